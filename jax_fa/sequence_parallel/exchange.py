"""The strategies that need no steps: heads in place of rows (Ulysses), and partial results that are reduced."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fa import api, dropout, entry, masks, softmax
from jax_fa.masks import Mask
from jax_fa.sequence_parallel.local import Local
from jax_fa.sequence_parallel.order import Spread


def ulysses(local: Local, shards: dict[str, Any], options: dict[str, Any]) -> entry.Request:
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


def all_reduced(request: entry.Request, spread: Spread, result, return_logsumexp: bool):
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
