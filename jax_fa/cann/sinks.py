"""A sink: one more logit per head, without a value, in the softmax of every row.

With (m, l) of a row's keys, the joined statistics are M = max(m, sink) and L = l exp(m - M) + exp(sink - M), and the output
shrinks by what the keys keep of the sum. A fully masked row has the sink alone: output 0, max sink, sum 1.

Source: aclnnFlashAttentionScoreV3, sinkOptional.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa.arguments import shown
from jax_fa.attention import Attention
from jax_fa.call import Call, Dims


def checked(sink, d: Dims):
    """The sink as an array `N`, or None."""
    if sink is None:
        return None
    if not hasattr(sink, "dtype"):
        raise TypeError(f"sink must be a float32 array; got {shown(sink)}.")
    if sink.dtype != np.float32:
        raise TypeError(f"sink must have dtype float32; got {sink.dtype}.")
    if sink.shape != (d.N,):
        raise ValueError(f"sink must have shape (head_num,)={(d.N,)}; got {sink.shape}.")
    return jnp.asarray(sink)


def joined(result: Attention, sink, call: Call):
    """(out, max, sum) with the sink."""
    m, l = result.softmax_max, result.softmax_sum
    if sink is None:
        return result.out, m, l
    sink = sink[:, None]
    # l as it is, with the derivative of the log-sum-exp: m is a constant shift.
    live = l * jnp.exp(result.logsumexp - jax.lax.stop_gradient(result.logsumexp))
    top = jax.lax.stop_gradient(jnp.maximum(m, sink))
    keys = live * jnp.exp(m - top)
    total = keys + jnp.exp(sink - top)
    out = (result.out * by_row(keys / total, call)).astype(result.out.dtype)
    return out, top, total


def gradient(sink, m, l, delta):
    """That of the sink, from joined statistics and delta = rowsum(dy * attention_in), `*B N Sq` each."""
    weight = jnp.where(l == 0, 0, jnp.exp(sink[:, None] - m) / jnp.where(l == 0, 1, l))
    other = tuple(axis for axis in range(delta.ndim) if axis != delta.ndim - 2)
    return -jnp.sum(weight * delta, axis=other)


def by_row(x, call: Call):
    """A factor of rows `*B N Sq` for an array that is stored like out."""
    return jnp.swapaxes(x, -1, -2)[..., None].transpose(np.argsort(call.problem.out_axes))


def row_sums(x, call: Call):
    """`*B N Sq` in float32, of an array that is stored like out."""
    canonical = x.astype(jnp.float32).transpose(call.problem.out_axes)
    return jnp.swapaxes(jnp.sum(canonical, axis=-1), -1, -2)
