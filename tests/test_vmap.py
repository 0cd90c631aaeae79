"""vmap of any arguments, along any axis, against a Python loop (or the oracle, element by element)."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa.masks import Causal, Lengths
from jax_fa.testing.cases import FEATURES, KEYS, ROWS, check
from jax_fa.testing.programs import equations

SIZE, SQ, SKV, N, K, D = 3, ROWS + 1, KEYS + 1, 4, 2, 8
FLOATS = ("query", "key", "value", "bias", "alibi_slopes")


# --- the table: two different calls of a kind at once


@pytest.mark.one_in(4)
@pytest.mark.in_turn
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_two_calls_at_once(case, backend):
    """Every operand mapped, masks and dropout keys too: results and gradients are those of each call."""
    calls = [replace(case, name=f"{case.name}-{i}") for i in range(2)]

    def stack(trees):
        return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)

    operands = stack([c.stored_operands() for c in calls])
    arrays = stack([jax.tree.map(jnp.asarray, c.arrays()) for c in calls])
    dout = jnp.stack([c.stored(c.cotangents()[0]) for c in calls])
    dlse = jnp.stack([c.cotangents()[1] for c in calls])
    run = jax.vmap(lambda x, a, do, dl: case.gradient(x, do, dl, implementation=backend, **a))
    (out, lse), gradients = jax.jit(run)(operands, arrays, dout, dlse)
    for i, call in enumerate(calls):
        check(call, out[i], lse[i], {name: g[i] for name, g in gradients.items()})


# --- subsets of the arguments


@cache
def _mapped() -> dict[str, jax.Array]:
    """Every argument with a leading axis of SIZE."""
    normal = np.random.default_rng(0).standard_normal
    return {
        "query": jnp.asarray(normal((SIZE, SQ, N, D)), jnp.float32),
        "key": jnp.asarray(normal((SIZE, SKV, K, D)), jnp.float32),
        "value": jnp.asarray(normal((SIZE, SKV, K, D)), jnp.float32),
        "bias": jnp.asarray(normal((SIZE, 1, SQ, SKV)), jnp.float32),
        "alibi_slopes": jnp.asarray(np.abs(normal((SIZE, N))) / 8, jnp.float32),
        "length": jnp.array([20, 0, SKV], jnp.int32),
        "dropout_key": jax.random.split(jax.random.key(1), SIZE),
    }


_WEIGHTS = np.random.default_rng(1).standard_normal((SQ, N, D)).astype(np.float32)
_LSE_WEIGHTS = np.random.default_rng(2).standard_normal((N, SQ)).astype(np.float32)


def _loss(floats, others, backend):
    mask = Causal("bottom-right") & Lengths(key=others["length"])
    dropout = {"dropout_rate": 0.2, "dropout_key": others["dropout_key"]} if "dropout_key" in others else {}
    out, lse = jax_fa.flash_attention(
        **floats, mask=mask, **dropout, implementation=backend, return_logsumexp=True
    )
    return jnp.sum(out * _WEIGHTS) + jnp.sum(jnp.where(lse > -1e30, lse, 0) * _LSE_WEIGHTS), (out, lse)


def _split(x):
    return {n: a for n, a in x.items() if n in FLOATS}, {n: a for n, a in x.items() if n not in FLOATS}


@cache
def _one(backend):
    """The loss, results and gradients of one call."""
    return jax.jit(lambda *x: jax.value_and_grad(_loss, has_aux=True)(*x, backend))


def _arguments(mapped: tuple[str, ...], i: int | None = None) -> tuple[dict, dict]:
    """Element i (None: all elements) of what is mapped, element 0 of the rest. (Dropout compiles slowly.)"""
    every = {n: a for n, a in _mapped().items() if n != "dropout_key" or n in mapped}
    return _split({n: a[0] if n not in mapped else a if i is None else a[i] for n, a in every.items()})


def _axes(mapped: tuple[str, ...]) -> tuple[dict, dict]:
    return _split({n: 0 if n in mapped else None for part in _arguments(mapped) for n in part})


def _loop(mapped: tuple[str, ...], backend) -> list:
    """One call per element."""
    return [_one(backend)(*_arguments(mapped, i)) for i in range(SIZE)]


def _close(ours, theirs) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, theirs)


SUBSETS = [
    ("query",),
    ("key",),
    ("value",),
    ("query", "key"),
    ("query", "value"),
    ("key", "value"),
    ("query", "key", "value"),
    ("bias",),
    ("alibi_slopes",),
    ("length",),
    ("dropout_key",),
    ("query", "bias", "length"),
    ("key", "alibi_slopes", "dropout_key"),
    tuple(_mapped()),
]


@pytest.mark.in_turn(1)
@pytest.mark.parametrize("mapped", SUBSETS, ids="+".join)
def test_subsets_of_arguments(mapped, backend):
    """vmap(grad): an argument that is not mapped has a gradient per element all the same."""
    found = jax.jit(jax.vmap(lambda *x: _one(backend)(*x), in_axes=_axes(mapped)))(*_arguments(mapped))
    loop = _loop(mapped, backend)
    for i in range(SIZE):
        _close(jax.tree.map(lambda a, i=i: a[i], found), loop[i])


@pytest.mark.parametrize(
    "mapped", [("query",), ("key", "value"), ("bias",), ("length",), tuple(_mapped())], ids="+".join
)
def test_gradient_of_vmap(mapped, backend):
    """grad(vmap): what is not mapped collects the gradients of all elements."""

    def total(floats, others):
        losses, _ = jax.vmap(lambda *x: _loss(*x, backend), in_axes=_axes(mapped))(floats, others)
        return jnp.sum(losses)

    found = jax.jit(jax.grad(total))(*_arguments(mapped))
    loop = [gradients for _, gradients in _loop(mapped, backend)]
    for name in FLOATS:
        each = np.stack([g[name] for g in loop])
        _close(found[name], each if name in mapped else each.sum(axis=0))


def test_nested(backend):
    """Queries along one axis, keys and values along another: every query meets every key."""
    x = _mapped()
    floats, others = _arguments((), 0)

    def run(q, k, v):
        return _one(backend)(floats | {"query": q, "key": k, "value": v}, others)

    inner = jax.vmap(run, in_axes=(None, 0, 0))
    found = jax.jit(jax.vmap(inner, in_axes=(0, None, None)))(x["query"][:2], x["key"], x["value"])
    for i in range(2):
        for j in range(SIZE):
            _close(
                jax.tree.map(lambda a, i=i, j=j: a[i, j], found),
                run(x["query"][i], x["key"][j], x["value"][j]),
            )


# --- positions of the mapped axis

POSITIONS = [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3), (3, 0, 1), (-2, -3, None)]


@pytest.mark.in_turn
@pytest.mark.parametrize("axes", POSITIONS, ids=str)
def test_positions(axes, backend):
    """The mapped axis may stand anywhere, also next to the heads, and leave from anywhere."""
    names = ("query", "key", "value")
    every = _mapped()
    mapped = tuple(name for name, axis in zip(names, axes, strict=True) if axis is not None)
    moved = [
        every[n][0] if a is None else jnp.moveaxis(every[n], 0, a) for n, a in zip(names, axes, strict=True)
    ]
    floats, others = _arguments((), 0)

    def run(q, k, v):
        (_, (out, lse)), gradients = _one(backend)(floats | dict(zip(names, (q, k, v), strict=True)), others)
        return out, lse, gradients

    out_at = 2
    out, lse, gradients = jax.jit(jax.vmap(run, in_axes=axes, out_axes=(out_at, -1, 1)))(*moved)
    loop = _loop(mapped, backend)
    for i in range(SIZE):
        found = (jnp.take(out, i, out_at), jnp.take(lse, i, -1))
        _close(found, loop[i][0][1])
        _close(jax.tree.map(lambda a, i=i: jnp.take(a, i, 1), gradients), loop[i][1])


def test_what_is_not_mapped_is_not_copied(backend):
    """vmap over queries hands one key and one value to the kernel, not one per element."""
    x = _mapped()
    shared = {n: x[n][0] for n in ("key", "value", "bias")}
    run = jax.vmap(lambda q: jax_fa.flash_attention(q, **shared, implementation=backend))
    found = [
        e for e in equations(jax.make_jaxpr(run)(x["query"])) if e.primitive.name == "flash_attention_fwd"
    ]
    assert len(found) == 1
    shapes = [v.aval.shape for v in found[0].invars]
    assert (SIZE, SQ, N, D) in shapes
    assert shapes.count((1, SKV, K, D)) == 2 and (1, 1, SQ, SKV) in shapes


@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_mapped_axis_stays_where_it_is(at, backend):
    """No transpose in front of the kernel, wherever vmap finds its axis."""
    x = _mapped()
    moved = [jnp.moveaxis(x[n], 0, at) for n in ("query", "key", "value")]
    run = jax.vmap(lambda *x: jax_fa.flash_attention(*x, implementation=backend), in_axes=at, out_axes=at)
    names = [e.primitive.name for e in equations(jax.make_jaxpr(run)(*moved))]
    assert "flash_attention_fwd" in names and "transpose" not in names


def test_heads_one_by_one(backend):
    """A module that attends with one head and is mapped over heads is multi-head attention."""
    q, k, v = (_mapped()[n][0] for n in ("query", "key", "value"))
    k, v = (jnp.repeat(x, N // K, axis=1) for x in (k, v))

    def one_head(q, k, v):
        return jax_fa.flash_attention(
            q[:, None], k[:, None], v[:, None], mask=Causal(), implementation=backend
        )[:, 0]

    found = jax.vmap(one_head, in_axes=1, out_axes=1)(q, k, v)
    _close(found, jax_fa.flash_attention(q, k, v, mask=Causal(), implementation=backend))
