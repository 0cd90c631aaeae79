"""Equinox's layers with our attention, held against their own. Skipped where it is not installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_tools import (
    TOLERANCE,
    B,
    D,
    E,
    N,
    S,
    assert_close,
    assert_mean,
    assert_same,
    count_calls,
    normal,
    padding,
    tri,
)

from jax_fa.masks import Causal, Lengths


@pytest.fixture
def eqx():
    return pytest.importorskip("equinox")


@pytest.fixture
def eqx_ours(eqx):
    from jax_fa.integrations import equinox

    return equinox


EQUINOX = {
    "self": ({}, {}),
    "biases": ({f"use_{name}_bias": True for name in ("query", "key", "value", "output")}, {}),
    "sizes": ({"qk_size": 5, "vo_size": 6, "output_size": 10}, {}),
    "mask": ({}, {"mask": jnp.asarray(tri())}),
    "mask by head": ({}, {"mask": jnp.asarray(tri() | (np.arange(N) == 1)[:, None, None])}),
    "inference": ({"dropout_p": 0.5}, {"inference": True}),
    "of inference": ({"dropout_p": 0.5, "inference": True}, {}),
    "a key without dropout": ({}, {"key": jax.random.key(0)}),
    "other heads": ({}, {"process_heads": lambda q, k, v: (q + 1, k * 2, v[::-1])}),
    "bfloat16": ({"dtype": jnp.bfloat16}, {"mask": jnp.asarray(tri())}),
}


def _eqx_layer(eqx, **options):
    return eqx.nn.MultiheadAttention(N, E, key=jax.random.key(0), **options)


@pytest.mark.parametrize("case", EQUINOX)
def test_equinox(case, eqx, eqx_ours):
    options, call = EQUINOX[case]
    dtype = jnp.dtype(options.get("dtype", "float32")).name
    theirs = _eqx_layer(eqx, **options)
    ours = eqx_ours.use_flash_attention(theirs)
    x, y = normal(B, S, E, dtype=dtype), normal(B, S, E, seed=1, dtype=dtype)

    def run(layer):
        params, static = eqx.partition(layer, eqx.is_inexact_array)

        def apply(params, x, y):
            return jax.vmap(lambda x, y: eqx.combine(params, static)(x, y, y, **call))(x, y)

        return apply, params

    (one, params), (two, same) = run(ours), run(theirs)
    assert all(a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True))
    assert_close(one(params, x, y), two(same, x, y), TOLERANCE[dtype])
    # The trees differ in the class only, so leaves are what gradients are compared by.
    leaves, theirs_tree = jax.tree.flatten(same)
    tree = jax.tree.structure(params)
    assert_same(
        lambda leaves, *xs: one(tree.unflatten(leaves), *xs),
        lambda leaves, *xs: two(theirs_tree.unflatten(leaves), *xs),
        leaves,
        x,
        y,
        dtype=dtype,
    )


def test_equinox_structured_mask(eqx, eqx_ours):
    theirs = _eqx_layer(eqx)
    ours = eqx_ours.use_flash_attention(theirs)
    x = normal(B, S, E)
    assert_same(
        jax.vmap(lambda x: ours(x, x, x, Causal())),
        jax.vmap(lambda x: theirs(x, x, x, jnp.asarray(tri()))),
        x,
    )
    lengths = jnp.array([S, 7])  # one mask per batch entry
    assert_same(
        lambda x: jax.vmap(lambda x, n: ours(x, x, x, Causal() & Lengths(key=n)))(x, lengths),
        lambda x: jax.vmap(lambda x, m: theirs(x, x, x, m))(x, jnp.asarray(padding()[:, 0] & tri())),
        x,
    )


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from _equations(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_equinox_vmap_moves_nothing(gradient, eqx, eqx_ours):
    """The batch is a batch dim of one call, heads are its N, and no array of query's size is transposed."""
    layer = eqx_ours.MultiheadAttention(N, E, use_query_bias=True, key=jax.random.key(0))
    x = normal(B, S, E)

    def run(x):
        return jax.vmap(lambda x: layer(x, x, x, Causal()))(x)

    fn = jax.grad(lambda x: run(x).sum()) if gradient else run
    equations = list(_equations(jax.make_jaxpr(fn)(x).jaxpr))
    calls = [e for e in equations if e.primitive.name.startswith("flash_attention")]
    assert {e.primitive.name for e in calls} == {
        "flash_attention_fwd",
        *(["flash_attention_bwd"] if gradient else []),
    }
    for call in calls:
        assert call.params["problem"].query_axes == call.params["problem"].out_axes == (0, 1, 2, 3)
        assert [v.aval.shape for v in call.invars[:3]] == [(B, S, N, D)] * 3
    moved = [e for e in equations if e.primitive.name == "transpose" and e.invars[0].aval.size >= x.size]
    assert moved == []
    # The library's own way of projecting does transpose, so this test can fail.
    stock = _eqx_layer(eqx)
    stock_equations = _equations(jax.make_jaxpr(jax.vmap(lambda x: stock(x, x, x)))(x).jaxpr)
    assert any(e.primitive.name == "transpose" and e.invars[0].aval.size >= x.size for e in stock_equations)


def test_equinox_models(eqx, eqx_ours, tmp_path):
    """Every layer of a model, nothing else; a checkpoint of the one loads into the other."""

    class Model(eqx.Module):
        layers: list
        head: eqx.nn.MLP

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.layers = [eqx.nn.MultiheadAttention(N, E, key=k) for k in keys[:2]]
            self.head = eqx.nn.MLP(E, E, E, 1, key=keys[2])

        def __call__(self, x):
            for layer in self.layers:
                x = x + eqx.filter_checkpoint(layer)(x, x, x, jnp.asarray(tri()))
            return jax.vmap(self.head)(x)

    model = Model(jax.random.key(0))
    swapped = eqx_ours.use_flash_attention(model, implementation="xla")
    assert [type(layer) for layer in swapped.layers] == [eqx_ours.MultiheadAttention] * 2
    assert [layer.implementation for layer in swapped.layers] == ["xla"] * 2
    assert type(model.layers[0]) is eqx.nn.MultiheadAttention
    x = normal(B, S, E)
    assert count_calls(jax.vmap(swapped), x) == 2 and count_calls(jax.vmap(model), x) == 0

    def loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    results = [eqx.filter_jit(eqx.filter_value_and_grad(loss))(m, x) for m in (swapped, model)]
    assert_close(*results, TOLERANCE["float32"])
    eqx.tree_serialise_leaves(tmp_path / "model", model)
    other = eqx_ours.use_flash_attention(Model(jax.random.key(1)))
    loaded = eqx.tree_deserialise_leaves(tmp_path / "model", other)
    assert_close(jax.vmap(loaded)(x), jax.vmap(model)(x), TOLERANCE["float32"])
    # Again, to change the implementation; and Equinox's own surgery.
    again = eqx_ours.use_flash_attention(swapped, implementation=None)
    assert [layer.implementation for layer in again.layers] == [None] * 2
    assert eqx.nn.inference_mode(again).layers[0].dropout.inference


def test_equinox_projection_of_another_kind(eqx, eqx_ours):
    """A projection that is no plain Linear is called row by row, as Equinox does."""

    class Scaled(eqx.nn.Linear):
        def __call__(self, x, *, key=None):
            return 2 * super().__call__(x)

    theirs = _eqx_layer(eqx)
    scaled = Scaled(E, E, use_bias=False, key=jax.random.key(3))
    theirs = eqx.tree_at(lambda layer: layer.query_proj, theirs, scaled)
    ours = eqx_ours.use_flash_attention(theirs)
    x = normal(S, E)
    assert_same(lambda x: ours(x, x, x), lambda x: theirs(x, x, x), x)


def test_equinox_dropout(eqx, eqx_ours):
    layer = eqx_ours.MultiheadAttention(N, E, dropout_p=0.4, key=jax.random.key(0))
    x = normal(S, E)
    want = layer(x, x, x, inference=True)
    run = functools.partial(layer, x, x, x, jnp.asarray(tri()))
    one, again, other = (run(key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != want).any() and (one != other).any()
    assert_mean(lambda key: layer(x, x, x, key=key), np.asarray(want))


def test_equinox_dropout_rate_as_data(eqx, eqx_ours):
    """A rate that is a leaf of the model, under jit: as the same number."""
    layer = eqx_ours.MultiheadAttention(N, E, dropout_p=0.25, key=jax.random.key(0))
    x, key = normal(S, E), jax.random.key(1)
    traced = eqx.tree_at(lambda layer: layer.dropout.p, layer, jnp.float32(0.25))
    arrays, rest = eqx.partition(traced, eqx.is_array)
    found = jax.jit(lambda arrays: eqx.combine(arrays, rest)(x, x, x, key=key))(arrays)
    assert_close(found, layer(x, x, x, key=key), TOLERANCE["float32"])
    with pytest.raises(ValueError, match=r"key must be a jax\.random key where inference is false"):
        jax.jit(lambda arrays: eqx.combine(arrays, rest)(x, x, x))(arrays)


@pytest.mark.usefixtures("no_type_checker")
def test_equinox_errors(eqx, eqx_ours):
    layer = eqx_ours.MultiheadAttention(N, E, dropout_p=0.4, key=jax.random.key(0))
    x = normal(S, E)
    with pytest.raises(ValueError, match=r"key must be a jax.random key .* dropout_p=0.4; got None"):
        layer(x, x, x)
    with pytest.raises(TypeError, match=r"key must be a jax\.random key, such as .*; got 0\."):
        layer(x, x, x, key=0)
    with pytest.raises(TypeError, match=r"mask must be one mask; got a list of 1\. Join masks by &"):
        layer(x, x, x, [Causal()], inference=True)
    with pytest.raises(ValueError, match="process_heads must keep the shapes"):
        layer(x, x, x, inference=True, process_heads=lambda q, k, v: (q[1:], k, v))
    for name, given in (("query", (x[None], x, x)), ("key_", (x, x[0], x)), ("value", (x, x, x[None]))):
        with pytest.raises(
            ValueError, match=rf"{name} must have 2 dimensions .*For a batch, jax\.vmap the layer"
        ):
            layer(*given, inference=True)
    with pytest.raises(TypeError, match="value must be an array; got None"):
        layer(x, x, None, inference=True)
    with pytest.raises(ValueError, match="value must have key's"):
        layer(x, x, x[1:], inference=True)
    with pytest.raises(ValueError, match="mask must broadcast to"):
        layer(x, x, x, jnp.ones((S, S + 1), bool), inference=True)
    with pytest.warns(DeprecationWarning, match="use inference"):
        layer(x, x, x, deterministic=True)
    with pytest.raises(ValueError, match=r"implementation must be .*got 'fast'"):
        eqx_ours.MultiheadAttention(N, E, key=jax.random.key(0), implementation="fast")
    with pytest.raises(ValueError, match=r"implementation must be .*got 'fast'"):
        eqx_ours.use_flash_attention(layer, implementation="fast")
    with pytest.raises(
        ValueError, match=r"model must hold an equinox\.nn\.MultiheadAttention; Linear has none"
    ):
        eqx_ours.use_flash_attention(layer.query_proj)

    class Own(eqx.nn.MultiheadAttention):
        pass

    with pytest.raises(TypeError, match="got Own, a subclass"):
        eqx_ours.use_flash_attention([Own(N, E, key=jax.random.key(0))])
