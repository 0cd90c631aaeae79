"""Block-sparse masks on the CPU kernels, which read the pairs of blocks and never the function.

Oracle: plain JAX in float64 with all pairs at once, and the visible pairs from NumPy.
"""

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
from jax_fa.backends import native
from jax_fa.flex import pairs
from jax_fa.masks import Causal, Lengths
from jax_fa.testing import oracle

if native.missing is not None:
    pytest.skip(f"needs the native extension: {native.missing}", allow_module_level=True)
if jax.default_backend() != "cpu":
    pytest.skip("needs CPU devices by default", allow_module_level=True)

B, N, K, D, Dv = 2, 4, 2, 8, 6
_RANDOM = np.random.default_rng(5)
IDS = np.sort(_RANDOM.integers(0, 5, (B, 200)), axis=-1).astype(np.int32)
SHOWN = _RANDOM.random((N, 8, 8)) < 0.3  # by head: which blocks of 16 rows and 32 columns


@dataclass(frozen=True, kw_only=True)
class Row:
    """A mask, what is given beside it, and how tests call it."""

    mask: Callable[[Any], Callable]  # of the namespace of arrays
    sizes: tuple[int, int] = (75, 140)
    batch: int | None = None
    heads: int | None = None
    block: tuple[int, int] | int = 32
    beside: Any = None  # another mask
    kwargs: Any = None
    dtype: str = "float32"
    nan: bool = False  # in what no row sees

    def blocks(self) -> jax_fa.BlockMask:
        return jax_fa.create_block_mask(self.mask(jnp), self.batch, self.heads, *self.sizes, self.block)

    def visible(self) -> np.ndarray:
        sizes = (B, N, *self.sizes)
        at = [np.arange(n).reshape([n if d == axis else 1 for d in range(4)]) for axis, n in enumerate(sizes)]
        found = np.broadcast_to(self.mask(np)(*at), sizes)
        if self.beside is not None:
            found = found & np.asarray(self.beside[1](*self.sizes))
        return found


ROWS = {
    "causal": Row(mask=lambda xp: lambda b, h, i, j: i + 65 >= j, block=(16, 40)),
    # In one row what most of the others have: rows that see nothing, unlike masks of entries and heads.
    "everything": Row(
        mask=lambda xp: (
            lambda b, h, i, j: (xp.asarray(IDS)[b, i] == xp.asarray(IDS)[b, j]) & (i != 7) & ((j - i) % 3 < h + 1)
        ),
        batch=B,
        heads=N,
        block=(24, 32),
        beside=(Lengths(key=np.array([140, 101])), lambda *s: oracle.lengths(*s, key=[140, 101])),
        kwargs={"logits_soft_cap": 2.0},
        nan=True,
    ),
    "sparse": Row(
        mask=lambda xp: lambda b, h, i, j: xp.asarray(SHOWN)[h, i // 16, j // 32] & (j != 3), heads=N, nan=True
    ),
    "window": Row(mask=lambda xp: lambda b, h, i, j: (j < 5) | (xp.abs(i + 60 - j) < 9), dtype="bfloat16"),
    "sinks": Row(
        mask=lambda xp: lambda b, h, i, j: (i // 20 + j // 30 + h) % 3 == 0,
        heads=N,
        kwargs={"sinks": np.linspace(-1, 1, N).astype(np.float32)},
    ),
    "few-rows": Row(mask=lambda xp: lambda b, h, i, j: (j // 40) % 4 == i, sizes=(3, 700), block=(2, 40), nan=True),
    "small": Row(mask=lambda xp: lambda b, h, i, j: (i // 5 == j // 6) & (j != 3), sizes=(11, 13), block=(4, 8), nan=True),
    "dense": Row(
        mask=lambda xp: lambda b, h, i, j: (i // 20 + j // 20) % 2 == 0,
        beside=(np.arange(140) % 7 != 2, lambda *s: (np.arange(140) % 7 != 2)[None]),
        dtype="float16",
    ),
}  # fmt: skip
DEFAULT = ("everything", "sparse", "few-rows")


def _arrays(row: Row) -> dict[str, np.ndarray]:
    random, (sq, skv) = np.random.default_rng(0), row.sizes
    shapes = {
        "query": (B, sq, N, D),
        "key": (B, skv, K, D),
        "value": (B, skv, K, Dv),
        "bias": (1, N, sq, skv),
    }
    found = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {
        name: np.asarray(jnp.asarray(x, row.dtype if name != "bias" else None)) for name, x in found.items()
    }


def _ours(row: Row, mask, x, implementation="cpu"):
    if row.beside is not None:
        mask = mask & row.beside[0]
    out, lse = jax_fa.flash_attention(
        **x, mask=mask, return_logsumexp=True, implementation=implementation, **(row.kwargs or {})
    )
    return out, jnp.where(lse <= -oracle.FLT_MAX, 0, lse)


def _dense(row: Row, visible, x):
    given = row.kwargs or {}
    k, v = (jnp.repeat(x[name], N // K, axis=2) for name in ("key", "value"))
    s = jnp.einsum("bind,bjnd->bnij", x["query"], k) * D**-0.5 + x["bias"]
    if cap := given.get("logits_soft_cap"):
        s = cap * jnp.tanh(s / cap)
    some = visible.any(axis=-1)
    sinks = given.get("sinks")
    rest = 0 if sinks is None else jnp.exp(jnp.asarray(sinks, s.dtype))[:, None]
    p = jnp.where(visible, jnp.exp(jnp.where(visible, s, 0)), 0)
    l = p.sum(axis=-1) + rest
    l = jnp.where(some | (sinks is not None), l, 1)
    return jnp.einsum("bnij,bjnd->bind", p / l[..., None], v), jnp.log(l)


def _everything(attend, x, along):
    """Results, gradients, tangents, and the Hessian times a vector."""
    wide = lambda y: y if y.dtype.itemsize > 2 else y.astype(jnp.float32)
    loss = lambda x: sum(jnp.sum(jnp.sin(wide(y))) for y in attend(x))
    gradients, second = jax.jvp(jax.grad(loss), (x,), (along,))
    results, tangents = jax.jvp(attend, (x,), (along,))
    return {"results": results, "gradients": gradients, "tangents": tangents, "second": second}


def _close(found, want, tolerance: float) -> None:
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(found), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(jnp.asarray(y, jnp.float32))
        np.testing.assert_allclose(y, x, rtol=tolerance, atol=tolerance * np.abs(x).max(), err_msg=str(path))


@pytest.mark.parametrize(
    "name", [x if x in DEFAULT else pytest.param(x, marks=pytest.mark.slow) for x in ROWS]
)
def test_every_derivative(name):
    """Of the kernels, as an argument of a jitted function, where no function is traced."""
    row = ROWS[name]
    x, visible = _arrays(row), row.visible()
    along = jax.tree.map(lambda y: np.cos(y.astype(np.float32)).astype(y.dtype), x)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = [jax.tree.map(partial(jnp.asarray, dtype=jnp.float64), y) for y in (x, along)]
        want = jax.jit(partial(_everything, partial(_dense, row, visible)))(*wide)
    if row.nan:
        seen = visible.any(axis=(1, 2))
        assert not seen.all()
        x |= {n: np.where(seen[..., None, None], x[n], np.nan) for n in ("key", "value")}
    run = jax.jit(lambda mask, *args: _everything(partial(_ours, row, mask), *args))
    found = run(row.blocks(), x, along)
    _close(found, want, {"float32": 2e-5, "bfloat16": 3e-2, "float16": 5e-3}[row.dtype])


# --- how masks are made


def test_equal_blocks_are_kept_once():
    mask = jax_fa.create_block_mask(lambda b, h, i, j: i >= j, None, None, 40, 40, 8)
    assert mask.table.shape == mask.states.shape == (1, 5, 5) and mask.pairs.shape == (1, 1, 8, 8)
    np.testing.assert_array_equal(mask.pairs[0, 0], np.tri(8, dtype=bool))
    np.testing.assert_array_equal(mask.table[0], np.tri(5, k=-1) + 2 * np.eye(5))
    mask = ROWS["everything"].blocks()
    assert mask.pairs.shape[:2] == (B, N) and mask.pairs.shape[2].bit_count() == 1


def _chosen(mask, shape=(B, 64, N, D), **kwargs):
    q = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = jax_fa.explain(q, q, q, mask=mask, platforms="cpu", **kwargs)
    return found.chosen["cpu"], found.reasons["cpu"]["cpu"]


def _masked(ids, **kwargs):
    return jax_fa.create_block_mask(lambda b, h, i, j: ids[i] == ids[j], None, None, 64, 64, 16)


def test_what_the_kernels_take(monkeypatch):
    ids = jnp.asarray(IDS[0, :64])
    mask = _masked(ids)
    assert _chosen(mask) == ("cpu", None) and _chosen(mask & Causal()) == ("cpu", None)
    _, why = _chosen(mask & _masked(ids))
    assert why.startswith("takes one BlockMask and no other function of a pair")
    assert (
        _chosen(mask, score_mod=lambda s, b, h, i, j: 2 * s)[1]
        == "does not support score_mod and mask_mod: xla does"
    )
    assert _chosen(mask, mask_mod=lambda b, h, i, j: i != 3)[1] == why
    # Known arrays make a known mask, wherever that is.
    seen = []
    jax.jit(lambda q: seen.append(_chosen(_masked(ids))) or q)(1.0)
    jax.jit(lambda ids: seen.append(_chosen(_masked(ids))) or ids)(ids)
    assert seen[0] == ("cpu", None)
    assert seen[1][0] == "xla" and seen[1][1].startswith("takes a BlockMask of known values")
    q = np.zeros((B, 64, N, D), np.float32)
    run = lambda ids: jax_fa.flash_attention(q, q, q, mask=_masked(ids), implementation="cpu")
    with pytest.raises(NotImplementedError, match="cpu: takes a BlockMask of known values"):
        jax.jit(run)(ids)
    monkeypatch.setattr(pairs, "MOST_BYTES", 3 * 16 * 16)
    assert _chosen(_masked(ids))[0] == "xla"
    # Leaves that do not belong together are not read.
    assert _chosen(replace(mask, pairs=mask.pairs[..., :8, :]))[0] == "xla"


# --- transformations


def test_vmap_and_what_is_done_to_leaves():
    """Over queries, over masks, and masks whose batch is turned round."""
    row = Row(mask=lambda xp: lambda b, h, i, j: xp.asarray(IDS)[b, i] == xp.asarray(IDS)[b, j], batch=B)
    x, mask = jax.tree.map(jnp.asarray, _arrays(row)), row.blocks()
    attend = lambda mask, query: _ours(row, mask, x | {"query": query})[0]
    run = jax.jit(attend)
    queries = jnp.stack([x["query"], -x["query"]])
    found = jax.jit(jax.vmap(attend, in_axes=(None, 0)))(mask, queries)
    for i in range(2):
        _close(found[i], run(mask, queries[i]), 1e-6)
    turned = jax.tree.map(lambda leaf: leaf[::-1], mask)
    masks = jax.tree.map(lambda *leaves: jnp.stack(leaves), mask, turned)
    found = jax.jit(jax.vmap(attend, in_axes=(0, None)))(masks, queries[0])
    _close(found[0], run(mask, queries[0]), 1e-6)
    want = _dense(row, row.visible()[::-1], x)[0]
    _close(found[1], want, 1e-5)
    _close(run(turned, queries[0]), want, 1e-5)


@pytest.mark.parametrize("how", ["shard_map", pytest.param("jit", marks=pytest.mark.slow)])
def test_over_devices(how):
    """Batch and heads on a mesh. In shard_map a mask is cut as batch entries are, and so is what it closes over."""
    ids = jnp.asarray(IDS)
    row = Row(
        mask=lambda xp: (
            lambda b, h, i, j: (ids[b, i] == ids[b, j]) & ((j + i) % 3 != (h if how == "jit" else 0))
        ),
        batch=B,
        heads=N if how == "jit" else None,
    )
    mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, mask = jax.tree.map(jnp.asarray, _arrays(row)), row.blocks()

    def run(mask, x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(_ours(row, mask, x)[0])))(x)

    del x["bias"]
    want = jax.jit(partial(run, mask))(x)
    specs = dict.fromkeys(x, P("b", None, "h", None))
    placed = {n: jax.device_put(y, NamedSharding(mesh, specs[n])) for n, y in x.items()}
    if how == "shard_map":
        run = jax.shard_map(run, mesh=mesh, in_specs=(P("b"), specs), out_specs=specs)
    program = jax.jit(run).lower(mask, placed).compile()
    _close(program(mask, placed), want, 1e-5)
    assert "all-gather" not in program.as_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_made_inside(kind):
    """Of known arrays a mask is known wherever it is made: under jit, in shard_map, with explicit mesh axes."""
    ids = jnp.asarray(IDS[0, :64])
    q = jnp.asarray(np.random.default_rng(0).standard_normal((B, 64, N, D)), jnp.float32)
    want = jax_fa.flash_attention(q, q, q, mask=_masked(ids))

    def attend(q):
        mask = _masked(ids)
        assert not isinstance(mask.pairs, jax.core.Tracer)
        return jax_fa.flash_attention(q, q, q, mask=mask, implementation="cpu")

    mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)
    spec = P("b", None, "h", None)
    with jax.set_mesh(mesh):
        placed = jax.device_put(q, NamedSharding(mesh, spec))
        for run in (attend, jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)):
            _close(jax.jit(run)(placed), want, 1e-6)
        mask = _masked(ids)
        given = jax.jit(lambda mask, q: jax_fa.flash_attention(q, q, q, mask=mask, implementation="cpu"))
        _close(given(mask, placed), want, 1e-6)
