"""What CANN does not take as it is: scalars that are data, -inf in pse, operands that broadcast against what was saved.

And what the custom calls refuse before CANN is asked.
"""

import itertools
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_traced as traced
import test_vmap_subsets as subsets
from tables import some_pairs

import jax_fa
from jax_fa import flash_attention, flash_attention_score, primitives
from jax_fa.backends.ascend import installation
from jax_fa.backends.ascend.translation import Translation
from jax_fa.call import Call, rounding_unit
from jax_fa.entry import request_of
from jax_fa.masks import Causal, CumulativeLengths, SegmentIds
from jax_fa.testing import cases as common
from jax_fa.testing import emulator
from jax_fa.testing.spread import pairwise

if (absent := installation.absence()) is not None:
    pytest.skip(f"needs the CANN adapter: {absent}", allow_module_level=True)

FLT_MAX = np.finfo(np.float32).max
RAISED = (jax.errors.JaxRuntimeError, ValueError)  # the latter from a jitted function that has run before
DTYPES = ("float32", "bfloat16", "float16")
CLOSE = {"float32": 2e-5, "bfloat16": 2**-6, "float16": 2**-9}


@pytest.fixture(autouse=True)
def nothing_leaks():
    emulator.reset()
    yield
    assert emulator.live() == dict.fromkeys(emulator.OBJECTS, 0)
    emulator.reset()


def _close(found, want, dtype: str) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=CLOSE[dtype] * max(1.0, np.abs(b[np.abs(b) < FLT_MAX]).max()))


# --- the backward under vmap: what was saved may have more batch entries than the operands


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "mapped", list(dict.fromkeys([*subsets.SUBSETS, *subsets.ALONE])), ids=subsets._label
)
def test_subsets(mapped):
    subsets._run("ascend", mapped)


@pytest.mark.parametrize("mapped", subsets.ALL_BUT_ONE, ids=lambda mapped: subsets._label(mapped))
def test_subsets_mapped_anywhere(mapped):
    subsets._run("ascend", mapped, front=False)


@pytest.mark.slow
@pytest.mark.parametrize("mapped", subsets.PAIRS, ids=subsets._label)
def test_pairs(mapped):
    subsets._run("ascend", mapped, front=False)


def test_cotangents_alone():
    subsets.test_jacrev("bfloat16", "ascend")
    subsets.test_nested_cotangents("ascend")
    subsets.test_gradients_per_target("ascend")


def test_cotangents_of_packed_sequences_and_dropout():
    """The forward went in layout TND, or with a whole drop mask; the backward of several cotangents cannot."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((20, 2, 8)), jnp.float32)
    packed = {"mask": CumulativeLengths((8, 20), within=Causal()), "layout": "SND"}
    dropping = {"layout": "SND", "dropout_rate": 0.5, "dropout_key": jax.random.key(1)}
    for options in (packed, dropping):
        _, pullback = jax.vjp(
            lambda q, k, options=options: flash_attention(q, k, k, implementation="ascend", **options), x, x
        )
        found = jax.vmap(pullback)(jnp.stack([x, -x, 2 * x]))
        for i, dout in enumerate((x, -x, 2 * x)):
            _close([g[i] for g in found], pullback(dout), "float32")


# --- scalars that are data


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("scalar", "dtype"),
    some_pairs([c for c in traced.CASES if c[0] != "logits_soft_cap"], DTYPES, every=2),
    ids=str,
)
def test_traced_is_static(scalar, dtype):
    traced.test_traced_is_static(*scalar, dtype, "ascend")


@pytest.mark.parametrize(
    ("dtype", "q", "k", "scale"),
    [("float16", 100.0, 0.01, 1000.0), ("bfloat16", 0.01, 0.01, 1e5), ("float16", 0.01, 0.01, 1e5)],
)
def test_a_traced_scale_is_not_rounded_to_16_bits(dtype, q, k, scale):
    traced.test_a_traced_scale_is_not_rounded_to_16_bits(dtype, q, k, scale, "ascend")


@pytest.mark.parametrize("value", [0.3, 0.0])
def test_gradient_of_the_scale(value):
    traced.test_gradient("scale", value, "ascend")


def test_mapped_scalars():
    traced.test_mapped("scale", "ascend")
    traced.test_mapped("dropout_rate", "ascend")
    traced.test_gradient_of_mapped_scales("ascend")


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("layout", "dtype"), some_pairs(["BSND", "BNSD", "SBND"], DTYPES, every=2))
def test_scalars_in_every_layout(layout, dtype):
    case = common.Case(name=f"scalars-{layout}", layout=layout, dtype=dtype, mask="causal")
    key = jax.random.key(0)

    def run(backend, x, scale, rate):
        out = flash_attention(
            **x,
            mask=Causal(),
            layout=layout,
            scale=scale,
            dropout_rate=rate,
            dropout_key=key,
            implementation=backend,
        )
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    x = jax.tree.map(jnp.asarray, case.stored_operands())
    scalars = jnp.float32(0.3), jnp.float32(0.25)
    found, want = (
        jax.jit(jax.value_and_grad(partial(run, backend), argnums=(0, 1)))(x, *scalars)
        for backend in ("ascend", "xla")
    )
    _close(found, want, dtype)
    assert {call["scaleValue"] for call in emulator.log()} == {1.0}
    assert {call["keepProb"] for call in emulator.log()} == {1.0}


# --- what rounding took from the output


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_known_where_cann_computes_in_float32(dtype):
    """CANN hands a rounded output; only where its own is float32 is there more to save."""
    case = common.Case(name="rounding", dtype=dtype)
    for bias_dtype in (dtype, "float32"):
        bias = np.zeros((case.Sq, case.Skv), bias_dtype)
        call = request_of(flash_attention, **case.operands(), bias=bias, implementation="ascend").call
        problem = replace(call.problem, saves_rounding=True)
        out, _, _, rounding = jax.jit(partial(primitives.forward, problem))(call.operands)
        assert rounding.shape == out.shape and rounding.dtype == out.dtype
        if bias_dtype == dtype:
            assert not np.asarray(rounding).any()
            continue
        exact = np.float64(out) + np.float64(rounding) * rounding_unit(dtype)
        np.testing.assert_allclose(exact, common.expected(case)[0].out, rtol=1e-4, atol=3e-6)


# --- -inf in pse


def _with_infinities(pse: np.ndarray) -> np.ndarray:
    """The first keys masked for all rows (CANN meets whole blocks of them), some rows masked fully."""
    pse = pse.copy()
    pse[..., :9] = -np.inf
    if pse.shape[-2] > 1:
        pse[..., 3:6, :] = -np.inf
    pse[..., 0, :, :] = -np.inf if pse.shape[-2] == 1 else pse[..., 0, :, :]
    return pse


def _score(backend, q, k, v, pse, dout, **options):
    def run(q, k, v, pse):
        found = flash_attention_score(q, k, v, pse, implementation=backend, **options)
        return found.attention_out, found[:2]

    out, pullback, stats = jax.vjp(run, q, k, v, pse, has_aux=True)
    return out, stats, pullback(dout)


SHAPES = {
    "BSH": lambda S, N: (2, S, N * 16),
    "SBH": lambda S, N: (S, 2, N * 16),
    "BSND": lambda S, N: (2, S, N, 16),
    "BNSD": lambda S, N: (2, N, S, 16),
    "TND": lambda S, N: (S, N, 16),
}
LENGTHS = (13, 23)  # of the packed sequences


def _pse_of(layout: str, rows: str, rng) -> np.ndarray:
    if layout != "TND":
        return _with_infinities(rng.standard_normal((2, 4, 36 if rows == "full" else 1, 36)))
    blocks = [_with_infinities(rng.standard_normal((4, n if rows == "full" else 1, n))) for n in LENGTHS]
    return np.concatenate([block.reshape(-1) for block in blocks])


_PSES = [(0, 0.25, "full"), (1, 0.25, "full"), (1, 0.0, "full"), (1, -0.5, "row")]  # type, scale, rows
_INFINITE = pairwise({"pse": _PSES, "layout": tuple(SHAPES), "dtype": DTYPES})


def _infinite():
    """By default every two options meet."""
    for pse, layout, dtype in itertools.product(_PSES, SHAPES, DTYPES):
        row = {"pse": pse, "layout": layout, "dtype": dtype}
        yield pytest.param(*pse, layout, dtype, marks=[] if row in _INFINITE else pytest.mark.slow)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("pse_type", "scale", "rows", "layout", "dtype"), list(_infinite()))
def test_a_pse_of_minus_infinity_masks(pse_type, scale, rows, layout, dtype):
    rng = np.random.default_rng(0)
    shape = SHAPES[layout]
    q, dout = (jnp.asarray(rng.standard_normal(shape(36, 4)), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal(shape(36, 2)), dtype) for _ in range(2))
    pse = jnp.asarray(_pse_of(layout, rows, rng), dtype)
    options = {"head_num": 4, "input_layout": layout, "scale_value": scale, "pse_type": pse_type}
    if layout == "TND":
        ends = tuple(int(n) for n in np.cumsum(LENGTHS))
        options |= {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
    found, want = (
        jax.jit(partial(_score, backend, **options))(q, k, v, pse, dout) for backend in ("ascend", "xla")
    )
    _close(found, want, dtype)
    masked = np.asarray(want[1][0]) == -FLT_MAX
    assert masked.any() and not masked.all()
    for a, b in zip(found[1], want[1], strict=True):  # the statistics of fully masked rows, exactly
        np.testing.assert_array_equal(np.asarray(a)[masked], np.asarray(b)[masked])
    if layout == "BSND":
        rows_masked = np.moveaxis(masked[..., 0], 1, 2)
        assert not np.asarray(found[0])[rows_masked].any() and not np.asarray(found[2][0])[rows_masked].any()
    (forward, _) = emulator.log()
    assert forward["inputLayout"] == {"BSH": "BSND"}.get(layout, layout)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("mask", [None, Causal()], ids=["whole", "causal"])
def test_a_bias_of_minus_infinity_masks(mask, low, dtype):
    """A low finite number is no mask: a row of nothing else is the mean of its values, as everywhere."""
    rng = np.random.default_rng(1)
    case = common.Case(name="infinite", dtype=dtype, Sq=36, Skv=36)
    bias = _with_infinities(rng.standard_normal((4, 36, 36))).astype(dtype)
    if low:
        bias[:, 20:24] = float(jnp.finfo(dtype).min) / 2

    def run(backend, x, bias):
        return flash_attention(
            **x, bias=bias, mask=mask, implementation=backend, return_logsumexp=True, scale=0.25
        )

    x = jax.tree.map(jnp.asarray, case.operands())
    dout, dlse = (jnp.asarray(a) for a in case.cotangents())
    found, want = (
        jax.jit(lambda x, bias, b=b: (lambda y, f: (y, f((dout, dlse))))(*jax.vjp(partial(run, b), x, bias)))(
            x, bias
        )
        for b in ("ascend", "xla")
    )
    _close(found, want, dtype)
    assert not np.asarray(found[0][0])[:, 3:6].any()


# --- other operands


def test_segments_in_any_order():
    ids = np.array([1, 2, 1, 3, 2, 1, 3, 3] * 4, np.int32)
    case = common.Case(name="mixed", Sq=32, Skv=32, dtype="bfloat16")
    asked = request_of(flash_attention, **case.operands(), mask=SegmentIds(ids, within=Causal())).call
    assert asked.operands.segment_row is not None
    found, want = (
        flash_attention(**case.operands(), mask=SegmentIds(ids, within=Causal()), implementation=b)
        for b in ("ascend", "xla")
    )
    _close(found, want, "bfloat16")
    (call,) = emulator.log()
    assert (call["sparseMode"], call["tensors"]["attenMask"]["shape"]) == (1, [1, 1, 32, 32])
    assert any("1024 bytes" in note for note in jax_fa.backends.notes("ascend", asked))


@pytest.mark.parametrize("dtype", DTYPES)
def test_slopes_at_other_positions(dtype):
    """Positions of a decode step: CANN's own slopes count from indices."""
    case = common.Case(name="decode", Sq=5, Skv=37, slopes="N", dtype=dtype)

    def run(backend, x):
        return flash_attention(**x, mask=Causal("bottom-right"), implementation=backend)

    x = jax.tree.map(jnp.asarray, case.operands())
    dout = jnp.asarray(case.cotangents()[0])
    found, want = (jax.jit(lambda x, b=b: jax.vjp(partial(run, b), x)[1](dout))(x) for b in ("ascend", "xla"))
    _close(found, want, dtype)
    assert {call["pseType"] for call in emulator.log()} == {0}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("traced_scale", [False, True])
@pytest.mark.parametrize("pse_type", [0, 1, 2, 3])
def test_pse_of_packed_sequences_with_a_scale_that_is_data(pse_type, traced_scale):
    """With ends that are data CANN's own form does not apply: the indexed bias is spread out."""
    rng = np.random.default_rng(0)
    q, k, dout = (jnp.asarray(rng.standard_normal((36, 4, 16)), jnp.float32) for _ in range(3))
    size = 4 * sum(n * n for n in LENGTHS)
    pse = jnp.asarray(rng.random(size if pse_type < 2 else (2, 4)), jnp.float32)
    ends = jnp.cumsum(jnp.array(LENGTHS)).astype(jnp.int32)

    @partial(jax.jit, static_argnums=0)
    def run(backend, scale, ends):
        scale = scale if traced_scale else 0.25
        options = {"head_num": 4, "input_layout": "TND", "scale_value": scale, "pse_type": pse_type}
        options |= {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
        return _score(backend, q, k, k, pse, dout, **options)

    _close(*(run(b, jnp.float32(0.25), ends) for b in ("ascend", "xla")), "float32")


def test_translations_of_a_backward_have_its_batch():
    problem, operands, saved = subsets._inputs()
    one = jax.tree.map(lambda x: x[:1], operands)
    problem = problem.map_front()
    call = Call.of(problem, one, saved)
    assert Translation(call, None).operator_call().B == subsets.SIZE


# --- the custom calls check every extent


def _problem(**changed):
    problem = {
        "input_layout": "BSND",
        "head_num": np.int64(4),
        "scale_value": np.float64(1),
        "keep_prob": np.float64(0.5),
        "pre_tokens": np.int64(2**31 - 1),
        "next_tokens": np.int64(2**31 - 1),
        "inner_precise": np.int64(0),
        "sparse_mode": np.int64(1),
        "pse_type": np.int64(1),
        "q_start": np.int64(0),
        "kv_start": np.int64(0),
        "present": np.uint32(7),
        "softmax_layout": "",
    }
    return problem | changed


ARRAYS = {
    "query": (2, 12, 4, 16),
    "key": (2, 20, 2, 16),
    "value": (2, 20, 2, 8),
    "dy": (2, 12, 4, 8),
    "pse": (2, 4, 12, 20),
    "drop_mask": (240,),
    "atten_mask": (2, 4, 12, 20),
    "softmax_max": (2, 4, 12, 8),
    "softmax_sum": (2, 4, 12, 8),
    "attention": (2, 12, 4, 8),
    "dq": (2, 12, 4, 16),
    "dk": (2, 20, 2, 16),
    "dv": (2, 20, 2, 8),
}
ARRAYS_TND = {
    name: {
        "pse": (4 * (5 * 8 + 7 * 12),),
        "drop_mask": (62,),
        "atten_mask": (7, 12),
        "softmax_max": (12, 4, 8),
        "softmax_sum": (12, 4, 8),
    }.get(name, shape[1:])
    for name, shape in ARRAYS.items()
}
ORDER = {
    True: (*ARRAYS,)[:10],
    False: ("query", "key", "value", "pse", "drop_mask", "atten_mask"),
}
RESULTS = {True: ("dq", "dk", "dv"), False: ("softmax_max", "softmax_sum", "attention")}
_DTYPE = {"drop_mask": np.uint8, "atten_mask": np.bool_}


def _bare_call(shapes, backward: bool, packed: bool):
    names = RESULTS[backward]
    results = [jax.ShapeDtypeStruct(shapes[n], jnp.float32) for n in names]
    call = jax.ffi.ffi_call(installation.BACKWARD if backward else installation.FORWARD, results)
    none = np.zeros(0, np.int64)
    ends = (np.array([5, 12]), np.array([8, 20])) if packed else (none, none)
    lists = {"prefix": none, "actual_seq_qlen": ends[0], "actual_seq_kvlen": ends[1]}
    problem = _problem(input_layout="TND") if packed else _problem()
    operands = [np.zeros(shapes[n], _DTYPE.get(n, np.float32)) for n in ORDER[backward]]
    return jax.block_until_ready(call(*operands, problem=problem, **lists))


def _wrong_shapes():
    for backward in (False, True):
        for packed in (False, True):
            arrays = ARRAYS_TND if packed else ARRAYS
            for name in dict.fromkeys((*ORDER[backward], *RESULTS[backward])):
                for axis in range(len(arrays[name])):
                    yield backward, packed, name, axis


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_shapes_that_fit_pass(backward, packed):
    _bare_call(ARRAYS_TND if packed else ARRAYS, backward, packed)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("backward", [False, True])
def test_every_extent_is_checked(backward, by):
    """Each dim of each array in turn too small or too large: an error that names an array and both shapes."""
    for back, packed, name, axis in _wrong_shapes():
        if back != backward or (name == "drop_mask" and by > 0):  # more bits than needed are fine
            continue
        arrays = dict(ARRAYS_TND if packed else ARRAYS)
        shape = list(arrays[name])
        shape[axis] += 2 * by if (name, axis) == ("pse", 0) else by  # one pse for all entries is fine
        arrays[name] = tuple(shape)
        with pytest.raises(RAISED) as raised:
            _bare_call(arrays, backward, packed)
        text = str(raised.value)
        # An array from which others' shapes follow is believed, and one of those is found wrong.
        assert re.search(r"INVALID_ARGUMENT|must have|must hold", text), (name, axis, text)
        assert re.search(r"must (have|hold) .*got ", text), (name, axis, text)
        named = re.search(rf"\b{name} must have .*{re.escape(str(shape))}", text)
        assert named or name in ("query", "key", "value"), (name, axis, text)


def test_lists_are_checked():
    none = np.zeros(0, np.int64)
    shapes = {n: s for n, s in ARRAYS_TND.items() if n in ("query", "key", "value")}
    results = [jax.ShapeDtypeStruct(ARRAYS_TND[n], jnp.float32) for n in RESULTS[False]]
    call = jax.ffi.ffi_call(installation.FORWARD, results)
    operands = [np.zeros(s, np.float32) for s in shapes.values()]
    plain = _problem(input_layout="TND", present=np.uint32(0), keep_prob=np.float64(1))
    for name, ends, message in (
        ("actual_seq_qlen", [5, 13], r"actual_seq_qlen must hold cumulative ends in 0\.\.12"),
        ("actual_seq_qlen", [7, 5], r"actual_seq_qlen must hold cumulative ends"),
        ("actual_seq_kvlen", [-1, 20], r"actual_seq_kvlen must hold cumulative ends in 0\.\.20"),
        ("prefix", [1], r"prefix must have one value per batch entry, 2; got 1"),
    ):
        lists = {"prefix": none, "actual_seq_qlen": np.array([5, 12]), "actual_seq_kvlen": np.array([8, 20])}
        lists[name] = np.array(ends)
        with pytest.raises(RAISED, match=message):
            jax.block_until_ready(call(*operands, problem=plain, **lists))


def test_small_float16_outputs_of_calls_in_float32():
    """Subnormal float16 outputs are the same with and without a derivative."""
    x, bias = jnp.full((1, 8, 1, 16), 3e-5, jnp.float16), jnp.zeros((1, 1, 8, 8), jnp.float32)

    def attend(x, bias):
        return jax_fa.flash_attention(x, x, x, bias=bias, implementation="ascend")

    plain = jax.jit(attend)(x, bias)
    derived = jax.jit(lambda *args: jax.vjp(attend, *args)[0])(x, bias)
    np.testing.assert_array_equal(np.float32(plain), np.float32(derived))
    assert np.all(np.float32(plain) > 0)
