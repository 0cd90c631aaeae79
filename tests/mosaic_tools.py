"""What the tests of the Mosaic GPU backend share: Pallas' interpreter, lowering for absent GPUs, spreads of options."""

import itertools
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pytest
from jax import export

from jax_fa import api, backends
from jax_fa.testing.cases import Case

OLD_JAX = jax.__version_info__[:2] < (0, 11)
REFUSED = (
    f"needs jax 0.11 or newer, which needs Python 3.12 or newer; this is jax {jax.__version__} on Python "
    f"{platform.python_version()}"
)
needs_new_jax = pytest.mark.skipif(OLD_JAX, reason=REFUSED)
TARGET = "mosaic_gpu_v2"  # the custom call that a kernel becomes


# --- Pallas' interpreter


@contextmanager
def interpreter() -> Iterator[None]:
    """Kernels run on CPU here, with a race detector; what a failed one leaves behind is cleared."""
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
    from jax.experimental.pallas import mosaic_gpu as plgpu

    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
    finally:
        reset_gpu_interpret_mode_state()


# --- GPUs that are not there


@contextmanager
def gpu(kind: str | None = "NVIDIA H200") -> Iterator[None]:
    """What is lowered here is lowered for a GPU of this name; None: for one that is not known."""
    if kind is None:
        yield
        return
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


def lowered(fn, *args, kind: str | None = "NVIDIA H200", platforms: Sequence[str] = ("cuda",)):
    """The program that `jax.export` makes of a call; its arguments may be avals."""
    with gpu(kind):
        return export.export(jax.jit(fn), platforms=tuple(platforms))(*args)


def operations(text: str) -> Iterator[tuple[str, int]]:
    """Every operation of a StableHLO module, with the number of elements of the largest array that it touches."""
    for line in text.splitlines():
        if found := re.search(r"= \"?stablehlo\.(\w+)", line):
            shapes = re.findall(r"tensor<((?:\d+x)*)\w+>", line)
            yield (
                found[1],
                max((int(np.prod([int(n) for n in s.split("x")[:-1]])) for s in shapes), default=0),
            )


# --- what the backend says of a case


def request(case: Case, operands: dict[str, Any] | None = None):
    """The (problem, operands) of a case, of these operands or its own."""
    return api.flash_attention_request(
        **case.stored_operands() if operands is None else operands,
        **case.arrays(),
        scale=case.scale,
        logits_soft_cap=case.soft_cap,
        dropout_rate=case.dropout,
        layout=case.layout,
        implementation="mosaic",
    )


def why_not(case: Case, backward: bool = False) -> str | None:
    """What the backend has against a case in the interpreter."""
    problems = []

    def operands(x):
        problem, found = request(case, x)
        problems.append(problem)
        return found

    with interpreter():
        avals = jax.eval_shape(operands, case.stored_operands())
        return backends.reasons("cpu", problems[0], avals, backward)["mosaic"]


# --- spreads


def pairwise(options: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows, one value of each option, in which every two values of two options meet; the same at every call.

    Greedy: a row starts with a pair that is missing yet and goes on with what adds most new pairs, so that the first
    rows have the most of them (`spanning` counts those that hold every value).
    """
    random = np.random.default_rng(0)
    names = list(options)
    missing = {
        ((a, i), (b, j)): None
        for a, b in itertools.combinations(names, 2)
        for i in range(len(options[a]))
        for j in range(len(options[b]))
    }
    uses = {(name, i): 0 for name in names for i in range(len(options[name]))}
    rows = []

    def pair(one, other):
        return (one, other) if names.index(one[0]) < names.index(other[0]) else (other, one)

    while missing:
        row = dict(min(missing, key=lambda p: uses[p[0]] + uses[p[1]]))
        for name in random.permutation([name for name in names if name not in row]):
            name = str(name)

            def worth(i, name=name, row=row):
                new = sum(pair((name, i), other) in missing for other in row.items())
                return (new, -uses[name, i])

            row[name] = max(random.permutation(len(options[name])).tolist(), key=worth)
        for one, other in itertools.combinations(row.items(), 2):
            missing.pop(pair(one, other), None)
        for item in row.items():
            uses[item] += 1
        rows.append({name: options[name][row[name]] for name in names})
    return rows


def spanning(rows: list[dict[str, Any]]) -> int:
    """How many of the first rows hold every value that any row has."""
    last = {}
    for n, row in enumerate(rows, 1):
        for item in ((name, repr(value)) for name, value in row.items()):
            last.setdefault(item, n)
    return max(last.values())
