"""Splitting a call that is too much for one launch: over the batch, then heads, then rows.

An Ascend device stops kernels that run for too long ("timeout or trap error"); the vendor's advice is to split.
Work is counted in multiply-adds of both products, `B * N * Sq * Skv * (D + Dv)`, as if nothing were masked.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jax_fa.backends.ascend import layout as layouts
from jax_fa.backends.ascend.keep_bits import (
    MAX_DRAWN_BYTES,
    Drawn,
    DrawnSequences,
    GivenSequences,
    Part,
    PartOf,
)
from jax_fa.backends.ascend.operator_call import OperatorCall, Residuals
from jax_fa.backends.ascend.sequences import Sequences
from jax_fa.backends.ascend.sparse_modes import FULL_MASK
from jax_fa.cann import spec

Range = tuple[int, int]


def ranges(size: int, most: int) -> list[Range]:
    """0..size in equal pieces of at most `most`."""
    count = max(1, -(-size // max(1, most)))
    step = -(-size // count) if size else 1
    return [(start, min(start + step, size)) for start in range(0, max(size, 1), step)]


class Grid:
    """The pieces of an operator call: ranges of batch entries (TND: sequences), of key heads, of rows."""

    def __init__(self, op: OperatorCall, max_work: int | None) -> None:
        self.whole = op
        self.heads, self.rows = [(0, op.K)], [(0, op.Sq)]
        if max_work is not None and isinstance(op.keep, (Drawn, DrawnSequences)):
            max_work = min(max_work, 8 * MAX_DRAWN_BYTES * (op.D + op.Dv))
        if op.sequences is not None:
            self.batch = _sequence_groups(op, op.sequences, max_work)
            if max_work is not None and _heads_may_split(op):
                work = op.sequences.logits()[0] * (op.D + op.Dv) * op.G
                self.heads = ranges(op.K, max_work // max(1, work)) if work * op.K > max_work else self.heads
            return
        self.batch = [(0, op.B)]
        row = op.Skv * (op.D + op.Dv) * op.G  # the work of one row of the heads that share a key head
        most = spec.MAX_HEADS // op.G
        if max_work is not None:
            entry = row * op.Sq * op.K
            self.batch = ranges(op.B, max_work // entry)
            if entry > max_work:
                most = min(most, max_work // (row * op.Sq))
        self.heads = ranges(op.K, most)
        if max_work is not None and row * op.Sq > max_work and _rows_may_split(op):
            blocks = max(1, max_work // row // spec.ROW_BLOCK)
            self.rows = ranges(op.Sq, blocks * spec.ROW_BLOCK)

    def __len__(self) -> int:
        return len(self.batch) * len(self.heads) * len(self.rows)

    def piece(self, batch: Range, heads: Range, rows: Range) -> OperatorCall:
        op = self.whole
        if op.sequences is not None:
            return self._some_heads(_group(op, op.sequences, batch), batch, heads)
        part = self._part(batch, heads, rows)
        if part == Part.whole(op.B, op.N, op.Sq):
            return op
        sparse, mask, count = op.sparse, _cut_full(op.mask, part), rows[1] - rows[0]
        if rows != (0, op.Sq):
            piece = sparse.rows(rows[0], count, op.Sq, op.Skv)
            if piece is None:  # the band masks all keys of these rows
                mask, piece = jnp.ones((1, 1, count, op.Skv), bool), FULL_MASK
            sparse = piece
        return replace(
            op,
            B=batch[1] - batch[0],
            N=part.n1 - part.n0,
            K=heads[1] - heads[0],
            Sq=count,
            query=self._cut_rows(op.query, part, op.D),
            key=self._cut_keys(op.key, part, op.D),
            value=self._cut_keys(op.value, part, op.Dv),
            sparse=replace(sparse, prefix=sparse.prefix[batch[0] : batch[1]]),
            mask=mask,
            pse=_cut_pse(op.pse, op, part),
            keep=None if op.keep is None else PartOf(op.keep, part),
            sink=None if op.sink is None else op.sink[part.n0 : part.n1],
        )

    def _some_heads(self, op: OperatorCall, batch: Range, heads: Range) -> OperatorCall:
        """In layout TND, a group of sequences with some of its key heads."""
        whole = self.whole
        if (batch, heads) == ((0, whole.B), (0, whole.K)):
            return op
        part = self._part(batch, heads, (0, whole.Sq))._replace(r1=op.Sq)
        rows = part._replace(b0=0, b1=op.B, r0=0)
        return replace(
            op,
            N=part.n1 - part.n0,
            K=heads[1] - heads[0],
            query=layouts.cut(op.query, "TND", "N", rows.n0, rows.n1),
            key=layouts.cut(op.key, "TND", "N", *heads),
            value=layouts.cut(op.value, "TND", "N", *heads),
            pse=None if op.pse is None else _cut_pse(op.pse, op, rows),
            keep=None if op.keep is None else PartOf(op.keep, part),
            sink=None if op.sink is None else op.sink[part.n0 : part.n1],
        )

    def residuals(self, saved: Residuals, batch: Range, heads: Range, rows: Range) -> Residuals:
        """Those of the piece."""
        op = self.whole
        if op.sequences is not None:
            at = slice(*rows_of(op.sequences, batch)), slice(heads[0] * op.G, heads[1] * op.G)
            return Residuals(*(x[at] for x in saved))
        part = self._part(batch, heads, rows)
        out, dout = (self._cut_rows(x, part, op.Dv) for x in (saved.out, saved.dout))
        stats = slice(part.b0, part.b1), slice(part.n0, part.n1), slice(part.r0, part.r1)
        return Residuals(out, saved.m[stats], saved.l[stats], dout)

    def _part(self, batch: Range, heads: Range, rows: Range) -> Part:
        return Part(*batch, heads[0] * self.whole.G, heads[1] * self.whole.G, *rows)

    def _cut_rows(self, x, part: Part, width: int):
        """The piece of query, or of what is like out; `width` elements per head."""
        layout = self.whole.layout
        x = layouts.cut(x, layout, "B", part.b0, part.b1)
        x = layouts.cut(x, layout, "N", part.n0, part.n1, width)
        return layouts.cut(x, layout, "S", part.r0, part.r1)

    def _cut_keys(self, x, part: Part, width: int):
        layout, G = self.whole.layout, self.whole.G
        x = layouts.cut(x, layout, "B", part.b0, part.b1)
        return layouts.cut(x, layout, "N", part.n0 // G, part.n1 // G, width)


def _rows_may_split(op: OperatorCall) -> bool:
    """Not where the mode or pse is about whole sequences."""
    structured = op.pse is not None and (op.pse.ndim < 4 or op.pse.shape[2] not in (1, op.Sq))
    return not structured and op.sparse.mode != 6


def _cut_full(x, part: Part):
    """Of a mask or bias `[B or 1, N or 1, Sq or 1, Skv]`."""
    if x is None:
        return None
    for axis, (start, stop) in enumerate(((part.b0, part.b1), (part.n0, part.n1), (part.r0, part.r1))):
        if x.shape[axis] != 1 and (start, stop) != (0, x.shape[axis]):
            x = x[(*(slice(None),) * axis, slice(start, stop))]
    return x


def _cut_pse(pse, op: OperatorCall, part: Part):
    if pse is None or pse.ndim == 4:
        table = pse is not None and pse.shape[2] == spec.ALIBI_ROWS and op.Sq > spec.ALIBI_ROWS
        return _cut_full(pse, part._replace(r0=0, r1=spec.ALIBI_ROWS) if table else part)
    heads = slice(part.n0, part.n1)
    return pse[heads] if pse.ndim == 1 else pse[part.b0 : part.b1, heads]


# --- layout TND: groups of sequences


def _sequence_groups(op: OperatorCall, s: Sequences, max_work: int | None) -> list[Range]:
    """Not split where pse, the mask or the keep bits are stored for all sequences together."""
    stored = op.keep is not None and not isinstance(op.keep, DrawnSequences)
    if op.pse is not None or stored or op.sparse.full:
        return [(0, op.B)]
    found, start, total = [], 0, 0
    sq, skv = (np.diff(ends, prepend=0).astype(object) for ends in (s.q_ends, s.kv_ends))
    for b, work in enumerate(sq * skv * (op.N * (op.D + op.Dv))):
        too_much = max_work is not None and 0 < total and total + work > max_work
        if too_much or b - start == spec.MAX_SEQUENCES:
            found.append((start, b))
            start, total = b, 0
        total += work
    return [*found, (start, op.B)]


def _heads_may_split(op: OperatorCall) -> bool:
    """Not where pse or the keep bits are stored sequence after sequence, each with all heads."""
    stored = isinstance(op.keep, GivenSequences) or (op.pse is not None and op.pse_type < 2)
    return not stored


def rows_of(s: Sequences, batch: Range) -> Range:
    return (0, *s.q_ends)[batch[0]], (0, *s.q_ends)[batch[1]]


def keys_of(s: Sequences, batch: Range) -> Range:
    return (0, *s.kv_ends)[batch[0]], (0, *s.kv_ends)[batch[1]]


def _group(op: OperatorCall, s: Sequences, batch: Range) -> OperatorCall:
    if batch == (0, op.B):
        return op
    (q0, q1), (k0, k1) = rows_of(s, batch), keys_of(s, batch)
    inside = slice(*batch)
    sparse = replace(op.sparse, prefix=op.sparse.prefix[inside])
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
        op,
        B=batch[1] - batch[0],
        Sq=q1 - q0,
        Skv=k1 - k0,
        query=op.query[q0:q1],
        key=op.key[k0:k1],
        value=op.value[k0:k1],
        sparse=sparse,
        sequences=sequences,
    )
