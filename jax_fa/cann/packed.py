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

from jax_fa import indices
from jax_fa.indices import known, search_last


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
    ends = indices.rising(ends, size)
    return jnp.concatenate([jnp.zeros((1,), jnp.int32), ends[:-1]]), ends


def checked_ends(name: str, ends, total: int, packed_axis: str):
    """Cumulative ends without the zeros that may fill up the list; raises ValueError where known ones do not fit."""
    ends = indices.tidy_ends(name, ends)
    values = known(ends)
    if values is not None and values.size and indices.is_int(total) and values[-1] > total:
        raise ValueError(f"{name} must end at most at {packed_axis}={total}; got {ends}.")
    return ends
