"""Calls of torch_npu as public training code makes them, on every backend, against the NumPy of npu_oracle.py.

Each row of the table is one call, written as it stands in such code: the same positions, names and kinds of values
(`jax_fa` in the place of `torch_npu`). The numbers are our own. Names say where calls of this form are found.
"""

import inspect
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import npu_oracle
import numpy as np
import pytest
from tables import some_pairs

import jax_fa
from jax_fa.backends import native
from jax_fa.backends.ascend import installation
from jax_fa.cann import score
from jax_fa.testing import cann_oracle
from jax_fa.testing import oracle as common

C = np.triu(np.ones((2048, 2048), bool), 1)  # the compressed mask of the causal and band modes
C6 = np.concatenate([C, np.repeat([[False, True]], 1024, axis=1).repeat(1024, axis=0)])
MAX = 2147483647

# Those that are present.
_ABSENT = {"cpu": native.missing is not None, "ascend": installation.absence() is not None}
BACKENDS = [name for name in ("xla", "cpu", "ascend") if not _ABSENT.get(name)]


@dataclass(frozen=True)
class Sizes:
    layout: str = "SBH"
    B: int = 2
    Sq: int = 24
    Skv: int = 24
    N: int = 4
    K: int = 4
    D: int = 16
    Dv: int = 16
    rope: int = 0
    ends: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    T: tuple[int, int] = (0, 0)

    def shape(self, heads: int, D: int, axis: int) -> tuple[int, ...]:
        S = (self.Sq, self.Skv)[axis]
        return {
            "SBH": (S, self.B, heads * D),
            "BSH": (self.B, S, heads * D),
            "BSND": (self.B, S, heads, D),
            "BNSD": (self.B, heads, S, D),
            "TND": (self.T[axis], heads, D),
        }[self.layout]


class Arrays:
    """What a row may name: q, k, v, and random arrays of its own."""

    def __init__(self, name: str, sizes: Sizes, dtype: str) -> None:
        self.rng, self.s, self.dtype = np.random.default_rng(zlib.crc32(name.encode())), sizes, dtype
        s = sizes
        self.q, self.k, self.v = (
            self.random(*s.shape(heads, D, axis))
            for heads, D, axis in ((s.N, s.D, 0), (s.K, s.D, 1), (s.K, s.Dv, 1))
        )
        self.q_rope, self.k_rope = (
            self.random(*s.shape(heads, max(s.rope, 1), axis)) for heads, axis in ((s.N, 0), (s.K, 1))
        )

    def random(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(self.dtype)

    def float32(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def slopes(self, *shape: int) -> np.ndarray:
        return (0.1 + self.rng.random(shape)).astype(np.float32)

    def mask(self, *shape: int) -> np.ndarray:
        """Every row has keys, but for the first of some."""
        found = self.rng.random(shape) < 0.3
        found[..., 0] = False
        return found

    def bits(self, count: int) -> np.ndarray:
        size = -(-count // 128) * 16
        return self.rng.integers(0, 256, size).astype(np.uint8)


Given = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    name: str
    call: Callable[[Arrays], Given]
    sizes: Sizes
    dtype: str = "float32"

    def __str__(self) -> str:
        return self.name


ROWS: list[Row] = []


def row(name: str, dtype: str = "float32", **sizes: Any):
    def add(call: Callable[[Arrays], Given]) -> Callable[[Arrays], Given]:
        ROWS.append(Row(name, call, Sizes(**sizes), dtype))
        return call

    return add


def given(*args: Any, **kwargs: Any) -> Given:
    """The arguments, as they stand in the call."""
    return args, kwargs


def causal(Sq: int, Skv: int) -> np.ndarray:
    return np.triu(np.ones((Sq, Skv), bool), 1)


# --- MindSpeed, Megatron


@row("mindspeed-dense-SBH", layout="SBH", dtype="bfloat16")
def _(x):
    return given(
        x.q, x.k, x.v, 4, "SBH", pse=None, padding_mask=None, atten_mask=causal(24, 24), scale=0.25,
        pre_tockens=65536, next_tockens=0, keep_prob=1.0, inner_precise=0, sparse_mode=0,
    )  # fmt: skip


@row("mindspeed-compressed", layout="SBH", K=2, dtype="bfloat16")
def _(x):
    return given(
        x.q, x.k, x.v, 4, "SBH", pse=None, padding_mask=None, atten_mask=C, scale=1.0 / 4, pre_tockens=65536,
        next_tockens=0, keep_prob=1.0, inner_precise=0, sparse_mode=2,
    )  # fmt: skip


@row("mindspeed-dropout", layout="SBH")
def _(x):
    return given(
        x.q, x.k, x.v, 4, "SBH", pse=None, padding_mask=None, atten_mask=C, scale=0.25, pre_tockens=65536,
        next_tockens=0, keep_prob=0.9, inner_precise=0, sparse_mode=2, gen_mask_parallel=True, sync=False,
        dropout_key=jax.random.key(7),
    )  # fmt: skip


@row("mindspeed-varlen", layout="TND", K=2, T=(40, 40), dtype="bfloat16")
def _(x):
    return given(
        x.q, x.k, x.v, 4, "TND", pse=None, padding_mask=None, atten_mask=C, scale=0.25, pre_tockens=65536,
        next_tockens=0, keep_prob=1.0, inner_precise=0, sparse_mode=3, actual_seq_qlen=[9, 24, 40],
        actual_seq_kvlen=[9, 24, 40],
    )  # fmt: skip


@row("mindspeed-varlen-TND-statistics", layout="TND", T=(40, 40))
def _(x):
    return given(
        x.q, x.k, x.v, 4, "TND", atten_mask=C, scale=0.25, sparse_mode=3, actual_seq_qlen=[9, 24, 40],
        actual_seq_kvlen=[9, 24, 40], softmax_layout="TND",
    )  # fmt: skip


@row("mindspeed-reset-attention-mask-EOD", layout="TND", T=(48, 48), dtype="bfloat16")
def _(x):
    """Fixed-size lists: the rest of the batch is padding, and so is the rest of the list."""
    return given(
        x.q, x.k, x.v, 4, "TND", atten_mask=C, scale=0.25, keep_prob=1.0, sparse_mode=3,
        actual_seq_qlen=np.array([7, 25, 40, 0, 0]), actual_seq_kvlen=np.array([7, 25, 40, 0, 0]),
    )  # fmt: skip


@row("mindspeed-alibi-in-kernel", layout="SBH")
def _(x):
    return given(
        x.q, x.k, x.v, 4, "SBH", pse=x.slopes(4), padding_mask=None, atten_mask=C, scale=0.25, pre_tockens=65536,
        next_tockens=0, keep_prob=1.0, inner_precise=0, sparse_mode=2, pse_type=2,
    )  # fmt: skip


@row("mindspeed-alibi-sqrt-of-a-context-block", layout="SBH")
def _(x):
    return given(
        x.q, x.k, x.v, 4, "SBH", pse=x.slopes(4), scale=0.25, sparse_mode=0, pse_type=3, q_start_idx=[48],
        kv_start_idx=[24],
    )  # fmt: skip


@row("mindspeed-alibi-table-of-a-bias", layout="SBH", dtype="bfloat16")
def _(x):
    return given(x.q, x.k, x.v, 4, "SBH", pse=x.random(2, 4, 24, 24), atten_mask=C, scale=0.25, sparse_mode=2)


@row("mindspeed-ring-diagonal-block", layout="SBH", K=2)
def _(x):
    return given(
        x.q, x.k, x.v, 4, "SBH", pse=None, padding_mask=None, atten_mask=C, scale=0.25, pre_tockens=24,
        next_tockens=0, keep_prob=1.0, sparse_mode=3,
    )  # fmt: skip


@row("mindspeed-ring-full-block", layout="SBH", Sq=12, K=2)
def _(x):
    """The mask is left out where the block is wholly visible; the mode is not."""
    return given(
        x.q, x.k, x.v, 4, "SBH", pse=None, padding_mask=None, atten_mask=None, scale=0.25, pre_tockens=24,
        next_tockens=24, keep_prob=1.0, sparse_mode=0,
    )  # fmt: skip


@row("mindspeed-ring-full-block-mode-3", layout="SBH", Sq=12)
def _(x):
    return given(x.q, x.k, x.v, 4, "SBH", None, None, None, 0.25, 1.0, 12, 0, 0, sparse_mode=3)


@row("mindspeed-ulysses-BSND", layout="BSND", dtype="bfloat16")
def _(x):
    return given(
        x.q, x.k, x.v, 4, "BSND", pse=None, padding_mask=None, atten_mask=C, scale=0.25, pre_tockens=2147483647,
        next_tockens=0, keep_prob=1.0, inner_precise=0, sparse_mode=3,
    )  # fmt: skip


@row("mindspeed-sliding-window", layout="SBH", Sq=40, Skv=40, dtype="bfloat16")
def _(x):
    return given(
        x.q, x.k, x.v, 4, "SBH", atten_mask=C, scale=0.25, pre_tockens=8, next_tockens=0, keep_prob=1.0,
        inner_precise=0, sparse_mode=4,
    )  # fmt: skip


@row("mindspeed-MLA", layout="SBH", D=24, Dv=16, dtype="bfloat16")
def _(x):
    return given(x.q, x.k, x.v, 4, "SBH", atten_mask=C, scale=24**-0.5, sparse_mode=2)


@row("mindspeed-MLA-rope-parts", layout="TND", rope=8, T=(30, 30), K=4)
def _(x):
    return given(
        x.q, x.k, x.v, 4, "TND", atten_mask=C, scale=24**-0.5, sparse_mode=3, actual_seq_qlen=[11, 30],
        actual_seq_kvlen=[11, 30], query_rope=x.q_rope, key_rope=x.k_rope,
    )  # fmt: skip


@row("mindspeed-rope-parts-SBH", layout="SBH", rope=8, K=2)
def _(x):
    return given(x.q, x.k, x.v, 4, "SBH", scale=24**-0.5, query_rope=x.q_rope, key_rope=x.k_rope)


@row("mindspeed-prefix-compressed", layout="SBH", Sq=20, Skv=24)
def _(x):
    return given(x.q, x.k, x.v, 4, "SBH", atten_mask=C6, scale=0.25, prefix=[6, 15], sparse_mode=6)


@row("mindspeed-cp-7", layout="TND", T=(24, 40))
def _(x):
    return given(
        x.q, x.k, x.v, 4, "TND", atten_mask=C, scale=0.25, pre_tockens=65536, next_tockens=-3, sparse_mode=7,
        actual_seq_qlen=[8, 24], actual_seq_kvlen=[15, 40],
    )  # fmt: skip


@row("mindspeed-cp-8", layout="TND", T=(24, 40))
def _(x):
    return given(
        x.q, x.k, x.v, 4, "TND", atten_mask=C, scale=0.25, pre_tockens=65536, next_tockens=2, sparse_mode=8,
        actual_seq_qlen=[8, 24], actual_seq_kvlen=[15, 40],
    )  # fmt: skip


@row("mindspeed-sink", layout="SBH", K=2)
def _(x):
    return given(x.q, x.k, x.v, 4, "SBH", atten_mask=C, scale=0.25, sparse_mode=2, sink=x.float32(4))


@row("mindspeed-sink-window-varlen", layout="TND", K=2, T=(40, 40))
def _(x):
    return given(
        x.q, x.k, x.v, 4, "TND", atten_mask=C, scale=0.25, pre_tockens=7, next_tockens=0, sparse_mode=4,
        actual_seq_qlen=[9, 24, 40], actual_seq_kvlen=[9, 24, 40], sink=x.float32(4),
    )  # fmt: skip


# --- ms-swift, transformers, LlamaFactory


@row("transformers-BSND", layout="BSND", K=2, dtype="bfloat16")
def _(x):
    return given(x.q, x.k, x.v, 4, "BSND", keep_prob=1.0, scale=0.25)


@row("transformers-BSND-causal", layout="BSND", K=2, Sq=10, dtype="bfloat16")
def _(x):
    return given(x.q, x.k, x.v, 4, "BSND", keep_prob=1.0, scale=0.25, atten_mask=C, sparse_mode=3)


@row("transformers-top-left-causal", layout="BSND", Sq=10)
def _(x):
    return given(x.q, x.k, x.v, 4, "BSND", keep_prob=1.0, scale=0.25, atten_mask=C, sparse_mode=2)


@row("transformers-varlen", layout="TND", T=(40, 50), K=2, dtype="bfloat16")
def _(x):
    return given(
        x.q, x.k, x.v, 4, "TND", pse=None, atten_mask=None, scale=0.25, keep_prob=1.0, actual_seq_qlen=(9, 24, 40),
        actual_seq_kvlen=(12, 30, 50),
    )  # fmt: skip


@row("transformers-varlen-causal", layout="TND", T=(40, 40), dtype="bfloat16")
def _(x):
    return given(
        x.q, x.k, x.v, 4, "TND", pse=None, padding_mask=None, atten_mask=C, scale=0.25, keep_prob=1,
        actual_seq_qlen=tuple([9, 24, 40]), actual_seq_kvlen=tuple([9, 24, 40]), sparse_mode=3,
    )  # fmt: skip


@row("ms-swift-padded-batch", layout="BNSD", dtype="bfloat16")
def _(x):
    padded = np.arange(24) >= np.array([24, 15])[:, None]
    mask = causal(24, 24) | padded[:, None, None, :]
    return given(x.q, x.k, x.v, 4, "BNSD", atten_mask=mask, scale=0.25, keep_prob=1.0)


@row("ms-swift-left-padding", layout="BNSD")
def _(x):
    """Rows of the padding are fully masked."""
    padded = np.arange(24) < np.array([0, 9])[:, None]
    mask = causal(24, 24) | padded[:, None, None, :]
    return given(
        x.q, x.k, x.v, 4, "BNSD", atten_mask=mask, scale=0.25, keep_prob=1.0, inner_precise=2, sparse_mode=1
    )


@row("llamafactory-SDPA", layout="BNSD", K=4, dtype="float16")
def _(x):
    return given(
        x.q, x.k, x.v, 4, "BNSD", pse=None, padding_mask=None, atten_mask=x.mask(2, 1, 24, 24), scale=0.25,
        keep_prob=1.0, pre_tockens=MAX, next_tockens=MAX, inner_precise=0, prefix=None, actual_seq_qlen=None,
        actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False,
    )  # fmt: skip


@row("llamafactory-neat-packing", layout="BNSD", B=1)
def _(x):
    ids = np.repeat([1, 2, 3], 8)
    return given(x.q, x.k, x.v, 4, "BNSD", atten_mask=(ids[:, None] != ids) | causal(24, 24), scale=0.25)


@row("verl-no-padding", layout="TND", T=(33, 33), K=1, dtype="bfloat16")
def _(x):
    ends = [5, 5, 33]  # a sequence without tokens
    return given(
        x.q, x.k, x.v, 4, "TND", atten_mask=C.astype(np.uint8), scale=0.25, keep_prob=1.0, actual_seq_qlen=ends,
        actual_seq_kvlen=ends, sparse_mode=3, inner_precise=0,
    )  # fmt: skip


# --- vllm-ascend, vision encoders


@row("vllm-ascend-vision", layout="TND", T=(36, 36), D=24, dtype="bfloat16")
def _(x):
    return given(
        x.q, x.k, x.v, 4, "TND", scale=24**-0.5, actual_seq_qlen=jnp.cumsum(jnp.array([16, 20])),
        actual_seq_kvlen=jnp.cumsum(jnp.array([16, 20])),
    )  # fmt: skip


@row("vllm-ascend-BSND", layout="BSND", D=8, Dv=8, dtype="float16")
def _(x):
    return given(query=x.q, key=x.k, value=x.v, head_num=4, input_layout="BSND", scale=8**-0.5)


@row("vllm-omni-mask", layout="BSND", Skv=30, dtype="bfloat16")
def _(x):
    return given(
        x.q, x.k, x.v, 4, input_layout="BSND", scale=0.25, atten_mask=x.mask(2, 1, 24, 30), pre_tockens=MAX,
        next_tockens=MAX,
    )  # fmt: skip


@row("vllm-decode-block", layout="BNSD", Sq=1, Skv=40, K=1)
def _(x):
    return given(x.q, x.k, x.v, 4, "BNSD", scale=0.25, atten_mask=x.mask(1, 1, 1, 40))


# --- diffusers


@row("diffusers-native-npu", layout="BSND", dtype="bfloat16")
def _(x):
    return given(
        x.q, x.k, x.v, 4, "BSND", pse=None, scale=0.25, pre_tockens=65536, next_tockens=65536, keep_prob=1.0,
        sync=False, inner_precise=0,
    )  # fmt: skip


@row("diffusers-AttnProcessorNPU", layout="BNSD", Skv=11, dtype="float16")
def _(x):
    return given(
        x.q, x.k, x.v, 4, input_layout="BNSD", pse=None, atten_mask=x.mask(2, 1, 24, 11), scale=0.25,
        pre_tockens=65536, next_tockens=65536, keep_prob=1.0, sync=False, inner_precise=0,
    )  # fmt: skip


@row("diffusers-cross-attention-BSH", layout="BSH", Skv=9, dtype="float16")
def _(x):
    return given(
        x.q, x.k, x.v, 4, "BSH", pse=None, atten_mask=None, scale=0.25, pre_tockens=2147483647,
        next_tockens=2147483647, keep_prob=1.0, sync=False,
    )  # fmt: skip


@row("opensora-BSH-mask-per-head", layout="BSH")
def _(x):
    return given(x.q, x.k, x.v, 4, "bsh", atten_mask=x.mask(2, 4, 24, 24).astype(np.uint8), scale=0.25)


@row("opensora-band-mask", layout="BNSD")
def _(x):
    i, j = np.arange(24)[:, None], np.arange(24)
    mask = (j < i - 6) | (j > i + 3)
    return given(
        x.q, x.k, x.v, 4, "BNSD", atten_mask=mask[None, None], scale=0.25, pre_tockens=6, next_tockens=3,
        sparse_mode=0,
    )  # fmt: skip


# --- MindSpore (its names mapped), documentation, tests of torch_npu


@row("mindspore-BSH-drop-mask", layout="BSH", dtype="float16")
def _(x):
    return given(
        x.q, x.k, x.v, 4, "BSH", atten_mask=C.astype(np.uint8), keep_prob=0.8, scale=0.25, pre_tockens=MAX,
        next_tockens=0, sparse_mode=2, dropout_mask=x.bits(2 * 4 * 24 * 24),
    )  # fmt: skip


@row("mindspore-real-shift", layout="BNSD", K=2)
def _(x):
    return given(
        x.q, x.k, x.v, 4, "BNSD", pse=x.random(1, 4, 24, 24), scale=0.25, atten_mask=C, sparse_mode=3
    )


@row("mindspore-real-shift-of-keys", layout="BSH", dtype="bfloat16")
def _(x):
    return given(x.q, x.k, x.v, 4, "BSH", pse=x.random(2, 4, 1, 24), scale=0.25)


@row("mindspore-prefix", layout="BSH")
def _(x):
    i, j = np.arange(24)[:, None], np.arange(24)
    mask = (j > i) & (j >= np.array([5, 12])[:, None, None])
    return given(x.q, x.k, x.v, 4, "BSH", atten_mask=mask[:, None], scale=0.25, prefix=[5, 12], sparse_mode=5)


@row("mindspore-TND-mask-of-the-longest", layout="TND", T=(34, 40))
def _(x):
    return given(
        x.q, x.k, x.v, 4, "TND", atten_mask=x.mask(15, 18), scale=0.25, actual_seq_qlen=[9, 24, 34],
        actual_seq_kvlen=[10, 28, 40], sparse_mode=1,
    )  # fmt: skip


@row("TND-mask-of-each-sequence-and-head", layout="TND", T=(34, 40))
def _(x):
    return given(
        x.q, x.k, x.v, 4, "TND", atten_mask=x.mask(3, 4, 15, 18), scale=0.25, actual_seq_qlen=[9, 24, 34],
        actual_seq_kvlen=[10, 28, 40], sparse_mode=1,
    )  # fmt: skip


@row("TND-dropout", layout="TND", K=2, T=(40, 40))
def _(x):
    return given(
        x.q, x.k, x.v, 4, "TND", atten_mask=C, scale=0.25, keep_prob=0.75, sparse_mode=3,
        actual_seq_qlen=[9, 24, 40], actual_seq_kvlen=[9, 24, 40], dropout_key=jax.random.key(3),
    )  # fmt: skip


@row("TND-pse-blocks", layout="TND", T=(20, 20))
def _(x):
    return given(
        x.q, x.k, x.v, 4, "TND", pse=x.random(4 * (81 + 121)), atten_mask=C, scale=0.25, sparse_mode=3,
        actual_seq_qlen=[9, 20], actual_seq_kvlen=[9, 20],
    )  # fmt: skip


@row("TND-pse-with-empty-sequences", layout="TND", T=(20, 22))
def _(x):
    """CANN itself does not take this."""
    return given(
        x.q, x.k, x.v, 4, "TND", pse=x.random(4 * (81 + 11 * 9)), scale=0.25, sparse_mode=1,
        actual_seq_qlen=[9, 9, 9, 20, 20], actual_seq_kvlen=[9, 9, 13, 22, 22],
    )  # fmt: skip


@row("a-mask-without-effect-of-tokens", layout="BNSD", Skv=30)
def _(x):
    return given(
        x.q, x.k, x.v, 4, "BNSD", atten_mask=x.mask(24, 30), scale=0.25, pre_tockens=3, sparse_mode=1
    )


@row("a-causal-mode-without-its-mask", layout="BNSD")
def _(x):
    """Every key is visible: CANN ignores the mode."""
    return given(
        x.q, x.k, x.v, 4, "BNSD", scale=0.25, pre_tockens=3, next_tockens=0, sparse_mode=4, prefix=[1]
    )


@row("everything-by-position", layout="BSND", K=2)
def _(x):
    return given(
        x.q, x.k, x.v, 4, "BSND", x.random(2, 4, 24, 24), None, x.mask(2, 1, 24, 24), 0.25, 0.5, MAX, MAX, 0, None,
        None, None, 0, True, False, "", x.float32(4), x.bits(2 * 4 * 24 * 24), 5, 6,
    )  # fmt: skip


@row("a-row-of-minus-infinity", layout="BNSD")
def _(x):
    pse = x.random(2, 4, 24, 24)
    pse[:, :, 5] = -np.inf
    pse[:, 1, 7, :20] = -np.inf
    return given(x.q, x.k, x.v, 4, "BNSD", pse=pse, scale=0.25)


@row("a-row-of-minus-infinity-causal-float16", layout="BNSD", dtype="float16")
def _(x):
    pse = x.random(2, 4, 24, 24)
    pse[0, :, :6] = -np.inf
    return given(x.q, x.k, x.v, 4, "BNSD", pse=pse, atten_mask=C, sparse_mode=2, scale=0.25)


@row("padded-tokens-of-minus-infinity-TND", layout="TND", T=(20, 20), dtype="bfloat16")
def _(x):
    pse = x.random(4 * (81 + 121))
    pse.reshape(-1)[: 4 * 81].reshape(4, 9, 9)[:, 4] = -np.inf
    return given(
        x.q, x.k, x.v, 4, "TND", pse=pse, atten_mask=C, scale=0.25, sparse_mode=3, actual_seq_qlen=[9, 20],
        actual_seq_kvlen=[9, 20],
    )  # fmt: skip


@row("a-row-of-the-lowest-number-causal", layout="BNSD")
def _(x):
    """Callers mask with it, too; in a row without other keys it masks nothing."""
    pse = x.random(2, 4, 24, 24)
    pse[:, :, 5] = pse[:, 1, 7, :20] = np.finfo(np.float32).min
    return given(x.q, x.k, x.v, 4, "BNSD", pse=pse, atten_mask=C, sparse_mode=2, pse_type=0, scale=0.25)


# --- running a row

PARAMETERS = ("query", "key", "value", "head_num", "input_layout", "pse", "padding_mask", "atten_mask", "scale",
              "keep_prob", "pre_tockens", "next_tockens", "inner_precise", "prefix", "actual_seq_qlen",
              "actual_seq_kvlen", "sparse_mode", "gen_mask_parallel", "sync", "softmax_layout", "sink", "dropout_mask",
              "seed", "offset")  # fmt: skip
DIFFERENTIABLE = ("query", "key", "value", "pse", "sink", "query_rope", "key_rope")


def named(given: Given) -> dict[str, Any]:
    args, kwargs = given
    return dict(zip(PARAMETERS, args, strict=False)) | kwargs


@cache
def made(row: Row) -> tuple[Given, np.ndarray]:
    """The arguments of the row, and a cotangent of attention."""
    x = Arrays(row.name, row.sizes, row.dtype)
    s = row.sizes
    return row.call(x), x.random(*s.shape(s.N, s.Dv, 0))


@cache
def expected(row: Row, naive: bool) -> dict[str, np.ndarray]:
    given, dy = made(row)
    arguments = named(given)
    key, keep = arguments.pop("dropout_key", None), None
    if key is not None:
        d, keep_prob = row.sizes, arguments["keep_prob"]
        shape = (1, d.N, *d.T) if row.sizes.layout == "TND" else (d.B, d.N, d.Sq, d.Skv)
        seed = np.asarray(jax.random.bits(key, (2,), jnp.uint32))
        keep = common.keep_bits(seed, shape, keep_prob)
        arguments["keep_prob"] = round(keep_prob * 65536) / 65536
    return npu_oracle.npu_fusion_attention(
        **arguments, keep=keep, dy=dy, dtype=np.dtype(row.dtype) if naive else None
    )


def called(row: Row, given: Given, arrays: dict[str, Any], **more: Any):
    """The call of the row, with other arrays in the place of its own."""
    args, kwargs = given
    args = tuple(arrays.get(name, x) for name, x in zip(PARAMETERS, args, strict=False))
    kwargs = {name: arrays.get(name, x) for name, x in kwargs.items()}
    return jax_fa.npu_fusion_attention(*args, **kwargs, **more)


def check(row: Row, found: dict[str, Any]) -> None:
    exact, naive = expected(row, False), expected(row, True)
    for name, x in found.items():
        dtype = "float32" if name in ("max", "sum", "sink") else row.dtype
        # Gradients of 16-bit calls: CANN takes delta from the rounded output.
        times = 8.0 if name not in ("attention", "max", "sum") else 1.0
        cann_oracle.assert_close(
            x,
            exact[name],
            np.asarray(naive[name]).astype(np.asarray(x).dtype),
            dtype,
            f"{row.name}: {name}",
            times,
        )


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("row", "on"), some_pairs(ROWS, BACKENDS, every=len(BACKENDS)), ids=str)
def test_calls_of_public_code(row, on):
    """Results, jax.grad's gradients, and those of npu_fusion_attention_grad, all of one program."""
    given, dy = made(row)
    arguments = named(given)
    arrays = {name: arguments[name] for name in DIFFERENTIABLE if arguments.get(name) is not None}
    own = {"implementation": on}

    @jax.jit
    def run(arrays, dy):
        def forward(arrays):
            result = called(row, given, arrays, **own)
            return result.attention, result

        _, pull, result = jax.vjp(forward, arrays, has_aux=True)
        again = arguments | arrays
        ropes = [again.pop(name, None) for name in ("query_rope", "key_rope")]
        if ropes[0] is not None:
            return result, pull(dy)[0], None
        again["scale_value"] = again.pop("scale")
        again |= {"softmax_max": result[1], "softmax_sum": result[2], "attention_in": result[0]}
        return result, pull(dy)[0], jax_fa.npu_fusion_attention_grad(dy=dy, **again, **own)

    result, gradients, again = run(arrays, dy)
    assert len(result) == 7 and result[3].shape == (0,)
    assert result[0].dtype == row.dtype and result[1].dtype == result[2].dtype == np.float32
    check(row, {"attention": result[0], "max": result[1], "sum": result[2]} | gradients)
    if again is not None:
        check(row, dict(zip(("query", "key", "value"), again[:3], strict=True)))
        for name, x in (("pse", again.dpse), ("sink", again.dsink)):
            if name in arrays:
                check(row, {name: x})
            else:
                assert x.shape == (0,)


def test_the_table_is_large():
    assert len(ROWS) >= 40 and len({row.name for row in ROWS}) == len(ROWS)


# --- the signatures


def test_positions_and_defaults_are_those_of_torch_npu():
    """As its schemas have them; what is ours comes after, by keyword."""
    forward = inspect.signature(jax_fa.npu_fusion_attention).parameters
    positional = [x for x in forward.values() if x.kind is not x.KEYWORD_ONLY]
    assert tuple(x.name for x in positional) == PARAMETERS
    defaults = (
        None,
        None,
        None,
        1.0,
        1.0,
        MAX,
        MAX,
        0,
        None,
        None,
        None,
        0,
        True,
        False,
        "",
        None,
        None,
        0,
        0,
    )
    assert tuple(x.default for x in positional[5:]) == defaults
    backward = inspect.signature(jax_fa.npu_fusion_attention_grad).parameters
    assert list(backward)[:6] == ["query", "key", "value", "dy", "head_num", "input_layout"]
    torch_npu = (
        "pse padding_mask atten_mask softmax_max softmax_sum softmax_in attention_in scale_value keep_prob "
    )
    torch_npu += (
        "pre_tockens next_tockens inner_precise seed offset numels prefix actual_seq_qlen actual_seq_kvlen "
    )
    torch_npu += "sparse_mode gen_mask_parallel sync softmax_layout sink"
    assert list(backward)[6 : 6 + len(torch_npu.split())] == torch_npu.split()


def test_results_have_torch_npus_order():
    q = np.ones((2, 8, 16), np.float32)
    attention, softmax_max, softmax_sum, softmax_out, seed, offset, numels = jax_fa.npu_fusion_attention(
        q, q, q, 2, "BSH", seed=5, offset=6
    )
    assert attention.shape == q.shape and softmax_max.shape == softmax_sum.shape == (2, 2, 8, 8)
    assert softmax_out.shape == (0,) and (seed, offset, numels) == (5, 6, 2 * 2 * 8 * 8)


# --- transformations

N, D, S = 4, 16, 24


def _arrays(*lead: int, count: int = 4):
    return np.random.default_rng(0).standard_normal((count, *lead, N, S, D)).astype(np.float32)


def _forward(on, q, k, v, **more):
    return jax_fa.npu_fusion_attention(
        q, k, v, N, "BNSD", atten_mask=C, scale=0.25, sparse_mode=2, implementation=on, **more
    )


def _backward(on, q, k, v, dy, softmax_max, softmax_sum, attention, **more):
    return jax_fa.npu_fusion_attention_grad(
        q, k, v, dy, N, "BNSD", atten_mask=C, softmax_max=softmax_max, softmax_sum=softmax_sum,
        attention_in=attention, scale_value=0.25, sparse_mode=2, implementation=on, **more
    )[:3]  # fmt: skip


@pytest.mark.parametrize("on", BACKENDS)
def test_vmap_and_jit_are_loops(on):
    x = _arrays(3, 2)

    def both(q, k, v, dy):
        attention, softmax_max, softmax_sum, *_ = _forward(on, q, k, v)
        return attention, softmax_max, *_backward(on, q, k, v, dy, softmax_max, softmax_sum, attention)

    mapped = jax.jit(jax.vmap(both))(*x)
    for i in range(3):
        for a, b in zip(mapped, both(*(y[i] for y in x)), strict=True):
            np.testing.assert_allclose(a[i], b, atol=2e-6)


@pytest.mark.parametrize("on", BACKENDS)
def test_derivatives_of_the_backward(on):
    """With statistics of its own, the backward entry is the gradient: so are its derivatives, in all arrays together."""
    q, k, v, dy = _arrays(2)

    def gradient(q, k, v, dy):
        return jax.vjp(lambda *x: _forward(on, *x).attention, q, k, v)[1](dy)

    def given(q, k, v, dy):
        attention, softmax_max, softmax_sum, *_ = _forward(on, q, k, v)
        return _backward(on, q, k, v, dy, softmax_max, softmax_sum, attention)

    along = tuple(np.cos(3 * x) for x in (q, k, v, dy))
    wanted, found = (
        jax.jit(lambda *x, f=f: jax.jvp(f, x[:4], x[4:]))(q, k, v, dy, *along) for f in (gradient, given)
    )
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    weights = tuple(np.sin(5 * x) for x in (q, k, v))
    wanted, found = (
        jax.jit(jax.grad(lambda *x, f=f: sum(map(jnp.vdot, f(*x), weights)), (0, 1, 2, 3)))(q, k, v, dy)
        for f in (gradient, given)
    )
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("moved", ["query", "key", "value", "dy", "softmax_max", "softmax_sum", "attention"])
def test_the_derivative_of_the_backward_in_one_array(moved, on):
    """The others stay, the statistics too: against differences of a formula in float64, with statistics of no call."""
    q, k, v, dy = _arrays(1)
    attention, softmax_max, softmax_sum, *_ = _forward("xla", q, k, v)
    given = {"query": q, "key": k, "value": v, "dy": dy, "softmax_max": softmax_max[..., :1] + 0.3}
    given |= {"softmax_sum": softmax_sum[..., :1] * 1.2, "attention": 0.7 * attention + 0.1}
    given = {name: np.asarray(x) for name, x in given.items()}
    weights = tuple(np.sin(5 * x) for x in (q, k, v))
    along = np.cos(3 * given[moved])

    def lanes(x):
        return {name: jnp.repeat(a, 8, -1) if "softmax" in name else a for name, a in x.items()}

    def total(x):
        return sum(map(jnp.vdot, _backward(on, *lanes(given | {moved: x}).values()), weights))

    def formula(x):
        q, k, v, dy, m, l, out = (y.astype(np.float64) for y in (given | {moved: x}).values())
        visible = np.tril(np.ones((S, S)))
        p = visible * np.exp(np.where(visible, 0.25 * q @ k.swapaxes(-1, -2) - m, 0)) / l
        ds = 0.25 * p * (dy @ v.swapaxes(-1, -2) - np.sum(dy * out, axis=-1, keepdims=True))
        found = ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dy
        return sum(map(np.vdot, found, weights))

    h = 1e-5
    at = given[moved].astype(np.float64)
    wanted = (formula(at + h * along) - formula(at - h * along)) / (2 * h)
    x = jnp.asarray(given[moved])
    np.testing.assert_allclose(total(x), formula(given[moved]), rtol=1e-4, atol=1e-3)
    gradient = jax.jit(jax.grad(total))(x)
    np.testing.assert_allclose(np.vdot(gradient, along), wanted, rtol=3e-4, atol=3e-3)


@pytest.mark.parametrize("empty", ["a sequence", "all"])
def test_derivatives_by_a_sink_without_keys(empty):
    """Rows without any key add nothing to the gradient of the sink, nor to its derivatives."""
    x, sink = _arrays(1)[:, 0].swapaxes(1, 2), np.linspace(-1, 2, N, dtype=np.float32)
    keys = 0 if empty == "all" else 5
    call = {"sink": sink, "actual_seq_qlen": [3, S], "actual_seq_kvlen": [keys, keys]}
    q, k, v, dy = x[0], x[1, :keys], x[2, :keys], x[3]
    attention, m, l, *_ = jax_fa.npu_fusion_attention(q, k, v, N, "TND", scale=0.25, **call)

    def dsink(sink, dy, m, l):
        return jax_fa.npu_fusion_attention_grad(
            q, k, v, dy, N, "TND", softmax_max=m, softmax_sum=l, attention_in=attention, scale_value=0.25,
            **call | {"sink": sink},
        ).dsink  # fmt: skip

    found = jax.jacobian(dsink, (0, 1, 2, 3))(sink, dy, m, l)
    assert all(np.isfinite(x).all() for x in found)
    # A weight of the sink is exp(sink - max) / sum, whose derivative is itself.
    np.testing.assert_allclose(found[0], np.diag(dsink(sink, dy, m, l)), atol=1e-6)


@pytest.mark.parametrize("layout", ["BSH", "SBH", "BSND", "BNSD", "TND"])
def test_gradients_of_rotated_parts(layout):
    """The operator's backward has them beside those of query and key, along head_dim."""
    s = Sizes(layout=layout, N=4, K=2, D=8, Dv=8, rope=4, T=(16, 12))
    x = Arrays("rotated parts", s, np.float32)
    call = {"head_num": s.N, "input_layout": layout, "scale_value": 0.3}
    if layout == "TND":
        call |= {"actual_seq_qlen": [11, s.T[0]], "actual_seq_kvlen": [9, s.T[1]]}

    def attend(q, k, v, q_rope, k_rope):
        found = jax_fa.flash_attention_score(q, k, v, query_rope=q_rope, key_rope=k_rope, **call)
        return found.attention_out, found

    arrays = x.q, x.k, x.v, x.q_rope, x.k_rope
    out, pull, (m, l, _) = jax.vjp(attend, *arrays, has_aux=True)
    dy = np.cos(3 * out)
    found = jax_fa.flash_attention_score_grad(
        *arrays[:3], dy, m, l, out, query_rope=x.q_rope, key_rope=x.k_rope, **call
    )
    wanted = pull(jnp.asarray(dy))

    def heads(a, count):
        return a.reshape(*a.shape[:2], count, -1) if layout in ("BSH", "SBH") else a

    for got, own, rope, count in (
        (found.dq, wanted[0], wanted[3], s.N),
        (found.dk, wanted[1], wanted[4], s.K),
    ):
        both = np.concatenate([heads(own, count), heads(rope, count)], axis=-1)
        assert got.shape == (*own.shape[:-1], own.shape[-1] + rope.shape[-1])
        np.testing.assert_allclose(heads(got, count), both, atol=2e-6)
    np.testing.assert_allclose(found.dv, wanted[2], atol=2e-6)


# --- context parallelism


def _merge(parts):
    """Outputs of blocks of keys, as context-parallel code joins them."""
    top = np.max([m for _, m, _ in parts], axis=0)
    sums = [l * np.exp(m - top) for _, m, l in parts]
    total = np.sum(sums, axis=0)
    out = np.sum([out * (l / total)[..., :1] for (out, _, _), l in zip(parts, sums, strict=True)], axis=0)
    return out.astype(np.float32), top, total


@pytest.mark.parametrize("on", BACKENDS)
def test_blocks_of_a_ring_are_the_whole(on):
    """Two devices hold half of the rows and keys each: a causal block, then one that all of the later rows see."""
    q, k, v, dy = _arrays(2)
    _, pull, whole = jax.vjp(lambda *x: (lambda r: (r.attention, r))(_forward(on, *x)), q, k, v, has_aux=True)
    half = S // 2
    first, second = np.s_[:, :, :half], np.s_[:, :, half:]
    blocks = [(first, first, 3, C), (second, second, 3, C), (second, first, 0, None)]

    def options(mode, mask):
        return {"sparse_mode": mode, "atten_mask": mask, "implementation": on}

    parts = [
        [np.asarray(x) for x in jax_fa.npu_fusion_attention(
            q[rows], k[keys], v[keys], N, "BNSD", scale=0.25, **options(*more))[:3]]
        for rows, keys, *more in blocks
    ]  # fmt: skip
    merged = [parts[0], _merge(parts[1:])]
    for i in range(3):
        found = np.concatenate([x[i] for x in merged], axis=2)
        np.testing.assert_allclose(found, whole[i], rtol=1e-6, atol=1e-6)
    gradients = [np.zeros_like(x) for x in (q, k, v)]
    for (rows, keys, *more), (out, m, l) in zip(blocks, [merged[0], merged[1], merged[1]], strict=True):
        dq, dk, dv, *_ = jax_fa.npu_fusion_attention_grad(
            q[rows], k[keys], v[keys], dy[rows], N, "BNSD", softmax_max=m, softmax_sum=l, attention_in=out,
            scale_value=0.25, **options(*more),
        )  # fmt: skip
        for total, at, part in zip(gradients, (rows, keys, keys), (dq, dk, dv), strict=True):
            total[at] += np.asarray(part)
    for found, wanted in zip(gradients, pull(dy), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.mark.parametrize("on", BACKENDS)
def test_gradients_of_a_sink_by_blocks_add_up(on):
    """With the merged statistics, each block of keys gives its share of the gradient of the sink, too."""
    q, k, v, dy = _arrays(2)
    sink = np.linspace(-1, 2, N, dtype=np.float32)

    def attend(q, k, v, sink):
        result = jax_fa.npu_fusion_attention(q, k, v, N, "BNSD", scale=0.25, sink=sink, implementation=on)
        return result.attention, result

    _, pull, whole = jax.vjp(attend, q, k, v, sink, has_aux=True)
    total = 0
    for keys in (np.s_[:, :, :7], np.s_[:, :, 7:]):
        found = jax_fa.npu_fusion_attention_grad(
            q, k[keys], v[keys], dy, N, "BNSD", softmax_max=whole[1], softmax_sum=whole[2], attention_in=whole[0],
            scale_value=0.25, sink=sink, implementation=on,
        )  # fmt: skip
        total += found.dsink
    np.testing.assert_allclose(total, pull(dy)[3], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("on", BACKENDS)
def test_cotangents_of_masked_rows_do_not_leak(on):
    """A fully masked row has no output: whatever its cotangent holds, no gradient has it."""
    q, k, v, dy = _arrays(2)
    mask = np.zeros((S, S), bool)
    mask[:3] = True
    given = {"atten_mask": mask, "sink": np.linspace(-1, 2, N, dtype=np.float32), "implementation": on}
    out, m, l, *_ = jax_fa.npu_fusion_attention(q, k, v, N, "BNSD", scale=0.25, **given)

    def gradients(filling):
        found = jax_fa.npu_fusion_attention_grad(
            q, k, v, np.where(mask[:, :1], np.float32(filling), dy), N, "BNSD", softmax_max=m, softmax_sum=l,
            attention_in=out, scale_value=0.25, **given,
        )  # fmt: skip
        return found.dq, found.dk, found.dv, found.dsink

    clean = gradients(0)
    assert np.all(clean[3] != 0)
    for filling in (np.nan, -np.inf):
        jax.tree.map(np.testing.assert_array_equal, gradients(filling), clean)


@pytest.mark.parametrize("on", BACKENDS)
def test_a_block_without_visible_keys_adds_nothing(on):
    """Whatever the merged statistics are; and rows that no block sees have gradients 0."""
    q, k, v, dy = _arrays(2)
    mask = np.ones((S, S), bool)
    out, m, l, *_ = jax_fa.npu_fusion_attention(
        q, k, v, N, "BNSD", atten_mask=mask, scale=0.25, implementation=on
    )
    assert (
        not np.any(out) and np.all(m == -np.finfo(np.float32).max) and np.all(l == np.finfo(np.float32).max)
    )
    for statistics in ((m, l), (np.zeros_like(m), np.ones_like(l))):
        found = jax_fa.npu_fusion_attention_grad(
            q, k, v, dy, N, "BNSD", atten_mask=mask, scale_value=0.25, softmax_max=statistics[0],
            softmax_sum=statistics[1], attention_in=q, implementation=on,
        )  # fmt: skip
        assert not any(np.any(x) for x in found[:3])


@pytest.mark.parametrize("layout", ["", "TND"])
@pytest.mark.parametrize("traced", [False, True])
def test_statistics_of_packed_sequences_go_round(layout, traced):
    """In torch_npu's order and in rows; the tail behind the last end too."""
    rng = np.random.default_rng(0)
    q, k, v, dy = rng.standard_normal((4, 20, N, D)).astype(np.float32)
    ends = [7, 7, 16, 0]

    def run(ends):
        given = {
            "actual_seq_qlen": ends,
            "actual_seq_kvlen": ends,
            "softmax_layout": layout,
            "sparse_mode": 3,
        }
        given |= {"atten_mask": C}

        def attend(*x):
            result = jax_fa.npu_fusion_attention(*x, N, "TND", scale=0.25, **given)
            return result.attention, result

        _, pull, result = jax.vjp(attend, q, k, v, has_aux=True)
        again = jax_fa.npu_fusion_attention_grad(
            q, k, v, dy, N, "TND", scale_value=0.25, softmax_max=result[1], softmax_sum=result[2],
            attention_in=result[0], **given,
        )  # fmt: skip
        return pull(dy), again[:3], result.numels

    gradients, again, numels = jax.jit(run)(jnp.array(ends)) if traced else run(ends)
    assert numels == (0 if traced else N * (7 * 7 + 9 * 9))
    for a, b in zip(gradients, again, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
        assert not np.any(a[16:])


# --- dropout


@pytest.mark.parametrize("on", BACKENDS)
def test_dropout_by_a_key_and_by_its_bits(on):
    q, k, v, dy = _arrays(2)
    key, keep_prob = jax.random.key(0), 0.75
    bits = jax_fa.dropout_mask(key, 1 - keep_prob, (2, N, S, S))

    def run(**how):
        attention, m, l, *_ = _forward(on, q, k, v, keep_prob=keep_prob, **how)
        return attention, *_backward(on, q, k, v, dy, m, l, attention, keep_prob=keep_prob, **how)

    for a, b in zip(run(dropout_key=key), run(dropout_mask=bits), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


# --- errors

Q = np.zeros((2, 8, 16), np.float32)
TND = np.zeros((8, 2, 16), np.float32)
LENGTHS = {"actual_seq_qlen": [3, 5], "actual_seq_kvlen": [3, 8]}
ERRORS = [
    ({"keep_prob": 0.5}, ValueError, "dropout_key must be a jax.random key, or dropout_mask be given"),
    (
        {"keep_prob": 0.5, "dropout_mask": np.zeros(3, np.uint8)},
        ValueError,
        "dropout_mask must have at least",
    ),
    (
        {"keep_prob": 0.5, "dropout_mask": np.zeros(64, np.uint8), "dropout_key": jax.random.key(0)},
        ValueError,
        "dropout_mask and dropout_key exclude each other",
    ),
    ({"dropout_key": 3}, TypeError, "dropout_key must be a jax.random key"),
    ({"scale": float("nan")}, ValueError, "scale must be finite"),
    ({"softmax_layout": "TND"}, ValueError, 'softmax_layout must be "", or "TND" with input_layout="TND"'),
    ({"sparse_mode": 7}, ValueError, "sparse_mode must be one of 0, 1, 2, 3, 4, 5, 6"),
    ({"pre_tockens": 1.5}, TypeError, "pre_tockens must be an int"),
    (
        {"pre_tockens": -9, "next_tockens": 3, "atten_mask": C, "sparse_mode": 4},
        ValueError,
        "pre_tockens and next_tockens do not fit sparse_mode=4: .*; got pre_tockens=-9, next_tockens=3",
    ),
    ({"sink": np.zeros(3, np.float32)}, ValueError, r"sink must have shape \(head_num,\)=\(2,\); got \(3,\)"),
    ({"sink": np.zeros(2, np.float16)}, TypeError, "sink must have dtype float32; got float16"),
    ({"query_rope": Q}, ValueError, "query_rope and key_rope go together; got key_rope=None"),
    ({"query_rope": Q[:, :4], "key_rope": Q}, ValueError, "query_rope must have the dtype float32 and"),
    (
        {"q_start_idx": [1, 2], "pse_type": 2, "pse": np.ones(2, np.float32)},
        TypeError,
        "q_start_idx must be a list",
    ),
    ({"sync": 3}, TypeError, "sync must be True or False"),
    ({"seed": "a"}, TypeError, "seed must be an int"),
    ({"scale_value": 1.0}, TypeError, "no argument 'scale_value'; pass scale instead"),
    ({"pre_tokens": 1}, TypeError, "no argument 'pre_tokens'; pass pre_tockens instead"),
    ({"actual_seq_qlen": [4, 8]}, ValueError, "actual_seq_qlen is for layout TND"),
]
ERRORS_TND = [
    (
        {"actual_seq_qlen": None, "actual_seq_kvlen": [8]},
        ValueError,
        "actual_seq_qlen must hold the cumulative lengths",
    ),
    (LENGTHS, ValueError, r"whose sum is query's T=8, as if these were lengths. For lengths pass \(3, 8\)"),
    (
        LENGTHS | {"actual_seq_qlen": np.array([5, 3])},
        ValueError,
        r"as if these were lengths. For lengths pass \(5, 8\)",
    ),
    (
        {"actual_seq_qlen": jnp.array([4, 4, 0]), "actual_seq_kvlen": [4, 8, 0]},
        ValueError,
        r"For lengths pass \(4, 8, 8\)",
    ),
    ({"actual_seq_qlen": [4, 9], "actual_seq_kvlen": [4, 8]}, ValueError, "must end at most at query's T=8"),
]
GRAD_ERRORS = [
    (
        {"softmax_max": None},
        TypeError,
        "softmax_max must be the float32 array that the forward gave; got None",
    ),
    ({"softmax_sum": np.ones((2, 2, 8, 8), np.float16)}, TypeError, "softmax_sum must have dtype float32"),
    (
        {"softmax_sum": np.ones((2, 2, 8), np.float32)},
        ValueError,
        r"softmax_sum must have shape \(B, N, Sq, 8\)=",
    ),
    ({"attention_in": None}, TypeError, "attention_in must be an array like attention_out; got None"),
    (
        {"attention_in": Q[:, :4]},
        ValueError,
        r"attention_in must have the shape of attention_out, \(2, 8, 16\)",
    ),
    ({"dy": Q.astype(np.float16)}, TypeError, "dy must have query's dtype float32; got float16"),
]


@pytest.mark.parametrize(("given", "kind", "text"), ERRORS, ids=range(len(ERRORS)))
def test_errors(given, kind, text, no_type_checker):
    with pytest.raises(kind, match=text):
        jax_fa.npu_fusion_attention(Q, Q, Q, 2, "BSH", **given)


@pytest.mark.parametrize(("given", "kind", "text"), ERRORS_TND, ids=range(len(ERRORS_TND)))
def test_errors_of_packed_sequences(given, kind, text, no_type_checker):
    with pytest.raises(kind, match=text):
        jax_fa.npu_fusion_attention(TND, TND, TND, 2, "TND", **given)


@pytest.mark.parametrize(("given", "kind", "text"), GRAD_ERRORS, ids=range(len(GRAD_ERRORS)))
def test_errors_of_the_backward(given, kind, text, no_type_checker):
    statistics = np.ones((2, 2, 8, 8), np.float32)
    whole = {"dy": Q, "softmax_max": statistics, "softmax_sum": statistics, "attention_in": Q} | given
    with pytest.raises(kind, match=text):
        jax_fa.npu_fusion_attention_grad(Q, Q, Q, head_num=2, input_layout="BSH", **whole)


def test_a_million_tokens_at_most():
    T = 2**20 + 1
    x = jax.ShapeDtypeStruct((T, 1, 16), jnp.bfloat16)
    for run in (
        lambda x: jax_fa.npu_fusion_attention(x, x, x, 1, "TND", actual_seq_qlen=[T], actual_seq_kvlen=[T]),
        lambda x: jax_fa.npu_fusion_attention(
            x, x, x, 1, "TND", actual_seq_qlen=jnp.array([T]), actual_seq_kvlen=jnp.array([T])
        ),
    ):
        with pytest.raises(ValueError, match=f"query must have T of at most {2**20}; got {T}"):
            jax.eval_shape(run, x)


def test_the_operators_entry_says_once_what_it_applies():
    score._warned = False
    run = lambda **more: jax_fa.flash_attention_score(Q, Q, Q, head_num=2, **more)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run()
        run(sparse_mode=2, atten_mask=C)
        assert not said
        run(sparse_mode=2)
        run(next_tokens=0)
        assert [str(w.message) for w in said] == [str(said[0].message)] and "sparse_mode=2" in str(
            said[0].message
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax_fa.npu_fusion_attention(Q, Q, Q, 2, "BSH", sparse_mode=2)


def test_explained():
    x = jax.ShapeDtypeStruct((2, 8, 16), jnp.bfloat16)
    assert jax_fa.explain(x, x, x, 2, "BSH", scale=0.5).entry == "npu_fusion_attention"
    assert jax_fa.explain(x, x, x, head_num=2, input_layout="BSH", scale=0.5).entry == "npu_fusion_attention"
    assert jax_fa.explain(x, x, x, head_num=2).entry == "flash_attention_score"


@pytest.mark.parametrize("on", BACKENDS)
def test_a_pse_that_overflows_once_scaled_masks(on):
    """In float32, as all backends compute it: such a row is fully masked."""
    q, k, v, _ = _arrays(1)
    pse = np.zeros((1, N, S, S), np.float32)
    pse[:, :, :, 3] = pse[:, :, 9] = -3e38
    out, pull = jax.vjp(
        lambda *x: jax_fa.npu_fusion_attention(*x, N, "BNSD", pse=pse, scale=2.0, implementation=on)[0],
        q,
        k,
        v,
    )
    gradients = pull(out)
    pse[pse < 0] = -np.inf
    wanted = jax_fa.npu_fusion_attention(q, k, v, N, "BNSD", pse=pse, scale=2.0, implementation="xla")[0]
    np.testing.assert_allclose(out, wanted, atol=5e-6)
    assert not np.any(out[:, :, 9]) and not np.any(gradients[1][:, :, 3]) and np.isfinite(gradients[0]).all()
