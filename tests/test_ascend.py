"""The Ascend backend against the emulator: the common tables, what CANN is asked, errors, splitting, transforms."""

import dataclasses
import itertools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_cann as cann
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tables import mostly_slow, some_pairs

import jax_fa
from jax_fa import ascend, flash_attention, flash_attention_score, masks
from jax_fa.backends.ascend import installation, keep_bits, sparse_modes, split
from jax_fa.call import Dims
from jax_fa.cann import spec
from jax_fa.entry import request_of
from jax_fa.masks import Band, Causal, CumulativeLengths, Prefix
from jax_fa.testing import cases as common
from jax_fa.testing import emulator, oracle
from jax_fa.testing.spread import covering

if (absent := installation.absence()) is not None:
    pytest.skip(f"needs the CANN adapter: {absent}", allow_module_level=True)

ASCEND = {"implementation": "ascend"}


@pytest.fixture(autouse=True)
def nothing_leaks():
    emulator.reset()
    yield
    assert emulator.live() == dict.fromkeys(emulator.OBJECTS, 0)
    emulator.reset()


# --- the common tables


def _refusal(case: common.Case) -> str | None:
    if case.dtype == "float64":
        return "serves float32, bfloat16 and float16, not float64"
    return None if case.soft_cap is None else "CANN has no soft cap"


def _check(case, out, lse, gradients) -> None:
    """As `common.check`; but where CANN rounds the output, its gradients are those with delta from that output.

    delta = rowsum(dout * out) - dlogsumexp: what rounding took from out is as if dlogsumexp were another. From the true
    gradients they may differ by half the distance of 16-bit neighbours more, except where rows are peaked.
    """
    wide = case.bias_dtype not in (None, case.dtype)
    if case.dtype == case.acc or wide or 0 in case.full:
        common.check(case, out, lse, gradients)
        return
    common.check(case, out, lse)
    exact, exact_gradients = common.expected(case)
    dout, dlse = (np.asarray(x, np.float64) for x in case.cotangents())
    lost = np.sum((np.float64(case.canonical(out)) - exact.out) * dout, axis=-1)
    wanted = exact.gradients(dout, dlse - np.moveaxis(lost, -1, -2))
    naive, floor = common.naive(case)[2], oracle.FLOOR[case.dtype]
    for name, g in case.canonical_gradients(gradients).items():
        assert g.dtype == case.operands()[name].dtype and g.shape == case.operands()[name].shape
        assert np.isfinite(np.float64(g)).all()
        errors = zip(
            oracle.errors(g, wanted[name]), oracle.errors(naive[name], exact_gradients[name]), strict=True
        )
        times = max(1.0, exact.cancellation.get(name, 1.0))
        true_errors = oracle.errors(g, exact_gradients[name])
        for (error, allowed), true_error in zip(errors, true_errors, strict=True):
            told = f"{case}: gradient of {name}: {error:.3g} and {true_error:.3g}, {allowed:.3g}"
            assert error <= 2 * allowed + times * floor, told
            assert case.spread > 1 or true_error <= 2 * allowed + times * 4 * floor, told


# What differs in lengths or numbers alone asks CANN for nothing else.
_ROWS = [c for c in common.CASES if c.feature or c.bias is not None or c.dtype != "float32" or 0 in c.full]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", mostly_slow(_ROWS, of=common.CASES), ids=str)
def test_common_table(case):
    dout, dlse = case.cotangents()
    with case.context():
        run = jax.jit(lambda x, dout, dlse: case.gradient(x, dout, dlse, **ASCEND))
        arguments = case.stored_operands(), case.stored(dout), dlse
        refusal = _refusal(case)
        if refusal is not None:
            with pytest.raises(NotImplementedError, match=refusal):
                run(*arguments)
            return
        (out, lse), gradients = run(*arguments)
        _check(case, out, lse, gradients)
    unseen = np.moveaxis(common.expected(case)[0].l == 0, -1, -2)
    assert not case.canonical(out)[unseen].any()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", list(cann.pairwise_rows()))
def test_cann_table(case):
    cann.check(case, cann.run(case, **ASCEND))


# --- what CANN is asked


LAYOUTS = ("BSH", "SBH", "BSND", "BNSD", "TND")
_ASKED = {"BSH": "BSND"}  # the same memory
_TOKENS = {0: (9, 5), 4: (10, 3), 7: (cann.HUGE, 0), 8: (cann.HUGE, 2)}
_PSE = (None, (0, "full"), (1, "1 full"), (1, "row"), (2, "slopes"), (3, "1 slopes"))


def _rows() -> list[dict[str, Any]]:
    """Every sparse mode with every layout, pse type and dtype."""
    rows = []
    for layout in LAYOUTS:
        for mode in (0, 1, 2, 3, 4, 6, 7, 8) if layout == "TND" else range(7):
            for pse, dtype in itertools.product(_PSE if mode < 7 else (None,), cann.DTYPES):
                rows.append({"layout": layout, "mode": mode, "pse": pse, "dtype": dtype})
    return rows


def _asked(layout: str, mode: int, pse: tuple[int, str] | None, dtype: str) -> cann.Case:
    packed = layout == "TND"
    form = pse and (pse[0], pse[1].removeprefix("1 ") if packed and pse[0] < 2 else pse[1])
    pre, following = _TOKENS.get(mode, (cann.HUGE, cann.HUGE))
    return cann.Case(
        name=f"{layout}-mode{mode}-{'pse' + str(pse[0]) + pse[1] if pse else 'plain'}-{dtype}",
        layout=layout,
        mode=mode,
        pre=25 if packed and mode == 0 else pre,
        following=following,
        prefix=((6, 0, 11) if packed else (7, 20)) if mode in (5, 6) else (),
        mask={0: None, 1: "plain", 5: "batch"}.get(mode, "compressed"),
        lengths=((9, 9), (0, 0), (20, 20)) if packed else ((23, 23),) * 2,
        pse=form,
        dtype=dtype,
        D=16,
    )


_PAIRWISE = covering(_rows())


def _product():
    """By default every two of mode, layout, pse type and dtype meet that may; the rest is slow."""
    for row in _rows():
        case = _asked(**row)
        yield pytest.param(case, id=case.name, marks=[] if row in _PAIRWISE else pytest.mark.slow)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", list(_product()))
def test_mode_layout_pse_dtype(case):
    cann.check(case, cann.run(case, **ASCEND))
    forward, backward = emulator.log()
    packed = case.layout == "TND"
    for call in (forward, backward):
        assert call["inputLayout"] == _ASKED.get(case.layout, case.layout)
        assert call["headNum"] == case.N
        assert call["tensors"]["query"]["dtype"] == {"float32": "FLOAT", "bfloat16": "BF16"}.get(
            case.dtype, "FLOAT16"
        )
        if case.pse is not None and case.pse[0] > 1:
            assert call["pseType"] == case.pse[0]
        if case.mode in (2, 3, 4, 6, 7, 8):
            assert call["sparseMode"] == case.mode
            assert call["tensors"]["attenMask"]["shape"] == [3072 if case.mode == 6 else 2048, 2048]
    assert ("VarLen" in forward["function"]) == ("Unpadding" in backward["function"]) == packed
    # With a pse, CANN takes no empty sequences.
    ends = [end for end, (sq, _) in zip(case.ends[0], case.lengths, strict=True) if sq or case.pse is None]
    assert forward["actualSeqQLen"] == (ends if packed else None)


_LONG: dict[str, Any] = {"lengths": ((1030, 1030),), "N": 1, "K": 1, "scale": 0.5}
_SQUARE: dict[str, Any] = {"layout": "TND", "lengths": cann.SQUARE}
_OTHERWISE = [
    cann.Case(name="a row for all batch entries", pse=(1, "1 row")),
    cann.Case(name="a table and a window", pse=(0, "table"), mode=4, pre=100, following=0, **_LONG),
    cann.Case(name="a table and keys that end earlier", pse=(1, "table"), following=-3, **_LONG),
    *(
        cann.Case(
            name=f"{form} of type {kind} and a mask for each", pse=(kind, form), mask="batch", **_SQUARE
        )
        for kind, form in ((0, "full"), (1, "row"), (2, "slopes"), (3, "1 slopes"))
    ),
    cann.Case(name="a prefix of nothing", mode=6, prefix=(0, 1), layout="TND", lengths=((5, 3), (3, 3))),
]


@pytest.mark.parametrize("case", _OTHERWISE, ids=lambda case: case.name)
def test_what_cann_takes_in_another_form_alone(case):
    cann.check(case, cann.run(case, **ASCEND))


@pytest.mark.parametrize(("mode", "tokens"), [(4, (0, 0)), (0, (-1, 1))])
def test_packed_sequences_with_a_band_of_one_key(mode, tokens):
    keys = jnp.array([1, 2, 4, 5])
    q, k, v = (
        jnp.asarray(np.random.default_rng(i).standard_normal((n, 2, 16)), jnp.float32)
        for i, n in enumerate((4, 6, 6))
    )
    ends = {"actual_seq_qlen": (2, 4), "actual_seq_kvlen": (3, 6)}
    options = {"sparse_mode": mode, "pre_tokens": tokens[0], "next_tokens": tokens[1], **ends, **ASCEND}

    def run(q, k, v):
        return flash_attention_score(q, k, v, head_num=2, input_layout="TND", **options).attention_out

    out, pullback = jax.vjp(run, q, k, v)
    np.testing.assert_array_equal(out, v[keys])
    dq, dk, dv = pullback(q)
    np.testing.assert_array_equal(dv, jnp.zeros_like(v).at[keys].set(q))
    np.testing.assert_allclose(np.concatenate([dq, dk]), 0, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "pre", "following"), [(2, 9, 9), (3, 9, 9), (4, 1030, 0), (0, cann.HUGE, 0)]
)
def test_tables_go_as_they_are_with_causal_modes(mode, pre, following):
    x = jnp.ones((1, 1030, 1, 16))
    options = {"sparse_mode": mode, "pre_tokens": pre, "next_tokens": following, **ASCEND}
    pse = jnp.ones((1, 1, 1024, 1030))
    jax.block_until_ready(flash_attention_score(x, x, x, pse, head_num=1, input_layout="BSND", **options))
    (call,) = emulator.log()
    assert call["tensors"]["realShift"]["shape"] == [1, 1, 1024, 1030] and call["sparseMode"] in (2, 3)


def test_many_packed_sequences_are_several_calls(monkeypatch):
    case = dataclasses.replace(next(c for c in cann.CASES if c.name == "TND-mode2"), dtype="float32")
    monkeypatch.setattr(spec, "MAX_SEQUENCES", 2)
    for options in (ASCEND, {"implementation": ascend.Options(max_work=None)}):
        cann.check(case, cann.run(case, **options))
        ends = [call["actualSeqQLen"] for call in emulator.log()]
        assert len(ends) > 2 and max(map(len, ends)) == 2
        emulator.reset()
    stored = dataclasses.replace(case, name="many sequences with a drop mask", keep_prob=0.5)
    cann.check(stored, cann.run(stored, **ASCEND))
    assert {call["inputLayout"] for call in emulator.log()} == {"BSND"}


def _means(mode: int, pre: int, following: int, prefix: int, Sq: int, Skv: int) -> np.ndarray:
    """Which keys are visible, without a mask of one's own (see the table in `jax_fa.cann.spec`)."""
    i, j, d = np.arange(Sq)[:, None], np.arange(Skv), Skv - Sq
    return {
        0: lambda: (i - pre <= j) & (j <= i + following),
        1: lambda: j >= 0 * i,
        2: lambda: j <= i,
        3: lambda: j <= i + d,
        4: lambda: (i + d - pre <= j) & (j <= i + d + following),
        5: lambda: (j <= i + d) | (j < prefix),
        6: lambda: (j <= i + d) | (j < prefix),
    }[mode]()


def _asked(sparse: sparse_modes.SparseMode, Sq: int, Skv: int) -> np.ndarray:
    """What CANN makes of a mode without a mask of our own: in modes 0 and 1 it masks nothing."""
    mode = 1 if sparse.mode == 0 else sparse.mode
    return _means(mode, sparse.pre, sparse.next, sparse.prefix[0] if sparse.prefix else 0, Sq, Skv)


@pytest.mark.parametrize(("Sq", "Skv"), list(itertools.product((1, 2, 5), (1, 4, 6))))
def test_the_mode_asked_for_means_the_arguments(Sq, Skv):
    """Whatever the tokens; also of some rows of the call alone."""
    tokens = (-cann.HUGE, -3, -1, 0, 1, 2, 4, 7, 11, cann.HUGE)
    sizes, dims = (1, 2, Sq, Skv), Dims((1,), Sq, Skv, 2, 2, 8, 8)
    for mode, pre, following in itertools.product(range(7), tokens, tokens):
        prefix = max(0, Skv - Sq, 3 if Skv > 3 else 0)
        given = spec.Arguments(
            sizes=sizes,
            sparse_mode=mode,
            pre_tokens=pre,
            next_tokens=following,
            prefix=(prefix,) if mode > 4 else None,
        )
        wanted = _means(mode, pre, following, prefix, Sq, Skv)
        found = sparse_modes.of_arguments(given, dims, own_mask=False)
        if found.full:  # a band that CANN refuses: all keys of all rows are masked
            assert mode in (0, 4) and not wanted.any(), given
            continue
        np.testing.assert_array_equal(_asked(found, Sq, Skv), wanted, str(given))
        assert found.may_mask or wanted.any(axis=1).all(), given
        for first in range(1, Sq) if found.mode < 5 else ():
            rows = found.rows(first, Sq - first, Sq, Skv)
            part = np.zeros_like(wanted[first:]) if rows is None else _asked(rows, Sq - first, Skv)
            np.testing.assert_array_equal(part, wanted[first:], str((given, first)))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["BSND-mode3", "BSH-mode4", "BNSD-mode6", "TND-mode2", "pse1-row"])
def test_vmap_of_cann_calls(name):
    """Many calls of `flash_attention_score` at once are no call that it names: their mode comes from the mask."""
    case = next(c for c in cann.CASES if c.name == name)
    x = cann.inputs(case)
    given = cann.static_arguments(case) | cann.integer_arguments(case)
    q = np.stack([x.q, -x.q, x.q])

    def run(implementation):
        def one(q):
            return flash_attention_score(q, x.k, x.v, x.pse, implementation=implementation, **given)

        return jax.vmap(one)(q)

    close = 2e-5 if case.dtype == "float32" else 2**-6
    for a, b in zip(run("ascend"), run("xla"), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=close, atol=close)
    assert len(emulator.log()) == 1


def _one_call(**options):
    q = jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, 4, 16)), jnp.float32)
    mask = options.pop("mask", None)
    jax.block_until_ready(flash_attention(q, q, q, mask=mask, **options, **ASCEND))
    (call,) = emulator.log()
    return call


@pytest.mark.parametrize(
    ("mask", "mode", "tokens", "inner_precise"),
    [
        (None, 0, None, 0),
        (Causal(), 2, None, 0),
        (Band(None, 5), 4, (48, 5), 0),
        (Band(7, 0), 4, (7, 0), 0),
        (Band(-1, 9), 4, (-1, 9), 2),
        (Band(7, 0) & Causal(offset=2), 4, (7, 0), 0),
        (Prefix((5, 9)), 6, None, 0),
        (Prefix(np.array([5, 9])), 1, None, 2),  # traced: no host integers
        (masks.Lengths(key=(9, 24)), 1, None, 2),
        (Causal() & masks.Dense(np.ones((2, 1, 24, 24), bool)), 0, (cann.HUGE, 0), 2),
        (masks.Dense(np.ones((24, 24), bool)), 1, None, 2),
    ],
    ids=repr,
)
def test_mask_kinds(mask, mode, tokens, inner_precise):
    call = _one_call(mask=mask)
    assert (call["sparseMode"], call["innerPrecise"]) == (mode, inner_precise)
    if tokens is not None:
        assert (call["preTokens"], call["nextTokens"]) == tokens
    shape = {0: None, 2: [2048, 2048], 4: [2048, 2048], 6: [3072, 2048]}.get(mode)
    if shape is not None:
        assert call["tensors"]["attenMask"]["shape"] == shape


def test_packed_sequences_go_as_they_are():
    x = jnp.ones((30, 4, 16), jnp.bfloat16)
    mask = CumulativeLengths((10, 10, 25), within=Causal())
    out = jax.block_until_ready(flash_attention(x, x, x, mask=mask, layout="SND", **ASCEND))
    (call,) = emulator.log()
    assert (call["inputLayout"], call["sparseMode"]) == ("TND", 3)
    assert call["actualSeqQLen"] == call["actualSeqKvLen"] == [10, 10, 25]
    assert call["tensors"]["query"]["shape"] == [25, 4, 16]
    assert not out[25:].any() and (out[:25] == 1).all()


@pytest.mark.parametrize(
    ("shape", "asked"),
    [((1, 1, 24, 24), (1, 4, 24, 24)), ((2, 1, 1, 24), (2, 4, 1, 24)), ((1, 1, 1, 24), (2, 4, 1, 24))],
)
def test_query_and_bias_are_not_materialized(shape, asked):
    """A bias that broadcasts over the batch or over rows goes so; CANN broadcasts not both, and no heads."""
    call = _one_call(bias=jnp.ones(shape, jnp.float32))
    assert call["tensors"]["realShift"]["shape"] == list(asked)
    assert call["pseType"] == 0


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "SBND"])
def test_layouts_cost_no_transpose(layout):
    x = jnp.ones((2, 16, 4, 8), jnp.bfloat16)

    def loss(q, k, v):
        return jnp.sum(flash_attention(q, k, v, mask=Causal(), layout=layout, **ASCEND).astype(jnp.float32))

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile().as_text()
    assert "jax_fa_ascend_backward" in text
    assert not re.search(r" (transpose|copy)\(.*bf16\[2,16,4,8\]", text)


def test_heads_of_vmap_become_heads():
    """Equinox style: one head, mapped over axis 1."""
    x = jnp.ones((24, 4, 1, 16), jnp.float32)

    def head(q, k, v):
        return flash_attention(q, k, v, layout="SND", **ASCEND)

    jax.block_until_ready(jax.vmap(head, in_axes=1, out_axes=1)(x, x, x))
    (call,) = emulator.log()
    assert (call["inputLayout"], call["tensors"]["query"]["shape"]) == ("SBH", [24, 4, 16])


# --- lowering


def _custom_calls(text: str) -> list[str]:
    """Line by line: the masks are constants of megabytes, through which a pattern would crawl."""
    return [line for line in text.splitlines() if "custom_call @jax_fa_ascend" in line]


def _loss(q, k, v):
    out = flash_attention(q, k, v, mask=Causal(), scale=0.5, **ASCEND)
    return jnp.sum(out.astype(jnp.float32) ** 2)


@pytest.mark.parametrize("platform", ["ascend", "ASCEND", "npu"])
@pytest.mark.parametrize("named", [True, False])
def test_lowered_text(platform, named):
    x = jax.ShapeDtypeStruct((2, 24, 4, 16), jnp.bfloat16)
    options = ASCEND if named else {}

    def run(x):
        return flash_attention(x, x, x, mask=Causal(), scale=0.5, **options)

    text = jax.jit(run).trace(x).lower(lowering_platforms=(platform,)).as_text()
    (call,) = _custom_calls(text)
    for attribute in (
        'input_layout = "BSND"',
        "head_num = 4 : i64",
        "sparse_mode = 2 : i64",
        "scale_value = 5.000000e-01 : f64",
        "present = 4 : ui32",
        "prefix = dense<> : tensor<0xi64>",
    ):
        assert attribute in call
    operands = re.search(r"\} : \((.*)\) -> \((.*)\)", call)
    assert operands is not None
    bf16, stats = "tensor<2x24x4x16xbf16>", "tensor<2x4x24x8xf32>"
    assert operands[1] == f"{bf16}, {bf16}, {bf16}, tensor<2048x2048xui8>"
    assert operands[2] == f"{stats}, {stats}, {bf16}"


def test_compressed_masks_are_in_a_program_once():
    x = jax.ShapeDtypeStruct((2, 24, 4, 16), jnp.float32)

    def twice(x):
        for _ in range(2):
            x = flash_attention(x, x, x, mask=Causal())
        return x

    text = jax.jit(twice).trace(x).lower(lowering_platforms=("ascend",)).as_text()
    assert len(_custom_calls(text)) == 2
    assert text.count('constant dense<"0x') == 1


def test_an_exported_program_is_the_same_calls_and_runs_here():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, 4, 16)), jnp.bfloat16)
    run = jax.jit(jax.grad(_loss, argnums=(0, 1, 2)))
    exported = jax.export.export(
        run, platforms=("ascend",), disabled_checks=[jax.export.DisabledSafetyCheck.platform()]
    )(x, x, x)
    loaded = jax.export.deserialize(exported.serialize())
    for a, b in zip(run(x, x, x), jax.jit(loaded.call)(x, x, x), strict=True):
        np.testing.assert_array_equal(a, b)
    here, there = (_custom_calls(text) for text in (run.lower(x, x, x).as_text(), exported.mlir_module()))

    def attributes(calls):
        return [re.findall(r"mhlo.backend_config = (\{.*?\}\})", call) for call in calls]

    assert attributes(here) == attributes(there) and len(here) == 2


def test_one_program_for_several_platforms():
    x = jnp.ones((1, 8, 2, 16), jnp.float32)

    def run(x):
        return flash_attention(x, x, x, mask=Causal())

    exported = jax.export.export(jax.jit(run), platforms=("cpu", "ascend", "cuda"))(x)
    text = exported.mlir_module()
    assert len(_custom_calls(text)) == 1 and "stablehlo.case" in text
    np.testing.assert_allclose(exported.call(x), x)


def test_another_name_for_the_platform():
    ascend.register_platform("my_npu")
    try:
        x = jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.float32)
        lowered = jax.jit(lambda x: flash_attention(x, x, x)).trace(x)
        assert "jax_fa_ascend_forward" in lowered.lower(lowering_platforms=("my_npu",)).as_text()
    finally:
        installation.platforms.remove("my_npu")


@pytest.mark.parametrize("name", ["cpu", "CUDA", "", "a b", 3])
def test_names_that_are_no_platform_of_ours(name, no_type_checker):
    with pytest.raises(ValueError, match="name must"):
        ascend.register_platform(name)


# --- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits_soft_cap": 3.0}, "CANN has no soft cap of logits"),
        ({"D": 784}, "head_dim is at most 768, not 784"),
        ({"dtype": np.float64}, "serves float32, bfloat16 and float16, not float64"),
        ({"N": 257}, "at most 256 query heads share a key head, not 257"),
    ],
    ids=["soft-cap", "head-dim", "dtype", "group"],
)
def test_refusals(options, message):
    D, N, dtype = options.pop("D", 16), options.pop("N", 4), options.pop("dtype", np.float32)
    with jax.enable_x64(True):
        q, k = jnp.ones((1, 8, N, D), dtype), jnp.ones((1, 8, 1, D), dtype)
        with pytest.raises(NotImplementedError, match=re.escape(message)):
            flash_attention(q, k, k, **options, **ASCEND)


def test_the_gradient_of_the_logsumexp_takes_columns():
    x = jnp.ones((1, 8, 1, 768), jnp.float32)
    run = lambda x: flash_attention(x, x, x, return_logsumexp=True, **ASCEND)[1].sum()
    assert np.isfinite(run(x))
    with pytest.raises(NotImplementedError, match="takes 2 more columns than head_dim's 768"):
        jax.grad(run)(x)


RAISED = (jax.errors.JaxRuntimeError, ValueError)  # the latter from a jitted function that has run before
FORWARD = "aclnnFlashAttentionScoreV2"
FAULTS = [
    (f"{FORWARD}GetWorkspaceSize", 161001, "ACLNN_ERR_PARAM_NULLPTR"),
    (f"{FORWARD}GetWorkspaceSize", 161002, "ACLNN_ERR_PARAM_INVALID"),
    (f"{FORWARD}GetWorkspaceSize", 561003, "ACLNN_ERR_INNER_FIND_KERNEL_ERROR"),
    (FORWARD, 561103, "ACLNN_ERR_INNER_NULLPTR"),
    (FORWARD, 361001, "ACLNN_ERR_RUNTIME_ERROR"),
    ("aclrtMalloc", 207001, "MEMORY_ALLOCATION"),
    ("aclrtCreateStream", 107002, "CONTEXT_NULL"),
    ("kernel", 507014, "AICORE_TIMEOUT"),
    ("kernel", 507015, "AICORE_EXCEPTION"),
]


@pytest.mark.parametrize(("function", "code", "name"), FAULTS, ids=[f"{f}-{c}" for f, c, _ in FAULTS])
def test_error_codes_surface(function, code, name):
    x = jnp.ones((1, 40, 2, 16), jnp.bfloat16)
    run = jax.jit(lambda x: flash_attention(x, x, x, mask=Causal(), **ASCEND))
    np.testing.assert_array_equal(run(x), x)
    ascend.release()  # so that the next call makes a stream and a workspace
    emulator.fail(function, code, times=10)
    with pytest.raises(RAISED, match=f"{code}") as raised:
        jax.block_until_ready(run(x))
    text = str(raised.value)
    assert name in text
    if function.startswith("aclnn"):
        assert all(part in text for part in (function, "BSND", "[1, 40, 2, 16]"))
    emulator.reset()
    np.testing.assert_array_equal(run(x), x)


@pytest.mark.parametrize(
    "words", ["失败".encode()[:-1], "失败".encode("gbk"), b"\xff\xfe\xc0\x80"], ids=["cut", "gbk", "none"]
)
def test_words_that_are_no_utf8(words):
    """The text of an error is there all the same, with U+FFFD for what cannot be read."""
    x = jnp.ones((1, 40, 2, 16), jnp.bfloat16)
    emulator.words(words)
    emulator.fail(FORWARD, 561103)
    with pytest.raises(RAISED, match=r"561103 .*ACLNN_ERR_INNER_NULLPTR.*fault injected.*\ufffd"):
        jax.block_until_ready(flash_attention(x, x, x, **ASCEND))
    emulator.fail("aclrtFree", 507899)
    flash_attention(x, x, x, **ASCEND).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"aclrtFree returned 507899.*\ufffd"):
        ascend.release()


@pytest.mark.parametrize("function", ["aclrtFree", "aclrtDestroyStream", "aclrtSynchronizeStream"])
def test_release_says_what_failed(function):
    x = jnp.ones((1, 40, 2, 16), jnp.bfloat16)
    flash_attention(x, x, x, **ASCEND).block_until_ready()
    emulator.fail(function, 507899)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{function} returned 507899"):
        ascend.release()
    ascend.release()  # nothing is left
    np.testing.assert_array_equal(flash_attention(x, x, x, **ASCEND), x)


def test_a_thread_without_a_device_gets_one():
    x = jnp.ones((1, 40, 2, 16), jnp.bfloat16)
    emulator.fail(f"{FORWARD}GetWorkspaceSize", 107002)
    np.testing.assert_array_equal(flash_attention(x, x, x, **ASCEND), x)
    assert emulator.calls("aclrtSetDevice") >= 1


@pytest.mark.parametrize("newer", [False, True])
def test_what_only_the_operator_refuses(newer):
    """Tokens that this library never sends, through the bare custom call."""
    emulator.style(newer)
    x = jnp.ones((1, 40, 2, 16), jnp.bfloat16)
    stats = jax.ShapeDtypeStruct((1, 2, 40, 8), jnp.float32)
    call = jax.ffi.ffi_call(installation.FORWARD, (stats, stats, jax.ShapeDtypeStruct(x.shape, x.dtype)))
    problem = {
        "input_layout": "BSND",
        "head_num": np.int64(2),
        "scale_value": np.float64(1),
        "keep_prob": np.float64(1),
        "pre_tokens": np.int64(-3),
        "next_tokens": np.int64(-3),
        "inner_precise": np.int64(0),
        "sparse_mode": np.int64(0),
        "pse_type": np.int64(1),
        "q_start": np.int64(0),
        "kv_start": np.int64(0),
        "present": np.uint32(4),
        "softmax_layout": "",
    }
    none = np.zeros(0, np.int64)
    lists = {"prefix": none, "actual_seq_qlen": none, "actual_seq_kvlen": none}
    with pytest.raises(RAISED, match="161001" if newer else "561103") as raised:
        jax.block_until_ready(call(x, x, x, jnp.zeros((1, 1, 40, 40), bool), problem=problem, **lists))
    assert "Tiling" in str(raised.value) or "tiling" in str(raised.value)


# --- splitting


SPLITS = [
    {"B": (4,)},
    {"B": (1,), "N": 6, "K": 3},
    {"B": (1,), "N": 2, "K": 1, "Sq": 520, "Skv": 300},
    {"mask": "causal"},
    {"mask": "causal_bottom", "Sq": 300, "Skv": 400},
    {"mask": "window", "Sq": 400},
    {"mask": "prefix_static", "Sq": 300, "Skv": 300},
    {"mask": "dense", "Sq": 300},
    {"mask": "lengths", "layout": "SBND"},
    {"bias": "B1QK", "layout": "BNSD", "Sq": 300},
    {"slopes": "N", "Sq": 300, "Skv": 300},
    {"dropout": 0.25, "Sq": 300},
    {"dtype": "bfloat16", "Sq": 300, "mask": "causal"},
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("options", SPLITS, ids=lambda o: "-".join(map(str, o.values())))
def test_splitting(options):
    case = common.Case(name="split-" + "-".join(map(str, options.values())), **options)
    dout, dlse = case.cotangents()
    d = case.Skv * (case.D + case.Dv)
    # Less than a quarter of the rows of one group of heads.
    limit = d * (case.N // case.K) * max(1, case.Sq // 3)
    arguments = case.stored_operands(), case.stored(dout), dlse
    run = jax.jit(lambda *x: case.gradient(*x, implementation=ascend.Options(max_work=limit)))
    (out, lse), gradients = run(*arguments)
    common.check(case, out, lse, gradients)
    assert len(emulator.log()) > 2
    emulator.reset()
    whole = ascend.Options(max_work=None)
    jax.block_until_ready(jax.jit(lambda *x: case.gradient(*x, implementation=whole))(*arguments))
    assert len(emulator.log()) == 2


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "name", ["TND-mode2", "TND-mode3", "TND-mode7", "TND-mode8", "TND-mode6", "drop-BSH-bf16", "everything"]
)
def test_splitting_of_cann_calls(name):
    case = next(c for c in cann.CASES if c.name == name)
    cann.check(case, cann.run(case, implementation=ascend.Options(max_work=20 * 33 * 4 * 16)))
    assert len(emulator.log()) > 2


@pytest.mark.parametrize("work", [0, -1, 2.5, True, "much"])
def test_max_work_is_checked(work, no_type_checker):
    with pytest.raises(ValueError, match="max_work must be a positive int or None; got"):
        ascend.Options(max_work=work)


def test_options_name_the_backend():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8, 2, 16)), jnp.float32)
    plain = flash_attention(x, x, x, **ASCEND)
    assert len(emulator.log()) == 1
    assert ascend.Options() == ascend.Options(max_work=2**46) != ascend.Options(max_work=None)
    options = ascend.Options(max_work=8 * 8 * 2 * 32)  # one batch entry
    np.testing.assert_array_equal(flash_attention(x, x, x, implementation=options), plain)
    assert len(emulator.log()) == 4
    emulator.reset()
    np.testing.assert_array_equal(jax_fa.dot_product_attention(x, x, x, implementation=options), plain)
    assert len(emulator.log()) == 3
    with pytest.raises(ValueError, match=r"Pass an object of this class: Options\(\.\.\.\)"):
        flash_attention(x, x, x, implementation=ascend.Options)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="implementation='ascend' cannot serve this call"):
        flash_attention(x, x, x, logits_soft_cap=2.0, implementation=options)


def test_many_heads_are_several_calls():
    x = jnp.ones((1, 8, 300, 16), jnp.float32)
    np.testing.assert_allclose(flash_attention(x, x, x, **ASCEND), x, rtol=1e-6)
    assert [call["headNum"] for call in emulator.log()] == [150, 150]


# --- transforms


def test_shards_call_from_several_threads():
    """Batch and heads over eight devices: eight threads in CANN at once, no collective."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x = np.random.default_rng(0).standard_normal((8, 40, 4, 16)).astype(np.float32)
    place = NamedSharding(mesh, PartitionSpec("data", None, "model", None))
    run = jax.jit(jax.grad(_loss, argnums=(0, 1, 2)))
    whole = run(x, x, x)
    sharded = jax.device_put(x, place)
    for _ in range(3):
        for a, b in zip(run(sharded, sharded, sharded), whole, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert "all-" not in run.lower(sharded, sharded, sharded).compile().as_text()
    assert max(call["tensors"]["query"]["shape"][0] for call in emulator.log()[2:]) == 2


@pytest.mark.parametrize("at", [(0, None, None), (1, 1, None), (0, 2, 1)])
def test_vmap(at):
    case = common.BY_NAME["mask-causal"]
    x = {n: np.stack([a, 2 * a, -a]) for n, a in case.operands().items()}

    def run(implementation, q, k, v):
        return flash_attention(q, k, v, mask=Causal(), implementation=implementation)

    names = ("query", "key", "value")
    arguments = [x[n][0] if a is None else np.moveaxis(x[n], 0, a) for n, a in zip(names, at, strict=True)]
    found, wanted = (jax.vmap(partial(run, name), in_axes=at)(*arguments) for name in ("ascend", "xla"))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_of_broadcast_batch_dims():
    """vmap over queries alone: the gradient of keys is per mapped entry, summed by JAX."""
    q = np.random.default_rng(0).standard_normal((3, 2, 20, 2, 8)).astype(np.float32)

    def loss(implementation, k):
        outs = jax.vmap(lambda q: flash_attention(q, k, k, implementation=implementation))(q)
        return jnp.sum(outs**2)

    found, wanted = (jax.grad(partial(loss, name))(q[0]) for name in ("ascend", "xla"))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_results_are_bitwise_repeatable():
    case = common.BY_NAME["bfloat16-causal"]
    dout, dlse = case.cotangents()
    run = jax.jit(lambda *x: case.gradient(*x, **ASCEND))
    arguments = case.stored_operands(), case.stored(dout), dlse
    jax.tree.map(np.testing.assert_array_equal, run(*arguments), run(*arguments))


# --- explain


def _explained(platform="ascend", Dv=16, **options):
    x, value = (jax.ShapeDtypeStruct((2, 24, 4, width), jnp.bfloat16) for width in (16, Dv))
    return jax_fa.explain(x, x, value, entry="flash_attention", platforms=(platform,), **options)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (
            {"bias": jax.ShapeDtypeStruct((4, 24, 24), jnp.bfloat16)},
            "the gradient of bias or slopes is computed",
        ),
        ({"bias": jax.ShapeDtypeStruct((4, 24, 24), jnp.float32)}, "computed in float32"),
        ({"return_logsumexp": True}, "the gradient of the log-sum-exp"),
        ({"mask": masks.Lengths(key=(3, 4))}, "a full one of 1152 bytes is built"),
        ({"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}, "stored: 576 bytes"),
        (
            {"dropout_rate": jax.ShapeDtypeStruct((), jnp.float32), "dropout_key": jax.random.key(0)},
            "divided by the keep probability",
        ),
        ({"Dv": 24}, "padded with zeros to value's head_dim 24"),
    ],
)
def test_notes(options, note):
    found = _explained(**options)
    assert found.chosen["ascend"] == found.backward["ascend"] == "ascend"
    assert any(note in line for line in found.notes["ascend"])
    assert note in str(found)


def test_no_notes_where_cann_does_it_all():
    assert _explained(mask=Causal()).notes == {"ascend": ()}


def test_the_emulator_is_for_calls_that_name_it():
    found = _explained("cpu")
    assert found.chosen["cpu"] == "cpu"
    assert found.reasons["cpu"]["ascend"] == "on cpu it is an emulator, for calls that name it"
    assert _explained("cpu", implementation="ascend").chosen["cpu"] == "ascend"


def test_library():
    found = ascend.library()
    assert found.error is None and found.emulator and found.exports(FORWARD)
    assert {field.name for field in dataclasses.fields(found)} >= {"long", "short", "functions"}


def test_statistics_have_eight_lanes():
    """Statistics come back as CANN has them, eight lanes."""
    x = jnp.ones((2, 24, 32), jnp.float32)
    found = flash_attention_score(x, x, x, head_num=2, scale_value=0.25, **ASCEND)
    assert found.softmax_max.shape == (2, 2, 24, 8)
    np.testing.assert_allclose(found.softmax_max, 4.0, rtol=1e-6)
    np.testing.assert_allclose(found.softmax_sum, 24.0, rtol=1e-6)


# --- drawn keep bits


@pytest.mark.parametrize(
    ("shape", "at_once"),
    some_pairs([(2, 3, 37, 45), (1, 5, 16, 64), (2, 4, 33, 41)], [1, 400, 1000], every=3),
    ids=str,
)
def test_bits_drawn_some_rows_at_a_time(shape, at_once, monkeypatch):
    """Whether heads end within a byte or not, of a whole call and of a part of it."""
    B, N, Sq, Skv = shape
    key = jax.random.key(1)
    q, k = jnp.zeros((B, Sq, N, 8)), jnp.zeros((B, Skv, N, 8))
    drawn = keep_bits.Drawn(request_of(flash_attention, q, k, k, dropout_rate=0.3, dropout_key=key).call)
    parts = keep_bits.Part.whole(B, N, Sq), keep_bits.Part(0, 1, 1, N, 8, Sq)
    wanted = [drawn.packed(part) for part in parts]
    count = B * N * Sq * Skv
    bits, mask = (
        np.unpackbits(x, bitorder="little")[:count] for x in (wanted[0], jax_fa.dropout_mask(key, 0.3, shape))
    )
    np.testing.assert_array_equal(bits, mask)
    monkeypatch.setattr(keep_bits, "_AT_ONCE", at_once)
    for part, want in zip(parts, wanted, strict=True):
        np.testing.assert_array_equal(drawn.packed(part), want)


def test_calls_that_draw_many_bits_are_split(monkeypatch):
    """By bytes of bits, not by work alone; the pieces' bits are those of the whole."""
    B, N, S, D = 2, 4, 24, 16
    q, k, v = np.random.default_rng(0).standard_normal((3, B, S, N, D)).astype(np.float32)

    def run(q, k, v):
        options = {"dropout_rate": 0.25, "dropout_key": jax.random.key(3), "mask": Causal()}
        return flash_attention(q, k, v, **options, **ASCEND)

    out, pull = jax.vjp(run, q, k, v)
    whole = jax.block_until_ready([out, *pull(out)])
    assert len(emulator.log()) == 2
    emulator.reset()
    monkeypatch.setattr(split, "MAX_DRAWN_BYTES", 2 * S * S // 8)  # of two heads
    with jax.default_device(jax.devices()[-1]):  # a part of the keys of JAX's caches, as is a new function
        out, pull = jax.vjp(run, q, k, v)
        pieces = jax.block_until_ready([out, *pull(whole[0])])
    assert len(emulator.log()) == 8
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_note_on_drawn_bits_says_bytes():
    q = jax.ShapeDtypeStruct((1, 32768, 32, 128), jnp.bfloat16)
    key = jax.random.key(0)
    found = jax_fa.explain(
        q, q, q, dropout_rate=0.1, dropout_key=key, platforms="ascend", entry="flash_attention"
    )
    assert any("4294967296 bytes, at most 268435456 at a time" in note for note in found.notes["ascend"])
