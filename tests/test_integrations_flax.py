"""Flax's layers with our attention, held against the same layers with their own. Skipped where it is not installed."""

import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_tools import (
    TOLERANCE,
    B,
    D,
    E,
    K,
    N,
    S,
    assert_close,
    assert_mean,
    assert_same,
    count_calls,
    normal,
    padding,
    per_head,
    tri,
)

import jax_fa
from jax_fa.integrations import patch_jax_nn, precision
from jax_fa.masks import Causal, Lengths, Prefix, SlidingWindow


@pytest.fixture
def linen():
    return pytest.importorskip("flax.linen")


@pytest.fixture
def nnx():
    return pytest.importorskip("flax.nnx")


@pytest.fixture
def flax_ours(linen):
    from jax_fa.integrations import flax

    return flax


# --- flax.linen

LINEN = {
    "self": ({}, {}),
    "batch dims": ({}, {"inputs": [(2, 3, 5, E)]}),
    "no batch dim": ({}, {"inputs": [(S, E)]}),
    "cross": ({}, {"inputs": [(B, S, E), (B, 7, E)]}),
    "values": ({}, {"inputs": [(B, S, E), (B, 7, E), (B, 7, 24)]}),
    "normalized": ({"normalize_qk": True}, {}),
    "float mask": ({}, {"mask": np.float32(tri())[None, None]}),
    "bool mask": ({}, {"mask": padding() & tri()}),
    "integer mask": ({}, {"mask": np.int32(padding())}),
    "softmax in float32": ({"force_fp32_for_softmax": True}, {}),
    "bfloat16": ({"dtype": jnp.bfloat16}, {"mask": padding()}),
    "rate 0 while training": ({"dropout_rate": 0.0, "deterministic": False}, {}),
    "deterministic": ({"dropout_rate": 0.5, "deterministic": True}, {}),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", LINEN)
def test_linen(case, linen, flax_ours):
    options, call = LINEN[case]
    inputs = [normal(*shape, seed=i) for i, shape in enumerate(call.get("inputs", [(B, S, E)]))]
    theirs = linen.MultiHeadDotProductAttention(N, qkv_features=E, **options)
    ours = theirs.clone(attention_fn=flax_ours.attention_fn)
    variables = theirs.init(jax.random.key(0), *inputs)
    assert jax.tree.structure(ours.init(jax.random.key(0), *inputs)) == jax.tree.structure(variables)
    apply = [functools.partial(layer.apply, mask=call.get("mask")) for layer in (ours, theirs)]
    assert_same(*apply, variables, *inputs, dtype=jnp.dtype(options.get("dtype", "float32")).name)


@pytest.mark.parametrize("name", ["MultiHeadAttention", "SelfAttention"])
@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
def test_linen_other_layers(name, linen, flax_ours):
    theirs = getattr(linen, name)(N)
    x = normal(B, S, E)
    assert_same(
        theirs.clone(attention_fn=flax_ours.attention_fn).apply,
        theirs.apply,
        theirs.init(jax.random.key(0), x),
        x,
    )


@pytest.mark.parametrize(
    ("mask", "dense"),
    [
        (Causal("bottom-right"), tri()),
        (Causal() & Lengths(key=jnp.array([S, 7])), tri() & padding()),
        (SlidingWindow(3, 0), tri() & ~np.tri(S, k=-4, dtype=bool)),
    ],
    ids=["causal", "causal and lengths", "window"],
)
@pytest.mark.parametrize("by", ["factory", "call"])
def test_linen_structured_masks(by, mask, dense, linen, flax_ours):
    """In the factory, joined with an array that the layer gets; or in place of that array."""
    theirs = linen.MultiHeadDotProductAttention(N)
    x = normal(B, S, E)
    left = np.arange(S) > 0  # so that no row but the first is empty
    extra = (left | ~tri()[:, ::-1])[None, None] | tri(S, 1)
    if by == "factory":
        ours = theirs.clone(attention_fn=flax_ours.make_attention_fn(mask=mask))
        run = functools.partial(ours.apply, mask=jnp.asarray(extra))
    else:
        ours = theirs.clone(attention_fn=flax_ours.attention_fn)
        run = functools.partial(ours.apply, mask=mask & extra)
    assert_same(
        run, functools.partial(theirs.apply, mask=dense & extra), theirs.init(jax.random.key(0), x), x
    )


def test_linen_in_a_stack(linen, flax_ours):
    """remat and scan over layers, under jit and grad."""

    def stack(attention_fn):
        class Block(linen.Module):
            @linen.compact
            def __call__(self, x, _):
                attention = linen.MultiHeadDotProductAttention(N, attention_fn=attention_fn)
                return x + attention(x, mask=linen.make_causal_mask(x[..., 0])), None

        repeat = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
        return linen.scan(linen.remat(Block, prevent_cse=False), **repeat)()

    x = normal(B, S, E)
    ours, theirs = stack(flax_ours.attention_fn), stack(linen.dot_product_attention)
    variables = theirs.init(jax.random.key(0), x, None)
    assert_same(*(lambda v, x, m=m: m.apply(v, x, None)[0] for m in (ours, theirs)), variables, x)


def test_linen_decoding(linen, flax_ours):
    """Token by token with a cache: Flax's own steps, and the rows of a causal call."""
    causal = flax_ours.make_attention_fn(mask=Causal("bottom-right"))
    x = normal(B, S, E)
    theirs = linen.MultiHeadDotProductAttention(N, decode=True)
    variables = theirs.init(jax.random.key(0), x)
    whole = theirs.clone(decode=False, attention_fn=causal).apply({"params": variables["params"]}, x)
    for attention_fn in (flax_ours.attention_fn, causal):
        ours = theirs.clone(attention_fn=attention_fn)
        steps = [jax.jit(functools.partial(m.apply, mutable="cache")) for m in (ours, theirs)]
        assert count_calls(steps[0], variables, x[:, :1]) == 1
        states = [variables, variables]
        for i in range(S):
            rows = []
            for m, step in enumerate(steps):
                row, cache = step(states[m], x[:, i : i + 1])
                states[m] = {**variables, **cache}
                rows.append(row)
            assert_close(rows[0], rows[1], TOLERANCE["float32"])
            assert_close(rows[0], whole[:, i : i + 1], TOLERANCE["float32"])
        assert states[0]["cache"]["cache_index"] == S


def test_linen_dropout(linen, flax_ours):
    """Reproducible for each rng, 0 in the mean."""
    x = normal(B, S, E)
    layer = linen.MultiHeadDotProductAttention(N, dropout_rate=0.4, attention_fn=flax_ours.attention_fn)
    variables = layer.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, deterministic=True)
    run = functools.partial(layer.apply, variables, x)
    want = run(deterministic=True)
    train = functools.partial(run, deterministic=False)
    one, again, by_hand = (
        train(rngs={"dropout": jax.random.key(1)}),
        train(rngs={"dropout": jax.random.key(1)}),
        train(dropout_rng=jax.random.key(1)),
    )
    np.testing.assert_array_equal(one, again)
    assert (one != want).mean() > 0.9 and (one != by_hand).any()
    assert_mean(lambda key: train(dropout_rng=key), np.asarray(want))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "independent"])
def test_flax_broadcast_dropout(shared, flax_ours, backend):
    """One pattern for all batch entries and heads, as Flax draws it, or one for each."""
    zero = jnp.zeros((2, 3, S, N, S))
    values = jnp.broadcast_to(jnp.eye(S)[:, None], zero.shape)  # out is the weights, 1 / S or 0
    options = {"dropout_rng": jax.random.key(2), "dropout_rate": 0.5, "broadcast_dropout": shared}
    fn = flax_ours.make_attention_fn(implementation=backend)

    def weights(values):
        return fn(zero, zero, values, **options)

    kept, vjp = jax.vjp(weights, values)
    kept = np.asarray(kept) > 0
    assert 0.4 < kept.mean() < 0.6
    patterns = np.unique(np.moveaxis(kept, -2, 2).reshape(-1, S * S), axis=0)
    assert len(patterns) == (1 if shared else 2 * 3 * N)
    # The gradient drops the same weights: value j gets the sum of its column.
    (gradient,) = vjp(jnp.ones_like(values))
    columns = kept.sum(axis=2).swapaxes(-1, -2)  # B B S N
    np.testing.assert_allclose(gradient[..., 0], columns * 2 / S, atol=1e-5)


def test_flax_functions(linen, nnx, flax_ours):
    """`attention_fn` is both libraries' `dot_product_attention`: names, order, defaults and results."""
    ours = inspect.signature(flax_ours.attention_fn).parameters
    for theirs in (linen.dot_product_attention, nnx.dot_product_attention):
        want = inspect.signature(theirs).parameters
        assert set(want) <= set(ours)
        shared = list(want)[: list(want).index("module") + 1]
        assert list(ours)[: len(shared)] == shared
        assert all(ours[n].default == want[n].default for n in want if n != "promote_dtype")
    q, k, v = per_head(), normal(B, 7, N, D, seed=1), normal(B, 7, N, 5, seed=2)
    bias = normal(1, N, 1, 7, seed=3)
    assert_same(flax_ours.attention_fn, linen.dot_product_attention, q, k, v, bias)


def test_flax_options(flax_ours):
    """Each option of the factory is that of `flash_attention`."""
    x = per_head()
    options = {
        "alibi_slopes": normal(N, seed=3),
        "scale": 0.3,
        "logits_soft_cap": 2.0,
        "implementation": "xla",
    }
    made = flax_ours.make_attention_fn(mask=Causal(), **options)
    want = jax_fa.flash_attention(x, x, x, mask=Causal(), **options)
    np.testing.assert_array_equal(made(x, x, x), want)
    assert set(inspect.signature(flax_ours.make_attention_fn).parameters) == {"mask", *options}
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(made))(x, x, x), want)


def test_flax_dtypes(linen, flax_ours):
    """Promotion is Flax's, or the function given."""
    low, high = normal(B, S, N, D, dtype="bfloat16"), per_head()
    with jax.numpy_dtype_promotion("standard"):
        assert flax_ours.attention_fn(low, high, high).dtype == jnp.float32
    assert flax_ours.attention_fn(low, high, high, dtype=jnp.float16).dtype == jnp.float16
    whole = jnp.ones((B, S, N, D), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):
        assert flax_ours.attention_fn(whole, whole, whole).dtype == jnp.float32

    def down(arrays, dtype):
        assert dtype is None
        return tuple(x.astype(jnp.bfloat16) for x in arrays)

    assert flax_ours.attention_fn(low, high, high, promote_dtype=down).dtype == jnp.bfloat16


def test_flax_rows_that_see_nothing(flax_ours):
    out = flax_ours.attention_fn(per_head(), per_head(), per_head(), mask=np.arange(S)[:, None] > 0)
    assert not out[:, 0].any() and out[:, 1:].all()


PRECISIONS = [
    None,
    "default",
    "highest",
    "tensorfloat32",
    jax.lax.Precision.HIGHEST,
    ("default", "highest"),
    jax.lax.DotAlgorithmPreset.F32_F32_F32,
    "BF16_BF16_F32_X3",
]


@pytest.mark.parametrize("asked", PRECISIONS, ids=str)
def test_flax_accepts_every_precision_that_is_met(asked, flax_ours, linen):
    """On CPU float32 products are exact to float32; sums of 16-bit products are float32 everywhere."""
    for dtype in ("float32", "bfloat16"):
        x = per_head().astype(dtype)
        run = jax.jit(lambda x: flax_ours.attention_fn(x, x, x, precision=asked))
        np.testing.assert_array_equal(run(x), flax_ours.attention_fn(x, x, x))
    x = normal(B, S, E)
    layer = linen.MultiHeadDotProductAttention(N, precision=asked, attention_fn=flax_ours.attention_fn)
    layer.init(jax.random.key(0), x)


def test_flax_refuses_a_precision_that_is_not_met(flax_ours, monkeypatch):
    x = per_head()
    with pytest.raises(NotImplementedError, match=r"precision='F64_F64_F64' asks for float64; float32 is"):
        flax_ours.attention_fn(x, x, x, precision="F64_F64_F64")
    for unknown in ("fast", 3, ("default", "fast")):
        with pytest.raises(NotImplementedError, match=r"precision must be None, a jax\.lax\.Precision or"):
            flax_ours.attention_fn(x, x, x, precision=unknown)
    monkeypatch.setattr(precision, "here", lambda: "tpu")
    for accepted in (None, "default", "bfloat16", "BF16_BF16_F32"):
        flax_ours.attention_fn(x, x, x, precision=accepted)
    low = x.astype(jnp.bfloat16)
    flax_ours.attention_fn(low, low, low, precision="highest")
    for refused in ("high", jax.lax.Precision.HIGHEST, ("default", "highest"), "F32_F32_F32"):
        with pytest.raises(
            NotImplementedError, match=r"precision=.* is more than the kernels may use on tpu"
        ):
            flax_ours.attention_fn(x, x, x, precision=refused)
        with jax.default_matmul_precision("highest"):
            fn = flax_ours.make_attention_fn(implementation="xla")
            run = jax.jit(lambda x, fn=fn, p=refused: fn(x, x, x, precision=p))
            assert "precision = [HIGHEST, HIGHEST]" in run.lower(x).as_text()


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (NotImplementedError, "module must be None: sow_weights=True", {"module": object()}),
        (NotImplementedError, "einsum_dot_general must be None", {"einsum_dot_general": jax.lax.dot_general}),
        (NotImplementedError, "qk_attn_weights_einsum must be None", {"qk_attn_weights_einsum": jnp.einsum}),
        (NotImplementedError, "attn_weights_value_einsum must", {"attn_weights_value_einsum": jnp.einsum}),
        (ValueError, r"dropout_rng must be .* dropout_rate=0.5; got None", {"dropout_rate": 0.5}),
        (
            ValueError,
            r"dropout_rate must be .* \[0, 1\)",
            {"dropout_rate": 1.0, "dropout_rng": jax.random.key(0)},
        ),
        (
            TypeError,
            "dropout_rng must be a jax.random key, .* got 0",
            {"dropout_rate": 0.5, "dropout_rng": 0},
        ),
        (TypeError, r"dropout_rate must be a number in \[0, 1\); got None", {"dropout_rate": None}),
        (TypeError, "mask must be one mask; got a list of 2", {"mask": [Causal(), Causal()]}),
        (TypeError, "mask must be .* got True. A causal mask is", {"mask": True}),
        (TypeError, "mask must be .* got str", {"mask": "causal"}),
        (TypeError, "bias must be an array; got 'abc'", {"bias": "abc"}),
        (TypeError, "is_causal must be True or False; got 'no'", {"is_causal": "no"}),
        (TypeError, "broadcast_dropout must be True or False; got 'no'", {"broadcast_dropout": "no"}),
        (ValueError, "mask must broadcast to", {"mask": np.ones((3, 1, S, S))}),
        (ValueError, "bias must broadcast to", {"bias": jnp.ones((S + 1,))}),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_flax_errors(error, message, options, flax_ours):
    with pytest.raises(error, match=message):
        flax_ours.attention_fn(per_head(), per_head(), per_head(), **options)


def test_flax_layers_reach_the_errors(linen, nnx, flax_ours):
    x = normal(B, S, E)
    layer = linen.MultiHeadDotProductAttention(N, attention_fn=flax_ours.attention_fn)
    with pytest.raises(NotImplementedError, match="sow_weights=True"):
        layer.init(jax.random.key(0), x, sow_weights=True)
    einsum = {
        "qk_attn_weights_einsum_cls": lambda: jnp.einsum,
        "attn_weights_value_einsum_cls": lambda: jnp.einsum,
    }
    with pytest.raises(NotImplementedError, match="qk_attn_weights_einsum must be None"):
        layer.clone(**einsum).init(jax.random.key(0), x)
    layer = nnx.MultiHeadAttention(N, E, attention_fn=flax_ours.attention_fn, decode=False, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="sow_weights=True"):
        layer(x, sow_weights=True)


@pytest.mark.parametrize(
    "options",
    [
        {"mask": Causal()},
        {"mask": SlidingWindow(3, 0, "bottom-right")},
        {"mask": Lengths(key=(3, 3)) & Prefix(3)},
        {"mask": Causal("bottom-right", offset=-1)},
        {"alibi_slopes": np.ones(N, np.float32)},
    ],
    ids=str,
)
def test_flax_refuses_positions_when_decoding(options, flax_ours):
    made = flax_ours.make_attention_fn(**options)
    with pytest.raises(ValueError, match=rf"one query and {S} keys, a step of decoding"):
        made(per_head()[:, :1], per_head(), per_head())
    made(per_head(), per_head(), per_head())


def test_flax_arrays_of_no_rank(flax_ours):
    with pytest.raises(
        ValueError, match=r"query must have a rank that fits layout 'BSND'; got shape \(2, 3\)"
    ):
        flax_ours.attention_fn(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="query must be an array; got None"):
        flax_ours.attention_fn(None, per_head(), per_head())


def test_flax_factory_errors(flax_ours, no_type_checker):
    with pytest.raises(ValueError, match=r"implementation must be .*got 'fast'"):
        flax_ours.make_attention_fn(implementation="fast")
    with pytest.raises(TypeError, match=r"mask must be a jax_fa\.masks\.Mask or a boolean array; got str"):
        flax_ours.make_attention_fn(mask="causal")


# --- flax.nnx

NNX = {
    "self": ({}, {}),
    "batch dims": ({}, {"shape": (2, 3, 5, E)}),
    "causal": ({}, {"is_causal": True}),
    "causal and mask": (
        {},
        {"is_causal": True, "mask": np.float32(np.broadcast_to(padding(), (B, 1, S, S)))},
    ),
    "grouped": ({"num_kv_heads": K}, {"is_causal": True}),
    "one key head": ({"num_kv_heads": 1}, {"mask": padding()}),
    "normalized": ({"normalize_qk": True}, {}),
    "bfloat16": ({"dtype": jnp.bfloat16, "num_kv_heads": K}, {"is_causal": True}),
    "deterministic": ({"dropout_rate": 0.5, "deterministic": True}, {}),
}


def _nnx_run(nnx, attention_fn, options, call):
    """The layer as a function of its state and input, and that state."""
    layer = nnx.MultiHeadAttention(N, E, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0), **options)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    return lambda params, x: nnx.merge(graph, params, rest)(x, **call), params


@pytest.mark.parametrize("case", NNX)
def test_nnx(case, nnx, flax_ours):
    options, call = NNX[case]
    call = dict(call)
    x = normal(*call.pop("shape", (B, S, E)))
    ours, params = _nnx_run(nnx, flax_ours.attention_fn, options, call)
    theirs, _ = _nnx_run(nnx, nnx.dot_product_attention, options, call)
    assert_same(ours, theirs, params, x, dtype=jnp.dtype(options.get("dtype", "float32")).name)


def test_nnx_structured_mask(nnx, flax_ours):
    x = normal(B, S, E)
    made = flax_ours.make_attention_fn(mask=Causal())
    ours, params = _nnx_run(nnx, made, {"num_kv_heads": K}, {"mask": jnp.asarray(padding())})
    theirs, _ = _nnx_run(nnx, nnx.dot_product_attention, {"num_kv_heads": K}, {"mask": padding() & tri()})
    assert_same(ours, theirs, params, x)
    by_call, _ = _nnx_run(nnx, flax_ours.attention_fn, {"num_kv_heads": K}, {"mask": Causal() & padding()})
    assert_close(by_call(params, x), ours(params, x), 1e-6)


def test_nnx_transforms(nnx, flax_ours):
    """nnx.jit, nnx.remat and nnx.value_and_grad around the layer."""
    x = normal(B, S, E)

    def loss(layer, x):
        return jnp.mean(nnx.remat(lambda layer, x: layer(x, is_causal=True))(layer, x) ** 2)

    results = []
    for attention_fn in (flax_ours.attention_fn, nnx.dot_product_attention):
        layer = nnx.MultiHeadAttention(N, E, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))
        results.append(nnx.jit(nnx.value_and_grad(loss))(layer, x))
    assert_close(*results, TOLERANCE["float32"])


def test_nnx_decoding(nnx, flax_ours):
    """Token by token with a cache, with fewer key heads."""
    x = normal(B, S, E)
    made = flax_ours.make_attention_fn(mask=Causal("bottom-right"))
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    layers = []
    for attention_fn in (flax_ours.attention_fn, made, nnx.dot_product_attention):
        layer = nnx.MultiHeadAttention(
            N, E, num_kv_heads=K, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0)
        )
        layer.init_cache(x.shape)
        layers.append(layer)
    whole = layers[1](x)
    for i in range(S):
        rows = [step(layer, x[:, i : i + 1]) for layer in layers]
        for row in rows:
            assert_close(row, whole[:, i : i + 1], TOLERANCE["float32"])
    assert all(layer.cache_index[...] == S for layer in layers)


def test_nnx_decoding_with_is_causal(nnx, flax_ours):
    """Layers hand it on beside their own causal mask: counted from the first key, it would leave that key alone.

    (Those of newer releases do not hand it on, and then it changes nothing.)
    """
    x, results = normal(B, 1, E), []
    for options in ({}, {"is_causal": True}):
        layer = nnx.MultiHeadAttention(
            N, E, attention_fn=flax_ours.attention_fn, decode=True, rngs=nnx.Rngs(0)
        )
        layer.init_cache((B, S, E))
        try:
            results.append([layer(x, **options), layer(2 * x, **options)])
        except ValueError as error:
            assert f"is_causal must be False with one query and {S} keys, a step of decoding" in str(error)
            assert options
    for other in results[1:]:
        assert_close(other, results[0], TOLERANCE["float32"])


def test_flax_dropout_rate_as_data(flax_ours):
    key = jax.random.key(0)
    run = lambda rate: flax_ours.attention_fn(
        per_head(), per_head(), per_head(), dropout_rate=rate, dropout_rng=key
    )
    assert_close(jax.jit(run)(jnp.float32(0.25)), run(0.25), TOLERANCE["float32"])
    with pytest.raises(ValueError, match=r"dropout_rate must be in \[0, 1\); got -0.5"):
        run(-0.5)


def test_nnx_dropout(nnx, flax_ours):
    x = normal(B, S, E)
    layer = nnx.MultiHeadAttention(
        N, E, attention_fn=flax_ours.attention_fn, dropout_rate=0.4, decode=False, rngs=nnx.Rngs(0)
    )
    want = layer(x, deterministic=True)
    one, again, other = (layer(x, deterministic=False, rngs=nnx.Rngs(dropout=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != want).any() and (one != other).any()
    graph, state = nnx.split(layer)

    def run(key):
        return nnx.merge(graph, state)(x, deterministic=False, rngs=nnx.Rngs(dropout=key))

    assert_mean(run, np.asarray(want))


def test_nnx_stock_layer_inside_the_patch(nnx):
    """nnx calls jax.nn where there is no dropout, so the patch alone is enough."""
    run, params = _nnx_run(nnx, nnx.dot_product_attention, {"num_kv_heads": K}, {"is_causal": True})
    x = normal(B, S, E)
    assert_same(patch_jax_nn()(lambda *args: run(*args)), run, params, x)
