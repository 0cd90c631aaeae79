"""Layout TND: which rows CANN computes, and the two orders in which it stores their statistics."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from jax_fa.backends.ascend.sparse_modes import SparseMode

Ends = tuple[int, ...]


@dataclass(frozen=True)
class Sequences:
    """The sequences of one call.

    `rows` are the ranges of the caller's rows that CANN computes: not those past the last end, and not those of
    sequences without keys, which the causal modes refuse.
    """

    q_ends: Ends
    kv_ends: Ends
    rows: tuple[tuple[int, int], ...]
    entries: tuple[int, ...] | None  # the sequences that go, if not all
    sparse: SparseMode

    @classmethod
    def of(cls, q_ends: Ends, kv_ends: Ends, sparse: SparseMode) -> "Sequences":
        sq, skv = np.diff(q_ends, prepend=0), np.diff(kv_ends, prepend=0)
        going = np.ones(len(q_ends), bool) if sparse.mode < 2 else (sq == 0) | (skv > 0)
        if going.all():
            return cls(q_ends, kv_ends, ((0, q_ends[-1]),), None, sparse)
        rows = tuple((q_ends[b] - int(sq[b]), q_ends[b]) for b in np.flatnonzero(going))
        entries = tuple(int(b) for b in np.flatnonzero(going))
        prefix = tuple(sparse.prefix[b] for b in entries) if sparse.prefix else ()
        apart = {7: sq > 0, 8: sq > 0}.get(sparse.mode)
        if apart is not None:
            special = int(np.flatnonzero(apart)[-1 if sparse.mode == 7 else 0])
            if special not in entries:  # no other sequence has its band
                sparse = SparseMode(mode=3 if sparse.mode == 7 else 2)
        ends = (np.cumsum(x[going]).tolist() for x in (sq, skv))
        q, kv = (tuple(int(n) for n in e) for e in ends)
        return cls(q, kv, rows, entries, replace(sparse, prefix=prefix))

    def longest(self) -> tuple[int, int]:
        sq, skv = (int(np.diff(ends, prepend=0).max()) for ends in (self.q_ends, self.kv_ends))
        return sq, skv

    def mask(self, given, left: int | None, right: int | None):
        """True = masked, for the longest sequences: a mask (or None) and a band from the top left."""
        rows, keys = self.longest()
        masked = jnp.zeros((rows, keys), bool) if given is None else given
        i, j = jnp.arange(rows, dtype=jnp.int32)[:, None], jnp.arange(keys, dtype=jnp.int32)
        if left is not None:
            masked = masked | (j < i - min(left, rows))
        if right is not None:
            masked = masked | (j > i + min(right, keys))
        return masked

    def take_rows(self, x):
        """The rows that go, of an array `T ...`."""
        parts = [x[start:stop] for start, stop in self.rows if stop > start]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def put_rows(self, x, size: int, fill: float):
        """`T ...` again, with `fill` in the rows that did not go."""
        parts, at, done = [], 0, 0
        for start, stop in self.rows:
            if stop == start:
                continue
            if start > done:
                parts.append(jnp.full((start - done, *x.shape[1:]), fill, x.dtype))
            parts.append(x[at : at + stop - start])
            at, done = at + stop - start, stop
        if size > done:
            parts.append(jnp.full((size - done, *x.shape[1:]), fill, x.dtype))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def take_entries(self, pse):
        """pse of the sequences that go: flat blocks of the others are empty, tables have one entry each."""
        if self.entries is None or pse.ndim == 1 or pse.shape[0] == 1:
            return pse
        return pse[jnp.asarray(self.entries, jnp.int32)]

    def to_rows(self, stats, heads: int):
        """`T N` from blocks `[N, Sq_b]`, one sequence after another."""
        first, length, position = self._row_places()
        n = jnp.arange(heads, dtype=jnp.int32)
        return stats.reshape(-1)[(first * heads + position)[:, None] + length[:, None] * n]

    def to_blocks(self, stats):
        """The inverse of `to_rows`."""
        T, heads = stats.shape
        starts, lengths = self._bounds()
        at = jnp.arange(T * heads, dtype=jnp.int32)
        b = jnp.searchsorted(jnp.asarray(self.q_ends, jnp.int32) * heads, at, side="right")
        inside = at - starts[b] * heads
        n, position = inside // lengths[b], inside % lengths[b]
        return stats.reshape(-1)[(starts[b] + position) * heads + n].reshape(T, heads)

    def _bounds(self):
        ends = np.asarray(self.q_ends, np.int32)
        lengths = np.diff(ends, prepend=np.int32(0))
        return jnp.asarray(ends - lengths), jnp.asarray(lengths)

    def _row_places(self):
        """(first row of its sequence, length of its sequence, position in it) of each row."""
        starts, lengths = self._bounds()
        at = jnp.arange(self.q_ends[-1], dtype=jnp.int32)
        b = jnp.searchsorted(jnp.asarray(self.q_ends, jnp.int32), at, side="right")
        return starts[b], lengths[b], at - starts[b]
