"""Masks that say where keys begin and end by the position of a row: bands, a prefix, lengths."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_fa import indices
from jax_fa.arguments import shown
from jax_fa.call import Size
from jax_fa.indices import FAR, is_int, known
from jax_fa.masks.base import Align, Mask, Placement, Rows, broadcasts, check_batch_shape


def check_align(align: str) -> None:
    if not isinstance(align, str) or align not in ("top-left", "bottom-right"):
        raise ValueError(f'align must be "top-left" or "bottom-right"; got {shown(align)}.')


def is_integer_array(value) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.integer)


@dataclass(frozen=True)
class Band(Mask):
    """`visible(i, j) = i + off - left <= j <= i + off + right`, off = offset (+ skv - sq if bottom-right).

    Args:
      left: how many keys before its own position are visible to a row: an int, or an integer array, one value for
        all or of shape `*B`. None is unbounded; a negative value moves the band's edge to the other side.
      right: how many keys after its own position; likewise.
      align: see the module.
      offset: moves the band by this many keys, for queries that start at another position than the keys: an int,
        or an integer array of shape `*B` (one per batch entry) or `*B N Sq` (one per row; N and Sq may be 1).

    Counts of more than 2**29 mean 2**29, known or not: they reach past every key.
    """

    left: Any = None
    right: Any = None
    align: Align = "top-left"
    offset: Any = 0

    def __post_init__(self) -> None:
        check_align(self.align)
        for name in ("left", "right"):
            value = getattr(self, name)
            if value is not None and not is_int(value) and not is_integer_array(value):
                raise TypeError(f"{name} must be an int, an integer array or None; got {shown(value)}.")
        if not is_int(self.offset) and not is_integer_array(self.offset):
            raise TypeError(f"offset must be an int or an integer array; got {shown(self.offset)}.")

    def check(self, batch, heads, sq, skv) -> None:
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                check_batch_shape(name, getattr(self, name), batch)
        shape, full = np.shape(self.offset), (*batch, heads, sq)
        per_row = len(shape) == len(full) and broadcasts(shape, full)
        if shape not in ((), tuple(batch)) and not per_row:
            raise ValueError(
                f"offset must be an int, or have one entry per batch entry, shape {tuple(batch)}, or one per row, "
                f"shape (*B, N, Sq)={full} of which any may be 1; got shape {shape}."
            )

    @property
    def is_static(self) -> bool:
        """Whether all counts are Python ints (or None)."""
        return is_int(self.offset) and all(x is None or is_int(x) for x in (self.left, self.right))

    def rows(self, rows: Rows, skv: Size) -> tuple[Any, Any]:
        at, offset = rows.i + rows.corner(self.align), 0
        if is_int(self.offset):
            offset = int(self.offset)
        else:
            at = at + rows.per_row(self.offset)
        lower = None if self.left is None else at + self._sum(offset, self.left, -1, rows)
        upper = None if self.right is None else at + self._sum(offset, self.right, 1, rows) + 1
        return lower, upper

    def shift(self, rows: Rows):
        """How far the band moves every row."""
        return rows.corner(self.align) + rows.per_row(self.offset)

    def _sum(self, offset: int, tokens, sign: int, rows: Rows):
        """offset + sign * tokens, of which no part leaves -FAR..FAR."""
        if is_int(tokens):
            return _clamp(offset + sign * int(tokens))
        return _clamp(offset) + sign * self._tokens(rows.per_batch(tokens))

    def _tokens(self, tokens):
        return tokens

    def placement(self, rows: Rows) -> Placement | None:
        corner = self.align == "bottom-right" and not same_length(rows.sq, rows.skv)
        found = Placement(corner, self.offset)
        free = self.left is None and self.right is None and self.align == "top-left"
        return None if free and found.plain else found


def _clamp(tokens: int) -> int:
    return max(-FAR, min(FAR, tokens))


def same_length(sq, skv) -> bool:
    """Whether two lengths are known to be equal when tracing: both are sizes, not data."""
    return not hasattr(sq, "shape") and not hasattr(skv, "shape") and bool(sq == skv)


@dataclass(frozen=True, init=False)
class Causal(Band):
    """`visible(i, j) = j <= i + off`, off = offset (+ skv - sq if bottom-right): see `Band`."""

    # No arguments of __init__, so that `dataclasses.replace` passes none of them.
    left: Any = field(default=None, init=False)
    right: Any = field(default=0, init=False)

    def __init__(self, align: Align = "top-left", offset: Any = 0) -> None:
        super().__init__(None, 0, align, offset)


@dataclass(frozen=True, init=False)
class SlidingWindow(Band):
    """`visible(i, j) = i + off - left <= j <= i + off + right`, off = 0 (top-left) or skv - sq (bottom-right).

    With `right=0` it is a causal window of `left + 1` keys.

    Args:
      left: at least 0, None or -1, which is unbounded: an int, or an integer array, one value for all or of shape
        `*B`. In arrays whose values are not known when tracing, every negative value is unbounded.
      right: likewise.
      align: see the module.
    """

    offset: Any = field(default=0, init=False)  # likewise

    def __init__(self, left: Any, right: Any = 0, align: Align = "top-left") -> None:
        for name, value in (("left", left), ("right", right)):
            if is_int(value) or is_integer_array(value):
                values = known(value)
                if values is not None and np.any(values < -1):
                    raise ValueError(
                        f"{name} must be at least 0 in a sliding window, or -1 (unbounded); got {value}. See Band."
                    )
        left, right = (None if is_int(x) and x == -1 else x for x in (left, right))
        super().__init__(left, right, align)

    def _tokens(self, tokens):
        return indices.module(tokens).where(tokens < 0, FAR, tokens)


@dataclass(frozen=True)
class Prefix(Mask):
    """`visible(i, j) = j <= i + off or j < length[b]`: causal, with a prefix that is visible to every row.

    Args:
      length: prefix length of each batch entry, in 0..Skv, shape `*B` (or a Python int or tuple). Values outside,
        where they are not known when tracing, mean the nearer end. Within packed sequences: of all of them (an int), or
        of each, in the shape of their `query`: one per sequence in `CumulativeLengths`, in `SegmentIds` one per row, which
        is that of the row's segment.
      align: off = 0 (top-left) or skv - sq (bottom-right).
    """

    length: Any
    align: Align = "top-left"

    def __post_init__(self) -> None:
        check_align(self.align)
        indices.check_dtype("length", self.length)

    def check(self, batch, heads, sq, skv) -> None:
        check_batch_shape("length", self.length, batch)
        indices.check_range("length", self.length, skv)

    def rows(self, rows: Rows, skv: Size) -> tuple[Any, Any]:
        return self.bounds(rows, rows.per_batch(self.length, skv))

    def bounds(self, rows: Rows, length) -> tuple[Any, Any]:
        """`rows`, of these lengths."""
        after = rows.i + self.shift(rows) + 1
        return None, indices.module(after, length).maximum(after, length)

    def shift(self, rows: Rows):
        """How far the diagonal lies from that of the top-left corner."""
        return rows.corner(self.align)

    def placement(self, rows: Rows) -> Placement:
        return Placement(self.align == "bottom-right" and not same_length(rows.sq, rows.skv))


@dataclass(frozen=True, init=False)
class Lengths(Mask):
    """`visible(i, j) = i < query[b] and j < key[b]`: padded sequences. Padded rows are fully masked.

    Args:
      query: length of each batch entry, in 0..Sq, shape `*B` (or a Python int or tuple); None: no padding. Values
        outside, where they are not known when tracing, mean the nearer end.
      key: the same of keys and values.
    """

    query: Any = None
    key: Any = None

    def __init__(self, *lengths: Any, query: Any = None, key: Any = None) -> None:
        if lengths:
            raise TypeError(
                "Lengths takes keywords: Lengths(key=...) for the lengths of keys and values (their padding is "
                f"masked), Lengths(query=...) for those of queries; got {len(lengths)} positional argument(s)."
            )
        for name, value in (("query", query), ("key", key)):
            if value is not None:
                indices.check_dtype(f"{name} lengths", value)
            object.__setattr__(self, name, value)

    def check(self, batch, heads, sq, skv) -> None:
        for name, full in (("query", sq), ("key", skv)):
            value = getattr(self, name)
            if value is not None:
                check_batch_shape(f"{name} lengths", value, batch)
                indices.check_range(f"{name} lengths", value, full)

    def aligned(self, rows: Rows) -> Rows:
        """The rows with these lengths instead of the arrays' own."""
        sq, skv = rows.sq, rows.skv
        if self.query is not None:
            sq = _shorter(sq, rows.all_sq, rows.per_batch(self.query, rows.all_sq))
        if self.key is not None:
            skv = _shorter(skv, rows.all_skv, rows.per_batch(self.key, rows.all_skv))
        return replace(rows, sq=sq, skv=skv)

    def rows(self, rows: Rows, skv: Size) -> tuple[Any, Any]:
        upper = None if self.key is None else rows.per_batch(self.key, skv)
        if self.query is not None:
            inside = rows.i < rows.per_batch(self.query, rows.all_sq)
            upper = jnp.where(inside, skv if upper is None else upper, 0)
        return None, upper


def _shorter(length, full: Size, other):
    """The shorter of two lengths, of which the first one may still be that of the array."""
    return other if length is full else jnp.minimum(length, other)
