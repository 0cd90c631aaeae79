"""Checks of the kinds of arguments: errors that name the argument, what was given, what is allowed and the way out."""

import difflib
import inspect
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import compat

_LONGEST = 60  # characters of a value that an error shows
_TAKE_DATA = ("cpu", "gpu", "tpu")


def shown(x) -> str:
    """A value as errors show it: short, and arrays by their shape and dtype."""
    if isinstance(x, jax.core.Tracer):
        return f"a traced value {x.aval.str_short()}"
    if hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, np.generic):
        return f"{type(x).__name__} of shape {tuple(x.shape)} and dtype {x.dtype}"
    text = repr(x)
    return text if len(text) <= _LONGEST else f"an object of type {type(x).__name__}"


def array(name: str, x):
    """x as a JAX array."""
    if isinstance(x, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{name} must be an array; got {x}, which has no values. "
            "(jax_fa.explain and jax.eval_shape take such shapes.)"
        )
    try:
        made = None if x is None else _converted(truth(x))
    except (OverflowError, TypeError, ValueError) as error:
        # Arrays that JAX itself cannot use here, such as deleted ones, have a better error of JAX.
        if isinstance(x, jax.Array):
            raise
        raise TypeError(f"{name} must be an array; got {shown(x)}.") from error
    if made is None or jnp.issubdtype(made.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{name} must be an array; got {'None' if x is None else 'a jax.random key'}.")
    return made


def _converted(x):
    """jnp.asarray(x). What changes nothing is an operation all the same where a derivative is traced outside of jit."""
    same = isinstance(x, jax.core.Tracer) and not jax.typeof(x).weak_type
    return x if same else jnp.asarray(x)


def host_array(name: str, x):
    """x as it is where it is an array of any kind, else as one of NumPy: its values stay known."""
    if hasattr(x, "dtype"):
        return x
    if hasattr(x, "__jax_array__"):
        return x.__jax_array__()
    try:
        return np.asarray(x)
    except (OverflowError, TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array; got {shown(x)}.") from error


def truth(x):
    """A NumPy array of booleans with the bytes that XLA expects of them, 0 and 1: a view of other bytes may have more."""
    if not isinstance(x, np.ndarray) or x.dtype != np.bool_:
        return x
    found = np.asarray(x).view(np.uint8)
    return found != 0 if np.any(found > 1) else x


def number(name: str, x, what: str) -> None:
    """Raises TypeError unless x is a real number or an array (traced ones too) of such numbers."""
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        real = isinstance(x, numbers.Real) and not isinstance(x, bool)
    else:
        real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
        real = real and not isinstance(x, jax.ShapeDtypeStruct)
    if not real:
        raise TypeError(f"{name} must be {what}; got {shown(x)}.")


def scalar(name: str, x) -> float | jax.Array:
    """A real scalar: a float where its value belongs to the program, an array where it is data.

    A traced value is data, and so is an array outside of jit, where each value would be a program of its own, which JAX keeps;
    but not on a platform whose kernels (of CANN) may take numbers of the host alone.
    """
    if isinstance(x, (bool, np.bool_)) or not (isinstance(x, numbers.Real) or hasattr(x, "dtype")):
        raise TypeError(f"{name} must be a real number or a scalar array; got {shown(x)}.")
    if not isinstance(x, numbers.Real):
        if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
            raise TypeError(f"{name} must be real; got dtype {x.dtype}.")
        if np.ndim(x) != 0:
            raise ValueError(f"{name} must be a scalar; got shape {np.shape(x)}.")
        if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
            return x
        if isinstance(x, jax.Array) and jax.default_backend() in _TAKE_DATA and not compat.in_program():
            return x
    try:
        return float(x)
    except OverflowError:
        raise ValueError(f"{name} must be finite; got {shown(x)}.") from None


def per_head(name: str, x, batch: tuple[Any, ...], heads: Any) -> float | jax.Array:
    """A real scalar, or an array of one value for each head or batch entry: `*#B #N 1 1`, as it broadcasts to logits."""
    shape = np.shape(x) if hasattr(x, "dtype") else ()
    full = (*batch, heads, 1, 1)
    if not shape or not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        return scalar(name, x)
    tail = full[max(0, len(full) - len(shape)) :]
    if len(shape) > len(full) or any(a not in (1, b) for a, b in zip(shape, tail, strict=True)):
        raise ValueError(
            f"{name} must be a scalar, or an array that broadcasts to (*B, N, 1, 1)={full}: one value for each head has shape "
            f"({heads}, 1, 1); got shape {shape}."
        )
    return jnp.asarray(x)


def is_zero(x) -> bool:
    """Whether this is known to be 0 when tracing."""
    return isinstance(x, numbers.Real) and x == 0


def integer(name: str, x, least: int | None = None, most: int | None = None) -> int:
    """x as an int, in least..most; NumPy's too, whose own arithmetic wraps around at the end of its dtype.

    Raises:
      TypeError: x is no int.
      ValueError: x is out of range.
    """
    if isinstance(x, bool) or not isinstance(x, (int, np.integer)):
        raise TypeError(f"{name} must be an int; got {shown(x)}.")
    x = int(x)
    if least is not None and x < least:
        raise ValueError(f"{name} must be at least {least}; got {shown(x)}.")
    if most is not None and x > most:
        raise ValueError(f"{name} must be at most {most}; got {shown(x)}.")
    return x


def flag(name: str, x) -> bool:
    """A Python bool; flags are part of the program."""
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"{name} must be True or False, known when the program is traced; got {shown(x)}. "
            "Make it a static argument of jax.jit (static_argnames)."
        )
    boolean = isinstance(x, (bool, np.bool_)) or (type(x) is int and x in (0, 1))
    if not boolean and not (getattr(x, "dtype", None) == np.bool_ and getattr(x, "shape", None) == ()):
        raise TypeError(f"{name} must be True or False; got {shown(x)}.")
    return bool(x)


def random_key(name: str, key) -> None:
    """Raises unless this is one `jax.random` key, new style or old."""
    dtype = getattr(key, "dtype", None)
    shape: tuple[int, ...] | None = None
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        shape = getattr(key, "shape", None)
    elif dtype == jnp.uint32:
        try:
            shape = jax.eval_shape(jax.random.wrap_key_data, key).shape
        except (TypeError, ValueError):
            pass
    if shape is None or isinstance(key, jax.ShapeDtypeStruct):
        raise TypeError(f"{name} must be a jax.random key, such as jax.random.key(0); got {shown(key)}.")
    if shape != ():
        raise ValueError(
            f"{name} must be a single jax.random key; got keys of shape {shape}. Every batch entry and head draws "
            "dropout of its own from one key; for several keys, jax.vmap the call over them and the arrays."
        )


def choice(name: str, x, allowed: Mapping[str, Any], advice: str = "") -> None:
    """Raises ValueError unless x is a string among those allowed."""
    if not isinstance(x, str) or x not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {shown(x)}.{advice}")


# --- layouts

# The axes that put an array into the canonical order `B S N D` (or `S N D`).
LAYOUTS = {
    "BSND": (0, 1, 2, 3),
    "BNSD": (0, 2, 1, 3),
    "SBND": (1, 0, 2, 3),
    "SND": (0, 1, 2),
    "NSD": (1, 0, 2),
}


def axes_of(layout: str, name: str, x: Any) -> tuple[tuple[int, ...], str]:
    """Axes that put arrays of this layout into canonical order, and the layout spelt for their rank."""
    choice("layout", layout, LAYOUTS, _other_letters(layout))
    ndim = x.ndim
    if ndim < 3 or ("B" not in layout and ndim != 3) or (layout == "SBND" and ndim != 4):
        raise ValueError(f"{name} must have a rank that fits layout {layout!r}; got shape {x.shape}.")
    if layout == "SBND" or "B" not in layout:
        return LAYOUTS[layout], layout
    tail = (1, 0, 2) if layout == "BNSD" else (0, 1, 2)
    lead = ndim - 3
    return (*range(lead), *(lead + axis for axis in tail)), "B" * lead + layout[1:]


def _other_letters(layout) -> str:
    """Advice for a layout that is spelt in the letters of others: heads H, lengths T or L."""
    meant = str(layout).upper().replace("H", "N").replace("T", "S").replace("L", "S")
    return f" Heads are N and lengths S here: pass layout={meant!r}." if meant in LAYOUTS else ""


# --- names of arguments

# What callers of other functions know these arguments as: for each entry, the name given and what to pass instead.
_CAUSAL = "mask=jax_fa.masks.Causal()"
_WINDOW = "mask=jax_fa.masks.SlidingWindow(left, right)"
_SCALES = dict.fromkeys(("softmax_scale", "sm_scale", "scale_value"), "scale")
_CAPS = dict.fromkeys(("softcap", "soft_cap", "logit_soft_cap", "attn_logits_soft_cap"), "logits_soft_cap")
_DROPOUT = {"dropout_p": "dropout_rate", "dropout_rng": "dropout_key", "dropout_seed": "dropout_key"}
_SINKS = dict.fromkeys(("s_aux", "learnable_sink", "sink", "attention_sink"), "sinks")
_MAX_WORK = {"max_work": "implementation=jax_fa.ascend.Options(max_work=...)"}
_MASKS = dict.fromkeys(
    ("attn_mask", "attention_mask", "atten_mask"), "mask (boolean, True = visible) or bias"
)
_ADVICE: dict[str, dict[str, str]] = {
    "paged_attention": {
        **_SCALES,
        **_CAPS,
        **_SINKS,
        **dict.fromkeys(("block_table", "block_tables", "page_indices", "page_tables"), "page_table"),
        **dict.fromkeys(("cache_seqlens", "context_lens", "seq_lens", "kv_lens"), "lengths"),
        **dict.fromkeys(("window_size", "window"), "local_window_size (keys before the token's own)"),
        "sliding_window": "local_window_size=sliding_window - 1",
        **dict.fromkeys(("return_residual", "return_lse", "return_softmax_lse"), "return_logsumexp"),
        "k_scale": "key_scale",
        "v_scale": "value_scale",
        "key_cache": "key_pages",
        "value_cache": "value_pages",
        "k_pages": "key_pages",
        "v_pages": "value_pages",
    },
    "dot_product_attention": {
        **_SCALES,
        **_CAPS,
        **_DROPOUT,
        **_SINKS,
        **_MASKS,
        "causal": "is_causal=True",
        "window_size": "local_window_size",
        "return_logsumexp": "return_residual",
        "return_lse": "return_residual",
    },
    "flash_attention": {
        **_SCALES,
        **_CAPS,
        **_DROPOUT,
        **_SINKS,
        **_MASKS,
        "causal": _CAUSAL,
        "is_causal": _CAUSAL,
        "window_size": _WINDOW,
        "local_window_size": _WINDOW,
        "query_seq_lengths": "mask=jax_fa.masks.Lengths(query=...)",
        "key_value_seq_lengths": "mask=jax_fa.masks.Lengths(key=...)",
        "segment_ids": "mask=jax_fa.masks.SegmentIds(...)",
        "cu_seqlens": "mask=jax_fa.masks.CumulativeLengths(...)",
        "return_residual": "return_logsumexp",
        "return_lse": "return_logsumexp",
        "input_layout": "layout",
        **_MAX_WORK,
    },
    "flash_attention_score": {
        "scale": "scale_value",
        "mask": "atten_mask (1 = masked)",
        "attn_mask": "atten_mask (1 = masked)",
        "bias": "pse",
        "dropout_rate": "keep_prob and drop_mask",
        "layout": "input_layout",
        **_MAX_WORK,
        "causal": "sparse_mode=2",
        "is_causal": "sparse_mode=2",
        "padding_mask": "None of it: CANN has reserved it",
        "pre_tockens": "pre_tokens",
        "next_tockens": "next_tokens",
        "dropout_mask": "drop_mask",
        "real_shift": "pse",
        "scalar_value": "scale_value",
    },
    "npu_fusion_attention": {
        "scale_value": "scale",
        "scalar_value": "scale",
        "pre_tokens": "pre_tockens",
        "next_tokens": "next_tockens",
        "drop_mask": "dropout_mask",
        "mask": "atten_mask (1 = masked)",
        "attn_mask": "atten_mask (1 = masked)",
        "real_shift": "pse",
        "bias": "pse",
        "dropout_rate": "keep_prob and dropout_key",
        "dropout_p": "keep_prob and dropout_key",
        "causal": "sparse_mode=2 and atten_mask",
        "is_causal": "sparse_mode=2 and atten_mask",
        **_MAX_WORK,
    },
}
_ADVICE["sequence_parallel_attention"] = _ADVICE["flash_attention"]
_signatures: dict[str, inspect.Signature] = {}


def declare(entry: str, signature: inspect.Signature) -> None:
    """Makes the arguments of an entry known."""
    _signatures[entry] = signature


def check_names(entry: str, given: Mapping[str, Any]) -> None:
    """Raises TypeError, with advice, for keywords that the entry does not have."""
    if not names(entry).issuperset(given):
        raise unknown(entry, given)


def names(entry: str) -> frozenset[str]:
    """The arguments that an entry has."""
    return frozenset(_signatures[entry].parameters)


def _needed(entry: str) -> set[str]:
    """Keywords that must be given."""
    parameters = _signatures[entry].parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}


def unknown(entry: str, given: Mapping[str, Any]) -> TypeError:
    """What to raise for keywords of which some are none of this entry's."""
    name = next(name for name in given if name not in names(entry))
    instead = _ADVICE.get(entry, {}).get(name)
    others = [other for other in _signatures if other != entry and name in names(other)]
    # An entry that has all arguments of another, and more, or needs one that is not given, is not what the caller was
    # thinking of.
    others = [other for other in others if not any(names(x) < names(other) for x in others)]
    others = [other for other in others if _needed(other) <= set(given)] or others
    near = difflib.get_close_matches(name, names(entry), n=1, cutoff=0.75)
    text = f"{entry} has no argument {name!r}"
    if instead:
        text += f"; pass {instead} instead"
    elif near:
        text += f"; did you mean {near[0]!r}?"
    else:
        text += f"; its arguments are {', '.join(_signatures[entry].parameters)}"
    if others:
        text = (
            f"{text.rstrip('?')}. ({name} is an argument of {' and '.join(f'jax_fa.{o}' for o in others)}.)"
        )
    return TypeError(text if text[-1] in "?)" else f"{text}.")
