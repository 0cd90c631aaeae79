"""The custom calls, and the pieces of a call put together again."""

import functools
import operator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa.backends.ascend import installation
from jax_fa.backends.ascend import layout as layouts
from jax_fa.backends.ascend.keep_bits import Part
from jax_fa.backends.ascend.operator_call import OperatorCall, Residuals
from jax_fa.backends.ascend.sparse_modes import SparseMode
from jax_fa.backends.ascend.split import Grid, Range
from jax_fa.cann import spec


def forward(op: OperatorCall, max_work: int | None):
    """(out, max, sum): out in the layout, the statistics `B N Sq`, in layout TND `T N`."""
    grid = Grid(op, max_work)
    batch = []
    done = None
    for b in grid.batch:
        heads = []
        for h in grid.heads:
            rows = []
            for s in grid.rows:
                rows.append(_forward(_after(grid.piece(b, h, s), done)))
                done = rows[-1][1]
            heads.append(_join(rows, op.layout, "S", 2))
        batch.append(_join(heads, op.layout, "N", 1))
    return _join(batch, op.layout, "S" if op.layout == "TND" else "B", 0)


def backward(op: OperatorCall, saved: Residuals, max_work: int | None):
    """(dq, dk, dv) in the layout, and the gradient of the sink `N` (without one, of no elements)."""
    grid = Grid(op, max_work)
    batch = []
    done = None
    for b in grid.batch:
        heads = []
        for h in grid.heads:
            heads.append(_backward_of_rows(grid, b, h, saved, done))
            done = heads[-1][0]
        *stored, sinks = zip(*heads, strict=True)
        joined = [layouts.join(list(parts), op.layout, "N") for parts in stored]
        batch.append([*joined, jnp.concatenate(sinks)])
    letter = "S" if op.layout == "TND" else "B"
    *stored, sinks = zip(*batch, strict=True)
    return *(layouts.join(list(parts), op.layout, letter) for parts in stored), _sum(sinks, jnp.float32)


def _after(op: OperatorCall, done) -> OperatorCall:
    """The call, whose keep bits are not drawn before another one is done."""
    return op if done is None or op.keep is None else replace(op, keep=op.keep.after(done))


def _backward_of_rows(grid: Grid, batch: Range, heads: Range, saved: Residuals, done):
    """The gradients of some batch entries and heads: those of key and value are sums over the ranges of rows."""
    found = []
    for rows in grid.rows:
        piece = batch, heads, rows
        found.append(_backward(_after(grid.piece(*piece), done), grid.residuals(saved, *piece)))
        done = found[-1][0]
    dq, dk, dv, *sinks = zip(*found, strict=True)
    op = grid.whole
    dsink = _sum(sinks[0], jnp.float32) if sinks else jnp.zeros((0,), jnp.float32)
    return layouts.join(list(dq), op.layout, "S"), _sum(dk, op.key.dtype), _sum(dv, op.value.dtype), dsink


def _sum(parts, dtype):
    """In float32 where there are several."""
    if len(parts) == 1:
        return parts[0].astype(dtype)
    return functools.reduce(operator.add, [x.astype(jnp.float32) for x in parts]).astype(dtype)


def _join(parts: list[tuple], layout: str, letter: str, axis: int):
    if len(parts) == 1:
        return parts[0]
    outs, ms, ls = zip(*parts, strict=True)
    return layouts.join(list(outs), layout, letter), jnp.concatenate(ms, axis), jnp.concatenate(ls, axis)


def _forward(op: OperatorCall):
    rows = (op.Sq, op.N) if op.layout == "TND" else (op.B, op.N, op.Sq)
    stats = jax.ShapeDtypeStruct((*rows, spec.LANES), jnp.float32)
    shape = layouts.layout_shape(op.layout, op.B, op.Sq, op.N, op.Dv)
    result = jax.ShapeDtypeStruct(shape, op.query.dtype)
    present, optional = _optional(op)
    call = jax.ffi.ffi_call(installation.FORWARD, (stats, stats, result))
    m, l, out = call(op.query, op.key, op.value, *optional, **_attributes(op, present))
    m, l = m[..., 0], l[..., 0]
    if op.sequences is not None and op.softmax_layout == "":
        m, l = (op.sequences.to_rows(x, op.N) for x in (m, l))
    return out, m, l


def _backward(op: OperatorCall, saved: Residuals):
    m, l = saved.m, saved.l
    if op.sequences is not None and op.softmax_layout == "":
        m, l = (op.sequences.to_blocks(x) for x in (m, l))
    m, l = (jnp.broadcast_to(x[..., None], (*x.shape, spec.LANES)) for x in (m, l))
    given = (op.query, op.key, op.value, *(() if op.sink is None else (op.sink,)))
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in given]
    present, optional = _optional(op)
    call = jax.ffi.ffi_call(installation.BACKWARD, results)
    return call(
        op.query, op.key, op.value, saved.dout, *optional, m, l, saved.out, **_attributes(op, present)
    )


def _optional(op: OperatorCall) -> tuple[int, list[Any]]:
    """Which of pse, drop_mask, atten_mask and sink are given, as a bit mask, and their arrays."""
    mask = op.mask if op.sparse.full else _pattern(op.sparse)
    drop = None if op.keep is None else op.keep.packed(Part.whole(op.B, op.N, op.Sq))
    given = [op.pse, drop, mask, op.sink]
    present = sum(1 << bit for bit, x in enumerate(given) if x is not None)
    return present, [jnp.asarray(x) for x in given if x is not None]


def _pattern(sparse: SparseMode):
    if sparse.mode < 2:
        return None
    return _causal_prefix() if sparse.mode == 6 else _causal()


# Functions of their own, so that a program holds each of these constants of 4 and 6 MiB once.
@jax.jit
def _causal():
    return jnp.asarray(spec.compressed_mask(False))


@jax.jit
def _causal_prefix():
    return jnp.asarray(spec.compressed_mask(True))


def _next_tokens(op: OperatorCall) -> int:
    """Causal modes ignore it, but for the check of an ALiBi table in the backward, which asks for 0."""
    table = op.sequences is None and op.pse is not None and op.pse_type not in spec.ALIBI_TYPES
    return 0 if table and op.pse.shape[2] == spec.ALIBI_ROWS and op.sparse.mode in (2, 3) else op.sparse.next


def _attributes(op: OperatorCall, present: int) -> dict[str, Any]:
    """What the handlers decode (cc/ascend_ffi.cc); every field has exactly the type that C++ expects."""
    s = op.sequences
    return {
        "problem": {
            "input_layout": op.layout,
            "head_num": np.int64(op.N),
            "scale_value": np.float64(op.scale),
            "keep_prob": np.float64(op.keep_prob),
            "pre_tokens": np.int64(op.sparse.pre),
            "next_tokens": np.int64(_next_tokens(op)),
            "inner_precise": np.int64(2 if op.sparse.may_mask else 0),
            "sparse_mode": np.int64(op.sparse.mode),
            "pse_type": np.int64(op.pse_type),
            "q_start": np.int64(op.starts[0]),
            "kv_start": np.int64(op.starts[1]),
            "present": np.uint32(present),
            "softmax_layout": op.softmax_layout,
        },
        "prefix": np.asarray(op.sparse.prefix, np.int64),
        "actual_seq_qlen": np.asarray(() if s is None else s.q_ends, np.int64),
        "actual_seq_kvlen": np.asarray(() if s is None else s.kv_ends, np.int64),
    }
