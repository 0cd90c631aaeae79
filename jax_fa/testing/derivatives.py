"""What the tests hold derivatives of every order against: those that JAX takes of a dense attention, in float64.

The attention is written for one padded form (`_dense`), into which every case goes, so that one program serves nearly all
of them. Padding is masked, and what broadcasts in a case is full there: its derivatives are summed afterwards.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa.testing import oracle
from jax_fa.testing.cases import Case

Arrays = dict[str, Any]  # by the names of operands
_LENGTH, _WIDTH = 72, 16  # lengths and head dims are padded to multiples of these


class Results(NamedTuple):
    """The results of attention, or their cotangents or tangents."""

    out: Any
    lse: Any


class Derivatives(NamedTuple):
    """Of a case, for `tangents` x' and y' of its operands, cotangents z of its results, and a tangent z' of those.

    The gradients are those of <z, results>.
    """

    tangent: Results  # of the results, along x'
    second: Arrays  # the tangent of the gradients along x': also the gradient of <x', gradients>, and of <z, tangent>
    mixed: Arrays  # the tangent of the gradients along (x', z')
    second_tangent: Results  # the tangent along y' of the tangent along x'


# --- the points and directions of a case


@cache
def tangents(case: Case, salt: str = "tangents") -> Arrays:
    """A tangent of each differentiable operand, canonical, in its dtype."""
    normal = case.random(salt).standard_normal
    return {name: case.cast(normal(x.shape), str(x.dtype)) for name, x in case.operands().items()}


@cache
def cotangent_tangents(case: Case) -> Results:
    """Tangents of `case.cotangents()`."""
    normal = case.random("cotangent tangents").standard_normal
    return Results(*(case.cast(normal(x.shape), str(x.dtype)) for x in case.cotangents()))


def stored(case: Case, arrays: Arrays) -> Arrays:
    """As the case stores its operands."""
    return {name: case.stored(x) if name in _STORED else x for name, x in arrays.items()}


# --- the dense form: every dim padded to a multiple of these

_HEADS, _GROUP, _LENGTH, _WIDTH = 12, 4, 72, 32
_STORED = ("query", "key", "value")
_UNITS = {  # by array: key heads of all batch entries, query heads of each, and the rest
    **dict.fromkeys(("query", "out"), (_HEADS, _GROUP, _LENGTH, _WIDTH)),
    **dict.fromkeys(("key", "value"), (_HEADS, 1, _LENGTH, _WIDTH)),
    "bias": (_HEADS, _GROUP, _LENGTH, _LENGTH),
    "lse": (_HEADS, _GROUP, _LENGTH),
    "alibi_slopes": (_HEADS, _GROUP),
}


def _full(case: Case, name: str) -> tuple[int, ...]:
    """The shape of an array in full, heads before lengths."""
    rest = {
        "query": (case.N, case.Sq, case.D),
        "out": (case.N, case.Sq, case.Dv),
        "key": (case.K, case.Skv, case.D),
        "value": (case.K, case.Skv, case.Dv),
        "bias": (case.N, case.Sq, case.Skv),
        "lse": (case.N, case.Sq),
        "alibi_slopes": (case.N,),
    }
    return (*case.B, *rest[name])


def _heads_first(name: str, x) -> np.ndarray:
    return np.swapaxes(x, -2, -3) if name in (*_STORED, "out") else x


def _grouped(case: Case, name: str) -> tuple[int, ...]:
    heads, *rest = _full(case, name)[len(case.B) :]
    return (math.prod(case.B) * case.K, heads // case.K, *rest)


def _dense(case: Case, name: str, x, dtype: Any) -> np.ndarray:
    x = np.broadcast_to(_heads_first(name, np.asarray(x)), _full(case, name)).reshape(_grouped(case, name))
    pad = [(0, -size % unit if size else unit) for size, unit in zip(x.shape, _UNITS[name], strict=True)]
    return np.pad(x, pad).astype(jnp.dtype(dtype))


def _from_dense(case: Case, name: str, x) -> np.ndarray:
    """The way back; of what broadcasts in the case, the sum."""
    x = np.asarray(x)[tuple(map(slice, _grouped(case, name)))].reshape(_full(case, name))
    x = _heads_first(name, x)
    return np.asarray(_sum_to(x, np.shape(case.operands()[name]))) if name in ("bias", "alibi_slopes") else x


def _sum_to(x, shape: tuple[int, ...]):
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(i for i, size in enumerate(shape) if size == 1), keepdims=True)


def _accumulator(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _dense_operands(case: Case, given: Arrays, dtype: str) -> Arrays:
    """Query, key and value in the dtype, the others in its accumulator's; absent ones are 0."""
    wide = {
        name: _dense(case, name, given.get(name, 0), _accumulator(dtype)) for name in ("bias", "alibi_slopes")
    }
    return {name: _dense(case, name, given[name], dtype) for name in _STORED} | wide


def _dense_results(case: Case, given, dtype: str) -> Results:
    out, lse = given
    return Results(_dense(case, "out", out, dtype), _dense(case, "lse", lse, _accumulator(dtype)))


def _distance(case: Case) -> np.ndarray:
    position = np.broadcast_to(case.position(), (*case.B, case.N, case.Sq))
    return np.abs(np.arange(case.Skv) - position[..., None])


def constants(case: Case, dtype: str) -> Arrays:
    """What `attention` takes besides the operands."""
    acc = _accumulator(dtype)
    visible, keep = case.visible(), case.keep()
    return {
        "visible": _dense(case, "bias", True if visible is None else visible, bool),
        "distance": _dense(case, "bias", _distance(case), acc),
        "kept": _dense(case, "bias", 1 if keep is None else keep / case.keep_prob, acc),
        "scale": np.asarray(case.D**-0.5 if case.scale is None else case.scale, acc),
        "soft_cap": np.asarray(case.soft_cap or 0, acc),
    }


# --- attention, and a naive one of the same dtype


def _as_it_is(x):
    return x


def attention(
    x: Arrays,
    constants: Arrays,
    narrow: Callable[[Any], Any] = _as_it_is,
    narrow_gradient: Callable[[Any], Any] = _as_it_is,
) -> Results:
    """softmax(cap(scale q k^T + bias - slope distance), visible) v, in the dense form; a soft cap of 0 is none.

    The operands may include scale and soft cap. `narrow` rounds the weights for their product as a 16-bit implementation
    does, and with them their derivatives; `narrow_gradient` the derivatives of the logits.
    """
    q, k, v = (x[name] for name in _STORED)
    scalars = constants | x
    scale, cap = scalars["scale"], scalars["soft_cap"]
    visible = constants["visible"]
    s = jnp.einsum("hgid,hxjd->hgij", q, k, preferred_element_type=scale.dtype)
    s = _narrow_derivatives(s, narrow_gradient) * scale
    s = s + x["bias"] - x["alibi_slopes"][..., None, None] * constants["distance"]
    s = jnp.where(cap > 0, cap * jnp.tanh(s / jnp.where(cap > 0, cap, 1)), s)
    s = jnp.where(visible, s, -jnp.inf)
    seen = visible.any(axis=-1)
    m = jax.lax.stop_gradient(jnp.where(seen, jnp.max(s, axis=-1), 0))
    p = jnp.where(visible, jnp.exp(jnp.where(visible, s - m[..., None], 0)), 0)
    l = jnp.where(seen, p.sum(axis=-1), 1)
    weights = narrow(constants["kept"] * p / l[..., None]).astype(v.dtype)
    out = jnp.einsum("hgij,hxjd->hgid", weights, v)
    return Results(out, jnp.where(seen, m + jnp.log(l), -oracle.FLT_MAX))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _narrow_derivatives(s, narrow):
    """s; the gradient enters the products of the backward in the dtype of the inputs, as in jax.nn."""
    return s


@_narrow_derivatives.defjvp
def _(narrow, primals, tangents):
    return primals[0], narrow(tangents[0])


@cache
def _narrow(dtype: str) -> Callable[[Any], Any]:
    if dtype in ("float32", "float64"):
        return _as_it_is
    info = jnp.finfo(dtype)
    # (Its derivative is the same rounding. XLA may keep excess precision through a plain pair of casts.)
    return lambda y: jax.lax.reduce_precision(y, info.nexp, info.nmant)


# --- their derivatives


@dataclass(frozen=True)
class Directions:
    """Where a case is differentiated: see `Derivatives`."""

    x: Arrays
    x_tangent: Arrays
    y_tangent: Arrays
    z: Results
    z_tangent: Results


jax.tree_util.register_dataclass(Directions)


@partial(jax.jit, static_argnums=(2,))
def _derivatives(at: Directions, constants: Arrays, dtype: str) -> Derivatives:
    attend = partial(attention, constants=constants, narrow=_narrow(dtype))
    attend_in_reverse = partial(attend, narrow_gradient=_narrow(dtype))

    def tangent(x):
        return jax.jvp(attend, (x,), (at.x_tangent,))[1]

    def gradients(x, z):
        return jax.vjp(attend_in_reverse, x)[1](z)[0]

    still = jax.tree.map(jnp.zeros_like, at.z)
    return Derivatives(
        tangent=tangent(at.x),
        second=jax.jvp(gradients, (at.x, at.z), (at.x_tangent, still))[1],
        mixed=jax.jvp(gradients, (at.x, at.z), (at.x_tangent, at.z_tangent))[1],
        second_tangent=jax.jvp(tangent, (at.x,), (at.y_tangent,))[1],
    )


def directions(case: Case, dtype: str) -> Directions:
    return Directions(
        x=_dense_operands(case, case.operands(), dtype),
        x_tangent=_dense_operands(case, tangents(case), dtype),
        y_tangent=_dense_operands(case, tangents(case, "other tangents"), dtype),
        z=_dense_results(case, case.cotangents(), dtype),
        z_tangent=_dense_results(case, cotangent_tangents(case), dtype),
    )


@cache
def dense_derivatives(case: Case, dtype: str) -> Derivatives:
    # (The transpose of a product with a wider result multiplies mixed dtypes.)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        found = _derivatives(directions(case, dtype), constants(case, dtype), dtype)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), found)


def of_case(case: Case, dense: Any) -> Any:
    """Results or gradients as the case has them: canonical, and only of operands that it has."""
    if isinstance(dense, Results):
        return Results(*(_from_dense(case, name, x) for name, x in dense._asdict().items()))
    scalars = {name: np.asarray(x) for name, x in dense.items() if name not in _UNITS}
    return scalars | {name: _from_dense(case, name, dense[name]) for name in case.operands()}


@cache
def expected(case: Case) -> Derivatives:
    """In float64."""
    return Derivatives(*(of_case(case, x) for x in dense_derivatives(case, "float64")))


@cache
def naive(case: Case) -> Derivatives:
    """In the dtype of the case; float64 is measured by the floor alone."""
    return Derivatives(*(of_case(case, x) for x in dense_derivatives(case, case.dtype)))


# --- the measure of error


def check(case: Case, what: str, found) -> None:
    """Holds a derivative of the library (as the case stores it), by its name in `Derivatives`, against the oracle."""
    want, by_naive = getattr(expected(case), what), getattr(naive(case), what)
    if isinstance(want, Results):
        found, want, by_naive = (dict(zip(Results._fields, x, strict=True)) for x in (found, want, by_naive))
        dtypes: dict[str, Any] = {"out": case.dtype, "lse": case.acc}
    else:
        dtypes = {name: x.dtype for name, x in case.operands().items()}
    assert sorted(found) == sorted(want)
    for name, x in found.items():
        assert x.dtype == jnp.dtype(dtypes[name]), f"{case}: {what} of {name} is {x.dtype}"
        x = case.canonical(x) if name in (*_STORED, "out") else np.asarray(x)
        floor = _floor(case, what, name)
        oracle.assert_close_to_oracle(x, want[name], by_naive[name], f"{case}: {what} of {name}", floor)


def _floor(case: Case, what: str, name: str) -> float:
    dtype = case.acc if name == "lse" else case.dtype
    floor = oracle.FLOOR[dtype]
    if dtype == case.acc:
        # Float32 knows a logit x to x / 2**24: its weight no better, nor the tangent of its weight.
        floor *= max(1.0, case.spread / 50)
    want = getattr(expected(case), what)
    want = want._asdict()[name] if isinstance(want, Results) else want[name]
    norm = float(np.linalg.norm(want))
    if norm < 1e-12:
        # 0 but for rounding, hence measured absolutely: by a norm that grows with the number of values.
        norm, floor = 1.0, floor * max(1.0, want.size**0.5)
    if name in ("bias", "alibi_slopes"):
        # Long sums, known only as well as their terms: see oracle.Attention.
        terms = np.abs(getattr(dense_derivatives(case, "float64"), what)["bias"])
        if name == "alibi_slopes":
            terms = (terms * constants(case, "float64")["distance"]).sum(axis=(-2, -1))
        floor *= max(1.0, float(np.linalg.norm(_from_dense(case, name, terms))) / norm)
    return floor
