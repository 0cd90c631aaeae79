"""How a part runs: jobs, each prepared, compiled beside others, and then run alone on the device."""

import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from gpu import record
from gpu.machine import first_line
from gpu.supervise import RESTART

# Seconds after which something hangs: tracing or compiling one thing, one step on the device.
TRACE, COMPILE, RUN = 120.0, 120.0, 25.0


@dataclass(kw_only=True)
class Context:
    """What every part needs."""

    events: record.Events
    deadline: float  # of the part under way
    threads: int
    rehearse: bool
    only: str  # rows whose "part label" contains this text
    most_checks: int | None
    rounds: int
    folder: Path
    nth: tuple[int, int] = (0, 1)  # of so many processes that share the checks, which one this is

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    @property
    def implementation(self) -> str:
        return "xla" if self.rehearse else "mosaic"


@dataclass(kw_only=True)
class Job:
    """One row to come.

    Attributes:
      label: its name within the part.
      prepare: traces and lowers, in the main thread; returns what may then run on other threads (compiling).
      run: gets those results (exceptions among them) and returns the row's status and whatever else it holds.
      limit: seconds after which `run` hangs, if it says nothing in between.
    """

    label: str
    prepare: Callable[[], Sequence[Callable[[], Any]]]
    run: Callable[[list[Any]], tuple[str, dict[str, Any]]]
    limit: float = RUN


def run_all(context: Context, part: str, jobs: Iterable[Job], group: int) -> None:
    """Runs jobs in groups: a group is compiled on all threads, and only then is anything timed."""
    todo = (job for job in jobs if _wanted(context, part, job.label))
    group = 1 if context.threads == 1 else group
    slowest = 0.0
    while batch := list(itertools.islice(todo, group)):
        if context.left < slowest / 2:  # what does not fit is left out row by row
            _skip(context, part, [job.label for job in itertools.chain(batch, todo)])
            return
        start = time.time()
        compiled = list(_prepared(context, part, batch))
        for job, found in compiled:
            if context.left <= 0:
                context.events.row(part, job.label, "skip", why="no time was left")
                continue
            _run(context, part, job, found)
        slowest = max(slowest, time.time() - start)


def _wanted(context: Context, part: str, label: str) -> bool:
    return context.only in f"{part} {label}" and not context.events.knows(part, label)


def _skip(context: Context, part: str, labels: list[str]) -> None:
    shown = ", ".join(labels)
    context.events.row(
        part, f"{len(labels)} rows", "skip", why=f"no time was left for {shown}", labels=labels
    )


def _prepared(context: Context, part: str, batch: list[Job]) -> Iterator[tuple[Job, list[Any]]]:
    pool = ThreadPoolExecutor(context.threads)
    pending = []
    for job in batch:
        context.events.begin(part, job.label, TRACE)
        try:
            pending.append((job, [pool.submit(attempt, thunk) for thunk in job.prepare()]))
        except Exception as error:
            _failed(context, part, job.label, error)
    shared = len(batch) > 1
    found = []
    for job, futures in pending:
        label = f"compiling {len(batch)} rows at once" if shared else job.label
        results = []
        for future in futures:
            context.events.begin(part, label, COMPILE + 20, shared)
            try:
                results.append(future.result(timeout=COMPILE))
            except FutureTimeoutError as error:
                results.append(
                    TimeoutError(f"compiling took more than {COMPILE:.0f} s ({type(error).__name__})")
                )
        found.append((job, results))
    pool.shutdown(wait=False, cancel_futures=True)
    return iter(found)


def attempt(thunk: Callable[[], Any]) -> Any:
    """What it returns, or the exception that it raised."""
    try:
        return thunk()
    except Exception as error:
        return error


def _run(context: Context, part: str, job: Job, found: list[Any]) -> None:
    context.events.begin(part, job.label, job.limit)
    start = time.time()
    try:
        status, more = job.run(found)
    except Exception as error:
        _failed(context, part, job.label, error)
    else:
        _write(context, part, job.label, status, {"seconds": time.time() - start} | more)


def explain(error: Exception) -> None:
    """Writes what a row's one line leaves out to the file of errors."""
    traceback.print_exception(error, limit=-30)
    sys.stderr.flush()


def _failed(context: Context, part: str, label: str, error: Exception) -> None:
    explain(error)
    status = "FAIL" if isinstance(error, AssertionError) else "error"
    _write(context, part, label, status, {"why": first_line(error)})


def _write(context: Context, part: str, label: str, status: str, more: dict[str, Any]) -> None:
    """Writes a row, and ends the process after one that broke the device: the next one goes on behind it."""
    broken = status in ("FAIL", "error") and not _device_works()
    context.events.row(part, label, status, **more, **({"fatal": True} if broken else {}))
    if broken:
        raise SystemExit(RESTART)


def _device_works() -> bool:
    """Whether the device still computes; an illegal access ends that for the whole process."""
    try:
        return float(jnp.sum(jnp.ones(8) + 1)) == 16.0
    except Exception:
        return False
