"""Accuracy where it is easily lost: large logits, logits or keys with much in common, peaked rows.

Every backend may err twice as much as a dense computation in the same dtype, plus the floor of the dtype; both are
measured against float64. In float32 the dense computation is the naive one or jax.nn, whichever errs more: XLA sums
the same products in different orders.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa.testing import oracle

# Sums over small tiles, as other tests have them, are not those of the library.
pytestmark = pytest.mark.usefixtures("real_tiles")
D = 64
NAMES = ("out", "query", "key", "value")


def _arrays(rows: int = 64, keys: int = 200, heads: int = 2, seed: int = 0) -> list[np.ndarray]:
    """query, key, value and the cotangent of the output."""
    normal = np.random.default_rng(seed).standard_normal
    return [normal((1, size, heads, D)) for size in (rows, keys, keys, rows)]


def _gradients(attention, arrays, scale: float) -> list[jax.Array]:
    """The output and the gradients."""

    @jax.jit
    def run(q, k, v, dout):
        out, pullback = jax.vjp(partial(attention, scale=scale), q, k, v)
        return out, *pullback(dout)

    return run(*arrays)


def _dense(arrays, scale: float) -> list[jax.Array]:
    q, k, v, dout = arrays
    visible = np.ones((1, q.shape[2], q.shape[1], k.shape[1]), bool)
    cotangents = dout, np.zeros(visible.shape[:3], np.float32)
    operands = {"query": q, "key": k, "value": v}
    out, _, gradients = oracle.naive(
        operands, visible, None, cotangents, np.float32(scale), None, np.float32(1), np.arange(q.shape[1])
    )
    return [out, *(gradients[name] for name in operands)]


def _errors(found, arrays, scale: float) -> dict[str, float]:
    """Relative errors in L2, by name."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in arrays)
    want = oracle.attention(q, k, v, scale=scale)
    want = {"out": want.out} | want.gradients(dout)
    return {name: oracle.errors(x, want[name])[0] for name, x in zip(NAMES, found, strict=True)}


def _check(backend, arrays, dtype="float32", scale=D**-0.5, names=NAMES, floor=0.0, like=None) -> None:
    """`like`: arrays for the dense computation, where those of the call are too hard for it."""
    arrays, like = ([jnp.asarray(x, dtype) for x in given] for given in (arrays, like or arrays))
    attention = partial(jax_fa.dot_product_attention, implementation=backend)
    found = _gradients(attention, arrays, scale)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in found)
    ours, dense = _errors(found, arrays, scale), _errors(_dense(like, scale), like, scale)
    if dtype == "float32":
        theirs = _errors(_gradients(jax.nn.dot_product_attention, like, scale), like, scale)
        dense = {name: max(dense[name], theirs[name]) for name in NAMES}
    for name in names:
        bound = 2 * dense[name] + oracle.FLOOR[dtype] + floor
        assert ours[name] <= bound, f"{name}: error {ours[name]:.3g} exceeds {bound:.3g} ({dense=})"


# The relative error of a product is that of its last bit, which for logits near 120 is 4e-6 of the weight.
@pytest.mark.one_in(3)
@pytest.mark.in_turn
@pytest.mark.parametrize("logit", [0, 120, -120, 2500, -2500])
@pytest.mark.parametrize("rows", [1, 16, 17])
def test_logits_with_much_in_common(rows, logit, backend):
    """Forward and backward compute the same logits, also where few rows take another path."""
    q, k, v, dout = _arrays(rows, keys=256, heads=8)
    if logit:
        q[..., 0] = 1
        k[..., 0] = logit * np.sqrt(D)
    _check(backend, (q, k, v, dout), floor=2**-23 * abs(logit))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [4, 64])
def test_peaked_rows(rows, dtype, backend):
    """The backward takes delta = rowsum(dout * out) from the output before it was rounded."""
    q, k, v, dout = _arrays(rows, keys=64)
    _check(backend, (2 * q, 2 * k, v, dout), dtype, scale=1.0)


def test_small_float16_outputs(backend):
    """What rounding takes is right below the normal numbers of float16, too."""
    q, k, v, dout = _arrays(8, keys=8)
    _check(backend, (q, k, 3e-5 * v, 1e3 * dout), "float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("common", [0, 3, 30])
def test_keys_with_a_common_component(common, dtype, backend):
    """A bias on the key projection moves no softmax, and no gradient of the queries."""
    q, k, v, dout = _arrays()
    shifted = k + common * np.random.default_rng(1).standard_normal((1, 1, 2, D))
    _check(backend, (q, shifted, v, dout), dtype, like=(q, k, v, dout))


@pytest.mark.parametrize("logit", [0, -120])
@pytest.mark.parametrize("common", [300, 3000])
def test_float32_keys_with_a_common_component(common, logit, backend):
    q, k, v, dout = _arrays()
    k = k + common * np.random.default_rng(1).standard_normal((1, 1, 2, D)) / 8
    if logit:
        q[..., 0] = 1
        k[..., 0] += logit * np.sqrt(D)
    _check(backend, (q, k, v, dout))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [1e4, 1e6, 1e18])
@pytest.mark.parametrize("scale", [D**-0.5, 0.3], ids=["exact", "rounds"])
def test_large_queries(scale, factor, dtype, backend):
    """One key takes it all, which leaves the gradients of queries and keys nothing but rounding.

    A scale that is no power of two makes scale * product - max another number where it is rounded only once.
    """
    q, k, v, dout = _arrays(keys=50)
    _check(backend, (factor * q, k, v, dout), dtype, scale, names=("out", "value"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [1e6, 1e18])
@pytest.mark.parametrize("rows", [8, 70])
def test_tangents_of_large_queries(rows, factor, dtype, backend):
    """The tangent is another pass over the products than the forward, whose max it is given."""
    q, k, v, moved = (jnp.asarray(x, dtype) for x in _arrays(rows, keys=rows))
    q = (factor * q).astype(dtype)

    def tangent(attention):
        attend = partial(attention, q, k, scale=0.3)
        with jax.numpy_dtype_promotion("standard"):  # which jax.nn needs
            return np.asarray(
                jax.jit(lambda v, moved: jax.linearize(attend, v)[1](moved))(v, moved), np.float32
            )

    ours = tangent(partial(jax_fa.dot_product_attention, implementation=backend))
    np.testing.assert_allclose(ours, tangent(jax.nn.dot_product_attention), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("moving", ["slopes", "bias"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("alone", [False, True], ids=["jvp", "linearize"])
def test_tangents_by_distance(alone, dtype, moving, backend):
    """Keys far away, whose tangents are thousands away too, have no weight; but they come first, block by block."""
    rows, keys, slopes = 4, 4096, np.array([0.3, 0.15, 0.07, 0.03], np.float32)
    q, k, v, _ = (jnp.asarray(x, dtype) for x in _arrays(rows, keys, heads=len(slopes)))
    away = np.abs(np.arange(keys) - np.arange(keys - rows, keys)[:, None]).astype(np.float32)
    mask = jax_fa.masks.Causal("bottom-right")

    def attend(by):
        of = {"alibi_slopes": by} if moving == "slopes" else {"bias": -by[:, None, None] * away}
        return jax_fa.flash_attention(q, k, v, mask=mask, implementation=backend, **of)

    by, one = jnp.asarray(slopes), jnp.ones(len(slopes), jnp.float32)
    found = jax.linearize(attend, by)[1](one) if alone else jax.jvp(attend, (by,), (one,))[1]

    q, k, v = (np.asarray(x[0], np.float64).swapaxes(0, 1) for x in (q, k, v))
    logits = q @ k.swapaxes(1, 2) / np.sqrt(D) - slopes[:, None, None] * away
    weights = np.exp(np.where(np.tri(rows, keys, keys - rows, bool), logits, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    want = (weights * ((weights * away).sum(-1, keepdims=True) - away)) @ v
    error, _ = oracle.errors(found[0], want.swapaxes(0, 1))
    assert error < (2e-6 if dtype == "float32" else 4e-3)


@pytest.mark.in_turn
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [1e6, 1e18])
@pytest.mark.parametrize("rows", [1, 8, 70])
def test_second_derivatives_of_large_queries(rows, factor, dtype, backend):
    """A gradient beside its tangent, and the gradient of one: max and sum are given to passes over other products."""
    q, k, v, moved = (jnp.asarray(x, dtype) for x in _arrays(rows, keys=300 if rows == 1 else rows))
    q, moved = (factor * q).astype(dtype), moved[:1, :1]

    def found(attention):
        def gradient(v):
            return jax.grad(lambda v: jnp.sum(jnp.square(attention(q, k, v, scale=0.3))))(v)

        with jax.numpy_dtype_promotion("standard"):  # which jax.nn needs
            both = jax.jit(lambda v, t: (*jax.jvp(gradient, (v,), (t,)), jax.vjp(gradient, v)[1](t)[0]))
            return [np.asarray(x, np.float32) for x in both(v, jnp.broadcast_to(moved, v.shape))]

    ours = found(partial(jax_fa.dot_product_attention, implementation=backend))
    for x, want in zip(ours, found(jax.nn.dot_product_attention), strict=True):
        np.testing.assert_allclose(x, want, rtol=2e-2, atol=1e-5)


def test_one_query_of_many_keys(backend):
    """Sums over many keys are made of sums over tiles."""
    normal = np.random.default_rng(0).standard_normal
    q, k, v, dout = (normal((1, size, 1, 16)) for size in (1, 2**17, 2**17, 1))
    q[..., 0], k[..., 0] = 1, 20 * 4
    _check(backend, (q, k, v, dout), scale=0.25, names=("out", "query", "value"))
