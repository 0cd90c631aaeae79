"""How the sequences are cut into tiles, and which tiles of keys a tile of rows visits."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from jax_fa import compat
from jax_fa.backends.xla.axis import Axis
from jax_fa.backends.xla.canonical import Canonical
from jax_fa.call import Dims, is_symbolic

# Elements of one tile of logits over all batch entries and heads. 2**20 float32 are 4 MiB: large enough to
# keep matrix multiplies busy, small enough for a last-level cache.
TILE_ELEMENTS = 2**20
MIN_TILE, MAX_ROWS, MAX_KEYS = 128, 512, 512
# A call of at most this many logits is one tile, without loops: it compiles in half the time. Not where rows are longer
# than this: sums over keys are more accurate tile by tile.
ONE_TILE_ELEMENTS, ONE_TILE_KEYS = 2**21, 2**14


def tiling(call: Canonical) -> tuple[Axis, Axis]:
    d = call.dims
    if any(map(is_symbolic, (call.heads, d.Sq, d.Skv))):
        return Axis.of(d.Sq, MIN_TILE), Axis.of(d.Skv, MIN_TILE)
    if is_one_tile(d):
        return Axis.of(d.Sq, d.Sq), Axis.of(d.Skv, d.Skv)
    keys = Axis.of(d.Skv, MAX_KEYS)
    rows = TILE_ELEMENTS // max(1, call.heads * keys.tile)
    return Axis.of(d.Sq, max(MIN_TILE, min(MAX_ROWS, rows))), keys


def is_one_tile(d: Dims) -> bool:
    """Whether a call of these sizes has no loops."""
    if any(map(is_symbolic, (*d.B, d.N, d.Sq, d.Skv))):
        return False
    return math.prod(d.B) * d.N * d.Sq * d.Skv <= ONE_TILE_ELEMENTS and d.Skv <= ONE_TILE_KEYS


def loop(bounds: tuple[Any, Any], body, carry):
    """fori_loop; a single known turn is run in line, which compiles faster."""
    first, last = bounds
    if isinstance(first, int) and isinstance(last, int) and last - first == 1:
        return body(first, carry)
    carry = compat.vary_like_results(lambda carry: body(jnp.int32(0), carry), carry)
    return lax.fori_loop(first, last, body, carry)


def key_ranges(call: Canonical, rows: Axis, keys: Axis):
    """A function of a row tile: the first key tile with a key visible to some row of it, and one past the last."""
    lower, upper = call.lower, call.upper
    if (lower is None and upper is None) or keys.tile == keys.size:
        return lambda t: (0, keys.count)

    def tiles(bound, reduce):
        """The bound reduced over each row tile, shape (tiles,) or (1,)."""
        bound = jnp.moveaxis(bound, -1, 0)
        if bound.shape[0] == 1:
            return reduce(bound)[None]
        width = rows.tile * math.prod(bound.shape[1:])
        if rows.ragged:
            # Not a NumPy index: a partitioned program must not close over arrays.
            starts = rows.start(jnp.arange(rows.count, dtype=jnp.int32))
            bound = bound[starts[:, None] + jnp.arange(rows.tile, dtype=jnp.int32)]
        return reduce(bound.reshape(rows.count, width), axis=1)

    def at(x, t):
        return x[0] if x.shape[0] == 1 else lax.dynamic_index_in_dim(x, t, keepdims=False)

    first = last = None
    if lower is not None:
        seen = lower if upper is None else jnp.where(lower < upper, lower, keys.size)
        first = tiles(seen, jnp.min) // keys.tile
    if upper is not None:
        seen = upper if lower is None else jnp.where(lower < upper, upper, 0)
        last = (tiles(seen, jnp.max) + keys.tile - 1) // keys.tile
    return lambda t: (0 if first is None else at(first, t), keys.count if last is None else at(last, t))
