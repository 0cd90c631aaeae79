"""Attention for Haiku: `MultiHeadAttention`, which takes the parameters of `haiku.MultiHeadAttention`."""

from typing import Any

import haiku as hk
import jax.numpy as jnp
import numpy as np

from jax_fa import api, arguments, backends, masks
from jax_fa.masks import Mask


class MultiHeadAttention(hk.MultiHeadAttention):
    """`haiku.MultiHeadAttention` in O(S) memory: the same parameters, under the same names."""

    def __init__(self, *args: Any, implementation: backends.Implementation = None, **kwargs: Any) -> None:
        """Takes the arguments of `haiku.MultiHeadAttention`, and:

        Args:
          implementation: None (the best backend that can), or the name of a backend: see `jax_fa.explain`.
        """
        super().__init__(*args, **kwargs)
        backends.chosen(implementation)
        self.implementation = implementation

    def __call__(self, query, key, value, mask=None, *, dropout_rate=0.0, dropout_key=None):
        """Attention with any number of leading batch dims `*B`.

        Args:
          query: shape `(*B, Sq, Dq)`.
          key: shape `(*#B, Skv, Dk)`; fewer or smaller batch dims are broadcast.
          value: shape `(*#B, Skv, Dv)`.
          mask: an array of rank `*B` + 3, broadcastable to `(*B, num_heads, Sq, Skv)`, of any dtype, nonzero =
            visible; or a mask of `jax_fa.masks`.
          dropout_rate: probability in [0, 1) of dropping an attention weight: 0 (the default) outside of training.
          dropout_key: a `jax.random` key; None: `haiku.next_rng_key()`, where the rate is not 0.

        Returns:
          Shape `(*B, Sq, model_size)`. A fully masked row is the output projection of 0.

        Raises:
          ValueError: shapes that do not fit.
          TypeError: dtypes that do not fit.
        """
        given = (("query", query), ("key", key), ("value", value))
        query, key, value = (_checked(name, x, query) for name, x in given)
        heads = (
            self._linear_projection(query, self.key_size, "query"),
            self._linear_projection(key, self.key_size, "key"),
            self._linear_projection(value, self.value_size, "value"),
        )
        dtype = jnp.result_type(*heads)
        batch = query.shape[:-2]
        out = api.flash_attention(
            *(_over(batch, x).astype(dtype) for x in heads),
            mask=_mask(mask, rank=len(batch) + 3),
            **_dropout(dropout_rate, dropout_key),
            implementation=self.implementation,
        )
        project = hk.Linear(self.model_size, w_init=self.w_init, with_bias=self.with_bias, b_init=self.b_init)
        return project(out.reshape(*query.shape[:-1], out.shape[-2] * out.shape[-1]))


def _checked(name: str, x, query):
    x, batch = arguments.array(name, x), np.shape(query)[:-2]
    if x.ndim < 2:
        raise ValueError(f"{name} must have at least 2 dimensions (*B, length, size); got shape {x.shape}.")
    if not masks.broadcasts(x.shape[:-2], batch):
        raise ValueError(
            f"{name} must have batch dims that broadcast to query's {batch}; got shape {x.shape}."
        )
    return x


def _over(batch: tuple[int, ...], x):
    """The heads `*#B S N D` over all batch dims."""
    return x if x.shape[:-3] == batch else jnp.broadcast_to(x, (*batch, *x.shape[-3:]))


def _dropout(rate, key) -> dict[str, Any]:
    arguments.number("dropout_rate", rate, "a number in [0, 1)")
    if arguments.is_zero(rate):
        return {}
    return {"dropout_rate": rate, "dropout_key": hk.next_rng_key() if key is None else key}


def _mask(mask, rank: int) -> Mask | None:
    if mask is None or isinstance(mask, Mask):
        return mask
    if isinstance(mask, (bool, type)) or (
        isinstance(mask, (list, tuple)) and any(isinstance(m, Mask) for m in mask)
    ):
        return api.one_mask(mask)
    mask = arguments.array("mask", mask)
    if mask.ndim != rank:
        raise ValueError(
            f"mask must have {rank} dimensions (*B, num_heads, Sq, Skv); got shape {mask.shape}."
        )
    return masks.Dense(mask.astype(jnp.bool_))
