"""The portable backend: blocked attention in plain JAX, on every platform.

It is the meaning of the op: loops over row tiles and, inside, over those key tiles that some row of the
tile can see. No array of Sq x Skv exists; the largest temporary is one tile of logits for all heads.

Forward, per row tile (Dao et al. 2022, arXiv:2205.14135, algorithm 1; Dao 2023, arXiv:2307.08691):
    s = cap(scale q k^T + bias),  m = max s,  l = sum exp(s - m),  out = sum keep exp(s - m) v / (keep_prob l)
Backward from the saved m and l, with D = rowsum(dout out) - dlogsumexp, out as it was before rounding:
    p = exp(s - m) / l,  dp = keep / keep_prob (dout v^T),  ds = p (dp - D)
    dq = scale ds k,  dk = scale ds^T q,  dv = (keep / keep_prob p)^T dout,  dbias = ds

Rows of ds sum to 0 (to dlogsumexp), so that what all keys have in common cancels in dq. Rounding to 16 bits would leave
some of it, in p v (of which D is made) as well as in ds k: under differentiation both take their weights wide.

NaN in masked positions (padding often holds it) must not propagate, and 0 * NaN is NaN in a matrix product. So in
masked tiles non-finite values enter the products as 0, and where they are visible they come back through the
probabilities: key and query through s anyway, value added to s, dout through 1 / l. A row with a visible non-finite
value is NaN as a whole, with its statistics.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fa import dropout, softmax
from jax_fa.backends.xla.tiles import Axis, Canonical, Padding
from jax_fa.call import Call, Operands, Saved, is_symbolic, narrowed, rounding_unit, sum_to
from jax_fa.indices import add_last, take_last

# Elements of one tile of logits over all batch entries and heads. 2**20 float32 are 4 MiB: large enough to
# keep matrix multiplies busy, small enough for a last-level cache.
TILE_ELEMENTS = 2**20
MIN_TILE, MAX_ROWS, MAX_KEYS = 128, 512, 512
# A call of at most this many logits is one tile, without loops: it compiles in half the time. Not where rows are longer
# than this: sums over keys are more accurate tile by tile.
ONE_TILE_ELEMENTS, ONE_TILE_KEYS = 2**21, 2**14


class Xla:
    """See `backends.Backend`."""

    name = "xla"
    platforms = None
    emulated_on = ()

    def why_not(self, call: Call, *, platform: str, what: str) -> str | None:
        """Nothing is refused."""
        return None

    def notes(self, call: Call) -> tuple[str, ...]:
        return ()

    def forward(self, call: Call) -> tuple[Any, ...]:
        padding = Padding(call, MIN_TILE)
        if not padding.extra:
            return _forward(Canonical(call))
        results = _forward(Canonical(padding.padded()))
        shapes = (call.out_shape, call.stats_shape, call.stats_shape, call.out_shape)
        return tuple(padding.cut(x, shape) for x, shape in zip(results, shapes, strict=False))

    def backward(self, call: Call, saved: Saved) -> Operands:
        padding = Padding(call, MIN_TILE)
        if not padding.extra:
            return _backward(Canonical(call), saved)
        padded = _backward(Canonical(padding.padded()), padding.saved(saved))
        return padded.map(lambda name, x: padding.cut(x, call.gradient_shape(name)))


backend = Xla()


def _tiling(call: Canonical) -> tuple[Axis, Axis]:
    d = call.dims
    if any(map(is_symbolic, (call.heads, d.Sq, d.Skv))):
        return Axis.of(d.Sq, MIN_TILE), Axis.of(d.Skv, MIN_TILE)
    if call.heads * d.Sq * d.Skv <= ONE_TILE_ELEMENTS and d.Skv <= ONE_TILE_KEYS:
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


def _key_ranges(call: Canonical, rows: Axis, keys: Axis):
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

    call: Canonical
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
        if call.segment_row is not None:
            row = self.rows.cut(call.segment_row, -1, self.t)[..., None]
            terms.append((row < 0) | (row == self.keys.cut(call.segment_key, -1, self.u)[..., None, :]))
        return _all(*terms)

    def distance(self):
        """What an ALiBi slope multiplies."""
        i, j = self.rows.positions(self.t), self.keys.positions(self.u)
        if self.call.position is not None:
            i = self.rows.cut(self.call.position, -1, self.t)
        away = jnp.abs(j - i[..., None]).astype(self.call.acc)
        return jnp.sqrt(away) if self.call.problem.alibi == "sqrt" else away

    def bias_index(self):
        """Where an indexed bias holds this tile's: `*#B #K #G rows keys`."""
        offset = self.rows.cut(self.call.bias_offset, -1, self.t)
        shape = (*offset.shape[:-1], self.rows.tile)
        return jnp.broadcast_to(offset, shape)[..., None] + self.keys.positions(self.u)

    def bias(self):
        call = self.call
        if call.bias is None:
            return None
        indexed = call.bias_offset is not None
        bias = take_last(call.bias, self.bias_index()) if indexed else self.cut(call.bias)
        return bias.astype(call.acc)

    def slopes(self):
        """ALiBi slopes of the rows, over the tile."""
        return self.rows.cut(self.call.slopes, -1, self.t)[..., None].astype(self.call.acc)

    def logits(self, q, k, visible, nan_marker=None) -> "_Logits":
        """`nan_marker` (`*#B K keys`, 0 or NaN) is added to the logits of its keys."""
        call = self.call
        product = call.product("kgid,kjd->kgij", q, k)
        s = product * call.scale
        if (bias := self.bias()) is not None:
            s = s + bias
        if call.slopes is not None:
            s = s - self.slopes() * self.distance()
        slope = cap_slope = None
        if (cap := call.soft_cap) is not None:
            x = s / cap
            tanh = jnp.tanh(x)
            s, slope = cap * tanh, 1 - tanh * tanh
            cap_slope = tanh - jnp.where(slope == 0, 0, x * slope)  # x may be infinite
            if bias is not None:  # -inf masks a key, whatever comes after
                s = jnp.where(bias == -jnp.inf, -jnp.inf, s)
        if nan_marker is not None:
            s = s + nan_marker[..., None, None, :].astype(call.acc)
        s = s if visible is None else jnp.where(visible, s, -jnp.inf)
        return _Logits(s, product, slope, cap_slope)

    def keep(self):
        """Keep bits of the tile, or None without dropout."""
        call, operands = self.call, self.call.operands
        first, columns = self.keys.start(self.u), self.keys.tile
        seeded = explicit = None
        if operands.dropout_seed is not None:
            seed = call.squeeze(operands.dropout_seed)[..., None, None, :]
            stream = call.by_head(operands.dropout_stream)
            rows = self.rows.positions(self.t)
            seeded = dropout.keep_tile(seed, stream, rows, first, columns, call.keep_limit)
        if operands.drop_bits is not None:
            bits = call.squeeze(operands.drop_bits)[..., None, None, :]
            offset = self.rows.cut(call.by_head(operands.drop_offset), -2, self.t)
            explicit = dropout.explicit_keep_tile(bits, offset, first, columns)
        return _all(seeded, explicit)


class _Logits(NamedTuple):
    x: Any  # logits, -inf where masked
    product: Any  # q k^T
    slope: Any  # the derivative of the soft cap by the logits; None without a cap
    cap_slope: Any  # ... and by the cap


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


def _forward(call: Canonical) -> tuple[Any, ...]:
    problem, operands, d = call.problem, call.operands, call.dims
    shape, stats = (*call.B, d.K, d.G, d.Sq), (*d.B, d.N, d.Sq)
    out = call.stored(jnp.zeros((*shape, d.Dv), call.dtype), problem.out_axes)
    outs = (out, out) if problem.saves_rounding else (out,)
    m, l = softmax.start(shape, call.acc)
    if call.empty:
        return outs[0], m.reshape(stats), l.reshape(stats), *outs[1:]
    rows, keys = _tiling(call)
    key_range = _key_ranges(call, rows, keys)
    seq = problem.out_axes[problem.batch_rank]

    def weighted(spec: str, p, v):
        # A derivative takes delta from the output, so that it must be the sum of the weights that the backward has.
        return (
            _wide_product(call, spec, p, v)
            if problem.saves_rounding
            else call.product(spec, p.astype(call.dtype), v)
        )

    def row_tile(t, carry):
        outs, m, l = carry
        q = call.query_tile(operands.query, problem.query_axes, rows, t)

        def key_tile(u, carry):
            acc, m, l = carry
            tile = _Tile(call, rows, keys, t, u)
            k = call.key_tile(operands.key, problem.key_axes, keys, u)
            v = call.key_tile(operands.value, problem.value_axes, keys, u)
            visible = tile.visible()
            nan_marker = None
            if visible is not None:
                v, nan_marker = _finite(v), _nan_unless_finite(v)
            logits = tile.logits(q, k, visible, nan_marker)
            m, l, rescale, p = softmax.update(m, l, logits.x)
            keep = tile.keep()
            if keep is not None:
                p = jnp.where(keep, p, 0)
            return acc * rescale[..., None] + weighted("kgij,kjd->kgid", p, v), m, l

        part = (*call.B, d.K, d.G, rows.tile)
        start = (jnp.zeros((*part, d.Dv), call.acc), *softmax.start(part, call.acc))
        acc, m_tile, l_tile = _loop(key_range(t), key_tile, start)
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

    outs, m, l = _loop((0, rows.count), row_tile, (outs, m, l))
    return outs[0], m.reshape(stats), l.reshape(stats), *outs[1:]


def _backward(call: Canonical, saved: Saved) -> Operands:
    gradients = _zero_gradients(call)
    if not call.empty:
        gradients = _sum_tiles(call, saved, gradients)

    def finish(name, gradient):
        operand = getattr(call.operands, name)
        if name in ("key", "value"):
            gradient = call.stored(gradient, call.problem.axes(name))
        return gradient.reshape(call.call.gradient_shape(name)).astype(operand.dtype)

    return gradients.map(finish)


def _sum_tiles(call: Canonical, saved: Saved, zeros: Operands) -> Operands:
    problem, operands, d = call.problem, call.operands, call.dims
    rows, keys = _tiling(call)
    key_range = _key_ranges(call, rows, keys)
    seq = problem.query_axes[problem.batch_rank]
    rules = (call.lower, call.upper, call.mask, call.segment_row)
    masked = rows.ragged or keys.ragged or any(x is not None for x in rules)
    stats = {name: call.by_head(getattr(saved, name)) for name in ("m", "l", "dlogsumexp")}

    def row_tile(t, carry):
        dq_all, gradients = carry
        q = call.query_tile(operands.query, problem.query_axes, rows, t)
        out = call.query_tile(saved.out, problem.out_axes, rows, t).astype(call.acc)
        if saved.rounding is not None:
            lost = call.query_tile(saved.rounding, problem.out_axes, rows, t).astype(call.acc)
            out = out + lost * rounding_unit(call.dtype)
        dout = call.query_tile(saved.dout, problem.out_axes, rows, t)
        delta = jnp.sum(out * dout.astype(call.acc), axis=-1)
        if stats["dlogsumexp"] is not None:
            delta = delta - rows.cut(stats["dlogsumexp"], -1, t).astype(call.acc)
        m = rows.cut(stats["m"], -1, t)
        inverse = softmax.inverse(rows.cut(stats["l"], -1, t))
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
            logits = tile.logits(q, k, visible)
            p = jnp.exp(logits.x - m[..., None]) * inverse[..., None]
            dp = call.product("kgid,kjd->kgij", dout, v)
            weights, keep = p, tile.keep()
            if keep is not None:
                divisor = 1 if call.keep_prob is None else call.keep_prob
                weights = jnp.where(keep, p / divisor, 0)
                dp = jnp.where(keep, dp / divisor, 0)
            counted = _all(visible, fresh)

            def count(x):
                return x if counted is None else jnp.where(counted, x, 0)

            ds = dcapped = count(p * (dp - delta[..., None]))
            if logits.slope is not None:
                ds = count(ds * logits.slope)
            if masked:
                k = _finite(k)
            dq = dq + _wide_product(call, "kgij,kjd->kgid", ds, k)
            dk = _times_scale(call, ds, q_clean)
            dv = call.product("kgij,kgid->kjd", count(weights).astype(call.dtype), dout_clean)
            return dq, _add_tile(tile, gradients, _Parts(dk, dv, ds, dcapped, logits))

        part = jnp.zeros((*call.B, d.K, d.G, rows.tile, d.D), call.acc)
        dq, gradients = _loop(key_range(t), key_tile, (part, gradients))
        dq = (dq * call.scale).astype(call.dtype)
        if fresh is not None:  # the previous tile has the gradient of the rows both share
            before = call.query_tile(dq_all, problem.query_axes, rows, t)
            dq = jnp.where(fresh, dq, before)
        return rows.put(dq_all, call.stored(dq, problem.query_axes), seq, t), gradients

    start = (zeros.query, replace(zeros, query=None))
    dq, gradients = _loop((0, rows.count), row_tile, start)
    return replace(gradients, query=dq)


def _wide_product(call: Canonical, spec: str, x, y):
    """The product of wide x and y; in 16-bit calls x is rounded twice, which costs less than 32-bit products.

    (Not on CPU, where XLA widens 16-bit products anyway.)
    """
    if call.dtype == call.acc:
        return call.product(spec, x, y)

    def split(x, y):
        high, low = narrowed(x, call.dtype)
        low = jnp.where(jnp.isfinite(low), low, 0).astype(call.dtype)
        return call.product(spec, high, y) + call.product(spec, low, y)

    return lax.platform_dependent(x, y, cpu=partial(call.product, spec), default=split)


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
    logits: _Logits


def _add_tile(tile: _Tile, gradients: Operands, parts: _Parts) -> Operands:
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


def _add_bias(tile: _Tile, dbias, ds):
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
