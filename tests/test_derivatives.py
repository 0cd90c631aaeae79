"""Derivatives along tangents and of second order, against those of a dense attention in float64."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jax_fa
from jax_fa.testing import derivatives
from jax_fa.testing.cases import BY_NAME, CASES, FEATURES, REAL_TILES, Case, expected

# --- the table

# A tangent of logits of some hundreds exceeds 16 bits: the naive implementation, which is the measure, overflows.
_SECOND = tuple(case for case in CASES if not (case.spread >= 500 and case.dtype in ("bfloat16", "float16")))
# Second order takes several programs a case: by default, what the others do not have.
_FEW = tuple(case if case in FEATURES else pytest.param(case, marks=pytest.mark.slow) for case in _SECOND)


def _directions(case: Case) -> dict[str, Any]:
    """As the case stores its operands: x, its tangents, the cotangents z, and theirs."""
    z, z_tangent = case.cotangents(), derivatives.cotangent_tangents(case)
    return {
        "x": case.stored_operands(),
        "x_tangent": derivatives.stored(case, derivatives.tangents(case)),
        "y_tangent": derivatives.stored(case, derivatives.tangents(case, "other tangents")),
        "z": (case.stored(z[0]), z[1]),
        "z_tangent": (case.stored(z_tangent[0]), z_tangent[1]),
    }


def _gradients(attend, x, z):
    return jax.vjp(attend, x)[1](z)[0]


def _tangent(attend, x, x_tangent):
    return jax.jvp(attend, (x,), (x_tangent,))[1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tangent(case, backend):
    """jax.jvp of the output and the log-sum-exp."""
    attend = partial(case.flash_attention, implementation=backend)
    with case.context():
        at = _directions(case)
        run = jax.jit(lambda x, t: jax.jvp(attend, (x,), (t,)))
        _, found = run(at["x"], at["x_tangent"])
    derivatives.check(case, "tangent", found)
    _check_masked_rows(case, found)


def _check_masked_rows(case: Case, found) -> None:
    """0 exactly."""
    if case.mask is not None:
        masked = ~np.broadcast_to(case.visible(), case.full).any(axis=-1)
        assert not case.canonical(found[0])[np.moveaxis(masked, -1, -2)].any()
        assert not np.asarray(found[1])[masked].any()


@pytest.mark.parametrize("case", _FEW, ids=str)
def test_second_order(case, backend):
    """Each way to a second derivative: reverse over reverse, forward over reverse, reverse over forward, forward twice."""
    attend = partial(case.flash_attention, implementation=backend)
    tangent, gradients = partial(_tangent, attend), partial(_gradients, attend)

    def run(x, x_tangent, y_tangent, z, z_tangent):
        _, pullback = jax.vjp(gradients, x, z)
        of_operands, of_cotangents = pullback(x_tangent)
        _, pullback = jax.vjp(tangent, x, x_tangent)
        return {
            "second": of_operands,
            "tangent": of_cotangents,
            "mixed": jax.jvp(gradients, (x, z), (x_tangent, z_tangent))[1],
            "reverse over forward": pullback(z)[0],
            "second_tangent": jax.jvp(lambda x: tangent(x, x_tangent), (x,), (y_tangent,))[1],
        }

    with case.context():
        found = jax.jit(run)(**_directions(case))
    # <z, tangent> and <x', gradients> are one function: their gradients are the same.
    derivatives.check(case, "second", found.pop("reverse over forward"))
    for what, x in found.items():
        derivatives.check(case, what, x)
    _check_masked_rows(case, found["second_tangent"])


@pytest.mark.parametrize("case", [c for c in REAL_TILES if c.dtype == "float32"], ids=str)
def test_with_the_tiles_of_the_library(case, backend, real_tiles):
    attend = partial(case.flash_attention, implementation=backend)

    def run(x, x_tangent, y_tangent, z, z_tangent):
        still = jax.tree.map(jnp.zeros_like, z)
        return {
            "tangent": _tangent(attend, x, x_tangent),
            "second": jax.jvp(partial(_gradients, attend), (x, z), (x_tangent, still))[1],
        }

    for what, found in jax.jit(run)(**_directions(case)).items():
        derivatives.check(case, what, found)


# --- what the oracle is worth


@pytest.mark.parametrize("case", [BY_NAME["everything"], BY_NAME["mask-lengths"]], ids=str)
def test_the_oracle_itself(case):
    """Its derivatives are the central differences of its results, and its results those of the other oracle."""
    with jax.enable_x64(True):
        at = derivatives.directions(case, "float64")
        attend = jax.jit(partial(derivatives.attention, constants=derivatives.constants(case, "float64")))

        def gradients(x, z):
            return jax.jit(partial(_gradients, attend))(x, z)

        def difference(function, points, tangents):
            """Along the tangents."""
            h = 2e-6
            up, down = (
                function(*jax.tree.map(lambda x, t, h=h: x + h * t, points, tangents)) for h in (h, -h)
            )
            return jax.tree.map(lambda a, b: (a - b) / (2 * h), up, down)

        still = jax.tree.map(np.zeros_like, at.z)
        want = derivatives.Derivatives(
            tangent=difference(attend, (at.x,), (at.x_tangent,)),
            second=difference(gradients, (at.x, at.z), (at.x_tangent, still)),
            mixed=difference(gradients, (at.x, at.z), (at.x_tangent, at.z_tangent)),
            second_tangent=difference(
                jax.jit(lambda x: _tangent(attend, x, at.x_tangent)), (at.x,), (at.y_tangent,)
            ),
        )
        found = derivatives.dense_derivatives(case, "float64")
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), found, want)
        results, first = (
            derivatives.of_case(case, attend(at.x)),
            derivatives.of_case(case, gradients(at.x, at.z)),
        )
    oracle, want_first = expected(case)
    np.testing.assert_allclose(results.out, oracle.out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(results.lse, oracle.lse, rtol=1e-12, atol=1e-12)
    for name, x in first.items():
        np.testing.assert_allclose(x, want_first[name], rtol=1e-10, atol=1e-10)


# --- finite differences


def _in_float64() -> list:
    """The rows of the table that differ in float64."""
    # Peaked rows are no rows of finite differences.
    kept = {
        replace(c, name="", dtype="float64", bias_dtype=None, feature=True): c for c in CASES if c.spread == 1
    }
    few = ("everything", "soft-cap", "mask-segments_mixed")
    return [
        pytest.param(
            replace(c, name=case.name), id=case.name, marks=() if case.name in few else pytest.mark.slow
        )
        for c, case in kept.items()
    ]


@pytest.mark.parametrize("case", _in_float64())
def test_finite_differences(case):
    """Both modes over both modes, on the portable backend."""
    with case.context():
        x = jax.tree.map(jnp.asarray, case.stored_operands())
        attend = partial(case.flash_attention, implementation="xla")
        check_grads(attend, (x,), order=2, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4)


def test_traced_scalars(backend):
    """Scale and soft cap that are data have derivatives, too."""
    case = BY_NAME["soft-cap"]
    x, dense = case.operands(), derivatives.directions(case, "float64")
    scalars, direction = {"scale": 0.3, "soft_cap": 1.7}, {"scale": 0.2, "soft_cap": -0.4}
    z = case.cotangents()

    def attend(x):
        x = dict(x)
        cap = x.pop("soft_cap")
        return jax_fa.flash_attention(
            **x, mask=case.library_mask(), logits_soft_cap=cap, implementation=backend, return_logsumexp=True
        )

    def run(attend, x, t, z):
        still = jax.tree.map(jnp.zeros_like, z)
        return {
            "tangent": _tangent(attend, x, t),
            "second": jax.jvp(partial(_gradients, attend), (x, z), (t, still))[1],
        }

    found = jax.jit(partial(run, attend))(x | scalars, derivatives.tangents(case) | direction, z)
    with jax.enable_x64(True):
        attend = partial(derivatives.attention, constants=derivatives.constants(case, "float64"))
        want = jax.jit(partial(run, attend))(dense.x | scalars, dense.x_tangent | direction, dense.z)
        want_of_case = {name: derivatives.of_case(case, x) for name, x in want.items()}
    for a, b in zip(found["tangent"], want_of_case["tangent"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    for name, b in want_of_case["second"].items():
        np.testing.assert_allclose(found["second"][name], b, rtol=1e-4, atol=1e-4, err_msg=name)


# --- transformations, against those of jax.nn


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


B, S, N, D = 2, 5, 2, 3
X = {"q": _normal(B, S, N, D), "kv": _normal(B, S, 1, D)}
T = jax.tree.map(lambda x: np.roll(x, 1), X)


def _attend(attention, x):
    """A function of two arrays, smooth and of all their elements."""
    return jnp.sin(attention(x["q"], x["kv"], jnp.cos(x["kv"]), is_causal=True))


def _loss(f, x):
    return jnp.sum(f(x) ** 2)


def _penalty(f, x):
    return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(partial(_loss, f))(x)))


# By name: (function, x, tangents) -> results.
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, x, t: jax.jvp(f, (x,), (t,)),
    "linearize": lambda f, x, t: jax.linearize(f, x)[1](t),
    "vjp": lambda f, x, t: jax.vjp(f, x)[1](f(t)),
    "jacfwd": lambda f, x, t: jax.jacfwd(f)(x),
    "jacrev": lambda f, x, t: jax.jacrev(f)(x),
    "hessian": lambda f, x, t: jax.hessian(partial(_loss, f))(x),
    "jvp of jvp": lambda f, x, t: jax.jvp(lambda x: jax.jvp(f, (x,), (t,))[1], (x,), (t,)),
    "jvp of grad": lambda f, x, t: jax.jvp(jax.grad(partial(_loss, f)), (x,), (t,)),
    "grad of jvp": lambda f, x, t: jax.grad(lambda x: jnp.sum(jax.jvp(f, (x,), (t,))[1] ** 2))(x),
    "grad of grad": lambda f, x, t: jax.grad(partial(_penalty, f))(x),
    "linearize of grad": lambda f, x, t: jax.linearize(jax.grad(partial(_loss, f)), x)[1](t),
}
KEEP = jax.checkpoint_policies.save_only_these_names(jax_fa.OUT_NAME, jax_fa.STATS_NAME)


def _twice(f, x):
    """A scan over two layers."""
    return jax.lax.scan(lambda x, _: (x | {"q": f(x)}, None), x, None, length=2)[0]["q"]


def _on_two_devices(f, x):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])
    return jax.shard_map(f, mesh=mesh, in_specs=P("x"), out_specs=P("x"))(x)


def _shared_keys(f, x):
    """Every device has queries of its own and all keys, which collect the derivatives of all devices."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])
    specs = {"q": P(None, None, "x"), "kv": P()}
    return jax.shard_map(f, mesh=mesh, in_specs=(specs,), out_specs=specs["q"])(x)


# By name: what a transformation is taken of, and what is taken of it.
PLACES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "jit": (lambda f, x: f(x), jax.jit),
    "eager": (lambda f, x: f(x), lambda run: run),
    "vmap": (
        lambda f, x: f(jax.tree.map(lambda a: a[None], x))[0],
        lambda run: jax.jit(jax.vmap(run, in_axes=({"q": 0, "kv": 0}, 0))),
    ),
    "vmap-shared": (
        lambda f, x: f(jax.tree.map(lambda a: a[None], x))[0],
        lambda run: jax.jit(jax.vmap(run, in_axes=({"q": 0, "kv": None}, {"q": None, "kv": 0}))),
    ),
    "scan": (_twice, jax.jit),
    "remat": (lambda f, x: jax.checkpoint(f)(x), jax.jit),
    "remat-keep": (lambda f, x: jax.checkpoint(f, policy=KEEP)(x), jax.jit),
    "shard_map": (_on_two_devices, jax.jit),
    "shard_map-shared": (_shared_keys, jax.jit),
}
# One backend has kernels of its own and one has not: the rules do not differ between those of a kind.
_COSTLY = {("xla", place) for place in PLACES if place not in ("jit", "vmap-shared", "shard_map-shared")}


@cache
def _by_jax_nn(place: str) -> dict[str, Any]:
    """Every transformation of jax.nn; a place has no effect on numbers but by what it computes."""
    of, taken = PLACES[place] if place in ("vmap", "vmap-shared", "scan") else PLACES["jit"]
    run = partial(of, partial(_attend, jax.nn.dot_product_attention))
    x, t = _arguments(place)
    return taken(lambda x, t: {name: transform(run, x, t) for name, transform in TRANSFORMS.items()})(x, t)


def _arguments(place: str):
    """One example each where vmap does not map."""
    if place != "vmap-shared":
        return X, T
    return X | {"kv": X["kv"][0]}, T | {"q": T["q"][0]}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformation(name, place, backend):
    of, taken = PLACES[place]
    attention = partial(jax_fa.dot_product_attention, implementation=backend)
    run = partial(of, partial(_attend, attention))
    found = taken(partial(TRANSFORMS[name], run))(*_arguments(place))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), found, _by_jax_nn(place)[name])
