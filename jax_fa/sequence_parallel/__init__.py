"""The entry: `sequence_parallel_attention`."""

from dataclasses import replace
from typing import Any, Literal

from jaxtyping import ArrayLike, Bool, Float, Num

from jax_fa import api, arguments, backends, entry
from jax_fa.call import STORED
from jax_fa.flex.masks import functions_of
from jax_fa.masks import Mask
from jax_fa.sequence_parallel.exchange import all_reduced, ulysses, with_largest
from jax_fa.sequence_parallel.local import Local, check_varying
from jax_fa.sequence_parallel.order import ORDERS, Order, Spread, devices_of, position_ids, reorder, restore
from jax_fa.sequence_parallel.visibility import visited_tiles

__all__ = [
    "Order",
    "Strategy",
    "position_ids",
    "reorder",
    "restore",
    "sequence_parallel_attention",
    "visited_tiles",
]

Strategy = Literal["ring", "all_gather", "ulysses", "all_reduce"]
_STRATEGIES = {"ring": "ring", "all_gather": "gather", "ulysses": None, "all_reduce": "stay"}


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
    sinks: Float[ArrayLike, "..."] | None = None,
    return_max_logits: bool = False,
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
        to the next ⌈(w - 1) / Skv⌉ devices.
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
      sinks: as in `flash_attention`, the same on every device. Every row has one sink, whatever the number of devices.
      return_max_logits: also return the largest logit of every head, over the rows of all devices.

    Returns:
      As `flash_attention` of this device's rows: the output `(*B, Sq, N, Dv)` in query's dtype, with return_logsumexp
      the log-sum-exp `(*B, N, Sq)`, float32 (float64 for float64 inputs), and with return_max_logits the largest logits
      `(*B, N)`, the same on every device, which take one all-reduce. The first two have jvp, gradients and second
      derivatives.

    Raises:
      ValueError: a call outside of `shard_map`, an axis that is not manual, shapes that do not fit together, a number of
        heads that the strategy cannot split, an order that cannot split the shards.
      TypeError: dtypes that do not fit.
      NotImplementedError: the backend named cannot serve the calls on a device; third derivatives, but
        those in forward mode with strategy="ulysses".

    Source: arXiv:2310.01889 (ring), arXiv:2309.14509 (Ulysses), arXiv:2311.09431 (balanced orders).
    """
    devices = devices_of(axis_name)
    arguments.choice("strategy", strategy, _STRATEGIES)
    arguments.choice("order", order, ORDERS)
    arguments.flag("return_logsumexp", return_logsumexp)
    arguments.flag("return_max_logits", return_max_logits)
    spread = Spread(axis_name, devices, order == "zigzag", strategy != "all_reduce")
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
        "sinks": sinks if sinks is None else arguments.array("sinks", sinks),
        "return_max_logits": bool(return_max_logits),
    }
    # A call of the shards alone: what is wrong with their shapes and dtypes is wrong here, too.
    request = entry.request_of(api.flash_attention, **operands, **options)
    check_varying(spread, operands)
    local = Local(request, spread, None if bias is None else arguments.array("bias", bias), _mask(mask))
    if strategy == "ulysses":
        return ulysses(local, operands, options)
    local.check_chunks()
    if strategy == "all_reduce" and options["sinks"] is not None:  # which every row has once
        request = entry.request_of(api.flash_attention, **operands, **options | {"sinks": None})
    request = replace(request, call=local.call(_STRATEGIES[strategy]))
    if strategy != "all_reduce":
        return replace(
            request, finish=lambda result: with_largest(request.finish(result), options, axis_name)
        )
    return replace(
        request, finish=lambda result: all_reduced(request, spread, result, options, bool(return_logsumexp))
    )


def _mask(mask) -> Mask | None:
    found = None if mask is None else api.one_mask(mask)
    if functions_of(found):
        raise NotImplementedError(
            "sequence_parallel_attention does not support a BlockMask: shards of a sequence are told apart by intervals, segment "
            "IDs or a boolean array."
        )
    return found
