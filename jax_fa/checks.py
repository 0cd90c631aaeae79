"""What an entry is given, checked against each other: query, key and value, then what their sizes allow beside them."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import arguments, indices, masks
from jax_fa.call import Axes, Dims, Shape, Size, canonical_shape, is_symbolic


class Arrays(NamedTuple):
    """Query, key and value of a call, checked against each other. `axes` puts them into the order `*B S N D`."""

    query: Any
    key: Any
    value: Any
    axes: Axes
    dims: Dims


def arrays(query, key, value, axes: Axes, layout: str) -> Arrays:
    """Raises unless shapes and dtypes fit together; `layout` names the stored dims in errors."""
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
    for name, x, what, size in (("query", query, "Sq", q[rank]), ("key", key, "Skv", k[rank])):
        if not is_symbolic(size) and size > indices.FAR:
            raise ValueError(
                f"{name} must have a length {what} of at most 2**29 = {indices.FAR}, which 32-bit positions allow; got "
                f"shape {x.shape} ({layout}). Split the sequence: jax_fa.merge joins the parts."
            )
    return Arrays(query, key, value, axes, Dims(q[:rank], q[rank], k[rank], N, K, q[-1], v[-1]))


def _expect(name, layout, what, want, got, other, x, other_name="query") -> str:
    return (
        f"{name} must have {what}={want}; got {got}. "
        f"({other_name} has shape {other.shape}, {name} {x.shape}; layout {layout}.)"
    )


def scale(scale, D: Size) -> float | jax.Array:
    """The factor of the logits that an entry is given: a float where it belongs to the program, else data."""
    return 1.0 / math.sqrt(D) if scale is None else finite_scale("scale", scale)


def head_scales(scale, d: Dims) -> float | jax.Array:
    """The same where every head may have its own."""
    if scale is None:
        return 1.0 / math.sqrt(d.D)
    return _finite("scale", arguments.per_head("scale", scale, d.B, d.N))


def finite_scale(name: str, scale) -> float | jax.Array:
    """A factor of the logits: finite where it is known."""
    return _finite(name, arguments.scalar(name, scale))


def _finite(name: str, scale) -> float | jax.Array:
    values = indices.known(scale)
    if values is not None and not np.all(np.isfinite(values)):
        raise ValueError(f"{name} must be finite; got {scale}.")
    return scale


def soft_cap(cap) -> float | jax.Array | None:
    """The soft cap of the logits, likewise."""
    return None if cap is None else _positive(arguments.scalar("logits_soft_cap", cap))


def head_soft_caps(cap, d: Dims) -> float | jax.Array | None:
    """The same where every head may have its own."""
    return None if cap is None else _positive(arguments.per_head("logits_soft_cap", cap, d.B, d.N))


def _positive(cap) -> float | jax.Array:
    values = indices.known(cap)
    if values is not None and not np.all((values > 0) & np.isfinite(values)):
        raise ValueError(f"logits_soft_cap must be positive and finite, or None for no cap; got {cap}.")
    if isinstance(cap, float):
        return cap
    cap = cap.astype(jnp.float64 if cap.dtype == jnp.float64 else jnp.float32)
    return jnp.where((cap > 0) & (cap < jnp.inf), cap, jnp.nan)


def dropout_rate(rate, key) -> float | jax.Array:
    """A rate, and whether there is a key where it may drop anything."""
    rate = arguments.scalar("dropout_rate", rate)
    value = None if indices.known(rate) is None else float(rate)
    if value is not None and not 0.0 <= value < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1); got {value}.")
    if value == 0.0:
        return 0.0
    if key is None:
        what = "dropout_rate is traced" if value is None else f"dropout_rate > 0 (it is {value})"
        raise ValueError(f"dropout_key must be a jax.random key when {what}; got None.")
    return rate


def bias(bias, full: Shape, acc):
    """A bias as an operand; raises unless it broadcasts to `full`, the shape of all logits."""
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


def sinks(sinks, dims: Dims, acc):
    """Sinks as `*#B N` in the dtype of the statistics."""
    sinks = arguments.array("sinks", sinks)
    if not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise TypeError(f"sinks must have a floating dtype; got {sinks.dtype}.")
    B, N = dims.B, dims.N
    if sinks.shape[-1:] != (N,) or not masks.broadcasts(sinks.shape, (*B, N)):
        raise ValueError(f"sinks must have shape (N,) or (*B, N) with B={B}, N={N}; got {sinks.shape}.")
    return masks.lead(sinks, len(B) + 1).astype(acc)


def slopes(slopes, batch: Shape, N: Size) -> Any:
    """ALiBi slopes as `*#B N 1`."""
    if slopes is None:
        return None
    slopes = jnp.asarray(slopes)
    if slopes.ndim == len(batch) + 2:
        return slopes  # an operand already (see `entry.Terms`)
    if not jnp.issubdtype(slopes.dtype, jnp.floating):
        raise TypeError(f"alibi_slopes must have a floating dtype; got {slopes.dtype}.")
    if slopes.shape[-1:] != (N,) or not masks.broadcasts(slopes.shape, (*batch, N)):
        raise ValueError(
            f"alibi_slopes must have shape (N,) or (*B, N) with B={batch}, N={N}; got {slopes.shape}."
        )
    return masks.lead(slopes, len(batch) + 1)[..., None]
