"""The backward of a call from statistics, an output and its cotangent that the caller gives.

Context-parallel code calls it for one block of keys at a time, with the statistics and the output of all blocks merged:
the probabilities are exp(x - max) / sum of what is given, whatever these are, and delta = rowsum(dy * attention_in).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jax_fa import arguments, compat, entry, primitives, softmax
from jax_fa.attention import attention
from jax_fa.call import DIFFERENTIABLE, Call, Operands, Problem, Saved
from jax_fa.cann import sinks
from jax_fa.cann.operator import Built, Operator

R = TypeVar("R")
_STORED, _ROPES = ("query", "key", "value"), ("query_rope", "key_rope")


class Gradients(NamedTuple):
    """Each as its array is stored; those of query and key have those of their rotated parts beside them, along head_dim."""

    query: Any
    key: Any
    value: Any
    pse: Any
    sink: Any


def request(
    operator: Operator, softmax_max, softmax_sum, attention_in, dy, *, finish: Callable[[Gradients], R]
) -> entry.Request[R]:
    """What an entry asks for that returns the gradients."""
    given = dict(zip((*_STORED, *_ROPES), (*operator.arrays, *operator.ropes), strict=True))
    given |= {"pse": operator.pse.values}
    arrays = {name: arguments.array(name, x) for name, x in given.items() if x is not None or name in _STORED}
    built, pull = _pulled_back(operator, arrays)
    m, l = built.statistics(softmax_max, softmax_sum)
    out, dout = built.like_out("attention_in", attention_in), built.like_out("dy", dy)
    differentiable = tuple(_differentiable(built.call.operands))
    wanted = tuple(name for name in differentiable if name not in ("scale", "soft_cap"))

    def run(call: Call) -> Gradients:
        problem = replace(call.problem, gradients=wanted, logsumexp=False, partial=True)
        found = _backward(problem, call.operands, m, l, out, dout)
        primal = _differentiable(call.operands)
        zeros = {name: jnp.zeros_like(primal[name]) for name in differentiable}
        gradients = pull(zeros | found)
        dsink = None
        if built.sink is not None:
            dsink = sinks.gradient(built.sink, m, l, _weighted_cotangents(call, m, l, dout))
            dsink = compat.summed_like(dsink, built.sink)
        return Gradients(
            query=operator.beside(gradients["query"], gradients.get("query_rope"), built.call.dims.N),
            key=operator.beside(gradients["key"], gradients.get("key_rope"), built.call.dims.K),
            value=gradients["value"],
            pse=gradients.get("pse"),
            sink=dsink,
        )

    return entry.Request(built.call, finish, run)


def _pulled_back(operator: Operator, arrays: dict[str, Any]):
    """The call of these arrays, and from the gradients of its operands to those of the arrays, by name."""
    made: list[Built] = []

    def operands(arrays):
        made.append(
            replace(
                operator,
                arrays=tuple(arrays[name] for name in _STORED),
                ropes=tuple(arrays.get(name) for name in _ROPES),
                pse=replace(operator.pse, values=arrays.get("pse")),
            ).built()
        )
        found = made[0].call.operands
        return _differentiable(found), found

    _, pull, whole = jax.vjp(operands, arrays, has_aux=True)
    built = replace(made[0], call=Call.of(made[0].call.problem, whole))
    return built, lambda gradients: pull(gradients)[0]


def _differentiable(operands: Operands) -> dict[str, Any]:
    return {name: x for name, x in operands.present().items() if name in DIFFERENTIABLE}


def _weighted_cotangents(call: Call, m, l, dout):
    """sum_j p_j dp_j of each row, over the keys of this call: those of other blocks have theirs."""
    own = attention(call.replace(problem=replace(call.problem, logsumexp=True, gradients=None)))
    products = dout.astype(jnp.float32) * own.out.astype(jnp.float32)
    summed = softmax.row_sums(products, call.problem.out_axes)
    # A fully masked row has no output, and whatever its cotangent is, none of it reaches the sink.
    masked = jax.lax.stop_gradient(own.logsumexp) == -softmax.FLT_MAX
    return _share(l, m, own.logsumexp) * jnp.where(masked, 0, summed)


def _share(l, m, lse):
    """exp(lse - the log-sum-exp of m and l): what the keys of a call have of the weights of all; 0 without a visible key."""
    # There, exp would get huge numbers of both signs.
    masked = (l == 0) | (jax.lax.stop_gradient(lse) == -softmax.FLT_MAX)
    return jnp.where(masked, 0, jnp.exp(jnp.where(masked, 0, lse - softmax.logsumexp(m, l))))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(problem: Problem, operands: Operands, m, l, out, dout) -> dict[str, Any]:
    """The gradients that the problem wants; arrays as the kernels have them."""
    found = primitives.backward(problem, operands, Saved(out=out, m=m, l=l, dout=dout)).present()
    return {name: compat.summed_like(x, getattr(operands, name)) for name, x in found.items()}


@_backward.defjvp
def _(problem: Problem, primals, tangents):
    """The rules of the primitives take what is saved for a function of the operands. Here it is not."""
    _, moved = jax.jvp(partial(_of_attention, problem), primals, tangents)
    return _backward(problem, *primals), moved


def _of_attention(problem: Problem, operands: Operands, m, l, out, dout) -> dict[str, Any]:
    """The same from attention itself, whose every derivative is known.

    With P' of the call's own statistics, P = w P' for w = exp(lse' - lse), a factor of rows. So dS = P (dP - delta) is what
    the cotangents w dout of out' and rowsum(w dout out') - w delta of lse' give.
    """

    def run(arrays):
        asked = replace(problem, logsumexp=True, gradients=None)
        result = attention(Call.of(asked, replace(operands, **arrays)))
        return result.out, result.logsumexp

    arrays = {name: x for name, x in _differentiable(operands).items() if name in (problem.gradients or ())}
    (own, lse), pull = jax.vjp(run, arrays)
    weight = _share(l, m, lse)
    wide = dout.astype(jnp.float32)
    moved = softmax.rows_as_stored(weight, problem.out_axes) * wide
    delta, own_delta = (
        softmax.row_sums(products, problem.out_axes)
        for products in (wide * out.astype(jnp.float32), moved * own.astype(jnp.float32))
    )
    return pull((moved.astype(own.dtype), (own_delta - weight * delta).astype(lse.dtype)))[0]
