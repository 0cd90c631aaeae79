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
    problem, operands, d = call.problem, call.operands, call.dims
    shape, stats = (*call.B, d.K, d.G, d.Sq), (*d.B, d.N, d.Sq)
    out = call.stored(jnp.zeros((*shape, d.Dv), call.dtype), problem.out_axes)
    outs = (out, out) if problem.saves_rounding else (out,)
    m, l = softmax.start(shape, call.acc)
    if call.empty:
        return outs[0], m.reshape(stats), l.reshape(stats), *outs[1:]
    rows, keys = tiling(call)
    key_range = key_ranges(call, rows, keys)
    seq = problem.out_axes[problem.batch_rank]

    def weighted(spec: str, p, v):
        # A derivative takes delta from the output, so that it must be the sum of the weights that the backward has.
        return (
            wide_product(call, spec, p, v)
            if problem.saves_rounding
            else call.product(spec, p.astype(call.dtype), v)
        )

    def row_tile(t, carry):
        outs, m, l = carry
        q = call.query_tile(operands.query, problem.query_axes, rows, t)

        def key_tile(u, carry):
            acc, m, l = carry
            tile = Tile(call, rows, keys, t, u)
            k = call.key_tile(operands.key, problem.key_axes, keys, u)
            v = call.key_tile(operands.value, problem.value_axes, keys, u)
            visible = tile.visible()
            nan_marker = None
            if visible is not None:
                v, nan_marker = finite(v), nan_unless_finite(v)
            logits = tile.logits(q, k, visible, nan_marker)
            m, l, rescale, p = softmax.update(m, l, logits.x)
            keep = tile.keep()
            if keep is not None:
                p = jnp.where(keep, p, 0)
            return acc * rescale[..., None] + weighted("kgij,kjd->kgid", p, v), m, l

        part = (*call.B, d.K, d.G, rows.tile)
        start = (jnp.zeros((*part, d.Dv), call.acc), *softmax.start(part, call.acc))
        acc, m_tile, l_tile = loop(key_range(t), key_tile, start)
        exact = softmax.finish(acc, l_tile)
        if call.keep_prob is not None:
            exact = exact / call.keep_prob
        tiles = [exact.astype(call.dtype)]
        if problem.saves_rounding:
            narrow, lost = narrowed(exact, call.dtype)
            tiles = [narrow, (lost / rounding_unit(call.dtype)).astype(call.dtype)]
        return (
            tuple(
                rows.put(x, call.stored(tile, problem.out_axes), seq, t)
                for x, tile in zip(outs, tiles, strict=True)
            ),
            rows.put(m, m_tile, -1, t),
            rows.put(l, l_tile, -1, t),
        )

    outs, m, l = loop((0, rows.count), row_tile, (outs, m, l))
    return outs[0], m.reshape(stats), l.reshape(stats), *outs[1:]
