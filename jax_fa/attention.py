"""START READING HERE: attention and its derivatives.

`attention` is the primitive forward. It keeps, beside its inputs and output, two scalars per query row: the softmax max m
and sum l. Every derivative recomputes the probabilities as exp(s - m) / l, so nothing of size Sq x Skv is ever stored.
16-bit calls also keep what rounding took from the output, in 16 bits (see `Saved`).

The primitives are a closed set. Let x be the operands, F(x) = (out, log-sum-exp) and w cotangents of these:

    primitive       computes                               its derivative              its transpose
    forward         F(x)                                   tangent (with F: jvp)       (of value: that of the tangent)
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

Attention sinks, one more logit in each row's softmax without a value, are an operand that backends need not know of (see
`backends/sinks.py`). Second derivatives with sinks are those of the results without, multiplied by the share of the keys.

Above this file stand the public functions, which turn their arguments into a `Call`: a `Problem` (static) and
`Operands` (arrays). Below stand `rules.py`, which hands the rules of this file to JAX, and the primitives, which choose a
backend when they are lowered.
"""

import functools
import operator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_fa import compat, primitives, rules, softmax
from jax_fa.backends.sinks import joined, shares
from jax_fa.call import DIFFERENTIABLE, STORED, Axes, Call, Operands, Problem, Saved, sum_to, widened
from jax_fa.primitives.kinds import SECOND, SECOND_TANGENT, Inputs
from jax_fa.rules import OUT_NAME, STATS_NAME, jvp_saved

__all__ = ["OUT_NAME", "STATS_NAME", "Attention", "attention"]


class Attention(NamedTuple):
    """Statistics are `*B N Sq`, with the sink included but for the largest logit."""

    out: Any
    m: Any  # m + log l has the derivatives of the log-sum-exp; they may be in either
    l: Any
    largest_logit: Any  # of each row; with sinks None where it was not asked for

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


def attention(call: Call, sinks=None, *, max_logits: bool = False) -> Attention:
    """`sinks`: of every head, `*#B N` in the dtype of the statistics, or None; `max_logits`: the largest one is wanted."""
    problem = call.problem
    # Alike here already, so that JAX transposes it: under shard_map the gradient of an operand that all devices share is
    # the sum of theirs.
    if call.parts:
        parts, sinks = compat.vary_alike((call.in_parts, sinks))
        found = [primitives.forward_saved(problem, operands) for operands in parts]
        return Attention(*_merged(problem.out_axes, found, None if sinks is None else sinks[..., None]))
    operands, sinks = compat.vary_alike((call.operands, sinks))
    if sinks is None:
        out, m, l = primitives.forward(problem, operands)
        return Attention(out, m, l, jax.lax.stop_gradient(m))
    operands = replace(operands, sinks=sinks)
    if max_logits:
        return _composed(problem, operands)
    out, m, l = primitives.forward(problem, operands)
    return Attention(out, m, l, None)


def _composed(problem: Problem, operands: Operands) -> Attention:
    """Attention with sinks from that without: what has derivatives of any order, and the largest logits."""
    saved = primitives.forward_saved(problem, replace(operands, sinks=None))
    call = Call.of(replace(problem, saves_rounding=False), operands)
    out, m, l = joined(call, saved.out, saved.m, saved.l, saved.rounding)
    return Attention(out, m, l, jax.lax.stop_gradient(saved.m))


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.checkpoint, static_argnums=0)
def _merged(axes: Axes, parts: list[Saved], sinks):
    """out, m and l of all parts of the keys, with the sinks, and the largest logit."""
    largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [x.m for x in parts]))
    # (Of a part without a visible key l is 0.)
    weights = [x.l * jnp.exp(x.m - largest) for x in parts]
    m, l = largest, functools.reduce(operator.add, weights)
    share = softmax.inverse(l)
    if sinks is not None:
        share = share * shares(m, l, sinks)[0]
    exact: Any = 0
    for x, weight in zip(parts, weights, strict=True):
        rows = softmax.rows_as_stored(weight * share, axes)
        exact = exact + widened(x.out, x.rounding, rows.dtype) * rows
    if sinks is not None:
        exact = jnp.where(softmax.rows_as_stored(l == 0, axes), 0, exact)
        m, l = softmax.with_sink(m, l, sinks)
    return exact.astype(parts[0].out.dtype), m, l, largest


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
        with_sinks = x.operands.sinks is not None
        second = _second_tangent_with_sinks if with_sinks else primitives.second_tangent
        parts.append(second(problem, x.operands, x.saved, x.tangents, along.operands))
    return _added(parts) or [None, None]


def _second_tangent_with_sinks(
    problem: Problem, operands: Operands, saved: Saved, tangents: Operands, others: Operands
) -> list[Any]:
    call = Call.of(problem, operands, saved, tangents, others)
    spread, along, along_others = compat.vary_alike(
        tuple(_wide(call, x) for x in _alike(call, tangents, others))
    )

    def tangent(moving):
        moved = replace(spread, **moving)
        at = {name: getattr(moved, name) for name in along}
        return jax.jvp(lambda arrays: _results(problem, replace(moved, **arrays)), (at,), (along,))[1]

    at = {name: getattr(spread, name) for name in along_others}
    out, logsumexp = jax.jvp(tangent, (at,), (along_others,))[1]
    return [out.astype(call.dtype), logsumexp]


def _results(problem: Problem, operands: Operands) -> tuple[Any, Any]:
    found = _composed(problem, operands)
    return found.out, found.logsumexp


def _alike(call: Call, *tangents: Operands) -> tuple[Any, ...]:
    """The operands with all batch dims of their gradients and tangents, and these tangents by name, in the same shapes."""
    given = [x.present() for x in tangents]

    def spread(name: str, x):
        if name not in DIFFERENTIABLE:
            return x
        others = [t[name].shape for t in given if name in t]
        return jnp.broadcast_to(x, jnp.broadcast_shapes(call.gradient_shape(name), *others))

    operands = call.operands.map(spread)
    shapes = {name: x.shape for name, x in operands.present().items()}
    return operands, *({n: jnp.broadcast_to(t, shapes[n]) for n, t in x.items()} for x in given)


def _added(parts: list[list[Any]]) -> list[Any]:
    return [functools.reduce(operator.add, terms) for terms in zip(*parts, strict=True)]


def _backward(problem: Problem, x: Inputs, along: Inputs):
    """The derivative of the backward, which is linear in its cotangents."""
    results = primitives.backward(problem, x.operands, x.saved).present()
    cotangents = along.saved
    dout, dlogsumexp = (cotangents.dout, cotangents.dlogsumexp) if cotangents else (None, None)
    if along.operands is not None and x.operands.sinks is not None:
        moved = _second_with_sinks(problem, x, along.operands, dout, dlogsumexp)
    elif along.operands is not None:
        saved = replace(x.saved, dout_tangent=dout, dlogsumexp_tangent=dlogsumexp)
        alone = replace(problem, gradients=tuple(results))
        moved = primitives.second(alone, x.operands, saved, along.operands)
    else:
        saved = replace(x.saved, dout=_or_zeros(dout, x.saved.dout), dlogsumexp=dlogsumexp)
        moved = primitives.backward(problem, x.operands, saved).present()
    return list(results.values()), list(moved.values())


def _second_with_sinks(
    problem: Problem, x: Inputs, tangents: Operands, dout_tangent, dlogsumexp_tangent
) -> dict[str, Any]:
    """The derivative of the backward along the tangents of operands and of cotangents."""
    call = x.call(problem)
    saved = call.full(x.saved)
    given = {"out": saved.dout, "logsumexp": _or_zeros(saved.dlogsumexp, saved.m)}
    moved = {"out": dout_tangent, "logsumexp": dlogsumexp_tangent}
    cotangents = {n: jnp.broadcast_to(t, given[n].shape) for n, t in moved.items() if t is not None}
    spread, along = (_wide(call, x) for x in _alike(call, tangents))
    given, cotangents = ({n: x.astype(call.acc) for n, x in found.items()} for found in (given, cotangents))
    given, cotangents, spread, along = compat.vary_alike((given, cotangents, spread, along))

    def gradients(moving, moving_cotangents):
        operands = replace(spread, **moving)
        wanted = {name: getattr(operands, name) for name in call.gradient_names}
        _, pull = jax.vjp(lambda arrays: _results(problem, replace(operands, **arrays)), wanted)
        both = given | moving_cotangents
        return pull((both["out"], both["logsumexp"]))[0]

    primals = {n: getattr(spread, n) for n in along}, {n: given[n] for n in cotangents}
    found = jax.jvp(gradients, primals, (along, cotangents))[1]
    # (Gradients have the dtypes of their operands.)
    summed = {name: sum_to(found[name], call.gradient_shape(name)) for name in call.gradient_names}
    return {name: x.astype(call.dtype) if name in STORED else x for name, x in summed.items()}


def _wide(call: Call, given: Any) -> Any:
    """Operands, or arrays by name: query, key and value in the dtype of sums.

    With a sink that has nearly all of the weight, what its share is multiplied by is a small difference: of terms that are
    rounded to 16 bits it would have no digit.
    """
    if isinstance(given, Operands):
        return replace(given, **_wide(call, {name: getattr(given, name) for name in STORED}))
    return {name: x.astype(call.acc) if name in STORED else x for name, x in given.items()}


def _or_zeros(x, like):
    return jnp.zeros_like(like) if x is None else x


def _second(problem: Problem, x: Inputs, along: Inputs):
    """The derivative of the second: linear in its tangents and, for them alone, in the cotangents; in x the third."""
    results = primitives.second(problem, x.operands, x.saved, x.tangents)
    if along.operands is not None:
        return list(results.values()), _third(SECOND, problem, x, along)
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
        return results, _third(SECOND_TANGENT, problem, x, along)
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
    """Of out as a function of value alone the transpose is that of the tangent (see `rules.py`)."""
    names = [] if linear.operands is None else list(linear.operands.present())
    raise NotImplementedError(
        f"attention is linear in value alone, and has no transpose in {', '.join(names)}."
    )


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
    rules.def_jet(primitive)
for primitive, transpose in (
    (primitives.fwd_p, _forward_transpose),
    (primitives.tangent_p, _tangent_transpose),
    (primitives.bwd_p, _backward_transpose),
    (primitives.second_p, _second_transpose),
    (primitives.second_tangent_p, _second_tangent_transpose),
):
    rules.def_transpose(primitive, transpose)
