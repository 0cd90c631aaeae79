"""The forward: a loop over row tiles and, inside, over key tiles."""

from typing import Any

import jax.numpy as jnp

from jax_fa import softmax
from jax_fa.backends.xla.axis import Axis
from jax_fa.backends.xla.canonical import Canonical
from jax_fa.backends.xla.logits import Tile, finite, nan_unless_finite
from jax_fa.backends.xla.products import wide_product
from jax_fa.backends.xla.tiling import key_ranges, loop, tiling
from jax_fa.call import narrowed, rounding_unit


def forward(call: Canonical) -> tuple[Any, ...]:
    """out stored in out_axes, softmax max and sum `*B N Sq`, and rounding like out if the problem says so."""
    outs, m, l = start(call)
    if not call.empty:
        outs, m, l = _Sums(call).of(outs, m, l)
    stats = call.call.stats_shape
    return outs[0], m.reshape(stats), l.reshape(stats), *outs[1:]


def start(call: Canonical) -> tuple[tuple[Any, ...], Any, Any]:
    """The results of fully masked rows: out and, if the problem says so, rounding; softmax max and sum."""
    d = call.dims
    shape = (*call.B, d.K, d.G, d.Sq)
    out = call.stored(jnp.zeros((*shape, d.Dv), call.dtype), call.problem.out_axes)
    return ((out, out) if call.problem.saves_rounding else (out,)), *softmax.start(shape, call.acc)


def normalized(call: Canonical, acc, l):
    """A sum of the values of kept weights, over the sum of all weights."""
    exact = softmax.finish(acc, l)
    return exact if call.keep_prob is None else exact / call.keep_prob


def put(call: Canonical, outs, exact, rows: Axis, t) -> tuple[Any, ...]:
    """Out and, where it is there, rounding, with the rows of tile t."""
    tiles = [exact.astype(call.dtype)]
    if len(outs) > 1:
        narrow, lost = narrowed(exact, call.dtype)
        tiles = [narrow, (lost / rounding_unit(call.dtype)).astype(call.dtype)]
    return tuple(
        call.put_rows(x, tile, call.problem.out_axes, rows, t) for x, tile in zip(outs, tiles, strict=True)
    )


class _Sums:
    """The loops over row tiles and key tiles."""

    def __init__(self, call: Canonical) -> None:
        self.call = call
        self.rows, self.keys = tiling(call)

    def of(self, outs, m, l):
        """Out and what is stored like it, softmax max and sum: each tile of rows is put where it belongs."""
        key_range = key_ranges(self.call, self.rows, self.keys)
        return loop(
            (0, self.rows.count), lambda t, carry: self._row_tile(t, key_range(t), *carry), (outs, m, l)
        )

    def _row_tile(self, t, key_range, outs, m, l):
        call, rows, d = self.call, self.rows, self.call.dims
        q = call.query_tile(call.operands.query, call.problem.query_axes, rows, t)
        part = (*call.B, d.K, d.G, rows.tile)
        start = (jnp.zeros((*part, d.Dv), call.acc), *softmax.start(part, call.acc))
        acc, m_tile, l_tile = loop(key_range, lambda u, carry: self._key_tile(q, t, u, *carry), start)
        outs = put(call, outs, normalized(call, acc, l_tile), rows, t)
        return outs, rows.put(m, m_tile, -1, t), rows.put(l, l_tile, -1, t)

    def _key_tile(self, q, t, u, acc, m, l):
        call, problem = self.call, self.call.problem
        tile = Tile(call, self.rows, self.keys, t, u)
        k = call.key_tile(call.operands.key, problem.key_axes, self.keys, u)
        v = call.key_tile(call.operands.value, problem.value_axes, self.keys, u)
        visible = tile.visible()
        nan_marker = None
        if visible is not None:
            v, nan_marker = finite(v), nan_unless_finite(v)
        logits = tile.logits(q, k, visible, nan_marker)
        m, l, rescale, p = softmax.update(m, l, logits.x)
        keep = tile.keep()
        if keep is not None:
            p = jnp.where(keep, p, 0)
        return acc * rescale[..., None] + self._weighted(p, v), m, l

    def _weighted(self, p, v):
        call, spec = self.call, "kgij,kjd->kgid"
        # A derivative takes delta from the output, so that it must be the sum of the weights that the backward has.
        if call.problem.saves_rounding:
            return wide_product(call, spec, p, v)
        return call.product(spec, p.astype(call.dtype), v)
