"""Rows: what the worker writes, what is read back, the file of results and the tables.

The worker appends a line of JSON to a file of events for every step (`begin`) and every result (`row`), so that
whoever watches knows what was running when it died, and loses nothing that was measured.
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gpu.work import exp_seconds

SCHEMA = 1
Row = dict[str, Any]
# ok: measured. pass, FAIL: a check; close: beyond the tolerance, but no worse than the portable one. skip: not tried, or
# refused for a stated reason. error: it raised. done: a part has come to its end.
STATUSES = ("ok", "pass", "close", "FAIL", "skip", "error", "done")
DEATHS_PER_PART = 4  # after so many a part is given up


class Events:
    """The file of events, in the worker."""

    def __init__(self, path: Path, settled: Iterable[tuple[str, str]] = ()) -> None:
        self._path = path
        rows = [event["row"] for event in read_events(path) if "row" in event]
        self._known = {(row["part"], row["label"]) for row in rows} | set(settled)
        self._deaths = [row["part"] for row in rows if row.get("fatal")]

    def begin(self, part: str, label: str, limit: float, shared: bool = False) -> None:
        """From here to the next event no more than `limit` seconds pass, or the worker hangs.

        `shared`: several rows are worked on at once, and the label is that of none.
        """
        self._append({"begin": {"part": part, "label": label, "limit": limit, "shared": shared}})

    def row(self, part: str, label: str, status: str, **more: Any) -> None:
        assert status in STATUSES, status
        self._known.add((part, label))
        self._append({"row": {"part": part, "label": label, "status": status, **more}})

    def knows(self, part: str, label: str) -> bool:
        """Whether this row was written, by this worker or one before it, or is settled."""
        return (part, label) in self._known

    def deadly(self, part: str) -> bool:
        """Whether this part has killed so many workers that it is given up."""
        return self._deaths.count(part) >= DEATHS_PER_PART

    def _append(self, event: dict[str, Any]) -> None:
        append_event(self._path, event)


def settled(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """(part, label) of the rows in files of results that need not be run again; the machine is described each time."""
    for file in files:
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            if row["part"] != "machine" and row["status"] in ("ok", "pass", "close"):
                yield row["part"], row["label"]


def append_event(path: Path, event: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(event, default=str) + "\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


class Results:
    """The file of results (always whole) and the log of what was printed beside it."""

    def __init__(self, folder: Path, options: dict[str, Any], show: Callable[[str], None] = print) -> None:
        self._folder, self._options, self._show = folder, options, show
        self.date = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime())
        self._lines: list[str] = []
        self.path: Path | None = None  # known when the device is
        self.rows: list[Row] = []
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        self._show(text)
        self._lines.append(text)
        if self.path is not None:
            self.path.with_suffix(".txt").write_text("\n".join(self._lines) + "\n", encoding="utf-8")

    def add(self, row: Row) -> None:
        with self._lock:  # several processes are watched at the same time
            self._add(row)

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is None and "device" in row:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.path = self._folder / f"{slug(row['device'])}-{self.date}.json"
        self.write(complete=False)
        if row["status"] != "done":
            self.say(line(row))

    def write(self, complete: bool) -> None:
        if self.path is None:
            return
        machine = next((row for row in self.rows if "device" in row), {})
        text = {
            "schema": SCHEMA,
            "date": self.date,
            "device": machine.get("device"),
            "versions": machine.get("versions"),
            "options": self._options,
            "complete": complete,
            "rows": self.rows,
        }
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self.path)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def exit_code(rows: Iterable[Row]) -> int:
    """1 if a check failed, none of them passed, or what is ours raised or computed something else; else 0."""
    rows = list(rows)
    checks = [row["status"] for row in rows if row["part"] == "checks" and row["status"] != "done"]
    nothing_checked = bool(checks) and "pass" not in checks
    return int(nothing_checked or any(row["status"] in ("FAIL", "error") for row in rows))


# --- text


def line(row: Row) -> str:
    """A row as it comes."""
    head = f"{row['part']:9} {row['label']}: "
    if row.get("contestants"):
        times = (_contestant(name, found) for name, found in row["contestants"].items())
        head += "; ".join(times)
        if row.get("ratio"):
            head += f"; ours / {row['best_peer']} = {row['ratio']:.2f}"
        return head + (f"  {row['status']}: {row['why']}" if row.get("why") else "")
    status = "" if row["status"] == "ok" else row["status"]
    seconds = f"({row['seconds']:.1f} s)" if "seconds" in row else ""
    return head + " ".join(x for x in (status, row.get("text"), row.get("why"), seconds) if x)


def _contestant(name: str, found: dict[str, Any]) -> str:
    if found.get("why"):
        return f"{name} -"  # the reasons come below the table, once each
    text = f"{name} {found['milliseconds']:.3f} ms ±{found['spread']:.0%}"
    if "tflops" in found:
        text += f" {found['tflops']:.0f} TF/s"
    if found.get("temp_bytes") is not None:
        text += f" temp {found['temp_bytes'] / 2**20:.0f} MiB"
    if found.get("host_bound"):
        text += " HOST-BOUND"
    return text


def table(rows: list[Row]) -> str:
    """TFLOP/s of every contestant by row, and how many times faster ours is than the best other one."""
    timed = [row for row in rows if row.get("contestants")]
    if not timed:
        return ""
    names = list(dict.fromkeys(name for row in timed for name in row["contestants"]))
    lines = [["row (TF/s)", *names, "ours/best peer", "best peer", "of floor"]]
    for row in timed:
        cells = [f"{row['part']} {row['label']}"]
        for name in names:
            found = row["contestants"].get(name, {})
            cells.append(f"{found['tflops']:.1f}" if "tflops" in found else "-")
        ratio = row.get("ratio")
        share = floor_share(row, rows)
        cells += [f"{ratio:.2f}" if ratio else "-", row.get("best_peer") or "-"]
        lines.append([*cells, "-" if share is None else f"{share:.0%}"])
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(lines[0]))]

    def laid(cells: list[str]) -> str:
        padded = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join(laid(cells) for cells in lines)


def floor_share(row: Row, rows: list[Row]) -> float | None:
    """The least time of the first contestant's row, over the time that it took; None where that is not known.

    The least time is that of the products at the rate of the machine's own large product, or of one exponential
    per pair, whichever is more: as if they overlapped in full.
    """
    machine = [r for r in rows if r["part"] == "machine"]
    device = next((r for r in machine if r.get("multiprocessors") and r.get("max_hertz")), None)
    product = next((r["tflops"] for r in machine if "tflops" in r), None)
    mine: dict[str, Any] = next(iter(row["contestants"].values()), {})
    if device is None or product is None or "tflops" not in mine or "pairs" not in row:
        return None
    exponentials = exp_seconds(row["pairs"], device["multiprocessors"], device["max_hertz"])
    least = max(row["flops"] / (product * 1e12), exponentials)
    return least / (mine["milliseconds"] / 1e3)


def reasons(rows: list[Row]) -> str:
    """Once each, why contestants have no number."""
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, result in (row.get("contestants") or {}).items():
            if result.get("why"):
                key = (name, result["why"])
                found[key] = found.get(key, 0) + 1
    return "\n".join(f"- {name} ({count} rows): {why}" for (name, why), count in found.items())


def best_configs(rows: list[Row]) -> dict[str, Row]:
    """By what was tuned, the fastest row."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["part"] == "tune" and row["status"] == "ok" and "milliseconds" in row:
            before = best.get(row["tuned"])
            if before is None or row["milliseconds"] < before["milliseconds"]:
                best[row["tuned"]] = row
    return best


def counts(rows: list[Row]) -> str:
    """How the checks went."""
    statuses = [row["status"] for row in rows if row["part"] == "checks"]
    names = {"pass": "passed", "close": "close", "FAIL": "FAILED", "error": "raised", "skip": "skipped"}
    return ", ".join(f"{statuses.count(status)} {name}" for status, name in names.items())
