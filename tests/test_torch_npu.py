"""Calls of torch_npu as public training code makes them, on every backend, against the NumPy of npu_oracle.py.

Each row of the table is one call, written as it stands in such code: the same positions, names and kinds of values
(`jax_fa` in the place of `torch_npu`). The numbers are our own. Names say where calls of this form are found.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa.backends import native
from jax_fa.backends.ascend import installation
from jax_fa.testing import cann_oracle, npu_oracle
from jax_fa.testing import oracle as common

C = np.triu(np.ones((2048, 2048), bool), 1)  # the compressed mask of the causal and band modes
C6 = np.concatenate([C, np.repeat([[False, True]], 1024, axis=1).repeat(1024, axis=0)])
MAX = 2147483647

BACKENDS = [
    "xla",
    pytest.param("cpu", marks=pytest.mark.skipif(native.missing is not None, reason="no native kernels")),
    pytest.param(
        "ascend", marks=pytest.mark.skipif(installation.absence() is not None, reason="no CANN adapter")
    ),
]


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


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("row", ROWS, ids=str)
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
