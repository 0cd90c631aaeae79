"""The fuzzer itself: its reference, that it finds a fault and makes it small, and a few seconds of it."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_fa import masks
from jax_fa.backends.xla import tiling
from jax_fa.testing import oracle
from jax_fa.testing.fuzz import __main__ as fuzz
from jax_fa.testing.fuzz import inputs, reference, shrink, worker
from jax_fa.testing.fuzz.campaign import Campaign, Options
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


@pytest.mark.slow
def test_many_programs_draw():
    """Every program can be made into JSON and back, and its inputs drawn."""
    for seed in range(3000):
        program = draw_program(seed, ("cpu", "xla", "ascend"))
        assert Program.from_dict(json.loads(json.dumps(program.as_dict()))) == program
        inputs.draw(program, draw_data(program, 0)).arguments()
        assert inputs.maps_an_array(program)
    assert worker.LEAST >= 1


# What runs have found, made small: each was a bound without an argument, or a fault that is mended.
MISSES: dict[str, tuple[dict, dict]] = {
    "small cotangents of parts, divided by the probability to be kept": (
        dict(backend="ascend", B=(1,), Sq=31, Skv=31, N=3, K=3, D=17, Dv=31, dtype="float16", layout="SBND")
        | dict(mask=("band_right", "dense_B1QK"), joined="any", bias="QK", bias_dtype="float16", sinks="N")
        | dict(dropout="traced", derivative="reverse", seed=202001591),
        dict(seed=45, spread=8.0),
    ),
    "sums over parts of the keys that overflow to both sides": (
        dict(
            backend="cpu", B=(3,), Sq=29, N=15, K=3, D=24, Dv=24, dtype="float16", layout="SBND", cap="traced"
        )
        | dict(mask=("dense_QK", "band_left"), joined="implied", bias="B111", bias_dtype="float16")
        | dict(dropout="known", mapped=("query", "key", "value", "bias", "dropout_key"), mapped_last=True)
        | dict(derivative="second", vmap_outside=False, seed=202001373),
        dict(seed=82, spread=400.0, size=1000.0, infinite_bias=True),
    ),
    "second derivatives of rows whose sink has nearly all of the weight": (
        dict(
            backend="cpu",
            B=(1,),
            Sq=65,
            Skv=65,
            N=10,
            K=2,
            D=2,
            Dv=2,
            layout="SBND",
            mask=("key_lengths", "dense_B1QK"),
            sinks="N",
            scale="traced",
            derivative="second",
            seed=202000562,
        ),
        dict(seed=87, spread=60.0, infinite_bias=True, garbage="inf"),
    ),
    "cotangents of outputs without the sink, rounded": (
        dict(
            backend="cpu",
            B=(),
            Sq=1,
            Skv=13,
            D=64,
            Dv=64,
            dtype="float16",
            layout="NSD",
            mask=("segments_window", "cumulative_self"),
            sinks="BN",
            dropout="known",
            derivative="second",
            max_logits=True,
            seed=202000573,
        ),
        dict(seed=3, spread=8.0),
    ),
    "rows of which one key has nearly all of the weight but the sink's": (
        dict(
            entry="dot_product_attention",
            backend="ascend",
            Sq=17,
            Skv=17,
            N=3,
            K=3,
            D=65,
            Dv=65,
            dtype="bfloat16",
            mask=("dense_QK",),
            bias_dtype="bfloat16",
            sinks="BN",
            scale="known",
            dropout="known",
            derivative="reverse",
            max_logits=True,
            seed=202000698,
        ),
        dict(seed=9, spread=8.0),
    ),
    "tangents that cancel between dropped keys and the sink": (
        dict(
            backend="cpu",
            B=(3,),
            Sq=96,
            Skv=5,
            N=3,
            D=16,
            Dv=16,
            mask=("dense_B1QK", "cumulative"),
            sinks="N",
            cap="known",
            dropout="traced",
            derivative="forward",
            seed=202000810,
        ),
        dict(seed=76, spread=400.0),
    ),
    "second derivatives of dropped keys beside a sink": (
        dict(
            entry="flash_attention_score",
            backend="cpu",
            B=(3,),
            Sq=96,
            N=6,
            K=2,
            D=65,
            Dv=16,
            dtype="bfloat16",
            layout="BSH",
            mask=("sparse_3",),
            bias_dtype="bfloat16",
            sinks="N",
            scale="known",
            dropout="bits",
            derivative="second",
            seed=202000868,
        ),
        dict(seed=50, spread=60.0, size=1000.0),
    ),
    "small gradients of parts on devices": (
        dict(
            backend="cpu",
            B=(),
            Sq=96,
            Skv=6,
            N=6,
            K=3,
            D=65,
            Dv=65,
            dtype="float16",
            layout="NSD",
            mask=("cumulative_window",),
            joined="not all",
            sinks="BN",
            scale="known",
            cap="known",
            derivative="reverse",
            how="sharded",
            seed=404000607,
        ),
        dict(seed=2, spread=400.0, size=0.0001, infinite_bias=True, garbage="-inf", visible_garbage=True),
    ),
    "tangents of cotangents of parts, rounded": (
        dict(
            backend="cpu",
            B=(),
            Sq=97,
            Skv=97,
            K=2,
            D=5,
            Dv=3,
            dtype="float16",
            layout="NSD",
            mask=("cumulative_window",),
            joined="not all",
            sinks="BN",
            derivative="second",
            seed=404000713,
        ),
        dict(seed=11, spread=60.0, size=0.0001, garbage="1e-40"),
    ),
    "small outputs of parts": (
        dict(backend="cpu", Sq=129, Skv=8, N=3, D=80, Dv=5, dtype="float16", scale="traced", dropout="known")
        | dict(derivative="forward", how="sharded", seed=404001184),
        dict(seed=27, spread=8.0, size=0.0001),
    ),
    "outputs of parts, larger than that of all": (
        dict(
            backend="ascend",
            Sq=95,
            Skv=17,
            N=3,
            D=2,
            Dv=16,
            dtype="float16",
            mask=("causal_bottom", "dense_QK", "prefix"),
            joined="implied",
            bias_dtype="float16",
            derivative="reverse",
            seed=404000788,
        ),
        dict(seed=127, spread=8.0),
    ),
    "gradients of parts of the keys that overflow to both sides": (
        dict(backend="cpu", B=(), Sq=8, Skv=8, N=6, K=3, D=130, Dv=130, dtype="float16", bias_dtype="float16")
        | dict(mask=("dense_BNQK", "cumulative_self"), joined="implied", sinks="N", cap="traced")
        | dict(derivative="second", seed=202000253),
        dict(seed=58, spread=60.0, size=1000.0, garbage="3e38"),
    ),
    "both halves of a gradient, each rounded": (
        dict(backend="cpu", B=(), Sq=1, Skv=16, N=1, D=1, Dv=1, dtype="float16", how="doubled")
        | dict(derivative="reverse", seed=404000172),
        dict(seed=4, spread=60.0, size=0.0001),
    ),
    "the gradients of parts of the keys, each rounded": (
        dict(backend="cpu", B=(), Sq=33, Skv=33, K=2, D=32, Dv=32, dtype="float16", layout="SND", bias="B111")
        | dict(mask=("dense_bNQK", "causal_bottom", "dense_1"), joined="not all", scale="traced")
        | dict(derivative="reverse", seed=404000164),
        dict(seed=20, spread=60.0),
    ),
    "the gradients of devices, each rounded": (
        dict(backend="xla", B=(), Sq=64, Skv=64, N=1, D=2, Dv=80, dtype="bfloat16", mask=("prefix",))
        | dict(bias="bNQK", slopes="BN", cap="traced", dropout="known", derivative="reverse", how="sharded")
        | dict(seed=202000334),
        dict(seed=122, spread=60.0, size=1000.0, infinite_bias=True),
    ),
    "small outputs that are divided by the probability to be kept": (
        dict(
            entry="dot_product_attention", backend="ascend", Sq=64, Skv=64, N=1, D=32, Dv=32, dtype="float16"
        )
        | dict(mask=("dense_QK",), known_mask=True, bias="BNQK", bias_dtype="float16", scale="known")
        | dict(dropout="traced", max_logits=True, seed=202000447),
        dict(seed=1),
    ),
    "tangents of parts by the distance of rounded outputs": (
        dict(backend="cpu", B=(), Sq=48, Skv=18, K=2, D=64, Dv=80, dtype="bfloat16", how="sharded")
        | dict(derivative="forward", seed=202000164),
        dict(seed=1, spread=8.0, garbage="inf"),
    ),
    "parts of a gradient that overflow to both sides": (
        dict(backend="xla", B=(2, 2), Sq=3, N=9, K=3, D=17, Dv=3, dtype="float16", layout="BNSD", Skv=5)
        | dict(mask=("cumulative_causal",), slopes="N", sinks="N", cap="traced", dropout="known")
        | dict(derivative="second", mapped=("alibi_slopes", "mask", "dropout_key"), vmap_outside=False)
        | dict(seed=2252000047),
        dict(seed=35, spread=400.0, size=1000.0),
    ),
    "weights rounded before they are divided by the probability to be kept": (
        dict(backend="xla", B=(), Sq=191, Skv=15, N=1, D=1, Dv=1, dtype="float16", dropout="known")
        | dict(seed=2252000071),
        dict(seed=15, spread=8.0),
    ),
    "second derivatives with sinks in 16 bits": (
        dict(backend="cpu", B=(), Skv=5, N=15, K=3, D=3, Dv=3, dtype="float16", layout="SND", sinks="BN")
        | dict(mask=("cumulative_self",), known_mask=True, scale="traced", dropout="traced")
        | dict(derivative="second", mapped=("value", "sinks", "scale", "dropout_key"), seed=2252000256),
        dict(seed=58, size=1000.0),
    ),
    "products below the normal numbers": (
        dict(entry="dot_product_attention", backend="xla", B=(3,), Sq=15, Skv=47, N=1, D=31, Dv=31)
        | dict(bias="1", scale="known", derivative="second", seed=2252000253),
        dict(seed=8, spread=400.0, size=1e-4),
    ),
    "a sink with nearly all of the weight": (
        dict(backend="cpu", B=(2, 2), Sq=3, Skv=3, N=15, K=3, D=65, Dv=65, dtype="bfloat16", slopes="BN")
        | dict(sinks="N", scale="known", derivative="forward", seed=2252000288),
        dict(seed=0, spread=60.0),
    ),
    "the share of a sink in merged parts": (
        dict(
            backend="cpu", Sq=6, Skv=6, K=2, D=1, Dv=1, mask=("dense_QK",), bias="bNQK", slopes="N", sinks="N"
        )
        | dict(derivative="reverse", how="sharded", seed=156000005),
        dict(seed=626, spread=60.0),
    ),
    "a sink whose tangent cancels those of the keys": (
        dict(
            backend="cpu",
            B=(1,),
            Sq=8,
            Skv=8,
            N=9,
            K=3,
            D=15,
            Dv=80,
            dtype="float16",
            layout="SBND",
            bias="BNQ1",
        )
        | dict(mask=("dense_bNQK", "cumulative_window", "window_bottom"), sinks="N", cap="known")
        | dict(derivative="forward", how="sharded", seed=5224000003),
        dict(seed=2, spread=0.01),
    ),
    "a dropped key in merged parts": (
        dict(backend="cpu", B=(3,), Skv=5, D=100, Dv=100, mask=("window",), joined="not all", bias="BNQK")
        | dict(sinks="BN", scale="known", dropout="known", derivative="reverse", seed=5224000010),
        dict(seed=232, spread=60.0),
    ),
    "the cotangent of a part's output, below the normal numbers": (
        dict(backend="cpu", B=(), Sq=14, Skv=129, N=1, D=18, Dv=2, dtype="float16", bias_dtype="float16")
        | dict(mask=("window_bottom",), joined="not all", derivative="reverse", seed=148530000010),
        dict(seed=19, spread=8.0, size=1e-4),
    ),
    "weights of 16 bits times the scale of a value": (
        dict(entry="paged_attention", backend="xla", B=(3,), Sq=3, Skv=16, K=2, D=1, Dv=40, dtype="float16")
        | dict(mask=("pages_16", "key_lengths", "causal_bottom"), pages="int8", page_scales=True)
        | dict(seed=5224000014),
        dict(seed=11, spread=60.0, size=1000.0),
    ),
    "an infinite cotangent of a masked row": (
        dict(entry="flash_attention_score", backend="cpu", B=(1,), Sq=1, Skv=1, N=1, D=1, Dv=1, sinks="N")
        | dict(mask=("sparse_0", "dense_B1QK"), derivative="reverse", how="npu_grad", seed=5222000009),
        dict(seed=1, garbage="-inf"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MISSES)
def test_misses_of_the_past(name, monkeypatch):
    for size, value in worker.SMALL_TILES.items():
        monkeypatch.setattr(tiling, size, value)
    program, data = MISSES[name]
    try:
        with jax.numpy_dtype_promotion("standard"):
            verdict = Runner(Program(**program))(Data(**data))
    except NotImplementedError as error:
        pytest.skip(str(error))
    assert verdict.faults == ()
