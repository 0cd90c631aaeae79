"""Holds outputs, log-sum-exp and gradients against float64 NumPy, next to `jax.nn.dot_product_attention`.

A case is ok where our error is at most twice that of jax.nn (which works in the same dtype) plus a few units
in the last place of the largest value.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa.demo import baseline

FACTOR = 2.0  # of jax.nn's error
FLOOR = 8.0  # units of the dtype's epsilon, relative to the largest value


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: sizes, dtype, the shapes of optional arrays and the static arguments."""

    name: str
    dtype: str = "float32"
    B: int = 2
    Sq: int = 160
    Skv: int = 160
    N: int = 4
    K: int = 4
    D: int = 32
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    query_seq_lengths: tuple[int, ...] | None = None
    key_value_seq_lengths: tuple[int, ...] | None = None
    static: dict[str, Any] = field(default_factory=dict)


_CAUSAL = {"is_causal": True}
_WINDOW = {"local_window_size": 100}
QUICK_CASES = (
    Case(name="full"),
    Case(name="causal", static=_CAUSAL),
    Case(name="causal, several key tiles", B=1, Sq=1100, Skv=1100, N=2, K=2, static=_CAUSAL),
    Case(name="causal", dtype="bfloat16", static=_CAUSAL),
    Case(name="causal", dtype="float16", static=_CAUSAL),
    Case(name="causal, 4 heads on 2", K=2, static=_CAUSAL),
    Case(name="window 40 back, 10 ahead", static={"local_window_size": (40, 10)}),
    Case(name="bias (1, N, Sq, Skv), mask (B, 1, 1, Skv)", bias=(1, 4, 160, 160), mask=(2, 1, 1, 160)),
    Case(name="lengths, Sq != Skv", Sq=96, query_seq_lengths=(96, 41), key_value_seq_lengths=(7, 160)),
)
CASES = (
    *QUICK_CASES,
    Case(name="full", dtype="bfloat16"),
    Case(name="full", dtype="float16"),
    Case(name="causal, 4 heads on 1", dtype="bfloat16", K=1, static=_CAUSAL),
    Case(name="causal, head_dim 128", D=128, static=_CAUSAL),
    Case(name="causal, Sq > Skv", Sq=200, Skv=70, static=_CAUSAL),
    Case(name="causal window 33", static={"is_causal": True, "local_window_size": (32, 0)}),
    Case(name="window, several key tiles", B=1, Sq=1100, Skv=1100, N=2, K=2, static=_WINDOW),
    Case(name="bias (N, 1, Skv)", bias=(4, 1, 160), dtype="bfloat16"),
    Case(name="bias (Sq, Skv), causal", bias=(160, 160), static=_CAUSAL),
    Case(name="mask (B, N, Sq, Skv), causal", mask=(2, 4, 160, 160), static=_CAUSAL),
    Case(name="lengths, causal, heads on 2", K=2, key_value_seq_lengths=(100, 31), static=_CAUSAL),
    Case(name="scale 0.3", static={"scale": 0.3}),
    Case(name="one query, long keys", Sq=1, Skv=1500),
)


class Errors(NamedTuple):
    """Largest error over largest value, of what one call gives."""

    out: float
    lse: float
    gradients: float


@dataclass(frozen=True, kw_only=True)
class Result:
    case: Case
    jax_nn: Errors
    ours: Errors | None = None
    refused: str | None = None  # why the backend that was asked for does not serve this case

    @property
    def ok(self) -> bool:
        if self.ours is None:
            return True
        floor = FLOOR * float(jnp.finfo(self.case.dtype).eps)
        pairs = zip(self.ours, self.jax_nn, strict=True)
        return all(ours <= FACTOR * theirs + floor for ours, theirs in pairs)  # False for NaN, too


def check(case: Case, attention: Callable[..., Any]) -> Result:
    """Runs a case with `attention` and with jax.nn, and measures both against float64."""
    arrays = _arrays(case)
    wanted = _float64(case, **arrays)
    jax_nn = _errors(_run(case, baseline.attention, **arrays), wanted)
    try:
        ours = _errors(_run(case, attention, **arrays), wanted)
    except NotImplementedError as error:
        return Result(case=case, jax_nn=jax_nn, refused=str(error))
    return Result(case=case, jax_nn=jax_nn, ours=ours)


def _arrays(case: Case) -> dict[str, Any]:
    """Operands and the cotangent of the output, rounded to the case's dtype."""
    random = np.random.default_rng(0)

    def normal(*shape: int):
        return random.standard_normal(shape).astype(jnp.dtype(case.dtype))

    B, Sq, Skv, N, K, D = case.B, case.Sq, case.Skv, case.N, case.K, case.D
    mask = None
    if case.mask is not None:
        mask = random.random(case.mask) < 0.7
        mask[..., 0] = True  # jax.nn gives a mean, not 0, to a fully masked row
    return {
        "query": normal(B, Sq, N, D),
        "key": normal(B, Skv, K, D),
        "value": normal(B, Skv, K, D),
        "bias": None if case.bias is None else normal(*case.bias),
        "mask": mask,
        "dout": normal(B, Sq, N, D),
    }


def _run(case: Case, attention: Callable[..., Any], *, query, key, value, bias, mask, dout):
    """(out, lse, gradients) of one compiled call."""

    def call(query, key, value, bias):
        lengths = {
            name: None if value is None else jnp.asarray(value, jnp.int32)
            for name, value in (
                ("query_seq_lengths", case.query_seq_lengths),
                ("key_value_seq_lengths", case.key_value_seq_lengths),
            )
        }
        return attention(query, key, value, bias, mask, return_residual=True, **lengths, **case.static)

    @jax.jit
    def run(*operands):
        out, pullback, lse = jax.vjp(call, *operands, has_aux=True)
        return out, lse, [g for g in pullback(dout) if g is not None]

    out, lse, gradients = run(query, key, value, bias)
    return out, jnp.swapaxes(lse, 1, 2), gradients


def _visible(case: Case, mask) -> np.ndarray:
    """Which keys are visible to each row, `B N Sq Skv`, by the definitions."""
    i, j = np.arange(case.Sq)[:, None], np.arange(case.Skv)
    visible = np.ones((case.B, case.N, case.Sq, case.Skv), bool)
    if mask is not None:
        visible &= mask
    if case.static.get("is_causal"):
        visible &= j <= i
    if (window := case.static.get("local_window_size")) is not None:
        left, right = (window, window) if isinstance(window, int) else window
        visible &= (j >= i - left) & (j <= i + right)
    if case.query_seq_lengths is not None:
        visible &= i < np.reshape(case.query_seq_lengths, (-1, 1, 1, 1))
    if case.key_value_seq_lengths is not None:
        visible &= j < np.reshape(case.key_value_seq_lengths, (-1, 1, 1, 1))
    return visible


def _float64(case: Case, *, query, key, value, bias, mask, dout):
    """(out, lse, gradients) in plain float64 NumPy; lse is NaN for fully masked rows."""
    G = case.N // case.K
    q, do = (x.astype(np.float64) for x in (query, dout))
    k, v = (x.astype(np.float64).repeat(G, axis=2) for x in (key, value))
    scale = case.static.get("scale", 1 / np.sqrt(case.D))
    visible = _visible(case, mask)
    logits = scale * np.einsum("bind,bjnd->bnij", q, k)
    if bias is not None:
        logits = logits + bias.astype(np.float64)
    m = np.max(logits, axis=-1, keepdims=True)
    p = np.where(visible, np.exp(logits - m), 0)
    l = p.sum(axis=-1, keepdims=True)
    some = l > 0
    p = p / np.where(some, l, 1)
    out = np.einsum("bnij,bjnd->bind", p, v)
    lse = np.where(some, m + np.log(np.where(some, l, 1)), np.nan)[..., 0]

    dp = np.einsum("bind,bjnd->bnij", do, v)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    dq = scale * np.einsum("bnij,bjnd->bind", ds, k)
    dk = scale * np.einsum("bnij,bind->bjnd", ds, q)
    dv = np.einsum("bnij,bind->bjnd", p, do)
    gradients = [dq, *(x.reshape(case.B, case.Skv, case.K, G, case.D).sum(axis=3) for x in (dk, dv))]
    if bias is not None:
        lead = ds.ndim - bias.ndim
        axes = (*range(lead), *(lead + axis for axis, size in enumerate(bias.shape) if size == 1))
        gradients.append(ds.sum(axis=axes).reshape(bias.shape))
    return out, lse, gradients


def _errors(got, wanted) -> Errors:
    (out, lse, gradients), (out64, lse64, gradients64) = got, wanted
    worst = (_error(g, g64) for g, g64 in zip(gradients, gradients64, strict=True))
    return Errors(_error(out, out64), _error(lse, lse64), float(np.max(list(worst))))


def _error(got, wanted) -> float:
    """Largest error over largest value, where a value is wanted (is not NaN)."""
    defined = ~np.isnan(wanted)
    got, wanted = np.asarray(got, np.float64)[defined], wanted[defined]
    return float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted)))
