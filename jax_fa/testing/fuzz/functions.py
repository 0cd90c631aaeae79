"""A call whose bias, slopes and soft cap are a `score_mod`, and whose masks are a `mask_mod` or a `BlockMask`."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

import jax_fa
from jax_fa.testing.fuzz import kinds
from jax_fa.testing.fuzz.plain import Arrays, attend_with
from jax_fa.testing.fuzz.program import Program

Visible = Callable[[Any, Any, Any, Any], Any]
MOVED = ("bias", "alibi_slopes", "logits_soft_cap")


def serves(program: Program) -> bool:
    """Whether all of its masks are functions of a pair, and leave rows where they are."""
    p = program
    known = all(name in _MASKS or name.startswith("dense") for name in p.mask)
    something = p.mask or p.bias or p.slopes or p.cap
    there = all((*p.B, p.Sq, p.Skv))  # an index into a dim of size 0 is an error
    return bool(p.backend == "xla" and known and something and there and p.derivative != "second")


def attend(program: Program, operands: Arrays, values: Arrays, options: Arrays) -> Arrays:
    p = program
    given = {name: x for name, x in operands.items() if name not in MOVED}
    options = dict(options)
    cap = operands.get("logits_soft_cap", options.pop("logits_soft_cap", None))
    if p.mask:
        visible = [_visible(p, name, values[name]) for name in p.mask]

        def mask_mod(*at):
            return kinds.joined(p.joined, [fn(*at) for fn in visible])

        options |= _as_mask(p, mask_mod)
    if p.bias or p.slopes or cap is not None:
        options["score_mod"] = _score(p, operands, cap)
    return attend_with(p, given, options)


def _as_mask(p: Program, mask_mod: Visible) -> Arrays:
    if p.seed % 2:
        return {"mask_mod": mask_mod}
    size = ((16, 16), 128, (7, 40))[p.seed % 3]
    return {"mask": jax_fa.create_block_mask(mask_mod, p.B or None, p.N, p.Sq, p.Skv, size)}


# --- elements of arrays that broadcast


def _element(p: Program, x: Any, rest: int) -> Callable[..., Any]:
    """That of `x`, `*#B` and `rest` dims more, at an index of the batch, counted through, and of the others."""
    x = jnp.asarray(x)
    x = x.reshape((1,) * (len(p.B) + rest - x.ndim) + x.shape)
    lead, inner = x.shape[: len(p.B)], x.shape[len(p.B) :]
    same = math.prod(lead) == 1
    x = (x if same else jnp.broadcast_to(x, (*p.B, *inner))).reshape((-1, *inner))

    def at(batch, *others):
        where = [i if size != 1 else 0 for i, size in zip(others, inner, strict=True)]
        return x[(0 if same else batch, *where)]

    return at


def _score(p: Program, operands: Arrays, cap: Any) -> Callable[..., Any]:
    bias = _element(p, operands["bias"], 3) if p.bias else None
    slope = _element(p, operands["alibi_slopes"], 1) if p.slopes else None

    def score_mod(score, batch, head, row, column):
        if bias is not None:
            score = score + bias(batch, head, row, column).astype(score.dtype)
        if slope is not None:
            away = jnp.abs(column - row).astype(score.dtype)
            score = score - slope(batch, head).astype(score.dtype) * away
        if cap is None:
            return score
        limit, masked = jnp.asarray(cap, score.dtype), jnp.isneginf(score)
        return jnp.where(masked, score, limit * jnp.tanh(jnp.where(masked, 0, score) / limit))

    return score_mod


# --- masks


def _visible(p: Program, name: str, values: Arrays) -> Visible:
    if name.startswith("dense"):
        return _element(p, values["array"], 3)
    numbers = {key: _element(p, x, 1 if name == "segments" else 0) for key, x in values.items()}
    return _MASKS[name](p, numbers)


def _lengths(p: Program, of: Any) -> Visible:
    def visible(batch, head, row, column):
        found = jnp.bool_(True)
        for name, i in (("query", row), ("key", column)):
            found = found & (i < of[name](batch)) if name in of else found
        return found

    return visible


_MASKS: dict[str, Callable[[Program, Any], Visible]] = {
    "causal": lambda p, of: lambda batch, head, row, column: column <= row,
    "lengths": _lengths,
    "key_lengths": _lengths,
    "query_lengths": _lengths,
    "prefix": lambda p, of: lambda batch, head, row, column: (column <= row) | (column < of["length"](batch)),
    "segments": lambda p, of: (
        lambda batch, head, row, column: of["query"](batch, row) == of["key"](batch, column)
    ),
}
