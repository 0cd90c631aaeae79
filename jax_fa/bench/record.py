"""A run as a file: what was measured, on what, and every single time."""

import json
import os
import platform
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import jax_fa
from jax_fa.backends import cpu
from jax_fa.bench.measure import Result
from jax_fa.bench.shapes import call_from
from jax_fa.demo import program

SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class Run:
    """Results that may be compared with each other: taken in turn, in one process, on one machine."""

    id: str
    date: str  # ISO 8601, UTC
    environment: dict[str, Any]
    results: Sequence[Result]
    complete: bool = True  # False: the program was stopped, or has more to measure


def new_run(results: Sequence[Result]) -> Run:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Run(id=str(uuid.uuid4()), date=now, environment=environment(), results=results)


def environment() -> dict[str, Any]:
    """The hardware and the versions of all that takes part."""
    versions = {name: _version(name) for name in ("jax", "jaxlib", "numpy", "torch")}
    return {
        "devices": sorted({f"{device.platform}: {device.device_kind}" for device in jax.devices()}),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_set": cpu.instruction_set(),
        "tuning": cpu.tuning(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax_fa": jax_fa.__version__,
    } | {name: version for name, version in versions.items() if version is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(run: Run, path: Path) -> None:
    rows = [asdict(result) for result in run.results]
    head = {"schema": SCHEMA, "run": run.id, "date": run.date, "environment": run.environment}
    program.write(path, json.dumps(head | {"complete": run.complete, "rows": rows}, indent=1) + "\n")


def _result(row: dict[str, Any]) -> Result:
    row = row | {"call": call_from(row["call"])}
    if "contestant" in row:  # schema 1
        row["implementation"] = row.pop("contestant")
    return Result(**row)


def read(path: Path) -> Run:
    """Raises ValueError where the file is none of ours."""
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(text, dict) or text.get("schema") not in (1, SCHEMA):
            raise ValueError(f"schema must be {SCHEMA}")
        results = [_result(row) for row in text["rows"]]
        return Run(
            id=text["run"],
            date=text["date"],
            environment=text["environment"],
            results=results,
            complete=text.get("complete", True),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a file that --json wrote: {error}") from error
