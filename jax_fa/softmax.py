"""The (max, sum) algebra of the online softmax.

A row's partial result over a set of keys is `(acc, m, l)`: `m = max_j s_j`, `l = sum_j exp(s_j - m)` and
`acc = sum_j exp(s_j - m) v_j`. Two partial results over disjoint keys merge exactly, so a row can be
computed tile by tile (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).

The empty set is `m = -FLT_MAX, l = 0, acc = 0`: a finite max keeps `exp(-inf - m)` at 0, never NaN, so a
row with no visible key needs no special case until `finish`.
"""

import jax
import jax.numpy as jnp
import numpy as np

FLT_MAX = float(np.finfo(np.float32).max)


def start(shape, dtype):
    """(m, l) of the empty set of keys, for rows of the given shape."""
    return jnp.full(shape, -FLT_MAX, dtype), jnp.zeros(shape, dtype)


def update(m, l, logits):
    """Takes a tile of logits `[..., rows, keys]` (masked ones -inf) into `(m, l)`.

    Returns the new `(m, l)`, the factor that rescales what was summed before, and the tile's unnormalized
    probabilities.
    """
    m_new = jnp.maximum(m, jnp.max(logits, axis=-1))
    rescale = jnp.exp(m - m_new)
    p = jnp.exp(logits - m_new[..., None])
    return m_new, l * rescale + jnp.sum(p, axis=-1), rescale, p


def merge(left, right):
    """Merges two partial results `(acc, m, l)` over disjoint sets of keys."""
    (acc_a, m_a, l_a), (acc_b, m_b, l_b) = left, right
    m = jnp.maximum(m_a, m_b)
    a, b = jnp.exp(m_a - m), jnp.exp(m_b - m)
    return acc_a * a[..., None] + acc_b * b[..., None], m, l_a * a + l_b * b


def inverse(l):
    """1 / l, and 0 for a row without a visible key; NaN stays NaN."""
    empty = l == 0
    return jnp.where(empty, 0, 1 / jnp.where(empty, 1, l))


def finish(acc, l):
    """The normalized output; 0 for a row without a visible key."""
    empty = l[..., None] == 0
    return jnp.where(empty, 0, acc / jnp.where(empty, 1, l[..., None]))


def logsumexp(m, l):
    """Natural log-sum-exp; -FLT_MAX for a row without a visible key."""
    empty = l == 0
    return jnp.where(empty, -FLT_MAX, m + jnp.log(jnp.where(empty, 1, l)))


def with_sink(m, l, sink):
    """`(m, l)` with one more logit, as if merged with the partial result `(0, sink, 1)`; -inf is no sink.

    The new m is a constant: the derivatives of the log-sum-exp are in l.
    """
    m_new = jax.lax.stop_gradient(jnp.maximum(m, sink))
    return m_new, l * jnp.exp(m - m_new) + jnp.exp(sink - m_new)
