"""`python -m jax_fa`: its checks, its training, its arguments and exit codes."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa import demo
from jax_fa.backends import native
from jax_fa.demo import baseline, checks, comparison, gpt, program

BEST = "cpu" if native.missing is None else "xla"
TINY = ["--quick", "--steps", "3", "--seq-len", "96"]


@pytest.fixture(autouse=True)
def standard_promotion():
    """jax.nn mixes 16-bit dtypes with float32 itself, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def one_case(monkeypatch):
    """The quick table cut down to its first case."""
    monkeypatch.setattr(checks, "QUICK_CASES", checks.QUICK_CASES[:1])


def _wrong(attention, factor=1.1):
    """An attention whose output is off by a factor."""

    def call(*args, **kwargs):
        result = attention(*args, **kwargs)
        return jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), result)

    return call


def test_versions(capsys):
    assert demo.main(["--versions"]) == 0
    text = capsys.readouterr().out
    tuning = "none" if native.missing is not None else native.extension.cpu_tuning()
    assert f"jax_fa {jax_fa.__version__}, " in text and text.endswith(f"CPU kernels: {tuning}\n")
    assert "Backends" not in text


@pytest.mark.parametrize(
    "case",
    [
        checks.Case(name="bias and mask", Sq=40, Skv=50, bias=(4, 1, 50), mask=(2, 1, 1, 50)),
        checks.Case(
            name="everything else",
            dtype="bfloat16",
            Sq=40,
            Skv=50,
            K=2,
            query_seq_lengths=(40, 11),
            key_value_seq_lengths=(50, 9),
            static={"is_causal": True, "local_window_size": (30, 5), "scale": 0.2},
        ),
        checks.Case(name="float16", dtype="float16", Sq=40, Skv=50, K=1),
    ],
    ids=lambda case: case.name,
)
def test_a_case_that_is_right(case):
    result = checks.check(case, jax_fa.dot_product_attention)
    assert result.ok and result.refused is None
    assert all(0 < error < 0.02 for error in (*result.ours, *result.jax_nn))


def test_a_case_that_is_wrong():
    result = checks.check(checks.Case(name="wrong", Sq=20, Skv=20), _wrong(baseline.attention))
    assert not result.ok


def test_a_case_that_is_not_served():
    def refuse(*args, **kwargs):
        raise NotImplementedError("only on Sundays")

    result = checks.check(checks.Case(name="refused", Sq=20, Skv=20), refuse)
    assert result.ok and result.ours is None and result.refused == "only on Sundays"


def test_nan_is_a_miss():
    bad = checks.Errors(float("nan"), 0.0, 0.0)
    good = checks.Errors(1.0, 1.0, 1.0)
    assert not checks.Result(case=checks.Case(name=""), ours=bad, jax_nn=good).ok
    assert not comparison.Agreement(float("nan"), 1.0).ok


def test_cases_have_names_of_their_own():
    labels = [(case.name, case.dtype) for case in checks.CASES]
    assert len(set(labels)) == len(labels)


def test_training_end_to_end(one_case, capsys):
    assert demo.main(TINY) == 0
    out = capsys.readouterr().out
    assert f"jax_fa {jax_fa.__version__}, Python" in out
    assert re.search(rf"cpu +{BEST}", out)
    assert "step    3  loss: jax_fa" in out
    assert "temporary memory of a step" in out
    assert out.splitlines()[-1].startswith("OK: 1 of 1 cases right, losses agree; a step takes ")


def test_a_wrong_case_gives_1(one_case, capsys, monkeypatch):
    real = jax_fa.dot_product_attention

    def wrong_with_residual(*args, return_residual=False, **kwargs):  # in the checks, not in the training
        call = _wrong(real) if return_residual else real
        return call(*args, return_residual=return_residual, **kwargs)

    monkeypatch.setattr(jax_fa, "dot_product_attention", wrong_with_residual)
    assert demo.main(TINY) == 1
    out = capsys.readouterr().out
    assert "  MISS\n" in out
    assert out.splitlines()[-1].startswith("MISS: 0 of 1 cases right, losses agree; ")


def test_losses_that_differ_give_1(one_case, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "TOLERANCE", {"float32": -1.0})
    assert demo.main(TINY) == 1
    out = capsys.readouterr().out
    assert "MISS: curves differ" in out
    assert out.splitlines()[-1].startswith("MISS: 1 of 1 cases right, losses DIFFER; ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: must be a positive integer; got '0'"),
        (["--batch", "two"], "argument --batch: must be a positive integer; got 'two'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--seq-len", "100000000"], "seq_len must be less than the text's"),
        (
            ["--implementation", "nope"],
            "implementation must be None or one of 'cpu', 'mosaic', 'ascend', 'xla'",
        ),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_arguments_give_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        demo.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_plot_without_matplotlib_gives_2(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as exit:
        demo.main(["--plot", "x.png"])
    assert exit.value.code == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/directory/a.png", "/no/such/directory must be a directory, to write a.png into"),
        ("/", "/ must be a file to write, and is a directory"),
        ("x.nonsense", "--plot must end in one of"),
    ],
)
def test_a_plot_that_could_not_be_written_gives_2_before_any_work(path, message, capsys):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as exit:
        demo.main([*TINY, "--plot", path])
    assert exit.value.code == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""


def test_a_plot_that_fails_loses_no_verdict(one_case, capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(demo.report, "plot", full)
    path = tmp_path / "a.png"
    assert demo.main([*TINY, "--plot", str(path)]) == program.UNWRITTEN
    shown = capsys.readouterr()
    assert f"--plot {path} was not written: no space left" in shown.err
    assert shown.out.splitlines()[-1].startswith("OK: 1 of 1 cases right, losses agree; ")


def test_help_tells_the_exit_codes():
    """In a process of its own: the module starts, and asks nothing of the device."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "jax_fa", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    assert (
        "Exit codes: 0 all values agree, 1 some do not, 2 bad arguments, 3 the plot could not be written."
        in done.stdout
    )


def test_progress_on_a_terminal_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run = comparison.Run(step_bytes=None, attention_bytes=None, compile_seconds=1.0, losses=[2.5])
    update = demo.report.progress(2)
    update(1, {"a": run})
    update(2, {"a": run})
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\r") == 2 and err.count("\n") == 1
    assert "2/2  loss: a 2.5000" in err


def test_batches_and_parameters_are_the_same_every_time():
    config = gpt.Config(seq_len=32, steps=2)
    first, again = ([batch.tolist() for batch in gpt.batches(config)] for _ in range(2))
    assert first == again and first[0] != first[1]
    assert np.shape(first) == (2, config.batch, 33)
    assert jax.tree.all(jax.tree.map(np.array_equal, gpt.init(config), gpt.init(config)))
