"""What the kernels share in which rows stay and keys move: the forward, and dq.

A thread block has one producer warpgroup, which has TMA load tiles of keys and values into the stages of a pipeline in
shared memory, and consumers with 64 rows each. Key tiles that are masked for all rows of the block are not loaded;
those that are visible to every row are not compared with bounds.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa.backends.mosaic import logits, nan_safe
from jax_fa.backends.mosaic.geometry import Geometry, clip_index, tile_at
from jax_fa.backends.mosaic.inputs import BY_KEY, BY_ROW, BY_TILE, RANGE, Inputs
from jax_fa.backends.mosaic.launch import Block, Kernel
from jax_fa.backends.mosaic.logits import ROW, WGMMA, Tile
from jax_fa.backends.mosaic.memory import Ring, arrive_if, atom_of, registers, span, swizzled, wait_if
from jax_fa.backends.mosaic.tuning import ROWS
from jax_fa.call import Axes


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RowSmem:
    """Shared memory and barriers; what a kernel does without is None."""

    bias_keys: Any = None  # stages x width; so are the others by key
    bias_tile: Any = None  # stages x consumers x 64 x width
    again_here: Any = None  # these three, nan_marker, turn_to_vote, voted and votes: see nan_safe.py
    again_read: Any = None
    cleaned: Any = None
    dout: Any = None  # consumers x 64 x Dv
    key: Ring  # stages x width x D; with it come tiles and vectors of bias and mask
    mask_keys: Any = None
    mask_tile: Any = None
    nan_marker: Any = None
    query: Any  # consumers x 64 x D
    result: Any = None  # consumers x 64 x Dv: out, where query's tile has no room for it
    rows_here: Any  # a barrier per consumer: its rows are loaded
    segment_key: Any = None
    stats: Any = None  # 2 x consumers x 64: softmax max and sum
    sums: Any = None  # sums over keys x consumers x 64
    turn: Any = None  # a barrier per consumer: its turn at the tensor cores (ping-pong scheduling)
    turn_to_vote: Any = None
    value: Ring  # stages x width x Dv
    voted: Any = None
    votes: Any = None


class RowKernel(Kernel):
    """Rows stay: those of `heads` query heads that share a key head."""

    def __init__(self, g: Geometry, inputs: Inputs) -> None:
        super().__init__(g, inputs)
        self.by_tile, self.by_key = inputs.present(BY_TILE), inputs.present(BY_KEY)
        self.by_row = inputs.present(BY_ROW)

    def staying(self) -> dict[str, tuple[Axes, int]]:
        """The arrays whose rows stay: the order they are stored in, and their columns in shared memory."""
        raise NotImplementedError

    def row_smem(self, **more: Any) -> RowSmem:
        """The shared memory that both kernels have, and `more`."""
        t, width = self.tiles, self.tiles.width
        for name, (_, n) in self.staying().items():
            more[name] = swizzled((t.consumers, ROWS, n), self.dtype)
        for name in self.by_tile:
            x = getattr(self.inputs, name)
            shape = (t.stages, t.consumers, ROWS, width)
            more[name] = swizzled(shape, x.dtype, atom_of(width, x.shape[-1], x.dtype))
        for name in self.by_key:
            more[name] = plgpu.SMEM((t.stages, width), getattr(self.inputs, name).dtype)
        if nan_safe.may_mask(self.inputs):
            more |= nan_safe.smem(t.consumers, width, self._copies_with_key() + 1)
        key = swizzled((t.stages, width, self.D), self.dtype)
        value = swizzled((t.stages, width, self.Dv), self.dtype)
        return RowSmem(
            key=Ring.of(key, t.stages, t.consumers, self._copies_with_key()),
            value=Ring.of(value, t.stages, t.consumers),
            rows_here=plgpu.Barrier(
                num_barriers=t.consumers, num_arrivals=self.g.heads * len(self.staying())
            ),
            **more,
        )

    def _copies_with_key(self) -> int:
        return 1 + len(self.by_tile) * self.tiles.consumers * self.g.heads + len(self.by_key)

    @property
    def blocks(self) -> int:
        return self.g.row_tiles * self.g.units * math.prod(self.g.dims.B)

    def place(self, index) -> tuple:
        """(indices of the batch dims, unit of query heads, tile of rows)."""
        g, d = self.g, self.g.dims
        shared = d.Skv * (d.D + d.Dv) * jnp.dtype(self.dtype).itemsize * g.heads // d.G
        return g.deal(index, g.row_tiles, g.units, shared, last_first=True)


class RowBlock(Block):
    kernel: RowKernel
    smem: RowSmem
    cleaned: str  # which of the arrays that move is summed over keys: a second pass removes non-finite values there

    def __init__(self, kernel: RowKernel, inputs: Inputs, smem, multiply_add, batch, unit, tile) -> None:
        super().__init__(kernel, inputs, smem, multiply_add)
        self.batch, self.unit, self.tile = batch, unit, tile
        self.ranges = self._ranges()

    def _ranges(self) -> dict[str, Any]:
        """The key tiles to visit, and which of them are visible whole."""
        g = self.g
        if self.inputs.ranges is None:
            whole = g.dims.Skv // self.tiles.width
            return dict(zip(RANGE, (0, 0, whole, g.key_tiles), strict=True))
        ref = self.inputs.ranges
        where = clip_index(ref.shape[:-2], (*self.batch, self.unit))
        return {name: ref[(*where, self.tile, i)] for i, name in enumerate(RANGE)}

    def slot(self, key_tile):
        return lax.rem(key_tile - self.ranges["first"], self.tiles.stages)

    def first_row(self, warpgroup):
        """Position of a warpgroup's first row."""
        return self.tile * self.g.block_positions + warpgroup * self.g.positions

    # --- the producer

    def produce(self) -> None:
        t, smem = self.tiles, self.smem
        first, last = self.ranges["first"], self.ranges["last"]

        @pl.loop(first, last)
        def _load(key_tile):
            slot = self.slot(key_tile)
            for name in ("key", "value"):
                ring = getattr(smem, name)
                wait_if(key_tile - first >= t.stages, ring.read.at[slot])
                self._load(name, key_tile, slot, ring.here.at[slot])

        if nan_safe.may_mask(self.inputs):

            @pl.when(nan_safe.again(smem, t.consumers))
            def _():
                @pl.loop(first, last)
                def _load_again(key_tile):
                    wait_if(key_tile > first, smem.again_read)
                    for name in ("key", "value"):
                        self._load(name, key_tile, 0, smem.again_here)

    def _load(self, name: str, key_tile, slot, here) -> None:
        g, t = self.g, self.tiles
        keys = span(key_tile * t.width, t.width, t.width)
        columns = self.kernel.D if name == "key" else self.kernel.Dv
        axes, head = self.kernel.problem.axes(name), g.key_head(self.unit)
        source = tile_at(getattr(self.inputs, name), axes, self.batch, keys, head, span(0, columns, columns))
        plgpu.copy_gmem_to_smem(source, getattr(self.smem, name).tile.at[slot], here)
        if name == "key":
            self._load_logits(keys, slot, here)

    def _load_logits(self, keys, slot, here) -> None:
        """Bias and mask of a tile of logits come with its keys."""
        g = self.g
        for name in self.kernel.by_tile:
            ref = getattr(self.inputs, name)
            for consumer in range(self.tiles.consumers):
                rows = span(self.first_row(consumer), g.positions, g.positions)
                for i in range(g.heads):
                    where = clip_index(ref.shape[:-2], (*self.batch, self.unit * g.heads + i))
                    tile = getattr(self.smem, name)
                    target = tile.at[slot, consumer, pl.ds(i * g.positions, g.positions)]
                    plgpu.copy_gmem_to_smem(ref.at[(*where, rows, keys)], target, here)
        for name in self.kernel.by_key:
            ref = getattr(self.inputs, name)
            # Heads are not packed where these have any.
            where = clip_index(ref.shape[:-1], (*self.batch, self.unit))
            plgpu.copy_gmem_to_smem(ref.at[(*where, keys)], getattr(self.smem, name).at[slot], here)

    # --- consumers

    def load_rows(self, warpgroup) -> Inputs:
        """Starts the copies of the rows that stay, and loads scalars per row and the dropout key."""
        g = self.g
        for name, (axes, columns) in self.kernel.staying().items():
            for i in range(g.heads):
                target = getattr(self.smem, name).at[warpgroup, pl.ds(i * g.positions, g.positions)]
                source = self._rows_of(getattr(self.inputs, name), axes, warpgroup, i, columns)
                plgpu.copy_gmem_to_smem(source, target, self.smem.rows_here.at[warpgroup])
        packed = self.packed(warpgroup)
        found = {name: self.vector(name, self.batch, self.unit, packed, ROW) for name in self.kernel.by_row}
        return Inputs(**found, seed=self.seed(self.batch))

    def _rows_of(self, ref, axes: Axes, warpgroup, i: int, columns: int):
        """A warpgroup's rows of its i-th head in a stored array."""
        g = self.g
        rows = span(self.first_row(warpgroup), g.positions, g.positions)
        return tile_at(ref, axes, self.batch, rows, self.unit * g.heads + i, span(0, columns, columns))

    def packed(self, warpgroup):
        """Where a warpgroup's rows lie in arrays in packed order."""
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

    def reader(self, warpgroup, slot, rows: Inputs, again: bool) -> logits.Read:
        def read(name: str):
            if name == "nan_marker":
                return registers(self.smem.nan_marker, logits.COLUMN) if again else None
            if name in self.kernel.by_tile:
                return registers(getattr(self.smem, name).at[slot, warpgroup], WGMMA)
            if name in self.kernel.by_key:
                return registers(getattr(self.smem, name).at[slot], logits.COLUMN)
            return getattr(rows, name)

        return read

    def start(self) -> tuple[Any, ...]:
        """The sums before any tile. Made anew where it is needed, so that no register holds it meanwhile."""
        raise NotImplementedError

    def sweep(self, step):
        """`step(key_tile, carry, bounded)` over the key tiles to visit; `bounded`: not all of it may be visible."""
        first, inner_first, inner_last, last = (self.ranges[name] for name in RANGE)

        def run(begin, end, carry, bounded: bool):
            if isinstance(begin, int) and isinstance(end, int) and begin == end:
                return carry
            return lax.fori_loop(begin, end, lambda u, carry: step(u, carry, bounded), carry)

        carry = self.start()
        if self.inputs.seed is not None:  # beside drawing bits, comparing costs nothing: one loop, not three
            bounded = self.inputs.ranges is not None or bool(self.g.dims.Skv % self.tiles.width)
            return run(first, last, carry, bounded)
        if self.inputs.lower is not None:
            carry = run(first, inner_first, carry, True)
            first = inner_first
        return run(inner_last, last, run(first, inner_last, carry, False), True)

    def sweep_again(self, warpgroup, step, carry):
        """The result of a sweep, or of a second, NaN-safe one where it is not finite: see nan_safe.py.

        `step(key_tile, carry)` finds its tile in slot 0.
        """
        if not nan_safe.may_mask(self.inputs):
            return carry
        smem, first, last = self.smem, self.ranges["first"], self.ranges["last"]
        nan_safe.vote(smem, warpgroup, self.tiles.consumers, carry[0])

        def one(key_tile, carry):
            plgpu.barrier_wait(smem.again_here)

            @pl.when(warpgroup == 0)
            def _():
                nan_safe.clean(getattr(smem, self.cleaned).tile.at[0], smem.nan_marker)
                plgpu.commit_smem()
                plgpu.barrier_arrive(smem.cleaned)

            plgpu.barrier_wait(smem.cleaned)
            carry = step(key_tile, carry)
            plgpu.commit_smem()
            arrive_if(key_tile + 1 < last, smem.again_read)
            return carry

        redo = nan_safe.again(smem, self.tiles.consumers)
        return lax.cond(redo, lambda: lax.fori_loop(first, last, one, self.start()), lambda: carry)

    def release(self, name: str, key_tile) -> None:
        """Tells the producer that a stage is free, if it is to be filled again."""
        if name == "key" and (self.kernel.by_tile or self.kernel.by_key):
            plgpu.commit_smem()  # they were read through the generic proxy; TMA may write there now
        again = key_tile + self.tiles.stages < self.ranges["last"]
        arrive_if(again, getattr(self.smem, name).read.at[self.slot(key_tile)])

    def store_rows(self, warpgroup, staged, out, axes: Axes, columns: int) -> None:
        """Starts the copies of a warpgroup's rows from shared memory to a stored array."""
        g = self.g
        for i in range(g.heads):
            target = self._rows_of(out, axes, warpgroup, i, columns)
            source = staged.at[pl.ds(i * g.positions, g.positions)]
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)

    def store_vector(self, warpgroup, staged, out) -> None:
        """Starts the copy of one scalar per row."""
        target = out.at[(*self.batch, self.unit, self.packed(warpgroup))]
        plgpu.copy_smem_to_gmem(staged, target, commit_group=False)
