"""Reading, adding and searching along the last axis, of arrays with leading dims that broadcast.

Dims of size 1 are not broadcast in memory, and only positions along the last axis are counted, so that a large array
of many rows does not overflow 32 bits.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp


def take_last(x, index):
    """x[..., index] for x of shape `*#L n` and index of shape `*L rows keys`, clipped to the axis."""
    flat = index.reshape(*index.shape[:-2], -1)
    found = jnp.take_along_axis(x, flat, axis=-1, mode="clip")
    return found.reshape(*found.shape[:-1], *index.shape[-2:])


def add_last(x, index, values):
    """x with `values` (`*L rows keys`) added at x[..., index], summed over dims that x has as 1; the transpose of `take_last`.

    What lies outside the axis is dropped.
    """
    lead = x.ndim - 1
    index, values = jnp.broadcast_arrays(index, values)
    kept = [i for i in range(lead) if x.shape[i] != 1]
    order = (*kept, *(i for i in range(index.ndim) if i not in kept))
    count = math.prod(x.shape[i] for i in kept)
    index, values = (a.transpose(order).reshape(count, -1) for a in (index, values))
    # A negative index would count from the end.
    index = jnp.where(index < 0, x.shape[-1], index)
    add = jax.vmap(lambda x, i, v: x.at[i].add(v, mode="drop"))
    return add(x.reshape(count, x.shape[-1]), index, values).reshape(x.shape)


def search_last(table, values, side: Literal["left", "right"]):
    """searchsorted: where each of `values` (`*#L m`) belongs in sorted `table` (`*#L n`), int32 `*L m`."""

    def find(table, values):
        if isinstance(table.shape[0], int) and isinstance(values.shape[0], int):
            return jnp.searchsorted(table, values, side=side).astype(jnp.int32)
        return _bisect(table, values, side)

    return jnp.vectorize(find, signature="(n),(m)->(m)")(table, values)


def _bisect(table, values, side: Literal["left", "right"]):
    """The same of one table and symbolic sizes (`jax.export`), which jnp.searchsorted does not take."""
    size = jnp.asarray(table.shape[0], jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        found = table[jnp.minimum(middle, size - 1)]
        after = (low < high) & (found < values if side == "left" else found <= values)
        return jnp.where(after, middle + 1, low), jnp.where(after | (low >= high), high, middle)

    start = jnp.zeros_like(values, jnp.int32)
    return jax.lax.fori_loop(0, 32, halve, (start, start + size))[0]
