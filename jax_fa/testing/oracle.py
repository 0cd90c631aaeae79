"""What the tests hold the library against: plain float64 NumPy, S x S arrays and all.

Imports nothing from the library. Arrays are canonical: query `*B Sq N D`, key `*B Skv K D`, value
`*B Skv K Dv`; bias, masks and keep bits broadcast to `*B N Sq Skv`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLT_MAX = float(np.finfo(np.float32).max)


# --- attention and its derivative, by the formulas


@dataclass(frozen=True)
class Attention:
    """Results of `attention`; `m`, `l`, `lse` and `largest` have shape `*B N Sq`. The last is the max without a sink."""

    out: np.ndarray
    m: np.ndarray
    l: np.ndarray
    lse: np.ndarray
    largest: np.ndarray
    _saved: dict[str, Any]

    @property
    def cancellation(self) -> dict[str, float]:
        """By operand, for gradients that are long sums; known after `gradients`."""
        return self._saved["cancellation"]

    def gradients(self, dout, dlse=None) -> dict[str, np.ndarray]:
        """Gradients of every operand that was given, of that operand's shape."""
        s = self._saved
        q, k, v, w, scale = s["q"], s["k"], s["v"], s["w"], s["scale"]
        dout = np.asarray(dout, np.float64)
        dw = s["kept"] * np.einsum("...ind,...jnd->...nij", dout, v)
        delta = np.sum(w * dw, axis=-1)
        if dlse is not None:
            delta = delta - np.asarray(dlse, np.float64)
        dx = w * (dw - delta[..., None])
        ds = dx * s["dcap"]
        group = q.shape[-2] // s["K"]

        def sum_groups(g):
            return g.reshape(*g.shape[:-2], s["K"], group, g.shape[-1]).sum(axis=-2)

        found = {
            "query": scale * np.einsum("...nij,...jnd->...ind", ds, k),
            "key": sum_groups(scale * np.einsum("...nij,...ind->...jnd", ds, q)),
            "value": sum_groups(np.einsum("...nij,...ind->...jnd", s["kept"] * w, dout)),
        }
        # How much larger the terms of a sum are than the sum: a row's ds add up to almost nothing, and what is
        # left of them is known only as well as they are.
        s["cancellation"] = {}
        if s["bias_shape"] is not None:
            found["bias"] = _sum_to(ds, s["bias_shape"])
            terms = _sum_to(np.abs(ds), s["bias_shape"])
            s["cancellation"]["bias"] = _ratio(terms, found["bias"])
        if s["slopes_shape"] is not None:
            found["alibi_slopes"] = _sum_to(-(ds * s["distance"]).sum(axis=(-2, -1)), s["slopes_shape"])
            terms = _sum_to((np.abs(ds) * s["distance"]).sum(axis=(-2, -1)), s["slopes_shape"])
            s["cancellation"]["alibi_slopes"] = _ratio(terms, found["alibi_slopes"])
        if s["sinks_shape"] is not None:
            terms = -s["sink_weight"] * delta
            found["sinks"] = _sum_to(terms.sum(axis=-1), s["sinks_shape"])
            terms = _sum_to(np.abs(terms).sum(axis=-1), s["sinks_shape"])
            s["cancellation"]["sinks"] = _ratio(terms, found["sinks"])
        return found


def _ratio(terms, total) -> float:
    norm = float(np.linalg.norm(total))
    return float(np.linalg.norm(terms)) / norm if norm > 1e-12 else 1.0


def attention(
    q,
    k,
    v,
    *,
    bias=None,
    visible=None,
    scale=None,
    soft_cap=None,
    slopes=None,
    position=None,
    keep=None,
    keep_prob=1.0,
    sinks=None,
) -> Attention:
    """softmax(cap(scale q k^T + bias - slope |j - position|), visible) v, weights kept by `keep`.

    `sinks` `*#B N` are one more logit of each row, without a value. `position` of each row broadcasts to
    `*B N Sq`; None: the row's index.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    *_, Sq, N, D = q.shape
    Skv, K = k.shape[-3:-1]
    k, v = np.repeat(k, N // K, axis=-2), np.repeat(v, N // K, axis=-2)
    scale = D**-0.5 if scale is None else scale
    distance = np.abs(np.arange(Skv) - _position(position, Sq)[..., None]).astype(np.float64)
    s = scale * np.einsum("...ind,...jnd->...nij", q, k)
    if bias is not None:
        s = s + np.asarray(bias, np.float64)
    if slopes is not None:
        s = s - np.asarray(slopes, np.float64)[..., None, None] * distance
    dcap = np.ones_like(s)
    if soft_cap is not None:
        tanh = np.tanh(s / soft_cap)
        s, dcap = soft_cap * tanh, 1 - tanh**2
    visible = np.broadcast_to(True if visible is None else visible, s.shape)
    largest = m = np.max(s, axis=-1, where=visible, initial=-FLT_MAX)
    sink = np.full(s.shape[:-1], -np.inf)
    if sinks is not None:
        sink = np.broadcast_to(np.asarray(sinks, np.float64)[..., None], s.shape[:-1])
        m = np.maximum(m, sink)
    p = np.where(visible, np.exp(np.where(visible, s - m[..., None], 0)), 0)
    l = p.sum(axis=-1) + np.exp(sink - m)
    w = p / np.where(l == 0, 1, l)[..., None]
    kept = np.broadcast_to(1.0 if keep is None else np.where(keep, 1 / keep_prob, 0.0), s.shape)
    lse = np.where(l == 0, -FLT_MAX, m + np.log(np.where(l == 0, 1, l)))
    saved = {
        "q": q,
        "k": k,
        "v": v,
        "w": w,
        "scale": scale,
        "kept": kept,
        "dcap": dcap,
        "distance": distance,
        "K": K,
        "bias_shape": None if bias is None else np.shape(bias),
        "slopes_shape": None if slopes is None else np.shape(slopes),
        "sinks_shape": None if sinks is None else np.shape(sinks),
        "sink_weight": np.exp(sink - m) / np.where(l == 0, 1, l),
    }
    return Attention(np.einsum("...nij,...jnd->...ind", kept * w, v), m, l, lse, largest, saved)


def _position(position, Sq: int):
    return np.arange(Sq) if position is None else np.asarray(position)


def _sum_to(x, shape: tuple[int, ...]):
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and x.shape[i] != 1)
    return x.sum(axis=axes, keepdims=True)


# --- masks by their definition, as boolean arrays


def _align(align: str, sq: int, skv: int) -> int:
    return {"top-left": 0, "bottom-right": skv - sq}[align]


def band(sq: int, skv: int, left=None, right=None, align="top-left", offset=0) -> np.ndarray:
    """i + off - left <= j <= i + off + right; in Python integers, so that nothing overflows."""
    i = (
        np.arange(sq, dtype=np.int64)[:, None]
        + _align(align, sq, skv)
        + np.asarray(offset, np.int64)[..., None]
    )
    j = np.arange(skv, dtype=np.int64)
    visible = np.ones(np.broadcast_shapes(i.shape, (skv,)), bool)
    if left is not None:
        visible = visible & (i - left <= j)
    if right is not None:
        visible = visible & (j <= i + right)
    return visible


def causal(sq: int, skv: int, align="top-left") -> np.ndarray:
    return band(sq, skv, None, 0, align)


def prefix(sq: int, skv: int, length, align="top-left") -> np.ndarray:
    """`*B 1 Sq Skv` for lengths of shape `*B`."""
    seen = np.arange(skv) < np.asarray(length)[..., None, None, None]
    return causal(sq, skv, align) | seen


def lengths(sq: int, skv: int, query=None, key=None) -> np.ndarray:
    """`*B 1 Sq Skv`: both inside their sequence."""
    visible = np.ones((1, sq, skv), bool)
    if query is not None:
        visible = visible & (np.arange(sq)[:, None] < np.asarray(query)[..., None, None, None])
    if key is not None:
        visible = visible & (np.arange(skv) < np.asarray(key)[..., None, None, None])
    return visible


def cumulative(sq: int, skv: int, query, key=None, within=None, prefix=None) -> np.ndarray:
    """Blocks between consecutive ends; `within(rows, keys)` fills a block of that many rows and keys.

    `prefix`: how many keys of each sequence are visible besides.
    """
    query, key = np.asarray(query), np.asarray(query if key is None else key)
    batch = np.broadcast_shapes(query.shape[:-1], key.shape[:-1])
    count = query.shape[-1]
    visible = np.zeros((*batch, sq, skv), bool)
    query, key = np.broadcast_to(query, (*batch, count)), np.broadcast_to(key, (*batch, count))
    for b in np.ndindex(*batch):
        row = column = 0
        for i, (end_row, end_column) in enumerate(zip(query[b], key[b], strict=True)):
            rows, columns = end_row - row, end_column - column
            block = np.ones((rows, columns), bool) if within is None else within(int(rows), int(columns))
            if prefix is not None:
                block = block | (np.arange(columns) < prefix[*b, i])
            visible[b][row:end_row, column:end_column] = block
            row, column = end_row, end_column
    return visible if not batch else visible[..., None, :, :]


def segments(query, key=None, within=None, padding_id=None, prefix=None) -> np.ndarray:
    """Rows and keys of equal id; `within(rows, keys)` fills the block of one id. Padding is fully masked.

    `prefix(id)`: how many keys of a segment are visible besides.
    """
    query, key = np.asarray(query), np.asarray(query if key is None else key)
    batch = np.broadcast_shapes(query.shape[:-1], key.shape[:-1])
    sq, skv = query.shape[-1], key.shape[-1]
    visible = np.zeros((*batch, sq, skv), bool)
    query, key = np.broadcast_to(query, (*batch, sq)), np.broadcast_to(key, (*batch, skv))
    for b in np.ndindex(*batch):
        for name in np.unique(query[b]):
            rows, columns = np.flatnonzero(query[b] == name), np.flatnonzero(key[b] == name)
            shape = (len(rows), len(columns))
            if name == padding_id:
                continue
            block = np.ones(shape, bool) if within is None else within(*shape)
            if prefix is not None:
                block = block | (np.arange(shape[1]) < prefix(name))
            visible[b][np.ix_(rows, columns)] = block
    return visible if not batch else visible[..., None, :, :]


# --- the key position at which a mask puts a row, for ALiBi: `*B 1 Sq`, or what broadcasts


def cumulative_position(sq: int, query, key, bottom: bool) -> np.ndarray:
    """As far behind its sequence's first key as the row is behind its first row; `bottom`: from the other end."""
    query, key = np.asarray(query), np.asarray(key)
    found = np.zeros((*query.shape[:-1], 1, sq), int)
    for b in np.ndindex(*query.shape[:-1]):
        row = column = 0
        for end_row, end_column in zip(query[b], key[b], strict=True):
            shift = end_column - end_row if bottom else column - row
            found[b][0, row:end_row] = np.arange(row, end_row) + shift
            row, column = end_row, end_column
    return found


def segment_position(query, key, bottom: bool = False) -> np.ndarray:
    """The key in the same place of the segment (`bottom`: counted from its end); outside, as far from its ends."""
    query, key = np.asarray(query), np.asarray(key)
    found = np.zeros((*query.shape[:-1], 1, query.shape[-1]), int)
    for b in np.ndindex(*query.shape[:-1]):
        for name in np.unique(query[b]):
            rows, columns = np.flatnonzero(query[b] == name), np.flatnonzero(key[b] == name)
            if len(columns) == 0:
                continue
            place = np.arange(len(rows)) + (len(columns) - len(rows) if bottom else 0)
            inside = np.clip(place, 0, len(columns) - 1)
            found[b][0, rows] = columns[inside] + place - inside
    return found


# --- dropout bits


def philox4x32(counter, key, rounds: int = 10) -> list[Any]:
    """Philox4x32 as the paper writes it, in 64-bit integers."""
    low = np.uint64(0xFFFFFFFF)
    c = [np.asarray(x, np.uint64) for x in counter]
    k = [np.asarray(x, np.uint64) for x in key]
    for _ in range(rounds):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c = [(b >> shift) ^ c[1] ^ k[0], b & low, (a >> shift) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return c


def keep_bits(seed, shape: tuple[int, ...], keep_prob: float) -> np.ndarray:
    """Keep bits `*B N Sq Skv` of a Philox key of two words; the batch word counts `*B` in row-major order."""
    *batch, N, Sq, Skv = shape
    b = np.arange(int(np.prod(batch, dtype=int))).reshape(*batch, 1, 1, 1)
    head, row, column = np.arange(N)[:, None, None], np.arange(Sq)[:, None], np.arange(Skv)
    words = philox4x32((4 * (column // 32) + (column % 8) // 2, row, head, b), seed)
    stacked = np.stack([np.broadcast_to(w, shape) for w in words], axis=-1)
    index = np.broadcast_to((column // 8) % 4, shape)
    word = np.take_along_axis(stacked, index[..., None], axis=-1)[..., 0]
    number = np.where(column % 2 == 0, word & np.uint64(0xFFFF), word >> np.uint64(16))
    return number < round(keep_prob * 65536)


# --- the measure of error


def _round(x, dtype):
    """x rounded for sure: XLA may keep excess precision through a plain pair of casts."""
    return jax.lax.reduce_precision(x, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _round_gradient(x, dtype):
    """x; its gradient enters the products of the backward in this dtype, as in jax.nn."""
    return x


_round_gradient.defvjp(lambda x, dtype: (x, None), lambda dtype, _, g: (_round(g, dtype),))


@jax.jit
def naive(operands, visible, keep, cotangents, scale, soft_cap, keep_prob, position):
    """(out, log-sum-exp, gradients) of a plain implementation: logits in float32, weights in query's dtype.

    Takes operands by name, masks in full and scalars as arrays, so that cases of one shape share one program.
    """

    def attention(x):
        q, k, v = x["query"], x["key"], x["value"]
        *_, Sq, N, D = q.shape
        Skv, K = k.shape[-3:-1]
        group = (*q.shape[:-2], K, N // K, D)
        s = jnp.einsum("...ikgd,...jkd->...kgij", q.reshape(group), k, preferred_element_type=jnp.float32)
        s = _round_gradient(s, q.dtype).reshape(*s.shape[:-4], N, Sq, Skv) * scale
        if "bias" in x:
            s = s + x["bias"].astype(jnp.float32)
        if "alibi_slopes" in x:
            distance = jnp.abs(jnp.arange(Skv) - position[..., None]).astype(jnp.float32)
            s = s - x["alibi_slopes"][..., None, None] * distance
        if soft_cap is not None:
            s = soft_cap * jnp.tanh(s / soft_cap)
        s = jnp.where(visible, s, -1e30)
        unseen: Any = -FLT_MAX
        if "sinks" in x:
            unseen = jnp.broadcast_to(x["sinks"][..., None].astype(s.dtype), s.shape[:-1])
            s = jnp.concatenate([s, unseen[..., None]], axis=-1)
        w = jnp.where(visible, jax.nn.softmax(s, axis=-1)[..., :Skv], 0)
        w = w if keep is None else jnp.where(keep, w / keep_prob, 0)
        w = _round(w, q.dtype).astype(q.dtype)
        out = jnp.einsum("...kgij,...jkd->...ikgd", w.reshape(*w.shape[:-3], K, N // K, Sq, Skv), v)
        lse = jnp.where(visible.any(axis=-1), jax.nn.logsumexp(s, axis=-1), unseen)
        return out.reshape(*out.shape[:-3], N, v.shape[-1]), lse

    results, pullback = jax.vjp(attention, operands)
    return *results, pullback(cotangents)[0]


def errors(x, oracle) -> tuple[float, float]:
    """(relative L2, largest absolute difference over the largest absolute value), both against the oracle."""
    x, oracle = np.asarray(x, np.float64), np.asarray(oracle, np.float64)
    assert x.shape == oracle.shape, f"shape {x.shape}, expected {oracle.shape}"
    if x.size == 0:
        return 0.0, 0.0
    # Masked rows hold -FLT_MAX in the statistics: compared exactly, and left out of the norms.
    absent = np.abs(oracle) >= FLT_MAX
    np.testing.assert_array_equal(x[absent], oracle[absent])
    x, oracle = np.where(absent, 0, x), np.where(absent, 0, oracle)
    difference = np.abs(x - oracle)
    # What is 0 but for rounding in float64 (the gradient of a bias that all keys share) is measured absolutely.
    norm, largest = (1.0 if x < 1e-12 else x for x in (np.linalg.norm(oracle), np.abs(oracle).max()))
    return float(np.linalg.norm(difference) / norm), float(difference.max() / largest)


# Floors: what a correct result may differ from the oracle by, however well the naive one does by luck. 16-bit
# dtypes: an eighth of the distance between neighbours above 1.
FLOOR = {"float64": 1e-12, "float32": 2**-19, "bfloat16": 2**-10, "float16": 2**-13}


def assert_close_to_oracle(ours, oracle, naive, what: str, floor: float) -> None:
    """Ours errs at most twice as much as the naive result, plus a floor: in relative L2 and in max-abs.

    The naive result must itself be near the oracle: otherwise they do not compute the same thing, and the
    comparison would allow anything.
    """
    ours, naive = np.asarray(ours, np.float64), np.asarray(naive, np.float64)
    assert np.isfinite(ours).all(), f"{what}: {np.count_nonzero(~np.isfinite(ours))} values are not finite"
    for norm, error, allowed in zip(("L2", "max"), errors(ours, oracle), errors(naive, oracle), strict=True):
        assert allowed <= (16 if floor > 1e-5 else 4) * floor, (
            f"{what}: the naive result is off by {allowed:.3g} ({norm})"
        )
        bound = 2 * allowed + floor
        assert error <= bound, f"{what}: {norm} error {error:.3g} exceeds {bound:.3g} (naive: {allowed:.3g})"
