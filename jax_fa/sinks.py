"""Attention sinks of calls whose backend takes none: plain JAX beside a call without them.

A sink is one more logit in each row's softmax, without a value. It multiplies the output by the share of the keys in the
sum, sigmoid(log-sum-exp - sink).

Where a backend may take sinks itself, they are an operand of the primitives, and this file is what these are lowered to for
every other backend. The first derivatives come from the statistics that include the sink, of which the weights of the keys
are exp(s - m) / l as well; those of higher order are JAX's own, of the composition.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_fa import primitives, softmax
from jax_fa.call import (
    DIFFERENTIABLE,
    Axes,
    Call,
    Operands,
    Problem,
    has_rounding,
    narrowed,
    rounding_unit,
    widened,
)
from jax_fa.primitives import Inputs

Moving = dict[str, Any]


# (Rematerialized, since its inputs are residuals already and the output in full precision would be one more.)
@partial(jax.jit, static_argnums=0)
@partial(jax.checkpoint, static_argnums=0)
def joined(axes: Axes, out, rounding: list[Any], m, l, sinks):
    """out, m and l with sinks `*#B N`."""
    exact, m, l = _exact(axes, out, rounding, m, l, sinks)
    return exact.astype(out.dtype), m, l


def _exact(axes: Axes, out, rounding: list[Any], m, l, sinks):
    """The same with an output that is not rounded."""
    rows = softmax.rows_as_stored(share(m, l, sinks[..., None]), axes)
    exact = widened(out, rounding[0] if rounding else None, rows.dtype)
    # A fully masked row has no output, and whatever its cotangent is, none of it reaches the sink.
    found = jnp.where(softmax.rows_as_stored(l == 0, axes), 0, exact * rows)
    return found, *softmax.with_sink(m, l, sinks[..., None])


def share(m, l, sinks):
    """That of the keys in each row's sum, with sinks that broadcast to it."""
    # (The derivative of jax.nn.sigmoid at 1 - 1e-9 is 0 in float32.)
    return jnp.exp(jax.nn.log_sigmoid(softmax.logsumexp(m, l) - sinks))


def beside(problem: Problem, operands: Operands, sinks) -> tuple[list[Any], Any]:
    """[out, m, l], and m without the sink; accurate gradients need the output before it was rounded."""
    rounded = has_rounding(operands.query.dtype)
    asked = replace(problem, logsumexp=True, rounding_if_derived=rounded, saves_rounding=False)
    out, m, l, *rounding = primitives.forward(asked, operands)
    return list(joined(problem.out_axes, out, rounding, m, l, sinks)), m


def weight(m, l, sinks):
    """That of the sink in each row, `*B N Sq`, from statistics that include it."""
    return jnp.exp(sinks[..., None] - m) * softmax.inverse(l)


# --- what the primitives are lowered to


def _apart(operands: Operands) -> tuple[Operands, Any]:
    return replace(operands, sinks=None), operands.sinks


def _forward(problem: Problem, x: Inputs) -> list[Any]:
    operands, sinks = _apart(x.operands)
    asked = replace(problem, logsumexp=True, rounding_if_derived=False)
    out, m, l, *rounding = primitives.forward(asked, operands)
    if not problem.saves_rounding:
        found = list(joined(problem.out_axes, out, rounding, m, l, sinks))
        return found + [jnp.zeros(out.shape, out.dtype)] * problem.rounding_if_derived
    exact, m, l = _exact(problem.out_axes, out, rounding, m, l, sinks)
    narrow, lost = narrowed(exact, out.dtype)
    return [narrow, m, l, (lost / rounding_unit(out.dtype)).astype(out.dtype)]


def _backward(problem: Problem, x: Inputs) -> list[Any]:
    operands, sinks = _apart(x.operands)
    call, saved = x.call(problem), x.saved
    names = tuple(name for name in call.gradient_names if name != "sinks")
    found: Moving = {}
    if names:
        found |= primitives.backward(replace(problem, gradients=names), operands, saved).present()
    if "sinks" in call.gradient_names:
        full = call.full(saved)
        moved = -softmax.row_sums(
            widened(full.out, full.rounding, call.acc) * full.dout.astype(call.acc), problem.out_axes
        )
        if full.dlogsumexp is not None:
            moved += full.dlogsumexp
        rows = jnp.sum(weight(full.m, full.l, sinks) * moved, axis=-1)
        only = call.replace(problem=replace(problem, gradients=("sinks",)))
        found["sinks"] = only.gradients({"sinks": rows}).sinks
    return [found[name] for name in call.gradient_names]


def _tangent(problem: Problem, x: Inputs) -> list[Any]:
    operands, sinks = _apart(x.operands)
    along, moved = _apart(x.tangents)
    call = x.call(problem)
    saved = call.full(x.saved)
    if along.present():
        dout, dlse = primitives.tangent(problem, operands, x.saved, along)
    else:
        dout, dlse = jnp.zeros(call.out_shape, call.dtype), jnp.zeros(call.stats_shape, call.acc)
    if moved is None:
        return [dout, dlse]
    towards = weight(saved.m, saved.l, sinks) * moved[..., None]
    out = widened(saved.out, saved.rounding, call.acc)
    lost = out * softmax.rows_as_stored(towards, problem.out_axes)
    return [(dout.astype(call.acc) - lost).astype(call.dtype), dlse + towards]


def _composed(problem: Problem, operands: Operands) -> Callable[[Moving], tuple[Any, Any]]:
    """(out, log-sum-exp) as a function of what has derivatives."""
    asked = replace(problem, gradients=None, mapped=0)

    def run(moving: Moving):
        (out, m, l), _ = beside(asked, *_apart(replace(operands, **moving)))
        return out, softmax.logsumexp(m, l)

    return run


def _moving(call: Call, arrays: Operands | None) -> Moving:
    """The operands that have derivatives in the shapes of their gradients; or their tangents, 0 where there is none."""
    given = {n: x for n, x in call.operands.present().items() if n in DIFFERENTIABLE}

    def full(name: str, x):
        along = x if arrays is None else getattr(arrays, name)
        along = jnp.zeros((), x.dtype) if along is None else along
        return jnp.broadcast_to(along, call.gradient_shape(name))

    return {name: full(name, x) for name, x in given.items()}


def _second(problem: Problem, x: Inputs) -> list[Any]:
    call, saved = x.call(problem), x.call(problem).full(x.saved)
    run = _composed(problem, call.operands)
    point, along = _moving(call, None), _moving(call, x.tangents if x.tangents is not None else Operands())

    def pulled(point, cotangents):
        return jax.vjp(run, point)[1](cotangents)[0]

    given, moved = (
        (_or_zeros(out, call.out_shape, call.dtype), _or_zeros(lse, call.stats_shape, call.acc))
        for out, lse in ((saved.dout, saved.dlogsumexp), (saved.dout_tangent, saved.dlogsumexp_tangent))
    )
    found = jax.jvp(pulled, (point, given), (along, moved))[1]
    dout, dlse = jax.jvp(run, (point,), (along,))[1]
    found |= {"dout": dout, "dlogsumexp": dlse}
    return [found[name] for name in primitives.SECOND.results(call)]


def _or_zeros(x, shape, dtype):
    return jnp.zeros(shape, dtype) if x is None else x.astype(dtype)


def _second_tangent(problem: Problem, x: Inputs) -> list[Any]:
    call = x.call(problem)
    run = _composed(problem, call.operands)
    point, along, others = (_moving(call, arrays) for arrays in (None, x.tangents, x.others))

    def first(point):
        return jax.jvp(run, (point,), (along,))[1]

    return list(jax.jvp(first, (point,), (others,))[1])


for _kind, _form in (
    (primitives.FORWARD, _forward),
    (primitives.BACKWARD, _backward),
    (primitives.TANGENT, _tangent),
    (primitives.SECOND, _second),
    (primitives.SECOND_TANGENT, _second_tangent),
):
    primitives.def_sinks_beside(_kind, _form)
