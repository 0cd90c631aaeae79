"""The custom calls, and the pieces of a call put together again."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa.backends.ascend import installation
from jax_fa.backends.ascend import layout as layouts
from jax_fa.backends.ascend.drop import Part
from jax_fa.backends.ascend.modes import Sparse
from jax_fa.backends.ascend.request import Request
from jax_fa.backends.ascend.split import Grid, rows_of
from jax_fa.cann import spec


def forward(r: Request, max_work: int | None):
    """(out, max, sum): out in the layout, the statistics `B N Sq`, in layout TND `T N`."""
    grid = Grid(r, max_work)
    batch = []
    for b in grid.batch:
        heads = []
        for h in grid.heads:
            rows = [_forward(grid.piece(b, h, s)) for s in grid.rows]
            heads.append(_join(rows, r.layout, "S", 2))
        batch.append(_join(heads, r.layout, "N", 1))
    return _join(batch, r.layout, "S" if r.layout == "TND" else "B", 0)


def backward(r: Request, out, m, l, dout, max_work: int | None):
    """(dq, dk, dv) in the layout, from statistics as `forward` gives them."""
    grid = Grid(r, max_work)
    layout, group = r.layout, r.N // r.K
    sequence = layout == "TND"
    batch: list[list] = [[], [], []]
    for b in grid.batch:
        heads: list[list] = [[], [], []]
        for h in grid.heads:
            dq, dk, dv = [], None, None
            for s in grid.rows:
                piece = grid.piece(b, h, s)
                if r.sequences is not None:
                    at: Any = slice(*rows_of(r.sequences, b))
                    saved = out[at], m[at], l[at], dout[at]
                else:
                    part = Part(*b, h[0] * group, h[1] * group, *s)
                    at = slice(*b), slice(part.n0, part.n1), slice(*s)
                    o, do = (grid.cut_query(x, part, r.Dv) for x in (out, dout))
                    saved = o, m[at], l[at], do
                dq_part, dk_part, dv_part = _backward(piece, *saved)
                dq.append(dq_part)
                dk, dv = _add(dk, dk_part, len(grid.rows)), _add(dv, dv_part, len(grid.rows))
            heads[0].append(layouts.join(dq, layout, "S"))
            heads[1].append(dk.astype(r.key.dtype))  # type: ignore[union-attr]
            heads[2].append(dv.astype(r.value.dtype))  # type: ignore[union-attr]
        for all_of, parts in zip(batch, heads, strict=True):
            all_of.append(layouts.join(parts, layout, "N"))
    return tuple(layouts.join(parts, layout, "S" if sequence else "B") for parts in batch)


def _add(total, part, count: int):
    """Sums over several pieces are float32."""
    part = part if count == 1 else part.astype(jnp.float32)
    return part if total is None else total + part


def _join(parts: list[tuple], layout: str, letter: str, axis: int):
    if len(parts) == 1:
        return parts[0]
    outs, ms, ls = zip(*parts, strict=True)
    return layouts.join(list(outs), layout, letter), jnp.concatenate(ms, axis), jnp.concatenate(ls, axis)


def _forward(r: Request):
    rows = (r.Sq, r.N) if r.layout == "TND" else (r.B, r.N, r.Sq)
    stats = jax.ShapeDtypeStruct((*rows, spec.LANES), jnp.float32)
    shape = layouts.layout_shape(r.layout, r.B, r.Sq, r.N, r.Dv)
    result = jax.ShapeDtypeStruct(shape, r.query.dtype)
    present, optional = _optional(r)
    call = jax.ffi.ffi_call(installation.FORWARD, (stats, stats, result))
    m, l, out = call(r.query, r.key, r.value, *optional, **_attributes(r, present))
    m, l = m[..., 0], l[..., 0]
    if r.sequences is not None and r.softmax_layout == "":
        m, l = (r.sequences.to_rows(x, r.N) for x in (m, l))
    return out, m, l


def _backward(r: Request, out, m, l, dout):
    if r.sequences is not None and r.softmax_layout == "":
        m, l = (r.sequences.to_blocks(x) for x in (m, l))
    m, l = (jnp.broadcast_to(x[..., None], (*x.shape, spec.LANES)) for x in (m, l))
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (r.query, r.key, r.value)]
    present, optional = _optional(r)
    call = jax.ffi.ffi_call(installation.BACKWARD, results)
    return call(r.query, r.key, r.value, dout, *optional, m, l, out, **_attributes(r, present))


def _optional(r: Request) -> tuple[int, list[Any]]:
    """Which of pse, drop_mask and atten_mask are given, as a bit mask, and their arrays."""
    mask = r.mask if r.sparse.full else _pattern(r.sparse)
    drop = None if r.keep is None else r.keep.packed(Part(0, r.B, 0, r.N, 0, r.Sq))
    given = [r.pse, drop, mask]
    present = sum(1 << bit for bit, x in enumerate(given) if x is not None)
    return present, [jnp.asarray(x) for x in given if x is not None]


def _pattern(sparse: Sparse):
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


def _attributes(r: Request, present: int) -> dict[str, Any]:
    """What the handlers decode (cc/ascend_ffi.cc); every field has exactly the type that C++ expects."""
    s = r.sequences
    return {
        "problem": {
            "input_layout": r.layout,
            "head_num": np.int64(r.N),
            "scale_value": np.float64(r.scale),
            "keep_prob": np.float64(r.keep_prob),
            "pre_tokens": np.int64(r.sparse.pre),
            "next_tokens": np.int64(r.sparse.next),
            "inner_precise": np.int64(2 if r.sparse.hides else 0),
            "sparse_mode": np.int64(r.sparse.mode),
            "pse_type": np.int64(r.pse_type),
            "present": np.uint32(present),
            "softmax_layout": r.softmax_layout,
        },
        "prefix": np.asarray(r.sparse.prefix, np.int64),
        "actual_seq_qlen": np.asarray(() if s is None else s.q_ends, np.int64),
        "actual_seq_kvlen": np.asarray(() if s is None else s.kv_ends, np.int64),
    }
