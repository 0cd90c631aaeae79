"""What must hold: least values of figures, and which rows they are of."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
# Fractions of the peak at S=4096, full and causal, by the kind of products.
PEAK = {
    ("forward", 64): {"avx2": (0.76, 0.72), "avx512": (0.82, 0.78), "avx512_bf16": (0.74, 0.69)},
    ("forward", 128): {"avx2": (0.82, 0.78), "avx512": (0.86, 0.81), "avx512_bf16": (0.80, 0.75)},
    ("backward", 64): {"avx2": (0.75, 0.71), "avx512": (0.80, 0.76), "avx512_bf16": (0.73, 0.69)},
    ("backward", 128): {"avx2": (0.80, 0.76), "avx512": (0.83, 0.79), "avx512_bf16": (0.76, 0.72)},
}
# How many times longer PyTorch takes at S=4096.
TORCH = {
    "avx2": {"float32": 1.6, "bfloat16": 1.7},
    "avx512": {"float32": 2.3},
    "avx512_bf16": {"float32": 2.3, "bfloat16": 4.4},
}
# Fractions of our own plain call, forward and backward. A window may take 1.25 times its share of the products,
# packed sequences 1.15 times.
EXTRAS = {
    "mask": (0.90, 0.88),
    "bias over batch": (0.88, 0.80),
    "bias over heads": (0.88, 0.80),
    "learnt bias over batch": (0.88, 0.80),
    "learnt bias over heads": (0.88, 0.80),
    "learnt bias": (0.80, 0.65),
    "dropout": (0.85, 0.90),
    "soft cap": (0.80, 0.80),
    "window 512": (1 / 1.25, 1 / 1.25),
    "packed": (1 / 1.15, 1 / 1.15),
}
SHORT, DECODE, PREFILL, HALVES = 0.85, 0.85, 0.90, 0.95


@dataclass(frozen=True)
class Bound:
    row: str
    what: str
    least: float
    found: float

    @property
    def holds(self) -> bool:
        return self.found >= self.least


def check(rows: list[Row], instruction_set: str, sweep: dict[str, Any] | None = None) -> list[Bound]:
    """Those that apply to what was measured."""
    found = [
        Bound(f"{row['name']} {row['direction']}", what, least, value)
        for row in rows
        for what, least, value in _of_row(row, instruction_set)
    ]
    for row in (sweep or {}).get("worst", [])[:1]:
        found.append(Bound(f"worst of {sweep['rows']} in the sweep", "x jax.nn", 1.0, row["ratio"]))  # type: ignore[index]
    return found


def _of_row(row: Row, isa: str) -> Iterator[tuple[str, float, float]]:
    group, dtype, direction = row["group"], row["dtype"], row["direction"]
    pairs = isa == "avx512_bf16" and dtype == "bfloat16"
    if group == "long":
        if dtype == "float32" or pairs:
            kind = isa if pairs or isa != "avx512_bf16" else "avx512"
            bound = PEAK[direction, row["D"]].get(kind)
            if bound is not None:
                yield "of peak", bound[row["mask"] == "causal"], row["of_peak"]
        else:
            yield "of float32", HALVES, row["of_rate"]
        least = TORCH.get(isa, {}).get(dtype)
        if least is not None and "torch" in row["ratio"]:
            yield "x torch", least, row["ratio"]["torch"]
    elif group in ("short", "prefill"):
        yield "of the long rate", SHORT if group == "short" else PREFILL, row["of_rate"]
    elif group == "decode":
        yield "of bandwidth", DECODE, row["of_bandwidth"]
    elif group == "extras" and (row["extra"] or row["mask"]) in EXTRAS:
        yield "of plain", EXTRAS[row["extra"] or row["mask"]][direction == "backward"], row["of_rate"]
    if "jax.nn" in row["ratio"]:
        yield "x jax.nn", 1.0, row["ratio"]["jax.nn"]


def table(bounds: list[Bound]) -> str:
    lines = [f"must hold: {sum(bound.holds for bound in bounds)} of {len(bounds)} do"]
    for bound in sorted(bounds, key=lambda bound: bound.found / bound.least):
        verdict = "holds" if bound.holds else "MISSED"
        ratio = bound.what.startswith("x ")
        least, found = (f"{x:.2f}" if ratio else f"{x:.0%}" for x in (bound.least, bound.found))
        lines.append(f"  {bound.row:52} {found:>7} {bound.what:17} at least {least:>5}  {verdict}")
    return "\n".join(lines)
