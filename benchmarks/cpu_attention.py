"""Times the native CPU kernels against the machine's own limits, `jax.nn` and PyTorch, all in one run.

    python -P benchmarks/cpu_attention.py [--rounds 7] [--only TEXT] [--alone] [--instruction-set NAME] [--json FILE]
    python -P benchmarks/cpu_attention.py --tables

All that is compared in a row is called in turn within one process, and every figure is of one run; see README.md
beside this file. `cpu/cases.py` says what is measured, `cpu/bounds.py` what must come out.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if options.instruction_set:
        os.environ["JAX_FA_CPU_ISA"] = options.instruction_set
    # After that, since what the kernels choose may be chosen at import.
    from cpu import bounds, cases, limits, machine, measure, programs, report, tables

    if options.tables:
        for document in tables.DOCUMENTS:
            tables.write(document)
        return
    found = machine.describe()
    path = options.json or HERE / "results" / machine.file_name(found)
    writes = bool(options.json) or not options.only
    if writes:
        _check(parser, path)
    print("\n".join(f"{name}: {text}" for name, text in found.items()))
    found["peak_gflops"] = {
        dtype: round(limits.fma_peak(dtype) / 1e9, 1) for dtype in ("float32", "bfloat16")
    }
    found["read_gigabytes"] = round(limits.read_bandwidth() / 1e9, 1)
    print(f"peak {found['peak_gflops']} GF/s; reading {found['read_gigabytes']} GB/s")
    print("Nx: how many times longer the other takes\n")
    rows = []
    for case in cases.cases():
        if options.only not in f"{case.group} {case.name}":
            continue
        for row in measure.measure(replace(case, peers=()) if options.alone else case, options.rounds):
            print(report.line(row), flush=True)
            rows.append(row)
        if writes:
            report.update(path, found, some=bool(options.only), complete=False, rows=rows)
    if writes:
        memory = programs.temporary_bytes(cases.Case(group="long", mask="causal"))
        whole = not options.alone
        report.update(path, found, some=bool(options.only), complete=whole, rows=rows, temporary_bytes=memory)
        print(f"\nwritten: {path}")
    sweep = report.read(path).get("sweep") if path.exists() else None
    print("\n" + bounds.table(bounds.check(rows, found["instruction_set"], sweep)))


def _check(parser: argparse.ArgumentParser, path: Path) -> None:
    from jax_fa.demo import program

    try:
        program.check_writable(path)
    except ValueError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=7, help="samples of each implementation (default: %(default)s)"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help='only cases whose "group name" contains this text'
    )
    parser.add_argument(
        "--alone", action="store_true", help="without other libraries, which takes a fraction of the time"
    )
    parser.add_argument("--instruction-set", metavar="NAME", help="in place of the best one")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where all figures go (default: results/PROCESSOR-SET.json, and none with --only)",
    )
    parser.add_argument(
        "--tables",
        action="store_true",
        help="measure nothing: make the tables of documents from result files",
    )
    return parser


if __name__ == "__main__":
    from jax_fa.demo import program

    program.start(main)
