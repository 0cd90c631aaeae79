"""CANN's constants: limits, sparse modes, compressed masks, and a call's arguments in CANN's own form.

It imports nothing else of jax_fa, so that the entry above and the Ascend backend below share it.

Sparse modes, with `d = Skv - Sq` (in layout TND every letter is that of one sequence):

    mode  key j is visible to row i where                       atten_mask
    0     i - pre <= j <= i + next, and not masked              full (optional)
    1     not masked                                            full (optional)
    2     j <= i                                                compressed
    3     j <= i + d                                            compressed
    4     i + d - pre <= j <= i + d + next                      compressed
    5     j <= i + d or j < prefix[b], and not masked           full; not TND
    6     j <= i + d or j < prefix[b]                           compressed with prefix
    7     j <= i + d, in the last sequence j <= i + d + next    compressed; TND only
    8     j <= i, in the first sequence j <= i + d + next       compressed; TND only

(Last and first of the sequences that have rows.) A mask of 1 masks a key. CANN itself ignores the mode and the tokens of
a call without atten_mask, and in mode 0 uses the tokens to skip blocks only.

Source: aclnnFlashAttentionScoreV2 (sparseMode) and aclnnFlashAttentionVarLenScoreV4 in the CANN operator library's
documentation; ops-transformer `docs/context` on sparse modes.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

DTYPES = ("float16", "bfloat16", "float32")
LANES = 8  # copies of each softmax statistic: the vector unit reads blocks of 32 bytes
MAX_HEADS = 256
MAX_LENGTH = 2**20
MAX_HEAD_DIM = 768
HEAD_DIM_BLOCK = 16  # head_dim is padded to multiples of this
ROW_BLOCK = 128  # rows that one step of the operator takes
MAX_BATCH, MAX_BATCH_PREFIX, MAX_SEQUENCES_PREFIX = 2 * 2**20, 2 * 2**10, 2**10
MAX_SEQUENCES = 20000  # whose lengths one call of the operator has room for

MODES, PACKED_MODES = (0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 4, 6, 7, 8)  # the latter in layout TND
FULL_MASK_MODES = (0, 1, 5)  # atten_mask is read; in the others it is compressed
PREFIX_MODES = (5, 6)
TOKEN_MODES = (0, 4)  # both token counts are read
UNBOUNDED = 2147483647  # of pre_tokens and next_tokens: what CANN's callers pass for "all tokens"
MASK_SIDE, PREFIX_ROWS = (
    2048,
    1024,
)  # a compressed mask is MASK_SIDE squared; for mode 6 with so many rows more

PSE_TYPES = (0, 1, 2, 3)
ALIBI_TYPES: dict[int, Literal["linear", "sqrt"]] = {2: "linear", 3: "sqrt"}  # pse holds slopes of a distance
ALIBI_ROWS = 1024  # of a pse that holds the last rows of an ALiBi table

# aclnnFlashAttentionScoreWithLargeHeadDim, an operator of its own.
LARGE_HEAD_DIM, LARGE_HEAD_DIM_KEYS = 576, 1024  # at most; more keys than this


@functools.cache
def compressed_mask(prefix: bool) -> np.ndarray:
    """The mask that CANN requires in modes 2 to 4, 7 and 8 (`prefix`: in mode 6), 1 = masked."""
    causal = np.triu(np.ones((MASK_SIDE, MASK_SIDE), np.uint8), 1)
    if not prefix:
        return causal
    below = np.zeros((PREFIX_ROWS, MASK_SIDE), np.uint8)
    below[:, MASK_SIDE // 2 :] = 1
    return np.concatenate([causal, below])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("pse", "mask"),
    meta_fields=(
        "sizes",
        "sparse_mode",
        "pre_tokens",
        "next_tokens",
        "prefix",
        "actual_seq_qlen",
        "actual_seq_kvlen",
        "pse_type",
        "starts",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What a `flash_attention_score` call was given, for the backend that passes it on (`Operands.hints`).

    All but the arrays is known when tracing; where it is not (lengths or a prefix given as arrays), a call has none.
    """

    sizes: tuple[Any, ...]  # (*B, N, Sq, Skv): a call of other sizes is a part of it, or many
    sparse_mode: int
    pre_tokens: int
    next_tokens: int
    prefix: tuple[int, ...] | None = None
    actual_seq_qlen: tuple[int, ...] | None = None  # layout TND
    actual_seq_kvlen: tuple[int, ...] | None = None
    pse_type: int = 1
    starts: tuple[int, int] = (0, 0)  # of the positions of rows and keys, for slopes
    pse: Any = None  # as it was given, behind batch dims of size 1
    mask: Any = None  # likewise: a full atten_mask of layout TND
