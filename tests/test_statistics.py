"""Softmax max and sum have the gradient of the log-sum-exp: blocks of keys merged by any formula are the whole."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa import ascend
from jax_fa.backends.ascend import installation
from jax_fa.testing import oracle

B, SQ, SKV, N, D = 2, 21, 48, 3, 16
CUT = 20  # of the keys
NORMAL = np.random.default_rng(0).standard_normal
X = tuple(NORMAL((B, N, size, D)).astype(np.float32) for size in (SQ, SKV, SKV))
DOUT, DLSE = NORMAL((B, N, SQ, D)).astype(np.float32), NORMAL((B, N, SQ)).astype(np.float32)


# --- formulas: (out, max, sum) of two blocks to out and log-sum-exp; max and sum `B N Sq 1`


def by_running_max(first, second):
    """As context-parallel training code updates its accumulators."""
    (out_a, m_a, l_a), (out_b, m_b, l_b) = first, second
    m = jnp.maximum(m_a, m_b)
    a, b = l_a * jnp.exp(m_a - m), l_b * jnp.exp(m_b - m)
    return out_a * (a / (a + b)) + out_b * (b / (a + b)), (m + jnp.log(a + b))[..., 0]


def by_logsumexp(first, second):
    (out_a, *a), (out_b, *b) = first, second
    a, b = (m + jnp.log(l) for m, l in (a, b))
    lse = jnp.logaddexp(a, b)
    return out_a * jnp.exp(a - lse) + out_b * jnp.exp(b - lse), lse[..., 0]


def by_sigmoid(first, second):
    (out_a, *a), (out_b, *b) = first, second
    a, b = (m + jnp.log(l) for m, l in (a, b))
    return out_a - jax.nn.sigmoid(b - a) * (out_a - out_b), (a - jax.nn.log_sigmoid(a - b))[..., 0]


def by_the_first_max(first, second):
    """Relative to one block's max, in powers of two."""
    (out_a, m_a, l_a), (out_b, m_b, l_b) = first, second
    b = l_b * jnp.exp2((m_b - m_a) / jnp.log(2.0))
    return (out_a * l_a + out_b * b) / (l_a + b), (m_a + jnp.log(l_a + b))[..., 0]


FORMULAS = [by_running_max, by_logsumexp, by_sigmoid, by_the_first_max]


def _score(query, key, value, backend, **options):
    """(out, max, sum)."""
    found = jax_fa.flash_attention_score(
        query,
        key,
        value,
        head_num=N,
        input_layout="BNSD",
        scale_value=D**-0.5,
        implementation=backend,
        **options,
    )
    # Any of the equal lanes, or their mean.
    return found.attention_out, found.softmax_max.mean(-1, keepdims=True), found.softmax_sum[..., 3:4]


def _merged(formula, backend, query, key, value):
    first = _score(query, key[:, :, :CUT], value[:, :, :CUT], backend)
    second = _score(query, key[:, :, CUT:], value[:, :, CUT:], backend)
    return formula(first, second)


def _canonical(x):
    return np.asarray(x).swapaxes(1, 2)


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f.__name__)
def test_two_blocks_are_one(formula, backend):
    """Results and gradients, in reverse and in forward mode."""
    run = partial(_merged, formula, backend)
    (out, lse), gradients = jax.jit(lambda *x: (run(*x), jax.vjp(run, *x)[1]((DOUT, DLSE))))(*X)
    want = oracle.attention(*map(_canonical, X))
    np.testing.assert_allclose(_canonical(out), want.out, atol=1e-6)
    np.testing.assert_allclose(lse, want.lse, rtol=1e-6)
    expected = want.gradients(_canonical(DOUT), DLSE).values()
    for found, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(_canonical(found), wanted, atol=4e-6)
    along = tuple(np.cos(3 * x) for x in X)
    _, moved = jax.jit(lambda x, t: jax.jvp(run, x, t))(X, along)
    pushed = sum(np.vdot(c, t) for c, t in zip((DOUT, DLSE), moved, strict=True))
    pulled = sum(np.vdot(g, _canonical(t)) for g, t in zip(expected, along, strict=True))
    np.testing.assert_allclose(pushed, pulled, rtol=1e-4)


@pytest.mark.parametrize("formula", FORMULAS[:2], ids=lambda f: f.__name__)
def test_second_derivatives(formula, backend):
    def loss(attend, x):
        return sum(jnp.sum(jnp.sin(y)) for y in attend(*x))

    def whole(query, key, value):
        return jax_fa.flash_attention(
            query, key, value, layout="BNSD", return_logsumexp=True, implementation=backend
        )

    along = tuple(np.cos(3 * x) for x in X)

    def product(attend):
        return jax.jit(lambda x: jax.jvp(jax.grad(partial(loss, attend)), (x,), (along,))[1])(X)

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5),
        product(partial(_merged, formula, backend)),
        product(whole),
    )


@pytest.mark.parametrize("formula", [by_running_max], ids=lambda f: f.__name__)
def test_a_block_that_some_rows_do_not_see(formula, backend):
    """Its sum of FLT_MAX takes no part, and no gradient is NaN."""

    def run(query, key, value):
        options = {"sparse_mode": 4, "pre_tokens": 2**31 - 1}
        # Bottom-right: query i sees keys up to i + 27. Rows before the second block's keys see none of them.
        first = _score(query, key[:, :, :CUT], value[:, :, :CUT], backend)
        second = _score(query, key[:, :, CUT:], value[:, :, CUT:], backend, next_tokens=-14, **options)
        return formula(first, second)

    with jax.debug_nans(True):
        (out, lse), gradients = run(*X), jax.vjp(run, *X)[1]((DOUT, DLSE))
    visible = np.arange(SKV) < CUT
    edge = np.arange(SQ)[:, None] + (SKV - CUT - SQ) - 14 + CUT
    visible = visible | (np.arange(SKV) <= edge)
    assert not visible[0, CUT:].any() and visible[-1, CUT:].any()
    want = oracle.attention(*map(_canonical, X), visible=visible)
    np.testing.assert_allclose(_canonical(out), want.out, atol=1e-6)
    np.testing.assert_allclose(lse, want.lse, rtol=1e-6)
    for found, wanted in zip(gradients, want.gradients(_canonical(DOUT), DLSE).values(), strict=True):
        np.testing.assert_allclose(_canonical(found), wanted, atol=4e-6)


def test_packed_sequences(backend):
    """Layout TND: statistics by token carry it too."""
    query, key, value = (NORMAL((size, N, D)).astype(np.float32) for size in (12, 30, 30))
    ends = (5, 12)

    def block(query, key, value, kv_ends):
        found = jax_fa.flash_attention_score(
            query,
            key,
            value,
            head_num=N,
            input_layout="TND",
            scale_value=D**-0.5,
            actual_seq_qlen=ends,
            actual_seq_kvlen=kv_ends,
            implementation=backend,
        )
        return found.attention_out, found.softmax_max[..., :1], found.softmax_sum[..., :1]

    def merged(query, key, value):
        # Each sequence has 15 keys, of which the first block has 6.
        pick = np.arange(30) % 15 < 6
        first, second = ((key[p], value[p]) for p in (pick, ~pick))
        return by_running_max(block(query, *first, (6, 12)), block(query, *second, (9, 18)))[0]

    def whole(query, key, value):
        return block(query, key, value, (15, 30))[0]

    dout = np.cos(np.arange(12 * N * D, dtype=np.float32)).reshape(12, N, D)
    found, want = (
        jax.jit(lambda *x, f=f: jax.vjp(f, *x)[1](dout))(query, key, value) for f in (merged, whole)
    )
    jax.tree.map(partial(np.testing.assert_allclose, atol=4e-6), found, want)


@pytest.mark.skipif(installation.absence() is not None, reason="needs the extension")
def test_through_the_emulator_of_cann():
    assert ascend.emulator_dir()
    run = partial(_merged, by_running_max, "ascend")
    gradients = jax.vjp(run, *X)[1]((DOUT, DLSE))
    want = oracle.attention(*map(_canonical, X)).gradients(_canonical(DOUT), DLSE).values()
    for found, wanted in zip(gradients, want, strict=True):
        np.testing.assert_allclose(_canonical(found), wanted, atol=4e-6)


def test_unused_statistics_cost_nothing():
    """Without a use of them the backward has no cotangent of the log-sum-exp."""

    def loss(query):
        return _score(query, *X[1:], "xla")[0].sum()

    def with_statistics(query):
        return sum(x.sum() for x in _score(query, *X[1:], "xla"))

    def cotangents(loss) -> bool:
        return "logsumexp=True" in str(jax.make_jaxpr(jax.grad(loss))(X[0]))

    assert not cotangents(loss) and cotangents(with_statistics)
