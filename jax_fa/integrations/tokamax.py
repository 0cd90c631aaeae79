"""`tokamax.dot_product_attention`, as AlphaFold 3 and others call it, in O(S) memory.

from jax_fa.integrations import tokamax  # in place of `import tokamax`
tokamax.dot_product_attention(query, key, value, mask=mask, bias=bias, implementation="triton")
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_fa import api, arguments, backends, indices
from jax_fa.integrations.precision import check_precision
from jax_fa.integrations.structure import band, joined
from jax_fa.masks import Causal, Lengths, Mask

_THEIRS = ("mosaic", "mosaic_gpu", "mosaic_tpu", "triton", "cudnn", "xla", "xla_chunked")


def dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal: bool = False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    logits_soft_cap=None,
    precision=None,
    implementation=None,
    q_sharding=None,
    _backend: backends.Implementation = None,
):
    """`tokamax.dot_product_attention`, argument for argument.

    Args:
      query: shape `(*B, T, N, H)`, any number of batch dims; no quantized array.
      key: shape `(*B, S, K, H)`, query's dtype; N must be a multiple of K.
      value: shape `(*B, S, K, h)`, query's dtype.
      bias: added to the scaled logits; broadcastable to `(*B, N, T, S)`. Differentiable.
      mask: boolean, True = visible, broadcastable to `(*B, N, T, S)`; or a mask of `jax_fa.masks`.
      scale: factor of the logits; None: `1 / sqrt(H)`.
      is_causal: query i attends to keys j <= i (top-left aligned).
      query_seq_lengths: integers broadcastable to `*B`; rows from the length on are fully masked.
      key_value_seq_lengths: integers broadcastable to `*B`; keys from the length on are masked.
      local_window_size: `(left, right)`, or an int for both: keys i - left .. i + right are visible to query i.
      logits_soft_cap: replaces the logits x, after scale and bias, by `cap * tanh(x / cap)`.
      precision: accepted where the kernels have it anyway, as in `jax_fa.integrations.flax.attention_fn`.
      implementation: a name of tokamax's implementations, several, or None. They name kernels of tokamax: the call is
        served by jax_fa, whose backend `make_dot_product_attention` names.
      q_sharding: must be None: shardings are those of the arrays.

    Returns:
      Shape `(*B, T, N, h)`, query's dtype. A fully masked row is 0, where tokamax gives the mean of all values.

    Raises:
      ValueError: shapes or values that do not fit; an unknown implementation.
      TypeError: dtypes that do not fit.
      NotImplementedError: quantized arrays, q_sharding, or a precision that the kernels do not have.
    """
    _check_implementation(implementation)
    if q_sharding is not None:
        raise NotImplementedError(
            f"q_sharding must be None: jax_fa takes the sharding from the arrays; got {arguments.shown(q_sharding)}. "
            "Apply it by jax.lax.with_sharding_constraint, or by jax.device_put outside of jit."
        )
    query, key, value = (_array(n, x) for n, x in (("query", query), ("key", key), ("value", value)))
    check_precision(precision, query.dtype)
    rows = _lengths(query, key, query_seq_lengths, key_value_seq_lengths)
    arguments.flag("is_causal", is_causal)
    return api.flash_attention(
        query,
        key,
        value,
        bias=bias,
        mask=joined(mask, Causal() if is_causal else None, rows, band(local_window_size)),
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        implementation=_backend,
    )


def make_dot_product_attention(*, implementation: backends.Implementation = None) -> Callable[..., jax.Array]:
    """`dot_product_attention` by one backend of jax_fa.

    Args:
      implementation: None (the best backend that can), or the name of a backend: see `jax_fa.explain`.
    """
    backends.chosen(implementation)
    return functools.partial(dot_product_attention, _backend=implementation)


def _array(name: str, x):
    if hasattr(x, "qvalue"):
        raise NotImplementedError(
            f"{name} must be an array that is not quantized; got {type(x).__name__}. Dequantize it first, by qwix.dequantize."
        )
    x = arguments.array(name, x)
    if x.ndim < 3:
        raise ValueError(
            f"{name} must have at least 3 dimensions, (*B, length, heads, size); got shape {x.shape}."
        )
    return x


def _lengths(query, key, query_lengths, key_lengths) -> Mask | None:
    """Lengths beyond the arrays mean all of them, negative ones none."""
    found = {}
    for side, name, lengths, x in (
        ("query", "query_seq_lengths", query_lengths, query),
        ("key", "key_value_seq_lengths", key_lengths, key),
    ):
        if lengths is None:
            continue
        lengths = arguments.array(name, lengths)
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise TypeError(f"{name} must hold integers; got dtype {lengths.dtype}.")
        batch = query.shape[:-3]
        try:
            lengths = jnp.broadcast_to(lengths, batch)
        except ValueError:
            raise ValueError(f"{name} must broadcast to *B={batch}; got shape {lengths.shape}.") from None
        found[side] = jnp.clip(indices.int32(lengths), 0, x.shape[-3])
    return Lengths(**found) if found else None


def _check_implementation(implementation: Any) -> None:
    names = implementation if isinstance(implementation, (list, tuple)) else [implementation]
    if not names:
        raise ValueError("implementation must not be an empty sequence; None takes the best.")
    for name in names:
        if name is not None and name not in _THEIRS:
            raise ValueError(
                f"implementation must be None, or one or several of tokamax's names, {', '.join(map(repr, _THEIRS))}; got "
                f"{arguments.shown(implementation)}. (make_dot_product_attention names a backend of jax_fa.)"
            )
