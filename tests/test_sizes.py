"""Sizes at which 32-bit indices would end, with little memory: windows, and calls that are only traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa.masks import Causal, SlidingWindow
from jax_fa.testing import oracle

LIMIT = 2**29  # of lengths
S = 2**16 + 3  # S * S passes 2**32


def test_more_than_2_to_the_32_logits(backend):
    """Each row sees its own key alone: the output is the value, where dropout keeps it, and so are the gradients."""
    random = np.random.default_rng(0)
    q, k, v, dout = (random.standard_normal((1, S, 1, 1)).astype(np.float32) for _ in range(4))
    key = jax.random.key(5)

    @jax.jit
    def run(q, k, v, dout):
        mask = SlidingWindow(0)
        attend = jax_fa.flash_attention
        out, pullback = jax.vjp(
            lambda *x: attend(*x, mask=mask, dropout_rate=0.5, dropout_key=key, implementation=backend),
            q,
            k,
            v,
        )
        return out, pullback(dout)

    out, (dq, dk, dv) = run(q, k, v, dout)
    at, zero = np.arange(S), np.zeros(S, np.uint64)
    seed = np.asarray(jax.random.bits(key, (2,), jnp.uint32))
    words = np.stack(oracle.philox4x32((4 * (at // 32) + at % 8 // 2, at, zero, zero), seed))
    word = words[at // 8 % 4, at].astype(np.uint64)
    numbers = np.where(at % 2 == 0, word & np.uint64(0xFFFF), word >> np.uint64(16))
    kept = np.where(numbers < 32768, 2, 0).reshape(1, S, 1, 1).astype(np.float32)
    np.testing.assert_array_equal(out, kept * v)
    np.testing.assert_array_equal(dv, kept * dout)
    np.testing.assert_allclose(dq, 0, atol=1e-5)
    np.testing.assert_allclose(dk, 0, atol=1e-5)


def _of_length(Sq: int, Skv: int):
    return (jax.ShapeDtypeStruct((1, s, 1, 1), jnp.float32) for s in (Sq, Skv, Skv))


@pytest.mark.parametrize(("name", "Sq", "Skv"), [("query", LIMIT + 1, 8), ("key", 8, LIMIT + 1)])
@pytest.mark.parametrize("entry", ["flash_attention", "dot_product_attention", "flash_attention_score"])
def test_longer_sequences_are_refused(entry, name, Sq, Skv):
    options = {"head_num": 1, "input_layout": "BSND"} if entry == "flash_attention_score" else {}
    with pytest.raises(ValueError, match=rf"{name} must have a length .* of at most 2\*\*29 .* got shape"):
        jax.eval_shape(lambda *x: getattr(jax_fa, entry)(*x, **options), *_of_length(Sq, Skv))


def test_the_longest_sequences_trace():
    for Sq, Skv in ((8, LIMIT), (LIMIT, 8)):
        found = jax.eval_shape(
            lambda *x: jax_fa.flash_attention(*x, mask=Causal("bottom-right")), *_of_length(Sq, Skv)
        )
        assert found.shape == (1, Sq, 1, 1)
