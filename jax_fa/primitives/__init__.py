"""The primitives and the rules JAX needs for them, but those of derivatives, which `attention.py` holds, and of lowering.

All take the present arrays of an `Inputs` as a flat list; `tree` (its treedef) says which they are. `problem` is everything
static. Arrays keep the axis order they are stored in, so vmap moves no data: the batching rule writes the new axis into
the problem.

The rules are written once, for all kinds of them (`kinds.py`).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla

from jax_fa import backends, compat
from jax_fa.call import LIKE_OUT, STORED, Operands, Problem, Saved, has_rounding, stored_shape
from jax_fa.primitives.kinds import (
    BACKWARD,
    FORWARD,
    JVP,
    SECOND,
    SECOND_TANGENT,
    STATISTICS,
    TANGENT,
    TANGENTS,
    Inputs,
    Kind,
    second_results,
    shape_of,
)
from jax_fa.primitives.lowering import lower
from jax_fa.sharding import explicit_axes


def plain(problem: Problem) -> Problem:
    """The problem of a primitive that gives no gradients."""
    return replace(problem, gradients=None, mapped=0)


def forward(problem: Problem, operands: Operands) -> list[Any]:
    """out, softmax max, softmax sum and, if the problem says so, rounding."""
    return _bind(fwd_p, plain(problem), Inputs(operands=operands))


def jvp(problem: Problem, operands: Operands, tangents: Operands) -> list[Any]:
    """The results of the forward, then the tangents of out and log-sum-exp."""
    return _bind(jvp_p, plain(problem), Inputs(operands=operands, tangents=tangents))


def tangent(problem: Problem, operands: Operands, saved: Saved, tangents: Operands) -> list[Any]:
    """The tangents of out and log-sum-exp."""
    inputs = Inputs(operands=operands, saved=saved.of_forward(), tangents=tangents)
    return _bind(tangent_p, plain(problem), inputs)


def backward(problem: Problem, operands: Operands, saved: Saved) -> Operands:
    """The gradients that the problem asks for of the operands that are present."""
    problem = replace(problem, logsumexp=saved.dlogsumexp is not None)
    inputs = Inputs(operands=operands, saved=saved)
    names = inputs.call(problem).gradient_names
    return Operands(**dict(zip(names, _bind(bwd_p, problem, inputs), strict=True)))


def second(problem: Problem, operands: Operands, saved: Saved, tangents: Operands) -> dict[str, Any]:
    """The derivative of the backward along tangents; and the gradients by its cotangents, "dout" and "dlogsumexp"."""
    inputs = Inputs(operands=operands, saved=saved, tangents=tangents)
    names = second_results(inputs.call(problem))
    return dict(zip(names, _bind(second_p, problem, inputs), strict=True))


def second_tangent(
    problem: Problem, operands: Operands, saved: Saved, tangents: Operands, others: Operands
) -> list[Any]:
    """The second derivatives of out and log-sum-exp along two tangents."""
    inputs = Inputs(operands=operands, saved=saved.of_forward(), tangents=tangents, others=others)
    return _bind(second_tangent_p, plain(problem), inputs)


def forward_saved(problem: Problem, operands: Operands) -> Saved:
    """The forward as a derivative needs it: 16-bit calls keep what rounding took from the output."""
    if has_rounding(operands.query.dtype):
        out, m, l, rounding = forward(replace(problem, saves_rounding=True), operands)
        return Saved(out=out, m=m, l=l, rounding=rounding)
    out, m, l = forward(replace(problem, saves_rounding=False), operands)
    return Saved(out=out, m=m, l=l)


def forward_results(problem: Problem, saved: Saved) -> list[Any]:
    """Those of what is saved that the problem's forward gives."""
    return [saved.out, saved.m, saved.l, *([saved.rounding] if problem.saves_rounding else [])]


def two_steps(
    problem: Problem, tree, *leaves, keep: Callable[[Saved], Saved] = lambda saved: saved
) -> list[Any]:
    """A jvp as the forward, and the tangent from what it saves; `keep` may name that."""
    inputs = tree.unflatten(leaves)
    saved = keep(forward_saved(problem, inputs.operands))
    return [*forward_results(problem, saved), *tangent(problem, inputs.operands, saved, inputs.tangents)]


def _bind(primitive, problem: Problem, inputs: Inputs) -> list[Any]:
    if primitive in (second_p, second_tangent_p):  # the transposes of the others have use for hints
        inputs = replace(inputs, operands=replace(inputs.operands, hints=None))
    leaves, tree = jax.tree.flatten(compat.vary_alike(inputs))
    return primitive.bind(*leaves, tree=tree, problem=problem)


# --- abstract evaluation


def abstract_eval(kind, *avals, tree, problem):
    call = tree.unflatten(avals).call(problem)
    query = call.operands.query
    axes = explicit_axes(call)
    *batch, rows, heads, _ = axes

    def aval(name):
        shape = shape_of(call, name)
        if name in LIKE_OUT:
            return compat.placed(query, shape, query.dtype, stored_shape(axes, problem.out_axes), avals)
        if name in STATISTICS:
            return compat.placed(query, shape, call.acc, (*batch, heads, rows), avals)
        return getattr(call.operands, name).update(shape=shape, weak_type=False)

    return [aval(name) for name in kind.results(call)]


# --- batching


def _batched_operands(problem, operands, at):
    """Operands with one more batch dim, and the problem that says so; `at` holds each one's mapped axis."""
    where = {name: getattr(at, name) for name in STORED}
    hints = jax.tree.map(
        lambda x, axis: None if x is None else _moved(x, axis, 0),
        operands.hints,
        at.hints,
        is_leaf=lambda x: x is None,
    )
    batched = operands.map(lambda name, x: _moved(x, getattr(at, name), where.get(name) or 0))
    return problem.map_front(**where, out=at.query or 0), replace(batched, hints=hints)


def _moved(x, axis: int | None, to: int):
    """x with its mapped axis at `to`; size 1 there if it has none."""
    if axis is None:
        return jax.numpy.expand_dims(x, to)
    return x if axis == to else jax.numpy.moveaxis(x, axis, to)


def _unflatten_axes(tree, axes):
    """A tree of mapped axes, None where not mapped (which is a leaf here, not an absent operand)."""
    unmapped = object()
    marked = tree.unflatten([unmapped if a is None else a for a in axes])
    return jax.tree.map(lambda a: None if a is unmapped else a, marked)


def _batching_rule(kind, primitive, args, axes, *, tree, problem):
    inputs, at = tree.unflatten(args), _unflatten_axes(tree, axes)
    if kind is JVP and not jax.tree.leaves(at.operands):
        return _batched_tangents(inputs, args, axes, tree, problem)
    problem, operands = _batched_operands(problem, inputs.operands, at.operands)
    if not kind.gives_gradients:
        problem = replace(problem, mapped=0)
    out_at = at.operands.query or 0

    def where(name):
        """Where an array has the new axis: an operand's tangents and gradient where the operand has it."""
        return (
            out_at if name in LIKE_OUT else (getattr(at.operands, name, None) or 0) if name in STORED else 0
        )

    def batched(part, axes):
        if part is None:
            return None
        return replace(
            part,
            **{name: _moved(x, getattr(axes, name), where(name)) for name, x in part.present().items()},
        )

    inputs = Inputs(
        operands=operands,
        saved=batched(inputs.saved, at.saved),
        tangents=batched(inputs.tangents, at.tangents),
        others=batched(inputs.others, at.others),
    )
    return _bind(primitive, problem, inputs), [where(name) for name in kind.results(inputs.call(problem))]


def _batched_tangents(inputs, args, axes, tree, problem):
    """The batching rule of the jvp where the tangents alone are mapped (`jax.jacfwd`): one forward serves them all."""
    lead = [i for i, axis in enumerate(axes) if axis is not None]

    def tangents_of(*mapped):
        filled = list(args)
        for i, x in zip(lead, mapped, strict=True):
            filled[i] = x
        return tree.unflatten(filled).tangents

    saved = forward_saved(problem, inputs.operands)
    primals = forward_results(problem, saved)
    found = jax.vmap(
        lambda *mapped: tangent(problem, inputs.operands, saved, tangents_of(*mapped)),
        in_axes=[axes[i] for i in lead],
    )(*(args[i] for i in lead))
    return [*primals, *found], [*(None for _ in primals), *(0 for _ in found)]


# --- dead code (scan and remat ask for it): results that nobody uses are not computed


def _without_unused(kind, used: list[bool], equation):
    if not any(used):
        return [False] * len(equation.invars), None
    params = equation.params
    problem, tree = params["problem"], params["tree"]
    names = kind.results(tree.unflatten([x.aval for x in equation.invars]).call(problem))
    kept = [name for name, use in zip(names, used, strict=True) if use]
    if kind.gives_gradients:
        outvars = [x for x, use in zip(equation.outvars, used, strict=True) if use]
        params = params | {"problem": replace(problem, gradients=tuple(kept))}
        return [True] * len(equation.invars), equation.replace(outvars=outvars, params=params)
    if kind is JVP and not set(kept) & set(TANGENTS):
        operands, tree = jax.tree.flatten(Inputs(operands=tree.unflatten(equation.invars).operands))
        outvars = equation.outvars[: len(names) - len(TANGENTS)]
        forward = equation.replace(
            invars=operands, outvars=outvars, primitive=fwd_p, params=params | {"tree": tree}
        )
        ours = set(map(id, operands))
        return [id(x) in ours for x in equation.invars], forward
    return [True] * len(equation.invars), equation


# --- assembly


def _primitive(name: str, kind: Kind) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(partial(abstract_eval, kind))
    batching.primitive_batchers[primitive] = partial(_batching_rule, kind, primitive)
    compat.def_dce(primitive, partial(_without_unused, kind))
    rule = partial(lower, kind, two_steps)
    mlir.register_lowering(primitive, rule)
    for platform in backends.PLATFORMS:
        mlir.register_lowering(primitive, rule, platform=platform)
    return primitive


fwd_p = _primitive("flash_attention_fwd", FORWARD)
bwd_p = _primitive("flash_attention_bwd", BACKWARD)
tangent_p = _primitive("flash_attention_tangent", TANGENT)
jvp_p = _primitive("flash_attention_jvp", JVP)
second_p = _primitive("flash_attention_second", SECOND)
second_tangent_p = _primitive("flash_attention_second_tangent", SECOND_TANGENT)
KINDS = {
    fwd_p: FORWARD,
    bwd_p: BACKWARD,
    tangent_p: TANGENT,
    jvp_p: JVP,
    second_p: SECOND,
    second_tangent_p: SECOND_TANGENT,
}
