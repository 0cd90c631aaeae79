"""Unions and complements of masks: the algebra against boolean arrays, and calls in parts against the oracle."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tables import mostly_slow

import jax_fa
from jax_fa import masks
from jax_fa.backends.ascend import installation
from jax_fa.backends.xla import tiling
from jax_fa.masks import Band, Causal, Complement, Dense, Lengths, SegmentIds, SlidingWindow, Union
from jax_fa.testing import derivatives, oracle, programs
from jax_fa.testing.case_masks import BOTTOM, UNIONS
from jax_fa.testing.cases import Case, check

SQ, SKV = 5, 8
_RANDOM = np.random.default_rng(0)
_SQUARE = _RANDOM.random((SQ, SKV)) < 0.5
_IDS = np.array([0, 1, 1, 2, 0]), np.array([1, 0, 0, 2, 1, 1, 2, 0])
# Masks, and what they show.
ATOMS = [
    (Causal(), oracle.causal(SQ, SKV)),
    (Causal(offset=3), oracle.band(SQ, SKV, None, 0, offset=3)),
    (SlidingWindow(2, None), oracle.band(SQ, SKV, 2)),
    (SlidingWindow(1), oracle.band(SQ, SKV, 1, 0)),
    (Band(-2, 4), oracle.band(SQ, SKV, -2, 4)),
    (Band(5, -7), np.zeros((SQ, SKV), bool)),
    (Band(), np.ones((SQ, SKV), bool)),
    (Lengths(key=4), np.arange(SKV) < 4),
    (Lengths(query=3, key=6), oracle.lengths(SQ, SKV, 3, 6).reshape(SQ, SKV)),
    (masks.CumulativeLengths((2, 2, 4), (3, 5, 7)), oracle.cumulative(SQ, SKV, (2, 2, 4), (3, 5, 7))),
    (Dense(_SQUARE), _SQUARE),
    (Dense(_SQUARE[:, :1]), _SQUARE[:, :1]),
]


def _shown(mask, sq=SQ, skv=SKV) -> np.ndarray:
    j, found = np.arange(skv), np.zeros((1, sq, skv), int)
    for rules in masks.parts(mask, (), 1, sq, skv):
        part = np.ones((1, sq, skv), bool) if rules.dense is None else np.asarray(rules.dense)
        for bound, inside in ((rules.lower, np.greater_equal), (rules.upper, np.less)):
            part = part if bound is None else part & inside(j, np.asarray(bound)[..., None])
        if rules.segment_row is not None:
            row, key = np.asarray(rules.segment_row)[..., None], np.asarray(rules.segment_key)[..., None, :]
            part = part & ((row < 0) | (row == key))
        found = found + part
    assert found.max(initial=0) <= 1  # the parts are disjoint
    return found[0] == 1


def _formula(draw, depth: int):
    """A mask and what it shows."""
    kind = draw(st.integers(0, 3)) if depth else 0
    if kind == 0:
        return ATOMS[draw(st.integers(0, len(ATOMS) - 1))]
    mask, shown = _formula(draw, depth - 1)
    if kind == 1:
        return ~mask, ~shown
    other, more = _formula(draw, depth - 1)
    return (mask & other, shown & more) if kind == 2 else (mask | other, shown | more)


@settings(max_examples=20)
@given(st.data())
def test_formulas(data):
    mask, shown = _formula(data.draw, 3)
    try:
        found = _shown(mask)
    except NotImplementedError as error:
        assert "may have at most 8 intervals" in str(error)
    else:
        np.testing.assert_array_equal(found, np.broadcast_to(shown, found.shape), err_msg=repr(mask))


def test_what_unions_are_made_of():
    assert len(masks.parts(Causal() & (Lengths(key=4) | SlidingWindow(2)), (), 1, SQ, SKV)) == 2
    assert masks.parts(~Band(), (), 1, SQ, SKV)[0].upper.max() == 0
    (one,) = masks.parts(Dense(_SQUARE) | Dense(~_SQUARE), (), 1, SQ, SKV)
    assert one.lower is None and np.asarray(one.dense).all()
    # Of a column and a row no square is made.
    column, row = Dense(_SQUARE[:, :1]), Dense(_SQUARE[:1])
    assert all(x.dense.size <= SQ * SKV for x in masks.parts(column | row, (), 1, SQ, SKV))
    np.testing.assert_array_equal(_shown(column | row), _SQUARE[:, :1] | _SQUARE[:1])
    assert ~~Causal() == Causal() and isinstance(~Causal(), Complement)
    assert (Causal() | Band()) | Band(1, 1) == Union((Causal(), Band(), Band(1, 1)))
    assert isinstance(_SQUARE | Causal(), Union) and isinstance(jnp.asarray(_SQUARE) | Causal(), Union)


def test_segments():
    """Of one in a union no complement is needed; of known ones that lie together there is one."""
    ids, key = _IDS
    want = oracle.segments(ids, key)
    np.testing.assert_array_equal(_shown(SegmentIds(ids, key) | Causal()), want | oracle.causal(SQ, SKV))
    np.testing.assert_array_equal(_shown(_SQUARE | SegmentIds(ids, key)), want | _SQUARE)
    together = SegmentIds(np.sort(ids), np.sort(key))
    np.testing.assert_array_equal(_shown(~together), ~oracle.segments(np.sort(ids), np.sort(key)))
    for mask in (~SegmentIds(ids, key), SegmentIds(ids, key) | SegmentIds(ids + 1, key)):
        with pytest.raises(
            NotImplementedError, match="cannot take the complement of SegmentIds that lie apart"
        ):
            _shown(mask)


def test_too_many_parts():
    mask = Band(0, 0)
    for i in range(1, 9):
        mask = mask | Band(-9 * i, 9 * i)
    with pytest.raises(NotImplementedError, match="at most 8 intervals of keys for each row; got 9"):
        jax_fa.flash_attention(*np.ones((3, 4, 1, 8), np.float32), mask=mask)


# --- calls


def _case(kind: str, **options) -> Case:
    return Case(name=f"union-{kind}", mask=kind, **options)


@pytest.mark.parametrize("kind", mostly_slow(["sinks_window", "lengths_segments"], of=UNIONS))
def test_forward_and_gradient(kind, backend):
    case = _case(kind)
    run = jax.jit(partial(case.gradient, implementation=backend))
    (out, lse), gradients = run(case.operands(), *case.cotangents())
    check(case, out, lse, gradients)


@pytest.mark.skipif(installation.absence() is not None, reason="needs the CANN adapter")
@pytest.mark.parametrize("kind", mostly_slow(["sinks_window"], of=UNIONS))
def test_ascend(kind):
    case = _case(kind)
    (out, lse), gradients = case.gradient(case.operands(), *case.cotangents(), implementation="ascend")
    check(case, out, lse, gradients)


EVERYTHING = {"bias": "BNQK", "slopes": "N", "soft_cap": 4.0, "dropout": 0.3, "layout": "BNSD", "Dv": 24}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_every_other_feature(dtype, backend):
    """Dropout has the bits of the whole call, and ALiBi its positions."""
    case = _case("sinks_window", dtype=dtype, **EVERYTHING)
    dout, dlse = case.cotangents()
    run = jax.jit(partial(case.gradient, implementation=backend))
    (out, lse), gradients = run(case.stored_operands(), case.stored(dout), dlse)
    check(case, out, lse, gradients)


def test_sinks_and_the_largest_logit(backend):
    case = _case("not_lengths")
    sinks = np.array([0.5, -1.0, 2.0, 0.0], np.float32)

    def run(mask):
        options = {"sinks": sinks, "return_logsumexp": True, "return_max_logits": True}
        call = partial(jax_fa.flash_attention, mask=mask, implementation=backend, **options)
        return jax.value_and_grad(
            lambda x: (lambda y: (sum(map(jnp.sum, y[:2])), y))(call(**x)), has_aux=True
        )

    x = case.operands()
    (_, found), gradients = jax.jit(run(case.library_mask()))(x)
    (_, want), expected = jax.jit(run(case.visible()))(x)
    for a, b in zip(jax.tree.leaves((found, gradients)), jax.tree.leaves((want, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sinks_window", "dense_window"])
def test_every_derivative(kind, backend):
    case = replace(_case(kind), Sq=19, Skv=23)
    x, along = case.operands(), derivatives.tangents(case)
    z = case.cotangents()

    def all_of(mask):
        def attend(x):
            return jax_fa.flash_attention(**x, mask=mask, return_logsumexp=True, implementation=backend)

        def gradient(x):
            return jax.vjp(attend, x)[1](z)[0]

        tangent = jax.jvp(attend, (x,), (along,))[1]
        second = jax.jvp(gradient, (x,), (along,))
        twice = jax.vjp(gradient, x)[1](along)[0]
        return tangent, second, twice

    found, want = (jax.jit(all_of)(mask) for mask in (case.library_mask(), case.visible()))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_vmap(backend):
    """Over masks and over arrays."""
    case = replace(_case("two_bands"), B=())
    x, (dout, dlse) = case.operands(), case.cotangents()
    offsets = jnp.array([9, -6, 0])

    def run(offset, query):
        def attend(query):
            mask = Band(4, 0, offset=offset) | Band(-3, 8)
            return jax_fa.flash_attention(
                **x | {"query": query}, mask=mask, return_logsumexp=True, implementation=backend
            )

        results, pullback = jax.vjp(attend, query)
        return results, pullback((dout, dlse))

    found = jax.jit(jax.vmap(run, (0, None)))(offsets, x["query"])
    both = jax.jit(jax.vmap(run))(offsets, jnp.stack([x["query"]] * 3))
    for i, offset in enumerate(offsets):
        one = jax.jit(run)(offset, x["query"])
        for some in (found, both):
            for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(one), strict=True):
                np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("explicit", mostly_slow([True], of=[False, True]))
def test_sharded(explicit, backend):
    axis = AxisType.Explicit if explicit else AxisType.Auto
    mesh = jax.make_mesh((2, 2), ("b", "n"), (axis, axis), devices=jax.devices("cpu")[:4])
    case = _case("two_bands")
    x, mask = case.operands(), case.library_mask()

    def loss(x, mask):
        out = jax_fa.flash_attention(**x, mask=mask, implementation=backend)
        return jnp.sum(out * out)

    want = jax.jit(jax.value_and_grad(loss))(x, mask)
    with jax.set_mesh(mesh):
        put = jax.device_put(x, NamedSharding(mesh, P("b", None, "n")))
        put = put, jax.device_put(mask, NamedSharding(mesh, P("b")))
        found = jax.jit(jax.value_and_grad(loss))(*put)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("real_tiles")
@pytest.mark.parametrize(
    ("data", "shared"),
    [pytest.param(False, False, id="static-rows"), pytest.param(True, True, id="data-shared-keys")],
)
def test_second_order_of_several_tiles_in_shard_map(data, shared, backend):
    """More than 2^21 logits on every device; keys and values that devices share have the sum of their gradients."""
    mesh = jax.make_mesh((2,), ("b",), (AxisType.Auto,), devices=jax.devices("cpu")[:2])
    S, N, D = 1100, 2, 8
    assert N * S * S > tiling.ONE_TILE_ELEMENTS > 1
    normal = np.random.default_rng(0).standard_normal
    keys = (1 if shared else 2, S, N, D)
    x, along = ([normal(shape, np.float32) for shape in ((2, S, N, D), keys, keys)] for _ in range(2))
    sizes = np.array([4, 40] if data else [4, 4])

    def attend(q, k, v, sizes):
        k, v = (jnp.broadcast_to(y, q.shape) for y in (k, v))
        mask = Causal() & (Lengths(key=sizes if data else 4) | SlidingWindow(300))
        return jax_fa.flash_attention(q, k, v, mask=mask, implementation=backend)

    def dense(q, k, v, sizes):
        i, j = np.arange(S)[:, None], np.arange(S)
        visible = (j <= i) & ((j < sizes[:, None, None, None]) | (i - j <= 300))
        k, v = (jnp.broadcast_to(y, q.shape) for y in (k, v))
        return jax.nn.dot_product_attention(q, k, v, mask=visible)

    def derivatives(attend):
        """The Hessian of a loss times a vector, forward over reverse and reverse over reverse."""

        def of(x, along, sizes):
            def gradient(x):
                return jax.grad(lambda x: jnp.sum(jnp.sin(attend(*x, sizes))))(x)

            return jax.jvp(gradient, (x,), (along,))[1], jax.vjp(gradient, x)[1](along)[0]

        return of

    of_keys = P() if shared else P("b")
    specs = [P("b"), of_keys, of_keys]
    run = jax.shard_map(
        derivatives(attend), mesh=mesh, in_specs=(specs, specs, P("b")), out_specs=(specs, specs)
    )
    found = jax.jit(run)(x, along, sizes)
    want = jax.jit(derivatives(dense))(x, along, sizes)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        oracle.assert_close_to_oracle(a, b, b, "second", 4 * oracle.FLOOR["float32"])


@pytest.mark.parametrize("strategy", mostly_slow(["all_gather"], of=["ring", "ulysses", "all_gather"]))
def test_sequence_parallel(strategy):
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,), devices=jax.devices("cpu")[:2])
    mask = Causal() & (Lengths(key=3) | SlidingWindow(5) | SegmentIds(np.array([1, 2] * 8)))
    x = [np.random.default_rng(i).standard_normal((1, 16, 2, 8)).astype(np.float32) for i in range(3)]
    run = partial(jax_fa.sequence_parallel_attention, axis_name="x", mask=mask, strategy=strategy)
    spec = P(None, "x")
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))
    one = jax.jit(partial(jax_fa.flash_attention, mask=mask))

    def gradient(attend):
        return jax.grad(lambda x: jnp.sum(attend(*x) ** 2))(x)

    for a, b in zip(gradient(sharded), gradient(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_no_array_of_rows_and_keys():
    """Tiles between the parts are not visited, and memory is linear."""
    S = 4096
    mask = Causal() & (Lengths(key=4) | SlidingWindow(255))
    x = jax.ShapeDtypeStruct((S, 1, 8), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(jax_fa.flash_attention(q, k, v, mask=mask))

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x)
    assert programs.temporary_bytes(lowered) < S * S
    names = programs.primitives(jax.grad(loss, (0, 1, 2)), x, x, x)
    assert sum(count for name, count in names.items() if name.startswith("flash_attention")) == 4


def test_explain():
    x = jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.float32)
    told = jax_fa.explain(x, x, x, mask=~Band(3, 6), platforms="cpu")
    assert "2 such calls, one for each disjoint part of the visible keys, are merged" in str(told)
    assert "such calls" not in str(jax_fa.explain(x, x, x, mask=~Causal(BOTTOM), platforms="cpu"))
