"""The one way of timing: all that is compared runs in one process and in turn, so that noise hits all alike."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np


def turns(names: Iterable[str], rounds: int) -> Iterator[list[str]]:
    """The names for every round, in an order that is reversed from round to round."""
    order = list(names)
    for _ in range(rounds):
        yield list(order)
        order.reverse()


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """(result, seconds) of a call and of all work that JAX began in it."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, time.perf_counter() - start


def alternate(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warm_up: int = 1,
    pause: float = 0.0,
    wake: frozenset[str] = frozenset(),
    awake: float = 0.0,
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every call that counts, by name.

    The first `warm_up` calls of each do not count: they touch their memory for the first time. Before each call that
    counts comes a pause of so many seconds: the threads of OpenMP, which PyTorch uses, and of XLA go on spinning for
    a while after a call and would slow down the next one. The names in `wake` are called after that pause, once or until
    `awake` seconds have passed: to wake threads (and the cores of a virtual machine, which take some 50 ms) and to load
    caches takes as long as many of their calls, which in a model follow one another.
    """
    for run in runs.values():
        for _ in range(warm_up):
            jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for names in turns(runs, rounds):
        for name in names:
            time.sleep(pause)
            until = time.perf_counter() + awake
            while name in wake:
                jax.block_until_ready(runs[name]())
                if time.perf_counter() >= until:
                    break
            seconds[name].append(timed(runs[name])[1])
        after_round()
    return seconds


def median(seconds: list[float]) -> float:
    return float(np.median(seconds))


def spread(seconds: list[float]) -> float:
    """Half the distance of the quartiles, relative to the median."""
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return float((high - low) / 2 / middle)
