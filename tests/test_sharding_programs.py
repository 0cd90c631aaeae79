"""What programs for several devices hold: no rule where XLA splits by itself, a key that tells calls apart, no gathers."""

import contextlib
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tables import some_pairs
from test_sharding import _SMALL, LAYOUTS, Layout, _compiled, _derivatives, _mesh, _operands, _same

import jax_fa
from jax_fa import backends, sharding
from jax_fa.sharding import gathering
from jax_fa.testing.cases import check

DEVICES = jax.devices("cpu")
pytestmark = pytest.mark.skipif(len(DEVICES) < 8, reason="needs eight CPU devices")
PARTITIONERS = ("shardy", "gspmd")
RULES = ("CustomSPMDPartitioning", sharding.TARGET)


@contextlib.contextmanager
def _partitioner(name: str):
    before = jax.config.jax_use_shardy_partitioner
    jax.config.update("jax_use_shardy_partitioner", name == "shardy")
    try:
        yield
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)


ROWS = (
    Layout("rows", replace(_SMALL, B=(2,), Sq=32, N=4, K=2), {"x": 4}, rows="x"),
    Layout(
        "rows-everything",
        replace(_SMALL, B=(2,), Sq=32, N=4, K=2, slopes="N", bias="1NQK", soft_cap=3.0, mask="causal"),
        {"x": 4},
        rows="x",
    ),
    Layout(
        "rows-dense",
        replace(_SMALL, B=(4,), Sq=32, mask="dense_padding"),
        {"x": 2, "y": 4},
        batch="x",
        rows="y",
    ),
    Layout("heads-beyond-keys", replace(_SMALL, B=(2,), N=8, K=2, bias="BNQK"), {"x": 4}, query_heads="x"),
    Layout(
        "everything-at-once",
        replace(_SMALL, B=(2,), Sq=32, N=4, K=1, mask="causal"),
        {"x": 2, "y": 2, "z": 2},
        batch="x",
        query_heads="y",
        rows="z",
    ),
)


@pytest.mark.in_turn
@pytest.mark.parametrize("partitioner", PARTITIONERS)
@pytest.mark.parametrize("layout", ROWS, ids=str)
def test_rows_and_heads_beyond_the_key_heads(layout, partitioner, backend):
    """No communication but the sums of gradients of what devices share."""
    case = layout.case
    attend = partial(case.flash_attention, implementation=backend)
    dout, dlse = case.cotangents()
    cotangents = ((case.stored(dout), layout.spec("out")), (dlse, layout.spec("lse")))
    with _partitioner(partitioner), warnings.catch_warnings():
        warnings.simplefilter("error")
        program, args = _compiled(layout, attend, _operands(layout))
        gradient, more = _compiled(
            layout, partial(case.gradient, implementation=backend), _operands(layout), *cotangents
        )
        out, lse = program(*args)
        found = gradient(*more)
    check(case, np.asarray(out), np.asarray(lse))
    assert "all-" not in program.as_text()
    assert out.sharding.is_equivalent_to(NamedSharding(_mesh(**layout.mesh), layout.spec("out")), out.ndim)
    (out, lse), gradients = found
    check(case, np.asarray(out), np.asarray(lse), {n: np.asarray(g) for n, g in gradients.items()})
    # A key head's gradient is the sum of some devices', and is then sent to all.
    allowed = 2 if layout.name == "heads-beyond-keys" else 0
    assert gradient.as_text().count(" all-gather(") <= allowed and "all-to-all" not in gradient.as_text()


ALONE = ("batch-dropout", "batch-and-heads-BNSD", "heads-of-one-key", "batch-shared-bias")


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("layout", "partitioner"),
    some_pairs([x for x in LAYOUTS if x.name in ALONE], PARTITIONERS, every=2),
    ids=str,
)
def test_plain_code_splits_by_itself(layout, partitioner, real_tiles):
    """The portable backend without loops needs no rule, and communicates nothing but sums that any gradient has."""
    case = (
        replace(layout.case, mask="causal_bottom") if layout.case.mask.startswith("causal") else layout.case
    )
    attend = partial(case.flash_attention, implementation="xla")
    x, specs = _operands(replace(layout, case=case))
    derivatives = partial(_derivatives, attend)
    with _partitioner(partitioner):
        program, args = _compiled(layout, attend, (x, specs))
        along, _ = _compiled(layout, derivatives, (x, specs))
        lowered = jax.jit(derivatives).lower(*args).as_text()
    assert not any(rule in lowered for rule in RULES)
    assert "all-" not in program.as_text()
    text = along.as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    assert layout.shared or "all-reduce" not in text
    _same(along(*args), jax.jit(derivatives)(x))


@pytest.mark.parametrize(("layout", "partitioner"), some_pairs(ROWS, PARTITIONERS, every=2), ids=str)
def test_plain_code_splits_rows_and_heads(layout, partitioner, real_tiles):
    with _partitioner(partitioner):
        program, args = _compiled(
            layout, partial(layout.case.flash_attention, implementation="xla"), _operands(layout)
        )
        out, lse = program(*args)
    check(layout.case, np.asarray(out), np.asarray(lse))
    assert "all-" not in program.as_text()


@pytest.mark.parametrize(
    ("layout", "derivative"),
    some_pairs([x for x in LAYOUTS + ROWS if x.case.dtype == "float32"], ["forward", "derivatives"], every=2),
    ids=str,
)
def test_programs_for_tpu_have_no_rule(layout, derivative):
    """Also where there are loops: that platform implements none."""
    mesh = _mesh(**layout.mesh)
    x, specs = _operands(layout)
    args = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, s)), x, specs
    )
    attend = layout.case.flash_attention
    run = attend if derivative == "forward" else partial(_derivatives, attend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = jax.jit(run).trace(args).lower(lowering_platforms=("tpu",)).as_text()
    assert not any(rule in text for rule in RULES)


def _sharded(mesh, *specs):
    shapes = (4, 32, 8, 8), (4, 32, 2, 8), (4, 32, 2, 8)
    return [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_lowering_for_a_mesh_without_devices(kind, backend):
    mesh = AbstractMesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    args = _sharded(mesh, P("x", None, "y"), P("x"), P("x"))
    run = jax.grad(lambda *qkv: jnp.sum(jax_fa.flash_attention(*qkv, implementation=backend)), (0, 1, 2))
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(run).trace(*args).lower(lowering_platforms=("cpu",)).as_text()
    assert "func.func public @main" in text


class _ReadsMasks:
    """A backend that may read `problem.mask`, which counts from the first row."""

    name, platforms, emulated_on = "reads-masks", None, ()

    def __init__(self, portable) -> None:
        self._portable, self.rows = portable, set()
        self.why_not, self.notes = portable.why_not, portable.notes

    def forward(self, call):
        self.rows.add(call.dims.Sq)
        return self._portable.forward(call)

    def backward(self, call, saved):
        self.rows.add(call.dims.Sq)
        return self._portable.backward(call, saved)


@pytest.mark.filterwarnings("ignore:.*gathered whole:UserWarning")
def test_a_backend_that_reads_masks_has_all_rows():
    layout = ROWS[0]
    backend = _ReadsMasks(backends.named("xla"))
    dout, dlse = layout.case.cotangents()
    cotangents = ((layout.case.stored(dout), layout.spec("out")), (dlse, layout.spec("lse")))
    with backends.registered(backend):
        run = partial(layout.case.gradient, implementation=backend.name)
        program, args = _compiled(layout, run, _operands(layout), *cotangents)
        (out, lse), gradients = program(*args)
    check(layout.case, np.asarray(out), np.asarray(lse), {n: np.asarray(g) for n, g in gradients.items()})
    assert backend.rows == {layout.case.Sq}


# --- other processes


def _child(code: str, *args) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # XLA's flags are those of all tests
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


_SETUP = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax_fa
from jax_fa.backends.xla import tiling
tiling.ONE_TILE_ELEMENTS = 0
mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
def operands(*specs):
    shapes = (4, 32, 8, 8), (4, 32, 2, 8), (4, 32, 2, 8)
    return [
        jax.device_put(np.random.default_rng(i).standard_normal(shape, np.float32), NamedSharding(mesh, spec))
        for i, (shape, spec) in enumerate(zip(shapes, specs))
    ]
def run(*qkv, **options):
    return jnp.sum(jnp.sin(jax_fa.flash_attention(*qkv, **options)))
"""
_CACHED = (
    _SETUP
    + """
directory, backend, stripped, calls = sys.argv[1:]
jax.config.update("jax_compilation_cache_dir", directory)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", stripped == "stripped")
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
qkv = operands(P("x", None, "y"), P("x"), P("x"))
found = []
key = jax.random.key(0)
for options in eval(calls):
    fn = jax.jit(lambda *qkv: run(*qkv, implementation=backend, **options))
    events.clear()
    value = float(fn(*qkv))
    found.append((value, any(e.endswith("cache_hits") for e in events)))
print(json.dumps(found))
"""
)


# Expressions of the other process, all of which differ in static parameters alone.
_CALLS = """[
    {"scale": 0.7}, {"scale": 0.8}, {"logits_soft_cap": 2.0},
    {"dropout_rate": 0.25, "dropout_key": key}, {"dropout_rate": 0.5, "dropout_key": key},
]"""
_UNIONS = """[{"mask": mask} for m in [jax_fa.masks] for mask in (
    m.Lengths(key=3) | m.SlidingWindow(4, 0), m.Lengths(key=4) | m.SlidingWindow(4, 0),
    m.Lengths(key=3) | m.SlidingWindow(5, 0), m.Lengths(key=3) & m.SlidingWindow(5, 0),
    m.Lengths(key=3) | m.SlidingWindow(4, 0) | m.Band(-20, 30), ~m.Band(-2, 3), ~m.Band(-2, 4), ~~m.Band(-2, 4),
)]"""


@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("stripped", "calls"),
    [
        pytest.param("", _CALLS, id="calls"),
        pytest.param("stripped", _CALLS, id="calls-stripped"),
        pytest.param("", _UNIONS, id="unions", marks=pytest.mark.slow),
        pytest.param("stripped", _UNIONS, id="unions-stripped", marks=pytest.mark.slow),
    ],
)
def test_the_compilation_cache_tells_calls_apart(stripped, calls, backend, tmp_path):
    """Another process finds every program, and each call its own."""
    first, second = (json.loads(_child(_CACHED, tmp_path, backend, stripped, calls)) for _ in range(2))
    assert [hit for _, hit in first] == [False] * len(first)
    assert [hit for _, hit in second] == [True] * len(second)
    values = [value for value, _ in first]
    assert len(set(values)) == len(values)
    assert [value for value, _ in second] == values


_EXPORT = (
    _SETUP
    + """
path, backend = sys.argv[1:]
qkv = operands(P("x", None, "y"), P("x"), P("x"))
program = jax.export.export(jax.jit(jax.value_and_grad(lambda *qkv: run(*qkv, implementation=backend))))(*qkv)
open(path, "wb").write(program.serialize())
print("jax_fa_split" in program.mlir_module() or "CustomSPMDPartitioning" in program.mlir_module())
"""
)
_CALL = (
    _SETUP
    + """
path, backend = sys.argv[1:]
qkv = operands(P("x", None, "y"), P("x"), P("x"))
program = jax.jit(jax.export.deserialize(open(path, "rb").read()).call).lower(*qkv).compile()
found = program(*qkv)
want = jax.jit(jax.value_and_grad(lambda *qkv: run(*qkv, implementation=backend)))(*map(np.asarray, qkv))
for a, b in zip(found, want):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
print(program.as_text().count(" all-gather("))
"""
)


def test_exported_programs_split_in_other_processes(backend, tmp_path):
    has_rule = _child(_EXPORT, tmp_path / "program", backend)
    assert has_rule == str(backend != "xla")
    assert _child(_CALL, tmp_path / "program", backend) == "0"


# --- what is gathered


@pytest.fixture
def untold():
    gathering._warned.clear()
    yield
    gathering._warned.clear()


GATHERED = [
    pytest.param(
        P("x"), P(None, "x"), {}, "key and value are gathered whole .* axis 1.*attends to all keys", id="keys"
    ),
    pytest.param(P(*[None] * 3, "x"), P(), {}, "query is gathered whole .* axis 3.*head_dim", id="head-dim"),
    pytest.param(
        P(None, "x"), P(), {"dropout": True}, "query is gathered whole .* axis 1.*dropout", id="dropout"
    ),
    pytest.param(P(None, None, "x"), P(), {"heads": 12, "key_heads": 3}, "N=12 .* K=3", id="heads"),
]


@pytest.mark.in_turn
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("query", "key", "options", "text"), GATHERED)
def test_what_is_gathered_is_said(query, key, options, text, kind, backend, untold):
    """Once, and by `explain`."""
    mesh = _mesh(kind, x=4)
    heads, key_heads = options.get("heads", 4), options.get("key_heads", 2)
    shapes = (4, 32, heads, 8), (4, 32, key_heads, 8), (4, 32, key_heads, 8)
    more = {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)} if options.get("dropout") else {}
    attend = partial(jax_fa.flash_attention, implementation=backend, **more)
    with jax.set_mesh(mesh):
        qkv = [
            jax.device_put(np.ones(shape, np.float32), NamedSharding(mesh, spec))
            for shape, spec in zip(shapes, (query, key, key), strict=True)
        ]
        with pytest.warns(UserWarning, match=text):
            jax.jit(attend).lower(*qkv).compile()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jax.jit(partial(attend)).lower(*qkv).compile()
        (found,) = jax_fa.explain(attend, *qkv, platforms="cpu")
    assert any(re.search(text, note) for note in found.notes["cpu"])
