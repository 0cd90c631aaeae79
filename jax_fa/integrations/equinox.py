"""Attention for Equinox: `MultiheadAttention`, and `use_flash_attention` for models that exist.

model = use_flash_attention(model)
"""

import dataclasses
import warnings
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from jax_fa import api, arguments, backends

Model = TypeVar("Model")


class MultiheadAttention(eqx.nn.MultiheadAttention):
    """`equinox.nn.MultiheadAttention` in O(S) memory: the same parameters, in the same order.

    All heads are one call of the kernel, and a model under `jax.vmap` gives it one call with a batch dim; no array is
    transposed for it.
    """

    implementation: backends.Implementation = eqx.field(static=True)

    def __init__(self, *args: Any, implementation: backends.Implementation = None, **kwargs: Any) -> None:
        """Takes the arguments of `equinox.nn.MultiheadAttention`, and:

        Args:
          implementation: None (the best backend that can), or the name of a backend: see `jax_fa.explain`.
        """
        super().__init__(*args, **kwargs)
        backends.chosen(implementation)
        self.implementation = implementation

    def __call__(
        self,
        query,
        key_,
        value,
        mask=None,
        *,
        key=None,
        inference: bool | None = None,
        deterministic: bool | None = None,
        process_heads=None,
    ):
        """Attention of one sequence; `jax.vmap` it over a batch.

        Args:
          query: shape `(Sq, query_size)`.
          key_: shape `(Skv, key_size)`.
          value: shape `(Skv, value_size)`.
          mask: a boolean array broadcastable to `(num_heads, Sq, Skv)`, True = visible, or a mask of `jax_fa.masks`.
          key: a `jax.random` key for dropout, needed where dropout is on. The bits are ours
            (`jax_fa.dropout_mask`), not those that Equinox would draw from this key.
          inference: True turns dropout off; None: what `self.dropout.inference` says.
          deterministic: Equinox's deprecated name of inference.
          process_heads: a function of the query, key and value heads, each `(S, num_heads, size)`, that returns new
            ones of the same shapes.

        Returns:
          Shape `(Sq, output_size)`. A fully masked row is the output projection of 0.

        Raises:
          ValueError: shapes or values that do not fit.
          TypeError: dtypes that do not fit.
        """
        if deterministic is not None:
            inference = deterministic
            warnings.warn("deterministic is deprecated; use inference.", DeprecationWarning, stacklevel=2)
        query, key_, value = (_rows(n, x) for n, x in (("query", query), ("key_", key_), ("value", value)))
        heads = (
            self._project(self.query_proj, query),
            self._project(self.key_proj, key_),
            self._project(self.value_proj, value),
        )
        if process_heads is not None:
            shapes = [x.shape for x in heads]
            heads = process_heads(*heads)
            if [x.shape for x in heads] != shapes:
                raise ValueError(
                    f"process_heads must keep the shapes {shapes}; it returned {[x.shape for x in heads]}."
                )
        dtype = jnp.result_type(*heads)
        out = api.flash_attention(
            *(x.astype(dtype) for x in heads),
            mask=mask,
            **self._dropout_arguments(inference, key),
            layout="SND",
            implementation=self.implementation,
        )
        return _apply(self.output_proj, out.reshape(out.shape[0], out.shape[1] * out.shape[2]))

    def _project(self, proj, x):
        found = _apply(proj, x)
        return found.reshape(x.shape[0], self.num_heads, found.shape[-1] // self.num_heads)

    def _dropout_arguments(self, inference: bool | None, key) -> dict[str, Any]:
        inference = self.dropout.inference if inference is None else inference
        if inference or arguments.is_zero(self.dropout.p):
            return {}
        if key is None:
            raise ValueError(
                f"key must be a jax.random key where inference is false and dropout_p={self.dropout.p}; got None."
            )
        arguments.random_key("key", key)
        return {"dropout_rate": self.dropout.p, "dropout_key": key}


def _rows(name: str, x):
    x = arguments.array(name, x)
    if x.ndim != 2:
        raise ValueError(
            f"{name} must have 2 dimensions (length, size); got shape {x.shape}. For a batch, jax.vmap the layer."
        )
    return x


def _apply(proj, x):
    """A layer of one vector, applied to every row of x."""
    if type(proj) is not eqx.nn.Linear:
        return jax.vmap(proj)(x)
    # What vmap makes of `weight @ row` leaves the rows behind the features, and every array would be transposed.
    y = jnp.einsum("si,oi->so", x, proj.weight)
    return y if proj.bias is None else y + proj.bias


def use_flash_attention(model: Model, *, implementation: backends.Implementation = None) -> Model:
    """The model with every `equinox.nn.MultiheadAttention` in it replaced by ours.

    The leaves are the same, in the same order: checkpoints and optimizer states of the one fit the other.

    Args:
      model: a pytree, such as an `equinox.Module`. It is not changed.
      implementation: None (the best backend that can), or the name of a backend: see `jax_fa.explain`.

    Returns:
      The new model.

    Raises:
      ValueError: there is no such layer in the model; an unknown implementation.
      TypeError: there is a subclass of it, which may compute something else.
    """
    backends.chosen(implementation)
    count = 0

    def swap(node):
        nonlocal count
        if not _is_attention(node):
            return node
        if type(node) not in (eqx.nn.MultiheadAttention, MultiheadAttention):
            raise TypeError(
                f"model must hold equinox.nn.MultiheadAttention itself; got {type(node).__name__}, a subclass that may "
                "compute something else. Derive it from jax_fa.integrations.equinox.MultiheadAttention instead."
            )
        count += 1
        return _converted(node, implementation)

    swapped = jax.tree.map(swap, model, is_leaf=_is_attention)
    if not count:
        raise ValueError(
            f"model must hold an equinox.nn.MultiheadAttention; {type(model).__name__} has none."
        )
    return swapped


def _is_attention(node) -> bool:
    return isinstance(node, eqx.nn.MultiheadAttention)


def _converted(layer: Any, implementation: backends.Implementation) -> MultiheadAttention:
    """The layer's own fields in our class, as modules are rebuilt from their leaves: without running `__init__`."""
    ours: Any = object.__new__(MultiheadAttention)
    for field in dataclasses.fields(layer):
        object.__setattr__(ours, field.name, getattr(layer, field.name))
    object.__setattr__(ours, "implementation", implementation)
    return ours
