"""Rows of which one key has all the weight: exactly nothing moves them, whatever multiplies the rounding of a zero.

The logits of such a row have the gradient p (dp - sum p dp) with p = 1, so that the gradients of query, key, bias and so on
are 0. With queries of 1e18 a last bit that is wrong in dp is a gradient of 1e12. Where other keys have weights too small for
the sum, but far larger dp, it is no rounding, and is there.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa import masks
from jax_fa.backends import native

FACTORS = (1e6, 1e12, 1e18)
D = 64
IDS = np.repeat([0, 1, 2], 20)
# Rows, keys, key heads, value head_dim, and further arguments.
CASES: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {
    "few": ((8, 8, 2, D), {}),
    "one_row": ((1, 70, 2, D), {}),
    "full": ((64, 50, 2, D), {}),
    "long": ((150, 300, 2, D), {}),
    "causal": ((70, 70, 2, D), {"mask": masks.Causal()}),
    "grouped": ((40, 150, 1, 40), {"mask": masks.SlidingWindow(100, 100)}),
    "dense": ((40, 70, 2, D), {"mask": masks.Dense(np.arange(70) % 3 != 0)}),
    "packed": ((60, 60, 2, D), {"mask": masks.SegmentIds(IDS, IDS)}),
    "union": ((60, 60, 2, D), {"mask": masks.Lengths(key=4) | masks.SlidingWindow(9, 0)}),
    "dropout": ((64, 50, 2, D), {"dropout_rate": 0.3, "dropout_key": jax.random.key(0)}),
    "sinks": ((64, 50, 2, D), {"sinks": np.array([0.5, 1.0], np.float32)}),
    "bias": ((64, 50, 2, D), {"bias": np.random.default_rng(1).standard_normal((1, 2, 64, 50), np.float32)}),
    "slopes": ((64, 50, 2, D), {"alibi_slopes": np.array([0.5, 0.25], np.float32)}),
}
DEFAULT = ("full-float32", "causal-bfloat16", "dropout-bfloat16")


def _mostly_slow(names) -> list[Any]:
    """All, of which few are no slow ones: each compiles."""
    return [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in names]


def _instruction_sets(backend: str) -> list[str]:
    if backend != "cpu":
        return [""]
    return [isa for isa, has in native.extension.instruction_sets().items() if has]


def _arrays(name: str, dtype: str, count: int = 1) -> list[list[jax.Array]]:
    """`count` times query, key, value and the cotangent of the output."""
    (rows, keys, heads, width), _ = CASES[name]
    normal = np.random.default_rng(0).standard_normal
    shapes = (rows, 2, D), (keys, heads, D), (keys, heads, width), (rows, 2, width)
    return [[jnp.asarray(normal((1, *shape)), dtype) for shape in shapes] for _ in range(count)]


@pytest.mark.parametrize(
    "case", _mostly_slow(f"{name}-{dtype}" for name in CASES for dtype in ("float32", "bfloat16"))
)
def test_gradients_are_zero(case, backend, monkeypatch):
    name, dtype = case.split("-")
    ((q, k, v, dout),), options = _arrays(name, dtype), CASES[name][1]

    @jax.jit
    def gradients(q, k, v, dout):
        _, pullback = jax.vjp(
            lambda *x: jax_fa.flash_attention(*x, **options, implementation=backend), q, k, v
        )
        return pullback(dout)

    for isa in _instruction_sets(backend):
        monkeypatch.setenv("JAX_FA_CPU_ISA", isa)
        for factor in FACTORS:
            dq, dk, dv = (np.asarray(x, np.float32) for x in gradients(q * factor, k, v, dout))
            assert not dq.any(), (isa, factor, np.abs(dq).max())
            assert not dk.any(), (isa, factor, np.abs(dk).max())
            assert np.isfinite(dv).all() and dv.any()


@pytest.mark.slow
def test_the_cotangent_of_the_logsumexp_is_left(backend, monkeypatch):
    """ds is that of the log-sum-exp alone."""
    ((q, k, v, dout),) = _arrays("full", "float32")
    dlse = np.random.default_rng(2).standard_normal((1, 2, 64)).astype(np.float32)

    @jax.jit
    def gradient(q, k, v, dout):
        def attend(q):
            return jax_fa.flash_attention(q, k, v, scale=1.0, return_logsumexp=True, implementation=backend)

        return jax.vjp(attend, q)[1]((dout, dlse))[0]

    q = q * 1e6
    largest = np.argmax(np.einsum("bind,bjnd->bnij", q, k), axis=-1)
    want = dlse[..., None] * np.take_along_axis(np.moveaxis(np.asarray(k), 2, 1), largest[..., None], axis=2)
    for isa in _instruction_sets(backend):
        monkeypatch.setenv("JAX_FA_CPU_ISA", isa)
        np.testing.assert_array_equal(np.moveaxis(gradient(q, k, v, dout), 2, 1), want)


@pytest.mark.parametrize("what", ["query", "value", "cotangent"])
@pytest.mark.slow
def test_what_is_not_finite_stays(what, backend):
    """The zero is no constant: a row with a NaN in what is visible to it has NaN gradients."""
    ((q, k, v, dout),) = _arrays("full", "float32")
    q, v, dout = (
        x.at[0, 5, 1, 2].set(jnp.nan) if name == what else x
        for name, x in (("query", q * 1e6), ("value", v), ("cotangent", dout))
    )
    _, pullback = jax.vjp(lambda q: jax_fa.flash_attention(q, k, v, implementation=backend), q)
    (dq,) = pullback(dout)
    assert np.isnan(dq[0, 5, 1]).all() and not np.asarray(dq[0, :, 0]).any()


DIFFERENTIATED = ("full-float32", "full-bfloat16", "causal-float32", "long-float32", "few-float32")
# The second derivative of the CPU kernels has float products in one order. The forward of small heads and of bfloat16 has
# others, so that the max it saved is not that of these logits.
OTHER_PRODUCTS = ("full-bfloat16", "few-float32")


@pytest.mark.parametrize("case", _mostly_slow(DIFFERENTIATED))
def test_other_derivatives(case, backend, monkeypatch):
    """Tangents along keys, and the derivative of the gradients along all that they are made of."""
    name, dtype = case.split("-")
    arrays, tangents = _arrays(name, dtype, 2)
    options = CASES[name][1]

    @jax.jit
    def derivatives(*x):
        def attend(q, k, v):
            return jax_fa.flash_attention(q, k, v, **options, implementation=backend)

        def gradients(q, k, v, dout):
            return jax.vjp(attend, q, k, v)[1](dout)

        q, k, v, _ = x
        return (
            jax.jvp(lambda k: attend(q, k, v), (k,), (tangents[1],))[1],
            jax.linearize(lambda k: attend(q, k, v), k)[1](tangents[1]),
            *jax.jvp(gradients, x, tuple(tangents))[1][:2],
        )

    for isa in _instruction_sets(backend):
        monkeypatch.setenv("JAX_FA_CPU_ISA", isa)
        for factor in FACTORS:
            *tangents_of_out, dq, dk = derivatives(arrays[0] * factor, *arrays[1:])
            second = () if backend == "cpu" and case in OTHER_PRODUCTS else (dq, dk)
            for x in (*tangents_of_out, *second):
                assert not np.asarray(x, np.float32).any(), (isa, factor)


def _small_weights(option: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows of which a key has all the weight but 1e-7 to 1e-12, and others dp of up to 1e6; and which pairs dropout keeps.

    Logits are those of the bias.
    """
    normal, uniform = (lambda r: (r.standard_normal, r.uniform))(np.random.default_rng(4))
    rows, keys = 40, 70
    bias = -uniform(18, 28, (1, 2, rows, 1)) - np.abs(normal((1, 2, rows, keys)))
    np.put_along_axis(bias, np.arange(rows)[:, None] % 30 + np.zeros((1, 2, 1, 1), int), 0.5, axis=-1)
    value = normal((1, keys, 2, D))
    value[:, 30:] *= 10 ** uniform(2, 6, (1, keys - 30, 1, 1))
    arrays = {"bias": bias, "value": value, "key": normal((1, keys, 2, D)), "dout": normal((1, rows, 2, D))}
    kept = np.ones((1, 2, rows, keys))
    if option == "dropout":
        bits = jax_fa.dropout_mask(jax.random.key(0), 0.5, kept.shape)
        kept = 2.0 * np.unpackbits(np.asarray(bits), bitorder="little")[: kept.size].reshape(kept.shape)
    return {name: x.astype(np.float32) for name, x in arrays.items()}, kept


@pytest.mark.parametrize(
    "option", ["dropout", *(pytest.param(x, marks=pytest.mark.slow) for x in ("", "sinks"))]
)
def test_small_weights_count(option, backend, monkeypatch):
    """The gradient of the logits is within the rounding of its own sums, also that of the key with p = 1."""
    x, kept = _small_weights(option)
    given: dict[str, Any] = {}
    if option == "dropout":
        given = {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}
    elif option == "sinks":
        given = {"sinks": np.array([-20, -30], np.float32)}

    @jax.jit
    def gradient(bias, key, value, dout):
        def attend(bias):
            return jax_fa.flash_attention(
                jnp.zeros_like(dout), key, value, bias=bias, implementation=backend, **given
            )

        return jax.vjp(attend, bias)[1](dout)[0]

    wide = {name: a.astype(np.float64) for name, a in x.items()}
    weights = np.exp(wide["bias"] - 0.5)
    sink = np.exp(np.float64(given["sinks"]) - 0.5)[:, None, None] if option == "sinks" else 0.0
    p = weights / (weights.sum(-1, keepdims=True) + sink)
    dp = kept * np.einsum("bind,bjnd->bnij", wide["dout"], wide["value"])
    size = kept * np.einsum("bind,bjnd->bnij", np.abs(wide["dout"]), np.abs(wide["value"]))
    want = p * (dp - (p * dp).sum(-1, keepdims=True))
    bound = (
        2.0**-24 * p * (30 * size + 30 * (p * size).sum(-1, keepdims=True) + 200 * np.abs(want / p)) + 1e-30
    )
    alone = (p > 1 - 2.0**-24) & (np.abs(want) > 2 * bound)
    assert alone.sum() > 10 and (option != "dropout" or (alone & (kept == 0)).any())
    for isa in _instruction_sets(backend):
        monkeypatch.setenv("JAX_FA_CPU_ISA", isa)
        got = gradient(x["bias"], x["key"], x["value"], x["dout"])
        assert (np.abs(got - want) <= bound).all(), isa
