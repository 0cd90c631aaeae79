"""The second derivative: that of the backward along tangents of the operands and of the cotangents."""

from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp

from jax_fa.backends.xla import gradients as sums
from jax_fa.backends.xla.canonical import Canonical
from jax_fa.backends.xla.pairs import Pairs, Row, Tiles
from jax_fa.backends.xla.products import wide_product
from jax_fa.backends.xla.tangent import start as tangent_start
from jax_fa.backends.xla.tiling import key_ranges, loop
from jax_fa.call import Operands, Saved


def second(call: Canonical, tangents: Operands, saved: Saved) -> tuple[Operands, Any, Any]:
    """Tangents of the wanted gradients, and those of out and of the log-sum-exp where they are wanted, else None."""
    wanted = call.problem.gradients
    out, tau = tangent_start(call)
    results = _Results(
        sums.zeros(call),
        out if wanted is None or "dout" in wanted else None,
        tau if wanted is None or "dlogsumexp" in wanted else None,
    )
    moving = tangents.present() or not (saved.dout_tangent is None and saved.dlogsumexp_tangent is None)
    if moving and not call.empty:
        results = _Sums(call, tangents, saved).of(results)
    tau = results.logsumexp
    tau = None if tau is None else tau.reshape(call.call.stats_shape)
    return sums.finish(call, results.gradients), results.out, tau


class _Results(NamedTuple):
    gradients: Operands
    out: Any  # the tangent of out
    logsumexp: Any  # ... and of the log-sum-exp, tau


class _RowSums(NamedTuple):
    """Sums over all keys of a row; None: 0."""

    tau: Any  # of p T
    mean: Any  # of p U
    near: Any  # ... from which a U that is the same may be as far away by rounding
    rest: Any  # what the tangent of delta has beside it


class _Sums:
    """The loops over row tiles and, twice, over key tiles: what they sum by row is subtracted from each pair."""

    def __init__(self, call: Canonical, tangents: Operands, saved: Saved) -> None:
        self.call, self.tiles = call, Tiles(call, saved, tangents)
        self.moved = self.tiles.tangents

    def of(self, zeros: _Results) -> _Results:
        rows, keys = self.tiles.rows, self.tiles.keys
        key_range = key_ranges(self.call, rows, keys)
        return loop((0, rows.count), lambda t, results: self._row_tile(t, key_range(t), results), zeros)

    def _row_tile(self, t, key_range, results: _Results) -> _Results:
        call, rows, keys, d = self.call, self.tiles.rows, self.tiles.keys, self.call.dims
        row = self.tiles.row(t)
        only = _Pairs(self.tiles, row, 0) if keys.tile == keys.size else None

        def each(body, carry):
            if only is not None:  # what one loop has computed the other need not
                return body(only, carry)
            return loop(key_range, lambda u, carry: body(_Pairs(self.tiles, row, u), carry), carry)

        by_row = self._row_sums(row, each)
        part = (*call.B, d.K, d.G, rows.tile)
        dq = jnp.zeros((*part, d.D), call.acc) if "query" in call.wanted else None
        out = None if results.out is None else jnp.zeros((*part, d.Dv), call.acc)
        start = (dq, out, replace(results.gradients, query=None))
        dq, out, gradients = each(lambda pairs, carry: self._add(pairs, by_row, *carry), start)
        problem, dq_all = call.problem, results.gradients.query
        if dq is not None:
            dq_all = sums.put_fresh(call, dq_all, dq, problem.query_axes, rows, t)
        if out is not None:
            out = sums.put_fresh(call, results.out, out, problem.out_axes, rows, t)
        tau = results.logsumexp
        if tau is not None and by_row.tau is not None:
            tau = rows.put(tau, by_row.tau, -1, t)
        return _Results(replace(gradients, query=dq_all), out, tau)

    def _row_sums(self, row: Row, each) -> _RowSums:
        """What all pairs of a row have in common, with a loop of its own if it takes tangents of operands."""
        call, saved = self.call, self.tiles.saved
        by_logits = self.moved.move_logits
        of_logits = bool(call.wanted - {"value"})  # what else is wanted takes neither
        by_value = of_logits and self.moved.value is not None
        zeros = jnp.zeros((*call.B, call.dims.K, call.dims.G, self.tiles.rows.tile), call.acc)
        tau = mean = rest = None

        def add(pairs: _Pairs, carry):
            tau, mean, rest = carry
            if by_logits:
                tau = tau + jnp.sum(pairs.p * pairs.tangent.s, axis=-1)
            if by_logits and of_logits:
                rest = rest + jnp.sum(pairs.ds * pairs.tangent.s, axis=-1)
            if by_value:
                mean = mean + jnp.sum(pairs.shown(pairs.p * pairs.dp_by_value), axis=-1)
            return tau, mean, rest

        if by_logits or by_value:
            which = (by_logits, by_value, by_logits and of_logits)
            tau, mean, rest = each(add, tuple(zeros if x else None for x in which))
        if not of_logits:
            return _RowSums(tau, None, None, None)
        near = None if mean is None else jnp.abs(mean) * self.tiles.rounding_of_out
        if saved.dout_tangent is not None:
            found = self.tiles.mean(row.given.dout_tangent, row.out)
            mean, near = _plus(mean, found[0]), _plus(near, found[1])
        if tau is not None and row.dlogsumexp is not None:
            rest = rest - tau * row.dlogsumexp
        if saved.dlogsumexp_tangent is not None:
            rest = _plus(rest, -self.tiles.statistics("dlogsumexp_tangent", row.t))
        return _RowSums(tau, mean, near, rest)

    def _add(self, pairs: "_Pairs", by_row: _RowSums, dq, out, gradients: Operands):
        """The sums by row and the gradients with those of a tile."""
        call, wanted, clean = self.call, self.call.wanted, pairs.row.clean
        scale, moved, saved = call.scale, self.moved, self.tiles.saved

        def by_row_of(weights, x):
            return wide_product(call, "kgij,kjd->kgid", weights, self.tiles.clean(x))

        def by_key_of(weights, x):
            return wide_product(call, "kgij,kgid->kjd", weights, x)

        dk = dv = dx = dscale = dcap = dfloats = None
        if wanted - {"value"}:
            g, gy, gx = pairs.second(by_row)
            dx = gx if wanted & {"bias", "alibi_slopes"} else None
        if wanted & {"query", "key"}:
            factor = scale * gx if moved.scale is None else scale * gx + moved.scale * pairs.dx
        if "query" in wanted:
            dq = dq + by_row_of(factor, pairs.k)
            if moved.key is not None:
                dq = dq + by_row_of(scale * pairs.dx, pairs.k_tangent)
        if "key" in wanted:
            dk = by_key_of(factor, clean.q)
            if moved.query is not None:
                dk = dk + by_key_of(scale * pairs.dx, clean.q_tangent)
        if moved.move_logits and ("value" in wanted or out is not None):
            shifted = pairs.counted(pairs.kept(pairs.p * (pairs.tangent.s - by_row.tau[..., None])))
            if "value" in wanted:
                dv = by_key_of(shifted, clean.dout)
            if out is not None:
                out = out + by_row_of(shifted, pairs.v)
        if "value" in wanted and saved.dout_tangent is not None:
            weights = pairs.counted(pairs.kept(pairs.p)).astype(call.dtype)
            dv = _plus(dv, call.product("kgij,kgid->kjd", weights, clean.dout_tangent))
        if out is not None and moved.value is not None:
            weights = pairs.counted(pairs.moved).astype(call.dtype)
            out = out + call.product("kgij,kjd->kgid", weights, self.tiles.clean(pairs.v_tangent))
        if "scale" in wanted:
            dscale = gx * pairs.logits.product
            if moved.move_logits and pairs.tangent.product is not None:
                dscale = dscale + pairs.dx * pairs.tangent.product
            dscale = pairs.counted(dscale)
        if "soft_cap" in wanted:
            cap = pairs.logits.cap
            dcap = g * cap.by_cap
            if moved.move_logits:
                dcap = dcap - cap.ratio * pairs.bend
            dcap = pairs.counted(dcap)
        if "function_floats" in wanted:
            dfloats = pairs.floats_second(gy, gradients.function_floats)
        parts = sums.Parts(dk, dv, dx, dscale, dcap, dfloats)
        return dq, out, sums.add_tile(pairs.tile, gradients, parts)


class _Pairs(Pairs):
    """With tangents of what the backward makes of the pairs."""

    @cached_property
    def dp_by_value(self):
        """What tangents of the values add to the tangent of dp."""
        return self.kept(self.call.product("kgid,kjd->kgij", self.row.given.dout, self.v_tangent))

    def _dp_tangent(self):
        """U; None: 0."""
        u = None if self.v_tangent is None else self.dp_by_value
        if (dout_tangent := self.row.given.dout_tangent) is None:
            return u
        return _plus(u, self.kept(self.call.product("kgid,kjd->kgij", dout_tangent, self.v)))

    @cached_property
    def bend(self):
        """ds f'' X', with the soft cap's part in it."""
        return self.ds * self.logits.cap.curve * self.tangent.inner

    def floats_second(self, gy, like):
        """The tangent of what a tile adds to the gradient of function_floats."""
        score, moved = self.logits.score, self.tiles.tangents
        if not moved.move_logits:
            return score.floats_cotangent(gy, like)
        return score.floats_second(self.dy, gy, self.tangent.before, moved.floats, like)

    def second(self, by_row: _RowSums) -> tuple[Any, Any, Any]:
        """The tangents of ds, dy and dx: G, that before the soft cap, and GX."""
        moving = self.tiles.tangents.move_logits
        u, g = self._dp_tangent(), None
        if u is not None:
            g = self.from_mean(u, by_row.mean, by_row.near)
        if by_row.rest is not None:
            g = _plus(g, -by_row.rest[..., None])
        if g is not None:
            g = self.p * g
        if moving:
            g = _plus(g, self.ds * (self.tangent.s - by_row.tau[..., None]))
        gy = gx = g = self.counted(g)
        cap, score = self.logits.cap, self.logits.score
        if cap is not None:
            gy = g * cap.slope
            gy = gx = self.counted(gy + self.bend if moving else gy)
        if score is not None:
            gx = gy * score.slope
            if moving:
                along = self.tangent.before, self.tiles.tangents.floats
                gx = gx + self.dy * score.slope_tangent(*along)
            gx = self.counted(gx)
        return g, gy, gx


def _plus(x, y):
    return y if x is None else x + y
