"""Dropout of the operator: seeded, or by CANN's drop_mask.

drop_mask is a stream of keep bits, dense over the logits of each sequence; here is where each row's bits begin.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from jax_fa.arguments import host_array, random_key, shown
from jax_fa.call import Dims
from jax_fa.cann.packed import Packed
from jax_fa.entry import Dropout


def dropout(keep_prob, drop_mask, dropout_key, d: Dims, packed: Packed | None) -> Dropout:
    """The user's key, or the user's bytes as they are and where each row's bits begin."""
    number = isinstance(keep_prob, (int, float, np.number)) and not isinstance(keep_prob, bool)
    if not number or not 0 < keep_prob <= 1:
        raise ValueError(f"keep_prob must be a Python number in (0, 1]; got {shown(keep_prob)}.")
    if dropout_key is not None:
        if drop_mask is not None:
            raise ValueError("drop_mask and dropout_key exclude each other; got both.")
        random_key("dropout_key", dropout_key)
        return Dropout(rate=1.0 - float(keep_prob), key=dropout_key)
    if drop_mask is None:
        if keep_prob < 1:
            raise ValueError(
                f"drop_mask must be given when keep_prob is below 1 (it is {keep_prob}); got None."
            )
        return Dropout(keep_prob=1.0)
    drop_mask = host_array("drop_mask", drop_mask)
    if drop_mask.dtype != np.uint8:
        raise TypeError(f"drop_mask must have dtype uint8; got {drop_mask.dtype}.")
    lengths = None if packed is None else packed.lengths()
    products = [math.prod((*d.B, d.Sq, d.Skv))] if packed is None else []
    if lengths is not None:
        products = [int(sq) * int(skv) for sq, skv in zip(*lengths, strict=True)]
    needed = -(-d.N * sum(products) // 8)
    have = math.prod(drop_mask.shape)
    if have < needed:
        raise ValueError(f"drop_mask must have at least {needed} bytes, one bit per weight; got {have}.")
    if max(have, math.prod((*d.B, d.N, d.Sq))) >= 2**31:
        raise ValueError(f"drop_mask and B*N*Sq must stay below 2**31 bytes and rows; got {have} bytes.")
    bits = jnp.asarray(drop_mask).reshape((1,) * len(d.B) + (have,))
    offset = _dense_drop_offset(d) if packed is None else _packed_drop_offset(d, packed)
    bits = bits if have else jnp.zeros((*bits.shape[:-1], 1), jnp.uint8)
    return Dropout(keep_prob=float(keep_prob), bits=bits, offset=offset)


def drop_offset(row, columns, before=(0, 0), first_key=0) -> Int32[Array, "... 2"]:
    """Where key 0 of a row has its bit: (byte, bit 0..7) of position `before + row * columns - first_key`.

    Positions pass 2**31 long before bytes do. With row = 8 a + c a row begins after a * columns whole bytes
    and c * columns bits, so 32-bit arithmetic is enough. `before` is a pair (bytes, bits).
    """
    bit = before[1] + (row & 7) * columns - first_key
    return jnp.stack([before[0] + (row >> 3) * columns + (bit >> 3), bit & 7], axis=-1)


def _dense_drop_offset(d: Dims) -> Int32[Array, "B N Sq 2"]:
    rows = jnp.arange(math.prod((*d.B, d.N, d.Sq)), dtype=jnp.int32)
    return drop_offset(rows.reshape(*d.B, d.N, d.Sq), d.Skv)


def _packed_drop_offset(d: Dims, packed: Packed) -> Int32[Array, "N T 2"]:
    """Rows of blocks [N, Sq_b, Skv_b]. Keys are numbered along T: key 0 lies first_key bits before a row."""
    rows = packed.rows()
    bytes_before, bits_before = blocks_before(*packed.sizes(), d.N)
    before = bytes_before[rows.sequence], bits_before[rows.sequence]
    heads = jnp.arange(d.N, dtype=jnp.int32)[:, None]
    return drop_offset(heads * rows.sq + rows.position, rows.skv, before, rows.first_key)


def blocks_before(sq, skv, N: int):
    """(bytes, bits) of all blocks [N, sq_b, skv_b] in front of each sequence's."""
    size = drop_offset(N * sq, skv)
    before = jnp.cumsum(size, axis=0, dtype=jnp.int32) - size
    return before[..., 0] + (before[..., 1] >> 3), before[..., 1] & 7
