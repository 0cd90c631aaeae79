"""`python -m jax_fa.testing.fuzz`: random calls of the library against a float64 reference."""

import argparse
import secrets
import sys
from pathlib import Path

from jax_fa.testing.fuzz.campaign import Campaign, Options, possible_backends, present_sets


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jax_fa.testing.fuzz", description=__doc__)
    parser.add_argument(
        "--seed", type=int, help="of all programs and data (default: a new one, which is printed)"
    )
    parser.add_argument("--count", type=int, help="stop after so many calls")
    parser.add_argument(
        "--time", type=float, help="stop after so many seconds (default: 60, without --count)"
    )
    parser.add_argument(
        "--draws", type=int, default=100, help="calls of each program, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--program-time", type=float, default=4.0, help="seconds of a program (default: %(default)s)"
    )
    parser.add_argument(
        "--shrink", type=float, default=60.0, help="seconds to make a failure small (default: %(default)s)"
    )
    parser.add_argument(
        "--near",
        type=float,
        default=1.0,
        help="misses by up to so many bounds are told and written, and are no failures: bounds are estimates; inf: "
        "none is (default: %(default)s)",
    )
    parser.add_argument(
        "--backends", default="", help="names, separated by commas (default: all that are present)"
    )
    parser.add_argument(
        "--isa", default="", help="instruction sets, separated by commas (default: all of this machine)"
    )
    parser.add_argument(
        "--out", type=Path, help="a file to which a line of JSON is added for each failure and round"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where the run of this seed in --out stopped"
    )
    given = parser.parse_args(arguments)
    backends = _names(parser, "--backends", given.backends, possible_backends())
    sets = _names(parser, "--isa", given.isa, present_sets())
    seed = secrets.randbelow(10**6) if given.seed is None else given.seed
    seconds = 60.0 if given.time is None and given.count is None else given.time
    options = Options(
        seed=seed,
        count=given.count,
        seconds=seconds,
        draws=given.draws,
        program_seconds=given.program_time,
        shrink=given.shrink,
        near=given.near,
        backends=backends,
        instruction_sets=sets,
        out=given.out,
        resume=given.resume,
    )
    print(f"seed {seed}", flush=True)
    totals = Campaign(options).run()
    worst = ", ".join(f"{name} {ratio:.2f}" for name, ratio in sorted(totals.worst.items()))
    print(f"seed {seed}: {totals}\nlargest errors, in units of their bounds: {worst}")
    return 1 if totals.failures else 0


def _names(parser, option: str, given: str, possible: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(filter(None, given.split(",")))
    for name in names:
        if name not in possible:
            parser.error(f"{option} must hold names among {', '.join(possible)}, which are here; got {name}")
    return names


if __name__ == "__main__":
    sys.exit(main())
