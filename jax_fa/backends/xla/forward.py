"""The forward: a loop over row tiles and, inside, over key tiles."""

from typing import Any

import jax.numpy as jnp

from jax_fa import softmax
from jax_fa.backends.xla.canonical import Canonical
from jax_fa.backends.xla.logits import Tile, finite, nan_unless_finite
from jax_fa.backends.xla.products import wide_product
from jax_fa.backends.xla.tiling import key_ranges, loop, tiling
from jax_fa.call import narrowed, rounding_unit


def forward(call: Canonical) -> tuple[Any, ...]:
    """out stored in out_axes, softmax max and sum `*B N Sq`, and rounding like out if the problem says so."""
    problem, d = call.problem, call.dims
    shape, stats = (*call.B, d.K, d.G, d.Sq), (*d.B, d.N, d.Sq)
    out = call.stored(jnp.zeros((*shape, d.Dv), call.dtype), problem.out_axes)
    outs = (out, out) if problem.saves_rounding else (out,)
    m, l = softmax.start(shape, call.acc)
    if not call.empty:
        outs, m, l = _Sums(call).of(outs, m, l)
    return outs[0], m.reshape(stats), l.reshape(stats), *outs[1:]


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
        call, problem, rows, d = self.call, self.call.problem, self.rows, self.call.dims
        q = call.query_tile(call.operands.query, problem.query_axes, rows, t)
        part = (*call.B, d.K, d.G, rows.tile)
        start = (jnp.zeros((*part, d.Dv), call.acc), *softmax.start(part, call.acc))
        acc, m_tile, l_tile = loop(key_range, lambda u, carry: self._key_tile(q, t, u, *carry), start)
        exact = softmax.finish(acc, l_tile)
        if call.keep_prob is not None:
            exact = exact / call.keep_prob
        tiles = [exact.astype(call.dtype)]
        if problem.saves_rounding:
            narrow, lost = narrowed(exact, call.dtype)
            tiles = [narrow, (lost / rounding_unit(call.dtype)).astype(call.dtype)]
        seq = problem.out_axes[problem.batch_rank]
        stored = (call.stored(tile, problem.out_axes) for tile in tiles)
        outs = tuple(rows.put(x, tile, seq, t) for x, tile in zip(outs, stored, strict=True))
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
