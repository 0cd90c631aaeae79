"""From the arguments of `sequence_parallel_attention` to the call of one device."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fa import checks, compat, entry, masks
from jax_fa.call import Call, is_symbolic
from jax_fa.masks import Mask
from jax_fa.sequence_parallel.order import Spread
from jax_fa.sequence_parallel.schedule import Schedule
from jax_fa.sequence_parallel.shards import Shards
from jax_fa.sequence_parallel.visibility import visible_chunks


def check_varying(spread: Spread, operands: dict[str, Any]) -> None:
    """Raises where types say that what must be sharded is not, or the other way round."""
    if not compat.checks_varying():
        return
    for name, x in operands.items():
        sharded = spread.axis in compat.varying_axes(x)
        if name != "query" or spread.rows:
            if not sharded and spread.devices > 1:
                raise ValueError(
                    f"{name} must be sharded along its sequence over axis {spread.axis!r}; it is the same on every device. "
                    "Name the axis in the in_specs of jax.shard_map."
                )
        elif sharded and spread.devices > 1:
            raise ValueError(
                f'query must be the same on every device with strategy="all_reduce"; its type says that it differs over '
                f"axis {spread.axis!r}. Leave the axis out of its in_specs, or take another strategy."
            )


@dataclass(frozen=True)
class Local:
    """What a device's call is made of. `request` is that of its shards alone, without bias and mask."""

    request: entry.Request
    spread: Spread
    bias: Any
    given_mask: Mask | None

    @property
    def dims(self):
        return self.request.call.dims

    @property
    def full(self) -> tuple[int, int]:
        """The lengths of the whole sequences."""
        n = self.spread.devices
        return self.dims.Sq * (n if self.spread.rows else 1), self.dims.Skv * n

    @cached_property
    def rows(self):
        """The positions of this device's rows; None: all."""
        if not self.spread.rows:
            return None
        return self.spread.positions(lax.axis_index(self.spread.axis), self.dims.Sq)

    def check_chunks(self) -> None:
        """Raises where the shards cannot be cut into the chunks of the order."""
        spread = self.spread
        for name, length in (("query", self.dims.Sq), ("key", self.dims.Skv)):
            if is_symbolic(length):
                raise ValueError(
                    f"{name} must have a length that is known when tracing; got {length} tokens."
                )
            if spread.zigzag and length % 2 and (name == "key" or spread.rows):
                whole = length * spread.devices
                raise ValueError(
                    f'order="zigzag" gives each device two chunks of equal length; {name} has a shard of {length} tokens. '
                    f"Pad the sequence of {whole} to {whole + spread.devices}, a multiple of 2 * {spread.devices}, and mask "
                    "the padding with jax_fa.masks.Lengths."
                )

    @cached_property
    def mask(self) -> Mask | None:
        """The mask, with the segment IDs of all tokens."""
        if self.given_mask is None:
            return None
        return masks.replaced(self._whole_ids, self.given_mask)

    def _whole_ids(self, mask: Mask) -> Mask:
        if not isinstance(mask, masks.SegmentIds):
            return mask
        d, (sq, skv) = self.dims, self.full
        same = mask.key is None

        def whole(name: str, ids, local: int, length: int):
            size = np.shape(ids)[-1:] if ids is not None else (length,)
            if size == (length,) or size != (local,):
                return ids
            # (Ids of the shards are known when tracing only if all devices have the same.)
            gathered = lax.all_gather(jnp.asarray(ids), self.spread.axis, axis=np.ndim(ids) - 1, tiled=True)
            return self.spread.shards(gathered, np.ndim(ids) - 1, restored=True)

        query = whole("query", mask.query, d.Sq, sq) if self.spread.rows else mask.query
        key = None if same else whole("key", mask.key, d.Skv, skv)
        within = mask.within
        if isinstance(within, masks.Prefix) and self.spread.rows:
            within = replace(within, length=whole("length", within.length, d.Sq, sq))
        return replace(mask, query=query, key=key, within=within)

    def call(self, travel: str | None) -> Call:
        """This device's call: what says something of keys says it of all keys."""
        call, d, (sq, skv) = self.request.call, self.dims, self.full
        x = call.operands
        batch, heads = d.B, d.N
        parts = entry.mask_operands(masks.parts(self.mask, batch, heads, sq, skv, self.rows))
        found = parts[0].present()
        found["bias"] = checks.bias(self.bias, (*batch, heads, d.Sq, skv), call.acc)
        if x.alibi_slopes is not None:
            at = masks.positions(self.mask, batch, heads, sq, skv, self.rows)
            at = (self.rows if self.spread.rows else jnp.arange(sq, dtype=jnp.int32)) if at is None else at
            found["position"] = masks.lead(at, len(batch) + 2)
        drops = x.dropout_seed is not None
        if drops:  # each block has its own
            found["dropout_start"] = jnp.zeros((1,) * len(batch) + (2,), jnp.uint32)
        pieces = self.spread.chunks if drops and self.spread.rows else 1, self.spread.chunks
        if x.alibi_slopes is None and not drops:
            pieces = 1, 1
        if 0 in (*batch, d.Sq, d.Skv):
            travel = "stay"  # no key for any row: nothing to communicate, for which XLA has no empty arrays
        shards = Shards(
            axis=self.spread.axis,
            devices=self.spread.devices,
            zigzag=self.spread.zigzag,
            rows=self.spread.rows,
            travel=travel,
            schedule=self._schedule() if travel == "ring" else None,
            row_parts=pieces[0],
            key_parts=pieces[1],
        )
        problem = replace(call.problem, shards=shards, mask=None if self.mask is None else _ANY_MASK)
        made = call.replace(problem=problem, operands=replace(x, **found))
        return replace(made, parts=tuple(parts[1:]))

    def _schedule(self) -> "Schedule":
        d, (sq, skv) = self.dims, self.full
        seen = visible_chunks(self.mask, d.B, d.N, sq, skv, self.spread.devices * self.spread.chunks)
        if self.spread.zigzag:
            n = self.spread.devices
            seen = seen[:n] | seen[: n - 1 : -1]
            seen = seen[:, :n] | seen[:, : n - 1 : -1]
        return Schedule.of(seen)


# What a backend with a mask language of its own knows of a shard's mask: nothing.
_ANY_MASK = masks.Dense(np.ones((1, 1), bool)).static()
