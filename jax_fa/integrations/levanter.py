"""`levanter.layers.attention.dot_product_attention`: named arrays, levanter's mask objects, sinks, in O(S) memory.

levanter and haliax are not imported: named arrays are taken for what they hold, and the result is of the query's class.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jax_fa import api, arguments, backends, indices
from jax_fa.integrations import structure
from jax_fa.integrations.precision import check_precision
from jax_fa.masks import Band, Dense, Mask

# What an AttentionMask may hold.
_FIELDS = (
    "is_causal",
    "causal_offset",
    "explicit_mask",
    "segment_ids",
    "sliding_window",
    "bidirectional_window",
)
_BACKENDS = ("default", "nvte", "splash", "jax_flash", "vanilla")


def dot_product_attention(
    QPos,  # noqa: N803 (levanter's name)
    KPos,  # noqa: N803 (likewise)
    Key,  # noqa: N803 (likewise)
    query,
    key,
    value,
    mask=None,
    bias=None,
    attention_dtype=None,
    precision=None,
    use_flash: bool | None = None,
    attn_backend=None,
    flash_block_size: int | None = None,
    dropout: Any = 0.0,
    *,
    logits_soft_cap=None,
    scaling_factor=None,
    inference: bool = True,
    prng=None,
    attn_sink=None,
    _implementation: backends.Implementation = None,
):
    """`dot_product_attention` of levanter, argument for argument.

    Axes that query, key and value share are batch axes and key/value heads; further axes of the query are query heads
    that share a key/value head.

    Args:
      QPos: the query's axis of positions, or its name.
      KPos: that of key and value; its name must differ.
      Key: the axis that query and key are contracted over.
      query: a named array with QPos and Key.
      key: a named array with KPos and Key, query's axes otherwise.
      value: a named array with KPos, key's axes otherwise, and Key or another axis in its place.
      mask: an `AttentionMask` of levanter, a boolean named array, or a mask of `jax_fa.masks`. Causal masks, windows and
        segment IDs stay structured.
      bias: a named array that is added to the scaled logits. Differentiable.
      attention_dtype: what query, key and value are cast to; None: the dtype they promote to.
      precision: accepted where the kernels have it anyway, as in `jax_fa.integrations.flax.attention_fn`.
      use_flash, attn_backend, flash_block_size: choose among levanter's implementations: checked, and without effect.
      dropout: rate in [0, 1). Dropout is on if it is above 0 and `inference` is false.
      logits_soft_cap: replaces the logits x by `cap * tanh(x / cap)`; not the sink, as in levanter's flash attention.
      scaling_factor: factor of the logits; None: 1 / sqrt of the size of Key.
      inference: turns dropout off.
      prng: a `jax.random` key, needed where dropout is on. The bits are ours (`jax_fa.dropout_mask`).
      attn_sink: a named array over axes of heads or batch: one more logit for each row, without a value.

    Returns:
      A named array: the axes of query without Key, then value's own. A fully masked row is 0.

    Raises:
      ValueError: axes or values that do not fit.
      TypeError: dtypes or kinds that do not fit.
      NotImplementedError: a precision that the kernels do not have; several axes of positions; a mask with fields that are
        not known here.
    """
    _check_choice(use_flash, attn_backend, flash_block_size)
    axes = _Axes.of(QPos, KPos, Key, query, key, value)
    dtype = attention_dtype or jnp.result_type(query.array, key.array, value.array)
    check_precision(precision, jnp.dtype(dtype))
    out = api.flash_attention(
        axes.rows("query", query, (*axes.batch, axes.q, *axes.heads, axes.contracted)).astype(dtype),
        axes.rows("key", key, (*axes.batch, axes.k, *axes.shared, axes.contracted)).astype(dtype),
        axes.rows("value", value, (*axes.batch, axes.k, *axes.shared, axes.out)).astype(dtype),
        bias=None if bias is None else axes.logits("bias", bias),
        mask=_mask(axes, mask),
        scale=1 / math.sqrt(axes.sizes[axes.contracted]) if scaling_factor is None else scaling_factor,
        logits_soft_cap=logits_soft_cap,
        sinks=None if attn_sink is None else axes.per_head("attn_sink", attn_sink),
        implementation=_implementation,
        **_dropout(dropout, inference, prng),
    )
    return axes.named(out.astype(jnp.result_type(query.array, value.array)), query, value)


@dataclass(frozen=True)
class _Axes:
    """The names of the axes of a call by their roles, and their sizes."""

    q: str
    k: str
    contracted: str
    out: str
    batch: tuple[str, ...]
    shared: tuple[str, ...]  # of the key/value heads
    heads: tuple[str, ...]  # of the query heads: the shared ones, then those that are query's alone
    sizes: dict[str, int]

    @classmethod
    def of(cls, QPos, KPos, Key, query, key, value) -> "_Axes":  # noqa: N803 (levanter's names)
        for name, x in (("query", query), ("key", key), ("value", value)):
            _check_named(name, x)
        q, k, contracted = _name("QPos", QPos), _name("KPos", KPos), _name("Key", Key)
        if q == k:
            raise ValueError(f"QPos and KPos must have different names; got {q!r} for both.")
        of_query, of_key, of_value = (tuple(axis.name for axis in x.axes) for x in (query, key, value))
        for name, names, needed in (
            ("query", of_query, (q, contracted)),
            ("key", of_key, (k, contracted)),
            ("value", of_value, (k,)),
        ):
            missing = [axis for axis in needed if axis not in names]
            if missing:
                raise ValueError(f"{name} must have the axes {needed}; got {names}.")
        common = tuple(x for x in of_query if x in of_key and x in of_value and x not in (q, k, contracted))
        own = [x for x in of_value if x not in (k, *common)]
        if len(own) != 1:
            raise ValueError(
                f"value must have one axis besides {k!r} and those that query and key have, {common}; got {of_value}."
            )
        extra = [x for x in of_key if x not in (k, contracted, *common)]
        if extra:
            raise ValueError(f"key must have no axes that query or value lack; got {extra} in {of_key}.")
        grouped = tuple(x for x in of_query if x not in (q, contracted, *common))
        # As in levanter, the last shared axis is one of heads unless it leads.
        shared = common[-1:] if common and common[-1] != of_query[0] else ()
        batch = common[: len(common) - len(shared)]
        sizes = {axis.name: axis.size for x in (query, key, value) for axis in x.axes}
        return cls(q, k, contracted, own[0], batch, shared, (*shared, *grouped), sizes)

    def rows(self, name: str, x, order: tuple[str, ...]):
        """x as `*B S N D`, its heads in one dim."""
        found = self.placed(name, x, order)
        lead = len(self.batch) + 1
        return found.reshape(*found.shape[:lead], -1, found.shape[-1])

    def placed(self, name: str, x, order: tuple[str, ...]):
        """The array with its axes in this order, of size 1 where x has none."""
        _check_named(name, x)
        names = [axis.name for axis in x.axes]
        unknown = [axis for axis in names if axis not in order]
        if unknown:
            raise ValueError(f"{name} must have axes among {order}; got {tuple(names)}.")
        wrong = {axis.name: axis.size for axis in x.axes if axis.size != self.sizes[axis.name]}
        if wrong:
            raise ValueError(f"{name} must have the sizes of query and key, {self.sizes}; got {wrong}.")
        array = arguments.array(name, x.array)
        present = [axis for axis in order if axis in names]
        array = array.transpose([names.index(axis) for axis in present])
        return array.reshape([self.sizes[axis] if axis in names else 1 for axis in order])

    def per_head(self, name: str, x, *last: str):
        """`*#B #N`, and the axes `last`: the dims of heads are one, of size 1 where x has none of them."""
        found = self.placed(name, x, (*self.batch, *self.heads, *last))
        lead, n = len(self.batch), len(self.heads)
        shape = found.shape
        if any(size != 1 for size in shape[lead : lead + n]) or name == "attn_sink":
            full = tuple(self.sizes[axis] for axis in self.heads)
            found = jnp.broadcast_to(found, (*shape[:lead], *full, *shape[lead + n :]))
            return found.reshape(*shape[:lead], math.prod(full), *shape[lead + n :])
        return found.reshape(*shape[:lead], 1, *shape[lead + n :])

    def logits(self, name: str, x):
        return self.per_head(name, x, self.q, self.k)

    def named(self, out, query, value):
        """Our output, as levanter's: the axes of query without Key, then that of value."""
        order = (*self.batch, self.q, *self.heads, self.out)
        own = {axis.name: axis for x in (value, query) for axis in x.axes}
        own[self.out] = next(axis for axis in value.axes if axis.name == self.out)
        out = out.reshape([own[name].size for name in order])
        wanted = [axis.name for axis in query.axes if axis.name != self.contracted] + [self.out]
        out = out.transpose([order.index(name) for name in wanted])
        return type(query)(out, tuple(own[name] for name in wanted))


def _check_named(name: str, x) -> None:
    if not hasattr(x, "axes") or not hasattr(x, "array"):
        raise TypeError(f"{name} must be a named array of haliax; got {arguments.shown(x)}.")


def _name(name: str, axis) -> str:
    if isinstance(axis, (list, tuple)):
        if len(axis) != 1:
            raise NotImplementedError(f"{name} must be one axis; got {len(axis)}. Flatten them first.")
        (axis,) = axis
    return axis if isinstance(axis, str) else axis.name


def _check_choice(use_flash, attn_backend, flash_block_size) -> None:
    if use_flash is not None:
        arguments.flag("use_flash", use_flash)
    # An Enum, in newer releases of strings.
    if attn_backend is not None and getattr(attn_backend, "value", attn_backend) not in _BACKENDS:
        raise ValueError(
            f"attn_backend must be None or one of levanter's, {', '.join(map(repr, _BACKENDS))}; got "
            f"{arguments.shown(attn_backend)}."
        )
    if flash_block_size is not None:
        structure.window("flash_block_size", flash_block_size)


def _dropout(rate, inference, prng) -> dict[str, Any]:
    arguments.number("dropout", rate, "a number in [0, 1)")
    if inference or arguments.is_zero(rate):
        return {}
    if prng is None:
        raise ValueError(
            f"prng must be a jax.random key where inference is false and dropout={rate}; got None."
        )
    arguments.random_key("prng", prng)
    return {"dropout_rate": rate, "dropout_key": prng}


def _mask(axes: _Axes, mask) -> Mask | None:
    if mask is None or isinstance(mask, Mask):
        return mask
    if hasattr(mask, "axes"):
        return _dense(axes, "mask", mask)
    if not hasattr(mask, "is_causal"):
        raise TypeError(
            f"mask must be an AttentionMask, a named array, a mask of jax_fa.masks or None; got {arguments.shown(mask)}."
        )
    others = [
        name for name, x in vars(mask).items() if name not in _FIELDS and x is not None and x is not False
    ]
    if others:
        raise NotImplementedError(
            f"mask must be an AttentionMask of no fields but {_FIELDS}; got {others}. Pass mask.materialize(QPos, KPos)."
        )
    causal = None
    if mask.is_causal:
        causal = Band(None, 0, offset=0 if mask.causal_offset is None else _offset(axes, mask.causal_offset))
    window = getattr(mask, "sliding_window", None)
    explicit = mask.explicit_mask
    return structure.joined(
        causal,
        None if window is None else Band(structure.window("sliding_window", window) - 1, 0),
        _both_ways(getattr(mask, "bidirectional_window", None)),
        None if explicit is None else _dense(axes, "explicit_mask", explicit),
        None if mask.segment_ids is None else _segments(axes, mask.segment_ids),
    )


def _both_ways(radius) -> Mask | None:
    """Keys at most this far away, on both sides."""
    if radius is not None and not (indices.is_int(radius) and radius >= 0):
        raise ValueError(f"bidirectional_window must be an int of at least 0; got {arguments.shown(radius)}.")
    return structure.band(radius, "bidirectional_window")


def _dense(axes: _Axes, name: str, mask) -> Mask:
    return Dense(axes.logits(name, mask).astype(jnp.bool_))


def _offset(axes: _Axes, offset):
    """`*#B #N 1`, or a number for all."""
    if not hasattr(offset, "axes"):
        return offset
    if not offset.axes:
        return indices.int32(offset.array)
    return indices.int32(axes.per_head("causal_offset", offset)[..., None])


def _segments(axes: _Axes, ids) -> Mask:
    query, key = ids if isinstance(ids, tuple) else (ids, ids)
    # Both may carry the name of the query's axis.
    renamed = {axes.q: axes.k, axes.k: axes.k}
    row = axes.placed("segment_ids", query, (*axes.batch, axes.q))
    column = _ids_of_keys(axes, key, renamed)
    return structure.segments(_whole(row), _whole(column))


def _ids_of_keys(axes: _Axes, x, renamed: dict[str, str]):
    names = [renamed.get(axis.name, axis.name) for axis in x.axes]
    order = (*axes.batch, axes.k)
    unknown = [name for name in names if name not in order]
    if unknown:
        raise ValueError(f"segment_ids must have axes among {order}; got {tuple(names)}.")
    array = x.array.transpose([names.index(name) for name in order if name in names])
    return array.reshape([x.array.shape[names.index(n)] if n in names else 1 for n in order])


def _whole(x):
    """Without leading dims where all are 1."""
    return x.reshape(x.shape[-1:]) if x.size == x.shape[-1] else x
