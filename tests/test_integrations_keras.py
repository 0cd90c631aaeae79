"""Keras's layers inside of `patch_jax_nn`, held against those outside. Skipped where it is not installed."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_tools import B, D, E, K, N, S, assert_same, count_calls, normal, padding, per_head, tri

from jax_fa.integrations import patch_jax_nn


@pytest.fixture
def keras(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # both are read when Keras is first imported
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    keras = pytest.importorskip("keras")
    assert keras.backend.backend() == "jax"
    with jax.numpy_dtype_promotion("standard"):  # Keras mixes dtypes
        yield keras


KERAS = {
    "plain": ("MultiHeadAttention", {}, {}, True),
    "causal": ("MultiHeadAttention", {}, {"use_causal_mask": True}, True),
    "mask": ("MultiHeadAttention", {}, {"attention_mask": padding()[:, 0] & tri()}, True),
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
    x = normal(*((B, 3, 4, E) if "attention_axes" in options else (B, S, E)), dtype=dtype)
    layer.build(x.shape, x.shape)
    fixed = [v.value for v in layer.non_trainable_variables]

    def run(params, x):
        return layer.stateless_call(params, fixed, x, x, **call)[0]

    params = [v.value for v in layer.trainable_variables]
    assert_same(patch_jax_nn()(lambda *args: run(*args)), run, params, x, dtype=dtype, calls=calls)


def test_keras_ops(keras):
    q, k = per_head(), normal(B, S, K, D, seed=1)
    bias = normal(1, N, S, S, seed=2)

    def run(q, k, bias):
        return keras.ops.dot_product_attention(q, k, k, bias=bias, mask=tri()[None, None], scale=0.3)

    assert_same(patch_jax_nn(implementation="xla")(lambda *args: run(*args)), run, q, k, bias)


def test_keras_scores_and_flash(keras, caplog):
    """What never reaches jax.nn, and that Keras logs an error of ours and goes on with its own."""
    x = normal(B, S, E)
    with patch_jax_nn():
        layer = _keras_layer(keras, "MultiHeadAttention", {})
        layer.build(x.shape, x.shape)
        assert count_calls(lambda x: layer(x, x, return_attention_scores=True)[0], x) == 0
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
    x = np.asarray(normal(B, S, E))
    out = keras.layers.MultiHeadAttention(N, D)(inputs, inputs, use_causal_mask=True)
    model = keras.Model(inputs, out)
    model.compile("sgd", "mse")
    theirs = model.predict(x, verbose=0)
    with patch_jax_nn():
        ours = model.predict(x, verbose=0)
        assert count_calls(lambda x: model(x), x) == 1
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


@pytest.mark.slow
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
