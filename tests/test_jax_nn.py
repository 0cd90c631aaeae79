"""`dot_product_attention` is `jax.nn.dot_product_attention`, argument for argument.

Both are held against the oracle: ours may err at most twice as much as JAX's own.
"""

import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa.testing import oracle

B, T, S, N, K, H = 2, 18, 37, 4, 2, 8


def _bool(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).random(shape) < 0.7


def _float(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _int(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@dataclass(frozen=True)
class Call:
    """Arguments of one call; `options` go to both functions."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (B, T, S, N, K, H)
    batched: bool = True
    dtype: str = "float32"

    def __str__(self) -> str:
        return self.name

    def operands(self) -> tuple[np.ndarray, ...]:
        """query, key, value and the output's cotangent."""
        b, t, s, n, k, h = self.shape
        normal = np.random.default_rng(len(self.name)).standard_normal
        shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, h), (b, t, n, h))
        drop = slice(None) if self.batched else 0
        return tuple(normal(shape)[drop].astype(jnp.dtype(self.dtype)) for shape in shapes)

    def visible(self) -> np.ndarray:
        o = self.options
        b, t, s, n, *_ = self.shape
        found = np.ones((b, n, t, s), bool)
        if o.get("mask") is not None:
            found = found & o["mask"]
        if o.get("is_causal"):
            found = found & oracle.causal(t, s)
        if o.get("local_window_size") is not None:
            left, right = np.broadcast_to(o["local_window_size"], 2)
            found = found & oracle.band(t, s, left, right)
        return found & oracle.lengths(t, s, o.get("query_seq_lengths"), o.get("key_value_seq_lengths"))


CALLS = (
    Call("plain"),
    Call("plain-3d", batched=False, shape=(1, T, S, N, K, H)),
    Call("mha", shape=(B, T, S, 3, 3, H)),
    Call("mqa", shape=(B, T, S, 4, 1, H)),
    Call("causal", {"is_causal": True}),
    Call("causal-more-rows-than-keys", {"is_causal": True}, shape=(B, S, T, N, K, H)),
    Call("causal-3d", {"is_causal": True, "scale": 0.5}, batched=False, shape=(1, S, S, N, K, H)),
    Call("scale", {"scale": 0.3}),
    *(
        Call(f"bias-{'x'.join(map(str, shape)) or 'scalar'}", {"bias": _float(*shape)})
        for shape in ((B, N, T, S), (1, N, T, S), (B, 1, 1, S), (N, T, S), (1, 1, S), (T, S), (T, 1), (S,))
    ),
    Call("bias-3d", {"bias": _float(N, T, S)}, batched=False, shape=(1, T, S, N, K, H)),
    *(
        Call(f"mask-{'x'.join(map(str, shape))}", {"mask": _bool(*shape)})
        for shape in ((B, N, T, S), (B, 1, T, S), (B, 1, 1, S), (N, T, S), (1, T, 1), (T, S), (S,))
    ),
    Call("mask-3d", {"mask": _bool(N, 1, S)}, batched=False, shape=(1, T, S, N, K, H)),
    Call("key-lengths", {"key_value_seq_lengths": _int(37, 5)}),
    Call("query-lengths", {"query_seq_lengths": _int(18, 3)}),
    Call(
        "both-lengths",
        {"query_seq_lengths": _int(0, 17), "key_value_seq_lengths": _int(30, 9), "is_causal": True},
    ),
    Call("window-int", {"local_window_size": 4}),
    Call("window-pair", {"local_window_size": (2, 9)}),
    Call("window-zero", {"local_window_size": (0, 0)}),
    Call("window-int-causal", {"local_window_size": 4, "is_causal": True}),
    Call("window-pair-causal", {"local_window_size": (7, 3), "is_causal": True}),
    Call("window-negative-left", {"local_window_size": (-2, 9)}),
    Call("window-negative-right", {"local_window_size": (5, -1)}),
    Call("lengths-beyond", {"key_value_seq_lengths": _int(99, 20), "query_seq_lengths": _int(10, 99)}),
    Call("window-lengths", {"local_window_size": (6, 6), "key_value_seq_lengths": _int(12, 37)}),
    Call(
        "everything",
        {"bias": _float(1, N, T, S), "mask": _bool(B, 1, T, S), "is_causal": True, "scale": 0.4}
        | {
            "local_window_size": (11, 2),
            "key_value_seq_lengths": _int(16, 37),
            "query_seq_lengths": _int(17, 18),
        },
    ),
    Call("bfloat16", {"is_causal": True}, dtype="bfloat16"),
    Call("bfloat16-bias", {"bias": _float(N, T, S)}, dtype="bfloat16"),
)


def _run(function, call: Call, seen):
    """Output, residual and gradients (of query, key, value and the bias if there is one)."""
    *qkv, dout = call.operands()
    # Rows that see nothing are where the two differ, as documented: their outputs are left out.
    rows = seen.swapaxes(-1, -2)[..., None]
    dout = dout * (rows if call.batched else rows[0]).astype(dout.dtype)
    options = dict(call.options)
    bias = options.pop("bias", None)

    @jax.jit
    def run(qkv, bias, dout):
        def attention(qkv, bias):
            return function(*qkv, bias, return_residual=True, **options)

        (out, residual), pullback = jax.vjp(attention, qkv, bias)
        return out, residual, pullback((dout, jnp.ones_like(residual)))

    with jax.numpy_dtype_promotion("standard"):  # JAX's own function needs it for 16-bit gradients
        out, residual, (gradients, dbias) = run(tuple(qkv), bias, dout)
    return out, residual, [*gradients, *([] if bias is None else [dbias])], dout


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_parity(call, backend):
    visible = call.visible()
    seen = visible.any(axis=-1)
    theirs = _run(jax.nn.dot_product_attention, call, seen)
    ours = _run(partial(jax_fa.dot_product_attention, implementation=backend), call, seen)
    q, k, v, dout = (x if call.batched else x[None] for x in (*call.operands()[:3], ours[-1]))
    bias, scale = call.options.get("bias"), call.options.get("scale")
    want = oracle.attention(q, k, v, bias=bias, visible=visible, scale=scale)
    # A lone residual cotangent changes nothing: it has no gradient.
    gradients = list(want.gradients(dout).values())
    residual = np.swapaxes(want.lse, -1, -2)
    floor = oracle.FLOOR[call.dtype]

    def close(name, a, b, c, where=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (name, a.shape, b.shape, a.dtype, b.dtype)
        a, b = (np.where(where, np.asarray(x, np.float64).reshape(c.shape), 0) for x in (a, b))
        oracle.assert_close_to_oracle(a, np.where(where, c, 0), b, f"{call}: {name}", floor)

    rows = seen.swapaxes(-1, -2)
    close("out", ours[0], theirs[0], want.out, rows[..., None])
    close("residual", ours[1], theirs[1], residual, rows)
    for name, *three in zip(("query", "key", "value", "bias"), ours[2], theirs[2], gradients, strict=False):
        close(f"gradient of {name}", *three)


@pytest.mark.parametrize("window", [(2, 9), (-2, 9), (5, -1), (0, 0), (40, 40)], ids=str)
@pytest.mark.parametrize("form", ["pair", "numpy pair", "array", "one"])
def test_windows_as_data(window, form, backend):
    """A traced window means what the static one does, in jax.nn too."""
    q, k, v, _ = Call("window").operands()
    left, right = (window[0],) * 2 if form == "one" else window
    convert = {
        "pair": lambda w: (w[0], w[1]),
        "numpy pair": lambda w: (np.int64(left), np.int8(right)),
        "array": lambda w: w,
        "one": lambda w: w[0],
    }[form]

    @jax.jit
    def run(window):
        return jax_fa.dot_product_attention(
            q, k, v, local_window_size=convert(window), implementation=backend
        )

    found = run(jnp.array([left, right], jnp.int32))
    theirs = jax.nn.dot_product_attention(q, k, v, local_window_size=(left, right))
    seen = oracle.band(T, S, left, right).any(axis=-1)
    np.testing.assert_allclose(found[:, seen], theirs[:, seen], atol=2e-6)
    assert not np.asarray(found)[:, ~seen].any()


def test_signature():
    """Theirs first, same order, kinds and defaults; ours after them, keyword only."""
    theirs = list(inspect.signature(jax.nn.dot_product_attention).parameters.values())
    ours = list(inspect.signature(jax_fa.dot_product_attention).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert {p.kind for p in ours[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}
    assert all(p.default is not inspect.Parameter.empty for p in ours[len(theirs) :])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_see_nothing(dtype, backend):
    """0, gradients 0 and the dtype's lowest number, where JAX gives the mean of all values."""
    call = Call("unseen", {"key_value_seq_lengths": _int(0, 20), "local_window_size": 1}, dtype=dtype)
    seen = np.ones((B, N, T), bool)  # all cotangents in
    function = partial(jax_fa.dot_product_attention, implementation=backend)
    out, residual, (dq, dk, dv), _ = _run(function, call, seen)
    assert not out[0].any() and (residual[0] == jnp.finfo(dtype).min).all()
    assert not dq[0].any() and not dk[0].any() and not dv[0].any()
    assert jnp.isfinite(residual).all() and out[1].any()
    theirs = _run(jax.nn.dot_product_attention, call, seen)[0]
    mean = np.repeat(np.asarray(call.operands()[2][0], np.float64).mean(axis=0), N // K, axis=0)
    np.testing.assert_allclose(np.asarray(theirs[0], np.float64), np.broadcast_to(mean, (T, N, H)), atol=0.05)


def test_as_a_swap_in_model_code(backend, monkeypatch):
    """A model that calls jax.nn gives the same with ours in its place."""
    x = _float(B, T, N * H)

    def model(x):
        heads = x.reshape(B, T, N, H)
        return jax.nn.dot_product_attention(heads, heads, heads, is_causal=True).reshape(x.shape)

    theirs = model(x)
    monkeypatch.setattr(jax.nn, "dot_product_attention", jax_fa.dot_product_attention)
    np.testing.assert_allclose(model(x), theirs, atol=2e-6)


def test_python_lists_and_scalars(backend):
    """Whatever jnp.asarray takes is an array."""
    q = _float(1, 3, 1, 2)
    run = partial(jax_fa.dot_product_attention, implementation=backend)
    nested = run(q.tolist(), q.tolist(), q.tolist(), bias=0.5, mask=[[True]], key_value_seq_lengths=[2])
    want = oracle.attention(q, q, q, visible=oracle.lengths(3, 3, key=[2])).out
    np.testing.assert_allclose(nested, want, atol=1e-6)


def test_our_own_arguments(backend):
    """Dropout and the soft cap are those of `flash_attention`."""
    q, k, v, _ = Call("own").operands()
    own = {
        "dropout_rate": 0.4,
        "dropout_key": jax.random.key(3),
        "logits_soft_cap": 1.5,
        "implementation": backend,
    }
    out = jax_fa.dot_product_attention(q, k, v, is_causal=True, **own)
    same = jax_fa.flash_attention(q, k, v, mask=jax_fa.masks.Causal(), **own)
    np.testing.assert_array_equal(out, same)
    seed = np.asarray(jax.random.bits(own["dropout_key"], (2,), jnp.uint32))
    kept = round(0.6 * 2**16) / 2**16
    keep = oracle.keep_bits(seed, (B, N, T, S), kept)
    options = {"visible": oracle.causal(T, S), "soft_cap": 1.5, "keep": keep, "keep_prob": kept}
    np.testing.assert_allclose(out, oracle.attention(q, k, v, **options).out, atol=2e-6)
