"""The logits of one tile, its mask and its dropout bits."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from jax_fa import dropout
from jax_fa.backends.xla.axis import Axis
from jax_fa.backends.xla.canonical import Canonical
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
            terms.append(self.cut(call.mask))
        if call.segment_row is not None:
            row = self.rows.cut(call.segment_row, -1, self.t)[..., None]
            terms.append((row < 0) | (row == self.keys.cut(call.segment_key, -1, self.u)[..., None, :]))
        return every(*terms)

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

    def bias(self):
        call = self.call
        if call.bias is None:
            return None
        indexed = call.bias_offset is not None
        bias = take_last(call.bias, self.bias_index()) if indexed else self.cut(call.bias)
        return bias.astype(call.acc)

    def slopes(self):
        """ALiBi slopes of the rows, over the tile."""
        return self.rows.cut(self.call.slopes, -1, self.t)[..., None].astype(self.call.acc)

    def logits(self, q, k, visible, nan_marker=None) -> "Logits":
        """`nan_marker` (`*#B K keys`, 0 or NaN) is added to the logits of its keys."""
        call = self.call
        product = call.product("kgid,kjd->kgij", q, k)
        s = product * call.scale
        if (bias := self.bias()) is not None:
            s = s + bias
        if call.slopes is not None:
            s = s - self.slopes() * self.distance()
        slope = cap_slope = None
        if (cap := call.soft_cap) is not None:
            x = s / cap
            tanh = jnp.tanh(x)
            s, slope = cap * tanh, 1 - tanh * tanh
            cap_slope = tanh - jnp.where(slope == 0, 0, x * slope)  # x may be infinite
            if bias is not None:  # -inf masks a key, whatever comes after
                s = jnp.where(bias == -jnp.inf, -jnp.inf, s)
        if nan_marker is not None:
            s = s + nan_marker[..., None, None, :].astype(call.acc)
        s = s if visible is None else jnp.where(visible, s, -jnp.inf)
        return Logits(s, product, slope, cap_slope)

    def keep(self):
        """Keep bits of the tile, or None without dropout."""
        call, operands = self.call, self.call.operands
        first, columns = self.keys.start(self.u), self.keys.tile
        seeded = explicit = None
        if operands.dropout_seed is not None:
            seed = call.squeeze(operands.dropout_seed)[..., None, None, :]
            stream = call.by_head(operands.dropout_stream)
            rows = self.rows.positions(self.t)
            seeded = dropout.keep_tile(seed, stream, rows, first, columns, call.keep_limit)
        if operands.drop_bits is not None:
            bits = call.squeeze(operands.drop_bits)[..., None, None, :]
            offset = self.rows.cut(call.by_head(operands.drop_offset), -2, self.t)
            explicit = dropout.explicit_keep_tile(bits, offset, first, columns)
        return every(seeded, explicit)


class Logits(NamedTuple):
    x: Any  # logits, -inf where masked
    product: Any  # q k^T
    slope: Any  # the derivative of the soft cap by the logits; None without a cap
    cap_slope: Any  # ... and by the cap


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
