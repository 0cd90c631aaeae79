"""`python -m jax_fa.bench`: times attention over shapes, against the other libraries that are installed."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import jax

from jax_fa.bench import implementations, measure, record, report, shapes
from jax_fa.demo import program

OK, MISS = 0, 1  # bad arguments exit with 2, from argparse
Read = TypeVar("Read")


@jax.numpy_dtype_promotion("standard")  # jax.nn mixes 16-bit dtypes with float32 itself
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit code: 0 all values agree, 1 some do not, 3 a file could not be written."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        if options.list:
            print("\n".join(shapes.QUICK if options.quick else shapes.DEFAULT))
            return OK
        if options.compare:
            if options.json or options.plot:
                raise ValueError("--compare measures nothing, so it takes no --json and no --plot")
            report.compare([record.read(path) for path in options.compare])
            return OK
        chosen = _chosen(options.implementations)
        calls = _calls(options)
        _check_outputs(options)
    except ValueError as error:
        parser.error(str(error))

    run = record.new_run([])
    report.header(run)
    results: list[measure.Result] = []
    written = True
    with report.progress(len(calls) * (len(chosen) + options.rounds)) as (step, beside_bar):
        for call in calls:
            results += (found := measure.measure(call, chosen, options.rounds, step))
            run = replace(run, results=results, complete=call is calls[-1])
            if options.json:  # as rows come: whoever stops the program keeps them
                written &= _written("--json", options.json, partial(record.write, run))
            with beside_bar():
                report.rows(found)
    if options.plot:
        written &= _written("--plot", options.plot, partial(report.plot, run=run))
    if not report.verdict(results):
        return MISS
    return OK if written else program.UNWRITTEN


def _written(option: str, path: Path, writing: Callable[[Path], None]) -> bool:
    return program.write_or_report(f"{option} {path}", partial(writing, path))


def _chosen(names: list[str] | None) -> dict[str, Callable]:
    """The implementations asked for, or all that are here."""
    present = implementations.present()
    if names is None:
        return present
    for name in names:
        if name in implementations.PEERS and name not in present:
            raise ValueError(f"--implementations: {name} is not here: not installed, or of another platform")
        if name not in present:
            raise ValueError(f"--implementations must be among {', '.join(present)}; got {name!r}")
    return {name: present[name] for name in names}


def _calls(options: argparse.Namespace) -> list[shapes.Workload]:
    default = shapes.QUICK if options.quick else shapes.DEFAULT
    return [
        shapes.Workload(shape=shape, mask=mask, dtype=dtype, direction=direction)
        for dtype in options.dtype
        for mask in options.mask
        for direction in options.direction
        for shape in options.shapes or map(shapes.parse_shape, default)
    ]


def _check_outputs(options: argparse.Namespace) -> None:
    """Raises ValueError where a file could not be written: before measuring, not after."""
    if options.json is not None:
        program.check_writable(options.json)
    if options.plot is not None:
        program.check_plot(options.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jax_fa.bench",
        description="Times attention over shapes: every backend of jax_fa that is here, jax.nn and PyTorch, called in turn "
        "in one process. Prints medians, half the distance of the quartiles, and ratios to the first one. Checks that "
        "all compute the same values.",
        epilog="Exit codes: 0 all values agree, 1 some do not, 2 bad arguments, 3 a file could not be written.",
    )
    parser.add_argument(
        "--shapes",
        type=_listed(shapes.parse_shape),
        metavar="SHAPE,...",
        help=f"like {shapes.SYNTAX} (default: see --list)",
    )
    parser.add_argument("--list", action="store_true", help="print the default shapes and exit")
    parser.add_argument(
        "--quick", action="store_true", help="small default shapes, seconds instead of minutes"
    )
    parser.add_argument(
        "--dtype",
        type=_listed(_one_of(shapes.DTYPES)),
        default=["float32"],
        metavar="DTYPE,...",
        help=f"of {', '.join(shapes.DTYPES)} (default: float32)",
    )
    parser.add_argument(
        "--mask",
        type=_listed(shapes.parse_mask),
        default=["full", "causal"],
        metavar="MASK,...",
        help="full, causal or window:W (default: full,causal)",
    )
    parser.add_argument(
        "--direction",
        type=_listed(_one_of(shapes.DIRECTIONS)),
        default=["forward", "backward"],
        metavar="DIRECTION,...",
        help="forward, backward (the pull-back alone), both (in one program), jvp (output and tangent), hvp (gradients and their "
        "tangents) or double-backward (the pull-back of the gradients alone) (default: forward,backward)",
    )
    parser.add_argument(
        "--implementations",
        type=_listed(str),
        metavar="NAME,...",
        help="names of jax_fa's backends, jax.nn, torch (default: all that are here)",
    )
    parser.add_argument(
        "--rounds", type=program.positive, default=7, metavar="N", help="timed calls of each (default: 7)"
    )
    _add_files(parser)
    return parser


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write versions and every single time, as they come"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw time against length (needs matplotlib)"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="measure nothing: print what --json wrote. Of several runs without ratios between them",
    )


def _listed(read: Callable[[str], Read]) -> Callable[[str], list[Read]]:
    def several(text: str) -> list[Read]:
        try:
            return [read(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return several


def _one_of(allowed: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"must be among {', '.join(allowed)}; got {text!r}")
        return text

    return read
