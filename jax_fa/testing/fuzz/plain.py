"""The call of `flash_attention` that a program stands for."""

from typing import Any

import jax_fa
from jax_fa.testing.fuzz import kinds
from jax_fa.testing.fuzz.program import Program

Arrays = dict[str, Any]


def attend(program: Program, operands: Arrays, made: list[Any], options: Arrays) -> Arrays:
    """`made`: masks."""
    return attend_with(program, operands, options | {"mask": kinds.joined(program.joined, made)})


def attend_with(program: Program, operands: Arrays, options: Arrays) -> Arrays:
    out, *others = as_tuple(
        jax_fa.flash_attention(
            **operands,
            **options,
            layout=program.layout,
            implementation=program.backend,
            return_logsumexp=True,
            return_max_logits=program.max_logits,
        )
    )
    return {"out": out, "lse": others[0]} | ({"max": others[1]} if program.max_logits else {})


def as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def axes_of(program: Program) -> tuple[int, int]:
    """The axes of the sequence and of the heads in arrays of the layout: from the end, or the first."""
    return {"BSND": (-3, -2), "SND": (-3, -2), "BNSD": (-2, -3), "NSD": (-2, -3), "SBND": (0, -2)}[
        program.layout
    ]
