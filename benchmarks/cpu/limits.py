"""The machine's limits, as all cores reach them together: multiply-adds from registers, and reading memory."""

import os
import threading
import time
from collections.abc import Callable

import numpy as np

from jax_fa import _native

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Bursts one after the other for so long, of which the best counts: in each of them something else may have run, and cores that
# begin take some 50 ms until they reach their rate.
SECONDS = 0.15
ITERATIONS = 3_000_000  # some 10 ms
READ_BYTES = 2**28


def fma_peak(dtype: str = "float32") -> float:
    """Multiply-add operations per second, of the kind that the kernels use for a dtype."""
    isa, bf16 = _native.chosen_instruction_set(), dtype == "bfloat16"
    if isa is None:
        raise SystemExit(f"JAX_FA_CPU_ISA must be one of {_native.instruction_sets()}")
    operations = _native.fma_operations(isa, 1, bf16) * ITERATIONS
    return _together(operations, lambda _: _native.fma_operations(isa, ITERATIONS, bf16))


_memory: list[np.ndarray] = []


def read_bandwidth() -> float:
    """Bytes per second."""
    if not _memory:
        _memory.extend(np.array_split(np.ones(READ_BYTES // 8, np.uint64), THREADS))
    return _together(READ_BYTES / THREADS, lambda i: _native.read_memory(_memory[i]))


def _together(amount: float, work: Callable[[int], object]) -> float:
    """What all threads do a second, `amount` each, from the start of the first to the end of the last."""
    best, until = 0.0, time.perf_counter() + SECONDS
    while best == 0.0 or time.perf_counter() < until:
        spans = [(0.0, 0.0)] * THREADS
        ready = threading.Barrier(THREADS)

        def run(i: int, spans: list[tuple[float, float]] = spans, ready: threading.Barrier = ready) -> None:
            ready.wait()
            start = time.perf_counter()
            work(i)
            spans[i] = (start, time.perf_counter())

        threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Not the sum of their rates: one that starts late runs faster, alone, while another waits.
        starts, ends = zip(*spans, strict=True)
        best = max(best, THREADS * amount / (max(ends) - min(starts)))
    return best
