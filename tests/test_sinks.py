"""Attention sinks: one more logit in every row's softmax, without a value, for every case of the table."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from mosaic_tools import interpreter, needs_new_jax

import jax_fa
from jax_fa.attention import attention
from jax_fa.backends.ascend import installation
from jax_fa.masks import Causal, Lengths, SlidingWindow
from jax_fa.testing import oracle
from jax_fa.testing.cases import BY_NAME, CASES, FEATURES, Case, expected

# --- the table: a case, and sinks of every head or of every head and batch entry


def _sinks(case: Case, dtype: str | None = None) -> np.ndarray:
    """About the size of the log-sum-exp, so that keys and sink share the weights."""
    shape = (case.N,) if len(case.name) % 2 else (*case.B, case.N)
    return case.cast(1.5 * case.random("sinks").standard_normal(shape) + 3, dtype or case.acc)


def _extra(case: Case) -> dict[str, Any]:
    """Of the oracle, besides the operands."""
    return {
        "visible": case.visible(),
        "scale": case.scale,
        "soft_cap": case.soft_cap,
        "position": case.position(),
        "keep": case.keep(),
        "keep_prob": case.keep_prob,
    }


@cache
def _expected(case: Case) -> tuple[oracle.Attention, dict[str, np.ndarray]]:
    x = case.operands()
    qkv = (x[name] for name in ("query", "key", "value"))
    terms = {"bias": x.get("bias"), "slopes": x.get("alibi_slopes"), "sinks": _sinks(case)}
    found = oracle.attention(*qkv, **terms, **_extra(case))
    return found, found.gradients(*case.cotangents())


@cache
def _naive(case: Case):
    if case.dtype == "float64" or 0 in case.full:
        found, gradients = _expected(case)
        return found.out, found.lse, gradients
    visible = case.visible()
    found = oracle.naive(
        case.operands() | {"sinks": _sinks(case)},
        np.broadcast_to(True if visible is None else visible, case.full),
        case.keep(),
        case.cotangents(),
        scale=np.float32(case.D**-0.5 if case.scale is None else case.scale),
        soft_cap=None if case.soft_cap is None else np.float32(case.soft_cap),
        keep_prob=np.float32(case.keep_prob),
        position=np.broadcast_to(case.position(), (*case.B, 1, case.Sq)),
    )
    return jax.tree.map(np.asarray, found)


def _check(case: Case, out, lse, gradients) -> None:
    want, want_gradients = _expected(case)
    naive_out, naive_lse, naive_gradients = _naive(case)
    wide = max(1.0, case.spread / 100) if case.dtype == case.acc else 1.0
    floor = wide * oracle.FLOOR[case.dtype]
    assert out.dtype == jnp.dtype(case.dtype) and lse.dtype == jnp.dtype(case.acc)
    oracle.assert_close_to_oracle(case.canonical(out), want.out, naive_out, f"{case}: out", floor)
    stats_floor = oracle.FLOOR[case.acc]
    oracle.assert_close_to_oracle(lse, want.lse, naive_lse, f"{case}: log-sum-exp", stats_floor)
    given = case.operands() | {"sinks": _sinks(case)}
    assert sorted(gradients) == sorted(want_gradients) == sorted(given)
    for name, g in case.canonical_gradients(gradients).items():
        assert g.dtype == given[name].dtype and g.shape == given[name].shape
        times = max(1.0, want.cancellation.get(name, 1.0))
        what = f"{case}: gradient of {name}"
        oracle.assert_close_to_oracle(g, want_gradients[name], naive_gradients[name], what, times * floor)


_FAST = {case for case in (*FEATURES, *CASES) if case.dtype == "bfloat16" or case.name.startswith("empty")}
_FAST |= {
    BY_NAME[name] for name in ("everything", "mqa", "dropout", "mask-lengths", "soft-cap", "layout-SBND")
}


@pytest.mark.in_turn(1)
@pytest.mark.parametrize(
    "case",
    [case if case in _FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_every_case_with_sinks(case, backend):
    """Output, log-sum-exp, and the gradients of all operands and of the sinks."""
    with case.context():
        dout, dlse = case.cotangents()
        run = jax.jit(lambda x, dout, dlse: case.gradient(x, dout, dlse, implementation=backend))
        x = case.stored_operands() | {"sinks": _sinks(case)}
        (out, lse), gradients = run(x, case.stored(dout), dlse)
        _check(case, out, lse, gradients)


@pytest.mark.parametrize("name", ["bfloat16-causal", "float16-bias", "bfloat16-everything", "mqa"])
def test_without_a_derivative(name, backend):
    """16-bit forwards save no rounding then; the output is rounded before it is multiplied, and after."""
    case = BY_NAME[name]
    run = jax.jit(lambda x: case.flash_attention(x, implementation=backend))
    out, lse = run(case.stored_operands() | {"sinks": _sinks(case)})
    want, (naive_out, naive_lse, _) = _expected(case)[0], _naive(case)
    floor = oracle.FLOOR[case.dtype]
    oracle.assert_close_to_oracle(case.canonical(out), want.out, naive_out, name, floor)
    oracle.assert_close_to_oracle(lse, want.lse, naive_lse, name, oracle.FLOOR["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_under_differentiation_the_output_is_rounded_once(dtype, backend):
    """It errs as much as without a sink. Rounded twice, it would err 1.4 times as much where that is all of the error."""
    case = Case(name=f"rounded-{dtype}", dtype=dtype, D=32, Dv=32)

    def error(found, want) -> float:
        return oracle.errors(case.canonical(found), want)[0]

    x = case.stored_operands()
    attend = partial(case.flash_attention, implementation=backend)
    plain, with_it = (jax.vjp(attend, given)[0][0] for given in (x, x | {"sinks": _sinks(case)}))
    assert error(with_it, _expected(case)[0].out) < 1.1 * error(plain, expected(case)[0].out)


def _gradient(case: Case, implementation: str):
    dout, dlse = case.cotangents()
    run = jax.jit(lambda x, dout, dlse: case.gradient(x, dout, dlse, implementation=implementation))
    return run(case.stored_operands() | {"sinks": _sinks(case)}, case.stored(dout), dlse)


@pytest.mark.skipif(installation.absence() is not None, reason="needs the emulator of CANN")
@pytest.mark.parametrize("name", ["mqa", "mask-lengths", "bfloat16-causal"])
def test_through_the_emulator_of_cann(name):
    (out, lse), gradients = _gradient(BY_NAME[name], "ascend")
    _check(BY_NAME[name], out, lse, gradients)


@needs_new_jax
def test_in_the_interpreter_of_gpu_kernels():
    case = Case(name="gpu", dtype="bfloat16", B=(1,), Sq=64, Skv=64, N=2, K=1, D=64, Dv=64, mask="causal")
    with interpreter():
        (out, lse), gradients = jax.block_until_ready(_gradient(case, "mosaic"))
    _check(case, out, lse, gradients)


# --- derivatives along tangents, and of second order


_SECOND = [
    BY_NAME[name] for name in ("mqa", "mask-lengths", "everything", "layout-SBND", "soft-cap", "dropout")
]


@pytest.mark.one_in(2)
@pytest.mark.in_turn
@pytest.mark.parametrize("case", _SECOND, ids=str)
def test_derivatives_of_every_order(case, backend):
    """jvp, jvp of grad, grad of grad, and grad of jvp, against a dense attention in float64."""
    call = dense.call_of(case, backend)
    visible, keep = case.visible(), case.keep()
    visible = np.broadcast_to(True if visible is None else visible, case.full)
    keep = np.broadcast_to(np.float64(1.0 if keep is None else keep / case.keep_prob), case.full)
    operands = {n: getattr(call.operands, n) for n in ("query", "key", "value", "bias", "alibi_slopes")}
    x = {n: np.asarray(a) for n, a in operands.items() if a is not None} | {"sinks": _sinks(case)}
    unseen = ~visible.any(axis=-1)

    def ours(x):
        operands = replace(call.operands, **{n: a for n, a in x.items() if n != "sinks"})
        rank = len(case.B) + 1
        sinks = x["sinks"].reshape((1,) * (rank - x["sinks"].ndim) + x["sinks"].shape)
        found = attention(call.replace(operands=operands), sinks)
        return found.out, found.logsumexp

    def theirs(x):
        out, lse = dense.attention(call, visible, keep, x)
        return out, jnp.where(unseen, x["sinks"][..., None], lse)

    def derivatives(attend, x, along):
        def loss(x):
            return sum(jnp.sum(jnp.sin(y)) for y in attend(x))

        def speed(x):
            return sum(jnp.sum(jnp.cos(t)) for t in jax.jvp(attend, (x,), (along,))[1])

        return {
            "jvp": jax.jvp(attend, (x,), (along,)),
            "jvp of grad": jax.jvp(jax.grad(loss), (x,), (along,))[1],
            "grad of grad": jax.grad(lambda x: sum(map(jnp.sum, jax.tree.leaves(jax.grad(loss)(x)))))(x),
            "grad of jvp": jax.grad(speed)(x),
        }

    along = {n: case.cast(case.random(f"along {n}").standard_normal(a.shape)) for n, a in x.items()}
    found = jax.jit(partial(derivatives, ours))(x, along)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (x, along))
        want = jax.jit(partial(derivatives, theirs))(*wide)
    for what in want:
        for a, b in zip(jax.tree.leaves(found[what]), jax.tree.leaves(want[what]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4 * max(1.0, np.abs(b).max()), err_msg=what)


# --- what a sink of -inf and a fully masked row mean


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_minus_infinity_is_no_sink(dtype, backend):
    """The same results (but for 16-bit outputs in the middle of two values); its own derivatives are 0."""
    case = Case(name=f"no-sink-{dtype}", mask="lengths", bias="1NQK", dtype=dtype)
    dout, dlse = case.cotangents()
    run = jax.jit(lambda x: case.gradient(x, case.stored(dout), dlse, implementation=backend))
    x = case.stored_operands()
    without, with_it = run(x), run(x | {"sinks": np.full(case.N, -np.inf, np.float32)})
    assert not np.asarray(with_it[1].pop("sinks")).any()
    ((out, lse), found), ((want_out, want_lse), want) = with_it, without
    np.testing.assert_array_equal(lse, want_lse)
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (out, want_out)), rtol=rounding)
    for g, wanted in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        np.testing.assert_allclose(np.float32(g), np.float32(wanted), rtol=rounding, atol=10 * rounding)

    def loss(sinks):
        out, lse = case.flash_attention(x, sinks=sinks, implementation=backend)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.sin(lse))

    sinks = jnp.array([-jnp.inf, 0.5, -jnp.inf, 1.0])
    hessian = np.asarray(jax.jit(jax.hessian(loss))(sinks))
    assert np.isfinite(hessian).all()
    finite = np.isfinite(sinks)
    assert not hessian[~finite].any() and not hessian[:, ~finite].any() and hessian[finite].any()


def test_a_fully_masked_row_leaves_all_weight_to_the_sink(backend):
    """Output 0, log-sum-exp the sink, whose gradient is that of the log-sum-exp alone."""
    case = Case(name="sink-nothing", mask="nothing")
    sinks = _sinks(case)
    dout, dlse = case.cotangents()
    with jax.debug_nans(True):
        (out, lse), gradients = case.gradient(
            case.stored_operands() | {"sinks": sinks}, dout, dlse, implementation=backend
        )
    assert not np.asarray(out).any()
    np.testing.assert_array_equal(lse, np.broadcast_to(sinks[..., None], lse.shape))
    summed = dlse.sum(axis=-1) if sinks.ndim > 1 else dlse.sum(axis=(0, -1))
    np.testing.assert_allclose(gradients.pop("sinks"), summed, rtol=1e-5)
    assert not any(np.asarray(g).any() for g in gradients.values())


def test_nothing_reaches_a_row_whose_sink_is_far_above(backend):
    """Its weights underflow; nothing is NaN."""
    case = Case(name="high-sink")
    x = case.stored_operands()
    run = jax.jit(
        jax.value_and_grad(lambda s: case.flash_attention(x, sinks=s, implementation=backend)[0].sum())
    )
    value, gradient = run(jnp.full(case.N, 1e30))
    assert value == 0 and not np.asarray(gradient).any()


# --- statistics


@pytest.mark.parametrize(
    "name", ["mqa", "mask-lengths", "soft-cap", "mask-nothing", "dropout", "bfloat16-causal"]
)
def test_softmax_statistics(name, backend):
    """The max and the sum have the sink in them; the largest logit does not."""
    case, sinks = BY_NAME[name], _sinks(BY_NAME[name])
    call = dense.call_of(case, backend)
    sinks = np.broadcast_to(sinks, (*case.B, case.N))

    @jax.jit
    def both(operands):
        given = call.replace(operands=operands)
        return attention(given, sinks), attention(given, sinks, max_logits=True)

    want = _expected(case)[0]
    for found in both(call.operands):
        pairs = {
            "max": (found.softmax_max, want.m),
            "sum": (found.softmax_sum, want.l),
            "log-sum-exp": (found.logsumexp, want.lse),
        }
        if found.largest_logit is not None:
            pairs["largest"] = found.largest_logit, want.largest
        for what, (ours, theirs) in pairs.items():
            assert ours.dtype == jnp.float32
            oracle.assert_close_to_oracle(ours, theirs, theirs, f"{case}: {what}", 2e-6)
    assert found.largest_logit is not None


def test_a_split_over_keys_merges_with_one_sink(backend):
    """One block with the sink and one without are the whole with it, gradients included."""
    case = Case(name="split", mask="causal_bottom", Sq=37, Skv=64, bias=None)
    x, sinks = case.stored_operands(), _sinks(case)
    halves = [slice(0, 40), slice(40, 64)]

    def merged(x, sinks):
        outs, lses = [], []
        for i, keys in enumerate(halves):
            block = x | {name: x[name][:, keys] for name in ("key", "value")}
            mask = Causal(offset=case.Skv - case.Sq - keys.start)
            out, lse = jax_fa.flash_attention(
                **block, mask=mask, sinks=None if i else sinks, return_logsumexp=True, implementation=backend
            )
            outs.append(out)
            lses.append(lse)
        lse = jnp.logaddexp(*lses)
        weights = [jnp.exp(part - lse).swapaxes(-1, -2)[..., None] for part in lses]
        return sum(o * w for o, w in zip(outs, weights, strict=True)), lse

    def whole(x, sinks):
        return case.flash_attention(x, sinks=sinks, implementation=backend)

    dout, dlse = case.cotangents()
    found, want = (
        jax.jit(lambda x, s, f=f: jax.vjp(f, x, s)[1]((dout, dlse)))(x, sinks) for f in (merged, whole)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, want)


# --- entries and transformations


def test_both_entries_take_them(backend):
    case = Case(name="entries", mask="causal", N=6, K=2)
    x, sinks = case.operands(), _sinks(case)
    options = {"sinks": sinks, "implementation": backend}
    out, residual, largest = jax_fa.dot_product_attention(
        **x, is_causal=True, return_residual=True, return_max_logits=True, **options
    )
    want, lse, most = jax_fa.flash_attention(
        **x, mask=Causal(), return_logsumexp=True, return_max_logits=True, **options
    )
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(largest, most)
    alone = jax_fa.dot_product_attention(**x, is_causal=True, **options)
    np.testing.assert_allclose(alone, want, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(residual, lse.swapaxes(-1, -2))
    assert largest.shape == (*case.B, case.N)
    # Without a batch too.
    one = {name: a[0] for name, a in x.items()}
    head = sinks if sinks.ndim == 1 else sinks[0]
    np.testing.assert_allclose(
        jax_fa.dot_product_attention(**one, is_causal=True, sinks=head, implementation=backend),
        want[0],
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_gradient_has_the_dtype_of_the_sinks(dtype, backend):
    """And is summed in float32."""
    case = Case(name="dtypes", Sq=300, Skv=8, N=2, K=1)
    x, sinks = case.stored_operands(), _sinks(case, dtype)
    loss = lambda s: case.flash_attention(x, sinks=s, implementation=backend)[1].sum()
    found, want = (jax.jit(jax.grad(loss))(s) for s in (sinks, sinks.astype(np.float32)))
    assert found.dtype == sinks.dtype
    np.testing.assert_array_equal(found, want.astype(found.dtype))


@pytest.mark.parametrize("axes", [(0, None, 0), (None, None, 0), (0, 0, None), (1, 0, 1)], ids=str)
def test_vmap(axes, backend):
    """Over sinks, queries and keys, or some of them: as if called one by one."""
    case = Case(name="vmap", mask="causal", B=(3, 2))
    query, key, sinks = (
        case.operands()["query"],
        case.operands()["key"],
        case.random("s").standard_normal((3, 4)),
    )
    sinks = sinks.astype(np.float32)

    def attend(query, key, sinks):
        def loss(q, k, s):
            out, lse = jax_fa.flash_attention(
                q, k, k, sinks=s, mask=Causal(), return_logsumexp=True, implementation=backend
            )
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(lse)), (out, lse)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, sinks)

    given = [
        x[0] if axis is None else np.moveaxis(x, 0, axis)
        for x, axis in zip((query, key, sinks), axes, strict=True)
    ]
    found = jax.jit(jax.vmap(attend, in_axes=axes))(*given)
    each = [
        attend(*(x if a is None else np.take(x, i, axis=a) for x, a in zip(given, axes, strict=True)))
        for i in range(3)
    ]
    want = jax.tree.map(lambda *parts: np.stack(parts), *each)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, want)


@pytest.mark.parametrize("manual", [False, True], ids=["jit", "shard_map"])
def test_over_devices(manual, backend):
    """Batch and heads on a mesh: no array is gathered, and the gradient of sinks is the sum over the batch."""
    case = Case(name="devices", B=(4,), N=4, K=2, mask="causal")
    mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    heads, rows = P("b", None, "h", None), P("b", "h", None)
    specs = ({"query": heads, "key": heads, "value": heads, "sinks": P("h")}, heads, rows)
    dout, dlse = case.cotangents()
    arrays = (case.stored_operands() | {"sinks": _sinks(replace(case, name="odd"))}, dout, dlse)
    assert arrays[0]["sinks"].shape == (4,)

    def run(x, dout, dlse):
        return case.gradient(x, dout, dlse, implementation=backend)

    placed = jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), arrays, specs)
    shard = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=((heads, rows), specs[0]))
    program = jax.jit(shard if manual else run).lower(*placed).compile()
    want = jax.jit(run)(*arrays)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), program(*placed), want)
    assert "all-gather" not in program.as_text() and "all-to-all" not in program.as_text()


@pytest.mark.slow
def test_second_derivatives_in_shard_map(backend):
    """By batch and heads: as without it."""
    case = Case(name="second", B=(2,), Sq=9, Skv=9, N=4, K=2, D=8, Dv=8, mask="causal")
    mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, heads = case.stored_operands() | {"sinks": np.float32([0.5, 2.0, -1.0, 3.0])}, P("b", None, "h")

    def attend(x):
        return case.flash_attention(x, implementation=backend)[0]

    def second(attend):
        loss = jax.grad(lambda x: jnp.sum(jnp.sin(attend(x))))
        return jax.jit(jax.grad(lambda x: sum(jnp.sum(jnp.cos(g)) for g in jax.tree.leaves(loss(x)))))(x)

    specs = {name: P("h") if name == "sinks" else heads for name in x}
    found = second(jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=heads))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, second(attend))


def test_remat_keeps_what_it_names(backend):
    """With output and statistics kept, the backward runs no second forward; nothing else of their size is saved."""
    case = Case(name="remat", dtype="bfloat16")
    x = case.stored_operands() | {"sinks": _sinks(case)}
    names = jax.checkpoint_policies.save_only_these_names(jax_fa.OUT_NAME, jax_fa.STATS_NAME)

    def loss(x):
        out, _ = case.flash_attention(x, implementation=backend)
        return jnp.sum(out.astype(jnp.float32))

    kept = str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=names)))(x))
    assert kept.count("flash_attention_fwd[") == 1
    plain = jax.grad(loss)(x)
    jax.tree.map(np.testing.assert_array_equal, jax.grad(jax.checkpoint(loss, policy=names))(x), plain)


def test_explain_finds_one_call():
    case = Case(name="explain")
    shapes = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in case.operands().items()}
    sinks = jax.ShapeDtypeStruct((case.N,), jnp.float32)
    with_it = jax_fa.explain(**shapes, sinks=sinks, platforms=("cpu", "cuda", "tpu"))
    without = jax_fa.explain(**shapes, platforms=("cpu", "cuda", "tpu"))
    assert with_it.chosen == without.chosen and with_it.reasons == without.reasons


# --- gpt-oss, which introduced them to open models


def _gpt_oss(torch, query, key, value, sinks, window: int):
    """Its eager attention in PyTorch: a column of sinks is appended to the logits and cut off the weights."""
    q, k, v = (x.movedim(-2, -3) for x in (query, key, value))
    group = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(group, dim=-3) for x in (k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    row, column = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
    masked = (column > row) | (column <= row - window)
    logits = logits.masked_fill(masked, -torch.inf)
    column = sinks[:, None, None].expand(*logits.shape[:-1], 1)
    weights = torch.softmax(torch.cat([logits, column], dim=-1), dim=-1)[..., :-1]
    return (weights @ v).movedim(-3, -2)


@pytest.mark.parametrize("window", [5, 1000])
def test_the_attention_of_gpt_oss(window, backend):
    torch = pytest.importorskip("torch")
    case = Case(name="gpt-oss", Sq=33, Skv=33, N=8, K=2)
    x, sinks, (dout, _) = (
        case.operands(),
        case.random("s").standard_normal(8).astype(np.float32),
        case.cotangents(),
    )
    theirs = [torch.tensor(a, requires_grad=True) for a in (*x.values(), sinks)]
    want = _gpt_oss(torch, *theirs, window)
    want.backward(torch.tensor(dout))

    def ours(*x):
        mask = SlidingWindow(window - 1)
        *qkv, sinks = x
        return jax_fa.flash_attention(*qkv, sinks=sinks, mask=mask, implementation=backend)

    out, pullback = jax.vjp(ours, *x.values(), sinks)
    np.testing.assert_allclose(out, want.detach().numpy(), rtol=1e-5, atol=1e-5)
    for found, wanted in zip(pullback(dout), theirs, strict=True):
        np.testing.assert_allclose(found, wanted.grad.numpy(), rtol=1e-4, atol=1e-5)


# --- the largest logit of every head


@pytest.mark.in_turn
@pytest.mark.parametrize(
    "name", ["mqa", "mask-lengths", "soft-cap", "mask-nothing", "everything", "everything-BNSD", "two-batch-dims",
             "no-batch", "bfloat16-causal", "float64-plain", "empty-Sq", "empty-Skv", "bias-causal"]
)  # fmt: skip
@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
def test_max_logits(name, with_sinks, backend):
    """After scale, bias, cap and mask, before dropout; -FLT_MAX for heads whose rows are all fully masked."""
    case = BY_NAME[name]
    if (backend, case.dtype) == ("cpu", "float64"):
        pytest.skip("refused")
    options = {"sinks": _sinks(case)} if with_sinks else {}
    with case.context():
        run = jax.jit(
            lambda x: case.flash_attention(x, return_max_logits=True, implementation=backend, **options)
        )
        *_, found = run(case.stored_operands())
    want = _expected(case)[0].largest.max(axis=-1, initial=-oracle.FLT_MAX)
    assert found.shape == (*case.B, case.N) and found.dtype == jnp.dtype(case.acc)
    oracle.assert_close_to_oracle(found, want, want, name, 2e-6)


def test_max_logits_have_no_gradient_and_cost_no_second_call(backend):
    case = Case(name="max", mask="causal")
    x = case.stored_operands()

    def largest(x):
        return jax_fa.flash_attention(**x, return_max_logits=True, implementation=backend)[1]

    gradients = jax.grad(lambda x: largest(x).sum())(x)
    assert not any(np.asarray(g).any() for g in gradients.values())
    assert not np.asarray(jax.jvp(largest, (x,), (x,))[1]).any()
    assert str(jax.make_jaxpr(largest)(x)).count("flash_attention_fwd[") == 1
    mapped = jax.vmap(largest)(jax.tree.map(lambda a: np.stack([a, 2 * a]), x))
    np.testing.assert_allclose(mapped[0], largest(x), rtol=1e-6)
    assert mapped.shape == (2, *case.B, case.N)


def test_lengths_leave_rows_and_heads_out(backend):
    """A batch entry without keys has -FLT_MAX, the others their own."""
    case = Case(name="max-lengths")
    x = case.operands()
    mask = Lengths(key=np.array([0, 7], np.int32))
    found = jax_fa.flash_attention(**x, mask=mask, return_max_logits=True, implementation=backend)[1]
    visible = oracle.lengths(case.Sq, case.Skv, key=[0, 7])
    want = oracle.attention(*x.values(), visible=visible).largest.max(axis=-1)
    np.testing.assert_array_equal(found[0], np.float32(-oracle.FLT_MAX))
    np.testing.assert_allclose(found[1], want[1], rtol=1e-5)


# --- what an array cannot show by being close


def test_cotangents_of_masked_rows_do_not_leak():
    """A fully masked row has no output: whatever its cotangent holds, no gradient has it."""
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((1, 6, 2, 4)), jnp.float32) for _ in range(3))

    def run(sinks, dout):
        mask = Lengths(query=jnp.array([4]))
        return jax.vjp(lambda *x: jax_fa.flash_attention(*x[:3], mask=mask, sinks=x[3]), q, k, v, sinks)[1](
            dout
        )

    dout = random.standard_normal((1, 6, 2, 4)).astype(np.float32)
    clean, *dirty = (
        jax.jit(run)(jnp.zeros(2), np.where(np.arange(6)[:, None, None] < 4, dout, np.float32(filling)))
        for filling in (0, np.nan, np.inf)
    )
    for found in dirty:
        jax.tree.map(np.testing.assert_array_equal, found, clean)


@pytest.mark.parametrize("sink", [-20.0, -45.0, 30.0])
def test_gradients_of_small_shares(sink):
    """Of a sink that has 1e-9 of the weight, or all but 1e-13 of it, to its last digits."""
    random = np.random.default_rng(0)
    q, k, v, dout = (random.standard_normal((1, 5, 1, 4)).astype(np.float32) for _ in range(4))
    want = oracle.attention(q, k, v, sinks=np.array([sink])).gradients(dout)
    _, pullback = jax.vjp(lambda *x: jax_fa.flash_attention(*x[:3], sinks=x[3]), q, k, v, jnp.array([sink]))
    for name, found in zip(("query", "key", "value", "sinks"), pullback(dout), strict=True):
        scale = np.abs(want[name]).max()
        np.testing.assert_allclose(found, want[name], rtol=1e-4, atol=1e-4 * scale, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_second_derivatives_of_small_shares(dtype):
    """With all but 1e-3 of the weight at the sink, nothing is rounded to 16 bits but the results."""
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.standard_normal((1, 5, 1, 4)), dtype) for _ in range(8)]
    dlse, dlse_along = (jnp.asarray(random.standard_normal((1, 1, 5)), jnp.float32) for _ in range(2))

    @jax.jit
    def moved(q, k, v, dout, *along):
        def gradients(q, k, v, dout, dlse):
            sinks = jnp.array([8.5])
            _, pullback = jax.vjp(
                lambda *x: jax_fa.flash_attention(*x, sinks=sinks, return_logsumexp=True), q, k, v
            )
            return pullback((dout, dlse))

        return jax.jvp(gradients, (q, k, v, dout, dlse), (*along, dlse_along))[1]

    found = moved(*arrays)
    want = moved(*(x.astype(jnp.float32) for x in arrays))
    for name, got, exact in zip(("query", "key", "value"), found, want, strict=True):
        noise = 1e-5 * np.abs(exact).max()
        assert got.dtype == dtype
        np.testing.assert_allclose(
            got.astype(jnp.float32), exact, rtol=0.51 * float(jnp.finfo(dtype).eps), atol=noise, err_msg=name
        )
