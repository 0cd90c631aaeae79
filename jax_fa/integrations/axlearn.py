"""The attention of axlearn's `FlashAttention` layers, with its bias objects, in O(S) memory where these are intervals.

axlearn is not imported: biases are taken for what they hold.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_fa import api, arguments, backends, indices
from jax_fa.integrations import structure
from jax_fa.masks import Band, Dense, Mask

_NEEDED = ("query", "key", "value", "bias")
_ALLOWED = (*_NEEDED, "prng_key", "logit_sink")


def flash_attention(
    input_batch: dict[str, Any],
    *,
    softmax_scale: Any = 1.0,
    dropout_rate: Any = 0.0,
    implementation: backends.Implementation = None,
):
    """What a `BaseFlashAttention` of axlearn computes for its input batch.

    Args:
      input_batch: a dict of query `(B, T, N, D)`, key and value `(B, S, K, D)`, bias (a `BaseAttentionBias` or None), and
        where they are needed prng_key (a `jax.random` key, for dropout) and logit_sink `(N,)`. Key and value are cast to
        query's dtype.
      softmax_scale: factor of the logits, as in the config.
      dropout_rate: in [0, 1), as in the config. The bits are ours (`jax_fa.dropout_mask`).
      implementation: None (the best backend that can), or the name of a backend: see `jax_fa.explain`.

    Causal masks, `sliding_window_causal_mask` and segment IDs stay structured, with target_positions too, unless
    source_positions are not known when tracing to be 0, 1, 2, ...: pass `np.arange(S)[None]`, since what JAX makes under
    `jax.jit` is traced. Other mask functions and boolean biases become one boolean array, numeric biases one bias.

    Returns:
      Shape `(B, T, N, D)`, query's dtype. A fully masked row is 0.

    Raises:
      ValueError: entries that are missing or do not fit.
      NotImplementedError: entries that are not served, such as page_tables.
    """
    missing = [name for name in _NEEDED if name not in input_batch]
    if missing:
        raise ValueError(
            f"input_batch must have the entries {_NEEDED}; {missing} are missing of {sorted(input_batch)}."
        )
    others = [name for name, x in input_batch.items() if name not in _ALLOWED and x is not None]
    if others:
        raise NotImplementedError(
            f"input_batch must have no entries but {_ALLOWED}; got {others}. A cache in pages: jax_fa.paged_attention."
        )
    query = arguments.array("query", input_batch["query"])
    parts = _Parts()
    parts.add(input_batch["bias"])
    return api.flash_attention(
        query,
        *(arguments.array(name, input_batch[name]).astype(query.dtype) for name in ("key", "value")),
        bias=parts.bias,
        mask=structure.joined(*parts.masks),
        scale=softmax_scale,
        sinks=input_batch.get("logit_sink"),
        implementation=implementation,
        **_dropout(dropout_rate, input_batch.get("prng_key")),
    )


def _dropout(rate, key) -> dict[str, Any]:
    arguments.number("dropout_rate", rate, "a number in [0, 1)")
    if arguments.is_zero(rate):
        return {}
    if key is None:
        raise ValueError(f"prng_key must be a jax.random key where dropout_rate={rate}; got None.")
    arguments.random_key("prng_key", key)
    return {"dropout_rate": rate, "dropout_key": key}


class _Parts:
    """A bias of axlearn, taken apart: masks that are joined, and the sum of what is added."""

    def __init__(self) -> None:
        self.masks: list[Mask] = []
        self.bias: Any = None

    def add(self, bias: Any) -> None:
        if bias is None:
            return
        if hasattr(bias, "biases"):  # CompositeAttentionBias
            for one in bias.biases:
                self.add(one)
        elif hasattr(bias, "segment_ids"):  # SegmentIdAttentionBias
            self.masks.append(structure.segments(indices.int32(bias.segment_ids)))
        elif hasattr(bias, "mask") and hasattr(bias, "target_positions"):  # MaskFnAttentionBias
            self.masks.append(_of_function(bias))
        elif hasattr(bias, "bool_value"):
            value = bias.bool_value()
            if value is not None:
                self.masks.append(Dense(value))
        elif hasattr(bias, "value"):
            value = bias.value()
            if value is not None:
                self.bias = value if self.bias is None else self.bias + value
        else:
            raise TypeError(
                f"bias must be a BaseAttentionBias of axlearn or None; got {arguments.shown(bias)}."
            )


def _of_function(bias: Any) -> Mask:
    """A causal mask and a causal window are bands; of other functions the whole array."""
    # Of the mask function, or in newer releases of the bias.
    size = getattr(bias.mask, "_sliding_window_size", getattr(bias, "sliding_window_size", None))
    if size is None and getattr(bias.mask, "__name__", "") != "causal_mask":
        return Dense(bias.bool_value())
    if not _counts(getattr(bias, "source_positions", None)):
        return Dense(bias.bool_value())
    return Band(size, 0, offset=_offset(bias.target_positions))


def _counts(positions: Any) -> bool:
    """Whether the keys are known, when tracing, to stand at 0, 1, 2, ...; older releases have no positions of keys."""
    if positions is None:
        return True
    values = indices.known(positions)
    return values is not None and bool(np.all(values == np.arange(values.shape[-1])))


def _offset(positions: Any):
    """How far the positions of the rows lie behind their indices: one for a batch entry, or one for a row."""
    if positions is None:
        return 0
    positions = indices.int32(positions)
    if positions.ndim == 1:
        return positions[:, None, None]
    if positions.ndim != 2:
        raise ValueError(f"target_positions must have shape (B,) or (B, T); got {positions.shape}.")
    return (positions - jnp.arange(positions.shape[1], dtype=jnp.int32))[:, None, :]
