"""Dropout: the generator, the layout of the bits, and that attention uses exactly those."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa import dropout
from jax_fa.testing import oracle
from jax_fa.testing.programs import temporary_bytes

B, SQ, SKV, N, K, D = 2, 37, 45, 4, 2, 16
RATE = 0.3

# Random123's kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> list[np.uint32]:
    return [np.uint32(int(word, 16)) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
@pytest.mark.parametrize("philox", [dropout.philox4x32, oracle.philox4x32], ids=["library", "oracle"])
def test_known_answers(philox, counter, key, result):
    assert [int(w) for w in philox(_words(counter), _words(key))] == [int(w) for w in _words(result)]


def test_philox_of_many_counters():
    random = np.random.default_rng(0).integers(0, 2**32, (6, 1000), dtype=np.uint32)
    for ours, want in zip(
        dropout.philox4x32(random[:4], random[4:]), oracle.philox4x32(random[:4], random[4:]), strict=True
    ):
        np.testing.assert_array_equal(ours, want)


def _seed(key) -> np.ndarray:
    return np.asarray(jax.random.bits(key, (2,), jnp.uint32))


def _unpack(packed, shape) -> np.ndarray:
    size = math.prod(shape)
    assert packed.dtype == jnp.uint8 and packed.shape == (-(-size // 8),)
    return np.unpackbits(np.asarray(packed), bitorder="little")[:size].reshape(shape).astype(bool)


@pytest.mark.parametrize(
    "shape", [(B, N, SQ, SKV), (1, 1, 1, 1), (3, 1, 2, 32), (1, 2, 33, 31), (1, 1, 2, 300)], ids=str
)
@pytest.mark.parametrize("rate", [RATE, 0.0, 0.999])
def test_dropout_mask_is_the_documented_layout(shape, rate):
    key = jax.random.key(11)
    found = _unpack(jax_fa.dropout_mask(key, rate, shape), shape)
    np.testing.assert_array_equal(found, oracle.keep_bits(_seed(key), shape, 1 - rate))


@pytest.mark.parametrize("shape", [(2, 3, 17, 45), (2, 3, 16, 40), (1, 1, 3, 700), (3, 2, 9, 1)], ids=str)
def test_a_dropout_mask_of_many_tiles(shape, monkeypatch):
    """Tiles of rows run over heads and batch entries, and the last one is cut."""
    monkeypatch.setattr(dropout, "TILE_ELEMENTS", 256)
    key = jax.random.key(12)
    found = jax_fa.dropout_mask(key, RATE, shape)
    np.testing.assert_array_equal(_unpack(found, shape), oracle.keep_bits(_seed(key), shape, 1 - RATE))
    past = -math.prod(shape) % 8
    assert int(found[-1]) >> (8 - past) == 0 or past == 0  # bits past the end are 0


def test_a_dropout_mask_takes_little_memory():
    """Temporaries are at most twice the result, and a tile."""
    shape = (1, 8, 1024, 1024)
    draw = jax.jit(lambda key: jax_fa.dropout_mask(key, RATE, shape))
    lowered = draw.lower(jax.random.key(0))
    assert temporary_bytes(lowered) < 2 * math.prod(shape) // 8 + 64 * dropout.TILE_ELEMENTS


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((None, 0.5, (1, 2, 3, 4)), TypeError, r"dropout_key must be a jax\.random key, .*; got None\."),
        ((0, 0.5, (1, 2, 3, 4)), TypeError, r"dropout_key must be a jax\.random key, .*; got 0\."),
        (("rate", None, (1, 2, 3, 4)), TypeError, r"dropout_rate must be a Python number .*; got None\."),
        (("rate", "0.5", (1, 2, 3, 4)), TypeError, r"dropout_rate must be a Python number .*; got '0\.5'\."),
        (
            ("rate", jnp.ones(2), (1, 2, 3, 4)),
            TypeError,
            r"dropout_rate must be a Python number .*shape \(2,\)",
        ),
        (("rate", float("nan"), (1, 2, 3, 4)), ValueError, r"dropout_rate must be in \[0, 1\); got nan\."),
        (("shape", 0.5, None), ValueError, r"shape must be \(B, N, Sq, Skv\); got None\."),
        (("shape", 0.5, (1, 2, 3)), ValueError, r"shape must be \(B, N, Sq, Skv\); got \(1, 2, 3\)\."),
        (("shape", 0.5, (1, 2, 3.0, 4)), TypeError, r"shape must hold the ints .*; got \(1, 2, 3\.0, 4\)\."),
        (
            ("shape", 0.5, (1, 2, -3, 4)),
            ValueError,
            r"shape must hold sizes of at least 0; got \(1, 2, -3, 4\)",
        ),
        (
            ("shape", 0.5, (2**16, 1, 2**16, 1)),
            ValueError,
            r"shape must have fewer than 2\*\*31 rows B\*N\*Sq",
        ),
    ],
)
def test_errors_of_dropout_mask(arguments, kind, message):
    key, *rest = arguments
    with pytest.raises(kind, match=message):
        jax_fa.dropout_mask(jax.random.key(0) if isinstance(key, str) else key, *rest)


@pytest.mark.usefixtures("no_type_checker")
def test_a_traced_rate_of_dropout_mask_is_refused():
    with pytest.raises(
        TypeError, match=r"dropout_rate must be a Python number .* got a traced value float32\[\]"
    ):
        jax.jit(lambda rate: jax_fa.dropout_mask(jax.random.key(0), rate, (1, 2, 3, 4)))(0.5)


def test_an_empty_dropout_mask():
    assert jax_fa.dropout_mask(jax.random.key(0), 0.5, (2, 0, 3, 4)).shape == (0,)


KEYS = {
    "threefry": lambda: jax.random.key(7),
    "old-style": lambda: jax.random.PRNGKey(7),
    "rbg": lambda: jax.random.key(7, impl="rbg"),
    "unsafe_rbg": lambda: jax.random.key(7, impl="unsafe_rbg"),
}


def _weights(key, rate=RATE, *, batch=B, backend=None, **options) -> np.ndarray:
    """The attention weights `B N Sq Skv` after dropout: q = 0 makes them equal, v = 1 picks them out."""
    q, k = jnp.zeros((batch, SQ, N, SKV)), jnp.zeros((batch, SKV, K, SKV))
    v = jnp.broadcast_to(jnp.eye(SKV)[:, None], (batch, SKV, K, SKV))
    out = jax_fa.flash_attention(
        q, k, v, dropout_rate=rate, dropout_key=key, implementation=backend, **options
    )
    return np.moveaxis(np.asarray(out), -2, -3)


@pytest.mark.parametrize("kind", KEYS)
def test_attention_uses_the_bits_of_dropout_mask(kind, backend):
    """Dropped weights are 0, kept ones divided by the probability to be kept."""
    key, shape = KEYS[kind](), (B, N, SQ, SKV)
    keep = _unpack(jax_fa.dropout_mask(key, RATE, shape), shape)
    np.testing.assert_allclose(_weights(key, backend=backend), keep / (1 - RATE) / SKV, rtol=1e-5)


def test_old_and_new_style_keys_agree():
    shape = (B, N, SQ, SKV)
    old, new = (jax_fa.dropout_mask(KEYS[kind](), RATE, shape) for kind in ("old-style", "threefry"))
    np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("rate", [0.01, RATE, 0.5, 0.9])
def test_rate(rate):
    """The share of dropped weights, over all and along every axis, within six standard deviations."""
    shape = (4, 4, 64, 128)
    keep = _unpack(jax_fa.dropout_mask(jax.random.key(5), rate, shape), shape)
    for axis in range(5):
        dropped = 1 - (keep if axis == 4 else keep.mean(axis=tuple(i for i in range(4) if i != axis)))
        count = keep.size if axis == 4 else keep.size / shape[axis]
        np.testing.assert_allclose(
            dropped.mean() if axis == 4 else dropped, rate, atol=6 * math.sqrt(rate * (1 - rate) / count)
        )


def test_bits_are_not_correlated():
    """Neither neighbours, nor heads, nor batch entries, nor keys share bits."""
    shape = (2, 2, 64, 128)
    keep = _unpack(jax_fa.dropout_mask(jax.random.key(5), 0.5, shape), shape) * 2.0 - 1
    other = _unpack(jax_fa.dropout_mask(jax.random.key(6), 0.5, shape), shape) * 2.0 - 1
    pairs = [(keep, other)]
    for axis in range(4):
        pairs.append(tuple(np.split(keep, [shape[axis] // 2], axis)))
    for distance in (1, 2, 8, 16, 32):
        pairs.append((keep[..., distance:], keep[..., :-distance]))
        pairs.append((keep[..., distance:, :], keep[..., :-distance, :]))
    for a, b in pairs:
        assert abs((a * b).mean()) < 6 / math.sqrt(a.size)


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("mapped_key", [False, True], ids=["shared-key", "mapped-key"])
def test_bits_under_vmap(mapped_key, kind, backend):
    """An element of a vmap uses the bits of its own call; a shared key means shared bits."""
    keys = jax.random.split(KEYS[kind](), 3)
    at = 0 if mapped_key else None

    def run(x, key):
        q, k = jnp.zeros((1, SQ, N, 8)) * x, jnp.zeros((1, SKV, K, 8))
        v = jnp.broadcast_to(jnp.eye(SKV)[:, None], (1, SKV, K, SKV))
        return jax_fa.flash_attention(q, k, v, dropout_rate=RATE, dropout_key=key, implementation=backend)

    found = jax.vmap(run, in_axes=(0, at))(jnp.arange(3.0), keys if mapped_key else keys[0])
    for i, out in enumerate(found):
        np.testing.assert_array_equal(out, run(jnp.float32(i), keys[i if mapped_key else 0]))
    assert mapped_key != bool((found[0] == found[1]).all())


def test_keys_may_be_traced(backend):
    """Under jit and scan a new key is data: same bits as outside, one program for all keys."""
    keys = jax.random.split(jax.random.key(4), 2)
    traces = []

    @jax.jit
    def run(keys):
        traces.append(keys)

        def step(carry, key):
            return carry, _scanned(key)

        return jax.lax.scan(step, 0, keys)[1]

    def _scanned(key):
        q, k = jnp.zeros((1, SQ, N, 8)), jnp.zeros((1, SKV, K, 8))
        v = jnp.broadcast_to(jnp.eye(SKV)[:, None], (1, SKV, K, SKV))
        return jax_fa.flash_attention(q, k, v, dropout_rate=RATE, dropout_key=key, implementation=backend)

    for given in (keys, keys[::-1]):
        for out, key in zip(run(given), given, strict=True):
            keep = oracle.keep_bits(_seed(key), (1, N, SQ, SKV), 1 - RATE)
            np.testing.assert_allclose(out, np.moveaxis(keep / (1 - RATE) / SKV, -2, -3), rtol=1e-5)
    assert len(traces) == 1


def test_rate_zero_is_no_dropout(backend):
    """Not even a key is looked at."""
    plain = _weights(None, 0.0, backend=backend)
    np.testing.assert_array_equal(plain, _weights(jax.random.key(1), 0.0, backend=backend))
    np.testing.assert_allclose(plain, 1 / SKV, rtol=1e-5)


@pytest.mark.parametrize("keep_prob", [1e-9, 2**-16, 0.5, 1.0])
def test_threshold(keep_prob):
    """16 bits of resolution; never 0 as long as something may be kept."""
    assert dropout.threshold(keep_prob) == max(1, round(keep_prob * 2**16))
