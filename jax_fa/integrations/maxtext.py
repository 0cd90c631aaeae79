"""`AttentionOp.apply_attention` of MaxText, in O(S) memory: packed sequences, windows, chunks, sinks, decoding.

from maxtext.layers.attention_op import AttentionOp
AttentionOp.apply_attention = apply_attention
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_fa import api, arguments, indices
from jax_fa.integrations import structure
from jax_fa.masks import Band, Mask, Rows

# MaxText's marks: the mode of a decoding step, and the segment ID of the cache's slots that are in use.
_DECODING, _IN_USE = "autoregressive", 1
_MODES = ("train", "prefill", _DECODING)


def apply_attention(
    self,
    query,
    key,
    value,
    decoder_segment_ids,
    segment_positions,
    lengths,
    model_mode: str,
    use_ragged_attention: bool = False,
    previous_chunk=None,
    bidirectional_mask=None,
    sinks=None,
    indexer_mask=None,
    compressed_mask=None,
    record_max_logits: bool = False,
    decoder_segment_ids_kv=None,
    pad_kv_total: int = 0,
    compress_ratio: int = 0,
    *,
    qk_product_einsum=jnp.einsum,
    wv_product_einsum=jnp.einsum,
):
    """`AttentionOp.apply_attention`, argument for argument: a method to put in its place.

    Args:
      self: the `AttentionOp`, of which attention_type, sliding_window_size, chunk_attn_window_size, attn_logits_soft_cap
        and the size of context parallelism are read.
      query: shape `(B, T, N, D)`, scaled already: MaxText's layers fold the factor into the query.
      key: shape `(B, S, K, D)`, N a multiple of K. Quantized tensors are dequantized.
      value: shape `(B, S, K, Dv)`; likewise.
      decoder_segment_ids: int, shape `(B, S)`, or `(B, T)` with decoder_segment_ids_kv; None: one sequence. Keys of
        negative IDs are masked. In decoding, 1 marks the slots of the cache that are in use.
      segment_positions: only needed with load-balanced context parallelism, which is refused.
      lengths, use_ragged_attention: for MaxText's ragged kernels; the segment IDs say the same.
      model_mode: "train", "prefill" or "autoregressive".
      previous_chunk: the keys before this chunk of a prefill, shape `(B, P, ...)`: the queries stand at P and after.
      bidirectional_mask: boolean, shape `(B, S)`: each run of True is visible to itself in both directions.
      sinks: shape `(N,)`: one more logit of each head, without a value.
      indexer_mask, compressed_mask, record_max_logits, pad_kv_total, compress_ratio: must be at their defaults.
      decoder_segment_ids_kv: int, shape `(B, S)`: the IDs of the keys; None: decoder_segment_ids.
      qk_product_einsum, wv_product_einsum: must be `jnp.einsum`: no other product runs in the kernels.

    Returns:
      `(out, None, None)` with out of shape `(B, T, N, Dv)`; in decoding `(out, max, sum)`, from which MaxText's own code
      joins the two parts of its cache: out is normalized, max is the log-sum-exp and sum is 1, both `(B, T, N, 1)`.

    Raises:
      ValueError: shapes or values that do not fit.
      NotImplementedError: what the kernels do not have, by the name of its argument.
    """
    _check_defaults(
        indexer_mask=indexer_mask,
        compressed_mask=compressed_mask,
        record_max_logits=record_max_logits,
        pad_kv_total=pad_kv_total,
        compress_ratio=compress_ratio,
    )
    _check_einsum(qk_product_einsum=qk_product_einsum, wv_product_einsum=wv_product_einsum)
    if model_mode not in _MODES:
        raise ValueError(f"model_mode must be one of {_MODES}; got {model_mode!r}.")
    decoding = model_mode == _DECODING
    query, key, value = _array("query", query), _array("key", key), _array("value", value)
    _check_parallelism(self)
    first = 0 if previous_chunk is None else previous_chunk.shape[1]
    if decoding and previous_chunk is None and query.shape[1] == 1:
        first = key.shape[1] - 1
    rows, keys = query.shape[1], key.shape[1]
    packed = _packed(decoder_segment_ids, decoder_segment_ids_kv, rows, keys, decoding, previous_chunk)
    mask = _of_type(self, packed, rows, keys, first, decoding)
    if bidirectional_mask is not None:
        mask = _with_images(mask, bidirectional_mask, rows, keys)
    dtype = jnp.result_type(query, key, value)
    found = api.flash_attention(
        *(x.astype(dtype) for x in (query, key, value)),
        mask=mask,
        scale=1.0,
        logits_soft_cap=self.attn_logits_soft_cap,
        sinks=sinks,
        return_logsumexp=decoding,
    )
    if not decoding:
        return found.astype(query.dtype), None, None
    out, logsumexp = found
    logsumexp = jnp.swapaxes(logsumexp, -1, -2)[..., None]
    return out.astype(query.dtype), logsumexp, jnp.ones_like(logsumexp)


def _array(name: str, x):
    return arguments.array(name, x.dequant() if hasattr(x, "dequant") else x)


def _check_defaults(**given) -> None:
    for name, x in given.items():
        if x is not None and not (isinstance(x, (bool, int)) and not x):
            raise NotImplementedError(
                f"{name} must be left at its default: jax_fa has no such attention; got {arguments.shown(x)}."
            )


def _check_einsum(**given) -> None:
    for name, einsum in given.items():
        if einsum is not jnp.einsum:
            raise NotImplementedError(
                f"{name} must be jnp.einsum: jax_fa computes its products in kernels, where no quantized einsum can run; "
                f"got {arguments.shown(einsum)}. Set kv_quant to None."
            )


def _check_parallelism(op) -> None:
    # Newer releases derive it from the mesh and the rules of its axes, and older ones have it among their settings.
    derived = getattr(op, "_context_parallel_size", None)
    size = getattr(op.config, "context_parallel_size", 1) if derived is None else derived()
    if size > 1:
        raise NotImplementedError(
            f"The size of context parallelism must be 1; got {size}. A sequence over several devices: "
            "jax_fa.sequence_parallel_attention."
        )
    if getattr(op.config, "moba", False):
        raise NotImplementedError("config.moba must be False: jax_fa has no mixture of block attention.")


def _packed(ids, of_keys, rows: int, keys: int, decoding: bool, previous) -> Mask | None:
    """The mask of packed sequences, or of a cache's slots that are in use."""
    if ids is None:
        return None
    ids = arguments.array("decoder_segment_ids", ids)
    column = ids if of_keys is None else arguments.array("decoder_segment_ids_kv", of_keys)
    if decoding:
        return structure.segments(jnp.full((rows,), _IN_USE, jnp.int32), indices.int32(ids))
    if previous is not None:
        ids = ids[:, previous.shape[1] : previous.shape[1] + rows]
    for name, x, size in (("decoder_segment_ids", ids, rows), ("decoder_segment_ids of keys", column, keys)):
        if x.ndim != 2 or x.shape[1] != size:
            raise ValueError(f"{name} must have shape (B, {size}); got {x.shape}.")
    # Every negative ID of a key masks it.
    ids, column = (jnp.maximum(indices.int32(x), -1) for x in (ids, column))
    return structure.segments(ids, column, padding=-1)


def _of_type(op, packed: Mask | None, rows: int, keys: int, first: int, decoding: bool) -> Mask | None:
    """The mask of the layer's attention_type, joined with that of packed sequences."""
    kind = getattr(op.attention_type, "value", op.attention_type)
    if kind not in ("global", "local_sliding", "chunk", "mla", "full"):
        raise NotImplementedError(
            f"attention_type must be global, local_sliding, chunk, mla or full; got {arguments.shown(op.attention_type)}."
        )
    causal = None if decoding or kind == "full" else Band(None, 0, offset=first)
    if packed is None and causal is None:
        return None
    more: Any = None
    if kind == "local_sliding":
        size = structure.window("sliding_window_size", op.sliding_window_size)
        more = Band(size - 1, 0, offset=first)
    elif kind == "chunk":
        size = structure.window("chunk_attn_window_size", op.chunk_attn_window_size)
        more = structure.chunks(size, rows, keys, first) & Band(None, 0, offset=first)
    return structure.joined(packed, causal, more)


def _with_images(mask: Mask | None, image, rows: int, keys: int) -> Mask | None:
    """Runs of True are visible to themselves, beside what the mask shows."""
    if mask is None:
        return None
    image = arguments.array("bidirectional_mask", image)
    if image.ndim != 2 or image.shape[1] != keys or rows != keys:
        raise ValueError(
            f"bidirectional_mask must have shape (B, S) with as many queries as keys, S={keys}; got {image.shape} and "
            f"{rows} queries."
        )
    return mask | _Runs(*_bounds(image.astype(jnp.bool_)))


@dataclass(frozen=True)
class _Runs(Mask):
    """`visible(b, i, j) = lower[b, i] <= j < upper[b, i]`. (Two masks of segment IDs would have no union.)"""

    lower: Any  # B S int32
    upper: Any

    def rows(self, rows: Rows, skv) -> tuple[Any, Any]:
        return rows.of(self.lower[:, None]), rows.of(self.upper[:, None])


def _bounds(image) -> tuple[Any, Any]:
    """Of every position, where its run of True begins and ends; 0 and 0 outside of runs."""
    here = jnp.arange(image.shape[1], dtype=jnp.int32)
    starts = image & ~jnp.pad(image, ((0, 0), (1, 0)))[:, :-1]
    first = jax.lax.cummax(jnp.where(starts, here, 0), axis=1)
    end = jax.lax.cummin(jnp.where(image, jnp.int32(image.shape[1]), here), axis=1, reverse=True)
    return jnp.where(image, first, 0), jnp.where(image, end, 0)
