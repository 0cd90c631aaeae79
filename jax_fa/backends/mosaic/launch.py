"""What all kernels have in common: a grid of thread blocks, each of one producer warpgroup and several consumers."""

from typing import Any, ClassVar, TypeVar

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa import compat
from jax_fa.backends.mosaic import products
from jax_fa.backends.mosaic.geometry import Geometry, clip_index
from jax_fa.backends.mosaic.inputs import Inputs
from jax_fa.backends.mosaic.memory import registers
from jax_fa.backends.mosaic.widths import padded_head_dim

Results = TypeVar("Results")


class Kernel:
    """The kernel of one call; its attributes are what is known when it is traced."""

    block: ClassVar[type["Block"]]

    def __init__(self, g: Geometry, inputs: Inputs) -> None:
        self.g, self.tiles, self.problem, self.inputs = g, g.tiles, g.problem, inputs
        self.dtype = inputs.query.dtype
        self.D, self.Dv = padded_head_dim(g.dims.D), padded_head_dim(g.dims.Dv)
        self.plain = g.plain

    def smem(self) -> Any:
        """What a block has in shared memory: a dataclass, in the order in which it is laid out."""
        raise NotImplementedError

    @property
    def blocks(self) -> int:
        raise NotImplementedError

    def place(self, index) -> tuple:
        """Where the block of this index works: the last arguments of `block`."""
        raise NotImplementedError

    def launch(self, name: str, results: Results) -> Results:
        """Runs the kernel; `results`: the shapes, in a dataclass that is returned with the arrays."""
        t = self.tiles
        consume, produce = t.REGISTERS[t.consumers]
        shapes, tree = jax.tree.flatten(results)
        # The kernels do not know where they run: this is the one product that the interpreter lacks.
        multiply_add = products.interpreted if compat.interpreting_gpu() else products.wgmma

        def body(inputs, *refs) -> None:
            *outs, smem = refs
            block = self.block(self, inputs, smem, multiply_add, *self.place(lax.axis_index("block")))
            warpgroup = lax.axis_index("warpgroup")

            @pl.when(warpgroup < t.consumers)
            def _consume():
                if t.consumers > 1:
                    plgpu.set_max_registers(consume, action="increase")
                block.consume(warpgroup, jax.tree.unflatten(tree, outs))

            @pl.when(warpgroup == t.consumers)
            def _produce():
                if t.consumers > 1:
                    plgpu.set_max_registers(produce, action="decrease")
                block.produce()

        kernel = plgpu.kernel(
            body,
            out_type=tuple(shapes),
            scratch_types=[self.smem()],
            grid=(self.blocks,),
            grid_names=("block",),
            num_threads=t.consumers + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=True),
            kernel_name=f"jax_fa_{name}",
        )
        with jax.enable_x64(False):  # a kernel's own integers have 32 bits, whatever the caller's have
            found = kernel(self.inputs)
        return jax.tree.unflatten(tree, found)


class Block:
    """What one thread block does."""

    def __init__(self, kernel: Any, inputs: Inputs, smem: Any, multiply_add: products.MultiplyAdd) -> None:
        self.kernel, self.g, self.tiles = kernel, kernel.g, kernel.tiles
        self.inputs, self.smem, self.multiply_add = inputs, smem, multiply_add

    def produce(self) -> None:
        """The producer warpgroup: has TMA load tiles into shared memory."""
        raise NotImplementedError

    def consume(self, warpgroup, results: Any) -> None:
        """A consumer warpgroup: computes, and stores into `results`."""
        raise NotImplementedError

    def vector(self, name: str, batch: tuple, head, at, layout):
        """A part of an input `*#B #N n`, in registers."""
        ref = getattr(self.inputs, name)
        where = clip_index(ref.shape[:-1], (*batch, head))
        return registers(ref.at[(*where, at)], layout)

    def seed(self, batch: tuple):
        """Both words of the dropout key; None without dropout."""
        ref = self.inputs.seed
        if ref is None:
            return None
        where = clip_index(ref.shape[:-1], batch)
        return ref[(*where, 0)], ref[(*where, 1)]
