"""Other libraries' own functions and tests against ours, where they are installed: tokamax, gemma, tunix, levanter, MaxText.

What they mean is in `test_integrations_signatures.py`, which needs none of them.
"""

import functools
import importlib
import inspect
import sys
import unittest
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa.integrations import levanter, maxtext, tokamax

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
integrations = importlib.import_module("integrations")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # what they warn of is theirs
    pytest.mark.usefixtures("standard_promotion", "no_type_checker"),
]
B, S, N, K, D = 2, 24, 4, 2, 16
ATOL = {"float32": 2e-5, "bfloat16": 0.03}


@pytest.fixture
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def _installed(name: str):
    """A module of a library; skips where it is missing, or calls what this JAX no longer has."""
    module = pytest.importorskip(name)
    if name.startswith("levanter"):
        source = inspect.getsource(importlib.import_module("haliax.jax_utils"))
        if "jax.core.is_constant_dim" in source and not hasattr(jax.core, "is_constant_dim"):
            pytest.skip(f"haliax calls jax.core.is_constant_dim, which JAX {jax.__version__} does not have")
    return module


@pytest.fixture
def theirs():
    """tokamax, whose flags must be parsed once."""
    library = pytest.importorskip("tokamax")
    flags = importlib.import_module("absl.flags")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["tests"], known_only=True)
    return library


def _normal(*shape: int, seed: int = 0, dtype: str = "float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _same(ours, theirs, args, dtype: str = "float32") -> None:
    """Outputs, and gradients of a weighted sum of them for every argument."""

    def run(fn):
        @jax.jit
        def both(*args):
            out, vjp = jax.vjp(fn, *args)
            return out, vjp(_normal(*out.shape, seed=9, dtype=str(out.dtype)))

        return jax.tree.leaves(both(*args))

    for found, want in zip(run(ours), run(theirs), strict=True):
        assert found.dtype == want.dtype and found.shape == want.shape
        found, want = np.asarray(found, np.float64), np.asarray(want, np.float64)
        np.testing.assert_allclose(found, want, rtol=0, atol=ATOL[dtype] * max(1.0, abs(want).max()))


@pytest.mark.parametrize("name", integrations.MODELS.keys() - integrations.layers.LAYERS.keys())
def test_models_train_alike(name):
    """50 steps of a small model of the library, as it is and with our attention."""
    make, module, _ = integrations.MODELS[name]
    _installed(module)
    before, after = integrations.compare(make(24), 50)
    assert before.losses[-1] < 0.95 * before.losses[0]  # it learns
    np.testing.assert_allclose(after.losses, before.losses, rtol=2e-4)


# --- tokamax

TRI = np.tri(S, dtype=bool)
ROWS = np.arange(S) < np.array([[S], [9]])
TOKAMAX = {
    "plain": {},
    "bias and mask": {"bias": _normal(1, N, S, S, seed=3), "mask": ROWS[:, None, None]},
    "causal, soft cap": {"is_causal": True, "logits_soft_cap": 2.0, "scale": 0.5},
    "window": {"local_window_size": (5, 2)},
    "one window": {"local_window_size": 3, "is_causal": True},
    "lengths of keys": {"key_value_seq_lengths": jnp.array([S, 7], jnp.int32)},
    "all": {
        "bias": _normal(B, 1, S, S, seed=4),
        "mask": TRI | ROWS[:, None, None],
        "is_causal": True,
        "local_window_size": (9, 9),
        "logits_soft_cap": 3.0,
        "key_value_seq_lengths": jnp.array([S, 20], jnp.int32),
    },
}


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("heads", [K, N, 1])
@pytest.mark.parametrize("case", TOKAMAX)
def test_tokamax(case, heads, dtype, theirs):
    given = dict(TOKAMAX[case])
    args = [_normal(B, S, n, D, seed=i, dtype=dtype) for i, n in enumerate((N, heads, heads))]
    ours, own = (
        functools.partial(fn, **given, implementation="xla")
        for fn in (tokamax.dot_product_attention, theirs.dot_product_attention)
    )
    _same(ours, own, args, dtype)


def test_tokamax_has_the_same_arguments(theirs):
    """Every argument of theirs, of the same kind and default; and none but private ones more."""

    def public(fn):
        found = inspect.signature(fn).parameters.values()
        return {p.name: (p.kind, p.default) for p in found if not p.name.startswith("_")}

    assert public(tokamax.dot_product_attention) == public(theirs.dot_product_attention)
    assert set(theirs._src.ops.attention.api.IMPLEMENTATIONS) <= set(tokamax._THEIRS)


def test_tokamax_own_tests(theirs, monkeypatch):
    """The tests that tokamax holds its implementations to, in float16 and bfloat16, with linear memory."""
    own = pytest.importorskip("tokamax._src.ops.attention.api_test")
    reached = []

    def bound(*_):
        reached.append(1)  # outputs and gradients have been compared
        raise unittest.SkipTest("what follows looks at the operator of tokamax that was chosen")

    monkeypatch.setattr(own, "api", tokamax)
    holder = own.autotuning if hasattr(own, "autotuning") else own.hlo_utils  # since 0.0.17
    monkeypatch.setattr(holder, "get_bound_args", bound)
    monkeypatch.setattr(own.DotProductAttentionTest, "IMPL", "triton")
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(own.DotProductAttentionTest)
    result = unittest.TestResult()
    suite.run(result)
    assert not result.failures and not result.errors, (result.failures + result.errors)[0][1]
    assert result.testsRun >= 19 and len(reached) >= 12 and len(result.skipped) <= len(reached) + 1


# --- levanter


@pytest.fixture
def lev():
    return _installed("levanter.layers.attention")


def _levanter_masks(lev, hax, axes):
    batch, position, keys = axes["batch"], axes["position"], axes["keys"]
    ids = hax.named(np.arange(S) // 9, position)
    per_batch = hax.named(np.stack([np.arange(S) // 9, np.arange(S) // 5]), (batch, position))
    causal = lev.AttentionMask.causal
    return {
        "none": None,
        "causal": causal(),
        "offset": causal(offset=3),
        "offsets": causal(offset=hax.named(np.array([2, 0]), batch)),
        "window": causal(sliding_window=5),
        "packed": causal().with_segment_ids(ids),
        "packed rows": causal(sliding_window=4).with_segment_ids(per_batch),
        "array": lev.AttentionMask.explicit(hax.named(TRI, (position, keys))),
        "array alone": hax.named(TRI | ROWS[:, None], (batch, position, keys)),
        "both": causal()
        & lev.AttentionMask.explicit(hax.named(TRI.T | ROWS[:, None], (batch, position, keys))),
    }


LEVANTER_MASKS = (
    "none",
    "causal",
    "offset",
    "offsets",
    "window",
    "packed",
    "packed rows",
    "array",
    "array alone",
    "both",
)


@pytest.mark.parametrize("order", ["BPHGD", "BHGPD"])
@pytest.mark.parametrize("mask", LEVANTER_MASKS)
def test_levanter(mask, order, lev):
    hax = importlib.import_module("haliax")
    axes = {name: hax.Axis(name, size) for name, size in {"batch": B, "position": S, "keys": S}.items()}
    kv, group, size = hax.Axis("kv", K), hax.Axis("group", N // K), hax.Axis("size", D)
    letters = {"B": axes["batch"], "P": axes["position"], "H": kv, "G": group, "D": size}
    query_axes = tuple(letters[x] for x in order)
    key_axes = (axes["batch"], axes["keys"], kv, size)
    masks = _levanter_masks(lev, hax, axes)
    assert set(masks) == set(LEVANTER_MASKS)
    bias_axes = (kv, group, axes["position"], axes["keys"])
    arrays = [
        _normal(*(axis.size for axis in shape), seed=i)
        for i, shape in enumerate((query_axes, key_axes, key_axes, bias_axes))
    ]
    out_axes = []

    def run(fn, q, k, v, bias):
        q, k, v, bias = (
            hax.named(x, shape)
            for x, shape in zip((q, k, v, bias), (query_axes, key_axes, key_axes, bias_axes), strict=True)
        )
        given = {"mask": masks[mask], "bias": bias, "logits_soft_cap": 4.0}
        out = fn(
            axes["position"], axes["keys"], size, q, k, v, **given, attn_backend=lev.AttentionBackend.VANILLA
        )
        out_axes.append(out.axes)
        return out.array

    _same(*(functools.partial(run, x.dot_product_attention) for x in (levanter, lev)), arrays)
    assert len(set(out_axes)) == 1


def test_levanter_has_the_same_arguments(lev):
    own = inspect.signature(lev.dot_product_attention).parameters
    ours = {
        n: p for n, p in inspect.signature(levanter.dot_product_attention).parameters.items() if n[0] != "_"
    }
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in own.values()
    ]
    assert {x.value for x in lev.AttentionBackend} == set(levanter._BACKENDS)


# --- MaxText


@pytest.fixture
def op():
    return pytest.importorskip("maxtext.layers.attention_op")


def test_maxtext_has_the_same_arguments(op):
    def public(fn):
        return [(p.name, p.kind) for p in inspect.signature(fn).parameters.values()]

    assert public(maxtext.apply_attention) == public(op.AttentionOp.apply_attention)


@pytest.mark.parametrize("ids", [None, "packed"])
@pytest.mark.parametrize("kind", ["global", "local_sliding", "chunk", "full", "mla"])
def test_maxtext_masks(kind, ids, op):
    """Against the mask that MaxText's own method makes."""
    kind = op.AttentionType(kind)
    fields = {"attention_type": kind, "sliding_window_size": 5, "chunk_attn_window_size": 7}
    layer = SimpleNamespace(**fields, attn_logits_soft_cap=None, config=SimpleNamespace())
    for name in ("_maybe_shard_with_pspec", "_logical_to_mesh_axes"):
        setattr(layer, name, lambda x, *_: x)
    layer._load_balanced_context_parallel = lambda: False
    q, k, v = (_normal(B, S, n, D, seed=i) for i, n in enumerate((N, K, K)))
    ids = (
        None if ids is None else jnp.asarray(np.stack([np.arange(S) // 9, np.arange(S) // 5 - 1]), jnp.int32)
    )
    own = inspect.signature(op.AttentionOp.generate_attention_mask).parameters
    given = {"attention_type": kind} if "attention_type" in own else {}
    bias = op.AttentionOp.generate_attention_mask(layer, q, k, ids, "train", **given)
    seen = None if bias is None else jnp.broadcast_to(bias[:, 0] > -1.0, (B, 1, S, S))
    out, _, _ = maxtext.apply_attention(layer, q, k, v, ids, None, None, "train")
    want = jax.nn.dot_product_attention(q, k, v, mask=seen, scale=1.0)
    if seen is not None:
        want = jnp.where(seen.any(axis=-1)[:, 0, :, None, None], want, 0)
    np.testing.assert_allclose(out, want, atol=2e-5)
