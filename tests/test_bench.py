"""`python -m jax_fa.bench`: what it measures, what it refuses, and what it writes."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jax_fa import bench
from jax_fa.bench import implementations, measure, record, report, shapes
from jax_fa.bench.measure import Result
from jax_fa.demo import program

TINY = ["--shapes", "B2-S24-N2-K1-D8", "--mask", "causal", "--rounds", "2"]


def _call(text="S16-N1-D4", mask="full", dtype="float32", direction="forward") -> shapes.Workload:
    return shapes.Workload(shape=shapes.parse_shape(text), mask=mask, dtype=dtype, direction=direction)


def _program(value: float, ran: list[str] | None = None, name: str = "") -> implementations.Program:
    def run():
        if ran is not None:
            ran.append(name)
        return value

    return implementations.Program(run=run, arrays=lambda x: [np.full(3, x, np.float32)], temp_bytes=7)


# --- shapes


@pytest.mark.parametrize(
    ("text", "sizes", "short"),
    [
        ("S64-N4-D32", (1, 64, 64, 4, 4, 32, 32), "B1-S64-N4-D32"),
        ("B2-S64-N4-K2-D32-Dv16", (2, 64, 64, 4, 2, 32, 16), "B2-S64-N4-K2-D32-Dv16"),
        ("D8-N2-Skv5-Sq1", (1, 1, 5, 2, 2, 8, 8), "B1-Sq1-Skv5-N2-D8"),
    ],
)
def test_shapes_are_read_and_written(text, sizes, short):
    shape = shapes.parse_shape(text)
    assert (shape.B, shape.Sq, shape.Skv, shape.N, shape.K, shape.D, shape.Dv) == sizes
    assert str(shape) == short and shapes.parse_shape(short) == shape


@pytest.mark.parametrize("mask", ["full", "causal", "window:1", "window:5", "window:99"])
@pytest.mark.parametrize(("Sq", "Skv"), [(1, 1), (7, 7), (3, 9), (9, 3)])
@pytest.mark.parametrize("direction", shapes.DIRECTIONS)
def test_flops_are_those_of_the_visible_pairs(mask, Sq, Skv, direction):
    text = f"B2-Sq{Sq}-Skv{Skv}-N4-K2-D8-Dv6"
    if mask.startswith("window") and Sq > Skv:
        with pytest.raises(ValueError, match="a window needs Sq <= Skv"):
            _call(text, mask, direction=direction)
        return
    i, j = np.arange(Sq)[:, None], np.arange(Skv)
    width = int(mask.partition(":")[2] or 10**6)
    visible = (mask == "full") | ((j <= i) & (j > i - width))
    products = {"forward": 2, "backward": 5, "both": 7, "jvp": 6, "hvp": 17, "double-backward": 12}
    times = products[direction] / 2
    call = _call(text, mask, direction=direction)
    assert call.flops == 2 * 4 * np.sum(visible) * 2 * (8 + 6) * times


# --- the command


@pytest.mark.one_in(3)
@pytest.mark.parametrize("direction", shapes.DIRECTIONS)
@pytest.mark.parametrize("dtype", shapes.DTYPES)
def test_it_measures_all_that_is_here_and_they_agree(direction, dtype, capsys):
    assert bench.main([*TINY, "--direction", direction, "--dtype", dtype]) == bench.OK
    shown = capsys.readouterr().out
    assert "jax_fa" in shown and "cores" in shown and shown.rstrip().endswith("the same values.")
    lines = [line.split() for line in shown.splitlines() if line.startswith("  ")]
    assert [line[0] for line in lines] == list(implementations.present())
    served = [line for line in lines if "not" not in line]
    assert len(served) >= 2 and all("GFLOP/s" in line for line in served)
    # jax.nn refuses float16 under jit on CPU, and there are no derivatives along tangents of torch: each says so.
    refuses = {"jax.nn": dtype == "float16", "torch": direction in ("jvp", "hvp", "double-backward")}
    refused = [line[0] for line in lines if "not" in line]
    assert refused == [name for name in implementations.present() if refuses.get(name, False)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "S64"], "a shape must give S (or Sq and Skv), N and D, once each; got 'S64'"),
        (["--shapes", "S64-Sq3-N1-D8"], "once each; got 'S64-Sq3-N1-D8'"),
        (["--shapes", "S0-N1-D8"], "where 'S0' does not fit"),
        (["--shapes", "S8-N1-N2-D8"], "where 'N2' does not fit"),
        (["--shapes", "S8-N3-K2-D8"], "N must be a multiple of K; got N=3, K=2"),
        (["--mask", "full,band"], "a mask must be full, causal or window:W"),
        (["--mask", "window:0"], "a mask must be full, causal or window:W"),
        (["--shapes", "Sq9-Skv3-N1-D8", "--mask", "window:2"], "a window needs Sq <= Skv; got B1-Sq9-Skv3"),
        (["--dtype", "int8"], "must be among float32, bfloat16, float16; got 'int8'"),
        (
            ["--direction", "sideways"],
            "must be among forward, backward, both, jvp, hvp, double-backward; got 'sideways'",
        ),
        (["--implementations", "nobody"], "--implementations must be among "),
        (["--implementations", "jax.nn cudnn"], "--implementations: jax.nn cudnn is not here"),
        (["--rounds", "0"], "must be a positive integer; got '0'"),
        (["--json", "/no/such/directory/x.json"], "/no/such/directory must be a directory"),
        (["--json", "/"], "/ must be a file to write, and is a directory"),
        (["--compare", "a.json", "--json", "b.json"], "--compare measures nothing, so it takes no --json"),
        (["--compare", "a.json", "--plot", "b.png"], "--compare measures nothing, so it takes no --json"),
        (["--compare", "/no/such/file"], "/no/such/file must be a file that --json wrote"),
    ],
)
def test_bad_arguments_give_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(arguments)
    assert exit.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_list(capsys):
    assert bench.main(["--list"]) == bench.OK
    listed = capsys.readouterr().out.split()
    assert listed == list(shapes.DEFAULT) and all(map(shapes.parse_shape, listed))


def test_wrong_numbers_give_1(monkeypatch, capsys):
    found = {"good": lambda call: _program(1.0), "bad": lambda call: _program(1.1)}
    monkeypatch.setattr(implementations, "present", lambda: found)
    assert bench.main([*TINY, "--direction", "forward"]) == bench.MISS
    assert "MISS: bad differs by 1.0e-01 (relative L2) in B2-S24-N2-K1-D8" in capsys.readouterr().out


@pytest.mark.parametrize(("value", "agrees"), [(1.0, True), (1.0005, True), (1.01, False), (np.nan, False)])
def test_what_counts_as_the_same_numbers(value, agrees):
    programs = {"a": lambda call: _program(1.0), "b": lambda call: _program(value)}
    first, second = measure.measure(_call(), programs, rounds=1)
    assert first.agrees and second.agrees == agrees


@pytest.mark.parametrize("size", [8, 2000])  # served by one implementation, and by none
def test_nothing_compared_is_not_called_agreement(size, capsys):
    arguments = ["--shapes", f"S8-N1-D{size}", "--mask", "full", "--direction", "forward", "--rounds", "1"]
    name = next(iter(implementations.present()))
    assert bench.main([*arguments, "--implementations", name]) == bench.OK
    shown = capsys.readouterr().out
    assert "Values were not compared" in shown and "OK" not in shown


# --- measuring


def test_implementations_take_turns_in_both_orders():
    ran: list[str] = []
    programs = {name: (lambda call, name=name: _program(1.0, ran, name)) for name in "abc"}
    steps: list[None] = []
    results = measure.measure(_call(), programs, rounds=3, progress=lambda: steps.append(None))
    assert "".join(ran) == "abc" + "abc" + "cba" + "abc"  # the first turn is not timed
    assert [len(result.seconds) for result in results] == [3, 3, 3]
    assert len(steps) == 3 + 3


def test_one_that_refuses_leaves_the_others():
    def refuses(call):
        raise implementations.RefusedError("not today")

    programs = {"a": refuses, "b": lambda call: _program(1.0)}
    a, b = measure.measure(_call(), programs, rounds=2)
    assert a.refused == "not today" and a.seconds == [] and a.agrees
    assert b.refused is None and b.temp_bytes == 7


@pytest.mark.parametrize("fails_when", ["prepared", "called"])
def test_what_another_library_raises_is_its_refusal(fails_when):
    def fails():
        raise RuntimeError("out of memory\nand a long story")

    def prepare():
        return implementations.Program(run=fails, arrays=lambda x: [], temp_bytes=None)

    with pytest.raises(implementations.RefusedError, match=r"^RuntimeError: out of memory$"):
        implementations._tried(fails if fails_when == "prepared" else prepare)


# --- files


def _results(call=None) -> list[Result]:
    call = call or _call()
    return [
        Result(implementation="ours", call=call, seconds=[0.5, 0.25, 0.75], temp_bytes=4),
        Result(implementation="theirs", call=call, seconds=[1.0, 1.0, 1.0], difference=1e-6),
        Result(implementation="absent", call=call, refused="why not"),
    ]


def test_a_file_holds_the_run(tmp_path, capsys):
    path = tmp_path / "run.json"
    assert bench.main([*TINY, "--direction", "forward", "--json", str(path)]) == bench.OK
    run = record.read(path)
    assert {result.implementation for result in run.results} == set(implementations.present())
    assert all(len(result.seconds) == 2 for result in run.results if result.refused is None)
    assert run.environment["jax_fa"] == bench.record.jax_fa.__version__ and run.environment["cores"] >= 1
    assert json.loads(path.read_text())["schema"] == record.SCHEMA
    shown = capsys.readouterr().out
    assert run.id in shown
    assert bench.main(["--compare", str(path)]) == bench.OK
    again = capsys.readouterr().out
    assert [x for x in again.splitlines() if "GFLOP/s" in x] == [
        x for x in shown.splitlines() if "GFLOP/s" in x
    ]
    assert report.NO_RATIOS not in again


def test_no_ratios_between_runs(tmp_path, capsys):
    runs = [record.new_run(_results()) for _ in range(2)]
    paths = [str(tmp_path / f"{i}.json") for i in range(2)]
    for run, path in zip(runs, paths, strict=True):
        record.write(run, type(tmp_path)(path))
    assert bench.main(["--compare", *paths]) == bench.OK
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith(report.NO_RATIOS)
    assert shown.count("2.00x the time of ours") == 2  # inside each
    assert bench.main(["--compare", paths[0], paths[0]]) == bench.OK
    assert report.NO_RATIOS not in capsys.readouterr().out  # one run, shown twice


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 2, "rows": [{}]}'])
def test_a_file_of_others_is_refused(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="must be a file that --json wrote"):
        record.read(path)


def test_a_file_grows_with_the_rows(tmp_path, monkeypatch):
    """Whatever ends the program, the rows before it are in the file; and nothing else is left beside it."""
    path = tmp_path / "run.json"
    measured = measure.measure
    arguments = [*TINY, "--direction", "forward,backward", "--json", str(path)]

    def stop(call, *rest):
        if path.exists():
            raise KeyboardInterrupt
        return measured(call, *rest)

    monkeypatch.setattr(measure, "measure", stop)
    assert program.run(lambda: bench.main(arguments)) == program.INTERRUPTED
    run = record.read(path)
    assert not run.complete and {result.call.direction for result in run.results} == {"forward"}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_stopped_run_says_so(capsys):
    report.compare([replace(record.new_run(_results()), complete=False)])
    assert "This run was stopped before its end." in capsys.readouterr().out


def test_a_file_that_cannot_be_written_loses_no_verdict(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(program, "write", full)
    arguments = [*TINY, "--direction", "forward", "--json", str(tmp_path / "run.json")]
    assert bench.main(arguments) == program.UNWRITTEN
    shown = capsys.readouterr()
    assert shown.out.rstrip().endswith("the same values.")
    assert "run.json was not written: no space left" in shown.err


def test_a_file_is_whole_at_any_time(tmp_path):
    path = tmp_path / "x.json"
    program.write(path, "old")
    link = tmp_path / "link"
    link.symlink_to(path)
    program.write(link, "new")
    assert path.read_text() == "new" and link.is_symlink()
    with pytest.raises(UnicodeEncodeError):
        program.write(path, "\ud800")
    assert path.read_text() == "new" and sorted(x.name for x in tmp_path.iterdir()) == ["link", "x.json"]
    program.write(Path(os.devnull), "to a device")


@contextmanager
def _started(module: str) -> Iterator[subprocess.Popen[str]]:
    """The program in a process of its own, which has written a line."""
    with subprocess.Popen(
        [sys.executable, "-P", "-m", module, "--quick"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        yield process


@pytest.mark.parametrize("module", ["jax_fa", "jax_fa.bench"])
def test_output_that_nobody_reads_ends_the_program(module):
    """`| head` closes the pipe: no traceback."""
    with _started(module) as process:
        process.stdout.close()
        assert process.wait(timeout=120) == program.NOBODY_READS
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("module", ["jax_fa", "jax_fa.bench"])
def test_an_interrupted_program_ends_without_a_traceback(module):
    with _started(module) as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert process.returncode == program.INTERRUPTED
    assert "Traceback" not in error and error.rstrip().endswith("interrupted")


# --- what is printed and drawn


def test_the_table(capsys):
    report.rows(_results())
    title, ours, theirs, absent = (line.strip() for line in capsys.readouterr().out.strip().split("\n"))
    assert title == "B1-S16-N1-D4 full float32 forward"
    assert (
        ours.split()[:5] == ["ours", "500.000", "ms", "±", "25%"]
        and "0.0 MiB" in ours
        and "x the" not in ours
    )
    assert theirs.endswith("2.00x the time of ours") and "unknown" in theirs
    assert absent == "absent        not served: why not"


def test_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results = [r for length in (16, 32) for r in _results(_call(f"S{length}-N1-D4"))]
    results.append(replace(results[0], call=_call(mask="causal")))  # a panel with a single point
    path = tmp_path / "times.png"
    report.plot(path, record.new_run(results))
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("keys", "times", "slope"),
    [((2, 4, 8), (4.0, 16.0, 64.0), ", slope 2.00"), ((2, 2), (1.0, 3.0), ""), ((5,), (1.0,), "")],
)
def test_slopes(keys, times, slope):
    assert report._slope(keys, times) == slope


def test_without_matplotlib_a_plot_is_refused(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "matplotlib" else find(n, *a))
    with pytest.raises(SystemExit) as exit:
        bench.main([*TINY, "--plot", "x.png"])
    assert exit.value.code == 2
    assert "--plot needs matplotlib: python -m pip install matplotlib" in capsys.readouterr().err


def test_a_plot_of_an_unknown_format_is_refused_before_measuring(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as exit:
        bench.main([*TINY, "--plot", str(tmp_path / "x.nonsense")])
    assert exit.value.code == 2
    shown = capsys.readouterr()
    assert "--plot must end in one of" in shown.err and shown.out == ""


def test_without_tqdm_nothing_shows_progress(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with report.progress(2) as (step, beside_bar), beside_bar():
        step()
    assert capsys.readouterr() == ("", "")


def test_rows_do_not_leave_a_bar_behind(monkeypatch):
    """What is printed starts on a line that the bar was wiped from."""
    pytest.importorskip("tqdm")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    with report.progress(2) as (step, beside_bar):
        step()
        with beside_bar():
            print("a row")
    before = terminal.getvalue().partition("a row")[0]
    assert "0/2" in before
    assert before.endswith("\r") and before.rstrip("\r").rpartition("\r")[2].strip() == ""


def test_files_of_the_first_schema_are_read(tmp_path, capsys):
    """Which named implementations otherwise."""
    path = tmp_path / "found.json"
    assert bench.main([*TINY, "--json", str(path)]) == bench.OK
    found = json.loads(path.read_text())
    rows = [
        {("contestant" if k == "implementation" else k): v for k, v in row.items()} for row in found["rows"]
    ]
    path.write_text(json.dumps(found | {"schema": 1, "rows": rows}))
    assert [r.implementation for r in record.read(path).results] == [row["contestant"] for row in rows]
