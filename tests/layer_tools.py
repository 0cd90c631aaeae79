"""What the tests of layers of other libraries share: sizes, arrays, and the comparison with the library's own layer."""

import jax
import jax.numpy as jnp
import numpy as np

B, S, N, K, D, E = 2, 12, 4, 2, 8, 32  # E = N * D: the width of the models
FORWARD = "flash_attention_fwd["  # our primitive in a jaxpr
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.04}


def normal(*shape: int, seed: int = 0, dtype: str = "float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def per_head():
    """A sequence as attention itself takes it."""
    return normal(B, S, N, D)


def tri(rows: int = S, columns: int = S) -> np.ndarray:
    return np.tri(rows, columns, dtype=bool)


def padding() -> np.ndarray:
    """Keys of the second sequence end at 7; shape (B, 1, 1, S)."""
    return (np.arange(S) < np.array([S, 7])[:, None])[:, None, None]


def count_calls(fn, *args) -> int:
    """How many calls of our forward a function makes."""
    return str(jax.make_jaxpr(fn)(*args)).count(FORWARD)


def with_gradients(fn, args, calls: bool):
    """Outputs, and the gradients of a weighted sum of them for every argument; `calls`: whether our kernels compute them."""

    def run(*args):
        out, vjp = jax.vjp(fn, *args)
        return out, vjp(normal(*out.shape, seed=9, dtype=str(out.dtype)))

    traced = jax.jit(run).trace(*args)
    assert (FORWARD in str(traced.jaxpr)) == calls
    return traced.lower().compile()(*args)


def assert_close(ours, theirs, tolerance: float) -> None:
    """The tolerance is relative to the largest number of all."""
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    assert len(ours) == len(theirs) > 0
    scale = max(1.0, *(float(abs(x).max()) for x in theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def assert_same(ours, theirs, *args, dtype: str = "float32", calls: bool = True) -> None:
    """The same outputs and gradients, ours by our kernels and theirs not."""
    found = with_gradients(ours, args, calls)
    with jax.numpy_dtype_promotion("standard"):  # which some of them need
        assert_close(found, with_gradients(theirs, args, False), TOLERANCE[dtype])


def assert_mean(run, want, *, draws: int = 400) -> None:
    """The mean of a random function of a key is `want`, and its values differ from key to key."""
    outs = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(5), draws)), np.float64)
    deviation = outs.std(axis=0)
    assert (deviation > 0).mean() > 0.9
    # 6 standard errors: of some thousand numbers none is further off but by a fault.
    np.testing.assert_array_less(abs(outs.mean(axis=0) - want), 6 * deviation / draws**0.5 + 1e-5)
