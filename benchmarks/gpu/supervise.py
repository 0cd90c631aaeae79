"""Starts the worker, watches it, and starts another where it hangs or dies.

A kernel with a mistake in its barriers never returns, and one that writes where it must not takes the CUDA context
of its process with it. Neither may cost the rows behind it, so the device is left to a process that can be ended.
"""

import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu import record

NO_DEVICE, RESTART = 2, 75  # exit codes of the worker
POLL = 0.2
TIME_IS_OVER = "the time was over"


def run_together(watches: "Sequence[Watch]") -> int:
    """Runs them at the same time; NO_DEVICE if one of them says so, else 0."""
    with ThreadPoolExecutor(len(watches)) as pool:
        codes = [pool.submit(watch.run) for watch in watches]
        try:
            return max(NO_DEVICE if code.result() == NO_DEVICE else 0 for code in codes)
        finally:
            for watch in watches:
                watch.stop()


class Watch:
    """One worker after another, until all is measured or the time is over.

    Args:
      command: the worker's command line, for a number of threads to compile with.
      events: the file that workers append to.
      deadline: in the terms of `time.time()`.
      on_row: gets every new row.
    """

    def __init__(
        self,
        command: Callable[[int], list[str]],
        events: Path,
        deadline: float,
        on_row: Callable[[record.Row], None],
        *,
        jobs: int,
        stderr: Path,
        grace: float = 10.0,
    ) -> None:
        self._command, self._events, self._deadline, self._on_row = command, events, deadline, on_row
        self._jobs, self._stderr, self._grace = jobs, stderr, grace
        self._seen = 0
        self._stopped = threading.Event()
        self._last: dict[str, Any] = {"part": "machine", "label": "start", "limit": 120.0}

    def stop(self) -> None:
        """Ends the worker, from another thread."""
        self._stopped.set()

    def run(self) -> int:
        """Returns NO_DEVICE, or 0 when there is nothing left to do, or nothing that can be done."""
        while self._deadline - time.time() > 0 and not self._stopped.is_set():
            code, why = self._one()
            if code in (0, NO_DEVICE) or self._stopped.is_set():
                return code
            if why is None and code == RESTART:
                continue  # it has written the row itself
            if self._jobs > 1 and (why is None or self._last.get("shared")) and time.time() < self._deadline:
                # Which of those compiled at once did it? One at a time will tell.
                self._jobs = 1
                continue
            self._died(why or f"the process ended with code {code}: {self._stderr_line()}")
            if self._last["label"] == "start":
                return 0  # the next one would not come further
        return 0

    def _one(self) -> tuple[int, str | None]:
        """(exit code, why it was ended if it was)."""
        self._last = {"part": "machine", "label": "start", "limit": 120.0}
        with open(self._stderr, "a", encoding="utf-8") as stderr:
            process = subprocess.Popen(self._command(self._jobs), stdout=stderr, stderr=stderr)
        heard, why = time.time(), None
        try:
            while process.poll() is None and not self._stopped.is_set():
                time.sleep(POLL)
                if self._read():
                    heard = time.time()
                if time.time() - heard > self._last["limit"]:
                    why = f"hung: nothing came for {self._last['limit']:.0f} s"
                    break
                if time.time() > self._deadline + self._grace:
                    why = TIME_IS_OVER
                    break
        finally:
            process.kill()
            code = process.wait()
        self._read()
        return code, why

    def _read(self) -> bool:
        events = record.read_events(self._events)
        new, self._seen = events[self._seen :], len(events)
        for event in new:
            if "begin" in event:
                self._last = event["begin"]
            else:
                self._on_row(event["row"])
        return bool(new)

    def _died(self, why: str) -> None:
        status = "skip" if why == TIME_IS_OVER else "error"
        row = {"part": self._last["part"], "label": self._last["label"], "status": status, "why": why}
        record.append_event(self._events, {"row": row | {"fatal": True}})
        self._read()

    def _stderr_line(self) -> str:
        lines = self._stderr.read_text(encoding="utf-8", errors="replace").strip().split("\n")
        return lines[-1][:300]
