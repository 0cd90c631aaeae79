"""The second derivative of the native CPU backend, against dense float64 JAX."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa.backends import native
from jax_fa.backends.cpu import backend
from jax_fa.call import DIFFERENTIABLE, STORED, Call, Operands, Problem, Saved, has_rounding
from jax_fa.testing import oracle
from jax_fa.testing.cases import BY_NAME, FEATURES, Case

if native.missing is not None:
    pytest.skip(f"needs the native extension: {native.missing}", allow_module_level=True)
if jax.default_backend() != "cpu":
    pytest.skip("needs CPU devices by default", allow_module_level=True)

ISA = "JAX_FA_CPU_ISA"
ALL = (*DIFFERENTIABLE, "dout", "dlogsumexp")  # what may move, and what has a gradient


def call_of(case: Case) -> Call:
    request = jax_fa.flash_attention.request(
        **case.stored_operands(),
        **case.arrays(),
        scale=case.scale,
        logits_soft_cap=case.soft_cap,
        dropout_rate=case.dropout,
        layout=case.layout,
        return_logsumexp=True,
        implementation="cpu",
    )
    return request.call


# --- the reference


def _stored_back(problem: Problem, name: str, x):
    return x.transpose(problem.axes(name)) if name in (*STORED, "dout") else x


def dense(call: Call, visible, keep, x: dict[str, Any]) -> tuple[Any, Any]:
    """(out, log-sum-exp), out as stored, of the differentiable operands, in their dtype."""
    problem, ops, d = call.problem, call.operands, call.dims
    acc = x["query"].dtype
    q, k, v = (x[name].transpose(problem.axes(name)) for name in STORED)
    group = (*q.shape[:-2], d.K, d.G, d.D)
    s = jnp.einsum("...ikgd,...jkd->...kgij", q.reshape(group), k)
    s = s.reshape(*s.shape[:-4], d.N, d.Sq, d.Skv)
    s = s * (x["scale"][..., None, None] if "scale" in x else problem.scale)
    if "bias" in x:
        bias = x["bias"]
        if ops.bias_offset is not None:
            at = np.asarray(ops.bias_offset)[..., None] + np.arange(d.Skv)
            full = np.broadcast_shapes(bias.shape[:-1], at.shape[:-2])
            at = np.clip(np.broadcast_to(at, (*full, *at.shape[-2:])), 0, bias.shape[-1] - 1)
            bias = jnp.broadcast_to(bias[..., None, :], (*full, 1, bias.shape[-1]))
            bias = jnp.take_along_axis(bias, at, axis=-1)
        s = s + bias
    if "alibi_slopes" in x:
        row = np.arange(d.Sq) if ops.position is None else np.asarray(ops.position)
        away = np.abs(np.arange(d.Skv) - row[..., None]).astype(acc)
        s = s - x["alibi_slopes"][..., None] * (np.sqrt(away) if problem.alibi == "sqrt" else away)
    cap = x["soft_cap"][..., None, None] if "soft_cap" in x else problem.logits_soft_cap
    if cap is not None:
        s = cap * jnp.tanh(s / cap)
    s = jnp.where(visible, s, -1e30)
    m = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True, initial=-1e30))
    p = jnp.where(visible, jnp.exp(s - m), 0)
    l = jnp.sum(p, axis=-1, keepdims=True)
    empty = l == 0
    l = jnp.where(empty, 1, l)
    w = p / l * keep.astype(acc)
    out = jnp.einsum("...kgij,...jkd->...ikgd", w.reshape(*w.shape[:-3], d.K, d.G, d.Sq, d.Skv), v)
    lse = jnp.where(empty, -oracle.FLT_MAX, m + jnp.log(l))[..., 0]
    return out.reshape(*out.shape[:-3], d.N, d.Dv).transpose(np.argsort(problem.out_axes)), lse


def _second(call: Call, visible, keep, x, cotangents, dx, dcotangents) -> dict[str, Any]:
    """The derivative of the gradients along (dx, dcotangents); and the tangents of out and log-sum-exp."""
    function = partial(dense, call, visible, keep)

    def gradients(x, cotangents):
        return jax.vjp(function, x)[1](cotangents)[0]

    _, found = jax.jvp(gradients, (x, cotangents), (dx, dcotangents))
    _, (dout, dlse) = jax.jvp(function, (x,), (dx,))
    return {**found, "dout": dout, "dlogsumexp": dlse}


class Setting:
    """A call with cotangents, and tangents of everything."""

    def __init__(self, call: Call, visible, keep, seed: int = 0) -> None:
        self.call = replace(call, problem=replace(call.problem, saves_rounding=has_rounding(call.dtype)))
        self.visible = np.broadcast_to(True if visible is None else visible, self.pairs)
        self.keep = np.broadcast_to(1.0 if keep is None else keep, self.pairs)
        random = np.random.default_rng(seed)

        def normal(shape, dtype):
            return jnp.asarray(random.standard_normal(shape), dtype)

        given = self.call.operands.present()
        self.x = {name: jnp.asarray(given[name]) for name in DIFFERENTIABLE if name in given}
        self.tangents = {name: normal(a.shape, a.dtype) for name, a in self.x.items()}
        out, stats = call.out_shape, call.stats_shape
        self.cotangents = {"dout": normal(out, call.dtype), "dlogsumexp": normal(stats, jnp.float32)}
        self.tangents |= {"dout": normal(out, call.dtype), "dlogsumexp": normal(stats, jnp.float32)}

    @property
    def pairs(self) -> tuple[int, ...]:
        d = self.call.dims
        return (*d.B, d.N, d.Sq, d.Skv)

    def reference(self, moving=ALL, dtype: Any = np.float64) -> dict[str, np.ndarray]:
        def wide(arrays, zero=False):
            cast = {name: np.asarray(a).astype(dtype) for name, a in arrays.items()}
            return {name: a * (name in moving or not zero) for name, a in cast.items()}

        names = ("dout", "dlogsumexp")
        with jax.enable_x64(True):
            tangents = wide(self.tangents, zero=True)
            dcotangents = tuple(tangents.pop(name) for name in names)
            cotangents = tuple(wide(self.cotangents)[name] for name in names)
            run = jax.jit(partial(_second, self.call, self.visible, self.keep))
            return jax.tree.map(np.asarray, run(wide(self.x), cotangents, tangents, dcotangents))

    def native(self, moving=ALL, wanted=None, **changes: Any) -> dict[str, np.ndarray]:
        """`changes`: other operands, cotangents ("dout"), or tangents ("query_tangent")."""
        call = self.call.replace(problem=replace(self.call.problem, gradients=wanted))
        x, cotangents, tangents = dict(self.x), dict(self.cotangents), dict(self.tangents)
        for name, a in changes.items():
            if name.endswith("_tangent"):
                tangents[name.removesuffix("_tangent")] = a
            else:
                (cotangents if name in cotangents else x)[name] = a
        tangents = {name: a for name, a in tangents.items() if name in moving}
        return jax.tree.map(np.asarray, _run(call.problem, replace(call.operands, **x), cotangents, tangents))


@partial(jax.jit, static_argnums=0)
def _run(problem: Problem, operands: Operands, cotangents, tangents) -> dict[str, Any]:
    out, m, l, *rounding = backend.forward(Call.of(problem, operands))
    tangents = dict(tangents)
    saved = Saved(
        out=out,
        m=m,
        l=l,
        rounding=rounding[0] if rounding else None,
        **cotangents,
        dout_tangent=tangents.pop("dout", None),
        dlogsumexp_tangent=tangents.pop("dlogsumexp", None),
    )
    along = Operands(**tangents)
    call = Call.of(problem, operands, saved, along)
    gradients, dout, dlse = backend.second(call, along, saved)
    found = {**gradients.present(), "dout": dout, "dlogsumexp": dlse}
    return {name: a for name, a in found.items() if a is not None}


def check(setting: Setting, moving=ALL) -> None:
    want, naive, ours = (
        setting.reference(moving),
        setting.reference(moving, np.float32),
        setting.native(moving),
    )
    assert sorted(ours) == sorted(want)
    for name, x in ours.items():
        assert x.dtype == (setting.x | setting.cotangents)[name].dtype
        floor, norm = oracle.FLOOR[str(setting.call.dtype)], np.linalg.norm(want[name])
        # Where all but rounding cancels, the reference has nothing to be relative to.
        if norm < 1e-9:
            assert np.linalg.norm(x.astype(np.float64)) <= 1e-3, name
            continue
        plain = naive[name].astype(x.dtype)
        for error, allowed in zip(
            oracle.errors(x, want[name]), oracle.errors(plain, want[name]), strict=True
        ):
            assert error <= 2 * allowed + floor, (
                f"{name}: {error:.3g}, naive {allowed:.3g}, floor {floor:.3g}"
            )


@cache
def setting_of(case: Case) -> Setting:
    keep = case.keep()
    return Setting(call_of(case), case.visible(), None if keep is None else keep / case.keep_prob)


@pytest.mark.parametrize("case", [c for c in FEATURES if c.dtype != "float64"], ids=str)
def test_every_tangent(case):
    check(setting_of(case))


# --- parts: tangents that are absent, gradients that are not wanted

EVERYTHING = BY_NAME["everything"]
_MOVING = (
    *((name,) for name in ALL if name not in ("scale", "soft_cap")),
    ("query", "key", "value"),
    ("dout", "bias"),
)


@cache
def heads() -> Setting:
    """A scale and a soft cap of each head, as data; slopes of each row; dropout."""
    case = replace(EVERYTHING, name="second-heads", bias="BNQK")
    whole = setting_of(case)
    call, random = whole.call, np.random.default_rng(3)
    slopes = jnp.asarray(np.abs(random.standard_normal((1, case.N, case.Sq))) / 8, jnp.float32)
    operands = replace(
        call.operands,
        alibi_slopes=slopes,
        scale=jnp.asarray([[0.3, -0.2, 0.0, 0.5]], jnp.float32),
        soft_cap=jnp.asarray([[2.0], [5.0]], jnp.float32),
    )
    problem = replace(call.problem, scale=1.0, logits_soft_cap=None)
    return Setting(Call.of(problem, operands), whole.visible, whole.keep)


@cache
def indexed() -> Setting:
    """A bias by relative position, one for all batch entries."""
    case = replace(EVERYTHING, name="second-indexed", bias=None, slopes=None, dropout=0.0, mask="causal")
    whole, random = setting_of(case), np.random.default_rng(4)
    call = whole.call
    operands = replace(
        call.operands,
        bias=jnp.asarray(random.standard_normal((1, case.N, case.Sq + case.Skv)), jnp.float32),
        bias_offset=jnp.asarray(case.Sq - np.arange(case.Sq), jnp.int32)[None, None],
    )
    return Setting(Call.of(call.problem, operands), whole.visible, None)


@pytest.mark.parametrize("moving", [(name,) for name in ALL] + [ALL], ids="-".join)
def test_heads(moving):
    check(heads(), moving)


@pytest.mark.parametrize("moving", [("bias",), ALL], ids="-".join)
def test_indexed_bias(moving):
    check(indexed(), moving)


@pytest.mark.parametrize("moving", _MOVING, ids="-".join)
@pytest.mark.parametrize("name", ["mqa", "float16-layout", "mask-dense"])
def test_tangents_of_some(name, moving):
    setting = setting_of(BY_NAME[name])
    if not any(x in setting.tangents for x in moving):
        pytest.skip("without such an operand")
    check(setting, moving)


@pytest.mark.parametrize("moving", [ALL, ("query", "key"), ("value",), ("dout",)], ids="-".join)
def test_gradients_of_some(moving):
    """One gradient alone has the bits it has among all."""
    setting = heads()
    everything = setting.native(moving)
    for name in ALL:
        alone = setting.native(moving, wanted=(name,))
        assert list(alone) == [name]
        np.testing.assert_array_equal(alone[name], everything[name], err_msg=name)


def test_no_tangent():
    """Without a tangent every derivative is 0."""
    for name, x in heads().native(()).items():
        assert not x.any(), name


def test_it_is_symmetric():
    """<y, H x> == <x, H y> for tangents x and y of all operands and cotangents."""
    setting, random = heads(), np.random.default_rng(5)
    other = {
        name: jnp.asarray(random.standard_normal(a.shape), a.dtype) for name, a in setting.tangents.items()
    }

    def product(tangents, results):
        return sum(
            np.vdot(np.asarray(tangents[name], np.float64), np.asarray(a, np.float64))
            for name, a in results.items()
        )

    along = setting.native(**{f"{name}_tangent": a for name, a in other.items()})
    left, right = product(other, setting.native()), product(setting.tangents, along)
    assert abs(left - right) <= 1e-4 * abs(left)


def test_batch_dims_that_broadcast():
    """Tangents with a batch that their operands have not, and the other way round."""
    case = replace(BY_NAME["mqa"], name="second-batch", B=(3,))
    setting, wide = setting_of(case), replace(case.__class__(name="x"), name="second-narrow")
    assert wide.name != case.name
    call = setting.call
    one = {name: x[:1] for name, x in setting.x.items()}
    problem = replace(call.problem, mapped=1)
    full = {name: jnp.broadcast_to(a, setting.x[name].shape) for name, a in one.items()}
    results = []
    for operands, mapped in ((one, 1), (full, 0)):
        narrow = Setting.__new__(Setting)
        narrow.__dict__.update(setting.__dict__)
        narrow.call = replace(
            call, problem=replace(problem, mapped=mapped), operands=replace(call.operands, **operands)
        )
        narrow.x = operands
        results.append(narrow.native())
    for name, x in results[0].items():
        np.testing.assert_array_equal(x, results[1][name], err_msg=name)


# --- blocks, instruction sets, threads

BLOCKS = Case(name="second-blocks", B=(1,), Sq=403, Skv=530, N=2, K=1, D=64, Dv=64, mask="causal_bottom")
SPREAD = (
    BLOCKS,
    *(BY_NAME[name] for name in ("mqa", "wide-values", "everything-BNSD", "mask-dense", "mask-nothing")),
    *(BY_NAME[name] for name in ("bfloat16-everything", "float16-causal", "narrow-values", "lengths-61-67")),
)
SETS = [isa for isa, there in native.extension.instruction_sets().items() if there]


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("case", SPREAD, ids=str)
def test_every_instruction_set(case, isa, monkeypatch):
    monkeypatch.setenv(ISA, isa)
    check(setting_of(case))


@pytest.mark.parametrize("bias", ["1NQK", "11QK", "1N1K", "11Q1"])
def test_blocks_with_a_bias(bias):
    """Its gradient is a sum over rows, keys or heads, which parts of the work share."""
    check(setting_of(replace(BLOCKS, name=f"second-blocks-{bias}", bias=bias, N=4, K=2, D=16, Dv=16)))


@pytest.mark.parametrize("mask", [None, "causal_bottom", "window_bottom"])
def test_keys_that_are_too_many_to_keep(mask):
    """The second pass computes again what does not fit, but where the mask leaves few keys to a block of rows."""
    case = Case(
        name=f"second-long-{mask}", B=(1,), Sq=130, Skv=13000, N=1, K=1, D=8, Dv=8, mask=mask, slopes="N"
    )
    check(setting_of(case))
