"""Haiku's layer with our attention, held against its own. Skipped where it is not installed."""

import functools
import unittest

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
    normal,
    padding,
    tri,
)

from jax_fa import api
from jax_fa.masks import Causal


@pytest.fixture
def hk():
    return pytest.importorskip("haiku")


@pytest.fixture
def hk_ours(hk):
    from jax_fa.integrations import haiku

    return haiku


HAIKU = {
    "self": ({}, {}),
    "no batch dim": ({}, {"shapes": [(S, E)] * 3}),
    "batch dims": ({}, {"shapes": [(2, 3, 5, E)] * 3}),
    "shared keys": ({}, {"shapes": [(B, S, E), (1, 7, E), (7, E)]}),
    "sizes": ({"value_size": 5, "model_size": 10}, {}),
    "no biases": ({"with_bias": False}, {}),
    "mask": ({}, {"mask": padding() & tri()}),
    "float mask": ({}, {"mask": np.float32(tri())[None, None]}),
    "bfloat16": ({}, {"mask": padding(), "dtype": "bfloat16"}),
}


def _hk_run(hk, cls, options, mask=None):
    def apply(query, key, value):
        w_init = hk.initializers.VarianceScaling(1.0)
        return cls(N, D, w_init=w_init, **options)(query, key, value, mask)

    return hk.without_apply_rng(hk.transform(apply))


@pytest.mark.parametrize("case", HAIKU)
def test_haiku(case, hk, hk_ours):
    options, call = HAIKU[case]
    dtype = call.get("dtype", "float32")
    shapes = call.get("shapes", [(B, S, E)] * 3)
    inputs = [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    ours, theirs = (
        _hk_run(hk, cls, options, call.get("mask"))
        for cls in (hk_ours.MultiHeadAttention, hk.MultiHeadAttention)
    )
    params = theirs.init(jax.random.key(0), *inputs)
    assert_close(ours.init(jax.random.key(0), *inputs), params, 0.0)
    assert ours.init(jax.random.key(0), *inputs).keys() == params.keys()
    assert_same(ours.apply, theirs.apply, params, *inputs, dtype=dtype)


def test_haiku_structured_mask(hk, hk_ours):
    x = normal(B, S, E)
    ours = _hk_run(hk, functools.partial(hk_ours.MultiHeadAttention, implementation="xla"), {}, Causal())
    theirs = _hk_run(hk, hk.MultiHeadAttention, {}, tri()[None, None])
    params = theirs.init(jax.random.key(0), x, x, x)
    assert_same(lambda p, x: ours.apply(p, x, x, x), lambda p, x: theirs.apply(p, x, x, x), params, x)
    assert "implementation='xla'" in str(jax.make_jaxpr(ours.apply)(params, x, x, x))


def test_haiku_transforms(hk, hk_ours):
    """hk.remat and hk.vmap inside of a transformed function."""

    def model(cls):
        def apply(x):
            layer = cls(N, D, w_init=hk.initializers.VarianceScaling(1.0))
            return hk.vmap(hk.remat(lambda x: layer(x, x, x)), split_rng=False)(x)

        return hk.without_apply_rng(hk.transform(apply))

    ours, theirs = model(hk_ours.MultiHeadAttention), model(hk.MultiHeadAttention)
    x = normal(B, S, E)
    assert_same(ours.apply, theirs.apply, theirs.init(jax.random.key(0), x), x)


def test_haiku_dropout(hk, hk_ours):
    """Of the attention weights, by Haiku's own stream of keys or one that is given."""
    x, w_init = normal(B, S, E), hk.initializers.VarianceScaling(1.0)

    def apply(x, rate, key=None):
        return hk_ours.MultiHeadAttention(N, D, w_init=w_init)(x, x, x, dropout_rate=rate, dropout_key=key)

    model = hk.transform(apply)
    params = model.init(jax.random.key(0), x, 0.0)
    want = model.apply(params, None, x, 0.0)
    one, again, other = (model.apply(params, jax.random.key(seed), x, 0.4) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != want).any() and (one != other).any()
    by_key = model.apply(params, None, x, 0.4, jax.random.key(3))
    assert_close(
        jax.jit(model.apply)(params, None, x, jnp.float32(0.4), jax.random.key(3)),
        by_key,
        TOLERANCE["float32"],
    )
    assert_mean(lambda key: model.apply(params, key, x, 0.4), np.asarray(want))
    with pytest.raises(ValueError, match=r"dropout_rate must be in \[0, 1\)"):
        model.apply(params, jax.random.key(1), x, 1.5)


@pytest.mark.usefixtures("no_type_checker")
def test_haiku_errors(hk, hk_ours):
    x = normal(B, S, E)

    def init(mask=None, arrays=(x, x, x), **options):
        _hk_run(hk, hk_ours.MultiHeadAttention, options, mask).init(jax.random.key(0), *arrays)

    with pytest.raises(ValueError, match=r"query must have at least 2 dimensions .*got shape \(12,\)"):
        init(arrays=(np.ones(12, np.float32), x, x))
    with pytest.raises(ValueError, match=r"key must have batch dims that broadcast to query's \(\); got"):
        init(arrays=(x[0], x, x))
    with pytest.raises(TypeError, match="value must be an array; got None"):
        init(arrays=(x, x, None))

    with pytest.raises(ValueError, match=r"mask must have 4 dimensions .*got shape \(12, 12\)"):
        init(tri())
    with pytest.raises(ValueError, match="mask must broadcast to"):
        init(np.ones((3, 1, S, S), bool))
    with pytest.raises(TypeError, match=r"mask must be one mask; got a list of 1\. Join masks by &"):
        init([Causal()])
    with pytest.raises(TypeError, match="mask must be an array; got 'causal'"):
        init("causal")
    with pytest.raises(ValueError, match=r"implementation must be .*got 'fast'"):
        init(implementation="fast")


@pytest.mark.filterwarnings("ignore:w_init_scale is deprecated:DeprecationWarning")
def test_haiku_own_tests(hk, hk_ours, monkeypatch):
    """Haiku's tests of its layer, with ours in its place. (The wheels of Flax and Equinox contain no tests.)"""
    own = pytest.importorskip("haiku._src.attention_test")
    flash_attention, reached = api.flash_attention, []

    def counted(*args, **kwargs):
        out = flash_attention(*args, **kwargs)
        reached.append(1)
        return out

    monkeypatch.setattr(api, "flash_attention", counted)
    monkeypatch.setattr(own.attention, "MultiHeadAttention", hk_ours.MultiHeadAttention)
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromModule(own).run(result)
    assert not result.failures and not result.errors, (result.failures + result.errors)[0][1]
    assert result.testsRun >= 13 and not result.skipped and len(reached) >= 19
