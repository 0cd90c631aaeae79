"""The sink of the operator: one more logit per head, without a value (`attention` joins it with the softmax of the keys).

Source: aclnnFlashAttentionScoreV3, sinkOptional.
"""

import jax.numpy as jnp
import numpy as np

from jax_fa.arguments import shown
from jax_fa.call import Dims


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


def gradient(sink, m, l, weighted):
    """That of the sink, from joined statistics and sum_j p_j dp_j over the keys of the call, `*B N Sq` each."""
    empty = l == 0
    # There, m is -FLT_MAX, and exp would be infinite: derivatives of what is chosen away would be NaN.
    share = jnp.exp(jnp.where(empty, 0, sink[:, None] - m)) / jnp.where(empty, 1, l)
    weight = jnp.where(empty, 0, share)
    other = tuple(axis for axis in range(weighted.ndim) if axis != weighted.ndim - 2)
    return -jnp.sum(weight * weighted, axis=other)
