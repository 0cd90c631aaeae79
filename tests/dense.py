"""Attention of the arrays of a call, with JAX and S x S arrays, for derivatives of any order in float64."""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Form:
    """What is static in a call: those that differ in masks, dropout and numbers alone share one program."""

    axes: tuple[tuple[int, ...], ...]
    out_axes: tuple[int, ...]
    dims: Any
    scale: float
    soft_cap: float | None
    alibi: str

    @classmethod
    def of(cls, call: Call) -> "Form":
        problem = call.problem
        axes = tuple(map(problem.axes, STORED))
        return cls(axes, problem.out_axes, call.dims, problem.scale, problem.logits_soft_cap, problem.alibi)


def constants(call: Call, visible, keep) -> dict[str, Any]:
    """What `of_form` takes besides the operands."""
    given = {"bias_offset": call.operands.bias_offset, "position": call.operands.position}
    return {"visible": visible, "keep": keep} | {name: x for name, x in given.items() if x is not None}


def attention(call: Call, visible, keep, x: dict[str, Any]) -> tuple[Any, Any]:
    """(out, log-sum-exp), out as stored, of the differentiable operands `x`, in their dtype.

    `visible` and `keep`, the factors of the weights: of every pair, `*B N Sq Skv`.
    """
    return of_form(Form.of(call), constants(call, visible, keep), x)


def of_form(form: Form, constants: dict[str, Any], x: dict[str, Any]) -> tuple[Any, Any]:
    """The same, of a call's form and constants."""
    d, visible = form.dims, constants["visible"]
    acc = x["query"].dtype
    q, k, v = (x[name].transpose(axes) for name, axes in zip(STORED, form.axes, strict=True))
    s = jnp.einsum("...ikgd,...jkd->...kgij", q.reshape(*q.shape[:-2], d.K, d.G, d.D), k)
    s = s.reshape(*s.shape[:-4], d.N, d.Sq, d.Skv)
    s = s * (x["scale"][..., None, None] if "scale" in x else form.scale)
    if "bias" in x:
        bias = x["bias"]
        if "bias_offset" in constants:
            offset = jnp.asarray(constants["bias_offset"])[..., None]
            at = offset + jnp.arange(d.Skv, dtype=offset.dtype)
            full = np.broadcast_shapes(bias.shape[:-1], at.shape[:-2])
            at = jnp.clip(jnp.broadcast_to(at, (*full, *at.shape[-2:])), 0, bias.shape[-1] - 1)
            bias = jnp.broadcast_to(bias[..., None, :], (*full, 1, bias.shape[-1]))
            bias = jnp.take_along_axis(bias, at, axis=-1)
        s = s + bias
    if "alibi_slopes" in x:
        row = jnp.asarray(constants.get("position", np.arange(d.Sq, dtype=np.int32)))[..., None]
        away = jnp.abs(jnp.arange(d.Skv, dtype=row.dtype) - row).astype(acc)
        s = s - x["alibi_slopes"][..., None] * (jnp.sqrt(away) if form.alibi == "sqrt" else away)
    cap = x["soft_cap"][..., None, None] if "soft_cap" in x else form.soft_cap
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
    w = p / l * constants["keep"].astype(acc)
    out = jnp.einsum("...kgij,...jkd->...ikgd", w.reshape(*w.shape[:-3], d.K, d.G, d.Sq, d.Skv), v)
    lse = jnp.where(empty, -oracle.FLT_MAX, m + jnp.log(l))[..., 0]
    return out.reshape(*out.shape[:-3], d.N, d.Dv).transpose(np.argsort(form.out_axes)), lse
