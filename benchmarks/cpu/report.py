"""Lines of text, and the file of a machine."""

import json
from pathlib import Path
from typing import Any

from jax_fa.demo import program

Row = dict[str, Any]
SCHEMA = 1


def line(row: Row) -> str:
    limit = "of_bandwidth" if row["group"] == "decode" else "of_peak"
    parts = [
        f"{row['group']:>11} {row['name']:45} {row['direction']:>15}",
        f"{row['seconds']['cpu'] * 1e3:9.3f} ms {row['gflops']:7.1f} GF/s",
        f"{row[limit]:5.0%} {limit.replace('_', ' '):12}",
        " ".join(f"{name} {ratio:.2f}x" for name, ratio in row["ratio"].items()),
    ]
    if row["of_rate"] is not None:
        parts.append(f"{row['of_rate']:.0%} of the rate of {row['of']}")
    return "  ".join(part for part in parts if part)


def read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("schema") != SCHEMA:
        raise ValueError(f"{path} must be a file of schema {SCHEMA}; got {found.get('schema')}")
    return found


def update(path: Path, machine: dict[str, Any], *, some: bool = False, **parts: Any) -> None:
    """Writes the parts into a machine's file; others that are there stay, if they are of the same versions.

    `some`: the rows are not all of them, and take the places of those of the same names alone.
    """
    found = read(path) if path.exists() else {}
    kept = found if found.get("machine", {}).get("versions") == machine["versions"] else {}
    if some:
        parts["rows"] = _joined(kept.get("rows", []), parts["rows"])
        parts["complete"] = kept.get("complete", False)
    text = json.dumps(kept | {"schema": SCHEMA, "machine": machine} | parts, indent=1)
    program.write(path, text + "\n")


def _joined(rows: list[Row], new: list[Row]) -> list[Row]:
    found = {(row["name"], row["direction"]): row for row in (*rows, *new)}
    return list(found.values())
