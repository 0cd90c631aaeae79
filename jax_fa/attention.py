"""START READING HERE: attention and its derivative.

`attention` is a `custom_vjp` around the two primitives. The forward keeps, beside its inputs and output, two
numbers per query row: the softmax max m and sum l. The backward recomputes the probabilities as
exp(s - m) / l, so nothing of size Sq x Skv is ever stored.

Above this file stand the public functions, which turn their arguments into a `Problem` (static) and
`Operands` (arrays). Below stand the primitives, which choose a backend when they are lowered.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from jax_fa import compat, primitives, softmax
from jax_fa.primitives import Backward
from jax_fa.problem import Operands, Problem

OUT_NAME = "flash_attention_out"
STATS_NAME = "flash_attention_stats"


class Attention(NamedTuple):
    out: Any
    logsumexp: Any  # has a gradient if problem.logsumexp
    softmax_max: Any  # no gradient
    softmax_sum: Any  # no gradient


def attention(problem: Problem, operands: Operands) -> Attention:
    # Outside of the custom_vjp, so that JAX transposes it: under shard_map the gradient of an operand that
    # all devices share is the sum of theirs.
    return _attention(problem, compat.vary_alike(operands))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(problem: Problem, operands: Operands) -> Attention:
    return _attention_fwd(problem, operands)[0]


def _attention_fwd(problem: Problem, operands: Operands):
    out, m, l = primitives.forward(problem, operands)
    # Named so that a remat policy can keep them: with both kept, the backward needs no second forward.
    out = checkpoint_name(out, OUT_NAME)
    m, l = checkpoint_name(m, STATS_NAME), checkpoint_name(l, STATS_NAME)
    return Attention(out, softmax.logsumexp(m, l), m, l), (operands, out, m, l)


def _attention_bwd(problem: Problem, residuals, cotangents: Attention):
    operands, out, m, l = residuals
    args = Backward(
        operands=operands,
        out=out,
        m=m,
        l=l,
        dout=cotangents.out,
        dlogsumexp=cotangents.logsumexp if problem.logsumexp else None,
    )
    return (primitives.backward(problem, args),)


_attention.defvjp(_attention_fwd, _attention_bwd)
