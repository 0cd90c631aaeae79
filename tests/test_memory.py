"""Temporary memory grows linearly in the length, forward and backward. Nothing runs here: XLA plans memory."""

import jax
import jax.numpy as jnp
import pytest

import jax_fa
from jax_fa.masks import Causal, SegmentIds
from jax_fa.testing.programs import temporary_bytes

pytestmark = pytest.mark.usefixtures("real_tiles")
N, K, D = 4, 2, 32
MIB = 2**20


def _float(*shape: int):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _ids(s: int):
    return jax.ShapeDtypeStruct((1, s), jnp.int32)


# What else the call takes, by length: none of it is S x S.
EXTRAS = {
    "plain": lambda s: {},
    "causal": lambda s: {"mask": Causal()},
    "bias-of-keys": lambda s: {"bias": _float(N, 1, s)},
    "mask-of-keys": lambda s: {"mask": jax.ShapeDtypeStruct((1, 1, 1, s), bool)},
    "segments-in-any-order": lambda s: {"mask": SegmentIds(_ids(s), _ids(s), padding_id=0)},
    "alibi": lambda s: {"alibi_slopes": _float(N)},
    "dropout": lambda s: {"dropout_key": jax.eval_shape(lambda: jax.random.key(0))},
}


def _temporary(backend, gradient: bool, q, kv, extras) -> int:
    """Bytes of temporary memory that the compiled call needs."""
    rate = 0.1 if "dropout_key" in extras else 0.0

    def attend(q, k, v, extras):
        return jax_fa.flash_attention(q, k, v, **extras, dropout_rate=rate, implementation=backend)

    def loss(floats, others):
        return jnp.sum(attend(*floats["qkv"], floats["extras"] | others) ** 2)

    if not gradient:
        return temporary_bytes(jax.jit(attend).lower(q, kv, kv, extras))
    floats = {n: x for n, x in extras.items() if n in ("bias", "alibi_slopes")}
    others = {n: x for n, x in extras.items() if n not in floats}
    return temporary_bytes(jax.jit(jax.grad(loss)).lower({"qkv": (q, kv, kv), "extras": floats}, others))


@pytest.mark.one_in(3)
@pytest.mark.in_turn
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("kind", EXTRAS)
def test_memory_is_linear_in_the_length(kind, gradient, backend):
    """Twice the length needs at most about twice the memory; an S x S array would need four times."""
    short, long = (
        _temporary(backend, gradient, _float(1, s, N, D), _float(1, s, K, D), EXTRAS[kind](s))
        for s in (2048, 4096)
    )
    assert long <= 2.2 * short + MIB
    assert long < N * 4096 * 4096  # bytes: a quarter of the logits of all heads


@pytest.mark.parametrize(
    ("gradient", "limit"), [(False, 64 * MIB), (True, 192 * MIB)], ids=["forward", "backward"]
)
def test_memory_of_a_usual_call(gradient, limit, backend):
    """B=1, S=4096, N=8, D=64, float32, causal: the logits alone would be 512 MiB."""
    x = _float(1, 4096, 8, 64)
    assert _temporary(backend, gradient, x, x, {"mask": Causal()}) < limit


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_sizes_of_one_in_masks_and_biases_stay_one(gradient, backend):
    """A bias and a mask of (B, 1, 1, Skv) need no more memory than the call without them, but for themselves."""
    B, s = 8, 1024
    q, kv = _float(B, s, N, D), _float(B, s, K, D)
    extras = {"bias": _float(B, 1, 1, s), "mask": jax.ShapeDtypeStruct((B, 1, 1, s), bool)}
    plain, full = (_temporary(backend, gradient, q, kv, x) for x in ({}, extras))
    assert full < 1.5 * plain + 2 * MIB


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_gradients_keep_one_array_more(dtype, backend):
    """Between forward and backward: the output, what rounding took from it, and the statistics."""
    x = jax.ShapeDtypeStruct((1, 1024, 8, 64), dtype)

    def saved(q, k, v):
        return jax.vjp(lambda *x: jax_fa.flash_attention(*x, implementation=backend), q, k, v)[1]

    kept = jax.tree.leaves(jax.eval_shape(saved, x, x, x))
    sizes = sorted(array.size * array.dtype.itemsize for array in kept)
    out, statistics = 1024 * 8 * 64 * 2, 1024 * 8 * 4
    assert sum(sizes) <= 5 * out + 2 * statistics  # query, key, value, out and rounding
    assert sizes.count(out) == 5
