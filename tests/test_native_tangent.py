"""Tangents of the native CPU backend, alone and with the forward, against dense float64 JAX."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa.backends import native
from jax_fa.backends.cpu import backend
from jax_fa.call import PLAIN_DIFFERENTIABLE, Call, Operands, Problem, Saved, has_rounding
from jax_fa.testing import oracle
from jax_fa.testing.cases import BY_NAME, CASES, FEATURES, Case

if native.missing is not None:
    pytest.skip(f"needs the native extension: {native.missing}", allow_module_level=True)
if jax.default_backend() != "cpu":
    pytest.skip("needs CPU devices by default", allow_module_level=True)

ISA = "JAX_FA_CPU_ISA"
# Several blocks of rows and of keys.
BLOCKS = Case(
    name="native-tangent-blocks", B=(1,), Sq=403, Skv=1130, N=2, K=1, D=64, Dv=40, mask="causal_bottom"
)
DECODE = Case(name="native-tangent-decode", Sq=1, Skv=2100, slopes="N")


@partial(jax.jit, static_argnums=0)
def _reference(form: dense.Form, constants, x, along):
    return jax.jvp(partial(dense.of_form, form, constants), (x,), (along,))


class Setting:
    """A call, and tangents of all its operands."""

    def __init__(self, call: Call, visible=None, keep=None) -> None:
        self.call = replace(call, problem=replace(call.problem, saves_rounding=has_rounding(call.dtype)))
        d = call.dims
        pairs = (*d.B, d.N, d.Sq, d.Skv)
        self.visible = np.broadcast_to(True if visible is None else visible, pairs)
        self.keep = np.broadcast_to(1.0 if keep is None else keep, pairs)
        random = np.random.default_rng(0)
        given = self.call.operands.present()
        self.x = {name: jnp.asarray(given[name]) for name in PLAIN_DIFFERENTIABLE if name in given}
        self.tangents = {
            name: jnp.asarray(random.standard_normal(a.shape), a.dtype) for name, a in self.x.items()
        }

    @cache  # noqa: B019 - there are few, and every instruction set is held against the same
    def expected(self, moving=PLAIN_DIFFERENTIABLE, dtype: Any = np.float64) -> dict[str, np.ndarray]:
        """out, log-sum-exp and their tangents along those of the operands named."""
        with jax.enable_x64(True):
            x = {name: np.asarray(a).astype(dtype) for name, a in self.x.items()}
            along = {name: np.asarray(self.tangents[name]).astype(dtype) * (name in moving) for name in x}
            given = dense.Form.of(self.call), dense.constants(self.call, self.visible, self.keep)
            (out, lse), (dout, dlse) = _reference(*given, x, along)
        return {name: np.asarray(a) for name, a in zip(_RESULTS, (out, lse, dout, dlse), strict=True)}

    def along(self, moving=PLAIN_DIFFERENTIABLE) -> Operands:
        return Operands(**{name: a for name, a in self.tangents.items() if name in moving})

    def check(self, found: dict[str, Any], moving=PLAIN_DIFFERENTIABLE) -> None:
        want, naive = self.expected(moving), self.expected(moving, np.float32)
        for name, x in found.items():
            assert x.dtype == (self.call.dtype if name in ("out", "dout") else jnp.float32)
            plain, floor = naive[name].astype(x.dtype), oracle.FLOOR[str(x.dtype)]
            if np.linalg.norm(want[name]) < 1e-9:
                assert np.linalg.norm(x.astype(np.float64)) <= 1e-3, name
                continue
            for error, allowed in zip(
                oracle.errors(x, want[name]), oracle.errors(plain, want[name]), strict=True
            ):
                assert error <= 2 * allowed + floor, (
                    f"{name}: {error:.3g}, naive {allowed:.3g}, floor {floor:.3g}"
                )


_RESULTS = ("out", "lse", "dout", "dlse")


@partial(jax.jit, static_argnums=0)
def _jvp(problem: Problem, operands: Operands, along: Operands) -> dict[str, Any]:
    """Together with the forward."""
    out, m, l, *_, dout, dlse = backend.jvp(Call.of(problem, operands, along), along)
    return dict(zip(_RESULTS, (out, jnp.where(l == 0, m, m + jnp.log(l)), dout, dlse), strict=True))


@partial(jax.jit, static_argnums=0)
def _tangent(problem: Problem, operands: Operands, along: Operands) -> dict[str, Any]:
    """From what the forward saved."""
    out, m, l, *rounding = backend.forward(Call.of(problem, operands))
    saved = Saved(out=out, m=m, l=l, rounding=rounding[0] if rounding else None)
    dout, dlse = backend.tangent(Call.of(problem, operands, saved, along), along, saved)
    return {"dout": dout, "dlse": dlse}


@cache
def setting_of(case: Case) -> Setting:
    keep = case.keep()
    kept = None if keep is None else keep / case.keep_prob
    return Setting(dense.call_of(case, "cpu"), case.visible(), kept)


def _run(run, setting: Setting, moving=PLAIN_DIFFERENTIABLE) -> dict[str, np.ndarray]:
    found = run(setting.call.problem, setting.call.operands.map(lambda _, x: x), setting.along(moving))
    return jax.tree.map(np.asarray, found)


_SERVED = [case for case in CASES if case.dtype != "float64"]
_TABLE = [case for case in _SERVED if case in FEATURES or case.dtype != "float32"]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", [*_TABLE, BLOCKS, DECODE], ids=str)
def test_tangents(case):
    """From what the forward saved; in one pass with it, all rows of the table are in test_derivatives.py."""
    setting = setting_of(case)
    setting.check(_run(_tangent, setting))
    if case in (BLOCKS, DECODE):
        setting.check(_run(_jvp, setting))


_SPREAD = (
    "gqa",
    "wide-values",
    "bias-causal",
    "soft-cap",
    "dropout",
    "bfloat16-everything",
    "float16-causal",
)


@pytest.mark.parametrize("isa", native.extension.instruction_sets())
@pytest.mark.parametrize("case", [*(BY_NAME[name] for name in _SPREAD), BLOCKS], ids=str)
def test_every_instruction_set(case, isa, monkeypatch):
    if not native.extension.instruction_sets()[isa]:
        pytest.skip(f"this machine does not have {isa}")
    monkeypatch.setenv(ISA, isa)
    setting = setting_of(case)
    for run in (_jvp, _tangent):
        setting.check(_run(run, setting))


# --- one of everything

B, SQ, SKV, N, K, D, DV = 2, 23, 41, 4, 2, 8, 9
_AXES = (0, 1, 2, 3)


def _everything(dtype: str = "float32", alibi: str = "linear") -> Setting:
    """A call with every kind of operand, with scalars as data, in storage orders of their own."""
    random = np.random.default_rng(1)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(random.standard_normal(shape), dtype)

    problem = Problem(
        query_axes=_AXES,
        key_axes=(0, 2, 1, 3),
        value_axes=(1, 0, 2, 3),
        out_axes=(0, 2, 1, 3),
        scale=1.0,
        alibi=alibi,
    )
    operands = Operands(
        query=normal(B, SQ, N, D),
        key=normal(B, K, SKV, D),
        value=normal(SKV, B, K, DV),
        bias=normal(1, N, SQ + SKV),
        bias_offset=jnp.asarray(random.integers(0, SQ, (1, 1, SQ)), jnp.int32),
        mask=jnp.asarray(random.random((B, 1, SQ, SKV)) < 0.7),
        lower=jnp.asarray(random.integers(-2, 9, (1, 1, SQ)), jnp.int32),
        upper=jnp.asarray(random.integers(3, SKV, (B, 1, SQ)), jnp.int32),
        segment_row=jnp.asarray(random.integers(-1, 2, (B, 1, SQ)), jnp.int32),
        segment_key=jnp.asarray(random.integers(0, 2, (B, 1, SKV)), jnp.int32),
        alibi_slopes=jnp.asarray(random.random((1, N, SQ)) / 8, jnp.float32),
        position=jnp.asarray(random.integers(0, SKV, (B, 1, SQ)), jnp.int32),
        scale=normal(B, N, dtype=jnp.float32),
        soft_cap=jnp.asarray(1 + 4 * random.random((1, N)), jnp.float32),
    )
    given = {name: np.asarray(x) for name, x in operands.present().items()}
    j, row = np.arange(SKV), given["segment_row"][..., None]
    visible = (
        given["mask"]
        & (j >= given["lower"][..., None])
        & (j < given["upper"][..., None])
        & ((row < 0) | (row == given["segment_key"][..., None, :]))
    )
    return Setting(Call.of(problem, operands), visible)


@pytest.mark.parametrize("alibi", ["linear", "sqrt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_operand(dtype, alibi):
    setting = _everything(dtype, alibi)
    for run in (_jvp, _tangent):
        setting.check(_run(run, setting))


@pytest.mark.parametrize("run", [_jvp, _tangent])
@pytest.mark.parametrize("name", PLAIN_DIFFERENTIABLE)
def test_one_tangent_alone(name, run):
    setting = _everything()
    setting.check(_run(run, setting, (name,)), (name,))


@pytest.mark.parametrize("run", [_jvp, _tangent])
def test_tangents_add_up(run):
    """Absent tangents are zero."""
    setting = _everything()
    parts = [_run(run, setting, (name,)) for name in PLAIN_DIFFERENTIABLE]
    both = _run(run, setting)
    for result in ("dout", "dlse"):
        np.testing.assert_allclose(sum(part[result] for part in parts), both[result], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("run", [_jvp, _tangent])
def test_no_tangents(run):
    found = _run(run, _everything(), ())
    assert not found["dout"].any() and not found["dlse"].any()


def test_batch_dims_of_size_one():
    """Of operands, of tangents and of what is saved: as if they were full."""
    setting = _everything()
    one = {"query": 0, "key": 0, "value": 1}  # the stored axis of the batch
    operands = setting.call.operands
    narrow = {
        name: jnp.take(getattr(operands, name), jnp.array([0]), axis=axis) for name, axis in one.items()
    }
    tangents = setting.tangents | {
        "key": setting.tangents["key"][:1]
    }  # mapped where the operand is not, and not
    problem = setting.call.problem
    wide = {name: jnp.repeat(x, B, axis=one[name]) for name, x in narrow.items()}
    full = tangents | {"key": jnp.repeat(tangents["key"], B, axis=0)}
    for run in (_jvp, _tangent):
        found = run(problem, replace(operands, **narrow), Operands(**tangents))
        expected = run(problem, replace(operands, **wide), Operands(**full))
        jax.tree.map(np.testing.assert_array_equal, found, expected)

    # One call's saved arrays for tangents of two.
    first = {name: jnp.asarray(x) for name, x in operands.present().items()}
    for name, x in first.items():
        first[name] = x[:, :1] if name == "value" else x[:1]
    out, m, l = backend.forward(Call.of(problem, Operands(**first)))
    saved = Saved(out=out, m=m, l=l)
    along = setting.along()
    dout, dlse = backend.tangent(Call.of(problem, Operands(**first), saved, along), along, saved)
    assert dout.shape[0] == dlse.shape[0] == B
    for i in range(B):
        part = {}
        for name, x in along.present().items():
            axis = one.get(name, 0)
            part[name] = x if x.shape[axis] == 1 else jax.lax.slice_in_dim(x, i, i + 1, axis=axis)
        call = Call.of(problem, Operands(**first), saved, Operands(**part))
        alone = backend.tangent(call, Operands(**part), saved)
        np.testing.assert_array_equal(dout[i : i + 1], alone[0])
        np.testing.assert_array_equal(dlse[i : i + 1], alone[1])


# --- bits


@partial(jax.jit, static_argnums=0)
def _both(problem: Problem, operands: Operands, along: Operands) -> tuple[Any, Any]:
    call = Call.of(problem, operands)
    return backend.forward(call), backend.jvp(call, along)


@pytest.mark.parametrize("case", [BLOCKS, *(BY_NAME[x] for x in ("mask-nothing", "everything"))], ids=str)
def test_the_forward_keeps_its_bits(case):
    """float32, and more rows than those for which keys are read in place."""
    setting = setting_of(case)
    alone, together = _both(setting.call.problem, setting.call.operands.map(lambda _, x: x), setting.along())
    assert len(together) == len(alone) + 2
    for a, b in zip(alone, together, strict=False):
        np.testing.assert_array_equal(a, b)
