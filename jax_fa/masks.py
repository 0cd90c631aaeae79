"""Structured masks: every kind is two rows of integers.

In a structured mask key j is visible to row i where `lower[i] <= j < upper[i]`. Each kind below turns itself into
such intervals (`Mask.rules`); its docstring gives the brute-force definition that the tests hold it against.
Intersections (`a & b`) of intervals are intervals again. Two kinds may need more: `Dense` is an arbitrary boolean
array, kept as it is and combined with the intervals, and `SegmentIds` whose segments are interleaved compare labels.

Alignment of two sequences of lengths sq and skv: `"top-left"` counts rows from the first key on (as `jax.nn` does),
`"bottom-right"` lets the last row meet the last key (as FlashAttention does). Where `Lengths` are given, the lengths
that align are those.

Python ints and tuples of them are static: they are part of the compiled program, and backends whose masks are host
integers can use them. Arrays (JAX or NumPy) are data: they may change from call to call.

An array of shape `*B` holds one value per batch entry, in every mask.

What a docstring asks of values (a range, an order) is checked where the values are known when the call is traced:
Python ints, NumPy arrays, concrete JAX arrays. Values known only when the program runs cannot raise; the docstring
says what they mean then.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import integers, segments
from jax_fa.gather import search_last
from jax_fa.integers import FAR, is_int, is_static, known
from jax_fa.problem import Shape, Size

Align = Literal["top-left", "bottom-right"]


class Rules(NamedTuple):
    """A mask as the kernels take it, each None or with `len(batch)` leading dims: see `problem.Operands`."""

    lower: Any = None  # *#B #N #Sq int32 in 0..skv
    upper: Any = None
    dense: Any = None  # *#B #N #Sq #Skv bool
    segment_row: Any = None  # *#B #N #Sq int32
    segment_key: Any = None  # *#B #N Skv int32


class _Terms(NamedTuple):
    """What one mask adds to the rules: unclipped bounds, labels and a boolean array."""

    lower: Any = None
    upper: Any = None
    labels: segments.Labels | None = None
    dense: Any = None


@dataclass(frozen=True)
class Rows:
    """Where rows stand: their positions in their own sequence, and the lengths of their two sequences."""

    i: Any  # what broadcasts to *B N Sq
    sq: Any
    skv: Any
    batch_rank: int
    all_sq: Size  # the lengths of the arrays
    all_skv: Size

    def per_batch(self, values, high: Size | None = None):
        """Values `*B` (or one for all) as int32 that broadcast with `i`, moved into 0..high if that is given."""
        x = integers.int32(values)
        x = x[..., None, None] if x.ndim else x
        return x if high is None else jnp.clip(x, 0, high)

    def per_row(self, values):
        """Values of shape `*B`, or `*B #N #Sq`."""
        x = integers.int32(values)
        return x if x.ndim == self.batch_rank + 2 else self.per_batch(values)

    def corner(self, align: Align):
        """How far the alignment moves every row."""
        return self.skv - self.sq if align == "bottom-right" else 0


@dataclass(frozen=True)
class _Placement:
    """The key position of a row: its index, moved to the corner, and by an offset; or that of a packed mask."""

    corner: bool = False
    offset: Any = 0
    packed: Any = None
    binds: bool = True  # a mask that does not bind gives way to others

    @property
    def plain(self) -> bool:
        return not self.corner and self.packed is None and is_int(self.offset) and self.offset == 0

    def same(self, other: "_Placement") -> bool:
        same_packed = self.packed is other.packed
        return self.corner == other.corner and same_packed and _alike(self.offset, other.offset)


def _alike(a, b) -> bool:
    """Whether these are known to hold the same values."""
    if a is b:
        return True
    x, y = (None if v is None else known(v) for v in (a, b))
    return x is not None and y is not None and np.array_equal(x, y)


class _Traced:
    """Stands in the static description of a mask for a value that is not known when tracing."""

    def __repr__(self) -> str:
        return "TRACED"


TRACED = _Traced()


class Mask:
    """Which keys a query row may see. Combine masks with `&`."""

    # NumPy would apply & to an array element by element.
    __array_ufunc__ = None

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value: join masks by &, not by `and`, `or` or `not`.")

    def __and__(self, other) -> "Mask":
        return Intersection(members(self) + members(as_mask(other)))

    def __rand__(self, other) -> "Mask":
        return as_mask(other) & self

    def __invert__(self) -> "Mask":
        raise TypeError("masks have no complement (~): pass the inverted boolean array, with True = visible.")

    def __or__(self, other) -> "Mask":
        raise TypeError("masks have no union (|): join masks by &, or pass the union as a boolean array.")

    def __ror__(self, other) -> "Mask":
        return self | other

    def check(self, batch: Shape, heads: Size, sq: Size, skv: Size) -> None:
        """Raises ValueError or TypeError where the mask does not fit a call of these sizes."""

    def rows(self, rows: Rows, skv: Size) -> tuple[Any, Any]:
        """(lower, upper) for the given rows, each None where unbounded; `skv` counts all keys."""
        raise NotImplementedError

    def rules(self, rows: Rows) -> _Terms:
        """What the mask says of the given rows, where two bounds do not say it all."""
        return _Terms(*self.rows(rows, rows.all_skv))

    def placement(self, rows: Rows) -> "_Placement | None":
        """At which key position the mask puts the rows; None: it says nothing of it."""
        return None

    def static(self) -> "Mask":
        """This mask with every array replaced by TRACED: hashable, a description and not a mask to use."""
        names = [f.name for f in fields(self)]  # type: ignore[arg-type]
        return _bare(type(self), {name: _static_value(getattr(self, name)) for name in names})


def _bare(cls: type, values: dict[str, Any]):
    """An object of cls without the checks of its constructor: JAX puts placeholders into pytrees."""
    mask: Any = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(mask, name, value)
    return mask


def _static_value(value):
    if isinstance(value, Mask):
        return value.static()
    if isinstance(value, (list, tuple)):
        return tuple(_static_value(v) for v in value)
    if isinstance(value, np.integer):
        return int(value)
    return TRACED if hasattr(value, "shape") else value


def members(mask: Mask) -> tuple[Mask, ...]:
    return mask.masks if isinstance(mask, Intersection) else (mask,)


def as_mask(mask) -> Mask:
    """A `Mask` as it is, a boolean array as `Dense`."""
    if isinstance(mask, Mask):
        return mask
    if hasattr(mask, "dtype") and hasattr(mask, "shape"):
        return Dense(mask)
    raise TypeError(
        f"mask must be a jax_fa.masks.Mask or a boolean array; got {type(mask).__name__}. "
        "For an additive mask use bias."
    )


def _check_align(align: str) -> None:
    if align not in ("top-left", "bottom-right"):
        raise ValueError(f'align must be "top-left" or "bottom-right"; got {align!r}.')


def _integer_array(value) -> bool:
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
        _check_align(self.align)
        for name in ("left", "right"):
            value = getattr(self, name)
            if value is not None and not is_int(value) and not _integer_array(value):
                raise TypeError(f"{name} must be an int, an integer array or None; got {value!r}.")
        if not is_int(self.offset) and not _integer_array(self.offset):
            raise TypeError(f"offset must be an int or an integer array; got {self.offset!r}.")

    def check(self, batch, heads, sq, skv) -> None:
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                _check_batch_shape(name, getattr(self, name), batch)
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

    def _sum(self, offset: int, tokens, sign: int, rows: Rows):
        """offset + sign * tokens, of which no part leaves -FAR..FAR."""
        if is_int(tokens):
            return _clamp(offset + sign * int(tokens))
        return _clamp(offset) + sign * self._tokens(rows.per_batch(tokens))

    def _tokens(self, tokens):
        return tokens

    def placement(self, rows: Rows) -> _Placement | None:
        corner = self.align == "bottom-right" and not _equal(rows.sq, rows.skv)
        found = _Placement(corner, self.offset)
        free = self.left is None and self.right is None and self.align == "top-left"
        return None if free and found.plain else found


def _clamp(tokens: int) -> int:
    return max(-FAR, min(FAR, tokens))


def _equal(sq, skv) -> bool:
    """Whether two lengths are known to be equal when tracing: both are sizes, not data."""
    return not hasattr(sq, "shape") and not hasattr(skv, "shape") and bool(sq == skv)


class Causal(Band):
    """`visible(i, j) = j <= i + off`, off = offset (+ skv - sq if bottom-right): see `Band`."""

    def __init__(self, align: Align = "top-left", offset: Any = 0) -> None:
        super().__init__(None, 0, align, offset)


class SlidingWindow(Band):
    """`visible(i, j) = i + off - left <= j <= i + off + right`, off = 0 (top-left) or skv - sq (bottom-right).

    With `right=0` it is a causal window of `left + 1` keys.

    Args:
      left: at least 0, None or -1, which is unbounded: an int, or an integer array, one value for all or of shape
        `*B`. In arrays whose values are not known when tracing, every negative value is unbounded.
      right: likewise.
      align: see the module.
    """

    def __init__(self, left: Any, right: Any = 0, align: Align = "top-left") -> None:
        for name, value in (("left", left), ("right", right)):
            if is_int(value) or _integer_array(value):
                values = known(value)
                if values is not None and np.any(values < -1):
                    raise ValueError(
                        f"{name} must be at least 0 in a sliding window, or -1 (unbounded); got {value}. See Band."
                    )
        left, right = (None if is_int(x) and x == -1 else x for x in (left, right))
        super().__init__(left, right, align)

    def _tokens(self, tokens):
        return integers.module(tokens).where(tokens < 0, FAR, tokens)


@dataclass(frozen=True)
class Prefix(Mask):
    """`visible(i, j) = j <= i + off or j < length[b]`: causal, with a prefix that is visible to every row.

    Args:
      length: prefix length of each batch entry, in 0..Skv, shape `*B` (or a Python int or tuple). Values outside,
        where they are not known when tracing, mean the nearer end.
      align: off = 0 (top-left) or skv - sq (bottom-right).
    """

    length: Any
    align: Align = "top-left"

    def __post_init__(self) -> None:
        _check_align(self.align)
        integers.check_dtype("length", self.length)

    def check(self, batch, heads, sq, skv) -> None:
        _check_batch_shape("length", self.length, batch)
        integers.check_range("length", self.length, skv)

    def rows(self, rows: Rows, skv: Size) -> tuple[Any, Any]:
        causal = rows.i + rows.corner(self.align) + 1
        return None, jnp.maximum(causal, rows.per_batch(self.length, skv))

    def placement(self, rows: Rows) -> _Placement:
        return _Placement(self.align == "bottom-right" and not _equal(rows.sq, rows.skv))


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
                integers.check_dtype(f"{name} lengths", value)
            object.__setattr__(self, name, value)

    def check(self, batch, heads, sq, skv) -> None:
        for name, full in (("query", sq), ("key", skv)):
            value = getattr(self, name)
            if value is not None:
                _check_batch_shape(f"{name} lengths", value, batch)
                integers.check_range(f"{name} lengths", value, full)

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


class _Packed(Mask):
    """Several sequences in one array: only keys of its own sequence are visible to a row, and of those `within`."""

    query: Any
    key: Any
    within: Band | None
    contiguous: ClassVar[bool] = True  # the members of a sequence lie side by side

    def _check_within(self) -> None:
        if self.within is not None and not isinstance(self.within, Band):
            raise TypeError(f"within must be a Band (Causal, SlidingWindow); got {self.within!r}.")

    def check(self, batch, heads, sq, skv) -> None:
        if self.within is not None:
            self.within.check(batch, heads, sq, skv)

    def placement(self, rows: Rows) -> _Placement:
        # A row of self-attention stands at its own key; `within` counts from the same corner either way.
        within = _Placement() if self.within is None else self.within.placement(rows) or _Placement()
        binds = self.within is not None
        still = is_int(within.offset) and within.offset == 0
        if (self.key is None or _alike(self.query, self.key)) and (still or self.contiguous):
            return _Placement(offset=within.offset, binds=binds)
        return _Placement(packed=self, binds=binds)

    def _shift(self, rows: Rows):
        """How far `within` moves the rows of a sequence; `rows` has the lengths of each one's own."""
        if self.within is None:
            return 0
        return rows.corner(self.within.align) + rows.per_row(self.within.offset)

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
      within: a Band, Causal or SlidingWindow relative to each sequence, with that sequence's lengths.
    """

    query: Any
    key: Any = None
    within: Band | None = None

    def __post_init__(self) -> None:
        self._check_within()
        if self.query is None:
            raise TypeError("query must hold the cumulative lengths of the rows; got None.")
        for name in ("query", "key"):
            value = getattr(self, name)
            if value is not None:
                integers.check_dtype(f"cumulative {name} lengths", value)
                object.__setattr__(self, name, integers.tidy_ends(f"cumulative {name} lengths", value))
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
            integers.check_range(f"cumulative {name} lengths", value, full)

    def rows(self, rows: Rows, skv: Size) -> tuple[Any, Any]:
        if np.shape(self.query)[-1] == 0:
            return None, jnp.zeros_like(rows.i)
        inside, start_k, own = self._places(rows)
        lower, upper = start_k, start_k + own.skv
        if self.within is not None:
            lo, hi = self.within.rows(own, skv)
            if lo is not None:
                lower = jnp.maximum(lower, start_k + lo)
            if hi is not None:
                upper = jnp.minimum(upper, start_k + hi)
        return lower, jnp.where(inside, upper, 0)

    def position(self, rows: Rows):
        if np.shape(self.query)[-1] == 0:
            return rows.i
        _, start_k, own = self._places(rows)
        return start_k + own.i + self._shift(own)

    def _places(self, rows: Rows):
        """(whether a row is in a sequence, its first key, the row within the sequence)."""
        end_q = integers.rising(self.query, rows.all_sq)
        end_k = integers.rising(self.query if self.key is None else self.key, rows.all_skv)
        count = end_q.shape[-1]
        sequence = _searchsorted(end_q, rows.i, "right")
        at = jnp.minimum(sequence, count - 1)

        def take(ends, index):
            return jnp.where(index < 0, 0, _take(ends, jnp.maximum(index, 0)))

        start_q, start_k = take(end_q, at - 1), take(end_k, at - 1)
        own = replace(rows, i=rows.i - start_q, sq=take(end_q, at) - start_q, skv=take(end_k, at) - start_k)
        return sequence < count, start_k, own


@dataclass(frozen=True)
class SegmentIds(_Packed):
    """`visible(i, j) = query[i] == key[j]`, and `within` of the positions inside that segment.

    Ids in any order. The members of a segment count in their own order, also where others lie in between.

    Args:
      query: integer ids, shape `*#B Sq`.
      key: the same of keys, shape `*#B Skv`; None: the same as query.
      within: a Band, Causal or SlidingWindow relative to each segment, with that segment's lengths.
      padding_id: rows of this id are fully masked, keys of this id are masked; None: no id is special.
    """

    query: Any
    key: Any = None
    within: Band | None = None
    padding_id: int | np.integer | None = None
    contiguous: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check_within()
        for name, value in (("query", self.query), ("key", self.key)):
            if value is not None:
                integers.check_dtype(f"{name} segment ids", value)
        if self.padding_id is not None and not is_int(self.padding_id):
            raise TypeError(f"padding_id must be an int or None; got {self.padding_id!r}.")

    def check(self, batch, heads, sq, skv) -> None:
        super().check(batch, heads, sq, skv)
        for name, value, full in (("query", self.query, sq), ("key", self.key, skv)):
            value = self.query if value is None else value
            shape = np.shape(value)
            if shape[-1:] != (full,) or not _per_batch(shape[:-1], batch):
                raise ValueError(
                    f"{name} segment ids must have shape (*B, {full}) with B={batch}; got {shape}."
                )

    def rules(self, rows: Rows) -> _Terms:
        if 0 in (*np.shape(self.query), *np.shape(self.key)):
            return _Terms(upper=jnp.zeros_like(rows.i))
        found, own = self._segments(rows)
        lo, hi = (None, None) if self.within is None else self.within.rows(own, rows.all_skv)
        return _Terms(*segments.interval(found, lo, hi))

    def position(self, rows: Rows):
        if 0 in (*np.shape(self.query), *np.shape(self.key)):
            return rows.i
        found, own = self._segments(rows)
        return segments.position(found, self._shift(own))

    def _segments(self, rows: Rows) -> tuple[segments.Segments, Rows]:
        """The segments, and the rows within their own."""

        def ids(given):
            x = np.asarray(given) if is_static(given) else given
            values = known(x)
            x = x if values is None else values
            # As many dims as the call has, so that they broadcast with counts per batch entry.
            return x.reshape((1,) * (rows.batch_rank + 1 - x.ndim) + x.shape)

        query, key = ids(self.query), ids(self.query if self.key is None else self.key)
        found = segments.of_ids(query, key, None if self.padding_id is None else int(self.padding_id))
        return found, replace(rows, i=found.rank, sq=found.rows, skv=found.count)


def _per_batch(shape: Shape, batch: Shape) -> bool:
    """Whether these leading dims are none, or `*#B`."""
    return not shape or (len(shape) == len(batch) and broadcasts(shape, batch))


def _searchsorted(table, values, side):
    """searchsorted along the last axis; a batched result gets a head axis: `*B 1 Sq`."""
    found = search_last(table, values, side)
    return found if found.ndim == 1 else found[..., None, :]


def _take(table, index):
    if table.ndim == 1:
        return table[index]
    if index.ndim == 1:
        return table[..., None, index]
    return jnp.take_along_axis(table[..., None, :], index, axis=-1)


@dataclass(frozen=True)
class Dense(Mask):
    """`visible(i, j) = array[..., i, j]`: any boolean array that broadcasts to `*B N Sq Skv`.

    Dimensions of size 1 are never materialized.
    """

    array: Any

    def __post_init__(self) -> None:
        dtype = jnp.result_type(self.array)
        if dtype != jnp.bool_:
            raise TypeError(
                f"mask must be boolean (True = visible); got dtype {dtype}. For an additive mask use bias."
            )

    def check(self, batch, heads, sq, skv) -> None:
        full = (*batch, heads, sq, skv)
        if not broadcasts(np.shape(self.array), full):
            raise ValueError(
                f"mask must broadcast to (*B, N, Sq, Skv)={full}; got shape {np.shape(self.array)}."
            )

    def rules(self, rows: Rows) -> _Terms:
        return _Terms(dense=jnp.asarray(self.array))


@dataclass(frozen=True)
class Intersection(Mask):
    """`visible(i, j)`: visible in every one of `masks`."""

    masks: tuple[Mask, ...]

    def check(self, batch, heads, sq, skv) -> None:
        for mask in self.masks:
            mask.check(batch, heads, sq, skv)

    def rules(self, rows: Rows) -> _Terms:
        rows = _aligned(self, rows)
        found = _Terms()
        for mask in self.masks:
            new = mask.rules(rows)
            found = _Terms(
                lower=_combine(jnp.maximum, found.lower, new.lower),
                upper=_combine(jnp.minimum, found.upper, new.upper),
                labels=segments.both(found.labels, new.labels),
                dense=_combine(jnp.logical_and, found.dense, new.dense),
            )
        return found


def _aligned(mask: Mask, rows: Rows) -> Rows:
    """The rows, with the lengths that the mask gives."""
    for member in members(mask):
        if isinstance(member, Lengths):
            rows = member.aligned(rows)
    return rows


def _combine(fn, a, b):
    return b if a is None else a if b is None else fn(a, b)


def broadcasts(shape: Shape, full: Shape) -> bool:
    if len(shape) > len(full):
        return False
    tail = full[len(full) - len(shape) :]
    return all(a == b or a == 1 for a, b in zip(shape, tail, strict=True))


def _check_batch_shape(name: str, value, batch: Shape) -> None:
    shape = np.shape(value)
    if shape and shape != tuple(batch):
        raise ValueError(
            f"{name} must have one entry per batch entry, shape {tuple(batch)}; got shape {shape}."
        )


def intervals(mask: Mask | None, batch: Shape, heads: Size, sq: Size, skv: Size) -> Rules:
    """What the kernels take of a mask. Raises ValueError or TypeError where it does not fit a call of these sizes."""
    if mask is None:
        return Rules()
    mask.check(batch, heads, sq, skv)
    found = mask.rules(_rows(batch, sq, skv))
    rank = len(batch) + 2
    segment_row, segment_key = _labels(found.labels, rank)
    return Rules(
        lower=_fit(found.lower, rank, skv),
        upper=_fit(found.upper, rank, skv),
        dense=lead(found.dense, rank + 1),
        segment_row=segment_row,
        segment_key=segment_key,
    )


def positions(mask: Mask | None, batch: Shape, heads: Size, sq: Size, skv: Size):
    """The key position at which a mask puts each row, int32 `*#B #N #Sq`; None where it is the row's index.

    Masks that align queries and keys (`Causal`, `SlidingWindow`, `Band`, `Prefix`, packed sequences) put row i at
    the key from which they count. ALiBi's distance counts from there too.

    Raises:
      ValueError: the masks of an intersection put a row at different positions (or may do so).
    """
    if mask is None:
        return None
    rows = _aligned(mask, _rows(batch, sq, skv))
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
    at = where.packed.position(rows) if where.packed is not None else rows.i + _moved(where, rows)
    return lead(jnp.asarray(at, jnp.int32), len(batch) + 2)


def _moved(where: _Placement, rows: Rows):
    return rows.per_row(where.offset) + (rows.corner("bottom-right") if where.corner else 0)


def _rows(batch: Shape, sq: Size, skv: Size) -> Rows:
    return Rows(jnp.arange(sq, dtype=jnp.int32), sq, skv, len(batch), sq, skv)


def _fit(bound, rank: int, skv: Size):
    return None if bound is None else lead(jnp.clip(bound, 0, skv).astype(jnp.int32), rank)


def _labels(labels: segments.Labels | None, rank: int) -> tuple[Any, Any]:
    """(segment_row, segment_key), or None for both where it is known that no row needs them."""
    if labels is None or (isinstance(labels.needed, np.ndarray) and not labels.needed.any()):
        return None, None
    return tuple(lead(jnp.asarray(x), rank) for x in (jnp.where(labels.needed, labels.row, -1), labels.key))


def lead(x, rank: int):
    """x with leading dims of size 1, up to the given rank."""
    return None if x is None else x.reshape((1,) * (rank - x.ndim) + x.shape)


def _register(cls: type, data: tuple[str, ...]) -> None:
    """Makes a mask a pytree: its arrays are leaves, the rest (Python ints and tuples of them too) is static."""
    names = tuple(f.name for f in fields(cls))

    def flatten(mask):
        # What was a leaf stays one, whatever `jax.tree.map` has put in its place.
        leaves = getattr(mask, "_leaves", None)
        if leaves is None:
            leaves = tuple(name for name in data if not is_static(getattr(mask, name)))
        static = {name: _static_value(getattr(mask, name)) for name in names if name not in leaves}
        return [getattr(mask, name) for name in leaves], (leaves, tuple(static.items()))

    def unflatten(aux, children):
        leaves, static = aux
        return _bare(cls, dict(static) | dict(zip(leaves, children, strict=True)) | {"_leaves": leaves})

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


for _cls, _data in (
    (Band, ("left", "right", "offset")),
    (Causal, ("offset",)),
    (SlidingWindow, ("left", "right", "offset")),
    (Prefix, ("length",)),
    (Lengths, ("query", "key")),
    (CumulativeLengths, ("query", "key", "within")),
    (SegmentIds, ("query", "key", "within")),
    (Dense, ("array",)),
    (Intersection, ("masks",)),
):
    _register(_cls, _data)
