"""Every kind of mask: its values, the library's mask of them, and what is visible by its definition.

The values of a mask are arrays `*B ...` of int32 (bool for `Dense`). As part of the program they are Python integers,
tuples or NumPy arrays; otherwise they are traced, and change from call to call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import and_, or_
from typing import Any

import numpy as np

from jax_fa import masks
from jax_fa.testing import oracle

Values = Mapping[str, np.ndarray]
TOP: masks.Align = "top-left"
BOTTOM: masks.Align = "bottom-right"


@dataclass(frozen=True)
class Sizes:
    """Of a call, and the lengths `*B` from which its masks count their corner."""

    B: tuple[int, ...]
    N: int
    Sq: int
    Skv: int
    own_sq: Any
    own_skv: Any
    K: int = 1

    def shift(self, align: masks.Align) -> Any:
        return self.per_batch(self.own_skv - self.own_sq) if align == BOTTOM else 0

    def per_batch(self, x: Any) -> np.ndarray:
        """`*B` or scalar, to broadcast with `*B N Sq`."""
        x = np.asarray(x, np.int64)
        return x[..., None, None] if x.ndim else x


@dataclass(frozen=True)
class Random:
    """`shape` is the same for every call of a program, `value` is not."""

    shape: np.random.Generator
    value: np.random.Generator


@dataclass(frozen=True)
class Kind:
    draw: Callable[[Random, Sizes], dict[str, np.ndarray]]
    make: Callable[[Mapping[str, Any]], Any]
    visible: Callable[[Sizes, Values], np.ndarray]
    position: Callable[[Sizes, Values], np.ndarray] | None = None  # None: it places no row
    never_static: bool = False


def _int32(x: Any) -> np.ndarray:
    return np.asarray(x, np.int32)


def _some(random: Random, B: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """Of each batch entry, or one for all, in low..high; the ends come often."""
    return _ends_often(random, _batch(random, B), low, high)


def _batch(random: Random, B: tuple[int, ...]) -> tuple[int, ...]:
    return B if random.shape.random() < 0.5 else ()


def _ends_often(random: Random, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    x = random.value.integers(low, high + 1, shape)
    pick = random.value.random(shape)
    return _int32(np.where(pick < 0.1, low, np.where(pick > 0.9, high, x)))


# --- bands


def _in_band(sizes: Sizes, at: Any, left: Any, right: Any) -> np.ndarray:
    """at - left <= j <= at + right, for `at` that broadcasts to `*B N Sq`; None is unbounded."""
    j = np.arange(sizes.Skv)
    at = np.asarray(at, np.int64)[..., None]
    found = np.ones((1, 1), bool)
    if left is not None:
        found = found & (j >= at - sizes.per_batch(left)[..., None])
    if right is not None:
        found = found & (j <= at + sizes.per_batch(right)[..., None])
    return found


def _at(sizes: Sizes, align: masks.Align, offset: Any = 0) -> np.ndarray:
    offset = np.asarray(offset, np.int64)
    if offset.ndim and offset.ndim != len(sizes.B) + 2:
        offset = offset[..., None, None]
    return np.arange(sizes.Sq) + sizes.shift(align) + offset


def _unbounded(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.int64)
    return np.where(x < 0, 2**40, x)


def _window(align: masks.Align) -> Kind:
    def draw(random, s):
        return {
            "left": _some(random, s.B, -1, s.Skv),
            "right": _some(random, s.B, -1, min(s.Skv, 9)),
        }

    return Kind(
        draw,
        lambda v: masks.SlidingWindow(v["left"], v["right"], align),
        lambda s, v: _in_band(s, _at(s, align), _unbounded(v["left"]), _unbounded(v["right"])),
        lambda s, v: _at(s, align),
    )


def _band(align: masks.Align, per_row: bool = False) -> Kind:
    def draw(random, s):
        far = s.Sq + s.Skv
        found = {"left": _some(random, s.B, -5, far), "right": _some(random, s.B, -5, far)}
        shape = tuple(n if random.shape.random() < 0.5 else 1 for n in (*s.B, s.N, s.Sq))
        found["offset"] = _ends_often(random, shape, -far, far) if per_row else _some(random, s.B, -far, far)
        if random.value.random() < 0.1:
            found["left"] = np.full_like(found["left"], 2**31 - 1)
        return found

    return Kind(
        draw,
        lambda v: masks.Band(v["left"], v["right"], align, v["offset"]),
        lambda s, v: _in_band(s, _at(s, align, v["offset"]), v["left"], v["right"]),
        lambda s, v: _at(s, align, v["offset"]),
        never_static=per_row,
    )


def _causal(align: masks.Align) -> Kind:
    return Kind(
        lambda random, s: {},
        lambda v: masks.Causal(align),
        lambda s, v: _in_band(s, _at(s, align), None, 0),
        lambda s, v: _at(s, align),
    )


def _one_sided(name: str) -> Kind:
    """A band without an end."""
    return Kind(
        lambda random, s: {name: _some(random, s.B, -5, s.Skv)},
        lambda v: masks.Band(**{name: v[name]}),
        lambda s, v: _in_band(s, _at(s, TOP), v.get("left"), v.get("right")),
        lambda s, v: _at(s, TOP),
    )


def behind() -> Kind:
    """The last keys before the end, counted from the bottom right."""
    return Kind(
        lambda random, s: {"left": _ends_often(random, (), 0, s.Skv)},
        lambda v: masks.Band(v["left"], None, BOTTOM),
        lambda s, v: _in_band(s, _at(s, BOTTOM), v["left"], None),
    )


# --- lengths


def _prefix(align: masks.Align) -> Kind:
    def visible(s, v):
        return _in_band(s, _at(s, align), None, 0) | (np.arange(s.Skv) < s.per_batch(v["length"])[..., None])

    return Kind(
        lambda random, s: {"length": _some(random, s.B, 0, s.Skv)},
        lambda v: masks.Prefix(v["length"], align),
        visible,
        lambda s, v: _at(s, align),
    )


def _lengths(*which: str) -> Kind:
    def draw(random, s):
        size = {"query": s.Sq, "key": s.Skv}
        return {name: _some(random, s.B, 0, size[name]) for name in which}

    def visible(s, v):
        found = np.ones((1, 1), bool)
        if "query" in v:
            found = found & (np.arange(s.Sq)[:, None] < s.per_batch(v["query"])[..., None])
        if "key" in v:
            found = found & (np.arange(s.Skv) < s.per_batch(v["key"])[..., None])
        return found

    return Kind(draw, lambda v: masks.Lengths(**v), visible)


# --- packed sequences

_WITHIN: dict[str, tuple[Callable[[], Any], Callable[..., np.ndarray], bool]] = {
    "causal": (masks.Causal, oracle.causal, False),
    "causal_bottom": (lambda: masks.Causal(BOTTOM), partial(oracle.causal, align=BOTTOM), True),
    "window": (
        lambda: masks.SlidingWindow(5, 1),
        partial(oracle.band, left=5, right=1),
        False,
    ),
    "window_bottom": (
        lambda: masks.SlidingWindow(9, 0, BOTTOM),
        partial(oracle.band, left=9, right=0, align=BOTTOM),
        True,
    ),
}


def _within(name: str | None) -> tuple[Any, Any, bool]:
    if name is None:
        return None, None, False
    make, visible, bottom = _WITHIN[name]
    return make(), visible, bottom


def _ends(random: Random, shape: tuple[int, ...], count: int, size: int) -> np.ndarray:
    ends = np.sort(random.value.integers(0, size + 1, (*shape, count)), axis=-1)
    if random.value.random() < 0.3:
        ends[..., -1] = size
    return _int32(ends)


def _cumulative(within: str | None, keys: bool) -> Kind:
    made, inside, bottom = _within(within)

    def draw(random, s):
        shape, count = _batch(random, s.B), int(random.shape.integers(1, 6))
        if not keys:
            return {"query": _ends(random, shape, count, min(s.Sq, s.Skv))}
        return {"query": _ends(random, shape, count, s.Sq), "key": _ends(random, shape, count, s.Skv)}

    def position(s, v):
        return oracle.cumulative_position(s.Sq, v["query"], v.get("key", v["query"]), bottom)

    return Kind(
        draw,
        lambda v: masks.CumulativeLengths(v["query"], v.get("key"), made),
        lambda s, v: oracle.cumulative(s.Sq, s.Skv, v["query"], v.get("key"), inside),
        position,
    )


def _segments(within: str | None, padding: int | None = None, keys: bool = True) -> Kind:
    made, inside, bottom = _within(within)

    def ids(random, shape, size):
        count, run = (int(random.value.integers(1, high)) for high in (6, 8))
        x = np.repeat(random.value.integers(-1, count, (*shape, -(-size // run))), run, axis=-1)[..., :size]
        return _int32(np.sort(x, axis=-1) if random.value.random() < 0.4 else x)

    def draw(random, s):
        shape = _batch(random, s.B)
        query = ids(random, shape, s.Sq)
        if not keys:
            return {"query": query}
        return {"query": query, "key": ids(random, shape, s.Skv)}

    def position(s, v):
        return oracle.segment_position(v["query"], v.get("key", v["query"]), bottom)

    return Kind(
        draw,
        lambda v: masks.SegmentIds(v["query"], v.get("key"), made, padding_id=padding),
        lambda s, v: oracle.segments(v["query"], v.get("key"), inside, padding),
        position,
    )


# --- boolean arrays


def dense_shape(letters: str, sizes: Sizes) -> tuple[int, ...]:
    dims = {
        "N": (sizes.N,),
        "Q": (sizes.Sq,),
        "K": (sizes.Skv,),
        "1": (1,),
        "B": sizes.B,
        "b": (1,) * len(sizes.B),
    }
    return sum((dims[c] for c in letters), start=())


def _dense(letters: str) -> Kind:
    def draw(random, s):
        shape = dense_shape(letters, s)
        value = random.value
        found = value.random(shape) < value.choice([0.05, 0.5, 0.9])
        if value.random() < 0.3:  # whole columns or rows
            found &= value.random((*shape[:-1], 1) if value.random() < 0.5 else shape[-1:]) < 0.7
        return {"array": found}

    return Kind(draw, lambda v: masks.as_mask(v["array"]), lambda s, v: np.asarray(v["array"]))


KINDS: dict[str, Kind] = {
    "causal": _causal(TOP),
    "causal_bottom": _causal(BOTTOM),
    "window": _window(TOP),
    "window_bottom": _window(BOTTOM),
    "band": _band(TOP),
    "band_bottom": _band(BOTTOM),
    "band_rows": _band(TOP, per_row=True),
    "band_left": _one_sided("left"),
    "band_right": _one_sided("right"),
    "prefix": _prefix(TOP),
    "prefix_bottom": _prefix(BOTTOM),
    "lengths": _lengths("query", "key"),
    "key_lengths": _lengths("key"),
    "query_lengths": _lengths("query"),
    "cumulative": _cumulative(None, True),
    "cumulative_self": _cumulative("causal", False),
    "cumulative_causal": _cumulative("causal_bottom", True),
    "cumulative_window": _cumulative("window", True),
    "segments": _segments(None),
    "segments_self": _segments("causal", keys=False),
    "segments_padding": _segments("causal_bottom", padding=0),
    "segments_window": _segments("window_bottom", padding=-1),
    **{
        f"dense_{letters}": _dense(letters)
        for letters in ("BNQK", "NQK", "bNQK", "B1QK", "B11K", "QK", "Q1", "K", "BNQ1", "1")
    },
}
# Kinds of which one call has at most one with ALiBi: they say where rows stand.
PLACING = frozenset(name for name, kind in KINDS.items() if kind.position is not None)
# Kinds that take as many rows as keys.
SQUARE = frozenset({"segments_self"})


# --- masks of masks


@dataclass(frozen=True)
class Combination:
    """What `&`, `|` and `~` make of masks: of boolean arrays and tracers as well as of the library's."""

    fewest: int
    of: Callable[[Sequence[Any]], Any]
    aligned: Callable[[int], bool] = lambda i: True  # whether lengths of mask i count for others


COMBINATIONS: dict[str, Combination] = {
    "all": Combination(1, lambda m: reduce(and_, m)),
    "any": Combination(2, lambda m: reduce(or_, m), lambda i: False),
    "not all": Combination(1, lambda m: ~reduce(and_, m)),
    "none": Combination(2, lambda m: ~reduce(or_, m), lambda i: False),
    "first alone": Combination(2, lambda m: m[0] & ~reduce(or_, m[1:]), lambda i: i == 0),
    "without the first": Combination(2, lambda m: ~m[0] & reduce(and_, m[1:]), lambda i: i > 0),
    "either way": Combination(2, lambda m: (m[0] & ~m[1]) | (m[1] & ~m[0]), lambda i: False),
    "implied": Combination(2, lambda m: ~m[0] | reduce(and_, m[1:]), lambda i: False),
}


def joined(combination: str, found: Sequence[Any]) -> Any:
    """None of no masks."""
    return COMBINATIONS[combination].of(found) if found else None


def lengths_of(names: tuple[str, ...], values: Mapping[str, Values], Sq: int, Skv: int) -> tuple[Any, Any]:
    """The lengths from which masks that are aligned to the bottom right count: those given, or the arrays'."""
    own_sq: Any = np.int64(Sq)
    own_skv: Any = np.int64(Skv)
    for name in names:
        if name in ("lengths", "query_lengths"):
            own_sq = np.minimum(own_sq, np.asarray(values[name]["query"], np.int64))
        if name in ("lengths", "key_lengths"):
            own_skv = np.minimum(own_skv, np.asarray(values[name]["key"], np.int64))
    return own_sq, own_skv
