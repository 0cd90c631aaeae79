"""Mask kinds as CANN's sparse modes.

`d = Skv - Sq`. Of a band, row i sees the keys i - left .. i + right; modes count from the bottom right corner:

    mode  row i sees key j where                     mask operand
    0     the mask is 0 (tokens only skip blocks)    full, or none: everything
    1     the mask is 0                              full
    2     j <= i                                     2048 x 2048
    3     j <= i + d                                 2048 x 2048
    4     i + d - pre <= j <= i + d + next           2048 x 2048
    5     the mask is 0 (it holds the prefix too)    full
    6     j <= i + d or j < prefix[b]                3072 x 2048

What no structure says goes as a full mask, in mode 1, or 0 with tokens that let CANN skip blocks.

Source: aclnnFlashAttentionScoreV2, sparseMode; ops-transformer `docs/context` on sparse modes.
"""

from dataclasses import dataclass, replace

import numpy as np

from jax_fa import masks
from jax_fa.call import Dims
from jax_fa.cann.spec import MAX_BATCH_PREFIX, UNBOUNDED
from jax_fa.masks import Mask


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """The numbers of a sparse mode.

    `hides`: a row may see nothing. `full`: the mask operand is one of our own, not the compressed one.
    """

    mode: int = 0
    pre: int = UNBOUNDED
    next: int = UNBOUNDED
    prefix: tuple[int, ...] = ()
    hides: bool = False
    full: bool = False

    def rows(self, first: int, count: int, Sq: int, Skv: int) -> "Sparse | None":
        """The same mask for `count` rows from `first` on, as a call of their own; None where they see nothing."""
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


def _shift(tokens: int, by: int) -> int:
    return tokens if tokens == UNBOUNDED else tokens + by


def of_band(left: int | None, right: int | None, Sq: int, Skv: int) -> Sparse | None:
    """Row i sees i - left .. i + right (None: no bound). None for a band outside of the rows and keys."""
    d, far = Skv - Sq, Sq + Skv
    left = None if left is None or left >= Sq - 1 else left
    right = None if right is None or right >= Skv - 1 else right
    if left is None and right is None:
        return Sparse()
    if left is None and right in (0, d):
        return Sparse(mode=2 if right == 0 else 3, hides=right < 0)
    if not _meets(left, right, Sq, Skv):
        return None
    hides = (right is not None and right < 0) or (left is not None and Sq - 1 - left > Skv - 1)
    return Sparse(
        mode=4,
        pre=far if left is None else left + d,
        next=far if right is None else right - d,
        hides=hides,
    )


def _meets(left: int | None, right: int | None, Sq: int, Skv: int) -> bool:
    """CANN's rule for tokens counted from the top left."""
    left = UNBOUNDED if left is None else left
    right = UNBOUNDED if right is None else right
    if left < 0 and right < 0:
        return False
    if left < 0:
        return right >= -left and -left < Skv
    return right >= 0 or (left >= -right and -right < Sq)


def of_mask(mask: Mask | None, d: Dims) -> Sparse | None:
    """The sparse mode of a static mask kind in a call that is not packed; None: none says it."""
    if mask is None:
        return Sparse()
    if isinstance(mask, masks.Prefix):
        return _of_prefix(mask, d)
    members = masks.members(mask)
    bands = [member for member in members if isinstance(member, masks.Band)]
    dense = [member for member in members if isinstance(member, masks.Dense)]
    if len(bands) + len(dense) != len(members) or not all(band.is_static for band in bands):
        return None
    left, right = _join(bands, d.Sq, d.Skv)
    if not dense:
        return of_band(left, right, d.Sq, d.Skv)
    # The full mask holds the band too; the tokens let CANN skip blocks.
    if not bands or not _meets(left, right, d.Sq, d.Skv):
        return None
    return Sparse(pre=_tokens(left), next=_tokens(right), hides=True, full=True)


def _tokens(count: int | None) -> int:
    return UNBOUNDED if count is None else count


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


def _of_prefix(mask: masks.Prefix, d: Dims) -> Sparse | None:
    B = int(np.prod(d.B, dtype=np.int64))
    lengths = (mask.length,) if isinstance(mask.length, int) else mask.length
    if not isinstance(lengths, tuple) or not all(isinstance(n, int) for n in lengths):
        return None
    # vmap puts its batch dims in front: every entry of them has these lengths.
    if isinstance(mask.length, int):
        lengths = lengths * B
    elif len(d.B) and len(lengths) == d.B[-1]:
        lengths = lengths * (B // len(lengths))
    corner = d.Skv - d.Sq
    if (mask.align == "top-left" and corner) or len(lengths) != B or B > MAX_BATCH_PREFIX:
        return None
    if not all(max(0, corner) <= n <= d.Skv for n in lengths):
        return None
    return Sparse(mode=6, prefix=lengths, hides=corner < 0 and min(lengths, default=0) == 0)


def of_packed(within: Mask | None, lengths: list[tuple[int, int]]) -> Sparse | None:
    """The sparse mode of packed sequences `(Sq_b, Skv_b)`, each with the band `within` (layout TND).

    With `full`, the mask operand is that of the longest sequences, which every shorter one begins with.
    """
    if within is None:
        return Sparse()
    if not isinstance(within, masks.Band) or not within.is_static:
        return None
    pairs = [(sq, skv) for sq, skv in lengths if sq and skv]
    left = None if within.left is None else int(within.left) - within.offset
    right = None if within.right is None else int(within.right) + within.offset
    if left is None and right is None:
        return Sparse()
    if within.align == "top-left" and any(sq != skv for sq, skv in pairs):
        return _top_left(left, right, pairs)
    if left is None and right == 0:
        return Sparse(mode=3) if all(sq <= skv for sq, skv in pairs) else None
    longest = sum(max((pair[i] for pair in pairs), default=0) for i in (0, 1))
    pre, following = (longest if n is None else min(n, longest) for n in (left, right))
    if pre < 0 or pre + following < 0 or not all(sq - following <= skv for sq, skv in pairs):
        return None
    return Sparse(mode=4, pre=pre, next=following)


def _top_left(left: int | None, right: int | None, pairs: list[tuple[int, int]]) -> Sparse | None:
    if left is None and right == 0:
        return Sparse(mode=2)
    pre, following = _tokens(left), _tokens(right)
    # Layout TND does not serve rows without a key.
    if following < 0 or pre + following < 0 or not all(sq <= skv + pre for sq, skv in pairs):
        return None
    return Sparse(pre=pre, next=following, full=True)
