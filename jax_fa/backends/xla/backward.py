"""The backward: the same loops, which add each tile's part to the gradients."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fa import softmax
from jax_fa.backends.xla.canonical import Canonical
from jax_fa.backends.xla.logits import Logits, Tile, every, finite, nan_unless_finite
from jax_fa.backends.xla.products import wide_product
from jax_fa.backends.xla.tiling import key_ranges, loop, tiling
from jax_fa.call import Operands, Saved, rounding_unit, sum_to
from jax_fa.indices import add_last


def backward(call: Canonical, saved: Saved) -> Operands:
    gradients = _zero_gradients(call)
    if not call.empty:
        gradients = _Sums(call, saved).of(gradients)

    def finish(name, gradient):
        operand = getattr(call.operands, name)
        if name in ("key", "value"):
            gradient = call.stored(gradient, call.problem.axes(name))
        return gradient.reshape(call.call.gradient_shape(name)).astype(operand.dtype)

    return gradients.map(finish)


class _Row(NamedTuple):
    """What all key tiles of a row tile have in common, `*B K G rows ...`."""

    t: Any
    q: Any
    dout: Any
    q_finite: Any  # with 0 where it is not finite, which the probabilities bring back
    dout_finite: Any
    m: Any
    inverse: Any  # 1 / l, NaN for a row whose dout is not finite
    delta: Any
    fresh: Any  # which rows no earlier tile has; None: all


class _Sums:
    """The loops over row tiles and key tiles."""

    def __init__(self, call: Canonical, saved: Saved) -> None:
        self.call, self.saved = call, saved
        self.rows, self.keys = tiling(call)
        rules = (call.lower, call.upper, call.mask, call.segment_row)
        self.masked = self.rows.ragged or self.keys.ragged or any(x is not None for x in rules)
        self.stats = {name: call.by_head(getattr(saved, name)) for name in ("m", "l", "dlogsumexp")}

    def of(self, zeros: Operands) -> Operands:
        """The gradients, added to zeros."""
        key_range = key_ranges(self.call, self.rows, self.keys)

        def row_tile(t, carry):
            return self._row_tile(t, key_range(t), *carry)

        start = (zeros.query, replace(zeros, query=None))
        dq, gradients = loop((0, self.rows.count), row_tile, start)
        return replace(gradients, query=dq)

    def _row(self, t) -> _Row:
        call, saved, rows, problem = self.call, self.saved, self.rows, self.call.problem
        q = call.query_tile(call.operands.query, problem.query_axes, rows, t)
        out = call.query_tile(saved.out, problem.out_axes, rows, t).astype(call.acc)
        if saved.rounding is not None:
            lost = call.query_tile(saved.rounding, problem.out_axes, rows, t).astype(call.acc)
            out = out + lost * rounding_unit(call.dtype)
        dout = call.query_tile(saved.dout, problem.out_axes, rows, t)
        delta = jnp.sum(out * dout.astype(call.acc), axis=-1)
        if self.stats["dlogsumexp"] is not None:
            delta = delta - rows.cut(self.stats["dlogsumexp"], -1, t).astype(call.acc)
        m = rows.cut(self.stats["m"], -1, t)
        inverse = softmax.inverse(rows.cut(self.stats["l"], -1, t))
        fresh = rows.fresh(t)
        fresh = None if fresh is None else fresh[:, None]
        if not self.masked:
            return _Row(t, q, dout, q, dout, m, inverse, delta, fresh)
        inverse = inverse + nan_unless_finite(dout).astype(call.acc)
        return _Row(t, q, dout, finite(q), finite(dout), m, inverse, delta, fresh)

    def _row_tile(self, t, key_range, dq_all, gradients):
        call, rows, d, axes = self.call, self.rows, self.call.dims, self.call.problem.query_axes
        row = self._row(t)
        part = jnp.zeros((*call.B, d.K, d.G, rows.tile, d.D), call.acc)
        dq, gradients = loop(key_range, lambda u, carry: self._key_tile(row, u, *carry), (part, gradients))
        dq = (dq * call.scale).astype(call.dtype)
        if row.fresh is not None:  # the previous tile has the gradient of the rows both share
            before = call.query_tile(dq_all, axes, rows, t)
            dq = jnp.where(row.fresh, dq, before)
        return rows.put(dq_all, call.stored(dq, axes), axes[call.problem.batch_rank], t), gradients

    def _key_tile(self, row: _Row, u, dq, gradients):
        call, problem = self.call, self.call.problem
        tile = Tile(call, self.rows, self.keys, row.t, u)
        k = call.key_tile(call.operands.key, problem.key_axes, self.keys, u)
        v = call.key_tile(call.operands.value, problem.value_axes, self.keys, u)
        visible = tile.visible()
        logits = tile.logits(row.q, k, visible)
        p = jnp.exp(logits.x - row.m[..., None]) * row.inverse[..., None]
        dp = call.product("kgid,kjd->kgij", row.dout, v)
        weights, keep = p, tile.keep()
        if keep is not None:
            divisor = 1 if call.keep_prob is None else call.keep_prob
            weights = jnp.where(keep, p / divisor, 0)
            dp = jnp.where(keep, dp / divisor, 0)
        counted = every(visible, row.fresh)

        def count(x):
            return x if counted is None else jnp.where(counted, x, 0)

        ds = dcapped = count(p * (dp - row.delta[..., None]))
        if logits.slope is not None:
            ds = count(ds * logits.slope)
        if self.masked:
            k = finite(k)
        dq = dq + wide_product(call, "kgij,kjd->kgid", ds, k)
        dk = _times_scale(call, ds, row.q_finite)
        dv = call.product("kgij,kgid->kjd", count(weights).astype(call.dtype), row.dout_finite)
        return dq, _add_tile(tile, gradients, _Parts(dk, dv, ds, dcapped, logits))


def _times_scale(call: Canonical, ds, q):
    """scale ds^T q, summed over the heads that share a key."""
    if call.scale.ndim and call.scale.shape[-3] != 1:  # a scale for each of them
        return call.product("kgij,kgid->kjd", ds * call.scale, q)
    product = call.product("kgij,kgid->kjd", ds.astype(call.dtype), q)
    return product * (call.scale[..., 0, :, :] if call.scale.ndim else call.scale)


def _zero_gradients(call: Canonical) -> Operands:
    """Query's gradient as stored; accumulators `*B ...` that keep the dims in which the other operands broadcast."""
    d, problem, operands = call.dims, call.problem, call.operands

    def like(x):
        if x is None:
            return None
        x = call.by_head(x)
        full = [call.B[at] if i < problem.mapped else x.shape[at] for at, i in enumerate(call.kept)]
        return jnp.zeros((*full, *x.shape[len(full) :]), call.acc)

    query = jnp.zeros((*call.B, d.K, d.G, d.Sq, d.D), call.dtype)
    return Operands(
        query=call.stored(query, problem.query_axes),
        key=jnp.zeros((*call.B, d.K, d.Skv, d.D), call.acc),
        value=jnp.zeros((*call.B, d.K, d.Skv, d.Dv), call.acc),
        bias=like(operands.bias),
        alibi_slopes=like(operands.alibi_slopes),
        scale=like(operands.scale),
        soft_cap=like(operands.soft_cap),
    )


class _Parts(NamedTuple):
    """What one tile adds to the gradients."""

    dk: Any
    dv: Any
    ds: Any
    dcapped: Any  # the gradient of the logits after the soft cap
    logits: Logits


def _add_tile(tile: Tile, gradients: Operands, parts: _Parts) -> Operands:
    """The gradients with one tile's part added; each is summed over the dims in which its operand broadcasts."""

    def along_keys(total, part):
        if total.shape == part.shape:
            return total + part
        before = tile.keys.cut(total, -2, tile.u)
        return tile.keys.put(total, before + part, -2, tile.u)

    def along_rows(total, part):
        """`part` is `... rows`."""
        part = sum_to(part, (*total.shape[:-1], 1 if total.shape[-1] == 1 else part.shape[-1]))
        before = tile.rows.cut(total, -1, tile.t)
        return tile.rows.put(total, before + part, -1, tile.t) if total.shape != part.shape else total + part

    def scalar(total, part):
        return total + sum_to(part, (*total.shape, 1, 1)).reshape(total.shape)

    ds = parts.ds
    changes = {"key": along_keys(gradients.key, parts.dk), "value": along_keys(gradients.value, parts.dv)}
    if gradients.bias is not None:
        changes["bias"] = _add_bias(tile, gradients.bias, ds)
    if gradients.alibi_slopes is not None:
        part = jnp.sum(-ds * tile.distance(), axis=-1)
        changes["alibi_slopes"] = along_rows(gradients.alibi_slopes, part)
    if gradients.scale is not None:
        # A product of a masked position may be NaN.
        changes["scale"] = scalar(gradients.scale, jnp.where(ds == 0, 0, ds * parts.logits.product))
    if gradients.soft_cap is not None:
        part = parts.dcapped * parts.logits.cap_slope
        changes["soft_cap"] = scalar(gradients.soft_cap, jnp.where(parts.dcapped == 0, 0, part))
    return replace(gradients, **changes)


def _add_bias(tile: Tile, dbias, ds):
    if tile.call.bias_offset is not None:
        return add_last(dbias, tile.bias_index(), ds)
    part = sum_to(
        ds, tuple(1 if full == 1 else size for full, size in zip(dbias.shape, ds.shape, strict=True))
    )
    if dbias.shape == part.shape:
        return dbias + part
    at: list[Any] = [0] * (dbias.ndim - 2)
    at.append(0 if dbias.shape[-2] == 1 else tile.rows.start(tile.t))
    at.append(0 if dbias.shape[-1] == 1 else tile.keys.start(tile.u))
    # With x64 a plain 0 would be int64.
    start = [np.int32(x) if isinstance(x, int) else x.astype(jnp.int32) for x in at]
    before = lax.dynamic_slice(dbias, start, part.shape)
    return lax.dynamic_update_slice(dbias, before + part, start)
