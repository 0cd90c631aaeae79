"""The operands of a call as the kernels take them.

Query, key, value and out stay as they are stored. Of the rest, what has Sq x Skv numbers is read tile by tile where it
lies; what has fewer becomes a number per row or per key, in float32 or int32, prepared by XLA.

The copy engine wants strides of 16 bytes, and shared memory is swizzled in groups of 8 rows. So these are copied once,
padded: sequences longer than 8 whose length is not a multiple of 8, head_dims above 64 that are not a multiple of 16,
masks and biases whose rows are not a multiple of 16 elements.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jax_fa import dropout, softmax
from jax_fa.backends.mosaic.geometry import LOG2E, Geometry, is_plain
from jax_fa.backends.mosaic.tuning import ROWS
from jax_fa.backends.mosaic.widths import padded_head_dim
from jax_fa.call import Axes, Dims, Operands, Problem, Saved, rounding_unit
from jax_fa.softmax import FLT_MAX

Arrays = dict[str, Any]
BY_TILE = ("bias_tile", "mask_tile")
BY_KEY = ("bias_keys", "mask_keys", "segment_key")
VISIBILITY = ("lower", "upper", "segment_row")
ADDITIVE = ("scale", "bias_rows", "slopes", "position", "soft_cap")
DROPPING = ("head_word", "batch_word", "keep_limit", "keep_inverse")
STATISTICS = ("maximum", "inverse", "delta")
BY_ROW = (*VISIBILITY, *ADDITIVE, *DROPPING, *STATISTICS)
BY_HEAD = ("scale", "soft_cap", *DROPPING)  # those of BY_ROW that all rows of a head share
RANGE = ("first", "inner_first", "inner_last", "last")  # key tiles of a tile of rows


@dataclass(frozen=True, kw_only=True)
class RowStatistics:
    """What the backward has per row besides the operands, and dout.

    Weights are exp(x - m) / l with the forward's own m and l, and an exponent that is rounded as the forward rounded
    it: so those of a row sum to 1 however large its logits are.
    """

    # The values of a row that is fully masked, or does not exist: there exp(x - FLT_MAX) is 0, and so is 1 / l.
    EMPTY: ClassVar[dict[str, float]] = {"maximum": FLT_MAX, "inverse": 0.0, "delta": 0.0}

    dout: Any  # as out is stored
    maximum: Any  # `*B N Sq` float32: m, times log2(e) where logits are plain (see logits.weights)
    inverse: Any  # `*B N Sq` float32: 1 / l
    delta: Any  # `*B N Sq` float32: rowsum(dout out) - dlogsumexp

    @classmethod
    def of(cls, problem: Problem, operands: Operands, saved: Saved) -> "RowStatistics":
        """From the forward's results and the cotangents; one pass over out and dout."""
        out, m, l, dout = saved.out.astype(jnp.float32), saved.m, saved.l, saved.dout
        if saved.rounding is not None:
            out = out + saved.rounding.astype(jnp.float32) * rounding_unit(dout.dtype)
        delta = jnp.sum(out * dout.astype(jnp.float32), axis=-1)
        *batch, seq, heads, _ = problem.out_axes
        delta = delta.transpose(*batch, heads, seq)
        if saved.dlogsumexp is not None:
            delta = delta - saved.dlogsumexp
        if is_plain(problem, operands):
            m = m * LOG2E
        maximum = jnp.where(l == 0, FLT_MAX, m)
        return cls(dout=dout, maximum=maximum, inverse=softmax.inverse(l), delta=delta)

    def by_row(self, arrange: Callable[[Any, float], Any]) -> Arrays:
        """The statistics by name; `arrange(array, fill)` brings one into a kernel's order."""
        return {name: arrange(getattr(self, name), fill) for name, fill in self.EMPTY.items()}


def aligned(x: jax.Array, axes: Axes) -> jax.Array:
    """A stored array `*B S N D` that the copy engine can read: itself, or padded."""
    seq, last = axes[-3], axes[-1]
    padding = [(0, 0)] * x.ndim
    padding[seq] = (0, aligned_length(x.shape[seq]) - x.shape[seq])
    padding[last] = (0, aligned_head_dim(x.shape[last]) - x.shape[last])
    return jnp.pad(x, padding) if any(extra for _, extra in padding) else x


def cut(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """An array without its padding."""
    return x if x.shape == shape else x[tuple(map(slice, shape))]


def aligned_length(S: int) -> int:
    return S if S <= 8 else -(-S // 8) * 8


def aligned_head_dim(D: int) -> int:
    """Copies fill up to 64 columns; beyond, rows are made of whole swizzle atoms."""
    return -(-D // 8) * 8 if D <= 64 else padded_head_dim(D)


def stored(problem: Problem, operands: Operands, saved: RowStatistics | None = None) -> Arrays:
    """Query, key and value, and dout in the backward, as they are stored."""
    found: Arrays = {
        name: aligned(getattr(operands, name), getattr(problem, f"{name}_axes"))
        for name in ("query", "key", "value")
    }
    return found if saved is None else found | {"dout": aligned(saved.dout, problem.out_axes)}


def by_rows(g: Geometry, operands: Operands, saved: RowStatistics | None = None) -> Arrays:
    """The rest, for kernels in which rows stay: numbers per row in packed order."""
    d = g.dims
    found = visibility(g, operands) | additive(g, operands)
    for name, (x, fill) in row_operands(operands).items():
        found[name] = g.pack(jnp.broadcast_to(x, (*x.shape[:-1], d.Sq)), fill)
    if operands.dropout_seed is not None:
        found["seed"] = operands.dropout_seed
    return found if saved is None else found | saved.by_row(g.pack)


def row_operands(operands: Operands) -> dict[str, tuple[jax.Array, int]]:
    """What has one scalar per row or head, but for bounds: `*#B #N #Sq`, and a fill for rows that do not exist."""
    found: dict[str, tuple[Any, int]] = {}
    bias, slopes, limit = operands.bias, operands.alibi_slopes, operands.keep_threshold
    if bias is not None and bias.shape[-1] == 1:
        found["bias_rows"] = bias[..., 0].astype(jnp.float32), 0
    if slopes is not None:
        found["slopes"] = slopes.astype(jnp.float32), 0
    if operands.position is not None:
        found["position"] = operands.position, 0
    if operands.segment_row is not None:
        found["segment_row"] = operands.segment_row, -1
    if operands.scale is not None:
        found["scale"] = operands.scale[..., None].astype(jnp.float32), 0
    if operands.soft_cap is not None:
        found["soft_cap"] = operands.soft_cap[..., None].astype(jnp.float32), 1
    if operands.dropout_seed is not None:
        stream = operands.dropout_stream
        found |= {"head_word": (stream[..., 0, None], 0), "batch_word": (stream[..., 1, None], 0)}
    if limit is not None:
        found["keep_limit"] = limit[..., None], 0
        found["keep_inverse"] = dropout.LIMIT / limit[..., None].astype(jnp.float32), 0
    return found


def visibility(g: Geometry, operands: Operands) -> Arrays:
    """Bounds per row, which key tiles a tile of rows visits, and masks of one number per key.

    A mask without a key axis is a bound: all keys or none.
    """
    lower, upper, mask = _as_bounds(g.dims, operands)
    found: Arrays = {}
    if lower is not None or upper is not None:
        found |= _bounds(g, lower, upper, operands.segment_row)
    if operands.segment_key is not None:
        found["segment_key"] = _fill_up(operands.segment_key, g.key_tiles * g.tiles.width)
    if mask is not None and mask.shape[-2] == 1:
        found["mask_keys"] = _per_key(mask, g.key_tiles * g.tiles.width)
    elif mask is not None:
        found["mask_tile"] = whole_rows(mask)
    return found


def _as_bounds(d: Dims, operands: Operands):
    """Lower and upper bounds, and the mask if it is more than a bound.

    Rows whose segment is compared have bounds in any case: these say which tiles are compared.
    """
    lower, upper, mask = operands.lower, operands.upper, operands.mask
    if mask is not None and mask.shape[-1] == 1:
        upper = jnp.where(mask[..., 0], d.Skv if upper is None else upper, 0)
        mask = None
    if operands.segment_row is not None and lower is None and upper is None:
        upper = jnp.full((1,) * operands.segment_row.ndim, d.Skv, jnp.int32)
    return lower, upper, mask


def _filled(d: Dims, lower, upper):
    """Both bounds, `*#B #N Sq`, inside the keys; a row that sees nothing gets (Skv, 0)."""
    shape = jnp.broadcast_shapes(*(x.shape for x in (lower, upper) if x is not None))
    shape = (*shape[:-1], d.Sq)
    low = jnp.broadcast_to(jnp.int32(0) if lower is None else jnp.maximum(lower, 0), shape)
    high = jnp.broadcast_to(jnp.int32(d.Skv) if upper is None else jnp.minimum(upper, d.Skv), shape)
    some = low < high
    return jnp.where(some, low, d.Skv), jnp.where(some, high, 0)


def _not_compared(d: Dims, low, high, segment_row):
    """Bounds of the keys that are visible whatever their segment is: none, in a row that compares segments."""
    if segment_row is None:
        return low, high
    free = segment_row < 0
    return jnp.where(free, low, d.Skv), jnp.where(free, high, 0)


def _bounds(g: Geometry, lower, upper, segment_row) -> Arrays:
    d = g.dims
    low, high = _filled(d, lower, upper)
    free_low, free_high = _not_compared(d, low, high, segment_row)
    width = g.tiles.width

    def over_tiles(x, fill, reduce):
        packed = g.pack(x, fill)
        return reduce(packed.reshape(*packed.shape[:-1], g.row_tiles, g.block_rows), axis=-1)

    first = over_tiles(low, d.Skv, jnp.min) // width
    last = -(-over_tiles(high, 0, jnp.max) // width)
    first = jnp.minimum(first, last)
    # Without lower bounds, an empty row shows in its upper bound alone.
    inner_first = first
    if lower is not None:
        inner_first = jnp.clip(-(-over_tiles(free_low, 0, jnp.max) // width), first, last)
    inner_last = jnp.clip(over_tiles(free_high, d.Skv, jnp.min) // width, inner_first, last)
    ends = jnp.broadcast_arrays(first, inner_first, inner_last, last)
    found = {"ranges": jnp.stack(ends, axis=-1).astype(jnp.int32)}
    if lower is not None:
        found["lower"] = g.pack(low, d.Skv)
    return found | {"upper": g.pack(high, 0)}


def additive(g: Geometry, operands: Operands) -> Arrays:
    """A bias of one scalar per key, or a tile; that per row is one of the `row_operands`."""
    bias = operands.bias
    if bias is None or bias.shape[-1] == 1:
        return {}
    if bias.shape[-2] == 1:
        return {"bias_keys": _per_key(bias, g.key_tiles * g.tiles.width)}
    return {"bias_tile": whole_rows(bias)}


def _per_key(x: jax.Array, keys: int) -> jax.Array:
    """`*#B #N 1 Skv` as float32 `*#B #N keys`."""
    return _fill_up(x[..., 0, :].astype(jnp.float32), keys)


def _fill_up(x: jax.Array, keys: int) -> jax.Array:
    """`... Skv` filled up with 0."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, keys - x.shape[-1])])


def _readable(x: jax.Array) -> jax.Array:
    """Bias or mask in a dtype that tiles are made of."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.int8)
    return x if x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16) else x.astype(jnp.float32)


def whole_rows(x: jax.Array) -> jax.Array:
    """`... Sq Skv` that tiles are copied from: rows of whole swizzle atoms (16 elements at least), in groups of 8."""
    x = _readable(x)
    *_, Sq, Skv = x.shape
    extra = (aligned_length(Sq) - Sq, -Skv % max(16, 32 // x.dtype.itemsize))
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, extra[0]), (0, extra[1])]) if any(extra) else x


def for_keys(g: Geometry, operands: Operands, saved: RowStatistics) -> Arrays:
    """What the kernel takes in which keys stay: `g.tiles.width` rows of one head move at a time.

    Scalars per row in their own order, filled up to whole tiles, those per head `*#B #N 1`; what has Sq x Skv elements
    is transposed, `Skv Sq`.
    """
    d = g.dims
    rows = -(-d.Sq // g.tiles.width) * g.tiles.width

    def per_row(x, fill=0):
        x = jnp.broadcast_to(x, (*x.shape[:-1], d.Sq))
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rows - d.Sq)], constant_values=fill)

    found = saved.by_row(per_row)
    lower, upper, mask = _as_bounds(d, operands)
    if lower is not None or upper is not None:
        low, high = _filled(d, lower, upper)
        free = _not_compared(d, low, high, operands.segment_row)
        found["ranges"] = _row_ranges(g, per_row(low, d.Skv), per_row(high), *map(per_row, free))
        found["upper"] = per_row(high)
        if lower is not None:
            found["lower"] = per_row(low, d.Skv)
    bias = operands.bias
    keys = -(-d.Skv // (ROWS * g.tiles.consumers)) * ROWS * g.tiles.consumers
    for name, x in (("bias", bias), ("mask", mask)):
        if x is None or x.shape[-1] == 1:  # a bias of this form is one of the row_operands, a mask is a bound
            continue
        if x.shape[-2] == 1:
            found[f"{name}_keys"] = _per_key(x, keys)
        else:
            found[f"{name}_tile"] = whole_rows(jnp.swapaxes(x, -1, -2))
    if operands.segment_key is not None:
        found["segment_key"] = _fill_up(operands.segment_key, keys)
    for name, (x, fill) in row_operands(operands).items():
        found[name] = x if name in BY_HEAD else per_row(x, fill)
    if operands.dropout_seed is not None:
        found["seed"] = operands.dropout_seed
    return found


def _row_ranges(g: Geometry, low, high, free_low, free_high):
    """Which row tiles have a visible key in a block of keys, and a run of those for which all are visible, by their
    bounds and without comparing segments: `*#B #N blocks 4`."""
    d, width, keys = g.dims, g.tiles.width, ROWS * g.tiles.consumers
    real = (jnp.arange(low.shape[-1]) < d.Sq).reshape(-1, width)
    low, high, free_low, free_high = (
        x.reshape(*x.shape[:-1], -1, width) for x in (low, high, free_low, free_high)
    )

    def tiles(x, reduce):
        return reduce(x, axis=-1)[..., None, :]  # ... 1 tiles

    blocks = jnp.arange(-(-d.Skv // keys), dtype=jnp.int32)[:, None] * keys
    ends = jnp.minimum(blocks + keys, d.Skv)
    some = (tiles(low, jnp.min) < ends) & (tiles(high, jnp.max) > blocks)
    whole = tiles(jnp.where(real, free_low, 0), jnp.max) <= blocks
    whole = whole & (tiles(jnp.where(real, free_high, d.Skv), jnp.min) >= ends)
    at = jnp.arange(low.shape[-2], dtype=jnp.int32)
    count = jnp.int32(low.shape[-2])
    some, whole = jnp.broadcast_arrays(some, whole)
    last = jnp.max(jnp.where(some, at + 1, 0), axis=-1)
    first = jnp.minimum(jnp.min(jnp.where(some, at, count), axis=-1), last)
    inner_first = jnp.minimum(jnp.min(jnp.where(whole & some, at, count), axis=-1), last)
    after = (at >= inner_first[..., None]) & ~whole
    inner_last = jnp.minimum(jnp.min(jnp.where(after, at, count), axis=-1), last)
    return jnp.stack([first, inner_first, jnp.maximum(inner_first, inner_last), last], axis=-1)
