"""What the tests of the Mosaic GPU backend share: Pallas' interpreter, lowering for absent GPUs, spreads of options."""

import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax import export

import jax_fa
from jax_fa import backends, compat
from jax_fa.backends import mosaic
from jax_fa.call import Call, Saved
from jax_fa.entry import request_of
from jax_fa.testing.cases import Case

OLD_JAX = jax.__version_info__[:2] < (0, 11)
REFUSED = (
    f"needs jax 0.11 or newer, which needs Python 3.12 or newer; this is jax {jax.__version__} on Python "
    f"{platform.python_version()}"
)
needs_new_jax = pytest.mark.skipif(OLD_JAX, reason=REFUSED)
TARGET = "mosaic_gpu_v2"  # the custom call that a kernel becomes


interpreter = compat.gpu_interpreter


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


# --- what kernels are made of


def both_directions(call: Call):
    """The jaxpr of the forward and the backward of a call of avals."""

    def run(operands):
        given = Call.of(call.problem, operands)
        out, m, l = mosaic.backend.forward(given)
        return mosaic.backend.backward(given, Saved(out=out, m=m, l=l, dout=out))

    return jax.make_jaxpr(run)(call.operands).jaxpr


def inside(jaxpr) -> Iterator[Any]:
    """The jaxpr and all in it."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for inner in jaxprs_of(eqn):
            yield from inside(inner)


def jaxprs_of(eqn) -> Iterator[Any]:
    """The jaxprs of an equation."""
    for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
        if hasattr(x, "eqns"):
            yield getattr(x, "jaxpr", x)


# --- what the backend says of a case


def request(case: Case, operands: dict[str, Any] | None = None) -> Call:
    """The `jax_fa.call.Call` of a case, of these operands or its own."""
    return request_of(
        jax_fa.flash_attention,
        **case.stored_operands() if operands is None else operands,
        **case.arrays(),
        scale=case.scale,
        logits_soft_cap=case.soft_cap,
        dropout_rate=case.dropout,
        layout=case.layout,
        implementation="mosaic",
    ).call


def why_not(case: Case, what: str = "forward") -> str | None:
    """The backend's reason not to serve a case in the interpreter."""
    with interpreter():
        call = abstract(partial(request, case), case.stored_operands())
        return backends.reasons("cpu", call, what)["mosaic"]


def abstract(make: Callable[..., Call], *args) -> Call:
    """What a function that makes a call makes of avals: a call of avals."""
    problems = []

    def operands(*args):
        call = make(*args)
        problems.append(call.problem)
        return call.operands

    avals = jax.eval_shape(operands, *args)
    return Call.of(problems[0], avals)
