"""Output, log-sum-exp and softmax statistics against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa import masks
from jax_fa.attention import attention
from jax_fa.entry import request_of
from jax_fa.primitives import fwd_p
from jax_fa.testing import oracle
from jax_fa.testing.cases import BY_NAME, CASES, REAL_TILES, check, expected
from jax_fa.testing.programs import equations


def _run(case, backend):
    with case.context():
        run = jax.jit(lambda x: case.flash_attention(x, implementation=backend))
        return run(case.stored_operands())


def _once(case):
    """Without a derivative only 16-bit forwards are programs of their own; test_grad.py checks the results of all."""
    alone = case.dtype in ("bfloat16", "float16")
    return pytest.param(case, marks=[] if alone else pytest.mark.slow, id=str(case))


@pytest.mark.parametrize("case", [_once(case) for case in CASES])
def test_output_and_logsumexp(case, backend):
    out, lse = _run(case, backend)
    check(case, out, lse)
    # Fully masked rows are 0 exactly.
    unseen = np.moveaxis(expected(case)[0].l == 0, -1, -2)
    assert not case.canonical(out)[unseen].any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_derivative_changes_no_forward(case):
    """But for 16-bit dtypes, where it saves what rounding took."""

    def forwards(run, *arguments):
        programs = equations(jax.make_jaxpr(run)(*arguments))
        return [(str(e.params), [v.aval for v in e.invars]) for e in programs if e.primitive is fwd_p]

    with case.context():
        x, (dout, dlse) = case.stored_operands(), case.cotangents()
        (alone,) = forwards(case.flash_attention, x)
        (derived,) = forwards(case.gradient, x, case.stored(dout), dlse)
    assert (alone == derived) == (case.dtype not in ("bfloat16", "float16"))


def test_the_tiles_of_the_library_make_other_programs(request):
    """Else tests of them would run what was compiled with small ones."""
    case = BY_NAME["mask-causal"]

    @jax.jit
    def run(x):
        return case.flash_attention(x, implementation="xla")

    def text():
        return run.lower(case.stored_operands()).as_text()

    small = text()
    assert text() == small
    request.getfixturevalue("real_tiles")
    assert text() != small


@pytest.mark.in_turn(1)
@pytest.mark.parametrize("case", REAL_TILES, ids=str)
def test_output_with_the_tiles_of_the_library(case, backend, real_tiles):
    check(case, *_run(case, backend))


@pytest.mark.parametrize(
    "name", ["mqa", "mask-lengths", "soft-cap", "mask-nothing", "dropout", "bfloat16-causal"]
)
def test_softmax_statistics(name, backend):
    """m and l are taken after scale, bias, cap and mask, before dropout; (-FLT_MAX, 0) where nothing is seen."""
    case = BY_NAME[name]
    x = {n: jnp.asarray(a) for n, a in case.operands().items()}
    mask = None if case.mask is None else masks.as_mask(case.library_mask())
    call = request_of(
        jax_fa.flash_attention,
        **x,
        mask=mask,
        logits_soft_cap=case.soft_cap,
        dropout_rate=case.dropout,
        dropout_key=case.dropout_key(),
        implementation=backend,
    ).call
    found = jax.jit(lambda operands: attention(call.replace(operands=operands)))(call.operands)
    want = expected(case)[0]
    for name, ours, oracles in (("m", found.softmax_max, want.m), ("l", found.softmax_sum, want.l)):
        assert ours.dtype == jnp.float32
        oracle.assert_close_to_oracle(ours, oracles, oracles, f"{case}: {name}", 2e-6)


def test_the_logsumexp_is_optional(backend):
    case = BY_NAME["mask-causal"]
    x = case.stored_operands()
    alone = jax_fa.flash_attention(**x, mask=masks.Causal(), implementation=backend)
    assert isinstance(alone, jax.Array)
    np.testing.assert_array_equal(alone, _run(case, backend)[0])


@pytest.mark.parametrize("kind", ["traced", "array", "numpy"])
def test_scale_may_be_any_scalar(kind, backend):
    """A traced scale multiplies the query; the result is that of the same Python number."""
    case = BY_NAME["scale"]
    x = case.stored_operands()

    def run(scale):
        return jax_fa.flash_attention(**x, mask=case.library_mask(), scale=scale, implementation=backend)

    given = {"traced": jnp.float32, "array": jnp.float32, "numpy": np.float64}[kind](case.scale)
    check(case, (jax.jit(run) if kind == "traced" else run)(given))


@pytest.mark.parametrize("dtype", ["int32", "float16", "bfloat16", "float32"])
def test_bias_of_another_dtype(dtype, backend):
    """Bias is added in float32, whatever its dtype."""
    case = BY_NAME["bias-BNQK"]
    x = case.operands()
    bias = (8 * x["bias"]).round() / (1 if dtype == "int32" else 8)
    given = jnp.asarray(bias.astype(jnp.dtype(dtype)))
    out = jax_fa.flash_attention(**case.stored_operands() | {"bias": given}, implementation=backend)
    wide = jax_fa.flash_attention(**case.stored_operands() | {"bias": bias}, implementation=backend)
    np.testing.assert_array_equal(out, wide)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_8_bit_floats(dtype, backend):
    """Weights of 1 / 4096 would underflow in 8 bits; the result has the inputs' dtype, and so have gradients."""
    q = jnp.zeros((1, 3, 2, 16), dtype)
    k, v = jnp.zeros((1, 4096, 2, 16), dtype), jnp.ones((1, 4096, 2, 16), dtype)

    def attend(q):
        return jax_fa.flash_attention(q, k, v, implementation=backend)

    out, pullback = jax.vjp(attend, q)
    assert out.dtype == q.dtype
    np.testing.assert_array_equal(np.float32(out), 1)
    assert pullback(out)[0].dtype == q.dtype
    assert jax_fa.dot_product_attention(q, k, v, implementation=backend).dtype == q.dtype
