"""CANN's sparse modes: which one a call's arguments, or a static mask, ask for.

The table of the modes is in `jax_fa.cann.spec`. A `flash_attention_score` names its mode (`of_arguments`,
`of_packed_arguments`). For other calls it follows from the mask (`of_mask`, `of_packed`). In a band, the keys
i - left .. i + right are visible to row i: here counted from the top left, in modes 3 and 4 from the bottom right corner,
`d = Skv - Sq` further. A mask that no mode describes is passed as a full one, in mode 1, or in mode 0 with tokens that let
CANN skip blocks.
"""

from dataclasses import dataclass, replace

import numpy as np

from jax_fa import masks
from jax_fa.call import Dims
from jax_fa.cann import spec
from jax_fa.cann.spec import UNBOUNDED
from jax_fa.masks import Mask

Lengths = list[tuple[int, int]]  # (Sq_b, Skv_b) of packed sequences


@dataclass(frozen=True, kw_only=True)
class SparseMode:
    """A sparse mode and its arguments.

    `may_mask`: a row may be fully masked. `full`: the mask operand is one of our own, not the compressed one.
    """

    mode: int = 0
    pre: int = UNBOUNDED
    next: int = UNBOUNDED
    prefix: tuple[int, ...] = ()
    may_mask: bool = False
    full: bool = False

    def takes_table(self, Sq: int) -> bool:
        """Whether CANN takes an ALiBi table for as many keys as rows: where it calls the mode causal."""
        if self.mode == 0:
            return self.full and self.pre >= Sq and self.next == 0
        return self.mode in (2, 3)

    def rows(self, first: int, count: int, Sq: int, Skv: int) -> "SparseMode | None":
        """The same mask for `count` rows from `first` on, as a call of their own; None where all of it is masked."""
        if self.mode == 1 or (self.mode == 0 and not self.full):
            return self
        if self.full:
            pre, following = _shift(self.pre, -first), _shift(self.next, first)
            if self.mode == 0 and _meets(pre, following, count, Skv):
                return replace(self, pre=pre, next=following)
            return replace(self, mode=1, pre=UNBOUNDED, next=UNBOUNDED, prefix=())
        assert self.mode in (2, 3, 4), self  # a prefix is of whole sequences
        d = Skv - Sq
        left = None if self.mode != 4 else self.pre - d
        right = {2: 0, 3: d, 4: self.next + d}[self.mode]
        left = None if left is None else left - first
        return of_band(left, right + first, count, Skv)


FULL_MASK = SparseMode(mode=1, may_mask=True, full=True)


def _shift(tokens: int, by: int) -> int:
    return tokens if tokens == UNBOUNDED else tokens + by


# --- from the arguments of flash_attention_score


def of_arguments(given: spec.Arguments, d: Dims, own_mask: bool) -> SparseMode:
    """The mode of a `flash_attention_score` that is not packed; `own_mask`: with a full atten_mask."""
    mode, prefix = given.sparse_mode, given.prefix or ()
    left, right = _bounds(given, d)
    if own_mask:
        if mode == 5 and prefix:
            return replace(FULL_MASK, mode=5, prefix=prefix)
        if mode == 0 and (left, right) != (None, None):
            return _full_with_band(left, right, d)
        return FULL_MASK
    if mode in spec.PREFIX_MODES:  # without a mask, CANN ignores mode 5
        may_mask = d.Skv < d.Sq and min(prefix, default=0) == 0
        return SparseMode(mode=6, prefix=prefix, may_mask=may_mask)
    corner = d.Skv - d.Sq
    if mode == 4:
        left, right = (None if n is None else n + by for n, by in ((left, -corner), (right, corner)))
    elif mode != 0:
        left, right = None, {1: None, 2: 0, 3: corner}[mode]
    found = of_band(left, right, d.Sq, d.Skv) or FULL_MASK
    if mode < 2 or found.mode < 2:  # without a mask, CANN ignores the tokens of mode 0
        return found
    if mode != 4:
        return replace(found, mode=mode)
    if found.mode != 4:  # causal modes take an ALiBi table
        return found
    far = d.Sq + d.Skv
    return replace(found, mode=4, pre=min(given.pre_tokens, far), next=min(given.next_tokens, far))


def of_packed_arguments(
    given: spec.Arguments, d: Dims, lengths: Lengths, own_mask: bool
) -> SparseMode | None:
    """The mode of a `flash_attention_score` in layout TND; None where only a full mask of all rows will do."""
    mode = given.sparse_mode
    if own_mask:
        return SparseMode(mode=1, full=True)
    if mode == 1:
        return SparseMode()
    if mode in (2, 3):
        return SparseMode(mode=mode)
    if mode in (0, 4):
        return _of_packed_band(*_bounds(given, d), "top-left" if mode == 0 else "bottom-right", lengths)
    prefix = given.prefix or ()
    may_mask = any(n == 0 and sq > skv for n, (sq, skv) in zip(prefix, lengths, strict=False))
    return SparseMode(
        mode=mode, pre=given.pre_tokens, next=given.next_tokens, prefix=prefix, may_mask=may_mask
    )


def _bounds(given: spec.Arguments, d: Dims) -> tuple[int | None, int | None]:
    """(pre_tokens, next_tokens), None for a count that reaches past every corner."""
    far = d.Sq + d.Skv
    pre, following = (None if n >= far else n for n in (given.pre_tokens, given.next_tokens))
    return pre, following


# --- from a mask


def of_band(left: int | None, right: int | None, Sq: int, Skv: int) -> SparseMode | None:
    """Of keys i - left .. i + right visible to row i (None: no bound). None for a band outside of the rows and keys."""
    d, far = Skv - Sq, Sq + Skv
    left = None if left is None or left >= Sq - 1 else left
    right = None if right is None or right >= Skv - 1 else right
    if left is None and right is None:
        return SparseMode()
    may_mask = _may_mask(left, right, Sq, Skv)
    if left is None and right in (0, d):
        return SparseMode(mode=2 if right == 0 else 3, may_mask=may_mask)
    if not _meets(left, right, Sq, Skv):
        return None
    pre, following = far if left is None else left + d, far if right is None else right - d
    return SparseMode(mode=4, pre=pre, next=following, may_mask=may_mask)


def _may_mask(left: int | None, right: int | None, Sq: int, Skv: int) -> bool:
    """Whether the first or the last row has no key."""
    return (right is not None and right < 0) or (left is not None and Sq - 1 - left > Skv - 1)


def _meets(left: int | None, right: int | None, Sq: int, Skv: int) -> bool:
    """CANN's rule for tokens counted from the top left."""
    left, right = _tokens(left), _tokens(right)
    if left < 0 and right < 0:
        return False
    if left < 0:
        return right >= -left and -left < Skv
    return right >= 0 or (left >= -right and -right < Sq)


def _tokens(count: int | None) -> int:
    return UNBOUNDED if count is None else count


def _full_with_band(left: int | None, right: int | None, d: Dims) -> SparseMode:
    """A full mask, which holds the band too: the tokens let CANN skip blocks."""
    if not _meets(left, right, d.Sq, d.Skv):
        return FULL_MASK
    return SparseMode(pre=_tokens(left), next=_tokens(right), may_mask=True, full=True)


def of_mask(mask: Mask | None, d: Dims) -> SparseMode:
    """The sparse mode of a static mask kind in a call that is not packed."""
    if mask is None:
        return SparseMode()
    if isinstance(mask, masks.Prefix):
        return _of_prefix(mask, d)
    members = masks.members(mask)
    bands = [member for member in members if isinstance(member, masks.Band)]
    dense = [member for member in members if isinstance(member, masks.Dense)]
    if len(bands) + len(dense) != len(members) or not all(band.is_static for band in bands):
        return FULL_MASK
    left, right = _join(bands, d.Sq, d.Skv)
    if not dense:
        return of_band(left, right, d.Sq, d.Skv) or FULL_MASK
    return _full_with_band(left, right, d) if bands else FULL_MASK


def _join(bands: list[masks.Band], Sq: int, Skv: int) -> tuple[int | None, int | None]:
    """(left, right) of all bands together, from the top left."""
    lefts, rights = [], []
    for band in bands:
        offset = band.offset + (Skv - Sq if band.align == "bottom-right" else 0)
        if band.left is not None:
            lefts.append(int(band.left) - offset)
        if band.right is not None:
            rights.append(int(band.right) + offset)
    return min(lefts, default=None), min(rights, default=None)


def _of_prefix(mask: masks.Prefix, d: Dims) -> SparseMode:
    B = int(np.prod(d.B, dtype=np.int64))
    lengths = (mask.length,) if isinstance(mask.length, int) else mask.length
    if not isinstance(lengths, tuple) or not all(isinstance(n, int) for n in lengths):
        return FULL_MASK
    # vmap puts its batch dims in front: every entry of them has these lengths.
    if isinstance(mask.length, int):
        lengths = lengths * B
    elif len(d.B) and len(lengths) == d.B[-1]:
        lengths = lengths * (B // len(lengths))
    corner = d.Skv - d.Sq
    if (mask.align == "top-left" and corner) or len(lengths) != B or B > spec.MAX_BATCH_PREFIX:
        return FULL_MASK
    if not all(max(0, corner) <= n <= d.Skv for n in lengths):
        return FULL_MASK
    return SparseMode(mode=6, prefix=lengths, may_mask=corner < 0 and min(lengths, default=0) == 0)


def of_packed(within: Mask | None, lengths: Lengths) -> SparseMode | None:
    """The sparse mode of packed sequences, each with the band `within` (layout TND)."""
    if within is None:
        return SparseMode()
    if not isinstance(within, masks.Band) or not within.is_static:
        return None
    left = None if within.left is None else int(within.left) - within.offset
    right = None if within.right is None else int(within.right) + within.offset
    return _of_packed_band(left, right, within.align, lengths)


def _of_packed_band(
    left: int | None, right: int | None, align: masks.Align, lengths: Lengths
) -> SparseMode | None:
    """With `full`, the mask operand is that of the longest sequences, which every shorter one begins with."""
    pairs = [(sq, skv) for sq, skv in lengths if sq and skv]
    if left is None and right is None:
        return SparseMode()
    if align == "top-left" and any(sq != skv for sq, skv in pairs):
        return _top_left(left, right, pairs)
    if left is None and right == 0:
        return SparseMode(mode=3) if all(sq <= skv for sq, skv in pairs) else None
    longest = sum(max((pair[i] for pair in pairs), default=0) for i in (0, 1))
    pre, following = (longest if n is None else min(n, longest) for n in (left, right))
    # (The backward refuses the band of one key, which the forward takes.)
    if pre < 0 or pre + following <= 0 or not all(sq - following <= skv for sq, skv in pairs):
        return None
    return SparseMode(mode=4, pre=pre, next=following)


def _top_left(left: int | None, right: int | None, pairs: Lengths) -> SparseMode | None:
    if left is None and right == 0:
        return SparseMode(mode=2)
    pre, following = _tokens(left), _tokens(right)
    # Layout TND does not serve rows without a key.
    if following < 0 or pre + following <= 0 or not all(sq <= skv + pre for sq, skv in pairs):
        return None
    return SparseMode(pre=pre, next=following, full=True)
