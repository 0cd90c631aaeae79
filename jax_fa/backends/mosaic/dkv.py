"""dk and dv, of a block of keys per thread block, and sums over rows.

    dv = (keep / keep_prob p)^T dout,  dk = scale ds^T q,  with p and ds as in gradient.py

Both sums fit beside the tiles up to head_dim 128; above, dv and dk are computed by a kernel each.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa.backends.mosaic import logits, nan_safe
from jax_fa.backends.mosaic.geometry import Geometry
from jax_fa.backends.mosaic.gradient import GradientBlock
from jax_fa.backends.mosaic.inputs import RANGE, Inputs
from jax_fa.backends.mosaic.keys import KeyBlock, KeyKernel
from jax_fa.backends.mosaic.logits import COLUMN, ROW, WGMMA, Read, Tile
from jax_fa.backends.mosaic.memory import arrive_if, opaque, registers
from jax_fa.backends.mosaic.operands import RowStatistics, aligned, cut, for_keys
from jax_fa.backends.mosaic.products import one_product
from jax_fa.backends.mosaic.tuning import ROWS, Tiles
from jax_fa.backends.mosaic.widths import padded_head_dim
from jax_fa.call import Call, stored_shape

BOTH_SUMS = 128  # the head_dim up to which one kernel computes both
NAMES = {("key", "value"): "dkv", ("key",): "dk", ("value",): "dv"}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Results:
    """dk and dv as key and value are stored, with all batch dims; `*B N Skv` sums of ds over rows."""

    key: Any = None
    value: Any = None
    bias_keys: Any = None  # where bias has one element per key


def dkv(call: Call, saved: RowStatistics, tiles: Tiles) -> Results:
    """The gradients of key and value, and of a bias with one element per key."""
    g = Geometry.of(call, tiles)
    inputs = for_keys(g, call, saved)
    if max(padded_head_dim(g.dims.D), padded_head_dim(g.dims.Dv)) <= BOTH_SUMS:
        return _run(call, DkvKernel(g, inputs, ("key", "value")))
    only_dv = replace(inputs, value=None, delta=None)  # which dv does not need
    dk = _run(call, DkvKernel(g, inputs, ("key",)))
    dv = _run(call, DkvKernel(g, only_dv, ("value",)))
    return replace(dk, value=dv.value)


def _run(call: Call, kernel: "DkvKernel") -> Results:
    d, results = call.dims, Results()
    full = {
        name: stored_shape((*d.B, d.Skv, d.K, d.D if name == "key" else d.Dv), call.problem.axes(name))
        for name in kernel.parts
    }
    for name, shape in full.items():
        axes = call.problem.axes(name)
        aval = jax.eval_shape(lambda s=shape, a=axes: aligned(jnp.zeros(s, kernel.dtype), a))
        results = replace(results, **{name: aval})
    if kernel.sums_rows:
        keys = kernel.key_blocks * kernel.block_keys
        results = replace(results, bias_keys=jax.ShapeDtypeStruct((*d.B, d.N, keys), jnp.float32))
    found = kernel.launch(NAMES[kernel.parts], results)
    found = replace(found, **{name: cut(getattr(found, name), shape) for name, shape in full.items()})
    return found if found.bias_keys is None else replace(found, bias_keys=found.bias_keys[..., : d.Skv])


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sums:
    """What a consumer holds in registers."""

    key: Any = None
    value: Any = None
    over_rows: Any = None  # of the query head under way

    def parts(self) -> tuple[Any, ...]:
        return tuple(x for x in (self.key, self.value) if x is not None)


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A tile of rows as a consumer finds it."""

    warpgroup: Any
    row_tile: Any
    slot: Any
    scalars: Inputs  # see KeyBlock.load_scalars
    bounded: bool  # not all of it may be visible
    again: bool = False  # in a second, NaN-safe pass
    refilled: Any = None  # whether its stage will be filled again


class DkvBlock(GradientBlock, KeyBlock):
    normalized = True

    @property
    def sum_columns(self) -> int:
        return self.kernel.columns

    def consume(self, warpgroup, results: Results) -> None:
        kernel = self.kernel
        self.start_loading_keys(warpgroup)
        total = self.total()
        plgpu.barrier_wait(self.smem.keys_here.at[warpgroup])

        def head(i, carry):
            count, sums = carry
            scalars = self.load_scalars(warpgroup, i)
            if kernel.sums_rows:
                sums = replace(sums, over_rows=plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW))
            count, sums = self._sweep(warpgroup, i, scalars, total, (count, sums))
            if kernel.sums_rows:
                self._store_sum(warpgroup, i, sums.over_rows, results.bias_keys)
            return count, replace(sums, over_rows=None)

        _, sums = self.over_heads(head, (jnp.int32(0), self._start()))
        self._store(warpgroup, self._again(warpgroup, total, sums), results)

    def _start(self) -> Sums:
        """The sums before any tile."""
        columns = {"key": self.kernel.D, "value": self.kernel.Dv}
        return Sums(
            **{
                name: plgpu.layout_cast(jnp.zeros((ROWS, columns[name]), jnp.float32), WGMMA)
                for name in self.kernel.parts
            }
        )

    def _sweep(self, warpgroup, i, scalars: Inputs, total, carry):
        """The row tiles of the i-th query head, as they come through the stages."""
        ranges = self.ranges(i)

        def run(begin, end, carry, bounded: bool):
            def step(row_tile, carry):
                count, sums = carry
                slot = lax.rem(count, self.tiles.stages)
                plgpu.barrier_wait(self.smem.query.here.at[slot])
                plgpu.barrier_wait(self.smem.dout.here.at[slot])
                visit = Visit(
                    warpgroup=warpgroup,
                    row_tile=row_tile,
                    slot=slot,
                    scalars=scalars,
                    bounded=bounded,
                    refilled=count + self.tiles.stages < total,
                )
                sums = self._add(visit, sums)
                return count + 1, sums

            return lax.fori_loop(begin, end, step, carry)

        first, inner_first, inner_last, last = (ranges[name] for name in RANGE)
        masked = self.inputs.ranges is not None
        if not masked or self.inputs.seed is not None:  # drawing bits costs more than comparing
            return run(first, last, carry, masked)
        carry = run(first, inner_first, carry, True)
        return run(inner_last, last, run(inner_first, inner_last, carry, False), True)

    def _again(self, warpgroup, total, sums: Sums) -> Sums:
        """The sums, or those of a second, NaN-safe pass where they are not finite: see nan_safe.py."""
        if not nan_safe.may_mask(self.inputs):
            return sums
        smem = self.smem
        nan_safe.vote(smem, warpgroup, self.tiles.consumers, *sums.parts())

        def one(i, row_tile, carry):
            count, sums = carry
            plgpu.barrier_wait(smem.again_here)

            @pl.when(warpgroup == 0)
            def _():
                if "value" in self.kernel.parts:
                    nan_safe.clean(smem.dout.tile.at[0], smem.nan_marker)
                if "key" in self.kernel.parts:
                    nan_safe.clean(smem.query.tile.at[0])
                plgpu.commit_smem()
                plgpu.barrier_arrive(smem.cleaned)

            plgpu.barrier_wait(smem.cleaned)
            visit = Visit(
                scalars=self.load_scalars(warpgroup, i),
                warpgroup=warpgroup,
                row_tile=row_tile,
                slot=opaque(0),
                bounded=True,
                again=True,
            )
            sums = self._add(visit, sums)
            plgpu.commit_smem()
            arrive_if(count + 1 < total, smem.again_read)
            return count + 1, sums

        redo = nan_safe.again(smem, self.tiles.consumers)
        return lax.cond(redo, lambda: self.over_rows(one, (jnp.int32(0), self._start()))[1], lambda: sums)

    def _tile(self, visit: Visit) -> Tile:
        width = self.tiles.width
        return Tile(
            problem=self.kernel.problem,
            shape=(ROWS, width),
            row_axis=1,
            first_row=visit.row_tile * width,
            first_key=self.first_key(visit.warpgroup),
            positions=width,
            Skv=self.g.dims.Skv,
        )

    def _reader(self, visit: Visit) -> Read:
        kernel, smem = self.kernel, self.smem

        def read(name: str):
            if name == "nan_marker":  # one per key; here it is per row, see `probabilities`
                return None
            if name in kernel.by_row:
                return registers(getattr(smem, name).at[visit.slot], COLUMN)
            if name in kernel.by_tile:
                return registers(getattr(smem, name).at[visit.slot, visit.warpgroup], WGMMA)
            return getattr(visit.scalars, name)

        return read

    def probabilities(self, s, tile: Tile, read: Read, bounded: bool, again: bool):
        plain = self.kernel.plain
        done = logits.finish(tile, s, read, plain, bounded)
        inverse = read("inverse")
        if (
            again and "value" in self.kernel.parts
        ):  # a row whose dout is not finite shows in its probabilities
            inverse = inverse + registers(self.smem.nan_marker, COLUMN)
        p = logits.weights(tile, done, read("maximum"), plain) * tile.rows(inverse)
        if again:
            p = jnp.where(done.visible, p, 0.0)
        return p, done.without_x()

    def _add(self, visit: Visit, sums: Sums) -> Sums:
        """The sums with a tile of rows added."""
        kernel, smem = self.kernel, self.smem
        tile, read = self._tile(visit), self._reader(visit)
        over_rows = sums.over_rows
        query, dout = smem.query.tile.at[visit.slot], smem.dout.tile.at[visit.slot]
        first = (smem.key.at[visit.warpgroup], query)
        if sums.key is not None:
            second = (smem.value.at[visit.warpgroup], dout)
            p, done, dp = self.recomputed(first, second, tile, read, visit.bounded, visit.again)
            keep = logits.keep(tile, read)
            ds = self.score_gradient(tile, read, p, done, logits.kept(tile, keep, dp, read)).ds
            if over_rows is not None:
                over_rows = over_rows + ds.sum(axis=1)
            if (scale := read("scale")) is not None:  # of each head that shares the key
                ds = ds * tile.rows(scale)
        else:
            p, _ = self.probabilities(one_product(*first), tile, read, visit.bounded, visit.again)
            keep = logits.keep(tile, read)
        dk, dv = sums.key, sums.value
        p = p if dv is None else logits.kept(tile, keep, p, read)
        plgpu.commit_smem()  # scalars of these rows were read through the generic proxy
        if dv is not None:
            dv = self.multiply_add(dv, (p.astype(kernel.dtype),), dout)
        self._release(visit, smem.dout)
        if dk is not None:
            dk = self.multiply_add(dk, (ds.astype(kernel.dtype),), query)
        self._release(visit, smem.query)
        return Sums(key=dk, value=dv, over_rows=over_rows)

    def _release(self, visit: Visit, ring) -> None:
        if not visit.again:
            arrive_if(visit.refilled, ring.read.at[visit.slot])

    def _store_sum(self, warpgroup, i, over_rows, out) -> None:
        plgpu.wait_smem_to_gmem(0)  # that of the head before
        staged = self.smem.sums
        staged[warpgroup] = over_rows
        plgpu.commit_smem()
        target = out.at[(*self.batch, self.query_head(i), pl.ds(self.first_key(warpgroup), ROWS))]
        plgpu.copy_smem_to_gmem(staged.at[warpgroup], target)

    def _store(self, warpgroup, sums: Sums, results: Results) -> None:
        kernel, smem = self.kernel, self.smem
        # dv has a place of its own where neither value's nor key's tile has room for it.
        for_dv = next(x for x in (smem.result, smem.value, smem.key) if x is not None)
        staged = {"key": smem.key, "value": for_dv}
        for name in kernel.parts:
            scale = kernel.problem.scale if name == "key" else 1.0
            x = getattr(sums, name) * jnp.float32(scale)
            staged[name].at[warpgroup][...] = x.astype(kernel.dtype)
        plgpu.commit_smem()
        for name in kernel.parts:
            columns = kernel.D if name == "key" else kernel.Dv
            axes = kernel.problem.axes(name)
            target = self.keys_of(getattr(results, name), axes, warpgroup, columns)
            plgpu.copy_smem_to_gmem(staged[name].at[warpgroup], target, commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)


class DkvKernel(KeyKernel):
    block = DkvBlock
