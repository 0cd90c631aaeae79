"""The layouts of arrays with a sequence, heads and head_dim: the order in which their dims are stored."""

from typing import Any

from jax_fa import arguments

# The axes that put an array into the canonical order `B S N D` (or `S N D`).
LAYOUTS = {
    "BSND": (0, 1, 2, 3),
    "BNSD": (0, 2, 1, 3),
    "SBND": (1, 0, 2, 3),
    "SND": (0, 1, 2),
    "NSD": (1, 0, 2),
}


def axes_of(layout: str, name: str, x: Any) -> tuple[tuple[int, ...], str]:
    """Axes that put arrays of this layout into canonical order, and the layout spelt for their rank."""
    arguments.choice("layout", layout, LAYOUTS, _other_letters(layout))
    ndim = x.ndim
    if ndim < 3 or ("B" not in layout and ndim != 3) or (layout == "SBND" and ndim != 4):
        raise ValueError(f"{name} must have a rank that fits layout {layout!r}; got shape {x.shape}.")
    if layout == "SBND" or "B" not in layout:
        return LAYOUTS[layout], layout
    tail = (1, 0, 2) if layout == "BNSD" else (0, 1, 2)
    lead = ndim - 3
    return (*range(lead), *(lead + axis for axis in tail)), "B" * lead + layout[1:]


def _other_letters(layout) -> str:
    """Advice for a layout that is spelt in the letters of others: heads H, lengths T or L."""
    meant = str(layout).upper().replace("H", "N").replace("T", "S").replace("L", "S")
    return f" Heads are N and lengths S here: pass layout={meant!r}." if meant in LAYOUTS else ""
