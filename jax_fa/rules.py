"""Between JAX's rules of derivatives, which take flat lists, and those of `attention.py`, which take `Inputs`.

In `Inputs` of tangents, cotangents or avals, what has none is None.
"""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval

from jax_fa import compat, primitives
from jax_fa.backends.xla import backend as portable
from jax_fa.call import (
    DIFFERENTIABLE,
    STORED,
    Operands,
    Problem,
    Saved,
    accumulator_dtype,
    has_rounding,
    sum_to,
    widened,
)
from jax_fa.primitives.kinds import Inputs

_PARTS = tuple(f.name for f in fields(Inputs))


def _only(x: Inputs) -> Inputs:
    """The differentiable arrays; a part without any is None."""

    def part(name: str):
        given = getattr(x, name)
        if given is None:
            return None
        keep = None if name == "saved" else DIFFERENTIABLE
        found = {n: a for n, a in given.present().items() if keep is None or n in keep}
        if not found:
            return None
        blank = {f.name: None for f in fields(given)}
        return type(given)(**blank | found)

    return Inputs(**{name: part(name) for name in _PARTS})


# --- jvp


def def_jvp(primitive: Primitive, rule: Callable[[Problem, Inputs, Inputs], tuple[list, list]]) -> None:
    """`rule(problem, inputs, their tangents)` gives the results and their tangents, None for zero."""

    def jvp(primals, tangents, *, tree, problem):
        along = tree.unflatten([None if type(t) is ad.Zero else t for t in tangents])
        results, moved = rule(problem, tree.unflatten(primals), _only(along))
        zeros = (ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results)
        return results, [zero if t is None else t for t, zero in zip(moved, zeros, strict=True)]

    ad.primitive_jvps[primitive] = jvp


# --- transposes


def def_transpose(
    primitive: Primitive, rule: Callable[[Problem, Inputs, Inputs, dict[str, Any]], Inputs]
) -> None:
    """`rule(problem, inputs, avals of the linear ones, cotangents of results by name)` gives those of the linear ones."""
    kind = primitives.KINDS[primitive]

    def transpose(cotangents, *args, tree, problem):
        avals = [x.aval if ad.is_undefined_primal(x) else jax.typeof(x) for x in args]
        names = kind.results(tree.unflatten(avals).call(problem))
        given = {n: ct for n, ct in zip(names, cotangents, strict=True) if type(ct) is not ad.Zero}
        linear = _only(
            tree.unflatten(
                [aval if ad.is_undefined_primal(x) else None for aval, x in zip(avals, args, strict=True)]
            )
        )
        if not given:
            return [None] * len(args)
        inputs = tree.unflatten([None if ad.is_undefined_primal(x) else x for x in args])
        found = rule(problem, inputs, linear, given)
        return _flat(found, tree)

    ad.primitive_transposes[primitive] = transpose


def _flat(found: Inputs, tree) -> list[Any]:
    """The arrays of `found` in the order of the leaves of the tree, None for those it lacks."""
    at = tree.unflatten(range(tree.num_leaves))
    leaves: list[Any] = [None] * tree.num_leaves
    for part in _PARTS:
        given = getattr(found, part)
        for name, x in {} if given is None else given.present().items():
            leaves[getattr(getattr(at, part), name)] = x
    return leaves


def asking(problem: Problem, operands: Operands, linear: Operands | None, *more: str) -> Problem:
    """The problem of a derivative whose gradients are the cotangents of linear operands; `more`: other results of it."""
    if linear is None:
        return replace(problem, gradients=more, mapped=0)
    broadcast = {name: x.shape for name, x in linear.present().items() if name not in STORED}
    mapped = [
        i + 1
        for name, shape in broadcast.items()
        for i in range(problem.batch_rank)
        if getattr(operands, name).shape[i] != shape[i]
    ]
    return replace(problem, gradients=(*linear.present(), *more), mapped=max(mapped, default=0))


def fitted(found: dict[str, Any], linear: Any) -> Any:
    """The cotangents of linear arrays (`Operands` or `Saved`) by name, summed over the batch dims that they lack."""
    if linear is None:
        return None

    def fit(name, aval):
        x = found.get(name)
        return None if x is None else sum_to(x, aval.shape, accumulator_dtype(x.dtype)).astype(aval.dtype)

    return replace(linear, **{name: fit(name, aval) for name, aval in linear.present().items()})


# --- a jvp taken apart. `jax.jvp` runs the forward and its tangent in one pass. `jax.grad`, `jax.linearize` and remat know the
# operands first and the tangents later: for them a jvp is two steps, the forward, whose results are residuals, and the
# tangent from these.

OUT_NAME = "flash_attention_out"
STATS_NAME = "flash_attention_stats"


def named(saved: Saved) -> Saved:
    """Named so that a remat policy can keep them: with both kept, no derivative needs a second forward."""
    rounding = None if saved.rounding is None else checkpoint_name(saved.rounding, OUT_NAME)
    return Saved(
        out=checkpoint_name(saved.out, OUT_NAME),
        m=checkpoint_name(saved.m, STATS_NAME),
        l=checkpoint_name(saved.l, STATS_NAME),
        rounding=rounding,
    )


def jvp_saved(problem: Problem, operands: Operands, tangents: Operands) -> tuple[Saved, list[Any]]:
    """What the forward saves, and the tangents, in one pass."""
    wide = replace(problem, saves_rounding=has_rounding(operands.query.dtype))
    out, m, l, *rounding, dout, dlogsumexp = primitives.jvp(wide, operands, tangents)
    return named(Saved(out=out, m=m, l=l, rounding=rounding[0] if rounding else None)), [dout, dlogsumexp]


def _partial_eval(trace, *tracers, tree, problem):
    """`jax.grad`, `jax.linearize`, also of a scan: of a jvp, the operands are known and the tangents are not."""
    inputs = tree.unflatten(tracers)
    operands = jax.tree.map(lambda x: x.pval.get_known(), inputs.operands)
    known = len(jax.tree.leaves(operands)) == len(jax.tree.leaves(inputs.operands))
    if not known or all(x.is_known() for x in tracers):
        return trace.default_process_primitive(primitives.jvp_p, tracers, {"tree": tree, "problem": problem})
    saved = named(primitives.forward_saved(problem, operands))
    tangents = _staged_tangent(
        trace, problem, Inputs(operands=operands, saved=saved, tangents=inputs.tangents)
    )
    return [*primitives.forward_results(problem, saved), *tangents]


def _staged_tangent(trace, problem: Problem, inputs: Inputs) -> list[Any]:
    """The tangents, as unknown as those in the inputs are."""
    leaves, tree = jax.tree.flatten(inputs)
    staged = [trace.to_jaxpr_tracer(x) for x in leaves]
    params = {"tree": tree, "problem": primitives.plain(problem)}
    return trace.default_process_primitive(primitives.tangent_p, staged, params)


def _partial_eval_of_forward(trace, *tracers, tree, problem):
    """`jax.linear_transpose` in value: out is its own tangent along value, and the statistics are known."""
    inputs = tree.unflatten(tracers)
    if [name for name, x in inputs.arrays() if not x.is_known()] != ["value"]:
        return trace.default_process_primitive(primitives.fwd_p, tracers, {"tree": tree, "problem": problem})
    value = inputs.operands.value
    known = jax.tree.map(lambda x: x.pval.get_known(), replace(inputs.operands, value=None))
    operands = compat.vary_alike(replace(known, value=jnp.zeros_like(value)))
    saved = primitives.forward_saved(problem, operands)
    along = Inputs(operands=operands, saved=saved, tangents=Operands(value=value))
    out, _ = _staged_tangent(trace, problem, along)
    return [out, *primitives.forward_results(problem, saved)[1:]]


def _partial_eval_by_policy(saveable, unknown, instantiated, equation):
    """Remat: the policy decides which results of the forward are kept, as it would for two equations in a jit."""
    params = equation.params
    steps = jax.jit(partial(primitives.two_steps, params["problem"], params["tree"], keep=named))
    (call,) = jax.make_jaxpr(steps)(*(x.aval for x in equation.invars)).eqns
    equation = equation.replace(primitive=call.primitive, params=call.params, effects=call.effects)
    rule = partial_eval.partial_eval_jaxpr_custom_rules[call.primitive]
    return rule(saveable, unknown, instantiated, equation)


partial_eval.custom_partial_eval_rules[primitives.jvp_p] = _partial_eval
partial_eval.custom_partial_eval_rules[primitives.fwd_p] = _partial_eval_of_forward
partial_eval.partial_eval_jaxpr_custom_rules[primitives.jvp_p] = _partial_eval_by_policy


# --- third derivatives: those of the portable backend, which is differentiable JAX in forward mode


# Of the module, so that calls outside of jit compile it once.
@partial(jax.jit, static_argnums=(0, 1))
def _portable_results(kind, problem: Problem, x: Inputs, moved: dict[str, dict[str, Any]]):
    """The results of a primitive, of x with the arrays of `moved` in their parts."""
    inputs = replace(x, **{name: replace(getattr(x, name), **arrays) for name, arrays in moved.items()})
    with jax.default_matmul_precision(problem.precision):
        return kind.run(portable, inputs.call(problem), inputs)


def forward_derivative(kind, problem: Problem, x: Inputs, along: Inputs) -> list[Any]:
    """The derivative of a primitive's results; what is saved of `along` must be there."""
    if problem.shards is not None:
        raise NotImplementedError(
            "jax_fa serves derivatives of sequence_parallel_attention up to the second order; this is one of the third. "
            'strategy="ulysses" serves it in forward mode.'
        )
    if x.saved.rounding is not None:  # in one array, so that it moves as one
        out = widened(x.saved.out, x.saved.rounding, accumulator_dtype(x.saved.out.dtype))
        x = replace(x, saved=replace(x.saved, out=out, rounding=None))

    def moving(part: str):
        given, tangents = getattr(x, part), getattr(along, part)
        return None if tangents is None else {name: getattr(given, name) for name in tangents.present()}

    at = {part: found for part in _PARTS if (found := moving(part)) is not None}
    tangents = {
        part: {name: getattr(getattr(along, part), name).astype(x.dtype) for name, x in arrays.items()}
        for part, arrays in at.items()
    }

    def derivative(arrays):
        x, at, tangents = arrays
        return jax.jvp(partial(_portable_results, kind, problem, x), (at,), (tangents,))[1]

    def specs(_):
        leaves, tree = jax.tree.flatten(x)
        avals = primitives.abstract_eval(kind, *map(jax.typeof, leaves), tree=tree, problem=problem)
        return [compat.explicit_axes(aval) for aval in avals]

    with compat.allow_promotion():
        found = compat.automatic(derivative, (x, at, tangents), specs)
    return [forward_only_p.bind(t) for t in found]


# The identity, of a tangent of third order.
forward_only_p = Primitive("flash_attention_forward_only")


def _refuse(cotangent, x):
    raise NotImplementedError(
        "jax_fa serves derivatives of the third order and above in forward mode only: take the outermost ones with "
        "jax.jvp or jax.jacfwd. Served: jvp and grad in any order up to the second, such as grad of grad, hessian and grad "
        "of jvp, and jvp of any of these."
    )


forward_only_p.def_impl(lambda x: x)
forward_only_p.def_abstract_eval(lambda x: x)
ad.primitive_jvps[forward_only_p] = lambda x, t: (
    forward_only_p.bind(*x),
    t[0] if type(t[0]) is ad.Zero else forward_only_p.bind(t[0]),
)
ad.primitive_transposes[forward_only_p] = _refuse
batching.defvectorized(forward_only_p)
mlir.register_lowering(forward_only_p, lambda ctx, x: [x])


# --- Taylor mode (`jax.experimental.jet`)


def def_jet(primitive: Primitive) -> None:
    """Taylor coefficients along a curve, by as many jvps, one around the other: for n of them the call runs 2**n times."""

    def rule(primals, series, *, tree, problem):
        order = len(series[0])

        def curve(t):
            def at(x, terms):
                if not jnp.issubdtype(x.dtype, jnp.floating):
                    return x
                step = t.astype(x.dtype)
                moved = jnp.zeros_like(x)
                for term in reversed(terms):  # terms[0] t + terms[1] t^2 + ..., as Horner sums them
                    moved = (term + moved) * step
                return x + moved

            return [primitive.bind(*map(at, primals, series), tree=tree, problem=problem)]

        def with_next(derivatives):
            def longer(t):
                known, slopes = jax.jvp(derivatives, (t,), (jnp.ones_like(t),))
                return [*known, slopes[-1]]

            return longer

        for _ in range(order):
            curve = with_next(curve)
        results, *derivatives = curve(jnp.zeros((), jnp.float32))
        terms = [[x / math.factorial(k) for x in xs] for k, xs in enumerate(derivatives, 1)]
        return results, [list(of_result) for of_result in zip(*terms, strict=True)]

    rules: dict[Primitive, Callable[..., Any]] = jet.jet_rules
    rules[primitive] = rule


jet.deflinear(forward_only_p)
