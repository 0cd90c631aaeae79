"""The one table of cases. Every file of tests runs it, or those of its rows that are `feature`s.

The row and key tiles of the tests are small (`ROWS`, `KEYS`, see conftest.py), so that lengths of a few
dozen cross several tiles.
"""

import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa
from jax_fa.testing import oracle
from jax_fa.testing.case_masks import KINDS, UNIONS, WITHIN_PACKED

ROWS, KEYS = 16, 32  # the tiles of the tests

_TO_STORED = {
    "BSND": lambda x: x,
    "SND": lambda x: x,
    "BNSD": lambda x: np.swapaxes(x, -2, -3),
    "NSD": lambda x: np.swapaxes(x, -2, -3),
    "SBND": lambda x: np.moveaxis(x, -3, 0),
}
_TO_CANONICAL = _TO_STORED | {"SBND": lambda x: np.moveaxis(x, 0, -3)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call. The letters are those of the library."""

    name: str
    B: tuple[int, ...] = (2,)
    Sq: int = 37
    Skv: int = 45
    N: int = 4
    K: int = 2
    D: int = 16
    Dv: int = 16
    dtype: str = "float32"
    layout: str = "BSND"
    mask: str | None = None  # a key of KINDS
    bias: str | None = None  # the last dims of a bias: letters of B N Q K (B: all batch dims), or 1
    bias_dtype: str | None = None
    slopes: str | None = None  # "N" or "BN"
    scale: float | None = None
    soft_cap: float | None = None
    dropout: float = 0.0
    spread: float | int = 1.0  # standard deviation of the logits, roughly: rows of a large one are peaked
    feature: bool = True  # differs from others by more than lengths

    def __str__(self) -> str:
        return self.name

    @property
    def full(self) -> tuple[int, ...]:
        return (*self.B, self.N, self.Sq, self.Skv)

    def random(self, salt: str) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(f"{self.name}/{salt}".encode()))

    def context(self):
        """Float64 needs x64, which is off otherwise."""
        return jax.enable_x64(True) if self.dtype == "float64" else nullcontext()

    def stored(self, x):
        return _TO_STORED[self.layout](x)

    def canonical(self, x) -> np.ndarray:
        return _TO_CANONICAL[self.layout](np.asarray(x))

    def cast(self, x, dtype: str | None = None) -> np.ndarray:
        return np.asarray(x).astype(jnp.dtype(dtype or self.dtype))

    @property
    def acc(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    def shape_of(self, letters: str) -> tuple[int, ...]:
        """Of dims that are named as in `bias`."""
        sizes = {"N": (self.N,), "Q": (self.Sq,), "K": (self.Skv,), "1": (1,), "B": self.B}
        return sum((sizes[c] for c in letters), start=())

    @cache
    def operands(self) -> dict[str, np.ndarray]:
        """The differentiable operands, canonical."""
        normal = self.random("operands").standard_normal
        found = {
            "query": self.cast(self.spread * normal((*self.B, self.Sq, self.N, self.D))),
            "key": self.cast(normal((*self.B, self.Skv, self.K, self.D))),
            "value": self.cast(normal((*self.B, self.Skv, self.K, self.Dv))),
        }
        if self.bias is not None:
            found["bias"] = self.cast(normal(self.shape_of(self.bias)), self.bias_dtype)
        if self.slopes is not None:
            shape = (self.N,) if self.slopes == "N" else (*self.B, self.N)
            found["alibi_slopes"] = self.cast(np.abs(normal(shape)) / 8, self.acc)
        return found

    @cache
    def cotangents(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the output (canonical) and of the log-sum-exp."""
        normal = self.random("cotangents").standard_normal
        dout = self.cast(normal((*self.B, self.Sq, self.N, self.Dv)))
        return dout, self.cast(normal((*self.B, self.N, self.Sq)), self.acc)

    def dropout_key(self):
        return jax.random.key(zlib.crc32(self.name.encode()) % 1000)

    def seed(self) -> np.ndarray:
        """The Philox key that a `jax.random` key stands for."""
        return np.asarray(jax.random.bits(self.dropout_key(), (2,), jnp.uint32))

    def visible(self) -> np.ndarray | None:
        return None if self.mask is None else KINDS[self.mask].visible(self)

    def position(self) -> np.ndarray:
        return np.arange(self.Sq) if self.mask is None else KINDS[self.mask].position(self)

    @property
    def keep_prob(self) -> float:
        """Of 2**16 numbers, how many keep their weight."""
        return round((1 - self.dropout) * 65536) / 65536

    def keep(self) -> np.ndarray | None:
        return oracle.keep_bits(self.seed(), self.full, self.keep_prob) if self.dropout else None

    def library_mask(self):
        return None if self.mask is None else KINDS[self.mask].make(self)

    def arrays(self) -> dict[str, Any]:
        """The operands without a gradient."""
        return {"mask": self.library_mask(), "dropout_key": self.dropout_key() if self.dropout else None}

    def flash_attention(self, operands: dict[str, Any], **options):
        """The library's result (out, log-sum-exp) for operands stored in the layout."""
        return jax_fa.flash_attention(
            **operands,
            **self.arrays() | options,
            scale=self.scale,
            logits_soft_cap=self.soft_cap,
            dropout_rate=self.dropout,
            layout=self.layout,
            return_logsumexp=True,
        )

    def stored_operands(self) -> dict[str, np.ndarray]:
        laid = ("query", "key", "value")
        return {name: self.stored(x) if name in laid else x for name, x in self.operands().items()}

    def gradient(self, operands: dict[str, Any], dout, dlse, **options):
        """(out, log-sum-exp) and the gradients of all operands, by name, as the library stores them."""
        results, pullback = jax.vjp(lambda x: self.flash_attention(x, **options), operands)
        return results, pullback((dout, dlse))[0]

    def canonical_gradients(self, gradients) -> dict[str, np.ndarray]:
        laid = ("query", "key", "value")
        return {n: self.canonical(g) if n in laid else np.asarray(g) for n, g in gradients.items()}


@cache
def expected(case: Case) -> tuple[oracle.Attention, dict[str, np.ndarray]]:
    """The oracle's results and gradients."""
    x = case.operands()
    found = oracle.attention(
        x["query"],
        x["key"],
        x["value"],
        bias=x.get("bias"),
        slopes=x.get("alibi_slopes"),
        visible=case.visible(),
        scale=case.scale,
        soft_cap=case.soft_cap,
        position=case.position(),
        keep=case.keep(),
        keep_prob=case.keep_prob,
    )
    return found, found.gradients(*case.cotangents())


@cache
def naive(case: Case):
    """The naive implementation's out, log-sum-exp and gradients.

    Float64 and empty calls are measured by the floor alone.
    """
    if case.dtype == "float64" or 0 in case.full:
        found, gradients = expected(case)
        return found.out, found.lse, gradients
    visible = case.visible()
    found = oracle.naive(
        case.operands(),
        np.broadcast_to(True if visible is None else visible, case.full),
        case.keep(),
        case.cotangents(),
        scale=np.float32(case.D**-0.5 if case.scale is None else case.scale),
        soft_cap=None if case.soft_cap is None else np.float32(case.soft_cap),
        keep_prob=np.float32(case.keep_prob),
        position=np.broadcast_to(case.position(), (*case.B, 1, case.Sq)),
    )
    return jax.tree.map(np.asarray, found)


def check(case: Case, out=None, lse=None, gradients=None) -> None:
    """Holds results of the library (stored in the case's layout) against the oracle."""
    want, want_gradients = expected(case)
    naive_out, naive_lse, naive_gradients = naive(case)
    # Float32 knows a logit x to x / 2**24, and its weight no better.
    wide = max(1.0, case.spread / 100)
    floor = oracle.FLOOR[case.dtype] * (wide if case.dtype == case.acc else 1)
    if out is not None:
        assert out.dtype == jnp.dtype(case.dtype)
        oracle.assert_close_to_oracle(case.canonical(out), want.out, naive_out, f"{case}: out", floor)
    if lse is not None:
        assert lse.dtype == jnp.dtype(case.acc)
        stats_floor = oracle.FLOOR[case.acc]
        oracle.assert_close_to_oracle(lse, want.lse, naive_lse, f"{case}: log-sum-exp", stats_floor)
    if gradients is not None:
        assert sorted(gradients) == sorted(want_gradients)
        for name, g in case.canonical_gradients(gradients).items():
            given = case.operands()[name]
            assert g.dtype == given.dtype and g.shape == given.shape, (name, g.dtype, g.shape)
            what = f"{case}: gradient of {name}"
            # The floor is relative to the terms of a sum (see oracle), of which most may cancel.
            times = max(1.0, want.cancellation.get(name, 1.0))
            oracle.assert_close_to_oracle(g, want_gradients[name], naive_gradients[name], what, times * floor)


# --- the table

_LENGTHS = (
    (1, 1),
    (1, 2 * KEYS + 3),
    (7, KEYS - 1),
    (ROWS - 1, KEYS),
    (ROWS, KEYS + 1),
    (ROWS + 1, 7),
    (2 * ROWS, 2 * KEYS),
    (2 * ROWS + 3, 1),
    (61, 67),
)
_LENGTHS_CAUSAL = ((7, 7), (2 * ROWS, KEYS), (2 * KEYS + 3, 2 * KEYS + 3), (1, KEYS + 1), (53, 19))
_EMPTY: tuple[dict[str, Any], ...] = ({"Sq": 0}, {"Skv": 0}, {"Sq": 0, "Skv": 0}, {"B": (0,)})
_BIASES = ("BNQK", "NQK", "B1QK", "BN1K", "BNQ1", "B11K", "1N11", "QK", "Q1", "K", "1", "")
_ALL: dict[str, Any] = {
    "mask": "causal_bottom_lengths",
    "bias": "1NQK",
    "slopes": "N",
    "soft_cap": 4.0,
    "dropout": 0.25,
}
_HALVES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("plain", {"D": 64, "Dv": 64}),
    ("causal", {"mask": "causal", "Sq": 61, "Skv": 67}),
    ("bias", {"bias": "BNQK", "bias_dtype": "float32"}),
)

CASES: tuple[Case, ...] = (
    *(Case(name=f"lengths-{a}-{b}", Sq=a, Skv=b, feature=False) for a, b in _LENGTHS),
    *(
        Case(name=f"causal-{a}-{b}", Sq=a, Skv=b, mask="causal_bottom", feature=False)
        for a, b in _LENGTHS_CAUSAL
    ),
    *(
        Case(name="empty-" + "-".join(f"{k}" for k in sizes), bias="BNQK", slopes="N", feature=False, **sizes)
        for sizes in _EMPTY
    ),
    Case(name="mha", N=3, K=3),
    Case(name="mqa", N=3, K=1, mask="causal"),
    Case(name="gqa", N=6, K=2, D=8, Dv=8, bias="BNQK", feature=False),
    Case(name="one-head", N=1, K=1, D=5, Dv=7, mask="causal_bottom", feature=False),
    Case(name="wide-values", D=8, Dv=24, mask="causal"),
    Case(name="narrow-values", D=24, Dv=1, feature=False),
    Case(name="no-batch", B=(), mask="window", bias="NQK"),
    Case(name="two-batch-dims", B=(2, 3), mask="lengths", bias="BNQK", slopes="BN", N=2, K=1),
    Case(name="batch-of-one", B=(1, 2, 1), mask="prefix", bias="B11K", dropout=0.5, N=2, K=1, feature=False),
    *(
        Case(name=f"mask-{kind}", mask=kind, feature=not kind.startswith("dense"))
        for kind in KINDS
        if kind not in (*WITHIN_PACKED, *UNIONS)
    ),
    *(Case(name=f"bias-{shape or 'scalar'}", bias=shape, feature=False) for shape in _BIASES),
    Case(name="bias-causal", bias="1NQK", mask="causal"),
    Case(name="slopes", slopes="N", N=6),
    Case(name="slopes-batch", slopes="BN", mask="causal", feature=False),
    Case(name="soft-cap", soft_cap=2.0, mask="causal"),
    Case(name="scale", scale=0.7, mask="window_bottom", feature=False),
    Case(name="scale-zero", scale=0.0, bias="QK", feature=False),
    Case(name="scale-negative", scale=-0.3, feature=False),
    Case(name="dropout", dropout=0.3),
    Case(name="dropout-causal", dropout=0.1, mask="causal", N=6, K=3, feature=False),
    Case(name="everything", **_ALL),
    Case(name="everything-BNSD", layout="BNSD", **_ALL),
    Case(name="layout-BNSD", layout="BNSD", B=(2, 1), mask="causal", feature=False),
    Case(name="layout-SBND", layout="SBND", mask="causal", bias="B1QK"),
    Case(name="layout-SND", layout="SND", B=(), mask="causal", feature=False),
    Case(name="layout-NSD", layout="NSD", B=(), dropout=0.2, feature=False),
    *(
        Case(name=f"{dtype}-{name}", dtype=dtype, feature=False, **options)
        for dtype in ("bfloat16", "float16")
        for name, options in _HALVES
    ),
    *(
        Case(
            name=f"{dtype}-peaked-{spread}", dtype=dtype, spread=spread, mask=mask, D=32, Dv=32, feature=False
        )
        for dtype in ("float32", "bfloat16", "float16")
        for spread, mask in ((50, None), (500, "causal"))
    ),
    Case(name="bfloat16-everything", dtype="bfloat16", **_ALL),
    Case(name="float16-layout", dtype="float16", layout="SBND", bias="NQK", feature=False),
    Case(name="float64-plain", dtype="float64", feature=False),
    Case(name="float64-segments", dtype="float64", mask="segments_window", B=(1,), feature=False),
    Case(name="float64-everything", dtype="float64", feature=False, **_ALL),
)
BY_NAME = {case.name: case for case in CASES}
FEATURES = tuple(case for case in CASES if case.feature)
# Run with the tiles of the library, which the long ones cross and the others do not fill.
REAL_TILES = (
    *(
        BY_NAME[name]
        for name in ("bias-BNQK", "mask-lengths", "dropout-causal", "everything", "bfloat16-causal")
    ),
    Case(name="real-causal", B=(1,), Sq=1030, Skv=1030, N=2, K=1, mask="causal"),
    Case(name="real-bias", B=(1,), Sq=1290, Skv=1100, N=2, K=1, bias="1NQK", mask="segments"),
    Case(name="real-bfloat16", B=(1,), Sq=1100, Skv=1030, N=2, K=2, dtype="bfloat16", mask="window_bottom"),
)
assert len(BY_NAME) == len(CASES)
