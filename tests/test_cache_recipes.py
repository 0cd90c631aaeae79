"""The recipes of docs/inference.md, as they stand there, against full attention in float64."""

import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa.backends import python_ints
from jax_fa.masks import Band, Causal, Lengths
from jax_fa.testing import oracle

PAGE = Path(__file__).parents[1] / "docs/inference.md"


@pytest.fixture(scope="module")
def page():
    """What the sections that hold recipes define, by name."""
    text = PAGE.read_text(encoding="utf-8")
    sections = re.findall(r"^(?:##+ (.+?)\n)?(.*?)(?=^##+ |\Z)", text, re.DOTALL | re.MULTILINE)
    found: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"):
        for title, part in sections:
            if title not in ("Paged KV cache", "Tree masks", "Attention sinks"):
                exec(
                    compile(
                        "".join(re.findall(r"^```python\n(.*?)^```$", part, re.DOTALL | re.MULTILINE)),
                        title,
                        "exec",
                    ),
                    found,
                )
    return found


@pytest.fixture(autouse=True)
def defaults():
    with jax.numpy_dtype_promotion("standard"):
        yield


def _tokens(page, seed: int, length: int):
    normal = np.random.default_rng(seed).standard_normal
    B, N, K, D = (page[name] for name in "BNKD")
    return (normal((B, length, heads, D)).astype(np.float32) for heads in (N, K, K))


def _close(found, want) -> None:
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-5)


def test_a_cache_with_traced_positions(page):
    """Prefill in chunks, then decode: one program for each number of rows, whatever the position."""
    q, k, v = _tokens(page, 1, 64)
    want = oracle.attention(q, k, v, visible=oracle.causal(64, 64)).out
    step = page["step"]
    step.clear_cache()
    cache = (jnp.full(k.shape, jnp.nan, jnp.float32),) * 2
    for first, rows in ((0, 16), (16, 16), (32, 16), *((i, 1) for i in range(48, 64))):
        now = slice(first, first + rows)
        cache, out = step(cache, q[:, now], k[:, now], v[:, now], jnp.int32(first))
        _close(out, want[:, now])
    assert step._cache_size() == 2


def test_a_batch_of_unequal_lengths(page):
    q, k, v = _tokens(page, 2, 64)
    step, positions = page["ragged_step"], np.array([50, 0], np.int32)
    step.clear_cache()
    written = np.arange(64)[:, None, None] < positions[:, None, None, None]
    cache = tuple(jnp.asarray(np.where(written, x, np.nan)) for x in (k, v))
    for at in (positions, positions + 1, positions + 2):
        rows = [x[np.arange(2), at][:, None] for x in (q, k, v)]
        cache, out = step(cache, *rows, jnp.asarray(at))
        visible = oracle.lengths(1, 64, key=at + 1)
        _close(out, oracle.attention(rows[0], k, v, visible=visible).out)
    assert step._cache_size() == 1


def test_a_ring_buffer(page):
    """From its first token to far beyond its size."""
    q, k, v = _tokens(page, 3, 50)
    step, window = page["windowed"], page["WINDOW"]
    step.clear_cache()
    want = oracle.attention(q, k, v, visible=oracle.band(50, 50, window - 1, 0)).out
    cache = (jnp.full((page["B"], window, page["K"], page["D"]), jnp.nan, jnp.float32),) * 2
    for position in range(50):
        now = slice(position, position + 1)
        cache, out = step(cache, q[:, now], k[:, now], v[:, now], jnp.int32(position))
        _close(out, want[:, now])
    assert step._cache_size() == 1


def test_a_shared_prefix(page):
    """Several new tokens of each sequence, lengths of their own; one program for all lengths."""
    B, prefix = page["B"], [np.asarray(page[f"prefix_{name}"]) for name in ("key", "value")]
    q, k, v = _tokens(page, 4, 64)
    shared = page["shared"]
    shared.clear_cache()
    for lengths in (np.array([64, 3], np.int32), np.array([7, 40], np.int32)):
        out = shared(q[:, :3], k, v, lengths)
        for b in range(B):
            keys, values = (
                np.concatenate([p[0], x[b, : lengths[b]]]) for p, x in zip(prefix, (k, v), strict=True)
            )
            visible = np.tri(3, len(keys), len(keys) - 3, dtype=bool)
            _close(out[b], oracle.attention(q[b, :3], keys, values, visible=visible).out)
    assert shared._cache_size() == 1


def test_a_loop_of_decode_steps(page):
    """256 tokens: one program for all positions, a cache that is updated in place, and the numbers of float64."""
    decode, step, project = page["decode"], page["step"], page["project"]
    B, N, K, D, steps = (page[name] for name in (*"BNKD", "STEPS"))
    decode.clear_cache()
    prompt = np.asarray(page["prompt"])
    for last in (30, 11):
        cache = tuple(jnp.zeros((B, page["CAPACITY"], K, D)) for _ in range(2))
        cache, _ = step(cache, *project(prompt[:, :last]), jnp.int32(0))
        given = cache
        cache, _, used, outs = decode(cache, prompt[:, last : last + 1], jnp.int32(last))
        assert all(x.is_deleted() for x in given) and outs.shape == (B, steps, N, D)
        hidden = np.concatenate([prompt[:, :last], used], axis=1)
        qkv = (hidden.astype(np.float64) @ np.asarray(page["weights"], np.float64)).reshape(
            B, -1, N + 2 * K, D
        )
        q, k, v = np.split(qkv, (N, N + K), axis=2)
        want = oracle.attention(q, k, v, visible=oracle.causal(hidden.shape[1], hidden.shape[1])).out
        np.testing.assert_allclose(outs, want[:, last:], rtol=1e-4, atol=1e-4)
    assert decode._cache_size() == 1


# --- positions that are Python ints


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(python_ints, "_warned", False)
    monkeypatch.setattr(python_ints, "_last", {})


def _trace(rows: int, mask) -> None:
    query, keys = (jax.ShapeDtypeStruct((1, n, 2, 8), jnp.float32) for n in (rows, 32))
    jax.eval_shape(lambda q, k: jax_fa.flash_attention(q, k, k, mask=mask), query, keys)


@pytest.mark.parametrize(
    ("rows", "mask"),
    [
        (1, lambda i: Causal(offset=i)),
        (1, lambda i: Lengths(key=i + 1)),
        (1, lambda i: Band(left=7, right=0, offset=np.int64(i)) & Lengths(key=i + 1)),
        (4, lambda i: Causal(offset=4 * i)),
    ],
    ids=["offset", "length", "both", "four"],
)
def test_a_decode_loop_over_python_ints_warns_once(rows, mask, unwarned):
    """Also where other layers have masks of their own."""
    with pytest.warns(
        UserWarning, match=r"Python ints are part of the program.*Causal\(offset=jnp.int32"
    ) as said:
        for i in range(8):
            for _ in range(2):
                _trace(rows, mask(i))
                _trace(rows, Band(left=3, right=0, offset=jnp.int32(i)))
        assert not said
        for i in range(8, 20):
            _trace(rows, mask(i))
    assert len(said) == 1


@pytest.mark.parametrize(
    ("rows", "mask"),
    [
        (1, lambda i: Causal(offset=jnp.int32(i))),
        (1, lambda i: Lengths(key=np.array([i + 1]))),
        (1, lambda i: Causal(offset=i * i)),
        (2, lambda i: Causal(offset=i)),
        (1, lambda i: Band(left=4)),
        (16, lambda i: Causal(offset=16 * i)),
    ],
    ids=["array", "lengths", "jumps", "rows", "constant", "chunks"],
)
def test_what_warns_of_nothing(rows, mask, unwarned):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(20):
            _trace(rows, mask(i))
