"""Gradients against the oracle: query, key, value, bias and slopes, with the cotangent of the log-sum-exp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa.testing import oracle
from jax_fa.testing.cases import BY_NAME, CASES, REAL_TILES, Case, check, expected, naive


def _run(case, backend):
    with case.context():
        dout, dlse = case.cotangents()
        run = jax.jit(lambda x, dout, dlse: case.gradient(x, dout, dlse, implementation=backend))
        (out, lse), gradients = run(case.stored_operands(), case.stored(dout), dlse)
        return out, lse, gradients


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, backend):
    out, lse, gradients = _run(case, backend)
    check(case, out, lse, gradients)
    # Fully masked rows are 0 exactly.
    unseen = np.moveaxis(expected(case)[0].l == 0, -1, -2)
    assert not case.canonical(out)[unseen].any()


@pytest.mark.in_turn
@pytest.mark.parametrize("case", REAL_TILES, ids=str)
def test_gradients_with_the_tiles_of_the_library(case, backend, real_tiles):
    check(case, *_run(case, backend))


@pytest.mark.parametrize("which", ["out", "lse"])
def test_each_result_has_a_gradient_of_its_own(which, backend):
    """With one cotangent absent (symbolically zero) the other one's gradient is right."""
    case = BY_NAME["soft-cap"]
    dout, dlse = case.cotangents()
    weights = (dout, 0 * dlse) if which == "out" else (0 * dout, dlse)
    want = expected(case)[0].gradients(*weights)

    def loss(x):
        out, lse = case.flash_attention(x, implementation=backend)
        return jnp.sum(out * dout) if which == "out" else jnp.sum(lse * dlse)

    gradients = jax.jit(jax.grad(loss))(case.stored_operands())
    for name, g in case.canonical_gradients(gradients).items():
        oracle.assert_close_to_oracle(g, want[name], want[name], f"{which}: {name}", 2e-6)


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "alibi_slopes"])
def test_gradient_of_one_operand(name, backend):
    """jax.grad with respect to one operand agrees with the gradient of all of them."""
    case = BY_NAME["everything"]
    x = case.stored_operands()
    dout, dlse = case.cotangents()

    def loss(given):
        out, lse = case.flash_attention(x | {name: given}, implementation=backend)
        return jnp.sum(out * dout) + jnp.sum(lse * dlse)

    g = case.canonical_gradients({name: jax.jit(jax.grad(loss))(x[name])})[name]
    oracle.assert_close_to_oracle(
        g, expected(case)[1][name], naive(case)[2][name], name, oracle.FLOOR["float32"]
    )


def test_gradient_of_a_traced_scale(backend):
    case = BY_NAME["mask-window"]
    x = case.operands()
    dout, _ = case.cotangents()

    def loss(scale):
        mask = case.library_mask()
        return jnp.sum(dout * jax_fa.flash_attention(**x, mask=mask, scale=scale, implementation=backend))

    # d loss / d scale = sum query dquery / scale.
    found = oracle.attention(x["query"], x["key"], x["value"], visible=case.visible(), scale=0.3)
    want = np.sum(x["query"] * found.gradients(dout)["query"]) / 0.3
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.3), want, rtol=1e-5)


def test_gradients_of_rows_and_keys_that_nothing_sees_are_zero(backend):
    case = BY_NAME["mask-lengths"]
    _, _, gradients = _run(case, backend)
    found = case.canonical_gradients(gradients)
    visible = np.broadcast_to(case.visible(), case.full)
    rows, keys = visible.any(axis=(-3, -1)), visible.any(axis=(-3, -2))
    assert not rows.all() and not keys.all()
    assert not found["query"][~rows].any()
    assert not found["key"][~keys].any() and not found["value"][~keys].any()


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "alibi_slopes"])
def test_the_oracle_itself(name):
    """Its gradients are the central differences of its results."""
    case = Case(
        name="oracle", B=(2,), Sq=4, Skv=5, D=3, Dv=2, N=2, K=1, mask="causal", bias="1NQ1", slopes="BN"
    )
    x = {n: np.asarray(a, np.float64) for n, a in case.operands().items()}
    dout, dlse = (np.asarray(c, np.float64) for c in case.cotangents())
    direction = case.random(name).standard_normal(x[name].shape)

    def run(step):
        y = x | {name: x[name] + step * direction}
        extra = {
            "bias": y["bias"],
            "slopes": y["alibi_slopes"],
            "keep": case.random("keep").random(case.full) < 0.7,
        }
        options = {"visible": case.visible(), "soft_cap": 1.5, "keep_prob": 0.7}
        return oracle.attention(y["query"], y["key"], y["value"], **extra, **options)

    def loss(step):
        found = run(step)
        return np.sum(found.out * dout) + np.sum(found.lse * dlse)

    derivative = np.sum(run(0.0).gradients(dout, dlse)[name] * direction)
    np.testing.assert_allclose(derivative, (loss(1e-6) - loss(-1e-6)) / 2e-6, rtol=1e-6, atol=1e-8)
