"""The forward kernel: out, softmax max and softmax sum of a tile of rows per thread block.

One producer warpgroup has the copy engine bring tiles of keys and values into a ring of shared memory; two or three
consumer warpgroups, 64 rows each, compute (Dao 2023, arXiv:2307.08691; Shah et al. 2024, arXiv:2407.08608):

    s = q k^T,  m' = max(m, s),  p = exp(s - m'),  l = l exp(m - m') + sum p,  acc = acc exp(m - m') + p v

Consumers take turns at the tensor cores, so that one's exponentials run beside another's products: a turn is the
product p v of one tile and then q k^T of the next. Key tiles that no row of the block sees are not loaded; those that
every row sees whole are not compared with bounds.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa.mosaic import logits, tuning
from jax_fa.mosaic.geometry import Geometry, clip_index, tile_at
from jax_fa.mosaic.logits import LOG2E, ROW, WGMMA, Tile
from jax_fa.mosaic.memory import atom_of, multiply_add, span, swizzled
from jax_fa.mosaic.operands import (
    RANGE,
    Arrays,
    additive,
    aligned,
    aligned_head_dim,
    aligned_length,
    dropping,
    visibility,
)
from jax_fa.mosaic.tuning import ROWS
from jax_fa.mosaic.widths import padded_head_dim
from jax_fa.problem import Operands, Problem, stored_shape
from jax_fa.softmax import FLT_MAX

BY_TILE = ("bias_tile", "mask_tile")
BY_KEY = ("bias_keys", "mask_keys")
BY_ROW = ("lower", "upper", "bias_rows", "slopes", "head_word", "batch_word")


def forward(problem: Problem, operands: Operands, tiles: tuning.Tiles):
    """(out, softmax max, softmax sum), as a backend returns them."""
    g = Geometry.of(problem, operands, tiles)
    arrays: Arrays = {
        "query": aligned(operands.query, problem.query_axes),
        "key": aligned(operands.key, problem.key_axes),
        "value": aligned(operands.value, problem.value_axes),
        **visibility(g, operands),
        **additive(g, operands),
        **dropping(g, operands),
    }
    d = g.dims
    shape = stored_shape((*d.B, aligned_length(d.Sq), d.N, aligned_head_dim(d.Dv)), problem.out_axes)
    stats = jax.ShapeDtypeStruct(g.packed_shape, jnp.float32)
    kernel = _Kernel(g, arrays)
    out, m, l = plgpu.kernel(
        kernel.body,
        out_type=(jax.ShapeDtypeStruct(shape, operands.query.dtype), stats, stats),
        scratch_types=kernel.scratch(),
        grid=(g.row_tiles * g.units * _product(d.B),),
        grid_names=("block",),
        num_threads=tiles.consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="jax_fa_forward",
    )(arrays)
    wanted = stored_shape((*d.B, d.Sq, d.N, d.Dv), problem.out_axes)
    if out.shape != wanted:
        out = out[tuple(slice(size) for size in wanted)]
    return out, g.unpack(m), g.unpack(l)


def _product(sizes) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


class _Kernel:
    """The kernel of one call; its attributes are what is known when it is traced."""

    def __init__(self, g: Geometry, arrays: Arrays) -> None:
        self.g, self.tiles, self.problem, self.arrays = g, g.tiles, g.problem, arrays
        self.dtype = arrays["query"].dtype
        self.D, self.Dv = padded_head_dim(g.dims.D), padded_head_dim(g.dims.Dv)
        self.plain = logits.is_plain(g.problem, arrays)
        self.by_tile = [name for name in BY_TILE if name in arrays]
        self.by_key = [name for name in BY_KEY if name in arrays]
        # A tile per row or per pack of heads; out leaves through the query's memory where it fits.
        self.out_in_query = self.D == self.Dv

    def scratch(self) -> dict[str, Any]:
        t, width = self.tiles, self.tiles.width
        found = {
            "query": swizzled((t.consumers, ROWS, self.D), self.dtype),
            "key": swizzled((t.stages, width, self.D), self.dtype),
            "value": swizzled((t.stages, width, self.Dv), self.dtype),
            "stats": plgpu.SMEM((2, t.consumers, ROWS), jnp.float32),
            "query_here": plgpu.Barrier(num_barriers=t.consumers, num_arrivals=self.g.heads),
            "key_here": plgpu.Barrier(num_barriers=t.stages, num_arrivals=self._copies_with_key()),
            "value_here": plgpu.Barrier(num_barriers=t.stages),
            "key_read": plgpu.Barrier(num_barriers=t.stages, num_arrivals=t.consumers),
            "value_read": plgpu.Barrier(num_barriers=t.stages, num_arrivals=t.consumers),
            "turn": plgpu.Barrier(num_barriers=t.consumers),
        }
        if not self.out_in_query:
            found["result"] = swizzled((t.consumers, ROWS, self.Dv), self.dtype)
        for name in self.by_tile:
            x = self.arrays[name]
            shape = (t.stages, t.consumers, ROWS, width)
            found[name] = swizzled(shape, x.dtype, atom_of(width, x.shape[-1], x.dtype))
        for name in self.by_key:
            found[name] = plgpu.SMEM((t.stages, width), jnp.float32)
        return found

    def _copies_with_key(self) -> int:
        return 1 + len(self.by_tile) * self.tiles.consumers * self.g.heads + len(self.by_key)

    # --- the body

    def body(self, arrays, out, m, l, **scratch) -> None:
        d, t = self.g.dims, self.tiles
        itemsize = jnp.dtype(self.dtype).itemsize
        batch, unit, tile = self.g.deal(
            lax.axis_index("block"),
            self.g.row_tiles,
            self.g.units,
            d.Skv * (d.D + d.Dv) * itemsize // max(1, d.G // self.g.heads),
            last_first=True,
        )
        block = _Block(self, arrays, scratch, batch, unit, tile)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < t.consumers)
        def _consume():
            if t.consumers > 1:
                plgpu.set_max_registers(t.REGISTERS[t.consumers][0], action="increase")
            block.consume(warpgroup, out, m, l)

        @pl.when(warpgroup == t.consumers)
        def _produce():
            if t.consumers > 1:
                plgpu.set_max_registers(t.REGISTERS[t.consumers][1], action="decrease")
            block.produce()


class _Block:
    """What one thread block does."""

    def __init__(self, kernel: _Kernel, arrays, scratch, batch, unit, tile) -> None:
        self.kernel, self.g, self.tiles = kernel, kernel.g, kernel.tiles
        self.arrays, self.scratch = arrays, scratch
        self.batch, self.unit, self.tile = batch, unit, tile
        self.ranges = self._ranges()

    def _ranges(self) -> dict[str, Any]:
        """The key tiles to visit, and which of them are visible whole."""
        g = self.g
        if "ranges" not in self.arrays:
            whole = g.dims.Skv // self.tiles.width
            return dict(zip(RANGE, (0, 0, whole, g.key_tiles), strict=True))
        ref = self.arrays["ranges"]
        where = clip_index(ref.shape[:-2], (*self.batch, self.unit))
        return {name: ref[(*where, self.tile, i)] for i, name in enumerate(RANGE)}

    def _slot(self, key_tile):
        return lax.rem(key_tile - self.ranges["first"], self.tiles.stages)

    def _first_row(self, warpgroup):
        """Position of a warpgroup's first row."""
        return self.tile * self.g.block_positions + warpgroup * self.g.positions

    # --- the producer

    def produce(self) -> None:
        g, t, problem = self.g, self.tiles, self.kernel.problem
        head = g.key_head(self.unit)
        first = self.ranges["first"]

        @pl.loop(first, self.ranges["last"])
        def _load(key_tile):
            slot = self._slot(key_tile)
            keys = span(key_tile * t.width, t.width, t.width)
            again = key_tile - first >= t.stages

            @pl.when(again)
            def _():
                plgpu.barrier_wait(self.scratch["key_read"].at[slot])

            for name, axes, columns in (
                ("key", problem.key_axes, self.kernel.D),
                ("value", problem.value_axes, self.kernel.Dv),
            ):
                if name == "value":
                    self._load_logits(key_tile, keys, slot)

                    @pl.when(again)
                    def _():
                        plgpu.barrier_wait(self.scratch["value_read"].at[slot])

                source = tile_at(self.arrays[name], axes, self.batch, keys, head, span(0, columns, columns))
                plgpu.copy_gmem_to_smem(
                    source, self.scratch[name].at[slot], self.scratch[f"{name}_here"].at[slot]
                )

    def _load_logits(self, key_tile, keys, slot) -> None:
        """What is added to, or hidden of, a tile of logits comes with its keys."""
        g, here = self.g, self.scratch["key_here"].at[slot]
        for name in self.kernel.by_tile:
            ref = self.arrays[name]
            for consumer in range(self.tiles.consumers):
                rows = span(self._first_row(consumer), g.positions, g.positions)
                for i in range(g.heads):
                    where = clip_index(ref.shape[:-2], (*self.batch, self.unit * g.heads + i))
                    target = self.scratch[name].at[slot, consumer, pl.ds(i * g.positions, g.positions)]
                    plgpu.copy_gmem_to_smem(ref.at[(*where, rows, keys)], target, here)
        for name in self.kernel.by_key:
            ref = self.arrays[name]
            where = clip_index(
                ref.shape[:-1], (*self.batch, self.unit)
            )  # heads are not packed where this has any
            plgpu.copy_gmem_to_smem(ref.at[(*where, keys)], self.scratch[name].at[slot], here)

    # --- a consumer

    def consume(self, warpgroup, out, m, l) -> None:
        kernel, t = self.kernel, self.tiles
        first, last = self.ranges["first"], self.ranges["last"]
        self._load_query(warpgroup)
        rows = self._row_vectors(warpgroup)
        carry = (
            plgpu.layout_cast(jnp.zeros((ROWS, kernel.Dv), jnp.float32), WGMMA),
            plgpu.layout_cast(jnp.full((ROWS,), -FLT_MAX, jnp.float32), ROW),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW),
        )
        plgpu.barrier_wait(self.scratch["query_here"].at[warpgroup])

        @pl.when(first < last)
        def _():
            plgpu.barrier_wait(self.scratch["key_here"].at[0])
            self._wait_turn(warpgroup, warpgroup > 0)

        def sweep(begin, end, carry, bounded):
            def step(key_tile, carry):
                return self._step(warpgroup, key_tile, carry, rows, bounded)

            return lax.fori_loop(begin, end, step, carry)

        inner_first, inner_last = self.ranges["inner_first"], self.ranges["inner_last"]
        if "lower" in self.arrays:
            carry = sweep(first, inner_first, carry, True)
            first = inner_first
        carry = sweep(first, inner_last, carry, False)
        if not (isinstance(inner_last, int) and inner_last == last):
            carry = sweep(inner_last, last, carry, True)

        @pl.when(self.ranges["first"] < last)
        def _():
            self._pass_turn(warpgroup, warpgroup < t.consumers - 1)

        self._store(warpgroup, carry, out, m, l)

    def _load_query(self, warpgroup) -> None:
        kernel, g = self.kernel, self.g
        positions = span(self._first_row(warpgroup), g.positions, g.positions)
        for i in range(g.heads):
            source = tile_at(
                self.arrays["query"],
                kernel.problem.query_axes,
                self.batch,
                positions,
                self.unit * g.heads + i,
                span(0, kernel.D, kernel.D),
            )
            target = self.scratch["query"].at[warpgroup, pl.ds(i * g.positions, g.positions)]
            plgpu.copy_gmem_to_smem(source, target, self.scratch["query_here"].at[warpgroup])

    def _row_vectors(self, warpgroup) -> dict[str, Any]:
        """Numbers per row, and the dropout key."""
        found = {}
        at = pl.ds(self.tile * self.g.block_rows + warpgroup * ROWS, ROWS)
        for name in BY_ROW:
            if name in self.arrays:
                ref = self.arrays[name]
                where = clip_index(ref.shape[:-1], (*self.batch, self.unit))
                found[name] = plgpu.load(ref.at[(*where, at)], layout=ROW, optimized=False)
        if "seed" in self.arrays:
            ref = self.arrays["seed"]
            where = clip_index(ref.shape[:-1], self.batch)
            found["seed"] = (ref[(*where, 0)], ref[(*where, 1)])
        return found

    def _step(self, warpgroup, key_tile, carry, rows, bounded: bool):
        """One tile of keys."""
        kernel, scratch = self.kernel, self.scratch
        acc, m, l = carry
        slot = self._slot(key_tile)

        def product(ref):
            plgpu.wgmma(ref, scratch["query"].at[warpgroup], scratch["key"].at[slot].transpose((1, 0)))
            self._pass_turn(warpgroup)
            return ref[...]

        s = pl.run_scoped(product, plgpu.ACC((ROWS, self.tiles.width), jnp.float32))
        tile = Tile(
            problem=kernel.problem,
            shape=(ROWS, self.tiles.width),
            row_axis=0,
            first_row=self._first_row(warpgroup),
            first_key=key_tile * self.tiles.width,
            positions=self.g.positions,
            Skv=self.g.dims.Skv,
        )

        def read(name):
            if name in kernel.by_tile:
                return plgpu.load(scratch[name].at[slot, warpgroup], layout=WGMMA, optimized=False)
            if name in kernel.by_key:
                return plgpu.load(scratch[name].at[slot], layout=logits.COLUMN, optimized=False)
            return rows.get(name)

        done = logits.finish(tile, s, read, kernel.plain, bounded)
        if kernel.by_tile or kernel.by_key:
            plgpu.commit_smem()  # registers have it: the copy engine may write there again
        self._release("key_read", key_tile)

        # m holds the maximum times c; finite, so that a row which has seen nothing gives exp2(-inf - m) = 0.
        m_new = jnp.maximum(m, done.x.max(axis=1) * jnp.float32(done.c))
        rescale = jnp.exp2(m - m_new)
        p = jnp.exp2(done.x * jnp.float32(done.c) - tile.rows(m_new))
        l = l * rescale + p.sum(axis=1)
        kept = logits.keep(tile, read)
        if kept is not None:
            p = jnp.where(kept, p, 0.0)
        narrow = p.astype(kernel.dtype)
        acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0])
        acc, narrow, m_new, l = lax.optimization_barrier((acc, narrow, m_new, l))

        plgpu.barrier_wait(scratch["value_here"].at[slot])
        self._wait_turn(warpgroup)

        def wait_for_keys():
            @pl.when(key_tile + 1 < self.ranges["last"])
            def _():
                plgpu.barrier_wait(scratch["key_here"].at[self._slot(key_tile + 1)])

        acc = multiply_add(acc, narrow, scratch["value"].at[slot], wait_for_keys)
        self._release("value_read", key_tile)
        return acc, m_new, l

    def _release(self, barrier: str, key_tile) -> None:
        """Tells the producer that a slot is free, if it is to be filled again."""

        @pl.when(key_tile + self.tiles.stages < self.ranges["last"])
        def _():
            plgpu.barrier_arrive(self.scratch[barrier].at[self._slot(key_tile)])

    def _wait_turn(self, warpgroup, when=None) -> None:
        if self.tiles.consumers == 1:
            return
        turn = self.scratch["turn"].at[warpgroup]
        if when is None:
            plgpu.barrier_wait(turn)
        else:
            pl.when(when)(lambda: plgpu.barrier_wait(turn))

    def _pass_turn(self, warpgroup, when=None) -> None:
        if self.tiles.consumers == 1:
            return
        turn = self.scratch["turn"].at[lax.rem(warpgroup + 1, self.tiles.consumers)]
        if when is None:
            plgpu.barrier_arrive(turn)
        else:
            pl.when(when)(lambda: plgpu.barrier_arrive(turn))

    def _store(self, warpgroup, carry, out, m_out, l_out) -> None:
        kernel, g = self.kernel, self.g
        acc, m, l = carry
        empty = l == 0.0
        inverse = jnp.where(
            empty, 0.0, 1.0 / (jnp.where(empty, 1.0, l) * jnp.float32(kernel.problem.keep_prob))
        )
        acc = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
        staged = self.scratch["query" if kernel.out_in_query else "result"].at[warpgroup]
        stats = self.scratch["stats"]
        staged[...] = acc.astype(kernel.dtype)
        # Statistics are in nats of the logits themselves, whatever c held.
        stats[0, warpgroup] = jnp.where(empty, -FLT_MAX, m * jnp.float32(1 / LOG2E))
        stats[1, warpgroup] = l
        plgpu.commit_smem()
        for i in range(g.heads):
            target = tile_at(
                out,
                kernel.problem.out_axes,
                self.batch,
                span(self._first_row(warpgroup), g.positions, g.positions),
                self.unit * g.heads + i,
                span(0, kernel.Dv, kernel.Dv),
            )
            plgpu.copy_smem_to_gmem(
                staged.at[pl.ds(i * g.positions, g.positions)], target, commit_group=False
            )
        at = pl.ds(self.tile * g.block_rows + warpgroup * ROWS, ROWS)
        for i, ref in enumerate((m_out, l_out)):
            plgpu.copy_smem_to_gmem(
                stats.at[i, warpgroup], ref.at[(*self.batch, self.unit, at)], commit_group=False
            )
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)
