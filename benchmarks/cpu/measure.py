"""A case as rows of figures: everything compared is called in turn, the machine's limits among it."""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import jax.numpy as jnp

from cpu import limits, programs
from cpu.cases import BESIDE, PRODUCTS, Case
from jax_fa.testing import timing

Row = dict[str, Any]
PAUSE = 0.05  # seconds before a sample, while the threads of the one before go on spinning
SAMPLE = 3e-3  # a sample takes at least so long: short programs are repeated
SHORT = 2e-1  # what takes less runs before each sample, too, so that threads are awake and caches filled ...
AWAKE = 5e-2  # ... for so many seconds: until then the cores of a virtual machine have been at 0.5 to 0.9 of their rate
PATIENCE = 8.0  # seconds of a direction; where peers are slower, there are fewer rounds, down to three


def measure(case: Case, rounds: int) -> list[Row]:
    """One row per direction."""
    found = programs.everyone(case)
    if case.of is not None:
        found["of"] = programs.ours(case.of)
    rows = []
    for direction in PRODUCTS:
        if direction not in found["cpu"] or (case.derivatives and direction not in BESIDE):
            continue
        runs = {name: each[direction] for name, each in found.items() if direction in each}
        if direction in BESIDE:
            runs[f"cpu {BESIDE[direction]}"] = found["cpu"][BESIDE[direction]]
        rows.append(_row(case, direction, runs, rounds))
    return rows


def _row(case: Case, direction: str, runs: dict[str, Callable[[], Any]], rounds: int) -> Row:
    repeats = {name: _repeats(run) for name, run in runs.items()}
    one_round = sum(count * once for count, once in repeats.values())
    peaks, bandwidths = [], []

    def measure_limits() -> None:
        time.sleep(PAUSE)
        peaks.append(limits.fma_peak(case.dtype))
        bandwidths.append(limits.read_bandwidth())

    samples = timing.alternate(
        {name: partial(_repeat, run, repeats[name][0]) for name, run in runs.items()},
        min(rounds, max(3, int(PATIENCE / one_round))),
        warm_up=0,
        pause=PAUSE,
        wake=frozenset(name for name, (count, once) in repeats.items() if count * once < SHORT),
        awake=AWAKE,
        after_round=measure_limits,
    )
    seconds = {name: [t / repeats[name][0] for t in times] for name, times in samples.items()}
    median = {name: timing.median(times) for name, times in seconds.items()}
    mine, of, flops = seconds["cpu"], median.pop("of", None), case.flops(direction)
    read = case.key_elements * jnp.dtype(case.dtype).itemsize
    row = asdict(case) | {"name": case.name, "direction": direction, "seconds": median, "samples": seconds}
    row |= {
        "gflops": flops / median["cpu"] / 1e9,
        "peak": timing.median(peaks) / 1e9,
        "bandwidth": timing.median(bandwidths) / 1e9,
        # Of the limits of the same round: the clock is not the same at all times.
        "of_peak": timing.median([flops / t / peak for t, peak in zip(mine, peaks, strict=True)]),
        "of_bandwidth": timing.median([read / t / rate for t, rate in zip(mine, bandwidths, strict=True)]),
        "of_rate": None,
        "ratio": {name: other / median["cpu"] for name, other in median.items() if name != "cpu"},
    }
    if case.of is not None and of is not None:
        row |= {"of": case.of.name, "of_rate": flops / median["cpu"] * of / case.of.flops(direction)}
    return row


def _repeats(run: Callable[[], Any]) -> tuple[int, float]:
    """How many calls a sample takes, and the seconds of one."""
    timing.timed(run)
    _, once = timing.timed(run)
    return max(1, min(1000, int(SAMPLE / once))), once


def _repeat(run: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        run()
