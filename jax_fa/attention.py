"""START READING HERE: attention and its derivatives.

`attention` is the primitive forward. It keeps, beside its inputs and output, two scalars per query row: the softmax max m
and sum l. Every derivative recomputes the probabilities as exp(s - m) / l, so nothing of size Sq x Skv is ever stored.
16-bit calls also keep what rounding took from the output, in 16 bits (see `Saved`).

The primitives are a closed set. Let x be the operands, F(x) = (out, log-sum-exp) and w cotangents of these:

    primitive       computes                               its derivative              its transpose
    forward         F(x)                                   tangent (with F: jvp)       (of value, in which out is linear)
    tangent         F'(x) u                                second_tangent + tangent    backward
    backward        F'(x)^T w, as `jax.grad` wants it      second                      tangent
    second          the Hessian of <w, F(x)> by x and w,   the portable backend's      second: it is symmetric
                    times a vector
    second_tangent  F''(x)[u, v]                           the portable backend's      second

That closes jvp, linearize, vjp, jacfwd, jacrev, hessian, and grad and jvp of one another. For tangents and cotangents that
are zero nothing is computed.

What is saved is a function of x, and each rule is the derivative of what its primitive is as a function of x and w alone:
rules ignore tangents of saved arrays, and give them no cotangents. The log-sum-exp is m + log l; m and l are no results by
themselves, so all of its tangent is put on m. (To callers who ask for the pair, m is a constant and l has the derivative.)

An attention sink is one more logit in each row's softmax, without a value: plain JAX behind the primitive, or an
operand of it where a backend may take it.

Above this file stand the public functions, which turn their arguments into a `Call`: a `Problem` (static) and
`Operands` (arrays). Below stand `rules.py`, which hands the rules of this file to JAX, and the primitives, which choose a
backend when they are lowered.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_fa import backends, compat, primitives, rules, softmax
from jax_fa.call import (
    DIFFERENTIABLE,
    Axes,
    Call,
    Operands,
    Problem,
    Saved,
    has_rounding,
    narrowed,
    rounding_unit,
    widened,
)
from jax_fa.primitives import Inputs
from jax_fa.rules import OUT_NAME, STATS_NAME, jvp_saved

__all__ = ["OUT_NAME", "STATS_NAME", "Attention", "attention"]


class Attention(NamedTuple):
    """Statistics are `*B N Sq`, with the sink included but for the largest logit."""

    out: Any
    m: Any  # m + log l has the derivatives of the log-sum-exp; they may be in either
    l: Any
    largest_logit: Any  # of each row; None where a backend took the sinks

    @property
    def logsumexp(self):
        return softmax.logsumexp(self.m, self.l)

    @property
    def softmax_max(self):
        """A constant."""
        return jax.lax.stop_gradient(self.m)

    @property
    def softmax_sum(self):
        """With the derivatives of the log-sum-exp.

        Of the pair only m + log l means something. So whatever formula merges partial results, its derivatives are right.
        """
        return self.l * jnp.exp(self.m - self.softmax_max)


def attention(call: Call, sinks=None, *, may_join: bool = True) -> Attention:
    """`sinks`: of every head, `*#B N` in the dtype of the statistics, or None; `may_join`: a backend may take them."""
    problem = call.problem
    # Alike here already, so that JAX transposes it: under shard_map the gradient of an operand that all devices share is
    # the sum of theirs.
    operands, sinks = compat.vary_alike((call.operands, sinks))
    if sinks is None:
        out, m, l = primitives.forward(problem, operands)
        return Attention(out, m, l, jax.lax.stop_gradient(m))
    if may_join and backends.may_take_sinks(problem):
        out, m, l = primitives.forward(problem, replace(operands, sinks=sinks))
        return Attention(out, m, l, None)
    (out, m, l), largest = _beside(problem, operands, sinks)
    return Attention(out, m, l, jax.lax.stop_gradient(largest))


# --- jvp rules: (problem, inputs x, their tangents) -> (results, tangents of the results)


def _forward(problem: Problem, x: Inputs, along: Inputs):
    out, m, l, *rounding, dout, dlogsumexp = primitives.jvp(problem, x.operands, along.operands)
    return [out, m, l, *rounding], [dout, dlogsumexp, None, *(None for _ in rounding)]


def _jvp(problem: Problem, x: Inputs, along: Inputs):
    saved, tangents = jvp_saved(problem, x.operands, x.tangents)
    dout = dlogsumexp = None
    if along.operands is not None:
        dout, dlogsumexp = primitives.tangent(problem, x.operands, saved, along.operands)
    moved = _along(problem, Inputs(operands=x.operands, saved=saved, tangents=x.tangents), along)
    rounding = [saved.rounding] if problem.saves_rounding else []
    results = [saved.out, saved.m, saved.l, *rounding, *tangents]
    return results, [dout, dlogsumexp, None, *(None for _ in rounding), *moved]


def _tangent(problem: Problem, x: Inputs, along: Inputs):
    return primitives.tangent(problem, x.operands, x.saved, x.tangents), _along(problem, x, along)


def _along(problem: Problem, x: Inputs, along: Inputs) -> list[Any]:
    """The derivative of the tangent, which is linear in its tangents."""
    parts = []
    if along.tangents is not None:
        parts.append(primitives.tangent(problem, x.operands, x.saved, along.tangents))
    if along.operands is not None:
        parts.append(primitives.second_tangent(problem, x.operands, x.saved, x.tangents, along.operands))
    return _added(parts) or [None, None]


def _added(parts: list[list[Any]]) -> list[Any]:
    return [functools.reduce(operator.add, terms) for terms in zip(*parts, strict=True)]


def _backward(problem: Problem, x: Inputs, along: Inputs):
    """The derivative of the backward, which is linear in its cotangents."""
    results = primitives.backward(problem, x.operands, x.saved).present()
    cotangents = along.saved
    dout, dlogsumexp = (cotangents.dout, cotangents.dlogsumexp) if cotangents else (None, None)
    if along.operands is not None:
        saved = replace(x.saved, dout_tangent=dout, dlogsumexp_tangent=dlogsumexp)
        alone = replace(problem, gradients=tuple(results))
        moved = primitives.second(alone, x.operands, saved, along.operands)
    else:
        saved = replace(x.saved, dout=_or_zeros(dout, x.saved.dout), dlogsumexp=dlogsumexp)
        moved = primitives.backward(problem, x.operands, saved).present()
    return list(results.values()), list(moved.values())


def _or_zeros(x, like):
    return jnp.zeros(like.shape, like.dtype) if x is None else x


def _second(problem: Problem, x: Inputs, along: Inputs):
    """The derivative of the second: linear in its tangents and, for them alone, in the cotangents; in x the third."""
    results = primitives.second(problem, x.operands, x.saved, x.tangents)
    if along.operands is not None:
        return list(results.values()), _third(primitives.SECOND, problem, x, along)
    moved, found = along.saved or _NO_COTANGENTS, {name: None for name in results}
    tangents = {"dout_tangent": moved.dout_tangent, "dlogsumexp_tangent": moved.dlogsumexp_tangent}
    parts = [(replace(x.saved, **tangents), along.tangents)]
    if (moved.dout, moved.dlogsumexp) != (None, None):
        none = dict.fromkeys(tangents)
        dout = _or_zeros(moved.dout, x.saved.dout)
        parts.append((replace(x.saved, dout=dout, dlogsumexp=moved.dlogsumexp, **none), x.tangents))
    for saved, along_these in parts:
        for name, part in _hessian_product(problem, x.operands, saved, along_these).items():
            found[name] = part if found[name] is None else found[name] + part
    return list(results.values()), list(found.values())


def _second_tangent(problem: Problem, x: Inputs, along: Inputs):
    """The derivative of the second tangent, which is linear in both of its tangents."""
    results = primitives.second_tangent(problem, x.operands, x.saved, x.tangents, x.others)
    if along.operands is not None:
        return results, _third(primitives.SECOND_TANGENT, problem, x, along)
    pairs = [(along.tangents, x.others), (x.tangents, along.others)]
    parts = [
        primitives.second_tangent(problem, x.operands, x.saved, a, b)
        for a, b in pairs
        if a is not None and b is not None
    ]
    return results, _added(parts)


def _third(kind, problem: Problem, x: Inputs, along: Inputs) -> list[Any]:
    """In forward mode. What is saved moves with the operands."""
    dout, dlogsumexp = primitives.tangent(problem, x.operands, x.saved, along.operands)
    others = {} if along.saved is None else along.saved.present()
    saved = Saved(**others | {"out": dout, "m": dlogsumexp, "l": jnp.zeros_like(x.saved.l)})
    return rules.forward_derivative(kind, problem, x, replace(along, saved=saved))


# --- transposes: (problem, inputs, avals of the linear ones, cotangents of the results) -> cotangents of the linear ones


def _forward_transpose(problem: Problem, x: Inputs, linear: Inputs, given: dict[str, Any]) -> Inputs:
    """Of out as a function of value, in which it is linear (`jax.linear_transpose`)."""
    names = [] if linear.operands is None else list(linear.operands.present())
    if names != ["value"]:
        raise NotImplementedError(
            f"attention is linear in value alone, and has no transpose in {', '.join(names)}."
        )
    value = jnp.zeros(linear.operands.value.shape, linear.operands.value.dtype)
    operands = replace(x.operands, value=value)
    saved = primitives.forward_saved(problem, operands)
    dout = _or_zeros(given.get("out"), saved.out)
    asked = rules.asking(problem, operands, linear.operands)
    gradients = primitives.backward(asked, operands, replace(saved, dout=dout))
    return _cotangents_of(linear, operands=gradients.present())


def _tangent_transpose(problem: Problem, x: Inputs, linear: Inputs, given: dict[str, Any]) -> Inputs:
    asked = rules.asking(problem, x.operands, linear.tangents)
    gradients = primitives.backward(asked, x.operands, _with_cotangents(x, given))
    return _cotangents_of(linear, tangents=gradients.present())


def _backward_transpose(problem: Problem, x: Inputs, linear: Inputs, given: dict[str, Any]) -> Inputs:
    found = primitives.tangent(problem, x.operands, x.saved, Operands(**given))
    return _cotangents_of(linear, saved=dict(zip(("dout", "dlogsumexp"), found, strict=True)))


def _second_transpose(problem: Problem, x: Inputs, linear: Inputs, given: dict[str, Any]) -> Inputs:
    along = {name: ct for name, ct in given.items() if name in DIFFERENTIABLE}
    saved = replace(x.saved, dout_tangent=given.get("dout"), dlogsumexp_tangent=given.get("dlogsumexp"))
    more = [] if linear.saved is None else [n.removesuffix("_tangent") for n in linear.saved.present()]
    asked = rules.asking(problem, x.operands, linear.tangents, *more)
    found = _hessian_product(asked, x.operands, saved, Operands(**along) if along else None)
    moved = {f"{name}_tangent": found[name] for name in more if name in found}
    return _cotangents_of(linear, tangents=found, saved=moved)


def _second_tangent_transpose(problem: Problem, x: Inputs, linear: Inputs, given: dict[str, Any]) -> Inputs:
    part = "others" if linear.tangents is None else "tangents"
    known = x.tangents if part == "others" else x.others
    names = getattr(linear, part)
    asked = rules.asking(problem, x.operands, names)
    found = primitives.second(asked, x.operands, _with_cotangents(x, given), known)
    return _cotangents_of(linear, **{part: found})


def _hessian_product(
    problem: Problem, operands: Operands, saved: Saved, tangents: Operands | None
) -> dict[str, Any]:
    """The second along tangents of operands and of cotangents, of which some are absent."""
    if tangents is not None:
        if problem.gradients and not set(problem.gradients) & set(DIFFERENTIABLE):
            found = primitives.tangent(problem, operands, saved, tangents)
            return dict(zip(("dout", "dlogsumexp"), found, strict=True))
        return primitives.second(problem, operands, saved, tangents)
    # Linear in the cotangents: their tangents have no effect on the gradients by cotangents.
    dout = _or_zeros(saved.dout_tangent, saved.dout)
    moved = replace(
        saved, dout=dout, dlogsumexp=saved.dlogsumexp_tangent, dout_tangent=None, dlogsumexp_tangent=None
    )
    return primitives.backward(problem, operands, moved).present()


def _with_cotangents(x: Inputs, given: dict[str, Any]) -> Saved:
    dout = _or_zeros(given.get("dout"), x.saved.out)
    return replace(x.saved, dout=dout, dlogsumexp=given.get("dlogsumexp"))


def _cotangents_of(linear: Inputs, **found: dict[str, Any]) -> Inputs:
    parts = {part: rules.fitted(arrays, getattr(linear, part)) for part, arrays in found.items()}
    return Inputs(**parts)


_NO_COTANGENTS = Saved(out=None, m=None, l=None)
for primitive, rule in (
    (primitives.fwd_p, _forward),
    (primitives.jvp_p, _jvp),
    (primitives.tangent_p, _tangent),
    (primitives.bwd_p, _backward),
    (primitives.second_p, _second),
    (primitives.second_tangent_p, _second_tangent),
):
    rules.def_jvp(primitive, rule)
for primitive, transpose in (
    (primitives.fwd_p, _forward_transpose),
    (primitives.tangent_p, _tangent_transpose),
    (primitives.bwd_p, _backward_transpose),
    (primitives.second_p, _second_transpose),
    (primitives.second_tangent_p, _second_tangent_transpose),
):
    rules.def_transpose(primitive, transpose)

# --- sinks that the backend does not take: plain JAX beside a call without them. They multiply the output by the share of the
# keys in the sum, sigmoid(log-sum-exp - sink). First derivatives come from the statistics that include the sink, of which the
# weights of the keys are exp(s - m) / l as well; those of higher order are JAX's own, of the composition.

Moving = dict[str, Any]


# (Rematerialized, since its inputs are residuals already and the output in full precision would be one more.)
@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.checkpoint, static_argnums=0)
def _joined(axes: Axes, out, rounding: list[Any], m, l, sinks):
    """out, m and l with sinks `*#B N`."""
    exact, m, l = _exact(axes, out, rounding, m, l, sinks)
    return exact.astype(out.dtype), m, l


def _exact(axes: Axes, out, rounding: list[Any], m, l, sinks):
    """The same with an output that is not rounded."""
    share = jax.nn.sigmoid(softmax.logsumexp(m, l) - sinks[..., None])
    rows = softmax.rows_as_stored(share, axes)
    exact = widened(out, rounding[0] if rounding else None, rows.dtype)
    return exact * rows, *softmax.with_sink(m, l, sinks[..., None])


def _beside(problem: Problem, operands: Operands, sinks) -> tuple[list[Any], Any]:
    """[out, m, l], and m without the sink; accurate gradients need the output before it was rounded."""
    rounded = has_rounding(operands.query.dtype)
    asked = replace(problem, logsumexp=True, rounding_if_derived=rounded, saves_rounding=False)
    out, m, l, *rounding = primitives.forward(asked, operands)
    return list(_joined(problem.out_axes, out, rounding, m, l, sinks)), m


def _sink_weight(m, l, sinks):
    """That of the sink in each row, `*B N Sq`, from statistics that include it."""
    return jnp.exp(sinks[..., None] - m) * softmax.inverse(l)


# --- what the primitives are lowered to


def _apart(operands: Operands) -> tuple[Operands, Any]:
    return replace(operands, sinks=None), operands.sinks


def _forward_beside(problem: Problem, x: Inputs) -> list[Any]:
    operands, sinks = _apart(x.operands)
    asked = replace(problem, logsumexp=True, rounding_if_derived=False)
    out, m, l, *rounding = primitives.forward(asked, operands)
    if not problem.saves_rounding:
        found = list(_joined(problem.out_axes, out, rounding, m, l, sinks))
        return found + [jnp.zeros(out.shape, out.dtype)] * problem.rounding_if_derived
    exact, m, l = _exact(problem.out_axes, out, rounding, m, l, sinks)
    narrow, lost = narrowed(exact, out.dtype)
    return [narrow, m, l, (lost / rounding_unit(out.dtype)).astype(out.dtype)]


def _backward_beside(problem: Problem, x: Inputs) -> list[Any]:
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
        rows = jnp.sum(_sink_weight(full.m, full.l, sinks) * moved, axis=-1)
        only = call.replace(problem=replace(problem, gradients=("sinks",)))
        found["sinks"] = only.gradients({"sinks": rows}).sinks
    return [found[name] for name in call.gradient_names]


def _tangent_beside(problem: Problem, x: Inputs) -> list[Any]:
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
    towards = _sink_weight(saved.m, saved.l, sinks) * moved[..., None]
    out = widened(saved.out, saved.rounding, call.acc)
    lost = out * softmax.rows_as_stored(towards, problem.out_axes)
    return [(dout.astype(call.acc) - lost).astype(call.dtype), dlse + towards]


def _composed(problem: Problem, operands: Operands) -> Callable[[Moving], tuple[Any, Any]]:
    """(out, log-sum-exp) as a function of what has derivatives."""
    asked = replace(problem, gradients=None, mapped=0)

    def run(moving: Moving):
        (out, m, l), _ = _beside(asked, *_apart(replace(operands, **moving)))
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


def _second_beside(problem: Problem, x: Inputs) -> list[Any]:
    call, saved = x.call(problem), x.call(problem).full(x.saved)
    run = _composed(problem, call.operands)
    point, along = _moving(call, None), _moving(call, x.tangents if x.tangents is not None else Operands())

    def pulled(point, cotangents):
        return jax.vjp(run, point)[1](cotangents)[0]

    given, moved = (
        (_full_or_zeros(out, call.out_shape, call.dtype), _full_or_zeros(lse, call.stats_shape, call.acc))
        for out, lse in ((saved.dout, saved.dlogsumexp), (saved.dout_tangent, saved.dlogsumexp_tangent))
    )
    found = jax.jvp(pulled, (point, given), (along, moved))[1]
    dout, dlse = jax.jvp(run, (point,), (along,))[1]
    found |= {"dout": dout, "dlogsumexp": dlse}
    return [found[name] for name in primitives.SECOND.results(call)]


def _full_or_zeros(x, shape, dtype):
    return jnp.zeros(shape, dtype) if x is None else x.astype(dtype)


def _second_tangent_beside(problem: Problem, x: Inputs) -> list[Any]:
    call = x.call(problem)
    run = _composed(problem, call.operands)
    point, along, others = (_moving(call, arrays) for arrays in (None, x.tangents, x.others))

    def first(point):
        return jax.jvp(run, (point,), (along,))[1]

    return list(jax.jvp(first, (point,), (others,))[1])


for _kind, _form in (
    (primitives.FORWARD, _forward_beside),
    (primitives.BACKWARD, _backward_beside),
    (primitives.TANGENT, _tangent_beside),
    (primitives.SECOND, _second_beside),
    (primitives.SECOND_TANGENT, _second_tangent_beside),
):
    primitives.def_sinks_beside(_kind, _form)
