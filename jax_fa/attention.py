"""START READING HERE: attention and its derivative.

`attention` is a `custom_vjp` around the two primitives. The forward keeps, beside its inputs and output, two
scalars per query row: the softmax max m and sum l. The backward recomputes the probabilities as
exp(s - m) / l, so nothing of size Sq x Skv is ever stored. 16-bit calls also keep what rounding took from the
output, in 16 bits (see `Saved`).

Above this file stand the public functions, which turn their arguments into a `Call`: a `Problem` (static) and
`Operands` (arrays). Below stand the primitives, which choose a backend when they are lowered.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from jax_fa import compat, primitives, softmax
from jax_fa.call import Call, Operands, Problem, Saved, has_rounding

OUT_NAME = "flash_attention_out"
STATS_NAME = "flash_attention_stats"


class Attention(NamedTuple):
    out: Any
    logsumexp: Any  # has a gradient if problem.logsumexp
    softmax_max: Any  # no gradient
    softmax_sum: Any  # no gradient


def attention(call: Call) -> Attention:
    # Outside of the custom_vjp, so that JAX transposes it: under shard_map the gradient of an operand that
    # all devices share is the sum of theirs.
    return _attention(call.problem, compat.vary_alike(call.operands))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(problem: Problem, operands: Operands) -> Attention:
    out, m, l = primitives.forward(problem, operands)
    return _named(out, m, l)


def _named(out, m, l) -> Attention:
    # Named so that a remat policy can keep them: with both kept, the backward needs no second forward.
    out = checkpoint_name(out, OUT_NAME)
    m, l = checkpoint_name(m, STATS_NAME), checkpoint_name(l, STATS_NAME)
    return Attention(out, softmax.logsumexp(m, l), m, l)


def _attention_fwd(problem: Problem, operands: Operands):
    rounding = None
    if has_rounding(operands.query.dtype):
        out, m, l, rounding = primitives.forward(replace(problem, saves_rounding=True), operands)
        rounding = checkpoint_name(rounding, OUT_NAME)
    else:
        out, m, l = primitives.forward(problem, operands)
    found = _named(out, m, l)
    return found, (operands, found.out, found.softmax_max, found.softmax_sum, rounding)


def _attention_bwd(problem: Problem, residuals, cotangents: Attention):
    operands, out, m, l, rounding = residuals
    saved = Saved(
        out=out,
        m=m,
        l=l,
        dout=cotangents.out,
        rounding=rounding,
        dlogsumexp=cotangents.logsumexp if problem.logsumexp else None,
    )
    return (primitives.backward(problem, operands, saved),)


_attention.defvjp(_attention_fwd, _attention_bwd)
