"""The one table of cases. Every file of tests runs it, or those of its rows that are `feature`s.

The row and key tiles of the tests are small (`ROWS`, `KEYS`, see conftest.py), so that lengths of a few
dozen cross several tiles.
"""

import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa
from jax_fa import masks
from jax_fa.testing import oracle

ROWS, KEYS = 16, 32  # the tiles of the tests

_TO_STORED = {
    "BSND": lambda x: x,
    "SND": lambda x: x,
    "BNSD": lambda x: np.swapaxes(x, -2, -3),
    "NSD": lambda x: np.swapaxes(x, -2, -3),
    "SBND": lambda x: np.moveaxis(x, -3, 0),
}
_TO_CANONICAL = _TO_STORED | {"SBND": lambda x: np.moveaxis(x, 0, -3)}


@dataclass(frozen=True)
class Kind:
    """A mask: as the library takes it, as a boolean array, and the key position at which it places each row."""

    make: Callable[["Case"], Any]
    visible: Callable[["Case"], np.ndarray]
    position: Callable[["Case"], Any] = lambda c: np.arange(c.Sq)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call. The letters are those of the library."""

    name: str
    B: tuple[int, ...] = (2,)
    Sq: int = 37
    Skv: int = 45
    N: int = 4
    K: int = 2
    D: int = 16
    Dv: int = 16
    dtype: str = "float32"
    layout: str = "BSND"
    mask: str | None = None  # a key of KINDS
    bias: str | None = None  # the last dims of a bias: letters of B N Q K (B: all batch dims), or 1
    bias_dtype: str | None = None
    slopes: str | None = None  # "N" or "BN"
    scale: float | None = None
    soft_cap: float | None = None
    dropout: float = 0.0
    spread: float | int = 1.0  # standard deviation of the logits, roughly: rows of a large one are peaked
    feature: bool = True  # differs from others by more than lengths

    def __str__(self) -> str:
        return self.name

    @property
    def full(self) -> tuple[int, ...]:
        return (*self.B, self.N, self.Sq, self.Skv)

    def random(self, salt: str) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(f"{self.name}/{salt}".encode()))

    def context(self):
        """Float64 needs x64, which is off otherwise."""
        return jax.enable_x64(True) if self.dtype == "float64" else nullcontext()

    def stored(self, x):
        return _TO_STORED[self.layout](x)

    def canonical(self, x) -> np.ndarray:
        return _TO_CANONICAL[self.layout](np.asarray(x))

    def cast(self, x, dtype: str | None = None) -> np.ndarray:
        return np.asarray(x).astype(jnp.dtype(dtype or self.dtype))

    @property
    def acc(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    def bias_shape(self) -> tuple[int, ...]:
        assert self.bias is not None
        letters = {"N": (self.N,), "Q": (self.Sq,), "K": (self.Skv,), "1": (1,), "B": self.B}
        return sum((letters[c] for c in self.bias), start=())

    @cache
    def operands(self) -> dict[str, np.ndarray]:
        """The differentiable operands, canonical."""
        normal = self.random("operands").standard_normal
        found = {
            "query": self.cast(self.spread * normal((*self.B, self.Sq, self.N, self.D))),
            "key": self.cast(normal((*self.B, self.Skv, self.K, self.D))),
            "value": self.cast(normal((*self.B, self.Skv, self.K, self.Dv))),
        }
        if self.bias is not None:
            found["bias"] = self.cast(normal(self.bias_shape()), self.bias_dtype)
        if self.slopes is not None:
            shape = (self.N,) if self.slopes == "N" else (*self.B, self.N)
            found["alibi_slopes"] = self.cast(np.abs(normal(shape)) / 8, self.acc)
        return found

    @cache
    def cotangents(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the output (canonical) and of the log-sum-exp."""
        normal = self.random("cotangents").standard_normal
        dout = self.cast(normal((*self.B, self.Sq, self.N, self.Dv)))
        return dout, self.cast(normal((*self.B, self.N, self.Sq)), self.acc)

    def dropout_key(self):
        return jax.random.key(zlib.crc32(self.name.encode()) % 1000)

    def seed(self) -> np.ndarray:
        """The Philox key that a `jax.random` key stands for."""
        return np.asarray(jax.random.bits(self.dropout_key(), (2,), jnp.uint32))

    def visible(self) -> np.ndarray | None:
        return None if self.mask is None else KINDS[self.mask].visible(self)

    def position(self) -> np.ndarray:
        return np.arange(self.Sq) if self.mask is None else KINDS[self.mask].position(self)

    @property
    def keep_prob(self) -> float:
        """Of 2**16 numbers, how many keep their weight."""
        return round((1 - self.dropout) * 65536) / 65536

    def keep(self) -> np.ndarray | None:
        return oracle.keep_bits(self.seed(), self.full, self.keep_prob) if self.dropout else None

    def library_mask(self):
        return None if self.mask is None else KINDS[self.mask].make(self)

    def arrays(self) -> dict[str, Any]:
        """The operands without a gradient."""
        return {"mask": self.library_mask(), "dropout_key": self.dropout_key() if self.dropout else None}

    def flash_attention(self, operands: dict[str, Any], **options):
        """The library's result (out, log-sum-exp) for operands stored in the layout."""
        return jax_fa.flash_attention(
            **operands,
            **self.arrays() | options,
            scale=self.scale,
            logits_soft_cap=self.soft_cap,
            dropout_rate=self.dropout,
            layout=self.layout,
            return_logsumexp=True,
        )

    def stored_operands(self) -> dict[str, np.ndarray]:
        laid = ("query", "key", "value")
        return {name: self.stored(x) if name in laid else x for name, x in self.operands().items()}

    def gradient(self, operands: dict[str, Any], dout, dlse, **options):
        """(out, log-sum-exp) and the gradients of all operands, by name, as the library stores them."""
        results, pullback = jax.vjp(lambda x: self.flash_attention(x, **options), operands)
        return results, pullback((dout, dlse))[0]

    def canonical_gradients(self, gradients) -> dict[str, np.ndarray]:
        laid = ("query", "key", "value")
        return {n: self.canonical(g) if n in laid else np.asarray(g) for n, g in gradients.items()}


@cache
def expected(case: Case) -> tuple[oracle.Attention, dict[str, np.ndarray]]:
    """The oracle's results and gradients."""
    x = case.operands()
    found = oracle.attention(
        x["query"],
        x["key"],
        x["value"],
        bias=x.get("bias"),
        slopes=x.get("alibi_slopes"),
        visible=case.visible(),
        scale=case.scale,
        soft_cap=case.soft_cap,
        position=case.position(),
        keep=case.keep(),
        keep_prob=case.keep_prob,
    )
    return found, found.gradients(*case.cotangents())


@cache
def naive(case: Case):
    """The naive implementation's out, log-sum-exp and gradients.

    Float64 and empty calls are measured by the floor alone.
    """
    if case.dtype == "float64" or 0 in case.full:
        found, gradients = expected(case)
        return found.out, found.lse, gradients
    visible = case.visible()
    found = oracle.naive(
        case.operands(),
        np.broadcast_to(True if visible is None else visible, case.full),
        case.keep(),
        case.cotangents(),
        scale=np.float32(case.D**-0.5 if case.scale is None else case.scale),
        soft_cap=None if case.soft_cap is None else np.float32(case.soft_cap),
        keep_prob=np.float32(case.keep_prob),
        position=np.broadcast_to(case.position(), (*case.B, 1, case.Sq)),
    )
    return jax.tree.map(np.asarray, found)


def check(case: Case, out=None, lse=None, gradients=None) -> None:
    """Holds results of the library (stored in the case's layout) against the oracle."""
    want, want_gradients = expected(case)
    naive_out, naive_lse, naive_gradients = naive(case)
    # Float32 knows a logit x to x / 2**24, and its weight no better.
    wide = max(1.0, case.spread / 100)
    floor = oracle.FLOOR[case.dtype] * (wide if case.dtype == case.acc else 1)
    if out is not None:
        assert out.dtype == jnp.dtype(case.dtype)
        oracle.assert_close_to_oracle(case.canonical(out), want.out, naive_out, f"{case}: out", floor)
    if lse is not None:
        assert lse.dtype == jnp.dtype(case.acc)
        stats_floor = oracle.FLOOR[case.acc]
        oracle.assert_close_to_oracle(lse, want.lse, naive_lse, f"{case}: log-sum-exp", stats_floor)
    if gradients is not None:
        assert sorted(gradients) == sorted(want_gradients)
        for name, g in case.canonical_gradients(gradients).items():
            given = case.operands()[name]
            assert g.dtype == given.dtype and g.shape == given.shape, (name, g.dtype, g.shape)
            what = f"{case}: gradient of {name}"
            # The floor is relative to the terms of a sum (see oracle), of which most may cancel.
            times = max(1.0, want.cancellation.get(name, 1.0))
            oracle.assert_close_to_oracle(g, want_gradients[name], naive_gradients[name], what, times * floor)


# --- masks


def _batch(case: Case, *values: int) -> np.ndarray:
    """An int32 array `*B` that goes through the given values."""
    return np.resize(np.array(values, np.int32), case.B)


def _lengths(case: Case, size: int, *values: int) -> Any:
    """The same, within 0..size."""
    return np.asarray(np.minimum(_batch(case, *values), size))


def _both_lengths(case: Case) -> tuple[Any, Any]:
    return _lengths(case, case.Sq, 30, 17), _lengths(case, case.Skv, 45, 11)


def _python(x):
    """Python integers, which are part of the program."""

    def convert(x):
        return tuple(map(convert, x)) if isinstance(x, list) else x

    return convert(x.tolist())


def _data(x) -> jax.Array:
    """An array whose values are not known when it is made under a trace."""
    return jax.lax.optimization_barrier(jnp.asarray(x))


def _ids(case: Case, size: int, salt: str) -> np.ndarray:
    return np.sort(case.random(salt).integers(0, 4, (*case.B, size)), axis=-1).astype(np.int32)


def _mixed_ids(case: Case, size: int, salt: str, padding: bool = False) -> np.ndarray:
    """Ids of runs whose order is mixed, so that some segments have several runs; `padding`: the last ones are 0."""
    random = case.random(salt)
    ids = np.repeat(random.integers(1, 5, (*case.B, -(-size // 3))), 3, axis=-1)[..., :size].astype(np.int32)
    if padding:
        ids = np.where(np.arange(size) < size - size // 4, np.sort(ids, axis=-1), 0).astype(np.int32)
    return ids


def _padded_ids(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Of queries and keys, both with padding."""
    return _mixed_ids(case, case.Sq, "q", padding=True), _mixed_ids(case, case.Skv, "q", padding=True)


def _ends(case: Case, size: int, salt: str) -> np.ndarray:
    """Four sequences that end within `size` and leave some of it unused."""
    return np.sort(case.random(salt).integers(0, size, (*case.B, 4)), axis=-1).astype(np.int32)


def _prefixes(case: Case, salt: str) -> np.ndarray:
    """A prefix length for each of four sequences."""
    return case.random(salt).integers(0, min(9, case.Skv), (*case.B, 4)).astype(np.int32)


def _dense(shape: str, chance: float = 0.7) -> Kind:
    """A random boolean mask of the dims named, as `Case.bias`."""

    def array(case: Case) -> np.ndarray:
        return case.random("mask").random(replace(case, bias=shape).bias_shape()) < chance

    return Kind(array, array)


def _both(*kinds: str, position: str | None = None) -> Kind:
    """The kinds together; `position`: the one that puts the rows at other keys than those of their indices."""

    def make(case: Case):
        mask, *others = (masks.as_mask(KINDS[k].make(case)) for k in kinds)
        for other in others:
            mask = mask & other
        return mask

    def visible(case: Case) -> np.ndarray:
        found = np.ones((), bool)
        for kind in kinds:
            found = found & KINDS[kind].visible(case)
        return found

    return Kind(make, visible, lambda c: KINDS[position].position(c) if position else np.arange(c.Sq))


def _corner(case: Case) -> np.ndarray:
    return np.arange(case.Sq) + case.Skv - case.Sq


def _aligned(case: Case) -> np.ndarray:
    """Causal from the bottom right corner of each entry's own lengths."""
    query, key = _both_lengths(case)
    corner = oracle.band(case.Sq, case.Skv, None, 0, offset=(key - query)[..., None, None])
    return corner & oracle.lengths(case.Sq, case.Skv, query, key)


def _aligned_corner(case: Case) -> np.ndarray:
    query, key = _both_lengths(case)
    return np.arange(case.Sq) + (key - query)[..., None, None]


def _window_data(case: Case) -> np.ndarray:
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


# --- the table

_LENGTHS = (
    (1, 1),
    (1, 2 * KEYS + 3),
    (7, KEYS - 1),
    (ROWS - 1, KEYS),
    (ROWS, KEYS + 1),
    (ROWS + 1, 7),
    (2 * ROWS, 2 * KEYS),
    (2 * ROWS + 3, 1),
    (61, 67),
)
_LENGTHS_CAUSAL = ((7, 7), (2 * ROWS, KEYS), (2 * KEYS + 3, 2 * KEYS + 3), (1, KEYS + 1), (53, 19))
_EMPTY: tuple[dict[str, Any], ...] = ({"Sq": 0}, {"Skv": 0}, {"Sq": 0, "Skv": 0}, {"B": (0,)})
_BIASES = ("BNQK", "NQK", "B1QK", "BN1K", "BNQ1", "B11K", "1N11", "QK", "Q1", "K", "1", "")
_ALL: dict[str, Any] = {
    "mask": "causal_bottom_lengths",
    "bias": "1NQK",
    "slopes": "N",
    "soft_cap": 4.0,
    "dropout": 0.25,
}
_HALVES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("plain", {"D": 64, "Dv": 64}),
    ("causal", {"mask": "causal", "Sq": 61, "Skv": 67}),
    ("bias", {"bias": "BNQK", "bias_dtype": "float32"}),
)

CASES: tuple[Case, ...] = (
    *(Case(name=f"lengths-{a}-{b}", Sq=a, Skv=b, feature=False) for a, b in _LENGTHS),
    *(
        Case(name=f"causal-{a}-{b}", Sq=a, Skv=b, mask="causal_bottom", feature=False)
        for a, b in _LENGTHS_CAUSAL
    ),
    *(
        Case(name="empty-" + "-".join(f"{k}" for k in sizes), bias="BNQK", slopes="N", feature=False, **sizes)
        for sizes in _EMPTY
    ),
    Case(name="mha", N=3, K=3),
    Case(name="mqa", N=3, K=1, mask="causal"),
    Case(name="gqa", N=6, K=2, D=8, Dv=8, bias="BNQK", feature=False),
    Case(name="one-head", N=1, K=1, D=5, Dv=7, mask="causal_bottom", feature=False),
    Case(name="wide-values", D=8, Dv=24, mask="causal"),
    Case(name="narrow-values", D=24, Dv=1, feature=False),
    Case(name="no-batch", B=(), mask="window", bias="NQK"),
    Case(name="two-batch-dims", B=(2, 3), mask="lengths", bias="BNQK", slopes="BN", N=2, K=1),
    Case(name="batch-of-one", B=(1, 2, 1), mask="prefix", bias="B11K", dropout=0.5, N=2, K=1, feature=False),
    *(
        Case(name=f"mask-{kind}", mask=kind, feature=not kind.startswith("dense"))
        for kind in KINDS
        if kind not in (*WITHIN_PACKED, *UNIONS)
    ),
    *(Case(name=f"bias-{shape or 'scalar'}", bias=shape, feature=False) for shape in _BIASES),
    Case(name="bias-causal", bias="1NQK", mask="causal"),
    Case(name="slopes", slopes="N", N=6),
    Case(name="slopes-batch", slopes="BN", mask="causal", feature=False),
    Case(name="soft-cap", soft_cap=2.0, mask="causal"),
    Case(name="scale", scale=0.7, mask="window_bottom", feature=False),
    Case(name="scale-zero", scale=0.0, bias="QK", feature=False),
    Case(name="scale-negative", scale=-0.3, feature=False),
    Case(name="dropout", dropout=0.3),
    Case(name="dropout-causal", dropout=0.1, mask="causal", N=6, K=3, feature=False),
    Case(name="everything", **_ALL),
    Case(name="everything-BNSD", layout="BNSD", **_ALL),
    Case(name="layout-BNSD", layout="BNSD", B=(2, 1), mask="causal", feature=False),
    Case(name="layout-SBND", layout="SBND", mask="causal", bias="B1QK"),
    Case(name="layout-SND", layout="SND", B=(), mask="causal", feature=False),
    Case(name="layout-NSD", layout="NSD", B=(), dropout=0.2, feature=False),
    *(
        Case(name=f"{dtype}-{name}", dtype=dtype, feature=False, **options)
        for dtype in ("bfloat16", "float16")
        for name, options in _HALVES
    ),
    *(
        Case(
            name=f"{dtype}-peaked-{spread}", dtype=dtype, spread=spread, mask=mask, D=32, Dv=32, feature=False
        )
        for dtype in ("float32", "bfloat16", "float16")
        for spread, mask in ((50, None), (500, "causal"))
    ),
    Case(name="bfloat16-everything", dtype="bfloat16", **_ALL),
    Case(name="float16-layout", dtype="float16", layout="SBND", bias="NQK", feature=False),
    Case(name="float64-plain", dtype="float64", feature=False),
    Case(name="float64-segments", dtype="float64", mask="segments_window", B=(1,), feature=False),
    Case(name="float64-everything", dtype="float64", feature=False, **_ALL),
)
BY_NAME = {case.name: case for case in CASES}
FEATURES = tuple(case for case in CASES if case.feature)
# Run with the tiles of the library, which the long ones cross and the others do not fill.
REAL_TILES = (
    *(
        BY_NAME[name]
        for name in ("bias-BNQK", "mask-lengths", "dropout-causal", "everything", "bfloat16-causal")
    ),
    Case(name="real-causal", B=(1,), Sq=1030, Skv=1030, N=2, K=1, mask="causal"),
    Case(name="real-bias", B=(1,), Sq=1290, Skv=1100, N=2, K=1, bias="1NQK", mask="segments"),
    Case(name="real-bfloat16", B=(1,), Sq=1100, Skv=1030, N=2, K=2, dtype="bfloat16", mask="window_bottom"),
)
assert len(BY_NAME) == len(CASES)
