"""CANN's sparse modes as masks. The table of the modes is in `spec`.

A compressed mask adds nothing to its mode: it is optional, checked where it is given, and then not read.

Source: as of `spec`; ops-transformer `op_host` tiling for what is refused.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_fa import arguments, indices, masks
from jax_fa.call import Dims
from jax_fa.cann import spec
from jax_fa.cann.packed import Packed, listed
from jax_fa.indices import known, list_of_integers
from jax_fa.masks import Mask


@dataclass(frozen=True)
class MaskArguments:
    """The arguments of the operator that say which keys are visible to a row."""

    mode: int
    pre_tokens: int | np.integer = spec.UNBOUNDED
    next_tokens: int | np.integer = spec.UNBOUNDED
    atten_mask: Any = None
    prefix: Any = None

    def mask(self, d: Dims, packed: Packed | None, *, lists: bool) -> Mask | None:
        """The mask of a call; raises where the arguments do not fit it or each other. `lists`: those of `packed.listed`."""
        check_mode(self.mode, packed is not None)
        self._check_tokens(d, packed)
        prefix = self._checked_prefix(d, packed)
        prefix = None if prefix is None else listed(prefix, lists)
        if packed is None:
            structure = self._structure(d, prefix)
        else:
            self._check_packed(packed)
            within = self._within(d, packed, prefix)
            structure = masks.CumulativeLengths(packed.query, packed.key, within)
        dense = self._dense(d, packed)
        if structure is None or dense is None:
            return dense if structure is None else structure
        return structure & dense

    def causal(self) -> bool:
        """Whether, with Sq == Skv, keys after its own position are masked for every row, by structure alone."""
        return self.mode in (2, 3) or (self.mode in (0, 4, 7) and int(self.next_tokens) <= 0)

    def full(self) -> bool:
        """Whether atten_mask is a mask of the caller's own, which is read."""
        return self.atten_mask is not None and self.mode in spec.FULL_MASK_MODES

    # --- checks

    def _check_tokens(self, d: Dims, packed: Packed | None) -> None:
        for name in ("pre_tokens", "next_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name} must be an int; got {value!r}.")
        pre, following = int(self.pre_tokens), int(self.next_tokens)
        problem = None
        if self.mode not in spec.TOKEN_MODES:
            if self.mode == 7 and following > 0:
                problem = "next_tokens must be at most 0"
        elif packed is not None:
            first = ("next_tokens", following) if self.mode == 0 else ("pre_tokens", pre)
            if first[1] < 0:
                problem = f"{first[0]} must be at least 0 with layout TND"
            elif pre + following < 0:
                problem = "pre_tokens + next_tokens must be at least 0"
        elif _numbers(d) and 0 not in (d.Sq, d.Skv):
            shift = d.Skv - d.Sq if self.mode == 4 else 0  # from the bottom right corner to the top left
            if pre + following < 0 or pre - shift <= -d.Skv or following + shift <= -d.Sq:
                problem = f"the band between them must meet the {d.Sq} x {d.Skv} logits"
        if problem is not None:
            raise ValueError(
                f"pre_tokens and next_tokens do not fit sparse_mode={self.mode}: {problem}; "
                f"got pre_tokens={pre}, next_tokens={following}."
            )

    def _check_packed(self, packed: Packed) -> None:
        """As CANN does, refuses sequences (where known) with rows that the structure leaves without keys."""
        lengths = packed.lengths()
        if lengths is None:
            return
        sq, skv = lengths
        pre = int(self.pre_tokens)
        empty = np.zeros(packed.count, bool)
        if self.mode in (3, 4, 7, 8):
            empty = self._edges(sq, skv, np) < 0
        if self.mode == 0:
            empty = skv + pre < sq
        if self.mode in (7, 8):
            band = self._band(sq, np)
            if np.any(band & (pre < skv)):
                raise ValueError(
                    f"pre_tokens must be at least the key length of the sequence with the band, "
                    f"{skv[band].tolist()}, in sparse_mode={self.mode}; got {pre}."
                )
        at = np.flatnonzero(empty & (sq > 0) & (skv > 0))
        if at.size:
            b = int(at[0])
            raise ValueError(
                f"sparse_mode={self.mode} leaves rows of sequence {b} (Sq={sq[b]}, Skv={skv[b]}, "
                f"pre_tokens={pre}, next_tokens={self.next_tokens}) without a key, which layout TND does not "
                "allow. Change the tokens or the sequence."
            )

    def _checked_prefix(self, d: Dims, packed: Packed | None):
        """prefix as a tuple or an array, or None."""
        absent = self.prefix is None or (isinstance(self.prefix, (list, tuple)) and not self.prefix)
        if self.mode not in spec.PREFIX_MODES:
            if not absent:
                raise ValueError(f"prefix is for sparse_mode 5 and 6; got {self.prefix} with {self.mode}.")
            return None
        count = d.B[0] if packed is None else packed.count
        if absent and count:
            raise ValueError(
                f"prefix must hold one length per batch entry in sparse_mode={self.mode}; got None."
            )
        prefix = list_of_integers("prefix", () if self.prefix is None else self.prefix)
        if np.shape(prefix) != (count,):
            raise ValueError(f"prefix must have B={count} entries; got {np.shape(prefix)[0]}.")
        lengths = (d.Sq, d.Skv) if packed is None else packed.lengths()
        values = known(prefix)
        if values is not None and lengths is not None:
            low, high = np.maximum(0, np.subtract(lengths[1], lengths[0])), np.asarray(lengths[1])
            if np.any((values < low) | (values > high)):
                raise ValueError(
                    f"prefix must be in max(0, Skv - Sq) .. Skv = {low.tolist()} .. {high.tolist()}; "
                    f"got {values.tolist()}."
                )
        return prefix

    # --- structure

    def _structure(self, d: Dims, prefix) -> Mask | None:
        """The mask of a call that is not packed, without atten_mask."""
        if self.mode in spec.TOKEN_MODES:
            return self._tokens("top-left" if self.mode == 0 else "bottom-right", d)
        if self.mode in spec.PREFIX_MODES:
            return masks.Prefix(prefix, "bottom-right")
        return {1: None, 2: masks.Causal(), 3: masks.Causal("bottom-right")}[self.mode]

    def _tokens(self, align: masks.Align, d: Dims) -> masks.Band | None:
        # Counts that reach past every corner bound nothing, and None costs nothing.
        far = d.Sq + d.Skv if _numbers(d) else spec.UNBOUNDED
        left, right = (None if n >= far else int(n) for n in (self.pre_tokens, self.next_tokens))
        return None if left is None and right is None else masks.Band(left, right, align)

    def _within(self, d: Dims, packed: Packed, prefix) -> masks.Band | None:
        """The band inside each packed sequence."""
        if self.mode < 5:
            band = self._structure(d, None)
            assert band is None or isinstance(band, masks.Band)
            return band
        rows = packed.rows()
        if self.mode == 6:
            # j < max(i + d + 1, prefix[b]) is a causal band whose offset depends on the row.
            reach = jnp.asarray(indices.int32(prefix))[rows.sequence] - 1 - rows.position
            return masks.Causal(offset=jnp.maximum(rows.skv - rows.sq, reach)[None])
        return masks.Causal(offset=self._edges(*packed.sizes(), jnp)[rows.sequence][None])

    def _edges(self, sq, skv, xp):
        """The last key visible to row 0 of each sequence, in modes 3, 4, 7 and 8."""
        following = min(int(self.next_tokens), 2**30)
        if self.mode in (3, 4):
            return skv - sq + (following if self.mode == 4 else 0)
        end, start = (skv - sq, 0) if self.mode == 7 else (0, skv - sq)
        return end + xp.where(self._band(sq, xp), start + max(following, -(2**30)), 0)

    def _band(self, sq, xp):
        """True for the sequence that modes 7 and 8 treat apart: the last or first one with rows."""
        at = xp.arange(sq.shape[0])
        if self.mode == 7:
            return at == xp.max(xp.where(sq > 0, at, -1))
        return at == xp.min(xp.where(sq > 0, at, sq.shape[0]))

    # --- atten_mask

    def _dense(self, d: Dims, packed: Packed | None) -> masks.Dense | None:
        """What atten_mask adds to the structure."""
        mask = self.atten_mask
        if mask is None:
            return None
        mask = arguments.host_array("atten_mask", mask)
        if mask.dtype not in (np.bool_, np.uint8):
            raise TypeError(f"atten_mask must have dtype bool or uint8 (1 = masked); got {mask.dtype}.")
        if self.mode not in spec.FULL_MASK_MODES:
            self._check_compressed(mask)
            return None
        if packed is not None:
            return masks.Dense(_spread(mask, d.N, packed))
        allowed: tuple[tuple[Any, ...], ...] = ((*d.B, d.N, d.Sq, d.Skv), (*d.B, 1, d.Sq, d.Skv))
        if self.mode != 5 or d.B == (1,):
            allowed += ((1, 1, d.Sq, d.Skv), (d.Sq, d.Skv))
        if mask.shape not in allowed:
            raise ValueError(
                f"atten_mask must have one of the shapes {', '.join(map(str, dict.fromkeys(allowed)))} in "
                f"sparse_mode={self.mode}; got {mask.shape}."
            )
        return masks.Dense(_visible(mask))

    def _check_compressed(self, mask) -> None:
        pattern = spec.compressed_mask(self.mode == 6)
        rank = mask.ndim - 2
        if mask.shape[max(0, rank) :] != pattern.shape or mask.shape[: max(0, rank)] != (1,) * rank:
            raise ValueError(
                f"atten_mask must have shape {pattern.shape} in sparse_mode={self.mode}; got {mask.shape}. "
                "A mask of your own goes with sparse_mode=0 or 1."
            )
        values = known(mask)
        if values is not None and not _same_bits(values.reshape(pattern.shape), pattern):
            top = f"np.triu(np.ones(({spec.MASK_SIDE}, {spec.MASK_SIDE})), 1)"
            below = f", with {spec.PREFIX_ROWS} rows below it that are 0 on the left half and 1 on the right,"
            raise ValueError(
                f"atten_mask must be {top}{below if self.mode == 6 else ''} in sparse_mode={self.mode}; got "
                "another pattern. A mask of your own goes with sparse_mode=0 or 1."
            )


def _same_bits(mask: np.ndarray, pattern: np.ndarray) -> bool:
    """Whether they are 0 at the same places; at each call outside of jit, eight bytes at a time where both hold 0 and 1 alone."""
    words, wanted = (np.ascontiguousarray(x).view(np.uint64) for x in (mask, pattern))
    return np.array_equal(words, wanted) or np.array_equal(mask != 0, pattern != 0)


def check_mode(mode, packed: bool) -> None:
    modes = spec.PACKED_MODES if packed else spec.MODES
    if mode not in modes or isinstance(mode, bool):
        where = "with layout TND" if packed else "(7 and 8 are for layout TND)"
        raise ValueError(f"sparse_mode must be one of {', '.join(map(str, modes))} {where}; got {mode!r}.")


def _numbers(d: Dims) -> bool:
    """Whether the lengths are numbers: symbolic ones (jax.export) cannot be compared."""
    return isinstance(d.Sq, int) and isinstance(d.Skv, int)


def _visible(mask):
    return jnp.logical_not(jnp.asarray(mask).astype(jnp.bool_))


def _spread(mask, N: int, packed: Packed):
    """Visibility over the packed axes, boolean `[N] Sq Skv`, from a mask of any shape that TND takes."""
    lengths = packed.lengths()
    whole = (packed.Sq, packed.Skv)
    # One mask for all sequences, or `[B, 1 or N, max Sq_b, max Skv_b]`: one for each.
    lead = mask.shape[:-2]
    each = lead not in ((), (1, 1)) and lead in ((packed.count, 1), (packed.count, N))
    shape = mask.shape[-2:] if each or mask.shape[:-2] == (1,) * (mask.ndim - 2) else mask.shape
    if shape == whole and not each:
        return _visible(mask.reshape(shape))
    if lengths is None:
        fits = len(shape) == 2 and shape[0] <= packed.Sq and shape[1] <= packed.Skv and 0 not in shape
        total, wanted = None, f"(max Sq_b, max Skv_b) or {whole}"
    else:
        longest, total = (tuple(int(f(x)) for x in lengths) for f in (np.max, np.sum))
        fits = shape == longest or (shape == total and not each)
        wanted = f"(max Sq_b, max Skv_b)={longest} or (sum Sq_b, sum Skv_b)={total}"
    if not fits:
        raise ValueError(
            f"atten_mask must have shape {wanted}, or (B, 1 or N, max Sq_b, max Skv_b) with B={packed.count}, N={N}, in layout "
            f"TND; got {mask.shape}."
        )
    if 0 in shape:
        return jnp.zeros(whole, bool)
    visible = _visible(mask.reshape(-1, *shape))
    if shape == total and not each:
        return jnp.pad(visible[0], [(0, n - size) for n, size in zip(whole, shape, strict=True)])
    rows, j = packed.rows(), packed.keys().position
    i, j = jnp.minimum(rows.position, shape[0] - 1), jnp.minimum(j, shape[1] - 1)
    if not each:
        return visible[0, i][:, j]
    found = visible.reshape(lead + shape)[rows.sequence[:, None], :, i[:, None], j]
    return found[..., 0] if lead[1] == 1 else jnp.moveaxis(found, -1, 0)
