"""The gradient of a bias of Sq x Skv numbers, of one tile per thread block.

    dbias = sum of ds over the batch entries and heads that share the bias,  ds = p (dp - delta) ds/d(logits)

The block goes through those batch entries and heads itself and keeps the sum in registers, so the one array of
Sq x Skv numbers is the gradient, and no sum depends on the order in which blocks run. Both products of a tile are
computed once more than the other gradients need.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa.backends.mosaic import logits
from jax_fa.backends.mosaic.geometry import Geometry, clip_index, tile_at
from jax_fa.backends.mosaic.launch import launch
from jax_fa.backends.mosaic.logits import COLUMN, ROW, WGMMA, Tile
from jax_fa.backends.mosaic.memory import (
    MOST_TOGETHER,
    arrive_if,
    atom_of,
    registers,
    span,
    swizzled,
    two_products,
    wait_if,
)
from jax_fa.backends.mosaic.operands import BY_KEY, BY_ROW, Arrays, RowStatistics, by_rows, cut, stored
from jax_fa.backends.mosaic.tuning import ROWS, Tiles
from jax_fa.backends.mosaic.widths import padded_head_dim
from jax_fa.call import Axes, Dims, Operands, Problem

MOVING = ("query", "dout", "key", "value")


def bias_gradient(
    problem: Problem, operands: Operands, d: Dims, saved: RowStatistics, tiles: Tiles
) -> jax.Array:
    """`*#B #N Sq Skv`, in full where bias is and in the batch dims that vmap added, and in bias's dtype."""
    g = Geometry.of(problem, operands, d, tiles, pack=False)
    bias = operands.bias
    arrays = {
        **stored(problem, operands, saved),
        **by_rows(g, operands, saved),
    }
    full = tuple(
        size if i < problem.mapped or bias.shape[i] != 1 else 1 for i, size in enumerate((*d.B, d.N))
    )
    given = arrays["bias_tile"]
    out = jax.ShapeDtypeStruct((*full, *given.shape[-2:]), given.dtype)
    found = _BiasGradient(g, arrays, full).call(out)
    return cut(found, (*full, d.Sq, d.Skv)).astype(bias.dtype)


class _BiasGradient:
    """The kernel of one call; `full` is the gradient's shape but for the last two dims."""

    def __init__(self, g: Geometry, arrays: Arrays, full: tuple[int, ...]) -> None:
        self.g, self.tiles, self.problem, self.arrays, self.full = g, g.tiles, g.problem, arrays, full
        self.dtype = arrays["query"].dtype
        self.D, self.Dv = padded_head_dim(g.dims.D), padded_head_dim(g.dims.Dv)
        self.by_row = [name for name in BY_ROW if name in arrays]
        self.by_key = [name for name in BY_KEY if name in arrays]

    @property
    def summed(self) -> tuple[int, ...]:
        """How many batch entries and heads share a number of the bias, by dim."""
        sizes = (*self.g.dims.B, self.g.dims.N)
        return tuple(1 if kept == size else size for kept, size in zip(self.full, sizes, strict=True))

    def stored(self, name: str) -> tuple[Axes, int]:
        axes = "out_axes" if name == "dout" else f"{name}_axes"
        return getattr(self.problem, axes), self.D if name in ("query", "key") else self.Dv

    def scratch(self) -> dict[str, Any]:
        t, width = self.tiles, self.tiles.width
        found: dict[str, Any] = {}
        for name in MOVING:
            rows = (width,) if name in ("key", "value") else (t.consumers, ROWS)
            found[name] = swizzled((t.stages, *rows, self.stored(name)[1]), self.dtype)
        bias = self.arrays["bias_tile"]
        atom = atom_of(width, bias.shape[-1], bias.dtype)
        found["bias_tile"] = swizzled((t.consumers, ROWS, width), bias.dtype, atom)
        copies = 2 * t.consumers + 2
        if "mask_tile" in self.arrays:
            mask = self.arrays["mask_tile"]
            atom = atom_of(width, mask.shape[-1], mask.dtype)
            found["mask_tile"] = swizzled((t.stages, t.consumers, ROWS, width), mask.dtype, atom)
            copies += t.consumers
        return found | {
            "bias_here": plgpu.Barrier(num_barriers=t.consumers),
            "here": plgpu.Barrier(num_barriers=t.stages, num_arrivals=copies),
            "read": plgpu.Barrier(num_barriers=t.stages, num_arrivals=t.consumers),
        }

    def call(self, out) -> jax.Array:
        def block(arrays, scratch, index) -> _Block:
            return _Block(self, arrays, scratch, index)

        blocks = math.prod(self.full) * self.g.row_tiles * self.g.key_tiles
        results = {"bias": out}
        return launch("bias_gradient", self.tiles, blocks, block, self.arrays, results, self.scratch())[
            "bias"
        ]


def _unravel(index, sizes: tuple[int, ...]) -> tuple:
    found = []
    for size in reversed(sizes):
        found.append(lax.rem(index, size))
        index = lax.div(index, size)
    return tuple(reversed(found))


class _Block:
    """What one thread block does. Blocks that run together share rows, or keys."""

    def __init__(self, kernel: _BiasGradient, arrays, scratch, block) -> None:
        self.kernel, self.g, self.tiles = kernel, kernel.g, kernel.tiles
        self.arrays, self.scratch = arrays, scratch
        *self.entry, self.row_tile, self.key_tile = _unravel(
            block, (*kernel.full, self.g.row_tiles, self.g.key_tiles)
        )

    def _place(self, i) -> tuple[tuple, Any]:
        """Batch indices and head of the i-th of those that share this tile."""
        inside = _unravel(i, self.kernel.summed)
        *batch, head = (a + b for a, b in zip(self.entry, inside, strict=True))
        return tuple(batch), head

    def _seen(self, i):
        """Whether any row of the tile sees any of its keys there."""
        if "ranges" not in self.arrays:
            return self.key_tile >= 0
        batch, head = self._place(i)
        ref = self.arrays["ranges"]
        where = (*clip_index(ref.shape[:-2], (*batch, head)), self.row_tile)
        return (ref[(*where, 0)] <= self.key_tile) & (self.key_tile < ref[(*where, 3)])

    def _over(self, step, carry):
        """`step(i, carry)` where something is seen."""

        def one(i, carry):
            return lax.cond(self._seen(i), lambda: step(i, carry), lambda: carry)

        return lax.fori_loop(0, math.prod(self.kernel.summed), one, carry)

    def _rows(self, warpgroup):
        start = self.row_tile * self.g.block_positions + warpgroup * ROWS
        return span(start, ROWS, ROWS)

    def _keys(self):
        return span(self.key_tile * self.tiles.width, self.tiles.width, self.tiles.width)

    # --- the producer

    def produce(self) -> None:
        self._over(self._load, jnp.int32(0))

    def _load(self, i, count):
        kernel, t = self.kernel, self.tiles
        batch, head = self._place(i)
        key_head = lax.div(head, self.g.dims.G)
        slot = lax.rem(count, t.stages)
        here = self.scratch["here"].at[slot]
        wait_if(count >= t.stages, self.scratch["read"].at[slot])
        for name in MOVING:
            axes, columns = kernel.stored(name)
            ref, whole = self.arrays[name], span(0, columns, columns)
            if name in ("key", "value"):
                source = tile_at(ref, axes, batch, self._keys(), key_head, whole)
                plgpu.copy_gmem_to_smem(source, self.scratch[name].at[slot], here)
                continue
            for consumer in range(t.consumers):
                source = tile_at(ref, axes, batch, self._rows(consumer), head, whole)
                plgpu.copy_gmem_to_smem(source, self.scratch[name].at[slot, consumer], here)
        if "mask_tile" in self.arrays:
            ref = self.arrays["mask_tile"]
            where = clip_index(ref.shape[:-2], (*batch, head))
            for consumer in range(t.consumers):
                source = ref.at[(*where, self._rows(consumer), self._keys())]
                plgpu.copy_gmem_to_smem(source, self.scratch["mask_tile"].at[slot, consumer], here)
        return count + 1

    # --- consumers

    def consume(self, warpgroup, out) -> None:
        bias = self.scratch["bias_tile"].at[warpgroup]
        ref = self.arrays["bias_tile"]
        where = clip_index(ref.shape[:-2], tuple(self.entry))
        plgpu.copy_gmem_to_smem(
            ref.at[(*where, self._rows(warpgroup), self._keys())],
            bias,
            self.scratch["bias_here"].at[warpgroup],
        )
        total = self._over(lambda i, n: n + 1, jnp.int32(0))
        plgpu.barrier_wait(self.scratch["bias_here"].at[warpgroup])
        acc = plgpu.layout_cast(jnp.zeros((ROWS, self.tiles.width), jnp.float32), WGMMA)
        _, acc = self._over(lambda i, carry: self._step(warpgroup, i, total, carry), (jnp.int32(0), acc))
        bias[...] = acc.astype(ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(bias, out.at[(*self.entry, self._rows(warpgroup), self._keys())])
        plgpu.wait_smem_to_gmem(0)

    def _numbers(self, warpgroup, i) -> dict[str, Any]:
        """Numbers per row and per key there, and the dropout key."""
        batch, head = self._place(i)
        found = {}
        rows = pl.ds(self.row_tile * self.g.block_rows + warpgroup * ROWS, ROWS)
        keys = pl.ds(self.key_tile * self.tiles.width, self.tiles.width)
        for names, at, layout in ((self.kernel.by_row, rows, ROW), (self.kernel.by_key, keys, COLUMN)):
            for name in names:
                ref = self.arrays[name]
                where = clip_index(ref.shape[:-1], (*batch, head))
                found[name] = registers(ref.at[(*where, at)], layout)
        if "seed" in self.arrays:
            ref = self.arrays["seed"]
            where = clip_index(ref.shape[:-1], batch)
            found["seed"] = (ref[(*where, 0)], ref[(*where, 1)])
        return found

    def _step(self, warpgroup, i, total, carry):
        kernel, scratch = self.kernel, self.scratch
        count, acc = carry
        slot = lax.rem(count, self.tiles.stages)
        numbers = self._numbers(warpgroup, i)
        tile = Tile(
            problem=kernel.problem,
            shape=(ROWS, self.tiles.width),
            row_axis=0,
            first_row=self.row_tile * self.g.block_positions + warpgroup * ROWS,
            first_key=self.key_tile * self.tiles.width,
            positions=ROWS,
            Skv=self.g.dims.Skv,
        )

        def read(name: str):
            if name == "bias_tile":
                return registers(scratch[name].at[warpgroup], WGMMA)
            if name == "mask_tile" and name in self.arrays:
                return registers(scratch[name].at[slot, warpgroup], WGMMA)
            return numbers.get(name)

        def weights(s):
            done = logits.finish(tile, s, read, plain=False, bounded=True)
            return logits.weights(tile, done, numbers["maximum"], plain=False), done.without_x()

        plgpu.barrier_wait(scratch["here"].at[slot])
        (p, done), dp = two_products(
            (scratch["query"].at[slot, warpgroup], scratch["key"].at[slot]),
            (scratch["dout"].at[slot, warpgroup], scratch["value"].at[slot]),
            weights,
            together=kernel.D <= MOST_TOGETHER,
        )
        if "mask_tile" in self.arrays:
            plgpu.commit_smem()  # it was read in the ordinary way
        again = count + self.tiles.stages < total
        arrive_if(again, scratch["read"].at[slot])
        dp = logits.kept(tile, logits.keep(tile, read), dp, read)
        inverse = numbers["inverse"]
        ds = p * (dp * tile.rows(inverse) - tile.rows(numbers["delta"] * inverse))
        if done.slope is not None:
            ds = ds * done.slope
        return count + 1, acc + jnp.where(done.visible, ds, 0.0)
