"""Results of every backend that can be used here, against float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa
from jax_fa import masks
from jax_fa.doctor import usable
from jax_fa.doctor.findings import Section

_B, _S, _N, _K, _D = 2, 150, 4, 2, 32
_LENGTHS = (150, 67)
# Largest error over largest value, in units of the dtype's epsilon.
_ALLOWED = 16


def check() -> Section:
    """A masked call of grouped heads with its log-sum-exp and gradients, twice."""
    found = Section(f"Results (largest error over largest value; {_ALLOWED} epsilons are allowed)")
    for platform in usable.here():
        for dtype in usable.DTYPES:
            for name, why in usable.serving(platform, dtype).items():
                if why is None:
                    _check(found, platform, name, dtype)
    return found


def _check(found: Section, platform: str, name: str, dtype: str) -> None:
    what = f"{name} on {platform}, {dtype}"
    operands = _operands(dtype)
    try:
        with jax.default_device(jax.devices("gpu" if platform in ("cuda", "rocm") else platform)[0]):
            results, again = (_run(name, *operands) for _ in range(2))
    except Exception as error:  # whatever it is belongs into the report
        found.add(what, f"failed: {type(error).__name__}: {error}")
        found.wrong.append(f"{what} failed. Please report it with this text.")
        return
    worst = max(_error(x, y) for x, y in zip(results, _float64(*operands), strict=True))
    allowed = _ALLOWED * float(jnp.finfo(dtype).eps)
    right = worst <= allowed  # False for NaN
    same = all(np.array_equal(x, y) for x, y in zip(results, again, strict=True))
    found.add(what, f"{worst:.1e} {'ok' if right else 'WRONG'}{'' if same else ', not the same twice'}")
    if not right:
        found.wrong.append(f"{what} is wrong: its error is {worst:.1e}. Please report it with this text.")
    elif not same:
        found.hints.append(f"{what} gives other bits from run to run.")


def _operands(dtype: str) -> tuple[Any, ...]:
    random = np.random.default_rng(0)
    shapes = [(_B, _S, heads, _D) for heads in (_N, _K, _K, _N)]
    return tuple(random.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes)


def _run(name: str, query, key, value, dout) -> list[np.ndarray]:
    @jax.jit
    def run(query, key, value, dout):
        mask = masks.Causal() & masks.Lengths(key=jnp.asarray(_LENGTHS, jnp.int32))

        def call(*operands):
            return jax_fa.flash_attention(*operands, mask=mask, return_logsumexp=True, implementation=name)

        out, pullback, logsumexp = jax.vjp(call, query, key, value, has_aux=True)
        return out, logsumexp, *pullback(dout)

    return [np.asarray(x).astype(np.float64) for x in run(query, key, value, dout)]


def _float64(query, key, value, dout) -> list[np.ndarray]:
    """The same in plain NumPy, every logit at once."""
    q, do = (x.astype(np.float64) for x in (query, dout))
    k, v = (x.astype(np.float64).repeat(_N // _K, axis=2) for x in (key, value))
    i, j = np.arange(_S)[:, None], np.arange(_S)
    visible = (j <= i) & (j < np.reshape(_LENGTHS, (-1, 1, 1, 1)))
    logits = np.where(visible, np.einsum("bind,bjnd->bnij", q, k) / np.sqrt(_D), -np.inf)
    highest = logits.max(axis=-1, keepdims=True)
    p = np.exp(logits - highest)
    total = p.sum(axis=-1, keepdims=True)
    p = p / total
    dp = np.einsum("bind,bjnd->bnij", do, v)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) / np.sqrt(_D)
    dk, dv = np.einsum("bnij,bind->bjnd", ds, q), np.einsum("bnij,bind->bjnd", p, do)
    grouped = (x.reshape(_B, _S, _K, _N // _K, _D).sum(axis=3) for x in (dk, dv))
    out, dq = np.einsum("bnij,bjnd->bind", p, v), np.einsum("bnij,bjnd->bind", ds, k)
    return [out, (highest + np.log(total))[..., 0], dq, *grouped]


def _error(x: np.ndarray, exact: np.ndarray) -> float:
    return float(np.max(np.abs(x.reshape(exact.shape) - exact)) / np.max(np.abs(exact)))
