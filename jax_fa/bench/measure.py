"""How it is measured: all contestants of a call in one process, called in turn."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jax_fa.bench.contestants import Program, RefusedError
from jax_fa.bench.shapes import Call

# The threads of OpenMP, which PyTorch uses, spin for a while after a call and would slow down the next one.
PAUSE = 0.05
# Largest difference of two contestants, relative L2, that is put down to rounding.
# (GPUs may round the operands of float32 products to TF32.)
TOLERANCE = {"float32": 5e-3, "bfloat16": 3e-2, "float16": 1e-2}


@dataclass(kw_only=True)
class Result:
    """What one contestant did in one call."""

    contestant: str
    call: Call
    seconds: list[float] = field(default_factory=list)  # every call that counts
    temp_bytes: int | None = None
    refused: str | None = None  # why there is nothing to measure
    difference: float | None = None  # from the first contestant, relative L2, the worst of all arrays

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, relative to the median."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float((high - low) / 2 / self.median)

    @property
    def agrees(self) -> bool:
        # NaN does not.
        return self.difference is None or self.difference <= TOLERANCE[self.call.dtype]


def measure(
    call: Call,
    contestants: dict[str, Callable[[Call], Program]],
    rounds: int,
    progress: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Compiles all, compares what they compute with the first one's, then calls them in turn.

    The order is reversed from round to round, so that whatever else the machine does hits all alike. The call
    that is compared is not timed: it is the one that touches memory for the first time.
    """
    results, programs = {}, {}
    for name, prepare in contestants.items():
        results[name] = Result(contestant=name, call=call)
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
    order = list(programs)
    for _ in range(rounds):
        for name in order:
            time.sleep(PAUSE)
            start = time.perf_counter()
            programs[name].run()
            results[name].seconds.append(time.perf_counter() - start)
        order.reverse()
        progress()
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
