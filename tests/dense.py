"""Attention of the arrays of a call, with JAX and S x S arrays, for derivatives of any order in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa
from jax_fa.call import STORED, Call
from jax_fa.testing import oracle
from jax_fa.testing.cases import Case


def call_of(case: Case, implementation: str) -> Call:
    """The call that a case makes."""
    request = jax_fa.flash_attention.request(
        **case.stored_operands(),
        **case.arrays(),
        scale=case.scale,
        logits_soft_cap=case.soft_cap,
        dropout_rate=case.dropout,
        layout=case.layout,
        return_logsumexp=True,
        implementation=implementation,
    )
    return request.call


def attention(call: Call, visible, keep, x: dict[str, Any]) -> tuple[Any, Any]:
    """(out, log-sum-exp), out as stored, of the differentiable operands `x`, in their dtype.

    `visible` and `keep`, the factors of the weights: of every pair, `*B N Sq Skv`.
    """
    problem, operands, d = call.problem, call.operands, call.dims
    acc = x["query"].dtype
    q, k, v = (x[name].transpose(problem.axes(name)) for name in STORED)
    s = jnp.einsum("...ikgd,...jkd->...kgij", q.reshape(*q.shape[:-2], d.K, d.G, d.D), k)
    s = s.reshape(*s.shape[:-4], d.N, d.Sq, d.Skv)
    s = s * (x["scale"][..., None, None] if "scale" in x else problem.scale)
    if "bias" in x:
        bias = x["bias"]
        if operands.bias_offset is not None:
            at = np.asarray(operands.bias_offset)[..., None] + np.arange(d.Skv)
            full = np.broadcast_shapes(bias.shape[:-1], at.shape[:-2])
            at = np.clip(np.broadcast_to(at, (*full, *at.shape[-2:])), 0, bias.shape[-1] - 1)
            bias = jnp.broadcast_to(bias[..., None, :], (*full, 1, bias.shape[-1]))
            bias = jnp.take_along_axis(bias, at, axis=-1)
        s = s + bias
    if "alibi_slopes" in x:
        row = np.arange(d.Sq) if operands.position is None else np.asarray(operands.position)
        away = np.abs(np.arange(d.Skv) - row[..., None]).astype(acc)
        s = s - x["alibi_slopes"][..., None] * (np.sqrt(away) if problem.alibi == "sqrt" else away)
    cap = x["soft_cap"][..., None, None] if "soft_cap" in x else problem.logits_soft_cap
    if cap is not None:
        s = cap * jnp.tanh(s / cap)
    s = jnp.where(visible, s, -1e30)
    m = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True, initial=-1e30))
    if "sinks" in x:
        m = jnp.maximum(m, jax.lax.stop_gradient(x["sinks"])[..., None, None])
    p = jnp.where(visible, jnp.exp(s - m), 0)
    l = jnp.sum(p, axis=-1, keepdims=True)
    if "sinks" in x:
        l = l + jnp.exp(x["sinks"][..., None, None] - m)
    empty = l == 0
    l = jnp.where(empty, 1, l)
    w = p / l * keep.astype(acc)
    out = jnp.einsum("...kgij,...jkd->...ikgd", w.reshape(*w.shape[:-3], d.K, d.G, d.Sq, d.Skv), v)
    lse = jnp.where(empty, -oracle.FLT_MAX, m + jnp.log(l))[..., 0]
    return out.reshape(*out.shape[:-3], d.N, d.Dv).transpose(np.argsort(problem.out_axes)), lse
