"""Layout TND: which rows CANN computes, and the two orders in which it stores their statistics."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from jax_fa.backends.ascend.sparse_modes import SparseMode

Ends = tuple[int, ...]


Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sequences:
    """The sequences of one call.

    `rows` and `keys` are the ranges of the caller's that CANN gets: not those past the last end, not rows of sequences
    without keys, which the causal modes refuse, and none of empty sequences where there is a pse.
    """

    q_ends: Ends
    kv_ends: Ends
    rows: Ranges
    keys: Ranges
    entries: tuple[int, ...] | None  # the sequences that go, if not all
    sparse: SparseMode

    @classmethod
    def of(cls, q_ends: Ends, kv_ends: Ends, sparse: SparseMode, with_pse: bool) -> "Sequences":
        sq, skv = np.diff(q_ends, prepend=0), np.diff(kv_ends, prepend=0)
        going = np.ones(len(q_ends), bool) if sparse.mode < 2 else (sq == 0) | (skv > 0)
        if with_pse:
            going = (sq > 0) & (skv > 0)
        if going.all():
            return cls(q_ends, kv_ends, ((0, q_ends[-1]),), ((0, kv_ends[-1]),), None, sparse)
        entries = tuple(int(b) for b in np.flatnonzero(going))
        rows, keys = (
            tuple((ends[b] - int(size[b]), ends[b]) for b in entries)
            for ends, size in ((q_ends, sq), (kv_ends, skv))
        )
        prefix = tuple(sparse.prefix[b] for b in entries) if sparse.prefix else ()
        apart = {7: sq > 0, 8: sq > 0}.get(sparse.mode)
        if apart is not None:
            special = int(np.flatnonzero(apart)[-1 if sparse.mode == 7 else 0])
            if special not in entries:  # no other sequence has its band
                sparse = SparseMode(mode=3 if sparse.mode == 7 else 2)
        ends = (np.cumsum(x[going]).tolist() for x in (sq, skv))
        q, kv = (tuple(int(n) for n in e) for e in ends)
        return cls(q, kv, rows, keys, entries, replace(sparse, prefix=prefix))

    def longest(self) -> tuple[int, int]:
        sq, skv = (int(np.diff(ends, prepend=0).max()) for ends in (self.q_ends, self.kv_ends))
        return sq, skv

    def places(self) -> tuple[Ranges, Ranges]:
        """Where each sequence lies, (start, length), in the caller's rows and in the caller's keys."""

        def places(ends: Ends, ranges: Ranges) -> Ranges:
            lengths = np.diff(ends, prepend=0).tolist()
            starts = (0, *ends) if self.entries is None else [start for start, _ in ranges]
            return tuple(zip(starts, lengths, strict=False))

        return places(self.q_ends, self.rows), places(self.kv_ends, self.keys)

    def logits(self) -> tuple[int, int]:
        """Of one head, how many the largest sequence has, and all of them."""
        sq, skv = (np.diff(ends, prepend=0).astype(object) for ends in (self.q_ends, self.kv_ends))
        return int((sq * skv).max()), int((sq * skv).sum())

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
        return _take(x, self.rows)

    def take_keys(self, x):
        return _take(x, self.keys)

    def put_rows(self, x, size: int, fill: float):
        """`T ...` again, with `fill` in the rows that did not go."""
        return _put(x, self.rows, size, fill)

    def put_keys(self, x, size: int):
        """Likewise, with zeros."""
        return _put(x, self.keys, size, 0.0)

    def own_pse(self, pse, heads: int):
        """A pse of the caller's that is no slopes, flat: of the sequences that go.

        CANN's own ALiBi table is not for packed sequences on every device: it becomes blocks `[N, Sq_b, Skv_b]`.
        """
        if pse.ndim == 4:
            return self._blocks_of_table(pse, heads)
        rows = pse.size == heads * sum(stop - start for start, stop in self.keys)
        if self.entries is None or rows:
            return pse
        blocks = sum((q[1] - q[0]) * (k[1] - k[0]) for q, k in zip(self.rows, self.keys, strict=True))
        if pse.size == heads * blocks:  # those that do not go are empty
            return pse
        return _take(pse, tuple((heads * start, heads * stop) for start, stop in self.keys))

    def _blocks_of_table(self, table, heads: int):
        """Entry (r, c) of the table holds the distance `row - column = longest - 1024 + r - c`."""
        sq, skv = (np.diff(ends, prepend=0) for ends in (self.q_ends, self.kv_ends))
        ends = np.cumsum(heads * sq * skv)
        at = jnp.arange(int(ends[-1]), dtype=jnp.int32)
        b = jnp.searchsorted(jnp.asarray(ends, jnp.int32), at, side="right")
        rows, keys, starts = (jnp.asarray(x, jnp.int32)[b] for x in (sq, skv, ends - heads * sq * skv))
        n, inside = jnp.divmod(at - starts, rows * keys)
        i, j = jnp.divmod(inside, keys)
        beyond = i - j - (table.shape[3] - table.shape[2])
        # Keys after a row's own position have no entry, and are masked.
        r, c = jnp.maximum(beyond, 0), jnp.minimum(jnp.maximum(-beyond, 0), table.shape[3] - 1)
        entry = jnp.asarray(self.entries, jnp.int32)[b] if self.entries is not None else b
        return table[entry if table.shape[0] > 1 else 0, n, r, c]

    def take_entries(self, slopes):
        """ALiBi slopes of the sequences that go."""
        if self.entries is None or slopes.ndim == 1:
            return slopes
        return slopes[jnp.asarray(self.entries, jnp.int32)]

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


def _take(x, ranges: Ranges):
    parts = [x[start:stop] for start, stop in ranges if stop > start]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _put(x, ranges: Ranges, size: int, fill: float):
    parts, at, done = [], 0, 0
    for start, stop in ranges:
        if stop == start:
            continue
        if start > done:
            parts.append(jnp.full((start - done, *x.shape[1:]), fill, x.dtype))
        parts.append(x[at : at + stop - start])
        at, done = at + stop - start, stop
    if size > done:
        parts.append(jnp.full((size - done, *x.shape[1:]), fill, x.dtype))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
