"""Indices: integers that say where things begin and end, and reading, adding and searching at them.

Integers are checked where their values are known, and made to fit where not.

Python ints (and tuples of them) are static. The values of NumPy arrays and of concrete JAX arrays are known when
a call is traced; those of traced arrays are not.
"""

import functools
import math
import reprlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa.arguments import shown

FAR = 2**29  # larger counts are moved to this, so that sums with positions stay within int32


def known(x) -> np.ndarray | None:
    """The values of x where they can be read now; None while they are traced, abstract, or live on other hosts."""
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    if hasattr(x, "shape") and not isinstance(x, (np.ndarray, np.generic, jax.Array)):
        return None
    return np.asarray(x)


def is_int(x) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def is_static(value) -> bool:
    """Whether this is part of the program: Python ints, None, and tuples of them."""
    if isinstance(value, (list, tuple)):
        return all(is_static(v) for v in value)
    return value is None or isinstance(value, (int, np.integer))


def check_dtype(name: str, value) -> None:
    try:
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    except (TypeError, ValueError) as error:  # a ragged list, or one of traced values
        got = reprlib.repr(value)
        raise TypeError(f"{name} must be a list of ints or an integer array; got {got}.") from error
    if np.size(value) and not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers; got dtype {dtype}.")


def check_range(name: str, value, high) -> None:
    """Raises ValueError for known values outside of 0..high. (A symbolic `high` compares with nothing.)"""
    values = known(value)
    if values is None or not values.size or not is_int(high):
        return
    if values.min() < 0 or values.max() > high:
        raise ValueError(f"{name} must be in 0..{high}; got {value}.")


def int32(x) -> Any:
    """x as int32, with what is outside of -FAR..FAR moved to the nearer of them. NumPy where x is known."""
    values = known(x)
    if values is None:
        limits = jnp.iinfo(x.dtype)
        return jnp.clip(x, max(-FAR, limits.min), min(FAR, limits.max)).astype(jnp.int32)
    if values.dtype == np.uint64:
        values = np.minimum(values, np.uint64(FAR))
    if values.dtype == object:  # ints that no dtype holds
        values = np.asarray(np.clip(values, -FAR, FAR))
    return np.clip(values.astype(np.int64), -FAR, FAR).astype(np.int32)


def module(*arrays):
    """NumPy if all of these are NumPy arrays or numbers, else jax.numpy."""
    return np if all(isinstance(x, (int, np.ndarray, np.generic)) for x in arrays) else jnp


# --- cumulative ends


def tidy_ends(name: str, ends) -> Any:
    """Ends in which zeros after the last sequence repeat its end; raises ValueError where known ends decrease.

    Lists of a fixed length are filled up with zeros, each an empty sequence. Static ends stay static (tuples).
    """
    values = known(ends)
    if values is None or not values.size:
        return ends
    # Zeros from the last positive end on.
    padded = (values == 0) & (np.cumsum(values[..., ::-1] != 0, axis=-1)[..., ::-1] == 0)
    risen = np.maximum.accumulate(values, axis=-1)
    if np.any((values < 0) | ((values < risen) & ~padded)):
        raise ValueError(
            f"{name} must be cumulative ends that start at 0 or more and do not decrease, but for zeros after "
            f"the last one; got {ends}."
        )
    if not np.any(values < risen):
        return ends
    return _tuples(risen.tolist()) if is_static(ends) else risen


def _tuples(x):
    return tuple(_tuples(v) for v in x) if isinstance(x, list) else x


def rising(ends, high) -> Any:
    """Ends as int32 of 0..high that do not decrease, whatever they are: their running maximum."""
    ends = int32(ends)
    if isinstance(ends, np.ndarray):
        ends = np.maximum.accumulate(ends, axis=-1) if ends.size else ends
    else:
        ends = jax.lax.cummax(ends, axis=ends.ndim - 1)
    return jnp.clip(ends, 0, high)


def list_of_integers(name: str, value) -> tuple[int, ...] | np.ndarray | jax.Array:
    """A list, tuple or int as a tuple (static); an array stays as it is."""
    if is_int(value):
        return (int(value),)
    if isinstance(value, (list, tuple)) and all(type(x) is int or isinstance(x, np.integer) for x in value):
        return tuple(int(x) for x in value)
    try:
        array = value if hasattr(value, "dtype") else jnp.asarray(value)
    except (OverflowError, TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a list of ints or an integer array; got {shown(value)}.") from error
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers; got dtype {array.dtype}.")
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension; got shape {array.shape}.")
    # Not converted here: under jit that would hide the values of a NumPy array from the checks.
    return array


# --- the last axis, of arrays with leading dims that broadcast
#
# Dims of size 1 are not broadcast in memory, and only positions along the last axis are counted, so that a large array
# of many rows does not overflow 32 bits.


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


# Outside of jit, a loop whose function is made anew would be compiled at each call.
@functools.partial(jax.jit, static_argnames="side")
def search_last(table, values, side: Literal["left", "right"]):
    """searchsorted: where each of `values` (`*#L m`) belongs in sorted `table` (`*#L n`), int32 `*L m`.

    (jnp.searchsorted takes one table, which vmap does not mend where some mesh axes are manual, and no symbolic sizes.)
    """
    size = jnp.asarray(table.shape[-1], jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        found = jnp.take_along_axis(table, jnp.minimum(middle, size - 1), axis=-1, mode="clip")
        after = (low < high) & (found < values if side == "left" else found <= values)
        return jnp.where(after, middle + 1, low), jnp.where(after | (low >= high), high, middle)

    # 0, of the shape of both, and differing over the manual axes over which either does.
    start = ((values != values) | (table[..., :1] != table[..., :1])).astype(jnp.int32)
    steps = int(table.shape[-1]).bit_length() if is_int(table.shape[-1]) else 32
    return jax.lax.fori_loop(0, steps, halve, (start, start + size))[0]
