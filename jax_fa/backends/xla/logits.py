"""The logits of one tile, its mask and its dropout bits."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp

from jax_fa import dropout
from jax_fa.backends.xla.axis import Axis
from jax_fa.backends.xla.canonical import Canonical
from jax_fa.backends.xla.functions import Functions, Score
from jax_fa.indices import take_last


@dataclass(frozen=True)
class Tile:
    """Logits of row tile t and key tile u."""

    call: Canonical
    rows: Axis
    keys: Axis
    t: object
    u: object

    def cut(self, x):
        """The tile's part of an array `... #Sq #Skv`."""
        return self.keys.cut(self.rows.cut(x, -2, self.t), -1, self.u)

    def visible(self):
        """Boolean `*#B #K #G #rows #keys`, or None if every pair is visible for sure."""
        call = self.call
        j = self.keys.positions(self.u)
        terms = [self.keys.fresh(self.u)]
        if call.lower is not None:
            terms.append(j >= self.rows.cut(call.lower, -1, self.t)[..., None])
        if call.upper is not None:
            terms.append(j < self.rows.cut(call.upper, -1, self.t)[..., None])
        if call.mask is not None:
            # (Bytes other than 0 and 1, which views of other dtypes have, are true on the other backends.)
            terms.append(self.cut(call.mask).astype(jnp.uint8) != 0)
        if call.segment_row is not None:
            row = self.rows.cut(call.segment_row, -1, self.t)[..., None]
            terms.append((row < 0) | (row == self.keys.cut(call.segment_key, -1, self.u)[..., None, :]))
        if call.problem.mask_mods:
            terms += self.functions.visible(self)
        return every(*terms)

    @cached_property
    def functions(self) -> Functions:
        return Functions(self.call)

    def distance(self):
        """What an ALiBi slope multiplies."""
        i, j = self.rows.positions(self.t), self.keys.positions(self.u)
        if self.call.position is not None:
            i = self.rows.cut(self.call.position, -1, self.t)
        away = jnp.abs(j - i[..., None]).astype(self.call.acc)
        return jnp.sqrt(away) if self.call.problem.alibi == "sqrt" else away

    def bias_index(self):
        """Where an indexed bias holds this tile's: `*#B #K #G rows keys`."""
        offset = self.rows.cut(self.call.bias_offset, -1, self.t)
        shape = (*offset.shape[:-1], self.rows.tile)
        return jnp.broadcast_to(offset, shape)[..., None] + self.keys.positions(self.u)

    def bias(self, bias):
        """The tile's part of the bias, or of its tangent."""
        indexed = self.call.bias_offset is not None
        bias = take_last(bias, self.bias_index()) if indexed else self.cut(bias)
        return bias.astype(self.call.acc)

    def alibi(self, slopes):
        """What slopes of the rows (or their tangents) take from the logits."""
        return self.rows.cut(slopes, -1, self.t)[..., None].astype(self.call.acc) * self.distance()

    def logits(self, q, k, visible, nan_marker=None) -> "Logits":
        """`nan_marker` (`*#B K keys`, 0 or NaN) is added to the logits of its keys."""
        call = self.call
        product = call.product("kgid,kjd->kgij", q, k)
        s = product * call.scale
        bias = cap = score = masked = None
        if call.bias is not None:
            bias = self.bias(call.bias)
            s = s + bias
        if call.slopes is not None:
            s = s - self.alibi(call.slopes)
        if bias is not None and (call.problem.score_mod is not None or call.soft_cap is not None):
            masked = bias == -jnp.inf  # which masks a key, whatever comes after
        if call.problem.score_mod is not None:
            score = Score(self.functions, self, s, masked, visible)
            s, masked = score.value, score.masked
        if call.soft_cap is not None:
            cap = SoftCap.of(s if masked is None else jnp.where(masked, 0, s), call.soft_cap)
            s = cap.value
        if masked is not None:
            s = jnp.where(masked, -jnp.inf, s)
        if nan_marker is not None:
            s = s + nan_marker[..., None, None, :].astype(call.acc)
        s = s if visible is None else jnp.where(visible, s, -jnp.inf)
        return Logits(s, product, cap, score)

    def keep(self):
        """Keep bits of the tile, or None without dropout."""
        call, operands = self.call, self.call.operands
        first, columns = self.keys.start(self.u), self.keys.tile
        seeded = explicit = None
        if operands.dropout_seed is not None:
            seed = call.squeeze(operands.dropout_seed)[..., None, None, :]
            stream = call.by_head(operands.dropout_stream)
            rows, column = self.rows.positions(self.t), first
            if operands.dropout_start is not None:
                row_0, column_0 = operands.dropout_start.reshape(2).astype(jnp.int32)
                rows, column = rows + row_0, column + column_0
            seeded = dropout.keep_tile(seed, stream, rows, column, columns, call.keep_limit)
        if operands.drop_bits is not None:
            bits = call.squeeze(operands.drop_bits)[..., None, None, :]
            offset = self.rows.cut(call.by_head(operands.drop_offset), -2, self.t)
            explicit = dropout.explicit_keep_tile(bits, offset, first, columns)
        return every(seeded, explicit)


class SoftCap(NamedTuple):
    """f(x) = cap tanh(x / cap) and what its derivatives of first and second order are made of.

    By x and the cap these are f' and tanh - ratio f'; f'', -ratio f'' (by one each) and ratio^2 f''.
    """

    value: Any
    tanh: Any
    ratio: Any  # x / cap, but 0 where it may be infinite and everything that it is a factor of is 0
    slope: Any  # f'
    curve: Any  # f''

    @classmethod
    def of(cls, x, cap) -> "SoftCap":
        ratio = x / cap
        tanh = jnp.tanh(ratio)
        slope = 1 - tanh * tanh
        ratio = jnp.where(slope == 0, 0, ratio)
        return cls(cap * tanh, tanh, ratio, slope, -2 * tanh * slope / cap)

    @property
    def by_cap(self):
        """The derivative of f by the cap."""
        return self.tanh - self.ratio * self.slope


class Logits(NamedTuple):
    x: Any  # logits, -inf where masked
    product: Any  # q k^T
    cap: Any  # a `SoftCap`; None without one
    score: Any  # a `Score`; None without a score_mod


def every(*terms):
    """The conjunction of those terms that are given; None if none is."""
    result = None
    for term in terms:
        result = term if result is None else result if term is None else result & term
    return result


def finite(x):
    return jnp.where(jnp.isfinite(x), x, 0)


def nan_unless_finite(x):
    """0 for each vector (last axis) of finite numbers, NaN for any other."""
    return jnp.sum(x * jnp.zeros((), x.dtype), axis=-1)
