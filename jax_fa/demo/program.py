"""What the programs of this package share: how they end, and how they write files. Standard library only."""

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

UNWRITTEN = 3  # the exit code where all went well, but a file could not be written
INTERRUPTED = 130  # as shells have it: 128 + the number of SIGINT
NOBODY_READS = 141  # 128 + the number of SIGPIPE
_unfinished: set[Path] = set()  # files that are being written


def start(main: Callable[[], int | None]) -> NoReturn:
    """Runs main and ends the process."""
    signal.signal(signal.SIGINT, _stop)
    code = run(main)
    if code == NOBODY_READS:
        os._exit(code)  # as in `_stop`
    sys.exit(code)


def _stop(number: int, frame: object) -> NoReturn:
    """Ends the process at once.

    An exception may be lost, where C++ calls Python (garbage collection, for one). And what XLA's threads still compute
    would meet an interpreter that is gone.
    """
    for part in _unfinished:
        part.unlink(missing_ok=True)
    with contextlib.suppress(OSError, RuntimeError):  # which is what a print that was interrupted raises
        sys.stdout.flush()
    os.write(2, b"\ninterrupted\n")
    os._exit(INTERRUPTED)


def run(main: Callable[[], int | None]) -> int:
    """The exit code of main, also where it is interrupted or what reads its output goes away (`| head`)."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes at exit, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    return code or 0


def positive(text: str) -> int:
    """An argument that must be a positive integer, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer; got {text!r}")
    return int(text)


def check_writable(path: Path) -> None:
    """Raises ValueError where a file could not be written: for use before any work is done."""
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} must be a directory, to write {path.name} into")
    if path.is_dir():
        raise ValueError(f"{path} must be a file to write, and is a directory")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} must be a file that may be written, and is not")


def check_plot(path: Path) -> None:
    """The same for a picture, which also takes matplotlib and a format that it knows."""
    check_writable(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: python -m pip install matplotlib")
    from matplotlib.figure import Figure

    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ValueError(f"--plot must end in one of .{', .'.join(formats)}; got {path.name!r}")


def write(path: Path, text: str) -> None:
    """Writes a whole file or leaves the old one: whoever reads it at any time finds one or the other."""
    if path.exists() and not path.is_file():  # a device or a pipe
        path.write_text(text, encoding="utf-8")
        return
    whole = path.resolve()
    part = whole.with_name(f".{whole.name}.{os.getpid()}.part")
    _unfinished.add(part)
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(whole)
    finally:
        part.unlink(missing_ok=True)
        _unfinished.discard(part)


def write_or_report(name: str, writing: Callable[[], None]) -> bool:
    """Whether a file was written; what went wrong goes to stderr, so that no result is lost by it."""
    try:
        writing()
    except (OSError, ValueError) as error:
        print(f"{name} was not written: {error}", file=sys.stderr)
        return False
    return True
