"""The Mosaic GPU backend in Pallas' interpreter, which reports races, against the oracle.

The rows of the one table run in 16 bits; what is special to these kernels (head_dims and lengths around their tiles,
heads packed into the rows of a tile, which of bias and mask is read how, tiles of other sizes) is combined pairwise.
A run takes seconds, so most of both are slow tests.
"""

import itertools
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_tools import interpreter, needs_new_jax, request, why_not
from test_nan import MASKS

import jax_fa
from jax_fa import masks, primitives
from jax_fa.attention import attention
from jax_fa.backends.mosaic import Options, Tiles, tuning
from jax_fa.call import DIFFERENTIABLE, Call, rounding_unit
from jax_fa.testing import oracle
from jax_fa.testing.cases import CASES, Case, check, expected
from jax_fa.testing.spread import pairwise, spanning

pytestmark = needs_new_jax
SLOW = pytest.mark.slow


# The interpreter compiles dozens of programs for a run, each of which maps memory, which Linux lets a process do 65,530
# times; beyond, the compiler crashes. So they are dropped after so many tests.
KEPT_TESTS = 16
_tests = itertools.count(1)


@pytest.fixture
def interpreted(capfd):
    """Runs a function in the interpreter and fails where that reports a race."""

    def run(fn, *args):
        with interpreter():
            found = jax.block_until_ready(jax.jit(fn)(*args))
        printed = capfd.readouterr().out
        assert "RACE DETECTED" not in printed, printed[:4000]
        return found

    yield run
    if next(_tests) % KEPT_TESTS == 0:
        jax.clear_caches()


def test_a_race_is_reported(interpreted):
    """Two warpgroups write to one place of shared memory."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(x, out, shared):
        shared[...] = x[...]

        @pl.when(jax.lax.axis_index("warpgroup") == 0)
        def _():
            out[...] = shared[...]

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
        scratch_types=[plgpu.SMEM((128,), jnp.float32)],
        num_threads=2,
        thread_name="warpgroup",
    )
    # JAX 0.11 prints it, later ones raise it.
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match="RACE DETECTED"):
        interpreted(kernel, jnp.ones(128, jnp.float32))


# --- the rows of the one table


def _in_16_bits(at: int, case: Case) -> Case:
    if case.dtype in ("bfloat16", "float16"):
        return case
    return replace(case, dtype="float16" if at % 8 == 7 else "bfloat16")


TABLE = tuple(_in_16_bits(at, case) for at, case in enumerate(CASES))
EMPTY = tuple(case for case in TABLE if 0 in case.full)
REFUSED = {case.name: "a dimension is empty" for case in EMPTY}
SERVED = tuple(case for case in TABLE if case.name not in REFUSED)
# Where no naive result is at hand that is rounded alike: the distance of neighbours in bfloat16, above 1.
NEIGHBOURS = 2**-7
# Run by default: with gradients, which show the forward's results too, or without.
WITH_GRADIENTS = ("mask-nothing", "bias-BN1K", "bfloat16-everything", "float16-causal", "bfloat16-peaked-50")
FORWARD_ONLY = (
    "two-batch-dims",
    "mask-causal_dense",
    "mask-cumulative_causal",
    "bias-1N11",
    "everything-BNSD",
    "layout-SBND",
)


def test_what_is_refused():
    assert {case.name: why for case in TABLE if (why := why_not(case)) is not None} == REFUSED
    assert all(why_not(case, "backward") is None for case in SERVED)


# --- combinations


@dataclass(frozen=True, kw_only=True)
class Combination(Case):
    """A case with a second, dense mask and tiles of its own."""

    dense: str | None = None  # its dims, as `Case.bias`
    tiles: tuple[int, int, int] | None = None  # width, stages, consumers

    def _dense(self) -> np.ndarray:
        return self.random("dense").random(self.shape_of(self.dense)) < 0.7

    def visible(self) -> np.ndarray | None:
        found = super().visible()
        if self.dense is None:
            return found
        return self._dense() if found is None else found & self._dense()

    def library_mask(self):
        found = super().library_mask()
        if self.dense is None:
            return found
        dense = masks.as_mask(self._dense())
        return dense if found is None else masks.as_mask(found) & dense

    @property
    def implementation(self) -> str | Options:
        """With its tiles for all kernels in which they fit into shared memory."""
        if self.tiles is None:
            return "mosaic"
        width, stages, consumers = self.tiles
        tiles = Tiles(width=width, stages=stages, consumers=consumers)
        fitting = [w for w in tuning.TABLES if tuning.why_not(w, tiles, self.D, self.Dv, 5, 8) is None]
        return Options(tiles=dict.fromkeys(fitting, tiles))


_HEADS = (
    # layout, B, N, K: every layout, batch rank and number of heads that share a key head.
    {"layout": "BSND", "B": (2,), "N": 3, "K": 3},
    {"layout": "BNSD", "B": (1,), "N": 16, "K": 1},
    {"layout": "SBND", "B": (2,), "N": 3, "K": 1},
    {"layout": "BSND", "B": (2, 3), "N": 2, "K": 1},
    {"layout": "SND", "B": (), "N": 12, "K": 2},
    {"layout": "NSD", "B": (), "N": 8, "K": 2},
    {"layout": "BNSD", "B": (2, 1), "N": 4, "K": 2},
    {"layout": "BSND", "B": (), "N": 8, "K": 1},
)
_LENGTHS = (
    (1, 1),
    (1, 193),
    (7, 8),
    (8, 7),
    (9, 65),
    (63, 129),
    (64, 64),
    (65, 9),
    (127, 63),
    (129, 191),
    (191, 127),
    (193, 193),
)
_HEAD_DIMS = (
    (8, 8),
    (5, 7),
    (24, 24),
    (40, 40),
    (64, 64),
    (72, 72),
    (80, 80),
    (96, 96),
    (128, 128),
    (192, 128),
    (64, 16),
    (16, 64),
    (256, 256),
)
_KINDS = (
    None,
    "causal",
    "causal_bottom",
    "window_bottom",
    "prefix_bottom",
    "lengths",
    "segments_causal",
    "cumulative",
)
_FORMS = ("BNQK", "NQK", "B1QK", "BN1K", "BNQ1", "B11K", "N11", "QK", "Q1", "K", "1")
_OPTIONS = {
    "heads": _HEADS,
    "lengths": _LENGTHS,
    "head_dims": _HEAD_DIMS,
    "mask": _KINDS,
    "dense": (None, *_FORMS),
    "bias": (*((form, None) for form in _FORMS), *((form, "float32") for form in _FORMS[:6]), (None, None)),
    "dtype": ("bfloat16", "float16"),
    "scale": (None, 0.2, -0.3, 0.0),
    "soft_cap": (None, 4.0),
    "slopes": (None, "N", "BN"),
    "dropout": (0.0, 0.25),
    "tiles": (
        None,
        (64, 1, 1),
        (128, 2, 1),
        (192, 3, 1),
        (64, 4, 2),
        (128, 1, 2),
        (192, 2, 2),
        (64, 2, 3),
        (128, 3, 3),
    ),
}


def _combined(*, heads, lengths, head_dims, bias, **options) -> Combination:
    (Sq, Skv), (D, Dv) = lengths, head_dims
    words = [
        heads["layout"],
        *heads["B"],
        f"{heads['N']}:{heads['K']}",
        f"{Sq}x{Skv}",
        f"{D}+{Dv}",
        options["dtype"],
    ]
    words += [f"bias{bias[0]}{bias[1] or ''}"] if bias[0] is not None else []
    for name in ("mask", "dense", "scale", "soft_cap", "slopes", "dropout", "tiles"):
        if options[name] not in (None, 0.0) or (name, options[name]) == ("scale", 0.0):
            value = options[name] if name != "tiles" else "/".join(map(str, options[name]))
            words.append(f"{'' if name == 'mask' else name}{value}")
    return Combination(
        name="-".join(map(str, words)),
        Sq=Sq,
        Skv=Skv,
        D=D,
        Dv=Dv,
        bias=bias[0],
        bias_dtype=bias[1],
        **heads,
        **options,
    )


_ROWS = pairwise(_OPTIONS)
COMBINATIONS = tuple(_combined(**row) for row in _ROWS)
# The first ones, in which every value appears, run by default: two small ones with gradients.
FIRST = COMBINATIONS[: spanning(_ROWS)]
SMALL = tuple(sorted(FIRST, key=lambda case: case.Sq * case.Skv * case.N * np.prod(case.B, dtype=int))[:2])
LARGE = tuple(case for case in FIRST if case not in SMALL)


# --- results


def _params(names: tuple[str, ...], combinations: tuple[Case, ...]) -> list:
    """All that is served; slow are the rows not named, and all but these combinations."""
    chosen = {*names, *(case.name for case in combinations)}
    return [
        pytest.param(case, id=str(case), marks=() if case.name in chosen else pytest.mark.slow)
        for case in (*SERVED, *COMBINATIONS)
    ]


def _implementation(case: Case) -> str | Options:
    return case.implementation if isinstance(case, Combination) else "mosaic"


@pytest.mark.parametrize("case", _params(FORWARD_ONLY, LARGE))
def test_output_and_logsumexp(case, interpreted):
    out, lse = interpreted(
        lambda x: case.flash_attention(x, implementation=_implementation(case)), case.stored_operands()
    )
    check(case, out, lse)
    # Fully masked rows are 0 exactly.
    unseen = np.moveaxis(expected(case)[0].l == 0, -1, -2)
    assert not case.canonical(out)[unseen].any()


@pytest.mark.parametrize("case", _params(WITH_GRADIENTS, SMALL))
def test_gradients(case, interpreted):
    dout, dlse = case.cotangents()
    (out, lse), gradients = interpreted(
        lambda *args: case.gradient(*args, implementation=_implementation(case)),
        case.stored_operands(),
        case.stored(dout),
        dlse,
    )
    check(case, out, lse, gradients)


# --- what is special


KEEP_TILES = (
    None,
    *(pytest.param(t, marks=pytest.mark.slow) for t in ((64, 1, 3), (128, 1, 2), (192, 2, 1))),
)


def _keep_case(tiles) -> Combination:
    return Combination(
        name="keep", B=(1,), Sq=40, Skv=190, N=2, K=1, Dv=192, dtype="bfloat16", dropout=0.3, tiles=tiles
    )


def _keep_bits(case: Case) -> np.ndarray:
    packed = jax_fa.dropout_mask(case.dropout_key(), case.dropout, case.full)
    size = int(np.prod(case.full))
    return np.unpackbits(np.asarray(packed), bitorder="little")[:size].reshape(case.full).astype(bool)


@pytest.mark.parametrize("tiles", KEEP_TILES, ids=str)
def test_dropout_bits_are_those_of_dropout_mask(tiles, interpreted):
    """With equal weights and values that name their key, an output is 0 exactly where its key was dropped."""
    case = _keep_case(tiles)
    x = case.operands()
    named = np.broadcast_to(np.eye(case.Skv, case.Dv)[:, None], x["value"].shape)
    x = x | {"query": np.zeros_like(x["query"]), "value": case.cast(named)}
    out, _ = interpreted(lambda x: case.flash_attention(x, implementation=case.implementation), x)
    found = np.moveaxis(np.asarray(out) != 0, -2, -3)[..., : case.Skv]
    np.testing.assert_array_equal(found, _keep_bits(case))


@pytest.mark.parametrize("tiles", KEEP_TILES, ids=str)
def test_dropout_bits_of_the_gradient_of_value(tiles, interpreted):
    """Likewise, with cotangents that name their row and head."""
    case = _keep_case(tiles)
    x = case.operands() | {"query": np.zeros_like(case.operands()["query"])}
    dout, dlse = case.cotangents()
    group = case.N // case.K
    named = np.eye(group * case.Sq, case.Dv).reshape(group, case.Sq, case.Dv).swapaxes(0, 1)
    named = case.cast(np.broadcast_to(np.tile(named, (1, case.K, 1)), dout.shape))
    _, gradients = interpreted(
        lambda *args: case.gradient(*args, implementation=case.implementation), x, named, np.zeros_like(dlse)
    )
    found = np.asarray(gradients["value"])[..., : group * case.Sq] != 0  # B Skv K (group Sq)
    np.testing.assert_array_equal(np.moveaxis(found, 1, -1).reshape(case.full), _keep_bits(case))


@pytest.mark.parametrize("name", ["soft-cap", "mask-lengths"])
def test_softmax_statistics(name, interpreted):
    """m and l are taken after scale, bias, cap and mask, before dropout; (-FLT_MAX, 0) in fully masked rows."""
    case = next(case for case in TABLE if case.name == name)

    def run(x):
        found = attention(request(case, x))
        return found.softmax_max, found.softmax_sum

    want = expected(case)[0]
    for name, ours, oracles in zip(
        "ml", interpreted(run, case.stored_operands()), (want.m, want.l), strict=True
    ):
        assert ours.dtype == jnp.float32
        oracle.assert_close_to_oracle(ours, oracles, oracles, f"{case}: {name}", oracle.FLOOR["float32"])


def test_two_runs_are_bitwise_equal(interpreted):
    options = {"mask": "causal_bottom", "bias": "NQK", "dtype": "bfloat16"}
    case = Case(name="twice", B=(1,), Sq=40, Skv=70, N=2, K=1, **options)
    dout, dlse = case.cotangents()

    def run(x):
        return case.gradient(x, dout, dlse, implementation="mosaic")

    first, second = (jax.tree.leaves(interpreted(run, case.stored_operands())) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_square_root_of_distances(interpreted):
    """pse type 3 takes the root of the distance that slopes multiply."""
    case = Case(name="root", Sq=70, Skv=70, dtype="bfloat16", N=4, K=4)
    x = case.operands()
    bnsd = {name: np.swapaxes(a, 1, 2) for name, a in x.items()}
    slopes = np.array([0.1, 0.2, 0.3, 0.4], np.float32)

    def run(x, implementation="mosaic"):
        return jax_fa.flash_attention_score(
            **x,
            pse=slopes,
            pse_type=3,
            head_num=4,
            input_layout="BNSD",
            scale_value=0.2,
            implementation=implementation,
        ).attention_out

    want = oracle.attention(x["query"], x["key"], x["value"], scale=0.2, bias=_root(slopes, case.Sq)).out
    found = np.swapaxes(interpreted(run, bnsd), 1, 2)
    oracle.assert_close_to_oracle(found, want, want, "root", NEIGHBOURS)


def _root(slopes, S: int) -> np.ndarray:
    away = np.abs(np.arange(S) - np.arange(S)[:, None])
    return -slopes[:, None, None] * np.sqrt(away)


# --- garbage


def _garbage() -> list:
    """Every mask and filling of test_nan.py, and a soft cap, whose slope is NaN there; three run by default."""
    quick = (("lengths", np.nan, None), ("dense", np.inf, None), ("dense", np.nan, 2.0))
    fillings = ((np.nan, None), (np.inf, None), (-np.inf, None), (np.nan, 2.0))
    return [
        pytest.param(
            mask,
            x,
            cap,
            id=f"{mask}-{x}{'-soft-cap' if cap else ''}",
            marks=() if (mask, x, cap) in quick else pytest.mark.slow,
        )
        for mask in MASKS
        for x, cap in fillings
    ]


# The interpreter multiplies by NumPy, which warns of 0 times infinity.
garbage_test = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@garbage_test
@pytest.mark.parametrize(("mask", "garbage", "soft_cap"), _garbage())
def test_what_is_masked_does_not_leak(mask, garbage, soft_cap, interpreted):
    """Garbage in keys and rows that are masked throughout, and in the bias wherever it is masked, changes no bit."""
    case = Case(name=f"nan-{mask}", mask=mask, bias="BNQK", dtype="bfloat16", soft_cap=soft_cap)
    visible = np.broadcast_to(case.visible(), case.full)
    group = visible.reshape(*case.B, case.K, -1, case.Sq, case.Skv)
    keys = ~np.moveaxis(group.any(axis=(-3, -2)), -1, -2)  # B Skv K
    rows = ~np.moveaxis(visible.any(axis=-1), -1, -2)  # B Sq N
    dout, dlse = case.cotangents()

    def fill(x, masked, filling):
        return case.cast(np.where(masked, np.float32(filling), x.astype(np.float32)))

    def run(x, dout, dlse):
        (out, lse), gradients = case.gradient(x, dout, dlse, implementation="mosaic")
        return {"out": out, "lse": lse}, gradients

    def results(filling):
        x = case.operands()
        x = {
            "query": fill(x["query"], rows[..., None], filling),
            "key": fill(x["key"], keys[..., None], filling),
            "value": fill(x["value"], keys[..., None], filling),
            "bias": fill(x["bias"], ~visible, filling),
        }
        return interpreted(run, x, fill(dout, rows[..., None], filling), dlse)

    clean, dirty = results(0.0), results(garbage)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        assert np.isfinite(np.asarray(a, np.float32)).all()
        np.testing.assert_array_equal(b, a)
    found = dirty[1]
    assert not found["key"][keys].any() and not found["value"][keys].any()
    assert not found["query"][rows].any() and not found["bias"][~visible].any()


@garbage_test
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_visible_shows(where, interpreted):
    """A NaN turns those rows into NaN to which it is visible, and changes no bit of the others."""
    case = Case(name="nan-causal", mask="causal", dtype="bfloat16")
    b, at, head = 1, 20, 1
    x = case.operands()
    dirty = x | {where: x[where].copy()}
    dirty[where][b, at, head, 2] = np.nan
    clean, found = (
        np.asarray(
            interpreted(lambda x: case.flash_attention(x, implementation="mosaic"), given)[0], np.float32
        )
        for given in (x, dirty)
    )
    rows = np.zeros((*case.B, case.Sq, case.N), bool)
    if where == "query":
        rows[b, at, head] = True
    else:
        rows[b, at:, head * case.N // case.K : (head + 1) * case.N // case.K] = True
    assert np.isnan(found[rows]).any(axis=-1).all()
    np.testing.assert_array_equal(found[~rows], clean[~rows])


@garbage_test
def test_an_infinite_key_shows_in_the_gradient_of_query(interpreted):
    """Also where its logits are -inf and its weights 0, so that the forward's results are finite."""
    case = Case(name="infinite-key", B=(1,), Sq=40, Skv=40, N=1, K=1, mask="causal", dtype="bfloat16")
    x, (dout, dlse), at = case.operands(), case.cotangents(), 20
    x["key"][0, at, 0, 2] = -np.inf
    x["query"][..., 2] = np.abs(x["query"][..., 2]) + 1
    (out, _), gradients = interpreted(
        lambda *args: case.gradient(*args, implementation="mosaic"), x, dout, dlse
    )
    assert np.isfinite(_wide(out)).all()
    found = np.isnan(_wide(gradients["query"])[0, :, 0]).any(axis=-1)
    np.testing.assert_array_equal(found, np.arange(case.Sq) >= at)


@garbage_test
@pytest.mark.parametrize(
    ("bias", "soft_cap"),
    [("BNQK", None), ("BN1K", None), ("BNQ1", None), ("BNQK", 2.0), pytest.param("BN1K", 2.0, marks=SLOW)],
)
def test_a_bias_of_minus_infinity_masks(bias, soft_cap, interpreted):
    """Rows that are -inf throughout give 0, never NaN; a soft cap leaves them masked."""
    name = f"minus-infinity-{bias}"
    case = Case(name=name, bias=bias, bias_dtype="float32", dtype="bfloat16", soft_cap=soft_cap)
    x = case.operands()
    seen = case.random("seen").random(case.shape_of(case.bias)) < 0.7
    seen[..., :3, :] &= bias == "BN1K"
    hidden = x | {"bias": np.where(seen, x["bias"], -np.float32(np.inf))}
    out, lse = interpreted(lambda x: case.flash_attention(x, implementation="mosaic"), hidden)
    want = oracle.attention(x["query"], x["key"], x["value"], bias=x["bias"], visible=seen, soft_cap=soft_cap)
    oracle.assert_close_to_oracle(out, want.out, want.out, "out", NEIGHBOURS)
    oracle.assert_close_to_oracle(lse, want.lse, want.lse, "lse", oracle.FLOOR["float32"])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=SLOW)])
def test_a_row_of_the_least_finite_biases_is_visible(dtype, interpreted):
    """Only -inf masks: a row of equal logits has equal weights, whatever these logits are."""
    case = Case(name="least", bias="BNQ1", bias_dtype=dtype, dtype="bfloat16")
    x = case.operands()
    x = x | {"query": 0 * x["query"], "bias": np.full_like(x["bias"], jnp.finfo(dtype).min)}
    out, _ = interpreted(lambda x: case.flash_attention(x, implementation="mosaic"), x)
    mean = np.repeat(_wide(x["value"]).mean(axis=-3, keepdims=True), case.N // case.K, axis=-2)
    np.testing.assert_allclose(_wide(out), np.broadcast_to(mean, out.shape), atol=2**-8)


# --- what only the portable backend has as an oracle: operands that masks and traced arguments make


SMALL_CASE = {"B": (2,), "Sq": 70, "Skv": 150, "N": 4, "K": 2, "D": 16, "Dv": 16, "dtype": "bfloat16"}


def _ids(case: Case, size: int, heads: int = 1) -> np.ndarray:
    """Segments in no order."""
    return case.random(f"ids{size}").integers(0, 4, (*case.B, heads, size)).astype(np.int32)


def _segments(case: Case, heads: int = 1) -> dict:
    """Rows of every second 16 compare segments; one row's segment has no key."""
    row = np.where(np.arange(case.Sq) // 16 % 2, -1, _ids(case, case.Sq, heads))
    row[0, 0, 3] = 9
    return {"segment_row": row, "segment_key": _ids(case, case.Skv, heads)}


def _positions(case: Case) -> dict:
    random = case.random("positions")
    return {
        "position": random.integers(0, case.Skv, (*case.B, 1, case.Sq)).astype(np.int32),
        "alibi_slopes": random.random((*case.B, case.N, case.Sq)).astype(np.float32) / 8,
    }


def _scalars(case: Case, *names: str) -> dict:
    random, shape = case.random("scalars"), (*case.B, case.N)
    found = {
        "scale": random.uniform(0.2, 0.4, shape).astype(np.float32),
        "soft_cap": random.uniform(2, 4, (1, case.N)).astype(np.float32),
        "keep_threshold": random.integers(30000, 65536, shape).astype(np.uint32),
    }
    return {name: found[name] for name in names}


# Options of the case, and what replaces or joins its operands.
MORE = {
    "segments": ({}, _segments),
    "segments by head, bias, window": (
        {"bias": "BNQK", "mask": "window_bottom"},
        lambda case: _segments(case, case.N),
    ),
    "positions": ({"slopes": "N", "mask": "causal_bottom"}, _positions),
    "scale": ({}, lambda case: _scalars(case, "scale")),
    "soft cap": ({"bias": "BN1K"}, lambda case: _scalars(case, "soft_cap")),
    "dropout": ({"dropout": 0.3}, lambda case: _scalars(case, "keep_threshold")),
    "all": (
        {"bias": "1NQK", "slopes": "N", "dropout": 0.3, "mask": "lengths"},
        lambda case: (
            _segments(case) | _positions(case) | _scalars(case, "scale", "soft_cap", "keep_threshold")
        ),
    ),
}
SLOW_MORE = (
    "segments by head, bias, window",
    "positions",
    "scale",
    "soft cap",
    "dropout",
)  # "all" has each of them


def _attend(case: Case, more: dict) -> Call:
    """The call of a case whose operands `more` replaces."""
    call = request(case)
    problem = replace(call.problem, logsumexp=True)
    if "scale" in more:
        problem = replace(problem, scale=1.0)
    if "keep_threshold" in more:
        problem = replace(problem, keep_prob=1.0)
    operands = replace(call.operands, **{name: jnp.asarray(x) for name, x in more.items()})
    return call.replace(problem=problem, operands=operands)


def _results(problem, operands, cotangents, implementation: str) -> dict:
    """out, log-sum-exp and every gradient, by name."""
    problem = replace(problem, implementation=implementation)
    floats = {name: x for name, x in operands.present().items() if name in DIFFERENTIABLE}

    def attend(x):
        found = attention(Call.of(problem, replace(operands, **x)))
        return found.out, found.logsumexp

    (out, lse), pullback = jax.vjp(attend, floats)
    (gradients,) = pullback(cotangents(out, lse))
    return {"out": out, "lse": lse, **gradients}


def _cotangents(out, lse):
    draw = jax.random.normal
    return draw(jax.random.key(1), out.shape, out.dtype), draw(jax.random.key(2), lse.shape, lse.dtype)


def _widened(operands):
    """The same operands in float32."""
    return operands.map(lambda _, x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x)


def _wide(x):
    return np.asarray(x, np.float32)


def _as_good_as_portable(found: dict, portable: dict, wide: dict, floor: float = 2**-9) -> None:
    """Errors against float32 are at most twice those of the portable backend, and a floor."""
    assert sorted(found) == sorted(wide)
    for name, want in wide.items():
        # The log-sum-exp of a fully masked row is as large as float32 goes.
        want, ours, theirs = (np.maximum(_wide(x), -1e9) for x in (want, found[name], portable[name]))
        error, least = np.linalg.norm(ours - want), np.linalg.norm(theirs - want)
        assert found[name].dtype == portable[name].dtype and found[name].shape == want.shape, name
        assert error <= 2 * least + floor * np.linalg.norm(want), (name, error, least)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW if name in SLOW_MORE else ()) for name in MORE]
)
def test_more_operands(name, interpreted):
    """Forward and every gradient against the portable backend."""
    options, more = MORE[name]
    case = Case(name=f"more-{name}", **SMALL_CASE | options)
    call = _attend(case, more(case))
    problem, operands = call.problem, call.operands

    def run(operands, implementation):
        return _results(problem, operands, _cotangents, implementation)

    found = interpreted(partial(run, implementation="mosaic"), operands)
    portable = jax.jit(partial(run, implementation="xla"))
    # bfloat16 cotangents are what the others got.
    narrow = portable(operands)
    exact = jax.jit(
        lambda x: _results(
            problem,
            _widened(x),
            lambda out, lse: jax.tree.map(
                lambda c: c.astype(jnp.float32), _cotangents(out.astype(jnp.bfloat16), lse)
            ),
            "xla",
        )
    )(operands)
    _as_good_as_portable(found, narrow, exact)


# --- what the derivative saves


def test_rounding_is_what_the_output_lost(interpreted):
    """The forward of a derivative knows its output to twice the digits."""
    case = Case(name="rounding", **SMALL_CASE | {"mask": "lengths", "dtype": "float16"})
    call = request(case)
    wanted = replace(call.problem, saves_rounding=True)
    out, _, _, rounding = interpreted(lambda x: primitives.forward(wanted, x), call.operands)
    exact = _wide(expected(case)[0].out)
    assert rounding.dtype == out.dtype and rounding.shape == out.shape
    more = _wide(out) + _wide(rounding) * rounding_unit(out.dtype)
    assert np.linalg.norm(more - exact) < 0.02 * np.linalg.norm(_wide(out) - exact)


def _error(found, want) -> float:
    return float(np.linalg.norm(_wide(found) - _wide(want)) / np.linalg.norm(_wide(want)))


def _query_gradients(x: tuple, interpreted, ours: Any = "mosaic", **options) -> list[float]:
    """Relative errors of dq against float64: of these kernels, and of the portable backend."""
    *qkv, dout = x

    def gradient(implementation, *x):
        def attend(q, k, v):
            return jax_fa.flash_attention(q, k, v, **options, implementation=implementation)

        return jax.vjp(attend, *x[:3])[1](x[3])[0]

    exact = oracle.attention(*(np.asarray(a, np.float64) for a in qkv), scale=qkv[0].shape[-1] ** -0.5)
    wide = exact.gradients(np.asarray(dout, np.float64))["query"]
    found = interpreted(partial(gradient, ours), *x), jax.jit(partial(gradient, "xla"))(*x)
    return [_error(one, wide) for one in found]


@pytest.mark.parametrize("common", [pytest.param(3, marks=SLOW), 30])
def test_what_all_keys_share_cancels(common, interpreted):
    """A bias of the key projection, which softmax does not feel, is no error of the gradient of query."""
    random = np.random.default_rng(0)
    q, k, v, dout = random.standard_normal((4, 1, 150, 1, 64))
    k = k + common * random.standard_normal(64)
    x = tuple(jnp.asarray(a, jnp.bfloat16) for a in (q, k, v, dout))
    found, portable = _query_gradients(x, interpreted)
    assert found <= min(2 * portable, 4.6e-3)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(
    ("common", "length"),
    [pytest.param(120, 100, marks=SLOW), pytest.param(2500, 100, marks=SLOW), (2500, 300)],
)
def test_large_logits_have_right_weights(common, length, D, interpreted):
    """Every logit of a row is near a large one: the gradients take the weights of the forward, whose sum is 1.

    (With tiles of one width: on CPU, products of tiles of other widths are rounded in another order.)
    """
    random = np.random.default_rng(0)
    q, k, v, dout = random.standard_normal((4, 1, length, 1, D))
    q[..., 0], k[..., 0] = 1, common * np.sqrt(D)
    x = tuple(jnp.asarray(a, jnp.float16) for a in (q, k, v, dout))
    tiles = dict.fromkeys(("forward", "dq"), Tiles(width=64, stages=2, consumers=2))
    found, portable = _query_gradients(x, interpreted, ours=Options(tiles=tiles))
    assert found <= 2 * portable + 2**-11


@pytest.mark.parametrize("operands", [{"bias": "QK", "slopes": "N"}, pytest.param({}, marks=SLOW)], ids=str)
def test_only_cotangents_are_mapped(operands, interpreted):
    """vmap of a pullback: all operands have size 1 where the cotangents have more, and gradients are in full."""
    case = Case(name="cotangents", **SMALL_CASE | {"B": (1,), "Sq": 20, "Skv": 70} | operands)
    x = case.operands()
    dout = case.cast(case.random("mapped").standard_normal((3, *case.cotangents()[0].shape)))

    def run(x, dout, implementation):
        attend = partial(case.flash_attention, implementation=implementation)
        pullback = jax.vjp(lambda x: attend(x)[0], x)[1]
        return jax.vmap(pullback)(dout)[0]

    found = interpreted(partial(run, implementation="mosaic"), x, dout)
    wide = jax.tree.map(lambda x: x.astype(np.float32), (x, dout))
    want = jax.jit(partial(run, implementation="xla"))(*wide)
    for name in x:
        assert found[name].shape == (3, *x[name].shape)
        assert _error(found[name], want[name]) < 2**-7, name
    none = interpreted(partial(run, implementation="mosaic"), x, dout[:0])
    assert jax.tree.map(jnp.shape, none) == {name: (0, *a.shape) for name, a in x.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_large_logits_do_not_overflow(dtype, interpreted):
    """exp is taken of differences from the row's maximum."""
    q = jnp.full((1, 40, 1, 8), 100.0, dtype)
    k = jnp.linspace(-100, 100, 40 * 8).reshape(1, 40, 1, 8).astype(dtype)
    v = jnp.ones((1, 40, 1, 8), dtype)
    out = interpreted(lambda *x: jax_fa.flash_attention(*x, scale=10.0, implementation="mosaic"), q, k, v)
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, rtol=1e-2)
