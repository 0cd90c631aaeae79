"""Which keys are visible to which devices, as far as it is known when tracing; and how many tiles that makes."""

import jax.numpy as jnp
import numpy as np

from jax_fa import api, arguments, compat, indices, masks
from jax_fa.flex.masks import functions_of
from jax_fa.masks import Mask
from jax_fa.sequence_parallel.order import ORDERS, Order, Spread


def visible_chunks(mask: Mask | None, batch, heads, sq: int, skv: int, chunks: int) -> np.ndarray:
    """Which chunks of keys may be visible to which chunks of rows, as far as it is known when tracing: `[rows, keys]`."""
    known = (
        None if mask is None else masks.known_part(mask, but=masks.Dense)
    )  # whose rows are those of this device
    if known is None or 0 in (sq, skv):
        return np.ones((chunks, chunks), bool)
    with compat.eager():
        parts = masks.parts(known, batch, heads, sq, skv)
        return np.any([_chunks_of(rules, sq, skv, chunks) for rules in parts], axis=0)


def _chunks_of(rules: masks.Rules, sq: int, skv: int, chunks: int) -> np.ndarray:
    """`visible_chunks` of one part."""
    lower, upper = (None if x is None else np.asarray(x) for x in (rules.lower, rules.upper))
    lower = np.zeros((1, 1), np.int32) if lower is None else lower.reshape(-1, lower.shape[-1])
    upper = np.full((1, 1), skv, np.int32) if upper is None else upper.reshape(-1, upper.shape[-1])
    lower, upper = np.broadcast_arrays(lower, upper)
    some = lower < upper

    def by_chunk(x, reduce):
        x = reduce(np.broadcast_to(x, (x.shape[0], sq)), axis=0)
        return reduce(x.reshape(chunks, -1), axis=1)[:, None]

    first, last = by_chunk(np.where(some, lower, skv), np.min), by_chunk(np.where(some, upper, 0), np.max)
    keys = np.arange(chunks) * (skv // chunks)
    return (first < keys + skv // chunks) & (last > keys)


def visited_tiles(
    mask: Mask | None, sq: int, skv: int, *, devices: int, order: Order = "contiguous", tile: int = 128
) -> np.ndarray:
    """How many tiles of `tile` rows and keys each device visits in a forward: how even the work is. Runs nothing.

    Args:
      mask: a structured mask whose values are known, without batch dims, or None.
      sq: the length of the whole query.
      skv: that of the keys.
      devices: how many devices the sequence is sharded over.
      order: see `sequence_parallel_attention`.
      tile: rows and keys of a tile.

    Returns:
      int64 array `(devices,)`.

    Raises:
      ValueError: lengths that the devices (and chunks) do not divide, or a mask that has no intervals of keys, or whose values
        are not known.
      TypeError: a mask that is none, numbers that are no ints.
    """
    arguments.choice("order", order, ORDERS)
    spread = Spread("", arguments.integer("devices", devices, least=1), order == "zigzag")
    tile = arguments.integer("tile", tile, least=1)
    sq, skv = (_length(name, x, spread) for name, x in (("sq", sq), ("skv", skv)))
    mask = None if mask is None else api.one_mask(mask)
    if functions_of(mask):
        raise ValueError("mask must be a structured one; a BlockMask says nothing of whole shards.")
    if mask is not None and masks.known_part(mask) is not mask:
        raise ValueError("mask must have known values; it has traced ones.")
    with compat.eager():
        parts = masks.parts(mask, (), 1, sq, skv)
        if any(rules.dense is not None for rules in parts):
            raise ValueError("mask must be a structured one; a boolean array visits all tiles.")
        if any(rules.segment_row is not None for rules in parts):
            raise ValueError("mask must be intervals of keys; the members of a segment lie apart here.")
        return np.sum([_tiles_of(rules, sq, skv, spread, tile) for rules in parts], axis=0)


def _length(name: str, length: int, spread: Spread) -> int:
    length, parts = arguments.integer(name, length, least=0, most=indices.FAR), spread.devices * spread.chunks
    if length % parts:
        raise ValueError(f"{name} must be a multiple of {parts}, for devices={spread.devices}; got {length}.")
    return length


def _tiles_of(rules: masks.Rules, sq: int, skv: int, spread: Spread, tile: int) -> np.ndarray:
    """`visited_tiles` of one part."""
    devices = spread.devices
    rows, keys = sq // devices, skv // devices
    bounds = [
        np.broadcast_to(np.asarray(x if x is not None else fill), (1, sq)).reshape(-1)
        for x, fill in ((rules.lower, 0), (rules.upper, skv))
    ]
    found = np.zeros(devices, np.int64)
    for device in range(devices):
        at = np.asarray(spread.positions(device, rows))
        for source in range(devices):
            local = [
                local_bound(x[at], spread.starts(source, keys), keys // spread.chunks, np) for x in bounds
            ]
            for i in range(0, rows, tile):
                lower, upper = (x[i : i + tile] for x in local)
                some = lower < upper
                if some.any():
                    found[device] += -(-int(upper[some].max()) // tile) - int(lower[some].min()) // tile
    return found


def local_bound(bound, starts, length: int, xp=jnp):
    """A bound of all keys as one of chunks of keys that lie one after another: how many of them are below."""
    return sum(xp.clip(bound - start, 0, length) for start in starts)
