"""Attention over a sharded sequence: the same as on one device, with the communication and memory that are promised."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tables import some_pairs

import jax_fa
from jax_fa import masks
from jax_fa.backends import native
from jax_fa.masks import Causal, Lengths, Prefix, SegmentIds, SlidingWindow
from jax_fa.sequence_parallel import position_ids, reorder, restore, visited_tiles
from jax_fa.sequence_parallel.schedule import Schedule
from jax_fa.testing import oracle
from jax_fa.testing.cases import BY_NAME, CASES, Case, check
from jax_fa.testing.programs import temporary_bytes

# Of out and log-sum-exp, and of gradients, in float32: relative to one device, in the 2-norm.
CLOSE, CLOSE_GRADIENTS = 1e-6, 2e-6
SEQUENCE = {"BSND": -3, "SND": -3, "BNSD": -2, "NSD": -2, "SBND": 0}


@cache
def _mesh(devices: int, kind: AxisType = AxisType.Auto):
    return jax.make_mesh((devices,), ("x",), axis_types=(kind,), devices=jax.devices()[:devices])


def _split(case: Case, devices: int = 8) -> Case:
    """The case with lengths that 2 * devices chunks divide, and some shards that some rows do not see."""
    return replace(case, Sq=2 * devices * 3, Skv=2 * devices * 4)


class Program:
    """A case on several devices: whole arrays in, whole arrays out, in their natural order."""

    def __init__(
        self, case: Case, devices: int, strategy: str, order: str, backend: str | None = None
    ) -> None:
        self.case, self.devices, self.order = case, devices, order
        self.options = {"strategy": strategy, "order": order, "implementation": backend}
        self.whole_rows = strategy == "all_reduce"
        mask = case.library_mask()
        members = () if mask is None else masks.members(masks.as_mask(mask))
        self.arrays = {str(i): m.array for i, m in enumerate(members) if isinstance(m, masks.Dense)}
        self.members = members

    def axes(self, name: str, x) -> tuple[int | None, ...]:
        """The axes along which an array is sharded: query's rows, and the keys."""
        if name in ("query", "out", "key", "value"):
            axis = SEQUENCE[self.case.layout] % x.ndim
        elif name == "lse":
            axis = x.ndim - 1
        elif x.ndim < 2 or x.shape[-2] == 1 or name in ("alibi_slopes", "sinks"):
            return ()
        else:
            axis = x.ndim - 2
        return () if self.whole_rows and name not in ("key", "value") else (axis,)

    def spec(self, name: str, x) -> P:
        return P(*("x" if axis in self.axes(name, x) else None for axis in range(x.ndim)))

    def ordered(self, name: str, x, turn=reorder):
        for axis in self.axes(name, x):
            x = turn(jnp.asarray(x), devices=self.devices, axis=axis, order=self.order)
        return jnp.asarray(x)

    def local(self, x, arrays):
        mask: Any = None
        for i, member in enumerate(self.members):
            member = masks.Dense(arrays[str(i)]) if str(i) in arrays else member
            mask = member if mask is None else mask & member
        case = self.case
        return jax_fa.sequence_parallel_attention(
            **x,
            axis_name="x",
            mask=mask,
            scale=case.scale,
            logits_soft_cap=case.soft_cap,
            dropout_rate=case.dropout,
            dropout_key=case.dropout_key() if case.dropout else None,
            layout=case.layout,
            return_logsumexp=True,
            **self.options,
        )

    def attend(self, x):
        """(out, log-sum-exp) of whole operands."""
        x, arrays = ({n: self.ordered(n, a) for n, a in given.items()} for given in (x, self.arrays))
        specs = tuple({n: self.spec(n, a) for n, a in given.items()} for given in (x, arrays))
        rank = len(self.case.B)
        like = (
            jax.ShapeDtypeStruct((1,) * (rank + 3), jnp.float32),
            jax.ShapeDtypeStruct((1,) * (rank + 2), jnp.float32),
        )
        outs = tuple(self.spec(name, x) for name, x in zip(("out", "lse"), like, strict=True))
        found = jax.shard_map(self.local, mesh=_mesh(self.devices), in_specs=specs, out_specs=outs)(x, arrays)
        return tuple(self.ordered(n, a, restore) for n, a in zip(("out", "lse"), found, strict=True))

    @partial(jax.jit, static_argnums=0)
    def gradient(self, x, dout, dlse):
        results, pullback = jax.vjp(self.attend, x)
        return results, pullback((dout, dlse))[0]


def _distance(found, want) -> float:
    found, want = (np.asarray(x, np.float64) for x in (found, want))
    return float(np.linalg.norm(found - want) / (np.linalg.norm(want) or 1))


def _assert_same(program: Program) -> None:
    """Results and gradients are those of one device."""
    case = program.case
    dout, dlse = case.cotangents()
    args = case.stored_operands(), jnp.asarray(case.stored(dout)), jnp.asarray(dlse)
    (out, lse), gradients = program.gradient(*args)
    one = jax.jit(partial(case.gradient, implementation=program.options["implementation"]))
    (want, want_lse), want_gradients = one(*args)
    empty = np.asarray(want_lse) < -1e38
    np.testing.assert_array_equal(np.asarray(lse)[empty], np.asarray(want_lse)[empty])
    assert _distance(out, want) <= CLOSE
    assert _distance(np.where(empty, 0, lse), np.where(empty, 0, want_lse)) <= CLOSE
    assert sorted(gradients) == sorted(want_gradients)
    for name, gradient in gradients.items():
        assert _distance(gradient, want_gradients[name]) <= CLOSE_GRADIENTS, name


CPU = "cpu" if native.missing is None else "xla"  # which compiles faster
RING = (
    "mqa",
    "no-batch",
    "mask-window_bottom",
    "mask-prefix_bottom",
    "mask-lengths",
    "mask-cumulative_causal",
    "mask-segments_mixed_causal",
    "mask-causal_dense",
    "mask-nothing",
    "slopes-batch",
    "everything-BNSD",
    "layout-SBND",
)
OTHERS = ("mask-segments_mixed_causal", "mask-causal_dense", "everything")


def _serves(case: Case, devices: int, strategy: str) -> bool:
    ratio = max(case.K, devices) % min(case.K, devices)
    return strategy != "ulysses" or (case.N % devices == 0 and ratio == 0)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "way"), some_pairs(RING, [(8, "contiguous"), (4, "zigzag")], every=2), ids=str
)
def test_ring(name, way):
    """Also where some shards are fully masked for some devices."""
    devices, order = way
    _assert_same(Program(_split(BY_NAME[name]), devices, "ring", order, CPU))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("strategy", ["all_gather", "ulysses", "all_reduce"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_strategies(name, strategy):
    _assert_same(Program(_split(BY_NAME[name]), 2, strategy, "zigzag", CPU))


def test_plain_loops():
    _assert_same(Program(_split(BY_NAME["mask-segments_window"]), 4, "ring", "zigzag", "xla"))


SPLIT = [case for case in CASES if case.dtype == "float32" and 0 not in (*case.B, case.Sq, case.Skv)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "order"), [(2, "contiguous"), (4, "zigzag"), (8, "contiguous"), (8, "zigzag")]
)
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_ring_on_the_whole_table(case, devices, order, backend):
    _assert_same(Program(_split(case), devices, "ring", order, backend))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("strategy", ["all_gather", "ulysses", "all_reduce"])
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_other_strategies_on_the_whole_table(case, strategy, order, devices):
    if not _serves(case, devices, strategy):
        case = replace(case, N=devices, K=1)
    _assert_same(Program(_split(case), devices, strategy, order, CPU))


@pytest.mark.parametrize("name", ["bfloat16-everything", "float16-plain"])
def test_16_bit_inputs_are_held_against_the_oracle(name):
    """Partial results are merged before they are rounded: the tolerance is that of one device."""
    case = _split(BY_NAME[name], 4)
    dout, dlse = case.cotangents()
    args = case.stored_operands(), jnp.asarray(case.stored(dout)), jnp.asarray(dlse)
    (out, lse), gradients = Program(case, 4, "ring", "contiguous", CPU).gradient(*args)
    check(case, out, lse, gradients)


@pytest.mark.parametrize("sinks", [False, True])
def test_bfloat16_gradients_by_statistics_of_more_keys(sinks):
    """Those of a shard alone: a row's ds over the keys of one shard do not add up to 0."""
    case = Case(name="bfloat16-ring", dtype="bfloat16", B=(1,), Sq=64, Skv=64, N=2, K=2, D=32, Dv=32)
    x = case.stored_operands() | ({"sinks": np.float32([3.0, 5.0])} if sinks else {})
    dout, dlse = case.cotangents()
    _, found = Program(case, 2, "ring", "contiguous", CPU).gradient(x, jnp.asarray(dout), jnp.asarray(dlse))
    qkv = (np.asarray(x[name], np.float64) for name in ("query", "key", "value"))
    want = oracle.attention(*qkv, sinks=x.get("sinks")).gradients(dout, dlse)
    for name in want:
        assert _distance(found[name], want[name]) < 0.01, name


def test_float64():
    case = _split(BY_NAME["float64-plain"], 4)
    with case.context():
        dout, dlse = case.cotangents()
        (out, lse), gradients = Program(case, 4, "ring", "zigzag").gradient(
            case.stored_operands(), jnp.asarray(case.stored(dout)), jnp.asarray(dlse)
        )
        check(case, out, lse, gradients)


@pytest.mark.parametrize("sizes", [{"Sq": 0}, {"Skv": 0}], ids=str)
@pytest.mark.parametrize("strategy", ["ring", "all_gather", "all_reduce"])
def test_empty_arrays(sizes, strategy):
    case = replace(_split(BY_NAME["mask-causal"]), **sizes)
    (out, lse), gradients = Program(case, 4, strategy, "contiguous", CPU).gradient(
        case.stored_operands(), *map(jnp.asarray, case.cotangents())
    )
    assert not np.asarray(out).any() and (np.asarray(lse) == -np.finfo(np.float32).max).all()
    assert not any(np.asarray(g).any() for g in gradients.values())


# --- sinks and the largest logits


@pytest.mark.parametrize(
    ("name", "strategy", "devices"),
    [
        ("mask-lengths", "ring", 2),
        ("mask-lengths", "all_reduce", 2),
        ("mask-causal", "ulysses", 2),
        pytest.param("mask-nothing", "ring", 2, marks=pytest.mark.slow),
        pytest.param("mask-nothing", "all_reduce", 2, marks=pytest.mark.slow),
        pytest.param("everything", "all_gather", 2, marks=pytest.mark.slow),
        pytest.param("everything", "ulysses", 2, marks=pytest.mark.slow),
        pytest.param("everything", "all_reduce", 2, marks=pytest.mark.slow),
    ],
)
def test_sinks_and_the_largest_logits(name, strategy, devices):
    """Every row has one sink, whatever the number of devices; its gradient is a sum over all rows."""
    case = _split(BY_NAME[name], devices)
    program = Program(case, devices, strategy, "zigzag", CPU)
    shape = (case.N,) if strategy == "ring" else (*case.B, case.N)
    sinks = 1.5 * case.random("sinks").standard_normal(shape) + 3
    x = case.stored_operands() | {"sinks": sinks.astype(np.float32)}
    dout, dlse = case.cotangents()
    found = program.gradient(x, jnp.asarray(case.stored(dout)), jnp.asarray(dlse))
    want = jax.jit(partial(case.gradient, implementation=CPU))(x, jnp.asarray(case.stored(dout)), dlse)
    assert sorted(found[1]) == sorted(want[1])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert _distance(a, b) <= CLOSE_GRADIENTS

    def largest(x, arrays):
        program.options["return_max_logits"] = True
        return program.local(x, arrays)[-1]

    given = tuple({n: program.ordered(n, a) for n, a in part.items()} for part in (x, program.arrays))
    specs = tuple({n: program.spec(n, a) for n, a in part.items()} for part in given)
    run = jax.shard_map(largest, mesh=_mesh(devices), in_specs=specs, out_specs=P())
    *_, most = case.flash_attention(x, implementation=CPU, return_max_logits=True)
    np.testing.assert_allclose(jax.jit(run)(*given), most, rtol=1e-5)


@pytest.mark.parametrize(
    "strategy",
    ["all_reduce", *(pytest.param(s, marks=pytest.mark.slow) for s in ("ring", "all_gather", "ulysses"))],
)
def test_cotangents_of_masked_rows_reach_no_sink(strategy):
    case = _split(BY_NAME["mask-nothing"], 2)
    program = Program(case, 2, strategy, "contiguous", CPU)
    x = case.stored_operands() | {"sinks": np.full(case.N, 0.5, np.float32)}
    dout, dlse = case.cotangents()
    _, found = program.gradient(x, jnp.full_like(case.stored(dout), jnp.nan), jnp.asarray(dlse))
    want = np.sum(
        dlse, axis=tuple(i for i in range(dlse.ndim) if i != dlse.ndim - 2)
    )  # of the log-sum-exp, which is the sink
    np.testing.assert_allclose(found.pop("sinks"), want, rtol=1e-5)
    assert not any(np.asarray(g).any() for g in found.values())


# --- derivatives


def _derivatives(attend, x):
    """jvp, jvp of grad, grad of grad, grad of jvp, jvp of jvp."""
    along = jax.tree.map(lambda a: jnp.cos(3 * a), x)

    def loss(x):
        return sum(jnp.sum(jnp.sin(y)) for y in attend(x))

    def norm(x):
        return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(jax.grad(loss)(x)))

    def moved(x):
        return jax.jvp(attend, (x,), (along,))[1]

    return {
        "jvp": moved(x),
        "jvp of grad": jax.jvp(jax.grad(loss), (x,), (along,))[1],
        "grad of grad": jax.grad(norm)(x),
        "grad of jvp": jax.grad(lambda x: sum(jnp.sum(jnp.cos(t)) for t in moved(x)))(x),
        "jvp of jvp": jax.jvp(moved, (x,), (along,))[1],
    }


_BOTH = Case(name="derivatives", Sq=32, Skv=32, D=8, Dv=12, mask="window")


@pytest.mark.parametrize(
    ("case", "devices", "strategy", "order"),
    [
        pytest.param(_BOTH, 4, "ring", "contiguous", id="ring"),
        pytest.param(
            replace(_BOTH, bias="1NQK", slopes="N", soft_cap=2.0, dropout=0.2, mask="causal"),
            2,
            "ring",
            "zigzag",
            id="ring-everything",
            marks=pytest.mark.slow,
        ),
        pytest.param(_BOTH, 4, "all_gather", "zigzag", id="all_gather", marks=pytest.mark.slow),
        pytest.param(_BOTH, 2, "ulysses", "zigzag", id="ulysses", marks=pytest.mark.slow),
        pytest.param(_BOTH, 4, "all_reduce", "contiguous", id="all_reduce"),
    ],
)
def test_derivatives_of_both_modes_and_second_order(case, devices, strategy, order):
    x = jax.tree.map(jnp.asarray, case.stored_operands())
    program = Program(case, devices, strategy, order, CPU)
    found = jax.jit(partial(_derivatives, program.attend))(x)
    want = jax.jit(partial(_derivatives, partial(case.flash_attention, implementation=CPU)))(x)
    for name in want:
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(want[name]), strict=True):
            assert _distance(a, b) < 5e-5, name  # of sums of large terms that cancel


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "devices"), [("ring", 2), ("all_reduce", 2)])
def test_derivatives_with_sinks(strategy, devices):
    case = replace(_BOTH, mask="causal")
    x = case.stored_operands() | {"sinks": np.float32([0.5, 2.0, -1.0, 3.0])}
    program = Program(case, devices, strategy, "contiguous", CPU)
    found = jax.jit(partial(_derivatives, program.attend))(x)
    want = jax.jit(partial(_derivatives, partial(case.flash_attention, implementation=CPU)))(x)
    for name in want:
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(want[name]), strict=True):
            assert _distance(a, b) < 5e-5, name


def test_a_third_derivative_is_refused():
    program = Program(replace(_BOTH, mask=None), 2, "ring", "contiguous", CPU)
    x = jax.tree.map(jnp.asarray, program.case.stored_operands())

    def along(f):
        return lambda x: jax.jvp(f, (x,), (x,))[1]

    with pytest.raises(NotImplementedError, match="up to the second order"):
        jax.eval_shape(along(along(along(program.attend))), x)


def test_vmap_and_remat():
    """vmap inside and outside of shard_map, and a remat that keeps nothing."""
    case = _split(replace(BY_NAME["mask-causal"], B=()), 4)
    program = Program(case, 4, "ring", "zigzag", CPU)
    x = {n: jnp.stack([a, 2 * a, a[::-1]]) for n, a in case.stored_operands().items()}
    attend = jax.checkpoint(program.attend, policy=jax.checkpoint_policies.nothing_saveable)

    def loss(attend, x):
        return sum(jnp.sum(jnp.sin(y)) for y in jax.vmap(attend)(x))

    found = jax.jit(jax.grad(partial(loss, attend)))(x)
    want = jax.jit(jax.grad(partial(loss, partial(case.flash_attention, implementation=CPU))))(x)
    for name in want:
        assert _distance(found[name], want[name]) <= CLOSE_GRADIENTS, name


def test_scan_over_layers_without_jit():
    """Layers that share one program, in an eager shard_map."""
    case = _split(replace(BY_NAME["mask-causal"], B=(1,), K=4, N=4), 2)
    case = replace(case, Sq=case.Skv)
    program = Program(case, 2, "ring", "contiguous", CPU)
    x = {n: jnp.asarray(a) for n, a in case.stored_operands().items()}

    def layers(attend, x):
        def step(query, _):
            return attend({**x, "query": query}), None

        return jax.lax.scan(step, x["query"], length=2)[0]

    spec = P(None, "x")
    local = jax.shard_map(
        partial(layers, lambda x: program.local(x, {})[0]), mesh=_mesh(2), in_specs=(spec,), out_specs=spec
    )
    want = layers(lambda x: case.flash_attention(x, implementation=CPU)[0], x)
    assert _distance(local(x), want) <= CLOSE


def test_explicit_axes():
    """A mesh of explicit axes, whose types say how results are sharded."""
    mesh, spec = _mesh(4, AxisType.Explicit), P(None, "x")
    x = jnp.cos(jnp.arange(2 * 16 * 4 * 8, dtype=jnp.float32)).reshape(2, 16, 4, 8)
    attend = jax.shard_map(
        partial(jax_fa.sequence_parallel_attention, axis_name="x", mask=Causal(), implementation=CPU),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
    )
    with jax.set_mesh(mesh):
        out = jax.jit(attend)(*[jax.device_put(x, NamedSharding(mesh, spec))] * 3)
        assert jax.typeof(out).sharding.spec == P(None, "x", None, None)
    assert _distance(out, jax_fa.flash_attention(x, x, x, mask=Causal(), implementation=CPU)) <= CLOSE


def test_without_checks_of_types():
    """shard_map(check_vma=False), which Pallas kernels may need."""
    case = _split(BY_NAME["mask-causal"], 4)
    program = Program(case, 4, "ring", "contiguous", CPU)
    spec = P(None, "x")
    attend = jax.shard_map(
        lambda x: program.local(x, {})[0], mesh=_mesh(4), in_specs=(spec,), out_specs=spec, check_vma=False
    )
    x = case.stored_operands()
    assert _distance(jax.jit(attend)(x), case.flash_attention(x)[0]) <= CLOSE


def test_a_mesh_with_batch_heads_and_sequence():
    """Only the sequence is a matter of the call; the other axes may be manual, too."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "model", "x"), axis_types=(AxisType.Auto,) * 3)
    case = _split(replace(BY_NAME["mask-causal"], B=(2,), N=4, K=2), 2)
    x, spec = case.stored_operands(), P("data", "x", "model")
    program = Program(case, 2, "ring", "contiguous", CPU)
    attend = jax.shard_map(lambda x: program.local(x, {})[0], mesh=mesh, in_specs=(spec,), out_specs=spec)

    def gradient(attend):
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(attend(x)))))(x)

    want = gradient(lambda x: case.flash_attention(x, implementation=CPU)[0])
    for name, found in gradient(attend).items():
        assert _distance(found, want[name]) <= CLOSE_GRADIENTS, name


def test_explain():
    """The calls of the shards, by the backend that serves them."""
    x = jnp.ones((1, 16, 4, 8), jnp.bfloat16)

    def attend(rate, x):
        call = partial(jax_fa.sequence_parallel_attention, x, x, x, axis_name="x", mask=Causal())
        return call(dropout_rate=rate, dropout_key=jax.random.key(0))

    def found(rate):
        run = jax.shard_map(
            partial(attend, rate), mesh=_mesh(4), in_specs=P(None, "x"), out_specs=P(None, "x")
        )
        return jax_fa.explain(run, x, platforms=("cpu", "cuda"))

    (plain,), (dropped,) = found(0.0), found(0.5)
    assert plain.chosen["cpu"] == dropped.chosen["cpu"] == CPU
    assert plain.dims.Sq == plain.dims.Skv == 4
    assert "sequence_parallel" in plain.source or "test_sequence_parallel" in plain.source


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses"])
def test_other_axes_may_be_automatic(strategy):
    """shard_map over the sequence alone; XLA splits the batch."""
    mesh = jax.make_mesh((2, 4), ("data", "x"), axis_types=(AxisType.Auto,) * 2)
    case = _split(replace(BY_NAME["mask-causal"], K=4), 4)
    x, spec = case.stored_operands(), P(None, "x")
    program = Program(case, 4, strategy, "contiguous", "xla")
    attend = jax.shard_map(
        lambda x: program.local(x, {})[0], mesh=mesh, in_specs=(spec,), out_specs=spec, axis_names={"x"}
    )
    placed = {n: jax.device_put(a, NamedSharding(mesh, P("data", "x"))) for n, a in x.items()}
    assert _distance(jax.jit(attend)(placed), case.flash_attention(x, implementation="xla")[0]) <= CLOSE


# --- what is sent and kept


@cache
def _lowered(
    devices: int, mask, *, length: int = 1024, gradient: bool = False, backend: str | None = CPU, **options
):
    spec = NamedSharding(_mesh(devices), P(None, "x"))
    attend = jax.shard_map(
        partial(
            jax_fa.sequence_parallel_attention, axis_name="x", mask=mask, implementation=backend, **options
        ),
        mesh=_mesh(devices),
        in_specs=P(None, "x"),
        out_specs=P(None, "x"),
    )
    x = [jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32, sharding=spec)] * 3

    def run(query, key, value):
        return jax.vjp(attend, query, key, value)[1](query) if gradient else attend(query, key, value)

    return jax.jit(run).lower(*x)


def _compiled(*args: Any, **options: Any):
    return _lowered(*args, **options).compile()


def _collectives(program) -> Counter:
    names = "collective-permute|all-gather|all-reduce|all-to-all|reduce-scatter"
    return Counter(re.findall(rf" ({names})(?:-start)?\(", program.as_text()))


@pytest.mark.parametrize(
    ("mask", "devices", "steps"),
    [
        (None, 8, 7),
        (None, 4, 3),
        (Causal(), 8, 7),
        (SlidingWindow(100), 8, 1),  # of shards of 128
        (SlidingWindow(128), 8, 1),
        (SlidingWindow(129), 8, 2),
        (SlidingWindow(300), 8, 3),
        (SlidingWindow(100, 100), 8, 2),  # one forward, one backward
        (masks.Band(0, 0, offset=256), 8, 2),
        (masks.CumulativeLengths((128, 256, 512, 1024)), 8, 6),  # the last one has four shards
        (masks.CumulativeLengths((128, 256, 512, 1024), within=Causal()), 8, 3),
        (Lengths(key=128), 8, 7),
    ],
    ids=str,
)
def test_a_ring_sends_what_is_needed(mask, devices, steps):
    """Key and value once for each step, and nothing else."""
    assert _collectives(_compiled(devices, mask)) == {"collective-permute": 2 * steps} if steps else {}


@pytest.mark.parametrize("devices", range(1, 9))
def test_schedules_of_any_visibility(devices):
    """Every device gets every shard that it needs, and the gradient of each shard comes home from its last device."""
    random = np.random.default_rng(devices)
    for _ in range(50):
        seen = random.random((devices, devices)) < random.choice([0.1, 0.3, 0.9])
        schedule = Schedule.of(seen)
        missing = {(int(i), int(j)) for i, j in zip(*np.nonzero(seen), strict=True)}
        homes = []
        for sign in (1, -1):
            held = {j: j for j in range(devices)}  # device: shard
            for step in range(1, schedule.far(sign) + 1):
                pairs = schedule.on(sign * step)
                for side in zip(*pairs, strict=True):
                    assert len(set(side)) == len(side)  # a permutation
                held = {target: held[source] for source, target in pairs}
                if sign * step in schedule.visited:
                    missing -= set(held.items())
                homes += [target for source, target in schedule.home(sign * step) if held[source] == target]
        assert missing <= ({(j, j) for j in range(devices)} if 0 in schedule.visited else set())
        travelling = [(j, sign) for j, reach in enumerate(schedule.reach) for sign in (0, 1) if reach[sign]]
        assert sorted(homes) == sorted(j for j, _ in travelling)


def test_the_backward_sends_keys_again_and_their_gradients():
    assert _collectives(_compiled(8, None, gradient=True)) == {"collective-permute": 2 * 7 * 3}


@pytest.mark.parametrize(
    ("static", "steps"),
    [
        (None, 3),
        (SlidingWindow(10), 1),
        (SlidingWindow(10, 0, "bottom-right"), 3),
    ],  # lengths may move the corner
    ids=str,
)
def test_masks_that_are_data_send_what_the_others_leave(static, steps):
    def attend(query, key, value, lengths):
        mask = Lengths(key=lengths) if static is None else static & Lengths(key=lengths)
        return jax_fa.sequence_parallel_attention(query, key, value, axis_name="x", mask=mask)

    x = [jax.ShapeDtypeStruct((1, 64, 4, 32), jnp.float32)] * 3
    run = jax.shard_map(attend, mesh=_mesh(4), in_specs=(P(None, "x"),) * 3 + (P(),), out_specs=P(None, "x"))
    program = jax.jit(run).lower(*x, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    assert _collectives(program) == {"collective-permute": 2 * steps}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_platforms(platform):
    """Steps are kept apart by barriers, and nothing is left to a partitioner."""
    attend = partial(jax_fa.sequence_parallel_attention, axis_name="x", mask=Causal(), implementation="xla")
    run = jax.shard_map(attend, mesh=_mesh(4), in_specs=P(None, "x"), out_specs=P(None, "x"))
    x = [jax.ShapeDtypeStruct((1, 64, 4, 32), jnp.float32)] * 3
    text = jax.jit(run).trace(*x).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.collective_permute") == 2 * 3
    assert "optimization_barrier" in text and "CustomSPMDPartitioning" not in text


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("all_gather", {"all-gather": 2}), ("ulysses", {"all-to-all": 4})],
)
def test_other_strategies_communicate_once(strategy, expected):
    assert _collectives(_compiled(4, Causal(), strategy=strategy)) == expected


def _temporary(devices: int, length: int, mask, backend: str) -> int:
    return temporary_bytes(_lowered(devices, mask, length=length, gradient=True, backend=backend))


@pytest.mark.usefixtures("real_tiles")
@pytest.mark.parametrize("mask", [None, Causal()], ids=str)
def test_memory_is_that_of_a_shard(mask):
    """Twice the devices, half the temporary memory, forward and backward; and it is linear in the length."""
    few, many, long = (_temporary(*at, mask, CPU) for at in ((4, 2**16), (8, 2**16), (8, 2**17)))
    assert many < 0.55 * few
    assert long < 2.05 * many


@pytest.mark.slow
@pytest.mark.usefixtures("real_tiles")
def test_memory_is_that_of_a_shard_in_plain_loops():
    few, many, long = (_temporary(*at, Causal(), "xla") for at in ((4, 2**17), (8, 2**17), (8, 2**18)))
    assert many < 0.6 * few
    assert long < 2.05 * many


# --- order


def test_order_of_tokens():
    x = jnp.arange(32).reshape(2, 16)
    zigzag = reorder(x, devices=4)
    np.testing.assert_array_equal(zigzag[0], [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9])
    np.testing.assert_array_equal(restore(zigzag, devices=4), x)
    np.testing.assert_array_equal(reorder(x, devices=4, order="contiguous"), x)
    positions = jax.shard_map(
        partial(position_ids, 4, axis_name="x", order="zigzag"), mesh=_mesh(4), in_specs=(), out_specs=P("x")
    )
    np.testing.assert_array_equal(positions(), zigzag[0])


def test_zigzag_balances_causal_work():
    tiles = visited_tiles(Causal(), 2**14, 2**14, devices=8, order="zigzag")
    assert tiles.max() <= 1.03 * tiles.min()
    contiguous = visited_tiles(Causal(), 2**14, 2**14, devices=8)
    assert contiguous.max() > 10 * contiguous.min()
    (one,) = visited_tiles(Causal(), 2**14, 2**14, devices=1)
    assert tiles.sum() == contiguous.sum() == one == 128 * 129 // 2


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_segments_of_the_shards(order):
    """Segment ids that are sharded as the tokens are."""
    case = _split(BY_NAME["mask-segments_mixed"], 4)
    ids = np.sort(np.random.default_rng(0).integers(0, 5, (2, case.Skv)), axis=-1).astype(np.int32)
    case = replace(case, Sq=case.Skv, mask=None)
    x, spec = case.stored_operands(), P(None, "x")

    def local(x, ids):  # the prefix lengths of rows are sharded likewise
        mask = SegmentIds(ids, within=Prefix(ids))
        return jax_fa.sequence_parallel_attention(
            **x, axis_name="x", mask=mask, order=order, implementation=CPU
        )

    run = jax.shard_map(local, mesh=_mesh(4), in_specs=(spec, spec), out_specs=spec)
    given = jax.tree.map(lambda a: reorder(jnp.asarray(a), devices=4, order=order), (x, ids))
    found = restore(jax.jit(run)(*given), devices=4, order=order)
    want = jax_fa.flash_attention(**x, mask=SegmentIds(ids, within=Prefix(ids)), implementation=CPU)
    assert _distance(found, want) <= CLOSE


# --- decoding


@pytest.mark.parametrize(("batch", "reductions"), [(2, 1), (512, 2)])
def test_decode_takes_one_all_reduce(batch, reductions):
    """One token against a KV cache that is sharded, of which each entry has a length of its own."""
    case = Case(name="decode", B=(batch,), Sq=1, Skv=64, N=8, K=2, D=16, Dv=16)
    x = case.stored_operands()
    lengths = np.resize(np.array([64, 3, 17], np.int32), batch)
    keys = P(None, "x")

    def local(x, lengths):
        mask = Lengths(key=lengths) & Causal("bottom-right")
        return jax_fa.sequence_parallel_attention(
            **x, axis_name="x", mask=mask, strategy="all_reduce", implementation=CPU
        )

    specs = {"query": P(), "key": keys, "value": keys}
    run = jax.jit(jax.shard_map(local, mesh=_mesh(8), in_specs=(specs, P()), out_specs=P()))
    assert _collectives(run.lower(x, lengths).compile()) == {"all-reduce": reductions}
    want = jax_fa.flash_attention(**x, mask=Lengths(key=lengths) & Causal("bottom-right"), implementation=CPU)
    assert _distance(run(x, lengths), want) <= CLOSE


# --- merge


def _parts(layout: str = "BSND", dtype: str = "float32", cuts=(0, 5, 6, 24)):
    case = Case(name="merge", Sq=7, Skv=24, N=4, K=2, Dv=12, layout=layout, dtype=dtype)
    x = case.stored_operands()
    axis = SEQUENCE[layout]

    def part(x, first, last):
        keys = {n: jax.lax.slice_in_dim(jnp.asarray(x[n]), first, last, axis=axis) for n in ("key", "value")}
        # The first key is masked for row 0 everywhere, and the second part for all rows but the last two.
        seen = np.arange(7)[:, None] >= np.array([2, 0, 5])[:, None, None][min(first, 2) and 2]
        seen = np.broadcast_to(seen & (np.arange(7)[:, None] > 0), (7, last - first))
        return jax_fa.flash_attention(
            x["query"],
            **keys,
            mask=jnp.asarray(seen),
            layout=layout,
            return_logsumexp=True,
            implementation=CPU,
        )

    def merged(x):
        pairs = [part(x, *cut) for cut in pairwise(cuts)]
        return jax_fa.merge(*pairs, layout=layout)

    def whole(x):
        seen = np.arange(24) >= 0
        seen = np.stack([np.where(np.arange(24) < 5, i >= 2, i >= 5) & (i > 0) & seen for i in range(7)])
        return jax_fa.flash_attention(
            **x, mask=jnp.asarray(seen), layout=layout, return_logsumexp=True, implementation=CPU
        )

    return x, merged, whole


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "SBND"])
def test_merge(layout):
    x, merged, whole = _parts(layout)
    for a, b in zip(merged(x), whole(x), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
    if layout != "BSND":
        return
    want = jax.jit(partial(_derivatives, lambda x: [jnp.where(y < -1e30, 0, y) for y in whole(x)]))(x)
    found = jax.jit(partial(_derivatives, lambda x: [jnp.where(y < -1e30, 0, y) for y in merged(x)]))(x)
    for name in want:
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(want[name]), strict=True):
            assert np.isfinite(a).all() and _distance(a, b) < 1e-5, name


def test_merge_of_rows_without_a_key():
    """Neither NaN nor a gradient, whatever marks them."""
    out = jnp.full((1, 2, 1, 3), 7.0)
    for empty in (-np.finfo(np.float32).max, -np.inf):
        lse = jnp.array([[[empty, 0.5]]], jnp.float32)
        nothing = jnp.full((1, 1, 2), empty, jnp.float32)

        def merged(out, lse, nothing=nothing):
            return jax_fa.merge((out, lse), (out * jnp.nan, nothing))

        found, statistic = merged(out, lse)
        np.testing.assert_array_equal(found[0, :, 0, 0], [0, 7])
        np.testing.assert_array_equal(statistic[0, 0], [-np.finfo(np.float32).max, 0.5])
        gradients = jax.grad(lambda o, s: sum(jnp.sum(jnp.sin(y)) for y in merged(o, s)), (0, 1))(out, lse)
        assert np.isfinite(gradients[1]).all() and not np.asarray(gradients[1])[0, 0, 0]


def test_merge_of_16_bit_parts_keeps_their_dtype():
    x, merged, whole = _parts(dtype="bfloat16", cuts=(0, 5, 24))
    (out, lse), (want, _) = merged(x), whole(x)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(out.astype(jnp.float32), want.astype(jnp.float32), atol=0.02)


_OUT, _LSE = jnp.ones((1, 2, 3, 4)), jnp.ones((1, 3, 2))


@pytest.mark.parametrize(
    ("parts", "options", "error", "message"),
    [
        ((), {}, ValueError, "at least one; got none"),
        ((_OUT,), {}, TypeError, r"part 0 must be a pair \(out, logsumexp\)"),
        (((_OUT, _OUT),), {}, ValueError, r"logsumexp of part 0 must have shape \(\*B, N, Sq\)=\(1, 3, 2\)"),
        (((_OUT, _LSE), (_OUT[:, :1], _LSE[..., :1])), {}, ValueError, "logsumexp of part 1"),
        (((_OUT, _LSE), (_OUT[..., :1], _LSE)), {}, ValueError, "out of part 1 must have the shape"),
        (((_OUT, _LSE.astype(jnp.bfloat16)),), {}, TypeError, "must be float32 or float64"),
        (((_OUT.astype(int), _LSE),), {}, TypeError, "must have a floating dtype"),
        (
            ((_OUT, _LSE), (_OUT.astype(jnp.bfloat16), _LSE)),
            {},
            TypeError,
            "out of part 1 must have the dtype",
        ),
        (((_OUT, _LSE),), {"layout": "BHSD"}, ValueError, "layout must be one of"),
        (((_OUT, _LSE),), {"layout": "SND"}, ValueError, "out must have a rank"),
    ],
)
@pytest.mark.usefixtures("no_type_checker")
def test_merge_says_what_is_wrong(parts, options, error, message):
    with pytest.raises(error, match=message):
        jax_fa.merge(*parts, **options)


# --- wrong use


_SHARDED = P(None, "x")


def _wrong(shape=(1, 16, 4, 8), spec=_SHARDED, mesh=None, heads=None, manual=None, devices=4, **options):
    x = jnp.ones(shape)
    keys = x if heads is None else jnp.ones((*shape[:2], heads, shape[3]))
    attend = partial(jax_fa.sequence_parallel_attention, **{"axis_name": "x"} | options)
    mesh = mesh or _mesh(devices)
    names = {} if manual is None else {"axis_names": manual}
    return jax.eval_shape(
        jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=P(None, "x"), **names), x, keys, keys
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"axis_name": "z"}, ValueError, "axis_name='z' must be a mesh axis of a surrounding jax.shard_map"),
        ({"axis_name": 0}, TypeError, "axis_name must be the name of a mesh axis; got 0"),
        (
            {"strategy": "tree"},
            ValueError,
            "strategy must be one of ring, all_gather, ulysses, all_reduce; got 'tree'",
        ),
        ({"order": "striped"}, ValueError, "order must be one of contiguous, zigzag; got 'striped'"),
        (
            {"order": "zigzag", "shape": (1, 12, 4, 8)},
            ValueError,
            r"Pad the sequence of 12 to 16, a multiple of 2 \* 4",
        ),
        ({"strategy": "ulysses", "shape": (1, 16, 6, 8)}, ValueError, "N must be a multiple of 4"),
        ({"strategy": "ulysses", "heads": 3, "shape": (1, 16, 12, 8)}, ValueError, "got N=12, K=3"),
        (
            {"spec": (P(None, "x"), P(), P())},
            ValueError,
            "key must be sharded along its sequence over axis 'x'",
        ),
        ({"strategy": "all_reduce"}, ValueError, "query must be the same on every device"),
        ({"bias": np.ones((16, 16), np.float32)}, ValueError, r"\(\*B, N, Sq, Skv\)=\(1, 4, 4, 16\)"),
        ({"sinks": np.ones(3, np.float32)}, ValueError, r"sinks must have shape \(N,\) or \(\*B, N\)"),
        ({"return_max_logits": 2}, TypeError, "return_max_logits must be True or False"),
        ({"mask": np.ones((4, 4), bool)}, ValueError, r"\(1, 4, 4, 16\)"),
        ({"mask": SegmentIds(np.ones((1, 5), np.int32))}, ValueError, "segment ids must have shape"),
        ({"mask": Lengths(key=17)}, ValueError, r"key lengths must be in 0\.\.16"),
        ({"dropout_rate": 0.5}, ValueError, "dropout_key must be a jax.random key"),
        ({"causal": True}, TypeError, "sequence_parallel_attention has no argument 'causal'"),
    ],
)
@pytest.mark.usefixtures("no_type_checker")
def test_wrong_use_is_told(options, error, message):
    with pytest.raises(error, match=message):
        _wrong(**options)


def test_a_call_outside_of_shard_map_is_told():
    x = jnp.ones((1, 16, 4, 8))
    with pytest.raises(ValueError, match="must be a mesh axis of a surrounding jax"):
        jax_fa.sequence_parallel_attention(x, x, x, axis_name="x")
    with jax.set_mesh(_mesh(4)), pytest.raises(ValueError, match="must be a manual mesh axis"):
        jax_fa.sequence_parallel_attention(x, x, x, axis_name="x")


def test_an_axis_that_is_not_manual_is_told():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match="axis_name='y' must be a manual mesh axis"):
        _wrong(mesh=mesh, manual={"x"}, axis_name="y")


@pytest.mark.parametrize("turn", [reorder, restore])
def test_order_says_what_to_pad(turn):
    with pytest.raises(
        ValueError, match=r"multiple of 8 along axis 1, for devices=4 and order='zigzag'; got 100\. Pad"
    ):
        turn(jnp.ones((1, 100)), devices=4)
    with pytest.raises(ValueError, match="devices must be at least 1"):
        turn(jnp.ones((1, 100)), devices=0)
    with pytest.raises(ValueError, match="axis must be one of x"):
        turn(jnp.ones((1, 100)), devices=4, axis=2)


def test_counts_of_tiles_say_what_they_cannot_count():
    with pytest.raises(ValueError, match="sq must be a multiple of 16, for devices=8; got 100"):
        visited_tiles(Causal(), 100, 128, devices=8, order="zigzag")
    with pytest.raises(ValueError, match="mask must be a structured one"):
        visited_tiles(masks.Dense(np.ones((16, 16), bool)), 16, 16, devices=8)
    with pytest.raises(
        ValueError, match="mask must be intervals of keys; the members of a segment lie apart"
    ):
        visited_tiles(SegmentIds(np.arange(16) % 2), 16, 16, devices=8)
    with pytest.raises(ValueError, match="mask must have known values; it has traced ones"):
        jax.jit(lambda offset: visited_tiles(Causal(offset=offset), 16, 16, devices=8).sum())(1)


def test_counts_of_tiles_while_tracing():
    given = 2**10, 2**10
    found = jax.jit(lambda: visited_tiles(Causal(), *given, devices=2))()
    np.testing.assert_array_equal(found, visited_tiles(Causal(), *given, devices=2))


@pytest.mark.usefixtures("no_type_checker")
def test_counts_that_numpy_would_wrap_around():
    x, n = jnp.arange(128)[None], np.int8(64)  # chunks are twice as many
    np.testing.assert_array_equal(reorder(x, devices=n), reorder(x, devices=64))
    np.testing.assert_array_equal(restore(x, devices=n), restore(x, devices=64))
    tiles = visited_tiles(Causal(), 128, 128, devices=n, order="zigzag", tile=1)
    np.testing.assert_array_equal(
        tiles, visited_tiles(Causal(), 128, 128, devices=64, order="zigzag", tile=1)
    )
