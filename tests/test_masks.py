"""Masks against their brute-force definition: which keys are visible to every row, before any attention."""

import copy
import dataclasses
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_fa
from jax_fa import masks
from jax_fa.masks import Band, Causal, CumulativeLengths, Dense, Lengths, Prefix, SegmentIds, SlidingWindow
from jax_fa.testing import oracle
from jax_fa.testing.case_masks import BOTTOM, KINDS, WITHIN_PACKED
from jax_fa.testing.cases import Case, check

# Few sizes: each compiles the few operations that turn a mask into intervals.
SIZES = st.sampled_from([1, 5, 8])
ALIGN = st.sampled_from(["top-left", BOTTOM])


def visible(mask, batch: tuple[int, ...], heads: int, sq: int, skv: int) -> np.ndarray:
    """What the kernels would let each row attend to, `*B N Sq Skv`."""
    parts = masks.parts(mask, batch, heads, sq, skv)
    found = np.sum([visible_by(rules, batch, heads, sq, skv).astype(int) for rules in parts], axis=0)
    assert found.max(initial=0) <= 1  # they are disjoint
    return found == 1


def visible_by(rules: masks.Rules, batch: tuple[int, ...], heads: int, sq: int, skv: int) -> np.ndarray:
    j = np.arange(skv)
    found = np.ones((*batch, heads, sq, skv), bool)
    for bound, inside in ((rules.lower, np.greater_equal), (rules.upper, np.less)):
        if bound is not None:
            assert bound.dtype == jnp.int32 and bound.ndim == len(batch) + 2
            assert (bound >= 0).all() and (bound <= skv).all()
            found = found & inside(j, np.asarray(bound)[..., None])
    if rules.segment_row is not None:
        row, key = np.asarray(rules.segment_row), np.asarray(rules.segment_key)
        assert row.dtype == key.dtype == np.int32 and row.ndim == key.ndim == len(batch) + 2
        assert key.shape[-1] == skv and (key >= 0).all()
        found = found & ((row < 0)[..., None] | (row[..., None] == key[..., None, :]))
    return found if rules.dense is None else found & np.asarray(rules.dense)


def same(mask, want, batch: tuple[int, ...], sq: int, skv: int, heads: int = 2) -> None:
    found = visible(mask, batch, heads, sq, skv)
    np.testing.assert_array_equal(found, np.broadcast_to(want, found.shape), err_msg=repr(mask))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("B", [(), (2,), (2, 3)], ids=str)
def test_every_kind(kind, B):
    case = Case(name="masks", B=B)
    mask = masks.as_mask(KINDS[kind].make(case))
    same(mask, KINDS[kind].visible(case), B, case.Sq, case.Skv, case.N)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_with_64_bit_integers(kind):
    case = Case(name="masks")
    with jax.enable_x64(True):
        mask = jax.tree.map(
            lambda x: x.astype(jnp.int64) if x.dtype == jnp.int32 else x, KINDS[kind].make(case)
        )
        same(masks.as_mask(mask), KINDS[kind].visible(case), case.B, case.Sq, case.Skv, case.N)


# --- properties

_properties = partial(settings, max_examples=40)


@_properties()
@given(
    SIZES, SIZES, st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9), ALIGN, st.integers(-9, 9)
)
def test_band(sq, skv, left, right, align, offset):
    same(Band(left, right, align, offset), oracle.band(sq, skv, left, right, align, offset), (), sq, skv)


BIG = st.sampled_from([-(2**40), -(2**31), -(2**30), 2**30, 2**31 - 1, 2**31, 2**61])


@_properties()
@given(st.none() | BIG, st.none() | BIG, ALIGN, BIG | st.integers(-2, 2))
def test_band_of_huge_counts(left, right, align, offset):
    """Token counts like 2147483647 mean "unbounded" and must not overflow on the way."""
    same(Band(left, right, align, offset), oracle.band(5, 8, left, right, align, offset), (), 5, 8)


@_properties()
@given(SIZES, SIZES, st.none() | st.integers(0, 9), st.none() | st.integers(0, 9), ALIGN)
def test_sliding_window(sq, skv, left, right, align):
    same(SlidingWindow(left, right, align), oracle.band(sq, skv, left, right, align), (), sq, skv)


@_properties()
@given(st.data(), SIZES, SIZES, ALIGN, st.booleans())
def test_prefix(data, sq, skv, align, host):
    length = data.draw(st.lists(st.integers(0, skv), min_size=2, max_size=2))
    given_length = tuple(length) if host else np.array(length)
    same(Prefix(given_length, align), oracle.prefix(sq, skv, length, align), (2,), sq, skv)


@_properties()
@given(st.data(), SIZES, SIZES, st.booleans())
def test_lengths(data, sq, skv, host):
    query, key = (
        data.draw(st.none() | st.lists(st.integers(0, size), min_size=2, max_size=2)) for size in (sq, skv)
    )
    convert = tuple if host else np.array
    query, key = (None if x is None else convert(x) for x in (query, key))
    mask = Lengths(query=query, key=key)
    same(mask, oracle.lengths(sq, skv, query, key), (2,), sq, skv)


WITHIN = st.sampled_from(
    [
        (None, None),
        (Causal(), oracle.causal),
        (Causal(BOTTOM), partial(oracle.causal, align=BOTTOM)),
        (SlidingWindow(2, 1, BOTTOM), partial(oracle.band, left=2, right=1, align=BOTTOM)),
        (Band(-1, 3), partial(oracle.band, left=-1, right=3)),
    ]
)


@_properties()
@given(st.data(), SIZES, SIZES, WITHIN, st.booleans())
def test_cumulative_lengths(data, sq, skv, within, host):
    def ends(size):
        return sorted(data.draw(st.lists(st.integers(0, size), min_size=3, max_size=3)))

    query, key = ends(sq), ends(skv)
    convert = tuple if host else np.array
    mask = CumulativeLengths(convert(query), convert(key), within[0])
    same(mask, oracle.cumulative(sq, skv, query, key, within[1]), (), sq, skv)


@_properties()
@given(st.data(), SIZES, SIZES, WITHIN, st.sampled_from([None, 0, 7]), st.booleans(), st.booleans())
def test_segment_ids(data, sq, skv, within, padding_id, in_order, traced):
    """Ids in any order: what lies apart is one segment."""

    def ids(size):
        found = data.draw(st.lists(st.integers(-1, 3), min_size=size, max_size=size))
        return np.array(sorted(found) if in_order else found, np.int32)

    query, key = ids(sq), ids(skv)

    def rules(query, key):
        return masks.intervals(SegmentIds(query, key, within[0], padding_id=padding_id), (), 2, sq, skv)

    found = (jax.jit(rules) if traced else rules)(query, key)
    want = oracle.segments(query, key, within[1], padding_id)
    seen = visible_by(found, (), 2, sq, skv)
    np.testing.assert_array_equal(seen, np.broadcast_to(want, seen.shape))
    if in_order and not traced:
        assert found.segment_row is None and found.segment_key is None


@_properties()
@given(st.data(), SIZES, SIZES, st.sampled_from([(), (2,)]), st.booleans())
def test_segments_of_segments(data, sq, skv, B, traced):
    """Two masks that both compare labels, one of them with ids per batch entry."""

    def ids(shape):
        count = int(np.prod(shape))
        found = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
        return np.array(found, np.int32).reshape(shape)

    a, b, c, d = ids((*B, sq)), ids((*B, skv)), ids((sq,)), ids((skv,))

    def rules(a, b, c, d):
        return masks.intervals(SegmentIds(a, b) & SegmentIds(c, d, Causal()), B, 1, sq, skv)

    found = visible_by((jax.jit(rules) if traced else rules)(a, b, c, d), B, 1, sq, skv)
    want = oracle.segments(a, b) & oracle.segments(c, d, oracle.causal)
    np.testing.assert_array_equal(found, np.broadcast_to(want, found.shape))


def test_ids_as_they_are_packed_compare_no_labels():
    """Ids 1, 1, 2, 2, 3 and then 0 for padding: known ones are intervals; traced ones say so row by row."""
    ids = np.array([1, 1, 2, 2, 3, 0, 0])
    for padding_id in (None, 0):
        mask = SegmentIds(ids, within=Causal(), padding_id=padding_id)
        want = oracle.segments(ids, within=oracle.causal, padding_id=padding_id)
        assert masks.intervals(mask, (), 1, 7, 7).segment_row is None
        same(mask, want, (), 7, 7)
        traced = jax.jit(lambda mask: masks.intervals(mask, (), 1, 7, 7))(mask)
        assert (np.asarray(traced.segment_row) == -1).all()
        np.testing.assert_array_equal(visible_by(traced, (), 1, 7, 7)[0], want)


IDS = {
    np.int64: [5, 2**40 + 5, 2**40 + 5, -(2**40)],
    np.uint32: [2**31, 0, 2**32 - 1, 2**31],
    np.uint64: [2**63, 0, 2**63, 2**32],
    np.int8: [-1, 127, -128, -1],
    np.uint8: [255, 0, 255, 1],
}
# Without x64, jit makes 32-bit integers of 64-bit arguments before the library is asked.
ARRIVALS = [
    (dtype, traced, x64)
    for dtype in IDS
    for traced in (False, True)
    for x64 in (False, True)
    if x64 or not traced or np.dtype(dtype).itemsize < 8
]


@pytest.mark.parametrize(("dtype", "traced", "x64"), ARRIVALS)
def test_ids_of_every_integer_dtype(dtype, traced, x64):
    """Ids beyond int32 are told apart."""
    ids = np.array(IDS[dtype], dtype)

    def rules(ids):
        return masks.intervals(SegmentIds(ids, within=Causal()), (), 1, 4, 4)

    with jax.enable_x64(x64):
        found = visible_by((jax.jit(rules) if traced else rules)(ids), (), 1, 4, 4)[0]
    np.testing.assert_array_equal(found, oracle.segments(ids, within=oracle.causal))


def test_ids_of_different_dtypes():
    """They are compared by value, or refused."""
    query, key = np.array([1, 2**31, 2], np.uint32), np.array([-(2**31), 1, 2], np.int32)
    want = oracle.segments(query.astype(np.int64), key.astype(np.int64))
    same(SegmentIds(query, key), want, (), 3, 3)
    with pytest.raises(
        TypeError, match=r"query segment ids of dtype uint32 must fit int32, .* cast query and key"
    ):
        jax.jit(lambda *ids: masks.intervals(SegmentIds(*ids), (), 1, 3, 3))(query, key)
    with pytest.raises(TypeError, match="segment ids must have dtypes that compare; got uint64 and int32"):
        masks.intervals(SegmentIds(query.astype(np.uint64), key), (), 1, 3, 3)
    big = np.array([2**40, 1, 2])
    with pytest.raises(TypeError, match="query segment ids of dtype int64 must fit int32"):
        jax.jit(lambda key: masks.intervals(SegmentIds(big, key), (), 1, 3, 3))(key)


@_properties()
@given(st.data())
def test_intersections(data):
    """In any set of kinds, in any order, a key is visible where it is in all of them."""
    case = Case(name="intersection", Sq=9, Skv=7)
    simple = [kind for kind in KINDS if "lengths" not in kind and "_" not in kind] + [
        "band_negative",
        "dense_padding",
    ]
    chosen = data.draw(st.permutations(simple))[: data.draw(st.integers(2, 4))]
    first, *others = (masks.as_mask(KINDS[kind].make(case)) for kind in chosen)
    want = np.ones((), bool)
    for kind in chosen:
        want = want & KINDS[kind].visible(case)
    for mask in others:
        first = first & mask
    same(first, want, case.B, case.Sq, case.Skv, case.N)


@pytest.mark.parametrize("order", [1, -1])
def test_lengths_align_the_masks_they_meet(order):
    """Bottom-right is the corner of each entry's own lengths, in whatever order the masks are joined."""
    query, key = np.array([3, 5]), np.array([6, 2])
    a, b = (Causal(BOTTOM), Lengths(query=query, key=key))[::order]
    corner = oracle.band(5, 8, None, 0, offset=(key - query)[:, None, None])
    same(a & b, corner & oracle.lengths(5, 8, query, key), (2,), 5, 8)


def test_band_offset_per_row_and_head():
    for shape in ((1, 2, 5), (3, 2, 5), (3, 1, 5), (3, 2, 1)):
        offset = np.arange(30)[: np.prod(shape)].reshape(shape)
        same(Band(1, 1, offset=offset), oracle.band(5, 8, 1, 1, offset=offset), (3,), 5, 8)
    rows = np.arange(5)[None]
    same(Causal(offset=rows), oracle.band(5, 8, None, 0, offset=rows), (), 5, 8)


@pytest.mark.parametrize("B", [(), (3,), (5,), (2, 3)], ids=str)
def test_counts_per_batch_entry(B):
    """Every count of a mask may have shape `*B`, also where B, N and Sq are alike."""
    random = np.random.default_rng(0)
    left, right, offset, length = (random.integers(0, 5, B) for _ in range(4))
    per_batch = [np.asarray(x)[..., None, None] for x in (left, right, offset)]
    left_, right_ = (x[..., None] for x in per_batch[:2])
    same(Band(left, right, offset=offset), oracle.band(5, 8, left_, right_, offset=per_batch[2]), B, 5, 8, 5)
    same(SlidingWindow(left, right), oracle.band(5, 8, left_, right_), B, 5, 8, 5)
    same(Prefix(length), oracle.prefix(5, 8, length), B, 5, 8, 5)
    same(Lengths(key=length), oracle.lengths(5, 8, key=length), B, 5, 8, 5)


@pytest.mark.parametrize("traced", [False, True])
def test_counts_as_data(traced):
    """Layers with different windows in one program: Python ints, NumPy and JAX scalars say the same."""
    run = jax.jit if traced else lambda f: f
    for left, right in ((2, 1), (0, 3), (-1, 0), (2, -1)):
        unbounded = [None if x == -1 else x for x in (left, right)]
        for dtype in (np.int32, np.int8, np.int64):
            found = run(lambda *w: masks.intervals(SlidingWindow(*w, BOTTOM), (), 1, 5, 8))(
                dtype(left), dtype(right)
            )
            want = oracle.band(5, 8, *unbounded, BOTTOM)
            np.testing.assert_array_equal(visible_by(found, (), 1, 5, 8)[0], want)
        found = run(lambda *w: masks.intervals(Band(*w), (), 1, 5, 8))(np.asarray(left), np.asarray(right))
        np.testing.assert_array_equal(visible_by(found, (), 1, 5, 8)[0], oracle.band(5, 8, left, right))


def test_windows_of_the_layers_of_a_scan(backend):
    x = Case(name="layers", Sq=9, Skv=9).operands()
    windows = jnp.array([0, 3, -1])

    def layer(query, window):
        mask = SlidingWindow(window)
        out = jax_fa.flash_attention(query, x["key"], x["value"], mask=mask, implementation=backend)
        return query, out

    _, outs = jax.lax.scan(layer, x["query"], windows)
    for out, left in zip(outs, (0, 3, None), strict=True):
        want = oracle.attention(*x.values(), visible=oracle.band(9, 9, left, 0)).out
        np.testing.assert_allclose(out, want, atol=1e-5)


@pytest.mark.parametrize("ends", [[0, 3, 5], [3, 3, 5], [5], []], ids=str)
def test_empty_sequences_are_harmless(ends):
    same(
        CumulativeLengths(np.array(ends, np.int32)),
        oracle.cumulative(5, 5, np.array(ends, np.int32)),
        (),
        5,
        5,
    )


@pytest.mark.parametrize("shape", [(), (8,), (5, 1), (1, 1, 8), (2, 1, 5, 8), (2, 2, 1, 1)], ids=str)
def test_dense_keeps_its_broadcast_dims(shape):
    array = np.random.default_rng(0).random(shape) < 0.5
    rules = masks.intervals(Dense(array), (2,), 2, 5, 8)
    assert rules == masks.Rules(dense=rules.dense)
    assert rules.dense.shape == (1,) * (4 - len(shape)) + shape
    same(Dense(array), array, (2,), 5, 8)


def test_structured_masks_are_small():
    """Intervals have no key axis, and no batch or head axis that the mask does not have."""
    rules = masks.intervals(Causal() & Lengths(key=np.array([3, 4])), (2,), 8, 5, 8)
    assert rules == masks.Rules(upper=rules.upper) and rules.upper.shape == (2, 1, 5)


# --- masks as values


# Beside the kinds of the table, which hold arrays: masks of Python numbers.
HOST = {
    "host_prefix": (Prefix((1, 4)), oracle.prefix(9, 7, [1, 4])),
    "host_lengths": (Lengths(query=(3, 9), key=(7, 0)), oracle.lengths(9, 7, [3, 9], [7, 0])),
    "host_cumulative": (CumulativeLengths((2, 5), [3, 4]), oracle.cumulative(9, 7, [2, 5], [3, 4])),
    "host_numpy_integers": (
        Band(np.int64(2), np.int8(1), offset=np.int32(1)),
        oracle.band(9, 7, 2, 1, offset=1),
    ),
}


def _mask(kind: str) -> tuple[masks.Mask, np.ndarray]:
    case = Case(name="values", Sq=9, Skv=7)
    return HOST[kind] if kind in HOST else (masks.as_mask(KINDS[kind].make(case)), KINDS[kind].visible(case))


@pytest.mark.parametrize("kind", [*KINDS, *HOST])
def test_masks_are_pytrees(kind):
    """A mask goes through jit as an argument and comes back the same."""
    mask, want = _mask(kind)
    leaves, tree = jax.tree.flatten(mask)
    again = jax.tree.unflatten(tree, leaves)
    inside = []
    returned = jax.jit(lambda m: inside.append(visible_inside(m)) or m)(mask)
    for other in (again, returned):
        assert type(other) is type(mask)
        assert jax.tree.structure(other) == tree
        same(other, want, (2,), 9, 7, 4)


def visible_inside(mask) -> tuple[masks.Rules, ...]:
    return masks.parts(mask, (2,), 4, 9, 7)


@pytest.mark.parametrize("kind", [*KINDS, *HOST])
def test_static_descriptions(kind):
    """`static()` has no arrays; it can be compared and hashed, and is the same under a trace."""
    mask, _ = _mask(kind)
    found = []
    jax.jit(lambda m: found.append(m.static()))(mask)
    for description in (mask.static(), *found):
        assert description == mask.static() and hash(description) == hash(mask.static())
        assert not any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(description))


def test_the_structure_of_a_mask_survives_tree_map():
    """So `in_axes` can be made from a mask."""
    mask = (
        Causal() & Lengths(key=jnp.array([3, 4])) & SegmentIds(jnp.zeros(9, int), jnp.zeros(7, int), Causal())
    )
    axes = jax.tree.map(lambda _: 0, mask)
    assert jax.tree.leaves(axes) == [0, 0, 0]
    assert jax.tree.structure(axes) == jax.tree.structure(mask)


def test_masks_as_arguments_of_jit_do_not_recompile(backend):
    """Arrays in a mask are data: other lengths, same program."""
    x = Case(name="argument", Sq=9, Skv=7).operands()
    traces = []

    @jax.jit
    def run(mask):
        traces.append(mask)
        return jax_fa.flash_attention(**x, mask=mask, implementation=backend)

    for lengths in ([3, 7], [0, 5]):
        mask = Causal() & Lengths(key=jnp.array(lengths, jnp.int32))
        want = oracle.causal(9, 7) & oracle.lengths(9, 7, key=lengths)
        found = oracle.attention(x["query"], x["key"], x["value"], visible=want).out
        np.testing.assert_allclose(run(mask), found, atol=1e-5)
    assert len(traces) == 1


def test_static_descriptions_keep_host_values():
    description = (Causal() & Lengths(key=(3, 4)) & Prefix(np.array([1, 2]))).static()
    assert description.masks == (Causal(), Lengths(key=(3, 4)), Prefix.static(Prefix(jnp.zeros(2, int))))
    assert description.masks[2].length is masks.TRACED
    assert Causal().static() != Causal(BOTTOM).static()


def test_boolean_arrays_join_masks():
    dense = np.random.default_rng(1).random((5, 8)) < 0.5
    for joined in (Causal() & dense, dense & Causal(), jnp.asarray(dense) & Causal()):
        same(joined, dense & oracle.causal(5, 8), (2,), 5, 8)


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
@pytest.mark.parametrize("within", ["offset", "left", "rows"])
def test_segments_of_all_entries_with_counts_of_each(within, shape):
    """Ids that the batch shares, with a band for each entry."""
    ids = np.array([0, 0, 1, 0, 1, 1])
    rank = np.array([np.sum(ids[:i] == ids[i]) for i in range(6)])
    if within == "left":
        values = np.array([0, 2])
        band, first, last = SlidingWindow(values, 0), rank - values[:, None], rank - 0 * values[:, None]
    else:
        values = np.array([0, 1]) if within == "offset" else np.arange(12).reshape(2, 1, 6) % 3
        last = rank + (values[:, None] if within == "offset" else values[:, 0])
        band, first = Causal(offset=values), np.zeros_like(last)
    mask = SegmentIds(np.broadcast_to(ids, (*shape, 6)), within=band)
    inside = (first[..., None] <= rank) & (rank <= last[..., None])
    same(mask, ((ids[:, None] == ids) & inside)[:, None], (2,), 6, 6)


def test_two_lengths_align_by_the_shorter_one():
    for first, second in ((3, 5), (5, 3)):
        mask = Lengths(key=first) & Lengths(key=second) & Causal("bottom-right")
        same(mask, oracle.band(6, 6, None, 0, offset=3 - 6) & (np.arange(6) < 3), (), 6, 6)


def test_a_shift_counts_in_the_segment_whatever_is_known():
    """ALiBi's positions of known and of traced ids are the same."""
    ids = np.array([1, 2, 1, 2, 1, 2])
    known = masks.positions(SegmentIds(ids, within=Band(offset=1)), (1,), 1, 6, 6)
    traced = jax.jit(lambda x: masks.positions(SegmentIds(x, x, within=Band(offset=1)), (1,), 1, 6, 6))(ids)
    np.testing.assert_array_equal(np.ravel(known), np.ravel(traced))
    np.testing.assert_array_equal(np.ravel(known), [2, 3, 4, 5, 5, 6])


def test_a_mask_has_no_truth_value():
    """`and` would drop the first of two masks."""
    with pytest.raises(TypeError, match=r"a mask has no truth value: join masks by &"):
        Causal() and Lengths(key=(3,))


# --- errors

ERRORS = [
    (lambda: Band("1"), TypeError, r"left must be an int, an integer array or None; got '1'\."),
    (lambda: Band(1, True), TypeError, r"right must be an int, an integer array or None; got True\."),
    (
        lambda: Band(np.ones(2)),
        TypeError,
        r"left must be an int, an integer array or None; got ndarray of shape \(2,\)",
    ),
    (
        lambda: Band(1, 1, "center"),
        ValueError,
        r'align must be "top-left" or "bottom-right"; got \'center\'\.',
    ),
    (lambda: Prefix(3, "left"), ValueError, r'align must be "top-left" or "bottom-right"; got \'left\'\.'),
    (lambda: Band(offset=1.5), TypeError, r"offset must be an int or an integer array; got 1\.5\."),
    (lambda: Band(offset=True), TypeError, r"offset must be an int or an integer array; got True\."),
    (
        lambda: Band(offset=jnp.ones(5, jnp.float32)),
        TypeError,
        r"offset must be an int or an integer array; got .*float32",
    ),
    (
        lambda: SlidingWindow(-2),
        ValueError,
        r"left must be at least 0 in a sliding window, or -1 \(unbounded\); got -2\. See Band\.",
    ),
    (lambda: SlidingWindow(1, -2), ValueError, r"right must be at least 0 in a sliding window, .* got -2\."),
    (lambda: SlidingWindow(1.5), TypeError, r"left must be an int, an integer array or None; got 1\.5\."),
    (
        lambda: Lengths(np.array([3, 4])),
        TypeError,
        r"Lengths takes keywords: Lengths\(key=\.\.\.\) for the lengths of keys .* got 1 positional argument",
    ),
    (lambda: Prefix(np.ones(2, np.float32)), TypeError, r"length must hold integers; got dtype float32\."),
    (lambda: Lengths(key=np.ones(2)), TypeError, r"key lengths must hold integers; got dtype float"),
    (
        lambda: Dense(np.ones((5, 8), np.float32)),
        TypeError,
        r"mask must be boolean .* got dtype float32\. .* bias\.",
    ),
    (
        lambda: CumulativeLengths((3, 2)),
        ValueError,
        r"cumulative query lengths must be cumulative ends that start at 0 or more and do not decrease, "
        r"but for zeros after the last one; got \(3, 2\)\.",
    ),
    (
        lambda: CumulativeLengths(np.int32(4)),
        ValueError,
        r"cumulative query lengths must have shape \(sequences,\) or .*: the end of each sequence; got np\.int32\(4\)",
    ),
    (
        lambda: CumulativeLengths((4,), 4),
        ValueError,
        r"cumulative key lengths must have shape \(sequences,\) or .*; got 4\.",
    ),
    (
        lambda: CumulativeLengths((1, 2), (1, 2, 3)),
        ValueError,
        r"must name the same sequences; got shapes \(2,\) and \(3,\)\.",
    ),
    (
        lambda: CumulativeLengths((1, 2), within=Lengths(key=(1,))),
        TypeError,
        r"within must be a Band \(Causal, SlidingWindow\) or a Prefix; got Lengths",
    ),
    (
        lambda: SegmentIds(np.zeros(3, int), padding_id=np.zeros(3, int)),
        TypeError,
        r"padding_id must be an int or None; got ndarray of shape \(3,\)",
    ),
    (lambda: SegmentIds(None), TypeError, "query must hold the segment ids of the rows; got None"),
    (lambda: SegmentIds(np.ones(3)), TypeError, r"query segment ids must hold integers; got dtype float"),
    (
        lambda: Causal() & "mask",
        TypeError,
        r"mask must be a jax_fa\.masks\.Mask or a boolean array; got str\.",
    ),
    (lambda: Causal() & np.ones((5, 8)), TypeError, r"mask must be boolean .* got dtype float"),
]
MISFITS = [
    (
        Band(offset=np.arange(4)),
        r"offset must be an int, or have one entry per batch entry, shape \(2,\), or one per row, shape "
        r"\(\*B, N, Sq\)=\(2, 4, 5\) of which any may be 1; got shape \(4,\)\.",
    ),
    (Band(offset=np.arange(5)), r"offset must be an int, .*; got shape \(5,\)\."),
    (Band(offset=np.zeros((4, 5), int)), r"offset must be an int, .*; got shape \(4, 5\)\."),
    (Band(left=np.arange(5)), r"left must have one entry per batch entry, shape \(2,\); got shape \(5,\)\."),
    (
        CumulativeLengths((3, 5), (3, 5), Causal(offset=np.arange(5))),
        r"offset must be an int, .*; got shape \(5,\)\.",
    ),
    (Prefix((1, 2, 3)), r"length must have one entry per batch entry, shape \(2,\); got shape \(3,\)\."),
    (
        Lengths(query=np.arange(3)),
        r"query lengths must have one entry per batch entry, shape \(2,\); got shape \(3,\)\.",
    ),
    (Lengths(query=(1, 6)), r"query lengths must be in 0\.\.5; got \(1, 6\)\."),
    (Lengths(key=(-1, 6)), r"key lengths must be in 0\.\.8; got \(-1, 6\)\."),
    (CumulativeLengths((3, 6)), r"cumulative query lengths must be in 0\.\.5; got \(3, 6\)\."),
    (CumulativeLengths((3, 5), (8, 9)), r"cumulative key lengths must be in 0\.\.8; got \(8, 9\)\."),
    (
        CumulativeLengths(np.ones((3, 2), int)),
        r"cumulative query lengths must have shape \(sequences,\) or \(\*B, sequences\) with B=\(2,\); got \(3, 2\)\.",
    ),
    (
        SegmentIds(np.zeros(8, int)),
        r"query segment ids must have shape \(\*B, 5\) with B=\(2,\); got \(8,\)\.",
    ),
    (SegmentIds(np.zeros(5, int)), r"key segment ids must have shape \(\*B, 8\) with B=\(2,\); got \(5,\)\."),
    (
        Dense(np.ones((3, 8), bool)),
        r"mask must broadcast to \(\*B, N, Sq, Skv\)=\(2, 4, 5, 8\); got shape \(3, 8\)\.",
    ),
    (
        Causal() & Prefix((1, 2, 3)),
        r"length must have one entry per batch entry, shape \(2,\); got shape \(3,\)\.",
    ),
]


@pytest.mark.parametrize(("make", "kind", "message"), ERRORS)
def test_errors_when_made(make, kind, message, no_type_checker):
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(("mask", "message"), MISFITS)
def test_errors_when_used(mask, message, no_type_checker):
    with pytest.raises(ValueError, match=message):
        masks.intervals(mask, (2,), 4, 5, 8)


# What the docstrings ask of values: (the mask, values that break it, the error where they are known, the values
# that they mean where they are not). Sq = 5, Skv = 8.
PRECONDITIONS = {
    "prefix-range": (lambda x: Prefix(x), [9, -1], r"length must be in 0\.\.8", [8, 0]),
    "prefix-int32": (lambda x: Prefix(x), [2**31 - 1, 2], r"length must be in 0\.\.8", [8, 2]),
    "query-lengths": (lambda x: Lengths(query=x), [6, -2], r"query lengths must be in 0\.\.5", [5, 0]),
    # The diagonal starts from the corner of the lengths, so that a length beyond the array would move it.
    "key-lengths": (
        lambda x: Causal(BOTTOM) & Lengths(key=x),
        [12, -3],
        r"key lengths must be in 0\.\.8",
        [8, 0],
    ),
    "query-ends": (
        lambda x: CumulativeLengths(x, (2, 8)),
        [3, 9],
        r"cumulative query lengths must be in 0\.\.5",
        [3, 5],
    ),
    "key-ends": (
        lambda x: CumulativeLengths((2, 5), x, Causal(BOTTOM)),
        [3, 9],
        r"cumulative key lengths must be in 0\.\.8",
        [3, 8],
    ),
    "decreasing-ends": (
        lambda x: CumulativeLengths(x, (2, 3, 8), Causal()),
        [4, 2, 5],
        "cumulative query lengths must be cumulative ends that start at 0 or more and do not decrease",
        [4, 4, 5],
    ),
    "negative-ends": (
        lambda x: CumulativeLengths((1, 5), x),
        [-1, 3],
        "cumulative key lengths must be cumulative ends that start at 0 or more",
        [0, 3],
    ),
    "window": (lambda x: SlidingWindow(x), [-3, 2], "left must be at least 0 in a sliding window", [-1, 2]),
}


@pytest.mark.parametrize("form", ["tuple", "numpy", "numpy-in-jit", "jax", "traced"])
@pytest.mark.parametrize("name", PRECONDITIONS)
def test_preconditions(name, form):
    """Checked wherever the values are known when tracing; what else is given means what the docstring says."""
    make, wrong, message, meant = PRECONDITIONS[name]

    def rules(x):
        return masks.intervals(make(x), (2,), 1, 5, 8)

    calls = {
        "tuple": lambda: rules(tuple(wrong)),
        "numpy": lambda: rules(np.array(wrong)),
        "numpy-in-jit": lambda: jax.jit(lambda: rules(np.array(wrong)))(),
        "jax": lambda: rules(jnp.array(wrong)),
    }
    if form == "traced":
        found = jax.jit(rules)(np.array(wrong, np.int32))
        want = rules(np.array(meant))
        jax.tree.map(np.testing.assert_array_equal, found, want)
    elif (name, form) != ("window", "tuple"):  # a window is an int or an array
        with pytest.raises(ValueError, match=message):
            calls[form]()


@pytest.mark.parametrize("form", ["tuple", "numpy", "jax", "traced"])
def test_lists_of_ends_filled_up_with_zeros(form):
    """Zeros after the last end are empty sequences, known or not."""

    def rules(query, key):
        return masks.intervals(CumulativeLengths(query, key, Causal(BOTTOM)), (), 1, 5, 8)

    query, key = (2, 4, 0, 0), (3, 8, 0, 0)
    arrays = np.array(query, np.int32), np.array(key, np.int32)
    found = {
        "tuple": lambda: rules(query, key),
        "numpy": lambda: rules(*arrays),
        "jax": lambda: rules(*map(jnp.asarray, arrays)),
        "traced": lambda: jax.jit(rules)(*arrays),
    }[form]()
    want = oracle.cumulative(5, 8, (2, 4), (3, 8), partial(oracle.causal, align=BOTTOM))
    np.testing.assert_array_equal(visible_by(found, (), 1, 5, 8)[0], want)


def test_backends_get_ends_that_do_not_decrease():
    assert CumulativeLengths((2, 4, 0, 0)).static() == CumulativeLengths((2, 4, 4, 4))
    assert CumulativeLengths(((2, 4, 0), (1, 3, 5))).query == ((2, 4, 4), (1, 3, 5))


def test_zeros_between_ends_are_refused():
    with pytest.raises(ValueError, match="do not decrease, but for zeros after the last one"):
        CumulativeLengths((2, 0, 4))


# (In a union, rows may have visible keys that no segment places.)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lengths_segments"])
@pytest.mark.parametrize("B", [(), (2,), (2, 3)], ids=str)
def test_positions(kind, B):
    """The key position at which a mask puts a row, wherever the row has a visible key."""
    case = Case(name="masks", B=B)
    mask = masks.as_mask(KINDS[kind].make(case))
    found = masks.positions(mask, B, case.N, case.Sq, case.Skv)
    want = np.broadcast_to(KINDS[kind].position(case), (*B, 1, case.Sq))
    if found is None:
        found = np.arange(case.Sq)
    else:
        assert found.dtype == jnp.int32 and found.ndim == len(B) + 2
    live = visible(mask, B, case.N, case.Sq, case.Skv).any(axis=(-3, -1))[..., None, :]
    want = np.where(live, want, 0)
    np.testing.assert_array_equal(np.where(live, found, 0), want)


@pytest.mark.parametrize(
    "mask",
    [
        None,
        Causal(),
        SlidingWindow(3) & Lengths(key=np.array([3, 5])),
        CumulativeLengths((2, 5), within=Causal(BOTTOM)),
        CumulativeLengths((2, 5), (2, 5), within=Causal()),
        SegmentIds(np.array([1, 1, 2, 2, 0]), within=SlidingWindow(2)) & Causal(),
        SegmentIds(np.array([2, 1, 2, 1, 0]), np.array([0, 1, 2, 1, 0])) & Causal(),
    ],
)
def test_rows_that_stand_at_their_index(mask):
    assert masks.positions(mask, (2,), 2, 5, 5) is None


def test_masks_that_put_rows_at_different_keys():
    """One of them would be wrong about ALiBi's distance."""
    for mask in (
        Causal() & SlidingWindow(3, align=BOTTOM),
        Causal(offset=1) & Causal(offset=2),
        CumulativeLengths((2, 5), (3, 8), Causal()) & Causal(),
    ):
        with pytest.raises(ValueError, match=r"alibi_slopes need one position for each row; .*Causal"):
            masks.positions(mask, (2,), 2, 5, 8)
    alike = Causal(BOTTOM, offset=np.array([1, 2])) & SlidingWindow(3, align=BOTTOM)
    with pytest.raises(ValueError, match="alibi_slopes need one position"):
        masks.positions(alike, (2,), 2, 5, 8)
    offset = jnp.array([1, 2])
    joined = Causal(BOTTOM, offset=offset) & Band(3, None, BOTTOM, offset=np.array([1, 2]))
    np.testing.assert_array_equal(
        masks.positions(joined, (2,), 2, 5, 8)[:, 0], np.arange(5) + 3 + np.array([[1], [2]])
    )


# --- masks as values of Python


@pytest.mark.parametrize("kind", [*KINDS, *HOST])
def test_masks_are_copied_and_compared_by_value(kind):
    mask, _ = _mask(kind)
    for again in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert again == mask and not again != mask and type(again) is type(mask)
    fields = {f.name: getattr(mask, f.name) for f in dataclasses.fields(mask) if f.init}
    assert dataclasses.replace(mask, **fields) == mask
    assert mask != (Causal(offset=1) if mask == Causal() else Causal())
    if jax.tree.leaves(mask):
        with pytest.raises(TypeError, match="holds arrays, which are data and have no hash"):
            hash(mask)
    else:
        assert hash(mask) == hash(copy.deepcopy(mask))


def test_masks_of_other_values_differ():
    a, b = (Lengths(key=np.array([3, x])) for x in (4, 5))
    assert a != b and a & Causal() != b & Causal() and a == Lengths(key=jnp.array([3, 4]))
    inside = []
    jax.jit(lambda x: inside.append((Lengths(key=x) == Lengths(key=x), Lengths(key=x) == a)))(
        np.array([3, 4])
    )
    assert inside == [(True, False)]


def test_replace():
    assert dataclasses.replace(Causal(), offset=3) == Causal(offset=3)
    assert dataclasses.replace(Causal(offset=1), align=BOTTOM) == Causal(BOTTOM, 1)
    assert dataclasses.replace(SlidingWindow(2, 1), right=None) == SlidingWindow(2, None)
    for mask, change in ((Causal(), {"left": 1}), (SlidingWindow(2), {"offset": 1})):
        # It would be another kind. (Python 3.13 raises the other error.)
        with pytest.raises((TypeError, ValueError), match="init=False"):
            dataclasses.replace(mask, **change)


@pytest.mark.parametrize(
    "array", [np.tri(5, 8, dtype=bool), jnp.ones((5, 8), bool), np.bool_(True)], ids=type
)
def test_arrays_join_masks_from_either_side(array):
    """As one mask, and not element by element."""
    for mask in (array & Causal(), Causal() & array):
        assert isinstance(mask, masks.Intersection)
        same(mask, np.asarray(array) & oracle.causal(5, 8), (), 5, 8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int64])
def test_lengths_of_every_integer_dtype(dtype):
    """The largest value of a dtype, traced, means the end."""
    big = np.iinfo(dtype).max if dtype not in (np.uint64, np.int64) else np.iinfo(dtype).max - 5
    with jax.enable_x64(True):
        values = np.array([big, 3], dtype)

        def rules(x):
            offset = jnp.minimum(x, 3)
            made = (Lengths(key=x), Lengths(query=x), Prefix(x), SlidingWindow(x, x), Causal(offset=offset))
            return [masks.intervals(mask, (2,), 1, 5, 8) for mask in made]

        found = [visible_by(x, (2,), 1, 5, 8) for x in jax.jit(rules)(values)]
    ends, five = [8, 3], [5, 3]
    wanted = [
        oracle.lengths(5, 8, key=ends),
        oracle.lengths(5, 8, query=five),
        oracle.prefix(5, 8, ends),
        oracle.band(5, 8, *(np.array(ends)[:, None, None, None],) * 2),
        oracle.band(5, 8, None, 0, offset=np.array([3, 3])[:, None, None]),
    ]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, np.broadcast_to(b, a.shape))


def test_true_is_any_byte_but_0(backend):
    """NumPy's views of other dtypes have booleans that are neither 0 nor 1."""
    want = np.tri(9, dtype=bool)
    odd = np.where(want, np.arange(9) * 28 + 2, 0).astype(np.uint8).view(np.bool_)
    x = [np.random.default_rng(i).standard_normal((1, 9, 2, 8)).astype(np.float32) for i in range(3)]

    def run(mask):
        joined = jax_fa.flash_attention(*x, mask=Dense(mask) & Dense(mask), implementation=backend)
        return jax_fa.flash_attention(*x, mask=mask, implementation=backend), joined

    expected = oracle.attention(*x, visible=want).out
    for out in (*run(odd), jax.jit(run)(odd)[0], jax_fa.dot_product_attention(*x, mask=odd)):
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_prefixes_within_packed_sequences():
    """Of all sequences, of each of them, and known or not; what does not fit is told."""
    ends, ids = np.array([2, 2, 6, 9]), np.array([1, 1, 2, 1, 2, 2, 0, 0, 2])
    for length, each in ((3, [3] * 4), ((1, 0, 2, 3), [1, 0, 2, 3]), (np.array([9, 9, 0, 2]), [9, 9, 0, 2])):
        mask = CumulativeLengths(ends, within=Prefix(length))
        same(mask, oracle.cumulative(9, 9, ends, within=oracle.causal, prefix=np.array(each)), (), 9, 9)
    per_row = np.array([0, 1, 2])[ids]
    want = oracle.segments(ids, within=oracle.causal, prefix=lambda name: name)
    same(SegmentIds(ids, within=Prefix(per_row)), want, (), 9, 9)
    traced = jax.jit(lambda *x: masks.intervals(SegmentIds(x[0], within=Prefix(x[1])), (), 1, 9, 9))(
        ids, per_row
    )
    np.testing.assert_array_equal(visible_by(traced, (), 1, 9, 9)[0], want)
    ordered = masks.intervals(SegmentIds(np.sort(ids), within=Prefix(2)), (), 1, 9, 9)
    assert ordered.segment_row is None
    with pytest.raises(
        ValueError, match=r"must be an int or have the shape \(4,\) of query; got shape \(2,\)"
    ):
        masks.intervals(CumulativeLengths(ends, within=Prefix((1, 2))), (2,), 1, 9, 9)


@pytest.mark.parametrize("kind", WITHIN_PACKED)
def test_prefixes_within_packed_sequences_on_every_backend(kind, backend):
    case = Case(name=kind, mask=kind)
    run = jax.jit(partial(case.gradient, implementation=backend))
    (out, lse), gradients = run(case.operands(), *case.cotangents())
    check(case, out, lse, gradients)
