"""Masks against their brute-force definition: what every row sees, before any attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import BOTTOM, KINDS, Case
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_fa
from jax_fa import masks
from jax_fa.masks import Band, Causal, CumulativeLengths, Dense, Lengths, Prefix, SegmentIds, SlidingWindow

# Few sizes: each compiles the few operations that turn a mask into intervals.
SIZES = st.sampled_from([1, 5, 8])
ALIGN = st.sampled_from(["top-left", BOTTOM])


def visible(mask, batch: tuple[int, ...], heads: int, sq: int, skv: int) -> np.ndarray:
    """What the kernels would let each row see, `*B N Sq Skv`."""
    lower, upper, dense = masks.intervals(mask, batch, heads, sq, skv)
    j = np.arange(skv)
    found = np.ones((*batch, heads, sq, skv), bool)
    for bound, inside in ((lower, np.greater_equal), (upper, np.less)):
        if bound is not None:
            assert bound.dtype == jnp.int32 and bound.ndim == len(batch) + 2
            assert (bound >= 0).all() and (bound <= skv).all()
            found = found & inside(j, np.asarray(bound)[..., None])
    return found if dense is None else found & np.asarray(dense)


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
@given(SIZES, SIZES, st.lists(st.integers(0, 10), min_size=2, max_size=2), ALIGN, st.booleans())
def test_prefix(sq, skv, length, align, host):
    given_length = tuple(length) if host else np.array(length)
    same(Prefix(given_length, align), oracle.prefix(sq, skv, length, align), (2,), sq, skv)


@_properties()
@given(st.data(), SIZES, SIZES, st.booleans())
def test_lengths(data, sq, skv, host):
    query, key = (
        data.draw(st.none() | st.lists(st.integers(0, size), min_size=2, max_size=2)) for size in (sq, skv)
    )
    convert = tuple if host else np.array
    mask = Lengths(*(None if x is None else convert(x) for x in (query, key)))
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
@given(st.data(), SIZES, SIZES, WITHIN)
def test_segment_ids(data, sq, skv, within):
    def ids(size):
        return np.array(sorted(data.draw(st.lists(st.integers(-1, 3), min_size=size, max_size=size))))

    query, key = ids(sq), ids(skv)
    same(SegmentIds(query, key, within[0]), oracle.segments(query, key, within[1]), (), sq, skv)


@_properties()
@given(st.data())
def test_intersections(data):
    """Any set of kinds, in any order, sees what all of them see."""
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
    a, b = (Causal(BOTTOM), Lengths(query, key))[::order]
    corner = oracle.band(5, 8, None, 0, offset=(key - query)[:, None, None])
    same(a & b, corner & oracle.lengths(5, 8, query, key), (2,), 5, 8)


def test_band_offset_per_row_and_head():
    offset = np.arange(10).reshape(2, 5)
    same(Band(1, 1, offset=offset), oracle.band(5, 8, 1, 1, offset=offset), (3,), 5, 8)


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
    lower, upper, dense = masks.intervals(Dense(array), (2,), 2, 5, 8)
    assert lower is None and upper is None
    assert dense.shape == (1,) * (4 - len(shape)) + shape
    same(Dense(array), array, (2,), 5, 8)


def test_structured_masks_are_small():
    """Intervals have no key axis, and no batch or head axis that the mask does not have."""
    lower, upper, dense = masks.intervals(Causal() & Lengths(key=np.array([3, 4])), (2,), 8, 5, 8)
    assert lower is None and dense is None and upper.shape == (2, 1, 5)


# --- masks as values


# Beside the kinds of the table, which hold arrays: masks of Python numbers.
HOST = {
    "host_prefix": (Prefix((1, 4)), oracle.prefix(9, 7, [1, 4])),
    "host_lengths": (Lengths((3, 9), (7, 0)), oracle.lengths(9, 7, [3, 9], [7, 0])),
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


def visible_inside(mask) -> tuple:
    return masks.intervals(mask, (2,), 4, 9, 7)


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
    for joined in (Causal() & dense, jnp.asarray(dense) & Causal()):
        same(joined, dense & oracle.causal(5, 8), (2,), 5, 8)


# --- errors

ERRORS = [
    (lambda: Band("1"), TypeError, r"left must be an int or None; got '1'\."),
    (lambda: Band(1, True), TypeError, r"right must be an int or None; got True\."),
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
        lambda: SlidingWindow(-1),
        ValueError,
        r"left must be at least 0 in a sliding window; got -1\. See Band\.",
    ),
    (lambda: SlidingWindow(1, -2), ValueError, r"right must be at least 0 in a sliding window; got -2\."),
    (lambda: SlidingWindow(1.5), TypeError, r"left must be an int or None; got 1\.5\."),
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
        r"cumulative query lengths must not decrease; got \(3, 2\)\.",
    ),
    (
        lambda: CumulativeLengths((1, 2), (1, 2, 3)),
        ValueError,
        r"must name the same sequences; got shapes \(2,\) and \(3,\)\.",
    ),
    (
        lambda: CumulativeLengths((1, 2), within=Prefix(1)),
        TypeError,
        r"within must be a Band \(Causal, SlidingWindow\); got Prefix",
    ),
    (
        lambda: SegmentIds(np.array([0, 1, 0])),
        ValueError,
        r"query segment ids must not decrease along the sequence; got \[0 1 0\]\.",
    ),
    (lambda: SegmentIds(np.ones(3)), TypeError, r"query segment ids must hold integers; got dtype float"),
    (
        lambda: Causal() & "mask",
        TypeError,
        r"mask must be a jax_fa\.masks\.Mask or a boolean array; got str\.",
    ),
    (lambda: Causal() & np.ones((5, 8)), TypeError, r"mask must be boolean .* got dtype float"),
]
MISFITS = [
    (Band(offset=np.arange(4)), r"offset must broadcast to \(\*B, N, Sq\)=\(2, 4, 5\); got shape \(4,\)\."),
    (Prefix((1, 2, 3)), r"length must have one entry per batch entry, shape \(2,\); got shape \(3,\)\."),
    (
        Lengths(query=np.arange(3)),
        r"query lengths must have one entry per batch entry, shape \(2,\); got shape \(3,\)\.",
    ),
    (Lengths(query=(1, 6)), r"query lengths must be in 0\.\.5; got \(1, 6\)\."),
    (Lengths(key=(-1, 6)), r"key lengths must be in 0\.\.8; got \(-1, 6\)\."),
    (CumulativeLengths((3, 6)), r"cumulative query lengths must not exceed 5; got \(3, 6\)\."),
    (CumulativeLengths((3, 5), (8, 9)), r"cumulative key lengths must not exceed 8; got \(8, 9\)\."),
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
