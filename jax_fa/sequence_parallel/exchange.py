"""The strategies that need no steps: heads in place of rows (Ulysses), and partial results that are reduced."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fa import api, checks, dropout, entry, masks, softmax
from jax_fa.masks import Mask
from jax_fa.sequence_parallel.local import Local
from jax_fa.sequence_parallel.order import Spread


def ulysses(local: Local, shards: dict[str, Any], options: dict[str, Any]) -> entry.Request:
    """The request of all rows and keys and of N / n heads."""
    exchange, d, call = _Exchange(local), local.dims, local.request.call
    rank = len(d.B)
    seq, head = (call.problem.query_axes[at] for at in (rank, rank + 1))
    arrays = {}
    for name, x in shards.items():
        if name != "query" and d.K < exchange.devices:
            x = jnp.repeat(x, exchange.devices // d.K, axis=head)
        arrays[name] = exchange.to_heads(x, head, seq)
    mask = None
    if local.mask is not None:
        mask = masks.replaced(exchange.of_mask, local.mask)
    bias = checks.bias(local.bias, (*d.B, d.N, d.Sq, local.full[1]), call.acc)
    options = options | {
        "bias": None if bias is None else exchange.of_rows(bias),
        "mask": mask,
        "alibi_slopes": exchange.of_heads(options["alibi_slopes"], -1),
        **{name: exchange.of_heads(options[name], -3) for name in ("scale", "logits_soft_cap")},
        "sinks": exchange.of_heads(options["sinks"], -1),
    }
    request = entry.request_of(api.flash_attention, **arrays, **options)
    whole, operands = request.call, request.call.operands
    if operands.dropout_stream is not None:
        stream = exchange.of_heads(dropout.streams(d.B, d.N), -2)
        whole = whole.replace(operands=replace(operands, dropout_stream=stream))

    def finish(result):
        out, logsumexp, largest = _results(request.finish(result), options)
        out = exchange.to_rows(out, head, seq)
        if logsumexp is not None:
            logsumexp = exchange.to_rows(logsumexp, rank, rank + 1)
        if largest is not None:
            largest = exchange.of_all_heads(largest)
        return _given(out, logsumexp, largest)

    return replace(request, call=whole, finish=finish)


class _Exchange:
    """Between a device's rows of all heads and all rows of a device's heads."""

    def __init__(self, local: Local) -> None:
        d, self.local, self.spread = local.dims, local, local.spread
        n = self.devices = self.spread.devices
        if d.N % n or (d.K % n and n % d.K):
            raise ValueError(
                f'strategy="ulysses" splits heads over the {n} devices of axis {self.spread.axis!r}: N must be a multiple of '
                f'{n}, and K a multiple or a divisor of it; got N={d.N}, K={d.K}. strategy="ring" serves any number of heads.'
            )
        local.check_chunks()

    def to_heads(self, x, head: int, seq: int):
        x = lax.all_to_all(x, self.spread.axis, split_axis=head, concat_axis=seq, tiled=True)
        return self.spread.shards(x, seq, restored=True)

    def to_rows(self, x, head: int, seq: int):
        x = self.spread.shards(x, seq, restored=False)
        return lax.all_to_all(x, self.spread.axis, split_axis=seq, concat_axis=head, tiled=True)

    def of_heads(self, x, axis: int):
        """This device's heads, which lie along the axis (counted from the end), of what all devices have."""
        N = self.local.dims.N
        if x is None or np.ndim(x) < -axis or np.shape(x)[axis] != N:
            return x
        count = N // self.devices
        first = lax.axis_index(self.spread.axis) * count
        return lax.dynamic_slice_in_dim(jnp.asarray(x), first, count, np.ndim(x) + axis)

    def of_all_heads(self, largest):
        """The largest logits `*B N`, from those of this device's heads."""
        shape = (*largest.shape[:-1], self.local.dims.N)
        at = lax.axis_index(self.spread.axis) * largest.shape[-1]
        none = jnp.full(shape, -softmax.FLT_MAX, largest.dtype)
        return _largest(lax.dynamic_update_slice_in_dim(none, largest, at, -1), self.spread.axis)

    def of_rows(self, x):
        """A bias or mask `... #N #Sq #Skv` with all rows, of this device's heads."""
        x = masks.lead(x, max(x.ndim, 3))
        head, seq = x.ndim - 3, x.ndim - 2
        if x.shape[seq] == 1:
            return self.of_heads(x, -3)
        if x.shape[head] != 1:
            return self.to_heads(x, head, seq)
        gathered = lax.all_gather(x, self.spread.axis, axis=seq, tiled=True)
        return self.spread.shards(gathered, seq, restored=True)

    def of_mask(self, mask: Mask) -> Mask:
        d, (sq, skv) = self.local.dims, self.local.full
        if isinstance(mask, masks.Dense):
            mask.check(d.B, d.N, d.Sq, skv)
            return masks.Dense(self.of_rows(jnp.asarray(mask.array)))
        if isinstance(mask, masks.Band) and np.ndim(mask.offset) == len(d.B) + 2:
            mask.check(d.B, d.N, sq, skv)
            return masks.Band(mask.left, mask.right, mask.align, self.of_heads(mask.offset, -2))
        return mask


# Partial results of so many bytes, over all devices, take one all-reduce, in which each device fills a slot of its own:
# that takes n times the bytes, and half the latency, of one for the max and one for the sums.
ONE_MESSAGE = 2**20


def all_reduced(
    request: entry.Request, spread: Spread, result, options: dict[str, Any], return_logsumexp: bool
):
    """The results over all keys, from those over the keys of each device."""
    out, logsumexp, largest = _results(request.finish(result), options)
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
    if options["sinks"] is not None:
        found = _with_sinks(*found, options["sinks"], axes)
    if largest is not None:
        largest = _largest(largest, axis)
    return _given(found[0].astype(out.dtype), found[1] if return_logsumexp else None, largest)


def _with_sinks(out, logsumexp, sinks, axes) -> tuple[Any, Any]:
    """The results over keys and sinks, from those over keys. No cotangent of a fully masked row's output reaches a sink."""
    sinks, empty = sinks.astype(logsumexp.dtype)[..., None], logsumexp <= -softmax.FLT_MAX
    share = softmax.rows_as_stored(softmax.shares(logsumexp - sinks)[0], axes)
    m, l = softmax.with_sink(logsumexp, jnp.where(empty, 0.0, 1.0), sinks)
    return jnp.where(softmax.rows_as_stored(empty, axes), 0, out * share), softmax.logsumexp(m, l)


def with_largest(found: Any, options: dict[str, Any], axis: str) -> Any:
    """The results of a device's rows, with the largest logits of all devices where they are asked for."""
    out, logsumexp, largest = _results(found, options)
    return found if largest is None else _given(out, logsumexp, _largest(largest, axis))


def _largest(x, axis: str):
    return lax.pmax(lax.stop_gradient(x), axis)


def _results(found: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(out, log-sum-exp, largest logits) of what `flash_attention` returns with these options; None: not asked for."""
    asked = (True, options["return_logsumexp"], options["return_max_logits"])
    given = iter(found if isinstance(found, tuple) else (found,))
    out, logsumexp, largest = (next(given) if wanted else None for wanted in asked)
    return out, logsumexp, largest


def _given(out, *others: Any) -> Any:
    """The output, or a tuple of it and those of the others that are there."""
    found = [x for x in others if x is not None]
    return (out, *found) if found else out
