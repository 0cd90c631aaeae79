"""Calls as other libraries write them (tokamax, Gemma, levanter, MaxText, axlearn), held against float64 NumPy.

None of these libraries is needed: what their objects hold is stood in for here. `test_integrations_hosts.py` runs the
libraries themselves, where they are installed.
"""

import enum
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa.integrations import axlearn, gemma, levanter, maxtext, tokamax
from jax_fa.masks import Causal, SlidingWindow

B, S, N, K, D = 2, 12, 4, 2, 8
TOLERANCE = {"float32": 3e-6, "bfloat16": 0.02}
I, J = np.arange(S)[:, None], np.arange(S)
TRI = J <= I
IDS = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 0, 0], [5] * 7 + [1] * 5], np.int32)
SAME = IDS[:, :, None] == IDS[:, None, :]
POSITIONS = np.array([[*range(3), *range(5), *range(4)], [*range(7), *range(5)]], np.int32)


def _normal(*shape: int, seed: int = 0, dtype: str = "float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _qkv(rows: int = S, dtype: str = "float32", width: int = D):
    return (
        _normal(B, rows, N, D, dtype=dtype),
        _normal(B, S, K, D, seed=1, dtype=dtype),
        _normal(B, S, K, width, seed=2, dtype=dtype),
    )


def _reference(q, k, v, visible=None, *, bias=0.0, scale=D**-0.5, cap=None, sink=None):
    """`visible` broadcasts to `*B N Sq Skv`; fully masked rows are 0."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[-2] // x.shape[-2], axis=-2) for x in (k, v))
    x = scale * np.einsum("...ind,...jnd->...nij", q, k) + np.asarray(bias, np.float64)
    x = x if cap is None else cap * np.tanh(x / cap)
    x = x if visible is None else np.where(visible, x, -np.inf)
    last = np.full((*x.shape[:-1], 1), -np.inf)
    if sink is not None:
        last = np.broadcast_to(np.asarray(sink, np.float64)[..., None, None], last.shape)
    x = np.concatenate([x, last], axis=-1)
    top = x.max(axis=-1, keepdims=True)
    weights = np.exp(x - np.where(np.isfinite(top), top, 0.0))
    weights = (weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300))[..., :-1]
    return np.einsum("...nij,...jnd->...ind", weights, v)


def _close(found, want, dtype: str = "float32") -> None:
    assert found.dtype == dtype and found.shape == want.shape
    np.testing.assert_allclose(np.asarray(found, np.float64), want, rtol=0, atol=TOLERANCE[dtype] * 3)


class Case(NamedTuple):
    """A call: what it passes, and what that means as arguments of `_reference`."""

    given: dict[str, Any]
    visible: Any = None
    meaning: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    rows: int = S
    dtype: str = "float32"


# --- tokamax

BIAS = np.asarray(_normal(1, N, S, S, seed=3))
KEEP = np.arange(S) < np.array([[S], [7]])  # padding of keys
TOKAMAX = {
    "alphafold": Case(
        {"mask": KEEP[:, None, None], "bias": BIAS, "implementation": "triton"},
        KEEP[:, None, None],
        {"bias": BIAS},
    ),
    "window, cap, precision": Case(
        {
            "is_causal": True,
            "local_window_size": (3, 1),
            "logits_soft_cap": 2.0,
            "scale": 0.5,
            "precision": "highest",
            "implementation": ["mosaic", "xla_chunked"],
        },
        TRI & (J >= I - 3),
        {"cap": 2.0, "scale": 0.5},
    ),
    "lengths": Case(
        {
            "query_seq_lengths": np.array([S, 9]),
            "key_value_seq_lengths": np.array([99, 5]),
            "local_window_size": 4,
        },
        ((np.array([S, 9])[:, None, None] > I) & (np.array([S, 5])[:, None, None] > J) & (abs(I - J) <= 4))[
            :, None
        ],
    ),
    "bfloat16": Case({"mask": TRI, "implementation": "cudnn"}, TRI, dtype="bfloat16"),
}


@pytest.mark.parametrize("case", TOKAMAX)
def test_tokamax(case):
    case = TOKAMAX[case]
    qkv = _qkv(dtype=case.dtype, width=5)
    found = jax.jit(lambda *x: tokamax.dot_product_attention(*x, **case.given))(*qkv)
    _close(found, _reference(*qkv, case.visible, **case.meaning), case.dtype)


def test_tokamax_batch_dims_and_gradients():
    """As rows of a pair representation, with one bias for all of them: the bias' gradient is summed over the rows."""
    x, bias = _normal(2, 3, 5, N, D), _normal(1, N, 5, 5, seed=3)

    def loss(fn):
        return jax.jit(jax.grad(lambda x, bias: jnp.sum(jnp.sin(fn(x, bias))), argnums=(0, 1)))(x, bias)

    ours = loss(lambda x, bias: tokamax.dot_product_attention(x, x, x, bias=bias, mask=np.tri(5, dtype=bool)))

    def theirs(x, bias):
        flat = x.reshape(6, 5, N, D)
        out = jax.nn.dot_product_attention(flat, flat, flat, bias=bias, is_causal=True)
        return out.reshape(x.shape)

    for found, want in zip(ours, loss(theirs), strict=True):
        np.testing.assert_allclose(found, want, atol=3e-5)


# --- Gemma and tunix

ATTN = np.broadcast_to(TRI, (B, S, S))
GEMMA = {
    "soft cap": Case({"attn_mask": ATTN, "attn_logits_soft_cap": 1.5}, TRI, {"cap": 1.5}),
    "window by index": Case(
        {"attn_mask": Causal(), "sliding_window_size": 4, "attn_logits_soft_cap": 1.5},
        TRI & (I - J < 4),
        {"cap": 1.5},
    ),
    "window on both sides": Case({"attn_mask": None, "sliding_window_size": 3}, abs(I - J) < 3),
    "packed positions": Case(
        {"attn_mask": np.int32(SAME & TRI), "sliding_window_size": 3, "segment_pos": POSITIONS},
        (SAME & TRI & (abs(POSITIONS[:, :, None] - POSITIONS[:, None]) < 3))[:, None],
    ),
    "a cache from its start": Case(
        {
            "attn_mask": np.ones((B, 2, S), bool),
            "sliding_window_size": 5,
            "segment_pos": np.array([[6, 7], [2, 3]], np.int32),
            "cache_positions": np.arange(S),
        },
        (abs(np.array([[6, 7], [2, 3]])[..., None] - J) < 5)[:, None],
        rows=2,
    ),
    "a cache that wraps": Case(
        {
            "attn_mask": np.ones((B, 1, S + 4), bool),  # more columns than the cache
            "sliding_window_size": 5,
            "segment_pos": np.array([[14], [13]], np.int32),
            "cache_positions": np.stack([(J + 2) % S + 2, (J + 1) % S + 1]).astype(np.int32),
        },
        np.stack([abs((J + 2) % S + 2 - 14) < 5, abs((J + 1) % S + 1 - 13) < 5])[:, None, None],
        rows=1,
    ),
    "bfloat16": Case({"attn_mask": ATTN, "attn_logits_soft_cap": 30.0}, TRI, {"cap": 30.0}, dtype="bfloat16"),
}


@pytest.mark.parametrize("case", GEMMA)
def test_gemma(case):
    case = GEMMA[case]
    qkv = _qkv(case.rows, case.dtype)
    given = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in case.given.items()}
    found = jax.jit(lambda *x: gemma.attention(*x, **given))(*qkv)
    _close(found, _reference(*qkv, case.visible, scale=1.0, **case.meaning), case.dtype)


# --- levanter


@dataclass(frozen=True)
class Axis:
    name: str
    size: int


class NamedArray:
    """What `haliax.NamedArray` holds."""

    def __init__(self, array, axes) -> None:
        self.array, self.axes = array, tuple(axes)


def _named(array, *names: str) -> NamedArray:
    return NamedArray(array, [Axis(*x) for x in zip(names, array.shape, strict=True)])


def _attention_mask(**given) -> SimpleNamespace:
    fields = ("causal_offset", "explicit_mask", "segment_ids", "sliding_window")
    return SimpleNamespace(**{"is_causal": False, **dict.fromkeys(fields)} | given)


BACKEND = enum.Enum("AttentionBackend", {"VANILLA": "vanilla"}).VANILLA
LEVANTER = {
    "causal window": Case(
        {
            "mask": _attention_mask(is_causal=True, sliding_window=4),
            "logits_soft_cap": 1.5,
            "attn_backend": BACKEND,
        },
        TRI & (I - J < 4),
        {"cap": 1.5},
    ),
    "window both ways": Case({"mask": _attention_mask(bidirectional_window=2)}, abs(I - J) <= 2),
    "window both ways, packed": Case(
        {
            "mask": _attention_mask(
                bidirectional_window=0, segment_ids=(_named(IDS, "batch", "position"),) * 2
            )
        },
        (SAME & (I == J))[:, None],
    ),
    "packed": Case(
        {
            "mask": _attention_mask(
                is_causal=True,
                segment_ids=(_named(IDS, "batch", "position"), _named(IDS, "batch", "position")),
            )
        },
        (SAME & TRI)[:, None],
    ),
    "offsets of batch entries": Case(
        {"mask": _attention_mask(is_causal=True, causal_offset=_named(np.array([8, 5]), "batch"))},
        (np.arange(3)[:, None] + np.array([8, 5])[:, None, None] >= J)[:, None],
        rows=3,
    ),
    "array, bias, sinks": Case(
        {
            "mask": _attention_mask(explicit_mask=_named(KEEP.T, "key_position", "batch")),
            "bias": _named(BIAS[0].reshape(K, 2, S, S), "kv", "group", "position", "key_position"),
            "attn_sink": _named(np.float32([[0.5, -1.0], [2.0, 0.0]]), "kv", "group"),
            "scaling_factor": 0.7,
        },
        KEEP[:, None, None],
        {"bias": BIAS, "sink": [0.5, -1.0, 2.0, 0.0], "scale": 0.7},
    ),
    "bfloat16 in float32": Case(
        {"mask": _named(TRI, "position", "key_position"), "attention_dtype": jnp.float32, "dropout": 0.5},
        TRI,
        dtype="bfloat16",
    ),
}


@pytest.mark.parametrize("case", LEVANTER)
def test_levanter(case):
    heads_first = list(LEVANTER).index(case) % 2 == 0
    case = LEVANTER[case]
    q, k, v = _qkv(case.rows, case.dtype, width=5)
    order = (
        ("batch", "kv", "group", "position", "size")
        if heads_first
        else ("batch", "position", "kv", "group", "size")
    )

    def run(q, k, v):
        named = _named(q.reshape(B, case.rows, K, N // K, D), "batch", "position", "kv", "group", "size")
        moved = named.array.transpose([[x.name for x in named.axes].index(name) for name in order])
        named = _named(moved, *order)
        key = _named(k, "batch", "key_position", "kv", "size")
        value = _named(v, "batch", "key_position", "kv", "width")
        out = levanter.dot_product_attention(
            "position", Axis("key_position", S), "size", named, key, value, **case.given
        )
        assert [x.name for x in out.axes] == [*order[:-1], "width"]
        assert out.array.shape == tuple(x.size for x in out.axes)
        back = [order.index(name) for name in ("batch", "position", "kv", "group")]
        return out.array.transpose((*back, 4)).reshape(B, case.rows, N, 5)

    want = _reference(q, k, v, case.visible, **case.meaning)
    _close(jax.jit(run)(q, k, v), want, case.dtype)


# --- MaxText


def _op(kind: str = "global", **given) -> SimpleNamespace:
    """What the adapter reads of an `AttentionOp`."""
    fields = ("sliding_window_size", "chunk_attn_window_size", "attn_logits_soft_cap")
    config = SimpleNamespace(context_parallel_size=given.pop("context_parallel_size", 1))
    kind = SimpleNamespace(value=kind)  # an Enum there
    return SimpleNamespace(attention_type=kind, config=config, **dict.fromkeys(fields) | given)


IMAGE = np.array([[0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0], [0] * 12], bool)
RUNS = np.cumsum(IMAGE & ~np.pad(IMAGE, ((0, 0), (1, 0)))[:, :-1], axis=1) * IMAGE
BLOCKS = (RUNS[:, :, None] == RUNS[:, None]) & IMAGE[:, :, None]
NEGATIVE = np.where(IDS == 0, -3, IDS)
MAXTEXT = {
    "packed": Case({"op": _op(), "ids": IDS}, (SAME & TRI)[:, None]),
    "window, cap, sinks": Case(
        {
            "op": _op("local_sliding", sliding_window_size=4, attn_logits_soft_cap=1.5),
            "ids": IDS,
            "sinks": np.float32([0.5, -1, 2, 0]),
        },
        (SAME & TRI & (I - J < 4))[:, None],
        {"cap": 1.5, "sink": [0.5, -1, 2, 0]},
    ),
    "chunks": Case({"op": _op("chunk", chunk_attn_window_size=5), "ids": None}, TRI & (I // 5 == J // 5)),
    "full, masked keys": Case({"op": _op("full"), "ids": NEGATIVE}, (SAME & (IDS > 0)[:, None])[:, None]),
    "images": Case({"op": _op(), "ids": IDS, "bidirectional_mask": IMAGE}, ((SAME & TRI) | BLOCKS)[:, None]),
    "a chunk of a prefill": Case(
        {"op": _op(), "ids": IDS, "previous_chunk": np.zeros((B, 8, K, D)), "mode": "prefill"},
        (SAME & TRI)[:, None, 8:11],
        rows=3,
    ),
}


@pytest.mark.parametrize("case", MAXTEXT)
def test_maxtext(case):
    case = MAXTEXT[case]
    given = dict(case.given)
    op, ids, mode = given.pop("op"), given.pop("ids"), given.pop("mode", "train")
    qkv = _qkv(case.rows)

    def run(*qkv):
        out, *rest = maxtext.apply_attention(op, *qkv, ids, None, None, mode, **given)
        assert rest == [None, None]
        return out

    want = _reference(*qkv, case.visible, scale=1.0, **case.meaning)
    _close(jax.jit(run)(*qkv), want)


@pytest.mark.parametrize("window", [None, 4])
def test_maxtext_decodes(window):
    """Two parts of a cache, joined as MaxText joins them; of the second one nothing is in use for one entry."""
    op = _op() if window is None else _op("local_sliding", sliding_window_size=window)
    q, k, v = _qkv(1)
    used = np.stack([J < 9, J < 4])
    split = 6

    def run(q, k, v):
        parts = []
        for cut in (slice(None, split), slice(split, None)):
            ids = jnp.asarray(used[:, cut], jnp.int32)
            parts.append(
                maxtext.apply_attention(op, q, k[:, cut], v[:, cut], ids, None, None, "autoregressive")
            )
        top = jnp.maximum(parts[0][1], parts[1][1])
        total = sum(jnp.exp(most - top) * s for _, most, s in parts)
        return sum(jnp.exp(most - top) / total * out for out, most, _ in parts)

    # A window counts from the last slot of each part.
    near = np.ones(S, bool) if window is None else np.r_[np.arange(split) >= 2, np.arange(split) >= 2]
    want = _reference(q, k, v, (used & near)[:, None, None], scale=1.0)
    _close(jax.jit(run)(q, k, v), want)


# --- axlearn


def causal_mask(query_position, key_position):
    return query_position >= key_position


def _sliding(size: int):
    def mask(query_position, key_position):
        return (query_position >= key_position) & (query_position - key_position <= size)

    mask._sliding_window_size = size  # as axlearn marks it
    return mask


def _function(mask, target_positions=None, array=None) -> SimpleNamespace:
    return SimpleNamespace(mask=mask, target_positions=target_positions, bool_value=lambda: array)


def _positions(rows, keys, mask=causal_mask, **more) -> SimpleNamespace:
    """Of newer releases: the positions of rows and keys are arrays."""

    def bool_value():
        return mask(jnp.asarray(rows)[:, :, None], jnp.asarray(keys)[:, None])[:, None]

    return SimpleNamespace(
        mask=mask, target_positions=rows, source_positions=keys, bool_value=bool_value, **more
    )


def _within(size: int):
    """A window that does not say so."""
    return lambda query_position, key_position: _sliding(size)(query_position, key_position)


ROW = np.array([[9], [6]], np.int32)
RING = np.stack([(np.arange(S) - 3) % S, (np.arange(S) + 5) % S]).astype(
    np.int32
)  # where a ring buffer stands


AXLEARN = {
    "causal, segments, bias, sinks": Case(
        {
            "bias": SimpleNamespace(
                biases=[
                    _function(causal_mask),
                    SimpleNamespace(segment_ids=IDS),
                    SimpleNamespace(value=lambda: jnp.asarray(BIAS)),
                    SimpleNamespace(bool_value=lambda: None, value=lambda: None),  # ZeroAttentionBias
                ]
            ),
            "logit_sink": np.float32([0.5, -1, 2, 0]),
        },
        (SAME & TRI)[:, None],
        {"bias": BIAS, "sink": [0.5, -1, 2, 0]},
    ),
    "window": Case({"bias": _function(_sliding(3))}, TRI & (I - J <= 3)),
    "decoding": Case(
        {"bias": _function(_sliding(4), np.array([9, 6], np.int32))},
        (np.array([9, 6])[:, None] - J <= 4)[:, None, None] & (J <= np.array([9, 6])[:, None])[:, None, None],
        rows=1,
    ),
    "positions of rows": Case(
        {"bias": _function(causal_mask, np.array([[2, 9], [7, 0]], np.int32))},
        (np.array([[2, 9], [7, 0]])[..., None] >= J)[:, None],
        rows=2,
    ),
    "positions of keys": Case({"bias": _positions(ROW, RING)}, (RING <= ROW)[:, None, None], rows=1),
    "positions of keys, window": Case(
        {"bias": _positions(ROW, RING, _sliding(4))},
        ((RING <= ROW) & (ROW - RING <= 4))[:, None, None],
        rows=1,
    ),
    "keys in order": Case(
        {"bias": _positions(ROW, np.arange(S)[None], _within(4), sliding_window_size=4)},
        ((J <= ROW) & (ROW - J <= 4))[:, None, None],
        rows=1,
    ),
    "another function": Case(
        {"bias": _function(lambda q, k: None, array=jnp.asarray(SAME[:, None]))}, SAME[:, None]
    ),
}


@pytest.mark.parametrize("case", AXLEARN)
def test_axlearn(case):
    case = AXLEARN[case]
    q, k, v = _qkv(case.rows)

    def run(q, k, v):
        batch = {"query": q, "key": k, "value": v, "prng_key": None, **case.given}
        return axlearn.flash_attention(batch, softmax_scale=D**-0.5)

    _close(jax.jit(run)(q, k, v), _reference(q, k, v, case.visible, **case.meaning))


# --- what is refused


def _levanter_call(**given):
    q, k = (
        _named(x, "batch", name, "kv", "size")
        for x, name in zip(_qkv()[1:], ("position", "key"), strict=True)
    )
    return levanter.dot_product_attention("position", "key", "size", q, k, k, **given)


def _maxtext_call(op=None, ids=None, mode="train", **given):
    return maxtext.apply_attention(op or _op(), *_qkv(), ids, None, None, mode, **given)


def _axlearn_call(rate=0.0, **given):
    q, k, v = _qkv()
    batch = {"query": q, "key": k, "value": v, "bias": None} | given
    return axlearn.flash_attention(batch, dropout_rate=rate)


REFUSED = [
    (
        tokamax,
        {"implementation": "flash"},
        ValueError,
        "implementation must be None, or one or several of tokamax's",
    ),
    (tokamax, {"implementation": ()}, ValueError, "implementation must not be an empty sequence"),
    (tokamax, {"q_sharding": 1}, NotImplementedError, "q_sharding must be None: jax_fa takes the sharding"),
    (tokamax, {"local_window_size": (1, 2, 3)}, ValueError, r"local_window_size must be an int, a pair"),
    (
        tokamax,
        {"key_value_seq_lengths": np.ones(5, int)},
        ValueError,
        r"key_value_seq_lengths must broadcast to",
    ),
    (
        tokamax,
        {"query_seq_lengths": np.ones(B)},
        TypeError,
        "query_seq_lengths must hold integers; got dtype",
    ),
    (tokamax, {"is_causal": 1.5}, TypeError, "is_causal must be"),
    (tokamax, {"precision": "F64_F64_F64"}, NotImplementedError, "precision='F64_F64_F64' asks for float64"),
    (
        gemma,
        {"sliding_window_size": 0},
        ValueError,
        "sliding_window_size must be an int of at least 1; got 0",
    ),
    (
        gemma,
        {"attn_mask": np.ones((B, S, 4))},
        ValueError,
        r"attn_mask must have shape \(B, T, S\) with S of at",
    ),
    (gemma, {"attn_mask": True}, TypeError, "mask must be .* got True"),
    (gemma, {"cache_positions": POSITIONS}, ValueError, "segment_pos must be given with cache_positions"),
    (
        gemma,
        {"sliding_window_size": 2, "segment_pos": POSITIONS[:, :3]},
        ValueError,
        r"segment_pos must have shape \(2, 12\); got \(2, 3\)",
    ),
    (levanter, {"attn_backend": "fast"}, ValueError, "attn_backend must be None or one of levanter's"),
    (levanter, {"flash_block_size": 0}, ValueError, "flash_block_size must be an int of at least 1"),
    (levanter, {"dropout": 0.5, "inference": False}, ValueError, "prng must be a jax.random key .* got None"),
    (levanter, {"mask": np.ones((S, S), bool)}, TypeError, "mask must be an AttentionMask, a named array"),
    (levanter, {"bias": _named(BIAS[0], "h", "position", "key")}, ValueError, "bias must have axes among"),
    (
        levanter,
        {"bias": _named(BIAS[0, 0, :3], "position", "key")},
        ValueError,
        "bias must have the sizes of",
    ),
    (
        levanter,
        {"mask": _attention_mask(sliding_window=0)},
        ValueError,
        "sliding_window must be an int of at",
    ),
    (
        levanter,
        {"mask": _attention_mask(bidirectional_window=-1)},
        ValueError,
        "bidirectional_window must be an int of at least 0; got -1",
    ),
    (
        levanter,
        {"mask": _attention_mask(prefix=3)},
        NotImplementedError,
        r"mask must be an AttentionMask of no fields but .*; got \['prefix'\]",
    ),
    (maxtext, {"indexer_mask": np.ones(3)}, NotImplementedError, "indexer_mask must be left at its default"),
    (maxtext, {"record_max_logits": True}, NotImplementedError, "record_max_logits must be left at its"),
    (maxtext, {"qk_product_einsum": len}, NotImplementedError, "qk_product_einsum must be jnp.einsum"),
    (maxtext, {"mode": "eval"}, ValueError, r"model_mode must be one of .* got 'eval'"),
    (maxtext, {"op": _op("compressed")}, NotImplementedError, "attention_type must be global, local_sliding"),
    (
        maxtext,
        {"op": _op("local_sliding")},
        ValueError,
        "sliding_window_size must be an int of at least 1; got None",
    ),
    (
        maxtext,
        {"op": _op(context_parallel_size=2)},
        NotImplementedError,
        "size of context parallelism must be 1; got 2",
    ),
    (
        maxtext,
        {"op": _op(_context_parallel_size=lambda: 4)},
        NotImplementedError,
        "size of context parallelism must be 1; got 4",
    ),
    (
        maxtext,
        {"ids": IDS[:, :5]},
        ValueError,
        r"decoder_segment_ids must have shape \(B, 12\); got \(2, 5\)",
    ),
    (axlearn, {"page_tables": np.ones(3)}, NotImplementedError, r"no entries but .* got \['page_tables'\]"),
    (
        axlearn,
        {"rate": 0.5},
        ValueError,
        "prng_key must be a jax.random key where dropout_rate=0.5; got None",
    ),
    (axlearn, {"bias": 3}, TypeError, "bias must be a BaseAttentionBias of axlearn or None; got 3"),
]
CALLS = {
    tokamax: lambda **given: tokamax.dot_product_attention(*_qkv(), **given),
    gemma: lambda **given: gemma.attention(*_qkv(), **given),
    levanter: _levanter_call,
    maxtext: _maxtext_call,
    axlearn: _axlearn_call,
}


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(
    ("module", "given", "error", "message"),
    REFUSED,
    ids=[f"{m.__name__.split('.')[-1]}-{'-'.join(given)}-{i}" for i, (m, given, _, _) in enumerate(REFUSED)],
)
def test_refused(module, given, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: CALLS[module](**given))


def test_levanter_axes():
    q, k, v = (_named(x, "batch", n, "kv", "size") for x, n in zip(_qkv()[:1] * 3, "pkk", strict=True))
    for QPos, KPos, args, message in (  # noqa: N806 (names of axes)
        ("p", "p", (q, k, v), "QPos and KPos must have different names; got 'p'"),
        ("p", "x", (q, k, v), r"key must have the axes \('x', 'size'\)"),
        (
            "p",
            "k",
            (q, _named(k.array, "batch", "k", "other", "size"), v),
            "value must have one axis besides",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            levanter.dot_product_attention(QPos, KPos, "size", *args)
    with pytest.raises(TypeError, match="query must be a named array of haliax; got"):
        levanter.dot_product_attention("p", "k", "size", q.array, k, v)
    with pytest.raises(NotImplementedError, match="KPos must be one axis; got 2"):
        levanter.dot_product_attention("p", ("k", "l"), "size", q, k, v)


def test_levanter_dropout():
    """On with a key alone, and 0 in the mean."""
    x = _named(_normal(1, S, 1, D), "batch", "position", "kv", "size")
    y = _named(x.array, "batch", "key", "kv", "size")

    def run(key):
        given = {"dropout": 0.3, "inference": False, "prng": key}
        return levanter.dot_product_attention("position", "key", "size", x, y, y, **given).array

    found = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(1), 400)), np.float64)
    deviation = found.std(axis=0)
    off = abs(found.mean(axis=0) - _reference(x.array, y.array, y.array))
    assert (deviation > 0).all() and (off < 6 * deviation / math.sqrt(400) + 1e-5).all()


def test_structured_masks_stay_structured():
    """Windows, causal masks and packed sequences of every library need no S×S array."""
    mask = _attention_mask(
        is_causal=True, sliding_window=4, segment_ids=(_named(IDS, "batch", "position"),) * 2
    )
    bias = SimpleNamespace(biases=[_function(_sliding(3)), SimpleNamespace(segment_ids=IDS)])
    window = {"local_window_size": (3, 0), "is_causal": True}
    for run in (
        lambda: CALLS[tokamax](**window, key_value_seq_lengths=np.array([3, 4])),
        lambda: CALLS[gemma](attn_mask=SlidingWindow(3, 0), sliding_window_size=4),
        lambda: CALLS[gemma](sliding_window_size=4, segment_pos=POSITIONS, cache_positions=np.arange(S)),
        lambda: _levanter_call(mask=mask).array,
        lambda: _levanter_call(mask=_attention_mask(bidirectional_window=3)).array,
        lambda: _maxtext_call(_op("local_sliding", sliding_window_size=4), IDS),
        lambda: _maxtext_call(_op("chunk", chunk_attn_window_size=4), IDS),
        lambda: _axlearn_call(bias=bias),
        lambda: _axlearn_call(bias=_positions(np.arange(S)[None], np.arange(S)[None])),
    ):
        text = str(jax.make_jaxpr(run)())
        assert "flash_attention_fwd[" in text and f"bool[{B},1,{S},{S}]" not in text
        assert f"bool[1,1,{S},{S}]" not in text
