"""`benchmarks/gpu_attention.py`: what it counts, how it watches its worker, and all of it rehearsed on CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jax_fa.testing.cases import Case

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

from gpu import checks, record, supervise, work  # noqa: E402

# --- what is counted


@pytest.mark.parametrize(("direction", "times"), [("forward", 1), ("backward", 2.5), ("both", 3.5)])
def test_flops_are_two_products_of_all_pairs(direction, times):
    shape = work.Shape(B=2, S=32, N=3, D=8)
    assert shape.flops(direction) == 2 * 2 * (2 * 3 * 32 * 32) * 8 * times
    causal = work.Shape(B=2, S=32, N=3, D=8, causal=True)
    assert causal.flops(direction) == shape.flops(direction) / 2


def test_shapes_share_tokens_and_width_and_differ():
    shapes = list(work.shapes(rehearse=False))
    assert {shape.S * shape.B for shape in shapes} == {16384}
    assert {shape.N * shape.D for shape in shapes} == {2048}
    assert {shape.D for shape in shapes} == {64, 128, 256}
    assert {shape.S for shape in shapes} == {2048, 4096, 8192, 16384}
    assert len({str(shape) for shape in shapes}) == len(shapes) == 24
    assert str(work.alphafold(rehearse=False)) == "S=4096 D=32 B=128 N=4 bias+mask"


def test_a_part_takes_its_share_of_what_is_left():
    chosen = work.parts(check_only=False, tune=False)
    assert "tune" not in chosen and work.parts(check_only=True, tune=True) == ("machine", "checks")
    left, taken = 560.0, []
    for part in chosen:
        taken.append(work.share(part, chosen, left))
        left -= taken[-1]
    assert left == pytest.approx(0) and min(taken) > 0
    assert work.share("training", chosen, 100) == 100  # the last one gets all
    assert work.share("checks", chosen, -5) == 0
    assert 190 < dict(zip(chosen, taken, strict=True))["checks"] < 220


def test_calls_and_sets():
    assert work.calls_per_sample(1e-4) == 24  # below what JAX lets the host run ahead
    assert work.calls_per_sample(2e-3) == 10
    assert work.calls_per_sample(1e-2) == 3
    assert work.calls_per_sample(1.0) == 1
    assert work.rotated_sets(192 * 2**20) == 2
    assert work.rotated_sets(30 * 2**20) == 8
    assert work.rotated_sets(1) == 16


def test_the_floor_is_products_or_exponentials():
    # 16 per clock on each of 132 multiprocessors.
    assert work.exp_seconds(16 * 132 * 1e9, 132, 1e9) == pytest.approx(1.0)
    device = {"part": "machine", "label": "device", "status": "ok", "multiprocessors": 100, "max_hertz": 1e9}
    product = {"part": "machine", "label": "product", "status": "ok", "tflops": 500.0}
    row = _timed(ours=(400.0, 2.0), pairs=1.0, flops=5e11)
    assert record.floor_share(row, [device, product]) == pytest.approx(0.5)
    row = _timed(ours=(400.0, 2.0), pairs=16 * 100 * 1e9 * 1.5e-3, flops=5e11)
    assert record.floor_share(row, [device, product]) == pytest.approx(0.75)
    assert record.floor_share(row, [product]) is None


# --- rows, files, tables


def _timed(ours: tuple[float, float], **more) -> record.Row:
    tflops, milliseconds = ours
    found = {"milliseconds": milliseconds, "spread": 0.01, "tflops": tflops}
    peers = {
        "peer": {"milliseconds": 4.0, "spread": 0.02, "tflops": 200.0},
        "absent": {"why": "is not here"},
    }
    row = {"part": "forward", "label": "S=1", "status": "ok", "ratio": tflops / 200, "best_peer": "peer"}
    return row | {"contestants": {"ours": found} | peers} | more


def test_table_and_reasons():
    rows = [_timed((300.0, 2.0)), _timed((100.0, 6.0), label="S=22")]
    head, first, second = record.table(rows).split("\n")
    assert head.split() == "row (TF/s) ours peer absent ours/best peer best peer of floor".split()
    assert first.split() == ["forward", "S=1", "300.0", "200.0", "-", "1.50", "peer", "-"]
    assert second.split() == ["forward", "S=22", "100.0", "200.0", "-", "0.50", "peer", "-"]
    assert len(first) == len(second)
    assert record.reasons(rows) == "- absent (2 rows): is not here"
    assert record.table([]) == "" and record.reasons([]) == ""
    assert record.line(rows[0]) == (
        "forward   S=1: ours 2.000 ms ±1% 300 TF/s; peer 4.000 ms ±2% 200 TF/s; absent -; ours / peer = 1.50"
    )


def test_exit_code():
    ok, skip, bad, raised = (
        {"part": "checks", "label": status, "status": status} for status in ("pass", "skip", "FAIL", "error")
    )
    assert record.exit_code([ok, skip]) == 0
    assert record.exit_code([ok, bad]) == record.exit_code([ok, raised]) == 1
    assert record.exit_code([skip]) == 1  # nothing was checked
    assert record.exit_code([{"part": "checks", "label": "end", "status": "done"}]) == 0  # none was asked for
    assert record.counts([ok, skip, bad]) == "1 passed, 0 close, 1 FAILED, 0 raised, 1 skipped"


def test_best_configuration():
    row = {"part": "tune", "label": "x", "status": "ok", "tuned": "forward D=64"}
    rows = [row | {"milliseconds": t, "config": f"c{t}"} for t in (3.0, 1.0, 2.0)]
    rows.append({"part": "tune", "label": "y", "status": "skip", "why": "too many registers", "tuned": "z"})
    assert {name: best["config"] for name, best in record.best_configs(rows).items()} == {
        "forward D=64": "c1.0"
    }


def test_results_are_whole_after_every_row(tmp_path):
    said: list[str] = []
    results = record.Results(tmp_path / "new", {"rows": ""}, said.append)
    assert results.path is None and not (tmp_path / "new").exists()
    device = {"part": "machine", "label": "device", "status": "ok", "device": "NVIDIA H100 80GB HBM3"}
    results.add(device | {"versions": {"jax": "1"}})
    assert results.path.name.startswith("nvidia-h100-80gb-hbm3-20")
    for label in ("a", "b"):
        results.add({"part": "checks", "label": label, "status": "pass", "seconds": 0.25})
        found = json.loads(results.path.read_text())
        assert found["rows"][-1]["label"] == label and not found["complete"]
    assert found["device"] == "NVIDIA H100 80GB HBM3" and found["versions"] == {"jax": "1"}
    results.write(complete=True)
    assert json.loads(results.path.read_text())["complete"]
    assert said[-1] == "checks    b: pass (0.2 s)"
    assert said[-1] in results.path.with_suffix(".txt").read_text()
    assert sorted(path.suffix for path in results.path.parent.iterdir()) == [".json", ".txt"]


def test_events_are_read_back_by_the_next_worker(tmp_path):
    path = tmp_path / "events"
    events = record.Events(path)
    events.begin("checks", "a", 1.0)
    events.row("checks", "a", "pass")
    for label in "bcde"[: record.DEATHS_PER_PART]:
        record.append_event(
            path, {"row": {"part": "tune", "label": label, "status": "error", "why": "hung", "fatal": True}}
        )
    with open(path, "a") as file:
        file.write('{"row": {"part": "tu')  # the worker died here
    assert [list(event) for event in record.read_events(path)] == [["begin"]] + 5 * [["row"]]
    later = record.Events(path)
    assert later.knows("checks", "a") and not later.knows("checks", "b") and not events.knows("tune", "b")
    assert later.deadly("tune") and not later.deadly("checks")


# --- the watch

_WORKER = """
import os, sys, time
sys.path.append({benchmarks!r})
from pathlib import Path
from gpu.record import Events
jobs, path = int(sys.argv[1]), Path({path!r})
events = Events(path)
def row(label):
    events.row("checks", label, "pass")
{body}
"""


def _watch(tmp_path, body: str, jobs: int = 1, seconds: float = 30.0) -> tuple[int, list[record.Row]]:
    rows: list[record.Row] = []
    path = tmp_path / "events"
    script = _WORKER.format(benchmarks=str(BENCHMARKS), path=str(path), body=body)
    watch = supervise.Watch(
        lambda jobs: [sys.executable, "-S", "-c", script, str(jobs)],
        path,
        time.time() + seconds,
        rows.append,
        jobs=jobs,
        stderr=tmp_path / "stderr",
        grace=0.0,
    )
    return watch.run(), rows


def _found(rows: list[record.Row]) -> list[tuple[str, str]]:
    return [(row["label"], row["status"]) for row in rows]


def test_a_row_that_hangs_costs_itself_alone(tmp_path):
    code, rows = _watch(
        tmp_path,
        """
for label in "abc":
    if not events.knows("checks", label):
        events.begin("checks", label, 0.5)
        if label == "b":
            time.sleep(60)
        row(label)
""",
    )
    assert code == 0 and _found(rows) == [("a", "pass"), ("b", "error"), ("c", "pass")]
    assert rows[1]["why"] == "hung: nothing came for 0 s" and rows[1]["fatal"]


def test_a_row_that_kills_costs_itself_alone(tmp_path):
    body = """
if jobs > 1:
    events.begin("checks", "compiling 2 rows at once", 20, shared=True)
    os._exit(3)
for label in "ab":
    if not events.knows("checks", label):
        events.begin("checks", label, 20)
        if label == "a":
            sys.exit("too bad")
        row(label)
"""
    code, rows = _watch(tmp_path, body, jobs=4)
    assert code == 0 and _found(rows) == [("a", "error"), ("b", "pass")]
    assert rows[0]["why"] == "the process ended with code 1: too bad"


def test_a_worker_that_broke_the_device_is_followed_by_another(tmp_path):
    body = """
if events.knows("checks", "a"):
    row("b")
else:
    events.row("checks", "a", "error", why="illegal address", fatal=True)
    sys.exit(75)
"""
    code, rows = _watch(tmp_path, body)
    assert code == 0 and _found(rows) == [("a", "error"), ("b", "pass")]


def test_the_time_ends_the_worker(tmp_path):
    code, rows = _watch(tmp_path, 'events.begin("checks", "a", 60)\ntime.sleep(60)', seconds=1.0)
    assert code == 0 and _found(rows) == [("a", "skip")] and rows[0]["why"] == supervise.TIME_IS_OVER


def test_no_device(tmp_path):
    assert _watch(tmp_path, "sys.exit(2)") == (supervise.NO_DEVICE, [])


def test_a_worker_that_cannot_start_is_not_tried_again(tmp_path):
    code, rows = _watch(tmp_path, "raise ImportError('no such thing')")
    assert code == 0 and _found(rows) == [("start", "error")]
    assert rows[0]["why"] == "the process ended with code 1: ImportError: no such thing"


# --- checks


@pytest.mark.parametrize("where", ["out", "lse", "key"])
def test_a_second_opinion_forgives_only_what_the_portable_backend_does_too(where):
    case = Case(name="opinion", B=(1,), Sq=9, Skv=11, N=2, K=1, mask="causal", dtype="float16")
    first = AssertionError("off")
    results = jax.device_get(checks.program(case, "xla")(*checks.arguments(case)))
    assert checks._second_opinion(case, results, first) == "AssertionError: off; no worse than xla"
    holder = results["gradients"] if where == "key" else results
    holder[where] = holder[where] * np.float32(1.02).astype(holder[where].dtype)
    with pytest.raises(AssertionError, match=f"off; {where} of xla is off by"):
        checks._second_opinion(case, results, first)


def test_checks_reach_everything_once():
    context = SimpleNamespace(implementation="xla", rehearse=True)
    labels = [job.label for job in checks._jobs(context)]
    assert len(labels) == len(set(labels)) > 250
    for text in (
        "forward-plain-128-bfloat16",
        "edge-2048-float16",
        "nan-lengths-bfloat16",
        "real-bias-float16",
    ):
        assert text in labels
    assert not any("float64" in label for label in labels)


def test_a_refusal_is_the_backend_s_own_reason():
    case = Case(name="refused", mask="causal")
    assert checks.refusal(case, "xla", "cpu", "backward") is None
    assert checks.refusal(case, "ascend", "tpu", "forward") == "runs on ascend, npu only, not on tpu"
    assert checks.refusal(case, "nobody", "cpu", "forward") == "there is no backend 'nobody'"


# --- all of it


def _script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", str(BENCHMARKS / "gpu_attention.py"), *arguments]
    # The eight devices of the tests would only cost time.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a CUDA device")
def test_without_a_cuda_device_it_says_so(tmp_path):
    done = _script("--out", str(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout.startswith("There is no CUDA device here") and done.stdout.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_files_of_results_lack_is_run(tmp_path):
    """All that was not measured, and what failed; the machine is described each time."""
    rows = [{"part": "machine", "label": "device", "status": "ok"}]
    rows += [{"part": "checks", "label": status, "status": status} for status in record.STATUSES]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    events = record.Events(tmp_path / "events", record.settled([tmp_path / "results.json"]))
    known = {row["label"] for row in rows if events.knows(row["part"], row["label"])}
    assert known == {"ok", "pass", "close"}


def test_files_of_results_must_be_there():
    done = _script("--after", "no.json")
    assert done.returncode == 2 and "argument --after: there is no file 'no.json'" in done.stderr


@pytest.mark.slow
def test_rehearsal(tmp_path):
    arguments = ("--checks", "6", "--rounds", "2", "--jobs", "2", "--tune", "--out", str(tmp_path))
    done = _script("--rehearse", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("cpu-*.json")
    assert {file.suffix for file in tmp_path.iterdir()} <= {".json", ".txt", ".err"}
    found = json.loads(path.read_text())
    assert found["complete"] and found["device"] == "cpu" and found["versions"]["jax"]
    by_part = {part: [row for row in found["rows"] if row["part"] == part] for part in work.SHARES}
    for part, rows in by_part.items():
        assert rows[-1]["label"] == "end" and len(rows) > 1, part
        assert not any(row["status"] in ("FAIL", "error") for row in rows)
    checks = [row["status"] for row in by_part["checks"]]
    assert checks.count("pass") == 6 and set(checks) == {"pass", "done"}
    assert [row["direction"] for row in by_part["backward"][:2]] == ["both", "backward"]
    timed = [row for row in found["rows"] if row.get("contestants")]
    assert len(timed) == 2 + 4 + 2 + 1
    for row in timed:
        _check_ratio(row)
    best = record.best_configs(found["rows"])
    assert sorted(best) == [f"forward D=128 Dv=128 {mask}" for mask in ("causal", "full")]
    shown = path.with_suffix(".txt").read_text()
    assert done.stdout.strip() == shown.strip()
    assert "checks: 6 passed, 0 close, 0 FAILED, 0 raised, 0 skipped" in shown
    assert record.table(found["rows"]) in shown


def _check_ratio(row: record.Row) -> None:
    """The ratio is that of the medians of this very row."""
    contestants = row["contestants"]
    assert next(iter(contestants)) == "jax_fa"
    timed = {name: x for name, x in contestants.items() if "milliseconds" in x}
    for name, x in contestants.items():
        assert (name in timed) != bool(x.get("why")), (name, x)
    for x in timed.values():
        assert x["milliseconds"] == pytest.approx(1e3 * np.median(x["samples"]))
    mine = timed.pop("jax_fa")
    if not timed:  # peers of AlphaFold's shape need a GPU
        assert row["ratio"] is None
        return
    best = min(timed, key=lambda name: timed[name]["milliseconds"])
    assert row["best_peer"] == best
    assert row["ratio"] == pytest.approx(timed[best]["milliseconds"] / mine["milliseconds"])
    if "flops" in row:
        assert mine["tflops"] == pytest.approx(row["flops"] / mine["milliseconds"] / 1e9)
        assert timed["jax.nn xla"]["difference"] < 3e-2
