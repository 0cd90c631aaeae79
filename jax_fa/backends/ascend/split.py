"""Splitting a call that is too much for one launch: over the batch, then heads, then rows.

An Ascend device stops kernels that run for too long ("timeout or trap error"); the vendor's advice is to split.
Work is counted in multiply-adds of both products, `B * N * Sq * Skv * (D + Dv)`, as if nothing were masked.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jax_fa.backends.ascend import layout as layouts
from jax_fa.backends.ascend.drop import Part, Piece
from jax_fa.backends.ascend.modes import Sparse
from jax_fa.backends.ascend.request import Request
from jax_fa.backends.ascend.sequences import Sequences
from jax_fa.cann import spec

_ROWS = 128  # rows are split in multiples of this: whole blocks of the operator
Range = tuple[int, int]


def ranges(size: int, most: int) -> list[Range]:
    """0..size in equal pieces of at most `most`."""
    count = max(1, -(-size // max(1, most)))
    step = -(-size // count) if size else 1
    return [(start, min(start + step, size)) for start in range(0, max(size, 1), step)]


class Grid:
    """The pieces of a request: ranges of batch entries (TND: sequences), of key heads, of rows."""

    def __init__(self, r: Request, max_work: int | None) -> None:
        self.request = r
        self.heads, self.rows = [(0, r.K)], [(0, r.Sq)]
        if r.sequences is not None:
            self.batch = _sequence_groups(r, r.sequences, max_work)
            return
        self.batch = [(0, r.B)]
        group = r.N // r.K
        row = r.Skv * (r.D + r.Dv) * group
        most = spec.MAX_HEADS // group
        if max_work is not None:
            entry = row * r.Sq * r.K
            self.batch = ranges(r.B, max_work // entry)
            if entry > max_work:
                most = min(most, max_work // (row * r.Sq))
        self.heads = ranges(r.K, most)
        if max_work is not None and row * r.Sq > max_work and _rows_may_split(r):
            self.rows = ranges(r.Sq, max(_ROWS, max_work // row // _ROWS * _ROWS))

    def __len__(self) -> int:
        return len(self.batch) * len(self.heads) * len(self.rows)

    def piece(self, batch: Range, heads: Range, rows: Range) -> Request:
        r = self.request
        if r.sequences is not None:
            return _group(r, r.sequences, batch)
        group = r.N // r.K
        part = Part(*batch, heads[0] * group, heads[1] * group, *rows)
        if part == Part(0, r.B, 0, r.N, 0, r.Sq):
            return r
        sparse, mask, count = r.sparse, _cut_full(r.mask, part), rows[1] - rows[0]
        if rows != (0, r.Sq):
            piece = sparse.rows(rows[0], count, r.Sq, r.Skv)
            if piece is None:  # a band that these rows see nothing of
                mask, piece = jnp.ones((1, 1, count, r.Skv), bool), Sparse(mode=1, hides=True, full=True)
            sparse = piece
        return replace(
            r,
            B=batch[1] - batch[0],
            N=part.n1 - part.n0,
            K=heads[1] - heads[0],
            Sq=count,
            query=self.cut_query(r.query, part, r.D),
            key=self.cut_key(r.key, part, r.D),
            value=self.cut_key(r.value, part, r.Dv),
            sparse=replace(sparse, prefix=sparse.prefix[batch[0] : batch[1]]),
            mask=mask,
            pse=_cut_pse(r.pse, r, part),
            keep=None if r.keep is None else Piece(r.keep, part),
        )

    def cut_query(self, x, part: Part, width: int):
        """The piece of query, out or their gradients."""
        layout = self.request.layout
        x = layouts.cut(x, layout, "B", part.b0, part.b1)
        x = layouts.cut(x, layout, "N", part.n0, part.n1, width)
        return layouts.cut(x, layout, "S", part.r0, part.r1)

    def cut_key(self, x, part: Part, width: int):
        layout, group = self.request.layout, self.request.N // self.request.K
        x = layouts.cut(x, layout, "B", part.b0, part.b1)
        return layouts.cut(x, layout, "N", part.n0 // group, part.n1 // group, width)


def _rows_may_split(r: Request) -> bool:
    """Not where the mode or pse speaks of whole sequences."""
    structured = r.pse is not None and (r.pse.ndim < 4 or r.pse.shape[2] not in (1, r.Sq))
    return not structured and r.sparse.mode != 6


def _cut_full(x, part: Part):
    """Of a mask or bias `[B or 1, N or 1, Sq or 1, Skv]`."""
    if x is None:
        return None
    for axis, (start, stop) in enumerate(((part.b0, part.b1), (part.n0, part.n1), (part.r0, part.r1))):
        if x.shape[axis] != 1 and (start, stop) != (0, x.shape[axis]):
            x = x[(*(slice(None),) * axis, slice(start, stop))]
    return x


def _cut_pse(pse, r: Request, part: Part):
    if pse is None or pse.ndim == 4:
        table = pse is not None and pse.shape[2] == spec.ALIBI_ROWS and r.Sq > spec.ALIBI_ROWS
        return _cut_full(pse, part._replace(r0=0, r1=spec.ALIBI_ROWS) if table else part)
    heads = slice(part.n0, part.n1)
    return pse[heads] if pse.ndim == 1 else pse[part.b0 : part.b1, heads]


# --- layout TND: groups of sequences


def _sequence_groups(r: Request, s: Sequences, max_work: int | None) -> list[Range]:
    """Not split where pse, the mask or the keep bits are stored for all sequences together."""
    if max_work is None or r.pse is not None or r.keep is not None or r.sparse.full:
        return [(0, r.B)]
    sq, skv = (np.diff(ends, prepend=0).astype(object) for ends in (s.q_ends, s.kv_ends))
    found, start, total = [], 0, 0
    for b, work in enumerate(sq * skv * (r.N * (r.D + r.Dv))):
        if b > start and total + work > max_work:
            found.append((start, b))
            start, total = b, 0
        total += work
    return [*found, (start, r.B)]


def rows_of(s: Sequences, batch: Range) -> Range:
    return (0, *s.q_ends)[batch[0]], (0, *s.q_ends)[batch[1]]


def keys_of(s: Sequences, batch: Range) -> Range:
    return (0, *s.kv_ends)[batch[0]], (0, *s.kv_ends)[batch[1]]


def _group(r: Request, s: Sequences, batch: Range) -> Request:
    if batch == (0, r.B):
        return r
    (q0, q1), (k0, k1) = rows_of(s, batch), keys_of(s, batch)
    inside = slice(*batch)
    sparse = replace(r.sparse, prefix=r.sparse.prefix[inside])
    with_rows = np.flatnonzero(np.diff(s.q_ends, prepend=0))
    special = with_rows[-1 if sparse.mode == 7 else 0] if with_rows.size else -1
    if sparse.mode in (7, 8) and not batch[0] <= special < batch[1]:
        sparse = replace(sparse, mode=3 if sparse.mode == 7 else 2)
    sequences = replace(
        s,
        q_ends=tuple(end - q0 for end in s.q_ends[inside]),
        kv_ends=tuple(end - k0 for end in s.kv_ends[inside]),
        sparse=sparse,
    )
    return replace(
        r,
        B=batch[1] - batch[0],
        Sq=q1 - q0,
        Skv=k1 - k0,
        query=r.query[q0:q1],
        key=r.key[k0:k1],
        value=r.value[k0:k1],
        sparse=sparse,
        sequences=sequences,
    )
