"""Sequences packed along one axis (CANN's layout TND): where each row and each key stands.

Sequence b holds the rows `query[b-1] <= i < query[b]` and the keys `key[b-1] <= j < key[b]`; `query` and
`key` are cumulative ends without a leading 0. Rows and keys past the last end belong to no sequence. An end that
is lower than one before it counts as that one (its sequence is empty).
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import indices
from jax_fa.call import Dims
from jax_fa.indices import known, list_of_integers, search_last


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
        return jax.tree.map(lambda ends: jnp.diff(ends, prepend=0), self._ends())

    def last_row(self) -> jax.Array:
        """Where the last sequence ends in query."""
        return self._ends()[0][-1]

    def rows(self) -> Places:
        return self._places(0, self.Sq)

    def keys(self) -> Places:
        return self._places(1, self.Skv)

    def _ends(self) -> tuple[jax.Array, jax.Array]:
        return indices.rising(self.query, self.Sq), indices.rising(self.key, self.Skv)

    def _places(self, axis: int, size: int) -> Places:
        return _places(*self._ends(), axis, size)


def _bounds(ends) -> tuple[jax.Array, jax.Array]:
    return jnp.concatenate([jnp.zeros((1,), jnp.int32), ends[:-1]]), ends


# Calls outside of jit need it several times: it is one program of theirs.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _places(query_ends, key_ends, axis: int, size: int) -> Places:
    at = jnp.arange(size, dtype=jnp.int32)
    bounds = _bounds(query_ends), _bounds(key_ends)
    starts, ends = bounds[axis]
    found = search_last(ends, at, "right")
    sequence = jnp.minimum(found, ends.size - 1)
    first_row, first_key = (start[sequence] for start, _ in bounds)
    sq, skv = ((end - start)[sequence] for start, end in bounds)
    return Places(sequence, found < ends.size, at - starts[sequence], first_row, first_key, sq, skv)


def sequences(input_layout: str, query_ends, key_ends, d: Dims, *, lists: bool) -> Packed | None:
    """The sequences of layout TND; None in the other layouts. `lists`: known ends become tuples, else arrays of NumPy."""
    given = {"actual_seq_qlen": query_ends, "actual_seq_kvlen": key_ends}
    for name, ends in given.items():
        absent = ends is None or (isinstance(ends, (list, tuple)) and not ends)
        if input_layout == "TND" and absent:
            raise ValueError(
                f"{name} must hold the cumulative lengths of the sequences in layout TND; got {ends}."
            )
        if input_layout != "TND" and not absent:
            raise ValueError(f"{name} is for layout TND; got {ends} with input_layout={input_layout!r}.")
    if input_layout != "TND":
        return None
    query, key = (listed(list_of_integers(name, ends), True) for name, ends in given.items())
    if np.shape(query) != np.shape(key) or np.shape(query) == (0,):
        raise ValueError(
            "actual_seq_qlen and actual_seq_kvlen must name the same sequences, at least one; got "
            f"{np.shape(query)[0]} and {np.shape(key)[0]} entries."
        )
    query = _checked_ends("actual_seq_qlen", query, d.Sq, "query's T")
    key = _checked_ends("actual_seq_kvlen", key, d.Skv, "key's T")
    return Packed(listed(query, lists), listed(key, lists), d.Sq, d.Skv)


def listed(integers, lists: bool):
    """What is known as a tuple, which is part of the program, or as an array of NumPy, which is data."""
    values = known(integers)
    if values is None:
        return integers
    return tuple(values.tolist()) if lists else indices.int32(values)


def _checked_ends(name: str, ends, total: int, packed_axis: str):
    """Cumulative ends without the zeros that may fill up the list; raises ValueError where known ones do not fit."""
    values = known(ends)
    if values is not None and values.size and indices.is_int(total) and total:
        # Lengths in place of ends are the commonest mistake; some of them are no wrong ends.
        if min(values) >= 0 and values.max() != total and int(values.sum(dtype=np.int64)) == total:
            raise ValueError(
                f"{name} must be cumulative ends of the sequences along T; got {ends}, whose sum is "
                f"{packed_axis}={total}, as if these were lengths. For lengths pass "
                f"{tuple(np.cumsum(values).tolist())}; where these are ends, cut the arrays behind the last one."
            )
    ends = indices.tidy_ends(name, ends)
    values = known(ends)
    if values is not None and values.size and indices.is_int(total) and values[-1] > total:
        raise ValueError(f"{name} must end at most at {packed_axis}={total}; got {ends}.")
    return ends
