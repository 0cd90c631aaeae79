"""The backward: the same loops, which add each tile's part to the gradients."""

from dataclasses import replace

import jax.numpy as jnp

from jax_fa.backends.xla import gradients as sums
from jax_fa.backends.xla.canonical import Canonical
from jax_fa.backends.xla.pairs import Pairs, Row, Tiles
from jax_fa.backends.xla.products import wide_product
from jax_fa.backends.xla.tiling import key_ranges, loop
from jax_fa.call import Operands, Saved


def backward(call: Canonical, saved: Saved) -> Operands:
    gradients = sums.zeros(call)
    if not call.empty and call.wanted:
        gradients = _Sums(call, saved).of(gradients)
    return sums.finish(call, gradients)


class _Sums:
    """The loops over row tiles and key tiles."""

    def __init__(self, call: Canonical, saved: Saved) -> None:
        self.call, self.tiles = call, Tiles(call, saved)

    def of(self, zeros: Operands) -> Operands:
        """The gradients, added to zeros."""
        rows, keys = self.tiles.rows, self.tiles.keys
        key_range = key_ranges(self.call, rows, keys)
        start = (zeros.query, replace(zeros, query=None))
        dq, gradients = loop((0, rows.count), lambda t, carry: self._row_tile(t, key_range(t), *carry), start)
        return replace(gradients, query=dq)

    def _row_tile(self, t, key_range, dq_all, gradients):
        call, rows, d = self.call, self.tiles.rows, self.call.dims
        row = self.tiles.row(t)
        start = jnp.zeros((*call.B, d.K, d.G, rows.tile, d.D), call.acc) if "query" in call.wanted else None
        dq, gradients = loop(key_range, lambda u, carry: self._key_tile(row, u, *carry), (start, gradients))
        if dq is not None:
            dq_all = sums.put_fresh(call, dq_all, dq * call.scale, call.problem.query_axes, rows, t)
        return dq_all, gradients

    def _key_tile(self, row: Row, u, dq, gradients):
        call, wanted = self.call, self.call.wanted
        pairs = Pairs(self.tiles, row, u)
        dk = dv = dscale = dcap = dfloats = None
        if "query" in wanted:
            dq = dq + wide_product(call, "kgij,kjd->kgid", pairs.dx, self.tiles.clean(pairs.k))
        if "key" in wanted:
            dk = _times_scale(call, pairs.dx, row.clean.q)
        if "value" in wanted:
            weights = pairs.counted(pairs.kept(pairs.p)).astype(call.dtype)
            dv = call.product("kgij,kgid->kjd", weights, row.clean.dout)
        if "scale" in wanted:
            dscale = pairs.counted(pairs.dx * pairs.logits.product)
        if "soft_cap" in wanted:
            dcap = pairs.counted(pairs.ds * pairs.logits.cap.by_cap)
        if "function_floats" in wanted:
            dfloats = pairs.logits.score.floats_cotangent(pairs.dy, gradients.function_floats)
        dx = pairs.dx if wanted & {"bias", "alibi_slopes"} else None
        return dq, sums.add_tile(pairs.tile, gradients, sums.Parts(dk, dv, dx, dscale, dcap, dfloats))


def _times_scale(call: Canonical, ds, q):
    """scale ds^T q, summed over the heads that share a key."""
    if call.scale.ndim and call.scale.shape[-3] != 1:  # a scale for each of them
        return call.product("kgij,kgid->kjd", ds * call.scale, q)
    product = call.product("kgij,kgid->kjd", ds.astype(call.dtype), q)
    return product * (call.scale[..., 0, :, :] if call.scale.ndim else call.scale)
