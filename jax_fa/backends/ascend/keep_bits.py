"""Keep bits as CANN's dropMask: packed, least significant bit first, dense over `[B, N, Sq, Skv]`.

CANN reads its mask from memory, so here alone the bits of a call are stored: B * N * Sq * Skv / 8 bytes.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jax_fa import dropout
from jax_fa.call import Call


class Part(NamedTuple):
    """A piece of a call: entries b0..b1 of the batch, query heads n0..n1, rows r0..r1."""

    b0: int
    b1: int
    n0: int
    n1: int
    r0: int
    r1: int

    @classmethod
    def whole(cls, B: int, N: int, Sq: int) -> "Part":
        return cls(0, B, 0, N, 0, Sq)


@runtime_checkable
class KeepBits(Protocol):
    """Where keep bits come from."""

    def packed(self, part: Part) -> Any:
        """uint8: the bits of the part, in the order of `[B, N, Sq, Skv]`."""


# Bits that are drawn at once; more are drawn head by head, so that they are never held as bytes together.
_AT_ONCE = 2**22


@dataclass(frozen=True)
class Given:
    """Bits that the caller packed."""

    bytes: Any  # uint8, one dim
    shape: tuple[int, int, int, int]  # B N Sq Skv

    def packed(self, part: Part):
        if part == Part.whole(*self.shape[:3]):
            return self.bytes
        total = math.prod(self.shape)
        bits = jnp.unpackbits(self.bytes[: -(-total // 8)], bitorder="little")[:total].reshape(self.shape)
        cut = bits[part.b0 : part.b1, part.n0 : part.n1, part.r0 : part.r1]
        return jnp.packbits(cut.reshape(-1), bitorder="little")


@dataclass(frozen=True)
class GivenSequences:
    """The caller's bits of layout TND, as they are: such a call is not split."""

    bytes: Any

    def packed(self, part: Part):
        return self.bytes


@dataclass(frozen=True)
class PartOf:
    """The bits of one part of a call, which is a call itself."""

    whole: KeepBits
    part: Part

    def packed(self, part: Part):
        return self.whole.packed(self.part)


@dataclass(frozen=True)
class Drawn:
    """Bits from the operands, drawn or looked up as every backend does."""

    call: Call

    def packed(self, part: Part):
        columns, rows = self.call.dims.Skv, part.r1 - part.r0
        b, n = jnp.meshgrid(
            jnp.arange(part.b0, part.b1, dtype=jnp.int32),
            jnp.arange(part.n0, part.n1, dtype=jnp.int32),
            indexing="ij",
        )
        b, n = b.reshape(-1), n.reshape(-1)
        at = jnp.arange(part.r0, part.r1, dtype=jnp.int32)
        if b.size * rows * columns <= _AT_ONCE or rows * columns % 8:
            keep = jax.vmap(lambda b, n: self._head(b, n, at))(b, n)
            return jnp.packbits(keep.reshape(-1), bitorder="little")

        def head(entry):
            b, n = entry
            return jnp.packbits(self._head(b, n, at).reshape(-1), bitorder="little")

        return jax.lax.map(head, (b, n)).reshape(-1)

    def _head(self, b, n, rows):
        """Keep bits `rows Skv` of batch entry b, head n."""
        x, d = self.call.operands, self.call.dims
        found = None
        if x.dropout_seed is not None:
            seed, stream = self._at(x.dropout_seed, b), self._at(x.dropout_stream, b, n)
            limit = x.keep_threshold
            limit = dropout.threshold(self.call.problem.keep_prob) if limit is None else self._at(limit, b, n)
            row_0 = column_0 = jnp.int32(0)
            if x.dropout_start is not None:
                row_0, column_0 = x.dropout_start.reshape(2).astype(jnp.int32)
            found = dropout.keep_tile(seed, stream, rows + row_0, column_0, d.Skv, limit)
        if x.drop_bits is not None:
            offset = self._at(x.drop_offset, b, n)
            offset = offset if offset.shape[0] == 1 else offset[rows]
            bits = self._at(x.drop_bits, b)
            given = dropout.explicit_keep_tile(bits, offset, jnp.int32(0), d.Skv)
            found = given if found is None else found & given
        return found

    def _at(self, x, b, n=None):
        """Entry b (of all batch dims flattened) and head n of an operand `*#B ...` or `*#B #N ...`."""
        B = self.call.dims.B
        rank = len(B)
        if math.prod(x.shape[:rank]) == 1:
            x = x.reshape(x.shape[rank:])
        else:
            x = jnp.broadcast_to(x, (*B, *x.shape[rank:])).reshape(-1, *x.shape[rank:])[b]
        return x if n is None else x[0] if x.shape[0] == 1 else x[n]
