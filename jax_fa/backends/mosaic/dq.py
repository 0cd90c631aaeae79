"""dq, of a tile of rows per thread block, and sums over keys: gradients of operands with one scalar per row.

    dq = scale ds k,  with ds as in gradient.py

A row of ds sums to 0 (to dlogsumexp): what all its keys have in common, say a bias of their projection, cancels in dq.
Rounded to 16 bits, ds would not sum to 0, so a second product takes what rounding took; and delta would be off by as
much if the forward had rounded its weights, so with a derivative to come it does the same for p v. A correction by the
sum of ds alone would be cheaper, but it needs a key that stands for the row's visible ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa.backends.mosaic import logits
from jax_fa.backends.mosaic.geometry import Geometry
from jax_fa.backends.mosaic.gradient import GradientBlock, ScoreGradient
from jax_fa.backends.mosaic.inputs import Inputs
from jax_fa.backends.mosaic.logits import ROW, WGMMA, Logits, Read, Tile
from jax_fa.backends.mosaic.memory import opaque
from jax_fa.backends.mosaic.operands import RowStatistics, aligned, cut, for_rows
from jax_fa.backends.mosaic.products import split
from jax_fa.backends.mosaic.rows import RowBlock, RowKernel
from jax_fa.backends.mosaic.tuning import ROWS, Tiles
from jax_fa.call import Call, stored_shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Results:
    """dq as query is stored, with all batch dims; and sums over keys, in packed order."""

    query: Any
    bias_rows: Any = None
    slopes: Any = None
    scale: Any = None
    soft_cap: Any = None


def _times(gradient, x):
    """Products and soft caps of masked keys may be anything; their gradients are 0."""
    return jnp.where(gradient == 0.0, 0.0, gradient * x)


def _by_soft_cap(tile: Tile, read: Read, found: ScoreGradient, done: Logits):
    by_capped = found.by_capped
    if done.visible is not None:
        by_capped = jnp.where(done.visible, by_capped, 0.0)
    return _times(by_capped, done.cap_slope)


# The term of each sum over keys, by the operand that it is the gradient of.
SUMS: dict[str, Callable[[Tile, Read, ScoreGradient, Logits], Any]] = {
    "bias_rows": lambda tile, read, found, done: found.ds,
    "slopes": lambda tile, read, found, done: -found.ds * logits.distance(tile, read),
    "scale": lambda tile, read, found, done: _times(found.ds, done.product),
    "soft_cap": _by_soft_cap,
}


def dq(call: Call, saved: RowStatistics, tiles: Tiles) -> Results:
    """The gradient of query, and `*B N Sq` sums over keys."""
    axes, d = call.problem.query_axes, call.dims
    g = Geometry.of(call, tiles)
    kernel = DqKernel(g, for_rows(g, call, saved))
    full = stored_shape((*d.B, d.Sq, d.N, d.D), axes)
    stats = jax.ShapeDtypeStruct(g.packed_shape, jnp.float32)
    query = jax.eval_shape(lambda: aligned(jnp.zeros(full, call.dtype), axes))
    found = kernel.launch("dq", Results(query=query, **dict.fromkeys(kernel.sums, stats)))
    sums = {name: g.unpack(getattr(found, name)) for name in kernel.sums}
    return replace(found, query=cut(found.query, full), **sums)


class DqBlock(GradientBlock, RowBlock):
    kernel: "DqKernel"
    cleaned = "key"

    def start(self):
        kernel = self.kernel
        return (
            plgpu.layout_cast(jnp.zeros((ROWS, kernel.D), jnp.float32), WGMMA),
            *(plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW) for _ in kernel.sums),
        )

    def consume(self, warpgroup, results: Results) -> None:
        rows = self.load_rows(warpgroup)
        plgpu.barrier_wait(self.smem.rows_here.at[warpgroup])

        def step(key_tile, carry, bounded=True, again=False):
            return self._step(warpgroup, key_tile, carry, rows, bounded, again)

        carry = self.sweep(step)
        carry = self.sweep_again(warpgroup, partial(step, again=True), carry)
        self._store(warpgroup, carry, rows, results)

    def _step(self, warpgroup, key_tile, carry, rows: Inputs, bounded: bool, again: bool):
        """One tile of keys; `again`: it is in slot 0 already."""
        kernel, smem = self.kernel, self.smem
        dq, *sums = carry
        slot = opaque(0) if again else self.slot(key_tile)
        tile, read = self.tile_of(warpgroup, key_tile), self.reader(warpgroup, slot, rows, again)
        if not again:
            plgpu.barrier_wait(smem.key.here.at[slot])
            plgpu.barrier_wait(smem.value.here.at[slot])
        first = (smem.query.at[warpgroup], smem.key.tile.at[slot])
        second = (smem.dout.at[warpgroup], smem.value.tile.at[slot])
        p, done, dp = self.recomputed(first, second, tile, read, bounded)
        if not again:
            self.release("value", key_tile)
        dp = logits.kept(tile, logits.keep(tile, read), dp, read)
        found = self.score_gradient(tile, read, p, done, dp)
        terms = [SUMS[name](tile, read, found, done) for name in kernel.sums]
        sums = [x + term.sum(axis=1) for x, term in zip(sums, terms, strict=True)]
        # Or ds - rounded becomes one multiply-add where nothing is masked, and a second pass would differ in its bits.
        ds = lax.optimization_barrier(found.ds)
        dq = self.multiply_add(dq, split(ds, kernel.dtype, wide=True), smem.key.tile.at[slot])
        if not again:
            self.release("key", key_tile)
        return dq, *sums

    def _store(self, warpgroup, carry, rows: Inputs, results: Results) -> None:
        kernel = self.kernel
        dq, *sums = carry
        staged = self.smem.query.at[warpgroup]
        scale = jnp.float32(kernel.problem.scale)
        if rows.scale is not None:
            scale = lax.broadcast_in_dim(rows.scale, dq.shape, [0])
        staged[...] = (dq * scale).astype(kernel.dtype)
        for i, x in enumerate(sums):
            self.smem.sums[i, warpgroup] = x
        plgpu.commit_smem()
        self.store_rows(warpgroup, staged, results.query, kernel.problem.query_axes, kernel.D)
        for i, name in enumerate(kernel.sums):
            self.store_vector(warpgroup, self.smem.sums.at[i, warpgroup], getattr(results, name))
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)


class DqKernel(RowKernel):
    block = DqBlock

    @property
    def sums(self) -> tuple[str, ...]:
        """Sums over keys that are wanted."""
        return self.inputs.present(SUMS)

    def staying(self):
        return {
            "query": (self.problem.query_axes, self.D),
            "dout": (self.problem.out_axes, self.Dv),
        }

    def smem(self):
        n = len(self.sums)
        sums = plgpu.SMEM((n, self.tiles.consumers, ROWS), jnp.float32) if n else None
        return self.row_smem(sums=sums)
