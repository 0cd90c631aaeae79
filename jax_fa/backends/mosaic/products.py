"""Matrix products of tiles on the tensor cores (WGMMA)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Two tiles of logits at a time leave registers for sums of so many columns beside them.
MOST_TOGETHER = 128
# acc + a b, of an array a in registers, the sum of `parts`, and a tile b in shared memory; `meanwhile` runs while the
# products do: `(acc, parts, b, meanwhile=...)`.
MultiplyAdd = Callable[..., Any]


def split(x, dtype, wide: bool):
    """x in 16 bits; `wide`: and what rounding took from it, so that the sum of both parts has twice the digits."""
    high = x.astype(dtype)
    return (high, (x - high.astype(jnp.float32)).astype(dtype)) if wide else (high,)


def wgmma(acc, parts, b, meanwhile=lambda: None):
    """The `MultiplyAdd` of the chip."""

    def product(ref):
        for a in parts:
            plgpu.wgmma(ref, a, b)
        meanwhile()

    return pl.run_state(product)(plgpu.ACC.init(acc))


def interpreted(acc, parts, b, meanwhile=lambda: None):
    """The `MultiplyAdd` of Pallas' interpreter, which knows WGMMA with both operands in memory and a sum from 0 only."""
    meanwhile()
    for a in parts:
        acc = acc + jnp.dot(a, b[...], preferred_element_type=acc.dtype)
    plgpu.commit_smem()  # b is read through the generic proxy here, and TMA may overwrite it next
    return acc


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
