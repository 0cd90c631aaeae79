"""A report of this installation: what is there, which backends can be used and why not the others, and what to do.

`python -m jax_fa doctor` prints it. Its text is what a bug report should hold.
"""

import argparse
from collections.abc import Sequence

from jax_fa.doctor import inventory, numbers, usable
from jax_fa.doctor.findings import Section

OK, TROUBLE = 0, 1  # bad arguments exit with 2, from argparse


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns its exit code: 0 nothing is wrong, 1 something is."""
    options = _parser().parse_args(argv)
    steps = [inventory.versions, inventory.caches, usable.devices, inventory.variables, usable.backends]
    found: list[Section] = []
    for step in steps if options.no_check else [*steps, numbers.check]:
        if step is usable.backends and found[-1].wrong:
            break  # no call is taken with such variables
        found.append(step())
        print(found[-1], flush=True)
    return _advise(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jax_fa doctor",
        description="Reports what is installed, which backends can be used here and why not the others, "
        "and checks results of each against float64, in about ten seconds.",
        epilog="Exit codes: 0 nothing is wrong, 1 something is, 2 bad arguments.",
    )
    parser.add_argument("--no-check", action="store_true", help="leave out the check of results")
    return parser


def _advise(found: Sequence[Section]) -> int:
    wrong = [text for section in found for text in section.wrong]
    hints = [text for section in found for text in section.hints]
    print("What to do next")
    for text in [*wrong, *hints] or ["Nothing: all is well."]:
        print(f"  - {text}")
    return TROUBLE if wrong else OK
