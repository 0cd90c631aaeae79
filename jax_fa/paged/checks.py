"""Checks of the arguments of `paged_attention`: one error each, before anything is computed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import arguments, indices, masks
from jax_fa.call import Size

_FLOATS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


class Pools(NamedTuple):
    """Pages of keys and values, checked against the query; without value_pages, value is None."""

    key: Any  # P S K D
    value: Any  # P S K Dv

    @classmethod
    def of(cls, query, key_pages, value_pages, value_dim) -> "Pools":
        _check_query(query)
        key = _pages("key_pages", key_pages, query)
        N, D = query.shape[-2:]
        if key.shape[-1] != D:
            raise ValueError(
                f"key_pages must have query's head_dim D={D}; got shape {key.shape} (P, S, K, D)."
            )
        K = key.shape[2]
        if K == 0 or N % K != 0:
            raise ValueError(
                f"query must have a number of heads N that is a multiple of key_pages' K; got N={N}, K={K} from shapes "
                f"{query.shape} and {key.shape} (P, S, K, D)."
            )
        if value_pages is None:
            _check_value_dim(value_dim, D)
            return cls(key, None)
        if value_dim is not None:
            raise ValueError(
                f"value_dim is for value_pages=None, where values are parts of the keys; got value_dim={value_dim} with "
                "value_pages."
            )
        value = _pages("value_pages", value_pages, query)
        if value.shape[:3] != key.shape[:3]:
            raise ValueError(
                f"value_pages must have key_pages' (P, S, K)={key.shape[:3]}; got shape {value.shape}."
            )
        if value.dtype != key.dtype:
            raise TypeError(f"value_pages must have key_pages' dtype {key.dtype}; got {value.dtype}.")
        return cls(key, value)

    def capacity(self, table) -> Size:
        return table.shape[1] * self.key.shape[1]

    def scale(self, name: str, x):
        """A scale as `#P #S #K`; None is none."""
        if x is None:
            return None
        x = arguments.array(name, x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must have a floating dtype; got {x.dtype}.")
        full = self.key.shape[:3]
        if not masks.broadcasts(x.shape, full):
            raise ValueError(f"{name} must broadcast to (P, S, K)={full}; got shape {x.shape}.")
        if name == "value_scale" and self.value is None:
            raise ValueError(
                "value_scale is for value_pages; with value_pages=None, key_scale is the scale of values, too."
            )
        return masks.lead(x, 3).astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _check_query(query) -> None:
    if query.ndim not in (3, 4):
        raise ValueError(
            f"query must have 4 dimensions (B, Sq, N, D) or 3 (B, N, D); got shape {query.shape}."
        )
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise TypeError(f"query must have a floating dtype; got {query.dtype}.")
    if query.shape[-1] == 0:
        raise ValueError(f"query must have head_dim D of at least 1; got shape {query.shape}.")


def _pages(name: str, x, query):
    x = arguments.array(name, x)
    if x.ndim != 4 or 0 in x.shape[:2]:
        raise ValueError(
            f"{name} must have 4 dimensions (P, S, K, D) with at least one page P and one token S of a page; got shape "
            f"{x.shape}."
        )
    allowed = dict.fromkeys((str(query.dtype), *_FLOATS, "int8"))
    if str(x.dtype) not in allowed:
        raise TypeError(f"{name} must have one of the dtypes {', '.join(allowed)}; got {x.dtype}.")
    return x


def _check_value_dim(value_dim, D: int) -> None:
    if value_dim is None:
        raise ValueError(
            "value_pages must be an array, or None with value_dim=, where values are the first value_dim elements of keys; "
            "got None without value_dim."
        )
    if not 1 <= arguments.integer("value_dim", value_dim) <= D:
        raise ValueError(f"value_dim must be in 1..D={D}; got {value_dim}.")


def table_and_lengths(table, lengths, query, pools: Pools) -> tuple[Any, Any]:
    """Both as int32; the values of lengths are checked where they are known."""
    B, given = query.shape[0], lengths
    table, lengths = _integers("page_table", table), _integers("lengths", lengths)
    if table.ndim != 2 or table.shape[0] != B or table.shape[1] == 0:
        raise ValueError(
            f"page_table must have shape (B, M) with B={B}, and at least one page M of a sequence; got {table.shape}."
        )
    if lengths.shape != (B,):
        raise ValueError(f"lengths must have shape (B,)={(B,)}; got {lengths.shape}.")
    # (Under jit, an array of JAX would hide the values.)
    indices.check_range("lengths", arguments.host_array("lengths", given), pools.capacity(table))
    return jnp.asarray(indices.int32(table)), jnp.asarray(indices.int32(lengths))


def _integers(name: str, x):
    x = arguments.array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers; got dtype {x.dtype}.")
    return x


def window(size):
    """How many keys before its own are visible to a row, `1` int32; None: all."""
    if size is None:
        return None
    dtype = getattr(size, "dtype", None)
    scalar = dtype is not None and jnp.issubdtype(dtype, jnp.integer) and np.shape(size) == ()
    if not (indices.is_int(size) or scalar) or isinstance(size, jax.ShapeDtypeStruct):
        raise TypeError(
            f"local_window_size must be an int, an integer scalar, traced or not, or None; got {arguments.shown(size)}. "
            "(It is that of keys before the token: rows are causal.)"
        )
    known = indices.known(size)
    if known is not None and known < 0:
        raise ValueError(f"local_window_size must be at least 0, or None for no window; got {size}.")
    return jnp.asarray(indices.int32(size)).reshape(1)
