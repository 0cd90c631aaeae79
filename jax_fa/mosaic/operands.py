"""The operands of a call as the kernels take them.

Query, key, value and out stay as they are stored. Of the rest, what has Sq x Skv numbers is read tile by tile where it
lies; what has fewer becomes a number per row or per key, in float32 or int32, prepared by XLA.

The copy engine wants strides of 16 bytes, and shared memory is swizzled in groups of 8 rows. So these are copied once,
padded: sequences longer than 8 whose length is not a multiple of 8, head_dims above 64 that are not a multiple of 16,
masks and biases whose rows are not a multiple of 16 elements.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jax_fa.mosaic.geometry import Geometry
from jax_fa.mosaic.tuning import ROWS
from jax_fa.mosaic.widths import padded_head_dim
from jax_fa.problem import Axes, Dims, Operands, Problem, Saved, rounding_unit
from jax_fa.softmax import FLT_MAX

Arrays = dict[str, Any]
BY_TILE = ("bias_tile", "mask_tile")
BY_KEY = ("bias_keys", "mask_keys")
BY_ROW = ("lower", "upper", "bias_rows", "slopes", "head_word", "batch_word", "logsumexp", "delta")
RANGE = ("first", "inner_first", "inner_last", "last")  # key tiles of a tile of rows


@dataclass(frozen=True, kw_only=True)
class RowStatistics:
    """What the backward has per row besides the operands, and dout."""

    # The log-sum-exp of a row that saw nothing, or does not exist: every weight is exp2(x - it) = 0.
    NOTHING: ClassVar[float] = FLT_MAX

    dout: Any  # as out is stored
    logsumexp: Any  # `*B N Sq` float32, base 2
    delta: Any  # `*B N Sq` float32: rowsum(dout out) - dlogsumexp

    @classmethod
    def of(cls, problem: Problem, saved: Saved) -> "RowStatistics":
        """From the forward's results and the cotangents; one pass over out and dout."""
        out, m, l, dout = saved.out.astype(jnp.float32), saved.m, saved.l, saved.dout
        if saved.rounding is not None:
            out = out + saved.rounding.astype(jnp.float32) * rounding_unit(dout.dtype)
        delta = jnp.sum(out * dout.astype(jnp.float32), axis=-1)
        *batch, seq, heads, _ = problem.out_axes
        delta = delta.transpose(*batch, heads, seq)
        if saved.dlogsumexp is not None:
            delta = delta - saved.dlogsumexp
        empty = l == 0
        base2 = jnp.maximum(m * math.log2(math.e), -FLT_MAX) + jnp.log2(jnp.where(empty, 1.0, l))
        return cls(dout=dout, logsumexp=jnp.where(empty, cls.NOTHING, base2), delta=delta)


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
    found = visibility(g, operands) | additive(g, operands) | dropping(g, operands)
    if saved is None:
        return found
    return found | {"logsumexp": g.pack(saved.logsumexp, saved.NOTHING), "delta": g.pack(saved.delta)}


def visibility(g: Geometry, operands: Operands) -> Arrays:
    """Bounds per row, which key tiles a tile of rows visits, and masks of one number per key.

    A mask without a key axis is a bound: all keys or none.
    """
    lower, upper, mask = _as_bounds(g.dims, operands)
    found: Arrays = {}
    if lower is not None or upper is not None:
        found |= _bounds(g, lower, upper)
    if mask is not None and mask.shape[-2] == 1:
        found["mask_keys"] = _per_key(mask, g.key_tiles * g.tiles.width)
    elif mask is not None:
        found["mask_tile"] = whole_rows(mask)
    return found


def _as_bounds(d: Dims, operands: Operands):
    """Lower and upper bounds, and the mask if it is more than a bound."""
    upper, mask = operands.upper, operands.mask
    if mask is not None and mask.shape[-1] == 1:
        upper = jnp.where(mask[..., 0], d.Skv if upper is None else upper, 0)
        mask = None
    return operands.lower, upper, mask


def _filled(d: Dims, lower, upper):
    """Both bounds, `*#B #N Sq`, inside the keys; a row that sees nothing gets (Skv, 0)."""
    shape = jnp.broadcast_shapes(*(x.shape for x in (lower, upper) if x is not None))
    shape = (*shape[:-1], d.Sq)
    low = jnp.broadcast_to(jnp.int32(0) if lower is None else jnp.maximum(lower, 0), shape)
    high = jnp.broadcast_to(jnp.int32(d.Skv) if upper is None else jnp.minimum(upper, d.Skv), shape)
    some = low < high
    return jnp.where(some, low, d.Skv), jnp.where(some, high, 0)


def _bounds(g: Geometry, lower, upper) -> Arrays:
    d = g.dims
    low, high = _filled(d, lower, upper)
    width = g.tiles.width

    def over_tiles(x, fill, reduce):
        packed = g.pack(x, fill)
        return reduce(packed.reshape(*packed.shape[:-1], g.row_tiles, g.block_rows), axis=-1)

    first = over_tiles(low, d.Skv, jnp.min) // width
    last = -(-over_tiles(high, 0, jnp.max) // width)
    first = jnp.minimum(first, last)
    # Without lower bounds, an empty row shows in its upper bound alone.
    inner_first = first if lower is None else jnp.clip(-(-over_tiles(low, 0, jnp.max) // width), first, last)
    inner_last = jnp.clip(over_tiles(high, d.Skv, jnp.min) // width, inner_first, last)
    found = {"ranges": jnp.stack([first, inner_first, inner_last, last], axis=-1).astype(jnp.int32)}
    if lower is not None:
        found["lower"] = g.pack(low, d.Skv)
    return found | {"upper": g.pack(high, 0)}


def additive(g: Geometry, operands: Operands) -> Arrays:
    """Bias and slopes: a number per row, per key, or a tile."""
    found: Arrays = {}
    bias = operands.bias
    if bias is not None and bias.shape[-1] == 1:
        rows = jnp.broadcast_to(bias[..., 0].astype(jnp.float32), (*bias.shape[:-2], g.dims.Sq))
        found["bias_rows"] = g.pack(rows)
    elif bias is not None and bias.shape[-2] == 1:
        found["bias_keys"] = _per_key(bias, g.key_tiles * g.tiles.width)
    elif bias is not None:
        found["bias_tile"] = whole_rows(bias)
    if operands.alibi_slopes is not None:
        slopes = operands.alibi_slopes.astype(jnp.float32)
        found["slopes"] = g.pack(jnp.broadcast_to(slopes, (*slopes.shape[:-1], g.dims.Sq)))
    return found


def dropping(g: Geometry, operands: Operands) -> Arrays:
    """The Philox key, and the (head, batch) words of every row's counters."""
    if operands.dropout_seed is None:
        return {}
    stream = operands.dropout_stream
    words = [g.pack(jnp.broadcast_to(stream[..., i, None], (*stream.shape[:-1], g.dims.Sq))) for i in (0, 1)]
    return {"seed": operands.dropout_seed, "head_word": words[0], "batch_word": words[1]}


def _per_key(x: jax.Array, keys: int) -> jax.Array:
    """`*#B #N 1 Skv` as float32 `*#B #N keys`, filled up with 0."""
    x = x[..., 0, :].astype(jnp.float32)
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

    Numbers per row in their own order, filled up to whole tiles; what has Sq x Skv numbers turned over, `Skv Sq`.
    """
    d = g.dims
    rows = -(-d.Sq // g.tiles.width) * g.tiles.width

    def per_row(x, fill=0):
        x = jnp.broadcast_to(x, (*x.shape[:-1], d.Sq))
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rows - d.Sq)], constant_values=fill)

    found: Arrays = {
        "logsumexp": per_row(saved.logsumexp, saved.NOTHING),
        "delta": per_row(saved.delta),
    }
    lower, upper, mask = _as_bounds(d, operands)
    if lower is not None or upper is not None:
        low, high = _filled(d, lower, upper)
        found["ranges"] = _row_ranges(g, per_row(low, d.Skv), per_row(high))
        found["upper"] = per_row(high)
        if lower is not None:
            found["lower"] = per_row(low, d.Skv)
    bias = operands.bias
    keys = -(-d.Skv // (ROWS * g.tiles.consumers)) * ROWS * g.tiles.consumers
    for name, x in (("bias", bias), ("mask", mask)):
        if x is None:
            continue
        if x.shape[-1] == 1:  # a mask of this form has become a bound
            found["bias_rows"] = per_row(x[..., 0].astype(jnp.float32))
        elif x.shape[-2] == 1:
            found[f"{name}_keys"] = _per_key(x, keys)
        else:
            found[f"{name}_tile"] = whole_rows(jnp.swapaxes(x, -1, -2))
    if operands.alibi_slopes is not None:
        found["slopes"] = per_row(operands.alibi_slopes.astype(jnp.float32))
    if operands.dropout_seed is not None:
        stream = operands.dropout_stream
        found |= {
            "seed": operands.dropout_seed,
            "head_word": per_row(stream[..., 0, None]),
            "batch_word": per_row(stream[..., 1, None]),
        }
    return found


def _row_ranges(g: Geometry, low, high):
    """Which row tiles see some key of a block of keys, and a run of those that see all: `*#B #N blocks 4`."""
    d, width, keys = g.dims, g.tiles.width, ROWS * g.tiles.consumers
    by_tile = (*low.shape[:-1], -1, width)
    real = (jnp.arange(low.shape[-1]) < d.Sq).reshape(-1, width)
    low, high = low.reshape(by_tile), high.reshape(by_tile)

    def tiles(x, reduce):
        return reduce(x, axis=-1)[..., None, :]  # ... 1 tiles

    blocks = jnp.arange(-(-d.Skv // keys), dtype=jnp.int32)[:, None] * keys
    ends = jnp.minimum(blocks + keys, d.Skv)
    some = (tiles(low, jnp.min) < ends) & (tiles(high, jnp.max) > blocks)
    whole = tiles(jnp.where(real, low, 0), jnp.max) <= blocks
    whole &= tiles(jnp.where(real, high, d.Skv), jnp.min) >= ends
    at = jnp.arange(low.shape[-2], dtype=jnp.int32)
    count = jnp.int32(low.shape[-2])
    last = jnp.max(jnp.where(some, at + 1, 0), axis=-1)
    first = jnp.minimum(jnp.min(jnp.where(some, at, count), axis=-1), last)
    inner_first = jnp.minimum(jnp.min(jnp.where(whole & some, at, count), axis=-1), last)
    after = (at >= inner_first[..., None]) & ~whole
    inner_last = jnp.minimum(jnp.min(jnp.where(after, at, count), axis=-1), last)
    return jnp.stack([first, inner_first, jnp.maximum(inner_first, inner_last), last], axis=-1)
