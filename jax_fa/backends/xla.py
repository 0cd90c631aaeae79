"""The portable backend: blocked attention in plain JAX, on every platform.

It is the meaning of the op: loops over row tiles and, inside, over those key tiles that some row of the
tile can see. No array of Sq x Skv exists; the largest temporary is one tile of logits for all heads.

Forward, per row tile (Dao et al. 2022, arXiv:2205.14135, algorithm 1; Dao 2023, arXiv:2307.08691):
    s = cap(scale q k^T + bias),  m = max s,  l = sum exp(s - m),  out = sum keep exp(s - m) v / (keep_prob l)
Backward from the saved m and l, with D = rowsum(dout out) - dlogsumexp:
    p = exp(s - m) / l,  dp = keep / keep_prob (dout v^T),  ds = p (dp - D)
    dq = scale ds k,  dk = scale ds^T q,  dv = (keep / keep_prob p)^T dout,  dbias = ds
"""

import math
import string
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp
from jax import lax

from jax_fa import dropout, softmax
from jax_fa.problem import Dims, Operands, Problem, accumulator_dtype, dims, gradient_shape

name = "xla"
platforms = None  # every one

# Elements of one tile of logits over all batch entries and heads. 2**20 float32 are 4 MiB: large enough to
# keep matrix multiplies busy, small enough for a last-level cache.
TILE_ELEMENTS = 2**20
MIN_TILE, MAX_ROWS, MAX_KEYS = 128, 512, 512


def why_not(problem: Problem, operands: Operands) -> str | None:
    """Nothing is refused."""
    return None


def forward(problem: Problem, operands: Operands):
    """(out, softmax max, softmax sum): out stored in out_axes, the statistics `*B N Sq`."""
    call = _Call(problem, operands)
    return call.store_out(*_forward(call))


def backward(problem: Problem, operands: Operands, out, m, l, dout, dlogsumexp) -> Operands:
    """Gradients of query, key, value and, where present, bias and alibi_slopes."""
    call = _Call(problem, operands)
    return call.store_gradients(_backward(call, out, m, l, dout, dlogsumexp))


@dataclass(frozen=True)
class _Axis:
    """Tiles of one sequence axis. The last tile is moved back to end with the axis, so tiles can overlap."""

    size: int
    tile: int

    @property
    def count(self) -> int:
        return -(-self.size // self.tile)

    def start(self, t):
        return jnp.minimum(t * self.tile, self.size - self.tile) if self.ragged else t * self.tile

    @property
    def ragged(self) -> bool:
        return self.count * self.tile != self.size


class _Call:
    """The operands in canonical order, heads split as K x G, batch dims of size 1 left out."""

    def __init__(self, problem: Problem, operands: Operands) -> None:
        self.problem, self.operands = problem, operands
        self.dims: Dims = dims(problem, operands)
        self.dtype = operands.query.dtype
        self.acc = accumulator_dtype(self.dtype)
        self.kept = tuple(i for i, size in enumerate(self.dims.B) if size != 1)
        self.B = tuple(self.dims.B[i] for i in self.kept)
        d = self.dims
        q = self._canonical(operands.query, problem.query_axes)
        self.query = q.reshape(*q.shape[:-2], d.K, d.G, d.D).swapaxes(-4, -3).swapaxes(-3, -2)  # K G Sq D
        self.key = self._canonical(operands.key, problem.key_axes).swapaxes(-3, -2)  # K Skv D
        self.value = self._canonical(operands.value, problem.value_axes).swapaxes(-3, -2)
        self.bias = self._rows(operands.bias)
        self.mask = self._rows(operands.mask)
        self.lower, self.upper = self._rows(operands.lower), self._rows(operands.upper)
        self.slopes = self._rows(operands.alibi_slopes)
        self.seed = self._squeeze(operands.dropout_seed)
        self.stream = self._rows(operands.dropout_stream)
        self.drop_bits = self._squeeze(operands.drop_bits)
        self.drop_offset = self._rows(operands.drop_offset)

    @property
    def masked(self) -> bool:
        """Whether any pair of row and key may be masked, also by a tile that overlaps the one before."""
        given = (self.lower, self.upper, self.mask)
        return any(x is not None for x in given) or self.tiles[1].ragged

    @cached_property
    def tiles(self) -> tuple[_Axis, _Axis]:
        d = self.dims
        heads = max(1, math.prod(self.B) * d.N)
        keys = min(d.Skv, MAX_KEYS)
        rows = TILE_ELEMENTS // (heads * max(1, keys)) // 32 * 32
        rows = min(d.Sq, max(MIN_TILE, min(MAX_ROWS, rows)))
        return _Axis(d.Sq, rows), _Axis(d.Skv, keys)

    # --- storage order <-> canonical order

    def _squeeze(self, x):
        if x is None:
            return None
        rank = self.problem.batch_rank
        return x.reshape(tuple(x.shape[i] for i in self.kept) + x.shape[rank:])

    def _canonical(self, x, axes):
        return self._squeeze(x.transpose(axes))

    def _rows(self, x):
        """`*#B #N ...` -> `*#B #K #G ...`."""
        if x is None:
            return None
        x = self._squeeze(x)
        at = len(self.B)
        heads = (self.dims.K, self.dims.G) if x.shape[at] != 1 else (1, 1)
        return x.reshape(*x.shape[:at], *heads, *x.shape[at + 1 :])

    def store_out(self, out, m, l):
        d, B = self.dims, self.dims.B
        out = jnp.moveaxis(out.reshape(*B, d.N, d.Sq, d.Dv), -2, -3)
        axes = self.problem.out_axes
        stats = (*B, d.N, d.Sq)
        return out.transpose([axes.index(i) for i in range(len(axes))]), m.reshape(stats), l.reshape(stats)

    def canonical_out(self, x):
        """An array shaped like out, as `*B K G Sq Dv`."""
        d = self.dims
        x = self._canonical(x, self.problem.out_axes)
        return x.reshape(*x.shape[:-2], d.K, d.G, d.Dv).swapaxes(-4, -3).swapaxes(-3, -2)

    def canonical_stats(self, x):
        return self._rows(x)

    def store_gradients(self, gradients: Operands) -> Operands:
        d, problem = self.dims, self.problem

        def store(name, g):
            given = getattr(self.operands, name)
            shape = gradient_shape(problem, d, name, given.shape)
            if name not in ("query", "key", "value"):
                return g.reshape(shape).astype(given.dtype)
            axes = getattr(problem, f"{name}_axes")
            heads, length = (d.N, d.Sq) if name == "query" else (d.K, d.Skv)
            g = g.astype(given.dtype).reshape(*d.B, heads, length, g.shape[-1])
            g = jnp.moveaxis(g, -2, -3).transpose([axes.index(i) for i in range(len(axes))])
            return g.reshape(shape)

        return gradients.map(store)

    # --- products over the batch dims an operand has

    def product(self, spec: str, x, y):
        """einsum over `*#B` operands, e.g. "kgid,kjd->kgij", accumulated in acc; batch dims of size 1 broadcast."""
        letters = string.ascii_uppercase[: len(self.B)]
        inputs, output = spec.split("->")
        names = []
        operands = []
        for part, operand in zip(inputs.split(","), (x, y), strict=True):
            lead = operand.shape[: len(self.B)]
            names.append("".join(c for c, size in zip(letters, lead, strict=True) if size != 1) + part)
            operands.append(operand.reshape([s for s in lead if s != 1] + list(operand.shape[len(self.B) :])))
        present = "".join(c for c in letters if any(c in n for n in names))
        result = jnp.einsum(f"{','.join(names)}->{present}{output}", *operands, preferred_element_type=self.acc)
        shape = iter(result.shape)
        return result.reshape([next(shape) if c in present else 1 for c in letters] + list(shape))


@dataclass(frozen=True)
class _Tile:
    """What a tile of logits needs besides q and k: positions, visibility, keep bits."""

    call: _Call
    rows: _Axis
    keys: _Axis
    t: object
    u: object

    @property
    def i(self):
        return self.rows.start(self.t) + jnp.arange(self.rows.tile, dtype=jnp.int32)

    @property
    def j(self):
        return self.keys.start(self.u) + jnp.arange(self.keys.tile, dtype=jnp.int32)

    def cut(self, x):
        """The tile's part of an array `... #Sq #Skv`."""
        return self.keys_of(self.rows_of(x, -2), -1)

    def rows_of(self, x, axis: int):
        return _slice(x, axis, self.rows, self.t)

    def keys_of(self, x, axis: int):
        return _slice(x, axis, self.keys, self.u)

    def visible(self):
        """Boolean `*#B #K #G #rows #keys`, or None where every pair of the tile is visible for sure."""
        call = self.call
        terms = []
        if call.lower is not None:
            terms.append(self.j >= self.rows_of(call.lower, -1)[..., None])
        if call.upper is not None:
            terms.append(self.j < self.rows_of(call.upper, -1)[..., None])
        if call.mask is not None:
            terms.append(self.cut(call.mask))
        if self.keys.ragged:
            terms.append(self.j >= self.u * self.keys.tile)
        visible = None
        for term in terms:
            visible = term if visible is None else visible & term
        return visible

    def distance(self):
        away = jnp.abs(self.j - self.i[:, None]).astype(self.call.acc)
        return jnp.sqrt(away) if self.call.problem.alibi == "sqrt" else away

    def logits(self, q, k, visible):
        """Logits with -inf where masked, and the derivative of the soft cap (or None)."""
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
        return (s if visible is None else jnp.where(visible, s, -jnp.inf)), slope

    def keep(self):
        """Keep bits of the tile, or None without dropout."""
        call = self.call
        columns = self.keys.tile
        first = self.keys.start(self.u)
        keep = None
        if call.seed is not None:
            seed = call.seed[..., None, None, :]
            keep = dropout.keep_tile(seed, call.stream, self.i, first, columns, call.problem.keep_prob)
        if call.drop_bits is not None:
            bits = call.drop_bits[..., None, None, :]
            offset = self.rows_of(call.drop_offset, -2)
            explicit = dropout.explicit_keep_tile(bits, offset, first, columns)
            keep = explicit if keep is None else keep & explicit
        return keep


def _slice(x, axis: int, tiles: _Axis, t):
    """Tile t of x along an axis; an axis of size 1 broadcasts and stays whole."""
    if x.shape[axis] == 1 or x.shape[axis] == tiles.tile:
        return x
    return lax.dynamic_slice_in_dim(x, tiles.start(t), tiles.tile, axis)


def _put(x, part, axis: int, tiles: _Axis, t, *, add: bool = False):
    """Writes (or adds) tile t of x along an axis."""
    if x.shape[axis] == part.shape[axis]:
        return x + part if add else part.astype(x.dtype)
    start = tiles.start(t)
    if add:
        part = lax.dynamic_slice_in_dim(x, start, part.shape[axis], axis) + part
    return lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, axis)


def _loop(first, last, body, carry):
    """fori_loop; a single known turn is run in line, which compiles faster."""
    if isinstance(first, int) and isinstance(last, int) and last - first == 1:
        return body(first, carry)
    return lax.fori_loop(first, last, body, carry)


def _key_range(call: _Call, rows: _Axis, keys: _Axis, t):
    """The key tiles that some row of tile t can see."""
    if call.lower is None and call.upper is None or keys.count == 1:
        return 0, keys.count
    lower = jnp.zeros((1,), jnp.int32) if call.lower is None else _slice(call.lower, -1, rows, t)
    upper = jnp.full((1,), keys.size, jnp.int32) if call.upper is None else _slice(call.upper, -1, rows, t)
    some = lower < upper
    first = jnp.min(jnp.where(some, lower, keys.size)) // keys.tile
    last = -(-jnp.max(jnp.where(some, upper, 0)) // keys.tile)
    return first, last


def _finite(x):
    """x with NaN and infinity as 0: a masked key must not reach a sum as 0 * NaN."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _weighted_values(call: _Call, p, v, visible):
    """p v, where non-finite values reach only the rows that see them (as NaN)."""
    spec = "kgij,kjd->kgid"
    if visible is None:
        return call.product(spec, p.astype(call.dtype), v)
    result = call.product(spec, p.astype(call.dtype), _finite(v))
    bad = ~jnp.isfinite(v)

    def poison(result):
        seen = jnp.broadcast_to(visible, p.shape).astype(call.acc)
        return jnp.where(call.product(spec, seen, bad.astype(call.acc)) > 0, jnp.nan, result)

    return lax.cond(jnp.any(bad), poison, lambda result: result, result)


def _forward(call: _Call):
    d = call.dims
    shape = (*call.B, d.K, d.G, d.Sq)
    out = jnp.zeros((*shape, d.Dv), call.dtype)
    m, l = softmax.start(shape, call.acc)
    if 0 in (*shape, d.Skv):
        return out, m, l
    rows, keys = call.tiles

    def row_tile(t, carry):
        out, m, l = carry
        q = _slice(call.query, -2, rows, t)

        def key_tile(u, carry):
            acc, m, l = carry
            tile = _Tile(call, rows, keys, t, u)
            visible = tile.visible()
            logits, _ = tile.logits(q, tile.keys_of(call.key, -2), visible)
            m, l, rescale, p = softmax.update(m, l, logits)
            keep = tile.keep()
            if keep is not None:
                p = jnp.where(keep, p, 0)
            values = _weighted_values(call, p, tile.keys_of(call.value, -2), visible)
            return acc * rescale[..., None] + values, m, l

        part = (*shape[:-1], rows.tile)
        start = (jnp.zeros((*part, d.Dv), call.acc), *softmax.start(part, call.acc))
        acc, m_tile, l_tile = _loop(*_key_range(call, rows, keys, t), key_tile, start)
        out_tile = softmax.finish(acc / call.problem.keep_prob, l_tile)
        return (
            _put(out, out_tile, -2, rows, t),
            _put(m, m_tile, -1, rows, t),
            _put(l, l_tile, -1, rows, t),
        )

    return _loop(0, rows.count, row_tile, (out, m, l))


def _backward(call: _Call, out, m, l, dout, dlogsumexp) -> Operands:
    d, problem = call.dims, call.problem
    out, dout = call.canonical_out(out), call.canonical_out(dout)
    m, l = call.canonical_stats(m), call.canonical_stats(l)
    delta = jnp.sum(out.astype(call.acc) * dout.astype(call.acc), axis=-1)
    if dlogsumexp is not None:
        delta = delta - call.canonical_stats(dlogsumexp).astype(call.acc)
    rows, keys = call.tiles if d.Sq and d.Skv else (_Axis(d.Sq, 1), _Axis(d.Skv, 1))
    zeros = _zero_gradients(call)
    if 0 in (*call.B, d.N, d.Sq, d.Skv):
        return zeros

    def row_tile(t, carry):
        q = _slice(call.query, -2, rows, t)
        do = _slice(dout, -2, rows, t)
        m_t, l_t, delta_t = (_slice(x, -1, rows, t) for x in (m, l, delta))
        inv = softmax.inverse(l_t)
        # Rows that the previous tile has already added.
        fresh = _Tile(call, rows, keys, t, 0).i[:, None] >= t * rows.tile if rows.ragged else None
        q_clean, do_clean = q, do
        if call.masked or rows.ragged:
            # A non-finite dout reaches the keys that its row sees through 1 / l, and no other key.
            inv = jnp.where(jnp.isfinite(do).all(axis=-1), inv, jnp.nan)
            q_clean, do_clean = _finite(q), _finite(do)

        def key_tile(u, carry):
            dq, grads = carry
            tile = _Tile(call, rows, keys, t, u)
            k, v = tile.keys_of(call.key, -2), tile.keys_of(call.value, -2)
            visible = tile.visible()
            logits, slope = tile.logits(q, k, visible)
            p = jnp.exp(logits - m_t[..., None]) * inv[..., None]
            dp = call.product("kgid,kjd->kgij", do, v)
            weights = p
            keep = tile.keep()
            if keep is not None:
                weights = jnp.where(keep, p / problem.keep_prob, 0)
                dp = jnp.where(keep, dp / problem.keep_prob, 0)
            ds = p * (dp - delta_t[..., None])
            if slope is not None:
                ds = ds * slope
            seen = fresh if visible is None else visible if fresh is None else visible & fresh
            if seen is not None:
                ds, weights = jnp.where(seen, ds, 0), jnp.where(seen, weights, 0)
                k = _finite(k)
            ds16, weights16 = ds.astype(call.dtype), weights.astype(call.dtype)
            dq = dq + call.product("kgij,kjd->kgid", ds16, k)
            grads = _accumulate(tile, grads, ds, ds16, weights16, q_clean, do_clean)
            return dq, grads

        dq, grads = carry
        part = jnp.zeros((*call.B, d.K, d.G, rows.tile, d.D), call.acc)
        dq_tile, grads = _loop(*_key_range(call, rows, keys, t), key_tile, (part, grads))
        dq_tile = (dq_tile * jnp.asarray(problem.scale, call.acc)).astype(call.dtype)
        if fresh is not None:
            dq_tile = jnp.where(fresh, dq_tile, _slice(dq, -2, rows, t))
        return _put(dq, dq_tile, -2, rows, t), grads

    dq, grads = _loop(0, rows.count, row_tile, (zeros.query, replace(zeros, query=None)))
    return replace(grads, query=dq, key=grads.key * jnp.asarray(problem.scale, call.acc))


def _zero_gradients(call: _Call) -> Operands:
    """Accumulators `*B ...`; those of bias and slopes keep the operand's dims of size 1."""
    d, mapped = call.dims, call.problem.mapped

    def like(x):
        if x is None:
            return None
        full = [call.B[at] if i < mapped else x.shape[at] for at, i in enumerate(call.kept)]
        return jnp.zeros((*full, *x.shape[len(full) :]), call.acc)

    return Operands(
        query=jnp.zeros((*call.B, d.K, d.G, d.Sq, d.D), call.dtype),
        key=jnp.zeros((*call.B, d.K, d.Skv, d.D), call.acc),
        value=jnp.zeros((*call.B, d.K, d.Skv, d.Dv), call.acc),
        bias=like(call.bias),
        alibi_slopes=like(call.slopes),
    )


def _accumulate(tile: _Tile, grads: Operands, ds, ds16, weights16, q, do) -> Operands:
    """Adds a tile's part to the gradients of key, value, bias and slopes."""
    call = tile.call
    dk = call.product("kgij,kgid->kjd", ds16, q)
    dv = call.product("kgij,kgid->kjd", weights16, do)
    grads = replace(
        grads,
        key=_put(grads.key, dk, -2, tile.keys, tile.u, add=True),
        value=_put(grads.value, dv, -2, tile.keys, tile.u, add=True),
    )
    if grads.bias is not None:
        grads = replace(grads, bias=_put_bias(tile, grads.bias, ds))
    if grads.alibi_slopes is not None:
        slopes = grads.alibi_slopes
        part = _reduce_to(-ds * tile.distance(), (*slopes.shape, 1, 1))
        grads = replace(grads, alibi_slopes=slopes + part.reshape(slopes.shape))
    return grads


def _put_bias(tile: _Tile, dbias, ds):
    """Adds ds to the bias gradient, summed over the dims in which the bias broadcasts."""
    target = list(ds.shape)
    for axis in range(len(target)):
        if dbias.shape[axis] == 1:
            target[axis] = 1
    part = _reduce_to(ds, tuple(target))
    starts = [0] * ds.ndim
    if dbias.shape[-2] != 1:
        starts[-2] = tile.rows.start(tile.t)
    if dbias.shape[-1] != 1:
        starts[-1] = tile.keys.start(tile.u)
    if dbias.shape == part.shape:
        return dbias + part
    old = lax.dynamic_slice(dbias, starts, part.shape)
    return lax.dynamic_update_slice(dbias, old + part, starts)


def _reduce_to(x, shape: tuple[int, ...]):
    axes = [axis for axis, (a, b) in enumerate(zip(x.shape, shape, strict=True)) if a != b]
    return jnp.sum(x, axis=axes, keepdims=True) if axes else x

