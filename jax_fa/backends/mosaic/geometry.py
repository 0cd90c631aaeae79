"""How the rows, heads and batch entries of a call are dealt out to thread blocks, and where its arrays lie.

Rows of a tile are *packed*: a warpgroup's 64 rows are `heads` query heads that share a key head, times 64 / heads
positions, so that a tile of keys serves them all. What has one scalar per row (bounds, statistics, ...) is in that
order, `*#B #units rows` with one unit per pack of heads; `pack` and `unpack` translate. These arrays are O(N Sq).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jax_fa.backends.mosaic.tuning import ROWS, Tiles
from jax_fa.call import Axes, Call, Dims, Problem

LOG2E = math.log2(math.e)
# At most so many heads are packed: they leave whole groups of 8 rows, the unit of swizzled shared memory.
MAX_PACK = ROWS // 8
# Keys and values that blocks running at the same time should share in the second-level cache (50 MB on an H100).
CACHE_BYTES = 24 * 2**20


def is_plain(call: Call) -> bool:
    """Whether logits are products times a static scale, and no more."""
    operands = call.operands
    shaped = (operands.bias, operands.alibi_slopes, operands.scale, operands.soft_cap)
    return call.problem.logits_soft_cap is None and all(x is None for x in shaped)


@dataclass(frozen=True)
class Geometry:
    """The sizes of a call and how it is cut."""

    problem: Problem
    dims: Dims
    tiles: Tiles
    heads: int  # query heads packed into one tile of rows
    plain: bool  # see is_plain

    @classmethod
    def of(cls, call: Call, tiles: Tiles, pack: bool = True) -> "Geometry":
        operands, d = call.operands, call.dims
        # One scalar per head and key, the same for all rows, is one vector per tile only where the tile has one head.
        apart = any(
            x is not None and x.shape[-3] > 1 and x.shape[-2] == 1 and x.shape[-1] > 1
            for x in (operands.bias, operands.mask)
        )
        apart |= operands.segment_key is not None and operands.segment_key.shape[-2] > 1
        heads = 1 if apart or not pack else math.gcd(d.G, MAX_PACK)
        return cls(call.problem, d, tiles, heads, is_plain(call))

    @property
    def positions(self) -> int:
        """Positions of one warpgroup's rows."""
        return ROWS // self.heads

    @property
    def units(self) -> int:
        """Packs of query heads."""
        return self.dims.N // self.heads

    @property
    def block_positions(self) -> int:
        return self.positions * self.tiles.consumers

    @property
    def block_rows(self) -> int:
        return ROWS * self.tiles.consumers

    @property
    def row_tiles(self) -> int:
        return -(-self.dims.Sq // self.block_positions)

    @property
    def key_tiles(self) -> int:
        return -(-self.dims.Skv // self.tiles.width)

    def key_head(self, unit):
        return lax.div(unit, self.dims.G // self.heads)

    # --- one scalar per row

    def pack(self, x: jax.Array, fill=0) -> jax.Array:
        """An array `*#B #N Sq` in the order of the kernels, `*#B #units rows`; rows that do not exist get `fill`."""
        *batch, N, Sq = x.shape
        x = jnp.pad(
            x,
            [(0, 0)] * (len(batch) + 1) + [(0, self.row_tiles * self.block_positions - Sq)],
            constant_values=fill,
        )
        cut = (self.row_tiles, self.tiles.consumers)
        if N == 1:
            x = x.reshape(*batch, 1, *cut, 1, self.positions)
            x = jnp.broadcast_to(x, (*batch, 1, *cut, self.heads, self.positions))
        else:
            x = x.reshape(*batch, self.units, self.heads, *cut, self.positions)
            x = jnp.moveaxis(x, len(batch) + 1, -2)
        return x.reshape(*batch, x.shape[len(batch)], self.row_tiles * self.block_rows)

    def unpack(self, x: jax.Array) -> jax.Array:
        """`*B units rows` as `*B N Sq`."""
        *batch, units, _ = x.shape
        x = x.reshape(*batch, units, self.row_tiles, self.tiles.consumers, self.heads, self.positions)
        x = jnp.moveaxis(x, -2, len(batch) + 1)
        x = x.reshape(*batch, self.dims.N, self.row_tiles * self.block_positions)
        return x if x.shape[-1] == self.dims.Sq else x[..., : self.dims.Sq]

    @property
    def packed_shape(self) -> tuple[int, ...]:
        return (*self.dims.B, self.units, self.row_tiles * self.block_rows)

    # --- blocks

    def deal(self, block, tiles: int, units: int, bytes_per_unit: int, last_first: bool):
        """(indices of the batch dims, unit, tile) of a thread block.

        Blocks start in order. Those of one unit's neighbours run together, as many as share the cache; among them
        tiles go slowest and, where `last_first`, from the end: under a causal mask the last rows see the most keys,
        and long work started first leaves no tail.
        """
        total = math.prod(self.dims.B) * units
        together = max(1, min(total, CACHE_BYTES // max(1, bytes_per_unit)))
        together = max(n for n in range(1, together + 1) if total % n == 0)
        section, inside = lax.div(block, together * tiles), lax.rem(block, together * tiles)
        tile = lax.div(inside, together)
        if last_first:
            tile = tiles - 1 - tile
        unit = section * together + lax.rem(inside, together)
        batch = []
        rest, unit = lax.div(unit, units), lax.rem(unit, units)
        for size in reversed(self.dims.B):
            batch.append(lax.rem(rest, size))
            rest = lax.div(rest, size)
        return tuple(reversed(batch)), unit, tile


def clip_index(shape: tuple[int, ...], index: tuple) -> tuple:
    """An index in which dims of size 1 are always at 0: how operands broadcast."""
    return tuple(0 if size == 1 else i for size, i in zip(shape, index, strict=True))


def stored_index(axes: Axes, canonical: tuple) -> tuple:
    """An index `*B S N D` in the order in which the array is stored."""
    return tuple(canonical[axes.index(i)] for i in range(len(axes)))


def tile_at(ref, axes: Axes, batch: tuple, rows, head, columns):
    """The part of a stored array `*#B S N D` at a batch entry and head: rows x columns."""
    shape = tuple(ref.shape[axis] for axis in axes)
    where = clip_index(shape[: len(batch)], batch)
    return ref.at[stored_index(axes, (*where, rows, head, columns))]
