"""`patch_jax_nn`: code that calls `jax.nn.dot_product_attention`, with ours in its place."""

import inspect
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_tools import TOLERANCE, B, D, K, N, S, assert_close, count_calls, normal, padding, per_head

from jax_fa.integrations import patch_jax_nn

THEIRS = jax.nn.dot_product_attention


def _jax_nn(x):
    return jax.nn.dot_product_attention(x, x, x)


def test_patch_inside_and_outside():
    from jax import nn

    bound = THEIRS
    x = per_head()
    with patch_jax_nn():
        assert count_calls(_jax_nn, x) == 1
        assert count_calls(lambda x: nn.dot_product_attention(x, x, x), x) == 1
        assert count_calls(lambda x: bound(x, x, x), x) == 0  # a name bound before
        assert inspect.signature(jax.nn.dot_product_attention) == inspect.signature(THEIRS)
        inside = _jax_nn(x)
    assert jax.nn.dot_product_attention is THEIRS and count_calls(_jax_nn, x) == 0
    np.testing.assert_allclose(inside, _jax_nn(x), atol=2e-6)


def test_patch_as_decorator():
    @patch_jax_nn(implementation="xla")
    def model(x):
        return _jax_nn(x)

    assert count_calls(model, per_head()) == count_calls(jax.jit(model), per_head()) == 1
    assert model.__name__ == "model" and jax.nn.dot_product_attention is THEIRS


def test_patch_is_left_on_an_error():
    with pytest.raises(ZeroDivisionError), patch_jax_nn():
        _ = 1 / 0
    assert jax.nn.dot_product_attention is THEIRS and count_calls(_jax_nn, per_head()) == 0


def test_patches_nest():
    """The innermost counts; one object can be entered again."""

    def named(x):
        return str(jax.make_jaxpr(_jax_nn)(x)).split("implementation=")[1].split(",")[0]

    outer, inner = patch_jax_nn(), patch_jax_nn(implementation="xla")
    with outer:
        with inner:
            with outer, inner:
                assert named(per_head()) == "'xla'"
            assert named(per_head()) == "'xla'"
            with outer:
                assert named(per_head()) == "None"
        assert named(per_head()) == "None"
    assert count_calls(_jax_nn, per_head()) == 0


def test_patch_retraces_jitted_functions():
    """One jitted function, outside and inside: neither runs what the other has compiled."""
    traced = []

    @jax.jit
    def model(x):
        traced.append(jax.nn.dot_product_attention is not THEIRS)
        return _jax_nn(x)

    x = per_head()
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
        counts.append(count_calls(_jax_nn, per_head()))
        with patch_jax_nn():
            counts.append(count_calls(_jax_nn, per_head()))

    with patch_jax_nn():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        counts.append(count_calls(_jax_nn, per_head()))
    assert counts == [0, 1, 1] and jax.nn.dot_product_attention is THEIRS


def test_patch_below_another_patch(monkeypatch):
    """Whoever replaced the function after us keeps what they put there."""
    with patch_jax_nn():
        ours = jax.nn.dot_product_attention
        monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args: ours(*args))
        assert count_calls(_jax_nn, per_head()) == 1
    assert count_calls(_jax_nn, per_head()) == 0
    monkeypatch.undo()  # puts ours back, which by now calls JAX's
    assert count_calls(_jax_nn, per_head()) == 0
    jax.nn.dot_product_attention = THEIRS


@pytest.mark.parametrize("asked", [None, "xla", "cudnn"])
def test_patch_replaces_the_implementation_asked_for(asked):
    def run(x):
        return jax.nn.dot_product_attention(x, x, x, implementation=asked)

    with patch_jax_nn(implementation="xla"):
        assert "implementation='xla'" in str(jax.make_jaxpr(run)(per_head()))


def test_patch_passes_every_argument():
    x, key = per_head(), normal(B, S, K, D, seed=1)
    bias, mask = normal(1, N, S, S, seed=2), padding()
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
        assert count_calls(run, x, key, bias) == 1
        ours = run(x, key, bias)
    assert_close(ours, run(x, key, bias), TOLERANCE["float32"])


def test_patch_gives_0_for_rows_that_see_nothing():
    x = per_head()
    with patch_jax_nn():
        out = jax.nn.dot_product_attention(x, x, x, key_value_seq_lengths=jnp.array([0, S], jnp.int32))
    assert not out[0].any() and out[1].all()


@pytest.mark.usefixtures("no_type_checker")
def test_patch_errors():
    with pytest.raises(ValueError, match=r"implementation must be .*got 'fast'"):
        patch_jax_nn(implementation="fast")
    x = per_head()
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
