"""`python -m jax_fa.demo.sharded`: a model trained on a mesh, in one process and in several, has the losses of one device."""

import os
import re
import subprocess
import sys

import pytest

SHORT = ["--seq-len", "64", "--steps", "2"]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: text for name, text in os.environ.items() if name != "NPROC"}
    command = [sys.executable, "-P", "-m", "jax_fa.demo.sharded", *SHORT, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize(
    ("arguments", "mesh"),
    [
        pytest.param(
            "--order zigzag",
            "1 processes, 4 devices: data 1, heads 1, sequence 4; ring, zigzag",
            marks=pytest.mark.slow,
        ),
        (
            "--processes 2 --devices 4 --data 2 --heads 2",
            "2 processes, 8 devices: data 2, heads 2, sequence 2; ring, contiguous",
        ),
        pytest.param(
            "--processes 4 --devices 1 --order zigzag",
            "4 processes, 4 devices: data 1, heads 1, sequence 4; ring, zigzag",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--strategy ulysses --devices 2",
            "1 processes, 2 devices: data 1, heads 1, sequence 2; ulysses, contiguous",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_losses_are_those_of_one_device(arguments, mesh):
    done = _run(*arguments.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert mesh in done.stdout
    losses = re.findall(r"loss ([\d.]+) sharded, ([\d.]+) on one device", done.stdout)
    assert len(losses) == 2
    for sharded, alone in losses:
        assert abs(float(sharded) - float(alone)) < 2e-5
    assert losses[0] != losses[1]  # it learns


def test_a_mesh_that_does_not_fit():
    done = _run("--data", "3")
    assert done.returncode == 2
    assert "--data times --heads must divide the 4 devices of 1 processes; got 3 and 1" in done.stderr
