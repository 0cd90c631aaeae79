"""Draws the pictures of masks: `python -P docs/draw_masks.py [DIRECTORY]` writes them as SVG, by default to docs/images.

Each picture shows what the library computes, not what it should: with a query of 0 all visible keys have the same
weight, and with the identity as values the output is the weights.
"""

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import jax.numpy as jnp
import jax_fa
import numpy as np
from jax_fa.masks import (
    Band,
    Causal,
    CumulativeLengths,
    Dense,
    Lengths,
    Prefix,
    SegmentIds,
    SlidingWindow,
)

ROWS, KEYS, TILE, CELL = 12, 16, 4, 9
SKIPPED, MASKED, VISIBLE, WHOLE = "#e4e4e4", "#fbe3c4", "#7fb2d9", "#24608f"
LEGEND = (
    ("visible, in a tile without masking", WHOLE),
    ("visible", VISIBLE),
    ("masked", MASKED),
    ("tile not visited", SKIPPED),
)
IDS = np.array([1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0])
MIXED = np.array([1, 1, 2, 1, 2, 2, 1, 3, 3, 2, 3, 3])

# name of the file: (caption, mask, rows, keys) of its panels
MASKS = {
    "causal": [
        ("Causal()", Causal(), ROWS, KEYS),
        ('Causal("bottom-right")', Causal("bottom-right"), ROWS, KEYS),
        ("Causal(offset=2)", Causal(offset=2), ROWS, KEYS),
    ],
    "sliding-window": [
        ("SlidingWindow(4, 0)", SlidingWindow(4, 0), ROWS, KEYS),
        ("SlidingWindow(3, 2)", SlidingWindow(3, 2), ROWS, KEYS),
        (
            'SlidingWindow(4, 0, "bottom-right")',
            SlidingWindow(4, 0, "bottom-right"),
            ROWS,
            KEYS,
        ),
    ],
    "band": [
        ("Band(6, -2)", Band(6, -2), ROWS, KEYS),
        ("Band(None, -1)", Band(None, -1), ROWS, KEYS),
        ("Band(-1, 5)", Band(-1, 5), ROWS, KEYS),
    ],
    "prefix": [
        ("Prefix(6)", Prefix(6), ROWS, KEYS),
        ('Prefix(9, "bottom-right")', Prefix(9, "bottom-right"), ROWS, KEYS),
    ],
    "lengths": [
        ("Lengths(key=11)", Lengths(key=11), ROWS, KEYS),
        ("Lengths(query=9, key=11)", Lengths(query=9, key=11), ROWS, KEYS),
        ("Causal() & Lengths(key=9)", Causal() & Lengths(key=9), ROWS, KEYS),
    ],
    "cumulative-lengths": [
        ("CumulativeLengths((3, 8, 12))", CumulativeLengths((3, 8, 12)), ROWS, ROWS),
        (
            "(3, 8, 12), within=Causal()",
            CumulativeLengths((3, 8, 12), within=Causal()),
            ROWS,
            ROWS,
        ),
        ("(3, 8, 12), (5, 10, 16)", CumulativeLengths((3, 8, 12), (5, 10, 16)), ROWS, KEYS),
    ],
    "segment-ids": [
        ("ids 111122222000, padding_id=0", SegmentIds(IDS, padding_id=0), ROWS, ROWS),
        ("ids 112122133233", SegmentIds(MIXED), ROWS, ROWS),
        (
            "ids 112122133233, within=Causal()",
            SegmentIds(MIXED, within=Causal()),
            ROWS,
            ROWS,
        ),
    ],
    "dense": [
        (
            "Dense(array)",
            Dense(np.add.outer(np.arange(ROWS), np.arange(KEYS)) % 5 < 3),
            ROWS,
            KEYS,
        ),
        (
            "SlidingWindow(5) & Lengths(key=10)",
            SlidingWindow(5) & Lengths(key=10),
            ROWS,
            KEYS,
        ),
    ],
    "union": [
        (
            "SlidingWindow(3) | Lengths(key=2)",
            SlidingWindow(3) | Lengths(key=2),
            ROWS,
            KEYS,
        ),
        (
            "Causal() & (... | ...)",
            Causal() & (SlidingWindow(3) | Lengths(key=2)),
            ROWS,
            KEYS,
        ),
        ("~SlidingWindow(3, 2)", ~SlidingWindow(3, 2), ROWS, KEYS),
    ],
}

OWN = jnp.asarray(
    ((np.arange(ROWS)[:, None] // 3 + np.arange(KEYS) // 4) % 3 == 1).astype(np.uint8)
)
PACKED = {
    "input_layout": "TND",
    "actual_seq_qlen": (3, 7, 12),
    "actual_seq_kvlen": (4, 9, 16),
}
MODES = [
    ("0, pre 5, next 3", {"sparse_mode": 0, "pre_tokens": 5, "next_tokens": 3}),
    ("1, with atten_mask", {"sparse_mode": 1, "atten_mask": OWN}),
    ("2", {"sparse_mode": 2}),
    ("3", {"sparse_mode": 3}),
    ("4, pre 6, next 1", {"sparse_mode": 4, "pre_tokens": 6, "next_tokens": 1}),
    (
        "5, prefix 9, atten_mask",
        {"sparse_mode": 5, "prefix": [9], "atten_mask": OWN[None, None]},
    ),
    ("6, prefix 9", {"sparse_mode": 6, "prefix": [9]}),
    ("3, TND", {"sparse_mode": 3, **PACKED}),
    ("7, TND, next -2", {"sparse_mode": 7, "next_tokens": -2, **PACKED}),
    ("8, TND, next 1", {"sparse_mode": 8, "next_tokens": 1, **PACKED}),
]


def visible(mask, rows: int, keys: int) -> np.ndarray:
    query, key, value = (
        np.zeros((rows, 1, 8)),
        np.zeros((keys, 1, 8)),
        np.eye(keys)[:, None],
    )
    arrays = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
    return np.asarray(jax_fa.flash_attention(*arrays, mask=mask, layout="SND"))[:, 0] > 0


def visible_in_mode(arguments: dict) -> np.ndarray:
    query, key, value = (
        np.zeros((ROWS, 1, KEYS)),
        np.zeros((KEYS, 1, KEYS)),
        np.eye(KEYS)[:, None],
    )
    packed = "input_layout" in arguments
    arrays = (
        jnp.asarray(x if packed else x[None], jnp.float32) for x in (query, key, value)
    )
    arguments = {"input_layout": "BSND", **arguments}
    out = jax_fa.flash_attention_score(*arrays, head_num=1, **arguments).attention_out
    return np.asarray(out).reshape(ROWS, KEYS) > 0


def panel(seen: np.ndarray, structure: np.ndarray) -> list[str]:
    """The cells as runs of one colour. `structure` is what is visible without regard to a boolean array."""

    def tiles(reduce, x):
        found = reduce(x.reshape(len(x) // TILE, TILE, -1, TILE), (1, 3))
        return np.kron(found, np.ones((TILE, TILE), bool))

    read = (structure != seen).any()
    whole = tiles(np.all, seen) & (not read)
    visited = tiles(np.any, structure)
    colours = np.where(
        seen, np.where(whole, WHOLE, VISIBLE), np.where(visited, MASKED, SKIPPED)
    )
    shapes = []
    for i, row in enumerate(colours):
        for colour, run in groupby(range(len(row)), row.__getitem__):
            run = list(run)
            shapes.append(
                _rectangle(run[0] * CELL, i * CELL, len(run) * CELL, CELL, colour)
            )
    height, width = (n * CELL for n in seen.shape)
    lines = [f"M{x} 0V{height}" for x in range(0, width + 1, TILE * CELL)]
    lines += [f"M0 {y}H{width}" for y in range(0, height + 1, TILE * CELL)]
    return [*shapes, f'<path d="{"".join(lines)}" stroke="#fff" stroke-width="1.2"/>']


def _rectangle(x: int, y: int, width: int, height: int, colour: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{colour}"/>'


def picture(
    panels: Sequence[tuple[str, np.ndarray, np.ndarray]], title: str, columns: int = 3
) -> str:
    """An SVG: rows of panels, each under its caption, and a legend. The grey of the text suits light and dark pages."""
    across, down, top = 224, ROWS * CELL + 40, 20
    parts = []
    for n, (caption, seen, structure) in enumerate(panels):
        x, y = n % columns * across, top + n // columns * down
        parts.append(
            f'<g transform="translate({x} {y})"><text y="-6">{_escaped(caption)}</text>'
        )
        parts += [*panel(seen, structure), "</g>"]
    width = min(len(panels), columns) * across
    y = top + -(-len(panels) // columns) * down - 22
    x = 0
    for text, colour in LEGEND:
        if x + 7 * len(text) > width:
            x, y = 0, y + 16
        parts += [
            _rectangle(x, y, CELL, CELL, colour),
            f'<text x="{x + 14}" y="{y + 9}">{text}</text>',
        ]
        x += 26 + round(6.2 * len(text))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 14}" viewBox="0 0 {width} {y + 14}" '
        f'role="img" fill="#777" font-family="monospace" font-size="10.5"><title>{_escaped(title)}</title>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def pictures() -> dict[str, str]:
    """File names and their texts."""
    found = {}
    for name, panels in MASKS.items():
        drawn = []
        for caption, mask, rows, keys in panels:
            seen = visible(mask, rows, keys)
            drawn.append(
                (caption, seen, np.ones_like(seen) if isinstance(mask, Dense) else seen)
            )
        title = f"Visible keys (across) of each row (down): {name.replace('-', ' ')}"
        found[f"mask-{name}.svg"] = picture(drawn, title)
    modes = []
    for caption, arguments in MODES:
        without = {name: x for name, x in arguments.items() if name != "atten_mask"}
        modes.append(
            (f"mode {caption}", visible_in_mode(arguments), visible_in_mode(without))
        )
    found["sparse-modes.svg"] = picture(
        modes, "Visible keys (across) of each row (down) in every sparse mode"
    )
    return found


if __name__ == "__main__":
    directory = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "images"
    for name, text in pictures().items():
        (directory / name).write_text(text, encoding="utf-8")
