"""Structured masks: every kind is two rows of integers.

A structured mask lets row i see the keys `lower[i] <= j < upper[i]`. Each kind below turns itself into such
intervals (`Mask.rows`); its docstring gives the brute-force definition that the tests hold it against.
Intersections (`a & b`) of intervals are intervals again. `Dense` is the exception: an arbitrary boolean
array, kept as it is and combined with the intervals.

Alignment of two sequences of lengths sq and skv: `"top-left"` counts rows from the first key on (as
`jax.nn` does), `"bottom-right"` lets the last row meet the last key (as FlashAttention does). Where
`Lengths` are given, the lengths that align are those.

Python ints and tuples of them are static: they are part of the compiled program, and backends whose masks
are host integers can use them. Arrays (JAX or NumPy) are data: they may change from call to call.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa.problem import Shape, Size

Align = Literal["top-left", "bottom-right"]
_UNBOUNDED = 2**29  # larger token counts are clamped to this, so that sums with positions stay within int32


@dataclass(frozen=True)
class Rows:
    """Where rows stand: their positions in their own sequence, and the lengths of their two sequences."""

    i: Any
    sq: Any
    skv: Any


class _Traced:
    """Stands in the static description of a mask for a value that is not known when tracing."""

    def __repr__(self) -> str:
        return "TRACED"


TRACED = _Traced()


class Mask:
    """Which keys a query row may see. Combine masks with `&`."""

    def __and__(self, other) -> "Mask":
        return Intersection(members(self) + members(as_mask(other)))

    def __rand__(self, other) -> "Mask":
        return as_mask(other) & self

    def check(self, batch: Shape, heads: Size, sq: Size, skv: Size) -> None:
        """Raises ValueError or TypeError where the mask does not fit a call of these sizes."""

    def rows(self, rows: Rows, skv: Size) -> tuple[Any, Any]:
        """(lower, upper) for the given rows, each None where unbounded; `skv` counts all keys."""
        raise NotImplementedError

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


def _offset(align: Align, rows: Rows):
    return rows.skv - rows.sq if align == "bottom-right" else 0


def _check_align(align: str) -> None:
    if align not in ("top-left", "bottom-right"):
        raise ValueError(f'align must be "top-left" or "bottom-right"; got {align!r}.')


def _check_int(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int or None; got {value!r}.")


def _int_array(value) -> jax.Array:
    return jnp.asarray(value, jnp.int32)


def _check_int_array(name: str, value) -> None:
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    if np.size(value) and not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers; got dtype {dtype}.")


@dataclass(frozen=True)
class Band(Mask):
    """`visible(i, j) = i + off - left <= j <= i + off + right`, off = offset (+ skv - sq if bottom-right).

    Args:
      left: how many keys before its own position a row sees; None is unbounded, a negative value moves the
        band's edge to the other side.
      right: how many keys after its own position; likewise.
      align: see the module.
      offset: moves the band by this many keys: an int, or an int32 array broadcastable to `*B N Sq`
        (queries that start at another position than the keys).
    """

    left: int | np.integer | None = None
    right: int | np.integer | None = None
    align: Align = "top-left"
    offset: Any = 0

    def __post_init__(self) -> None:
        _check_align(self.align)
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name))
        array = hasattr(self.offset, "dtype") and jnp.issubdtype(self.offset.dtype, jnp.integer)
        if isinstance(self.offset, bool) or not (array or isinstance(self.offset, int)):
            raise TypeError(f"offset must be an int or an integer array; got {self.offset!r}.")

    def check(self, batch, heads, sq, skv) -> None:
        shape = np.shape(self.offset)
        if shape and not broadcasts(shape, (*batch, heads, sq)):
            raise ValueError(
                f"offset must broadcast to (*B, N, Sq)={(*batch, heads, sq)}; got shape {shape}."
            )

    def rows(self, rows: Rows, skv: Size) -> tuple[Any, Any]:
        at, known = rows.i + _offset(self.align, rows), 0
        if isinstance(self.offset, (int, np.integer)):
            known = int(self.offset)
        else:
            at = at + jnp.clip(_int_array(self.offset), -_UNBOUNDED, _UNBOUNDED)
        lower = None if self.left is None else at + _clamp(known - int(self.left))
        upper = None if self.right is None else at + _clamp(known + int(self.right) + 1)
        return lower, upper


def _clamp(tokens: int) -> int:
    return int(max(-_UNBOUNDED, min(_UNBOUNDED, tokens)))


class Causal(Band):
    """`visible(i, j) = j <= i + off`, off = 0 (top-left) or skv - sq (bottom-right)."""

    def __init__(self, align: Align = "top-left", offset: Any = 0) -> None:
        super().__init__(None, 0, align, offset)


class SlidingWindow(Band):
    """`visible(i, j) = i + off - left <= j <= i + off + right`, with left and right at least 0.

    With `right=0` it is a causal window of `left + 1` keys.
    """

    def __init__(
        self, left: int | np.integer | None, right: int | np.integer | None = 0, align: Align = "top-left"
    ) -> None:
        for name, value in (("left", left), ("right", right)):
            if value is not None:
                _check_int(name, value)
                if value < 0:
                    raise ValueError(f"{name} must be at least 0 in a sliding window; got {value}. See Band.")
        super().__init__(left, right, align)


@dataclass(frozen=True)
class Prefix(Mask):
    """`visible(i, j) = j <= i + off or j < length[b]`: causal, with a prefix that every row sees.

    Args:
      length: prefix length of each batch entry, shape `*B` (or a Python int or tuple).
    """

    length: Any
    align: Align = "top-left"

    def __post_init__(self) -> None:
        _check_align(self.align)
        _check_int_array("length", self.length)

    def check(self, batch, heads, sq, skv) -> None:
        _check_batch_shape("length", self.length, batch)

    def rows(self, rows: Rows, skv: Size) -> tuple[Any, Any]:
        causal = rows.i + _offset(self.align, rows) + 1
        return None, jnp.maximum(causal, _int_array(self.length)[..., None, None])


@dataclass(frozen=True)
class Lengths(Mask):
    """`visible(i, j) = i < query[b] and j < key[b]`: padded sequences. Padded rows see nothing.

    Args:
      query: length of each batch entry, shape `*B` (or a Python int or tuple); None: no padding.
      key: the same of keys and values.
    """

    query: Any = None
    key: Any = None

    def __post_init__(self) -> None:
        for name in ("query", "key"):
            if getattr(self, name) is not None:
                _check_int_array(f"{name} lengths", getattr(self, name))

    def check(self, batch, heads, sq, skv) -> None:
        for name, full in (("query", sq), ("key", skv)):
            value = getattr(self, name)
            if value is None:
                continue
            _check_batch_shape(f"{name} lengths", value, batch)
            if not hasattr(value, "shape") and not all(0 <= n <= full for n in np.ravel(value)):
                raise ValueError(f"{name} lengths must be in 0..{full}; got {value}.")

    def aligned(self, rows: Rows) -> Rows:
        """The rows with these lengths instead of the arrays' own."""
        sq = rows.sq if self.query is None else _int_array(self.query)[..., None, None]
        skv = rows.skv if self.key is None else _int_array(self.key)[..., None, None]
        return replace(rows, sq=sq, skv=skv)

    def rows(self, rows: Rows, skv: Size) -> tuple[Any, Any]:
        upper = None if self.key is None else _int_array(self.key)[..., None, None]
        if self.query is not None:
            inside = rows.i < _int_array(self.query)[..., None, None]
            upper = jnp.where(inside, skv if upper is None else upper, 0)
        return None, upper


class _Packed(Mask):
    """Several sequences in one array: a row sees only keys of its own sequence, and of those `within`."""

    within: Mask | None

    def _placed(self, rows: Rows, skv: Size, start_q, start_k, sq, length_k, empty) -> tuple[Any, Any]:
        lower, upper = start_k, start_k + length_k
        if self.within is not None:
            lo, hi = self.within.rows(Rows(rows.i - start_q, sq, length_k), skv)
            if lo is not None:
                lower = jnp.maximum(lower, start_k + lo)
            if hi is not None:
                upper = jnp.minimum(upper, start_k + hi)
        return lower, jnp.where(empty, 0, upper)

    def _check_within(self) -> None:
        if self.within is not None and not isinstance(self.within, Band):
            raise TypeError(f"within must be a Band (Causal, SlidingWindow); got {self.within!r}.")


@dataclass(frozen=True)
class CumulativeLengths(_Packed):
    """`visible(i, j) = seq(i) == seq(j)`, and `within` of the positions inside that sequence.

    Args:
      query: where each sequence ends: `cumsum` of the lengths, shape `sequences` or `*B sequences`. A
        leading 0 is an empty sequence and does no harm. Rows past the last end see nothing.
      key: the same of keys, None: the same as query. Keys past the last end are not seen.
      within: a Band, Causal or SlidingWindow relative to each sequence, with that sequence's lengths.
    """

    query: Any
    key: Any = None
    within: Mask | None = None

    def __post_init__(self) -> None:
        self._check_within()
        for name, value in (("query", self.query), ("key", self.key)):
            if value is None:
                continue
            _check_int_array(f"cumulative {name} lengths", value)
            if not hasattr(value, "shape") and np.any(np.diff(value, prepend=0) < 0):
                raise ValueError(f"cumulative {name} lengths must not decrease; got {value}.")
        if self.key is not None and np.shape(self.query)[-1:] != np.shape(self.key)[-1:]:
            raise ValueError(
                f"cumulative query and key lengths must name the same sequences; got shapes "
                f"{np.shape(self.query)} and {np.shape(self.key)}."
            )

    def check(self, batch, heads, sq, skv) -> None:
        for name, value, full in (("query", self.query, sq), ("key", self.key, skv)):
            if value is None:
                continue
            shape = np.shape(value)
            if not shape or not broadcasts(shape[:-1], batch):
                raise ValueError(
                    f"cumulative {name} lengths must have shape (sequences,) or (*B, sequences) with "
                    f"B={batch}; got {shape}."
                )
            if not hasattr(value, "shape") and np.size(value) and np.max(value) > full:
                raise ValueError(f"cumulative {name} lengths must not exceed {full}; got {value}.")

    def rows(self, rows: Rows, skv: Size) -> tuple[Any, Any]:
        end_q = _int_array(self.query)
        end_k = end_q if self.key is None else _int_array(self.key)
        count = end_q.shape[-1]
        if count == 0:
            return None, jnp.zeros_like(rows.i)
        sequence = _searchsorted(end_q, rows.i, "right")
        at = jnp.minimum(sequence, count - 1)

        def take(ends, index):
            return jnp.where(index < 0, 0, _take(ends, jnp.maximum(index, 0)))

        start_q, start_k = take(end_q, at - 1), take(end_k, at - 1)
        length_q, length_k = take(end_q, at) - start_q, take(end_k, at) - start_k
        return self._placed(rows, skv, start_q, start_k, length_q, length_k, sequence >= count)


@dataclass(frozen=True)
class SegmentIds(_Packed):
    """`visible(i, j) = query[i] == key[j]`, and `within` of the positions inside that segment.

    Args:
      query: integer ids in non-decreasing order along the sequence, shape `*#B Sq`. (Ids in any other order:
        pass `Dense(query[:, None] == key)`.)
      key: the same of keys, shape `*#B Skv`; None: the same as query.
      within: a Band, Causal or SlidingWindow relative to each segment, with that segment's lengths.
    """

    query: Any
    key: Any = None
    within: Mask | None = None

    def __post_init__(self) -> None:
        self._check_within()
        for name, value in (("query", self.query), ("key", self.key)):
            if value is None:
                continue
            _check_int_array(f"{name} segment ids", value)
            host = not isinstance(value, jax.Array)
            if host and np.any(np.diff(value, axis=-1) < 0):
                raise ValueError(f"{name} segment ids must not decrease along the sequence; got {value}.")

    def check(self, batch, heads, sq, skv) -> None:
        for name, value, full in (("query", self.query, sq), ("key", self.key, skv)):
            value = self.query if value is None else value
            shape = np.shape(value)
            if shape[-1:] != (full,) or not broadcasts(shape[:-1], batch):
                raise ValueError(
                    f"{name} segment ids must have shape (*B, {full}) with B={batch}; got {shape}."
                )

    def rows(self, rows: Rows, skv: Size) -> tuple[Any, Any]:
        ids_q = _int_array(self.query)
        ids_k = ids_q if self.key is None else _int_array(self.key)
        start_k = _searchsorted(ids_k, ids_q, "left")
        length_k = _searchsorted(ids_k, ids_q, "right") - start_k
        start_q = _searchsorted(ids_q, ids_q, "left")
        length_q = _searchsorted(ids_q, ids_q, "right") - start_q
        return self._placed(rows, skv, start_q, start_k, length_q, length_k, length_k == 0)


def _searchsorted(table, values, side):
    """searchsorted along the last axis; a batched result gets a head axis: `*B 1 Sq`."""
    find = jnp.vectorize(
        lambda t, v: jnp.searchsorted(t, v, side=side).astype(jnp.int32), signature="(n),(m)->(m)"
    )
    found = find(table, values)
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

    def rows(self, rows: Rows, skv: Size) -> tuple[Any, Any]:
        return None, None


@dataclass(frozen=True)
class Intersection(Mask):
    """`visible(i, j)`: visible in every one of `masks`."""

    masks: tuple[Mask, ...]

    def check(self, batch, heads, sq, skv) -> None:
        for mask in self.masks:
            mask.check(batch, heads, sq, skv)

    def rows(self, rows: Rows, skv: Size) -> tuple[Any, Any]:
        for mask in self.masks:
            if isinstance(mask, Lengths):
                rows = mask.aligned(rows)
        lower = upper = None
        for mask in self.masks:
            lo, hi = mask.rows(rows, skv)
            lower = _combine(jnp.maximum, lower, lo)
            upper = _combine(jnp.minimum, upper, hi)
        return lower, upper


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


class Rules(NamedTuple):
    """A mask as the kernels take it: each `*#B #N ...`, or None. See `Operands`."""

    lower: Any = None
    upper: Any = None
    dense: Any = None
    segment_row: Any = None
    segment_key: Any = None


def intervals(mask: Mask | None, batch: Shape, heads: Size, sq: Size, skv: Size) -> Rules:
    """The rules of a mask: bounds are int32 of shape `*#B #N #Sq` within 0..skv, dense boolean `*#B #N #Sq #Skv`."""
    if mask is None:
        return Rules()
    mask.check(batch, heads, sq, skv)
    lower, upper = mask.rows(Rows(jnp.arange(sq, dtype=jnp.int32), sq, skv), skv)
    dense = None
    for member in members(mask):
        if isinstance(member, Dense):
            array = jnp.asarray(member.array)
            dense = _combine(jnp.logical_and, dense, array)
    rank = len(batch)
    return Rules(_fit(lower, rank + 2, skv), _fit(upper, rank + 2, skv), lead(dense, rank + 3))


def positions(mask: Mask | None, batch: Shape, heads: Size, sq: Size, skv: Size) -> Any:
    """The key position at which a mask places each row, `*#B #N #Sq` int32; None: its index."""
    return None


def _fit(bound, rank: int, skv: Size):
    return None if bound is None else lead(jnp.clip(bound, 0, skv).astype(jnp.int32), rank)


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
            leaves = tuple(name for name in data if not _is_static(getattr(mask, name)))
        static = {name: _static_value(getattr(mask, name)) for name in names if name not in leaves}
        return [getattr(mask, name) for name in leaves], (leaves, tuple(static.items()))

    def unflatten(aux, children):
        leaves, static = aux
        return _bare(cls, dict(static) | dict(zip(leaves, children, strict=True)) | {"_leaves": leaves})

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


def _is_static(value) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_static(v) for v in value)
    return value is None or isinstance(value, (int, np.integer))


for _cls, _data in (
    (Band, ("offset",)),
    (Causal, ("offset",)),
    (SlidingWindow, ("offset",)),
    (Prefix, ("length",)),
    (Lengths, ("query", "key")),
    (CumulativeLengths, ("query", "key", "within")),
    (SegmentIds, ("query", "key", "within")),
    (Dense, ("array",)),
    (Intersection, ("masks",)),
):
    _register(_cls, _data)
