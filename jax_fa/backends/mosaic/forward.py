"""The forward kernel: out, softmax max and softmax sum of a tile of rows per thread block.

    s = q k^T,  m' = max(m, s),  p = exp(s - m'),  l = l exp(m - m') + sum p,  acc = acc exp(m - m') + p v

(Dao 2023, arXiv:2307.08691; Shah et al. 2024, arXiv:2407.08608.) Ping-pong scheduling: consumers take turns at the
tensor cores, so that one's exponentials run beside another's products; a turn is the product p v of one tile and then
q k^T of the next.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa.backends.mosaic import logits
from jax_fa.backends.mosaic.geometry import Geometry
from jax_fa.backends.mosaic.inputs import Inputs
from jax_fa.backends.mosaic.logits import ROW, WGMMA
from jax_fa.backends.mosaic.memory import opaque, swizzled
from jax_fa.backends.mosaic.operands import aligned_head_dim, aligned_length, cut, for_rows
from jax_fa.backends.mosaic.products import one_product, split
from jax_fa.backends.mosaic.rows import RowBlock, RowKernel
from jax_fa.backends.mosaic.tuning import ROWS, Tiles
from jax_fa.call import Call, rounding_unit, stored_shape
from jax_fa.softmax import FLT_MAX


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Results:
    out: Any
    m: Any
    l: Any
    rounding: Any = None


def forward(call: Call, tiles: Tiles) -> tuple[Any, ...]:
    """(out, softmax max, softmax sum) and, if the problem says so, rounding, as a backend returns them."""
    problem, d = call.problem, call.dims
    g = Geometry.of(call, tiles)
    shape = stored_shape((*d.B, aligned_length(d.Sq), d.N, aligned_head_dim(d.Dv)), problem.out_axes)
    stats = jax.ShapeDtypeStruct(g.packed_shape, jnp.float32)
    out = jax.ShapeDtypeStruct(shape, call.dtype)
    results = Results(out=out, m=stats, l=stats, rounding=out if problem.saves_rounding else None)
    name = "forward_rounding" if problem.saves_rounding else "forward"  # each is a kernel of its own
    found = ForwardKernel(g, for_rows(g, call)).launch(name, results)
    narrow = cut(found.out, call.out_shape), g.unpack(found.m), g.unpack(found.l)
    return narrow if found.rounding is None else (*narrow, cut(found.rounding, call.out_shape))


class ForwardBlock(RowBlock):
    kernel: "ForwardKernel"
    cleaned = "value"

    def start(self):
        lowest = logits.start_of_maximum(self.kernel.plain)
        return (
            plgpu.layout_cast(jnp.zeros((ROWS, self.kernel.Dv), jnp.float32), WGMMA),
            plgpu.layout_cast(jnp.full((ROWS,), lowest, jnp.float32), ROW),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW),
        )

    def consume(self, warpgroup, results: Results) -> None:
        t = self.tiles
        rows = self.load_rows(warpgroup)
        plgpu.barrier_wait(self.smem.rows_here.at[warpgroup])
        some = self.ranges["first"] < self.ranges["last"]

        @pl.when(some)
        def _():
            plgpu.barrier_wait(self.smem.key.here.at[0])
            pl.when(warpgroup > 0)(lambda: self._wait_turn(warpgroup))

        def step(key_tile, carry, bounded=True, again=False):
            return self._step(warpgroup, key_tile, carry, rows, bounded, again)

        carry = self.sweep(step)

        @pl.when(some & (warpgroup < t.consumers - 1))
        def _():
            self._pass_turn(warpgroup)

        carry = self.sweep_again(warpgroup, partial(step, again=True), carry)
        self._store(warpgroup, carry, rows, results)

    def _step(self, warpgroup, key_tile, carry, rows: Inputs, bounded: bool, again: bool):
        """One tile of keys; `again`: it is in slot 0 already, and consumers take no turns."""
        kernel, smem = self.kernel, self.smem
        acc, m, l = carry
        slot = opaque(0) if again else self.slot(key_tile)

        query, key = smem.query.at[warpgroup], smem.key.tile.at[slot]
        s = one_product(query, key, lambda: None if again else self._pass_turn(warpgroup))
        tile, read = self.tile_of(warpgroup, key_tile), self.reader(warpgroup, slot, rows, again)
        done = logits.finish(tile, s, read, kernel.plain, bounded)
        if not again:
            self.release("key", key_tile)

        m_new = jnp.maximum(m, done.x.max(axis=1) * jnp.float32(logits.unit_of(kernel.problem, kernel.plain)))
        # Rounded, as the gradients read them: joined with the subtraction into one multiply-add, keys of tiles before a
        # new maximum would get other weights than those after it.
        exponents = tuple(logits.in_exponent(x, kernel.plain) for x in (m, m_new))
        before, after = lax.optimization_barrier(exponents)
        rescale = logits.rescale(before, after, kernel.plain)
        p = logits.weights(tile, done, after, kernel.plain)
        l = l * rescale + p.sum(axis=1)
        keep = logits.keep(tile, read)
        if keep is not None:
            p = jnp.where(keep, p, 0.0)
        # Under differentiation out is what delta is made of, hence wide: see dq.py.
        parts = split(p, kernel.dtype, wide=kernel.problem.saves_rounding)
        acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0])
        acc, parts, m_new, l = lax.optimization_barrier((acc, parts, m_new, l))

        if again:
            return self.multiply_add(acc, parts, smem.value.tile.at[slot]), m_new, l
        plgpu.barrier_wait(smem.value.here.at[slot])
        self._wait_turn(warpgroup)

        def wait_for_keys():
            @pl.when(key_tile + 1 < self.ranges["last"])
            def _():
                plgpu.barrier_wait(smem.key.here.at[self.slot(key_tile + 1)])

        acc = self.multiply_add(acc, parts, smem.value.tile.at[slot], wait_for_keys)
        self.release("value", key_tile)
        return acc, m_new, l

    def _wait_turn(self, warpgroup) -> None:
        if self.tiles.consumers > 1:
            plgpu.barrier_wait(self.smem.turn.at[warpgroup])

    def _pass_turn(self, warpgroup) -> None:
        if self.tiles.consumers > 1:
            plgpu.barrier_arrive(self.smem.turn.at[lax.rem(warpgroup + 1, self.tiles.consumers)])

    def _store(self, warpgroup, carry, rows: Inputs, results: Results) -> None:
        kernel = self.kernel
        acc, m, l = carry
        empty = l == 0.0
        keep_inverse = rows.keep_inverse
        if keep_inverse is None:
            keep_inverse = jnp.float32(1 / kernel.problem.keep_prob)
        inverse = jnp.where(empty, 0.0, keep_inverse / jnp.where(empty, 1.0, l))
        acc = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
        staged = (self.smem.query if self.smem.result is None else self.smem.result).at[warpgroup]
        stats = self.smem.stats
        narrow = acc.astype(kernel.dtype)
        staged[...] = narrow
        stats[0, warpgroup] = jnp.where(empty, -FLT_MAX, m)
        stats[1, warpgroup] = l
        plgpu.commit_smem()
        self.store_rows(warpgroup, staged, results.out, kernel.problem.out_axes, kernel.Dv)
        self.store_vector(warpgroup, stats.at[0, warpgroup], results.m)
        self.store_vector(warpgroup, stats.at[1, warpgroup], results.l)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)
        if results.rounding is not None:  # through the memory that out has left
            lost = (acc - narrow.astype(jnp.float32)) * jnp.float32(1 / rounding_unit(kernel.dtype))
            staged[...] = lost.astype(kernel.dtype)
            plgpu.commit_smem()
            self.store_rows(warpgroup, staged, results.rounding, kernel.problem.out_axes, kernel.Dv)
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0)


class ForwardKernel(RowKernel):
    block = ForwardBlock

    def staying(self):
        return {"query": (self.problem.query_axes, self.D)}

    def smem(self):
        t = self.tiles
        result = None if self.D == self.Dv else swizzled((t.consumers, ROWS, self.Dv), self.dtype)
        return self.row_smem(
            stats=plgpu.SMEM((2, t.consumers, ROWS), jnp.float32),
            turn=plgpu.Barrier(num_barriers=t.consumers),
            result=result,
        )
