"""The operands of a call as the kernels take them.

Query, key, value and out stay as they are stored. Of the rest, what has Sq x Skv numbers is read tile by tile where it
lies; what has fewer becomes a number per row or per key, in float32 or int32, prepared by XLA.

The copy engine wants strides of 16 bytes, and shared memory is swizzled in groups of 8 rows. So these are copied once,
padded: sequences longer than 8 whose length is not a multiple of 8, head_dims above 64 that are not a multiple of 16,
masks and biases whose rows are not a multiple of 16 elements.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jax_fa.mosaic.geometry import Geometry
from jax_fa.mosaic.widths import padded_head_dim
from jax_fa.problem import Axes, Operands

Arrays = dict[str, Any]
RANGE = ("first", "inner_first", "inner_last", "last")  # key tiles of a tile of rows


def aligned(x: jax.Array, axes: Axes) -> jax.Array:
    """A stored array `*B S N D` that the copy engine can read: itself, or padded."""
    seq, last = axes[-3], axes[-1]
    padding = [(0, 0)] * x.ndim
    padding[seq] = (0, aligned_length(x.shape[seq]) - x.shape[seq])
    padding[last] = (0, aligned_head_dim(x.shape[last]) - x.shape[last])
    return jnp.pad(x, padding) if any(extra for _, extra in padding) else x


def aligned_length(S: int) -> int:
    return S if S <= 8 else -(-S // 8) * 8


def aligned_head_dim(D: int) -> int:
    """Copies fill up to 64 columns; beyond, rows are made of whole swizzle atoms."""
    return -(-D // 8) * 8 if D <= 64 else padded_head_dim(D)


def visibility(g: Geometry, operands: Operands) -> Arrays:
    """Bounds per row, which key tiles a tile of rows visits, and masks of one number per key.

    A mask without a key axis is a bound: all keys or none.
    """
    d = g.dims
    lower, upper, mask = operands.lower, operands.upper, operands.mask
    if mask is not None and mask.shape[-1] == 1:
        seen = mask[..., 0]
        upper = jnp.where(seen, d.Skv if upper is None else upper, 0)
        mask = None
    found: Arrays = {}
    if lower is not None or upper is not None:
        found |= _bounds(g, lower, upper)
    if mask is not None and mask.shape[-2] == 1:
        found["mask_keys"] = _per_key(g, mask)
    elif mask is not None:
        found["mask_tile"] = _whole_rows(mask.astype(jnp.int8))
    return found


def _bounds(g: Geometry, lower, upper) -> Arrays:
    d = g.dims
    shape = jnp.broadcast_shapes(*(x.shape for x in (lower, upper) if x is not None))
    shape = (*shape[:-1], d.Sq)
    low = jnp.zeros(shape, jnp.int32) if lower is None else jnp.broadcast_to(jnp.maximum(lower, 0), shape)
    high = (
        jnp.full(shape, d.Skv, jnp.int32)
        if upper is None
        else jnp.broadcast_to(jnp.minimum(upper, d.Skv), shape)
    )
    some = low < high
    low, high = (
        jnp.where(some, low, d.Skv),
        jnp.where(some, high, 0),
    )  # an empty row asks for no tile, and all see none
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
        found["bias_keys"] = _per_key(g, bias)
    elif bias is not None:
        kept = bias.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
        found["bias_tile"] = _whole_rows(bias if kept else bias.astype(jnp.float32))
    if operands.alibi_slopes is not None:
        slopes = operands.alibi_slopes.astype(jnp.float32)
        found["slopes"] = g.pack(jnp.broadcast_to(slopes[..., None], (*slopes.shape, g.dims.Sq)))
    return found


def dropping(g: Geometry, operands: Operands) -> Arrays:
    """The Philox key, and the (head, batch) words of every row's counters."""
    if operands.dropout_seed is None:
        return {}
    stream = operands.dropout_stream
    words = [g.pack(jnp.broadcast_to(stream[..., i, None], (*stream.shape[:-1], g.dims.Sq))) for i in (0, 1)]
    return {"seed": operands.dropout_seed, "head_word": words[0], "batch_word": words[1]}


def _per_key(g: Geometry, x: jax.Array) -> jax.Array:
    """`*#B #N 1 Skv` as float32 `*#B #N keys`, filled up to whole tiles with 0."""
    x = x[..., 0, :].astype(jnp.float32)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, g.key_tiles * g.tiles.width - x.shape[-1])]
    return jnp.pad(x, padding)


def _whole_rows(x: jax.Array) -> jax.Array:
    """`... Sq Skv` with rows of whole swizzle atoms (16 elements at least, 16 bytes) in groups of 8."""
    *_, Sq, Skv = x.shape
    extra = (aligned_length(Sq) - Sq, -Skv % max(16, 32 // x.dtype.itemsize))
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, extra[0]), (0, extra[1])]) if any(extra) else x
