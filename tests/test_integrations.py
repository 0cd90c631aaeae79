"""Layers of other libraries with our attention in them, held against the same layers with their own.

Each library is optional: where it is not installed, its tests are skipped.
"""

import functools
import inspect
import os
import pickle
import re
import subprocess
import sys
import threading
import unittest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa import api
from jax_fa.integrations import patch_jax_nn, precision
from jax_fa.masks import Causal, Lengths, Prefix, SlidingWindow

B, S, N, K, D, E = 2, 12, 4, 2, 8, 32  # E = N * D: the width of the models
FORWARD = "flash_attention_fwd["  # our primitive in a jaxpr
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.04}
THEIRS = jax.nn.dot_product_attention


@pytest.fixture
def linen():
    return pytest.importorskip("flax.linen")


@pytest.fixture
def nnx():
    return pytest.importorskip("flax.nnx")


@pytest.fixture
def flax_ours(linen):
    from jax_fa.integrations import flax

    return flax


@pytest.fixture
def eqx():
    return pytest.importorskip("equinox")


@pytest.fixture
def eqx_ours(eqx):
    from jax_fa.integrations import equinox

    return equinox


@pytest.fixture
def hk():
    return pytest.importorskip("haiku")


@pytest.fixture
def hk_ours(hk):
    from jax_fa.integrations import haiku

    return haiku


@pytest.fixture
def keras(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # both are read when Keras is first imported
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    keras = pytest.importorskip("keras")
    assert keras.backend.backend() == "jax"
    with jax.numpy_dtype_promotion("standard"):  # Keras mixes dtypes
        yield keras


def _normal(*shape: int, seed: int = 0, dtype: str = "float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _tri(rows: int = S, columns: int = S) -> np.ndarray:
    return np.tri(rows, columns, dtype=bool)


def _padding() -> np.ndarray:
    """Keys of the second sequence end at 7; shape (B, 1, 1, S)."""
    return (np.arange(S) < np.array([S, 7])[:, None])[:, None, None]


def _count(fn, *args) -> int:
    """How many calls of our forward a function makes."""
    return str(jax.make_jaxpr(fn)(*args)).count(FORWARD)


def _with_gradients(fn, args, calls: bool):
    """Outputs, and the gradients of a weighted sum of them for every argument; `calls`: whether our kernels compute them."""

    def run(*args):
        out, vjp = jax.vjp(fn, *args)
        return out, vjp(_normal(*out.shape, seed=9, dtype=str(out.dtype)))

    traced = jax.jit(run).trace(*args)
    assert (FORWARD in str(traced.jaxpr)) == calls
    return traced.lower().compile()(*args)


def _close(ours, theirs, tolerance: float) -> None:
    """The tolerance is relative to the largest number of all."""
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    assert len(ours) == len(theirs) > 0
    scale = max(1.0, *(float(abs(x).max()) for x in theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def _same(ours, theirs, *args, dtype: str = "float32", calls: bool = True) -> None:
    """The same outputs and gradients, ours by our kernels and theirs not."""
    found = _with_gradients(ours, args, calls)
    with jax.numpy_dtype_promotion("standard"):  # which some of them need
        _close(found, _with_gradients(theirs, args, False), TOLERANCE[dtype])


def _mean_is(run, want, *, draws: int = 400) -> None:
    """The mean of a random function of a key is `want`, and its values differ from key to key."""
    outs = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(5), draws)), np.float64)
    deviation = outs.std(axis=0)
    assert (deviation > 0).mean() > 0.9
    # 6 standard errors: of some thousand numbers none is further off but by a fault.
    np.testing.assert_array_less(abs(outs.mean(axis=0) - want), 6 * deviation / draws**0.5 + 1e-5)


# --- patch_jax_nn


def _jax_nn(x):
    return jax.nn.dot_product_attention(x, x, x)


def _x():
    return _normal(B, S, N, D)


def test_patch_inside_and_outside():
    from jax import nn

    bound = THEIRS
    x = _x()
    with patch_jax_nn():
        assert _count(_jax_nn, x) == 1
        assert _count(lambda x: nn.dot_product_attention(x, x, x), x) == 1
        assert _count(lambda x: bound(x, x, x), x) == 0  # a name bound before
        assert inspect.signature(jax.nn.dot_product_attention) == inspect.signature(THEIRS)
        inside = _jax_nn(x)
    assert jax.nn.dot_product_attention is THEIRS and _count(_jax_nn, x) == 0
    np.testing.assert_allclose(inside, _jax_nn(x), atol=2e-6)


def test_patch_as_decorator():
    @patch_jax_nn(implementation="xla")
    def model(x):
        return _jax_nn(x)

    assert _count(model, _x()) == _count(jax.jit(model), _x()) == 1
    assert model.__name__ == "model" and jax.nn.dot_product_attention is THEIRS


def test_patch_is_left_on_an_error():
    with pytest.raises(ZeroDivisionError), patch_jax_nn():
        _ = 1 / 0
    assert jax.nn.dot_product_attention is THEIRS and _count(_jax_nn, _x()) == 0


def test_patches_nest():
    """The innermost counts; one object can be entered again."""

    def named(x):
        return str(jax.make_jaxpr(_jax_nn)(x)).split("implementation=")[1].split(",")[0]

    outer, inner = patch_jax_nn(), patch_jax_nn(implementation="xla")
    with outer:
        with inner:
            with outer, inner:
                assert named(_x()) == "'xla'"
            assert named(_x()) == "'xla'"
            with outer:
                assert named(_x()) == "None"
        assert named(_x()) == "None"
    assert _count(_jax_nn, _x()) == 0


def test_patch_retraces_jitted_functions():
    """One jitted function, outside and inside: neither runs what the other has compiled."""
    traced = []

    @jax.jit
    def model(x):
        traced.append(jax.nn.dot_product_attention is not THEIRS)
        return _jax_nn(x)

    x = _x()
    model(x)
    for _ in range(2):
        with patch_jax_nn():
            model(x)
        model(x)
    with patch_jax_nn(implementation="xla"):
        model(x)
    assert traced == [False, True, True]


def test_patch_is_of_its_thread():
    """Another thread keeps JAX's own, also where it enters and leaves in between."""
    counts = []

    def other():
        counts.append(_count(_jax_nn, _x()))
        with patch_jax_nn():
            counts.append(_count(_jax_nn, _x()))

    with patch_jax_nn():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        counts.append(_count(_jax_nn, _x()))
    assert counts == [0, 1, 1] and jax.nn.dot_product_attention is THEIRS


def test_patch_below_another_patch(monkeypatch):
    """Whoever replaced the function after us keeps what they put there."""
    with patch_jax_nn():
        ours = jax.nn.dot_product_attention
        monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args: ours(*args))
        assert _count(_jax_nn, _x()) == 1
    assert _count(_jax_nn, _x()) == 0
    monkeypatch.undo()  # puts ours back, which by now calls JAX's
    assert _count(_jax_nn, _x()) == 0
    jax.nn.dot_product_attention = THEIRS


@pytest.mark.parametrize("asked", [None, "xla", "cudnn"])
def test_patch_replaces_the_implementation_asked_for(asked):
    def run(x):
        return jax.nn.dot_product_attention(x, x, x, implementation=asked)

    with patch_jax_nn(implementation="xla"):
        assert "implementation='xla'" in str(jax.make_jaxpr(run)(_x()))


def test_patch_passes_every_argument():
    x, key = _x(), _normal(B, S, K, D, seed=1)
    bias, mask = _normal(1, N, S, S, seed=2), _padding()
    every = {
        "scale": 0.3,
        "is_causal": True,
        "query_seq_lengths": jnp.array([S, 9], jnp.int32),
        "key_value_seq_lengths": jnp.array([S, 9], jnp.int32),
        "local_window_size": (8, 2),
        "return_residual": True,
    }
    theirs = set(inspect.signature(THEIRS).parameters)
    assert theirs == {"query", "key", "value", "bias", "mask", "implementation", *every}

    def run(x, key, bias):
        out, residual = jax.nn.dot_product_attention(x, key, key, bias, mask, **every)
        seen = jnp.arange(S) < jnp.array([S, 9])[:, None]  # what follows differs on purpose
        return jnp.where(seen[..., None], out.reshape(B, S, -1), 0), jnp.where(seen[..., None], residual, 0)

    with patch_jax_nn():
        assert _count(run, x, key, bias) == 1
        ours = run(x, key, bias)
    _close(ours, run(x, key, bias), TOLERANCE["float32"])


def test_patch_gives_0_for_rows_that_see_nothing():
    x = _x()
    with patch_jax_nn():
        out = jax.nn.dot_product_attention(x, x, x, key_value_seq_lengths=jnp.array([0, S], jnp.int32))
    assert not out[0].any() and out[1].all()


@pytest.mark.usefixtures("no_type_checker")
def test_patch_errors():
    with pytest.raises(ValueError, match=r"implementation must be .*got 'fast'"):
        patch_jax_nn(implementation="fast")
    x = _x()
    with patch_jax_nn(), pytest.raises(TypeError, match=r"no argument 'causal'; pass is_causal=True instead"):
        jax.nn.dot_product_attention(x, x, x, causal=True)
    with patch_jax_nn(), pytest.raises(ValueError, match=r"one of jax.nn's, None, 'xla', 'cudnn'; got 'cpu'"):
        jax.nn.dot_product_attention(x, x, x, implementation="cpu")


def test_the_package_imports_no_library():
    """`jax_fa.integrations` is light, also where all of them are installed."""
    program = (
        "import sys, jax_fa.integrations\n"
        "assert not {'flax', 'equinox', 'haiku', 'keras'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


# --- flax.linen

LINEN = {
    "self": ({}, {}),
    "batch dims": ({}, {"inputs": [(2, 3, 5, E)]}),
    "no batch dim": ({}, {"inputs": [(S, E)]}),
    "cross": ({}, {"inputs": [(B, S, E), (B, 7, E)]}),
    "values": ({}, {"inputs": [(B, S, E), (B, 7, E), (B, 7, 24)]}),
    "normalized": ({"normalize_qk": True}, {}),
    "float mask": ({}, {"mask": np.float32(_tri())[None, None]}),
    "bool mask": ({}, {"mask": _padding() & _tri()}),
    "integer mask": ({}, {"mask": np.int32(_padding())}),
    "softmax in float32": ({"force_fp32_for_softmax": True}, {}),
    "bfloat16": ({"dtype": jnp.bfloat16}, {"mask": _padding()}),
    "rate 0 while training": ({"dropout_rate": 0.0, "deterministic": False}, {}),
    "deterministic": ({"dropout_rate": 0.5, "deterministic": True}, {}),
}


@pytest.mark.parametrize("case", LINEN)
def test_linen(case, linen, flax_ours):
    options, call = LINEN[case]
    inputs = [_normal(*shape, seed=i) for i, shape in enumerate(call.get("inputs", [(B, S, E)]))]
    theirs = linen.MultiHeadDotProductAttention(N, qkv_features=E, **options)
    ours = theirs.clone(attention_fn=flax_ours.attention_fn)
    variables = theirs.init(jax.random.key(0), *inputs)
    assert jax.tree.structure(ours.init(jax.random.key(0), *inputs)) == jax.tree.structure(variables)
    apply = [functools.partial(layer.apply, mask=call.get("mask")) for layer in (ours, theirs)]
    _same(*apply, variables, *inputs, dtype=jnp.dtype(options.get("dtype", "float32")).name)


@pytest.mark.parametrize("name", ["MultiHeadAttention", "SelfAttention"])
@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
def test_linen_other_layers(name, linen, flax_ours):
    theirs = getattr(linen, name)(N)
    x = _normal(B, S, E)
    _same(
        theirs.clone(attention_fn=flax_ours.attention_fn).apply,
        theirs.apply,
        theirs.init(jax.random.key(0), x),
        x,
    )


@pytest.mark.parametrize(
    ("mask", "dense"),
    [
        (Causal("bottom-right"), _tri()),
        (Causal() & Lengths(key=jnp.array([S, 7])), _tri() & _padding()),
        (SlidingWindow(3, 0), _tri() & ~np.tri(S, k=-4, dtype=bool)),
    ],
    ids=["causal", "causal and lengths", "window"],
)
@pytest.mark.parametrize("by", ["factory", "call"])
def test_linen_structured_masks(by, mask, dense, linen, flax_ours):
    """In the factory, joined with an array that the layer gets; or in place of that array."""
    theirs = linen.MultiHeadDotProductAttention(N)
    x = _normal(B, S, E)
    left = np.arange(S) > 0  # so that no row but the first is empty
    extra = (left | ~_tri()[:, ::-1])[None, None] | _tri(S, 1)
    if by == "factory":
        ours = theirs.clone(attention_fn=flax_ours.make_attention_fn(mask=mask))
        run = functools.partial(ours.apply, mask=jnp.asarray(extra))
    else:
        ours = theirs.clone(attention_fn=flax_ours.attention_fn)
        run = functools.partial(ours.apply, mask=mask & extra)
    _same(run, functools.partial(theirs.apply, mask=dense & extra), theirs.init(jax.random.key(0), x), x)


def test_linen_in_a_stack(linen, flax_ours):
    """remat and scan over layers, under jit and grad."""

    def stack(attention_fn):
        class Block(linen.Module):
            @linen.compact
            def __call__(self, x, _):
                attention = linen.MultiHeadDotProductAttention(N, attention_fn=attention_fn)
                return x + attention(x, mask=linen.make_causal_mask(x[..., 0])), None

        repeat = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
        return linen.scan(linen.remat(Block, prevent_cse=False), **repeat)()

    x = _normal(B, S, E)
    ours, theirs = stack(flax_ours.attention_fn), stack(linen.dot_product_attention)
    variables = theirs.init(jax.random.key(0), x, None)
    _same(*(lambda v, x, m=m: m.apply(v, x, None)[0] for m in (ours, theirs)), variables, x)


def test_linen_decoding(linen, flax_ours):
    """Token by token with a cache: Flax's own steps, and the rows of a causal call."""
    causal = flax_ours.make_attention_fn(mask=Causal("bottom-right"))
    x = _normal(B, S, E)
    theirs = linen.MultiHeadDotProductAttention(N, decode=True)
    variables = theirs.init(jax.random.key(0), x)
    whole = theirs.clone(decode=False, attention_fn=causal).apply({"params": variables["params"]}, x)
    for attention_fn in (flax_ours.attention_fn, causal):
        ours = theirs.clone(attention_fn=attention_fn)
        steps = [jax.jit(functools.partial(m.apply, mutable="cache")) for m in (ours, theirs)]
        assert _count(steps[0], variables, x[:, :1]) == 1
        states = [variables, variables]
        for i in range(S):
            rows = []
            for m, step in enumerate(steps):
                row, cache = step(states[m], x[:, i : i + 1])
                states[m] = {**variables, **cache}
                rows.append(row)
            _close(rows[0], rows[1], TOLERANCE["float32"])
            _close(rows[0], whole[:, i : i + 1], TOLERANCE["float32"])
        assert states[0]["cache"]["cache_index"] == S


def test_linen_dropout(linen, flax_ours):
    """Reproducible for each rng, 0 in the mean."""
    x = _normal(B, S, E)
    layer = linen.MultiHeadDotProductAttention(N, dropout_rate=0.4, attention_fn=flax_ours.attention_fn)
    variables = layer.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, deterministic=True)
    run = functools.partial(layer.apply, variables, x)
    want = run(deterministic=True)
    train = functools.partial(run, deterministic=False)
    one, again, by_hand = (
        train(rngs={"dropout": jax.random.key(1)}),
        train(rngs={"dropout": jax.random.key(1)}),
        train(dropout_rng=jax.random.key(1)),
    )
    np.testing.assert_array_equal(one, again)
    assert (one != want).mean() > 0.9 and (one != by_hand).any()
    _mean_is(lambda key: train(dropout_rng=key), np.asarray(want))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "independent"])
def test_flax_broadcast_dropout(shared, flax_ours, backend):
    """One pattern for all batch entries and heads, as Flax draws it, or one for each."""
    zero = jnp.zeros((2, 3, S, N, S))
    values = jnp.broadcast_to(jnp.eye(S)[:, None], zero.shape)  # out is the weights, 1 / S or 0
    options = {"dropout_rng": jax.random.key(2), "dropout_rate": 0.5, "broadcast_dropout": shared}
    fn = flax_ours.make_attention_fn(implementation=backend)

    def weights(values):
        return fn(zero, zero, values, **options)

    kept, vjp = jax.vjp(weights, values)
    kept = np.asarray(kept) > 0
    assert 0.4 < kept.mean() < 0.6
    patterns = np.unique(np.moveaxis(kept, -2, 2).reshape(-1, S * S), axis=0)
    assert len(patterns) == (1 if shared else 2 * 3 * N)
    # The gradient drops the same weights: value j gets the sum of its column.
    (gradient,) = vjp(jnp.ones_like(values))
    columns = kept.sum(axis=2).swapaxes(-1, -2)  # B B S N
    np.testing.assert_allclose(gradient[..., 0], columns * 2 / S, atol=1e-5)


def test_flax_functions(linen, nnx, flax_ours):
    """`attention_fn` is both libraries' `dot_product_attention`: names, order, defaults and results."""
    ours = inspect.signature(flax_ours.attention_fn).parameters
    for theirs in (linen.dot_product_attention, nnx.dot_product_attention):
        want = inspect.signature(theirs).parameters
        assert set(want) <= set(ours)
        shared = list(want)[: list(want).index("module") + 1]
        assert list(ours)[: len(shared)] == shared
        assert all(ours[n].default == want[n].default for n in want if n != "promote_dtype")
    q, k, v = _x(), _normal(B, 7, N, D, seed=1), _normal(B, 7, N, 5, seed=2)
    bias = _normal(1, N, 1, 7, seed=3)
    _same(flax_ours.attention_fn, linen.dot_product_attention, q, k, v, bias)


def test_flax_options(flax_ours):
    """Each option of the factory is that of `flash_attention`."""
    x = _x()
    options = {
        "alibi_slopes": _normal(N, seed=3),
        "scale": 0.3,
        "logits_soft_cap": 2.0,
        "implementation": "xla",
    }
    made = flax_ours.make_attention_fn(mask=Causal(), **options)
    want = jax_fa.flash_attention(x, x, x, mask=Causal(), **options)
    np.testing.assert_array_equal(made(x, x, x), want)
    assert set(inspect.signature(flax_ours.make_attention_fn).parameters) == {"mask", *options}
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(made))(x, x, x), want)


def test_flax_dtypes(linen, flax_ours):
    """Promotion is Flax's, or the function given."""
    low, high = _normal(B, S, N, D, dtype="bfloat16"), _x()
    with jax.numpy_dtype_promotion("standard"):
        assert flax_ours.attention_fn(low, high, high).dtype == jnp.float32
    assert flax_ours.attention_fn(low, high, high, dtype=jnp.float16).dtype == jnp.float16
    whole = jnp.ones((B, S, N, D), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):
        assert flax_ours.attention_fn(whole, whole, whole).dtype == jnp.float32

    def down(arrays, dtype):
        assert dtype is None
        return tuple(x.astype(jnp.bfloat16) for x in arrays)

    assert flax_ours.attention_fn(low, high, high, promote_dtype=down).dtype == jnp.bfloat16


def test_flax_rows_that_see_nothing(flax_ours):
    out = flax_ours.attention_fn(_x(), _x(), _x(), mask=np.arange(S)[:, None] > 0)
    assert not out[:, 0].any() and out[:, 1:].all()


PRECISIONS = [
    None,
    "default",
    "highest",
    "tensorfloat32",
    jax.lax.Precision.HIGHEST,
    ("default", "highest"),
    jax.lax.DotAlgorithmPreset.F32_F32_F32,
    "BF16_BF16_F32_X3",
]


@pytest.mark.parametrize("asked", PRECISIONS, ids=str)
def test_flax_accepts_every_precision_that_is_met(asked, flax_ours, linen):
    """On CPU float32 products are exact to float32; sums of 16-bit products are float32 everywhere."""
    for dtype in ("float32", "bfloat16"):
        x = _x().astype(dtype)
        run = jax.jit(lambda x: flax_ours.attention_fn(x, x, x, precision=asked))
        np.testing.assert_array_equal(run(x), flax_ours.attention_fn(x, x, x))
    x = _normal(B, S, E)
    layer = linen.MultiHeadDotProductAttention(N, precision=asked, attention_fn=flax_ours.attention_fn)
    layer.init(jax.random.key(0), x)


def test_flax_refuses_a_precision_that_is_not_met(flax_ours, monkeypatch):
    x = _x()
    with pytest.raises(NotImplementedError, match=r"precision='F64_F64_F64' asks for float64; float32 is"):
        flax_ours.attention_fn(x, x, x, precision="F64_F64_F64")
    for unknown in ("fast", 3, ("default", "fast")):
        with pytest.raises(NotImplementedError, match=r"precision must be None, a jax\.lax\.Precision or"):
            flax_ours.attention_fn(x, x, x, precision=unknown)
    monkeypatch.setattr(precision, "here", lambda: "tpu")
    for accepted in (None, "default", "bfloat16", "BF16_BF16_F32"):
        flax_ours.attention_fn(x, x, x, precision=accepted)
    low = x.astype(jnp.bfloat16)
    flax_ours.attention_fn(low, low, low, precision="highest")
    for refused in ("high", jax.lax.Precision.HIGHEST, ("default", "highest"), "F32_F32_F32"):
        with pytest.raises(
            NotImplementedError, match=r"precision=.* is more than the kernels may use on tpu"
        ):
            flax_ours.attention_fn(x, x, x, precision=refused)
        with jax.default_matmul_precision("highest"):
            fn = flax_ours.make_attention_fn(implementation="xla")
            run = jax.jit(lambda x, fn=fn, p=refused: fn(x, x, x, precision=p))
            assert "precision = [HIGHEST, HIGHEST]" in run.lower(x).as_text()


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (NotImplementedError, "module must be None: sow_weights=True", {"module": object()}),
        (NotImplementedError, "einsum_dot_general must be None", {"einsum_dot_general": jax.lax.dot_general}),
        (NotImplementedError, "qk_attn_weights_einsum must be None", {"qk_attn_weights_einsum": jnp.einsum}),
        (NotImplementedError, "attn_weights_value_einsum must", {"attn_weights_value_einsum": jnp.einsum}),
        (ValueError, r"dropout_rng must be .* dropout_rate=0.5; got None", {"dropout_rate": 0.5}),
        (
            ValueError,
            r"dropout_rate must be .* \[0, 1\)",
            {"dropout_rate": 1.0, "dropout_rng": jax.random.key(0)},
        ),
        (
            TypeError,
            "dropout_rng must be a jax.random key, .* got 0",
            {"dropout_rate": 0.5, "dropout_rng": 0},
        ),
        (TypeError, r"dropout_rate must be a number in \[0, 1\); got None", {"dropout_rate": None}),
        (TypeError, "mask must be one mask; got a list of 2", {"mask": [Causal(), Causal()]}),
        (TypeError, "mask must be .* got True. A causal mask is", {"mask": True}),
        (TypeError, "mask must be .* got str", {"mask": "causal"}),
        (TypeError, "bias must be an array; got 'abc'", {"bias": "abc"}),
        (ValueError, "mask must broadcast to", {"mask": np.ones((3, 1, S, S))}),
        (ValueError, "bias must broadcast to", {"bias": jnp.ones((S + 1,))}),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_flax_errors(error, message, options, flax_ours):
    with pytest.raises(error, match=message):
        flax_ours.attention_fn(_x(), _x(), _x(), **options)


def test_flax_layers_reach_the_errors(linen, nnx, flax_ours):
    x = _normal(B, S, E)
    layer = linen.MultiHeadDotProductAttention(N, attention_fn=flax_ours.attention_fn)
    with pytest.raises(NotImplementedError, match="sow_weights=True"):
        layer.init(jax.random.key(0), x, sow_weights=True)
    einsum = {
        "qk_attn_weights_einsum_cls": lambda: jnp.einsum,
        "attn_weights_value_einsum_cls": lambda: jnp.einsum,
    }
    with pytest.raises(NotImplementedError, match="qk_attn_weights_einsum must be None"):
        layer.clone(**einsum).init(jax.random.key(0), x)
    layer = nnx.MultiHeadAttention(N, E, attention_fn=flax_ours.attention_fn, decode=False, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="sow_weights=True"):
        layer(x, sow_weights=True)


@pytest.mark.parametrize(
    "options",
    [
        {"mask": Causal()},
        {"mask": SlidingWindow(3, 0, "bottom-right")},
        {"mask": Lengths(key=(3, 3)) & Prefix(3)},
        {"mask": Causal("bottom-right", offset=-1)},
        {"alibi_slopes": np.ones(N, np.float32)},
    ],
    ids=str,
)
def test_flax_refuses_positions_when_decoding(options, flax_ours):
    made = flax_ours.make_attention_fn(**options)
    with pytest.raises(ValueError, match=rf"one query and {S} keys, a step of decoding"):
        made(_x()[:, :1], _x(), _x())
    made(_x(), _x(), _x())


def test_flax_factory_errors(flax_ours, no_type_checker):
    with pytest.raises(ValueError, match=r"implementation must be .*got 'fast'"):
        flax_ours.make_attention_fn(implementation="fast")
    with pytest.raises(TypeError, match=r"mask must be a jax_fa\.masks\.Mask or a boolean array; got str"):
        flax_ours.make_attention_fn(mask="causal")


# --- flax.nnx

NNX = {
    "self": ({}, {}),
    "batch dims": ({}, {"shape": (2, 3, 5, E)}),
    "causal": ({}, {"is_causal": True}),
    "causal and mask": (
        {},
        {"is_causal": True, "mask": np.float32(np.broadcast_to(_padding(), (B, 1, S, S)))},
    ),
    "grouped": ({"num_kv_heads": K}, {"is_causal": True}),
    "one key head": ({"num_kv_heads": 1}, {"mask": _padding()}),
    "normalized": ({"normalize_qk": True}, {}),
    "bfloat16": ({"dtype": jnp.bfloat16, "num_kv_heads": K}, {"is_causal": True}),
    "deterministic": ({"dropout_rate": 0.5, "deterministic": True}, {}),
}


def _nnx_run(nnx, attention_fn, options, call):
    """The layer as a function of its state and input, and that state."""
    layer = nnx.MultiHeadAttention(N, E, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0), **options)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    return lambda params, x: nnx.merge(graph, params, rest)(x, **call), params


@pytest.mark.parametrize("case", NNX)
def test_nnx(case, nnx, flax_ours):
    options, call = NNX[case]
    call = dict(call)
    x = _normal(*call.pop("shape", (B, S, E)))
    ours, params = _nnx_run(nnx, flax_ours.attention_fn, options, call)
    theirs, _ = _nnx_run(nnx, nnx.dot_product_attention, options, call)
    _same(ours, theirs, params, x, dtype=jnp.dtype(options.get("dtype", "float32")).name)


def test_nnx_structured_mask(nnx, flax_ours):
    x = _normal(B, S, E)
    made = flax_ours.make_attention_fn(mask=Causal())
    ours, params = _nnx_run(nnx, made, {"num_kv_heads": K}, {"mask": jnp.asarray(_padding())})
    theirs, _ = _nnx_run(nnx, nnx.dot_product_attention, {"num_kv_heads": K}, {"mask": _padding() & _tri()})
    _same(ours, theirs, params, x)
    by_call, _ = _nnx_run(nnx, flax_ours.attention_fn, {"num_kv_heads": K}, {"mask": Causal() & _padding()})
    _close(by_call(params, x), ours(params, x), 1e-6)


def test_nnx_transforms(nnx, flax_ours):
    """nnx.jit, nnx.remat and nnx.value_and_grad around the layer."""
    x = _normal(B, S, E)

    def loss(layer, x):
        return jnp.mean(nnx.remat(lambda layer, x: layer(x, is_causal=True))(layer, x) ** 2)

    results = []
    for attention_fn in (flax_ours.attention_fn, nnx.dot_product_attention):
        layer = nnx.MultiHeadAttention(N, E, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))
        results.append(nnx.jit(nnx.value_and_grad(loss))(layer, x))
    _close(*results, TOLERANCE["float32"])


def test_nnx_decoding(nnx, flax_ours):
    """Token by token with a cache, with fewer key heads."""
    x = _normal(B, S, E)
    made = flax_ours.make_attention_fn(mask=Causal("bottom-right"))
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    layers = []
    for attention_fn in (flax_ours.attention_fn, made, nnx.dot_product_attention):
        layer = nnx.MultiHeadAttention(
            N, E, num_kv_heads=K, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0)
        )
        layer.init_cache(x.shape)
        layers.append(layer)
    whole = layers[1](x)
    for i in range(S):
        rows = [step(layer, x[:, i : i + 1]) for layer in layers]
        for row in rows:
            _close(row, whole[:, i : i + 1], TOLERANCE["float32"])
    assert all(layer.cache_index[...] == S for layer in layers)


def test_nnx_decoding_with_is_causal(nnx, flax_ours):
    """Layers hand it on beside their own causal mask: counted from the first key, it would leave that key alone.

    (Those of newer releases do not hand it on, and then it changes nothing.)
    """
    x, results = _normal(B, 1, E), []
    for options in ({}, {"is_causal": True}):
        layer = nnx.MultiHeadAttention(
            N, E, attention_fn=flax_ours.attention_fn, decode=True, rngs=nnx.Rngs(0)
        )
        layer.init_cache((B, S, E))
        try:
            results.append([layer(x, **options), layer(2 * x, **options)])
        except ValueError as error:
            assert f"is_causal must be False with one query and {S} keys, a step of decoding" in str(error)
            assert options
    for other in results[1:]:
        _close(other, results[0], TOLERANCE["float32"])


def test_flax_dropout_rate_as_data(flax_ours):
    key = jax.random.key(0)
    run = lambda rate: flax_ours.attention_fn(_x(), _x(), _x(), dropout_rate=rate, dropout_rng=key)
    _close(jax.jit(run)(jnp.float32(0.25)), run(0.25), TOLERANCE["float32"])
    with pytest.raises(ValueError, match=r"dropout_rate must be in \[0, 1\); got -0.5"):
        run(-0.5)


def test_nnx_dropout(nnx, flax_ours):
    x = _normal(B, S, E)
    layer = nnx.MultiHeadAttention(
        N, E, attention_fn=flax_ours.attention_fn, dropout_rate=0.4, decode=False, rngs=nnx.Rngs(0)
    )
    want = layer(x, deterministic=True)
    one, again, other = (layer(x, deterministic=False, rngs=nnx.Rngs(dropout=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != want).any() and (one != other).any()
    graph, state = nnx.split(layer)

    def run(key):
        return nnx.merge(graph, state)(x, deterministic=False, rngs=nnx.Rngs(dropout=key))

    _mean_is(run, np.asarray(want))


def test_nnx_stock_layer_inside_the_patch(nnx):
    """nnx calls jax.nn where there is no dropout, so the patch alone is enough."""
    run, params = _nnx_run(nnx, nnx.dot_product_attention, {"num_kv_heads": K}, {"is_causal": True})
    x = _normal(B, S, E)
    _same(patch_jax_nn()(lambda *args: run(*args)), run, params, x)


# --- equinox

EQUINOX = {
    "self": ({}, {}),
    "biases": ({f"use_{name}_bias": True for name in ("query", "key", "value", "output")}, {}),
    "sizes": ({"qk_size": 5, "vo_size": 6, "output_size": 10}, {}),
    "mask": ({}, {"mask": jnp.asarray(_tri())}),
    "mask by head": ({}, {"mask": jnp.asarray(_tri() | (np.arange(N) == 1)[:, None, None])}),
    "inference": ({"dropout_p": 0.5}, {"inference": True}),
    "of inference": ({"dropout_p": 0.5, "inference": True}, {}),
    "a key without dropout": ({}, {"key": jax.random.key(0)}),
    "other heads": ({}, {"process_heads": lambda q, k, v: (q + 1, k * 2, v[::-1])}),
    "bfloat16": ({"dtype": jnp.bfloat16}, {"mask": jnp.asarray(_tri())}),
}


def _eqx_layer(eqx, **options):
    return eqx.nn.MultiheadAttention(N, E, key=jax.random.key(0), **options)


@pytest.mark.parametrize("case", EQUINOX)
def test_equinox(case, eqx, eqx_ours):
    options, call = EQUINOX[case]
    dtype = jnp.dtype(options.get("dtype", "float32")).name
    theirs = _eqx_layer(eqx, **options)
    ours = eqx_ours.use_flash_attention(theirs)
    x, y = _normal(B, S, E, dtype=dtype), _normal(B, S, E, seed=1, dtype=dtype)

    def run(layer):
        params, static = eqx.partition(layer, eqx.is_inexact_array)

        def apply(params, x, y):
            return jax.vmap(lambda x, y: eqx.combine(params, static)(x, y, y, **call))(x, y)

        return apply, params

    (one, params), (two, same) = run(ours), run(theirs)
    assert all(a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True))
    _close(one(params, x, y), two(same, x, y), TOLERANCE[dtype])
    # The trees differ in the class only, so leaves are what gradients are compared by.
    leaves, theirs_tree = jax.tree.flatten(same)
    tree = jax.tree.structure(params)
    _same(
        lambda leaves, *xs: one(tree.unflatten(leaves), *xs),
        lambda leaves, *xs: two(theirs_tree.unflatten(leaves), *xs),
        leaves,
        x,
        y,
        dtype=dtype,
    )


def test_equinox_structured_mask(eqx, eqx_ours):
    theirs = _eqx_layer(eqx)
    ours = eqx_ours.use_flash_attention(theirs)
    x = _normal(B, S, E)
    _same(
        jax.vmap(lambda x: ours(x, x, x, Causal())),
        jax.vmap(lambda x: theirs(x, x, x, jnp.asarray(_tri()))),
        x,
    )
    lengths = jnp.array([S, 7])  # one mask per batch entry
    _same(
        lambda x: jax.vmap(lambda x, n: ours(x, x, x, Causal() & Lengths(key=n)))(x, lengths),
        lambda x: jax.vmap(lambda x, m: theirs(x, x, x, m))(x, jnp.asarray(_padding()[:, 0] & _tri())),
        x,
    )


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from _equations(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_equinox_vmap_moves_nothing(gradient, eqx, eqx_ours):
    """The batch is a batch dim of one call, heads are its N, and no array of query's size is transposed."""
    layer = eqx_ours.MultiheadAttention(N, E, use_query_bias=True, key=jax.random.key(0))
    x = _normal(B, S, E)

    def run(x):
        return jax.vmap(lambda x: layer(x, x, x, Causal()))(x)

    fn = jax.grad(lambda x: run(x).sum()) if gradient else run
    equations = list(_equations(jax.make_jaxpr(fn)(x).jaxpr))
    calls = [e for e in equations if e.primitive.name.startswith("flash_attention")]
    assert {e.primitive.name for e in calls} == {
        "flash_attention_fwd",
        *(["flash_attention_bwd"] if gradient else []),
    }
    for call in calls:
        assert call.params["problem"].query_axes == call.params["problem"].out_axes == (0, 1, 2, 3)
        assert [v.aval.shape for v in call.invars[:3]] == [(B, S, N, D)] * 3
    moved = [e for e in equations if e.primitive.name == "transpose" and e.invars[0].aval.size >= x.size]
    assert moved == []
    # The library's own way of projecting does transpose, so this test can fail.
    stock = _eqx_layer(eqx)
    stock_equations = _equations(jax.make_jaxpr(jax.vmap(lambda x: stock(x, x, x)))(x).jaxpr)
    assert any(e.primitive.name == "transpose" and e.invars[0].aval.size >= x.size for e in stock_equations)


def test_equinox_models(eqx, eqx_ours, tmp_path):
    """Every layer of a model, nothing else; a checkpoint of the one loads into the other."""

    class Model(eqx.Module):
        layers: list
        head: eqx.nn.MLP

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.layers = [eqx.nn.MultiheadAttention(N, E, key=k) for k in keys[:2]]
            self.head = eqx.nn.MLP(E, E, E, 1, key=keys[2])

        def __call__(self, x):
            for layer in self.layers:
                x = x + eqx.filter_checkpoint(layer)(x, x, x, jnp.asarray(_tri()))
            return jax.vmap(self.head)(x)

    model = Model(jax.random.key(0))
    swapped = eqx_ours.use_flash_attention(model, implementation="xla")
    assert [type(layer) for layer in swapped.layers] == [eqx_ours.MultiheadAttention] * 2
    assert [layer.implementation for layer in swapped.layers] == ["xla"] * 2
    assert type(model.layers[0]) is eqx.nn.MultiheadAttention
    x = _normal(B, S, E)
    assert _count(jax.vmap(swapped), x) == 2 and _count(jax.vmap(model), x) == 0

    def loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    results = [eqx.filter_jit(eqx.filter_value_and_grad(loss))(m, x) for m in (swapped, model)]
    _close(*results, TOLERANCE["float32"])
    eqx.tree_serialise_leaves(tmp_path / "model", model)
    other = eqx_ours.use_flash_attention(Model(jax.random.key(1)))
    loaded = eqx.tree_deserialise_leaves(tmp_path / "model", other)
    _close(jax.vmap(loaded)(x), jax.vmap(model)(x), TOLERANCE["float32"])
    # Again, to change the implementation; and Equinox's own surgery.
    again = eqx_ours.use_flash_attention(swapped, implementation=None)
    assert [layer.implementation for layer in again.layers] == [None] * 2
    assert eqx.nn.inference_mode(again).layers[0].dropout.inference


def test_equinox_projection_of_another_kind(eqx, eqx_ours):
    """A projection that is no plain Linear is called row by row, as Equinox does."""

    class Scaled(eqx.nn.Linear):
        def __call__(self, x, *, key=None):
            return 2 * super().__call__(x)

    theirs = _eqx_layer(eqx)
    scaled = Scaled(E, E, use_bias=False, key=jax.random.key(3))
    theirs = eqx.tree_at(lambda layer: layer.query_proj, theirs, scaled)
    ours = eqx_ours.use_flash_attention(theirs)
    x = _normal(S, E)
    _same(lambda x: ours(x, x, x), lambda x: theirs(x, x, x), x)


def test_equinox_dropout(eqx, eqx_ours):
    layer = eqx_ours.MultiheadAttention(N, E, dropout_p=0.4, key=jax.random.key(0))
    x = _normal(S, E)
    want = layer(x, x, x, inference=True)
    run = functools.partial(layer, x, x, x, jnp.asarray(_tri()))
    one, again, other = (run(key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != want).any() and (one != other).any()
    _mean_is(lambda key: layer(x, x, x, key=key), np.asarray(want))


def test_equinox_dropout_rate_as_data(eqx, eqx_ours):
    """A rate that is a leaf of the model, under jit: as the same number."""
    layer = eqx_ours.MultiheadAttention(N, E, dropout_p=0.25, key=jax.random.key(0))
    x, key = _normal(S, E), jax.random.key(1)
    traced = eqx.tree_at(lambda layer: layer.dropout.p, layer, jnp.float32(0.25))
    arrays, rest = eqx.partition(traced, eqx.is_array)
    found = jax.jit(lambda arrays: eqx.combine(arrays, rest)(x, x, x, key=key))(arrays)
    _close(found, layer(x, x, x, key=key), TOLERANCE["float32"])
    with pytest.raises(ValueError, match=r"key must be a jax\.random key where inference is false"):
        jax.jit(lambda arrays: eqx.combine(arrays, rest)(x, x, x))(arrays)


@pytest.mark.usefixtures("no_type_checker")
def test_equinox_errors(eqx, eqx_ours):
    layer = eqx_ours.MultiheadAttention(N, E, dropout_p=0.4, key=jax.random.key(0))
    x = _normal(S, E)
    with pytest.raises(ValueError, match=r"key must be a jax.random key .* dropout_p=0.4; got None"):
        layer(x, x, x)
    with pytest.raises(TypeError, match=r"key must be a jax\.random key, such as .*; got 0\."):
        layer(x, x, x, key=0)
    with pytest.raises(TypeError, match=r"mask must be one mask; got a list of 1\. Join masks by &"):
        layer(x, x, x, [Causal()], inference=True)
    with pytest.raises(ValueError, match="process_heads must keep the shapes"):
        layer(x, x, x, inference=True, process_heads=lambda q, k, v: (q[1:], k, v))
    with pytest.raises(ValueError, match="value must have key's"):
        layer(x, x, x[1:], inference=True)
    with pytest.raises(ValueError, match="mask must broadcast to"):
        layer(x, x, x, jnp.ones((S, S + 1), bool), inference=True)
    with pytest.warns(DeprecationWarning, match="use inference"):
        layer(x, x, x, deterministic=True)
    with pytest.raises(ValueError, match=r"implementation must be .*got 'fast'"):
        eqx_ours.MultiheadAttention(N, E, key=jax.random.key(0), implementation="fast")
    with pytest.raises(ValueError, match=r"implementation must be .*got 'fast'"):
        eqx_ours.use_flash_attention(layer, implementation="fast")
    with pytest.raises(
        ValueError, match=r"model must hold an equinox\.nn\.MultiheadAttention; Linear has none"
    ):
        eqx_ours.use_flash_attention(layer.query_proj)

    class Own(eqx.nn.MultiheadAttention):
        pass

    with pytest.raises(TypeError, match="got Own, a subclass"):
        eqx_ours.use_flash_attention([Own(N, E, key=jax.random.key(0))])


# --- haiku

HAIKU = {
    "self": ({}, {}),
    "no batch dim": ({}, {"shapes": [(S, E)] * 3}),
    "batch dims": ({}, {"shapes": [(2, 3, 5, E)] * 3}),
    "shared keys": ({}, {"shapes": [(B, S, E), (1, 7, E), (7, E)]}),
    "sizes": ({"value_size": 5, "model_size": 10}, {}),
    "no biases": ({"with_bias": False}, {}),
    "mask": ({}, {"mask": _padding() & _tri()}),
    "float mask": ({}, {"mask": np.float32(_tri())[None, None]}),
    "bfloat16": ({}, {"mask": _padding(), "dtype": "bfloat16"}),
}


def _hk_run(hk, cls, options, mask=None):
    def apply(query, key, value):
        w_init = hk.initializers.VarianceScaling(1.0)
        return cls(N, D, w_init=w_init, **options)(query, key, value, mask)

    return hk.without_apply_rng(hk.transform(apply))


@pytest.mark.parametrize("case", HAIKU)
def test_haiku(case, hk, hk_ours):
    options, call = HAIKU[case]
    dtype = call.get("dtype", "float32")
    shapes = call.get("shapes", [(B, S, E)] * 3)
    inputs = [_normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    ours, theirs = (
        _hk_run(hk, cls, options, call.get("mask"))
        for cls in (hk_ours.MultiHeadAttention, hk.MultiHeadAttention)
    )
    params = theirs.init(jax.random.key(0), *inputs)
    _close(ours.init(jax.random.key(0), *inputs), params, 0.0)
    assert ours.init(jax.random.key(0), *inputs).keys() == params.keys()
    _same(ours.apply, theirs.apply, params, *inputs, dtype=dtype)


def test_haiku_structured_mask(hk, hk_ours):
    x = _normal(B, S, E)
    ours = _hk_run(hk, functools.partial(hk_ours.MultiHeadAttention, implementation="xla"), {}, Causal())
    theirs = _hk_run(hk, hk.MultiHeadAttention, {}, _tri()[None, None])
    params = theirs.init(jax.random.key(0), x, x, x)
    _same(lambda p, x: ours.apply(p, x, x, x), lambda p, x: theirs.apply(p, x, x, x), params, x)
    assert "implementation='xla'" in str(jax.make_jaxpr(ours.apply)(params, x, x, x))


def test_haiku_transforms(hk, hk_ours):
    """hk.remat and hk.vmap inside of a transformed function."""

    def model(cls):
        def apply(x):
            layer = cls(N, D, w_init=hk.initializers.VarianceScaling(1.0))
            return hk.vmap(hk.remat(lambda x: layer(x, x, x)), split_rng=False)(x)

        return hk.without_apply_rng(hk.transform(apply))

    ours, theirs = model(hk_ours.MultiHeadAttention), model(hk.MultiHeadAttention)
    x = _normal(B, S, E)
    _same(ours.apply, theirs.apply, theirs.init(jax.random.key(0), x), x)


def test_haiku_dropout(hk, hk_ours):
    """Of the attention weights, by Haiku's own stream of keys or one that is given."""
    x, w_init = _normal(B, S, E), hk.initializers.VarianceScaling(1.0)

    def apply(x, rate, key=None):
        return hk_ours.MultiHeadAttention(N, D, w_init=w_init)(x, x, x, dropout_rate=rate, dropout_key=key)

    model = hk.transform(apply)
    params = model.init(jax.random.key(0), x, 0.0)
    want = model.apply(params, None, x, 0.0)
    one, again, other = (model.apply(params, jax.random.key(seed), x, 0.4) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != want).any() and (one != other).any()
    by_key = model.apply(params, None, x, 0.4, jax.random.key(3))
    _close(
        jax.jit(model.apply)(params, None, x, jnp.float32(0.4), jax.random.key(3)),
        by_key,
        TOLERANCE["float32"],
    )
    _mean_is(lambda key: model.apply(params, key, x, 0.4), np.asarray(want))
    with pytest.raises(ValueError, match=r"dropout_rate must be in \[0, 1\)"):
        model.apply(params, jax.random.key(1), x, 1.5)


@pytest.mark.usefixtures("no_type_checker")
def test_haiku_errors(hk, hk_ours):
    x = _normal(B, S, E)

    def init(mask=None, **options):
        _hk_run(hk, hk_ours.MultiHeadAttention, options, mask).init(jax.random.key(0), x, x, x)

    with pytest.raises(ValueError, match=r"mask must have 4 dimensions .*got shape \(12, 12\)"):
        init(_tri())
    with pytest.raises(ValueError, match="mask must broadcast to"):
        init(np.ones((3, 1, S, S), bool))
    with pytest.raises(TypeError, match=r"mask must be one mask; got a list of 1\. Join masks by &"):
        init([Causal()])
    with pytest.raises(TypeError, match="mask must be an array; got 'causal'"):
        init("causal")
    with pytest.raises(ValueError, match=r"implementation must be .*got 'fast'"):
        init(implementation="fast")


@pytest.mark.filterwarnings("ignore:w_init_scale is deprecated:DeprecationWarning")
def test_haiku_own_tests(hk, hk_ours, monkeypatch):
    """Haiku's tests of its layer, with ours in its place. (The wheels of Flax and Equinox contain no tests.)"""
    own = pytest.importorskip("haiku._src.attention_test")
    flash_attention, reached = api.flash_attention, []

    def counted(*args, **kwargs):
        out = flash_attention(*args, **kwargs)
        reached.append(1)
        return out

    monkeypatch.setattr(api, "flash_attention", counted)
    monkeypatch.setattr(own.attention, "MultiHeadAttention", hk_ours.MultiHeadAttention)
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromModule(own).run(result)
    assert not result.failures and not result.errors, (result.failures + result.errors)[0][1]
    assert result.testsRun >= 13 and not result.skipped and len(reached) >= 19


# --- keras

KERAS = {
    "plain": ("MultiHeadAttention", {}, {}, True),
    "causal": ("MultiHeadAttention", {}, {"use_causal_mask": True}, True),
    "mask": ("MultiHeadAttention", {}, {"attention_mask": _padding()[:, 0] & _tri()}, True),
    "window": ("MultiHeadAttention", {"sliding_window": 4}, {"use_causal_mask": True}, True),
    "gate": ("MultiHeadAttention", {"use_gate": True}, {}, True),
    "bfloat16": ("MultiHeadAttention", {"dtype": "bfloat16"}, {"use_causal_mask": True}, True),
    "grouped": ("GroupQueryAttention", {}, {"use_causal_mask": True}, True),
    # Where Keras computes its own: dropout, also at inference, and whoever wants the weights.
    "dropout": ("MultiHeadAttention", {"dropout": 0.2}, {"training": False}, False),
    "grouped dropout": ("GroupQueryAttention", {"dropout": 0.2}, {"training": False}, False),
    "two attention axes": ("MultiHeadAttention", {"attention_axes": (1, 2)}, {}, False),
}


def _keras_layer(keras, name, options):
    sizes = {"num_heads": N, "key_dim": D}
    if name == "GroupQueryAttention":
        sizes = {"head_dim": D, "num_query_heads": N, "num_key_value_heads": K}
    return getattr(keras.layers, name)(**sizes, **options)


@pytest.mark.parametrize("case", KERAS)
def test_keras(case, keras):
    name, options, call, calls = KERAS[case]
    layer = _keras_layer(keras, name, options)
    dtype = options.get("dtype", "float32")
    x = _normal(*((B, 3, 4, E) if "attention_axes" in options else (B, S, E)), dtype=dtype)
    layer.build(x.shape, x.shape)
    fixed = [v.value for v in layer.non_trainable_variables]

    def run(params, x):
        return layer.stateless_call(params, fixed, x, x, **call)[0]

    params = [v.value for v in layer.trainable_variables]
    _same(patch_jax_nn()(lambda *args: run(*args)), run, params, x, dtype=dtype, calls=calls)


def test_keras_ops(keras):
    q, k = _x(), _normal(B, S, K, D, seed=1)
    bias = _normal(1, N, S, S, seed=2)

    def run(q, k, bias):
        return keras.ops.dot_product_attention(q, k, k, bias=bias, mask=_tri()[None, None], scale=0.3)

    _same(patch_jax_nn(implementation="xla")(lambda *args: run(*args)), run, q, k, bias)


def test_keras_scores_and_flash(keras, caplog):
    """What never reaches jax.nn, and that Keras logs an error of ours and goes on with its own."""
    x = _normal(B, S, E)
    with patch_jax_nn():
        layer = _keras_layer(keras, "MultiHeadAttention", {})
        layer.build(x.shape, x.shape)
        assert _count(lambda x: layer(x, x, return_attention_scores=True)[0], x) == 0
    if jax.default_backend() == "cpu":
        layer = _keras_layer(keras, "MultiHeadAttention", {"flash_attention": True})
        layer.build(x.shape, x.shape)
        with pytest.raises(Exception, match="cuDNN"), patch_jax_nn():
            layer(x, x)
    wide = jnp.ones((B, S, N, D), jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)
    with patch_jax_nn():
        out = keras.ops.dot_product_attention(wide, wide, wide, mask=np.ones((B, 1, S, S), np.int32))
    assert out.shape == wide.shape and "Failed to apply xla implementation" in caplog.text


def test_keras_models(keras):
    """predict and fit, whose jitted functions are traced anew inside of the patch."""
    inputs = keras.Input((S, E))
    x = np.asarray(_normal(B, S, E))
    out = keras.layers.MultiHeadAttention(N, D)(inputs, inputs, use_causal_mask=True)
    model = keras.Model(inputs, out)
    model.compile("sgd", "mse")
    theirs = model.predict(x, verbose=0)
    with patch_jax_nn():
        ours = model.predict(x, verbose=0)
        assert _count(lambda x: model(x), x) == 1
        history = model.fit(x, x, epochs=2, verbose=0).history["loss"]
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert history[1] < history[0]


# Keras's own tests inside of the patch; it prints how many calls our function served, and how many it refused.
KERAS_OWN = """
import sys
import pytest
from jax_fa import api
from jax_fa.integrations import patch_jax_nn

dot_product_attention, served, refused = api.dot_product_attention, [], []

def counted(*args, **kwargs):
    refused.append(1)
    out = dot_product_attention(*args, **kwargs)
    served.append(refused.pop())
    return out

api.dot_product_attention = counted
with patch_jax_nn():
    code = pytest.main(["-q", "-c", "/dev/null", "-p", "no:cacheprovider", "--disable-warnings", *sys.argv[1:]])
print(f"exit {int(code)}, {len(served)} served, {len(refused)} refused")
"""
# Modules of tests in Keras's wheel, which of their tests, and how many calls of these ours serves at least.
KERAS_OWN_TESTS = {
    "layers.attention.multi_head_attention_test": ("", 40),
    "layers.attention.grouped_query_attention_test": ("", 30),
    "ops.nn_test": ("dot_product_attention", 30),
}


@pytest.mark.usefixtures("keras")  # whose environment the process inherits
@pytest.mark.parametrize("module", KERAS_OWN_TESTS)
def test_keras_own_tests(module, tmp_path):
    """In a process of its own. The tests of cuDNN skip themselves without a GPU."""
    only, calls = KERAS_OWN_TESTS[module]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-P", "-c", KERAS_OWN, "--pyargs", f"keras.src.{module}", "-k", only]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    found = re.search(r"^exit 0, (\d+) served, 0 refused$", done.stdout, re.MULTILINE)
    assert found, done.stdout + done.stderr
    assert int(found[1]) >= calls


# --- training


def _linen_model(linen, ours: bool):
    from jax_fa.integrations.flax import attention_fn

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            fn = attention_fn if ours else linen.dot_product_attention
            mask = linen.make_causal_mask(x[..., 0])
            for _ in range(2):
                x = x + linen.MultiHeadDotProductAttention(N, attention_fn=fn)(x, mask=mask)
                x = x + linen.Dense(E)(linen.gelu(linen.Dense(2 * E)(x)))
            return x

    model = Model()
    return model.init(jax.random.key(0), _normal(B, S, E)), model.apply


def _nnx_model(nnx, ours: bool):
    from jax_fa.integrations.flax import attention_fn

    class Block(nnx.Module):
        def __init__(self, rngs):
            fn = attention_fn if ours else nnx.dot_product_attention
            self.attention = nnx.MultiHeadAttention(N, E, attention_fn=fn, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(E, 2 * E, rngs=rngs), nnx.Linear(2 * E, E, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(x, mask=nnx.make_causal_mask(x[..., 0]))
            return x + self.down(nnx.gelu(self.up(x)))

    rngs = nnx.Rngs(0)
    graph, parameters, rest = nnx.split(nnx.Sequential(Block(rngs), Block(rngs)), nnx.Param, ...)
    return parameters, lambda parameters, x: nnx.merge(graph, parameters, rest)(x)


def _eqx_model(eqx, ours: bool):
    from jax_fa.integrations.equinox import use_flash_attention

    keys = jax.random.split(jax.random.key(0), (2, 2))
    model = [(eqx.nn.MultiheadAttention(N, E, key=a), eqx.nn.MLP(E, E, 2 * E, 1, key=b)) for a, b in keys]
    arrays, rest = eqx.partition(use_flash_attention(model) if ours else model, eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten(arrays)  # the trees differ in the class

    def apply(leaves, x):
        for attention, mlp in eqx.combine(tree.unflatten(leaves), rest):
            x = x + attention(x, x, x, jnp.asarray(_tri()))
            x = x + jax.vmap(mlp)(x)
        return x

    return leaves, jax.vmap(apply, in_axes=(None, 0))


def _hk_model(hk, ours: bool):
    from jax_fa.integrations.haiku import MultiHeadAttention

    def apply(x):
        w_init = hk.initializers.VarianceScaling(1.0)
        for _ in range(2):
            attention = (MultiHeadAttention if ours else hk.MultiHeadAttention)(N, D, w_init=w_init)
            x = x + attention(x, x, x, _tri()[None, None])
            x = x + hk.nets.MLP([2 * E, E], activation=jax.nn.gelu)(x)
        return x

    model = hk.without_apply_rng(hk.transform(apply))
    return model.init(jax.random.key(0), _normal(B, S, E)), model.apply


def _keras_model(keras, ours: bool):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((S, E))
    for _ in range(2):
        x = x + keras.layers.MultiHeadAttention(N, D)(x, x, use_causal_mask=True)
        x = x + keras.layers.Dense(E)(keras.layers.Dense(2 * E, "gelu")(x))
    model = keras.Model(inputs, x)

    def apply(parameters, x):
        return model.stateless_call(parameters, [v.value for v in model.non_trainable_variables], x)[0]

    return [v.value for v in model.trainable_variables], patch_jax_nn()(apply) if ours else apply


# By fixture: what makes the parameters of a model of two blocks, causal, and its function of them and a batch.
TRAINED = {
    "linen": _linen_model,
    "nnx": _nnx_model,
    "eqx": _eqx_model,
    "hk": _hk_model,
    "keras": _keras_model,
}


def _losses(apply, parameters, calls: bool) -> np.ndarray:
    """Of 50 steps in which the model learns to predict the next vector of a random walk."""
    x = jnp.cumsum(_normal(B, S, E), axis=1) / 4

    def step(parameters, _):
        def loss(parameters):
            return jnp.mean((apply(parameters, x)[:, :-1] - x[:, 1:]) ** 2)

        found, gradients = jax.value_and_grad(loss)(parameters)
        return jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradients), found

    traced = jax.jit(lambda parameters: jax.lax.scan(step, parameters, length=50)[1]).trace(parameters)
    assert (FORWARD in str(traced.jaxpr)) == calls
    return np.asarray(traced.lower().compile()(parameters))


@pytest.mark.parametrize("library", TRAINED)
def test_models_train_alike(library, request):
    """50 steps of a small model from the same parameters: with the library's own attention, and with ours."""
    make = functools.partial(TRAINED[library], request.getfixturevalue(library))
    with jax.numpy_dtype_promotion("standard"):
        (parameters, theirs), (same, ours) = make(ours=False), make(ours=True)
        _close(same, parameters, 0.0)
        before, after = _losses(theirs, parameters, False), _losses(ours, same, True)
    assert before[-1] < 0.5 * before[0]  # it learns
    np.testing.assert_allclose(after, before, rtol=1e-5)
