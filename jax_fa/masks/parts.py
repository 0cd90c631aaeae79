"""What masks say of rows as disjoint parts, and what `&`, `|` and `~` make of them: no array of rows and keys is made.

A part is an interval of keys for each row, alone or with a boolean array or labels beside it (`Terms`). Intervals alone are
closed under all three: of each row the first may begin with the first key (`lower` None), the last may end with the last
(`upper` None), and those in between rise. A boolean array D within an interval I has the complement ~I or (I and ~D).
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jax_fa.masks import segments

MOST = 8  # parts of a mask, each of which is a call of the kernels


class Terms(NamedTuple):
    """What one mask adds to the rules: unclipped bounds, labels and a boolean array."""

    lower: Any = None
    upper: Any = None
    labels: segments.Labels | None = None
    dense: Any = None

    @property
    def is_interval(self) -> bool:
        return self.labels is None and self.dense is None


Parts = tuple[Terms, ...]  # no key is visible to a row in two of them; none: no key is visible
ALL: Parts = (Terms(),)


def both(a: Parts, b: Parts) -> Parts:
    """What is visible in a and in b."""
    return _few(
        Terms(
            lower=combine(jnp.maximum, x.lower, y.lower),
            upper=combine(jnp.minimum, x.upper, y.upper),
            labels=segments.both(x.labels, y.labels),
            dense=combine(jnp.logical_and, x.dense, y.dense),
        )
        for x in a
        for y in b
    )


def complement(parts: Parts) -> Parts:
    """What is not visible in any of the parts."""
    intervals, others = _split(parts)
    found = _gaps(_Intervals.of(intervals))
    for part in others:
        if part.labels is not None:
            raise NotImplementedError(
                "~ and | cannot take the complement of SegmentIds that lie apart, or that are not known when tracing: of two "
                "such masks there is no union. Pass a boolean array."
            )
        interval = Terms(part.lower, part.upper)
        found = both(found, (*_gaps(_Intervals.of([interval])), interval._replace(dense=~part.dense)))
    return found


def either(a: Parts, b: Parts) -> Parts:
    """What is visible in a or in b."""
    (intervals, others), (more, rest) = _split(a), _split(b)
    merged = _Intervals.of([*intervals, *more])
    if any(part.labels is not None for part in others):
        others, rest = rest, others  # that have no complement
    if (one := _one_array(others, rest)) is not None:
        apart: Parts = (one,)
    else:
        apart = _few((*others, *(both(rest, complement(others)) if rest else ())))
    return _few((*merged.parts(), *(both(apart, _gaps(merged)) if apart else ())))


def _split(parts: Parts) -> tuple[Parts, Parts]:
    """Those that are intervals alone, and the others."""
    return tuple(x for x in parts if x.is_interval), tuple(x for x in parts if not x.is_interval)


def _one_array(a: Parts, b: Parts) -> Terms | None:
    """The union of two boolean arrays that is no larger than they are."""
    if len(a) != 1 or len(b) != 1 or any(x is not None for x in (*a[0][:3], *b[0][:3])):
        return None
    shapes = [x[0].dense.shape for x in (a, b)]
    return Terms(dense=a[0].dense | b[0].dense) if jnp.broadcast_shapes(*shapes) in shapes else None


def _few(parts: Iterable[Terms]) -> Parts:
    found = tuple(parts)
    if len(found) > MOST:
        raise NotImplementedError(
            f"masks joined by &, | and ~ may have at most {MOST} intervals of keys for each row; got {len(found)}. Pass a "
            "boolean array."
        )
    return found


class _Intervals(NamedTuple):
    """A union of intervals: of the first keys, of those in between, which rise, and of the last ones."""

    everything: bool
    first: Any = None  # the end of an interval that begins with the first key
    between: tuple[tuple[Any, Any], ...] = ()  # (lower, upper >= lower), each behind the one before
    last: Any = None  # the begin of one that ends with the last key

    @classmethod
    def of(cls, intervals: Iterable[Terms]) -> "_Intervals":
        first = last = None
        between = []
        for lower, upper, *_ in intervals:
            if lower is None and upper is None:
                return cls(True)
            if lower is None:
                first = combine(jnp.maximum, first, upper)
            elif upper is None:
                last = combine(jnp.minimum, last, lower)
            else:
                between.append((lower, upper))
        if first is not None and last is not None:
            last = jnp.maximum(first, last)
        # Empty ones too lie between the two, so that the gaps around them do.
        between = [
            tuple(combine(jnp.minimum, combine(jnp.maximum, x, first), last) for x in interval)
            for interval in between
        ]
        return cls(False, first, tuple(_risen(between)), last)

    def parts(self) -> Parts:
        if self.everything:
            return ALL
        first = [] if self.first is None else [Terms(upper=self.first)]
        last = [] if self.last is None else [Terms(lower=self.last)]
        return (*first, *(Terms(*x) for x in self.between), *last)


def _gaps(x: _Intervals) -> Parts:
    """What lies in none of the intervals."""
    if x.everything:
        return ()
    begins = [x.first, *(upper for _, upper in x.between)]
    ends = [*(lower for lower, _ in x.between), x.last]
    return tuple(Terms(lower, upper) for lower, upper in zip(begins, ends, strict=True))


def _risen(intervals: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """The union of intervals as others that rise in every row. (An empty one may end before it begins.)"""
    found = list(intervals)
    for end in range(len(found) - 1, 0, -1):
        for i in range(end):
            found[i], found[i + 1] = _ordered(found[i], found[i + 1])
    reached = None
    for i, (lower, upper) in enumerate(found):
        lower = combine(jnp.maximum, lower, reached)
        reached = jnp.maximum(lower, upper)
        found[i] = lower, reached
    return found


def _ordered(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """In each row the one first that begins first."""
    kept = a[0] <= b[0]

    def chosen(first, other):
        return jnp.where(kept, first[0], other[0]), jnp.where(kept, first[1], other[1])

    return chosen(a, b), chosen(b, a)


def combine(fn: Callable[[Any, Any], Any], a, b):
    return b if a is None else a if b is None else fn(a, b)
