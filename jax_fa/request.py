"""From checked arguments to (`Problem`, `Operands`): shared by every public entry."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import arguments, dropout, masks
from jax_fa.problem import Axes, Operands, Problem, Shape, Size, accumulator_dtype, canonical_shape

# Multiply-adds of one device call: about a second's work of an Ascend 910B, far below what its watchdogs allow.
DEFAULT_MAX_WORK = 2**46


def build(
    query,
    key,
    value,
    *,
    axes: Axes,
    layout: str,
    bias=None,
    mask: masks.Mask | None = None,
    scale=None,
    logits_soft_cap=None,
    alibi: str | None = None,
    alibi_slopes=None,
    position=None,
    bias_offset=None,
    bias_apart: bool = False,
    dropout_rate=0.0,
    dropout_key=None,
    keep_prob: float | None = None,
    drop_bits=None,
    drop_offset=None,
    logsumexp: bool = False,
    implementation: str | None = None,
    max_work: int | None = DEFAULT_MAX_WORK,
) -> tuple[Problem, Operands]:
    """Checks the arguments against each other and makes them canonical.

    `axes` puts query, key and value into the order `*B S N D`; `layout` names their stored dims in errors.
    With `drop_bits`, `keep_prob` says what kept weights are divided by; otherwise `dropout_rate` does.
    `position`, `bias_offset` and, with it, `bias` are operands already (see `Operands`), and so are `alibi_slopes` of
    rank B + 2; without `position`, the mask places the rows.

    Scalars that are traced become operands, those that are known belong to the program.
    """
    check_query_key_value(query, key, value, axes, layout)
    query, key, value = (x.astype(computed_dtype(x.dtype)) for x in (query, key, value))
    rank = len(axes) - 3
    *B, Sq, N, D = canonical_shape(query.shape, axes)
    Skv, batch = canonical_shape(key.shape, axes)[rank], tuple(B)
    acc = accumulator_dtype(query.dtype)
    scale, soft_cap = _scale(scale, D), _soft_cap(logits_soft_cap)
    rules = masks.intervals(mask, batch, N, Sq, Skv)
    rate = _dropout_rate(dropout_rate, dropout_key)
    limit = dropout.kept_numbers(rate)
    seed = stream = None
    if not isinstance(rate, float) or rate:
        seed = masks.lead(dropout.seed_words(dropout_key), rank + 1)
        stream = dropout.streams(batch, N)
    if alibi_slopes is not None and position is None:
        position = masks.positions(mask, batch, N, Sq, Skv)
    if keep_prob is None:
        keep_prob = _static(limit, dropout.LIMIT) / dropout.LIMIT
    problem = Problem(
        query_axes=axes,
        key_axes=axes,
        value_axes=axes,
        out_axes=axes,
        scale=_static(scale, 1.0),
        logits_soft_cap=_static(soft_cap, None),
        alibi=alibi,  # type: ignore[arg-type]
        keep_prob=keep_prob,
        mask=None if mask is None else mask.static(),
        bias_apart=bias_apart,
        logsumexp=logsumexp,
        implementation=implementation,
        max_work=_max_work(max_work),
    )
    operands = Operands(
        query=query,
        key=key,
        value=value,
        bias=_bias(bias, (*batch, N, Sq, Skv), acc) if bias_offset is None else bias,
        bias_offset=bias_offset,
        mask=rules.dense,
        lower=rules.lower,
        upper=rules.upper,
        segment_row=rules.segment_row,
        segment_key=rules.segment_key,
        alibi_slopes=_slopes(alibi_slopes, batch, N),
        position=position,
        dropout_seed=seed,
        dropout_stream=stream,
        drop_bits=drop_bits,
        drop_offset=drop_offset,
        scale=_data(scale, rank, acc),
        soft_cap=_data(soft_cap, rank, acc),
        keep_threshold=_data(limit, rank, jnp.uint32),
    )
    return problem, operands


def _static(x, otherwise):
    """A scalar that is part of the program; `otherwise` where it is data."""
    return otherwise if isinstance(x, jax.Array) else x


def _data(x, rank: int, dtype):
    """A scalar that is data, `*1 1`; None where it is part of the program."""
    return x.astype(dtype).reshape((1,) * (rank + 1)) if isinstance(x, jax.Array) else None


def computed_dtype(dtype):
    """The dtype a call computes in: 8-bit floats and smaller are widened, exactly, since their weights would underflow."""
    return jnp.dtype(jnp.bfloat16 if jnp.finfo(dtype).bits < 16 else dtype)


def check_query_key_value(query, key, value, axes: Axes, layout: str) -> None:
    """Raises unless shapes and dtypes fit together; messages give the stored shapes."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != len(axes):
            raise ValueError(f"{name} must have {len(axes)} dimensions ({layout}); got shape {x.shape}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must have a floating dtype; got {x.dtype}.")
        if x.dtype != query.dtype:
            raise TypeError(
                f"{name} must have query's dtype {query.dtype}; got {x.dtype}. Cast them to one dtype, such as "
                f"{name}.astype(query.dtype)."
            )
    rank = len(axes) - 3
    q, k, v = (canonical_shape(x.shape, axes) for x in (query, key, value))
    if k[:rank] != q[:rank]:
        raise ValueError(_expect("key", layout, "batch dims B", q[:rank], k[:rank], query, key))
    if k[-1] != q[-1]:
        raise ValueError(_expect("key", layout, "query's head_dim D", q[-1], k[-1], query, key))
    if v[: rank + 2] != k[: rank + 2]:
        want, got = k[: rank + 2], v[: rank + 2]
        raise ValueError(_expect("value", layout, "key's (*B, Skv, K)", want, got, key, value, "key"))
    if q[-1] == 0:
        raise ValueError(f"query must have head_dim D of at least 1; got shape {query.shape} ({layout}).")
    N, K = q[rank + 1], k[rank + 1]
    if K == 0 or N % K != 0:
        raise ValueError(
            f"query must have a number of heads N that is a multiple of key's K; got N={N}, K={K} "
            f"from shapes {query.shape} and {key.shape} ({layout})."
        )


def _expect(name, layout, what, want, got, other, x, other_name="query") -> str:
    return (
        f"{name} must have {what}={want}; got {got}. "
        f"({other_name} has shape {other.shape}, {name} {x.shape}; layout {layout}.)"
    )


def _scalar(name: str, x) -> float | jax.Array:
    """A real scalar: a float where its value is known now, a traced array otherwise."""
    if isinstance(x, (bool, np.bool_)) or not (isinstance(x, numbers.Real) or hasattr(x, "dtype")):
        raise TypeError(f"{name} must be a real number or a scalar array; got {arguments.shown(x)}.")
    if not isinstance(x, numbers.Real):
        if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
            raise TypeError(f"{name} must be real; got dtype {x.dtype}.")
        if np.ndim(x) != 0:
            raise ValueError(f"{name} must be a scalar; got shape {np.shape(x)}.")
        if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
            return x
    return float(x)


def _scale(scale, D: Size) -> float | jax.Array:
    if scale is None:
        return 1.0 / math.sqrt(D)
    scale = _scalar("scale", scale)
    if isinstance(scale, float) and not math.isfinite(scale):
        raise ValueError(f"scale must be finite; got {scale}.")
    return scale


def _soft_cap(cap) -> float | jax.Array | None:
    if cap is None:
        return None
    cap = _scalar("logits_soft_cap", cap)
    if isinstance(cap, float):
        if not (cap > 0 and math.isfinite(cap)):
            raise ValueError(f"logits_soft_cap must be positive and finite, or None for no cap; got {cap}.")
        return cap
    cap = cap.astype(jnp.float64 if cap.dtype == jnp.float64 else jnp.float32)
    return jnp.where((cap > 0) & (cap < jnp.inf), cap, jnp.nan)


def _dropout_rate(rate, key) -> float | jax.Array:
    rate = _scalar("dropout_rate", rate)
    if isinstance(rate, float) and not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1); got {rate}.")
    if key is None and not (isinstance(rate, float) and rate == 0.0):
        what = f"dropout_rate > 0 (it is {rate})" if isinstance(rate, float) else "dropout_rate is traced"
        raise ValueError(f"dropout_key must be a jax.random key when {what}; got None.")
    return rate


def _max_work(work) -> int | None:
    if work is None:
        return None
    if isinstance(work, bool) or not isinstance(work, (int, np.integer)) or work <= 0:
        raise ValueError(f"max_work must be a positive int or None; got {arguments.shown(work)}.")
    return int(work)


def _bias(bias, full: Shape, acc):
    if bias is None:
        return None
    bias = jnp.asarray(bias)
    if bias.dtype == jnp.bool_:
        raise TypeError("bias must be numeric, it is added to the logits; got dtype bool. Pass it as mask.")
    if jnp.issubdtype(bias.dtype, jnp.complexfloating):
        raise TypeError(f"bias must be real; got dtype {bias.dtype}.")
    if not masks.broadcasts(bias.shape, full):
        raise ValueError(f"bias must broadcast to (*B, N, Sq, Skv)={full}; got shape {bias.shape}.")
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        bias = bias.astype(acc)
    return masks.lead(bias, len(full))


def _slopes(slopes, batch: Shape, N: Size) -> Any:
    if slopes is None:
        return None
    slopes = jnp.asarray(slopes)
    if slopes.ndim == len(batch) + 2:
        return slopes  # an operand already (see build)
    if not jnp.issubdtype(slopes.dtype, jnp.floating):
        raise TypeError(f"alibi_slopes must have a floating dtype; got {slopes.dtype}.")
    if slopes.shape[-1:] != (N,) or not masks.broadcasts(slopes.shape, (*batch, N)):
        raise ValueError(
            f"alibi_slopes must have shape (N,) or (*B, N) with B={batch}, N={N}; got {slopes.shape}."
        )
    return masks.lead(slopes, len(batch) + 1)[..., None]
