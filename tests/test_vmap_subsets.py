"""Each primitive under vmap with any subset of its inputs mapped, at any axis, against a Python loop.

The inputs are those of the primitives themselves: what the forward saved and the cotangents may be mapped where no
operand is (`jax.vmap` of a pullback, `jax.jacrev`), and the other way round.
"""

from dataclasses import fields, replace
from functools import cache
from itertools import combinations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa import primitives
from jax_fa.call import Operands, Saved
from jax_fa.entry import request_of
from jax_fa.masks import Causal, Dense, Lengths, SegmentIds

SIZE, SQ, SKV, N, K, D = 3, 5, 7, 4, 2, 8
OPERANDS = ("query", "key", "value", "bias", "upper", "alibi_slopes")
SAVED = ("out", "m", "l", "dout", "dlogsumexp")


@cache
def _inputs():
    """The problem of one call, and every input of its backward with SIZE values along a new front axis."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    floats = {
        "query": normal(SIZE, SQ, N, D),
        "key": normal(SIZE, SKV, K, D),
        "value": normal(SIZE, SKV, K, D),
        "bias": normal(SIZE, 1, SQ, SKV),
        "alibi_slopes": jnp.abs(normal(SIZE, N)) / 8,
    }
    lengths = jnp.array([4, SKV, 2])
    calls = []
    for i in range(SIZE):
        one = {name: x[i] for name, x in floats.items()}
        mask = Causal("bottom-right") & Lengths(key=lengths[i])
        call = request_of(jax_fa.flash_attention, **one, mask=mask, return_logsumexp=True).call
        calls.append((call.problem, call.operands))
    operands = jax.tree.map(lambda *x: jnp.stack(x), *(found for _, found in calls))
    saved = Saved(
        out=normal(SIZE, SQ, N, D),
        m=jnp.abs(normal(SIZE, N, SQ)) + 2,
        l=jnp.abs(normal(SIZE, N, SQ)) + 1,
        dout=normal(SIZE, SQ, N, D),
        dlogsumexp=normal(SIZE, N, SQ),
    )
    return calls[0][0], operands, saved


@cache
def _data_inputs():
    """The same for a bfloat16 call in which everything that may be data is: scalars, segments, positions, dropout."""
    _problem, operands, saved = _inputs()
    rng = np.random.default_rng(1)

    calls = []
    for i in range(SIZE):
        one = {n: getattr(operands, n)[i].astype(jnp.bfloat16) for n in ("query", "key", "value")}
        ids = (jnp.asarray(rng.integers(0, 2, n)) for n in (SQ, SKV))
        mask = SegmentIds(*ids) & Causal("bottom-right") & Dense(jnp.asarray(rng.random((1, SQ, SKV)) < 0.9))
        slopes = jnp.abs(jnp.asarray(rng.standard_normal(N), jnp.float32))
        seen = []

        def request(scalar, one=one, mask=mask, slopes=slopes, i=i, seen=seen):
            call = request_of(
                jax_fa.flash_attention,
                **one,
                mask=mask,
                alibi_slopes=slopes,
                scale=scalar,
                logits_soft_cap=4 * scalar,
                dropout_rate=scalar,
                dropout_key=jax.random.key(i),
                return_logsumexp=True,
            ).call
            seen.append(call.problem)
            return call.operands

        calls.append((jax.jit(request)(jnp.float32(0.2 + 0.1 * i)), seen[0]))
    operands = jax.tree.map(lambda *x: jnp.stack(x), *(x for x, _ in calls))
    narrow = {n: getattr(saved, n).astype(jnp.bfloat16) for n in ("out", "dout")}
    rounding = jnp.asarray(rng.random(saved.out.shape) - 0.5, jnp.bfloat16)
    return calls[0][1], operands, replace(saved, **narrow, rounding=rounding)


def _names(tree) -> list[str]:
    return [f.name for f in fields(tree) if getattr(tree, f.name) is not None]


def _run(backend: str, mapped: frozenset[str], front: bool = True, made=_inputs, along: bool = False) -> None:
    """Forward and backward (`along`: derivatives along tangents) under vmap and in a loop."""
    _problem, operands, saved = made()
    inputs = {n: getattr(operands, n) for n in _names(operands)}
    inputs |= {n: getattr(saved, n) for n in _names(saved)}
    if along:
        inputs |= _directions()
    rng = np.random.default_rng(len(mapped))
    at = {n: (0 if front else int(rng.integers(x.ndim))) if n in mapped else None for n, x in inputs.items()}
    given = {n: x[0] if at[n] is None else jnp.moveaxis(x, 0, at[n]) for n, x in inputs.items()}

    run = _along(backend) if along else _one(backend, made)
    found = jax.vmap(run, in_axes=(at,))(given)
    for i in range(SIZE):
        want = run({n: x[i] if n in mapped else x[0] for n, x in inputs.items()})
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            assert a.shape == (SIZE, *b.shape), (sorted(mapped), a.shape, b.shape)
            # What sums over broadcast dims is rounded once, in either order of the sum.
            close = 2e-5 if b.dtype == jnp.float32 else 2**-7
            a, b = (np.asarray(x, np.float32) for x in (a[i], b))
            np.testing.assert_allclose(a, b, rtol=close, atol=close, err_msg=str(sorted(mapped)))


@cache
def _one(backend: str, made):
    problem, operands, saved = made()
    problem = replace(problem, implementation=backend)

    @jax.jit
    def run(x):
        operands_ = Operands(**{n: x[n] for n in _names(operands)})
        saved_ = Saved(**{n: x[n] for n in _names(saved)})
        gradients = primitives.backward(problem, operands_, saved_)
        return primitives.forward(problem, operands_), [g for _, g in gradients.items() if g is not None]

    return run


DIRECTIONS = ("query", "key", "bias", "alibi_slopes")


@cache
def _directions() -> dict[str, jax.Array]:
    """Tangents of operands ("query'") and of the cotangents."""
    rng = np.random.default_rng(2)
    _, operands, saved = _inputs()
    arrays = {f"{n}'": getattr(operands, n) for n in DIRECTIONS}
    arrays |= {"dout_tangent": saved.dout, "dlogsumexp_tangent": saved.dlogsumexp}
    return {n: jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for n, x in arrays.items()}


@cache
def _along(backend: str):
    problem, operands, saved = _inputs()
    problem = replace(problem, implementation=backend)

    @jax.jit
    def run(x):
        given = Operands(**{n: x[n] for n in _names(operands)})
        tangents = Operands(**{n: x[f"{n}'"] for n in DIRECTIONS})
        plain = Saved(**{n: x[n] for n in ("out", "m", "l")})
        full = Saved(**{n: x[n] for n in (*_names(saved), "dout_tangent", "dlogsumexp_tangent")})
        others = Operands(key=x["key'"])
        return (
            primitives.jvp(problem, given, tangents)[-2:],
            primitives.tangent(problem, given, plain, tangents),
            primitives.second(problem, given, full, tangents),
            primitives.second_tangent(problem, given, plain, tangents, others),
        )

    return run


# Every subset of five groups; then each input alone, and all but each.
GROUPS = (("query",), ("key", "value"), ("out", "m", "l"), ("dout",), ("bias", "upper", "alibi_slopes"))
SUBSETS = [
    frozenset(name for group, taken in zip(GROUPS, which, strict=True) if taken for name in group)
    for which in product((False, True), repeat=len(GROUPS))
    if any(which)
]
ALONE = [frozenset({name}) for name in (*OPERANDS, *SAVED)]
ALL_BUT_ONE = [frozenset((*OPERANDS, *SAVED)) - one for one in ALONE]
PAIRS = [frozenset(pair) for pair in combinations((*OPERANDS, *SAVED), 2)]


def _label(mapped) -> str:
    return "+".join(sorted(mapped))


@pytest.mark.in_turn
@pytest.mark.parametrize("mapped", list(dict.fromkeys([*SUBSETS, *ALONE])), ids=_label)
def test_subsets(mapped, backend):
    _run(backend, mapped)


@pytest.mark.in_turn(1)
@pytest.mark.parametrize("mapped", ALL_BUT_ONE, ids=_label)
def test_subsets_mapped_anywhere(mapped, backend):
    _run(backend, mapped, front=False)


DATA = (
    *("mask", "lower", "upper", "segment_row", "segment_key", "position", "alibi_slopes"),
    *("scale", "soft_cap", "keep_threshold", "dropout_seed", "dropout_stream", "rounding"),
)


@pytest.mark.in_turn
@pytest.mark.parametrize("name", DATA)
def test_data_alone(name, backend):
    _run(backend, frozenset({name}), made=_data_inputs)


@pytest.mark.in_turn
@pytest.mark.parametrize("count", [0, 4, 9, 13])
def test_data_mapped_anywhere(count, backend):
    """All inputs but a random few."""
    _, operands, saved = _data_inputs()
    names = [*_names(operands), *_names(saved)]
    left_out = np.random.default_rng(count).choice(names, count, replace=False)
    _run(backend, frozenset(names) - set(left_out), front=False, made=_data_inputs)


@pytest.mark.slow
@pytest.mark.parametrize("mapped", PAIRS, ids=_label)
def test_pairs(mapped, backend):
    _run(backend, mapped, front=False)


ALONG = (
    *("query'", "key'", "bias'", "dout_tangent", "dlogsumexp_tangent", "query", "key", "bias", "dout", "out"),
    *("query'+key'+bias'+alibi_slopes'", "query+key+value+out+m+l+query'", "key'+dout+dout_tangent"),
)


@pytest.mark.in_turn
@pytest.mark.parametrize("mapped", ALONG)
def test_derivatives_along_tangents(mapped, backend):
    """Also where only tangents are mapped (`jax.jacfwd`) or only what they are tangents of."""
    _run(backend, frozenset(mapped.split("+")), front=len(mapped) % 2 == 0, along=True)


# --- through the public function


def _call(backend, q, k, v):
    return jax_fa.flash_attention(q, k, v, mask=Causal("bottom-right"), implementation=backend)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jacrev(dtype, backend):
    _, operands, _ = _inputs()
    q, k, v = (getattr(operands, n)[0].astype(dtype) for n in ("query", "key", "value"))
    found = jax.jit(jax.jacrev(lambda q: _call(backend, q, k, v)))(q)
    assert found.shape == (*q.shape, *q.shape)
    out, pullback = jax.vjp(lambda q: _call(backend, q, k, v), q)
    for index in ((0, 0, 0), (3, 2, 5), (SQ - 1, N - 1, D - 1)):
        (row,) = pullback(jnp.zeros_like(out).at[index].set(1))
        np.testing.assert_allclose(
            np.asarray(found[index], np.float32), np.asarray(row, np.float32), atol=1e-5
        )


def test_nested_cotangents(backend):
    """Cotangents mapped twice, at different axes, over operands that are not."""
    _, operands, saved = _inputs()
    q, k, v = (getattr(operands, n)[0] for n in ("query", "key", "value"))
    _, pullback = jax.vjp(lambda *x: _call(backend, *x), q, k, v)
    douts = jnp.stack([saved.dout, 2 * saved.dout, saved.dout - 1, saved.dout**2], axis=2)
    found = jax.jit(jax.vmap(jax.vmap(pullback), in_axes=1, out_axes=1))(jnp.moveaxis(douts, 2, 1))
    for i, j in ((0, 0), (2, 3), (1, 2)):
        for a, b in zip(found, pullback(douts[i, :, j]), strict=True):
            np.testing.assert_allclose(a[i, j], b, rtol=2e-5, atol=2e-5)


def test_gradients_per_target(backend):
    """A shared trunk, targets mapped: the gradient is added to something of the right shape."""
    _, operands, saved = _inputs()
    q, k, v = (getattr(operands, n)[0] for n in ("query", "key", "value"))

    def gradient(target):
        return jax.grad(lambda q: jnp.mean((q + _call(backend, q, k, v) - target) ** 2))(q)

    found = jax.jit(jax.vmap(gradient))(saved.dout)
    for i in range(SIZE):
        np.testing.assert_allclose(found[i], gradient(saved.dout[i]), rtol=2e-5, atol=1e-6)
