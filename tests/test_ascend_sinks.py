"""Sinks that CANN takes itself, and the plain form around the call where it does not."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sinks as sinks

import jax_fa
from jax_fa import ascend, masks
from jax_fa.attention import attention
from jax_fa.backends.ascend import installation
from jax_fa.masks import Causal, CumulativeLengths
from jax_fa.testing import emulator
from jax_fa.testing.cases import BY_NAME, CASES

if (absent := installation.absence()) is not None:
    pytest.skip(f"needs the CANN adapter: {absent}", allow_module_level=True)


@pytest.fixture(autouse=True)
def nothing_leaks():
    emulator.reset()
    yield
    assert emulator.live() == dict.fromkeys(emulator.OBJECTS, 0)
    emulator.reset()


def _functions() -> list[str]:
    return [call["function"].removeprefix("aclnnFlashAttention") for call in emulator.log()]


# --- the table

_SERVED = [case for case in CASES if case.dtype != "float64" and case.soft_cap is None]
_FAST = ("bfloat16-causal", "float16-bias", "mqa", "dropout", "mask-lengths")


@pytest.mark.parametrize(
    "case",
    [case if case.name in _FAST else pytest.param(case, marks=pytest.mark.slow) for case in _SERVED],
    ids=str,
)
def test_table(case):
    """With a cotangent of the log-sum-exp, which keeps CANN from the gradient of the sinks."""
    (out, lse), gradients = sinks._gradient(case, "ascend")
    sinks._check(case, out, lse, gradients)
    shared = sinks._sinks(case).ndim == 1 or np.prod(case.B) == 1
    assert 0 in case.full or bool({"ScoreV3", "VarLenScoreV5"} & set(_functions())) == shared


@pytest.mark.one_in(2)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_the_output_alone(dtype, packed):
    """16-bit calls get the gradient of the sinks from CANN, the others from the statistics: as on xla."""
    rng = np.random.default_rng(0)
    mask = CumulativeLengths((5, 5, 12, 20), within=Causal()) if packed else masks.SlidingWindow(left=3)
    q, k, v, dout = (
        jnp.asarray(rng.standard_normal((1 if packed else 2, 20, n, 16)), dtype) for n in (4, 2, 2, 4)
    )
    # -inf is no sink, also beside others.
    given = jnp.asarray([0.5, -jnp.inf, 2.0, -1e38], jnp.float32)

    def run(q, k, v, s, backend):
        return jax_fa.flash_attention(q, k, v, mask=mask, sinks=s, implementation=backend)

    found, want = (
        jax.vjp(partial(run, backend=backend), q, k, v, given)[1](dout) for backend in ("ascend", "xla")
    )
    jax.block_until_ready(found)
    names = ("VarLenScoreV5", "UnpaddingScoreGradV") if packed else ("ScoreV3", "ScoreGradV")
    forward, backward = _functions()
    assert forward == names[0] and backward.startswith(names[1])
    assert (backward[-1] in "35" and backward[-2:] != "V4") == (dtype == "bfloat16"), backward
    tolerance = 1e-5 if dtype == "float32" else 0.05
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=tolerance, rtol=tolerance)
    assert not np.asarray(found[3])[[1, 3]].any()


def test_statistics_have_the_sink_in_them():
    case = BY_NAME["mqa"]
    call = sinks.dense.call_of(case, "ascend")
    given = jnp.asarray(sinks._sinks(replace(case, name="odd")))[None]  # one per head
    found = jax.jit(lambda x: attention(call.replace(operands=x), given))(call.operands)
    want = attention(call, given, max_logits=True)
    assert found.largest_logit is None and _functions()[0] == "ScoreV3"
    for name in ("out", "softmax_max", "softmax_sum", "logsumexp"):
        np.testing.assert_allclose(getattr(found, name), getattr(want, name), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("bias", [False, True], ids=["mask", "bias"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_without_a_key(dtype, bias):
    """Output 0 and the log-sum-exp of the sink alone, with gradients 0, by a mask and by a bias of -inf."""
    q = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 2, 16)), dtype)
    hidden = np.zeros((6, 6), bool)
    hidden[2] = hidden[:3, 4] = True
    given = jnp.asarray([0.5, -jnp.inf], jnp.float32)
    options: dict[str, Any] = {"mask": masks.Dense(~hidden)}
    if bias:
        options = {"bias": jnp.where(hidden, -jnp.inf, 0).astype(dtype)}

    def run(q, s):
        return jax_fa.flash_attention(
            q, q, q, sinks=s, return_logsumexp=True, implementation="ascend", **options
        )

    def loss(q, s):
        return run(q, s)[0].astype(jnp.float32).sum()

    with jax.debug_nans(True):
        (out, lse), (dq, dsinks) = run(q, given), jax.grad(loss, argnums=(0, 1))(q, given)
    assert set(_functions()) & {"ScoreV3", "ScoreGradV3"} and not np.asarray(out[:, 2]).any()
    np.testing.assert_array_equal(lse[:, 0, 2], 0.5)
    np.testing.assert_array_equal(lse[:, 1, 2], -np.finfo(np.float32).max)
    want = jax.grad(lambda q, s: _on_xla(q, s, options), argnums=(0, 1))(q, given)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    for a, b in zip((dq, dsinks), want, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=tolerance, rtol=tolerance)


def _on_xla(q, s, options):
    return jax_fa.flash_attention(q, q, q, sinks=s, implementation="xla", **options).astype(jnp.float32).sum()


# --- which function, and what explain says


_WITHOUT = [
    ((), "ScoreV3 ScoreGradV3", "by CANN", "by CANN"),
    (("GradV3",), "ScoreV3 ScoreGradV2", "by CANN", "this CANN has no aclnnFlashAttentionScoreGradV3"),
    (("V3",), "ScoreV2 ScoreGradV2", "this CANN has no aclnnFlashAttentionScoreV3", "in plain JAX"),
]


@pytest.mark.parametrize(("missing", "functions", "forward", "gradient"), _WITHOUT)
def test_a_library_without_the_functions(missing, functions, forward, gradient, monkeypatch):
    whole = installation.library()
    names = tuple(name for name in whole.functions if not name.endswith(missing or "-"))
    monkeypatch.setattr(installation, "here", lambda: replace(whole, functions=names))
    q = jnp.asarray(np.random.default_rng(2).standard_normal((2, 9, 4, 16)), jnp.bfloat16)
    given = jnp.asarray([0.5, 1.0, 2.0, -1.0], jnp.float32)

    def loss(q, s, backend="ascend"):
        out = jax_fa.flash_attention(q, q, q, sinks=s, mask=Causal(), implementation=backend)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    jax.clear_caches()  # the choice is no part of their keys
    found = jax.block_until_ready(jax.grad(loss, argnums=(0, 1))(q, given))
    assert " ".join(_functions()) == functions
    for a, b in zip(found, jax.grad(partial(loss, backend="xla"), argnums=(0, 1))(q, given), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=0.05, rtol=0.05)
    (told,) = jax_fa.explain(loss, q, given, platforms=("ascend",))
    notes = [note for note in told.notes["ascend"] if note.startswith("sinks")]
    assert len(notes) == 2 and forward in notes[0] and gradient in notes[1], notes
    jax.clear_caches()


@pytest.mark.parametrize("options", [{}, {"return_max_logits": True}], ids=["none", "max-logits"])
def test_what_keeps_sinks_beside_the_call(options):
    """The largest logit has no sink in it: CANN's maximum has."""
    q = jnp.ones((1, 4, 2, 16))
    run = partial(jax_fa.flash_attention, q, q, q, sinks=jnp.ones(2), implementation="ascend", **options)
    jax.block_until_ready(run())
    assert _functions() == ["ScoreV2" if options else "ScoreV3"]


@pytest.mark.parametrize("entry", ["flash_attention_score", "npu_fusion_attention"])
def test_entries_of_cann(entry):
    q = np.random.default_rng(3).standard_normal((2, 9, 4, 16)).astype(np.float32)
    given = jnp.asarray([0.5, 1.0, 2.0, -1.0], jnp.float32)
    scale = {"scale": 0.25} if entry == "npu_fusion_attention" else {"scale_value": 0.25}
    run = partial(getattr(jax_fa, entry), q, q, q, head_num=4, input_layout="BSND", sink=given, **scale)
    for a, b in zip(
        jax.tree.leaves(run(implementation="ascend")), jax.tree.leaves(run(implementation="xla")), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert _functions() == ["ScoreV3"]


# --- transformations


@pytest.mark.parametrize("packed", [False, True])
def test_pieces_have_the_sinks_of_their_heads(packed):
    """A call that is split over batch entries, heads and rows; in layout TND over sequences and heads."""
    rng = np.random.default_rng(4)
    mask = CumulativeLengths((160, 300), within=Causal()) if packed else Causal()
    q, k = (jnp.asarray(rng.standard_normal((1 if packed else 2, 300, n, 16)), jnp.bfloat16) for n in (4, 2))
    given = jnp.asarray([0.5, 1.0, 2.0, -1.0], jnp.float32)

    def loss(q, k, s, backend):
        out = jax_fa.flash_attention(q, k, k, sinks=s, mask=mask, implementation=backend)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    work = 160 * 160 * 32 * 2 if packed else 128 * 300 * 32 * 2
    found, want = (
        jax.grad(loss, argnums=(0, 1, 2))(q, k, given, backend)
        for backend in (ascend.Options(max_work=work), "ascend")
    )
    jax.block_until_ready((found, want))
    assert len(_functions()) > 8
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    "name", ["mqa", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mask-lengths", "dropout"))]
)
def test_derivatives_of_every_order(name):
    sinks.test_derivatives_of_every_order(BY_NAME[name], "ascend")


@pytest.mark.parametrize(
    "manual", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["jit", "shard_map"]
)
def test_over_devices(manual):
    sinks.test_over_devices(manual, "ascend")


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(0, None, 0), (None, None, 0), (0, 0, None), (1, 0, 1)], ids=str)
def test_vmap(axes):
    """Sinks of every batch entry are not CANN's; those that all share are."""
    sinks.test_vmap(axes, "ascend")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_minus_infinity_is_no_sink(dtype):
    sinks.test_minus_infinity_is_no_sink(dtype, "ascend")
