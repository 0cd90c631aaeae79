"""The attention of Gemma's layers, in `gemma` and in tunix, in O(S) memory: a soft cap, windows, and shared key heads.

encoded = attention(query_scaled, key_proj, value_proj, attn_mask, attn_logits_soft_cap=50.0, sliding_window_size=1024)
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_fa import api, arguments, backends, indices
from jax_fa.integrations import structure
from jax_fa.masks import Band, Dense, Mask


def attention(
    query,
    key,
    value,
    attn_mask=None,
    *,
    attn_logits_soft_cap: Any = None,
    sliding_window_size: int | None = None,
    segment_pos=None,
    cache_positions=None,
    implementation: backends.Implementation = None,
):
    """What stands between the projections of a layer: the products, soft cap, masks, softmax and sum over the values.

    Names, shapes and meaning are those of the layers `Attention` of `gemma.gm.nn` and of `tunix.models`.

    Args:
      query: shape `(B, T, N, H)`, already scaled, as the layers have it: `query_proj * query_pre_attn_scalar`.
      key: shape `(B, S, K, H)`, query's dtype; N must be a multiple of K. With a cache, the whole cache.
      value: shape `(B, S, K, H)`, query's dtype.
      attn_mask: shape `(B, T, S)` or `(1, T, S)`, boolean or numeric, nonzero = visible; or a mask of `jax_fa.masks`,
        which needs no S×S array; None: all keys are visible. An array may have more than S columns, as for a cache
        that was cut to its used part: the first S count.
      attn_logits_soft_cap: positive; replaces the logits x by `cap * tanh(x / cap)`.
      sliding_window_size: only keys whose position is less than this away from the query's are visible, on both sides:
        joined with attn_mask.
      segment_pos: int, shape `(B, T)`: the positions of the queries, for sliding_window_size alone. None: their indices,
        from 0 on, and those of the keys: then the window needs no S×S array.
      cache_positions: int, shape `(B, S)` or `(S,)`: the positions of the keys; None: those of the queries. Needs
        segment_pos. Where they are known when tracing to count up from 0, as `np.arange(S)` (the layers of tunix), the
        window needs no S×S array either.
      implementation: None (the best backend that can), or the name of a backend: see `jax_fa.explain`.

    Returns:
      Shape `(B, T, N, H)`, query's dtype. A fully masked row is 0, where the layers give the mean of all values.

    Raises:
      ValueError: shapes or values that do not fit.
      TypeError: dtypes that do not fit.
    """
    query, key, value = (arguments.array(n, x) for n, x in (("query", query), ("key", key), ("value", value)))
    for name, x in (("query", query), ("key", key)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions, (B, length, heads, size); got shape {x.shape}.")
    window = _window(query, key, sliding_window_size, segment_pos, cache_positions)
    return api.flash_attention(
        query,
        key,
        value,
        mask=structure.joined(_mask(attn_mask, key.shape[1]), window),
        scale=1.0,
        logits_soft_cap=attn_logits_soft_cap,
        implementation=implementation,
    )


def _mask(attn_mask, keys: int) -> Mask | None:
    if attn_mask is None or isinstance(attn_mask, Mask):
        return attn_mask
    if not hasattr(attn_mask, "dtype"):
        return api.one_mask(attn_mask)  # which raises
    attn_mask = arguments.array("attn_mask", attn_mask)
    if attn_mask.ndim != 3 or attn_mask.shape[-1] < keys:
        raise ValueError(
            f"attn_mask must have shape (B, T, S) with S of at least {keys}; got {attn_mask.shape}."
        )
    return Dense(attn_mask[:, None, :, :keys].astype(jnp.bool_))


def _window(query, key, size, segment_pos, cache_positions) -> Mask | None:
    if cache_positions is not None and segment_pos is None:
        raise ValueError("segment_pos must be given with cache_positions; got None.")
    if size is None:
        return None
    size = structure.window("sliding_window_size", size)
    if segment_pos is None:
        if query.shape[1] != key.shape[1]:
            raise ValueError(
                f"segment_pos must be given where sliding_window_size is and T={query.shape[1]} is not S={key.shape[1]}: "
                "the positions of the queries count from where the cache stands."
            )
        return Band(size - 1, size - 1)
    rows = structure.positions("segment_pos", segment_pos, query.shape[:2])
    if cache_positions is None:
        if query.shape[1] != key.shape[1]:
            raise ValueError(
                f"cache_positions must be given where T={query.shape[1]} is not S={key.shape[1]}; got None."
            )
        return structure.near(rows, rows, size)
    if _counts(cache_positions, key.shape[1]):
        here = jnp.arange(query.shape[1], dtype=jnp.int32)
        return Band(size - 1, size - 1, offset=(rows - here)[:, None, :])
    shape = key.shape[1:2] if np.ndim(cache_positions) == 1 else key.shape[:2]
    return structure.near(rows, structure.positions("cache_positions", cache_positions, shape), size)


def _counts(positions, keys: int) -> bool:
    """Whether positions are known, when tracing, to be 0, 1, 2, ..."""
    known = indices.known(positions) if hasattr(positions, "dtype") else None
    return known is not None and known.shape[-1:] == (keys,) and bool(np.all(known == np.arange(keys)))
