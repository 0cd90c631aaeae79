"""Shared memory of the kernels, and products of what lies there."""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa import compat
from jax_fa.backends.mosaic.widths import swizzle_elements


def swizzled(shape: tuple[int, ...], dtype, atom: int | None = None):
    """Tiles in the layout of the matrix unit: 8 rows of one swizzle atom of `atom` elements."""
    atom = swizzle_elements(shape[-1]) if atom is None else atom
    size = atom * jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, atom)), plgpu.SwizzleTransform(size))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def atom_of(width: int, row_elements: int, dtype) -> int:
    """Elements of the widest atom that divides a tile of `width` columns and a row of the array it is read from."""
    return math.gcd(width, row_elements, 128 // jnp.dtype(dtype).itemsize)


def span(start, size: int, multiple: int = 1):
    """A slice that may reach over the end of an array: copies read 0 there and write nothing.

    A start that JAX knows it would check against the array's size, so it does not get to know any.
    """
    return pl.ds(pl.multiple_of(hidden(start), multiple), size)


def hidden(x):
    """A number that JAX does not see through, known or not."""
    return lax.optimization_barrier(jnp.int32(x)) if isinstance(x, int) else x


def wait_if(condition, barrier) -> None:
    pl.when(condition)(lambda: plgpu.barrier_wait(barrier))


def arrive_if(condition, barrier) -> None:
    pl.when(condition)(lambda: plgpu.barrier_arrive(barrier))


def split(x, dtype, wide: bool):
    """x in 16 bits; `wide`: and what rounding took from it, so that the sum of both parts has twice the digits."""
    high = x.astype(dtype)
    return (high, (x - high.astype(jnp.float32)).astype(dtype)) if wide else (high,)


def multiply_add(acc, parts, b, meanwhile=lambda: None):
    """acc + a b, of an array a, the sum of `parts`, and a tile b in shared memory; `meanwhile` runs while the products
    do."""
    # The interpreter knows the matrix unit with both operands in memory and a sum from 0 only.
    if compat.interpreting_gpu():
        meanwhile()
        for a in parts:
            acc = acc + jnp.dot(a, b[...], preferred_element_type=acc.dtype)
        plgpu.commit_smem()  # what is read here in the ordinary way, the matrix unit reads as the copy engine writes
        return acc

    def product(ref):
        for a in parts:
            plgpu.wgmma(ref, a, b)
        meanwhile()

    return pl.run_state(product)(plgpu.ACC.init(acc))


# Two tiles of logits at a time leave registers for sums of so many columns beside them.
MOST_TOGETHER = 128


def two_products(first, second, between, together: bool):
    """`between(a b^T)` of the first pair, and c d^T of the second; `together`: while that product runs."""

    if not together:
        done = between(one_product(*first))
        return done, one_product(*second)

    def both(first_ref, second_ref):
        plgpu.wgmma(first_ref, first[0], first[1].transpose((1, 0)))
        plgpu.wgmma(second_ref, second[0], second[1].transpose((1, 0)))
        done = between(plgpu.wgmma_accumulator_load(first_ref, wait_n=1))
        return done, plgpu.wgmma_accumulator_load(second_ref)

    return pl.run_scoped(both, _sum_of(*first), _sum_of(*second))


def one_product(a, b, meanwhile=lambda: None):
    """a b^T; `meanwhile` runs while the product does."""

    def product(ref):
        plgpu.wgmma(ref, a, b.transpose((1, 0)))
        meanwhile()
        return ref[...]

    return pl.run_scoped(product, _sum_of(a, b))


def _sum_of(a, b):
    return plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32)


def registers(ref, layout):
    """A tile or a vector, from shared or global memory, in the layout of the matrix unit's results."""
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg] # JAX 0.10 wanted an index too
