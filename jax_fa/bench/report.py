"""What the benchmark prints and draws."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby, product
from pathlib import Path

import numpy as np

from jax_fa.bench.measure import Result
from jax_fa.bench.record import Run
from jax_fa.demo.colours import colour

NO_RATIOS = (
    "No ratios between these runs: a machine is not as fast at one time as at another, so only implementations called in turn "
    "within one run can be compared. Run them together."
)


def header(run: Run) -> None:
    """What the machine and the versions are."""
    print(f"run {run.id}, {run.date}")
    print(
        ", ".join(f"{name} {_plain(value)}" for name, value in run.environment.items() if value is not None)
    )


def _plain(value) -> str:
    return "; ".join(value) if isinstance(value, list) else str(value)


def rows(results: Sequence[Result]) -> None:
    """A line per implementation under each call; ratios to the first that could serve it."""
    for call, group in groupby(results, key=lambda result: result.call):
        found = list(group)
        print(f"\n{call}")
        served = [result for result in found if result.refused is None]
        for result in found:
            print(f"  {_line(result, served[0] if served else None)}", flush=True)


def _line(result: Result, first: Result | None) -> str:
    if first is None or result.refused is not None:
        return f"{result.implementation:13} not served: {result.refused}"
    ratio = (
        "" if result is first else f"{result.median / first.median:6.2f}x the time of {first.implementation}"
    )
    wrong = "" if result.agrees else f"  MISS: differs by {result.difference:.1e}"
    return (
        f"{result.implementation:13}{1e3 * result.median:11.3f} ms ±{result.spread:4.0%}"
        f"{result.call.flops / result.median / 1e9:11.1f} GFLOP/s  temp {_mebibytes(result.temp_bytes):>11}"
        f"  {ratio}{wrong}"
    ).rstrip()


def _mebibytes(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 2**20:.1f} MiB"


def compare(runs: Sequence[Run]) -> None:
    """Runs one after another: ratios inside each, none between them."""
    for run in runs:
        header(run)
        rows(run.results)
        print("" if run.complete else "\nThis run was stopped before its end.\n")
    if len({run.id for run in runs}) > 1:
        print(NO_RATIOS)


def verdict(results: Sequence[Result]) -> bool:
    """Prints the last line; whether all numbers agree."""
    wrong = [result for result in results if not result.agrees]
    for result in wrong:
        print(
            f"MISS: {result.implementation} differs by {result.difference:.1e} (relative L2) in {result.call}"
        )
    if wrong:
        return False
    compared = sum(result.difference is not None for result in results)
    if compared:
        print("\nOK: all implementations computed the same values.")
    else:
        print("\nValues were not compared: no call had two implementations that could serve it.")
    return True


@contextmanager
def progress(steps: int) -> Iterator[tuple[Callable[[], None], Callable[[], AbstractContextManager]]]:
    """A bar on stderr where that is a terminal and tqdm is installed; else nothing.

    Gives what takes a step, and what makes room for printing: a context without the bar.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        yield (lambda: None), nullcontext
        return
    with tqdm(total=steps, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False) as bar:
        yield (lambda: bar.update() and None), tqdm.external_write_mode


def plot(path: Path, run: Run) -> None:
    """Time against the number of keys, both logarithmic: a panel per kind of call, a line per implementation.

    A row per mask, dtype and sizes, a column per direction.
    """
    from matplotlib.figure import Figure  # imported only when asked for

    panels: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for result in run.results:
        if result.refused is None:
            call, s = result.call, result.call.shape
            kind = f"{call.mask}, {call.dtype}, B={s.B} N={s.N} K={s.K} D={s.D} Dv={s.Dv}"
            lines = panels.setdefault((kind, call.direction), {})
            lines.setdefault(result.implementation, []).append((s.Skv, 1e3 * result.median))
    if not panels:
        raise ValueError("no implementation served any call")
    kinds, directions = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
    size = (max(4.5 * len(directions), 6), 3 * len(kinds) + 0.6)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = figure.subplots(len(kinds), len(directions), squeeze=False, sharey="row")
    for axes, (kind, direction) in zip(grid.flat, product(kinds, directions), strict=True):
        lines = panels.get((kind, direction), {})
        axes.set_visible(bool(lines))
        _draw_panel(axes, lines)
        axes.set_title(f"{direction}: {kind}", fontsize=9)
    for row in grid:
        row[0].set_ylabel("ms")
    for axes in grid[-1]:
        axes.set_xlabel("keys (Skv)")
    figure.supxlabel("at the end of a line: the exponent with which its time grows", fontsize=8)
    labels = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels, loc="outside upper center", ncols=len(labels))
    figure.savefig(path)
    print(f"drawn: {path}")


def _draw_panel(axes, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Ticks at the measured lengths; at the end of each line the exponent with which its time grows."""
    for name, points in lines.items():
        keys, times = zip(*sorted(points), strict=True)
        axes.loglog(keys, times, "o-", color=colour(name), label=name, markersize=4)
        exponent = _slope(keys, times).removeprefix(", slope ")
        axes.annotate(
            exponent,
            (keys[-1], times[-1]),
            (5, 0),
            textcoords="offset points",
            color=colour(name),
            fontsize=8,
            va="center",
        )
    measured = sorted({length for points in lines.values() for length, _ in points})
    axes.set_xticks(measured, map(str, measured))
    axes.minorticks_off()
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)


def _slope(keys: Sequence[int], times: Sequence[float]) -> str:
    """The exponent with which time grows."""
    if len(set(keys)) < 2:
        return ""
    return f", slope {np.polyfit(np.log(keys), np.log(times), 1)[0]:.2f}"
