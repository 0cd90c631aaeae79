"""What the kernels share in which rows stay and keys move: the forward, and the gradient of query.

A thread block has one producer warpgroup, which has the copy engine bring tiles of keys and values into a ring of shared
memory, and consumers with 64 rows each. Key tiles that no row of the block sees are not loaded; those that every row
sees whole are not compared with bounds.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa.backends.mosaic import logits
from jax_fa.backends.mosaic import nan_safe as careful
from jax_fa.backends.mosaic.geometry import Geometry, clip_index, tile_at
from jax_fa.backends.mosaic.launch import launch
from jax_fa.backends.mosaic.logits import ROW, WGMMA, Tile
from jax_fa.backends.mosaic.memory import arrive_if, atom_of, registers, span, swizzled, wait_if
from jax_fa.backends.mosaic.operands import BY_KEY, BY_ROW, BY_TILE, RANGE, Arrays
from jax_fa.backends.mosaic.tuning import ROWS
from jax_fa.backends.mosaic.widths import padded_head_dim
from jax_fa.call import Axes


class RowKernel:
    """The kernel of one call; its attributes are what is known when it is traced."""

    block: type["RowBlock"]

    def __init__(self, g: Geometry, arrays: Arrays) -> None:
        self.g, self.tiles, self.problem, self.arrays = g, g.tiles, g.problem, arrays
        self.dtype = arrays["query"].dtype
        self.D, self.Dv = padded_head_dim(g.dims.D), padded_head_dim(g.dims.Dv)
        self.plain = g.plain
        self.by_tile = [name for name in BY_TILE if name in arrays]
        self.by_key = [name for name in BY_KEY if name in arrays]
        self.by_row = [name for name in BY_ROW if name in arrays]

    def staying(self) -> dict[str, tuple[Axes, int]]:
        """The arrays whose rows stay: the order they are stored in, and their columns in shared memory."""
        raise NotImplementedError

    def cleaned(self) -> str:
        """Which of the arrays that move is summed over keys: a careful pass looks for non-finite numbers there."""
        raise NotImplementedError

    def scratch(self) -> dict[str, Any]:
        t, width = self.tiles, self.tiles.width
        found = {
            name: swizzled((t.consumers, ROWS, n), self.dtype) for name, (_, n) in self.staying().items()
        }
        found |= {
            "key": swizzled((t.stages, width, self.D), self.dtype),
            "value": swizzled((t.stages, width, self.Dv), self.dtype),
            "rows_here": plgpu.Barrier(
                num_barriers=t.consumers, num_arrivals=self.g.heads * len(self.staying())
            ),
            "key_here": plgpu.Barrier(num_barriers=t.stages, num_arrivals=self._copies_with_key()),
            "value_here": plgpu.Barrier(num_barriers=t.stages),
            "key_read": plgpu.Barrier(num_barriers=t.stages, num_arrivals=t.consumers),
            "value_read": plgpu.Barrier(num_barriers=t.stages, num_arrivals=t.consumers),
        }
        for name in self.by_tile:
            x = self.arrays[name]
            shape = (t.stages, t.consumers, ROWS, width)
            found[name] = swizzled(shape, x.dtype, atom_of(width, x.shape[-1], x.dtype))
        for name in self.by_key:
            found[name] = plgpu.SMEM((t.stages, width), self.arrays[name].dtype)
        if careful.hides(self.arrays):
            found |= careful.scratch(t.consumers, width, self._copies_with_key() + 1)
        return found

    def _copies_with_key(self) -> int:
        return 1 + len(self.by_tile) * self.tiles.consumers * self.g.heads + len(self.by_key)

    def call(self, name: str, results: dict[str, Any]) -> dict[str, jax.Array]:
        """Runs the kernel; `results` are shapes by name."""
        g, d = self.g, self.g.dims
        shared = d.Skv * (d.D + d.Dv) * jnp.dtype(self.dtype).itemsize * g.heads // d.G

        def block(arrays, scratch, index) -> RowBlock:
            where = g.deal(index, g.row_tiles, g.units, shared, last_first=True)
            return self.block(self, arrays, scratch, *where)

        blocks = g.row_tiles * g.units * math.prod(d.B)
        return launch(name, self.tiles, blocks, block, self.arrays, results, self.scratch())


class RowBlock:
    """What one thread block does."""

    def __init__(self, kernel: RowKernel, arrays, scratch, batch, unit, tile) -> None:
        self.kernel, self.g, self.tiles = kernel, kernel.g, kernel.tiles
        self.arrays, self.scratch = arrays, scratch
        self.batch, self.unit, self.tile = batch, unit, tile
        self.ranges = self._ranges()

    def consume(self, warpgroup, *outs) -> None:
        raise NotImplementedError

    def _ranges(self) -> dict[str, Any]:
        """The key tiles to visit, and which of them are visible whole."""
        g = self.g
        if "ranges" not in self.arrays:
            whole = g.dims.Skv // self.tiles.width
            return dict(zip(RANGE, (0, 0, whole, g.key_tiles), strict=True))
        ref = self.arrays["ranges"]
        where = clip_index(ref.shape[:-2], (*self.batch, self.unit))
        return {name: ref[(*where, self.tile, i)] for i, name in enumerate(RANGE)}

    def slot(self, key_tile):
        return lax.rem(key_tile - self.ranges["first"], self.tiles.stages)

    def first_row(self, warpgroup):
        """Position of a warpgroup's first row."""
        return self.tile * self.g.block_positions + warpgroup * self.g.positions

    # --- the producer

    def produce(self) -> None:
        t, scratch = self.tiles, self.scratch
        first, last = self.ranges["first"], self.ranges["last"]

        @pl.loop(first, last)
        def _load(key_tile):
            slot = self.slot(key_tile)
            for name in ("key", "value"):
                wait_if(key_tile - first >= t.stages, scratch[f"{name}_read"].at[slot])
                self._load(name, key_tile, slot, scratch[f"{name}_here"].at[slot])

        if careful.hides(self.arrays):

            @pl.when(careful.again(scratch, t.consumers))
            def _():
                @pl.loop(first, last)
                def _load_again(key_tile):
                    wait_if(key_tile > first, scratch["careful_read"])
                    for name in ("key", "value"):
                        self._load(name, key_tile, 0, scratch["careful_here"])

    def _load(self, name: str, key_tile, slot, here) -> None:
        g, t, kernel = self.g, self.tiles, self.kernel
        keys = span(key_tile * t.width, t.width, t.width)
        axes, columns = {
            "key": (kernel.problem.key_axes, kernel.D),
            "value": (kernel.problem.value_axes, kernel.Dv),
        }[name]
        head = g.key_head(self.unit)
        source = tile_at(self.arrays[name], axes, self.batch, keys, head, span(0, columns, columns))
        plgpu.copy_gmem_to_smem(source, self.scratch[name].at[slot], here)
        if name == "key":
            self._load_logits(keys, slot, here)

    def _load_logits(self, keys, slot, here) -> None:
        """What is added to, or hidden of, a tile of logits comes with its keys."""
        g = self.g
        for name in self.kernel.by_tile:
            ref = self.arrays[name]
            for consumer in range(self.tiles.consumers):
                rows = span(self.first_row(consumer), g.positions, g.positions)
                for i in range(g.heads):
                    where = clip_index(ref.shape[:-2], (*self.batch, self.unit * g.heads + i))
                    target = self.scratch[name].at[slot, consumer, pl.ds(i * g.positions, g.positions)]
                    plgpu.copy_gmem_to_smem(ref.at[(*where, rows, keys)], target, here)
        for name in self.kernel.by_key:
            ref = self.arrays[name]
            # Heads are not packed where these have any.
            where = clip_index(ref.shape[:-1], (*self.batch, self.unit))
            plgpu.copy_gmem_to_smem(ref.at[(*where, keys)], self.scratch[name].at[slot], here)

    # --- consumers

    def load_rows(self, warpgroup) -> dict[str, Any]:
        """Starts the copies of the rows that stay, and loads the numbers per row and the dropout key."""
        g = self.g
        for name, (axes, columns) in self.kernel.staying().items():
            for i in range(g.heads):
                target = self.scratch[name].at[warpgroup, pl.ds(i * g.positions, g.positions)]
                source = self._rows_of(self.arrays[name], axes, warpgroup, i, columns)
                plgpu.copy_gmem_to_smem(source, target, self.scratch["rows_here"].at[warpgroup])
        found = {}
        for name in self.kernel.by_row:
            ref = self.arrays[name]
            where = clip_index(ref.shape[:-1], (*self.batch, self.unit))
            found[name] = registers(ref.at[(*where, self.packed(warpgroup))], ROW)
        if "seed" in self.arrays:
            ref = self.arrays["seed"]
            where = clip_index(ref.shape[:-1], self.batch)
            found["seed"] = (ref[(*where, 0)], ref[(*where, 1)])
        return found

    def _rows_of(self, ref, axes: Axes, warpgroup, i: int, columns: int):
        """A warpgroup's rows of its i-th head in a stored array."""
        g = self.g
        rows = span(self.first_row(warpgroup), g.positions, g.positions)
        return tile_at(ref, axes, self.batch, rows, self.unit * g.heads + i, span(0, columns, columns))

    def packed(self, warpgroup):
        """Where a warpgroup's rows lie in arrays with one number per row."""
        return pl.ds(self.tile * self.g.block_rows + warpgroup * ROWS, ROWS)

    def tile_of(self, warpgroup, key_tile) -> Tile:
        return Tile(
            problem=self.kernel.problem,
            shape=(ROWS, self.tiles.width),
            row_axis=0,
            first_row=self.first_row(warpgroup),
            first_key=key_tile * self.tiles.width,
            positions=self.g.positions,
            Skv=self.g.dims.Skv,
        )

    def reader(self, warpgroup, slot, rows: dict[str, Any], again: bool) -> logits.Read:
        def read(name: str):
            if name == "poison":
                return registers(self.scratch["poison"], logits.COLUMN) if again else None
            if name in self.kernel.by_tile:
                return registers(self.scratch[name].at[slot, warpgroup], WGMMA)
            if name in self.kernel.by_key:
                return registers(self.scratch[name].at[slot], logits.COLUMN)
            return rows.get(name)

        return read

    def start(self) -> tuple[Any, ...]:
        """The sums before any tile. Made anew where it is needed, so that no register holds it meanwhile."""
        raise NotImplementedError

    def sweep(self, step):
        """`step(key_tile, carry, bounded)` over the key tiles to visit; `bounded`: some row may not see all of it."""
        first, inner_first, inner_last, last = (self.ranges[name] for name in RANGE)

        def run(begin, end, carry, bounded: bool):
            if isinstance(begin, int) and isinstance(end, int) and begin == end:
                return carry
            return lax.fori_loop(begin, end, lambda u, carry: step(u, carry, bounded), carry)

        carry = self.start()
        if (
            "seed" in self.arrays
        ):  # beside drawing bits, comparing costs nothing: one loop to compile, not three
            return run(
                first, last, carry, bool("ranges" in self.arrays or self.g.dims.Skv % self.tiles.width)
            )
        if "lower" in self.arrays:
            carry = run(first, inner_first, carry, True)
            first = inner_first
        return run(inner_last, last, run(first, inner_last, carry, False), True)

    def sweep_again(self, warpgroup, step, carry):
        """The result of a sweep, or of a careful one from the start where it is not finite: see careful.py.

        `step(key_tile, carry)` finds its tile in slot 0.
        """
        if not careful.hides(self.arrays):
            return carry
        scratch, first, last = self.scratch, self.ranges["first"], self.ranges["last"]
        careful.vote(scratch, warpgroup, carry[0])

        def one(key_tile, carry):
            plgpu.barrier_wait(scratch["careful_here"])

            @pl.when(warpgroup == 0)
            def _():
                careful.clean(scratch[self.kernel.cleaned()].at[0], scratch["poison"])
                plgpu.commit_smem()
                plgpu.barrier_arrive(scratch["cleaned"])

            plgpu.barrier_wait(scratch["cleaned"])
            carry = step(key_tile, carry)
            plgpu.commit_smem()
            arrive_if(key_tile + 1 < last, scratch["careful_read"])
            return carry

        redo = careful.again(scratch, self.tiles.consumers)
        return lax.cond(redo, lambda: lax.fori_loop(first, last, one, self.start()), lambda: carry)

    def release(self, name: str, key_tile) -> None:
        """Tells the producer that a slot is free, if it is to be filled again."""
        if name == "key" and (self.kernel.by_tile or self.kernel.by_key):
            plgpu.commit_smem()  # they were read in the ordinary way; the copy engine may write there now
        again = key_tile + self.tiles.stages < self.ranges["last"]
        arrive_if(again, self.scratch[f"{name}_read"].at[self.slot(key_tile)])

    def store_rows(self, warpgroup, staged, out, axes: Axes, columns: int) -> None:
        """Starts the copies of a warpgroup's rows from shared memory to a stored array."""
        g = self.g
        for i in range(g.heads):
            target = self._rows_of(out, axes, warpgroup, i, columns)
            source = staged.at[pl.ds(i * g.positions, g.positions)]
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)

    def store_numbers(self, warpgroup, numbers, out) -> None:
        """Starts the copy of numbers per row."""
        target = out.at[(*self.batch, self.unit, self.packed(warpgroup))]
        plgpu.copy_smem_to_gmem(numbers, target, commit_group=False)
