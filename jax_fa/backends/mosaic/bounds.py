"""Bounds of the visible keys per row, and the ranges of tiles that kernels visit for them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jax_fa.backends.mosaic.geometry import Geometry
from jax_fa.backends.mosaic.tuning import ROWS
from jax_fa.call import Dims, Operands


def as_bounds(d: Dims, operands: Operands):
    """Lower and upper bounds, and the mask if it is more than a bound.

    Rows whose segment is compared have bounds in any case: these say which tiles are compared.
    """
    lower, upper, mask = operands.lower, operands.upper, operands.mask
    if mask is not None and mask.shape[-1] == 1:
        upper = jnp.where(mask[..., 0], jnp.int32(d.Skv) if upper is None else upper, 0)
        mask = None
    if operands.segment_row is not None and lower is None and upper is None:
        upper = jnp.full((1,) * operands.segment_row.ndim, d.Skv, jnp.int32)
    return lower, upper, mask


def _filled(d: Dims, lower, upper):
    """Both bounds, `*#B #N Sq`, inside the keys; a fully masked row gets (Skv, 0)."""
    shape = jnp.broadcast_shapes(*(x.shape for x in (lower, upper) if x is not None))
    shape = (*shape[:-1], d.Sq)
    low = jnp.broadcast_to(jnp.int32(0) if lower is None else jnp.maximum(lower, 0), shape)
    high = jnp.broadcast_to(jnp.int32(d.Skv) if upper is None else jnp.minimum(upper, d.Skv), shape)
    some = low < high
    return jnp.where(some, low, d.Skv), jnp.where(some, high, 0)


def _not_compared(d: Dims, low, high, segment_row):
    """Bounds of the keys that are visible whatever their segment is: none, in a row that compares segments."""
    if segment_row is None:
        return low, high
    free = segment_row < 0
    return jnp.where(free, low, d.Skv), jnp.where(free, high, 0)


def where_rows_stay(g: Geometry, lower, upper, segment_row) -> dict[str, Any]:
    """`lower`, `upper` and `ranges` of `Inputs`: which key tiles a tile of rows visits. Without bounds there are none."""
    if lower is None and upper is None:
        return {}
    d = g.dims
    low, high = _filled(d, lower, upper)
    free_low, free_high = _not_compared(d, low, high, segment_row)
    width = g.tiles.width

    def over_tiles(x, fill, reduce):
        packed = g.pack(x, fill)
        return reduce(packed.reshape(*packed.shape[:-1], g.row_tiles, g.block_rows), axis=-1)

    first = over_tiles(low, d.Skv, jnp.min) // width
    last = -(-over_tiles(high, 0, jnp.max) // width)
    first = jnp.minimum(first, last)
    # Without lower bounds, a fully masked row shows in its upper bound alone.
    inner_first = first
    if lower is not None:
        inner_first = jnp.clip(-(-over_tiles(free_low, 0, jnp.max) // width), first, last)
    inner_last = jnp.clip(over_tiles(free_high, d.Skv, jnp.min) // width, inner_first, last)
    ends = jnp.broadcast_arrays(first, inner_first, inner_last, last)
    found = {"ranges": jnp.stack(ends, axis=-1).astype(jnp.int32)}
    if lower is not None:
        found["lower"] = g.pack(low, d.Skv)
    return found | {"upper": g.pack(high, 0)}


def where_keys_stay(g: Geometry, lower, upper, segment_row, per_row: Callable[..., Any]) -> dict[str, Any]:
    """The same where rows move: which row tiles a block of keys visits. `per_row(x, fill=0)` fills rows up to tiles."""
    if lower is None and upper is None:
        return {}
    d = g.dims
    low, high = _filled(d, lower, upper)
    free = _not_compared(d, low, high, segment_row)
    found = {
        "ranges": _row_ranges(g, per_row(low, d.Skv), per_row(high), *map(per_row, free)),
        "upper": per_row(high),
    }
    return found if lower is None else found | {"lower": per_row(low, d.Skv)}


def _row_ranges(g: Geometry, low, high, free_low, free_high):
    """Which row tiles have a visible key in a block of keys, and a run of those for which all are visible, by their
    bounds and without comparing segments: `*#B #N blocks 4`."""
    d, width, keys = g.dims, g.tiles.width, ROWS * g.tiles.consumers
    real = (jnp.arange(low.shape[-1]) < d.Sq).reshape(-1, width)
    low, high, free_low, free_high = (
        x.reshape(*x.shape[:-1], -1, width) for x in (low, high, free_low, free_high)
    )

    def tiles(x, reduce):
        return reduce(x, axis=-1)[..., None, :]  # ... 1 tiles

    blocks = jnp.arange(-(-d.Skv // keys), dtype=jnp.int32)[:, None] * keys
    ends = jnp.minimum(blocks + keys, d.Skv)
    some = (tiles(low, jnp.min) < ends) & (tiles(high, jnp.max) > blocks)
    whole = tiles(jnp.where(real, free_low, 0), jnp.max) <= blocks
    whole = whole & (tiles(jnp.where(real, free_high, d.Skv), jnp.min) >= ends)
    at = jnp.arange(low.shape[-2], dtype=jnp.int32)
    count = jnp.int32(low.shape[-2])
    some, whole = jnp.broadcast_arrays(some, whole)
    last = jnp.max(jnp.where(some, at + 1, 0), axis=-1)
    first = jnp.minimum(jnp.min(jnp.where(some, at, count), axis=-1), last)
    inner_first = jnp.minimum(jnp.min(jnp.where(whole & some, at, count), axis=-1), last)
    after = (at >= inner_first[..., None]) & ~whole
    inner_last = jnp.minimum(jnp.min(jnp.where(after, at, count), axis=-1), last)
    return jnp.stack([first, inner_first, jnp.maximum(inner_first, inner_last), last], axis=-1)
