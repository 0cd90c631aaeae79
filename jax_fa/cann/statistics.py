"""CANN's softmax statistics: eight equal lanes, marks for rows without keys, and the orders they are stored in.

Inside, a fully masked row has max -FLT_MAX and sum 0. CANN's sum of +FLT_MAX makes exp(x - max) / sum vanish there.

In layout TND torch_npu stores `(T, N, 8)` in an order of its own by default (`blocks`): sequence after sequence, each as
`[N, Sq_b, 8]`. Rows past the last end count as one more sequence.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import compat
from jax_fa.arguments import shown
from jax_fa.call import Dims
from jax_fa.cann import spec
from jax_fa.cann.packed import Packed, Places
from jax_fa.softmax import FLT_MAX


def stored(m, l, d: Dims, packed: Packed | None, *, blocks: bool = False):
    """CANN's (softmax_max, softmax_sum) from the kernels', `*B N Sq` each."""
    l = jnp.where(l == 0, FLT_MAX, l)
    no_keys = None
    if d.Skv == 0:
        no_keys = True
    elif packed is not None:
        rows = packed.rows()
        no_keys = rows.inside & (rows.skv == 0)

    def store(x):
        x = x if no_keys is None else jnp.where(no_keys, 0.0, x)
        if packed is not None:
            x = _to_blocks(x, packed) if blocks else x.T
        return jnp.broadcast_to(x[..., None], (*x.shape, spec.LANES))

    return store(m), store(l)


def loaded(softmax_max, softmax_sum, d: Dims, packed: Packed | None, *, blocks: bool = False):
    """The kernels' (max, sum), `*B N Sq` each, from CANN's: the inverse of `stored`."""
    wanted = (*d.B, d.N, d.Sq, spec.LANES) if packed is None else (d.Sq, d.N, spec.LANES)
    given = {"softmax_max": softmax_max, "softmax_sum": softmax_sum}
    for name, x in given.items():
        if not hasattr(x, "dtype"):
            raise TypeError(f"{name} must be the float32 array that the forward gave; got {shown(x)}.")
        if x.dtype != np.float32:
            raise TypeError(f"{name} must have dtype float32; got {x.dtype}.")
        if x.shape != wanted:
            axes = "(B, N, Sq, 8)" if packed is None else "(T, N, 8)"
            raise ValueError(f"{name} must have shape {axes}={wanted}; got {x.shape}.")

    def load(x):
        x = jnp.asarray(x)[..., 0]
        if packed is None:
            return x
        return _from_blocks(x, packed) if blocks else x.T

    m, l = map(load, given.values())
    masked = (l == 0) | (l >= FLT_MAX)
    return jnp.where(masked, -FLT_MAX, m), jnp.where(masked, 0, l)


# --- the order of torch_npu


def _block_places(packed: Packed, heads: int):
    """Where (head, row) lies in the flat memory of `(T, N)`, int32 `N T`."""
    return _places_of(packed.rows(), packed.last_row(), heads, packed.Sq)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _places_of(rows: Places, end, heads: int, T: int):
    at = jnp.arange(T, dtype=jnp.int32)
    first = jnp.where(rows.inside, rows.first_row, end)
    length = jnp.where(rows.inside, rows.sq, T - end)
    return first * heads + jnp.arange(heads, dtype=jnp.int32)[:, None] * length + (at - first)


def _to_blocks(x, packed: Packed):
    """`(T, N)`, in memory blocks `[N, Sq_b]`, of `N T`."""
    heads, T = x.shape

    def stored(arrays):
        x, places = (array.reshape(-1) for array in arrays)
        return jnp.zeros(heads * T, x.dtype).at[places].set(x, unique_indices=True).reshape(T, heads)

    return compat.automatic(stored, (x, _block_places(packed, heads)), _whole)


def _from_blocks(x, packed: Packed):
    """The inverse."""
    given = x, _block_places(packed, x.shape[1])
    return compat.automatic(lambda arrays: arrays[0].reshape(-1)[arrays[1]], given, _whole)


def _whole(x) -> tuple[None, ...]:
    """No mesh axis cuts blocks, in which heads and rows are one after another."""
    return (None,) * x.ndim
