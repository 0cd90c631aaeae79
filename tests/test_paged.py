"""`paged_attention` against a float64 oracle that reads the pages one token at a time.

Every pool is hostile: what no sequence may read is NaN, or the largest integer, and the table's entries beyond the length are
page numbers that do not exist, or those of a page of NaN.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.jet import jet
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa
from jax_fa.testing import oracle

_FP8 = ("float8_e4m3fn", "float8_e5m2")
_SCALED = ("int8", *_FP8)


@dataclass(frozen=True, kw_only=True)
class Case:
    size: int = 16  # of a page
    dtype: str = "float32"
    pages: str = ""  # dtype of pages; "": dtype
    lengths: tuple[int, ...] = (37, 1, 0, 64)
    capacity: int = 64
    Sq: int = 1
    N: int = 4
    K: int = 2
    D: int = 32
    Dv: int = 32
    mla: bool = False
    scales: tuple[int, ...] | None = None  # which dims of (P, S, K) scales have
    window: int | None = None
    cap: float | None = None
    sinks: bool = False
    scale: float | None = None
    one_row: bool = False  # query without the dim Sq
    seed: int = 0

    def __str__(self) -> str:
        given = {name: x for name, x in vars(self).items() if name in Case.__annotations__}
        return "-".join(f"{k}{v}" for k, v in given.items() if v != getattr(Case, k)).replace(" ", "")

    @cached_property
    def arrays(self) -> dict[str, Any]:
        """Of the call. Pages lie in the pool in any order, some between them that belong to nobody."""
        random, B, S = np.random.default_rng(self.seed), len(self.lengths), self.size
        per_sequence = -(-self.capacity // S)
        used = [-(-n // S) for n in self.lengths]
        total = sum(used) + 3
        order = random.permutation(total)
        nobody = order[sum(used) :]
        table = np.empty((B, per_sequence), np.int32)
        first = 0
        for b, count in enumerate(used):
            table[b] = random.choice([-1, 10**9, -(2**31), *nobody], per_sequence)
            table[b, :count] = order[first : first + count]
            first += count
        dtype = jnp.dtype(self.pages or self.dtype)
        integer = dtype == jnp.int8
        worst = 127 if integer else np.nan

        def pool(width):
            x = random.standard_normal((total, S, self.K, width))
            x = np.round(30 * x).clip(-127, 127) if integer else x
            for b, n in enumerate(self.lengths):
                if n % S:
                    x[table[b, n // S], n % S :] = worst
            x[nobody] = worst
            return x.astype(dtype)

        Sq = () if self.one_row else (self.Sq,)
        found = {
            "query": random.standard_normal((B, *Sq, self.N, self.D)).astype(self.dtype),
            "key_pages": pool(self.D),
            "value_pages": None if self.mla else pool(self.Dv),
            "page_table": table,
            "lengths": np.array(self.lengths, np.int32),
        }
        if self.scales is not None:
            shape = [n if i in self.scales else 1 for i, n in enumerate((total, S, self.K))]
            for name in ("key_scale",) if self.mla else ("key_scale", "value_scale"):
                x = random.uniform(0.5, 1.5, shape) / (30 if integer else 1)
                if 0 in self.scales:
                    x[nobody] = np.nan
                found[name] = x.astype(np.float32)
        if self.sinks:
            found["sinks"] = random.standard_normal(self.N).astype(np.float32) + 1
        return found

    @property
    def options(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "local_window_size": self.window,
            "logits_soft_cap": self.cap,
            "value_dim": self.Dv if self.mla else None,
        }

    def __call__(self, arrays=None, **options):
        given = dict(self.arrays if arrays is None else arrays)
        first = [given.pop(x) for x in ("query", "key_pages", "value_pages", "page_table", "lengths")]
        return jax_fa.paged_attention(*first, return_logsumexp=True, **given, **self.options | options)

    def expected(self, dtype=np.float64, rounded=None) -> tuple[np.ndarray, np.ndarray]:
        """Token by token. `rounded`: what weights are rounded to before they meet the values."""
        x = self.arrays
        query = x["query"][:, None] if self.one_row else x["query"]
        B, Sq, N, D = query.shape
        scales = [x.get(f"{name}_scale") for name in ("key", "value")]
        full = x["key_pages"].shape[:3]
        scales = [np.broadcast_to(dtype(1) if s is None else s, full).astype(dtype) for s in scales]
        Dv = self.Dv
        values = x["key_pages"][..., :Dv] if self.mla else x["value_pages"]
        value_scale = scales[0] if self.mla else scales[1]
        out, lse = np.zeros((B, Sq, N, Dv), dtype), np.zeros((B, N, Sq), dtype)
        last = full[0] - 1
        for b, i, n in product(range(B), range(Sq), range(N)):
            p, k = self.lengths[b] - Sq + i, n * self.K // N
            first = 0 if self.window is None else max(p - self.window, 0)
            at = [
                (min(max(x["page_table"][b, j // self.size], 0), last), j % self.size, k)
                for j in range(first, p + 1)
            ]
            if not at:
                lse[b, n, i] = x["sinks"][n] if self.sinks else -np.finfo(np.float32).max
                continue
            at = tuple(np.array(at).T)
            s = x["key_pages"][at].astype(dtype) @ query[b, i, n].astype(dtype) * scales[0][at]
            s = s * dtype(D**-0.5 if self.scale is None else self.scale)
            s = s if self.cap is None else self.cap * np.tanh(s / dtype(self.cap))
            logits = np.append(s, dtype(x["sinks"][n])) if self.sinks else s
            m = logits.max()
            total = np.exp(logits - m).sum()
            weights = np.exp(s - m) * value_scale[at]
            weights = weights if rounded is None else weights.astype(rounded).astype(dtype)
            out[b, i, n] = weights @ values[at].astype(dtype) / total
            lse[b, n, i] = m + np.log(total)
        return (out[:, 0], lse[..., 0]) if self.one_row else (out, lse)

    def check(self, out, lse) -> None:
        want, want_lse = self.expected()
        acc = np.float64 if self.dtype == "float64" else np.float32
        naive, naive_lse = self.expected(acc, None if self.dtype == "float64" else self.dtype)
        assert out.dtype == jnp.dtype(self.dtype) and lse.dtype == acc
        floor = oracle.FLOOR[self.dtype]
        oracle.assert_close_to_oracle(out, want, naive.astype(self.dtype), f"{self}: out", floor)
        seen = want_lse > -1e30
        stats = oracle.FLOOR[str(np.dtype(acc))]
        oracle.assert_close_to_oracle(
            np.where(seen, lse, 0),
            np.where(seen, want_lse, 0),
            np.where(seen, naive_lse, 0),
            f"{self}: lse",
            stats,
        )
        assert np.array_equal(np.asarray(lse)[~seen], want_lse[~seen])


# Every value of a feature, most pairs of two, in few programs.
CASES = (
    Case(),
    Case(size=1, window=9, N=6, K=3, D=20, Dv=12, seed=1),
    Case(size=3, dtype="bfloat16", Sq=3, cap=2.0, seed=2),
    Case(size=7, dtype="float16", pages="float8_e5m2", scales=(0, 1, 2), sinks=True, K=1, seed=3),
    Case(size=16, dtype="bfloat16", pages="int8", scales=(0, 1, 2), window=20, Sq=2, N=2, K=2, seed=4),
    Case(size=16, dtype="bfloat16", one_row=True, sinks=True, cap=3.0, N=8, seed=5),
    Case(size=128, pages="int8", scales=(2,), lengths=(300, 128, 129), capacity=384, seed=6),
    Case(size=256, dtype="bfloat16", lengths=(700, 3), capacity=1024, Sq=5, K=4, window=100, seed=7),
    Case(
        size=16,
        pages="bfloat16",
        scales=(),
        D=72,
        Dv=40,
        Sq=9,
        K=1,
        lengths=(150, 9, 4),
        capacity=160,
        seed=8,
    ),
    Case(
        size=64, mla=True, dtype="bfloat16", N=16, K=1, D=48, Dv=32, lengths=(200, 65), capacity=256, seed=9
    ),
    Case(size=16, mla=True, pages="float8_e4m3fn", scales=(0, 1), N=40, K=1, D=48, Dv=32, scale=0.3, seed=10),
    Case(size=1, lengths=(1, 0, 1), capacity=1, N=3, K=3, D=20, Dv=12, seed=12),  # room for one key
    Case(size=1, dtype="bfloat16", pages="int8", scales=(0, 1, 2), lengths=(1, 1), capacity=1, K=4, seed=13),
    Case(size=5, dtype="bfloat16", Sq=33, N=2, K=1, lengths=(90, 33, 20), capacity=100, sinks=True, seed=11),
)


def _id(case: Case) -> str:
    return str(case) or "plain"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", CASES, ids=_id)
def test_forward(case, backend):
    case.check(*jax.jit(partial(case, implementation=backend))(case.arrays))


def _sampled() -> list[Case]:
    """Of the whole product, so many that every pair of values is there several times."""
    random = np.random.default_rng(0)

    def pick(*values):
        return values[random.integers(len(values))]

    found = []
    for seed in range(150):
        size, K, Sq = pick(1, 2, 5, 8, 16, 32, 64, 128, 256), pick(1, 2, 3), pick(1, 1, 2, 4, 17, 40)
        capacity = -(-pick(20, 100, 300, 600) // size) * size
        pages = pick("", "", "float32", "bfloat16", "float16", *_SCALED)
        D, mla = pick(8, 16, 20, 64, 80, 128), pick(True, False, False)
        found.append(
            Case(
                size=size,
                dtype=pick("float32", "bfloat16", "float16"),
                pages=pages,
                lengths=tuple(int(n) for n in random.integers(0, capacity + 1, pick(1, 2, 5))),
                capacity=capacity,
                Sq=Sq,
                N=K * pick(1, 2, 4, 8),
                K=K,
                D=D,
                Dv=pick(D // 2, D) if mla else pick(8, 12, 64, D),
                mla=mla,
                scales=pick(None, (), (0,), (2,), (0, 1), (0, 1, 2)) if pages else None,
                window=pick(None, None, 0, 7, 100),
                cap=pick(None, 2.0),
                sinks=pick(True, False),
                seed=seed,
            )
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", _sampled(), ids=_id)
def test_sampled(case, backend):
    case.check(*jax.jit(partial(case, implementation=backend))(case.arrays))


def test_float64():
    with jax.enable_x64(True):
        case = Case(dtype="float64", Sq=2, cap=2.0)
        case.check(*case())


# --- what is traced


def test_one_program_for_all_lengths_and_windows(backend):
    """Lengths, table, window, scale and cap are data."""
    case = Case(window=9, cap=3.0, scale=0.2)
    given = case.arrays | {
        "local_window_size": jnp.int32(9),
        "logits_soft_cap": jnp.float32(3),
        "scale": jnp.float32(0.2),
    }

    @jax.jit
    def run(x):
        x = dict(x)
        options = {name: x.pop(name) for name in ("local_window_size", "logits_soft_cap", "scale")}
        return case(x, **options, implementation=backend)

    case.check(*run(given))
    other = Case(window=3, cap=3.0, scale=0.2)
    other.check(*run(given | {"local_window_size": jnp.int32(3)}))
    assert run._cache_size() == 1
    # Lengths that are out of range are clipped, and so are page numbers within the length.
    x = case.arrays | {"lengths": np.array([-5, 10**6, 64, 0], np.int32)}
    x["page_table"] = np.clip(x["page_table"], 0, 1) + np.array([[0], [10**6], [-(10**6)], [0]], np.int32)
    pool = np.nan_to_num(x["key_pages"]), np.nan_to_num(x["value_pages"])
    x |= {"key_pages": pool[0], "value_pages": pool[1]}
    out, lse = run(given | x)
    last = len(pool[0]) - 1
    same = run(
        given
        | x
        | {"page_table": np.clip(x["page_table"], 0, last), "lengths": np.array([0, 64, 64, 0], np.int32)}
    )
    assert np.array_equal(out, same[0]) and np.array_equal(lse, same[1]) and np.isfinite(out).all()
    assert not out[0].any() and not out[3].any()


def test_visible_nan_stays_in_its_rows(backend):
    """A value that is not finite reaches the rows to which its key is visible, and no other."""
    case = Case(Sq=3, lengths=(40, 40), dtype="float32")
    x = dict(case.arrays)
    pool = x["value_pages"].copy()
    pool[x["page_table"][0, 39 // 16], 39 % 16, 0, 3] = np.inf
    out, _ = case(x | {"value_pages": pool}, implementation=backend)
    clean, _ = case(implementation=backend)
    touched = np.zeros(out.shape, bool)
    touched[0, 2, :2] = True
    assert np.array_equal(np.where(touched, 0, out), np.where(touched, 0, clean))
    assert not np.isfinite(np.asarray(out)[0, 2, :2, 3]).any()


# --- transformations


def test_vmap():
    """Over sequences, over pools, over windows: the same as a loop. (The rule knows no backend.)"""
    case = Case(Sq=2, pages="int8", scales=(0, 1, 2))
    x = case.arrays
    run = case
    windows = jnp.array([3, 30], jnp.int32)
    several = {
        "lengths": np.stack([x["lengths"], x["lengths"][::-1]]),
        "page_table": np.clip(np.stack([x["page_table"], x["page_table"][::-1]]), 0, len(x["key_pages"]) - 1),
    }
    pools = {name: np.stack([x[name], x[name][::-1]]) for name in ("key_pages", "value_pages")}
    mapped = {
        "sequences": {"page_table": several["page_table"], "lengths": several["lengths"]},
        "pools": pools,
        "both": several | pools,
    }
    for name, given in mapped.items():
        axes = ({key: 0 if key in given else None for key in x}, 0)
        found = jax.vmap(lambda x, w: run(x, local_window_size=w), axes)(x | given, windows)
        for i in range(2):
            one = run(x | {key: value[i] for key, value in given.items()}, local_window_size=windows[i])
            for got, want in zip(found, one, strict=True):
                np.testing.assert_allclose(got[i], want, rtol=2e-5, atol=2e-5, err_msg=name)


def _contiguous(case: Case, x):
    """The same call of `flash_attention`, from gathered pages."""
    B, Sq = x["query"].shape[:2]
    table = jnp.clip(x["page_table"], 0, x["key_pages"].shape[0] - 1)
    key, value = (
        (x[f"{name}_pages"] * x.get(f"{name}_scale", jnp.ones((1, 1, 1)))[..., None])[table].reshape(
            B, -1, case.K, case.D
        )
        for name in ("key", "value")
    )
    mask = jax_fa.masks.Band(left=case.window, right=0, offset=jnp.asarray(x["lengths"]) - Sq)
    return jax_fa.flash_attention(
        x["query"],
        key,
        value,
        mask=mask,
        sinks=x.get("sinks"),
        logits_soft_cap=case.cap,
        return_logsumexp=True,
    )


def test_derivatives():
    """Of everything that is floating, in both modes: those of the contiguous call. NaN of unused pages stays away."""
    case = Case(Sq=2, window=30, cap=3.0, sinks=True, scales=(0, 2), lengths=(37, 64, 0))
    x = jax.tree.map(jnp.asarray, case.arrays)
    wanted = {name: a for name, a in x.items() if name not in ("page_table", "lengths")}
    weights = jax.tree.map(lambda a: jax.random.normal(jax.random.key(1), a.shape), case())

    def loss(attend, moving):
        out, lse = attend(x | moving)
        return (out * weights[0]).sum() + (jnp.where(lse > -1e30, lse, 0) * weights[1]).sum()

    ours = jax.jit(jax.grad(partial(loss, case)))(wanted)
    theirs = jax.jit(jax.grad(partial(loss, partial(_contiguous, case))))(wanted)
    for name in wanted:
        finite = np.isfinite(theirs[name])
        np.testing.assert_allclose(
            np.where(finite, ours[name], 0), np.where(finite, theirs[name], 0), atol=1e-4, err_msg=name
        )
    along = {"query": x["query"][::-1]}
    moved = jax.jvp(lambda q: loss(case, {"query": q}), (x["query"],), (along["query"],))
    np.testing.assert_allclose(moved[1], jnp.vdot(ours["query"], along["query"]), rtol=1e-3)


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("name", ["value_pages", "value_scale"])
def test_linear_transpose(name, sinks):
    """In the values and in their scales, in which paged attention is linear."""
    case = Case(Sq=2, scales=(0, 2), sinks=sinks)
    x = {other: jnp.nan_to_num(a) for other, a in case.arrays.items()}

    def run(moved):
        return case(x | {name: moved})[0]

    (found,) = jax.linear_transpose(run, x[name])(x["query"])
    (want,) = jax.vjp(run, x[name])[1](x["query"])
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)


def test_linear_transpose_in_another_array():
    case = Case()
    pages = jnp.nan_to_num(case.arrays["key_pages"])
    transposed = jax.linear_transpose(lambda x: case(case.arrays | {"key_pages": x})[0], pages)
    with pytest.raises(
        NotImplementedError, match=r"linear in value_pages or value_scale alone, .* in key_pages"
    ):
        transposed(case.arrays["query"])


def test_taylor_mode():
    """Coefficients of the second order along a line."""
    case = Case(Sq=2)
    x = {name: jnp.nan_to_num(a) for name, a in case.arrays.items()}
    point, along = (x["query"], x["key_pages"]), (jnp.cos(x["query"]), jnp.sin(x["key_pages"]))

    def run(query, pages):
        return case(x | {"query": query, "key_pages": pages})[0]

    def first(*point):
        return jax.jvp(run, point, along)[1]

    _, found = jet(run, point, [[a, jnp.zeros_like(a)] for a in along])
    for got, want in zip(found, jax.jvp(first, point, along), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scales", [(2,), (0,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("pages", ["", "int8", "float8_e4m3fn"])
def test_derivatives_of_scales(pages, scales):
    """NaN and infinity where no row sees a key reach no gradient: behind lengths, before windows, in pages of nobody."""
    case = Case(Sq=2, window=9, pages=pages, scales=scales, lengths=(37, 64, 0, 5), size=8)
    hostile = jax.tree.map(jnp.asarray, case.arrays)
    before = case.arrays["page_table"][0, 2]  # of the first sequence, in front of its window
    tame = dict(hostile)
    for name in ("key_pages", "value_pages", "key_scale", "value_scale"):
        x = np.array(hostile[name])
        if x.shape[0] > 1 and np.issubdtype(hostile[name].dtype, np.floating):
            x[before] = np.inf
            hostile[name] = jnp.asarray(x)
        tame[name] = jnp.where(jnp.isfinite(hostile[name]), hostile[name], 1)
    moving = ("query", "key_scale", "value_scale", *(() if pages else ("key_pages", "value_pages")))

    @jax.jit
    def gradients(x):
        def loss(moved):
            return (case(x | moved)[0] ** 2).sum()

        return jax.grad(loss)({name: x[name] for name in moving})

    found, wanted = gradients(hostile), gradients(tame)
    for name in moving:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_explained():
    """Which backend runs, and those of the derivatives; a native backend that lacks it says so."""
    case = Case(window=9, pages="int8", scales=(2,))
    x = dict(case.arrays)
    first = [x.pop(name) for name in ("query", "key_pages", "value_pages", "page_table", "lengths")]
    for found in (
        jax_fa.explain(*first, **x, platforms=("cpu", "cuda")),
        jax_fa.explain(case, case.arrays, platforms=("cpu", "cuda"))[0],
    ):
        native = found.reasons["cpu"]["cpu"] is None
        assert found.chosen == {"cpu": "cpu" if native else "xla", "cuda": "xla"}
        assert found.backward["cpu"] == found.chosen["cpu"]
        assert found.reasons["cuda"]["mosaic"] == "does not compute paged attention: xla does"
        assert (found.dims.Sq, found.dims.Skv, found.dims.K) == (1, 64, 2) and "B=(4,)" in str(found)
    for name in ("mosaic", "ascend"):
        why = f"{name}: does not compute paged attention: xla does"
        with pytest.raises(
            NotImplementedError, match=rf"implementation='{name}' cannot serve paged .* {why}"
        ):
            jax_fa.paged_attention(*first, **x, implementation=name)


# --- devices


def _placed(case: Case, axes: AxisType = AxisType.Auto):
    """The arrays over four devices along the sequences, two along the heads; mesh and specs, those of the results too."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"), axis_types=(axes, axes))
    heads = P(None, None, "y")
    specs = {
        "query": P("x", None, "y"),
        "key_pages": heads,
        "value_pages": heads,
        "page_table": P("x"),
        "lengths": P("x"),
        "key_scale": heads,
        "value_scale": heads,
    }
    results = P("x", None, "y"), P("x", "y")
    placed = {name: jax.device_put(a, NamedSharding(mesh, specs[name])) for name, a in case.arrays.items()}
    return placed, mesh, specs, results


SHARDED = Case(Sq=2, N=4, K=2, pages="int8", scales=(0, 1, 2))


def test_sharded(backend):
    """Sequences and heads split without communication, in a plain jit and under shard_map."""
    placed, mesh, specs, results = _placed(SHARDED)
    run = partial(SHARDED, implementation=backend)
    for function in (run, jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=results)):
        program = jax.jit(function).lower(placed).compile()
        found = program(placed)
        SHARDED.check(*found)
        assert "all-" not in program.as_text()
        for x, spec in zip(found, results, strict=True):
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


def test_explicit_axes(backend):
    """Where shardings are part of types, the results' types are those of sequences and heads."""
    placed, mesh, _, results = _placed(SHARDED, AxisType.Explicit)
    types: list = []

    @jax.jit
    def run(x):
        found = SHARDED(x, implementation=backend)
        types.extend(jax.typeof(a).sharding for a in found)
        return found

    with jax.set_mesh(mesh):
        found = run(placed)
    SHARDED.check(*found)
    for of_type, x, spec in zip(types, found, results, strict=True):
        for sharding in (of_type, x.sharding):
            assert NamedSharding(mesh, sharding.spec).is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


def test_vmap_of_explicit_axes(backend):
    """A batch that explicit axes cut stays cut beside what is mapped."""
    placed, mesh, *_ = _placed(SHARDED, AxisType.Explicit)
    factors = jnp.array([1.0, -2.0])

    @jax.jit
    def run(x):
        return jax.vmap(lambda factor: SHARDED(x | {"query": factor * x["query"]}, implementation=backend))(
            factors
        )

    with jax.set_mesh(mesh):
        found = run(placed)
    assert jax.tree.map(lambda x: x.sharding.spec[1], found) == ("x", "x")
    for got, want in zip(found, run(SHARDED.arrays), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=2e-5, atol=2e-5)


PLACEMENTS = {
    "batch": {},
    "heads": {"key_pages": (None, None, "y"), "key_scale": (None, None, "y")},
    "pages": {"key_pages": ("y",), "value_pages": ("x", "y"), "key_scale": ("x",)},
    "one axis": {"key_pages": (None, None, "x"), "value_pages": (None, None, None, "y")},
    "whole table": {"page_table": (), "lengths": (), "query": ("x", "y")},
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("placed", PLACEMENTS)
def test_derivatives_of_explicit_axes(placed):
    """Whatever of the pool is cut: in both modes, and as the carry of a scan, whose type must not change."""
    case = Case(Sq=2, scales=(0, 1, 2), window=9, sinks=True, lengths=(37, 20, 0, 64))
    x = {name: jnp.nan_to_num(a) for name, a in case.arrays.items()}
    moving = [name for name in x if name not in ("page_table", "lengths")]

    def loss(moved, rest):
        def again(query, _):
            return case(moved | rest | {"query": query})[0], None

        first = case(moved | rest)[0]
        return jnp.sum(jnp.sin(jax.lax.scan(again, first, None, length=1)[0]))

    @jax.jit
    def run(x):
        moved = {name: x[name] for name in moving}
        gradient = jax.grad(partial(loss, rest={name: x[name] for name in ("page_table", "lengths")}))
        return jax.jvp(gradient, (moved,), (moved,))

    specs = {"query": ("x",), "page_table": ("x",), "lengths": ("x",)} | PLACEMENTS[placed]
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = run(
            {name: jax.device_put(a, NamedSharding(mesh, P(*specs.get(name, ())))) for name, a in x.items()}
        )
    want = run(x)
    for got, whole in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(got), whole, rtol=1e-4, atol=1e-4)


def test_exported(backend):
    """A serialized program of sharded arrays computes the same, for any values of lengths and table."""
    placed, *_ = _placed(SHARDED)
    exported = jax.export.export(jax.jit(partial(SHARDED, implementation=backend)))(placed)
    again = jax.export.deserialize(exported.serialize())
    SHARDED.check(*jax.jit(again.call)(placed))


def test_symbolic_sizes():
    """One exported program for any number of sequences, pages and pages of a sequence: fewer than a tile has, and more."""
    B, most, total = jax.export.symbolic_shape("B, M, P")
    pool = jax.ShapeDtypeStruct((total, 4, 2, 8), jnp.float32)
    query = jax.ShapeDtypeStruct((B, 4, 8), jnp.float32)
    table, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((B, most), (B,)))
    exported = jax.export.export(jax.jit(jax_fa.paged_attention))(query, pool, pool, table, lengths)
    random = np.random.default_rng(0)
    for B, most, total in ((1, 1, 3), (3, 5, 20), (2, 200, 30)):
        rows = random.standard_normal((B, 4, 8), np.float32)
        pools = random.standard_normal((2, total, 4, 2, 8), np.float32)
        table = random.integers(0, total, (B, most)).astype(np.int32)
        args = rows, *pools, table, random.integers(0, 4 * most + 1, B).astype(np.int32)
        np.testing.assert_allclose(exported.call(*args), jax_fa.paged_attention(*args), atol=1e-5)


def test_pages_are_updated_in_place():
    """A decode loop with a donated pool: one compile, and no copy of the pool."""
    S = 16  # of a page
    rows = np.random.default_rng(1).standard_normal((3, 20, 2, 2, 32)).astype(np.float32)
    table = np.arange(8, dtype=np.int32).reshape(2, 4)[:, ::-1]

    @partial(jax.jit, donate_argnums=0)
    def step(pool, query, key, value, position):
        at = jnp.take_along_axis(jnp.asarray(table), position[:, None] // S, 1)[:, 0], position % S
        pool = pool[0].at[at].set(key), pool[1].at[at].set(value)
        return pool, jax_fa.paged_attention(query, *pool, table, position + 1)

    pool = tuple(jnp.full((8, S, 2, 32), jnp.nan) for _ in range(2))
    queries, keys, values = rows
    where = [a.unsafe_buffer_pointer() for a in pool]
    for i in range(20):
        position = jnp.array([i, max(i - 5, 0)], jnp.int32)
        pool, out = step(pool, queries[i], keys[i], values[i], position)
    assert step._cache_size() == 1 and [a.unsafe_buffer_pointer() for a in pool] == where
    want = jax_fa.flash_attention(queries[19][:1, None], keys[None, :, 0], values[None, :, 0])
    np.testing.assert_allclose(out[0], want[0, 0], atol=1e-5)


# --- errors

Q, POOL = jnp.zeros((2, 3, 4, 8)), jnp.zeros((5, 16, 2, 8))
TABLE, LENGTHS = jnp.zeros((2, 4), jnp.int32), jnp.zeros(2, jnp.int32)
WRONG = [
    (
        {"query": Q[0, 0]},
        ValueError,
        r"query must have 4 dimensions \(B, Sq, N, D\) or 3 \(B, N, D\); got shape \(4, 8\)",
    ),
    ({"query": Q.astype(int)}, TypeError, "query must have a floating dtype; got int32"),
    ({"query": Q[..., :0]}, ValueError, "query must have head_dim D of at least 1"),
    (
        {"query": Q[..., :4]},
        ValueError,
        r"key_pages must have query's head_dim D=4; got shape \(5, 16, 2, 8\)",
    ),
    ({"query": Q[:, :, :3]}, ValueError, "multiple of key_pages' K; got N=3, K=2"),
    ({"key_pages": POOL[0]}, ValueError, r"key_pages must have 4 dimensions \(P, S, K, D\)"),
    ({"key_pages": POOL[:0]}, ValueError, "at least one page P and one token S of a page"),
    (
        {"key_pages": POOL.astype(jnp.int32)},
        TypeError,
        "key_pages must have one of the dtypes float32, bfloat16.*got int32",
    ),
    ({"value_pages": POOL[:4]}, ValueError, r"value_pages must have key_pages' \(P, S, K\)=\(5, 16, 2\)"),
    (
        {"value_pages": POOL.astype(jnp.int8)},
        TypeError,
        "value_pages must have key_pages' dtype float32; got int8",
    ),
    ({"value_pages": None}, ValueError, "value_pages must be an array, or None with value_dim="),
    ({"value_pages": None, "value_dim": 9}, ValueError, r"value_dim must be in 1\.\.D=8; got 9"),
    ({"value_pages": None, "value_dim": 4.0}, TypeError, "value_dim must be an int; got 4.0"),
    ({"value_dim": 4}, ValueError, "value_dim is for value_pages=None"),
    ({"page_table": TABLE[:1]}, ValueError, r"page_table must have shape \(B, M\) with B=2.*got \(1, 4\)"),
    ({"page_table": TABLE[:, :0]}, ValueError, "at least one page M of a sequence"),
    (
        {"page_table": TABLE.astype(jnp.float32)},
        TypeError,
        "page_table must hold integers; got dtype float32",
    ),
    ({"lengths": LENGTHS[:1]}, ValueError, r"lengths must have shape \(B,\)=\(2,\); got \(1,\)"),
    ({"lengths": LENGTHS + 65}, ValueError, r"lengths must be in 0\.\.64; got \[65 65\]"),
    ({"lengths": LENGTHS - 1}, ValueError, r"lengths must be in 0\.\.64"),
    ({"lengths": np.array([65, 1])}, ValueError, r"lengths must be in 0\.\.64; got \[65  1\]"),
    ({"lengths": [-1, 1]}, ValueError, r"lengths must be in 0\.\.64; got \[-1  1\]"),
    ({"lengths": LENGTHS.astype(jnp.float32)}, TypeError, "lengths must hold integers"),
    (
        {"key_scale": jnp.zeros((5, 16, 2, 8))},
        ValueError,
        r"key_scale must broadcast to \(P, S, K\)=\(5, 16, 2\)",
    ),
    ({"value_scale": jnp.zeros(3)}, ValueError, "value_scale must broadcast to"),
    ({"value_scale": TABLE[0, 0]}, TypeError, "value_scale must have a floating dtype; got int32"),
    (
        {"value_pages": None, "value_dim": 4, "value_scale": jnp.ones(())},
        ValueError,
        "key_scale is the scale of values",
    ),
    ({"scale": float("nan")}, ValueError, "scale must be finite"),
    ({"logits_soft_cap": -1.0}, ValueError, "logits_soft_cap must be positive and finite"),
    ({"local_window_size": -1}, ValueError, "local_window_size must be at least 0, or None"),
    ({"local_window_size": (3, 0)}, TypeError, r"local_window_size must be an int.*got \(3, 0\)"),
    ({"sinks": jnp.zeros(3)}, ValueError, r"sinks must have shape \(N,\) or \(\*B, N\)"),
    ({"return_logsumexp": "yes"}, TypeError, "return_logsumexp must be True or False"),
    ({"implementation": "flash"}, ValueError, "implementation must be None or one of"),
    ({"window": 3}, TypeError, "pass local_window_size"),
    ({"block_tables": TABLE}, TypeError, "pass page_table instead"),
    ({"mask": TABLE}, TypeError, "paged_attention has no argument 'mask'"),
]


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(
    ("given", "exception", "text"), WRONG, ids=lambda x: "-".join(x) if isinstance(x, dict) else ""
)
def test_wrong_arguments(given, exception, text):
    good = {"query": Q, "key_pages": POOL, "value_pages": POOL, "page_table": TABLE, "lengths": LENGTHS}
    with pytest.raises(exception, match=text):
        jax.eval_shape(lambda: jax_fa.paged_attention(**good | given))
