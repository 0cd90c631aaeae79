"""Programs of `flash_attention_score` as calls of `npu_fusion_attention`, and of its backward.

torch_npu's names, and a mask for each mode that has one.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

import jax_fa
from jax_fa.testing.fuzz import score
from jax_fa.testing.fuzz.program import Program

_NAMES = {
    "pre_tokens": "pre_tockens",
    "next_tokens": "next_tockens",
    "drop_mask": "dropout_mask",
}
_SIDE = 2048  # of a compressed mask


def attend(program: Program, operands: Any, values: Any, dropout: Any, known: bool) -> dict[str, Any]:
    given = _arguments(program, operands, values, dropout, known)
    given["scale"] = given.pop("scale_value")
    found = jax_fa.npu_fusion_attention(**given)
    return score.results(program, found.attention, found.softmax_max, found.softmax_sum)


def with_gradients(
    program: Program, operands: Any, values: Any, dropout: Any, known: bool, cotangent: Any
) -> dict[str, Any]:
    """The results, and the gradients of the entry that takes what the forward gave."""
    given = _arguments(program, operands, values, dropout, known)
    scale = given.pop("scale_value")
    found = jax_fa.npu_fusion_attention(**given, scale=scale)
    got = jax_fa.npu_fusion_attention_grad(
        **given,
        scale_value=scale,
        dy=cotangent,
        softmax_max=found.softmax_max,
        softmax_sum=found.softmax_sum,
        attention_in=found.attention,
    )
    gradients = {"dquery": got.dq, "dkey": got.dk, "dvalue": got.dv}
    if program.slopes:
        gradients["dalibi_slopes"] = got.dpse
    elif program.bias:
        gradients["dbias"] = got.dpse
    if program.sinks:
        gradients["dsinks"] = got.dsink
    return score.results(program, found.attention, found.softmax_max, found.softmax_sum) | gradients


def serves_gradients(program: Program) -> bool:
    """Whether the arrays of a program are those of the entry, and not made from others."""
    p = program
    return (
        p.derivative == "reverse"
        and p.scale != "traced"
        and not (p.bias and (p.layout == "TND" or score.pse_type(p)))
    )


def _arguments(program: Program, operands: Any, values: Any, dropout: Any, known: bool) -> dict[str, Any]:
    p = program
    given = score.arguments(p, operands, values, dropout, known)
    if given["atten_mask"] is None:
        given["atten_mask"] = _mask(p, given["sparse_mode"])
    if p.layout == "TND":
        given["softmax_layout"] = "TND"
    return {_NAMES.get(name, name): x for name, x in given.items()}


def _mask(program: Program, mode: int) -> Any:
    """Without one, modes and tokens count for nothing."""
    p = program
    if mode == 1:
        return None
    if mode in (0, 5):
        shape = (p.Sq, p.Skv) if p.layout == "TND" else (p.B[0], 1, p.Sq, p.Skv)
        return jnp.zeros(shape, jnp.uint8)
    triangle = np.triu(np.ones((_SIDE, _SIDE), np.uint8), 1)
    if mode == 6:
        below = np.zeros((_SIDE // 2, _SIDE), np.uint8)
        below[:, _SIDE // 2 :] = 1
        triangle = np.concatenate([triangle, below])
    return triangle
