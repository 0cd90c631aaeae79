"""Shared memory (SMEM) of the kernels, and barriers."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa.backends.mosaic.widths import swizzle_elements


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Ring:
    """Pipeline stages of one array that moves: its tiles, and a barrier each for loaded and for read by all consumers."""

    tile: Any
    here: Any
    read: Any

    @classmethod
    def of(cls, tile, stages: int, consumers: int, copies: int = 1) -> "Ring":
        """`copies`: how many TMA copies fill a stage."""
        return cls(
            tile=tile,
            here=plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
            read=plgpu.Barrier(num_barriers=stages, num_arrivals=consumers),
        )


def swizzled(shape: tuple[int, ...], dtype, atom: int | None = None):
    """Tiles in the layout that WGMMA reads: 8 rows of one swizzle atom of `atom` elements."""
    atom = swizzle_elements(shape[-1]) if atom is None else atom
    size = atom * jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, atom)), plgpu.SwizzleTransform(size))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def atom_of(width: int, row_elements: int, dtype) -> int:
    """Elements of the widest atom that divides a tile of `width` columns and a row of the array it is read from."""
    return math.gcd(width, row_elements, 128 // jnp.dtype(dtype).itemsize)


def span(start, size: int, multiple: int = 1):
    """A slice that may reach over the end of an array: TMA reads 0 there and writes nothing.

    A start that JAX knows it would check against the array's size, so it does not get to know any.
    """
    return pl.ds(pl.multiple_of(opaque(start), multiple), size)


def opaque(x):
    """A number that neither JAX nor the compiler sees through, known or not."""
    if not isinstance(x, int | float):
        return x
    return lax.optimization_barrier(jnp.int32(x) if isinstance(x, int) else jnp.float32(x))


def wait_if(condition, barrier) -> None:
    pl.when(condition)(lambda: plgpu.barrier_wait(barrier))


def arrive_if(condition, barrier) -> None:
    pl.when(condition)(lambda: plgpu.barrier_arrive(barrier))


def registers(ref, layout):
    """A tile or a vector, from shared or global memory, in the layout of WGMMA's results."""
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg] # JAX 0.10 wanted an index too
