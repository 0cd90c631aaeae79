"""Checks and times attention on an NVIDIA GPU, all in one call: ours, `jax.nn`, tokamax and PyTorch.

    python -P benchmarks/gpu_attention.py [--check-only] [--rows TEXT] [--tune] [--after FILE...] [--budget-seconds 560]
        [--out DIR]

It runs from a source tree without the native extension, and with any of the peers absent. In order: the device and
versions, correctness against float64, the forward, the backward, AlphaFold's shape, a training step, and with --tune the
configurations of the kernels. README.md beside this file says what is counted and how; `gpu/timing.py` says which clock
is used. Exits with 0, 1 if a check failed or ours raised, 2 if there is no CUDA device (or bad arguments).
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def main() -> int:
    options = _parser().parse_args()
    if options.worker:
        return _work(options)
    return _supervise(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check-only", action="store_true", help="the device and correctness, no timing")
    parser.add_argument("--rows", default="", metavar="TEXT", help='only rows whose "part label" contains it')
    parser.add_argument(
        "--after",
        type=_file,
        nargs="+",
        default=[],
        metavar="FILE",
        help="only rows that these files of results lack, or that were skipped or failed there",
    )
    parser.add_argument("--tune", action="store_true", help="also time every configuration of the kernels")
    parser.add_argument("--budget-seconds", type=float, default=560, help="in all (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="where results go (default: %(default)s)"
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        help="a folder of wheels to use besides what is installed (default: the checkout, and beside it)",
    )
    parser.add_argument("--checks", type=int, help="at most so many checks (default: as many as time allows)")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each time (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="threads that compile")
    parser.add_argument(
        "--check-processes",
        type=int,
        default=min(12, os.cpu_count() or 1),
        help="processes that check at the same time: lowering a kernel takes Python seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="everything, tiny and on CPU: no time means anything"
    )
    # For the worker, which the script starts itself.
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--parts", help=argparse.SUPPRESS)
    parser.add_argument("--nth", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    return parser


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return path


def _supervise(options: argparse.Namespace) -> int:
    from gpu import record, supervise, work

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended too
    deadline = time.time() + options.budget_seconds
    hidden = ("worker", "deadline", "parts", "nth", "after", "out", "wheels")  # the last three are paths
    shown = {name: str(value) for name, value in vars(options).items() if name not in hidden}
    results = record.Results(options.out, shown, lambda text: print(text, flush=True))
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / f"{results.date}.err"  # in full what rows say in a line
    chosen = work.parts(options.check_only, options.tune)
    with tempfile.TemporaryDirectory() as folder:

        def watch(parts: tuple[str, ...], until: float, nth: tuple[int, int]) -> supervise.Watch:
            place = Path(folder) / f"{parts[0]}{nth[0]}"
            place.mkdir()
            arguments = [*sys.argv[1:], "--worker", str(place / "events"), "--deadline", str(until)]
            arguments += ["--parts", ",".join(parts), "--nth", *map(str, nth)]

            def command(jobs: int) -> list[str]:
                return [sys.executable, "-P", __file__, *arguments, "--jobs", str(jobs)]

            jobs = options.jobs if nth[1] == 1 else 1
            return supervise.Watch(command, place / "events", until, results.add, jobs=jobs, stderr=log)

        code = 0
        for parts in work.phases(chosen):
            left = deadline - time.time()
            until = time.time() + work.phase_seconds(parts, chosen, left)
            processes = options.check_processes if parts == ("checks",) else 1
            if left > 0 and code != supervise.NO_DEVICE:
                watches = [watch(parts, until, (i, processes)) for i in range(processes)]
                code = supervise.run_together(watches)
        if code == supervise.NO_DEVICE or log.stat().st_size == 0:
            log.unlink()
        if code == supervise.NO_DEVICE:
            print("There is no CUDA device here (--rehearse runs everything on CPU, tiny).")
            return code
    for part in chosen:
        if not any(row["part"] == part for row in results.rows):
            results.say(f"{part:9} not reached: the time was over, or the device was lost")
    for tuned, row in record.best_configs(results.rows).items():
        results.say(f"best {tuned}: {row['config']}, {row['text']}")
    for text in (record.reasons(results.rows), record.table(results.rows)):
        if text:
            results.say(f"\n{text}")
    results.say(f"\nchecks: {record.counts(results.rows)}")
    if results.path is None:
        return 1
    results.say(f"written: {results.path}")
    results.write(complete=True)
    return record.exit_code(results.rows)


def _work(options: argparse.Namespace) -> int:
    from gpu import machine, record, supervise

    folder = options.worker.parent
    machine.prepare(options.wheels, folder / "wheels", options.rehearse, options.nth[1])
    import jax

    if not options.rehearse and not _has_cuda(jax):
        return supervise.NO_DEVICE
    from gpu import jobs, parts

    context = jobs.Context(
        events=record.Events(options.worker, record.settled(options.after)),
        deadline=options.deadline,
        threads=options.jobs,
        rehearse=options.rehearse,
        only=options.rows,
        most_checks=options.checks,
        rounds=options.rounds,
        folder=folder,
        nth=tuple(options.nth),
    )
    parts.run(context, tuple(options.parts.split(",")), options.deadline)
    return 0


def _has_cuda(jax: Any) -> bool:
    try:
        return "NVIDIA" in jax.devices()[0].device_kind
    except RuntimeError:  # a platform was asked for that is not there
        return False


if __name__ == "__main__":
    # As jax_fa.demo.program ends them; it is not imported here, because the process that watches is to load no JAX.
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        code = 141
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    sys.stderr.flush()
    os._exit(code)  # threads that compile may not come back
