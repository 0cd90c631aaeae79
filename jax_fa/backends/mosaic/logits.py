"""One tile of logits inside a kernel, from the product query key^T on: forward and backward share it.

A tile lies in registers as `rows x keys`, or as `keys x rows` in the kernel whose keys stay (`row_axis` says which).
Everything here is elementwise, so a thread keeps to its own registers.

Exponentials are base 2, as the hardware has them. Where nothing is done to the product but scaling by a static factor,
exp(scale x - m) is exp2(x c - m log2(e)) with c = scale log2(e): one multiply-add per element. Everywhere else it is
exp2((x - m) log2(e)), which stays right where logits are as large as float32 goes. The forward and the gradients round
these exponents alike (m is what the forward returns, in nats), so that both have the same weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa import dropout
from jax_fa.backends.mosaic.geometry import LOG2E
from jax_fa.backends.mosaic.memory import opaque
from jax_fa.call import Problem
from jax_fa.softmax import FLT_MAX

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)  # a vector along the first axis of a tile
COLUMN = WGMMA.reduce(0)  # along the second
LARGE_CAP = 256.0  # up to it a soft cap by the exponential is off by less than 2**-13
NEAR_0 = 0.1  # where the series of tanh, cut after x**5, has float32's digits
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
        """A scalar per row, or one of all rows, over the tile."""
        return lax.broadcast_in_dim(x, shape or self.shape, [self.row_axis] if x.ndim else [])

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


class Logits(NamedTuple):
    """Finished logits, or what the gradients need of them beside the weights (x is None then)."""

    x: Any  # -inf where masked; times `unit_of` they are in nats
    product: Any  # query key^T
    visible: Any = None  # None: all of it
    slope: Any = None  # the derivative of the soft cap by the logits before it; None without a cap
    cap_slope: Any = None  # ... and by the cap

    def without_x(self) -> "Logits":
        return self._replace(x=None)


def unit_of(problem: Problem, plain: bool) -> float:
    """What makes nats of the finished logits: the scale, where these are plain and a larger one is a larger logit."""
    return problem.scale if plain and problem.scale > 0 else 1.0


def start_of_maximum(plain: bool) -> float:
    """Finite, also times log2(e) (see `in_exponent`): a row without a visible key gives exp2(-inf)."""
    return -FLT_MAX / 2 if plain else -FLT_MAX


def in_exponent(m, plain: bool):
    """A maximum in nats as it is subtracted in exponents; `RowStatistics.maximum` is the same."""
    return m * jnp.float32(LOG2E) if plain else m


def rescale(before, after, plain: bool):
    """exp(m - m') of two maxima, as `in_exponent` has them."""
    return jnp.exp2(before - after if plain else (before - after) * jnp.float32(LOG2E))


def weights(tile: Tile, done: Logits, maximum, plain: bool):
    """exp(logits - m); `maximum` per row, as `in_exponent` has it."""
    if plain:
        return jnp.exp2(done.x * jnp.float32(unit_of(tile.problem, plain) * LOG2E) - tile.rows(maximum))
    return jnp.exp2((done.x - tile.rows(maximum)) * jnp.float32(LOG2E))


def finish(tile: Tile, s, read: Read, plain: bool, bounded: bool) -> Logits:
    """Scale, bias, slopes, soft cap and masks. `bounded`: for some row not all keys may be visible.

    `nan_marker`, one scalar per key, is added to what is visible: NaN where a key's value is not finite.
    """
    problem = tile.problem
    product, slope, cap_slope = s, None, None
    if (scale := read("scale")) is not None:
        s = s * tile.rows(scale)
    elif problem.scale != unit_of(problem, plain):
        s = s * jnp.float32(problem.scale)
    if not plain:
        s = _add(tile, s, read)
        s, slope, cap_slope = _capped(tile, s, read)
    if (nan_marker := read("nan_marker")) is not None:
        s = s + tile.keys(nan_marker)
    visible = _visible(tile, read, bounded)
    if visible is not None:
        # Opaque: beside a constant, the compiler moves the product that makes exponents (see `weights`) in front of the
        # choice, and it is then rounded before the subtraction, other than where nothing is masked.
        s = jnp.where(visible, s, opaque(-math.inf))
    return Logits(s, product, visible, slope, cap_slope)


def _add(tile: Tile, s, read: Read):
    for bias in _biases(tile, read):
        s = s + bias
    if (slopes := read("slopes")) is not None:
        s = s - tile.rows(slopes) * distance(tile, read)
    return s


def _biases(tile: Tile, read: Read):
    """The bias over the tile, in whatever form it came: at most one."""
    if (bias := read("bias_tile")) is not None:
        yield bias.astype(jnp.float32)
    if (bias := read("bias_rows")) is not None:
        yield tile.rows(bias)
    if (bias := read("bias_keys")) is not None:
        yield tile.keys(bias)


def distance(tile: Tile, read: Read):
    """What an ALiBi slope multiplies."""
    position = read("position")
    position = tile.row_positions() if position is None else tile.rows(position)
    away = jnp.abs(tile.key_positions() - position).astype(jnp.float32)
    return jnp.sqrt(away) if tile.problem.alibi == "sqrt" else away


def _capped(tile: Tile, s, read: Read):
    """cap tanh(s / cap) and its derivatives by s and by the cap; None for each without a cap."""
    data, static = read("soft_cap"), tile.problem.logits_soft_cap
    if data is not None:
        cap, inverse, large = tile.rows(data), tile.rows(1.0 / data), True
    elif static is not None:
        cap, inverse, large = jnp.float32(static), jnp.float32(1 / static), static > LARGE_CAP
    else:
        return s, None, None
    # tanh by the exponential: the hardware's own has 11 bits only. Near 0 the exponential loses the digits of x, which a large
    # cap would multiply; its series has them.
    x = s * inverse
    t = 1.0 - 2.0 / (1.0 + jnp.exp2(x * jnp.float32(2 * LOG2E)))
    if large:
        square = x * x
        series = x + x * square * (square * jnp.float32(2 / 15) - jnp.float32(1 / 3))
        t = jnp.where(jnp.abs(x) < NEAR_0, series, t)
    slope = 1.0 - t * t
    capped = t * cap
    for bias in _biases(tile, read):
        capped = jnp.where(bias == -jnp.inf, -jnp.inf, capped)  # which masks a key, whatever comes after
    return capped, slope, None if data is None else t - jnp.where(slope == 0.0, 0.0, x * slope)


def _visible(tile: Tile, read: Read, bounded: bool):
    terms = []
    if bounded:
        j = tile.key_positions()
        lower, upper = read("lower"), read("upper")
        if lower is not None:
            terms.append(j >= tile.rows(lower))
        terms.append(j < (jnp.int32(tile.Skv) if upper is None else tile.rows(upper)))
    if bounded and (row := read("segment_row")) is not None:
        row, key = tile.rows(row), tile.keys(read("segment_key"))
        terms.append((row < 0) | (row == key))
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
    limit = read("keep_limit")
    limit = jnp.uint32(dropout.threshold(tile.problem.keep_prob)) if limit is None else tile.rows(limit)
    return (_random_by_row if tile.row_axis == 0 else _random_by_key)(tile, read, seed) < limit


def kept(tile: Tile, keep, x, read: Read):
    """What dropout makes of weights, or of gradients of weights: 0 where they are dropped, else x / keep_prob."""
    if keep is None:
        return x
    inverse = read("keep_inverse")
    inverse = jnp.float32(1 / tile.problem.keep_prob) if inverse is None else tile.rows(inverse)
    return jnp.where(keep, x * inverse, 0.0)


def _philox(counter, seed):
    """`dropout.philox4x32` as a loop: the compiler unrolls it, and JAX, which is slower, has a tenth to lower."""

    def step(_, words):
        counter, key = words
        return dropout.philox_round(counter, key, _multiply_wide)

    return lax.fori_loop(0, dropout.ROUNDS, step, (counter, tuple(seed)))[0]


def _multiply_wide(a, b: int):
    """The high and low words of a product: one instruction on the chip, but 64 bits, which JAX hides by default."""
    with jax.enable_x64(True):
        product = lax.convert_element_type(a, np.uint64) * np.uint64(b)
        high = lax.shift_right_logical(product, np.uint64(32))
        return lax.convert_element_type(high, np.uint32), lax.convert_element_type(product, np.uint32)


def _half(word, odd):
    return jnp.where(odd, lax.shift_right_logical(word, jnp.uint32(16)), word & jnp.uint32(0xFFFF))


def _random_by_row(tile: Tile, read: Read, seed):
    """A counter yields 8 random numbers, for columns 8 apart that one thread holds. So they are drawn for 8 columns of each
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


def _random_by_key(tile: Tile, read: Read, seed):
    """The same for a tile `keys x rows`, where a thread holds too few keys to share counters: each element its own.
    Eight rows at a time, or the words of a whole tile would want all registers at once."""
    keys, rows = tile.shape
    part = (keys, SPAN)
    j = plgpu.broadcasted_iota(jnp.int32, part, 0, layout=WGMMA) + tile.first_key
    counter = (lax.shift_right_logical(j, 5) * 4 + lax.shift_right_logical(j & 7, 1)).astype(jnp.uint32)
    which, odd = lax.shift_right_logical(j, 3) & 3, (j & 1) == 1
    first = plgpu.broadcasted_iota(jnp.int32, part, 1, layout=WGMMA) + tile.first_row
    head, batch = (tile.rows(read(name), part) for name in ("head_word", "batch_word"))  # one head's rows
    pieces = []
    for at in range(0, rows, SPAN):
        row = (first + at).astype(jnp.uint32)
        words = _philox((counter, row, head, batch), seed)
        word = words[0]
        for i in (1, 2, 3):
            word = jnp.where(which == i, words[i], word)
        pieces.append(_half(word, odd))
    return jnp.concatenate(pieces, axis=1)
