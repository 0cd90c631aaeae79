"""What all kernels are launched by: a grid of blocks, each of one producer warpgroup and several consumers."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa.backends.mosaic.tuning import Tiles

Block = Any  # has consume(warpgroup, *outs) and produce()


def launch(
    name: str,
    tiles: Tiles,
    blocks: int,
    block: Callable[[dict[str, Any], dict[str, Any], Any], Block],
    arrays: dict[str, Any],
    results: dict[str, Any],
    scratch: dict[str, Any],
) -> dict[str, jax.Array]:
    """Runs a kernel; `block(arrays, scratch, index)` is what one of its blocks does, `results` are shapes by name."""
    consume, produce = tiles.REGISTERS[tiles.consumers]

    def body(arrays, *outs, **memory) -> None:
        this = block(arrays, memory, lax.axis_index("block"))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < tiles.consumers)
        def _consume():
            if tiles.consumers > 1:
                plgpu.set_max_registers(consume, action="increase")
            this.consume(warpgroup, *outs)

        @pl.when(warpgroup == tiles.consumers)
        def _produce():
            if tiles.consumers > 1:
                plgpu.set_max_registers(produce, action="decrease")
            this.produce()

    found = plgpu.kernel(
        body,
        out_type=tuple(results.values()),
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=tiles.consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=f"jax_fa_{name}",
    )(arrays)
    return dict(zip(results, found, strict=True))
