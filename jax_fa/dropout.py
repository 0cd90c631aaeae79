"""Counter-based dropout: the keep bit of (key, batch, head, row, column), on every backend the same.

Bits come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11). One
counter yields 4 words, that is 8 uniform 16-bit numbers, for 8 columns of one row:

    counter = (4 * (column // 32) + (column % 8) // 2, row, head, batch)
    word    = (column // 8) % 4
    half    = column % 2                       # 0: low 16 bits, 1: high 16 bits
    keep    = number < round(keep_prob * 65536), at least 1

A block of 32 columns thus takes 4 counters. Lanes of a matrix-multiply accumulator (which hold column
pairs 8 apart) own whole counters, and a vector of counters unpacks into contiguous columns by moving
blocks of 8 columns, so the same layout is cheap on GPUs and CPUs.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, UInt8, UInt32

from jax_fa import arguments, compat
from jax_fa.call import Shape, Size
from jax_fa.indices import take_last

BLOCK = 32  # columns whose counters lie together
TILE_ELEMENTS = 2**18  # bits that `dropout_mask` draws at a time
ROUNDS = 10


def philox4x32(counter, key):
    """Philox4x32: four uint32 words from a counter of four words and a key of two (arrays broadcast)."""
    counter, key = (tuple(jnp.asarray(x, jnp.uint32) for x in words) for words in (counter, key))
    for _ in range(ROUNDS):
        counter, key = philox_round(counter, key, _multiply_full)
    return counter


def philox_round(counter, key, multiply):
    """The counter and the key after a round; `multiply(a, b)` gives the high and low words of a product."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    hi0, lo0 = multiply(c0, 0xD2511F53)
    hi1, lo1 = multiply(c2, 0xCD9E8D57)
    return (hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0), (k0 + np.uint32(0x9E3779B9), k1 + np.uint32(0xBB67AE85))


def _multiply_full(a, b: int):
    """The high and low words of a 32 x 32 bit product, in 32-bit arithmetic."""
    b_hi, b_lo = np.uint32(b >> 16), np.uint32(b & 0xFFFF)
    a_hi, a_lo = a >> 16, a & np.uint32(0xFFFF)
    mid = a_hi * b_lo + (a_lo * b_lo >> 16)  # at most (2^16 - 1)^2 + 2^16 - 1: no carry is lost
    mid_lo = a_lo * b_hi + (mid & np.uint32(0xFFFF))
    return a_hi * b_hi + (mid >> 16) + (mid_lo >> 16), a * np.uint32(b)


LIMIT = 65536  # of the 16-bit numbers


def threshold(keep_prob: float) -> int:
    """A 16-bit number below this keeps its element. Never 0 for keep_prob > 0."""
    return max(1, round(keep_prob * LIMIT))


def kept_numbers(rate) -> int | UInt32[Array, ""]:
    """The `threshold` of a dropout rate: an int, or an array of the same value where the rate is traced.

    In float32, in which the product is exact. A traced rate outside [0, 1) is clipped.
    """
    if isinstance(rate, float):
        return max(1, LIMIT - int(np.rint(np.float32(rate) * np.float32(LIMIT))))
    kept = LIMIT - jnp.round(jnp.asarray(rate).astype(jnp.float32) * LIMIT)
    return jnp.clip(kept, 1, LIMIT).astype(jnp.uint32)


def seed_words(dropout_key) -> UInt32[Array, "2"]:
    """The Philox key of a `jax.random` key of any implementation, old style or new."""
    data = jax.random.key_data(dropout_key)
    if data.shape == (4,):  # RBG, whose bits are others under vmap and on other platforms
        return jnp.stack(philox4x32((0, 0, data[2], data[3]), (data[0], data[1]))[:2])
    return jax.random.bits(dropout_key, (2,), jnp.uint32)


def streams(batch: Shape, heads: Size) -> UInt32[Array, "*B N 2"]:
    """The (head, batch) counter words of every batch entry and head."""
    b = jnp.arange(math.prod(batch), dtype=jnp.uint32).reshape(*batch, 1)
    n = jnp.arange(heads, dtype=jnp.uint32)
    shape = (*batch, heads)
    return jnp.stack([jnp.broadcast_to(n, shape), jnp.broadcast_to(b, shape)], axis=-1)


@partial(jax.jit, static_argnames="columns")  # which traces and lowers it once for all tiles of a size
def keep_tile(
    seed: UInt32[Array, "*#S 2"],
    stream: UInt32[Array, "*#S 2"],
    rows: Int32[Array, " R"],
    first_column,
    columns: int,
    limit,
) -> Bool[Array, "*S R C"]:
    """Keep bits of the given rows and of `columns` columns from `first_column` (may be traced) on.

    `limit` is the `threshold` of the keep probability, or an array of them that broadcasts to `*S R C`.
    """
    blocks = -(-columns // BLOCK) + 1  # the range may begin inside a block
    # Shifts and masks: // and % of signed integers are six operations each.
    counters = (first_column >> 5) * 4 + jnp.arange(4 * blocks, dtype=jnp.int32)
    wide = (..., None, None)
    words = philox4x32(
        (counters, rows[:, None], stream[..., 0][wide], stream[..., 1][wide]),
        (seed[..., 0][wide], seed[..., 1][wide]),
    )
    words = jnp.stack(jnp.broadcast_arrays(*words), axis=-1)  # *S R (block pair) word
    shape = words.shape[:-2]
    words = words.reshape(*shape, blocks, 4, 4).swapaxes(-1, -2)  # ... block word pair
    numbers = jnp.stack([words & np.uint32(0xFFFF), words >> 16], axis=-1)
    keep = numbers.reshape(*shape, blocks * BLOCK) < jnp.asarray(limit, jnp.uint32)
    first = first_column & (BLOCK - 1)
    return jax.lax.dynamic_slice_in_dim(keep, first, columns, axis=-1, allow_negative_indices=False)


def explicit_keep_tile(
    bits: UInt8[Array, "*#S bytes"], offset: Int32[Array, "*#S R 2"], first_column, columns: int
) -> Bool[Array, "*S R C"]:
    """Keep bits read from a packed stream: bit `8 * byte + bit + column` for a row at offset (byte, bit)."""
    bit = offset[..., 1:] + (first_column + jnp.arange(columns, dtype=jnp.int32))
    byte = offset[..., :1] + (bit >> 3)
    taken = take_last(bits, byte)
    return (taken >> (bit & 7).astype(jnp.uint8)) & 1 == 1


def bit_offset(row, columns, before=(0, 0), first_key=0) -> Int32[Array, "... 2"]:
    """Where key 0 of a row has its bit: (byte, bit 0..7) of position `before + row * columns - first_key`.

    Positions pass 2**31 long before bytes do. With row = 8 a + c a row begins after a * columns whole bytes
    and c * columns bits, so 32-bit arithmetic is enough. `before` is a pair (bytes, bits).
    """
    bit = before[1] + (row & 7) * columns - first_key
    return jnp.stack([before[0] + (row >> 3) * columns + (bit >> 3), bit & 7], axis=-1)


@compat.allow_promotion()
def dropout_mask(
    dropout_key, dropout_rate: float, shape: tuple[int, int, int, int]
) -> UInt8[Array, " bytes"]:
    """The keep bits a call with this key and rate uses, packed as CANN's `dropMask` is.

    Args:
      dropout_key: a `jax.random` key, or an old-style uint32 key array.
      dropout_rate: probability of dropping an attention weight, a Python number in [0, 1). It is rounded to a
        multiple of 2**-16.
      shape: `(B, N, Sq, Skv)`, ints; N counts query heads.

    Returns:
      uint8 array of `ceil(B*N*Sq*Skv / 8)` bytes. Bit `((b*N + n)*Sq + i)*Skv + j`, least significant bit
      of a byte first, is 1 where the weight of key j for query i of head n is kept. The whole mask has
      S x S bits per head: attention itself computes them tile by tile and never stores them.

    Raises:
      ValueError: a rate or a shape out of range, or several keys.
      TypeError: what is no key, number or shape, and a traced rate.

    Source: Philox4x32-10, Salmon et al., SC'11; bit order of aclnnFlashAttentionScore's dropMaskOptional.
    """
    arguments.random_key("dropout_key", dropout_key)
    rate, sizes = _rate(dropout_rate), _sizes(shape)
    if 0 in sizes:
        return jnp.zeros((0,), jnp.uint8)
    return _packed(seed_words(dropout_key), kept_numbers(rate), sizes)


def _rate(rate: Any) -> float:
    arguments.number("dropout_rate", rate, "a Python number in [0, 1)")
    if isinstance(rate, jax.core.Tracer) or np.ndim(rate):
        raise TypeError(
            f"dropout_rate must be a Python number in [0, 1); got {arguments.shown(rate)}. "
            "Under jax.jit make it a static argument (static_argnames)."
        )
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1); got {rate}.")
    return float(rate)


def _sizes(shape) -> tuple[int, ...]:
    if not isinstance(shape, (tuple, list)) or len(shape) != 4:
        given = tuple(shape) if isinstance(shape, (tuple, list)) else shape
        raise ValueError(f"shape must be (B, N, Sq, Skv); got {arguments.shown(given)}.")
    if not all(isinstance(size, (int, np.integer)) and type(size) is not bool for size in shape):
        raise TypeError(f"shape must hold the ints (B, N, Sq, Skv); got {arguments.shown(tuple(shape))}.")
    if min(shape) < 0:
        raise ValueError(f"shape must hold sizes of at least 0; got {tuple(shape)}.")
    if math.prod(shape[:3]) >= 2**31:
        raise ValueError(f"shape must have fewer than 2**31 rows B*N*Sq; got {tuple(shape)}.")
    return tuple(int(size) for size in shape)


@partial(jax.jit, static_argnames=("limit", "shape"))
def _packed(seed, limit: int, shape: tuple[int, ...]):
    """The bits in tiles of rows of all heads, one after another: what is not packed yet is small."""
    _, N, Sq, Skv = shape
    rows = math.prod(shape[:3])
    whole = 8 // math.gcd(8, Skv)  # so many rows fill bytes
    tile = min(max(1, TILE_ELEMENTS // (whole * Skv)), -(-rows // whole)) * whole

    def pack(t):
        row = (t * tile).astype(jnp.uint32) + jnp.arange(tile, dtype=jnp.uint32)
        b, n, i = row // np.uint32(N * Sq), row // np.uint32(Sq) % np.uint32(N), row % np.uint32(Sq)

        def columns(b, n, i):
            at = i.astype(jnp.int32)[None]
            return keep_tile(seed, jnp.stack([n, b]), at, jnp.int32(0), Skv, limit)[0]

        keep = jax.vmap(columns)(b, n, i) & (row < np.uint32(rows))[:, None]
        return jnp.packbits(keep.reshape(-1), bitorder="little")

    packed = jax.lax.map(pack, jnp.arange(-(-rows // tile), dtype=jnp.int32))
    return packed.reshape(-1)[: -(-math.prod(shape) // 8)]
