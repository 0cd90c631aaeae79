"""The fuzzer itself: its reference, that it finds a fault and makes it small, and a few seconds of it."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from fuzz_misses import MISSES
from mosaic_tools import OLD_JAX, REFUSED, needs_new_jax

from jax_fa import masks
from jax_fa.backends.xla import tiling
from jax_fa.testing import oracle
from jax_fa.testing.fuzz import __main__ as fuzz
from jax_fa.testing.fuzz import inputs, reference, shrink, trial, worker
from jax_fa.testing.fuzz.campaign import Campaign, Options, environment
from jax_fa.testing.fuzz.drawing import draw_program
from jax_fa.testing.fuzz.program import Data, Program, draw_data
from jax_fa.testing.fuzz.trial import Runner

ALL = Program(
    backend="xla",
    B=(2,),
    Sq=5,
    Skv=6,
    N=4,
    K=2,
    D=3,
    Dv=2,
    dtype="float64",
    mask=("dense_BNQK",),
    bias="bNQK",
    bias_dtype="float64",
    slopes="BN",
    sinks="N",
    scale="traced",
    cap="traced",
    derivative="second",
    seed=3,
)


def _computed(given, cotangents, call: reference.Attention) -> reference.Attention:
    new = reference.Attention(
        batch=call.batch,
        given=given,
        scale=call.scale,
        visible=call.visible,
        distance=call.distance,
        cap=call.cap,
        eps=call.eps,
        cotangents=cotangents,
    )
    new.compute()
    return new


def test_the_reference_against_differences():
    """All of its derivatives are those of its own output; and that is the one of the other oracle."""
    call = inputs.draw(ALL, Data(seed=1)).reference(None)
    x = call.given
    other = oracle.attention(
        *(x[name] for name in ("query", "key", "value")),
        bias=x["bias"],
        slopes=x["alibi_slopes"],
        sinks=x["sinks"],
        visible=call.visible,
        scale=float(x["scale"]),
        soft_cap=float(x["logits_soft_cap"]),
    )
    np.testing.assert_allclose(call.results["out"].value, other.out, rtol=1e-12)
    np.testing.assert_allclose(call.results["lse"].value, other.lse, rtol=1e-12)
    for name, gradient in other.gradients(*call.cotangents).items():
        np.testing.assert_allclose(call.results[f"d{name}"].value, gradient, rtol=1e-9, atol=1e-12)
    h = 1e-6
    there, back = (
        _computed(
            {name: a + sign * h * call.tangents[name] for name, a in x.items()},
            tuple(a + sign * h * b for a, b in zip(call.cotangents, call.cotangent_tangents, strict=True)),
            call,
        )
        for sign in (1, -1)
    )
    for name, number in call.results.items():
        if number.tangent is not None:
            slope = (there.results[name].value - back.results[name].value) / (2 * h)
            scale = np.abs(slope).max()
            np.testing.assert_allclose(
                np.broadcast_to(number.tangent.value, slope.shape), slope, atol=1e-7 * scale, err_msg=name
            )


def test_a_fault_is_found_and_made_small(monkeypatch):
    """A causal mask that is off by one key: what is left is that mask, and next to nothing else."""
    rows = masks.Band.rows

    def wrong(self, at, skv):
        lower, upper = rows(self, at, skv)
        return lower, upper if upper is None or self.align == "top-left" else upper + 1

    monkeypatch.setattr(masks.Band, "rows", wrong)
    program = dataclasses.replace(
        ALL, dtype="float32", Sq=9, Skv=9, mask=("key_lengths", "causal_bottom"), slopes=None
    )
    data = draw_data(program, 0)
    with jax.numpy_dtype_promotion("standard"):
        faults = Runner(program)(data).faults
        assert "out" in {fault.result for fault in faults}
        small, _ = shrink.shrunk(program, data, shrink.fails_alike("out"), seconds=60.0)
    assert small.mask == ("causal_bottom",) and small.derivative == "none"
    assert small.operands == ("query", "key", "value") and max(small.Sq, small.Skv, small.N, small.D) <= 2


@pytest.mark.parametrize("crash", [False, True], ids=["clean", "crash"])
def test_a_run(crash, tmp_path, capsys, monkeypatch):
    """It says what it did, goes on where it stopped, and outlives a program that ends its process."""
    out = tmp_path / "found.jsonl"
    options = [
        "--seed",
        "5",
        "--backends",
        "xla",
        "--draws",
        "2",
        "--out",
        str(out),
        "--count",
        "4",
        "--shrink",
        "0",
    ]
    if crash:
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        broken = "import os; os._exit(7)"
        monkeypatch.setattr(sys, "executable", _broken_python(tmp_path, broken))
        options[options.index("--count")] = "--time"
    code = fuzz.main(options)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == int(crash) and "seed 5" in capsys.readouterr().out
    if crash:
        assert lines[0]["failure"] == "process" and "replay_seed" in lines[0]["script"]
        return
    first = lines[-1]["state"]
    assert first["calls"] >= 4
    assert fuzz.main([*options, "--resume", "--count", str(first["calls"] + 1)]) == 0
    second = json.loads(out.read_text().splitlines()[-1])["state"]
    assert second["rounds"] == first["rounds"] + 1 and second["calls"] > first["calls"]


@pytest.mark.parametrize("option, known", [("--backends", "xla"), ("--isa", "")])
def test_unknown_names(option, known, capsys):
    with pytest.raises(SystemExit) as stopped:
        fuzz.main([option, f"{known},tpu"])
    assert stopped.value.code == 2
    assert (
        f"error: {option} must hold names among " in (told := capsys.readouterr().err) and "; got tpu" in told
    )


INF = float("inf")


@pytest.mark.parametrize(
    "ratio, most, near",
    [
        (1.5, 2.0, True),
        (2.5, 2.0, False),
        (INF, 2.0, False),
        (None, 2.0, False),
        (INF, INF, True),
        (None, INF, False),
    ],
)
def test_near_misses_are_no_failures(ratio, most, near, tmp_path, capsys):
    """... where they are asked to be none; they are told and written all the same. (Of a process that ends there is no ratio.)"""
    out = tmp_path / "found.jsonl"
    run = Campaign(Options(seed=0, near=most, out=out))
    line = {"failure": 3, "result": "out", "text": "is 1, expected 2"}
    run._note(line | ({} if ratio is None else {"ratio": ratio}), {}, run._given(0, (0, 1)))
    assert (run.totals.near, run.totals.failures) == (int(near), int(not near))
    written = json.loads(out.read_text())
    assert written["near" if near else "failure"] == "out" and written["script"]
    assert ("NEAR MISS" if near else "FAILURE") in capsys.readouterr().out


def _broken_python(directory, code: str) -> str:
    path = directory / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    path.chmod(0o755)
    return str(path)


def test_a_script_reproduces(tmp_path):
    """The text of a failure is a program that ends with 1 where the failure is still there, and 0 where it is not."""
    from jax_fa.testing.fuzz import script

    program = Program(backend="xla", mask=("causal",)).as_dict()
    text = script.reproducing({"JAX_PLATFORMS": "cpu"}, True, program, Data(seed=2).as_dict(), 0, ("xla",))
    path = tmp_path / "again.py"
    path.write_text(f"import sys\nsys.path[:] = {sys.path}\n{text}")
    done = subprocess.run([sys.executable, "-P", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mask, has", [("causal_bottom", False), ("dense_QK", True), ("key_lengths", True)])
def test_vmap_maps_an_array(mask, has):
    program = Program(backend="xla", mask=(mask,), mapped=("mask",))
    assert inputs.maps_an_array(program) is has


@needs_new_jax
def test_kernels_for_gpus_are_interpreted():
    """Whatever the backend, one Runner; a race is an error."""
    program = Program(backend="mosaic", dtype="bfloat16", B=(), mask=("causal",), cap="known")
    with jax.numpy_dtype_promotion("standard"):
        verdict = Runner(program)(Data(seed=1))
    assert verdict.faults == () and "out" in verdict.worst
    with pytest.raises(RuntimeError, match="RACE DETECTED"), trial._interpreting():
        print("RACE DETECTED")
    assert environment(Options(seed=0, backends=("mosaic",)), 0)["NPROC"] == "16"  # or they wait for ever
    drawn = [draw_program(seed, ("mosaic",)) for seed in range(50)]
    assert {p.dtype for p in drawn if p.entry == "flash_attention"} == {"bfloat16", "float16"}


@pytest.mark.slow
def test_many_programs_draw():
    """Every program can be made into JSON and back, and its inputs drawn."""
    for seed in range(3000):
        program = draw_program(seed, ("cpu", "xla", "ascend"))
        assert Program.from_dict(json.loads(json.dumps(program.as_dict()))) == program
        inputs.draw(program, draw_data(program, 0)).arguments()
        assert inputs.maps_an_array(program)
    assert worker.LEAST >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MISSES)
def test_misses_of_the_past(name, monkeypatch):
    for size, value in worker.SMALL_TILES.items():
        monkeypatch.setattr(tiling, size, value)
    program, data = MISSES[name]
    if OLD_JAX and program["backend"] == "mosaic":
        pytest.skip(REFUSED)
    try:
        with jax.numpy_dtype_promotion("standard"):
            verdict = Runner(Program(**program))(Data(**data))
    except NotImplementedError as error:
        pytest.skip(str(error))
    assert verdict.faults == ()
