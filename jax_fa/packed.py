"""Sequences packed along one axis (CANN's layout TND): where each row and each key stands.

Sequence b holds the rows `query[b-1] <= i < query[b]` and the keys `key[b-1] <= j < key[b]`; `query` and
`key` are cumulative ends without a leading 0. Rows and keys past the last end belong to no sequence. An end that
is lower than one before it counts as that one (its sequence is empty).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import integers
from jax_fa.arguments import shown
from jax_fa.gather import search_last
from jax_fa.integers import known


def list_of_integers(name: str, value) -> tuple[int, ...] | np.ndarray | jax.Array:
    """A list, tuple or int as a tuple (static); an array stays as it is."""
    if integers.is_int(value):
        return (int(value),)
    if isinstance(value, (list, tuple)) and all(type(x) is int or isinstance(x, np.integer) for x in value):
        return tuple(int(x) for x in value)
    try:
        array = value if hasattr(value, "dtype") else jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a list of ints or an integer array; got {shown(value)}.") from error
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers; got dtype {array.dtype}.")
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension; got shape {array.shape}.")
    # Not converted here: under jit that would hide the values of a NumPy array from the checks.
    return array


class Places(NamedTuple):
    """What there is to know of rows (or keys): int32 arrays with one entry each."""

    sequence: Any  # which sequence; the last one for those that belong to none
    inside: Any  # bool: belongs to a sequence
    position: Any  # in its own sequence
    first_row: Any  # where its sequence begins
    first_key: Any
    sq: Any  # the lengths of its sequence
    skv: Any


@dataclass(frozen=True)
class Packed:
    """The sequences of one call; Sq and Skv are the lengths of the packed axes.

    Known ends do not decrease (see `tidy_ends`); those of traced arrays count as their running maximum.
    """

    query: tuple[int, ...] | np.ndarray | jax.Array
    key: tuple[int, ...] | np.ndarray | jax.Array
    Sq: int
    Skv: int

    @property
    def count(self) -> int:
        return len(self.query)

    def lengths(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The lengths of every sequence, or None while they are traced."""
        query, key = known(self.query), known(self.key)
        if query is None or key is None:
            return None
        return np.diff(query.astype(np.int64), prepend=0), np.diff(key.astype(np.int64), prepend=0)

    def sizes(self) -> tuple[jax.Array, jax.Array]:
        """The lengths of every sequence as int32 arrays."""
        (query, query_ends), (key, key_ends) = self._bounds()
        return query_ends - query, key_ends - key

    def rows(self) -> Places:
        return self._places(0, self.Sq)

    def keys(self) -> Places:
        return self._places(1, self.Skv)

    def _bounds(self):
        """(starts, ends) of the rows and of the keys of every sequence."""
        return _bounds(self.query, self.Sq), _bounds(self.key, self.Skv)

    def _places(self, axis: int, size: int) -> Places:
        at = jnp.arange(size, dtype=jnp.int32)
        bounds = self._bounds()
        starts, ends = bounds[axis]
        found = search_last(ends, at, "right")
        sequence = jnp.minimum(found, self.count - 1)
        first_row, first_key = (start[sequence] for start, _ in bounds)
        sq, skv = (size[sequence] for size in self.sizes())
        position = at - starts[sequence]
        return Places(sequence, found < self.count, position, first_row, first_key, sq, skv)


def _bounds(ends, size: int) -> tuple[jax.Array, jax.Array]:
    ends = integers.rising(ends, size)
    return jnp.concatenate([jnp.zeros((1,), jnp.int32), ends[:-1]]), ends


def checked_ends(name: str, ends, total: int, packed_axis: str):
    """Cumulative ends without the zeros that may fill up the list; raises ValueError where known ones do not fit."""
    ends = integers.tidy_ends(name, ends)
    values = known(ends)
    if values is not None and values.size and integers.is_int(total) and values[-1] > total:
        raise ValueError(f"{name} must end at most at {packed_axis}={total}; got {ends}.")
    return ends
