"""Gradients that are added up tile by tile, summed over the dims in which their operands broadcast."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fa.backends.xla.axis import FROM_THE_FRONT, Axis
from jax_fa.backends.xla.canonical import Canonical
from jax_fa.backends.xla.logits import Tile
from jax_fa.call import Axes, Operands, sum_to
from jax_fa.indices import add_last


class Parts(NamedTuple):
    """What one tile adds to the gradients; None for nothing, or for those that are not wanted."""

    dk: Any = None  # `*#B K keys D`
    dv: Any = None
    dx: Any = None  # of the logits before score_mod and soft cap, `*#B K G rows keys`
    dscale: Any = None  # of each pair, likewise
    dcap: Any = None
    dfloats: Any = None  # as their sum is stored


def zeros(call: Canonical) -> Operands:
    """Query's gradient as stored; accumulators `*B ...` that keep the dims in which the other operands broadcast."""
    d, problem = call.dims, call.problem

    def like(x):
        x = call.by_head(x)
        full = [call.B[at] if i < problem.mapped else x.shape[at] for at, i in enumerate(call.kept)]
        return jnp.zeros((*full, *x.shape[len(full) :]), call.acc)

    def zero(name, x):
        if name not in call.wanted:
            return None
        if name == "query":
            return call.stored(jnp.zeros((*call.B, d.K, d.G, d.Sq, d.D), call.dtype), problem.query_axes)
        if name in ("key", "value"):
            return jnp.zeros((*call.B, d.K, d.Skv, d.D if name == "key" else d.Dv), call.acc)
        return like(x)

    return call.operands.map(zero)


def finish(call: Canonical, gradients: Operands) -> Operands:
    """The gradients as the operands are stored."""

    def stored(name, gradient):
        operand = getattr(call.operands, name)
        if name in ("key", "value"):
            gradient = call.stored(gradient, call.problem.axes(name))
        return gradient.reshape(call.call.gradient_shape(name)).astype(operand.dtype)

    return gradients.map(stored)


def put_fresh(call: Canonical, total, part, axes: Axes, rows: Axis, t):
    """`Canonical.put_rows` of rows that an earlier tile has not put."""
    part = part.astype(total.dtype)
    if (fresh := rows.fresh(t)) is not None:
        part = jnp.where(fresh[:, None], part, call.query_tile(total, axes, rows, t))
    return call.put_rows(total, part, axes, rows, t)


def add_tile(tile: Tile, gradients: Operands, parts: Parts) -> Operands:
    """The gradients (but query's) with one tile's part added."""
    d = tile.call.dims
    full = (*tile.call.B, d.K, d.G, tile.rows.tile, tile.keys.tile)
    # In full, so that a batch dim in which all that the parts are made of broadcasts counts as often as it is long.
    wide: Any = [None if x is None else jnp.broadcast_to(x, full) for x in parts[2:5]]
    dx, dscale, dcap = wide

    def along_keys(total, part):
        if total.shape == part.shape:
            return total + part
        before = tile.keys.cut(total, -2, tile.u)
        return tile.keys.put(total, before + part, -2, tile.u)

    def along_rows(total, part):
        """`part` is `... rows`."""
        part = sum_to(part, (*total.shape[:-1], 1 if total.shape[-1] == 1 else part.shape[-1]))
        before = tile.rows.cut(total, -1, tile.t)
        return tile.rows.put(total, before + part, -1, tile.t) if total.shape != part.shape else total + part

    def scalar(total, part):
        return total + sum_to(part, (*total.shape, 1, 1)).reshape(total.shape)

    changes = {}
    if parts.dk is not None:
        changes["key"] = along_keys(gradients.key, parts.dk)
    if parts.dv is not None:
        changes["value"] = along_keys(gradients.value, parts.dv)
    if gradients.bias is not None:
        changes["bias"] = _add_bias(tile, gradients.bias, dx)
    if gradients.alibi_slopes is not None:
        part = jnp.sum(-dx * tile.distance(), axis=-1)
        changes["alibi_slopes"] = along_rows(gradients.alibi_slopes, part)
    if dscale is not None:
        changes["scale"] = scalar(gradients.scale, dscale)
    if dcap is not None:
        changes["soft_cap"] = scalar(gradients.soft_cap, dcap)
    if parts.dfloats is not None:
        changes["function_floats"] = gradients.function_floats + parts.dfloats
    return replace(gradients, **changes)


def _add_bias(tile: Tile, dbias, dx):
    if tile.call.bias_offset is not None:
        return add_last(dbias, tile.bias_index(), dx)
    part = sum_to(
        dx, tuple(1 if full == 1 else size for full, size in zip(dbias.shape, dx.shape, strict=True))
    )
    if dbias.shape == part.shape:
        return dbias + part
    at: list[Any] = [0] * (dbias.ndim - 2)
    at.append(0 if dbias.shape[-2] == 1 else tile.rows.start(tile.t))
    at.append(0 if dbias.shape[-1] == 1 else tile.keys.start(tile.u))
    # With x64 a plain 0 would be int64.
    start = [np.int32(x) if isinstance(x, int) else x.astype(jnp.int32) for x in at]
    before = lax.dynamic_slice(dbias, start, part.shape, **FROM_THE_FRONT)
    return lax.dynamic_update_slice(dbias, before + part, start, **FROM_THE_FRONT)
