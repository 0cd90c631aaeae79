"""Traced scalars: a traced value gives what the same Python number gives, has a gradient, and may be mapped."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa import dropout
from jax_fa.masks import Causal
from jax_fa.testing import oracle

B, SQ, SKV, N, K, D = 2, 9, 13, 4, 2, 16
RNG = np.random.default_rng(0)
ARRAYS = {
    "query": RNG.standard_normal((B, SQ, N, D)).astype(np.float32),
    "key": RNG.standard_normal((B, SKV, K, D)).astype(np.float32),
    "value": RNG.standard_normal((B, SKV, K, D)).astype(np.float32),
}
DOUT = RNG.standard_normal((B, SQ, N, D)).astype(np.float32)
BIAS = RNG.standard_normal((N, SQ, SKV)).astype(np.float32)
VALUES = {"scale": (0.3, -0.2, 0.0), "logits_soft_cap": (2.5,), "dropout_rate": (0.25, 0.9999, 0.0)}
CASES = [(name, value) for name, values in VALUES.items() for value in values]


def _attend(arrays, backend, dtype="float32", **options):
    arrays = {name: jnp.asarray(x).astype(dtype) for name, x in arrays.items()}
    key = jax.random.key(3) if "dropout_rate" in options else None
    return jax_fa.flash_attention(
        **arrays, mask=Causal("bottom-right"), bias=BIAS, dropout_key=key, implementation=backend, **options
    )


def _gradients(arrays, backend, dtype, **options):
    out, pullback = jax.vjp(lambda x: _attend(x, backend, dtype, **options), arrays)
    return out, pullback(jnp.asarray(DOUT).astype(dtype))[0]


@pytest.mark.in_turn
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "value"), CASES)
def test_traced_is_static(name, value, dtype, backend):
    static = jax.jit(lambda: _gradients(ARRAYS, backend, dtype, **{name: value}))()
    traced = jax.jit(lambda x: _gradients(ARRAYS, backend, dtype, **{name: x}))(jnp.float32(value))
    # Constants may be folded into other operations, which is a rounding of float32 at most.
    for a, b in zip(jax.tree.leaves(static), jax.tree.leaves(traced), strict=True):
        limit = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
        np.testing.assert_allclose(
            np.float32(b), np.float32(a), rtol=limit, atol=limit * np.abs(np.float32(a)).max()
        )


@pytest.mark.parametrize(
    ("dtype", "q", "k", "scale"),
    [("float16", 100.0, 0.01, 1000.0), ("bfloat16", 0.01, 0.01, 1e5), ("float16", 0.01, 0.01, 1e5)],
)
def test_a_traced_scale_is_not_rounded_to_16_bits(dtype, q, k, scale, backend):
    """The product of scale and query overflows, or is rounded, in the inputs' dtype."""
    x = {"query": q * ARRAYS["query"], "key": k * ARRAYS["key"], "value": ARRAYS["value"]}
    x = {name: np.asarray(jnp.asarray(a, dtype)) for name, a in x.items()}
    want = oracle.attention(*x.values(), scale=scale).out
    run = jax.jit(lambda x, scale: jax_fa.flash_attention(**x, scale=scale, implementation=backend))
    found = run(x, jnp.float32(scale))
    error, _ = oracle.errors(found, want)
    assert error < {"float16": 3e-4, "bfloat16": 2.5e-3}[dtype]


def _loss(name, backend, value):
    return jnp.sum(_attend(ARRAYS, backend, **{name: value}) * DOUT)


@pytest.mark.parametrize(("name", "value"), [("scale", 0.3), ("scale", 0.0), ("logits_soft_cap", 2.5)])
def test_gradient(name, value, backend):
    """Against central differences in float64, of the portable backend."""
    found = jax.jit(jax.grad(partial(_loss, name, backend)))(jnp.float32(value))
    assert found.dtype == jnp.float32
    with jax.enable_x64(True):
        arrays = {n: x.astype(np.float64) for n, x in ARRAYS.items()}

        def loss(value):
            out = _attend(arrays, "xla", "float64", **{name: value})
            return float(np.sum(np.asarray(out) * DOUT))

        want = (loss(value + 1e-5) - loss(value - 1e-5)) / 2e-5
    np.testing.assert_allclose(found, want, rtol=1e-4)


@pytest.mark.in_turn(1)
@pytest.mark.parametrize("name", list(VALUES))
def test_mapped(name, backend):
    """A value per element of a batch, the arrays shared: as in a loop."""
    values = jnp.array([0.2, 0.5, 0.75], jnp.float32)

    def run(value):
        out, pullback = jax.vjp(lambda x: _attend(x, backend, **{name: value}), ARRAYS)
        return out, pullback(DOUT)[0]

    found = jax.jit(jax.vmap(run))(values)
    one = jax.jit(run)
    for i, value in enumerate(values):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one(value)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=2e-5)


def test_gradient_of_mapped_scales(backend):
    values = jnp.array([0.2, 0.5], jnp.float32)
    found = jax.jit(jax.vmap(jax.grad(partial(_loss, "scale", backend))))(values)
    one = jax.jit(jax.grad(partial(_loss, "scale", backend)))
    np.testing.assert_allclose(found, [one(v) for v in values], rtol=2e-5)


def test_scan_over_layers(backend):
    """Layers of different scale and cap under one scan, as a stack of parameters gives them."""
    scales, caps = jnp.array([0.1, 0.4]), jnp.array([5.0, 2.0])

    def layer(q, parameters):
        scale, cap = parameters
        x = ARRAYS | {"query": q}
        out = _attend(x, backend, scale=scale, logits_soft_cap=cap)
        return out, None

    found, _ = jax.jit(lambda q: jax.lax.scan(layer, q, (scales, caps)))(ARRAYS["query"])
    want = ARRAYS["query"]
    for scale, cap in ((0.1, 5.0), (0.4, 2.0)):
        want = _attend(ARRAYS | {"query": want}, backend, scale=scale, logits_soft_cap=cap)
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rate", [-0.5, 1.0, 1.5])
def test_a_traced_rate_is_clipped(rate, backend):
    """Below 0 nothing is dropped; from 1 on all but one weight in 2**16 are, on average."""
    out = jax.jit(lambda r: _attend(ARRAYS, backend, dropout_rate=r))(jnp.float32(rate))
    if rate < 0:
        np.testing.assert_allclose(out, _attend(ARRAYS, backend), rtol=1e-6, atol=1e-6)
    else:
        assert not np.asarray(out).any()


@pytest.mark.parametrize("rate", [0.5, 0.99, 0.9999])
def test_dropout_keeps_the_mean(rate, backend):
    """Kept weights are divided by the probability that really keeps them, which 16 bits round."""
    q = k = jnp.zeros((1, 512, 4, 8))
    v = jnp.ones((1, 512, 4, 8))
    out = jax_fa.flash_attention(
        q, k, v, dropout_rate=rate, dropout_key=jax.random.key(0), implementation=backend
    )
    keep = round((1 - rate) * 2**16) / 2**16
    spread = ((1 - keep) / keep / (512 * 512 * 4)) ** 0.5
    assert abs(float(out.mean()) - 1) < 4 * spread


def test_traced_rates_draw_the_bits_of_static_ones():
    rates = np.float32(np.random.default_rng(0).random(500))
    traced = jax.jit(jax.vmap(dropout.kept_numbers))(rates)
    np.testing.assert_array_equal(traced, [dropout.kept_numbers(float(rate)) for rate in rates])


@pytest.mark.parametrize("cap", [0.0, -1.0, np.inf, np.nan])
def test_a_traced_cap_that_is_not_positive_and_finite(cap, backend):
    out = jax.jit(lambda cap: _attend(ARRAYS, backend, logits_soft_cap=cap))(jnp.float32(cap))
    visible = np.broadcast_to(oracle.causal(SQ, SKV, "bottom-right").any(-1)[:, None, None], out.shape[1:])
    assert np.isnan(out[:, visible]).all()


def test_gradient_of_a_cap_under_an_infinite_bias(backend):
    """A saturated logit adds to the gradient what its weight does, and no NaN."""
    x = {name: jnp.asarray(a[:, :3]) for name, a in ARRAYS.items()}
    bias = jnp.zeros((3, 3)).at[1, 1].set(jnp.inf)

    def loss(cap):
        out = jax_fa.flash_attention(**x, bias=bias, logits_soft_cap=cap, implementation=backend)
        return jnp.sum(out * DOUT[:, :3])

    found = jax.jit(jax.grad(loss))(jnp.float32(2.0))
    want = (loss(2.0 + 2e-2) - loss(2.0 - 2e-2)) / 4e-2
    np.testing.assert_allclose(found, want, rtol=1e-2)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_inference_in_16_bits_multiplies_16_bits(platform):
    """Wide products, which accelerators have to pay for, are those of derivatives alone."""
    x = jax.ShapeDtypeStruct((2, 64, 2, 16), jnp.bfloat16)
    attend = jax.jit(partial(jax_fa.flash_attention, mask=Causal(), implementation="xla"))
    text = jax.export.export(attend, platforms=(platform,))(x, x, x).mlir_module()
    products = [line for line in text.splitlines() if "= stablehlo.dot_general" in line]
    assert products
    for line in products:
        operands = line.split(" : (")[1].split(") -> ")[0]
        assert operands.count("xbf16>") == 2, line


_SLOW_SHAPES = ((B, 1, 1, 1), (B, N, 1, 1), (1, 1))
_SHAPES = [(N, 1, 1), *(pytest.param(shape, marks=pytest.mark.slow) for shape in _SLOW_SHAPES)]


@pytest.mark.parametrize("name", ["scale", "logits_soft_cap"])
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_one_value_for_each_head(name, shape, backend):
    """As calls of each batch entry and head alone, with its gradient; under vmap, too."""
    values = jnp.asarray(np.linspace(0.3, 0.9, int(np.prod(shape))).reshape(shape), jnp.float32)
    x = ARRAYS | {n: np.repeat(ARRAYS[n], N // K, axis=2) for n in ("key", "value")}

    def whole(value, x, dout):
        def run(value):
            return jax_fa.flash_attention(**x, mask=Causal(), implementation=backend, **{name: value})

        out, pullback = jax.vjp(run, value)
        return out, pullback(dout)[0]

    def alone(value):
        product = jnp.einsum("bsnd,btnd->bnst", x["query"], x["key"])
        logits = product * value if name == "scale" else value * jnp.tanh(product / 4 / value)
        weights = jax.nn.softmax(jnp.where(np.tri(SQ, SKV, dtype=bool), logits, -jnp.inf))
        return jnp.einsum("bnst,btnd->bsnd", weights, x["value"])

    want, pullback = jax.vjp(alone, values)
    out, gradient = jax.jit(whole)(values, x, DOUT)
    assert gradient.shape == shape
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(gradient, pullback(DOUT)[0], rtol=1e-4, atol=1e-4)
    twice = jax.jit(jax.vmap(whole, (0, None, None)))(jnp.stack([values, values]), x, DOUT)
    np.testing.assert_allclose(twice[0][1], want, atol=1e-5)
