"""Functions of one pair, score_mod and mask_mod, and block-sparse masks made of them.

The well-known ones are written once, for scalars or arrays of NumPy, JAX and PyTorch alike. Oracles: NumPy in float64 with all
indices at once; plain JAX in float64 for derivatives, and for the forward `flex_attention` of PyTorch.
"""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa
from jax_fa.flex import programs
from jax_fa.masks import Causal, CumulativeLengths, Lengths
from jax_fa.testing import oracle
from jax_fa.testing.programs import temporary_bytes

B, S, N, K, D, Dv = 2, 37, 4, 2, 8, 6
SQUARE = 6  # pixels of a row of the image that NATTEN's windows are of


@dataclass(frozen=True)
class Mod:
    """`score(xp, arrays)` and `mask(xp, arrays)` make the functions; None: without."""

    score: Callable[[Any, dict[str, Any]], Callable] | None = None
    mask: Callable[[Any, dict[str, Any]], Callable] | None = None


def _natten(xp, a):
    def mask(b, h, i, j):
        return (xp.abs(i // SQUARE - j // SQUARE) <= 1) & (xp.abs(i % SQUARE - j % SQUARE) <= 2)

    return mask


MODS = {
    "alibi": Mod(lambda xp, a: lambda s, b, h, i, j: s - a["slopes"][h] * xp.abs(j - i)),
    "relative": Mod(lambda xp, a: lambda s, b, h, i, j: s + a["table"][h, i - j + S]),
    "positions": Mod(lambda xp, a: lambda s, b, h, i, j: a["table"][h, i - j + S]),  # whatever the score is
    "soft-cap": Mod(lambda xp, a: lambda s, b, h, i, j: 2 * xp.tanh(s / 2)),
    "causal": Mod(mask=lambda xp, a: lambda b, h, i, j: i >= j),
    "window": Mod(mask=lambda xp, a: lambda b, h, i, j: (i >= j) & (i - j < 9)),
    "prefix-lm": Mod(mask=lambda xp, a: lambda b, h, i, j: (j < a["prefix"][b]) | (i >= j)),
    "documents": Mod(mask=lambda xp, a: lambda b, h, i, j: a["ids"][b, i] == a["ids"][b, j]),
    "natten": Mod(mask=_natten),
    "masked-score": Mod(lambda xp, a: lambda s, b, h, i, j: xp.where(i >= j, s, -np.inf)),
    # Everything at once, with a row that is fully masked.
    "all": Mod(
        lambda xp, a: lambda s, b, h, i, j: xp.tanh(s) * a["weights"][b] + a["table"][h, i - j + S] * s**2,
        lambda xp, a: lambda b, h, i, j: (a["ids"][b, i] == a["ids"][b, j]) & (i >= j) & (i != 7),
    ),
}
FLOATS = ("slopes", "table", "weights")


def _arrays(dtype=np.float64) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"query": (B, S, N, D), "key": (B, S, K, D), "value": (B, S, K, Dv)}
    shapes |= {"slopes": (N,), "table": (N, 2 * S), "weights": (B,)}
    found = {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    ids = np.sort(random.integers(0, 4, (B, S)), axis=-1).astype(np.int32)
    return found | {"prefix": np.array([5, 20], np.int32), "ids": ids}


def _indices(xp=np):
    sizes = (B, N, S, S)
    return [xp.arange(n).reshape([n if d == axis else 1 for d in range(4)]) for axis, n in enumerate(sizes)]


def _dense(mod: Mod, a, xp=jnp):
    """(out, log-sum-exp) with all pairs at once; -FLT_MAX for rows without a visible key is 0 here."""
    k, v = (xp.repeat(a[name], N // K, axis=2) for name in ("key", "value"))
    s = xp.einsum("bind,bjnd->bnij", a["query"], k) * D**-0.5
    if mod.score is not None:
        s = xp.broadcast_to(mod.score(xp, a)(s, *_indices(xp)), s.shape)
    visible = xp.broadcast_to(True if mod.mask is None else mod.mask(xp, a)(*_indices(xp)), s.shape)
    some = visible.any(axis=-1, keepdims=True)
    m = xp.where(some, xp.where(visible, s, -1e30).max(axis=-1, keepdims=True), 0)
    m = m if xp is np else jax.lax.stop_gradient(m)  # the derivatives are those of log l
    p = xp.where(visible, xp.exp(xp.where(visible, s, m) - m), 0)
    l = p.sum(axis=-1, keepdims=True)
    l = xp.where(some, l, 1)
    lse = xp.where(some, m + xp.log(l), 0)[..., 0]
    return xp.einsum("bnij,bjnd->bind", p / l, v), lse


def _ours(mod: Mod, a, **kwargs):
    out, lse = jax_fa.flash_attention(
        a["query"],
        a["key"],
        a["value"],
        score_mod=None if mod.score is None else mod.score(jnp, a),
        mask_mod=None if mod.mask is None else mod.mask(jnp, a),
        return_logsumexp=True,
        **kwargs,
    )
    return out, jnp.where(lse <= -oracle.FLT_MAX, 0, lse)


def _split(a):
    """What is differentiated, and the rest."""
    floats = {name: x for name, x in a.items() if x.dtype.kind == "f"}
    return floats, {name: x for name, x in a.items() if name not in floats}


def _everything(attend, others, floats, along):
    """Results, gradients, tangents, and the Hessian times a vector."""
    run = lambda x: attend(x | others)
    loss = lambda x: sum(jnp.sum(jnp.sin(y)) for y in run(x))
    gradients, second = jax.jvp(jax.grad(loss), (floats,), (along,))
    results, tangents = jax.jvp(run, (floats,), (along,))
    return {"results": results, "gradients": gradients, "tangents": tangents, "second": second}


def _same(found, want, tolerance: float = 1e-10) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(want):
        y = found
        for step in path:
            y = y[getattr(step, "key", getattr(step, "idx", None))]
        np.testing.assert_allclose(
            y, x, rtol=tolerance, atol=tolerance * max(1.0, np.abs(x).max(initial=0)), err_msg=str(path)
        )


def _along(floats):
    random = np.random.default_rng(1)
    return {name: random.standard_normal(x.shape) for name, x in floats.items()}


# In one row what all the others have, but a function that does not read the score.
@pytest.mark.parametrize(
    "name",
    [name if name in ("all", "positions") else pytest.param(name, marks=pytest.mark.slow) for name in MODS],
)
def test_derivatives(name):
    """Every derivative up to the second, by all that the functions close over, against plain JAX in float64."""
    mod = MODS[name]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        floats, others = _split(_arrays())
        floats, others = (jax.tree.map(jnp.asarray, x) for x in (floats, others))
        args = others, floats, _along(floats)
        found, want = (
            jax.jit(partial(_everything, partial(attend, mod)))(*args) for attend in (_ours, _dense)
        )
        _same(found, want)
        _same(found["results"], _dense(mod, _arrays(), np), 1e-12)


@pytest.mark.parametrize("name", MODS)
def test_forward(name):
    """In float32 and, with the tolerance of its products, bfloat16, against NumPy."""
    mod, wide = MODS[name], _arrays()
    dtypes = ["float32", "bfloat16"] if name in ("all", "relative") else ["float32"]
    for dtype in dtypes:
        given = {
            n: jnp.asarray(x, dtype if n in ("query", "key", "value") else None)
            for n, x in _arrays(np.float32).items()
        }
        rounded = wide | {
            n: np.asarray(x, np.float64) for n, x in given.items() if n not in ("ids", "prefix")
        }
        out, lse = jax.jit(partial(_ours, mod))(given)
        want, want_lse = _dense(mod, rounded, np)
        tolerance = 2e-6 if dtype == "float32" else 1e-2
        assert max(oracle.errors(out.astype(jnp.float32), want)) < tolerance
        assert max(oracle.errors(lse, want_lse)) < 2e-6
        assert out.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize(
    "functions",
    [
        dict(score_mod=lambda *_: 0.5),
        dict(score_mod=lambda *_: np.float32(0.5)),
        dict(score_mod=lambda s, b, *_: b * 0.5),
        dict(mask_mod=lambda *_: True, scale=0.0),
        dict(mask_mod=lambda *_: False),
        dict(score_mod=lambda *_: -np.inf),
    ],
    ids=["score", "numpy", "batch", "visible", "masked", "masked-score"],
)
def test_constants(functions):
    """Functions whose result is a number, or the same in every pair: the mean of all values, or 0."""
    a = _arrays(np.float32)
    given = {n: jnp.asarray(a[n]) for n in ("query", "key", "value")}
    run = lambda value: jax_fa.flash_attention(**given | {"value": value}, **functions)
    visible = functions.get("mask_mod") is None or functions["mask_mod"]()
    visible &= functions.get("score_mod", lambda *_: 0)(0.0, 0) != -np.inf
    mean = np.repeat(a["value"].mean(axis=1, keepdims=True), N // K, axis=2) * visible
    out, gradient = jax.jit(lambda x: (run(x), jax.grad(lambda x: jnp.sum(run(x)))(x)))(given["value"])
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), atol=1e-6)
    np.testing.assert_allclose(gradient, np.full_like(gradient, N // K * visible), atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("name", MODS)
def test_flex_attention_of_pytorch(name):
    """With its own create_block_mask, whose blocks are those of ours."""
    torch = pytest.importorskip("torch")
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    mod, a = MODS[name], _arrays(np.float32)
    tensors = {n: torch.tensor(x) for n, x in a.items()}
    q, k, v = (tensors[n].movedim(1, 2) for n in ("query", "key", "value"))
    blocks = None
    if mod.mask is not None:
        blocks = flex.create_block_mask(mod.mask(torch, tensors), B, N, S, S, device="cpu", BLOCK_SIZE=8)
        ours = jax_fa.create_block_mask(mod.mask(jnp, jax.tree.map(jnp.asarray, a)), B, N, S, S, 8)
        np.testing.assert_array_equal(blocks.to_dense().numpy() != 0, np.asarray(ours.states) != 0)
    score = None if mod.score is None else mod.score(torch, tensors)
    want = flex.flex_attention(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=True)
    out, _ = _ours(mod, jax.tree.map(jnp.asarray, a))
    np.testing.assert_allclose(out, want.movedim(1, 2).numpy(), rtol=2e-5, atol=2e-5)


# --- together with other arguments


@pytest.mark.parametrize("closes_over", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_order_of_terms(closes_over):
    """Bias and slopes before the function, then the soft cap, the mask, sinks and dropout: all of them are in one call."""
    a = _arrays(np.float32)
    bias, sinks = (
        np.random.default_rng(2).standard_normal((N, S, S)).astype(np.float32),
        np.ones(N, np.float32),
    )
    bias[:, 3, 2] = -np.inf
    common = dict(
        mask=Lengths(key=np.array([30, 37])) & Causal(),
        sinks=sinks,
        return_max_logits=True,
        return_logsumexp=True,
    )
    common |= dict(
        dropout_rate=0.25, dropout_key=jax.random.key(3), logits_soft_cap=3.0, implementation="xla"
    )

    def builtin(x):
        return jax_fa.flash_attention(
            x["query"],
            x["key"],
            x["value"],
            bias=2 * x["bias"],
            alibi_slopes=2 * x["slopes"],
            scale=2 * D**-0.5,
            **common,
        )

    def twice(x):
        return jax_fa.flash_attention(
            x["query"], x["key"], x["value"], bias=x["bias"], alibi_slopes=x["slopes"],
            score_mod=lambda s, b, h, i, j: 2 * s, mask_mod=lambda b, h, i, j: i >= j, **common,
        )  # fmt: skip

    def closed_over(x):
        def score(s, b, h, i, j):
            return 2 * (s + x["bias"][h, i, j] - x["slopes"][h] * jnp.abs(i - j))

        return jax_fa.flash_attention(x["query"], x["key"], x["value"], score_mod=score, **common)

    def run(attend):
        def loss(x):
            out, lse, largest = attend(x)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(lse)), (out, lse, largest)

        x = {
            n: jnp.asarray(y)
            for n, y in (a | {"bias": bias}).items()
            if n in ("query", "key", "value", "bias", "slopes")
        }
        return jax.jit(jax.grad(loss, has_aux=True))(x)

    _same(run(closed_over if closes_over else twice), run(builtin), 2e-5)


def test_dot_product_attention_takes_them():
    mod, a = MODS["all"], jax.tree.map(jnp.asarray, _arrays(np.float32))
    a["value"] = a["key"]
    out = jax_fa.dot_product_attention(
        a["query"], a["key"], a["value"], score_mod=mod.score(jnp, a), mask_mod=mod.mask(jnp, a)
    )
    np.testing.assert_array_equal(out, _ours(mod, a)[0])


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_nothing_of_masked_pairs_propagates(order):
    """NaN in masked keys and values, and derivatives of the function that are not finite there."""
    a = jax.tree.map(jnp.asarray, _arrays(np.float32))
    lengths = jnp.array([30, 17])
    nan = {n: a[n].at[1, 17:].set(jnp.nan) for n in ("key", "value")}

    def run(x):
        def score(s, b, h, i, j):
            return s - x["slopes"][h] * jnp.sqrt((i - j).astype(jnp.float32))

        mask = lambda b, h, i, j: (i > j) & (j < lengths[b])
        out, lse = jax_fa.flash_attention(
            x["query"], x["key"], x["value"], score_mod=score, mask_mod=mask, return_logsumexp=True
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(jnp.where(lse < -1e30, 0, lse)))

    floats = {n: a[n] for n in ("query", "key", "value", "slopes")}
    along = jax.tree.map(jnp.cos, floats)
    gradient = jax.grad(run)
    both = jax.jit(gradient if order == 1 else lambda x: jax.jvp(gradient, (x,), (along,)))
    found, want = both(floats | nan), both(floats)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    _same(found, want, 1e-5)
    # A pair that is visible propagates.
    found = both(floats | {"value": a["value"].at[0, 3].set(jnp.nan)})
    assert all(np.isnan(x["slopes"]).all() for x in (found if order == 2 else (found,)))


# --- transformations


@pytest.mark.parametrize(
    "axes",
    [(0, 1, 0), *(pytest.param(x, marks=pytest.mark.slow) for x in ((0, None, None), (None, 1, None)))],
)
def test_vmap(axes):
    """Over what a function closes over, over queries, or both: as if called one by one."""
    mod, a = MODS["all"], jax.tree.map(jnp.asarray, _arrays(np.float32))

    def attend(query, table, ids):
        loss = lambda q, t: jnp.sum(jnp.sin(_ours(mod, a | {"query": q, "table": t, "ids": ids})[0]))
        return jax.grad(loss, argnums=(0, 1))(query, table)

    stacked = [jnp.stack([a["query"], -a["query"]]), jnp.stack([a["table"], 2 * a["table"]], axis=1)]
    stacked.append(jnp.stack([a["ids"], jnp.zeros_like(a["ids"])]))
    given = [
        x if at is not None else jnp.take(x, 0, axis=d)
        for x, at, d in zip(stacked, axes, (0, 1, 0), strict=True)
    ]
    found, one = jax.jit(jax.vmap(attend, in_axes=axes))(*given), jax.jit(attend)
    for i in range(2):
        each = [x if at is None else jnp.take(x, i, axis=at) for x, at in zip(given, axes, strict=True)]
        _same([x[i] for x in found], list(one(*each)), 2e-5)


@pytest.mark.slow
def test_layers_in_a_scan_with_remat():
    mod, a = MODS["relative"], jax.tree.map(jnp.asarray, _arrays(np.float32))
    tables = jnp.stack([a["table"], -a["table"]])
    a["value"] = jnp.concatenate([a["value"], a["value"][..., : D - Dv]], axis=-1)

    def layer(query, table):
        return query + _ours(mod, a | {"query": query, "table": table})[0], None

    def scanned(tables):
        return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(layer), a["query"], tables)[0]))

    def unrolled(tables):
        return jnp.sum(jnp.sin(layer(layer(a["query"], tables[0])[0], tables[1])[0]))

    _same([jax.jit(jax.grad(scanned))(tables)], [jax.jit(jax.grad(unrolled))(tables)], 2e-5)


@pytest.mark.parametrize(
    "manual", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["jit", "shard_map"]
)
def test_over_devices(manual):
    """Batch and heads on a mesh: indices are those of the whole call under jit, those of the shard under shard_map."""
    mod = replace(MODS["all"], mask=MODS["prefix-lm"].mask)
    mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    a = jax.tree.map(jnp.asarray, _arrays(np.float32))
    whole, by_batch, by_head = P("b", None, "h", None), P("b"), P("h", None)
    specs = {
        "query": whole,
        "key": whole,
        "value": whole,
        "weights": by_batch,
        "table": by_head,
        "prefix": by_batch,
    }
    a = {name: a[name] for name in specs}

    def run(x):
        floats, others = _split(x)
        return jax.grad(lambda y: jnp.sum(jnp.sin(_ours(mod, y | others)[0])))(floats)

    want = jax.jit(run)(a)
    placed = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in a.items()}
    out_specs = {n: spec for n, spec in specs.items() if n != "prefix"}
    shard = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=out_specs)
    program = jax.jit(shard if manual else run).lower(placed).compile()
    _same(program(placed), want, 2e-5)
    if manual:
        assert "all-gather" not in program.as_text()


def test_programs_compare_by_what_they_compute():
    """So that calls outside of jit compile once, and a number that changes compiles again."""
    table = jnp.arange(8.0)

    def of(c: float, table=table):
        return programs.traced("score_mod", lambda s, b, h, i, j: c * s + table[h], jnp.float32).program

    assert of(2.0) == of(2.0) and hash(of(2.0)) == hash(of(2.0))
    assert of(2.0) == of(2.0, 3 * table)  # another array is another operand
    assert of(2.0) != of(2.5) and of(2.0) != of(2.0, table[:4])


# --- block masks


def _brute(mod: Mod, a) -> np.ndarray:
    return np.broadcast_to(mod.mask(np, a)(*_indices()), (B, N, S, S))


@pytest.mark.parametrize("block", [(8, 8), (5, 16), (128, 128)], ids=str)
@pytest.mark.parametrize("name", ["causal", "documents", "natten", "all"])
def test_states_of_blocks(name, block):
    mod, a = MODS[name], _arrays(np.float32)
    by_batch = "ids" if name in ("documents", "all") else None
    jit = jax.jit(
        lambda a: jax_fa.create_block_mask(mod.mask(jnp, a), B if by_batch else None, None, S, S, block)
    )
    mask = jit(jax.tree.map(jnp.asarray, a))
    visible = _brute(mod, a)[: B if by_batch else 1, :1]
    want = np.zeros((*visible.shape[:2], *mask.states.shape[-2:]), np.uint8)
    for r in range(want.shape[-2]):
        for c in range(want.shape[-1]):
            part = visible[..., r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]]
            want[..., r, c] = np.where(part.all((-1, -2)), 2, part.any((-1, -2)))
    np.testing.assert_array_equal(np.asarray(mask.states).reshape(want.shape), want)


@pytest.mark.parametrize("name", ["documents", pytest.param("natten", marks=pytest.mark.slow)])
def test_a_block_mask_is_its_function(name):
    """In every derivative, as an argument of a jitted function, and joined with another mask."""
    mod = MODS[name]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        a = jax.tree.map(jnp.asarray, _arrays())
        floats = {n: a[n] for n in ("query", "key", "value")}
        along = _along(floats)
        mask = jax_fa.create_block_mask(mod.mask(jnp, a), B, N, S, S, (8, 16)) & Causal()

        @jax.jit
        def blocks(mask, x, along):
            def attend(x):
                out, lse = jax_fa.flash_attention(**x, mask=mask, return_logsumexp=True)
                return out, jnp.where(lse <= -oracle.FLT_MAX, 0, lse)

            return _everything(attend, {}, x, along)

        found = blocks(mask, floats, along)
        both = Mod(mask=lambda xp, a: lambda b, h, i, j: mod.mask(xp, a)(b, h, i, j) & (i >= j))
        want = jax.jit(lambda x: _everything(lambda x: _dense(both, a | x), {}, x, along))(floats)
        _same(found, want)


@pytest.mark.parametrize(
    "name", ["gradients", *(pytest.param(x, marks=pytest.mark.slow) for x in ("tangents", "second"))]
)
def test_hidden_blocks_are_skipped(name):
    """A block that its state alone hides, not the function, is as if it were masked: so nobody computes it."""
    a = jax.tree.map(jnp.asarray, _arrays(np.float32))
    x = {n: a[n][:, :32] for n in ("query", "key", "value")}
    everything = jax_fa.create_block_mask(lambda b, h, i, j: i >= 0, None, None, 32, 32, 16)
    assert everything.sparsity == 0 and np.all(np.asarray(everything.states) == 2)
    hidden = replace(everything, states=everything.states.at[..., 0, 1].set(0))
    i, j = np.indices((32, 32))

    @jax.jit
    def run(mask):
        def attend(x):
            return jax_fa.flash_attention(**x, mask=mask, return_logsumexp=True, implementation="xla")

        found = _everything(attend, {}, x, jax.tree.map(jnp.cos, x))
        return {"results": found["results"], name: found[name]}

    _same(run(hidden), run(jnp.asarray((i >= 16) | (j < 16))), 1e-4)


# --- memory


@pytest.mark.usefixtures("real_tiles")
@pytest.mark.parametrize("order", [1, *(pytest.param(x, marks=pytest.mark.slow) for x in (0, 2))])
def test_memory_is_linear_in_the_length(order):
    """With a table, a mask by documents and blocks; no array of S x S exists in any derivative."""

    def temporary(s: int) -> int:
        x = {"query": (1, s, 4, 32), "key": (1, s, 2, 32), "value": (1, s, 2, 32), "table": (4, 2 * s)}
        x = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in x.items()}
        ids = jax.ShapeDtypeStruct((1, s), jnp.int32)

        def loss(x, ids):
            mask = jax_fa.create_block_mask(
                lambda b, h, i, j: (ids[b, i] == ids[b, j]) & (i >= j), 1, None, s, s
            )
            score = lambda v, b, h, i, j: v + x["table"][h, i - j + s]
            out = jax_fa.flash_attention(x["query"], x["key"], x["value"], mask=mask, score_mod=score)
            return jnp.sum(out**2)

        fn = loss
        if order:
            fn = jax.grad(loss)
        if order == 2:
            fn = lambda x, ids: jax.jvp(lambda x: jax.grad(loss)(x, ids), (x,), (x,))
        return temporary_bytes(jax.jit(fn).lower(x, ids))

    short, long = temporary(2048), temporary(4096)
    assert long <= 2.2 * short + 2**20
    assert long < 4 * 4096 * 4096


# --- what is refused

_Q = np.zeros((1, 4, 2, 8), np.float32)
_COMPLEX = jnp.ones(4, jnp.complex64)
_NO = NotImplementedError
_REFUSED = {
    "no-function": (dict(score_mod=3), TypeError, r"score_mod must be a function \(score, batch, head, row, column\)"),
    "arguments": (dict(score_mod=lambda s, h: s), TypeError, r"score_mod must be a function of 5 arguments"),
    "mask-arguments": (dict(mask_mod=lambda s, b, h, i, j: i >= j), TypeError, "mask_mod must be a function of 4 arguments"),
    "shape": (dict(score_mod=lambda s, *_: s[None]), TypeError, r"score_mod must return one scalar .* returns float32\[1\]"),
    "several": (dict(score_mod=lambda s, *_: (s, s)), TypeError, "score_mod must return one scalar"),
    "nothing": (dict(score_mod=lambda s, *_: None), TypeError, "score_mod must return one scalar.*nothing"),
    "bool": (dict(score_mod=lambda s, *_: s > 0), TypeError, "score_mod must return .*To mask pairs pass mask_mod"),
    "string": (dict(mask_mod=lambda *_: "causal"), TypeError, "mask_mod must return one scalar; it returns 'causal'"),
    "float": (dict(mask_mod=lambda b, h, i, j: i * 1.0), TypeError, "mask_mod must return one scalar of boolean dtype"),
    "branch": (dict(mask_mod=lambda b, h, i, j: bool(i >= j)), TypeError, "mask_mod must be a function that JAX can trace"),
    "numpy": (dict(score_mod=lambda s, b, h, i, j: s + np.ones(4)[i]), TypeError, "index no NumPy array"),
    "print": (dict(score_mod=lambda s, *_: (jax.debug.print("{}", s), s)[1]), ValueError, "pure function.*side effects"),
    "random": (dict(score_mod=lambda s, *_: s * np.random.default_rng().random()), ValueError, "another program each time"),
    "complex": (dict(score_mod=lambda s, b, h, i, j: s + _COMPLEX[i].real), TypeError, "score_mod must close over arrays of"),
    "cpu": (dict(score_mod=lambda s, *_: s, implementation="cpu"), _NO, "cpu: does not support score_mod: xla does"),
    "mosaic": (dict(mask_mod=lambda b, h, i, j: i >= j, implementation="mosaic"), _NO, "implementation='mosaic' cannot serve"),
    "cudnn": (dict(score_mod=lambda s, *_: s, implementation="cudnn"), _NO, "which has no score_mod"),
}  # fmt: skip


@pytest.mark.parametrize("name", _REFUSED)
def test_refused(name, no_type_checker):
    arguments, error, text = _REFUSED[name]
    entry = jax_fa.dot_product_attention if name == "cudnn" else jax_fa.flash_attention
    with pytest.raises(error, match=text):
        entry(_Q, _Q, _Q, **arguments)


_BLOCKS = {
    "rows": ((lambda b, h, i, j: i >= j, None, None, 0, 4), ValueError, "rows must be at least 1; got 0"),
    "kind": ((lambda b, h, i, j: i >= j, None, 2.5, 4, 4), TypeError, "heads must be an int; got 2.5"),
    "block": ((lambda b, h, i, j: i >= j, None, None, 4, 4, (1, 2, 3)), ValueError, "block_size must be one number or two"),
    "batch": ((lambda b, h, i, j: i >= b, None, None, 4, 4), ValueError, "batch must say how many there are"),
    "heads": ((lambda b, h, i, j: i >= h, None, None, 4, 4), ValueError, "heads must say how many there are"),
    "result": ((lambda b, h, i, j: i, None, None, 4, 4), TypeError, "mask_mod must return one scalar of boolean dtype"),
}  # fmt: skip


@pytest.mark.parametrize("name", _BLOCKS)
def test_block_masks_that_are_refused(name, no_type_checker):
    arguments, error, text = _BLOCKS[name]
    with pytest.raises(error, match=text):
        jax_fa.create_block_mask(*arguments)


_CAUSAL = lambda b, h, i, j: i >= j
_ELSEWHERE = {
    "union": lambda x: x | Lengths(key=1),
    "right": lambda x: Causal() | x,
    "complement": lambda x: ~x,
    "inside": lambda x: Causal() & ~(x & Causal()),
}


@pytest.mark.parametrize("name", _ELSEWHERE)
def test_block_masks_join_by_and_alone(name):
    mask = _ELSEWHERE[name](jax_fa.create_block_mask(_CAUSAL, None, None, 4, 4, 2))
    for run in (
        lambda: jax_fa.flash_attention(_Q, _Q, _Q, mask=mask),
        lambda: jax_fa.sequence_parallel.visited_tiles(mask, 4, 4, devices=2),
    ):
        with pytest.raises(NotImplementedError, match=r"~ and \| cannot take a BlockMask.*in the function"):
            run()


def test_copies_of_a_block_mask():
    mask = jax_fa.create_block_mask(_CAUSAL, None, None, 4, 4, 2)
    for again in (copy.copy(mask), copy.deepcopy(mask & Causal()).masks[0]):
        assert again == mask
    with pytest.raises(TypeError, match=r"cannot be pickled.*create_block_mask"):
        pickle.dumps(mask)


def test_a_block_mask_fits_its_call():
    causal = _CAUSAL
    for arguments, text in (
        ((None, None, 5, 4), "must be made for the lengths of the call, Sq=4 and Skv=4"),
        ((3, None, 4, 4), r"must be made for the batch and heads of the call, \(\*B, N\)=\(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=text):
            jax_fa.flash_attention(_Q, _Q, _Q, mask=jax_fa.create_block_mask(causal, *arguments, 2))
    a, b = (jax_fa.create_block_mask(causal, None, None, 4, 4, size) for size in (2, 4))
    with pytest.raises(ValueError, match="must have the same block_size"):
        jax_fa.flash_attention(_Q, _Q, _Q, mask=a & b)


def test_sequence_parallelism_takes_no_functions(no_type_checker):
    mask = jax_fa.create_block_mask(lambda b, h, i, j: i >= j, None, None, 8, 8, 4)
    with pytest.raises(ValueError, match="mask must be a structured one; a BlockMask"):
        jax_fa.sequence_parallel.visited_tiles(mask, 8, 8, devices=2)
    mesh = jax.make_mesh((2,), ("s",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = P(None, "s")
    attend = partial(jax_fa.sequence_parallel_attention, axis_name="s", mask=mask)
    with pytest.raises(NotImplementedError, match="does not support a BlockMask"):
        jax.eval_shape(
            jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec),
            *(np.tile(_Q, (1, 2, 1, 1)),) * 3,
        )


def test_explain_says_why():
    found = jax_fa.explain(_Q, _Q, _Q, score_mod=lambda s, b, h, i, j: 2 * s, platforms=("cpu", "cuda"))
    assert found.chosen == {"cpu": "xla", "cuda": "xla"}
    assert found.reasons["cpu"]["cpu"] == "does not support score_mod: xla does"
    with jax_fa.strict(), pytest.raises(NotImplementedError, match="does not support score_mod"):
        jax_fa.flash_attention(_Q, _Q, _Q, score_mod=lambda s, b, h, i, j: 2 * s)


@pytest.mark.slow
def test_a_packed_mask_joins_a_function():
    """Functions count rows and columns of the arrays, whatever the other masks say."""
    a = _arrays(np.float32)
    mask = CumulativeLengths(np.array([10, 30, S]), within=Causal())
    x = [jnp.asarray(a[n]) for n in ("query", "key", "value")]
    out = jax_fa.flash_attention(*x, mask=mask, mask_mod=lambda b, h, i, j: (j % 3 != 0) | (i == j))
    i, j = np.indices((S, S))
    sequence = np.searchsorted([10, 30, S], np.arange(S), side="right")
    visible = (sequence[:, None] == sequence) & (i >= j) & ((j % 3 != 0) | (i == j))
    np.testing.assert_allclose(out, oracle.attention(*x, visible=visible).out, rtol=1e-5, atol=1e-5)
