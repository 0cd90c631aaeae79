"""Attention masks: structured ones are two rows of integers, `lower[i] <= j < upper[i]` (see `base`).

Alignment of two sequences of lengths sq and skv: `"top-left"` counts rows from the first key on (as `jax.nn` does),
`"bottom-right"` aligns the last row with the last key (as FlashAttention does). Where `Lengths` are given, the lengths
that align are those.

Python ints and tuples of them are static: they are part of the compiled program, and backends whose masks are host
integers can use them. Arrays (JAX or NumPy) are data: they may change from call to call.

An array of shape `*B` holds one value per batch entry, in every mask.

What a docstring asks of values (a range, an order) is checked where the values are known when the call is traced:
Python ints, NumPy arrays, concrete JAX arrays. Values known only when the program runs cannot raise; the docstring
says what they mean then.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from jax_fa.call import Shape, Size
from jax_fa.masks import segments
from jax_fa.masks.bands import Band, Causal, Lengths, Prefix, SlidingWindow
from jax_fa.masks.base import (
    TRACED,
    Align,
    Dense,
    Intersection,
    Mask,
    Placement,
    Rows,
    Terms,
    aligned,
    as_mask,
    broadcasts,
    lead,
    members,
)
from jax_fa.masks.packed import CumulativeLengths, SegmentIds

__all__ = [
    "TRACED",
    "Align",
    "Band",
    "Causal",
    "CumulativeLengths",
    "Dense",
    "Intersection",
    "Lengths",
    "Mask",
    "Placement",
    "Prefix",
    "Rows",
    "SegmentIds",
    "SlidingWindow",
    "Terms",
    "as_mask",
    "broadcasts",
    "lead",
    "members",
]


class Rules(NamedTuple):
    """A mask as the kernels take it, each None or with `len(batch)` leading dims: see `call.Operands`."""

    lower: Any = None  # *#B #N #Sq int32 in 0..skv
    upper: Any = None
    dense: Any = None  # *#B #N #Sq #Skv bool
    segment_row: Any = None  # *#B #N #Sq int32
    segment_key: Any = None  # *#B #N Skv int32


def intervals(mask: Mask | None, batch: Shape, heads: Size, sq: Size, skv: Size, at: Any = None) -> Rules:
    """What the kernels take of a mask, for the rows `at` (int32 indices; None: all).

    A boolean array has these rows and no others.

    Raises:
      ValueError: the mask does not fit a call of these sizes.
      TypeError: likewise.
    """
    if mask is None:
        return Rules()
    for member in members(mask):
        member.check(batch, heads, sq if at is None or not isinstance(member, Dense) else len(at), skv)
    found = mask.rules(_rows(batch, sq, skv, at))
    rank = len(batch) + 2
    segment_row, segment_key = _labels(found.labels, rank)
    return Rules(
        lower=_fit(found.lower, rank, skv),
        upper=_fit(found.upper, rank, skv),
        dense=lead(found.dense, rank + 1),
        segment_row=segment_row,
        segment_key=segment_key,
    )


def positions(mask: Mask | None, batch: Shape, heads: Size, sq: Size, skv: Size, at: Any = None):
    """The key position at which a mask puts each row, int32 `*#B #N #Sq`; None where it is the row's index.

    Of the rows `at` (int32 indices; None: all).

    Masks that align queries and keys (`Causal`, `SlidingWindow`, `Band`, `Prefix`, packed sequences) put row i at
    the key from which they count. ALiBi's distance counts from there too.

    Raises:
      ValueError: the masks of an intersection put a row at different positions (or may do so).
    """
    if mask is None:
        return None
    rows = aligned(mask, _rows(batch, sq, skv, at))
    placed = [(m, p) for m in members(mask) if (p := m.placement(rows)) is not None]
    placed = [x for x in placed if x[1].binds] or placed
    if not placed:
        return None
    (first, where), *others = placed
    for other, there in others:
        if not where.same(there):
            raise ValueError(
                "alibi_slopes need one position for each row; the masks put it at several: "
                f"{first.static()!r} and {other.static()!r}. Align them alike, or pass a bias."
            )
    if where.plain:
        return None
    found = where.packed.position(rows) if where.packed is not None else rows.i + _moved(where, rows)
    return lead(jnp.asarray(found, jnp.int32), len(batch) + 2)


def _moved(where: Placement, rows: Rows):
    return rows.per_row(where.offset) + (rows.corner("bottom-right") if where.corner else 0)


def _rows(batch: Shape, sq: Size, skv: Size, at: Any = None) -> Rows:
    i = jnp.arange(sq, dtype=jnp.int32) if at is None else at
    return Rows(i, sq, skv, len(batch), sq, skv, at)


def _fit(bound, rank: int, skv: Size):
    return None if bound is None else lead(jnp.clip(bound, 0, skv).astype(jnp.int32), rank)


def _labels(labels: segments.Labels | None, rank: int) -> tuple[Any, Any]:
    """(segment_row, segment_key), or None for both where it is known that no row needs them."""
    if labels is None or labels.idle:
        return None, None
    return tuple(lead(jnp.asarray(x), rank) for x in (jnp.where(labels.needed, labels.row, -1), labels.key))
