"""The gradient of a bias of Sq x Skv elements, of one tile per thread block.

    dbias = sum of ds over the batch entries and heads that share the bias,  with ds as in gradient.py

The block goes through those batch entries and heads itself and keeps the sum in registers, so the one array of
Sq x Skv elements is the gradient, and no sum depends on the order in which blocks run. Both products of a tile are
computed once more than the other gradients need.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa.backends.mosaic import logits
from jax_fa.backends.mosaic.geometry import Geometry, clip_index, tile_at
from jax_fa.backends.mosaic.gradient import GradientBlock
from jax_fa.backends.mosaic.inputs import BY_KEY, BY_ROW, Inputs
from jax_fa.backends.mosaic.launch import Kernel
from jax_fa.backends.mosaic.logits import COLUMN, ROW, WGMMA, Tile
from jax_fa.backends.mosaic.memory import arrive_if, atom_of, registers, span, swizzled, wait_if
from jax_fa.backends.mosaic.operands import RowStatistics, cut, for_rows
from jax_fa.backends.mosaic.tuning import ROWS, Tiles
from jax_fa.call import Call

MOVING = ("query", "dout", "key", "value")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DbiasSmem:
    """Shared memory and barriers."""

    bias_here: Any  # a barrier per consumer
    bias_tile: Any  # consumers x 64 x width; the gradient leaves through it
    dout: Any  # stages x consumers x 64 x Dv
    here: Any  # a barrier per stage: all that moves is loaded
    key: Any  # stages x width x D
    mask_tile: Any = None  # stages x consumers x 64 x width
    query: Any  # stages x consumers x 64 x D
    read: Any  # a barrier per stage: all consumers have read it
    value: Any  # stages x width x Dv


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Results:
    bias: Any


def dbias(call: Call, saved: RowStatistics, tiles: Tiles) -> jax.Array:
    """`*#B #N Sq Skv`, in full where bias is and in the batch dims that vmap added, and in bias's dtype."""
    d, bias, mapped = call.dims, call.operands.bias, call.problem.mapped
    g = Geometry.of(call, tiles, pack=False)
    inputs = for_rows(g, call, saved)
    full = tuple(size if i < mapped or bias.shape[i] != 1 else 1 for i, size in enumerate((*d.B, d.N)))
    given = inputs.bias_tile
    out = jax.ShapeDtypeStruct((*full, *given.shape[-2:]), given.dtype)
    found = DbiasKernel(g, inputs, full).launch("dbias", Results(bias=out))
    return cut(found.bias, (*full, d.Sq, d.Skv)).astype(bias.dtype)


def _unravel(index, sizes: tuple[int, ...]) -> tuple:
    found = []
    for size in reversed(sizes):
        found.append(lax.rem(index, size))
        index = lax.div(index, size)
    return tuple(reversed(found))


class DbiasBlock(GradientBlock):
    """Blocks that run together share rows, or keys."""

    kernel: "DbiasKernel"
    smem: DbiasSmem

    def __init__(self, kernel: "DbiasKernel", inputs: Inputs, smem, multiply_add, *place) -> None:
        super().__init__(kernel, inputs, smem, multiply_add)
        *self.entry, self.row_tile, self.key_tile = place

    def _place(self, i) -> tuple[tuple, Any]:
        """Batch indices and head of the i-th of those that share this tile."""
        inside = _unravel(i, self.kernel.summed)
        *batch, head = (a + b for a, b in zip(self.entry, inside, strict=True))
        return tuple(batch), head

    def _visible(self, i):
        """Whether any key of the tile is visible to any of its rows there."""
        if self.inputs.ranges is None:
            return self.key_tile >= 0
        batch, head = self._place(i)
        ref = self.inputs.ranges
        where = (*clip_index(ref.shape[:-2], (*batch, head)), self.row_tile)
        return (ref[(*where, 0)] <= self.key_tile) & (self.key_tile < ref[(*where, 3)])

    def _over(self, step, carry):
        """`step(i, carry)` where something is visible."""

        def one(i, carry):
            return lax.cond(self._visible(i), lambda: step(i, carry), lambda: carry)

        return lax.fori_loop(0, math.prod(self.kernel.summed), one, carry)

    def _first_row(self, warpgroup):
        return self.row_tile * self.g.block_positions + warpgroup * ROWS

    def _rows(self, warpgroup):
        return span(self._first_row(warpgroup), ROWS, ROWS)

    def _keys(self):
        return span(self.key_tile * self.tiles.width, self.tiles.width, self.tiles.width)

    # --- the producer

    def produce(self) -> None:
        self._over(self._load, jnp.int32(0))

    def _load(self, i, count):
        kernel, t, smem = self.kernel, self.tiles, self.smem
        batch, head = self._place(i)
        key_head = lax.div(head, self.g.dims.G)
        slot = lax.rem(count, t.stages)
        here = smem.here.at[slot]
        wait_if(count >= t.stages, smem.read.at[slot])
        for name in MOVING:
            columns, target = kernel.columns(name), getattr(smem, name).at[slot]
            ref, axes, whole = (
                getattr(self.inputs, name),
                kernel.problem.axes(name),
                span(0, columns, columns),
            )
            if name in ("key", "value"):
                source = tile_at(ref, axes, batch, self._keys(), key_head, whole)
                plgpu.copy_gmem_to_smem(source, target, here)
                continue
            for consumer in range(t.consumers):
                source = tile_at(ref, axes, batch, self._rows(consumer), head, whole)
                plgpu.copy_gmem_to_smem(source, getattr(smem, name).at[slot, consumer], here)
        if (ref := self.inputs.mask_tile) is not None:
            where = clip_index(ref.shape[:-2], (*batch, head))
            for consumer in range(t.consumers):
                source = ref.at[(*where, self._rows(consumer), self._keys())]
                plgpu.copy_gmem_to_smem(source, smem.mask_tile.at[slot, consumer], here)
        return count + 1

    # --- consumers

    def consume(self, warpgroup, results: Results) -> None:
        bias, here = self.smem.bias_tile.at[warpgroup], self.smem.bias_here.at[warpgroup]
        ref = self.inputs.bias_tile
        where = clip_index(ref.shape[:-2], tuple(self.entry))
        plgpu.copy_gmem_to_smem(ref.at[(*where, self._rows(warpgroup), self._keys())], bias, here)
        total = self._over(lambda i, n: n + 1, jnp.int32(0))
        plgpu.barrier_wait(here)
        acc = plgpu.layout_cast(jnp.zeros((ROWS, self.tiles.width), jnp.float32), WGMMA)
        _, acc = self._over(lambda i, carry: self._step(warpgroup, i, total, carry), (jnp.int32(0), acc))
        bias[...] = acc.astype(ref.dtype)
        plgpu.commit_smem()
        out = results.bias.at[(*self.entry, self._rows(warpgroup), self._keys())]
        plgpu.copy_smem_to_gmem(bias, out)
        plgpu.wait_smem_to_gmem(0)

    def _scalars(self, warpgroup, i) -> Inputs:
        """Scalars per row and per key there, and the dropout key."""
        batch, head = self._place(i)
        rows = pl.ds(self.row_tile * self.g.block_rows + warpgroup * ROWS, ROWS)
        keys = pl.ds(self.key_tile * self.tiles.width, self.tiles.width)
        found = {name: self.vector(name, batch, head, rows, ROW) for name in self.kernel.by_row}
        found |= {name: self.vector(name, batch, head, keys, COLUMN) for name in self.kernel.by_key}
        return Inputs(**found, seed=self.seed(batch))

    def _reader(self, warpgroup, slot, scalars: Inputs) -> logits.Read:
        def read(name: str):
            if name == "nan_marker":  # nothing is summed over rows or keys, so nothing leaks
                return None
            if name == "bias_tile":
                return registers(self.smem.bias_tile.at[warpgroup], WGMMA)
            if name == "mask_tile" and self.inputs.mask_tile is not None:
                return registers(self.smem.mask_tile.at[slot, warpgroup], WGMMA)
            return getattr(scalars, name)

        return read

    def _step(self, warpgroup, i, total, carry):
        smem = self.smem
        count, acc = carry
        slot = lax.rem(count, self.tiles.stages)
        read = self._reader(warpgroup, slot, self._scalars(warpgroup, i))
        tile = Tile(
            problem=self.kernel.problem,
            shape=(ROWS, self.tiles.width),
            row_axis=0,
            first_row=self._first_row(warpgroup),
            first_key=self.key_tile * self.tiles.width,
            positions=ROWS,
            Skv=self.g.dims.Skv,
        )
        plgpu.barrier_wait(smem.here.at[slot])
        first = (smem.query.at[slot, warpgroup], smem.key.at[slot])
        second = (smem.dout.at[slot, warpgroup], smem.value.at[slot])
        p, done, dp = self.recomputed(first, second, tile, read, bounded=True)
        if self.inputs.mask_tile is not None:
            plgpu.commit_smem()  # it was read through the generic proxy
        again = count + self.tiles.stages < total
        arrive_if(again, smem.read.at[slot])
        dp = logits.kept(tile, logits.keep(tile, read), dp, read)
        acc = acc + self.score_gradient(tile, read, p, done, dp).ds
        return count + 1, acc


class DbiasKernel(Kernel):
    """`full` is the gradient's shape but for the last two dims."""

    block = DbiasBlock

    def __init__(self, g: Geometry, inputs: Inputs, full: tuple[int, ...]) -> None:
        super().__init__(g, inputs)
        self.full = full
        self.by_row, self.by_key = inputs.present(BY_ROW), inputs.present(BY_KEY)

    @property
    def summed(self) -> tuple[int, ...]:
        """How many batch entries and heads share an element of the bias, by dim."""
        sizes = (*self.g.dims.B, self.g.dims.N)
        return tuple(1 if kept == size else size for kept, size in zip(self.full, sizes, strict=True))

    @property
    def blocks(self) -> int:
        return math.prod(self.full) * self.g.row_tiles * self.g.key_tiles

    def place(self, index) -> tuple:
        """(batch indices and head of the bias, tile of rows, tile of keys)."""
        return _unravel(index, (*self.full, self.g.row_tiles, self.g.key_tiles))

    def columns(self, name: str) -> int:
        return self.D if name in ("query", "key") else self.Dv

    def smem(self) -> DbiasSmem:
        t, width = self.tiles, self.tiles.width
        moving = {}
        for name in MOVING:
            rows = (width,) if name in ("key", "value") else (t.consumers, ROWS)
            moving[name] = swizzled((t.stages, *rows, self.columns(name)), self.dtype)
        bias, mask, mask_tile = self.inputs.bias_tile, self.inputs.mask_tile, None
        copies = 2 * t.consumers + 2
        if mask is not None:
            atom = atom_of(width, mask.shape[-1], mask.dtype)
            mask_tile = swizzled((t.stages, t.consumers, ROWS, width), mask.dtype, atom)
            copies += t.consumers
        atom = atom_of(width, bias.shape[-1], bias.dtype)
        return DbiasSmem(
            **moving,
            bias_tile=swizzled((t.consumers, ROWS, width), bias.dtype, atom),
            mask_tile=mask_tile,
            bias_here=plgpu.Barrier(num_barriers=t.consumers),
            here=plgpu.Barrier(num_barriers=t.stages, num_arrivals=copies),
            read=plgpu.Barrier(num_barriers=t.stages, num_arrivals=t.consumers),
        )
