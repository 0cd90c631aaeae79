"""The second derivative of the native CPU backend, against dense float64 JAX."""

from dataclasses import dataclass, replace
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
from jax_fa.testing.cases import BY_NAME, FEATURES, Case

if native.missing is not None:
    pytest.skip(f"needs the native extension: {native.missing}", allow_module_level=True)
if jax.default_backend() != "cpu":
    pytest.skip("needs CPU devices by default", allow_module_level=True)

ISA = "JAX_FA_CPU_ISA"
ALL = (*PLAIN_DIFFERENTIABLE, "dout", "dlogsumexp")  # what may move, and what has a gradient


# --- the reference


@partial(jax.jit, static_argnums=0)
def _second(form: dense.Form, constants, x, cotangents, dx, dcotangents) -> dict[str, Any]:
    """The derivative of the gradients along (dx, dcotangents); and the tangents of out and log-sum-exp."""
    function = partial(dense.of_form, form, constants)

    def gradients(x, cotangents):
        return jax.vjp(function, x)[1](cotangents)[0]

    _, found = jax.jvp(gradients, (x, cotangents), (dx, dcotangents))
    _, (dout, dlse) = jax.jvp(function, (x,), (dx,))
    return {**found, "dout": dout, "dlogsumexp": dlse}


@dataclass(frozen=True, eq=False)
class Setting:
    """A call with cotangents, and tangents of everything."""

    call: Call
    visible: np.ndarray
    keep: np.ndarray  # what a weight is multiplied with
    x: dict[str, Any]
    cotangents: dict[str, Any]
    tangents: dict[str, Any]

    @classmethod
    def of(cls, call: Call, visible=None, keep=None) -> "Setting":
        call = replace(call, problem=replace(call.problem, saves_rounding=has_rounding(call.dtype)))
        d, random = call.dims, np.random.default_rng(0)
        pairs = (*d.B, d.N, d.Sq, d.Skv)

        def normal(shape, dtype):
            return jnp.asarray(random.standard_normal(shape), dtype)

        given = call.operands.present()
        x = {name: jnp.asarray(given[name]) for name in PLAIN_DIFFERENTIABLE if name in given}
        likes = {"dout": (call.out_shape, call.dtype), "dlogsumexp": (call.stats_shape, jnp.float32)}
        return cls(
            call,
            np.broadcast_to(True if visible is None else visible, pairs),
            np.broadcast_to(1.0 if keep is None else keep, pairs),
            x,
            {name: normal(*like) for name, like in likes.items()},
            {name: normal(a.shape, a.dtype) for name, a in x.items()}
            | {n: normal(*like) for n, like in likes.items()},
        )

    @cache  # noqa: B019 - there are few, and every instruction set is held against the same
    def reference(self, moving=ALL, dtype: Any = np.float64) -> dict[str, np.ndarray]:
        def wide(arrays, zero=False):
            cast = {name: np.asarray(a).astype(dtype) for name, a in arrays.items()}
            return {name: a * (name in moving or not zero) for name, a in cast.items()}

        names = ("dout", "dlogsumexp")
        with jax.enable_x64(True):
            tangents = wide(self.tangents, zero=True)
            dcotangents = tuple(tangents.pop(name) for name in names)
            cotangents = tuple(wide(self.cotangents)[name] for name in names)
            given = dense.Form.of(self.call), dense.constants(self.call, self.visible, self.keep)
            return jax.tree.map(np.asarray, _second(*given, wide(self.x), cotangents, tangents, dcotangents))

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
    return Setting.of(
        dense.call_of(case, "cpu"), case.visible(), None if keep is None else keep / case.keep_prob
    )


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", [c for c in FEATURES if c.dtype != "float64"], ids=str)
def test_every_tangent(case):
    check(setting_of(case))


# --- parts: tangents that are absent, gradients that are not wanted

EVERYTHING = BY_NAME["everything"]
_MOVING = (*((name,) for name in ("query", "key", "value", "dout", "dlogsumexp")), ("query", "key", "value"))


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
    return Setting.of(Call.of(problem, operands), whole.visible, whole.keep)


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
    return Setting.of(Call.of(call.problem, operands), whole.visible, None)


@pytest.mark.parametrize("moving", [(name,) for name in ALL] + [ALL], ids="-".join)
def test_heads(moving):
    check(heads(), moving)


@pytest.mark.parametrize("moving", [("bias",), ALL], ids="-".join)
def test_indexed_bias(moving):
    check(indexed(), moving)


@pytest.mark.parametrize("moving", _MOVING, ids="-".join)
@pytest.mark.parametrize("name", ["mqa", "float16-layout", "mask-dense"])
def test_tangents_of_some(name, moving):
    check(setting_of(BY_NAME[name]), moving)


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
    """Operands that have one batch entry where their tangents have more."""
    setting = setting_of(replace(BY_NAME["mqa"], name="second-batch", B=(3,)))
    one = {name: x[:1] for name, x in setting.x.items()}
    full = {name: jnp.broadcast_to(x, setting.x[name].shape) for name, x in one.items()}
    found = []
    for operands, mapped in ((one, 1), (full, 0)):
        problem = replace(setting.call.problem, mapped=mapped)
        found.append(replace(setting, call=replace(setting.call, problem=problem)).native(**operands))
    for name, x in found[0].items():
        np.testing.assert_array_equal(x, found[1][name], err_msg=name)


# --- blocks, instruction sets, threads

BLOCKS = Case(name="second-blocks", B=(1,), Sq=403, Skv=530, N=2, K=1, D=64, Dv=64, mask="causal_bottom")
SPREAD = (
    BLOCKS,
    *(BY_NAME[name] for name in ("mqa", "wide-values", "everything-BNSD", "mask-dense", "mask-nothing")),
    *(BY_NAME[name] for name in ("bfloat16-everything", "float16-causal", "narrow-values", "lengths-61-67")),
)
SETS = [isa for isa, there in native.extension.instruction_sets().items() if there]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("case", SPREAD, ids=str)
def test_every_instruction_set(case, isa, monkeypatch):
    monkeypatch.setenv(ISA, isa)
    check(setting_of(case))


@pytest.mark.one_in(2)
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


# --- NaN and infinity

MASKS = ("lengths", "causal", "window", "segments_causal", "dense", "dense_padding", "cumulative")


@cache
def _masked(mask: str, dtype: str = "float32") -> Setting:
    return setting_of(Case(name=f"second-nan-{mask}", mask=mask, bias="BNQK", dtype=dtype))


def _seen(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Rows `B N Sq` that see a key, and keys `B K Skv` that a row sees."""
    d = setting.call.dims
    group = setting.visible.reshape(*d.B, d.K, -1, d.Sq, d.Skv)
    return setting.visible.any(axis=-1), group.any(axis=(-3, -2))


@pytest.mark.parametrize("garbage", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize(
    ("mask", "dtype"), [*((mask, "float32") for mask in MASKS), ("causal", "bfloat16"), ("dense", "float16")]
)
def test_what_is_masked_does_not_leak(mask, dtype, garbage):
    """Garbage in rows and keys that nothing sees, and in the bias where it is masked, changes no bit."""
    setting = _masked(mask, dtype)
    rows, keys = _seen(setting)
    hidden = {"bias": ~setting.visible, "dlogsumexp": ~rows}
    hidden |= {name: ~np.moveaxis(rows, -1, -2)[..., None] for name in ("query", "dout")}
    hidden |= {name: ~np.moveaxis(keys, -1, -2)[..., None] for name in ("key", "value")}

    def results(filling):
        def fill(arrays, suffix=""):
            return {
                name + suffix: jnp.where(hidden[name], jnp.asarray(filling, a.dtype), a)
                for name, a in arrays.items()
            }

        return setting.native(
            **fill(setting.x), **fill(setting.cotangents), **fill(setting.tangents, "_tangent")
        )

    clean, dirty = results(0.0), results(garbage)
    for name, a in clean.items():
        assert np.isfinite(a.astype(np.float32)).all(), name
        np.testing.assert_array_equal(dirty[name], a, err_msg=name)
        assert not dirty[name][np.broadcast_to(hidden[name], a.shape)].any(), name


_WHERE = ("query", "key", "value", "dout", "dlogsumexp", "bias")


@pytest.mark.parametrize("where", [*_WHERE, *(f"{name}_tangent" for name in _WHERE)])
@pytest.mark.parametrize("mask", ["causal", "dense"])
def test_what_is_visible_shows(mask, where):
    """A NaN turns those rows into NaN that see it, and what they give to keys, and changes no bit of others."""
    setting, d = _masked(mask), _masked(mask).call.dims
    name, b, at, head = where.removesuffix("_tangent"), 1, 20, 1
    array = (setting.tangents if name != where else setting.x | setting.cotangents)[name]
    rows = np.zeros((*d.B, d.N, d.Sq), bool)
    if name in ("key", "value"):
        place, group = (b, at, head, 2), slice(head * d.G, (head + 1) * d.G)
        rows[b, group] = setting.visible[b, group, :, at]
    else:
        key = int(np.argmax(setting.visible[b, head, at]))
        place = {"bias": (b, head, at, key), "dlogsumexp": (b, head, at)}.get(name, (b, at, head, 2))
        rows[b, head, at] = True
    assert setting.visible[rows].any() and not rows.all()
    clean, dirty = setting.native(), setting.native(**{where: array.at[place].set(np.nan)})
    pairs = rows[..., None] & setting.visible
    keys = pairs.reshape(*d.B, d.K, -1, d.Skv).any(axis=-2)
    of_rows, of_keys = np.moveaxis(rows, -1, -2), np.moveaxis(keys, -1, -2)
    touched = {
        "query": of_rows,
        "dout": of_rows,
        "dlogsumexp": rows,
        "key": of_keys,
        "value": of_keys,
        "bias": pairs,
    }
    for result, there in touched.items():
        np.testing.assert_array_equal(dirty[result][~there], clean[result][~there], err_msg=result)
    # What a cotangent or its tangent does not enter by the formulas may stay as it is.
    linear = name == "dlogsumexp" or where == "dout_tangent"
    for result in ("query", "key", "bias", *(() if linear else ("dout",))):
        assert np.isnan(dirty[result][touched[result]]).all(), result
