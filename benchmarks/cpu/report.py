"""Lines of text, the file of a machine, and the table of the README that is made from it."""

import json
import re
from pathlib import Path
from typing import Any

from jax_fa.demo import program

Row = dict[str, Any]
SCHEMA = 1
ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
# What is between them is made from the file that the first one names.
BLOCK = re.compile(r"<!--cpu:(?P<file>\S+)-->\n(?P<text>.*?)<!--/cpu-->", re.DOTALL)


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


def update(path: Path, machine: dict[str, Any], **parts: Any) -> None:
    """Writes the parts into a machine's file; others that are there stay, if they are of the same versions."""
    found = read(path) if path.exists() else {}
    kept = found if found.get("machine", {}).get("versions") == machine["versions"] else {}
    text = json.dumps(kept | {"schema": SCHEMA, "machine": machine} | parts, indent=1)
    program.write(path, text + "\n")


# --- the README


def readme_table(found: dict[str, Any]) -> str:
    """The speed of a machine in words and a table."""
    machine, rows = found["machine"], found["rows"]
    caches = "/".join(f"{kib}K" if kib < 1024 else f"{kib // 1024}M" for kib in machine["caches"].values())
    cores = f"{machine['cores']} core{'s' if machine['cores'] > 1 else ''}"
    versions = machine["versions"]
    lines = [
        "Time relative to jax_fa's default backend, lower is faster. B=1, S=4096, 8 heads, head_dim 64;",
        f"{cores} of {machine['processor']} ({machine['instruction_set']}, caches {caches}), JAX {versions['jax']}, "
        f"PyTorch {versions['torch'].split('+')[0]}.",
        "",
        "| causal attention on CPU | jax_fa `cpu` | jax_fa `xla` | `jax.nn` | PyTorch SDPA |",
        "|---|---|---|---|---|",
    ]
    for dtype in ("float32", "bfloat16"):
        for direction in ("forward", "backward"):
            row = _row_of(rows, dtype, direction)
            others = " | ".join(f"{row['ratio'][name]:.1f}" for name in ("xla", "jax.nn", "torch"))
            lines.append(f"| {dtype}, {direction} | **1** ({row['of_peak']:.0%} of peak) | {others} |")
    xla, jax_nn = (round(found["temporary_bytes"][name] / 2**20) for name in ("xla", "jax.nn"))
    memory = f"O(S), see note | {xla} MiB | {jax_nn} MiB | not reported |"
    return "\n".join([*lines, f"| temporary memory, float32, forward and backward | {memory}", ""])


def _row_of(rows: list[Row], dtype: str, direction: str) -> Row:
    wanted = {"group": "long", "D": 64, "mask": "causal", "dtype": dtype, "direction": direction}
    return next(row for row in rows if wanted.items() <= row.items())


def write_readme(results: Path, document: Path = README) -> None:
    """Puts the table of these results into the README."""
    table = readme_table(read(results))
    name = results.resolve().relative_to(ROOT).as_posix()
    text, count = BLOCK.subn(
        lambda _: f"<!--cpu:{name}-->\n{table}<!--/cpu-->", document.read_text(encoding="utf-8")
    )
    if count != 1:
        raise ValueError(f"{document.name} must have one block that begins with <!--cpu:FILE-->; got {count}")
    program.write(document, text)
