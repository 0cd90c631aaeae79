"""Running a program on data."""

import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

import jax
import numpy as np

from jax_fa import compat
from jax_fa.testing.fuzz import calls
from jax_fa.testing.fuzz.checks import Fault, Verdict, check
from jax_fa.testing.fuzz.inputs import draw
from jax_fa.testing.fuzz.program import Data, Program


class Runner:
    """A program, compiled at its first call."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._run: Callable[..., Any] | None = None

    def __call__(self, data: Data, twice: bool = False) -> Verdict:
        """`twice`: also whether a second call gives the same bits. Raises NotImplementedError if the backend refuses."""
        inputs = draw(self.program, data)
        arguments = inputs.arguments()
        with _context(self.program):
            if self._run is None:
                self._run = calls.compiled(self.program, inputs)
            try:
                found = self._found(arguments)
                again = digest_of(self._found(arguments)) if twice else ""
            except NotImplementedError:
                raise
            except Exception as error:
                return Verdict((Fault("call", f"raised {type(error).__name__}: {error}", np.inf),), {})
        verdict = check(inputs, found)
        if not twice:
            return verdict
        digest = digest_of(found)
        if digest != again:
            changed = Fault("bits", "a second call gives other bits", np.inf)
            verdict = dataclasses.replace(verdict, faults=(*verdict.faults, changed))
        return dataclasses.replace(verdict, digest=digest)

    def _found(self, arguments: dict[str, Any]) -> dict[str, np.ndarray]:
        assert self._run is not None
        return {name: np.asarray(x) for name, x in self._run(arguments).items()}


def digest_of(found: dict[str, np.ndarray]) -> str:
    """Of the bits of results."""
    total = hashlib.sha256()
    for name in sorted(found):
        total.update(found[name].tobytes())
    return total.hexdigest()[:16]


def _context(program: Program) -> Any:
    """Float64 needs x64, which is off otherwise; kernels for GPUs need their interpreter."""
    if program.backend == "mosaic":
        return _interpreting()
    return jax.enable_x64(True) if program.dtype == "float64" else nullcontext()


@contextmanager
def _interpreting() -> Iterator[None]:
    """Raises where threads of a kernel race, which the interpreter prints."""
    with redirect_stdout(io.StringIO()) as printed, compat.gpu_interpreter():
        yield
    if "RACE DETECTED" in printed.getvalue():
        raise RuntimeError(printed.getvalue()[:4000])
