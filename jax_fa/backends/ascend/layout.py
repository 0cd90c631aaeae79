"""CANN's layouts: which one the stored arrays already have, and the way there and back.

An array whose dims longer than 1 lie in a layout's order is that layout after a reshape, which is free.
"""

import math
from typing import Any

import jax.numpy as jnp

from jax_fa.call import STORED, Axes, Call, Shape, stored_shape

LAYOUTS = ("BSND", "BNSD", "SBH")  # preferred first


def _order(layout: str, rank: int) -> Axes:
    """Canonical dims (`*B S N D` are 0, 1, ...) in the order of the layout."""
    batch, (S, N, D) = tuple(range(rank)), range(rank, rank + 3)
    return {
        "BSND": (*batch, S, N, D),
        "BNSD": (*batch, N, S, D),
        "SBH": (S, *batch, N, D),
        "TND": (*batch, S, N, D),  # all batch dims have size 1
    }[layout]


def canonical_shape(call: Call, name: str) -> Shape:
    """Of query, key, value or out, with every batch dim in full."""
    d = call.dims
    S, N, D = {
        "query": (d.Sq, d.N, d.D),
        "key": (d.Skv, d.K, d.D),
        "value": (d.Skv, d.K, d.Dv),
        "out": (d.Sq, d.N, d.Dv),
    }[name]
    return (*d.B, S, N, D)


def fits(call: Call, name: str, layout: str) -> bool:
    """Whether query, key, value or out, as stored, is the layout after a reshape."""
    axes, shape = call.problem.axes(name), canonical_shape(call, name)
    long = [dim for dim in _stored(axes) if shape[dim] != 1]
    return long == [dim for dim in _order(layout, len(axes) - 3) if shape[dim] != 1]


def _stored(axes: Axes) -> list[int]:
    """Canonical dims in the order in which an array is stored."""
    return sorted(range(len(axes)), key=lambda dim: axes[dim])


def choose(call: Call) -> str:
    """The layout that most of query, key, value and out are stored in."""
    return max(LAYOUTS, key=lambda layout: sum(fits(call, name, layout) for name in (*STORED, "out")))


def to_layout(call: Call, name: str, x, layout: str):
    """An array stored as query, key, value or out, in the layout: its batch dims in full, as one dim."""
    axes, shape = call.problem.axes(name), canonical_shape(call, name)
    x = jnp.broadcast_to(x, stored_shape(shape, axes))
    rank = len(call.dims.B)
    if not fits(call, name, layout):
        x = x.transpose([axes[dim] for dim in _order(layout, rank)])
    return x.reshape(layout_shape(layout, math.prod(call.dims.B), *shape[rank:]))


def from_layout(call: Call, name: str, x, layout: str):
    """The inverse of `to_layout`."""
    axes, shape = call.problem.axes(name), canonical_shape(call, name)
    if fits(call, name, layout):
        return x.reshape(stored_shape(shape, axes))
    order = _order(layout, len(call.dims.B))
    return x.reshape([shape[dim] for dim in order]).transpose([order.index(dim) for dim in _stored(axes)])


def layout_shape(layout: str, B: int, S: int, N: int, D: int) -> tuple[int, ...]:
    return {
        "BSND": (B, S, N, D),
        "BNSD": (B, N, S, D),
        "SBH": (S, B, N * D),
        "TND": (S, N, D),
    }[layout]


def cut(x, layout: str, letter: str, start: int, stop: int, width: int = 1):
    """Entries start..stop of the axis B, S or N (`width`: of H, the elements per head)."""
    axis = layout.replace("T", "S").find(letter)
    if axis < 0:  # N is part of H
        axis, start, stop = layout.index("H"), start * width, stop * width
    if (start, stop) == (0, x.shape[axis]):
        return x
    index: list[Any] = [slice(None)] * x.ndim
    index[axis] = slice(start, stop)
    return x[tuple(index)]


def join(parts: list, layout: str, letter: str):
    """The inverse of `cut`s that follow one another."""
    axis = layout.replace("T", "S").find(letter)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis if axis >= 0 else layout.index("H"))


def widen(x, layout: str, heads: int, width: int):
    """Zeros after the elements of each head, up to `width`."""
    if layout == "SBH":
        x = x.reshape(*x.shape[:2], heads, -1)
    if x.shape[-1] < width:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
    return x.reshape(*x.shape[:2], -1) if layout == "SBH" else x


def narrow(x, layout: str, heads: int, width: int):
    """The first `width` elements of each head."""
    if layout == "SBH":
        x = x.reshape(*x.shape[:2], heads, -1)
    x = x[..., :width]
    return x.reshape(*x.shape[:2], -1) if layout == "SBH" else x


def append(x, layout: str, heads: int, columns):
    """The elements of each head followed by `columns`, whose last axis goes through them: `... heads c`."""
    if layout == "SBH":
        x = x.reshape(*x.shape[:2], heads, -1)
    x = jnp.concatenate([x, columns.astype(x.dtype)], axis=-1)
    return x.reshape(*x.shape[:2], -1) if layout == "SBH" else x


def by_row(stats, layout: str):
    """Statistics `B N S ...` in the order of the layout's rows and heads (TND has them so already)."""
    order = {"BSND": (0, 2, 1), "BNSD": (0, 1, 2), "SBH": (2, 0, 1), "TND": (0, 1)}[layout]
    return stats.transpose(*order, *range(len(order), stats.ndim))


def times(x, layout: str, heads: int, factor):
    """x (`heads` heads) times a factor `[B or 1, N or 1]`, float32."""
    by_head = x.reshape(*x.shape[:2], heads, -1) if layout == "SBH" else x
    # The axes that the factor lacks; in TND its batch of 1 is that of rows.
    axes = {"BSND": (1, 3), "BNSD": (2, 3), "SBH": (0, 3), "TND": (2,)}[layout]
    return (by_head.astype(jnp.float32) * jnp.expand_dims(factor, axes)).reshape(x.shape)


def dot(x, y, layout: str, heads: int):
    """The sum of x * y over rows and columns of each batch entry and head, float32 `B N`; what is 0 in x counts as 0."""
    terms = jnp.where(x == 0, 0, x.astype(jnp.float32) * y.astype(jnp.float32))
    if layout == "SBH":
        terms = terms.reshape(*terms.shape[:2], heads, -1)
    total = terms.sum({"BSND": (1, 3), "BNSD": (2, 3), "SBH": (0, 3), "TND": (0, 2)}[layout])
    return total[None] if layout == "TND" else total
