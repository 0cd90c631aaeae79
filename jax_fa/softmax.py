"""The (max, sum) algebra of the online softmax.

A row's partial result over a set of keys is `(acc, m, l)`: `m = max_j s_j`, `l = sum_j exp(s_j - m)` and
`acc = sum_j exp(s_j - m) v_j`. Two partial results over disjoint keys merge exactly, so a row can be
computed tile by tile (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). So do the
results that callers have, `out = acc / l` and the log-sum-exp `m + log l` (`merge`).

The empty set is `m = -FLT_MAX, l = 0, acc = 0`: a finite max keeps `exp(-inf - m)` at 0, never NaN, so a
row with no visible key needs no special case until `finish`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jax_fa import arguments, compat
from jax_fa.call import Axes, accumulator_dtype, canonical_shape

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
    p = weights(logits, m_new)
    return m_new, l * rescale + jnp.sum(p, axis=-1), rescale, p


@jax.custom_jvp
def weights(logits, m):
    """exp(logits - m), `[..., rows, keys]`: 1 where a logit is its row's max, and never more.

    A compiler may compute `scale * product - m` with one rounding, so that a logit differs from itself as the max: at
    1e18 by 1e10, which makes an infinite weight, or none.
    """
    m = m[..., None]
    return jnp.exp(jnp.where(logits >= m, m - m, logits - m))  # m - m: an infinite max gives NaN


@weights.defjvp
def _weights_jvp(primals, tangents):
    """That of exp: the choice above is one of rounding only."""
    p = weights(*primals)
    return p, p * (tangents[0] - tangents[1][..., None])


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


Partial = tuple[Float[ArrayLike, "..."], Float[ArrayLike, "..."]]


@compat.allow_promotion()
def merge(*partials: Partial, layout: str = "BSND") -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Merges attention of the same queries over disjoint sets of keys into attention over all of them.

        lse = log sum_i exp(lse_i),  out = sum_i exp(lse_i - lse) out_i

    For keys that are computed in parts: a prefix that many requests share, a KV cache that is split over devices or blocks,
    a ring.

    Args:
      *partials: pairs (out, log-sum-exp) as `flash_attention(..., return_logsumexp=True)` gives them: out of shape
        `(*B, Sq, N, Dv)` (or as the layout says) in any floating dtype, and the natural log-sum-exp of shape `(*B, N, Sq)`,
        float32 or float64. At least one, and all of the same shapes and dtypes. A row without a visible key in a part has
        log-sum-exp -FLT_MAX (or -inf) there, and its out is not used.
      layout: that of out; see `flash_attention`.

    Returns:
      The pair over all keys, of the shapes and dtypes of the parts. Rows without a visible key in any part give out 0 and
      log-sum-exp -FLT_MAX. Differentiable to any order, in all parts.

    Raises:
      ValueError: no parts, or shapes that do not fit together.
      TypeError: what is no pair, or dtypes that do not fit.

    Source: Dao et al. 2022, arXiv:2205.14135; prefix sharing: Juravsky et al. 2024, arXiv:2402.05099.
    """
    if not partials:
        raise ValueError("merge takes pairs (out, logsumexp), at least one; got none.")
    pairs = [_pair(i, x) for i, x in enumerate(partials)]
    out, lse = pairs[0]
    axes, name = arguments.axes_of(layout, "out", out)
    *batch, rows, heads, _ = canonical_shape(out.shape, axes)
    for i, (other, statistic) in enumerate(pairs):
        if statistic.shape != (*batch, heads, rows):
            raise ValueError(
                f"logsumexp of part {i} must have shape (*B, N, Sq)={(*batch, heads, rows)} with out {out.shape} in layout "
                f"{name}; got {statistic.shape}."
            )
        if other.shape != out.shape:
            raise ValueError(f"out of part {i} must have the shape {out.shape} of part 0; got {other.shape}.")
        for what, x, first in (("out", other, out), ("logsumexp", statistic, lse)):
            if x.dtype != first.dtype:
                raise TypeError(
                    f"{what} of part {i} must have the dtype {first.dtype} of part 0; got {x.dtype}."
                )
    acc = accumulator_dtype(out.dtype)
    merged, logsumexp = merged_parts([(x.astype(acc), statistic) for x, statistic in pairs], axes)
    return merged.astype(out.dtype), logsumexp


def _pair(i: int, x: Any) -> tuple[Any, Any]:
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise TypeError(
            f"part {i} must be a pair (out, logsumexp), as flash_attention(..., return_logsumexp=True) gives it; got "
            f"{arguments.shown(x)}."
        )
    out, lse = (
        arguments.array(f"{name} of part {i}", a) for name, a in zip(("out", "logsumexp"), x, strict=True)
    )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"out of part {i} must have a floating dtype; got {out.dtype}.")
    if lse.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"logsumexp of part {i} must be float32 or float64; got {lse.dtype}.")
    return out, lse


def merged_parts(
    parts: Sequence[tuple[Any, Any]], axes: Axes, most: Any = None, add: Callable[[Any], Any] = lambda x: x
) -> tuple[Any, Any]:
    """(out, log-sum-exp) of all keys from those of parts, in which out is stored in the order of `axes`.

    Where others have more parts: `most` is the max of all log-sum-exps, and `add` sums over all parts.
    """
    if most is None:
        most = jax.lax.stop_gradient(jnp.max(jnp.stack([lse for _, lse in parts]), axis=0))
    acc: Any = 0
    l: Any = 0
    for out, lse in parts:
        empty = lse <= -FLT_MAX
        weight = jnp.where(empty, 0, jnp.exp(jnp.where(empty, 0, lse - most)))
        acc = acc + jnp.where(rows_as_stored(empty, axes), 0, out) * rows_as_stored(weight, axes)
        l = l + weight
    acc, l = add((acc, l))
    return acc * rows_as_stored(inverse(l), axes), logsumexp(most, l)


def rows_as_stored(x, axes: Axes):
    """Statistics `*B N Sq` as factors of what is stored in the order of `axes`."""
    return jnp.swapaxes(x, -1, -2)[..., None].transpose([axes.index(i) for i in range(len(axes))])


def row_sums(x, axes: Axes):
    """The sums of rows of what is stored in the order of `axes`, as statistics `*B N Sq`."""
    return jnp.swapaxes(jnp.sum(x.transpose(axes), axis=-1), -1, -2)


def with_sink(m, l, sink):
    """`(m, l)` with one more logit, as if merged with the partial result `(0, sink, 1)`; -inf is no sink.

    The new m is a constant: the derivatives of the log-sum-exp are in l.
    """
    m_new = jax.lax.stop_gradient(jnp.maximum(m, sink))
    return m_new, _sum_with_sink(m, l, sink, m_new)


@jax.custom_jvp
def _sum_with_sink(m, l, sink, most):
    return l * jnp.exp(m - most) + jnp.exp(sink - most)


@_sum_with_sink.defjvp
def _sum_with_sink_jvp(primals, tangents):
    # Made of the very shares that the output is multiplied by: what both are factors of may cancel.
    m, l, sink, most = primals
    of_keys, of_sink = shares(logsumexp(m, l) - sink)
    total = _sum_with_sink(m, l, sink, most)
    return total, total * (of_keys * (tangents[0] + inverse(l) * tangents[1]) + of_sink * tangents[2])


@jax.custom_jvp
def shares(apart) -> tuple[Any, Any]:
    """Those of two parts in their sum, from the difference of their log-sum-exps."""
    return jnp.exp(jax.nn.log_sigmoid(apart)), jnp.exp(jax.nn.log_sigmoid(-apart))


@shares.defjvp
def _shares_jvp(primals, tangents):
    # (The derivative of jax.nn.sigmoid at 1 - 1e-9 is 0 in float32, and that of log_sigmoid is off by the rounding of apart.)
    one, other = shares(*primals)
    moved = one * other * tangents[0]
    return (one, other), (moved, -moved)
