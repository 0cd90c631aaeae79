"""The masks of the table of cases: what the library is given for each, and what it means, as arrays.

A mask depends on a case's sizes alone, and on random numbers that its name stands for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import masks
from jax_fa.testing import oracle


@runtime_checkable  # annotations are checked in tests
class Sizes(Protocol):
    """A case, as masks see it."""

    @property
    def B(self) -> tuple[int, ...]: ...
    @property
    def Sq(self) -> int: ...
    @property
    def Skv(self) -> int: ...
    def shape_of(self, letters: str) -> tuple[int, ...]: ...
    def random(self, salt: str) -> np.random.Generator: ...


@dataclass(frozen=True)
class Kind:
    """A mask: as the library takes it, as a boolean array, and the key position at which it places each row."""

    make: Callable[[Sizes], Any]
    visible: Callable[[Sizes], np.ndarray]
    position: Callable[[Sizes], Any] = lambda c: np.arange(c.Sq)


def _batch(case: Sizes, *values: int) -> np.ndarray:
    """An int32 array `*B` that goes through the given values."""
    return np.resize(np.array(values, np.int32), case.B)


def _lengths(case: Sizes, size: int, *values: int) -> Any:
    """The same, within 0..size."""
    return np.asarray(np.minimum(_batch(case, *values), size))


def _both_lengths(case: Sizes) -> tuple[Any, Any]:
    return _lengths(case, case.Sq, 30, 17), _lengths(case, case.Skv, 45, 11)


def _python(x):
    """Python integers, which are part of the program."""

    def convert(x):
        return tuple(map(convert, x)) if isinstance(x, list) else x

    return convert(x.tolist())


def _data(x) -> jax.Array:
    """An array whose values are not known when it is made under a trace."""
    return jax.lax.optimization_barrier(jnp.asarray(x))


def _ids(case: Sizes, size: int, salt: str) -> np.ndarray:
    return np.sort(case.random(salt).integers(0, 4, (*case.B, size)), axis=-1).astype(np.int32)


def _mixed_ids(case: Sizes, size: int, salt: str, padding: bool = False) -> np.ndarray:
    """Ids of runs whose order is mixed, so that some segments have several runs; `padding`: the last ones are 0."""
    random = case.random(salt)
    ids = np.repeat(random.integers(1, 5, (*case.B, -(-size // 3))), 3, axis=-1)[..., :size].astype(np.int32)
    if padding:
        ids = np.where(np.arange(size) < size - size // 4, np.sort(ids, axis=-1), 0).astype(np.int32)
    return ids


def _padded_ids(case: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Of queries and keys, both with padding."""
    return _mixed_ids(case, case.Sq, "q", padding=True), _mixed_ids(case, case.Skv, "q", padding=True)


def _ends(case: Sizes, size: int, salt: str) -> np.ndarray:
    """Four sequences that end within `size` and leave some of it unused."""
    return np.sort(case.random(salt).integers(0, size, (*case.B, 4)), axis=-1).astype(np.int32)


def _prefixes(case: Sizes, salt: str) -> np.ndarray:
    """A prefix length for each of four sequences."""
    return case.random(salt).integers(0, min(9, case.Skv), (*case.B, 4)).astype(np.int32)


def _dense(shape: str, chance: float = 0.7) -> Kind:
    """A random boolean mask of the dims named, as `Case.bias`."""

    def array(case: Sizes) -> np.ndarray:
        return case.random("mask").random(case.shape_of(shape)) < chance

    return Kind(array, array)


def _both(*kinds: str, position: str | None = None) -> Kind:
    """The kinds together; `position`: the one that puts the rows at other keys than those of their indices."""

    def make(case: Sizes):
        mask, *others = (masks.as_mask(KINDS[k].make(case)) for k in kinds)
        for other in others:
            mask = mask & other
        return mask

    def visible(case: Sizes) -> np.ndarray:
        found = np.ones((), bool)
        for kind in kinds:
            found = found & KINDS[kind].visible(case)
        return found

    return Kind(make, visible, lambda c: KINDS[position].position(c) if position else np.arange(c.Sq))


def _corner(case: Sizes) -> np.ndarray:
    return np.arange(case.Sq) + case.Skv - case.Sq


def _aligned(case: Sizes) -> np.ndarray:
    """Causal from the bottom right corner of each entry's own lengths."""
    query, key = _both_lengths(case)
    corner = oracle.band(case.Sq, case.Skv, None, 0, offset=(key - query)[..., None, None])
    return corner & oracle.lengths(case.Sq, case.Skv, query, key)


def _aligned_corner(case: Sizes) -> np.ndarray:
    query, key = _both_lengths(case)
    return np.arange(case.Sq) + (key - query)[..., None, None]


def _window_data(case: Sizes) -> np.ndarray:
    """A window for each batch entry, of which some are unbounded to the left."""
    left, right = (x[..., None, None, None] for x in (_batch(case, 6, -1), _batch(case, 0, 3)))
    return oracle.band(case.Sq, case.Skv, np.where(left < 0, case.Sq + case.Skv, left), right, BOTTOM)


def _band(left=None, right=None, align="top-left", offset=0) -> Kind:
    return Kind(
        lambda c: masks.Band(left, right, align, offset),
        lambda c: oracle.band(c.Sq, c.Skv, left, right, align, offset),
        lambda c: (_corner(c) if align == BOTTOM else np.arange(c.Sq)) + offset,
    )


BOTTOM: Final = "bottom-right"
KINDS: dict[str, Kind] = {
    "causal": Kind(lambda c: masks.Causal(), lambda c: oracle.causal(c.Sq, c.Skv)),
    "causal_bottom": Kind(
        lambda c: masks.Causal(BOTTOM), lambda c: oracle.causal(c.Sq, c.Skv, BOTTOM), _corner
    ),
    "window": Kind(lambda c: masks.SlidingWindow(7), lambda c: oracle.band(c.Sq, c.Skv, 7, 0)),
    "window_bottom": Kind(
        lambda c: masks.SlidingWindow(20, 3, BOTTOM),
        lambda c: oracle.band(c.Sq, c.Skv, 20, 3, BOTTOM),
        _corner,
    ),
    "band": _band(5, 9),
    "band_left": _band(left=3),
    "band_negative": _band(-2, 12, BOTTOM),
    "band_unbounded": _band(2147483647, 2147483647),
    "band_offset_per_batch": Kind(
        lambda c: masks.Causal(BOTTOM, offset=_batch(c, 4, -6)),
        lambda c: oracle.band(c.Sq, c.Skv, None, 0, BOTTOM, offset=_batch(c, 4, -6)[..., None, None]),
        lambda c: _corner(c) + _batch(c, 4, -6)[..., None, None],
    ),
    "window_data": Kind(
        lambda c: masks.SlidingWindow(_batch(c, 6, -1), _data(_batch(c, 0, 3)), BOTTOM), _window_data, _corner
    ),
    "band_offset": Kind(
        lambda c: masks.Band(9, 2, offset=_batch(c, 4, -6)[..., None, None]),
        lambda c: oracle.band(c.Sq, c.Skv, 9, 2, offset=_batch(c, 4, -6)[..., None, None]),
        lambda c: np.arange(c.Sq) + _batch(c, 4, -6)[..., None, None],
    ),
    "prefix": Kind(
        lambda c: masks.Prefix(_lengths(c, c.Skv, 0, 21)),
        lambda c: oracle.prefix(c.Sq, c.Skv, _batch(c, 0, 21)),
    ),
    "prefix_bottom": Kind(
        lambda c: masks.Prefix(_lengths(c, c.Skv, 40, 3), BOTTOM),
        lambda c: oracle.prefix(c.Sq, c.Skv, _batch(c, 40, 3), BOTTOM),
        _corner,
    ),
    "prefix_static": Kind(
        lambda c: masks.Prefix(_python(_lengths(c, c.Skv, 40, 3))),
        lambda c: oracle.prefix(c.Sq, c.Skv, _batch(c, 40, 3)),
    ),
    "lengths": Kind(
        lambda c: masks.Lengths(**dict(zip(("query", "key"), _both_lengths(c), strict=True))),
        lambda c: oracle.lengths(c.Sq, c.Skv, *_both_lengths(c)),
    ),
    "key_lengths": Kind(
        lambda c: masks.Lengths(key=_lengths(c, c.Skv, 33, 0)),
        lambda c: oracle.lengths(c.Sq, c.Skv, key=_batch(c, 33, 0)),
    ),
    "cumulative": Kind(
        lambda c: masks.CumulativeLengths(_ends(c, c.Sq, "q"), _ends(c, c.Skv, "k")),
        lambda c: oracle.cumulative(c.Sq, c.Skv, _ends(c, c.Sq, "q"), _ends(c, c.Skv, "k")),
        lambda c: oracle.cumulative_position(c.Sq, _ends(c, c.Sq, "q"), _ends(c, c.Skv, "k"), bottom=False),
    ),
    "cumulative_causal": Kind(
        lambda c: masks.CumulativeLengths(_ends(c, c.Sq, "q"), _ends(c, c.Skv, "k"), masks.Causal(BOTTOM)),
        lambda c: oracle.cumulative(
            c.Sq, c.Skv, _ends(c, c.Sq, "q"), _ends(c, c.Skv, "k"), partial(oracle.causal, align=BOTTOM)
        ),
        lambda c: oracle.cumulative_position(c.Sq, _ends(c, c.Sq, "q"), _ends(c, c.Skv, "k"), bottom=True),
    ),
    "cumulative_prefix": Kind(
        lambda c: masks.CumulativeLengths(
            _ends(c, c.Sq, "q"), _ends(c, c.Skv, "k"), masks.Prefix(_prefixes(c, "q"), BOTTOM)
        ),
        lambda c: oracle.cumulative(
            c.Sq,
            c.Skv,
            _ends(c, c.Sq, "q"),
            _ends(c, c.Skv, "k"),
            partial(oracle.causal, align=BOTTOM),
            _prefixes(c, "q"),
        ),
        lambda c: oracle.cumulative_position(c.Sq, _ends(c, c.Sq, "q"), _ends(c, c.Skv, "k"), bottom=True),
    ),
    "segments_prefix": Kind(
        lambda c: masks.SegmentIds(
            _mixed_ids(c, c.Sq, "q"), _mixed_ids(c, c.Skv, "k"), masks.Prefix(_mixed_ids(c, c.Sq, "q"))
        ),
        lambda c: oracle.segments(
            _mixed_ids(c, c.Sq, "q"), _mixed_ids(c, c.Skv, "k"), oracle.causal, prefix=lambda name: name
        ),
        lambda c: oracle.segment_position(_mixed_ids(c, c.Sq, "q"), _mixed_ids(c, c.Skv, "k")),
    ),
    "segments": Kind(
        lambda c: masks.SegmentIds(_ids(c, c.Sq, "q"), _ids(c, c.Skv, "k")),
        lambda c: oracle.segments(_ids(c, c.Sq, "q"), _ids(c, c.Skv, "k")),
        lambda c: oracle.segment_position(_ids(c, c.Sq, "q"), _ids(c, c.Skv, "k")),
    ),
    "segments_window": Kind(
        lambda c: masks.SegmentIds(_ids(c, c.Sq, "q"), _ids(c, c.Skv, "k"), masks.SlidingWindow(5)),
        lambda c: oracle.segments(
            _ids(c, c.Sq, "q"), _ids(c, c.Skv, "k"), partial(oracle.band, left=5, right=0)
        ),
        lambda c: oracle.segment_position(_ids(c, c.Sq, "q"), _ids(c, c.Skv, "k")),
    ),
    "segments_mixed": Kind(
        lambda c: masks.SegmentIds(_mixed_ids(c, c.Sq, "q"), _mixed_ids(c, c.Skv, "k")),
        lambda c: oracle.segments(_mixed_ids(c, c.Sq, "q"), _mixed_ids(c, c.Skv, "k")),
        lambda c: oracle.segment_position(_mixed_ids(c, c.Sq, "q"), _mixed_ids(c, c.Skv, "k")),
    ),
    "segments_mixed_causal": Kind(
        lambda c: masks.SegmentIds(
            _mixed_ids(c, c.Sq, "q"), _mixed_ids(c, c.Skv, "k"), masks.Causal(BOTTOM), padding_id=3
        ),
        lambda c: oracle.segments(
            _mixed_ids(c, c.Sq, "q"),
            _mixed_ids(c, c.Skv, "k"),
            partial(oracle.causal, align=BOTTOM),
            padding_id=3,
        ),
        lambda c: oracle.segment_position(_mixed_ids(c, c.Sq, "q"), _mixed_ids(c, c.Skv, "k"), bottom=True),
    ),
    "segments_padded": Kind(
        lambda c: masks.SegmentIds(_data(_padded_ids(c)[0]), _data(_padded_ids(c)[1]), masks.Causal()),
        lambda c: oracle.segments(*_padded_ids(c), oracle.causal),
        lambda c: oracle.segment_position(*_padded_ids(c)),
    ),
    "dense": _dense("BNQK"),
    "dense_heads": _dense("NQK"),
    "dense_padding": _dense("B11K"),
    "dense_square": _dense("QK"),
    "dense_column": _dense("BNQ1"),
    "nothing": _dense("BNQ1", chance=0.0),
    "causal_lengths": _both("causal", "lengths"),
    "causal_bottom_lengths": Kind(
        lambda c: masks.Causal(BOTTOM) & KINDS["lengths"].make(c), _aligned, _aligned_corner
    ),
    "prefix_window": _both("prefix_bottom", "window_bottom", position="window_bottom"),
    "segments_causal": _both("segments", "causal"),
    "segments_twice": _both("segments_mixed", "segments_padded", position="segments_padded"),
    "causal_dense": _both("causal", "dense_padding", "dense_square"),
}
# Unions and complements: several intervals for each row, which are calls of their own.
UNIONS: dict[str, Kind] = {
    "sinks_window": Kind(
        lambda c: masks.Causal() & (masks.Lengths(key=4) | masks.SlidingWindow(7)),
        lambda c: oracle.causal(c.Sq, c.Skv) & (oracle.band(c.Sq, c.Skv, 7, 0) | (np.arange(c.Skv) < 4)),
    ),
    "not_band": Kind(lambda c: ~masks.Band(3, 6), lambda c: ~oracle.band(c.Sq, c.Skv, 3, 6)),
    "not_lengths": Kind(
        lambda c: ~(masks.Causal() & KINDS["lengths"].make(c)),
        lambda c: ~KINDS["causal_lengths"].visible(c),
    ),
    "two_bands": Kind(
        lambda c: masks.Band(4, 0, offset=_batch(c, 9, -6)) | masks.Band(-7, 12, offset=_batch(c, 9, -6)),
        lambda c: (
            oracle.band(c.Sq, c.Skv, 4, 0, offset=_batch(c, 9, -6)[..., None, None])
            | oracle.band(c.Sq, c.Skv, -7, 12, offset=_batch(c, 9, -6)[..., None, None])
        ),
        lambda c: np.arange(c.Sq) + _batch(c, 9, -6)[..., None, None],
    ),
    "dense_window": Kind(
        lambda c: masks.SlidingWindow(7) | KINDS["dense_square"].make(c),
        lambda c: oracle.band(c.Sq, c.Skv, 7, 0) | KINDS["dense_square"].visible(c),
    ),
    "lengths_segments": Kind(
        lambda c: masks.Lengths(key=_lengths(c, c.Skv, 2, 9)) | KINDS["segments_padded"].make(c),
        lambda c: oracle.lengths(c.Sq, c.Skv, key=_batch(c, 2, 9)) | KINDS["segments_padded"].visible(c),
    ),
}
# They make what others make: they are for tests of masks, and a call or two.
WITHIN_PACKED = ("cumulative_prefix", "segments_prefix")
KINDS |= UNIONS
