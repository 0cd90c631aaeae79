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

import jax
import jax.numpy as jnp

from jax_fa import indices
from jax_fa.call import Shape, Size
from jax_fa.masks import segments
from jax_fa.masks.bands import Band, Causal, Lengths, Prefix, SlidingWindow
from jax_fa.masks.base import (
    TRACED,
    Align,
    Complement,
    Dense,
    Intersection,
    Mask,
    Placement,
    Rows,
    Union,
    as_mask,
    broadcasts,
    kinds,
    lead,
    members,
    placed,
    replaced,
)
from jax_fa.masks.packed import CumulativeLengths, SegmentIds
from jax_fa.masks.parts import Terms

__all__ = [
    "TRACED",
    "Align",
    "Band",
    "Causal",
    "Complement",
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
    "Union",
    "as_mask",
    "broadcasts",
    "kinds",
    "lead",
    "members",
    "placed",
    "replaced",
]


class Rules(NamedTuple):
    """A mask as the kernels take it, each None or with `len(batch)` leading dims: see `call.Operands`."""

    lower: Any = None  # *#B #N #Sq int32 in 0..skv
    upper: Any = None
    dense: Any = None  # *#B #N #Sq #Skv bool
    segment_row: Any = None  # *#B #N #Sq int32
    segment_key: Any = None  # *#B #N Skv int32


def parts(
    mask: Mask | None, batch: Shape, heads: Size, sq: Size, skv: Size, at: Any = None
) -> tuple[Rules, ...]:
    """What the kernels take of a mask, for the rows `at` (int32 indices; None: all), as disjoint parts, at least one.

    A boolean array has these rows and no others.

    Raises:
      ValueError: the mask does not fit a call of these sizes.
      TypeError: likewise.
      NotImplementedError: the mask has too many parts, or one without a complement.
    """
    if mask is None:
        return (Rules(),)
    rows = _rows(batch, sq, skv, at)
    for kind in kinds(mask):
        kind.check(batch, heads, sq if at is None or not isinstance(kind, Dense) else len(at), skv)
    nothing = (Terms(upper=jnp.zeros_like(rows.i)),)
    return tuple(_rules(found, len(batch) + 2, skv) for found in mask.parts(rows) or nothing)


def _rules(found: Terms, rank: int, skv: Size) -> Rules:
    segment_row, segment_key = _labels(found.labels, rank)
    return Rules(
        lower=_fit(found.lower, rank, skv),
        upper=_fit(found.upper, rank, skv),
        dense=lead(found.dense, rank + 1),
        segment_row=segment_row,
        segment_key=segment_key,
    )


def intervals(mask: Mask | None, batch: Shape, heads: Size, sq: Size, skv: Size, at: Any = None) -> Rules:
    """`parts` of a mask that has one."""
    (found,) = parts(mask, batch, heads, sq, skv, at)
    return found


def known_part(mask: Mask, but: type[Mask] | tuple[type[Mask], ...] = ()) -> Mask | None:
    """Those of the masks joined by & whose values are known when tracing, and what they mean beside the others.

    None: of none of them. `but`: kinds that are left out.
    """
    everyone = members(mask)
    known = [m for m in everyone if all(indices.known(x) is not None for x in jax.tree.leaves(m))]
    others = [m for m in everyone if not any(m is k for k in known)]
    if any(type(m).aligned is not Mask.aligned for m in others):
        known = [m for m in known if all(getattr(kind, "align", None) == "top-left" for kind in kinds(m))]
    known = [m for m in known if not isinstance(m, but)]
    if len(known) == len(everyone):
        return mask
    return Intersection(tuple(known)) if known else None


def positions(mask: Mask | None, batch: Shape, heads: Size, sq: Size, skv: Size, at: Any = None):
    """The key position at which a mask puts each row, int32 `*#B #N #Sq`; None where it is the row's index.

    Of the rows `at` (int32 indices; None: all).

    Masks that align queries and keys (`Causal`, `SlidingWindow`, `Band`, `Prefix`, packed sequences) put row i at
    the key from which they count. ALiBi's distance counts from there too.

    Raises:
      ValueError: masks that are joined put a row at different positions (or may do so).
    """
    if mask is None:
        return None
    found = [
        (m, p, r) for m, r in placed(mask, _rows(batch, sq, skv, at)) if (p := m.placement(r)) is not None
    ]
    found = [x for x in found if x[1].binds] or found
    if not found:
        return None
    (first, where, rows), *others = found
    for other, there, their_rows in others:
        if not where.same(there) or (where.corner and not _same_lengths(rows, their_rows)):
            raise ValueError(
                "alibi_slopes need one position for each row; the masks put it at several: "
                f"{first.static()!r} and {other.static()!r}. Align them alike, or pass a bias."
            )
    if where.plain:
        return None
    position = where.packed.position(rows) if where.packed is not None else rows.i + _moved(where, rows)
    return lead(jnp.asarray(position, jnp.int32), len(batch) + 2)


def _same_lengths(a: Rows, b: Rows) -> bool:
    return a.sq is b.sq and a.skv is b.skv


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
