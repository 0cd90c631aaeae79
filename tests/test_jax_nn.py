"""`dot_product_attention` is `jax.nn.dot_product_attention`, argument for argument.

Both are held against the oracle: ours may err at most twice as much as JAX's own.
"""

import inspect
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
import jax_fa.integrations
from jax_fa import api
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


@cache
def _of_jax_nn(name: str):
    (call,) = (call for call in CALLS if call.name == name)
    return _run(jax.nn.dot_product_attention, call, call.visible().any(axis=-1))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_parity(call, backend):
    visible = call.visible()
    seen = visible.any(axis=-1)
    theirs = _of_jax_nn(call.name)
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


@pytest.mark.in_turn
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


# --- every kind of argument that jax.nn takes

Q, KEY, VALUE = Call("kinds").operands()[:3]
BIAS, MASK = _float(B, N, T, S), _bool(B, N, T, S) | (np.arange(S) == 0)
MASKED = np.where(MASK, 0, np.float32(-np.inf))


def _each(dtype) -> tuple:
    return tuple(jnp.asarray(x, dtype) for x in (Q, KEY, VALUE))


def _weak(*shape: int):
    return jnp.full(shape, 0.5)  # a dtype that JAX may promote


# By name: positional arguments, and keywords.
KINDS: dict[str, tuple[tuple, dict[str, Any]]] = {
    "numpy": ((Q, KEY, VALUE), {}),
    "jax": (_each(jnp.float32), {}),
    "numpy float64": (tuple(np.float64(x) for x in (Q, KEY, VALUE)), {}),
    "numpy and jax": ((Q, *_each(jnp.float32)[1:]), {}),
    "lists": (tuple(x.tolist() for x in (Q, KEY, VALUE)), {}),
    "weak types": ((_weak(B, T, N, H), _weak(B, S, K, H), _weak(B, S, K, H)), {}),
    "a weak query": ((_weak(B, T, N, H), KEY, VALUE), {}),
    "keywords": ((), {"query": Q, "key": KEY, "value": VALUE, "bias": BIAS, "mask": MASK}),
    "by position": ((Q, KEY, VALUE, BIAS, MASK), {}),
    "no bias": ((Q, KEY, VALUE, None, MASK), {}),
    "integer bias": ((Q, KEY, VALUE, np.ones((1, 1, T, S), np.int32)), {}),
    "float64 bias": ((Q, KEY, VALUE, np.float64(BIAS)), {}),
    "float16 bias": ((Q, KEY, VALUE, np.float16(BIAS)), {}),
    "scalar bias": ((Q, KEY, VALUE, 0.5), {}),
    "list bias": ((Q, KEY, VALUE, BIAS.tolist()), {}),
    "bias of -inf": ((Q, KEY, VALUE, MASKED), {}),
    "bias of lowest": ((Q, KEY, VALUE, np.maximum(MASKED, np.finfo(np.float32).min)), {}),
    "list mask": ((Q, KEY, VALUE, None, MASK.tolist()), {}),
    "numpy scalar mask": ((Q, KEY, VALUE, None, np.bool_(True)), {}),
    "one key's mask": ((Q, KEY, VALUE, None, MASK[..., :1]), {}),
    "integer scale": ((Q, KEY, VALUE), {"scale": 1}),
    "numpy scale": ((Q, KEY, VALUE), {"scale": np.float64(0.3)}),
    "jax scale": ((Q, KEY, VALUE), {"scale": jnp.float32(0.3)}),
    "weak scale": ((Q, KEY, VALUE), {"scale": jnp.asarray(0.3)}),
    # (With fewer key heads, jax.nn has no shape for it.)
    "scale of each head": (
        (Q, *(np.repeat(x, N // K, axis=2) for x in (KEY, VALUE))),
        {"scale": np.linspace(0.1, 1, N, dtype=np.float32)[:, None, None]},
    ),
    "scale of each batch entry": ((Q, KEY, VALUE), {"scale": jnp.array([0.2, 0.7]).reshape(B, 1, 1, 1)}),
    "flags of 1": ((Q, KEY, VALUE), {"is_causal": 1, "return_residual": 1}),
    "numpy flags": ((Q, KEY, VALUE), {"is_causal": np.bool_(True), "return_residual": np.bool_(True)}),
    "no flags": ((Q, KEY, VALUE), {"is_causal": None, "return_residual": None}),
    "list lengths": ((Q, KEY, VALUE), {"key_value_seq_lengths": [3, 9]}),
    "tuple lengths": ((Q, KEY, VALUE), {"key_value_seq_lengths": (3, 9), "query_seq_lengths": (2, T)}),
    "numpy lengths": ((Q, KEY, VALUE), {"key_value_seq_lengths": np.array([3, 9])}),
    "list window": ((Q, KEY, VALUE), {"local_window_size": [2, 1]}),
    "numpy window": ((Q, KEY, VALUE), {"local_window_size": np.array([2, 1])}),
    "jax window": ((Q, KEY, VALUE), {"local_window_size": jnp.array([2, 1])}),
    "xla": ((Q, KEY, VALUE), {"implementation": "xla", "return_residual": True}),
    "no batch": ((Q[0], KEY[0], VALUE[0], BIAS[0], MASK[0]), {"return_residual": True}),
    "no batch, bias of one": ((Q[0], KEY[0], VALUE[0], BIAS[:1], MASK[:1]), {}),
    "no batch, lengths": ((Q[0], KEY[0], VALUE[0]), {"key_value_seq_lengths": _int(3)}),
    "ranks that differ": ((Q[:1], KEY[0], VALUE[0]), {}),
    "no rows": ((Q[:, :0], KEY, VALUE), {}),
    "no keys": ((Q, KEY[:, :0], VALUE[:, :0]), {}),
    "no batch entries": ((Q[:0], KEY[:0], VALUE[:0]), {}),
    "bfloat16": (_each(jnp.bfloat16), {"return_residual": True}),
    "bfloat16, float32 bias": ((*_each(jnp.bfloat16), BIAS), {}),
    "float16": (_each(jnp.float16), {"return_residual": True}),
}


def _types(results) -> list:
    return [(x.shape, x.dtype, x.aval.weak_type) for x in jax.tree.leaves(results)]


@cache
def _of_their_kinds(name: str, x64: bool) -> Any:
    """The results of jax.nn, as one program: without jit each operation would be one."""
    args, kwargs = KINDS[name]
    # It takes int32 alone.
    lengths = {n: np.asarray(x, np.int32) for n, x in kwargs.items() if n.endswith("seq_lengths")}
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("standard"):
        run = partial(jax.nn.dot_product_attention, *args, **kwargs | lengths)
        # Under jit XLA refuses its products of float16 on CPU.
        return run() if name == "float16" else jax.jit(lambda: run())()


@pytest.mark.one_in(4)
@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(
    ("x64", "promotion"), [(False, "standard"), (False, "strict"), (True, "strict")], ids=str
)
@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_arguments(name, x64, promotion):
    """Values, shapes, dtypes and weak types of jax.nn's results, under strict promotion too, where jax.nn may raise."""
    args, kwargs = KINDS[name]
    theirs = _of_their_kinds(name, x64)
    with jax.enable_x64(x64):
        with jax.numpy_dtype_promotion(promotion):
            ours = jax_fa.dot_product_attention(*args, **kwargs)
        assert _types(ours) == _types(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            rows = np.ones(np.shape(a), bool)
            if "query_seq_lengths" in kwargs:  # fully masked rows differ, as documented
                rows = rows & (np.arange(T) < np.array(kwargs["query_seq_lengths"])[:, None])[..., None, None]
            atol = 2e-6 if a.dtype in (jnp.float32, jnp.float64) else 4 * float(jnp.finfo(a.dtype).eps)
            close = {"atol": atol, "rtol": atol}
            np.testing.assert_allclose(*(np.where(rows, np.float64(x), 0) for x in (a, b)), **close)


REFUSED: dict[str, tuple[tuple, dict[str, Any], str]] = {
    "boolean bias": ((Q, KEY, VALUE, MASK), {}, r"bias must be numeric.*Pass it as mask"),
    "Python bool as mask": ((Q, KEY, VALUE, None, True), {}, r"A causal mask is is_causal=True"),
    "bool as scale": ((Q, KEY, VALUE), {"scale": True}, r"scale must be a number or None; got True"),
    "scale with dims": ((Q, KEY, VALUE), {"scale": np.full((T, 1), 0.3)}, r"scale must be a scalar, or"),
    "window of floats": (
        (Q, KEY, VALUE),
        {"local_window_size": (2.0, 1.0)},
        r"local_window_size must be an int",
    ),
    "integers": (tuple(np.int32(8 * x) for x in (Q, KEY, VALUE)), {}, r"query must have a floating dtype"),
    "one dim": ((Q[0, 0, 0], KEY[0, 0, 0], VALUE[0, 0, 0]), {}, r"query must have 4 dimensions .* or 3"),
    "empty head_dim": (
        (Q[..., :0], KEY[..., :0], VALUE[..., :0]),
        {"scale": 1.0},
        r"query must have head_dim D of at least 1",
    ),
}


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize("name", REFUSED)
def test_what_jax_nn_takes_and_ours_refuses(name):
    """These are listed in the docstring."""
    args, kwargs, message = REFUSED[name]
    with jax.numpy_dtype_promotion("standard"):
        jax.nn.dot_product_attention(*args, **kwargs)
        with pytest.raises((TypeError, ValueError), match=message):
            jax_fa.dot_product_attention(*args, **kwargs)


# --- cuDNN


def test_cudnn_gets_every_argument(monkeypatch):
    """As it was given, and as jax.nn takes it."""
    given = {}

    dense = jax.nn.dot_product_attention

    def theirs(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        given.update(kwargs)
        return dense(*args, **kwargs)

    monkeypatch.setattr(api, "_jax_nn", theirs)
    every = {
        "scale": 0.3,
        "is_causal": True,
        "query_seq_lengths": _int(T, 9),
        "key_value_seq_lengths": _int(30, 9),
        "local_window_size": (7, 0),
        "return_residual": True,
    }
    names = {"query", "key", "value", "bias", "mask", "implementation", *every}
    assert set(inspect.signature(dense).parameters) == names
    run = partial(jax_fa.dot_product_attention, Q, KEY, VALUE, BIAS, MASK, **every)
    found, want = (
        run(implementation="cudnn"),
        jax.nn.dot_product_attention(Q, KEY, VALUE, BIAS, MASK, **every),
    )
    jax.tree.map(np.testing.assert_array_equal, found, want)
    assert set(given) == set(every)
    with jax_fa.integrations.patch_jax_nn():  # does not take what asks for cuDNN by name
        jax.tree.map(np.testing.assert_array_equal, run(implementation="cudnn"), want)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN is there")
@pytest.mark.parametrize("jit", [False, True])
def test_cudnn_says_where_it_cannot_run(jit):
    run = partial(jax_fa.dot_product_attention, implementation="cudnn")
    message = r"implementation='cudnn' is jax\.nn's, which cannot serve this call: cuDNN is not detected\. None takes"
    with pytest.raises(NotImplementedError, match=message):
        (jax.jit(run) if jit else run)(*_each(jnp.bfloat16))


@pytest.mark.gpu
def test_cudnn():
    """That of jax.nn, with its gradients."""
    query, key, value = (jnp.ones((2, 128, n, 64), jnp.bfloat16) * jnp.arange(n)[:, None] for n in (4, 2, 2))

    def run(function, query):
        out = function(query, key, value, is_causal=True, implementation="cudnn")
        return out, jax.grad(lambda q: function(q, key, value, is_causal=True, implementation="cudnn").sum())(
            query
        )

    jax.tree.map(
        np.testing.assert_array_equal,
        run(jax_fa.dot_product_attention, query),
        run(jax.nn.dot_product_attention, query),
    )
