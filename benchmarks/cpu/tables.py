"""Tables of documents that are made from the files of machines.

A document holds `<!--cpu TABLE FILE-->` and `<!--/cpu-->`; what is between them is made from the file.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_fa.demo import program

from . import report
from .report import Row

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = tuple(ROOT / name for name in ("README.md", "docs/performance.md", "benchmarks/README.md"))
BLOCK = re.compile(r"<!--cpu (?P<table>\S+) (?P<file>\S+)-->\n(?P<text>.*?)<!--/cpu-->", re.DOTALL)
DASH = "–"


def summary(found: dict[str, Any]) -> list[str]:
    """Causal attention of 4096 tokens: four rows, and the memory."""
    lines = [
        "Time relative to jax_fa's default backend, lower is faster. B=1, S=4096, 8 heads, head_dim 64;",
        f"{_machine(found)}.",
        "",
        *_head("causal attention on CPU", "jax_fa `cpu`", "jax_fa `xla`", "`jax.nn`", "PyTorch SDPA"),
    ]
    for dtype in ("float32", "bfloat16"):
        for direction in ("forward", "backward"):
            wanted = {"group": "long", "D": 64, "mask": "causal", "dtype": dtype, "direction": direction}
            row = next(row for row in found["rows"] if wanted.items() <= row.items())
            others = (f"{row['ratio'][name]:.1f}" for name in ("xla", "jax.nn", "torch"))
            lines.append(_line(f"{dtype}, {direction}", f"**1** ({row['of_peak']:.0%} of peak)", *others))
    xla, jax_nn = (f"{round(found['temporary_bytes'][name] / 2**20)} MiB" for name in ("xla", "jax.nn"))
    memory = "temporary memory, float32, forward and backward"
    return [*lines, _line(memory, "O(S), see note", xla, jax_nn, "not reported")]


def rates(found: dict[str, Any]) -> list[str]:
    """Where products are what counts: part of the peak, and how many times longer others take."""
    what = ("of peak", "`jax.nn`", "PyTorch")
    columns = (f"{direction}: {name}" for direction in ("forward", "backward") for name in what)
    lines = [f"{_machine(found)}.", "", *_head("8 heads", *columns)]
    for forward, backward in _pairs(found, "long", "short"):
        cells = []
        for row in (forward, backward):
            cells += (
                [DASH] * 3
                if row is None
                else [f"{row['of_peak']:.0%}", _times(row, "jax.nn"), _times(row, "torch")]
            )
        lines.append(_line(forward["name"], *cells))
    return lines


def fractions(found: dict[str, Any]) -> list[str]:
    """Of the bandwidth of reading, or of our own call that differs in one thing."""
    lines = [f"{_machine(found)}.", "", *_head("call", "forward", "backward", "of")]
    for row in (row for row in found["rows"] if row["group"] == "decode"):
        lines.append(_line(row["name"], f"{row['of_bandwidth']:.0%}", DASH, "bandwidth of reading"))
    for forward, backward in _pairs(found, "short", "prefill", "extras"):
        lines.append(_line(forward["name"], _part(forward), _part(backward), f"the rate of {forward['of']}"))
    return lines


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "summary": summary,
    "rates": rates,
    "fractions": fractions,
}


def write(document: Path) -> None:
    """Makes the tables of a document anew."""
    text, count = BLOCK.subn(_made, document.read_text(encoding="utf-8"))
    if not count:
        raise ValueError(
            f"{document.name} must have a block that begins with <!--cpu TABLE FILE-->; got none"
        )
    program.write(document, text)


def made(block: "re.Match[str]") -> str:
    """What belongs into a block."""
    table = TABLES.get(block["table"])
    if table is None:
        raise ValueError(f"a table must be among {', '.join(TABLES)}; got {block['table']}")
    return "\n".join([*table(report.read(ROOT / block["file"])), ""])


def _made(block: "re.Match[str]") -> str:
    return f"<!--cpu {block['table']} {block['file']}-->\n{made(block)}<!--/cpu-->"


def _machine(found: dict[str, Any]) -> str:
    machine = found["machine"]
    caches = "/".join(f"{kib}K" if kib < 1024 else f"{kib // 1024}M" for kib in machine["caches"].values())
    cores = f"{machine['cores']} core{'s' if machine['cores'] > 1 else ''}"
    versions = machine["versions"]
    return (
        f"{cores} of {machine['processor']} ({machine['instruction_set']}, caches {caches}), JAX {versions['jax']}, "
        f"PyTorch {versions['torch'].split('+')[0]}"
    )


def _pairs(found: dict[str, Any], *groups: str) -> list[tuple[Row, Row | None]]:
    """The rows of each call: forward, and backward if there is one."""
    by_name: dict[tuple[str, str], dict[str, Row]] = {}
    for row in found["rows"]:
        if row["group"] in groups:
            by_name.setdefault((row["group"], row["name"]), {})[row["direction"]] = row
    return [(rows["forward"], rows.get("backward")) for rows in by_name.values()]


def _times(row: Row, name: str) -> str:
    return f"{row['ratio'][name]:.1f}" if name in row["ratio"] else DASH


def _part(row: Row | None) -> str:
    return DASH if row is None else f"{row['of_rate']:.0%}"


def _head(*names: str) -> list[str]:
    return [_line(*names), "|".join(["", *("---" for _ in names), ""])]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
