"""Segments whose members lie anywhere: intervals of keys where they suffice, labels to compare where not.

The keys of one id are a run of the keys sorted by id, `order[first : first + count]`, in their own order. A row
that may attend to the ranks `lo <= r < hi` of its segment has all of these between `order[first + lo]` and
`order[first + hi - 1]`. Where they lie without gaps that interval says it all; where keys of other segments lie in
between, each key's label is compared with the row's. O(S log S), without an S x S array.

Everything here runs on NumPy arrays where the ids are known, and is then part of the program.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import indices
from jax_fa.indices import search_last


class Segments(NamedTuple):
    """int32 arrays with leading dims `*#B 1`."""

    order: Any  # Skv: the keys, sorted by id
    first: Any  # Sq: where the row's segment begins in `order`
    count: Any  # Sq: how many keys its segment has
    rank: Any  # Sq: the row's position among the rows of its segment
    rows: Any  # Sq: how many these are
    row_label: Any  # Sq: the first key of the row's segment
    key_label: Any  # Skv: the first key of the key's segment


class Labels(NamedTuple):
    """A key is visible only where `row == key`; rows without `needed` need no comparison."""

    row: Any  # *#B #N Sq int32
    needed: Any  # *#B #N Sq bool
    key: Any  # *#B 1 Skv int32

    @property
    def idle(self) -> bool:
        """It is known that no row needs a comparison."""
        return isinstance(self.needed, np.ndarray) and not self.needed.any()

    def of(self, take) -> "Labels":
        """The labels of some rows: `take` picks them."""
        return Labels(take(self.row), take(self.needed), self.key)


def of_ids(query, key, padding_id: int | None) -> Segments:
    """The segments of ids `*#B Sq` and `*#B Skv`, of which there is at least one key."""
    query, key = _comparable(query, key)
    xp = indices.module(query, key)
    rank = max(query.ndim, key.ndim) + 1
    query, key = (
        x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (query[..., None, :], key[..., None, :])
    )
    order, starts = _sorted_runs(key, xp)
    ordered = xp.take_along_axis(key, order, -1)
    first = _search(ordered, query, "left", xp)
    count = _search(ordered, query, "right", xp) - first
    if padding_id is not None and _fits(padding_id, query.dtype):
        count = xp.where(query == query.dtype.type(padding_id), 0, count)
    own, _ = _sorted_runs(query, xp)
    mine = xp.take_along_axis(query, own, -1)
    before = _search(mine, query, "left", xp)
    return Segments(
        order=order,
        first=first,
        count=count,
        rank=_inverse(own, xp) - before,
        rows=_search(mine, query, "right", xp) - before,
        row_label=_at(order, first, xp),
        key_label=xp.take_along_axis(xp.take_along_axis(order, starts, -1), _inverse(order, xp), -1),
    )


def interval(segments: Segments, lo, hi) -> tuple[Any, Any, Labels]:
    """(lower, upper, labels) of the ranks lo .. hi - 1 of each row's segment, None: all of them."""
    xp = indices.module(segments.order, *(x for x in (lo, hi) if x is not None))
    first, count = segments.first, segments.count
    lo = 0 if lo is None else xp.clip(lo, 0, count)
    hi = count if hi is None else xp.clip(hi, 0, count)
    some = hi > lo
    lower = xp.where(some, _at(segments.order, first + lo, xp), 0)
    upper = xp.where(some, _at(segments.order, first + hi - 1, xp) + 1, 0)
    needed = some & (upper - lower != hi - lo)
    return lower, upper, Labels(segments.row_label, needed, segments.key_label)


def position(segments: Segments, shift) -> Any:
    """The key that stands where the row stands in its segment, moved by `shift` keys of the segment."""
    at, last = segments.rank + shift, segments.count - 1
    inside = jnp.clip(at, 0, jnp.maximum(last, 0))
    # Beyond the ends of the segment each further rank is one position.
    return _at(segments.order, segments.first + inside, jnp) + at - inside


def both(a: Labels | None, b: Labels | None) -> Labels | None:
    """Labels that are equal where those of a and of b are."""
    if a is None or b is None:
        return b if a is None else a
    # (NumPy's takes no symbolic sizes.)
    batch = jnp.broadcast_shapes(*(x.shape[:-1] for x in (a.row, b.row, a.key, b.key)))
    xp = indices.module(*a, *b)
    # The pairs of rows and keys are numbered together: sorted by the second label, then stably by the first.
    sizes = a.row.shape[-1], a.key.shape[-1]
    pairs = [
        xp.concatenate(
            [xp.broadcast_to(row, (*batch, sizes[0])), xp.broadcast_to(key, (*batch, sizes[1]))], -1
        )
        for row, key in ((a.row, a.key), (b.row, b.key))
    ]
    by_second = _argsort(pairs[1], xp)
    order = xp.take_along_axis(by_second, _argsort(xp.take_along_axis(pairs[0], by_second, -1), xp), -1)
    one, two = (xp.take_along_axis(x, order, -1) for x in pairs)
    new = (one[..., 1:] != one[..., :-1]) | (two[..., 1:] != two[..., :-1])
    number = xp.concatenate([xp.zeros_like(order[..., :1]), xp.cumsum(new, -1, dtype=np.int32)], -1)
    number = xp.take_along_axis(number, _inverse(order, xp), -1)
    return Labels(number[..., : sizes[0]], a.needed | b.needed, number[..., sizes[0] :])


def _comparable(query, key):
    """Both ids in one dtype that holds the values of both."""
    wide = np.promote_types(query.dtype, key.dtype)
    host = indices.known(query) is not None and indices.known(key) is not None
    dtype = wide if host else jax.dtypes.canonicalize_dtype(wide)
    if dtype.kind not in "iu":
        raise TypeError(
            f"query and key segment ids must have dtypes that compare; got {query.dtype} and {key.dtype}."
        )
    return tuple(_converted(n, x, dtype, host) for n, x in (("query", query), ("key", key)))


def _converted(name: str, ids, dtype, host: bool):
    values = indices.known(ids)
    if values is None:
        fits = np.can_cast(ids.dtype, dtype)
    else:
        limits = np.iinfo(dtype)
        fits = not values.size or (int(values.min()) >= limits.min and int(values.max()) <= limits.max)
    if not fits:
        raise TypeError(
            f"{name} segment ids of dtype {ids.dtype} must fit {dtype}, in which they are compared here; cast "
            "query and key ids to one dtype."
        )
    return values.astype(dtype) if host and values is not None else jnp.asarray(ids).astype(dtype)


def _fits(value: int, dtype) -> bool:
    limits = np.iinfo(dtype)
    return limits.min <= value <= limits.max


def _argsort(x, xp):
    return xp.argsort(x, axis=-1, stable=True).astype(np.int32)


def _inverse(order, xp):
    """The rank of each position in `order`."""
    return _argsort(order, xp)


def _sorted_runs(ids, xp):
    """(order of the ids, for each place in it the first one with the same id)."""
    order = _argsort(ids, xp)
    ordered = xp.take_along_axis(ids, order, -1)
    at = xp.arange(ids.shape[-1], dtype=np.int32)
    new = xp.concatenate([xp.ones_like(ordered[..., :1], bool), ordered[..., 1:] != ordered[..., :-1]], -1)
    starts = xp.where(new, at, 0)
    last = starts.ndim - 1
    return order, (np.maximum.accumulate(starts, last) if xp is np else jax.lax.cummax(starts, last))


def _at(order, index, xp):
    """`order[index]` along the last axis, with indices moved into its range."""
    return xp.take_along_axis(order, xp.clip(index, 0, order.shape[-1] - 1), -1)


def _search(table, values, side: Literal["left", "right"], xp):
    """searchsorted along the last axis."""
    if xp is jnp:
        return search_last(table, values, side)
    batch = np.broadcast_shapes(table.shape[:-1], values.shape[:-1])
    tables, wanted = (
        np.broadcast_to(x, (*batch, x.shape[-1])).reshape(-1, x.shape[-1]) for x in (table, values)
    )
    found = np.empty(wanted.shape, np.int32)
    for b in range(len(wanted)):
        found[b] = np.searchsorted(tables[b], wanted[b], side)
    return found.reshape(*batch, -1) if found.size else found.reshape(*batch, values.shape[-1])
