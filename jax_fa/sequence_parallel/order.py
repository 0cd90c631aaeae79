"""Which tokens a device holds, and how whole arrays get there."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, Shaped

from jax_fa import arguments, compat, indices

Order = Literal["contiguous", "zigzag"]
ORDERS = {"contiguous": 1, "zigzag": 2}  # chunks of each device


@dataclass(frozen=True)
class Spread:
    """How a sequence lies on the devices."""

    axis: str
    devices: int
    zigzag: bool
    rows: bool = True  # query's rows are sharded, too

    @property
    def chunks(self) -> int:
        """Of each device."""
        return 2 if self.zigzag else 1

    def starts(self, device, length: int) -> list[Any]:
        """The positions at which the chunks of a device begin, which has `length` tokens."""
        if not self.zigzag:
            return [device * length]
        chunk = length // 2
        return [device * chunk, (2 * self.devices - 1 - device) * chunk]

    def positions(self, device, length: int):
        """The positions of a device's tokens, int32."""
        chunk = length // self.chunks
        parts = [start + jnp.arange(chunk, dtype=jnp.int32) for start in self.starts(device, length)]
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]

    def shards(self, x, axis: int, restored: bool):
        """Whole arrays as the shards of all devices, one after another; `restored`: the other way."""
        if not self.zigzag or self.devices == 1:
            return x
        n = self.devices
        order = np.array([self.starts(i, self.chunks) for i in range(n)]).reshape(-1)
        if restored:
            order = np.argsort(order)
        parts = jnp.split(x, 2 * n, axis=axis)
        return jnp.concatenate([parts[i] for i in order], axis=axis)


def devices_of(axis_name: Any) -> int:
    """How many devices there are along the axis; raises unless code here is local along it."""
    if not isinstance(axis_name, str):
        raise TypeError(f"axis_name must be the name of a mesh axis; got {arguments.shown(axis_name)}.")
    manual = compat.axis_is_manual(axis_name)
    if manual:
        return lax.axis_size(axis_name)
    example = f'jax.shard_map(..., axis_names={{"{axis_name}"}})'
    if manual is None:
        raise ValueError(
            f"axis_name={axis_name!r} must be a mesh axis of a surrounding jax.shard_map; there is none of this name here. "
            f"Call sequence_parallel_attention inside {example}."
        )
    raise ValueError(
        f"axis_name={axis_name!r} must be a manual mesh axis; here it is not one, so that arrays are whole along it. Call "
        f"sequence_parallel_attention inside {example}."
    )


def reorder(
    x: Shaped[Array, "..."], *, devices: int, axis: int = 1, order: Order = "zigzag"
) -> Shaped[Array, "..."]:
    """A whole array whose equal parts along the axis are what each of the devices holds in this order.

    Args:
      x: an array of the whole sequence: tokens, positions, labels, query, key or value.
      devices: how many devices the sequence is sharded over.
      axis: that of the sequence.
      order: see `sequence_parallel_attention`; "contiguous" changes nothing.

    Returns:
      An array of x's shape and dtype. Shard it along the axis.

    Raises:
      ValueError: a length that is no multiple of the number of chunks (2 * devices for "zigzag"), and what to pad it to.
    """
    return _reordered(x, devices, axis, order, restored=False)


def restore(
    x: Shaped[Array, "..."], *, devices: int, axis: int = 1, order: Order = "zigzag"
) -> Shaped[Array, "..."]:
    """The inverse of `reorder`: a whole array in its natural order again. Arguments as there."""
    return _reordered(x, devices, axis, order, restored=True)


def _reordered(x, devices: int, axis: int, order: Order, restored: bool):
    devices, axis = arguments.integer("devices", devices, least=1), arguments.integer("axis", axis)
    arguments.choice("order", order, ORDERS)
    x = arguments.array("x", x)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be one of x, which has shape {x.shape}; got {axis}.")
    axis %= x.ndim
    parts, length = devices * ORDERS[order], x.shape[axis]
    if length % parts:
        padded = -(-length // parts) * parts
        raise ValueError(
            f"x must have a length that is a multiple of {parts} along axis {axis}, for devices={devices} and order={order!r}; "
            f"got {length}. Pad the sequence to {padded} and mask the padding with jax_fa.masks.Lengths."
        )
    return Spread("", devices, order == "zigzag").shards(x, axis, restored)


def position_ids(length: int, *, axis_name: str, order: Order = "contiguous") -> Int32[Array, " length"]:
    """The positions of this device's tokens in the whole sequence, inside `jax.shard_map`: for rotary embeddings.

    Args:
      length: how many tokens a device has.
      axis_name: the mesh axis along which the sequence is sharded.
      order: see `sequence_parallel_attention`.

    Returns:
      int32 array `(length,)`.

    Raises:
      ValueError: a call outside of `shard_map`, or an odd length with order="zigzag".
    """
    length = arguments.integer("length", length, least=0, most=indices.FAR)
    arguments.choice("order", order, ORDERS)
    devices = devices_of(axis_name)
    if length % ORDERS[order]:
        raise ValueError(f'order="zigzag" gives each device two chunks of equal length; got length={length}.')
    return Spread(axis_name, devices, order == "zigzag").positions(lax.axis_index(axis_name), length)
