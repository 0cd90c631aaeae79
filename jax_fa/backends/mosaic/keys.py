"""The kernel in which keys stay and rows move: what its blocks load, and in which order. dkv.py computes with it.

The rows of every query head that reads a block's key head move, one head after the other. Tiles lie as `keys x rows`,
so that probabilities are an operand of the next product where they are, in registers.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa.backends.mosaic import nan_safe
from jax_fa.backends.mosaic.geometry import Geometry, clip_index, tile_at
from jax_fa.backends.mosaic.inputs import BY_HEAD, BY_KEY, BY_ROW, BY_TILE, RANGE, Inputs
from jax_fa.backends.mosaic.launch import Block, Kernel
from jax_fa.backends.mosaic.logits import ROW
from jax_fa.backends.mosaic.memory import Ring, atom_of, opaque, span, swizzled, wait_if
from jax_fa.backends.mosaic.tuning import ROWS
from jax_fa.call import Axes


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KeySmem:
    """Shared memory and barriers; what a kernel does without is None."""

    bias_rows: Any = None  # stages x width; so are the others by row
    bias_tile: Any = None  # stages x consumers x 64 x width
    again_here: Any = None  # these three, nan_marker, turn_to_vote, voted and votes: see nan_safe.py
    again_read: Any = None
    cleaned: Any = None
    delta: Any = None
    dout: Ring  # stages x width x Dv
    inverse: Any = None
    key: Any  # consumers x 64 x D
    keys_here: Any  # a barrier per consumer: its keys and values are loaded
    lower: Any = None
    mask_tile: Any = None
    maximum: Any = None
    nan_marker: Any = None
    position: Any = None
    query: Ring  # stages x width x D; with it come tiles of bias and mask and scalars per row
    result: Any = None  # consumers x 64 x Dv: dv, where no tile has room for it
    segment_row: Any = None
    slopes: Any = None
    sums: Any = None  # consumers x 64: sums of ds over rows
    turn_to_vote: Any = None
    upper: Any = None
    value: Any = None  # consumers x 64 x Dv
    voted: Any = None
    votes: Any = None


class KeyKernel(Kernel):
    """`parts`: which of the gradients of key and value it computes."""

    def __init__(self, g: Geometry, inputs: Inputs, parts: tuple[str, ...]) -> None:
        super().__init__(g, inputs)
        self.parts = parts
        self.by_tile, self.by_key = inputs.present(BY_TILE), inputs.present(BY_KEY)
        self.by_head = inputs.present(BY_HEAD)
        self.by_row = inputs.present(name for name in BY_ROW if name not in BY_HEAD)
        self.sums_rows = "key" in parts and inputs.bias_keys is not None

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
        return {name: found[name] for name in self.inputs.present(found)}

    def moving(self) -> dict[str, tuple[Axes, int]]:
        return {"query": (self.problem.query_axes, self.D), "dout": (self.problem.out_axes, self.Dv)}

    def smem(self) -> KeySmem:
        t, width = self.tiles, self.tiles.width
        more: dict[str, Any] = {
            name: swizzled((t.consumers, ROWS, n), self.dtype) for name, (_, n) in self.staying().items()
        }
        for name in self.by_row:
            more[name] = plgpu.SMEM((t.stages, width), getattr(self.inputs, name).dtype)
        for name in self.by_tile:
            x = getattr(self.inputs, name)
            shape = (t.stages, t.consumers, ROWS, width)
            more[name] = swizzled(shape, x.dtype, atom_of(width, x.shape[-1], x.dtype))
        if self.parts == ("value",) and self.Dv != self.D:
            more["result"] = swizzled((t.consumers, ROWS, self.Dv), self.dtype)
        if self.sums_rows:
            more["sums"] = plgpu.SMEM((t.consumers, ROWS), jnp.float32)
        copies = 1 + len(self.by_row) + len(self.by_tile) * t.consumers
        if nan_safe.may_mask(self.inputs):
            more |= nan_safe.smem(t.consumers, width, copies + 1)
        query = swizzled((t.stages, width, self.D), self.dtype)
        dout = swizzled((t.stages, width, self.Dv), self.dtype)
        return KeySmem(
            query=Ring.of(query, t.stages, t.consumers, copies),
            dout=Ring.of(dout, t.stages, t.consumers),
            keys_here=plgpu.Barrier(num_barriers=t.consumers, num_arrivals=len(self.staying())),
            **more,
        )

    @property
    def blocks(self) -> int:
        return self.key_blocks * self.g.dims.K * math.prod(self.g.dims.B)

    def place(self, index) -> tuple:
        """(indices of the batch dims, key head, block of keys)."""
        d = self.g.dims
        shared = d.Sq * d.G * (d.D + d.Dv) * jnp.dtype(self.dtype).itemsize
        return self.g.deal(index, self.key_blocks, d.K, shared, last_first=False)


class KeyBlock(Block):
    kernel: KeyKernel
    smem: KeySmem

    def __init__(self, kernel: KeyKernel, inputs: Inputs, smem, multiply_add, batch, head, tile) -> None:
        super().__init__(kernel, inputs, smem, multiply_add)
        self.batch, self.head, self.tile = batch, head, tile

    def query_head(self, i):
        return self.head * self.g.dims.G + i

    def ranges(self, i) -> dict[str, Any]:
        """The row tiles of the i-th query head to visit, and those to which all keys of the block are visible."""
        if self.inputs.ranges is None:
            return dict(zip(RANGE, (0, 0, self.kernel.row_tiles, self.kernel.row_tiles), strict=True))
        ref = self.inputs.ranges
        where = clip_index(ref.shape[:-2], (*self.batch, self.query_head(i)))
        return {name: ref[(*where, self.tile, n)] for n, name in enumerate(RANGE)}

    def over_heads(self, step, carry):
        return lax.fori_loop(0, self.g.dims.G, step, carry)

    def over_rows(self, step, carry):
        """`step(i, row_tile, carry)` over the row tiles of every query head."""

        def head(i, carry):
            ranges = self.ranges(i)
            return lax.fori_loop(ranges["first"], ranges["last"], lambda t, carry: step(i, t, carry), carry)

        return self.over_heads(head, carry)

    def total(self):
        """How many row tiles there are to visit, of all heads."""

        def count(i, n):
            ranges = self.ranges(i)
            return n + ranges["last"] - ranges["first"]

        return self.over_heads(count, jnp.int32(0))

    def first_key(self, warpgroup):
        return self.tile * self.kernel.block_keys + warpgroup * ROWS

    def keys_of(self, ref, axes: Axes, warpgroup, columns: int):
        """A warpgroup's keys in a stored array."""
        keys = span(self.first_key(warpgroup), ROWS, ROWS)
        return tile_at(ref, axes, self.batch, keys, self.head, span(0, columns, columns))

    # --- the producer

    def produce(self) -> None:
        t, smem = self.tiles, self.smem

        def load(i, row_tile, count):
            slot = lax.rem(count, t.stages)
            for name in self.kernel.moving():
                ring = getattr(smem, name)
                wait_if(count >= t.stages, ring.read.at[slot])
                self._load(name, i, row_tile, slot, ring.here.at[slot])
            return count + 1

        def load_again(i, row_tile, count):
            wait_if(count > 0, smem.again_read)
            for name in self.kernel.moving():
                self._load(name, i, row_tile, opaque(0), smem.again_here)
            return count + 1

        self.over_rows(load, jnp.int32(0))
        if nan_safe.may_mask(self.inputs):

            @pl.when(nan_safe.again(smem, t.consumers))
            def _():
                self.over_rows(load_again, jnp.int32(0))

    def _load(self, name: str, i, row_tile, slot, here) -> None:
        width, head = self.tiles.width, self.query_head(i)
        rows = span(row_tile * width, width, width)
        axes, columns = self.kernel.moving()[name]
        source = tile_at(getattr(self.inputs, name), axes, self.batch, rows, head, span(0, columns, columns))
        plgpu.copy_gmem_to_smem(source, getattr(self.smem, name).tile.at[slot], here)
        if name == "query":
            self._load_logits(head, rows, slot, here)

    def _load_logits(self, head, rows, slot, here) -> None:
        """Scalars per row, and bias and mask of a tile of logits, come with its rows."""
        for name in self.kernel.by_row:
            ref = getattr(self.inputs, name)
            where = clip_index(ref.shape[:-1], (*self.batch, head))
            plgpu.copy_gmem_to_smem(ref.at[(*where, rows)], getattr(self.smem, name).at[slot], here)
        for name in self.kernel.by_tile:
            ref = getattr(self.inputs, name)
            where = clip_index(ref.shape[:-2], (*self.batch, head))
            for consumer in range(self.tiles.consumers):
                keys = span(self.first_key(consumer), ROWS, ROWS)
                target = getattr(self.smem, name).at[slot, consumer]
                plgpu.copy_gmem_to_smem(ref.at[(*where, keys, rows)], target, here)

    # --- consumers

    def start_loading_keys(self, warpgroup) -> None:
        for name, (axes, n) in self.kernel.staying().items():
            target = getattr(self.smem, name).at[warpgroup]
            source = self.keys_of(getattr(self.inputs, name), axes, warpgroup, n)
            plgpu.copy_gmem_to_smem(source, target, self.smem.keys_here.at[warpgroup])

    def load_scalars(self, warpgroup, i) -> Inputs:
        """Scalars per key of the i-th query head, those of the head itself, and the dropout key."""
        found: dict[str, Any] = {}
        for name in self.kernel.by_head:
            ref = getattr(self.inputs, name)
            found[name] = ref[(*clip_index(ref.shape[:-1], (*self.batch, self.query_head(i))), 0)]
        for name in self.kernel.by_key:
            keys = pl.ds(self.first_key(warpgroup), ROWS)
            found[name] = self.vector(name, self.batch, self.query_head(i), keys, ROW)
        return Inputs(**found, seed=self.seed(self.batch))
