"""The same call written in other ways, which must give the same."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import jax_fa
from jax_fa import masks
from jax_fa.testing.fuzz import functions, kinds, sharded
from jax_fa.testing.fuzz.plain import Arrays, attend, axes_of
from jax_fa.testing.fuzz.program import Program


def _keys_of(program: Program, operands: Arrays, made: list[Any], fn: Callable[[Any, int, Any], Any]) -> Any:
    """Everything that has keys, through `fn(array, axis, filling)`."""
    sequence, _ = axes_of(program)
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
    return attend(program, moved, masks_moved, options)


def _padded(program: Program, operands: Arrays, made: list[Any], options: Arrays) -> Arrays:
    """Keys of NaN at the end, which are masked by the lengths."""
    count = 1 + program.seed % 40

    def pad(x, axis, filling):
        shape = list(x.shape)
        shape[axis] = count
        return jnp.concatenate([x, jnp.full(shape, filling, x.dtype)], axis=axis)

    moved, masks_moved = _keys_of(program, operands, made, pad)
    return attend(program, moved, [*masks_moved, masks.Lengths(key=program.Skv)], options)


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
        found = attend(program, moved, masks_moved, options)
        parts.append((found["out"], found["lse"]))
    out, lse = jax_fa.merge(*parts, layout=program.layout)
    return {"out": out, "lse": lse}


def _doubled(program: Program, operands: Arrays, made: list[Any], options: Arrays) -> Arrays:
    """All heads twice; the mean of both halves."""
    _, heads = axes_of(program)
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
    found = attend(program, moved, masks_moved, options)
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


WAYS = {
    "permuted": _permuted,
    "padded": _padded,
    "split": _split,
    "doubled": _doubled,
    "sharded": sharded.attend,
}
HOW: dict[str, Callable[[Program], bool]] = {
    "functions": lambda p: functions.serves(p) and (not p.slopes or not _placed(p)),
    "sharded": sharded.serves,
    "eager": lambda p: not p.mapped,
    "permuted": lambda p: _only(p, "dense") and not p.slopes and not p.dropout and _has_keys_in_masks(p),
    "padded": lambda p: (
        not _segments_or_lengths(p)
        and p.joined == "all"
        and (p.slopes is None or not p.mask)
        and p.backend != "ascend"
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


def merges(program: Program) -> bool:
    """Whether the results are merged from those of parts of the keys.

    Devices that exchange keys add up sums; but a tangent is that of each part, moved by how far its output is from that of all
    keys: outputs which both are rounded.
    """
    p = program
    adds_outputs = p.derivative == "forward" or sharded.strategy(p)[1] == "all_reduce"
    by_devices = p.how == "sharded" and adds_outputs
    return p.how == "split" or p.joined != "all" or by_devices


def _placed(program: Program) -> bool:
    return any(name in kinds.PLACING and name != "causal" for name in program.mask)


def _segments_or_lengths(program: Program) -> bool:
    """Masks whose arrays have an entry for each key, or that check the number of keys."""
    return any(name.startswith(("segments",)) or "lengths" in name for name in program.mask)
