"""`benchmarks/cpu_attention.py` and `cpu_sweep.py`: what they count, what must hold, and tables of documents."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jax_fa.backends import native
from jax_fa.testing import timing

if native.missing is not None:
    pytest.skip(f"needs the native extension: {native.missing}", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from cpu import bounds, limits, machine, measure, programs, report, sweep, tables  # noqa: E402
from cpu.cases import DTYPES, PACKED, Case, cases  # noqa: E402

TINY = Case(group="extras", Sq=48, N=2, D=16)


@pytest.fixture(autouse=True)
def standard_promotion():
    """jax.nn mixes 16-bit dtypes with float32 itself, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# --- cases


def test_cases_differ_and_cover_what_must_hold():
    found = cases()
    assert len({(case.group, case.name) for case in found}) == len(found)
    long = [case for case in found if case.group == "long"]
    assert {(case.dtype, case.D, case.mask) for case in long} == {
        (dtype, D, mask) for dtype in DTYPES for D in (64, 128) for mask in ("full", "causal")
    }
    assert bounds.EXTRAS.keys() <= {case.extra or case.mask for case in found if case.group == "extras"}


@pytest.mark.parametrize("mask", ["full", "causal", "window 5"])
def test_operations_are_those_of_visible_pairs(mask):
    case = replace(TINY, B=3, mask=mask, chain=2)
    i, j = np.indices((48, 48))
    visible = {"full": i >= 0, "causal": j <= i, "window 5": (j <= i) & (i - j < 5)}[mask]
    assert case.pairs == visible.sum()
    assert case.flops("forward") == 2 * 2 * (2 * 3 * 2 * 16) * visible.sum()
    assert case.flops("backward") == 2.5 * case.flops("forward")


def test_packed_sequences_fill_the_call():
    assert sum(PACKED) == Case(group="extras").Sq


@pytest.mark.parametrize(
    "extra", ["mask", "bias over heads", "learnt bias over batch", "dropout", "soft cap"]
)
def test_a_case_is_measured(extra, monkeypatch):
    monkeypatch.setattr(limits, "ITERATIONS", 1000)
    monkeypatch.setattr(limits, "SECONDS", 0.0)
    monkeypatch.setattr(limits, "READ_BYTES", 2**16)
    monkeypatch.setattr(measure, "SHORT", 1e-3)
    case = replace(TINY, extra=extra, of=TINY, peers=("jax.nn",) if extra == "learnt bias over batch" else ())
    rows = measure.measure(case, rounds=3)
    assert [row["direction"] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert set(row["ratio"]) == set(case.peers) and row["of"] == TINY.name
        assert row["of_rate"] > 0 and row["of_peak"] > 0 and len(row["samples"]["cpu"]) == 3
        assert extra in report.line(row) and "of the rate of" in report.line(row)
    json.dumps(rows)


def test_peers_compute_the_same():
    case = replace(TINY, mask="causal", peers=("torch", "jax.nn", "xla"), chain=2)
    outputs = {name: found["forward"]() for name, found in programs.everyone(case).items()}
    mine = np.asarray(outputs.pop("cpu"))
    for name, out in outputs.items():
        out = out.swapaxes(1, 2).numpy() if name == "torch" else np.asarray(out)
        np.testing.assert_allclose(out, mine, atol=1e-5)


def test_derivatives_have_rows_of_their_own(monkeypatch):
    monkeypatch.setattr(limits, "ITERATIONS", 1000)
    monkeypatch.setattr(limits, "SECONDS", 0.0)
    rows = measure.measure(replace(TINY, derivatives=True), rounds=3)
    assert [row["direction"] for row in rows] == ["jvp", "hvp", "double backward"]
    assert [list(row["ratio"]) for row in rows] == [["cpu forward"], ["cpu backward"], ["cpu backward"]]


# --- what must hold


def _row(group: str, **more):
    row = {"group": group, "name": "a", "dtype": "float32", "direction": "forward", "D": 64, "mask": "full"}
    return row | {"extra": "", "of_peak": 0.8, "of_rate": 0.9, "of_bandwidth": 0.7, "ratio": {}} | more


@pytest.mark.parametrize(
    ("isa", "row", "expected"),
    [
        ("avx2", _row("long"), [("of peak", 0.76, True)]),
        ("avx512", _row("long"), [("of peak", 0.82, False)]),
        ("avx512_bf16", _row("long", mask="causal"), [("of peak", 0.78, True)]),
        ("avx512_bf16", _row("long", dtype="bfloat16", D=128), [("of peak", 0.80, True)]),
        ("avx512", _row("long", dtype="bfloat16"), [("of float32", 0.95, False)]),
        ("avx512_bf16", _row("long", dtype="float16"), [("of float32", 0.95, False)]),
        ("avx2", _row("long", ratio={"torch": 1.5}), [("of peak", 0.76, True), ("x torch", 1.6, False)]),
        ("portable", _row("long", ratio={"torch": 1.5}), []),
        (
            "avx2",
            _row("short", ratio={"jax.nn": 2.0}),
            [("of the long rate", 0.85, True), ("x jax.nn", 1.0, True)],
        ),
        ("avx2", _row("decode"), [("of bandwidth", 0.85, False)]),
        ("avx2", _row("extras", mask="window 512"), [("of plain", 0.8, True)]),
        ("avx2", _row("extras", extra="dropout", direction="backward"), [("of plain", 0.9, True)]),
        ("avx2", _row("derivatives"), []),
    ],
)
def test_the_bounds_of_a_row(isa, row, expected):
    found = bounds.check([row], isa)
    assert [(bound.what, bound.least, bound.holds) for bound in found] == expected
    assert ("MISSED" in bounds.table(found)) == any(not holds for *_, holds in expected)


def test_the_worst_row_of_the_sweep_is_a_bound():
    (bound,) = bounds.check([], "avx2", {"rows": 3, "worst": [{"ratio": 0.9}, {"ratio": 1.0}]})
    assert not bound.holds and "worst of 3" in bound.row


# --- the sweep


def test_shapes_of_the_sweep():
    shapes = sweep.shapes(50, seed=1)
    assert shapes == sweep.shapes(50, seed=1) != sweep.shapes(50, seed=2)
    assert len(set(shapes)) == len(shapes)
    # But for the corner that does not fit with one head.
    assert {(shape.S, shape.B, shape.N, shape.D) for shape in shapes if not shape.fits} == {(4096, 1, 1, 256)}
    for name in "SBND":
        smallest, largest = min(getattr(sweep, name)), max(getattr(sweep, name))
        assert {smallest, largest} <= {getattr(shape, name) for shape in shapes}


def test_a_shape_of_the_sweep_is_measured():
    rows = sweep.measure(sweep.Shape(4, 1, 2, 16, "bfloat16", True), rounds=2)
    assert [row["direction"] for row in rows] == ["forward", "gradient"]
    assert sweep.summary(rows)["worst"] == sorted(rows, key=lambda row: row["ratio"])
    assert "S=4 B=1 N=2 D=16 bfloat16 causal" in sweep.line(rows[0])


# --- files


def test_caches_of_linux(tmp_path):
    for i, (level, kind, size) in enumerate([(1, "Data", 32), (1, "Instruction", 64), (2, "Unified", 512)]):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", f"{size}K")):
            (folder / name).write_text(f"{text}\n")
    assert machine.caches(tmp_path) == {"L1d": 32, "L2": 512}
    assert machine.caches(tmp_path / "nowhere") == {}


def test_a_file_is_of_a_processor_its_caches_and_an_instruction_set():
    found = machine.describe()
    milan = {
        "processor": "AMD EPYC 7543",
        "caches": {"L1d": 32, "L2": 512, "L3": 32768},
        "instruction_set": "avx2",
    }
    assert machine.file_name(milan) == "amd-epyc-7543-32k-512k-32768k-avx2.json"
    assert machine.file_name(milan | {"caches": {}}) == "amd-epyc-7543-avx2.json"  # where they are not known
    assert found["tuning"] and found["instruction_set"] in native.extension.instruction_sets()
    assert os.uname().nodename not in json.dumps(found)


def test_parts_of_a_file_stay_while_versions_do(tmp_path):
    path, here = tmp_path / "x.json", {"versions": {"jax": "1"}}
    report.update(path, here, rows=[1])
    report.update(path, here, sweep={"rows": 2})
    assert report.read(path) == {"schema": 1, "machine": here, "rows": [1], "sweep": {"rows": 2}}
    report.update(path, {"versions": {"jax": "2"}}, rows=[3])
    assert "sweep" not in report.read(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="must be a file of schema 1; got None"):
        report.read(path)


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_documents_agree_with_the_files_that_they_name(document, tmp_path):
    text = document.read_text(encoding="utf-8")
    blocks = list(tables.BLOCK.finditer(text))
    assert blocks
    for block in blocks:
        assert block["text"] == tables.made(block)
    copy = tmp_path / document.name
    copy.write_text(
        tables.BLOCK.sub(r"<!--cpu \g<table> \g<file>-->\nold\n<!--/cpu-->", text), encoding="utf-8"
    )
    assert copy.read_text(encoding="utf-8") != text
    tables.write(copy)
    assert copy.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "must have a block .* got none"),
        ("<!--cpu no x-->\n<!--/cpu-->", "must be among summary, .* got no"),
    ],
)
def test_a_document_without_tables(text, message, tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        tables.write(copy)


@pytest.mark.parametrize("same", [True, False], ids=["same versions", "others"])
def test_some_rows_anew(same, tmp_path):
    path, versions = tmp_path / "found.json", {"jax": "1"}
    row = {"name": "a", "direction": "forward", "seconds": 1}
    report.update(path, {"versions": versions}, complete=True, rows=[row, row | {"name": "b"}])
    again = {"versions": versions if same else {"jax": "2"}}
    report.update(path, again, some=True, complete=True, rows=[row | {"name": "b", "seconds": 2}])
    found = report.read(path)
    assert found["complete"] == same
    assert [(x["name"], x["seconds"]) for x in found["rows"]] == [("a", 1), ("b", 2)][not same :]


def test_short_runs_are_awake(monkeypatch):
    """They are called until the time is over, and at least once; others are not called."""
    calls, clock = [], [0.0]

    def run(name):
        calls.append(name)
        clock[0] += 0.25

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0], sleep=lambda _: None))
    runs = {name: partial(run, name) for name in ("short", "long", "once")}
    timing.alternate(runs, 1, warm_up=0, wake=frozenset({"short"}), awake=1.0)
    assert Counter(calls) == {"short": 4 + 1, "long": 1, "once": 1}
    timing.alternate(runs, 1, warm_up=0, wake=frozenset({"once"}))
    assert calls.count("once") == 1 + 2


def test_memory_is_read():
    x = np.arange(1001, dtype=np.uint64)
    quarters = [x[i * 250 : (i + 1) * 250] for i in range(4)]
    expected = np.bitwise_xor.reduce(quarters).sum() + x[1000]
    assert native.extension.read_memory(x) == expected


@pytest.mark.slow
def test_the_script_in_a_process(tmp_path):
    """Another instruction set than the best one, as the file says."""
    path = tmp_path / "found.json"
    script = [sys.executable, "-P", str(ROOT / "benchmarks/cpu_attention.py")]
    arguments = ["--only", "short S=256 D=64 float32", "--rounds", "3", "--instruction-set", "portable"]
    done = subprocess.run(
        [*script, *arguments, "--json", str(path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = report.read(path)
    assert found["machine"]["instruction_set"] == "portable" and not found["complete"]
    assert {row["name"] for row in found["rows"]} == {"S=256 D=64 float32 full", "S=256 D=64 float32 causal"}
    assert "must hold" in done.stdout
