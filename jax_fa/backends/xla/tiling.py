"""How the sequences are cut into tiles, and which tiles of keys a tile of rows visits."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from jax_fa import compat
from jax_fa.backends.xla.axis import FROM_THE_FRONT, Axis
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
    if call.blocks is not None:
        return _by_block(call)
    if any(map(is_symbolic, (call.heads, d.Sq, d.Skv))):
        return Axis.of(d.Sq, MIN_TILE), Axis.of(d.Skv, MIN_TILE)
    if is_one_tile(d):
        return Axis.of(d.Sq, d.Sq), Axis.of(d.Skv, d.Skv)
    keys = Axis.of(d.Skv, MAX_KEYS)
    rows = TILE_ELEMENTS // max(1, call.heads * keys.tile)
    return Axis.of(d.Sq, max(MIN_TILE, min(MAX_ROWS, rows))), keys


def _by_block(call: Canonical) -> tuple[Axis, Axis]:
    """Tiles of one block, or of as many as make no tile too small: a larger one would be masked whole less often."""
    d, (rows, keys) = call.dims, _block_size(call)
    return (
        Axis.by(d.Sq, max(MIN_TILE // rows * rows, min(rows, MAX_ROWS))),
        Axis.by(d.Skv, max(MIN_TILE // keys * keys, min(keys, MAX_KEYS))),
    )


def _block_size(call: Canonical) -> tuple[int, int]:
    size = call.problem.block_size
    assert size is not None  # where there are blocks
    return size


def is_one_tile(d: Dims) -> bool:
    """Whether a call of these sizes has no loops."""
    if any(map(is_symbolic, (*d.B, d.N, d.Sq, d.Skv))):
        return False
    return math.prod(d.B) * d.N * d.Sq * d.Skv <= ONE_TILE_ELEMENTS and d.Skv <= ONE_TILE_KEYS


def loop(bounds: tuple[Any, ...], body, carry):
    """fori_loop; a single known turn is run in line, which compiles faster.

    Bounds may have a third member, what the body takes for each turn.
    """
    first, last, *listed = bounds
    if listed:
        of_turn = body

        def body(n, carry):
            return of_turn(_at(listed[0], n), carry)

    if isinstance(first, int) and isinstance(last, int) and last - first == 1:
        return body(first, carry)
    carry = compat.vary_like_results(lambda carry: body(jnp.int32(0), carry), carry)
    return lax.fori_loop(first, last, body, carry)


def _at(x, t):
    return lax.dynamic_index_in_dim(x, t, keepdims=False, **FROM_THE_FRONT)


def key_ranges(call: Canonical, rows: Axis, keys: Axis):
    """A function of a row tile, which gives the bounds of a `loop` over key tiles.

    From the first one with a key that is visible to some row of the tile to the last; of a mask with blocks, those with some
    visible block.
    """
    interval = _intervals(call, rows, keys)
    if call.blocks is None:
        return interval
    some = _some_block(call, rows, keys)

    def listed(t):
        """The visible ones come first, in order."""
        first, last = interval(t)
        u = jnp.arange(keys.count, dtype=jnp.int32)
        here = _at(some, t) & (first <= u) & (u < last)
        return 0, jnp.sum(here, dtype=jnp.int32), jnp.argsort(~here, stable=True).astype(jnp.int32)

    return listed


def _some_block(call: Canonical, rows: Axis, keys: Axis):
    """Whether some pair of each row tile and key tile is in a block with visible pairs, in some head of some entry."""
    shown = call.blocks != 0
    shown = jnp.any(shown, axis=tuple(range(shown.ndim - 2))).astype(jnp.int32)
    # How many blocks are left of and above each corner of blocks.
    above = jnp.cumsum(jnp.cumsum(jnp.pad(shown, ((1, 0), (1, 0))), axis=0), axis=1)

    def corners(axis: Axis, block: int):
        start = axis.start(jnp.arange(axis.count, dtype=jnp.int32))
        return start // block, (start + axis.tile - 1) // block + 1

    (top, bottom), (left, right) = map(corners, (rows, keys), _block_size(call))
    upper, lower = above[top], above[bottom]
    return lower[:, right] - lower[:, left] - upper[:, right] + upper[:, left] > 0


def _intervals(call: Canonical, rows: Axis, keys: Axis):
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
        return x[0] if x.shape[0] == 1 else _at(x, t)

    first = last = None
    if lower is not None:
        seen = lower if upper is None else jnp.where(lower < upper, lower, keys.size)
        first = tiles(seen, jnp.min) // keys.tile
    if upper is not None:
        seen = upper if lower is None else jnp.where(lower < upper, upper, 0)
        last = (tiles(seen, jnp.max) + keys.tile - 1) // keys.tile
    return lambda t: (0 if first is None else at(first, t), keys.count if last is None else at(last, t))
