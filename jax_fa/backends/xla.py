"""The portable backend: blocked attention in plain JAX, on every platform.

It is the meaning of the op: loops over row tiles and, inside, over those key tiles that some row of the
tile can see. No array of Sq x Skv exists; the largest temporary is one tile of logits for all heads.

Forward, per row tile (Dao et al. 2022, arXiv:2205.14135, algorithm 1; Dao 2023, arXiv:2307.08691):
    s = cap(scale q k^T + bias),  m = max s,  l = sum exp(s - m),  out = sum keep exp(s - m) v / (keep_prob l)
Backward from the saved m and l, with D = rowsum(dout out) - dlogsumexp:
    p = exp(s - m) / l,  dp = keep / keep_prob (dout v^T),  ds = p (dp - D)
    dq = scale ds k,  dk = scale ds^T q,  dv = (keep / keep_prob p)^T dout,  dbias = ds

Masked keys must not be heard even if they hold NaN (padding often does), and 0 * NaN is NaN in a matrix
product. So in masked tiles non-finite numbers enter the products as 0, and where they are visible they come
back through the probabilities: key and query through s anyway, value added to s, dout through 1 / l. A row
that sees a non-finite value is NaN as a whole, with its statistics.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fa import dropout, softmax
from jax_fa.problem import Operands, Problem, Shape, gradient_shape, out_shape
from jax_fa.tiles import Axis, Call, Padding, is_symbolic

name = "xla"
platforms = None  # every one

# Elements of one tile of logits over all batch entries and heads. 2**20 float32 are 4 MiB: large enough to
# keep matrix multiplies busy, small enough for a last-level cache.
TILE_ELEMENTS = 2**20
MIN_TILE, MAX_ROWS, MAX_KEYS = 128, 512, 512
# A call of at most this many logits is one tile, without loops: it compiles in half the time.
ONE_TILE_ELEMENTS = 2**21


def why_not(problem: Problem, operands: Operands, *, platform: str, backward: bool) -> str | None:
    """Nothing is refused."""
    return None


def forward(problem: Problem, operands: Operands):
    """(out, softmax max, softmax sum): out stored in out_axes, the statistics `*B N Sq`."""
    padding = Padding(problem, operands, MIN_TILE)
    if padding.extra:
        results = _forward(Call(problem, padding.operands_padded()))
        d = padding.dims
        stats = (*d.B, d.N, d.Sq)
        shapes = out_shape(problem, d), stats, stats
        return tuple(map(padding.cut, results, shapes))
    return _forward(Call(problem, operands))


def backward(problem: Problem, operands: Operands, out, m, l, dout, dlogsumexp) -> Operands:
    """Gradients of query, key, value and, where present, bias and alibi_slopes."""
    padding = Padding(problem, operands, MIN_TILE)
    if padding.extra:
        out, dout = padding.out(out), padding.out(dout)
        m, l, dlogsumexp = (padding.stats(x) for x in (m, l, dlogsumexp))
        padded = _backward(Call(problem, padding.operands_padded()), out, m, l, dout, dlogsumexp)

        def cut(name, x):
            return padding.cut(x, gradient_shape(problem, padding.dims, name, getattr(operands, name).shape))

        return padded.map(cut)
    return _backward(Call(problem, operands), out, m, l, dout, dlogsumexp)


def _tiling(call: Call) -> tuple[Axis, Axis]:
    d = call.dims
    if any(map(is_symbolic, (call.heads, d.Sq, d.Skv))):
        return Axis.of(d.Sq, MIN_TILE), Axis.of(d.Skv, MIN_TILE)
    if call.heads * d.Sq * d.Skv <= ONE_TILE_ELEMENTS:
        return Axis.of(d.Sq, d.Sq), Axis.of(d.Skv, d.Skv)
    keys = Axis.of(d.Skv, MAX_KEYS)
    rows = TILE_ELEMENTS // max(1, call.heads * keys.tile)
    return Axis.of(d.Sq, max(MIN_TILE, min(MAX_ROWS, rows))), keys


def _loop(bounds: tuple[Any, Any], body, carry):
    """fori_loop; a single known turn is run in line, which compiles faster."""
    first, last = bounds
    if isinstance(first, int) and isinstance(last, int) and last - first == 1:
        return body(first, carry)
    return lax.fori_loop(first, last, body, carry)


def _key_ranges(call: Call, rows: Axis, keys: Axis):
    """A function of a row tile: the first and one past the last key tile that some row of it can see."""
    lower, upper = call.lower, call.upper
    if (lower is None and upper is None) or keys.tile == keys.size:
        return lambda t: (0, keys.count)

    def tiles(bound, reduce):
        """The bound reduced over each row tile, shape (tiles,) or (1,)."""
        bound = jnp.moveaxis(bound, -1, 0)
        if bound.shape[0] == 1:
            return reduce(bound)[None]
        width = rows.tile * math.prod(bound.shape[1:])
        if rows.ragged:
            # Not a NumPy index: a partitioned program must not close over arrays.
            starts = rows.start(jnp.arange(rows.count, dtype=jnp.int32))
            bound = bound[starts[:, None] + jnp.arange(rows.tile, dtype=jnp.int32)]
        return reduce(bound.reshape(rows.count, width), axis=1)

    def at(x, t):
        return x[0] if x.shape[0] == 1 else lax.dynamic_index_in_dim(x, t, keepdims=False)

    first = last = None
    if lower is not None:
        seen = lower if upper is None else jnp.where(lower < upper, lower, keys.size)
        first = tiles(seen, jnp.min) // keys.tile
    if upper is not None:
        seen = upper if lower is None else jnp.where(lower < upper, upper, 0)
        last = (tiles(seen, jnp.max) + keys.tile - 1) // keys.tile
    return lambda t: (0 if first is None else at(first, t), keys.count if last is None else at(last, t))


@dataclass(frozen=True)
class _Tile:
    """Logits of row tile t and key tile u."""

    call: Call
    rows: Axis
    keys: Axis
    t: object
    u: object

    def cut(self, x):
        """The tile's part of an array `... #Sq #Skv`."""
        return self.keys.cut(self.rows.cut(x, -2, self.t), -1, self.u)

    def visible(self):
        """Boolean `*#B #K #G #rows #keys`, or None if every pair is visible for sure."""
        call = self.call
        j = self.keys.positions(self.u)
        terms = [self.keys.fresh(self.u)]
        if call.lower is not None:
            terms.append(j >= self.rows.cut(call.lower, -1, self.t)[..., None])
        if call.upper is not None:
            terms.append(j < self.rows.cut(call.upper, -1, self.t)[..., None])
        if call.mask is not None:
            terms.append(self.cut(call.mask))
        return _all(*terms)

    def distance(self):
        """What an ALiBi slope multiplies."""
        i, j = self.rows.positions(self.t), self.keys.positions(self.u)
        away = jnp.abs(j - i[:, None]).astype(self.call.acc)
        return jnp.sqrt(away) if self.call.problem.alibi == "sqrt" else away

    def logits(self, q, k, visible, poison=None):
        """Logits with -inf where masked, and the derivative of the soft cap (or None).

        `poison` (`*#B K keys`, 0 or NaN) is added to the logits of its keys.
        """
        problem, call = self.call.problem, self.call
        s = call.product("kgid,kjd->kgij", q, k) * jnp.asarray(problem.scale, call.acc)
        if call.bias is not None:
            s = s + self.cut(call.bias).astype(call.acc)
        if call.slopes is not None:
            s = s - call.slopes[..., None, None].astype(call.acc) * self.distance()
        slope = None
        if problem.logits_soft_cap is not None:
            tanh = jnp.tanh(s / problem.logits_soft_cap)
            s, slope = problem.logits_soft_cap * tanh, 1 - tanh * tanh
        if poison is not None:
            s = s + poison[..., None, None, :].astype(call.acc)
        return (s if visible is None else jnp.where(visible, s, -jnp.inf)), slope

    def keep(self):
        """Keep bits of the tile, or None without dropout."""
        call, operands = self.call, self.call.operands
        first, columns = self.keys.start(self.u), self.keys.tile
        seeded = explicit = None
        if operands.dropout_seed is not None:
            seed = call.squeeze(operands.dropout_seed)[..., None, None, :]
            stream = call.by_head(operands.dropout_stream)
            rows = self.rows.positions(self.t)
            seeded = dropout.keep_tile(seed, stream, rows, first, columns, call.problem.keep_prob)
        if operands.drop_bits is not None:
            bits = call.squeeze(operands.drop_bits)[..., None, None, :]
            offset = self.rows.cut(call.by_head(operands.drop_offset), -2, self.t)
            explicit = dropout.explicit_keep_tile(bits, offset, first, columns)
        return _all(seeded, explicit)


def _all(*terms):
    """The conjunction of those terms that are given; None if none is."""
    result = None
    for term in terms:
        result = term if result is None else result if term is None else result & term
    return result


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0)


def _nan_unless_finite(x):
    """0 for each vector (last axis) of finite numbers, NaN for any other."""
    return jnp.sum(x * jnp.zeros((), x.dtype), axis=-1)


def _forward(call: Call):
    problem, operands, d = call.problem, call.operands, call.dims
    shape, stats = (*call.B, d.K, d.G, d.Sq), (*d.B, d.N, d.Sq)
    out = call.stored(jnp.zeros((*shape, d.Dv), call.dtype), problem.out_axes)
    m, l = softmax.start(shape, call.acc)
    if call.empty:
        return out, m.reshape(stats), l.reshape(stats)
    rows, keys = _tiling(call)
    key_range = _key_ranges(call, rows, keys)
    seq = problem.out_axes[problem.batch_rank]

    def row_tile(t, carry):
        out, m, l = carry
        q = call.query_tile(operands.query, problem.query_axes, rows, t)

        def key_tile(u, carry):
            acc, m, l = carry
            tile = _Tile(call, rows, keys, t, u)
            k = call.key_tile(operands.key, problem.key_axes, keys, u)
            v = call.key_tile(operands.value, problem.value_axes, keys, u)
            visible = tile.visible()
            poison = None
            if visible is not None:
                v, poison = _finite(v), _nan_unless_finite(v)
            logits, _ = tile.logits(q, k, visible, poison)
            m, l, rescale, p = softmax.update(m, l, logits)
            keep = tile.keep()
            if keep is not None:
                p = jnp.where(keep, p, 0)
            return acc * rescale[..., None] + call.product("kgij,kjd->kgid", p.astype(call.dtype), v), m, l

        part = (*call.B, d.K, d.G, rows.tile)
        start = (jnp.zeros((*part, d.Dv), call.acc), *softmax.start(part, call.acc))
        acc, m_tile, l_tile = _loop(key_range(t), key_tile, start)
        out_tile = softmax.finish(acc, l_tile * problem.keep_prob).astype(call.dtype)
        return (
            rows.put(out, call.stored(out_tile, problem.out_axes), seq, t),
            rows.put(m, m_tile, -1, t),
            rows.put(l, l_tile, -1, t),
        )

    out, m, l = _loop((0, rows.count), row_tile, (out, m, l))
    return out, m.reshape(stats), l.reshape(stats)


@dataclass(frozen=True)
class _Saved:
    """What the backward has besides the operands: out and dout as stored, the rest `*B K G Sq`."""

    out: object
    dout: object
    m: object
    l: object
    dlogsumexp: object


def _backward(call: Call, out, m, l, dout, dlogsumexp) -> Operands:
    saved = _Saved(out, dout, *(call.by_head(x) for x in (m, l, dlogsumexp)))
    gradients = _zero_gradients(call)
    if not call.empty:
        gradients = _sum_tiles(call, saved, gradients)

    def finish(name, gradient):
        operand = getattr(call.operands, name)
        if name in ("key", "value"):
            gradient = call.stored(gradient, getattr(call.problem, f"{name}_axes"))
        shape = gradient_shape(call.problem, call.dims, name, operand.shape)
        return gradient.reshape(shape).astype(operand.dtype)

    return gradients.map(finish)


def _sum_tiles(call: Call, saved: _Saved, zeros: Operands) -> Operands:
    problem, operands, d = call.problem, call.operands, call.dims
    rows, keys = _tiling(call)
    key_range = _key_ranges(call, rows, keys)
    seq = problem.query_axes[problem.batch_rank]
    scale = jnp.asarray(problem.scale, call.acc)
    masked = rows.ragged or keys.ragged or any(x is not None for x in (call.lower, call.upper, call.mask))

    def row_tile(t, carry):
        dq_all, gradients = carry
        q = call.query_tile(operands.query, problem.query_axes, rows, t)
        out = call.query_tile(saved.out, problem.out_axes, rows, t)
        dout = call.query_tile(saved.dout, problem.out_axes, rows, t)
        delta = jnp.sum(out.astype(call.acc) * dout.astype(call.acc), axis=-1)
        if saved.dlogsumexp is not None:
            delta = delta - rows.cut(saved.dlogsumexp, -1, t).astype(call.acc)
        m = rows.cut(saved.m, -1, t)
        inverse = softmax.inverse(rows.cut(saved.l, -1, t))
        fresh = rows.fresh(t)
        fresh = None if fresh is None else fresh[:, None]
        q_clean, dout_clean = q, dout
        if masked:
            inverse = inverse + _nan_unless_finite(dout).astype(call.acc)
            q_clean, dout_clean = _finite(q), _finite(dout)

        def key_tile(u, carry):
            dq, gradients = carry
            tile = _Tile(call, rows, keys, t, u)
            k = call.key_tile(operands.key, problem.key_axes, keys, u)
            v = call.key_tile(operands.value, problem.value_axes, keys, u)
            visible = tile.visible()
            logits, slope = tile.logits(q, k, visible)
            p = jnp.exp(logits - m[..., None]) * inverse[..., None]
            dp = call.product("kgid,kjd->kgij", dout, v)
            weights, keep = p, tile.keep()
            if keep is not None:
                weights = jnp.where(keep, p / problem.keep_prob, 0)
                dp = jnp.where(keep, dp / problem.keep_prob, 0)
            ds = p * (dp - delta[..., None])
            if slope is not None:
                ds = ds * slope
            counted = _all(visible, fresh)
            if counted is not None:
                ds, weights = jnp.where(counted, ds, 0), jnp.where(counted, weights, 0)
            if masked:
                k = _finite(k)
            narrow = ds.astype(call.dtype)
            dq = dq + call.product("kgij,kjd->kgid", narrow, k)
            dk = call.product("kgij,kgid->kjd", narrow, q_clean)
            dv = call.product("kgij,kgid->kjd", weights.astype(call.dtype), dout_clean)
            return dq, _add_tile(tile, gradients, dk * scale, dv, ds)

        part = jnp.zeros((*call.B, d.K, d.G, rows.tile, d.D), call.acc)
        dq, gradients = _loop(key_range(t), key_tile, (part, gradients))
        dq = (dq * scale).astype(call.dtype)
        if fresh is not None:  # the previous tile has the gradient of the rows both share
            before = call.query_tile(dq_all, problem.query_axes, rows, t)
            dq = jnp.where(fresh, dq, before)
        return rows.put(dq_all, call.stored(dq, problem.query_axes), seq, t), gradients

    start = (zeros.query, replace(zeros, query=None))
    dq, gradients = _loop((0, rows.count), row_tile, start)
    return replace(gradients, query=dq)


def _zero_gradients(call: Call) -> Operands:
    """Query's gradient as stored; accumulators `*B ...` that keep the dims in which bias and slopes broadcast."""
    d, problem = call.dims, call.problem

    def like(x):
        if x is None:
            return None
        full = [call.B[at] if i < problem.mapped else x.shape[at] for at, i in enumerate(call.kept)]
        return jnp.zeros((*full, *x.shape[len(full) :]), call.acc)

    query = jnp.zeros((*call.B, d.K, d.G, d.Sq, d.D), call.dtype)
    return Operands(
        query=call.stored(query, problem.query_axes),
        key=jnp.zeros((*call.B, d.K, d.Skv, d.D), call.acc),
        value=jnp.zeros((*call.B, d.K, d.Skv, d.Dv), call.acc),
        bias=like(call.bias),
        alibi_slopes=like(call.slopes),
    )


def _add_tile(tile: _Tile, gradients: Operands, dk, dv, ds) -> Operands:
    """The gradients with one tile's part added; ds is summed over the dims in which bias broadcasts."""

    def along_keys(total, part):
        if total.shape == part.shape:
            return total + part
        before = tile.keys.cut(total, -2, tile.u)
        return tile.keys.put(total, before + part, -2, tile.u)

    changes = {"key": along_keys(gradients.key, dk), "value": along_keys(gradients.value, dv)}
    if gradients.bias is not None:
        changes["bias"] = _add_bias(tile, gradients.bias, ds)
    if gradients.alibi_slopes is not None:
        slopes = gradients.alibi_slopes
        part = _sum_to(-ds * tile.distance(), (*slopes.shape, 1, 1))
        changes["alibi_slopes"] = slopes + part.reshape(slopes.shape)
    return replace(gradients, **changes)


def _add_bias(tile: _Tile, dbias, ds):
    part = _sum_to(
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


def _sum_to(x, shape: Shape):
    axes = [axis for axis, (a, b) in enumerate(zip(x.shape, shape, strict=True)) if a != b]
    return jnp.sum(x, axis=axes, keepdims=True) if axes else x
