"""The gradient of query, of a tile of rows per thread block, and what is summed over keys: gradients of row numbers.

    p = exp(s - m) / l,  dp = keep / keep_prob (dout v^T),  ds = p (dp - delta) ds/d(logits),  dq = scale ds k

with delta = rowsum(dout out) - dlogsumexp (Dao 2023, arXiv:2307.08691). The two products of a tile are issued together;
the exponentials run beside the second.

A row of ds sums to 0 (to dlogsumexp): what all its keys have in common, say a bias of their projection, cancels in dq.
Rounded to 16 bits, ds would not sum to 0, so a second product takes what rounding took; and delta would be off by as
much if the forward had rounded its weights, so with a derivative to come it does the same for p v. A correction by the
sum of ds alone would be cheaper, but it needs a key that stands for the row's visible ones.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa.backends.mosaic import logits
from jax_fa.backends.mosaic.geometry import Geometry
from jax_fa.backends.mosaic.logits import ROW, WGMMA
from jax_fa.backends.mosaic.memory import MOST_TOGETHER, hidden, multiply_add, split, two_products
from jax_fa.backends.mosaic.operands import RowStatistics, aligned, by_rows, cut, stored
from jax_fa.backends.mosaic.rows import RowBlock, RowKernel
from jax_fa.backends.mosaic.tuning import ROWS, Tiles
from jax_fa.call import Dims, Operands, Problem, stored_shape

# What is summed over keys, by the operand of one scalar per row that it is the gradient of.
SUMS: dict[str, Callable[..., Any]] = {
    "bias_rows": lambda tile, read, ds, dcapped, done: ds,
    "slopes": lambda tile, read, ds, dcapped, done: -ds * logits.distance(tile, read),
    # Products of masked keys may be anything; their ds is 0.
    "scale": lambda tile, read, ds, dcapped, done: _times(ds, done.product),
    "soft_cap": lambda tile, read, ds, dcapped, done: _times(dcapped, done.cap_slope),
}


def _times(ds, x):
    return jnp.where(ds == 0.0, 0.0, ds * x)


def query_gradient(
    problem: Problem, operands: Operands, d: Dims, saved: RowStatistics, tiles: Tiles
) -> dict[str, jax.Array]:
    """The gradient of query, stored as query is with all batch dims, and `*B N Sq` sums over keys by name (SUMS)."""
    g = Geometry.of(problem, operands, d, tiles)
    arrays = {
        **stored(problem, operands, saved),
        **by_rows(g, operands, saved),
    }
    kernel = _QueryGradient(g, arrays)
    full = stored_shape((*d.B, d.Sq, d.N, d.D), problem.query_axes)
    padded = jax.eval_shape(lambda: aligned(jnp.zeros(full, operands.query.dtype), problem.query_axes))
    stats = jax.ShapeDtypeStruct(g.packed_shape, jnp.float32)
    results: dict[str, Any] = {"query": jax.ShapeDtypeStruct(padded.shape, padded.dtype)}
    results |= dict.fromkeys(kernel.sums, stats)
    found = kernel.call("query_gradient", results)
    return {"query": cut(found["query"], full)} | {name: g.unpack(found[name]) for name in kernel.sums}


class _Block(RowBlock):
    kernel: "_QueryGradient"

    def start(self):
        kernel = self.kernel
        return (
            plgpu.layout_cast(jnp.zeros((ROWS, kernel.D), jnp.float32), WGMMA),
            *(plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW) for _ in kernel.sums),
        )

    def consume(self, warpgroup, *outs) -> None:
        rows = self.load_rows(warpgroup)
        plgpu.barrier_wait(self.scratch["rows_here"].at[warpgroup])

        def step(key_tile, carry, bounded=True, again=False):
            return self._step(warpgroup, key_tile, carry, rows, bounded, again)

        carry = self.sweep(step)
        carry = self.sweep_again(warpgroup, partial(step, again=True), carry)
        self._store(warpgroup, carry, rows, *outs)

    def _step(self, warpgroup, key_tile, carry, rows, bounded: bool, again: bool):
        """One tile of keys; `again`: it is in slot 0 already."""
        kernel, scratch = self.kernel, self.scratch
        dq, *sums = carry
        slot = hidden(0) if again else self.slot(key_tile)
        # Visible keys that are not finite have made their rows' log-sum-exp NaN: no need of poison.
        tile, read = self.tile_of(warpgroup, key_tile), self.reader(warpgroup, slot, rows, again=False)
        if not again:
            plgpu.barrier_wait(scratch["key_here"].at[slot])
            plgpu.barrier_wait(scratch["value_here"].at[slot])

        def weights(s):
            done = logits.finish(tile, s, read, kernel.plain, bounded)
            return logits.weights(tile, done, rows["maximum"], kernel.plain), done.without_x()

        # p is yet to be divided by l, which dp and delta are in its place.
        (p, done), dp = two_products(
            (scratch["query"].at[warpgroup], scratch["key"].at[slot]),
            (scratch["dout"].at[warpgroup], scratch["value"].at[slot]),
            weights,
            together=kernel.D <= MOST_TOGETHER,
        )
        if not again:
            self.release("value", key_tile)
        dp = logits.kept(tile, logits.keep(tile, read), dp, read)
        ds = p * (dp * tile.rows(rows["inverse"]) - tile.rows(rows["delta"] * rows["inverse"]))
        if done.visible is not None:
            ds = jnp.where(done.visible, ds, 0.0)  # dp may be anything where values are hidden
        dcapped = ds
        if done.slope is not None:
            ds = ds * done.slope
        terms = [SUMS[name](tile, read, ds, dcapped, done) for name in kernel.sums]
        sums = [x + term.sum(axis=1) for x, term in zip(sums, terms, strict=True)]
        # Or ds - rounded becomes one multiply-add where nothing is masked, and a careful pass would differ in its bits.
        ds = lax.optimization_barrier(ds)
        dq = multiply_add(dq, split(ds, kernel.dtype, wide=True), scratch["key"].at[slot])
        if not again:
            self.release("key", key_tile)
        return dq, *sums

    def _store(self, warpgroup, carry, rows, out, *sums_out) -> None:
        kernel = self.kernel
        dq, *sums = carry
        staged = self.scratch["query"].at[warpgroup]
        scale = jnp.float32(kernel.problem.scale)
        if "scale" in rows:
            scale = lax.broadcast_in_dim(rows["scale"], dq.shape, [0])
        staged[...] = (dq * scale).astype(kernel.dtype)
        for i, x in enumerate(sums):
            self.scratch["sums"][i, warpgroup] = x
        plgpu.commit_smem()
        self.store_rows(warpgroup, staged, out, kernel.problem.query_axes, kernel.D)
        for i, target in enumerate(sums_out):
            self.store_numbers(warpgroup, self.scratch["sums"].at[i, warpgroup], target)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)


class _QueryGradient(RowKernel):
    block = _Block

    @property
    def sums(self) -> list[str]:
        """Sums over keys that somebody wants."""
        return [name for name in SUMS if name in self.arrays]

    def cleaned(self):
        return "key"

    def staying(self):
        return {
            "query": (self.problem.query_axes, self.D),
            "dout": (self.problem.out_axes, self.Dv),
        }

    def scratch(self):
        found = super().scratch()
        if self.sums:
            found["sums"] = plgpu.SMEM((len(self.sums), self.tiles.consumers, ROWS), jnp.float32)
        return found
