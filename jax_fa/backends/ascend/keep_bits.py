"""Keep bits as CANN's dropMask: packed, least significant bit first, dense over `[B, N, Sq, Skv]`.

CANN reads its mask from memory, so here alone the bits of a call are stored: B * N * Sq * Skv / 8 bytes. Calls that draw
theirs are split so that one piece has at most MAX_DRAWN_BYTES of them, and a piece draws its own when the one before is done.
"""

import math
from dataclasses import dataclass, replace
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

    def after(self, done: Any) -> "KeepBits":
        """The same, which takes no memory before the array `done` is there."""


MAX_DRAWN_BYTES = 2**28
# Bits that are drawn at once; more are drawn some rows at a time, so that they are never held as bytes together.
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

    def after(self, done: Any) -> "Given":
        return self


@dataclass(frozen=True)
class GivenSequences:
    """The caller's bits of layout TND, as they are: such a call is not split."""

    bytes: Any

    def packed(self, part: Part):
        return self.bytes

    def after(self, done: Any) -> "GivenSequences":
        return self


@dataclass(frozen=True)
class PartOf:
    """The bits of one part of a call, which is a call itself."""

    whole: KeepBits
    part: Part

    def packed(self, part: Part):
        return self.whole.packed(self.part)

    def after(self, done: Any) -> "PartOf":
        return replace(self, whole=self.whole.after(done))


@dataclass(frozen=True)
class Drawn:
    """Bits from the operands, drawn or looked up as every backend does."""

    call: Call
    done: Any = None

    def after(self, done: Any) -> "Drawn":
        return replace(self, done=done)

    def packed(self, part: Part):
        columns, rows = self.call.dims.Skv, part.r1 - part.r0
        b, n = jnp.meshgrid(
            jnp.arange(part.b0, part.b1, dtype=jnp.int32),
            jnp.arange(part.n0, part.n1, dtype=jnp.int32),
            indexing="ij",
        )
        b, n = b.reshape(-1), n.reshape(-1)
        if self.done is not None:
            b, n, _ = jax.lax.optimization_barrier((b, n, self.done))
        at = jnp.arange(part.r0, part.r1, dtype=jnp.int32)
        if b.size * rows * columns <= _AT_ONCE:
            keep = jax.vmap(lambda b, n: self._head(b, n, at))(b, n)
            return jnp.packbits(keep.reshape(-1), bitorder="little")
        size = rows * columns
        if size % 8 == 0:
            heads = jax.lax.map(lambda at: self._packed_head(at[0], at[1], part), (b, n))
            return heads.reshape(-1)

        def add(i, found):
            """The bits of one head, behind those of the heads before, which may end within a byte."""
            bits = self._packed_head(b[i], n[i], part).astype(jnp.uint16)
            # i * size passes 32 bits long before bytes do: i = 8 a + c.
            i = i.astype(jnp.uint32)
            shift = (i & 7) * (size & 7) & 7
            start = (i >> 3) * size + (i & 7) * (size >> 3) + ((i & 7) * (size & 7) >> 3)
            bits = bits << shift.astype(jnp.uint16)
            low, high = (bits & 255).astype(jnp.uint8), (bits >> 8).astype(jnp.uint8)
            moved = jnp.pad(low, (0, 1)) | jnp.pad(high, (1, 0))
            there = jax.lax.dynamic_slice(found, (start,), moved.shape)
            return jax.lax.dynamic_update_slice(found, there | moved, (start,))

        total = -(-b.size * size // 8)
        found = jnp.zeros((total + 1,), jnp.uint8)
        return jax.lax.fori_loop(0, b.size, add, found)[:total]

    def _packed_head(self, b, n, part: Part):
        """The bits of the part's rows of one head, some rows at a time; those of the last byte that are too many are 0."""
        columns, rows = self.call.dims.Skv, part.r1 - part.r0
        step = max(8, _AT_ONCE // columns // 8 * 8)

        def some(first):
            at = first + jnp.arange(step, dtype=jnp.int32)
            keep = self._head(b, n, jnp.minimum(at, part.r1 - 1)) & (at < part.r1)[:, None]
            return jnp.packbits(keep.reshape(-1), bitorder="little")

        found = jax.lax.map(some, jnp.arange(part.r0, part.r1, step, dtype=jnp.int32))
        return found.reshape(-1)[: -(-rows * columns // 8)]

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
