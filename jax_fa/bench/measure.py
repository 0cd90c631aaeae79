"""How it is measured: all implementations of a call in one process, called in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jax_fa.bench.implementations import Program, RefusedError
from jax_fa.bench.shapes import Workload
from jax_fa.testing import timing

PAUSE = 0.05  # seconds before a call, while the threads of the one before go on spinning
# Largest difference of two implementations, relative L2, that is put down to rounding.
# (GPUs may round the operands of float32 products to TF32.)
TOLERANCE = {"float32": 5e-3, "bfloat16": 3e-2, "float16": 1e-2}


@dataclass(kw_only=True)
class Result:
    """What one implementation did in one call."""

    implementation: str
    call: Workload
    seconds: list[float] = field(default_factory=list)  # every call that counts
    temp_bytes: int | None = None
    refused: str | None = None  # why there is nothing to measure
    difference: float | None = None  # from the first implementation, relative L2, the worst of all arrays

    @property
    def median(self) -> float:
        return timing.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, relative to the median."""
        return timing.spread(self.seconds)

    @property
    def agrees(self) -> bool:
        # NaN does not.
        return self.difference is None or self.difference <= TOLERANCE[self.call.dtype]


def measure(
    call: Workload,
    implementations: dict[str, Callable[[Workload], Program]],
    rounds: int,
    progress: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Compiles all, compares what they compute with the first one's, then calls them in turn.

    The order is reversed from round to round, so that whatever else the machine does hits all alike. The call
    that is compared is not timed: it is the one that touches memory for the first time.
    """
    results, programs = {}, {}
    for name, prepare in implementations.items():
        results[name] = Result(implementation=name, call=call)
        try:
            programs[name] = prepare(call)
        except RefusedError as why:
            results[name].refused = str(why)
        else:
            results[name].temp_bytes = programs[name].temp_bytes
        progress()
    first: list[np.ndarray] | None = None
    for name, program in programs.items():
        arrays = program.arrays(program.run())
        if first is None:
            first = arrays
        else:
            results[name].difference = _difference(arrays, first)
    runs = {name: program.run for name, program in programs.items()}
    seconds = timing.alternate(runs, rounds, warm_up=0, pause=PAUSE, after_round=progress)
    for name in seconds:
        results[name].seconds = seconds[name]
    return list(results.values())


def _difference(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        b = b.astype(np.float64)
        size = float(np.linalg.norm(b.ravel()))
        difference = float(np.linalg.norm((a - b).ravel()))
        worst = max(worst, difference / size if size else difference)
        if np.isnan(difference):
            return difference
    return worst
