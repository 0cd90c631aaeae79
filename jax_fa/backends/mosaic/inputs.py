"""What a kernel reads."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax

BY_TILE = ("bias_tile", "mask_tile")
BY_KEY = ("bias_keys", "mask_keys", "segment_key")
VISIBILITY = ("lower", "upper", "segment_row")
ADDITIVE = ("scale", "bias_rows", "slopes", "position", "soft_cap")
DROPPING = ("head_word", "batch_word", "keep_limit", "keep_inverse")
STATISTICS = ("maximum", "inverse", "delta")
BY_ROW = (*VISIBILITY, *ADDITIVE, *DROPPING, *STATISTICS)
BY_HEAD = ("scale", "soft_cap", *DROPPING)  # those of BY_ROW that all rows of a head share
RANGE = (
    "first",
    "inner_first",
    "inner_last",
    "last",
)  # tiles to visit; those between the inner ones need no masking


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Arrays of a kernel in the order of its arguments; absent ones are None. Also what a warpgroup has loaded of them.

    Where rows stay, rows and heads are in packed order (see geometry.py): `*#B #units rows` for `*#B #N Sq`.
    """

    batch_word: Any = None  # *#B #N Sq uint32, of the Philox counter
    bias_keys: Any = None  # *#B #N Skv float32
    bias_rows: Any = None  # *#B #N Sq float32
    bias_tile: Any = None  # *#B #N Sq Skv, or transposed where keys stay
    delta: Any = None  # *B N Sq float32, see operands.RowStatistics
    dout: Any = None  # stored like out
    head_word: Any = None  # *#B #N Sq uint32, of the Philox counter
    inverse: Any = None  # *B N Sq float32, see operands.RowStatistics
    keep_inverse: Any = None  # *#B #N Sq float32: 1 / keep probability
    keep_limit: Any = None  # *#B #N Sq uint32: kept are random numbers below it
    key: Any = None  # as stored
    lower: Any = None  # *#B #N Sq int32
    mask_keys: Any = None  # *#B #N Skv float32: 1 visible, 0 masked
    mask_tile: Any = None  # *#B #N Sq Skv int8, or transposed where keys stay
    maximum: Any = None  # *B N Sq float32, see operands.RowStatistics
    position: Any = None  # *#B #N Sq int32
    query: Any = None  # as stored
    ranges: Any = None  # *#B #N tiles 4 int32: see RANGE
    scale: Any = None  # *#B #N Sq float32
    seed: Any = None  # *#B 2 uint32; once loaded, a pair
    segment_key: Any = None  # *#B #N Skv int32
    segment_row: Any = None  # *#B #N Sq int32
    slopes: Any = None  # *#B #N Sq float32
    soft_cap: Any = None  # *#B #N Sq float32
    upper: Any = None  # *#B #N Sq int32
    value: Any = None  # as stored

    def present(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the names whose array is there."""
        return tuple(name for name in names if getattr(self, name) is not None)
