"""Attention sinks: what backends compute without them, made into what it is with them.

A sink is one more logit in each row's softmax, without a value. With it the log-sum-exp is lse' = log(exp(lse) + exp(sink)),
and keys have the share exp(lse - lse') = sigmoid(lse - sink) of the weights, by which out is multiplied.

Derivatives take the weights p from the softmax max and sum that are saved. With those of the keys and the sink together, and
out as it is, the formulas for a softmax of keys alone hold: the gradients of operands follow from ds = p (dp - delta), and
tangents from tau = sum p t. The sink adds its own weight w = exp(sink - lse'):

    backward   dsink = -sum w delta,  delta = rowsum(dout out) - dlse'
    tangent    tau + w sink',  out' - w sink' out

Second derivatives do not have this form, since sums of weights enter them: `attention.py` takes those of `joined`.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from jax_fa import softmax
from jax_fa.call import Call, Operands, Saved, narrowed, rounding_unit, widened


class Around:
    """A backend (see `backends.Backend`) for calls with sinks, but for their second derivatives."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def _takes_sinks(self, call: Call, what: str) -> bool:
        return hasattr(self._backend, "why_no_sinks") and self._backend.why_no_sinks(call, what) is None

    def forward(self, call: Call) -> tuple[Any, ...]:
        if self._takes_sinks(call, "forward"):
            return self._backend.forward(call)
        return joined(call, *self._backend.forward(call.without_sinks()))

    def jvp(self, call: Call, tangents: Operands) -> tuple[Any, ...]:
        keys = replace(tangents, sinks=None)
        if not keys.present():
            results = self.forward(call)
            return *results, *self.tangent(call, tangents, _saved(results))
        *results, dout, tau = self._backend.jvp(call.without_sinks(), keys)
        _, m, l, *_ = results
        share, rest = shares(m, l, call.operands.sinks[..., None])
        axes, exact = call.problem.out_axes, _exact(call, _saved(results))
        change = tau if tangents.sinks is None else tau - tangents.sinks[..., None]
        moved = dout.astype(call.acc) + softmax.rows_as_stored(rest * change, axes) * exact
        moved = softmax.rows_as_stored(share, axes) * moved
        # (Not tau - rest change, which loses the digits of a sink that has nearly all of the sum.)
        dlogsumexp = share * tau if tangents.sinks is None else share * tau + rest * tangents.sinks[..., None]
        return *joined(call, *results), moved.astype(call.dtype), dlogsumexp

    def tangent(self, call: Call, tangents: Operands, saved: Saved) -> tuple[Any, Any]:
        saved, keys = call.full(saved), replace(tangents, sinks=None)
        dout, tau = jnp.zeros(call.out_shape, call.dtype), jnp.zeros(call.stats_shape, call.acc)
        if keys.present():
            dout, tau = self._backend.tangent(self._derived(call, "tangent"), keys, saved)
        if tangents.sinks is None:
            return dout, tau
        moved = _weight(call, saved) * tangents.sinks[..., None]
        lost = softmax.rows_as_stored(moved, call.problem.out_axes) * _exact(call, saved)
        return (dout.astype(call.acc) - lost).astype(call.dtype), tau + moved

    def backward(self, call: Call, saved: Saved) -> Operands:
        of_keys = self._derived(call, "backward")
        found = Operands()
        if any(name != "sinks" for name in call.gradient_names):
            found = self._backend.backward(of_keys, saved)
        if "sinks" not in call.gradient_names or found.sinks is not None:
            return found
        saved = call.full(saved)
        exact = _exact(call, saved)
        # A fully masked row has no output, and whatever its cotangent is, none of it reaches the sink.
        products = jnp.where(exact == 0, 0, saved.dout.astype(call.acc) * exact)
        delta = softmax.row_sums(products, call.problem.out_axes)
        if saved.dlogsumexp is not None:
            delta = delta - saved.dlogsumexp
        of_sinks = call.replace(problem=replace(call.problem, gradients=("sinks",)))
        summed = -jnp.sum(_weight(call, saved) * delta, axis=-1)
        return replace(found, sinks=of_sinks.gradients({"sinks": summed}).sinks)

    def _derived(self, call: Call, what: str) -> Call:
        """What the backend computes a derivative of: if it takes no sinks, the sink is one of the keys that it does not have."""
        if self._takes_sinks(call, what):
            return call
        plain = call.without_sinks()
        return plain.replace(problem=replace(plain.problem, partial=True))


def joined(call: Call, out, m, l, rounding=None) -> tuple[Any, ...]:
    """The results of the forward with the call's sinks, from those without."""
    share, _ = shares(m, l, call.operands.sinks[..., None])
    exact = widened(out, rounding, call.acc) * softmax.rows_as_stored(share, call.problem.out_axes)
    exact = jnp.where(softmax.rows_as_stored(l == 0, call.problem.out_axes), 0, exact)
    stats = softmax.with_sink(m, l, call.operands.sinks[..., None])
    if not call.problem.saves_rounding:
        return exact.astype(call.dtype), *stats
    out, lost = narrowed(exact, call.dtype)
    return out, *stats, (lost / rounding_unit(call.dtype)).astype(call.dtype)


def shares(m, l, sinks) -> tuple[Any, Any]:
    """Those of the keys and of the sink in each row's sum, with sinks that broadcast to it."""
    return softmax.shares(softmax.logsumexp(m, l) - sinks)


def _weight(call: Call, saved: Saved):
    """That of the sink, by row, from statistics that have it."""
    return jnp.exp(call.operands.sinks[..., None] - saved.m) * softmax.inverse(saved.l)


def _saved(results) -> Saved:
    return Saved(**dict(zip(("out", "m", "l", "rounding"), results, strict=False)))


def _exact(call: Call, saved: Saved):
    return widened(saved.out, saved.rounding, call.acc)
