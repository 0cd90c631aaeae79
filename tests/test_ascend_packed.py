"""Packed sequences on CANN whose keep bits are drawn, and ALiBi of positions that start elsewhere."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa import ascend
from jax_fa.backends.ascend import installation, keep_bits, split
from jax_fa.entry import request_of
from jax_fa.masks import Causal, CumulativeLengths
from jax_fa.testing import emulator

if (absent := installation.absence()) is not None:
    pytest.skip(f"needs the CANN adapter: {absent}", allow_module_level=True)

KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def nothing_leaks():
    emulator.reset()
    yield
    assert emulator.live() == dict.fromkeys(emulator.OBJECTS, 0)
    emulator.reset()


def _gradients(run, *arrays):
    def both(*arrays):
        out, pull = jax.vjp(run, *arrays)
        return [out, *pull(jnp.cos(out))]

    return jax.block_until_ready(jax.jit(both)(*arrays))


def _alike(run, *arrays) -> list[dict]:
    """Output and gradients are those of xla; returns CANN's calls."""
    found, want = (_gradients(partial(run, backend), *arrays) for backend in ("ascend", "xla"))
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * max(1, np.abs(b).max()))
    return emulator.log()


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- keep bits


@pytest.mark.parametrize("at_once", [100, 2**22])
def test_bits_of_sequences_are_those_of_a_mask_of_all(at_once, monkeypatch):
    """Of a part of the sequences and heads; sequences may be empty, short, and begin within a byte."""
    monkeypatch.setattr(keep_bits, "_AT_ONCE", at_once)
    T, N, ends = 61, 3, np.array([0, 3, 4, 30, 61])
    call = request_of(
        jax_fa.flash_attention, *(jnp.zeros((T, N, 8)),) * 3, layout="SND", dropout_rate=0.3, dropout_key=KEY
    ).call
    places = tuple((int(a), int(b - a)) for a, b in itertools.pairwise(ends))
    places = (*places[:2], (4, 0), *places[2:])
    drawn = keep_bits.DrawnSequences(call, places, places)
    bits = np.unpackbits(jax_fa.dropout_mask(KEY, 0.3, (1, N, T, T)), bitorder="little")
    whole = bits[: N * T * T].reshape(N, T, T)
    for part in (keep_bits.Part.whole(5, N, T), keep_bits.Part(1, 4, 1, 3, 0, T)):
        blocks = [
            whole[part.n0 : part.n1, a : a + n, a : a + n].reshape(-1) for a, n in places[part.b0 : part.b1]
        ]
        want = np.packbits(np.concatenate(blocks), bitorder="little")
        np.testing.assert_array_equal(drawn.packed(part), want)


@pytest.mark.parametrize(
    ("q_ends", "kv_ends"),
    [
        ((7, 7, 20, 50), (9, 9, 30, 61)),
        pytest.param((1, 3, 4, 60), (1, 3, 4, 60), marks=pytest.mark.slow),  # rows that belong to none
        pytest.param((61,), (61,), marks=pytest.mark.slow),
    ],
)
def test_dropout_by_key(q_ends, kv_ends):
    """As many bits as the sequences have weights, in layout TND, and the results of every backend."""

    def run(backend, q, k, v):
        mask = CumulativeLengths(q_ends, kv_ends, within=Causal("bottom-right"))
        options = {"dropout_rate": 0.3, "dropout_key": KEY, "layout": "SND"}
        return jax_fa.flash_attention(q, k, v, mask=mask, implementation=backend, **options)

    calls = _alike(run, _normal(0, 61, 4, 16), _normal(1, 61, 2, 16), _normal(2, 61, 2, 16))
    lengths = (np.diff(ends, prepend=0) for ends in (q_ends, kv_ends))
    want = -(-4 * int(np.dot(*lengths)) // 8)
    assert [call["tensors"]["dropMask"]["shape"] for call in calls] == [[want]] * 2
    assert {call["inputLayout"] for call in calls} == {"TND"}


def test_dropout_by_key_in_pieces(monkeypatch):
    """A piece has the bits of its sequences and heads, also where the rate is data."""
    arrays = _normal(0, 61, 4, 16), _normal(1, 61, 2, 16), jnp.float32(0.3)

    def run(backend, q, k, rate):
        options = {"dropout_rate": jax.lax.stop_gradient(rate), "dropout_key": KEY, "layout": "SND"}
        return jax_fa.flash_attention(
            q, k, k, mask=CumulativeLengths((7, 20, 61)), implementation=backend, **options
        )

    most = -(-2 * 41 * 41 // 8)  # of the two query heads of a key head in the longest sequence
    monkeypatch.setattr(split, "MAX_DRAWN_BYTES", most)
    jax.clear_caches()
    calls = _alike(run, *arrays)
    sizes = [call["tensors"]["dropMask"]["shape"][0] for call in calls]
    assert len(sizes) == 8 and max(sizes) <= most + 1
    jax.clear_caches()


@pytest.mark.parametrize(
    ("ends", "options", "note"),
    [
        ([4096 * i for i in range(1, 9)], "ascend", "536870912 bytes, at most 268435456 at a time"),
        ([32768], "ascend", "4294967296 bytes, at most 268435456 at a time"),
        (
            [4096 * i for i in range(1, 9)],
            ascend.Options(max_work=None),
            "536870912 bytes, at most 536870912",
        ),
    ],
)
def test_explain_says_the_bytes_of_bits(ends, options, note):
    x = jax.ShapeDtypeStruct((32768, 32, 128), jnp.bfloat16)
    lengths = {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
    found = jax_fa.explain(
        x,
        x,
        x,
        32,
        "TND",
        keep_prob=0.9,
        dropout_key=KEY,
        platforms="ascend",
        implementation=options,
        **lengths,
    )
    (text,) = found.notes["ascend"]
    assert note.removesuffix(", at most 536870912") in text


# --- where positions start


@pytest.mark.one_in(2)
@pytest.mark.parametrize("pse_type", [2, 3])
@pytest.mark.parametrize("layout", ["BSND", "TND"])
def test_start_indices_are_the_operators_own(layout, pse_type):
    """Nothing of Sq x Skv is built, and 16-bit calls stay so."""
    ends = [7, 7, 20, 24]
    lengths = {"actual_seq_qlen": ends, "actual_seq_kvlen": ends} if layout == "TND" else {}
    lead = () if layout == "TND" else (2,)

    def run(backend, q, k, slopes):
        return jax_fa.flash_attention_score(
            q, k, k, slopes, head_num=4, input_layout=layout, scale_value=0.25, pse_type=pse_type,
            q_start_idx=[5], kv_start_idx=[20], implementation=backend, **lengths,
        ).attention_out  # fmt: skip

    calls = _alike(run, _normal(0, *lead, 24, 4, 16), _normal(1, *lead, 24, 2, 16), np.abs(_normal(2, 4)))
    assert [(c["pseType"], c["qStartIdx"], c["kvStartIdx"]) for c in calls] == [(pse_type, [5], [20])] * 2
    assert calls[0]["tensors"]["realShift"]["shape"] == [4]
    emulator.reset()
    narrow = jnp.asarray(_normal(0, *lead, 24, 4, 16), jnp.bfloat16)
    jax.block_until_ready(run("ascend", narrow, narrow, np.abs(_normal(2, 4))))
    (call,) = emulator.log()
    assert call["tensors"]["query"]["dtype"] == "BF16"
