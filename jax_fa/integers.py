"""Integers that say where things begin and end: checked where their values are known, made to fit where not.

Python ints (and tuples of them) are static. The values of NumPy arrays and of concrete JAX arrays are known when
a call is traced; those of traced arrays are not.
"""

import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
