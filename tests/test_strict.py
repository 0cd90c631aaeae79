"""Strict mode: where `xla` would stand in for a native backend, a call raises."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa import backends
from jax_fa.backends import native, xla

X = np.random.default_rng(0).standard_normal((1, 9, 2, 8)).astype(np.float32)
NEEDS_CPU = pytest.mark.skipif(native.missing is not None, reason="needs the native extension")
FALLS_BACK = re.escape("jax_fa is strict (jax_fa.strict, JAX_FA_STRICT) and ")


def attend(x, **options):
    return jax_fa.flash_attention(x, x, x, **options)


class Forward:
    """A native backend of CPU that computes forwards of float32 alone, and no derivative but the gradient."""

    name = "forward"
    platforms = ("cpu",)
    emulated_on = ()

    def why_not(self, call, *, platform, what):
        if what != "forward":
            return "has no backward"
        return None if call.dtype == jnp.float32 else f"serves float32, not {call.dtype}"

    def notes(self, call):
        return ()

    def forward(self, call):
        return xla.backend.forward(call)

    def backward(self, call, saved):
        raise AssertionError("why_not refused it")


@pytest.fixture
def only_forward(monkeypatch):
    """The only native backend."""
    monkeypatch.setattr(backends, "_backends", [Forward(), xla.backend])
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def _lower(function, *args, platforms=("cpu",)):
    return jax.jit(function).trace(*args).lower(lowering_platforms=platforms)


# --- which calls raise

CALLS = {
    "forward": (lambda x: attend(x), "this call"),
    "gradient": (lambda x: jax.grad(lambda y: attend(y).sum())(x), "the gradient of this call"),
    "jvp": (lambda x: jax.jvp(attend, (x,), (x,)), "the tangent (jvp) of this call"),
    "second": (
        lambda x: jax.grad(lambda y: jnp.sum(jax.grad(lambda z: attend(z).sum())(y)))(x),
        "the second derivative of this call",
    ),
    "dot_product_attention": (lambda x: jax_fa.dot_product_attention(x, x, x), "this call"),
    "flash_attention_score": (
        lambda x: jax_fa.flash_attention_score(x, x, x, head_num=2, input_layout="BSND"),
        "this call",
    ),
}


REASONS = {
    "this call": "serves float32, not float16",
    "the gradient of this call": "has no backward",
    "the tangent (jvp) of this call": "does not compute the tangent (jvp) of this call: xla does",
    "the second derivative of this call": "does not compute the second derivative of this call: xla does",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_fallback_raises(name, only_forward):
    """With the reason, for the call or the derivative that would fall back."""
    run, which = CALLS[name]
    x = X if which != "this call" else np.float16(X)
    reason = f"forward: {REASONS[which]}"
    message = f"{which} would fall back to xla on platform 'cpu'. {reason}."
    with jax_fa.strict(), pytest.raises(NotImplementedError, match=FALLS_BACK + re.escape(message)):
        _lower(run, x)
    with jax_fa.strict(), pytest.raises(NotImplementedError, match=FALLS_BACK):
        run(x)
    _lower(run, x)


def test_what_raises_nothing(only_forward):
    """What the native backend serves, what names xla, other platforms, and `strict(False)`."""
    half = np.float16(X)
    with jax_fa.strict():
        _lower(attend, X)
        _lower(lambda x: jax.grad(lambda y: attend(y, implementation="xla").sum())(x), half)
        _lower(attend, half, platforms=("tpu",))
        with jax_fa.strict(False):
            _lower(attend, half)
        with pytest.raises(NotImplementedError, match=FALLS_BACK):
            _lower(attend, half)
        with pytest.raises(NotImplementedError, match=FALLS_BACK):
            _lower(attend, half, platforms=("tpu", "cpu"))


def test_a_named_backend_that_lacks_a_derivative(only_forward):
    """xla supplies it, which is a fallback too."""
    run = lambda x: jax.jvp(lambda y: attend(y, implementation="forward"), (x,), (x,))
    _lower(run, X)
    with jax_fa.strict(), pytest.raises(NotImplementedError, match=r"forward: does not compute the tangent"):
        _lower(run, X)


@pytest.mark.parametrize("platform", ["cuda", "cpu", "tpu"])
def test_the_backends_of_the_library(platform):
    """The reasons are those of `explain`. TPU has no native backend."""
    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64)
        reasons = jax_fa.explain(x, x, x, platforms=platform).reasons[platform]
        with jax_fa.strict():
            if platform == "tpu":
                _lower(attend, x, platforms=(platform,))
                return
            name = {"cuda": "mosaic", "cpu": "cpu"}[platform]
            with pytest.raises(
                NotImplementedError, match=re.escape(f"'{platform}'. {name}: {reasons[name]}.")
            ):
                _lower(attend, x, platforms=(platform,))


@NEEDS_CPU
def test_what_the_cpu_kernels_serve_is_unchanged():
    with jax_fa.strict():
        inside = jax.jit(jax.value_and_grad(lambda x: attend(x).sum()))(X)
    jax.tree.map(
        np.testing.assert_array_equal, inside, jax.jit(jax.value_and_grad(lambda x: attend(x).sum()))(X)
    )


def test_explain_raises_nothing(only_forward):
    half = np.float16(X)
    with jax_fa.strict():
        assert jax_fa.explain(half, half, half, platforms="cpu").chosen == {"cpu": "xla"}


# --- when it counts


def test_it_is_part_of_the_keys_of_caches(only_forward):
    """What was traced and compiled outside is checked inside, and the other way round; eager calls too."""
    run, half = jax.jit(attend), np.float16(X)
    for call in (run, attend):
        outside = call(half)
        with jax_fa.strict(), pytest.raises(NotImplementedError, match=FALLS_BACK):
            call(half)
        np.testing.assert_array_equal(call(half), outside)
    with jax_fa.strict():
        run(X)
        with jax.disable_jit(), pytest.raises(NotImplementedError, match=FALLS_BACK):
            run(half)


def test_it_travels_with_what_was_traced(only_forward):
    """A call traced inside is checked when it is lowered outside; its gradient too."""
    half = np.float16(X)
    with jax_fa.strict():
        traced = jax.jit(attend).trace(half)
        _, pullback = jax.vjp(attend, X)
    with pytest.raises(NotImplementedError, match=FALLS_BACK):
        traced.lower(lowering_platforms=("cpu",))
    with pytest.raises(NotImplementedError, match=FALLS_BACK):
        pullback(X)
    outside = jax.jit(attend).trace(half)
    with jax_fa.strict():
        outside.lower(lowering_platforms=("cpu",))


def test_as_a_decorator(only_forward):
    @jax_fa.strict()
    def step(x):
        return attend(x)

    for _ in range(2):
        with pytest.raises(NotImplementedError, match=FALLS_BACK):
            step(np.float16(X))
    step(X)
    attend(np.float16(X))


def test_other_threads_are_not_inside(only_forward):
    raised: list[Exception] = []

    def run():
        try:
            attend(np.float16(X))
        except NotImplementedError as error:
            raised.append(error)

    with jax_fa.strict():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert not raised


@pytest.mark.parametrize(
    ("value", "inside", "raises"),
    [
        ("1", "", True),
        ("0", "", False),
        ("", "", False),
        ("1", "strict(False)", False),
        ("0", "strict()", True),
    ],
)
def test_the_environment(value, inside, raises):
    """float64 has no native backend on CPU."""
    program = (
        "import contextlib, jax, jax.numpy as jnp, jax_fa; jax.config.update('jax_enable_x64', True); "
        "x = jnp.ones((1, 4, 1, 4))\n"
        f"with {f'jax_fa.{inside}' if inside else 'contextlib.nullcontext()'}: jax_fa.flash_attention(x, x, x)"
    )
    path = str(Path(jax_fa.__file__).parents[1])
    environment = os.environ | {"JAX_FA_STRICT": value, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode != 0) == raises, done.stderr
    assert not raises or re.search(f"NotImplementedError: {FALLS_BACK}", done.stderr), done.stderr


def test_the_import_makes_no_context():
    """A new one has JAX trace anew what it has traced before, so it waits for the first use."""
    program = (
        "import jax_fa; from jax_fa.backends import strictness; assert strictness._context is None\n"
        "with jax_fa.strict(): assert strictness.active()\n"
        "assert not strictness.active()"
    )
    environment = os.environ | {"JAX_FA_STRICT": "", "PYTHONPATH": str(Path(jax_fa.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
