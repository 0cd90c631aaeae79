"""Looks for calls in which `jax.nn` is faster on CPU: ours beside it over many shapes, forward and gradient.

    python -P benchmarks/cpu_sweep.py [--rows 200] [--seed 0] [--part 0/1] [--json FILE] [--instruction-set NAME]

README.md beside this file says which shapes those are.
"""

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def main() -> None:
    options = _parser().parse_args()
    if options.instruction_set:
        os.environ["JAX_FA_CPU_ISA"] = options.instruction_set
    from cpu import machine, report, sweep

    shapes = sweep.shapes(options.rows, options.seed)
    part, parts = map(int, options.part.split("/"))
    rows = []
    for shape in shapes[part::parts]:
        if options.only in str(shape):
            for row in sweep.measure(shape, options.rounds):
                rows.append(row)
                print(sweep.line(row), flush=True)
    print(f"\nslowest against jax.nn, of {len(rows)}:")
    for row in sweep.worst(rows):
        print(sweep.line(row))
    if options.json:
        report.update(options.json, machine.describe(), sweep=sweep.summary(rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rows", type=int, default=200, help="shapes besides the corners (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: %(default)s)")
    parser.add_argument(
        "--part", default="0/1", metavar="I/N", help="every Nth shape, from the Ith (default: all)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only shapes whose line contains it")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each time (default: %(default)s)")
    parser.add_argument("--instruction-set", metavar="NAME", help="in place of the best one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the worst rows into this file")
    return parser


if __name__ == "__main__":
    from jax_fa.demo import program

    program.start(main)
