"""The public entries with JAX's conventions: `dot_product_attention` and `flash_attention`.

(`jax_fa.cann` holds the third entry, with CANN's conventions.)
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Num

from jax_fa import arguments, backends, checks, compat, entry, indices, masks
from jax_fa.call import Call, Size
from jax_fa.flex.masks import of_function
from jax_fa.masks import Mask

# What jax.nn takes: whatever jnp.asarray makes an array of.
Like = ArrayLike | Sequence[Any]


@entry.entry
def dot_product_attention(
    query: Like,
    key: Like,
    value: Like,
    bias: Like | None = None,
    mask: Like | None = None,
    *,
    scale: float | Like | None = None,
    is_causal: bool = False,
    query_seq_lengths: Like | None = None,
    key_value_seq_lengths: Like | None = None,
    local_window_size: int | Like | None = None,
    implementation: backends.Implementation = None,
    return_residual: bool = False,
    dropout_rate: float | Like = 0.0,
    dropout_key: Like | None = None,
    logits_soft_cap: float | Like | None = None,
    sinks: Like | None = None,
    return_max_logits: bool = False,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
) -> entry.Request[Any]:
    """A drop-in for `jax.nn.dot_product_attention` in O(S) memory.

        softmax(scale * query key^T + bias, where=mask) value

    B batch, T query length, S key/value length, N query heads, K key/value heads, H head_dim; query head n
    reads key head n // (N // K).

    Args:
      query: shape `(B, T, N, H)` or `(T, N, H)`, any floating dtype. 8-bit floats are computed in bfloat16.
      key: shape `(B, S, K, H)` or `(S, K, H)`, query's dtype. N must be a multiple of K.
      value: key's shape and dtype.
      bias: added to the scaled logits; broadcastable to `(B, N, T, S)`, lower ranks too. Differentiable:
        its gradient is summed over broadcast dims as it is computed.
      mask: boolean, True = visible; broadcastable to `(B, N, T, S)`, lower ranks too.
      scale: factor of the logits; None: `1 / sqrt(H)`. A Python number or a scalar array, traced or not, with the
        same result; or one for each head, of shape `(N, 1, 1)` (of each batch entry, `(B, 1, 1, 1)`; of both). Differentiable.
      is_causal: mask keys j > i for query i (top-left aligned, as in jax.nn).
      query_seq_lengths: integers of shape `(B,)`; rows from the length on are 0.
      key_value_seq_lengths: integers of shape `(B,)`; keys from the length on are masked.
      local_window_size: `(left, right)`, both inclusive: keys i - left .. i + right are visible to query i. An int
        means both; None, also of one side: unbounded. A negative size moves the edge to the other side, as in
        jax.nn, and does not mean "no window". Combines with is_causal. May be traced, also as an array of shape (2,):
        layers with different windows can share one `jax.lax.scan`.
      implementation: None (the best backend that can), the name of a backend (see `explain`), or the options of one:
        `jax_fa.ascend.Options`, `jax_fa.mosaic.Options`. "xla" is the backend of this name here. "cudnn" hands the call
        to `jax.nn`, which runs cuDNN on NVIDIA GPUs, with its own limits and without the arguments that are ours.
      return_residual: also return the log-sum-exp of the logits.
      dropout_rate: probability in [0, 1) of dropping an attention weight, rounded to a multiple of 2**-16; kept
        weights are divided by the probability of keeping them. A traced rate is clipped to that range and has no
        gradient.
      dropout_key: a `jax.random` key, required if dropout_rate > 0. Same key, same bits, on every backend;
        `jax_fa.dropout_mask` returns them.
      logits_soft_cap: positive; replaces the logits x (after scale and bias) by `cap * tanh(x / cap)`. A finite
        bias is capped with them; a bias of -inf masks its key all the same. May be traced; differentiable. A traced
        cap that is not positive and finite gives NaN. One for each head as with scale.
      sinks: attention sinks, shape `(N,)` or `(B, N)`: see `flash_attention`.
      return_max_logits: also return the largest logit of every head: see `flash_attention`.
      score_mod: a function of one pair, traced; see `flash_attention`.
      mask_mod: likewise.

    Returns:
      The output, of query's shape and dtype. Further results make it a tuple, in this order: with return_residual
      the natural log-sum-exp (with the sink) of shape `(B, T, N)` or `(T, N)`, in key's dtype and without gradient;
      with return_max_logits the largest logits of shape `(B, N)` or `(N,)`.

    Differences from jax.nn:
      * A fully masked row gives 0 (jax.nn: the mean of all values), gradients 0 and log-sum-exp -FLT_MAX (in
        16 bits what is closest to it).
      * NaN and infinity in masked positions of keys and values do not propagate.
      * float64 inputs are computed in float64 throughout.
      * `implementation="xla"` takes O(S) memory.
      * Refused, with an error that says what to pass instead: integer query, key and value, fewer than 3 dims, an empty
        head_dim, a boolean bias, a Python bool as mask or scale, a scale of each row or key, a window that is not integer.
      * `scale`, `dropout_rate` and `logits_soft_cap` that are Python numbers are checked when tracing.

    Raises:
      ValueError: shapes or values that do not fit.
      TypeError: dtypes that do not fit.
      NotImplementedError: the backend named cannot serve this call (and why).

    Source: Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.
    """
    cudnn = isinstance(implementation, str) and implementation == "cudnn"
    backend = (None, None) if cudnn else backends.chosen(implementation)
    return_residual, is_causal = _flag("return_residual", return_residual), _flag("is_causal", is_causal)
    arguments.flag("return_max_logits", return_max_logits)
    _check_kinds(scale, logits_soft_cap, dropout_rate, dropout_key)
    given = [arguments.array(name, x) for name, x in (("query", query), ("key", key), ("value", value))]
    q, k, v = _with_batch(*given)
    bias, mask = _at_most_four_dims("bias", bias), _at_most_four_dims("mask", mask)
    call = entry.build(
        checks.arrays(q, k, v, arguments.LAYOUTS["BSND"], "BSND"),
        mask=_joined(
            None if mask is None else masks.Dense(mask),
            masks.Causal() if is_causal else None,
            _window(local_window_size),
            _lengths(query_seq_lengths, key_value_seq_lengths, q.shape, k.shape),
            _function(mask_mod),
        ),
        terms=entry.Terms(bias=bias, score_mod=score_mod),
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        dropped=entry.Dropout(dropout_rate, dropout_key),
        backend=backend,
    )
    if cudnn:
        same = dict(scale=scale, is_causal=is_causal, return_residual=return_residual)
        sizes = dict(query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths)
        theirs = (*given, bias, mask), same | sizes | dict(local_window_size=local_window_size)
        ours = dict(dropout_rate=dropout_rate, logits_soft_cap=logits_soft_cap, sinks=sinks)
        more = dict(return_max_logits=return_max_logits, score_mod=score_mod, mask_mod=mask_mod)
        return _cudnn(call, *theirs, ours | more)
    finish = functools.partial(
        _as_jax_nn, given[0].shape, given[0].dtype, residual=return_residual, max_logits=return_max_logits
    )
    return entry.Request(call, finish, entry.with_sinks(call, sinks, max_logits=return_max_logits))


# As it is before anybody patches it.
_jax_nn = jax.nn.dot_product_attention


def _cudnn(call: Call, args: tuple, kwargs: dict[str, Any], ours: dict[str, Any]) -> entry.Request[Any]:
    """A call that jax.nn runs through cuDNN. `ours`: arguments that it does not have."""
    for name, x in ours.items():
        if x is not None and not (isinstance(x, (bool, int, float)) and not x):
            raise NotImplementedError(
                f"implementation='cudnn' is jax.nn's, which has no {name}; None takes the best backend of jax_fa."
            )

    def run(call: Call):
        try:
            with compat.allow_promotion():
                return _jax_nn(*args, **kwargs, implementation="cudnn")
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            why = str(error).rstrip(".")
            raise NotImplementedError(
                f"implementation='cudnn' is jax.nn's, which cannot serve this call: {why}. None takes the best backend "
                "of jax_fa."
            ) from error

    return entry.Request(call, lambda result: result, run)


def _flag(name: str, x) -> bool:
    """None is False, as in jax.nn."""
    return x is not None and arguments.flag(name, x)


def _as_jax_nn(shape: tuple[Size, ...], dtype: Any, result, *, residual: bool, max_logits: bool) -> Any:
    """A result of attention as jax.nn stores it, for a query of this shape and dtype."""

    def rows():
        lse = jnp.swapaxes(jnp.maximum(result.logsumexp, float(jnp.finfo(dtype).min)), -1, -2)
        return jax.lax.stop_gradient(lse.astype(dtype).reshape(shape[:-1]))

    return _returned(
        result.out.reshape(shape).astype(dtype),
        (residual, rows),
        (max_logits, lambda: entry.largest_logits(result).reshape(*shape[:-3], shape[-2])),
    )


def _returned(out, *others: tuple[bool, Callable[[], Any]]) -> Any:
    """The output, or a tuple of it and of the others that are asked for."""
    found = [make() for asked, make in others if asked]
    return (out, *found) if found else out


def _function(mask_mod: Callable[..., Any] | None) -> Mask | None:
    return None if mask_mod is None else of_function(mask_mod)


def _joined(*parts: Mask | None) -> Mask | None:
    given = [part for part in parts if part is not None]
    return functools.reduce(operator.and_, given) if given else None


def _check_kinds(scale, logits_soft_cap, dropout_rate, dropout_key) -> None:
    if scale is not None:
        arguments.number("scale", scale, "a number or None")
    if logits_soft_cap is not None:
        arguments.number("logits_soft_cap", logits_soft_cap, "a positive number or None")
    arguments.number("dropout_rate", dropout_rate, "a number in [0, 1)")
    if dropout_key is not None:
        arguments.random_key("dropout_key", dropout_key)


def _at_most_four_dims(name: str, x):
    if x is None:
        return None
    if isinstance(x, Mask):
        raise TypeError(f"{name} must be an array; got {x!r}. Structured masks: jax_fa.flash_attention.")
    if isinstance(x, (list, tuple)) and any(isinstance(member, Mask) for member in x):
        raise TypeError(
            f"{name} must be an array; got a {type(x).__name__} of masks. Structured masks, joined by &, are "
            "arguments of jax_fa.flash_attention."
        )
    if name == "mask" and isinstance(x, bool):
        raise TypeError(f"mask must be a boolean array; got {x}. A causal mask is is_causal=True.")
    x = arguments.array(name, x)
    if x.ndim > 4:
        raise ValueError(f"{name} must have at most 4 dimensions; got shape {x.shape}.")
    return x


def _with_batch(*given):
    """Query, key and value with four dims."""
    q, k, v = (_four_dims(name, x) for name, x in zip(("query", "key", "value"), given, strict=True))
    if v.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"value must have key's shape {k.shape}; got {v.shape}. "
            "(jax_fa.flash_attention takes values of another head_dim.)"
        )
    return q, k, v


def _four_dims(name: str, x):
    x = arguments.array(name, x)
    if x.ndim not in (3, 4):
        raise ValueError(f"{name} must have 4 dimensions (B, S, N, D) or 3 (S, N, D); got shape {x.shape}.")
    return x if x.ndim == 4 else x[None]


def _window(size) -> Mask | None:
    """jax.nn's window as a band: the sizes may be negative, and be data."""
    if size is None:
        return None
    if indices.is_int(size) or (hasattr(size, "shape") and np.shape(size) == ()):
        size = (size, size)
    if not isinstance(size, Sequence) and np.shape(size) == (2,):
        size = tuple(size)
    if not isinstance(size, Sequence) or len(size) != 2 or not all(map(_is_count, size)):
        raise ValueError(
            "local_window_size must be an int, a pair (left, right) of ints or integer scalars, traced or not, or None; "
            f"got {arguments.shown(size)}."
        )
    return masks.Band(*size)


def _is_count(x) -> bool:
    """An int, an integer scalar that is data, or None for no bound."""
    dtype = getattr(x, "dtype", None)
    data = dtype is not None and jnp.issubdtype(dtype, jnp.integer) and np.shape(x) == ()
    return x is None or data or indices.is_int(x)


def _lengths(query, key, query_shape, key_shape) -> Mask | None:
    """As in jax.nn, lengths beyond the arrays mean all of them, and negative ones none."""
    found = {}
    for side, name, x, shape in (
        ("query", "query_seq_lengths", query, query_shape),
        ("key", "key_value_seq_lengths", key, key_shape),
    ):
        if x is not None:
            x = arguments.array(name, x)
            if not jnp.issubdtype(x.dtype, jnp.integer):
                raise TypeError(f"{name} must hold integers; got dtype {x.dtype}.")
            if x.shape != shape[:1]:
                raise ValueError(f"{name} must have shape (B,)={shape[:1]}; got {x.shape}.")
            found[side] = jnp.clip(indices.int32(x), 0, shape[1])
    return masks.Lengths(**found) if found else None


@entry.entry
def flash_attention(
    query: Float[ArrayLike, "..."],
    key: Float[ArrayLike, "..."],
    value: Float[ArrayLike, "..."],
    *,
    bias: Num[ArrayLike, "..."] | None = None,
    mask: Mask | Bool[ArrayLike, "..."] | None = None,
    alibi_slopes: Float[ArrayLike, "..."] | None = None,
    scale: float | ArrayLike | None = None,
    logits_soft_cap: float | ArrayLike | None = None,
    dropout_rate: float | ArrayLike = 0.0,
    dropout_key: ArrayLike | None = None,
    layout: str = "BSND",
    implementation: backends.Implementation = None,
    return_logsumexp: bool = False,
    sinks: Float[ArrayLike, "..."] | None = None,
    return_max_logits: bool = False,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
) -> entry.Request[Any]:
    """Exact attention with all features: structured masks, ALiBi, dropout, any layout, a differentiable log-sum-exp.

    Per head::

        x = scale * query key^T + bias - slope * |j - i|;  x = score_mod(x);  x = cap * tanh(x / cap)
        softmax(x, mask) value

    Letters: `*B` any number of batch dims, Sq and Skv lengths, N query heads, K key/value heads (query head
    n reads key head n // (N // K)), D query/key head_dim, Dv value head_dim.

    Args:
      query: shape `(*B, Sq, N, D)`, any floating dtype. 8-bit floats are computed in bfloat16.
      key: shape `(*B, Skv, K, D)`, query's dtype; N must be a multiple of K.
      value: shape `(*B, Skv, K, Dv)`, query's dtype; Dv may differ from D.
      bias: added to the scaled logits; broadcastable to `(*B, N, Sq, Skv)`. Differentiable.
      mask: a mask of `jax_fa.masks` (`Causal`, `SlidingWindow`, `Band`, `Prefix`, `Lengths`,
        `CumulativeLengths`, `SegmentIds`, `Dense`, or several joined by `&`, `|` and `~`; a `jax_fa.BlockMask`, joined by `&`
        alone), or a boolean array broadcastable to `(*B, N, Sq, Skv)` with True = visible. Structured masks skip fully masked
        tiles.
      alibi_slopes: ALiBi slopes of shape `(N,)` or `(*B, N)` (arXiv:2108.12409); evaluated in the kernel.
        Differentiable. The distance of key j to row i is `|p - j|` with p the key position at which the mask places
        the row: i without a mask or with top-left alignment, `i + Skv - Sq` with bottom-right alignment (as in
        FlashAttention), and in either case plus the mask's offset; in packed sequences, the position of the row in
        its own sequence counted from that sequence's first key.
      scale: factor of the logits; None: `1 / sqrt(D)`. See `dot_product_attention`.
      logits_soft_cap: positive; None: no cap. Applied after scale and bias, before the mask; a bias of -inf masks its
        key all the same. See `dot_product_attention`.
      dropout_rate: in [0, 1); see `dot_product_attention`.
      dropout_key: a `jax.random` key, required if dropout_rate > 0.
      layout: the order of the trailing dims: "BSND" (with any number of leading batch dims, 0 too), "BNSD"
        (likewise), "SBND", "SND" or "NSD". No layout costs a copy.
      implementation: None (the best backend that can), the name of a backend (see `explain`), or the options of one:
        `jax_fa.ascend.Options`, `jax_fa.mosaic.Options`.
      return_logsumexp: also return the log-sum-exp.
      sinks: attention sinks, shape `(N,)` or `(*B, N)`, any floating dtype: every row's softmax gets one more logit,
        its head's sink, which has no value, so that the weights of the keys sum to less than 1. Neither scale, bias,
        soft cap, mask nor dropout applies to it. -inf is no sink. Differentiable.
      return_max_logits: also return the largest logit of every head.
      score_mod: `score_mod(score, batch, head, row, column) -> score`, a pure function of scalars, evaluated tile by
        tile: the score has the dtype of the log-sum-exp, the indices are int32, batch counts all entries of `*B`. -inf
        masks the pair. It may close over arrays, traced ones too, and is differentiable in them. Served by "xla" alone.
      mask_mod: `mask_mod(batch, head, row, column) -> bool`, likewise, True = visible; joined with mask. See
        `create_block_mask` for a mask that also skips what its function masks.

    Returns:
      The output, query's shape with Dv for D, query's dtype. Further results make it a tuple, in this order:

      * with return_logsumexp the natural log-sum-exp of x over the visible keys, and of the sink, float32 (float64
        for float64 inputs), shape `(*B, N, Sq)` in every layout, differentiable; before dropout;
      * with return_max_logits the largest x over the rows and visible keys of every head, without the sink, in the
        same dtype, shape `(*B, N)`, without gradient; -FLT_MAX where all rows are fully masked.

      A fully masked row gives 0, gradients 0 and log-sum-exp -FLT_MAX; with a sink, the log-sum-exp is the sink.

    Raises:
      ValueError: shapes or values that do not fit.
      TypeError: dtypes that do not fit.
      NotImplementedError: the backend named cannot serve this call (and why).

    Source: Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.
    """
    backend = backends.chosen(implementation)
    arguments.flag("return_logsumexp", return_logsumexp)
    arguments.flag("return_max_logits", return_max_logits)
    _check_kinds(scale, logits_soft_cap, dropout_rate, dropout_key)
    q, k, v = (arguments.array(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    axes, layout = arguments.axes_of(layout, "query", q)
    terms = entry.Terms(bias=None if bias is None else arguments.array("bias", bias), score_mod=score_mod)
    if alibi_slopes is not None:
        terms = terms._replace(alibi="linear", alibi_slopes=_slopes(alibi_slopes, axes))
    call = entry.build(
        checks.arrays(q, k, v, axes, layout),
        mask=_joined(None if mask is None else one_mask(mask), _function(mask_mod)),
        terms=terms,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        dropped=entry.Dropout(dropout_rate, dropout_key),
        logsumexp=bool(return_logsumexp),
        backend=backend,
    )

    def finish(result):
        return _returned(
            result.out.astype(q.dtype),
            (return_logsumexp, lambda: result.logsumexp),
            (return_max_logits, lambda: entry.largest_logits(result)),
        )

    return entry.Request(call, finish, entry.with_sinks(call, sinks, max_logits=return_max_logits))


def _slopes(slopes, axes: tuple[int, ...]):
    slopes = arguments.array("alibi_slopes", slopes)
    if slopes.ndim > len(axes) - 2:  # `entry.build` also takes slopes of every row
        raise ValueError(f"alibi_slopes must have shape (N,) or (*B, N); got {slopes.shape}.")
    return slopes


def one_mask(mask) -> Mask:
    """`masks.as_mask`, with advice for what is often passed in place of a mask."""
    if isinstance(mask, (list, tuple)) and any(isinstance(member, Mask) for member in mask):
        raise TypeError(
            f"mask must be one mask; got a {type(mask).__name__} of {len(mask)}. Join masks by &: "
            "mask=Causal() & Lengths(key=...)."
        )
    if isinstance(mask, bool):
        raise TypeError(
            f"mask must be a jax_fa.masks.Mask or a boolean array; got {mask}. A causal mask is "
            "mask=jax_fa.masks.Causal()."
        )
    if isinstance(mask, type) and issubclass(mask, Mask):
        raise TypeError(f"mask must be an object; got the class {mask.__name__}: pass {mask.__name__}().")
    if hasattr(mask, "dtype") and hasattr(mask, "shape"):
        mask = arguments.array("mask", mask) if isinstance(mask, (np.ndarray, jax.ShapeDtypeStruct)) else mask
    return masks.as_mask(mask)
