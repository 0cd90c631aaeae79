"""The operands of a call as the kernels take them.

Query, key, value and out stay as they are stored. Of the rest, what has Sq x Skv elements is read tile by tile where it
lies; what has fewer becomes one scalar per row or per key, in float32 or int32, prepared by XLA.

TMA wants strides of 16 bytes, and shared memory is swizzled in groups of 8 rows. So these are copied once,
padded: sequences longer than 8 whose length is not a multiple of 8, head_dims above 64 that are not a multiple of 16,
masks and biases whose rows are not a multiple of 16 elements.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jax_fa import dropout, softmax
from jax_fa.backends.mosaic import bounds
from jax_fa.backends.mosaic.geometry import LOG2E, Geometry, is_plain
from jax_fa.backends.mosaic.inputs import BY_HEAD, Inputs
from jax_fa.backends.mosaic.tuning import ROWS
from jax_fa.backends.mosaic.widths import padded_head_dim
from jax_fa.call import STORED, Axes, Call, Operands, Saved, widened
from jax_fa.softmax import FLT_MAX


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
    def of(cls, call: Call, saved: Saved) -> "RowStatistics":
        """From the forward's results and the cotangents; one pass over out and dout."""
        out, m, l, dout = widened(saved.out, saved.rounding, jnp.float32), saved.m, saved.l, saved.dout
        delta = jnp.sum(out * dout.astype(jnp.float32), axis=-1)
        *batch, seq, heads, _ = call.problem.out_axes
        delta = delta.transpose(*batch, heads, seq)
        if saved.dlogsumexp is not None:
            delta = delta - saved.dlogsumexp
        if is_plain(call):
            m = m * LOG2E
        maximum = jnp.where(l == 0, FLT_MAX, m)
        return cls(dout=dout, maximum=maximum, inverse=softmax.inverse(l), delta=delta)

    def by_row(self, arrange: Callable[[Any, float], Any]) -> dict[str, Any]:
        """The statistics by their fields of `Inputs`; `arrange(array, fill)` brings one into a kernel's order."""
        return {name: arrange(getattr(self, name), fill) for name, fill in self.EMPTY.items()}


def aligned(x: jax.Array, axes: Axes) -> jax.Array:
    """A stored array `*B S N D` that TMA can read: itself, or padded."""
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


def _stored(call: Call, saved: RowStatistics | None) -> dict[str, Any]:
    """Query, key and value, and dout in the backward, as they are stored."""
    found = {name: aligned(getattr(call.operands, name), call.problem.axes(name)) for name in STORED}
    return found if saved is None else found | {"dout": aligned(saved.dout, call.problem.out_axes)}


def for_rows(g: Geometry, call: Call, saved: RowStatistics | None = None) -> Inputs:
    """The inputs of kernels in which rows stay, with one scalar per row in packed order; `saved` in the backward."""
    operands = call.operands
    found = _stored(call, saved) | visibility(g, operands) | _additive(g, operands)
    for name, (x, fill) in row_operands(operands).items():
        found[name] = g.pack(jnp.broadcast_to(x, (*x.shape[:-1], g.dims.Sq)), fill)
    if saved is not None:
        found |= saved.by_row(g.pack)
    return Inputs(**found, seed=operands.dropout_seed)


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


def visibility(g: Geometry, operands: Operands) -> dict[str, Any]:
    """Where rows stay: bounds per row, which key tiles a tile of rows visits, segments, and the mask, by field of `Inputs`.

    A mask without a key axis is a bound: all keys or none.
    """
    lower, upper, mask = bounds.as_bounds(g.dims, operands)
    found = bounds.where_rows_stay(g, lower, upper, operands.segment_row)
    if operands.segment_key is not None:
        found["segment_key"] = _fill_up(operands.segment_key, g.key_tiles * g.tiles.width)
    if mask is not None and mask.shape[-2] == 1:
        found["mask_keys"] = _per_key(mask, g.key_tiles * g.tiles.width)
    elif mask is not None:
        found["mask_tile"] = whole_rows(mask)
    return found


def _additive(g: Geometry, operands: Operands) -> dict[str, Any]:
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


def for_keys(g: Geometry, call: Call, saved: RowStatistics) -> Inputs:
    """The inputs of the kernel in which keys stay: `g.tiles.width` rows of one head move at a time.

    Scalars per row in their own order, filled up to whole tiles, those per head `*#B #N 1`; what has Sq x Skv elements
    is transposed, `Skv Sq`.
    """
    d, operands = g.dims, call.operands
    rows = -(-d.Sq // g.tiles.width) * g.tiles.width
    keys = -(-d.Skv // (ROWS * g.tiles.consumers)) * ROWS * g.tiles.consumers

    def per_row(x, fill=0):
        x = jnp.broadcast_to(x, (*x.shape[:-1], d.Sq))
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rows - d.Sq)], constant_values=fill)

    lower, upper, mask = bounds.as_bounds(d, operands)
    found = _stored(call, saved) | saved.by_row(per_row)
    found |= bounds.where_keys_stay(g, lower, upper, operands.segment_row, per_row)
    for name, x in (("bias", operands.bias), ("mask", mask)):
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
    return Inputs(**found, seed=operands.dropout_seed)
