"""Attention over a sequence that is sharded over devices, inside `jax.shard_map`.

`sequence_parallel_attention` is an entry like the others: it makes a `Call`, here of one device's shard, whose problem
holds a `Shards`: how the keys of other devices reach its rows. A `Shards` computes the forward and every derivative as a
backend does, from calls on one device, so that the rules of derivatives in `attention.py` hold here too.

Let (out_s, lse_s) be the results of one device's rows over the keys of shard s alone, and w_s = exp(lse_s - lse):

    forward   lse = log sum_s exp(lse_s),  out = sum_s w_s out_s
    backward  that of each shard, from the softmax max and sum over *all* keys: dq is the sum over shards, dk and dv of a
              shard are sums over the devices that it visits
    tangent   lse' = sum_s w_s lse_s',  out' = sum_s w_s (out_s' + lse_s' (out_s - out))
    second    the backward is that of each shard alone from the cotangents w_s dout and w_s (dlse + dout (out_s - out)) of
              out_s and lse_s: the sum of the seconds of the shards, along the tangents of these cotangents too
    second tangent, along a and b: the derivative of the tangent's formulas along b, with w_s' = w_s (lse_s' - lse')

Nothing of another shard is saved: every pass sends keys and values around again.

Sources: ring attention, Liu et al. 2023, arXiv:2310.01889; Ulysses, Jacobs et al. 2023, arXiv:2309.14509; balanced orders,
Brandon et al. 2023 (striped), arXiv:2311.09431, of which zigzag is the form with two chunks for each device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int32, Num

from jax_fa import api, arguments, backends, compat, dropout, entry, indices, masks, primitives, softmax
from jax_fa.call import (
    STORED,
    Axes,
    Call,
    Operands,
    Problem,
    Saved,
    accumulator_dtype,
    has_rounding,
    narrowed,
    rounding_unit,
    widened,
)
from jax_fa.masks import Mask

Strategy = Literal["ring", "all_gather", "ulysses", "all_reduce"]
Order = Literal["contiguous", "zigzag"]
_STRATEGIES = {"ring": "ring", "all_gather": "gather", "ulysses": None, "all_reduce": "stay"}
_ORDERS = {"contiguous": 1, "zigzag": 2}  # chunks of each device


# --- the entry


@entry.entry
def sequence_parallel_attention(
    query: Float[ArrayLike, "..."],
    key: Float[ArrayLike, "..."],
    value: Float[ArrayLike, "..."],
    *,
    axis_name: str,
    bias: Num[ArrayLike, "..."] | None = None,
    mask: Mask | Bool[ArrayLike, "..."] | None = None,
    alibi_slopes: Float[ArrayLike, "..."] | None = None,
    scale: float | ArrayLike | None = None,
    logits_soft_cap: float | ArrayLike | None = None,
    dropout_rate: float | ArrayLike = 0.0,
    dropout_key: ArrayLike | None = None,
    layout: str = "BSND",
    strategy: Strategy = "ring",
    order: Order = "contiguous",
    implementation: backends.Implementation = None,
    return_logsumexp: bool = False,
) -> entry.Request[Any]:
    """`flash_attention` over sequences that are sharded over the devices of a mesh axis, for use inside `jax.shard_map`.

    Every device passes its shards of query, key and value and gets its shard of the output: the one that `flash_attention`
    of the whole arrays would give, with the same gradients and the same dropped weights. Arguments are those of
    `flash_attention`; here Sq and Skv are the lengths of a shard, n is the number of devices along the axis, and the whole
    sequences have lengths n·Sq and n·Skv.

    Args:
      query: this device's rows, shape `(*B, Sq, N, D)`. With strategy="all_reduce" all rows, the same on every device.
      key: this device's keys, shape `(*B, Skv, K, D)`.
      value: shape `(*B, Skv, K, Dv)`.
      axis_name: the mesh axis along which the sequence is sharded. It must be a manual axis of the surrounding `shard_map`.
      bias: broadcastable to `(*B, N, Sq, n·Skv)`: the rows are those of query, the columns all keys in their natural order.
      mask: a mask of the whole sequences, whatever the order: `Causal()`, `SlidingWindow(1023)`, lengths and cumulative
        lengths of the whole sequences and positions in them. Segment IDs may be those of all tokens, the same on every
        device, or those of the shards, which are then gathered (4 bytes for each token). A boolean array has the rows of
        query and all keys, like a bias. Shards that no row of a device attends to are not computed, and a shard is not
        sent on where it is known when tracing that no device further on needs it: a causal window of w keys sends each shard
        to the next ⌈w / Skv⌉ devices.
      alibi_slopes: as in `flash_attention`.
      scale: likewise.
      logits_soft_cap: likewise.
      dropout_rate: likewise.
      dropout_key: the same key on every device.
      layout: likewise.
      strategy: how rows and keys come together. All give the same result:

        * "ring": keys and values go around the devices, one shard at a time; the next one is sent while this one is
          computed. n - 1 sends of key and value in the forward; in the backward those again, and n - 1 of their gradients.
          Memory is O(S / n) for each device.
        * "all_gather": keys and values are gathered in one step, in the backward too; then nothing waits. Memory is O(S).
        * "ulysses": query, key and value are exchanged (all-to-all) such that each device has all of the sequence and
          N / n heads. N must be a multiple of n, and K a multiple or a divisor of n.
        * "all_reduce": for decoding with a sharded KV cache, where query is short and the same on every device: keys stay
          where they are, and partial results are merged. Up to 1 MiB of these takes one all-reduce, more takes two. The
          output is the same on every device.
      order: which tokens a device holds. "contiguous": device i of n holds part i. "zigzag": the sequence has 2n chunks, and
        device i holds chunks i and 2n - 1 - i, which gives every device the same work under a causal mask. `reorder` puts
        whole arrays into this order, `restore` back, and `position_ids` are the positions of the tokens of a device.
      implementation: the backend of the calls on each device.
      return_logsumexp: also return the log-sum-exp.

    Returns:
      As `flash_attention` of this device's rows: the output `(*B, Sq, N, Dv)` in query's dtype, and with return_logsumexp
      the log-sum-exp `(*B, N, Sq)`, float32 (float64 for float64 inputs). Both have jvp, gradients and second derivatives.

    Raises:
      ValueError: a call outside of `shard_map`, an axis that is not manual, shapes that do not fit together, a number of
        heads that the strategy cannot split, an order that cannot split the shards.
      TypeError: dtypes that do not fit.
      NotImplementedError: the backend named cannot serve the calls on a device; third derivatives.

    Source: arXiv:2310.01889 (ring), arXiv:2309.14509 (Ulysses), arXiv:2311.09431 (balanced orders).
    """
    devices = _devices(axis_name)
    arguments.choice("strategy", strategy, _STRATEGIES)
    arguments.choice("order", order, _ORDERS)
    arguments.flag("return_logsumexp", return_logsumexp)
    spread = _Spread(axis_name, devices, order == "zigzag", strategy != "all_reduce")
    operands = {name: arguments.array(name, x) for name, x in zip(STORED, (query, key, value), strict=True)}
    options = {
        "alibi_slopes": alibi_slopes,
        "scale": scale,
        "logits_soft_cap": logits_soft_cap,
        "dropout_rate": dropout_rate,
        "dropout_key": dropout_key,
        "layout": layout,
        "implementation": implementation,
        "return_logsumexp": bool(return_logsumexp) or strategy == "all_reduce",
    }
    # A call of the shards alone: what is wrong with their shapes and dtypes is wrong here, too.
    request = entry.request_of(api.flash_attention, **operands, **options)
    _check_varying(spread, operands)
    local = _Local(request, spread, None if bias is None else arguments.array("bias", bias), _mask(mask))
    if strategy == "ulysses":
        return _ulysses(local, operands, options)
    local.check_chunks()
    request = replace(request, call=local.call(_STRATEGIES[strategy]))
    if strategy != "all_reduce":
        return request
    return replace(
        request, finish=lambda result: _all_reduced(request, spread, result, bool(return_logsumexp))
    )


def _devices(axis_name: Any) -> int:
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


def _mask(mask) -> Mask | None:
    return None if mask is None else api.one_mask(mask)


@dataclass(frozen=True)
class _Spread:
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
        order = np.array([[i, 2 * n - 1 - i] for i in range(n)]).reshape(-1)
        if restored:
            order = np.argsort(order)
        parts = jnp.split(x, 2 * n, axis=axis)
        return jnp.concatenate([parts[i] for i in order], axis=axis)


def _check_varying(spread: _Spread, operands: dict[str, Any]) -> None:
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


# --- from arguments to the call of a device


@dataclass(frozen=True)
class _Local:
    """What a device's call is made of. `request` is that of its shards alone, without bias and mask."""

    request: entry.Request
    spread: _Spread
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
        first, *others = map(self._whole_ids, masks.members(self.given_mask))
        for other in others:
            first = first & other
        return first

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
        return replace(mask, query=query, key=key)

    def call(self, travel: str | None) -> Call:
        """This device's call: what says something of keys says it of all keys."""
        call, d, (sq, skv) = self.request.call, self.dims, self.full
        x = call.operands
        batch, heads = d.B, d.N
        rules = masks.intervals(self.mask, batch, heads, sq, skv, self.rows)._asdict()
        found = {"mask": rules.pop("dense"), **rules}
        found["bias"] = entry.checked_bias(self.bias, (*batch, heads, d.Sq, skv), call.acc)
        if x.alibi_slopes is not None:
            at = masks.positions(self.mask, batch, heads, sq, skv, self.rows)
            at = (self.rows if self.spread.rows else jnp.arange(sq, dtype=jnp.int32)) if at is None else at
            found["position"] = masks.lead(at, len(batch) + 2)
        drops = x.dropout_seed is not None
        parts = self.spread.chunks if drops and self.spread.rows else 1, self.spread.chunks
        if x.alibi_slopes is None and not drops:
            parts = 1, 1
        shards = Shards(
            axis=self.spread.axis,
            devices=self.spread.devices,
            zigzag=self.spread.zigzag,
            rows=self.spread.rows,
            travel=travel,
            schedule=self._schedule() if travel == "ring" else None,
            row_parts=parts[0],
            key_parts=parts[1],
        )
        problem = replace(call.problem, shards=shards, mask=None if self.mask is None else _ANY_MASK)
        return call.replace(problem=problem, operands=replace(x, **found))

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


def visible_chunks(mask: Mask | None, batch, heads, sq: int, skv: int, chunks: int) -> np.ndarray:
    """Which chunks of keys may be visible to which chunks of rows, as far as it is known when tracing: `[rows, keys]`."""
    known = _known(mask)
    if known is None:
        return np.ones((chunks, chunks), bool)
    with jax.ensure_compile_time_eval(), compat.plain():
        rules = masks.intervals(known, batch, heads, sq, skv)
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


def _known(mask: Mask | None) -> Mask | None:
    """Those of the joined masks whose values are known when tracing, and what they mean beside the others."""
    if mask is None:
        return None
    members = masks.members(mask)
    known = [m for m in members if all(indices.known(x) is not None for x in jax.tree.leaves(m))]
    others = [m for m in members if not any(m is k for k in known)]
    if any(type(m).aligned is not Mask.aligned for m in others):
        known = [m for m in known if getattr(m, "align", None) == "top-left"]
    known = [m for m in known if not isinstance(m, masks.Dense)]  # whose rows are those of this device
    if not known:
        return None
    return known[0] if len(known) == 1 else masks.Intersection(tuple(known))


# --- ulysses and all_reduce


def _ulysses(local: _Local, shards: dict[str, Any], options: dict[str, Any]) -> entry.Request:
    """The request of all rows and keys and of N / n heads."""
    spread, d, call = local.spread, local.dims, local.request.call
    n, (sq, skv), axes = spread.devices, local.full, call.problem.query_axes
    if d.N % n or (d.K % n and n % d.K):
        raise ValueError(
            f'strategy="ulysses" splits heads over the {n} devices of axis {spread.axis!r}: N must be a multiple of {n}, and K '
            f'a multiple or a divisor of it; got N={d.N}, K={d.K}. strategy="ring" serves any number of heads.'
        )
    local.check_chunks()
    rank, me = len(d.B), lax.axis_index(spread.axis)
    seq, head = axes[rank], axes[rank + 1]

    def to_heads(x, head: int, seq: int):
        x = lax.all_to_all(x, spread.axis, split_axis=head, concat_axis=seq, tiled=True)
        return spread.shards(x, seq, restored=True)

    def to_rows(x, head: int, seq: int):
        x = spread.shards(x, seq, restored=False)
        return lax.all_to_all(x, spread.axis, split_axis=seq, concat_axis=head, tiled=True)

    def of_heads(x, at: int):
        """This device's heads of what is the same on all of them."""
        if x is None or np.ndim(x) <= -at - 1 or np.shape(x)[at] != d.N:
            return x
        return lax.dynamic_slice_in_dim(jnp.asarray(x), me * (d.N // n), d.N // n, np.ndim(x) + at)

    def of_rows(x):
        """A bias or mask `... #N #Sq #Skv` with all rows and this device's heads."""
        x = x.reshape((1,) * (3 - x.ndim) + x.shape)
        head, seq = x.ndim - 3, x.ndim - 2
        if x.shape[seq] == 1:
            return of_heads(x, -3)
        if x.shape[head] != 1:
            return to_heads(x, head, seq)
        return spread.shards(lax.all_gather(x, spread.axis, axis=seq, tiled=True), seq, restored=True)

    def of_mask(mask: Mask) -> Mask:
        if isinstance(mask, masks.Dense):
            full = (*d.B, d.N, d.Sq, skv)
            mask.check(d.B, d.N, d.Sq, skv)
            return masks.Dense(of_rows(masks.lead(jnp.asarray(mask.array), len(full))))
        if isinstance(mask, masks.Band) and np.ndim(mask.offset) == rank + 2:
            mask.check(d.B, d.N, sq, skv)
            return masks.Band(mask.left, mask.right, mask.align, of_heads(mask.offset, -2))
        return mask

    arrays = {}
    for name, x in shards.items():
        if name != "query" and d.K < n:
            x = jnp.repeat(x, n // d.K, axis=head)
        arrays[name] = to_heads(x, head, seq)
    mask = None if local.mask is None else masks.Intersection(tuple(map(of_mask, masks.members(local.mask))))
    bias = entry.checked_bias(local.bias, (*d.B, d.N, d.Sq, skv), call.acc)
    options = options | {
        "bias": None if bias is None else of_rows(bias),
        "mask": mask,
        "alibi_slopes": of_heads(options["alibi_slopes"], -1),
    }
    request = entry.request_of(api.flash_attention, **arrays, **options)
    whole, operands = request.call, request.call.operands
    if operands.dropout_stream is not None:
        stream = of_heads(dropout.streams(d.B, d.N), -2)
        whole = whole.replace(operands=replace(operands, dropout_stream=stream))

    def finish(result):
        found = request.finish(result)
        out, logsumexp = found if options["return_logsumexp"] else (found, None)
        out = to_rows(out, head, seq)
        return out if logsumexp is None else (out, to_rows(logsumexp, rank, rank + 1))

    return entry.Request(whole, finish)


# Partial results of so many bytes, over all devices, take one all-reduce, in which each device fills a slot of its own:
# that takes n times the bytes, and half the latency, of one for the max and one for the sums.
ONE_MESSAGE = 2**20


def _all_reduced(request: entry.Request, spread: _Spread, result, return_logsumexp: bool):
    """The results over all keys, from those over the keys of each device."""
    out, logsumexp = request.finish(result)
    axes, acc = request.call.problem.out_axes, logsumexp.dtype
    axis, n = spread.axis, spread.devices
    if n * (out.size + logsumexp.size) * acc.itemsize <= ONE_MESSAGE:
        flat = jnp.concatenate([out.astype(acc).reshape(-1), logsumexp.reshape(-1)])
        slots = jnp.zeros((n, flat.size), acc).at[lax.axis_index(axis)].set(flat)
        slots = lax.psum(slots, axis)
        outs = [row[: out.size].reshape(out.shape) for row in slots]
        found = softmax.merged_parts(
            [(o, row[out.size :].reshape(logsumexp.shape)) for o, row in zip(outs, slots, strict=True)], axes
        )
    else:
        most = lax.pmax(lax.stop_gradient(logsumexp), axis)
        found = softmax.merged_parts([(out.astype(acc), logsumexp)], axes, most, lambda x: lax.psum(x, axis))
    out = found[0].astype(out.dtype)
    return (out, found[1]) if return_logsumexp else out


# --- the order of tokens


def reorder(
    x: Num[Array, "..."], *, devices: int, axis: int = 1, order: Order = "zigzag"
) -> Num[Array, "..."]:
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
    x: Num[Array, "..."], *, devices: int, axis: int = 1, order: Order = "zigzag"
) -> Num[Array, "..."]:
    """The inverse of `reorder`: a whole array in its natural order again. Arguments as there."""
    return _reordered(x, devices, axis, order, restored=True)


def _reordered(x, devices: int, axis: int, order: Order, restored: bool):
    arguments.integer("devices", devices)
    arguments.integer("axis", axis)
    arguments.choice("order", order, _ORDERS)
    if devices < 1:
        raise ValueError(f"devices must be at least 1; got {devices}.")
    x = arguments.array("x", x)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be one of x, which has shape {x.shape}; got {axis}.")
    axis %= x.ndim
    parts, length = devices * _ORDERS[order], x.shape[axis]
    if length % parts:
        padded = -(-length // parts) * parts
        raise ValueError(
            f"x must have a length that is a multiple of {parts} along axis {axis}; got {length}. Pad the sequence to "
            f"{padded} and mask the padding with jax_fa.masks.Lengths."
        )
    return _Spread("", devices, order == "zigzag").shards(x, axis, restored)


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
    arguments.integer("length", length)
    arguments.choice("order", order, _ORDERS)
    devices = _devices(axis_name)
    if length % _ORDERS[order]:
        raise ValueError(f'order="zigzag" gives each device two chunks of equal length; got length={length}.')
    return _Spread(axis_name, devices, order == "zigzag").positions(lax.axis_index(axis_name), length)


def visited_tiles(
    mask: Mask | None, sq: int, skv: int, *, devices: int, order: Order = "contiguous", tile: int = 128
) -> np.ndarray:
    """How many tiles of `tile` rows and keys each device visits in a forward: how even the work is. Runs nothing.

    Args:
      mask: a mask whose values are known, or None.
      sq: the length of the whole query.
      skv: that of the keys.
      devices: how many devices the sequence is sharded over.
      order: see `sequence_parallel_attention`.
      tile: rows and keys of a tile; a shard (a chunk, with "zigzag") has whole tiles or is one.

    Returns:
      int64 array `(devices,)`.
    """
    spread = _Spread("", devices, order == "zigzag")
    rows, keys = sq // devices, skv // devices
    rules = masks.intervals(mask, (), 1, sq, skv)
    bounds = [
        np.broadcast_to(np.asarray(x if x is not None else fill), (1, sq)).reshape(-1)
        for x, fill in ((rules.lower, 0), (rules.upper, skv))
    ]
    found = np.zeros(devices, np.int64)
    for device in range(devices):
        at = np.asarray(spread.positions(device, rows))
        for source in range(devices):
            local = [
                _local_bound(x[at], spread.starts(source, keys), keys // spread.chunks, np) for x in bounds
            ]
            for i in range(0, rows, tile):
                lower, upper = (x[i : i + tile] for x in local)
                some = lower < upper
                if some.any():
                    found[device] += -(-int(upper[some].max()) // tile) - int(lower[some].min()) // tile
    return found


def _local_bound(bound, starts, length: int, xp=jnp):
    """A bound of all keys as one of chunks of keys that lie one after another: how many of them are below."""
    return sum(xp.clip(bound - start, 0, length) for start in starts)


# --- which shards go where


@dataclass(frozen=True)
class Schedule:
    """The steps of a ring: at which distances shards of keys are computed with, and how far each one goes.

    At distance d, device j + d has the shard of device j. Shards go forward from distance 1 on, and backward from -1 on.
    """

    visited: tuple[int, ...]
    reach: tuple[
        tuple[int, int], ...
    ]  # of each shard: the last distance forward, and backward (both positive)

    @classmethod
    def of(cls, seen: np.ndarray) -> "Schedule":
        """From which shards of keys each device needs, `[device, shard]`."""
        n = len(seen)
        needed = [{(i - j) % n for i in range(n) if seen[i, j]} for j in range(n)]
        every = sorted({0}.union(*needed))
        # The fewest steps leave out the widest gap on the circle of distances.
        gaps = [b - a for a, b in zip(every, [*every[1:], n], strict=True)]
        last = every[int(np.argmax(gaps[::-1])) * -1 - 1]  # of equal ones the last: rather forward
        visited = {d if d <= last else d - n for ds in needed for d in ds}
        reach = tuple(
            (max((d for d in ds if d <= last), default=0), max((n - d for d in ds if d > last), default=0))
            for ds in needed
        )
        return cls(tuple(sorted(visited)), reach)

    def far(self, sign: int) -> int:
        """The last distance of any shard."""
        return max(reach[sign < 0] for reach in self.reach)

    @property
    def distances(self) -> list[int]:
        return [*range(self.far(1) + 1), *(-d for d in range(1, self.far(-1) + 1))]

    def on(self, distance: int) -> list[tuple[int, int]]:
        """(source, target) of shards that go on to this distance."""
        sign = 1 if distance > 0 else -1
        n, before = len(self.reach), distance - sign
        going = [j for j, reach in enumerate(self.reach) if reach[sign < 0] >= abs(distance)]
        return [((j + before) % n, (j + distance) % n) for j in going]

    def home(self, distance: int) -> list[tuple[int, int]]:
        """(source, target) of gradients of the shards that have come to their last distance."""
        n, sign = len(self.reach), distance < 0
        return [((j + distance) % n, j) for j, reach in enumerate(self.reach) if reach[sign] == abs(distance)]


class _Block(NamedTuple):
    """Rows of this device and keys of one shard that are computed by one call."""

    rows: tuple[int, int]  # the first one and how many
    keys: tuple[int, int]
    length: int  # all keys of the shard
    row_start: Any  # the position of the first row
    starts: list[Any]  # the positions at which the equal chunks of keys begin


_BY_ROW = ("lower", "upper", "alibi_slopes", "position", "segment_row")
Keys = dict[str, Any]  # arrays stored like key and value: these, and their tangents
Visit = Callable[[Any, Keys, Any], tuple[Any, Keys | None]]


@dataclass(frozen=True)
class Shards:
    """Computes what a backend does (see `backends.Backend`) where keys lie on several devices."""

    axis: str
    devices: int
    zigzag: bool
    rows: bool
    travel: str | None  # how keys come to rows: "ring", "gather", or "stay": they do not
    schedule: Schedule | None
    row_parts: (
        int  # into how many calls the rows and keys of a shard are cut, where one cannot say where both lie
    )
    key_parts: int

    @property
    def axes(self) -> dict[str, int]:
        """The mesh axes over which devices communicate, and their sizes."""
        return {self.axis: self.devices}

    @property
    def _spread(self) -> _Spread:
        return _Spread(self.axis, self.devices, self.zigzag, self.rows)

    # --- what the primitives ask for

    def forward(self, call: Call) -> tuple[Any, ...]:
        problem, acc = self._problem(call), call.acc

        def visit(total, keys, source):
            for block in self._blocks(call, keys, source):
                saved = primitives.forward_saved(problem, self._operands(call, call.operands, keys, block))
                part = widened(saved.out, saved.rounding, acc), saved.m, saved.l
                whole = _Rows(call, block).of(total)
                total = _Rows(call, block).put(total, _joined(call.problem.out_axes, whole, part))
            return total, None

        start = (jnp.zeros(call.out_shape, acc), *softmax.start(call.stats_shape, acc))
        (sums, m, l), _ = self._around(call, _keys(call.operands), visit, start)
        exact = sums * softmax.rows_as_stored(softmax.inverse(l), call.problem.out_axes)
        if not call.problem.saves_rounding:
            return exact.astype(call.dtype), m, l
        out, lost = narrowed(exact, call.dtype)
        return out, m, l, (lost / rounding_unit(call.dtype)).astype(call.dtype)

    def backward(self, call: Call, saved: Saved) -> Operands:
        saved = call.full(saved)
        step = _Backward(self, call)

        def visit(sums, keys, source):
            back: Keys = {}
            for block in self._blocks(call, keys, source):
                operands = self._operands(call, call.operands, keys, block)
                found = primitives.backward(step.problem, operands, _Rows(call, block).saved(saved))
                sums, back = step.add(sums, back, found.present(), block)
            return sums, back

        return step.finish(*self._around(call, _keys(call.operands), visit, step.start(), saved))

    def tangent(self, call: Call, tangents: Operands, saved: Saved) -> tuple[Any, Any]:
        moved, tau = self._tangent(call, tangents, call.full(saved))
        return moved.astype(call.dtype), tau

    def _tangent(self, call: Call, tangents: Operands, saved: Saved) -> tuple[Any, Any]:
        """The tangents of out and log-sum-exp, as they are summed."""

        def visit(total, keys, source):
            for block in self._blocks(call, keys, source):
                rows = _Rows(call, block)
                own = self._own(call, tangents, keys, block)
                at = _At(call, own, rows.saved(saved))
                part = at.weighted(own.moved + at.row(own.tau) * at.apart), at.weight * own.tau
                total = rows.add(total, part)
            return total, None

        start = (jnp.zeros(call.out_shape, call.acc), jnp.zeros(call.stats_shape, call.acc))
        return self._around(call, _keys(call.operands, tangents), visit, start, saved)[0]

    def second(self, call: Call, tangents: Operands, saved: Saved) -> tuple[Operands, Any, Any]:
        saved, step = call.full(saved), _Backward(self, call)
        moved, tau = self._tangent(call, tangents, saved)

        def visit(sums, keys, source):
            back: Keys = {}
            for block in self._blocks(call, keys, source):
                rows = _Rows(call, block)
                own = self._own(call, tangents, keys, block)
                at = _At(call, own, rows.saved(saved))
                part = at.cotangents(*rows.of((moved, tau)))
                found = primitives.second(step.problem, own.operands, part, own.along)
                sums, back = step.add(sums, back, found, block)
            return sums, back

        start = step.start()
        gradients = step.finish(*self._around(call, _keys(call.operands, tangents), visit, start, saved))
        return gradients, moved.astype(call.dtype), tau

    def second_tangent(
        self, call: Call, tangents: Operands, others: Operands, saved: Saved
    ) -> tuple[Any, Any]:
        problem, saved = self._problem(call), call.full(saved)
        moved, tau = self._tangent(call, others, saved)
        travelling = _keys(call.operands, tangents)
        travelling |= {f"{name}_other": x for name, x in _keys(others).items()}

        def visit(total, keys, source):
            for block in self._blocks(call, keys, source):
                rows = _Rows(call, block)
                own = self._own(call, tangents, keys, block)
                at = _At(call, own, rows.saved(saved))
                other = self._operands(call, others, keys, block, "_other")
                both = primitives.second_tangent(problem, own.operands, own.saved, own.along, other)
                out_b, lse_b = primitives.tangent(problem, own.operands, own.saved, other)
                all_b, tau_b = rows.of((moved, tau))
                more = at.row(lse_b - tau_b) * (own.moved + at.row(own.tau) * at.apart)
                out = both[0] + at.row(both[1]) * at.apart + at.row(own.tau) * (out_b - all_b) + more
                part = at.weighted(out), at.weight * (both[1] + (lse_b - tau_b) * own.tau)
                total = rows.add(total, part)
            return total, None

        start = (jnp.zeros(call.out_shape, call.acc), jnp.zeros(call.stats_shape, call.acc))
        (out, lse), _ = self._around(call, travelling, visit, start, saved)
        return out.astype(call.dtype), lse

    def _own(self, call: Call, tangents: Operands, keys: Keys, block: _Block) -> "_Own":
        operands = self._operands(call, call.operands, keys, block)
        along = self._operands(call, tangents, keys, block, "_tangent")
        problem = replace(self._problem(call), saves_rounding=has_rounding(call.dtype))
        out, m, l, *rounding, moved, tau = primitives.jvp(problem, operands, along)
        saved = Saved(out=out, m=m, l=l, rounding=rounding[0] if rounding else None)
        return _Own(operands, along, saved, moved.astype(call.acc), tau)

    # --- what a call of one block takes

    def _problem(self, call: Call) -> Problem:
        return replace(call.problem, shards=None, saves_rounding=False)

    def _blocks(self, call: Call, keys: Keys, source) -> list[_Block]:
        """`source`: whose keys these are; None: those of all devices."""
        axis = call.problem.key_axes[call.problem.batch_rank]
        rows, length = call.dims.Sq, keys["key"].shape[axis]
        row_starts = [0]
        if self.rows:
            row_starts = self._spread.starts(lax.axis_index(self.axis), rows)
        starts = [0] if source is None else self._spread.starts(source, length)
        key_parts = 1 if source is None else self.key_parts
        row_size, size = rows // self.row_parts, length // key_parts
        return [
            _Block(
                rows=(p * row_size, row_size),
                keys=(q * size, size),
                length=length,
                row_start=row_starts[p],
                starts=starts if key_parts == 1 else starts[q : q + 1],
            )
            for p in range(self.row_parts)
            for q in range(key_parts)
        ]

    def _operands(self, call: Call, given: Operands, keys: Keys, block: _Block, suffix: str = "") -> Operands:
        """The operands of a block, or their tangents; what is stored by key is among `keys`, by its name and suffix."""
        problem = call.problem
        rank = problem.batch_rank

        def cut(name: str, x):
            if name in ("key", "value"):
                return _cut(keys[name + suffix], problem.axes(name)[rank], *block.keys)
            if name == "query":
                return _cut(x, problem.query_axes[rank], *block.rows)
            if name in ("bias", "mask"):
                return _columns(_cut(x, rank + 1, *block.rows), rank + 2, block)
            if name == "segment_key":
                return _columns(x, rank + 1, block)
            if name in _BY_ROW:
                x = _cut(x, rank + 1, *block.rows)
            if name in ("lower", "upper"):
                return _local_bound(x, block.starts, block.keys[1] // len(block.starts))
            return x - block.starts[0] if name == "position" else x

        found = given.map(cut)
        if found.dropout_seed is None:
            return found
        start = jnp.stack([jnp.asarray(block.row_start), jnp.asarray(block.starts[0])]).astype(jnp.uint32)
        return replace(found, dropout_start=masks.lead(start, rank + 1))

    # --- how keys come to rows

    def _around(
        self, call: Call, own: Keys, visit: Visit, carry, since: Saved | None = None
    ) -> tuple[Any, Keys | None]:
        """Visits the keys of all devices: the carry, and what `visit` gives back to the owners of the keys, summed.

        `since`: what is there before. Keys go around again in each pass, and are not kept from one to the next.
        """
        if self.travel == "ring":
            return self._ring(own, visit, carry, since)
        me = lax.axis_index(self.axis)
        if self.travel == "stay":
            return visit(carry, own, me)
        return self._gathered(call, own, visit, carry)

    def _send(self, x, pairs: list[tuple[int, int]]):
        return lax.ppermute(x, self.axis, pairs)

    def _ring(self, own: Keys, visit: Visit, carry, since) -> tuple[Any, Keys | None]:
        schedule, me = self.schedule, lax.axis_index(self.axis)
        assert schedule is not None
        steps = schedule.distances
        total = moving = None
        (here, _) = own, _ = _barrier((own, since), me)
        for distance, following in zip(steps, [*steps[1:], None], strict=True):
            sent = None
            if following is not None:
                sent = self._send(here if abs(following) > 1 else own, schedule.on(following))
            back = None
            if distance in schedule.visited:
                carry, back = _alone(visit, (carry, here, (me - distance) % self.devices), me)
            if distance == 0:
                total = back
            else:
                total, moving = self._homeward(schedule, distance, following, total, _sum(moving, back))
            # The send after the next waits for this step: two shards of others at a time, and not all of them.
            here, carry, total, moving = _barrier((sent, carry, total, moving), me)
        return carry, total

    def _homeward(self, schedule: Schedule, distance: int, following: int | None, total, moving):
        """Gradients go home from the last device that their keys visit, or on with their keys."""
        if moving is None:
            return total, None
        if pairs := schedule.home(distance):
            total = _sum(total, self._send(moving, pairs))
        on = following is not None and abs(following) > 1
        return total, self._send(moving, schedule.on(following)) if on else None

    def _gathered(self, call: Call, own: Keys, visit: Visit, carry) -> tuple[Any, Keys | None]:
        spread, axes = self._spread, _key_axes(call, own)
        whole = {
            name: spread.shards(lax.all_gather(x, self.axis, axis=axes[name], tiled=True), axes[name], True)
            for name, x in own.items()
        }
        carry, back = visit(carry, whole, None)
        back = back and {
            name: lax.psum_scatter(
                spread.shards(x, axes[name], False), self.axis, scatter_dimension=axes[name], tiled=True
            )
            for name, x in back.items()
        }
        return carry, back


def _keys(operands: Operands, tangents: Operands | None = None) -> Keys:
    """Key and value, and their tangents (those that are there), by name."""
    found = {name: getattr(operands, name) for name in ("key", "value")}
    if tangents is not None:
        found |= {f"{name}_tangent": getattr(tangents, name) for name in ("key", "value")}
    return {name: x for name, x in found.items() if x is not None}


def _key_axes(call: Call, keys: Keys) -> dict[str, int]:
    """Along which axis of each array the keys lie."""
    problem = call.problem
    return {name: problem.axes(name.split("_")[0])[problem.batch_rank] for name in keys}


@dataclass(frozen=True)
class _Rows:
    """The rows of a block, of what is stored like out and of statistics."""

    call: Call
    block: _Block

    def _axis(self, x) -> int:
        problem = self.call.problem
        like_out = x.ndim == problem.batch_rank + 3
        return problem.out_axes[problem.batch_rank] if like_out else problem.batch_rank + 1

    def of(self, arrays) -> list[Any]:
        return [_cut(x, self._axis(x), *self.block.rows) for x in arrays]

    def add(self, arrays, parts) -> tuple[Any, ...]:
        return self.put(arrays, [a + b for a, b in zip(self.of(arrays), parts, strict=True)])

    def put(self, arrays, parts) -> tuple[Any, ...]:
        first, count = self.block.rows
        if count == self.call.dims.Sq:
            return tuple(parts)
        pairs = zip(arrays, parts, strict=True)
        return tuple(lax.dynamic_update_slice_in_dim(x, part, first, self._axis(x)) for x, part in pairs)

    def saved(self, saved: Saved) -> Saved:
        return replace(saved, **dict(zip(saved.present(), self.of(saved.present().values()), strict=True)))


class _Own(NamedTuple):
    """The forward and tangent of one block: of its rows over its own keys alone."""

    operands: Operands
    along: Operands
    saved: Saved
    moved: Any  # the tangents of out
    tau: Any  # and of log-sum-exp


class _At:
    """How the results of one block enter those of all keys: `weight` is exp(lse_s - lse)."""

    def __init__(self, call: Call, own: _Own, whole: Saved) -> None:
        self.call, self.own, self.whole = call, own, whole
        part = own.saved
        self.weight = jnp.exp(part.m - whole.m) * part.l * softmax.inverse(whole.l)
        out, out_s = (widened(x.out, x.rounding, call.acc) for x in (whole, part))
        self.apart = out_s - out

    def row(self, x):
        """Statistics as factors of what is stored like out."""
        return softmax.rows_as_stored(x, self.call.problem.out_axes)

    def weighted(self, x):
        return self.row(self.weight) * x

    def cotangents(self, moved, tau) -> Saved:
        """What the block's own second takes; `moved` and `tau` are the tangents of out and log-sum-exp over all keys."""
        call, own, whole = self.call, self.own, self.whole
        dout = whole.dout.astype(call.acc)
        inner = _row_sum(
            dout * self.apart, call.problem.out_axes
        )  # the cotangent of lse_s is weight times this
        inner = inner if whole.dlogsumexp is None else inner + whole.dlogsumexp
        turned = own.tau - tau  # the tangent of the weight is weight times this
        inner_tangent = _row_sum(dout * (own.moved - moved), call.problem.out_axes) + turned * inner
        dout_tangent = self.row(turned) * dout
        if whole.dout_tangent is not None:
            given = whole.dout_tangent.astype(call.acc)
            dout_tangent = dout_tangent + given
            inner_tangent = inner_tangent + _row_sum(given * self.apart, call.problem.out_axes)
        if whole.dlogsumexp_tangent is not None:
            inner_tangent = inner_tangent + whole.dlogsumexp_tangent
        return replace(
            own.saved,
            dout=self.weighted(dout).astype(call.dtype),
            dlogsumexp=self.weight * inner,
            dout_tangent=self.weighted(dout_tangent).astype(call.dtype),
            dlogsumexp_tangent=self.weight * inner_tangent,
        )


class _Backward:
    """Sums of the gradients of blocks."""

    def __init__(self, shards: Shards, call: Call) -> None:
        self.call, self.wanted = call, call.gradient_names
        self.problem = replace(shards._problem(call), gradients=tuple(self.wanted))

    def _acc(self, name: str):
        return accumulator_dtype(getattr(self.call.operands, name).dtype)

    def start(self) -> dict[str, Any]:
        """Zeros for all but the gradients of key and value, which travel."""
        here = [name for name in self.wanted if name not in ("key", "value")]
        return {name: jnp.zeros(self.call.gradient_shape(name), self._acc(name)) for name in here}

    def add(self, sums: dict[str, Any], back: Keys, found: dict[str, Any], block: _Block):
        """(sums, what goes back) with the gradients of a block."""
        sums, back, problem = dict(sums), dict(back), self.call.problem
        rank = problem.batch_rank
        for name, part in found.items():
            part = part.astype(self._acc(name))
            if name in ("key", "value"):
                axis = problem.axes(name)[rank]
                if name not in back:
                    shape = list(part.shape)
                    shape[axis] = block.length
                    back[name] = jnp.zeros(shape, part.dtype)
                back[name] = _add(back[name], part, {axis: block.keys[0]})
            elif name == "bias":
                sums[name] = _add_columns(sums[name], part, rank, block)
            elif name == "query":
                sums[name] = _add(sums[name], part, {problem.query_axes[rank]: block.rows[0]})
            else:
                sums[name] = sums[name] + part
        return sums, back

    def finish(self, sums: dict[str, Any], back: Keys | None) -> Operands:
        found = sums | (back or {})
        operands = self.call.operands

        def of(name: str):
            x = found.get(name)
            dtype = getattr(operands, name).dtype
            return jnp.zeros(self.call.gradient_shape(name), dtype) if x is None else x.astype(dtype)

        return Operands(**{name: of(name) for name in self.wanted})


# --- arrays


# XLA for CPU drops barriers before it fuses and schedules: it would begin all steps at once. But it does not know that a
# device's index is not negative, so that a branch is a barrier.


def _alone(fn: Callable[..., Any], args: tuple, me):
    """`fn(*args)`, where nothing of it begins before all of the arguments are there."""

    def cpu(args, me):
        def never(*args):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, *args))

        return lax.cond(me < 0, never, fn, *args)

    return lax.platform_dependent(
        args, me, cpu=cpu, default=lambda args, me: fn(*lax.optimization_barrier(args))
    )


def _barrier(x, me):
    """x, where nothing that takes a part of it begins before all of it is there."""
    return _alone(lambda x: x, (x,), me)


def _cut(x, axis: int, first: int, count: int):
    """A part of an axis; one of size 1 broadcasts and stays."""
    return x if x.shape[axis] in (1, count) else lax.slice_in_dim(x, first, first + count, axis=axis)


def _columns(x, axis: int, block: _Block):
    """Those of a block's keys, of an array with all keys along the axis."""
    if x.shape[axis] == 1:
        return x
    chunk = block.keys[1] // len(block.starts)
    parts = [lax.dynamic_slice_in_dim(x, start, chunk, axis) for start in block.starts]
    return jnp.concatenate(parts, axis) if len(parts) > 1 else parts[0]


def _add(total, part, at: dict[int, Any]):
    """`total` with `part` added from the indices `at` on, by axis."""
    if total.shape == part.shape:
        return total + part
    start = [
        jnp.asarray(at.get(axis, 0) if size != 1 else 0, jnp.int32) for axis, size in enumerate(total.shape)
    ]
    before = lax.dynamic_slice(total, start, part.shape)
    return lax.dynamic_update_slice(total, before + part, start)


def _add_columns(total, part, rank: int, block: _Block):
    """The gradient of a bias with that of a block."""
    rows = {rank + 1: block.rows[0]}
    if total.shape[-1] == 1:
        return _add(total, part, rows)
    chunks = jnp.split(part, len(block.starts), axis=-1)
    for start, chunk in zip(block.starts, chunks, strict=True):
        total = _add(total, chunk, rows | {rank + 2: start})
    return total


def _sum(a, b):
    """Of two trees; None: 0."""
    return b if a is None else a if b is None else jax.tree.map(jnp.add, a, b)


def _row_sum(x, axes: Axes):
    """The sums of rows of what is stored in the order of `axes`, as statistics."""
    return jnp.swapaxes(jnp.sum(x.transpose(axes), axis=-1), -1, -2)


def _joined(axes: Axes, whole, part):
    """(sum, m, l) with another part of the keys, of which the sum is given divided by l."""
    (acc, m_a, l_a), (out, m_b, l_b) = whole, part
    m = jnp.maximum(m_a, m_b)
    a, b = jnp.exp(m_a - m), jnp.exp(m_b - m) * l_b
    return acc * softmax.rows_as_stored(a, axes) + out * softmax.rows_as_stored(b, axes), m, l_a * a + b
