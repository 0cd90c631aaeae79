"""Masks of several sequences in one array: by cumulative lengths, and by segment IDs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import indices
from jax_fa.arguments import shown
from jax_fa.call import Shape, Size
from jax_fa.indices import is_int, is_static, known, search_last
from jax_fa.masks import segments
from jax_fa.masks.bands import Band, Prefix
from jax_fa.masks.base import Mask, Placement, Rows, alike, broadcasts
from jax_fa.masks.parts import Terms


class _Packed(Mask):
    """Several sequences in one array: only keys of its own sequence are visible to a row, and of those `within`."""

    query: Any
    key: Any
    within: Band | Prefix | None
    contiguous: ClassVar[bool] = True  # the members of a sequence lie side by side

    def _check_within(self) -> None:
        if self.within is not None and not isinstance(self.within, (Band, Prefix)):
            raise TypeError(
                f"within must be a Band (Causal, SlidingWindow) or a Prefix; got {shown(self.within)}."
            )

    def check(self, batch, heads, sq, skv) -> None:
        if not isinstance(self.within, Prefix):
            if self.within is not None:
                self.within.check(batch, heads, sq, skv)
            return
        length, shape = self.within.length, np.shape(self.query)
        if np.shape(length) not in ((), shape):
            raise ValueError(
                f"length of a Prefix within packed sequences must be an int or have the shape {shape} of query; got shape "
                f"{np.shape(length)}."
            )
        indices.check_range("length", length, skv)

    def _bounds(self, own: Rows, skv: Size, prefix: Callable[[Any], Any]) -> tuple[Any, Any]:
        """What `within` shows the rows of their `own` sequences; `prefix` gives each row the length of its sequence."""
        if self.within is None:
            return None, None
        if not isinstance(self.within, Prefix):
            return self.within.rows(own, skv)
        length = indices.int32(self.within.length)
        return self.within.bounds(own, prefix(length) if np.ndim(length) else length)

    def placement(self, rows: Rows) -> Placement:
        # The position of a row of self-attention is that of its own key; `within` counts from the same corner either way.
        within = Placement() if self.within is None else self.within.placement(rows) or Placement()
        binds = self.within is not None
        still = is_int(within.offset) and within.offset == 0
        if (self.key is None or alike(self.query, self.key)) and (still or self.contiguous):
            return Placement(offset=within.offset, binds=binds)
        return Placement(packed=self, binds=binds)

    def _shift(self, rows: Rows):
        """How far `within` moves the rows of a sequence; `rows` has the lengths of each one's own."""
        return 0 if self.within is None else self.within.shift(rows)

    def position(self, rows: Rows):
        """The key position of each row."""
        raise NotImplementedError


@dataclass(frozen=True)
class CumulativeLengths(_Packed):
    """`visible(i, j) = seq(i) == seq(j)`, and `within` of the positions inside that sequence.

    Args:
      query: where each sequence ends: `cumsum` of the lengths, in 0..Sq, shape `sequences` or `*B sequences`. A
        leading 0 is an empty sequence and does no harm; zeros after the last end are empty sequences. Ends must not
        decrease otherwise; those whose values are not known when tracing count as their running maximum, within
        0..Sq. Rows past the last end are fully masked.
      key: the same of keys, None: the same as query. Keys past the last end are masked.
      within: a Band, Causal, SlidingWindow or Prefix relative to each sequence, with that sequence's lengths.
    """

    query: Any
    key: Any = None
    within: Band | Prefix | None = None

    def __post_init__(self) -> None:
        self._check_within()
        if self.query is None:
            raise TypeError("query must hold the cumulative lengths of the rows; got None.")
        for name in ("query", "key"):
            value = getattr(self, name)
            if value is not None:
                indices.check_dtype(f"cumulative {name} lengths", value)
                if not np.shape(value):
                    raise ValueError(
                        f"cumulative {name} lengths must have shape (sequences,) or (*B, sequences): the end of each sequence; "
                        f"got {shown(value)}."
                    )
                object.__setattr__(self, name, indices.tidy_ends(f"cumulative {name} lengths", value))
        if self.key is not None and np.shape(self.query)[-1:] != np.shape(self.key)[-1:]:
            raise ValueError(
                f"cumulative query and key lengths must name the same sequences; got shapes "
                f"{np.shape(self.query)} and {np.shape(self.key)}."
            )

    def check(self, batch, heads, sq, skv) -> None:
        super().check(batch, heads, sq, skv)
        for name, value, full in (("query", self.query, sq), ("key", self.key, skv)):
            # Keys that end where queries do must fit both.
            value = self.query if value is None else value
            shape = np.shape(value)
            if not shape or not _per_batch(shape[:-1], batch):
                raise ValueError(
                    f"cumulative {name} lengths must have shape (sequences,) or (*B, sequences) with "
                    f"B={batch}; got {shape}."
                )
            indices.check_range(f"cumulative {name} lengths", value, full)

    def rows(self, rows: Rows, skv: Size) -> tuple[Any, Any]:
        if np.shape(self.query)[-1] == 0:
            return None, jnp.zeros_like(rows.i)
        inside, start_k, own, at = self._places(rows)
        lower, upper = start_k, start_k + own.skv
        lo, hi = self._bounds(own, skv, lambda length: _take(jnp.asarray(length), at))
        if lo is not None:
            lower = jnp.maximum(lower, start_k + lo)
        if hi is not None:
            upper = jnp.minimum(upper, start_k + hi)
        return lower, jnp.where(inside, upper, 0)

    def position(self, rows: Rows):
        if np.shape(self.query)[-1] == 0:
            return rows.i
        _, start_k, own, _ = self._places(rows)
        return start_k + own.i + self._shift(own)

    def _places(self, rows: Rows):
        """(whether a row is in a sequence, its first key, the row within the sequence, which sequence it is)."""
        end_q = indices.rising(self.query, rows.all_sq)
        end_k = indices.rising(self.query if self.key is None else self.key, rows.all_skv)
        count = end_q.shape[-1]
        sequence = _searchsorted(end_q, rows.i, "right")
        at = jnp.minimum(sequence, count - 1)

        def take(ends, index):
            return jnp.where(index < 0, 0, _take(ends, jnp.maximum(index, 0)))

        start_q, start_k = take(end_q, at - 1), take(end_k, at - 1)
        own = replace(rows, i=rows.i - start_q, sq=take(end_q, at) - start_q, skv=take(end_k, at) - start_k)
        return sequence < count, start_k, own, at


@dataclass(frozen=True)
class SegmentIds(_Packed):
    """`visible(i, j) = query[i] == key[j]`, and `within` of the positions inside that segment.

    Ids in any order. The members of a segment count in their own order, also where others lie in between.

    Args:
      query: integer ids, shape `*#B Sq`.
      key: the same of keys, shape `*#B Skv`; None: the same as query.
      within: a Band, Causal, SlidingWindow or Prefix relative to each segment, with that segment's lengths.
      padding_id: rows of this id are fully masked, keys of this id are masked; None: no id is special.
    """

    query: Any
    key: Any = None
    within: Band | Prefix | None = None
    padding_id: int | np.integer | None = None
    contiguous: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check_within()
        if self.query is None:
            raise TypeError("query must hold the segment ids of the rows; got None.")
        for name, value in (("query", self.query), ("key", self.key)):
            if value is not None:
                indices.check_dtype(f"{name} segment ids", value)
        if self.padding_id is not None and not is_int(self.padding_id):
            raise TypeError(f"padding_id must be an int or None; got {shown(self.padding_id)}.")

    def check(self, batch, heads, sq, skv) -> None:
        super().check(batch, heads, sq, skv)
        for name, value, full in (("query", self.query, sq), ("key", self.key, skv)):
            value = self.query if value is None else value
            shape = np.shape(value)
            if shape[-1:] != (full,) or not _per_batch(shape[:-1], batch):
                raise ValueError(
                    f"{name} segment ids must have shape (*B, {full}) with B={batch}; got {shape}."
                )

    def rules(self, rows: Rows) -> Terms:
        if 0 in (*np.shape(self.query), *np.shape(self.key)):
            return Terms(upper=jnp.zeros_like(rows.i))
        found, own = self._segments(rows)
        lo, hi = self._bounds(own, rows.all_skv, self._per_row(rows))
        lower, upper, labels = segments.interval(found, lo, hi)
        return Terms(rows.of(lower), rows.of(upper), None if labels.idle else labels.of(rows.of))

    def position(self, rows: Rows):
        if 0 in (*np.shape(self.query), *np.shape(self.key)):
            return rows.i
        found, own = self._segments(rows)
        return rows.of(segments.position(found, self._shift(own)))

    def _per_row(self, rows: Rows) -> Callable[[Any], Any]:
        """Values of the shape of the rows' ids, so that they broadcast with `Rows.i` of segments."""
        return lambda x: x.reshape((1,) * (rows.batch_rank + 1 - x.ndim) + x.shape)[..., None, :]

    def _segments(self, rows: Rows) -> tuple[segments.Segments, Rows]:
        """The segments, and all rows within their own."""

        def ids(given):
            x = np.asarray(given) if is_static(given) else given
            values = known(x)
            x = x if values is None else values
            # As many dims as the call has, so that they broadcast with counts per batch entry.
            return x.reshape((1,) * (rows.batch_rank + 1 - x.ndim) + x.shape)

        query, key = ids(self.query), ids(self.query if self.key is None else self.key)
        found = segments.of_ids(query, key, None if self.padding_id is None else int(self.padding_id))
        return found, replace(rows, i=found.rank, sq=found.rows, skv=found.count, at=None)


def _per_batch(shape: Shape, batch: Shape) -> bool:
    """Whether these leading dims are none, or `*#B`."""
    return not shape or (len(shape) == len(batch) and broadcasts(shape, batch))


def _searchsorted(table, values, side):
    """searchsorted along the last axis; a batched result gets a head axis: `*B 1 Sq`."""
    found = search_last(table, values, side)
    return found if found.ndim == 1 else found[..., None, :]


@jax.jit
def _take(table, index):
    if table.ndim == 1:
        return table[index]
    if index.ndim == 1:
        return table[..., None, index]
    return jnp.take_along_axis(table[..., None, :], index, axis=-1)
