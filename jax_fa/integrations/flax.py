"""Attention for the layers of Flax: `attention_fn=` of linen's and nnx's multi-head attention.

nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=attention_fn)
nnx.MultiHeadAttention(8, 512, attention_fn=make_attention_fn(mask=Causal("bottom-right")), rngs=rngs)
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype as promote_like_linen
from jaxtyping import ArrayLike

from jax_fa import api, arguments, backends, entry, masks
from jax_fa.attention import attention
from jax_fa.integrations.precision import check_precision
from jax_fa.masks import Mask


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What `make_attention_fn` adds to what the layers pass."""

    mask: Mask | None = None
    alibi_slopes: Any = None
    scale: Any = None
    logits_soft_cap: float | None = None
    implementation: backends.Implementation = None


def attention_fn(
    query,
    key,
    value,
    bias=None,
    mask=None,
    broadcast_dropout: bool = True,
    dropout_rng=None,
    dropout_rate: float | ArrayLike = 0.0,
    deterministic: bool = False,
    dtype=None,
    precision=None,
    module=None,
    *,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general=None,
    qk_attn_weights_einsum=None,
    attn_weights_value_einsum=None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
    _options: _Options = _Options(),
):
    """`dot_product_attention` of `flax.linen` and of `flax.nnx`, in O(S) memory.

    Arguments, order and meaning are those of Flax's two functions. What the layers cannot pass (structured masks,
    a backend, ...) `make_attention_fn` adds.

    Args:
      query: shape `(*B, Sq, N, D)`.
      key: shape `(*B, Skv, K, D)`, N a multiple of K.
      value: shape `(*B, Skv, K, Dv)`.
      bias: added to the scaled logits; broadcastable to `(*B, N, Sq, Skv)`. Differentiable.
      mask: broadcastable to `(*B, N, Sq, Skv)`, of any dtype, nonzero = visible; or a mask of `jax_fa.masks`.
      broadcast_dropout: draw one dropout pattern of shape `(Sq, Skv)` for all batch entries and heads (Flax's
        default), or an independent one for each.
      dropout_rng: a `jax.random` key, required where dropout is on. The bits are ours (`jax_fa.dropout_mask`), not
        those that Flax would draw from this key.
      dropout_rate: in [0, 1). Dropout is on if it is above 0 and `deterministic` is false.
      deterministic: turns dropout off.
      dtype: what query, key and value are cast to; None: the dtype they promote to, at least float32 for integers.
      precision: what Flax passes to its products. Any is accepted that the kernels meet anyway: on CPU float32 products
        and sums for float32, everywhere float32 sums for the 16-bit dtypes. On GPU and TPU float32 products take
        their precision from `jax.default_matmul_precision`, so there more than that is refused.
      module: Flax passes the layer where attention weights are to be sown (`sow_weights=True`), which is refused:
        they never exist.
      force_fp32_for_softmax: changes nothing: the softmax is computed in float32 anyway.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: must be None: there is no einsum.
      promote_dtype: in place of Flax's rule, called as `promote_dtype((query, key, value), dtype=dtype)`.
      is_causal: query i attends to keys j <= i (top-left aligned). Refused with one query and several keys, a step of
        decoding: there nnx passes its layer's is_causal on, which would leave key 0 alone, beside a cache mask that is
        causal already.

    Returns:
      Shape `(*B, Sq, N, Dv)`, in the dtype that query, key and value were cast to. A fully masked row is 0.

    Raises:
      ValueError: shapes or values that do not fit.
      TypeError: dtypes that do not fit.
      NotImplementedError: attention weights, an einsum or a precision that the kernels do not have.
    """
    _check_no_weights(module)
    _check_no_einsum(
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )
    for name, flag in (("broadcast_dropout", broadcast_dropout), ("is_causal", is_causal)):
        arguments.flag(name, flag)
    given = (("query", query), ("key", key), ("value", value))
    query, key, value = (arguments.array(name, x) for name, x in given)
    if promote_dtype is None:
        query, key, value = promote_like_linen(query, key, value, dtype=dtype)
    else:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
    check_precision(precision, query.dtype)
    _check_decoding(_options, is_causal, query, key)
    arguments.number("dropout_rate", dropout_rate, "a number in [0, 1)")
    dropping = not deterministic and not arguments.is_zero(dropout_rate)
    _check_rng(dropping, dropout_rng, dropout_rate)
    call = entry.request_of(
        api.flash_attention,
        query,
        key,
        value,
        bias=bias,
        mask=_joined(mask, is_causal, _options.mask),
        alibi_slopes=_options.alibi_slopes,
        scale=_options.scale,
        logits_soft_cap=_options.logits_soft_cap,
        dropout_rate=dropout_rate if dropping else 0.0,
        dropout_key=dropout_rng if dropping else None,
        implementation=_options.implementation,
    ).call
    if dropping and broadcast_dropout:
        # The words that tell batch entries and heads apart: with one value for all they share their bits.
        streams = jnp.zeros((1,) * (query.ndim - 2) + (2,), jnp.uint32)
        call = call.replace(operands=replace(call.operands, dropout_stream=streams))
    return attention(call).out


def _check_rng(dropping: bool, dropout_rng, dropout_rate: float | ArrayLike) -> None:
    if dropping and dropout_rng is None:
        raise ValueError(
            f"dropout_rng must be a jax.random key where deterministic is false and "
            f"dropout_rate={arguments.shown(dropout_rate)}; got None."
        )
    if dropout_rng is not None:
        arguments.random_key("dropout_rng", dropout_rng)


def make_attention_fn(
    *,
    mask: Mask | None = None,
    alibi_slopes=None,
    scale=None,
    logits_soft_cap: float | None = None,
    implementation: backends.Implementation = None,
) -> Callable[..., jax.Array]:
    """`attention_fn` with what Flax's layers have no argument for.

    Use this and not `functools.partial(attention_fn, mask=...)`: the layers always pass a mask of their own, which
    would take its place.

    Args:
      mask: a mask of `jax_fa.masks`, such as `Causal("bottom-right")`, joined with what the layer passes. Decoding
        with a cache calls with one query, whose position is known to the layer only, so there masks that count
        positions are refused; `Causal("bottom-right")` masks nothing then and is fine (the layer's own mask
        is causal).
      alibi_slopes: ALiBi slopes of shape `(N,)` or `(*B, N)`. Refused when decoding.
      scale: factor of the logits; None: `1 / sqrt(D)`.
      logits_soft_cap: replaces the logits x by `cap * tanh(x / cap)`.
      implementation: None (the best backend that can), or the name of a backend: see `jax_fa.explain`.

    Returns:
      A function like `attention_fn`.
    """
    backends.chosen(implementation)
    options = _Options(
        mask=None if mask is None else api.one_mask(mask),
        alibi_slopes=alibi_slopes,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        implementation=implementation,
    )
    return functools.partial(attention_fn, _options=options)


def _joined(mask, is_causal: bool, own: Mask | None) -> Mask | None:
    if mask is not None and not isinstance(mask, Mask):
        array = hasattr(mask, "dtype") or (isinstance(mask, (list, tuple)) and not _holds_masks(mask))
        # Flax makes its masks in float32.
        mask = masks.Dense(arguments.array("mask", mask).astype(jnp.bool_)) if array else api.one_mask(mask)
    given = [m for m in (mask, masks.Causal() if is_causal else None, own) if m is not None]
    return functools.reduce(lambda a, b: a & b, given) if given else None


def _holds_masks(given) -> bool:
    return any(isinstance(member, Mask) for member in given)


def _check_no_weights(module) -> None:
    if module is not None:
        raise NotImplementedError(
            "module must be None: sow_weights=True asks for the attention weights, which jax_fa never holds. Leave "
            "sow_weights at False, or use Flax's own attention_fn to look at them."
        )


def _check_no_einsum(**given) -> None:
    for name, einsum in given.items():
        if einsum is not None:
            raise NotImplementedError(
                f"{name} must be None: jax_fa computes its products in kernels, where no other einsum can run; got "
                f"{einsum!r}."
            )


def _check_decoding(options: _Options, is_causal: bool, query, key) -> None:
    """One query and many keys: a step of decoding, at a position that only the layer knows."""
    if min(query.ndim, key.ndim) < 3 or query.shape[-3] != 1 or key.shape[-3] == 1:
        return
    if is_causal:
        raise ValueError(
            f"is_causal must be False with one query and {key.shape[-3]} keys, a step of decoding: counted from the first "
            "key it would mask all keys but that one. The layer's own mask is causal when it decodes."
        )
    if options.alibi_slopes is not None:
        raise ValueError(
            f"alibi_slopes need the positions of the queries; this call has one query and {key.shape[-3]} keys, a step "
            "of decoding, whose position jax_fa does not know. Pass a bias, or decode without a cache."
        )
    for member in () if options.mask is None else masks.members(options.mask):
        counts = [kind for kind in masks.kinds(member) if isinstance(kind, (masks.Band, masks.Prefix))]
        if counts and not _shows_all_to_the_last(member):
            raise ValueError(
                f"mask={member!r} of make_attention_fn counts positions; this call has one query and {key.shape[-3]} keys, "
                "a step of decoding, whose position jax_fa does not know. A causal mask that works in training and "
                'decoding is Causal("bottom-right") (the layer masks what is not yet in its cache).'
            )


def _shows_all_to_the_last(mask: Mask) -> bool:
    """Whether every key is visible to the last query, whatever the lengths: True for `Causal("bottom-right")`."""
    if not isinstance(mask, masks.Band) or mask.align != "bottom-right" or mask.left is not None:
        return False
    return mask.right is None or (mask.is_static and int(mask.right) + mask.offset >= 0)
