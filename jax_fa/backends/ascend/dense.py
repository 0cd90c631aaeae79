"""Operands of a call as dense arrays `[B, N, Sq, Skv]`, as CANN takes them, its batch dims as one.

What broadcasts keeps size 1 where CANN lets it.
"""

import math
from typing import Any

import jax.numpy as jnp

from jax_fa.call import Call
from jax_fa.indices import take_last


def is_empty(call: Call) -> bool:
    """Whether there are no logits."""
    d = call.dims
    return 0 in (*d.B, d.N, d.Sq, d.Skv)


def flat(call: Call, x):
    """`*#B ...` with its batch dims as one, of size 1 or B."""
    B = call.dims.B
    rest = x.shape[len(B) :]
    if math.prod(x.shape[: len(B)]) == 1:
        return x.reshape(1, *rest)
    return jnp.broadcast_to(x, (*B, *rest)).reshape(-1, *rest)


# --- the mask


def visible(call: Call):
    """Which keys are visible, boolean `[B or 1, N or 1, Sq or 1, Skv or 1]`."""
    x, d = call.operands, call.dims
    j = jnp.arange(d.Skv, dtype=jnp.int32)
    found = jnp.ones((1, 1, 1, 1), bool)
    if x.lower is not None:
        found = found & (j >= flat(call, x.lower)[..., None])
    if x.upper is not None:
        found = found & (j < flat(call, x.upper)[..., None])
    if x.mask is not None:
        found = found & flat(call, x.mask)
    if x.segment_row is not None:
        row, key = flat(call, x.segment_row)[..., None], flat(call, x.segment_key)[..., None, :]
        found = found & ((row < 0) | (row == key))
    return found


def mask(call: Call, whole_batch: bool = False):
    """`[B or 1, N or 1, Sq, Skv]`, True = masked."""
    d, found = call.dims, visible(call)
    B, N = found.shape[:2]
    # CANN has no mask [1, N, Sq, Skv].
    B = math.prod(d.B) if N > 1 or whole_batch else B
    return jnp.broadcast_to(~found, (B, N, d.Sq, d.Skv))


def mask_bytes(call: Call) -> int:
    """The size of `mask`, without making it."""
    x, d = call.operands, call.dims
    given = (x.lower, x.upper, x.mask, x.segment_row, x.segment_key)
    shapes = [x.shape for x in given if x is not None]
    rank = len(d.B)
    N = max((shape[rank] for shape in shapes), default=1)
    whole_batch = N > 1 or any(math.prod(shape[:rank]) > 1 for shape in shapes)
    return (math.prod(d.B) if whole_batch else 1) * N * d.Sq * d.Skv


def rows_with_keys(call: Call):
    """Which rows have a visible key, boolean `*B N Sq`: one that neither the mask nor a bias of -inf masks."""
    d, found = call.dims, visible(call)
    if call.operands.bias is not None:
        found = found & (_bias_operand(call) != -jnp.inf)
    found = jnp.any(jnp.broadcast_to(found, (*found.shape[:-1], d.Skv)), axis=-1)
    return jnp.broadcast_to(found, (math.prod(d.B), d.N, d.Sq)).reshape(*d.B, d.N, d.Sq)


# --- what is added to the scaled logits


def bias(call: Call):
    """Bias and slopes together, `[B or 1, N, Sq or 1, Skv]`."""
    x, d = call.operands, call.dims
    total: Any = None if x.bias is None else _bias_operand(call)
    if x.alibi_slopes is not None:
        term = -flat(call, x.alibi_slopes)[..., None].astype(jnp.float32) * _distance(call)
        total = term if total is None else total.astype(jnp.float32) + term
    B, _, rows, _ = total.shape
    return jnp.broadcast_to(total, (B, d.N, rows, d.Skv))


def _bias_operand(call: Call):
    """`[B or 1, N or 1, Sq or 1, Skv or 1]`."""
    x, d = call.operands, call.dims
    if x.bias_offset is None:
        return flat(call, x.bias)
    values, offset = flat(call, x.bias), flat(call, x.bias_offset)
    index = offset[..., None] + jnp.arange(d.Skv, dtype=jnp.int32)
    lead = jnp.broadcast_shapes(values.shape[:2], index.shape[:2])
    return take_last(values, jnp.broadcast_to(index, (*lead, *index.shape[2:])))


def _distance(call: Call):
    """What ALiBi slopes multiply, float32 `[B or 1, N or 1, Sq or 1, Skv]`."""
    x, d = call.operands, call.dims
    i = jnp.arange(d.Sq, dtype=jnp.int32) if x.position is None else flat(call, x.position)
    away = jnp.abs(jnp.arange(d.Skv, dtype=jnp.int32) - i[..., None]).astype(jnp.float32)
    return jnp.sqrt(away) if call.problem.alibi == "sqrt" else away
