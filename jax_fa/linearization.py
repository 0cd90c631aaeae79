"""How the jvp is taken apart where JAX wants its two halves at different times.

`jax.jvp` runs the forward and its tangent in one pass. `jax.grad`, `jax.linearize` and remat know the operands first and
the tangents later: there the jvp stands for two steps, the forward, whose results are residuals, and the tangent from
these.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import partial_eval

from jax_fa import primitives
from jax_fa.call import Operands, Problem, Saved, has_rounding
from jax_fa.primitives import Inputs

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


def _two_steps(problem: Problem, tree, *leaves) -> list[Any]:
    inputs = tree.unflatten(leaves)
    saved = named(primitives.forward_saved(problem, inputs.operands))
    tangents = primitives.tangent(problem, inputs.operands, saved, inputs.tangents)
    return [*_results(problem, saved), *tangents]


def _results(problem: Problem, saved: Saved) -> list[Any]:
    return [saved.out, saved.m, saved.l, *([saved.rounding] if problem.saves_rounding else [])]


def _partial_eval(trace, *tracers, tree, problem):
    """`jax.grad`, `jax.linearize`, also of a scan: of a jvp, the operands are known and the tangents are not."""
    inputs = tree.unflatten(tracers)
    operands = jax.tree.map(lambda x: x.pval.get_known(), inputs.operands)
    known = len(jax.tree.leaves(operands)) == len(jax.tree.leaves(inputs.operands))
    if not known or all(x.is_known() for x in tracers):
        return trace.default_process_primitive(primitives.jvp_p, tracers, {"tree": tree, "problem": problem})
    saved = named(primitives.forward_saved(problem, operands))
    leaves, tree = jax.tree.flatten(
        Inputs(operands=replace(operands, hints=None), saved=saved, tangents=inputs.tangents)
    )
    staged = [trace.to_jaxpr_tracer(x) for x in leaves]
    tangents = trace.default_process_primitive(
        primitives.tangent_p, staged, {"tree": tree, "problem": primitives.plain(problem)}
    )
    return [*_results(problem, saved), *tangents]


def _partial_eval_by_policy(saveable, unknown, instantiated, equation):
    """Remat: the policy decides which results of the forward are kept, as it would for two equations in a jit."""
    steps = jax.jit(partial(_two_steps, equation.params["problem"], equation.params["tree"]))
    (call,) = jax.make_jaxpr(steps)(*(x.aval for x in equation.invars)).eqns
    equation = equation.replace(primitive=call.primitive, params=call.params, effects=call.effects)
    rule = partial_eval.partial_eval_jaxpr_custom_rules[call.primitive]
    return rule(saveable, unknown, instantiated, equation)


partial_eval.custom_partial_eval_rules[primitives.jvp_p] = _partial_eval
partial_eval.partial_eval_jaxpr_custom_rules[primitives.jvp_p] = _partial_eval_by_policy
