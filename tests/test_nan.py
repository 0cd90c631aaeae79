"""NaN and infinity: what is masked does not leak, what is visible shows."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa.testing import oracle
from jax_fa.testing.case_masks import KINDS
from jax_fa.testing.cases import Case

# Each hides some keys from all rows, or from some; the arrays cross several tiles.
MASKS = (
    "lengths",
    "causal",
    "window",
    "segments_causal",
    "dense",
    "dense_padding",
    "cumulative",
    "prefix_window",
)


def _case(mask: str) -> Case:
    return Case(name=f"nan-{mask}", mask=mask, bias="BNQK", Sq=37, Skv=45)


@cache
def _run(mask: str, backend):
    """(out, lse, gradients) as one compiled function of all float arrays."""
    case = _case(mask)

    @jax.jit
    def run(x, dout, dlse):
        (out, lse), gradients = case.gradient(x, dout, dlse, implementation=backend)
        return {"out": out, "lse": lse, **gradients}

    return lambda *args: {name: np.asarray(a) for name, a in run(*args).items()}


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_what_is_masked_does_not_leak(mask, garbage, backend):
    """Garbage in keys and rows that nothing sees, and in the bias wherever it is masked, changes no bit."""
    case = _case(mask)
    visible = np.broadcast_to(case.visible(), case.full)
    group = visible.reshape(*case.B, case.K, -1, case.Sq, case.Skv)
    keys = ~np.moveaxis(group.any(axis=(-3, -2)), -1, -2)  # B Skv K
    rows = ~np.moveaxis(visible.any(axis=-1), -1, -2)  # B Sq N
    dout, dlse = case.cotangents()

    def results(filling):
        x = dict(case.operands())
        for name, hidden in (("query", rows), ("key", keys), ("value", keys)):
            x[name] = np.where(hidden[..., None], np.float32(filling), x[name])
        x["bias"] = np.where(visible, x["bias"], np.float32(filling))
        return _run(mask, backend)(x, np.where(rows[..., None], np.float32(filling), dout), dlse)

    clean, dirty = results(0.0), results(garbage)
    for name, a in clean.items():
        assert np.isfinite(a).all(), name
        np.testing.assert_array_equal(dirty[name], a, err_msg=name)
    assert not dirty["key"][keys].any() and not dirty["value"][keys].any()
    assert not dirty["query"][rows].any() and not dirty["bias"][~visible].any()


@pytest.mark.parametrize("where", ["query", "key", "value", "dout"])
@pytest.mark.parametrize("mask", ["causal", "window", "dense", "band"])
def test_what_is_visible_shows(mask, where, backend):
    """A NaN turns those rows into NaN that see it, with their gradients, and changes no bit of the others."""
    case = _case(mask)
    visible = np.broadcast_to(case.visible(), case.full)
    x, (dout, dlse) = dict(case.operands()), case.cotangents()
    clean = _run(mask, backend)(x, dout, dlse)
    b, at, head = 1, 20, 1
    arrays = {**x, "dout": dout}
    arrays[where] = arrays[where].copy()
    arrays[where][b, at, head, 2] = np.nan
    dirty = _run(mask, backend)({n: arrays[n] for n in x}, arrays["dout"], dlse)

    # Rows (B, N, Sq) that see the NaN, and keys (B, K, Skv) that those rows see.
    rows = np.zeros((*case.B, case.N, case.Sq), bool)
    if where in ("query", "dout"):
        rows[b, head, at] = visible[b, head, at].any()
    else:
        group = slice(head * case.N // case.K, (head + 1) * case.N // case.K)
        rows[b, group] = visible[b, group, :, at]
    assert rows.any() and not rows.all()
    seen = (rows[..., None] & visible).reshape(*case.B, case.K, -1, case.Skv).any(axis=-2)
    rows, seen = np.moveaxis(rows, -1, -2), np.moveaxis(seen, -1, -2)
    forward = where != "dout"
    if forward:
        assert np.isnan(dirty["out"][rows]).any(axis=-1).all()
    assert np.isnan(dirty["query"][rows]).any(axis=-1).all()
    for name, touched in (("out", rows & forward), ("query", rows), ("key", seen), ("value", seen)):
        np.testing.assert_array_equal(dirty[name][~touched], clean[name][~touched], err_msg=name)
    others = ~np.moveaxis(rows & forward, -1, -2)
    np.testing.assert_array_equal(dirty["lse"][others], clean["lse"][others])


def test_visible_nan_without_a_mask(backend):
    """Every row sees every key."""
    case = Case(name="nan-no-mask")
    for name in ("key", "value"):
        x = {n: a.copy() for n, a in case.operands().items()}
        x[name][0, 44, 1, 3] = np.nan
        out = np.asarray(jax.jit(lambda x: jax_fa.flash_attention(**x, implementation=backend))(x))
        assert np.isnan(out[0, :, 2:]).any(axis=-1).all()
        assert np.isfinite(out[1]).all() and np.isfinite(out[0, :, :2]).all()


def test_a_bias_of_minus_infinity_masks(backend):
    """As in other implementations; rows that are -inf throughout give 0 here too, never NaN."""
    case = Case(name="nan-bias", bias="BNQK")
    visible = KINDS["dense"].visible(case) & oracle.lengths(case.Sq, case.Skv, [37, 20], None)
    x = case.operands()
    hidden = x | {"bias": np.where(visible, x["bias"], -np.float32(np.inf))}
    dout, dlse = case.cotangents()
    (out, lse), gradients = jax.jit(lambda x: case.gradient(x, dout, dlse, implementation=backend))(hidden)
    want = oracle.attention(x["query"], x["key"], x["value"], bias=x["bias"], visible=visible)
    floor = 4 * oracle.FLOOR["float32"]
    for name, ours, oracles in (("out", out, want.out), ("lse", lse, want.lse)):
        oracle.assert_close_to_oracle(ours, oracles, oracles, name, floor)
    for name, oracles in want.gradients(dout, dlse).items():
        oracle.assert_close_to_oracle(gradients[name], oracles, oracles, name, floor)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_large_logits_do_not_overflow(dtype, backend):
    """exp is taken of differences from the row's maximum."""
    q = jnp.full((1, 40, 1, 8), 100.0, dtype)
    k = jnp.linspace(-100, 100, 40 * 8).reshape(1, 40, 1, 8).astype(dtype)
    v = jnp.ones((1, 40, 1, 8), dtype)
    run = jax.value_and_grad(
        lambda q: jnp.sum(
            jax_fa.flash_attention(q, k, v, scale=10.0, implementation=backend).astype(jnp.float32)
        )
    )
    out, gradient = jax.jit(run)(q)
    np.testing.assert_allclose(out, 40 * 8, rtol=1e-2)
    assert jnp.isfinite(gradient).all()
