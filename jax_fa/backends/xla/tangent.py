"""The derivative of the forward along tangents: from saved statistics, or in one pass with the forward."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_fa import softmax
from jax_fa.backends.xla.canonical import Canonical
from jax_fa.backends.xla.forward import normalized, put
from jax_fa.backends.xla.forward import start as forward_start
from jax_fa.backends.xla.logits import Tile, finite, nan_unless_finite
from jax_fa.backends.xla.pairs import Pairs, Row, Tiles, less, nan_marker
from jax_fa.backends.xla.products import wide_product
from jax_fa.backends.xla.tangents import Tangents
from jax_fa.backends.xla.tiling import key_ranges, loop, tiling
from jax_fa.call import Call, Operands, Saved, widened


def tangent(call: Canonical, tangents: Operands, saved: Saved, dtype: Any = None) -> tuple[Any, Any]:
    """The tangents of out, in the dtype (None: that of the call), and of the log-sum-exp, from saved statistics."""
    out, tau = start(call, dtype)
    if not call.empty:
        out, tau = _Tangent(call, tangents, saved).of(out, tau)
    return out, tau.reshape(call.call.stats_shape)


def start(call: Canonical, dtype: Any = None) -> tuple[Any, Any]:
    """Zeros: the tangent of out as stored, and that of the log-sum-exp."""
    d = call.dims
    shape = (*call.B, d.K, d.G, d.Sq)
    out = call.stored(jnp.zeros((*shape, d.Dv), dtype or call.dtype), call.problem.out_axes)
    return out, jnp.zeros(shape, call.acc)


class _Tangent:
    """The loops over row tiles and key tiles."""

    def __init__(self, call: Canonical, tangents: Operands, saved: Saved) -> None:
        self.call, self.tiles = call, Tiles(call, saved, tangents)

    def of(self, out, tau):
        rows = self.tiles.rows
        key_range = key_ranges(self.call, rows, self.tiles.keys)
        return loop((0, rows.count), lambda t, carry: self._row_tile(t, key_range(t), *carry), (out, tau))

    def _row_tile(self, t, key_range, out, tau_all):
        call, rows, d = self.call, self.tiles.rows, self.call.dims
        row = self.tiles.row(t)
        part = (*call.B, d.K, d.G, rows.tile)
        sums = jnp.zeros((*part, d.Dv), call.acc)
        by_value = None if self.tiles.tangents.value is None else sums
        start = (sums, by_value, jnp.zeros(part, call.acc))
        acc, by_value, tau = loop(key_range, lambda u, carry: self._key_tile(row, u, *carry), start)
        moved = less(acc, common := tau[..., None] * row.out, self._near(row, common))
        moved = moved if by_value is None else moved + by_value
        return call.put_rows(out, moved, call.problem.out_axes, rows, t), rows.put(tau_all, tau, -1, t)

    def _key_tile(self, row: Row, u, acc, by_value, tau):
        call, tiles = self.call, self.tiles
        pairs = Pairs(tiles, row, u)
        if tiles.tangents.move_logits:
            moved = pairs.p * pairs.tangent.s
            tau = tau + jnp.sum(moved, axis=-1)
            acc = acc + wide_product(call, "kgij,kjd->kgid", pairs.kept(moved), tiles.clean(pairs.v))
        if pairs.v_tangent is not None:
            by_value = by_value + call.product(
                "kgij,kjd->kgid", pairs.moved.astype(call.dtype), tiles.clean(pairs.v_tangent)
            )
        return acc, by_value, tau

    def _near(self, row: Row, common):
        """How far the tangent may be by rounding from `common`, which is subtracted, where one key has all the weight.

        Keys of 1e18 have tangents of the logits as large, which move nothing there.
        """
        return jnp.where(row.inverse[..., None] == 1, jnp.abs(common) * self.tiles.rounding_of_out, -1)


def jvp(call: Canonical, tangents: Operands) -> tuple[Any, ...]:
    """The results of the forward, then the tangents of out and of the log-sum-exp."""
    outs, m, l = forward_start(call)
    moved, tau = outs[0], jnp.zeros_like(l)
    if not call.empty:
        outs, m, l, moved, tau = _Fused(call, tangents).of(outs, m, l, moved, tau)
    stats = call.call.stats_shape
    return outs[0], m.reshape(stats), l.reshape(stats), *outs[1:], moved, tau.reshape(stats)


def second_tangent(call: Call, tangents: Operands, others: Operands, saved: Saved) -> tuple[Any, Any]:
    """The derivatives of `tangent`'s results along other tangents, with which all that is saved moves, too.

    With the max taken for the log-sum-exp that moves, and the sum for a constant.
    """
    canonical = Canonical(call)
    saved = Saved(out=widened(saved.out, saved.rounding, call.acc), m=saved.m, l=saved.l)
    dout, dlogsumexp = tangent(canonical, others, saved, call.acc)
    moving = {name: _alike(getattr(call.operands, name), x) for name, x in others.present().items()}

    def along(operands: dict[str, Any], out, m):
        moved = Canonical(call.replace(operands=replace(call.operands, **operands)))
        return tangent(moved, tangents, Saved(out=out, m=m, l=saved.l), call.acc)

    results = zip(_alike(saved.out, dout), _alike(saved.m, dlogsumexp), strict=True)
    at, to = (({name: x[i] for name, x in moving.items()}, *pair) for i, pair in enumerate(results))
    _, (out, logsumexp) = jax.jvp(along, at, to)
    return out.astype(call.dtype), logsumexp


def _alike(x, tangent) -> tuple[Any, Any]:
    """Both with the batch dims of both."""
    x, tangent = jnp.broadcast_arrays(x, tangent)
    return x, tangent


class _Sum(NamedTuple):
    """What is summed over the keys of a row tile, rescaled where the max grows."""

    m: Any
    l: Any
    out: Any
    moved: Any  # of p (T - tau) v + p e, with tau of the keys so far: nothing is subtracted at the end
    tau: Any  # of p T


class _Fused:
    """The loops over row tiles and key tiles."""

    def __init__(self, call: Canonical, tangents: Operands) -> None:
        self.call, self.tangents = call, Tangents(call, tangents)
        self.rows, self.keys = tiling(call)

    def of(self, *zeros):
        key_range = key_ranges(self.call, self.rows, self.keys)
        return loop((0, self.rows.count), lambda t, carry: self._row_tile(t, key_range(t), *carry), zeros)

    def _row_tile(self, t, key_range, outs, m, l, moved, tau):
        call, problem, rows, d = self.call, self.call.problem, self.rows, self.call.dims
        q, q_tangent = (
            None if x is None else call.query_tile(x, problem.query_axes, rows, t)
            for x in (call.operands.query, self.tangents.query)
        )
        part = (*call.B, d.K, d.G, rows.tile)
        zeros = jnp.zeros((*part, d.Dv), call.acc)
        m_tile, l_tile = softmax.start(part, call.acc)
        start = _Sum(m_tile, l_tile, zeros, zeros, zeros[..., 0])
        total = loop(key_range, lambda u, carry: self._key_tile((q, q_tangent), t, u, carry), start)
        outs = put(call, outs, normalized(call, total.out, total.l), rows, t)
        (moved,) = put(call, (moved,), normalized(call, total.moved, total.l), rows, t)
        tau = rows.put(tau, total.tau * softmax.inverse(total.l), -1, t)
        return outs, rows.put(m, total.m, -1, t), rows.put(l, total.l, -1, t), moved, tau

    def _key_tile(self, queries, t, u, total: _Sum) -> _Sum:
        call, problem, tangents = self.call, self.call.problem, self.tangents
        tile = Tile(call, self.rows, self.keys, t, u)
        k, k_tangent, v, v_tangent = (
            None if x is None else call.key_tile(x, axes, self.keys, u)
            for x, axes in (
                (call.operands.key, problem.key_axes),
                (tangents.key, problem.key_axes),
                (call.operands.value, problem.value_axes),
                (tangents.value, problem.value_axes),
            )
        )
        visible, keep = tile.visible(), tile.keep()
        marker: Any = None
        moved_marker: Any = 0
        if visible is not None:
            marker, v = nan_unless_finite(v), finite(v)
            if v_tangent is not None:
                moved_marker = jnp.where(visible, nan_marker(call, v_tangent), 0)
                v_tangent = finite(v_tangent)
        logits = tile.logits(queries[0], k, visible, marker)
        m, l, rescale, p = softmax.update(total.m, total.l, logits.x)
        kept = p if keep is None else jnp.where(keep, p, 0)

        def weighted(weights, v):
            return wide_product(call, "kgij,kjd->kgid", weights, v)

        before, moved, tau = total.out * rescale[..., None], total.moved * rescale[..., None], total.tau
        if tangents.move_logits:
            s = tangents.of_logits(tile, logits, queries, (k, k_tangent), visible).s
            tau = tau * rescale + jnp.sum(p * s, axis=-1)
            # Their means: less of one is taken from the tangents before, and the new one from those of this tile.
            old, new = total.tau * softmax.inverse(total.l), tau * softmax.inverse(l)
            moved = moved + (old - new)[..., None] * before + weighted(kept * (s - new[..., None]), v)
        if v_tangent is not None:
            moved = moved + call.product(
                "kgij,kjd->kgid", (kept + moved_marker).astype(call.dtype), v_tangent
            )
        return _Sum(m, l, before + weighted(kept, v), moved, tau)
