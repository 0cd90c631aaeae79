"""A program as a compiled function of the library.

`HOW`: the same call written in other ways, which must give the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa
from jax_fa import masks
from jax_fa.testing.fuzz import inputs as given
from jax_fa.testing.fuzz import score
from jax_fa.testing.fuzz.inputs import Inputs
from jax_fa.testing.fuzz.kinds import KINDS
from jax_fa.testing.fuzz.program import Program

Arrays = dict[str, Any]


def compiled(program: Program, known: Inputs) -> Callable[[Arrays], Arrays]:
    """The function of `Inputs.arguments()`; `known` has the values that are part of the program."""
    run = partial(_run, program, known)
    return run if program.how == "eager" else jax.jit(run)


def _run(program: Program, known: Inputs, arrays: Arrays) -> Arrays:
    p = program
    if not p.mapped:
        found = _derivatives(p, partial(_attend, p, known), arrays)
    elif p.vmap_outside:
        axes = {
            "operands": {n: _axis(p, n) for n in arrays["operands"]},
            "masks": _axis(p, "mask"),
            "dropout": {n: _axis(p, n) for n in arrays["dropout"]},
        }
        for name, like in (
            ("tangents", arrays["operands"]),
            ("cotangents", None),
            ("cotangent_tangents", None),
        ):
            if name in arrays:
                axes[name] = 0 if like is None else {n: _axis(p, n) for n in like}
        return jax.vmap(lambda a: _derivatives(p, partial(_attend, p, known), a), in_axes=(axes,))(arrays)
    else:
        inside = (
            {n: _axis(p, n) for n in arrays["operands"]},
            _axis(p, "mask"),
            {n: _axis(p, n) for n in arrays["dropout"]},
        )
        found = _derivatives(p, jax.vmap(partial(_attend, p, known), in_axes=inside), arrays)
    return found


def _axis(program: Program, name: str) -> int | None:
    return (-1 if program.mapped_last else 0) if name in program.mapped else None


def _derivatives(program: Program, attend: Callable[..., Any], arrays: Arrays) -> Arrays:
    """Results by name; "d..." are gradients and "...'" tangents."""

    def results(operands):
        found = attend(operands, arrays["masks"], arrays["dropout"])
        other = {n: x for n, x in found.items() if n not in program.results()}
        return {n: found[n] for n in program.results()}, other

    operands = arrays["operands"]

    def reverse(operands, cotangents):
        found, pullback, other = jax.vjp(results, operands, has_aux=True)
        return {**found, **_named("d", pullback(cotangents)[0], "")}, other

    if program.derivative == "none":
        found, other = results(operands)
        return found | other
    if program.derivative == "reverse":
        found, other = reverse(operands, arrays["cotangents"])
        return found | other
    if program.derivative == "forward":
        found, moved, other = jax.jvp(results, (operands,), (arrays["tangents"],), has_aux=True)
    else:
        at = (operands, arrays["cotangents"])
        along = (arrays["tangents"], arrays["cotangent_tangents"])
        found, moved, other = jax.jvp(reverse, at, along, has_aux=True)
    return found | _named("", moved, "'") | other


def _named(before: str, arrays: Arrays, after: str) -> Arrays:
    return {f"{before}{name}{after}": x for name, x in arrays.items()}


# --- the call


def _attend(program: Program, known: Inputs, operands: Arrays, values: Arrays, dropout: Arrays) -> Arrays:
    mask_values = known.masks if program.known_mask else values
    if program.entry == score.ENTRY:
        return score.attend(program, operands, mask_values, dropout, program.known_mask)
    options: Arrays = {}
    if program.scale == "known":
        options["scale"] = known.scale
    if program.cap == "known":
        options["logits_soft_cap"] = known.cap
    more: Arrays = {}
    if program.dropout:
        options["dropout_key"] = jax.random.wrap_key_data(dropout["dropout_key"], impl="threefry2x32")
        options["dropout_rate"] = dropout.get("rate", known.rate)
        more["seed"] = given.seed_words(dropout["dropout_key"])
    if program.entry == "dot_product_attention":
        return _as_jax_nn(program, operands, mask_values, options) | more
    way = _WAYS.get(program.how, _plainly)
    made = [KINDS[name].make(_as_known(mask_values[name], program.known_mask)) for name in program.mask]
    return way(program, operands, made, options) | more


def _as_known(values: Arrays, known: bool) -> Arrays:
    """Scalars that are known as Python integers, and so are half of the arrays."""
    if not known:
        return values
    return {
        name: int(x) if np.ndim(x) == 0 and x.dtype != bool else np.asarray(x) for name, x in values.items()
    }


def _as_jax_nn(program: Program, operands: Arrays, values: Arrays, options: Arrays) -> Arrays:
    p, shape = program, program.B or (1,)
    lengths: dict[str, Any] = {
        f"{word}_seq_lengths": jnp.broadcast_to(jnp.asarray(x), shape)
        for name in p.mask
        if "lengths" in name
        for word, x in (("key_value" if key == "key" else key, x) for key, x in values[name].items())
    }
    mask = None
    for name in p.mask:
        if name.startswith("dense"):
            mask = values[name]["array"]
    out, *others = _as_tuple(
        jax_fa.dot_product_attention(
            **operands,
            **options,
            **lengths,
            mask=mask,
            is_causal="causal" in p.mask,
            implementation=p.backend,
            return_residual=True,
            return_max_logits=p.max_logits,
        )
    )
    found = {"out": out, "lse": jnp.swapaxes(others[0], -1, -2)}
    return found | ({"max": others[1]} if p.max_logits else {})


def _call(program: Program, operands: Arrays, made: list[Any], options: Arrays) -> Arrays:
    mask = None
    for one in made:
        mask = one if mask is None else mask & one
    out, *others = _as_tuple(
        jax_fa.flash_attention(
            **operands,
            **options,
            mask=mask,
            layout=program.layout,
            implementation=program.backend,
            return_logsumexp=True,
            return_max_logits=program.max_logits,
        )
    )
    return {"out": out, "lse": others[0]} | ({"max": others[1]} if program.max_logits else {})


def _as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


_plainly = _call


# --- the same in other ways


def _axes(program: Program) -> tuple[int, int]:
    """The axes of the sequence and of the heads in arrays of the layout, from the end."""
    return {"BSND": (-3, -2), "SND": (-3, -2), "BNSD": (-2, -3), "NSD": (-2, -3), "SBND": (0, -2)}[
        program.layout
    ]


def _keys_of(program: Program, operands: Arrays, made: list[Any], fn: Callable[[Any, int, Any], Any]) -> Any:
    """Everything that has keys, through `fn(array, axis, filling)`."""
    sequence, _ = _axes(program)
    moved = dict(operands)
    moved["key"], moved["value"] = (fn(operands[n], sequence, jnp.nan) for n in ("key", "value"))
    if "bias" in operands and operands["bias"].ndim and operands["bias"].shape[-1] == program.Skv:
        moved["bias"] = fn(operands["bias"], -1, jnp.nan)
    masks_moved = []
    for mask in made:
        if isinstance(mask, masks.Dense) and np.ndim(mask.array) and np.shape(mask.array)[-1] == program.Skv:
            mask = masks.Dense(fn(jnp.asarray(mask.array), -1, True))
        masks_moved.append(mask)
    return moved, masks_moved


def _permuted(program: Program, operands: Arrays, made: list[Any], options: Arrays) -> Arrays:
    order = np.random.default_rng(program.seed).permutation(program.Skv)
    moved, masks_moved = _keys_of(program, operands, made, lambda x, axis, _: jnp.take(x, order, axis=axis))
    return _call(program, moved, masks_moved, options)


def _padded(program: Program, operands: Arrays, made: list[Any], options: Arrays) -> Arrays:
    """Keys of NaN at the end, which are masked by the lengths."""
    count = 1 + program.seed % 40

    def pad(x, axis, filling):
        shape = list(x.shape)
        shape[axis] = count
        return jnp.concatenate([x, jnp.full(shape, filling, x.dtype)], axis=axis)

    moved, masks_moved = _keys_of(program, operands, made, pad)
    return _call(program, moved, [*masks_moved, masks.Lengths(key=program.Skv)], options)


def _split(program: Program, operands: Arrays, made: list[Any], options: Arrays) -> Arrays:
    """Two calls of half the keys each, merged."""
    half = program.Skv // 2
    parts = []
    for part in (slice(0, half), slice(half, None)):

        def cut(x, axis, _, part=part):
            index = [slice(None)] * x.ndim
            index[axis] = part
            return x[tuple(index)]

        moved, masks_moved = _keys_of(program, operands, made, cut)
        found = _call(program, moved, masks_moved, options)
        parts.append((found["out"], found["lse"]))
    out, lse = jax_fa.merge(*parts, layout=program.layout)
    return {"out": out, "lse": lse}


def _doubled(program: Program, operands: Arrays, made: list[Any], options: Arrays) -> Arrays:
    """All heads twice; the mean of both halves."""
    _, heads = _axes(program)
    N, moved = program.N, {}

    def twice(x, axis):
        return jnp.concatenate([x, x], axis=axis)

    for name, x in operands.items():
        at = {"query": heads, "key": heads, "value": heads, "alibi_slopes": -1, "sinks": -1, "bias": -3}.get(
            name
        )
        has = at is not None and x.ndim >= -at and (name != "bias" or x.shape[-3] == N)
        moved[name] = twice(x, at) if has else x
    masks_moved = []
    for mask in made:
        if isinstance(mask, masks.Dense) and np.ndim(mask.array) >= 3 and np.shape(mask.array)[-3] == N:
            mask = masks.Dense(twice(jnp.asarray(mask.array), -3))
        masks_moved.append(mask)
    found = _call(program, moved, masks_moved, options)
    where = {"out": heads, "lse": -2, "max": -1}

    def mean(name, x):
        first, second = jnp.split(x, 2, axis=where[name])
        wide = jnp.promote_types(x.dtype, jnp.float32)
        first, second = first.astype(wide), second.astype(wide)
        return (first + (second - first) / 2).astype(x.dtype)

    return {name: mean(name, x) for name, x in found.items()}


def _only(program: Program, *names: str) -> bool:
    return all(name.startswith(names) for name in program.mask)


def _has_keys_in_masks(program: Program) -> bool:
    return program.Skv > 1


def _simple(program: Program) -> bool:
    return not program.max_logits and not program.mapped


_WAYS = {"permuted": _permuted, "padded": _padded, "split": _split, "doubled": _doubled}
HOW: dict[str, Callable[[Program], bool]] = {
    "eager": lambda p: not p.mapped,
    "permuted": lambda p: _only(p, "dense") and not p.slopes and not p.dropout and _has_keys_in_masks(p),
    "padded": lambda p: (
        not _segments_or_lengths(p) and (p.slopes is None or not p.mask) and p.backend != "ascend"
    ),
    "split": lambda p: (
        _only(p, "dense")
        and not (p.slopes or p.dropout or p.sinks)
        and _simple(p)
        and p.dtype in ("float32", "float64")
        and _has_keys_in_masks(p)
    ),
    "doubled": lambda p: (
        not p.dropout and _only(p, "dense", "causal", "window", "prefix", "lengths", "cumulative")
    ),
}


def _segments_or_lengths(program: Program) -> bool:
    """Masks whose arrays have an entry for each key, or that check the number of keys."""
    return any(name.startswith(("segments",)) or "lengths" in name for name in program.mask)
