"""Derivatives of first and second order of the portable backend, against automatic ones of a plain float64 function."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa.backends.xla import backend
from jax_fa.call import (
    DIFFERENTIABLE,
    STORED,
    Call,
    Operands,
    Problem,
    Saved,
    accumulator_dtype,
    has_rounding,
)
from jax_fa.entry import request_of
from jax_fa.testing import oracle
from jax_fa.testing.cases import CASES, FEATURES, Case

FLT_MAX = oracle.FLT_MAX


# --- the plain function: S x S arrays, automatic derivatives of any order


def _dense(shared, problem: Problem, dtype, x):
    """(out, log-sum-exp) of operands by name, as the call has them; weights and out in the dtype."""
    visible, kappa, position = shared
    q, k, v = (x[name].transpose(problem.axes(name)) for name in STORED)
    *B, Sq, N, D = q.shape
    Skv, K = k.shape[-3:-1]
    acc = accumulator_dtype(dtype)
    s = jnp.einsum("...ikgd,...jkd->...kgij", q.reshape(*B, Sq, K, N // K, D), k, preferred_element_type=acc)
    s = s.reshape(*s.shape[:-4], N, Sq, Skv) * x.get("scale", jnp.asarray(problem.scale, acc)[None])[..., None, None]
    if "bias" in x:
        s = s + x["bias"].astype(acc)
    if "alibi_slopes" in x:
        distance = jnp.abs(jnp.arange(Skv, dtype=jnp.int32) - position[..., None]).astype(acc)
        s = s - x["alibi_slopes"].astype(acc)[..., None] * distance
    cap = x.get("soft_cap", problem.logits_soft_cap)
    if cap is not None:
        cap = jnp.asarray(cap, acc)
        cap = cap[..., None, None] if cap.ndim else cap
        s = cap * jnp.tanh(s / cap)
    m = jax.lax.stop_gradient(jnp.max(s, axis=-1, where=visible, initial=-FLT_MAX))
    p = jnp.where(visible, jnp.exp(jnp.where(visible, s - m[..., None], 0)), 0)
    l = p.sum(axis=-1)
    seen = l > 0
    l = jnp.where(seen, l, 1)
    w = (p / l[..., None] * kappa.astype(acc)).astype(dtype)
    out = jnp.einsum("...kgij,...jkd->...ikgd", w.reshape(*w.shape[:-3], K, N // K, Sq, Skv), v)
    out = out.reshape(*out.shape[:-3], N, v.shape[-1])
    inverse = [problem.out_axes.index(i) for i in range(len(problem.out_axes))]
    return out.transpose(inverse), jnp.where(seen, m + jnp.log(l), -FLT_MAX)


@partial(jax.jit, static_argnums=(0, 1))
def _automatic(problem: Problem, dtype, shared, x, moves, others, cotangents, cotangent_moves):
    """All derivatives along the moves, by name."""
    f = partial(_dense, shared, problem, dtype)
    along = lambda x: jax.jvp(f, (x,), (moves,))[1]
    out, lse = along(x)
    _, (out2, lse2) = jax.jvp(along, (x,), (others,))
    back = lambda x, c: jax.vjp(f, x)[1](c)[0]
    _, gradients = jax.jvp(back, (x, cotangents), (moves, cotangent_moves))
    return {"out": out, "lse": lse, "out2": out2, "lse2": lse2, **gradients}


# --- one call


@cache
def _call(case: Case, **options) -> Call:
    """The call of a case, in numpy arrays. (Backends of their own mask language apart, the kind of mask is not needed.)"""
    request = request_of(
        jax_fa.flash_attention,
        **case.stored_operands(),
        **case.arrays(),
        scale=case.scale,
        logits_soft_cap=case.soft_cap,
        dropout_rate=case.dropout,
        layout=case.layout,
        return_logsumexp=True,
    )
    call = request.call
    operands = jax.tree.map(np.asarray, replace(call.operands, hints=None))
    return call.replace(problem=replace(call.problem, mask=None), operands=operands)


def _shared(case: Case):
    """What the plain function takes of a case besides operands: always of one shape."""
    visible, keep = case.visible(), case.keep()
    kappa = 1.0 if keep is None else np.where(keep, 1 / case.keep_prob, 0)
    return (
        np.broadcast_to(True if visible is None else visible, case.full),
        np.broadcast_to(np.float64(kappa), case.full),
        np.broadcast_to(np.asarray(case.position(), np.int32), (*case.B, 1, case.Sq)),
    )


def _like(random, x):
    return random.standard_normal(x.shape).astype(x.dtype)


def _moves(case: Case, call: Call, salt: str) -> dict[str, np.ndarray]:
    random = case.random(salt)
    return {n: _like(random, x) for n, x in call.operands.present().items() if n in DIFFERENTIABLE}


def _cotangents(case: Case, call: Call, salt: str):
    random = case.random(salt)
    out = random.standard_normal(call.out_shape).astype(call.dtype)
    return out, random.standard_normal(call.stats_shape).astype(call.acc)


@partial(jax.jit, static_argnums=0)
def _ours(problem: Problem, operands: Operands, moves, others, cotangents, cotangent_moves):
    """All derivatives of the portable backend, by name."""
    call = Call.of(problem, operands)
    rounding = has_rounding(operands.query.dtype)
    call = call.replace(problem=replace(problem, saves_rounding=rounding))
    moves, others = Operands(**moves), Operands(**others)
    out, m, l, *rest = backend.forward(call)
    saved = Saved(out=out, m=m, l=l, rounding=rest[0] if rest else None)
    found = dict(zip(("out", "lse"), backend.tangent(call, moves, saved), strict=True))
    *results, found["fused-out"], found["fused-lse"] = backend.jvp(call, moves)
    forward = dict(zip(("out", "m", "l", "rounding"), zip(results, (out, m, l, *rest), strict=True)))
    found["out2"], found["lse2"] = backend.second_tangent(call, moves, others, saved)
    (dout, dlse), (dout_tangent, dlse_tangent) = cotangents, cotangent_moves
    saved = replace(
        saved, dout=dout, dlogsumexp=dlse, dout_tangent=dout_tangent, dlogsumexp_tangent=dlse_tangent
    )
    gradients, found["second-out"], found["second-lse"] = backend.second(call, moves, saved)
    return found | gradients.present(), forward


FLOOR = oracle.FLOOR | {"float64": 1e-10}


def _check(case: Case) -> None:
    with case.context():
        call = _call(case)
        moves, others = _moves(case, call, "moves"), _moves(case, call, "others")
        cotangents, cotangent_moves = _cotangents(case, call, "c"), _cotangents(case, call, "cm")
        args = moves, others, cotangents, cotangent_moves
        found, forward = jax.tree.map(np.asarray, _ours(call.problem, call.operands, *args))
    x = {n: a for n, a in call.operands.present().items() if n in DIFFERENTIABLE}
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (x, *args))
    shared = _shared(case)
    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, _automatic(call.problem, np.dtype("float64"), shared, *wide))
    naive = want
    if case.dtype != "float64":
        narrow = shared[0], np.asarray(shared[1], np.float32), shared[2]
        with jax.numpy_dtype_promotion("standard"):
            naive = jax.tree.map(np.asarray, _automatic(call.problem, jnp.dtype(case.dtype), narrow, x, *args))
    for name, a in found.items():
        what = name.rpartition("-")[2]
        given = getattr(call.operands, name, None)
        dtype = given.dtype if given is not None else call.acc if what.startswith("lse") else call.dtype
        assert a.dtype == dtype and a.shape == want[what].shape, (name, a.dtype, a.shape)
        _close(a, want[what], naive[what], f"{case}: {name}", FLOOR[jnp.dtype(dtype).name])
    for name, (fused, alone) in forward.items():
        assert fused.dtype == alone.dtype and fused.shape == alone.shape
        _close(fused, alone, alone, f"{case}: fused {name}", FLOOR[case.dtype])


def _close(found, want, naive, what: str, floor: float) -> None:
    assert np.isfinite(np.asarray(found, np.float64)).all(), f"{what}: not finite"
    for norm, error, allowed in zip(
        ("L2", "max"), oracle.errors(found, want), oracle.errors(naive, want), strict=True
    ):
        bound = 2 * allowed + floor
        assert error <= bound, f"{what}: {norm} error {error:.3g} exceeds {bound:.3g} (naive: {allowed:.3g})"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivatives(case):
    _check(case)


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features_in_float64(case):
    _check(replace(case, name=f"{case.name}-f64", dtype="float64"))
