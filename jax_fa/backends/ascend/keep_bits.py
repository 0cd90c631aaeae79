"""Keep bits as CANN's dropMask: packed, least significant bit first, dense over `[B, N, Sq, Skv]`.

CANN reads its mask from memory, so here alone the bits of a call are stored: B * N * Sq * Skv / 8 bytes. Calls that draw
theirs are split so that one piece has at most MAX_DRAWN_BYTES of them, and a piece draws its own when the one before is done.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

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
MAX_BYTES = 2**31  # that 32 bits count
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
        x, Skv = self.call.operands, self.call.dims.Skv
        found = None
        if x.dropout_seed is not None:
            found = _seeded(self.call, b, n, rows, jnp.int32(0), Skv)
        if x.drop_bits is not None:
            offset = _at(self.call, x.drop_offset, b, n)
            offset = offset if offset.shape[0] == 1 else offset[rows]
            bits = _at(self.call, x.drop_bits, b)
            given = dropout.explicit_keep_tile(bits, offset, jnp.int32(0), Skv)
            found = given if found is None else found & given
        return found


@dataclass(frozen=True)
class DrawnSequences:
    """Bits of packed sequences, drawn as those of a call of all rows and keys: blocks `[N, Sq_b, Skv_b]`, one after another.

    `rows` and `keys` say where each sequence lies, (start, length), in those of the call.
    """

    call: Call
    rows: tuple[tuple[int, int], ...]
    keys: tuple[tuple[int, int], ...]
    done: Any = None

    def after(self, done: Any) -> "DrawnSequences":
        return replace(self, done=done)

    def packed(self, part: Part):
        rows, keys = self.rows[part.b0 : part.b1], self.keys[part.b0 : part.b1]
        heads = part.n1 - part.n0
        bits = heads * np.array([sq * skv for (_, sq), (_, skv) in zip(rows, keys, strict=True)], np.int64)
        begins = np.cumsum(bits) - bits
        total = -(-int(bits.sum()) // 8)
        # Rows are drawn as wide as the widest of their kind: so that no kind has one of less than half of that.
        kinds: dict[int, list[int]] = {}
        for b in np.flatnonzero(bits):
            kinds.setdefault(keys[b][1].bit_length(), []).append(int(b))
        # A row may begin within a byte, and is added as bytes: up to one more than it has.
        found = jnp.zeros((total + 1,), jnp.uint8)
        if self.done is not None:
            found, _ = jax.lax.optimization_barrier((found, self.done))
        for members in kinds.values():
            width = max(keys[b][1] for b in members)
            table = np.array([(*rows[b], *keys[b], begins[b] >> 3, begins[b] & 7) for b in members], np.int32)
            found = self._add(found, table, width, part)
        return found[:total]

    def _add(self, found, table: np.ndarray, width: int, part: Part):
        """The bits of some sequences, some rows of a head at a time. `table`: where each has rows, keys, and bits."""
        ends = np.cumsum(table[:, 1], dtype=np.int64)
        count, step = int(ends[-1]), max(1, _AT_ONCE // width)
        step = min(step, count)
        chunks = -(-count // step)
        sequences, last = jnp.asarray(table), jnp.asarray(ends, jnp.int32)

        def add(i, found):
            n = part.n0 + i // chunks
            at = i % chunks * step + jnp.arange(step, dtype=jnp.int32)
            b = jnp.minimum(jnp.searchsorted(last, at, side="right"), len(ends) - 1)
            first_row, sq, first_key, skv, byte, bit = sequences[b].T
            row = at - (last[b] - sq)
            draw = jax.vmap(lambda row, key: _seeded(self.call, 0, n, row[None], key, width)[0])
            keep = draw(first_row + row, first_key)
            there = (jnp.arange(width) < skv[:, None]) & (at < count)[:, None]
            begin = dropout.bit_offset((n - part.n0) * sq + row, skv, (byte, bit))
            moved = _shifted(keep & there, begin[:, 1])
            place = begin[:, :1] + jnp.arange(moved.shape[1], dtype=jnp.int32)
            return found.at[place].add(moved, mode="drop")

        return jax.lax.fori_loop(0, (part.n1 - part.n0) * chunks, add, found)


def _shifted(bits, by):
    """Rows of bits as bytes, each `by` (0..7) places up."""
    width = bits.shape[1]
    room = -(-(width + 7) // 8) * 8
    at = jnp.arange(room, dtype=jnp.int32) - by[:, None]
    moved = jnp.take_along_axis(bits, jnp.clip(at, 0, width - 1), axis=1) & (at >= 0) & (at < width)
    return jnp.packbits(moved, axis=1, bitorder="little")


def _seeded(call: Call, b, n, rows, first_column, columns: int):
    """Seeded keep bits `rows columns` of batch entry b, head n."""
    x = call.operands
    seed, stream = _at(call, x.dropout_seed, b), _at(call, x.dropout_stream, b, n)
    limit = x.keep_threshold
    limit = dropout.threshold(call.problem.keep_prob) if limit is None else _at(call, limit, b, n)
    row_0 = column_0 = jnp.int32(0)
    if x.dropout_start is not None:
        row_0, column_0 = x.dropout_start.reshape(2).astype(jnp.int32)
    return dropout.keep_tile(seed, stream, rows + row_0, first_column + column_0, columns, limit)


def _at(call: Call, x, b, n=None):
    """Entry b (of all batch dims flattened) and head n of an operand `*#B ...` or `*#B #N ...`."""
    B = call.dims.B
    rank = len(B)
    if math.prod(x.shape[:rank]) == 1:
        x = x.reshape(x.shape[rank:])
    else:
        x = jnp.broadcast_to(x, (*B, *x.shape[rank:])).reshape(-1, *x.shape[rank:])[b]
    return x if n is None else x[0] if x.shape[0] == 1 else x[n]
