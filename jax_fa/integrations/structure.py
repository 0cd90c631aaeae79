"""From what other libraries say of a mask (windows, positions, segment IDs, arrays) to masks of jax_fa."""

import functools
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_fa import api, arguments, indices
from jax_fa.masks import Band, Dense, Mask, SegmentIds


def joined(*given: Any) -> Mask | None:
    """The intersection of masks and boolean arrays; None is no mask."""
    found = [api.one_mask(mask) for mask in given if mask is not None]
    return functools.reduce(operator.and_, found) if found else None


def band(size: Any, name: str = "local_window_size") -> Mask | None:
    """An int, or a pair (left, right) of ints: keys i - left .. i + right are visible to row i. None: all."""
    if size is None:
        return None
    pair = (size, size) if indices.is_int(size) else size
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(map(indices.is_int, pair)):
        raise ValueError(
            f"{name} must be an int, a pair (left, right) of ints, or None; got {arguments.shown(size)}."
        )
    return Band(int(pair[0]), int(pair[1]))


def window(name: str, size: Any) -> int:
    """A number of keys that is at least 1."""
    if not indices.is_int(size) or size < 1:
        raise ValueError(f"{name} must be an int of at least 1; got {arguments.shown(size)}.")
    return int(size)


def near(query: Any, key: Any, size: int) -> Mask:
    """Keys whose position is less than `size` away from that of the row: positions `*B Sq` and `*B Skv`, in any order.

    Which keys these are is an interval for none but ascending positions, so that this is an array `*B 1 Sq Skv`.
    """
    distance = key[..., None, :] - query[..., :, None]
    return Dense((jnp.abs(distance) < size)[..., None, :, :])


def segments(query: Any, key: Any = None, *, padding: int | None = None) -> Mask:
    """Rows attend to the keys of their own segment."""
    return SegmentIds(query, key, padding_id=padding)


def chunks(size: int, rows: int, keys: int, first_row: int = 0) -> Mask:
    """Rows attend to the keys of their own chunk: positions are cut into chunks of this size."""
    row, key = np.arange(rows) + first_row, np.arange(keys)
    return SegmentIds(np.int32(row // size), np.int32(key // size))


def positions(name: str, x: Any, shape: tuple[int, ...]):
    """Integers of exactly this shape."""
    x = arguments.array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers; got dtype {x.dtype}.")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; got {x.shape}.")
    return indices.int32(x)
