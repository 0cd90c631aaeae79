"""The parts of the Mosaic GPU backend that are no kernels: tables of tiles, packed rows, dealt blocks, ranges of tiles."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mosaic_tools import abstract, needs_new_jax

import jax_fa
from jax_fa.backends import mosaic
from jax_fa.backends.mosaic import Options, choice, geometry, inputs, operands, tuning
from jax_fa.backends.mosaic.geometry import Geometry
from jax_fa.backends.mosaic.inputs import RANGE
from jax_fa.backends.mosaic.operands import aligned, aligned_head_dim, aligned_length, visibility
from jax_fa.backends.mosaic.tuning import ROWS, Tiles
from jax_fa.backends.mosaic.widths import padded_head_dim, swizzle_elements
from jax_fa.call import Call, Operands, Problem
from jax_fa.entry import request_of

HEAD_DIMS = (1, 8, 16, 24, 40, 64, 72, 80, 96, 128, 160, 192, 256)
PAIRS = (*((D, D) for D in HEAD_DIMS), (192, 128), (128, 192), (64, 16), (16, 256), (256, 1))


# --- tables of tiles


def _fits(which, tiles: Tiles, D: int, Dv: int, element_bytes: int = 0) -> bool:
    return tuning.smem_bytes(which, tiles, D, Dv, element_bytes) <= tuning.SMEM_BYTES


@pytest.mark.parametrize("which", tuning.TABLES)
def test_tables_go_up_and_hold_what_fits(which):
    """Bounds rise to the largest head_dim served; every line is taken as it is for some head_dim."""
    table = tuning.TABLES[which]
    bounds = [row.head_dim for row in table]
    assert bounds == sorted(set(bounds)) and bounds[-1] == tuning.MAX_HEAD_DIM
    for below, row in zip([0, *bounds], table, strict=False):
        served = range(below + 1, row.head_dim + 1)
        taken = [tuning.tiles_for(which, D, D, rows=4096, width=4096) for D in served]
        assert row.tiles in taken


@pytest.mark.parametrize(("D", "Dv"), PAIRS)
@pytest.mark.parametrize("which", tuning.TABLES)
def test_tiles_shrink_until_they_fit(which, D, Dv):
    """Whatever bias and mask a tile comes with: up to a float32 and a byte per logit."""
    most = tuning.tiles_for(which, D, Dv, rows=4096, width=4096)
    for element_bytes in range(6):
        tiles = tuning.tiles_for(which, D, Dv, rows=4096, width=4096, element_bytes=element_bytes)
        assert _fits(which, tiles, D, Dv, element_bytes)
        assert (tiles.consumers, tiles.width) <= (most.consumers, most.width)


@pytest.mark.parametrize("which", tuning.TABLES)
def test_tiles_of_short_calls(which):
    """No more consumers than rows can use, no wider tiles than there are columns."""
    tiles = tuning.tiles_for(which, 64, 64, rows=1, width=1)
    assert (tiles.consumers, tiles.width) == (1, ROWS)
    assert tuning.tiles_for(which, 64, 64, rows=ROWS + 1, width=4096).consumers == 2


@pytest.mark.parametrize("which", tuning.TABLES)
def test_no_tiles(which):
    assert tuning.tiles_for(which, tuning.MAX_HEAD_DIM + 1, 8, rows=64, width=64) is None
    assert tuning.tiles_for(which, 256, 256, rows=64, width=64, element_bytes=64) is None


@pytest.mark.parametrize(("D", "Dv"), PAIRS)
@pytest.mark.parametrize("which", tuning.TABLES)
def test_candidates_fit(which, D, Dv):
    found = tuning.candidates(which, D, Dv)
    assert found and len(set(found)) == len(found)
    assert all(_fits(which, tiles, D, Dv) for tiles in found)


@pytest.mark.parametrize(("D", "Dv"), PAIRS)
@pytest.mark.parametrize("which", tuning.TABLES)
def test_tiles_of_the_tables_would_be_taken_as_options(which, D, Dv):
    for tiles in (tuning.tiles_for(which, D, Dv, rows=4096, width=4096), *tuning.candidates(which, D, Dv)):
        assert tuning.why_not(which, tiles, D, Dv) is None


def _call(options: Options | None, D: int = 64, bias: bool = False) -> Call:
    x = jax.ShapeDtypeStruct((1, 4096, 2, D), jnp.bfloat16)
    logits = jax.ShapeDtypeStruct((1, 2, 4096, 4096), jnp.float32) if bias else None

    def ask(query, key, value, bias):
        return request_of(
            jax_fa.flash_attention, query, key, value, bias=bias, implementation=options or "mosaic"
        ).call

    return abstract(ask, x, x, x, logits)


def test_tiles_of_options_are_taken():
    """For the kernels they name; the others keep those of the tables."""
    tiles = Tiles(width=192, stages=1, consumers=1)
    given, plain = _call(Options(tiles={"forward": tiles, "dkv": tiles})), _call(None)
    for which in tuning.TABLES:
        table = choice.tiles_of(which, plain)
        assert choice.tiles_of(which, given) == (tiles if which in ("forward", "dkv") else table)
        assert table != tiles


@pytest.mark.parametrize(
    ("which", "sizes", "D", "bias", "reason"),
    [
        ("forward", (128, 2, 3), 64, False, None),
        (
            "forward",
            (256, 4, 2),
            128,
            False,
            "the tiles given for forward (width=256, stages=4, consumers=2) need 563200 bytes of shared memory for this "
            "call; there are 232448",
        ),
        (
            "dbias",
            (128, 1, 3),
            64,
            True,
            "the tiles given for dbias (width=128, stages=1, consumers=3) need 283648 bytes of shared memory for this "
            "call; there are 232448",
        ),
        (
            "forward",
            (64, 1, 3),
            256,
            False,
            "the tiles given for forward (width=64, stages=1, consumers=3) need more than 160 registers a thread for this "
            "head_dim; there are 160",
        ),
    ],
)
def test_tiles_of_options_that_do_not_fit(which, sizes, D, bias, reason):
    width, stages, consumers = sizes
    tiles = Tiles(width=width, stages=stages, consumers=consumers)
    call = _call(Options(tiles={which: tiles}), D, bias)
    assert choice.why_not(which, call) == reason
    assert all(choice.why_not(other, call) is None for other in tuning.TABLES if other != which)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((100, 2, 2), r"width must be a multiple of 64, at most 256; got 100\."),
        ((0, 2, 2), r"width must be at least 1; got 0\."),
        ((320, 2, 2), r"width must be a multiple of 64, at most 256; got 320\."),
        ((64, 0, 2), r"stages must be at least 1; got 0\."),
        ((64, 2, 4), r"consumers must be one of 1, 2, 3; got 4\."),
    ],
)
def test_tiles_that_do_not_exist(sizes, message):
    width, stages, consumers = sizes
    with pytest.raises(ValueError, match=message):
        Tiles(width=width, stages=stages, consumers=consumers)


def test_registers_are_those_of_a_block():
    """A warpgroup has 128 threads, a block 65,536 registers; they are given out in eights."""
    for consumers, (each, producer) in Tiles.REGISTERS.items():
        assert each % 8 == producer % 8 == 0 and each <= 255
        assert 128 * (consumers * each + producer) <= 65536


# --- widths


def test_widths():
    """A row in shared memory is whole swizzle atoms, a row that is copied from elsewhere whole units of 16 bytes."""
    for D in range(1, tuning.MAX_HEAD_DIM + 1):
        padded, stored = padded_head_dim(D), aligned_head_dim(D)
        assert D <= stored <= padded <= max(16, 2 * D)
        assert padded % swizzle_elements(padded) == 0 and swizzle_elements(padded) in (16, 32, 64)
        assert 2 * stored % 16 == 0
        assert padded_head_dim(padded) == padded and aligned_head_dim(stored) == stored


@pytest.mark.parametrize("shape", [(2, 1000, 4, 64), (2, 5, 4, 40), (1, 8, 1, 80)])
def test_arrays_that_can_be_copied_stay_as_they_are(shape):
    x = jnp.ones(shape, jnp.bfloat16)
    assert aligned(x, (0, 1, 2, 3)) is x


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)])
def test_other_arrays_are_padded_with_zeros(axes):
    """Whatever order they are stored in: the rows to groups of 8, the head_dim to whole atoms."""
    x = jnp.ones((2, 13, 3, 72), jnp.bfloat16)
    stored = x.transpose(np.argsort(axes))
    found = aligned(stored, axes).transpose(axes)
    assert found.shape == (2, aligned_length(13), 3, aligned_head_dim(72)) == (2, 16, 3, 96)
    np.testing.assert_array_equal(found[:, :13, :, :72], x)
    assert jnp.sum(found.astype(jnp.float32)) == x.size


# --- soft caps


@needs_new_jax
@pytest.mark.parametrize("data", [False, True], ids=["static", "data"])
@pytest.mark.parametrize("cap", [0.5, 50.0, 256.0, 1e3, 1e5, 1e9, 1e30])
def test_a_soft_cap_of_any_size(cap, data):
    """One that is far above the logits leaves them as they are."""
    from jax_fa.backends.mosaic import logits

    given = None if data else cap
    problem = replace(_geometry().problem, logits_soft_cap=given)
    tile = logits.Tile(
        problem=problem, shape=(64, 64), row_axis=0, first_row=0, first_key=0, positions=64, Skv=64
    )
    s = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32) * np.logspace(-3, 2, 64)
    caps = {"soft_cap": jnp.full(64, cap, jnp.float32)} if data else {}
    capped, slope, _ = logits._capped(tile, jnp.asarray(s, jnp.float32), caps.get)
    np.testing.assert_allclose(capped, cap * np.tanh(s / cap), rtol=2e-6, atol=2e-4)
    np.testing.assert_allclose(slope, 1 - np.tanh(s / cap) ** 2, rtol=0, atol=2e-6)


# --- geometry


# Arguments of `_geometry`: it is called outside of strategies, in which the type checker may not choose at random.
SIZES = st.fixed_dictionaries(
    {
        "B": st.sampled_from([(), (1,), (2,), (2, 3)]),
        "Sq": st.sampled_from([1, 7, 8, 31, 64, 65, 130, 200]),
        "Skv": st.sampled_from([1, 9, 63, 64, 128, 193, 300]),
        "K": st.sampled_from([1, 2, 3]),
        "G": st.sampled_from([1, 2, 3, 4, 6, 8, 16]),
        "width": st.sampled_from([64, 128, 192]),
        "consumers": st.sampled_from([1, 2, 3]),
    }
)


def _geometry(*, B=(2,), Sq=65, Skv=100, K=1, G=1, width=64, consumers=1, bias=None) -> Geometry:
    axes = tuple(range(len(B) + 3))
    problem = Problem(query_axes=axes, key_axes=axes, value_axes=axes, out_axes=axes, scale=1.0)
    query = jax.ShapeDtypeStruct((*B, Sq, K * G, 16), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((*B, Skv, K, 16), jnp.bfloat16)
    tiles = Tiles(width=width, stages=2, consumers=consumers)
    found = Operands(query=query, key=key, value=key, bias=bias)
    return Geometry.of(Call.of(problem, found), tiles)


def _rows(g: Geometry):
    """For every packed row its head in the unit and its position, by the definition."""
    for tile in range(g.row_tiles):
        for consumer in range(g.tiles.consumers):
            for head in range(g.heads):
                for i in range(g.positions):
                    yield head, (tile * g.tiles.consumers + consumer) * g.positions + i


@given(SIZES)
def test_rows_are_packed_by_heads_and_come_back(sizes):
    g = _geometry(**sizes)
    d = g.dims
    x = np.arange(math.prod((*d.B, d.N, d.Sq)), dtype=np.int32).reshape(*d.B, d.N, d.Sq)
    packed = np.asarray(g.pack(jnp.asarray(x), -1))
    assert packed.shape == g.packed_shape
    np.testing.assert_array_equal(g.unpack(jnp.asarray(packed)), x)
    heads, at = np.array(list(_rows(g))).T
    for unit in range(g.units):
        want = np.where(at < d.Sq, x[..., unit * g.heads + heads, np.minimum(at, d.Sq - 1)], -1)
        np.testing.assert_array_equal(packed[..., unit, :], want)


@given(SIZES)
def test_what_all_heads_share_is_packed_once(sizes):
    g = _geometry(**sizes)
    d = g.dims
    x = jnp.arange(d.Sq, dtype=jnp.float32).reshape(*(1 for _ in d.B), 1, d.Sq)
    packed = g.pack(x, 7.0)
    assert packed.shape[:-1] == x.shape[:-1]
    full = g.pack(jnp.broadcast_to(x, (*d.B, d.N, d.Sq)), 7.0)
    np.testing.assert_array_equal(jnp.broadcast_to(packed, full.shape), full)


@pytest.mark.parametrize(("G", "heads"), [(1, 1), (2, 2), (3, 1), (4, 4), (6, 2), (8, 8), (12, 4), (16, 8)])
@pytest.mark.parametrize("form", ["none", "apart"])
def test_how_many_heads_are_packed(G, heads, form):
    """As many as divide 64 rows and share a key head; one where each head adds numbers of its own to the keys."""
    g = _geometry(G=G, bias=None if form == "none" else jax.ShapeDtypeStruct((1, G, 1, 100), jnp.float32))
    assert g.heads == (heads if form == "none" else 1) and g.units * g.heads == G


@settings(max_examples=20)
@given(SIZES, st.integers(1, 9), st.sampled_from([1, 2**20, geometry.CACHE_BYTES // 3, 2**40]), st.booleans())
def test_blocks_are_dealt_out_once_each(sizes, tiles, shared, last_first):
    g = _geometry(**sizes)
    d = g.dims
    blocks = jnp.arange(math.prod(d.B) * g.units * tiles, dtype=jnp.int32)
    batch, unit, tile = jax.vmap(lambda block: g.deal(block, tiles, g.units, shared, last_first))(blocks)
    found = list(zip(*(np.broadcast_to(x, blocks.shape).tolist() for x in (*batch, unit, tile)), strict=True))
    assert sorted(found) == list(np.ndindex(*d.B, g.units, tiles))
    assert found[0][-1] == (tiles - 1 if last_first else 0)
    # Those that run together go through one tile number after another.
    numbers = [place[-1] for place in found]
    together = next((i for i, n in enumerate(numbers) if n != numbers[0]), len(numbers))
    assert all(len(set(numbers[i : i + together])) == 1 for i in range(0, len(numbers), together))


# --- ranges of key tiles


# Few sizes, as each compiles: every length against the tiles, heads packed fully, partly and not at all.
FEW = (
    {"B": (2,), "Sq": 70, "Skv": 300, "K": 1, "G": 6, "width": 64, "consumers": 1},
    {"B": (), "Sq": 200, "Skv": 193, "K": 2, "G": 1, "width": 64, "consumers": 2},
    {"B": (2,), "Sq": 7, "Skv": 256, "K": 1, "G": 16, "width": 128, "consumers": 1},
)


@st.composite
def bounds(draw):
    """Sizes, with lower and upper bounds per row, either of which may be absent, and a mask of whole rows."""
    sizes = draw(st.sampled_from(FEW))
    B, Sq, Skv, N = sizes["B"], sizes["Sq"], sizes["Skv"], sizes["K"] * sizes["G"]
    dims = draw(st.sampled_from([(*B, N), (*(1 for _ in B), N), (*B, 1)]))
    numbers = st.integers(-5, Skv + 5)
    # A few rows that differ from the others: a fill, or lines that rise as under causal masks and windows.
    at = np.arange(Sq)
    found = {}
    for name in draw(st.sampled_from([("lower",), ("upper",), ("lower", "upper")])):
        line = draw(st.sampled_from([0, 1])) * at + draw(numbers)
        rare = draw(arrays(np.int32, (*dims, Sq), elements=numbers, fill=st.just(-99)))
        found[name] = np.where(rare == -99, line, rare).astype(np.int32)
    if draw(st.booleans()):
        rare = draw(arrays(np.bool_, (*dims, Sq, 1), fill=st.just(True)))
        found["mask"] = rare
    return sizes, found


def _visible(g: Geometry, given) -> np.ndarray:
    """`*B N Sq Skv`, by the definition of bounds."""
    d = g.dims
    j = np.arange(d.Skv)
    inside = given.get("lower", np.int32(0))[..., None] <= j
    inside = inside & (j < given.get("upper", np.int32(d.Skv))[..., None])
    return np.broadcast_to(inside & given.get("mask", True), (*d.B, d.N, d.Sq, d.Skv))


def _like(g: Geometry, **given) -> Call:
    """A call of the sizes of `g`, with these operands."""
    d = g.dims
    query = jnp.zeros((*d.B, d.Sq, d.N, d.D), jnp.bfloat16)
    key = jnp.zeros((*d.B, d.Skv, d.K, d.D), jnp.bfloat16)
    return Call.of(g.problem, Operands(query=query, key=key, value=key, **given))


def _bounded(g: Geometry, given) -> Call:
    return _like(g, **{name: jnp.asarray(a) for name, a in given.items()})


def _statistics(g: Geometry) -> operands.RowStatistics:
    d = g.dims
    ones, dout = jnp.ones((*d.B, d.N, d.Sq), jnp.float32), jnp.zeros((*d.B, d.Sq, d.N, d.Dv), jnp.bfloat16)
    return operands.RowStatistics(dout=dout, maximum=ones, inverse=ones, delta=ones)


@settings(max_examples=40)
@given(bounds())
def test_ranges_of_tiles_hold_all_that_is_visible(case):
    """Every visible key lies in [first, last), whose ends see something; tiles in [inner_first, inner_last) are whole."""
    sizes, given = case
    g = _geometry(**sizes)
    d, width = g.dims, g.tiles.width
    found = visibility(g, _bounded(g, given).operands)
    visible, j = _visible(g, given), np.arange(d.Skv)
    ranges = np.broadcast_to(found["ranges"], (*d.B, g.units, g.row_tiles, len(RANGE)))
    for where in np.ndindex(*d.B, g.units, g.row_tiles):
        *batch, unit, tile = where
        first, inner_first, inner_last, last = ranges[where]
        assert 0 <= first <= inner_first <= inner_last <= last <= g.key_tiles
        heads = slice(unit * g.heads, (unit + 1) * g.heads)
        rows = slice(tile * g.block_positions, (tile + 1) * g.block_positions)
        seen = visible[(*batch, heads, rows)].reshape(-1, d.Skv)
        assert not seen[:, : first * width].any() and not seen[:, last * width :].any()
        if first < last:
            assert seen[:, first * width : (first + 1) * width].any()
            assert seen[:, (last - 1) * width : last * width].any()
        assert seen[:, inner_first * width : inner_last * width].all()
        assert inner_first == inner_last or inner_last * width <= d.Skv
    # Per row the bounds say the same as the masks did.
    packed = {name: np.asarray(found[name]) for name in ("lower", "upper") if name in found}
    low, high = (
        np.asarray(g.unpack(jnp.broadcast_to(packed.get(name, default), g.packed_shape)))[..., None]
        for name, default in (("lower", 0), ("upper", d.Skv))
    )
    np.testing.assert_array_equal((low <= j) & (j < high), visible)
    assert np.all(packed["upper"].max(initial=0) <= d.Skv)


def test_calls_without_bounds_have_no_ranges():
    g = _geometry(G=2)
    assert visibility(g, _like(g).operands) == {}


@settings(max_examples=40)
@given(bounds())
def test_ranges_of_row_tiles_hold_all_that_sees_a_block_of_keys(case):
    """The same where keys stay and rows of one head move."""
    sizes, given = case
    g = _geometry(**sizes)
    d, width, keys = g.dims, g.tiles.width, ROWS * g.tiles.consumers
    found, visible = operands.for_keys(g, _bounded(g, given), _statistics(g)), _visible(g, given)
    blocks, row_tiles = -(-d.Skv // keys), -(-d.Sq // width)
    ranges = np.broadcast_to(found.ranges, (*d.B, d.N, blocks, len(RANGE)))
    for where in np.ndindex(*d.B, d.N, blocks):
        *before, block = where
        first, inner_first, inner_last, last = ranges[where]
        assert 0 <= first <= inner_first <= inner_last <= last <= row_tiles
        seen = visible[tuple(before)][:, block * keys : (block + 1) * keys]
        assert not seen[: first * width].any() and not seen[last * width :].any()
        assert seen[inner_first * width : inner_last * width].all()
    rows = {name: np.asarray(getattr(found, name)) for name in found.present(("lower", "upper"))}
    rows = {name: x[..., : d.Sq, None] for name, x in rows.items()}
    j = np.arange(d.Skv)
    again = (rows.get("lower", 0) <= j) & (j < rows["upper"])
    np.testing.assert_array_equal(np.broadcast_to(again, visible.shape), visible)
    # Rows that do not exist have no visible key and no weight.
    assert not np.asarray(found.upper)[..., d.Sq :].any()
    for name, empty in operands.RowStatistics.EMPTY.items():
        assert (np.asarray(getattr(found, name))[..., d.Sq :] == np.float32(empty)).all()


def test_tiles_that_compare_segments_are_not_whole():
    """Where some row compares segments no tile of its is skipped by the comparison, in both orders of loops."""
    sizes = {"B": (), "Sq": 200, "Skv": 256, "width": 64, "consumers": 1}
    g = _geometry(**sizes)
    row = np.full((1, 200), -1, np.int32)
    row[0, 70] = 3
    given = _like(g, segment_row=jnp.asarray(row), segment_key=jnp.zeros((1, 256), jnp.int32))
    ranges = np.asarray(visibility(g, given.operands)["ranges"])[0]
    np.testing.assert_array_equal(ranges, [[0, 0, 4, 4], [0, 0, 0, 4], [0, 0, 4, 4], [0, 0, 4, 4]])
    by_block = np.asarray(operands.for_keys(g, given, _statistics(g)).ranges)[0]
    np.testing.assert_array_equal(by_block, 4 * [[0, 0, 1, 4]])


@pytest.mark.parametrize("bias", [None, (1, 2, 40, 1), (1, 1, 1, 70)])
@pytest.mark.parametrize(
    "more", [(), ("lower",), ("segment_row", "segment_key"), ("mask",), ("position", "upper")]
)
def test_shared_memory_is_counted_for_every_vector(bias, more):
    """The table of tiles is told how many scalars per key or row come with a tile; the kernels take as many."""
    sizes = {"B": (1,), "Sq": 40, "Skv": 70, "K": 2}
    bias = None if bias is None else jnp.zeros(bias, jnp.float32)
    g = _geometry(**sizes, bias=bias)
    rows, keys = jnp.zeros((1, 1, 40), jnp.int32), jnp.zeros((1, 1, 70), jnp.int32)
    extra = {"lower": rows, "upper": rows, "segment_row": rows, "segment_key": keys, "position": rows}
    extra |= {"mask": jnp.ones((1, 1, 40, 1), bool)}
    scalars = {"alibi_slopes": jnp.ones((1, 2, 1)), "scale": jnp.ones((1, 2)), "soft_cap": jnp.ones((1, 2))}
    given = _like(g, bias=bias, **scalars, **{name: extra[name] for name in more})
    by_row, by_key = operands.for_rows(g, given), operands.for_keys(g, given, _statistics(g))
    per_key = len(by_row.present(inputs.BY_KEY))
    per_row = len(by_key.present(name for name in inputs.BY_ROW if name not in inputs.BY_HEAD))
    assert choice.vectors("forward", given.operands) == per_key
    assert choice.vectors("dq", given.operands) == per_key
    assert choice.vectors("dkv", given.operands) == per_row


@pytest.mark.parametrize(
    ("lengths", "bias", "said"),
    [
        ((64, 64), (1, 1, 64, 64), ()),
        (
            (65, 64),
            None,
            ("query (1, 65, 2, 64) is copied once, padded to (1, 72, 2, 64)",),
        ),
        (
            (64, 1001),
            (1, 1, 64, 1001),
            (
                "key (1, 1001, 2, 64) is copied once, padded to (1, 1008, 2, 64)",
                "value (1, 1001, 2, 64) is copied once, padded to (1, 1008, 2, 64)",
                "bias bfloat16[1, 1, 64, 1001] is copied once, to bfloat16[1, 1, 64, 1008]",
            ),
        ),
    ],
)
def test_copies_are_announced(lengths, bias, said):
    """`explain` shows what a call costs that an aligned one would not."""
    Sq, Skv = lengths
    query = jax.ShapeDtypeStruct((1, Sq, 2, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, Skv, 2, 64), jnp.bfloat16)
    array = None if bias is None else jax.ShapeDtypeStruct(bias, jnp.bfloat16)

    def ask(query, key, value, bias):
        return request_of(jax_fa.flash_attention, query, key, value, bias=bias).call

    assert mosaic.backend.notes(abstract(ask, query, key, key, array)) == said
