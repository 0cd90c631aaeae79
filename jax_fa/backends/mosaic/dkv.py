"""The gradients of key and value, of a tile of keys per thread block, and sums over rows.

    p = exp(s - m) / l,  dv = (keep / keep_prob p)^T dout,  ds = p (dp - delta) ds/d(logits),  dk = scale ds^T q

Keys stay and rows move: those of every query head that reads this key head, one head after the other. Tiles lie as
`keys x rows`, so that weights are an operand of the next product where they are, in registers. Both sums fit beside
the tiles up to head_dim 128; above, dv and dk are computed by a kernel each.
"""

import math
from collections.abc import Callable
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
from jax_fa.backends.mosaic.memory import (
    MOST_TOGETHER,
    arrive_if,
    atom_of,
    hidden,
    multiply_add,
    one_product,
    registers,
    span,
    swizzled,
    two_products,
    wait_if,
)
from jax_fa.backends.mosaic.operands import (
    BY_HEAD,
    BY_KEY,
    BY_ROW,
    BY_TILE,
    RANGE,
    Arrays,
    RowStatistics,
    aligned,
    cut,
    for_keys,
    stored,
)
from jax_fa.backends.mosaic.tuning import ROWS, Tiles
from jax_fa.backends.mosaic.widths import padded_head_dim
from jax_fa.call import Axes, Dims, Operands, Problem, stored_shape

BOTH_SUMS = 128  # the head_dim up to which one kernel computes both


def key_gradient(
    problem: Problem, operands: Operands, d: Dims, saved: RowStatistics, tiles: Tiles
) -> dict[str, jax.Array]:
    """The gradients of key and value, stored as these are with all batch dims; `bias_keys`, `*B N Skv` sums of ds over
    rows, where bias has one number per key."""
    g = Geometry.of(problem, operands, d, tiles)
    arrays = {
        **stored(problem, operands, saved),
        **for_keys(g, operands, saved),
    }
    wanted: dict[str, tuple[Axes, int]] = {
        "key": (problem.key_axes, d.D),
        "value": (problem.value_axes, d.Dv),
    }
    both = max(padded_head_dim(d.D), padded_head_dim(d.Dv)) <= BOTH_SUMS
    found: dict[str, jax.Array] = {}
    for parts in [("key", "value")] if both else [("key",), ("value",)]:
        kernel = _KeyGradient(g, arrays, parts)
        full = {name: stored_shape((*d.B, d.Skv, d.K, wanted[name][1]), wanted[name][0]) for name in parts}
        results: dict[str, Any] = {}
        for name in parts:
            axes, dtype = wanted[name][0], kernel.dtype
            results[name] = jax.eval_shape(lambda s=full[name], a=axes, t=dtype: aligned(jnp.zeros(s, t), a))
        if kernel.sums_rows:
            results["bias_keys"] = jax.ShapeDtypeStruct(
                (*d.B, d.N, kernel.key_blocks * kernel.block_keys), jnp.float32
            )
        done = kernel.call(results)
        found |= {name: cut(x, full[name]) if name in full else x[..., : d.Skv] for name, x in done.items()}
    return found


class _KeyGradient:
    """The kernel of one call; its attributes are what is known when it is traced."""

    def __init__(self, g: Geometry, arrays: Arrays, parts: tuple[str, ...]) -> None:
        self.g, self.tiles, self.problem, self.parts = g, g.tiles, g.problem, parts
        self.arrays = {
            name: x for name, x in arrays.items() if "key" in parts or name not in ("value", "delta")
        }
        self.dtype = arrays["query"].dtype
        self.D, self.Dv = padded_head_dim(g.dims.D), padded_head_dim(g.dims.Dv)
        self.plain = g.plain
        self.by_tile = [name for name in BY_TILE if name in self.arrays]
        self.by_key = [name for name in BY_KEY if name in self.arrays]
        self.by_row = [name for name in BY_ROW if name in self.arrays and name not in BY_HEAD]
        self.by_head = [name for name in BY_HEAD if name in self.arrays]
        self.sums_rows = "key" in parts and "bias_keys" in arrays

    @property
    def columns(self) -> int:
        """Of all sums."""
        return sum({"key": self.D, "value": self.Dv}[name] for name in self.parts)

    @property
    def block_keys(self) -> int:
        return ROWS * self.tiles.consumers

    @property
    def key_blocks(self) -> int:
        return -(-self.g.dims.Skv // self.block_keys)

    @property
    def row_tiles(self) -> int:
        return -(-self.g.dims.Sq // self.tiles.width)

    def staying(self) -> dict[str, tuple[Axes, int]]:
        found = {"key": (self.problem.key_axes, self.D), "value": (self.problem.value_axes, self.Dv)}
        return {name: found[name] for name in found if name in self.arrays}

    def moving(self) -> dict[str, tuple[Axes, int]]:
        return {"query": (self.problem.query_axes, self.D), "dout": (self.problem.out_axes, self.Dv)}

    def scratch(self) -> dict[str, Any]:
        t, width = self.tiles, self.tiles.width
        found = {
            name: swizzled((t.consumers, ROWS, n), self.dtype) for name, (_, n) in self.staying().items()
        }
        found |= {name: swizzled((t.stages, width, n), self.dtype) for name, (_, n) in self.moving().items()}
        for name in self.by_row:
            found[name] = plgpu.SMEM((t.stages, width), self.arrays[name].dtype)
        for name in self.by_tile:
            x = self.arrays[name]
            shape = (t.stages, t.consumers, ROWS, width)
            found[name] = swizzled(shape, x.dtype, atom_of(width, x.shape[-1], x.dtype))
        if self.parts == ("value",) and self.Dv != self.D:
            found["result"] = swizzled((t.consumers, ROWS, self.Dv), self.dtype)
        if self.sums_rows:
            found["sums"] = plgpu.SMEM((t.consumers, ROWS), jnp.float32)
        copies = 1 + len(self.by_row) + len(self.by_tile) * t.consumers
        if careful.hides(self.arrays):
            found |= careful.scratch(t.consumers, width, copies + 1)
        return found | {
            "keys_here": plgpu.Barrier(num_barriers=t.consumers, num_arrivals=len(self.staying())),
            "query_here": plgpu.Barrier(num_barriers=t.stages, num_arrivals=copies),
            "dout_here": plgpu.Barrier(num_barriers=t.stages),
            "query_read": plgpu.Barrier(num_barriers=t.stages, num_arrivals=t.consumers),
            "dout_read": plgpu.Barrier(num_barriers=t.stages, num_arrivals=t.consumers),
        }

    def call(self, results: dict[str, Any]) -> dict[str, jax.Array]:
        d = self.g.dims
        shared = d.Sq * d.G * (d.D + d.Dv) * jnp.dtype(self.dtype).itemsize

        def block(arrays, scratch, index) -> _Block:
            where = self.g.deal(index, self.key_blocks, d.K, shared, last_first=False)
            return _Block(self, arrays, scratch, *where)

        name = "_".join(self.parts) + "_gradient"
        blocks = self.key_blocks * d.K * math.prod(d.B)
        return launch(name, self.tiles, blocks, block, self.arrays, results, self.scratch())


class _Block:
    """What one thread block does."""

    def __init__(self, kernel: _KeyGradient, arrays, scratch, batch, head, tile) -> None:
        self.kernel, self.g, self.tiles = kernel, kernel.g, kernel.tiles
        self.arrays, self.scratch = arrays, scratch
        self.batch, self.head, self.tile = batch, head, tile  # head: of key and value

    def _query_head(self, i):
        return self.head * self.g.dims.G + i

    def _ranges(self, i) -> dict[str, Any]:
        """The row tiles of the i-th query head to visit, and which of them see all keys of the block."""
        if "ranges" not in self.arrays:
            return dict(zip(RANGE, (0, 0, self.kernel.row_tiles, self.kernel.row_tiles), strict=True))
        ref = self.arrays["ranges"]
        where = clip_index(ref.shape[:-2], (*self.batch, self._query_head(i)))
        return {name: ref[(*where, self.tile, n)] for n, name in enumerate(RANGE)}

    def _count(self, i, n):
        ranges = self._ranges(i)
        return n + ranges["last"] - ranges["first"]

    def _over_heads(self, step, carry):
        return lax.fori_loop(0, self.g.dims.G, step, carry)

    def _first_key(self, warpgroup):
        return self.tile * self.kernel.block_keys + warpgroup * ROWS

    # --- the producer

    def produce(self) -> None:
        t, scratch = self.tiles, self.scratch

        def load(i, row_tile, count):
            slot = lax.rem(count, t.stages)
            for name in self.kernel.moving():
                wait_if(count >= t.stages, scratch[f"{name}_read"].at[slot])
                self._load(name, i, row_tile, slot, scratch[f"{name}_here"].at[slot])
            return count + 1

        def load_again(i, row_tile, count):
            wait_if(count > 0, scratch["careful_read"])
            for name in self.kernel.moving():
                self._load(name, i, row_tile, hidden(0), scratch["careful_here"])
            return count + 1

        self._over_rows(load, jnp.int32(0))
        if careful.hides(self.arrays):

            @pl.when(careful.again(scratch, t.consumers))
            def _():
                self._over_rows(load_again, jnp.int32(0))

    def _over_rows(self, step, carry):
        """`step(i, row_tile, carry)` over the row tiles of every query head."""

        def head(i, carry):
            ranges = self._ranges(i)
            return lax.fori_loop(ranges["first"], ranges["last"], lambda t, carry: step(i, t, carry), carry)

        return self._over_heads(head, carry)

    def _load(self, name: str, i, row_tile, slot, here) -> None:
        width, head = self.tiles.width, self._query_head(i)
        rows = span(row_tile * width, width, width)
        axes, columns = self.kernel.moving()[name]
        source = tile_at(self.arrays[name], axes, self.batch, rows, head, span(0, columns, columns))
        plgpu.copy_gmem_to_smem(source, self.scratch[name].at[slot], here)
        if name == "query":
            self._load_numbers(head, rows, slot, here)

    def _load_numbers(self, head, rows, slot, here) -> None:
        kernel = self.kernel
        for name in kernel.by_row:
            ref = self.arrays[name]
            where = clip_index(ref.shape[:-1], (*self.batch, head))
            plgpu.copy_gmem_to_smem(ref.at[(*where, rows)], self.scratch[name].at[slot], here)
        for name in kernel.by_tile:
            ref = self.arrays[name]
            where = clip_index(ref.shape[:-2], (*self.batch, head))
            for consumer in range(self.tiles.consumers):
                keys = span(self._first_key(consumer), ROWS, ROWS)
                target = self.scratch[name].at[slot, consumer]
                plgpu.copy_gmem_to_smem(ref.at[(*where, keys, rows)], target, here)

    # --- consumers

    def consume(self, warpgroup, *outs) -> None:
        kernel = self.kernel
        results = dict(zip([*kernel.parts, "bias_keys"], outs, strict=False))
        for name, (axes, n) in kernel.staying().items():
            target = self.scratch[name].at[warpgroup]
            source = self._keys_of(self.arrays[name], axes, warpgroup, n)
            plgpu.copy_gmem_to_smem(source, target, self.scratch["keys_here"].at[warpgroup])
        total = self._over_heads(self._count, jnp.int32(0))
        plgpu.barrier_wait(self.scratch["keys_here"].at[warpgroup])

        def head(i, carry):
            count, sums = carry
            numbers = self._key_numbers(warpgroup, i)
            over_rows = None
            if kernel.sums_rows:
                over_rows = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
            carry = (count, sums, over_rows)
            count, sums, over_rows = self._sweep(warpgroup, i, numbers, total, carry)
            if kernel.sums_rows:
                self._store_sum(warpgroup, i, over_rows, results["bias_keys"])
            return count, sums

        _, sums = self._over_heads(head, (jnp.int32(0), self._start()))
        sums = self._again(warpgroup, total, sums)
        self._store(warpgroup, dict(zip(kernel.parts, sums, strict=True)), results)

    def _start(self) -> tuple[Any, ...]:
        """The sums before any tile."""
        kernel = self.kernel
        columns = {"key": kernel.D, "value": kernel.Dv}
        return tuple(
            plgpu.layout_cast(jnp.zeros((ROWS, columns[name]), jnp.float32), WGMMA) for name in kernel.parts
        )

    def _again(self, warpgroup, total, sums):
        """The sums, or those of a careful pass where they are not finite: see careful.py."""
        if not careful.hides(self.arrays):
            return sums
        scratch = self.scratch
        careful.vote(scratch, warpgroup, *sums)

        def one(i, row_tile, carry):
            count, sums = carry
            plgpu.barrier_wait(scratch["careful_here"])

            @pl.when(warpgroup == 0)
            def _():
                if "value" in self.kernel.parts:
                    careful.clean(scratch["dout"].at[0], scratch["poison"])
                if "key" in self.kernel.parts:
                    careful.clean(scratch["query"].at[0])
                plgpu.commit_smem()
                plgpu.barrier_arrive(scratch["cleaned"])

            plgpu.barrier_wait(scratch["cleaned"])
            numbers = self._key_numbers(warpgroup, i)
            sums, _ = self._tile(
                warpgroup, row_tile, hidden(0), numbers, sums, None, bounded=True, again=True
            )
            plgpu.commit_smem()
            arrive_if(count + 1 < total, scratch["careful_read"])
            return count + 1, sums

        redo = careful.again(scratch, self.tiles.consumers)
        return lax.cond(redo, lambda: self._over_rows(one, (jnp.int32(0), self._start()))[1], lambda: sums)

    def _keys_of(self, ref, axes: Axes, warpgroup, columns: int):
        keys = span(self._first_key(warpgroup), ROWS, ROWS)
        return tile_at(ref, axes, self.batch, keys, self.head, span(0, columns, columns))

    def _key_numbers(self, warpgroup, i) -> dict[str, Any]:
        """Scalars per key of a query head, those of the head itself, and the dropout key."""
        found = {}
        for name in self.kernel.by_head:
            ref = self.arrays[name]
            found[name] = ref[(*clip_index(ref.shape[:-1], (*self.batch, self._query_head(i))), 0)]
        for name in self.kernel.by_key:
            ref = self.arrays[name]
            where = clip_index(ref.shape[:-1], (*self.batch, self._query_head(i)))
            keys = pl.ds(self._first_key(warpgroup), ROWS)
            found[name] = registers(ref.at[(*where, keys)], ROW)
        if "seed" in self.arrays:
            ref = self.arrays["seed"]
            where = clip_index(ref.shape[:-1], self.batch)
            found["seed"] = (ref[(*where, 0)], ref[(*where, 1)])
        return found

    def _sweep(self, warpgroup, i, numbers, total, carry):
        ranges = self._ranges(i)

        def run(begin, end, carry, bounded: bool):
            def step(row_tile, carry):
                return self._step(warpgroup, row_tile, numbers, total, carry, bounded)

            return lax.fori_loop(begin, end, step, carry)

        first, inner_first, inner_last, last = (ranges[name] for name in RANGE)
        if "ranges" not in self.arrays or "seed" in self.arrays:  # drawing bits costs more than comparing
            return run(first, last, carry, "ranges" in self.arrays)
        carry = run(first, inner_first, carry, True)
        return run(inner_last, last, run(inner_first, inner_last, carry, False), True)

    def _step(self, warpgroup, row_tile, numbers, total, carry, bounded: bool):
        """One tile of rows, as it comes through the ring."""
        count, sums, over_rows = carry
        slot = lax.rem(count, self.tiles.stages)
        plgpu.barrier_wait(self.scratch["query_here"].at[slot])
        plgpu.barrier_wait(self.scratch["dout_here"].at[slot])
        free = count + self.tiles.stages < total

        def release(name: str) -> None:
            arrive_if(free, self.scratch[f"{name}_read"].at[slot])

        sums, over_rows = self._tile(
            warpgroup, row_tile, slot, numbers, sums, over_rows, bounded, again=False, release=release
        )
        return count + 1, sums, over_rows

    def _tile(
        self,
        warpgroup,
        row_tile,
        slot,
        numbers,
        sums,
        over_rows,
        bounded: bool,
        again: bool,
        release: Callable[[str], None] = lambda name: None,
    ):
        """What a tile of rows adds to the sums; `again`: in a careful pass."""
        kernel, scratch = self.kernel, self.scratch
        tile = Tile(
            problem=kernel.problem,
            shape=(ROWS, self.tiles.width),
            row_axis=1,
            first_row=row_tile * self.tiles.width,
            first_key=self._first_key(warpgroup),
            positions=self.tiles.width,
            Skv=self.g.dims.Skv,
        )

        def read(name: str):
            if name in kernel.by_row:
                return registers(scratch[name].at[slot], logits.COLUMN)
            if name in kernel.by_tile:
                return registers(scratch[name].at[slot, warpgroup], WGMMA)
            return numbers.get(name)

        def weights(s):
            done = logits.finish(tile, s, read, kernel.plain, bounded)
            inverse = read("inverse")
            if again and "value" in kernel.parts:  # a row whose dout is not finite shows in its weights
                inverse = inverse + registers(scratch["poison"], logits.COLUMN)
            p = logits.weights(tile, done, read("maximum"), kernel.plain) * tile.rows(inverse)
            if again:
                p = jnp.where(done.visible, p, 0.0)
            return p, done.without_x()

        first = (scratch["key"].at[warpgroup], scratch["query"].at[slot])
        found = dict(zip(kernel.parts, sums, strict=True))
        if "key" in found:
            second = (scratch["value"].at[warpgroup], scratch["dout"].at[slot])
            together = kernel.columns <= MOST_TOGETHER
            (p, done), dp = two_products(first, second, weights, together)
            keep = logits.keep(tile, read)
            ds = p * (logits.kept(tile, keep, dp, read) - tile.rows(read("delta")))
            if done.slope is not None:
                ds = ds * done.slope
            if done.visible is not None:
                ds = jnp.where(done.visible, ds, 0.0)  # dp may be anything in fully masked rows
            if over_rows is not None:
                over_rows = over_rows + ds.sum(axis=1)
            if (scale := read("scale")) is not None:  # of each head that shares the key
                ds = ds * tile.rows(scale)
        else:
            p, _ = weights(one_product(*first))
            keep = logits.keep(tile, read)
        p = logits.kept(tile, keep, p, read) if "value" in found else p
        plgpu.commit_smem()  # the numbers of these rows were read in the ordinary way
        if "value" in found:
            found["value"] = multiply_add(found["value"], (p.astype(kernel.dtype),), scratch["dout"].at[slot])
        release("dout")
        if "key" in found:
            found["key"] = multiply_add(found["key"], (ds.astype(kernel.dtype),), scratch["query"].at[slot])
        release("query")
        return tuple(found[name] for name in kernel.parts), over_rows

    def _store_sum(self, warpgroup, i, over_rows, out) -> None:
        plgpu.wait_smem_to_gmem(0)  # that of the head before
        staged = self.scratch["sums"]
        staged[warpgroup] = over_rows
        plgpu.commit_smem()
        target = out.at[(*self.batch, self._query_head(i), pl.ds(self._first_key(warpgroup), ROWS))]
        plgpu.copy_smem_to_gmem(staged.at[warpgroup], target)

    def _store(self, warpgroup, sums, results) -> None:
        kernel = self.kernel
        where = {"key": (kernel.problem.key_axes, kernel.D), "value": (kernel.problem.value_axes, kernel.Dv)}
        staged = {"key": "key", "value": "value" if "value" in self.scratch else "key"}
        if "result" in self.scratch:
            staged["value"] = "result"
        for name, x in sums.items():
            scale = kernel.problem.scale if name == "key" else 1.0
            self.scratch[staged[name]].at[warpgroup][...] = (x * jnp.float32(scale)).astype(kernel.dtype)
        plgpu.commit_smem()
        for name in sums:
            target = self._keys_of(results[name], where[name][0], warpgroup, where[name][1])
            plgpu.copy_smem_to_gmem(self.scratch[staged[name]].at[warpgroup], target, commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)
