"""One tile of logits inside a kernel, from the product query key^T on: forward and backward share it.

A tile lies in registers as `rows x keys`, or as `keys x rows` in the kernel whose keys stay (`row_axis` says which).
Everything here is elementwise, so a thread keeps to its own registers.

Exponentials are base 2, as the hardware has them: exp(x - m) = exp2(x c - m c), with c = log2(e). Where nothing is done
to the product but scaling, c takes the scale too, and one multiply-add per element is all there is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa import dropout
from jax_fa.problem import Problem

LOG2E = math.log2(math.e)
WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)  # a vector along the first axis of a tile
COLUMN = WGMMA.reduce(0)  # along the second
SPAN = 8  # columns that one group of four threads holds of a row

Read = Callable[[str], Any]  # a per-row, per-key or tile operand by name; None where absent


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Where a tile of logits stands."""

    problem: Problem
    shape: tuple[int, int]
    row_axis: int
    first_row: Any  # position of its first row
    first_key: Any
    positions: int  # rows repeat positions after so many (heads are packed)
    Skv: int

    def rows(self, x, shape: tuple[int, int] | None = None):
        """A number per row, over the tile."""
        return lax.broadcast_in_dim(x, shape or self.shape, [self.row_axis])

    def keys(self, x):
        return lax.broadcast_in_dim(x, self.shape, [1 - self.row_axis])

    def row_positions(self, shape: tuple[int, int] | None = None):
        shape = shape or self.shape
        at = plgpu.broadcasted_iota(jnp.int32, shape, self.row_axis, layout=WGMMA)
        if self.positions < shape[self.row_axis]:
            at = at & (self.positions - 1)
        return at + self.first_row

    def key_positions(self):
        return plgpu.broadcasted_iota(jnp.int32, self.shape, 1 - self.row_axis, layout=WGMMA) + self.first_key


@dataclass(frozen=True)
class Logits:
    """Finished logits x, so that exp2(x c - m c) is the weight before division."""

    x: Any
    c: float
    slope: Any = None  # dx/ds of the soft cap
    visible: Any = None  # None: all of it


def exponent_factor(problem: Problem, plain: bool) -> float:
    """c; it holds the scale where nothing else is done to the product, and a larger one means a larger logit."""
    return problem.scale * LOG2E if plain and problem.scale > 0 else LOG2E


def is_plain(problem: Problem, names) -> bool:
    """Whether logits are scaled products and no more."""
    shaped = ("bias_rows", "bias_keys", "bias_tile", "slopes")
    return problem.logits_soft_cap is None and not any(name in names for name in shaped)


def finish(tile: Tile, s, read: Read, plain: bool, bounded: bool) -> Logits:
    """Scale, bias, slopes, soft cap and masks; masked logits are -inf. `bounded`: some row may not see all keys.

    `poison`, a number per key, is added to what is visible: NaN where a key's value is not finite.
    """
    problem = tile.problem
    c = exponent_factor(problem, plain)
    slope = None
    if not plain or problem.scale <= 0:
        s = s * jnp.float32(problem.scale)
    if not plain:
        s = _add(tile, s, read)
        cap = problem.logits_soft_cap
        if cap is not None:
            # tanh by the exponential: the hardware's own has 11 bits only.
            t = 1.0 - 2.0 / (1.0 + jnp.exp2(s * jnp.float32(2 * LOG2E / cap)))
            s, slope = t * jnp.float32(cap), 1.0 - t * t
    if (poison := read("poison")) is not None:
        s = s + tile.keys(poison)
    visible = _visible(tile, read, bounded)
    if visible is not None:
        s = jnp.where(visible, s, -jnp.inf)
    return Logits(s, c, slope, visible)


def _add(tile: Tile, s, read: Read):
    if (bias := read("bias_tile")) is not None:
        s = s + bias.astype(jnp.float32)
    if (bias := read("bias_rows")) is not None:
        s = s + tile.rows(bias)
    if (bias := read("bias_keys")) is not None:
        s = s + tile.keys(bias)
    if (slopes := read("slopes")) is not None:
        s = s - tile.rows(slopes) * distance(tile)
    return s


def distance(tile: Tile):
    """What an ALiBi slope multiplies."""
    away = jnp.abs(tile.key_positions() - tile.row_positions()).astype(jnp.float32)
    return jnp.sqrt(away) if tile.problem.alibi == "sqrt" else away


def _visible(tile: Tile, read: Read, bounded: bool):
    terms = []
    if bounded:
        j = tile.key_positions()
        lower, upper = read("lower"), read("upper")
        if lower is not None:
            terms.append(j >= tile.rows(lower))
        terms.append(j < (jnp.int32(tile.Skv) if upper is None else tile.rows(upper)))
    if (mask := read("mask_keys")) is not None:
        terms.append(tile.keys(mask) > 0.5)
    if (mask := read("mask_tile")) is not None:
        terms.append(mask.astype(jnp.int32) != 0)
    visible = None
    for term in terms:
        visible = term if visible is None else visible & term
    return visible


def keep(tile: Tile, read: Read):
    """Keep bits of a tile, as `dropout.keep_tile` draws them; None without dropout."""
    seed = read("seed")
    if seed is None:
        return None
    threshold = jnp.uint32(dropout.threshold(tile.problem.keep_prob))
    return (_numbers_by_row if tile.row_axis == 0 else _numbers_by_key)(tile, read, seed) < threshold


def _philox(counter, seed):
    return dropout.philox4x32(counter, seed, multiply=_multiply_wide)


def _multiply_wide(a, b: int):
    """The high and low words of a product: one instruction on the chip, but 64 bits, which JAX hides by default."""
    with jax.enable_x64(True):
        product = lax.convert_element_type(a, np.uint64) * np.uint64(b)
        high = lax.shift_right_logical(product, np.uint64(32))
        return lax.convert_element_type(high, np.uint32), lax.convert_element_type(product, np.uint32)


def _half(word, odd):
    return jnp.where(odd, lax.shift_right_logical(word, jnp.uint32(16)), word & jnp.uint32(0xFFFF))


def _numbers_by_row(tile: Tile, read: Read, seed):
    """A counter yields 8 numbers, for columns 8 apart that one thread holds. So they are drawn for 8 columns of each
    block of 32 and unfolded: two registers of a thread compute each counter, and all its words are used."""
    rows, columns = tile.shape
    part = (rows, SPAN)
    column = plgpu.broadcasted_iota(jnp.int32, part, 1, layout=WGMMA)
    odd = (column & 1) == 1
    row = tile.row_positions(part).astype(jnp.uint32)
    head, batch = tile.rows(read("head_word"), part), tile.rows(read("batch_word"), part)
    pieces = []
    for block in range(-(-columns // dropout.BLOCK)):
        at = lax.div(tile.first_key, dropout.BLOCK) + block
        counter = (at * 4 + lax.shift_right_logical(column, 1)).astype(jnp.uint32)
        words = _philox((counter, row, head, batch), seed)
        pieces += [_half(word, odd) for word in words[: (columns - block * dropout.BLOCK) // SPAN]]
    return jnp.concatenate(pieces, axis=1)


def _numbers_by_key(tile: Tile, read: Read, seed):
    """The same for a tile `keys x rows`, where a thread holds too few keys to share counters: each element its own.
    Eight rows at a time, or the words of a whole tile would want all registers at once."""
    keys, rows = tile.shape
    part = (keys, SPAN)
    j = plgpu.broadcasted_iota(jnp.int32, part, 0, layout=WGMMA) + tile.first_key
    counter = (lax.shift_right_logical(j, 5) * 4 + lax.shift_right_logical(j & 7, 1)).astype(jnp.uint32)
    which, odd = lax.shift_right_logical(j, 3) & 3, (j & 1) == 1
    first = plgpu.broadcasted_iota(jnp.int32, part, 1, layout=WGMMA) + tile.first_row
    head, batch = read("head_word"), read("batch_word")
    pieces = []
    for at in range(0, rows, SPAN):
        inside = slice(at, at + SPAN)
        row = (first + at).astype(jnp.uint32)
        parts = (tile.rows(x[inside], part) for x in (head, batch))
        words = _philox((counter, row, *parts), seed)
        word = words[0]
        for i in (1, 2, 3):
            word = jnp.where(which == i, words[i], word)
        pieces.append(_half(word, odd))
    return jnp.concatenate(pieces, axis=1)
