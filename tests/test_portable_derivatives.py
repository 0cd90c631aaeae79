"""Derivatives of first and second order of the portable backend, against automatic ones of a plain float64 function."""

import zlib
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa import masks
from jax_fa.backends.xla import backend
from jax_fa.call import (
    DIFFERENTIABLE,
    OPERANDS,
    PLAIN_DIFFERENTIABLE,
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
from jax_fa.testing.cases import CASES, FEATURES, REAL_TILES, Case
from jax_fa.testing.programs import primitives, temporary_bytes

FLT_MAX = oracle.FLT_MAX


# --- the plain function: S x S arrays, automatic derivatives of any order


def _dense(shared, problem: Problem, dtype, x):
    """(out, log-sum-exp) of operands by name, as the call has them; weights and out in the dtype."""
    visible, kappa, position, bias_index = shared
    q, k, v = (x[name].transpose(problem.axes(name)) for name in STORED)
    *B, Sq, N, D = q.shape
    Skv, K = k.shape[-3:-1]
    acc = accumulator_dtype(dtype)
    s = jnp.einsum("...ikgd,...jkd->...kgij", q.reshape(*B, Sq, K, N // K, D), k, preferred_element_type=acc)
    s = (
        s.reshape(*s.shape[:-4], N, Sq, Skv)
        * x.get("scale", jnp.asarray(problem.scale, acc)[None])[..., None, None]
    )
    if "bias" in x:
        bias = (
            x["bias"]
            if bias_index is None
            else jnp.take_along_axis(x["bias"][..., None, :], bias_index, axis=-1)
        )
        s = s + bias.astype(acc)
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
    (out, lse), (out2, lse2) = jax.jvp(lambda x: jax.jvp(f, (x,), (moves,))[1], (x,), (others,))
    back = (lambda x, c: jax.vjp(f, x)[1](c)[0]), (x, cotangents), (moves, cotangent_moves)
    _, gradients = jax.jvp(*back)
    return {"out": out, "lse": lse, "out2": out2, "lse2": lse2, **gradients}


# --- one call


@dataclass(frozen=True)
class Subject:
    """A call in numpy arrays, and what the plain function takes of it besides operands."""

    name: str
    call: Call
    shared: tuple[Any, ...]
    shrink: float = (
        1.0  # what tangents of the key are divided by, so that products with large queries stay in range
    )

    def random(self, salt: str) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(f"{self.name}/{salt}".encode()))

    @property
    def moving(self) -> dict[str, np.ndarray]:
        return {n: x for n, x in self.call.operands.present().items() if n in DIFFERENTIABLE}

    def moves(self, salt: str) -> dict[str, np.ndarray]:
        random = self.random(salt)
        found = {n: random.standard_normal(x.shape).astype(x.dtype) for n, x in self.moving.items()}
        found["key"] = (found["key"] / np.asarray(self.shrink, found["key"].dtype)).astype(self.call.dtype)
        return found

    def cotangents(self, salt: str) -> tuple[np.ndarray, np.ndarray]:
        random, call = self.random(salt), self.call
        out = random.standard_normal(call.out_shape).astype(call.dtype)
        return out, random.standard_normal(call.stats_shape).astype(call.acc)

    def arguments(self) -> tuple[Any, ...]:
        moves = self.moves("moves"), self.moves("others")
        return *moves, self.cotangents("cotangents"), self.cotangents("cotangent moves")

    def context(self):
        return jax.enable_x64(True) if self.call.dtype == np.float64 else nullcontext()


def _call(case: Case, **options) -> Call:
    """The call of a case. The kind of its mask is only for backends that have a mask language of their own."""
    arguments = {
        "scale": case.scale,
        "logits_soft_cap": case.soft_cap,
        "dropout_rate": case.dropout,
        "layout": case.layout,
        "return_logsumexp": True,
        **case.arrays(),
        **options,
    }
    call = request_of(jax_fa.flash_attention, **case.stored_operands(), **arguments).call
    operands = jax.tree.map(np.asarray, replace(call.operands, hints=None))
    return call.replace(problem=replace(call.problem, mask=None), operands=operands)


@cache
def _subject(case: Case) -> Subject:
    visible, keep = case.visible(), case.keep()
    kappa = 1.0 if keep is None else np.where(keep, 1 / case.keep_prob, 0)
    shared = (
        np.broadcast_to(True if visible is None else visible, case.full),
        np.broadcast_to(np.float64(kappa), case.full),
        np.broadcast_to(np.asarray(case.position(), np.int32), (*case.B, 1, case.Sq)),
        None,
    )
    with case.context():
        return Subject(case.name, _call(case), shared, max(1.0, case.spread))


@partial(jax.jit, static_argnums=0)
def _ours(problem: Problem, operands: Operands, moves, others, cotangents, cotangent_moves):
    """All derivatives of the portable backend, by name; and the forward's results, fused and alone."""
    call = Call.of(replace(problem, saves_rounding=has_rounding(operands.query.dtype)), operands)
    moves, others = Operands(**moves), Operands(**others)
    forward, saved = _saved(call, cotangents, cotangent_moves)
    found = dict(zip(("out", "lse"), backend.tangent(call, moves, saved), strict=True))
    *fused, found["fused-out"], found["fused-lse"] = backend.jvp(call, moves)
    found["out2"], found["lse2"] = backend.second_tangent(call, moves, others, saved)
    gradients, found["second-out"], found["second-lse"] = backend.second(call, moves, saved)
    return found | gradients.present(), list(zip(fused, forward, strict=True))


def _saved(
    call: Call, cotangents=(None, None), cotangent_moves=(None, None)
) -> tuple[tuple[Any, ...], Saved]:
    forward = out, m, l, *rounding = backend.forward(call)
    (dout, dlse), (dout_tangent, dlse_tangent) = cotangents, cotangent_moves
    return forward, Saved(
        out=out,
        m=m,
        l=l,
        rounding=rounding[0] if rounding else None,
        dout=dout,
        dlogsumexp=dlse,
        dout_tangent=dout_tangent,
        dlogsumexp_tangent=dlse_tangent,
    )


def _expected(subject: Subject, dtype) -> dict[str, np.ndarray]:
    """The automatic derivatives, of which everything is computed in the dtype (16 bit: and float32)."""
    arrays = subject.shared[1], subject.moving, *subject.arguments()
    if dtype == np.float64:
        arrays = jax.tree.map(lambda a: np.asarray(a, np.float64), arrays)
    else:
        arrays = np.asarray(arrays[0], np.float32), *arrays[1:]
    kappa, *arrays = arrays
    shared = subject.shared[0], kappa, *subject.shared[2:]
    with jax.enable_x64(dtype == np.float64), jax.numpy_dtype_promotion("standard"):
        return jax.tree.map(np.asarray, _automatic(subject.call.problem, dtype, shared, *arrays))


FLOOR = oracle.FLOOR | {"float64": 1e-10}


def _check(subject: Subject) -> None:
    call = subject.call
    with subject.context():
        found, forward = jax.tree.map(np.asarray, _ours(call.problem, call.operands, *subject.arguments()))
    want = _expected(subject, np.dtype("float64"))
    naive = want if call.dtype == np.float64 else _expected(subject, call.dtype)
    for name, a in found.items():
        what = name.rpartition("-")[2]
        given = getattr(call.operands, name, None)
        dtype = given.dtype if given is not None else call.acc if what.startswith("lse") else call.dtype
        assert a.dtype == dtype and a.shape == want[what].shape, (name, a.dtype, a.shape)
        _close(a, want[what], naive[what], f"{subject.name}: {name}", FLOOR[jnp.dtype(dtype).name])
    for fused, alone in forward:
        assert fused.dtype == alone.dtype and fused.shape == alone.shape
        _close(fused, alone, alone, f"{subject.name}: fused forward", FLOOR[jnp.dtype(alone.dtype).name])


def _close(found, want, naive, what: str, floor: float) -> None:
    assert np.isfinite(np.asarray(found, np.float64)).all(), f"{what}: not finite"
    for norm, error, allowed in zip(
        ("L2", "max"), oracle.errors(found, want), oracle.errors(naive, want), strict=True
    ):
        bound = 2 * allowed + floor
        assert error <= bound, f"{what}: {norm} error {error:.3g} exceeds {bound:.3g} (naive: {allowed:.3g})"


# --- the table


# Of the whole table, which takes minutes to compile, those that have most of its features between them.
QUICK = {
    *("lengths-7-31", "empty-Sq", "two-batch-dims", "float64-everything", "bfloat16-everything"),
}
QUICK_IN_FLOAT64 = {"no-batch", "mask-nothing", "mask-causal_dense"}


def _rows(cases, quick):
    assert quick <= {case.name for case in cases}
    return [pytest.param(c, marks=() if c.name in quick else pytest.mark.slow, id=c.name) for c in cases]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", _rows(CASES, QUICK))
def test_derivatives(case):
    _check(_subject(case))


@pytest.mark.parametrize("case", _rows(FEATURES, QUICK_IN_FLOAT64))
def test_features_in_float64(case):
    _check(_subject(replace(case, dtype="float64")))


# --- operands that the table has not: indexed bias, traced scalars, explicit keep bits


@cache
def _arrays(Sq: int, Skv: int) -> Subject:
    """Every operand with a derivative, in float64; the bias is read at offsets, the keep bits are explicit."""
    case = Case(name="arrays", dtype="float64", Sq=Sq, Skv=Skv, slopes="N", mask="causal")
    B, N = case.B[0], case.N
    normal, keep = case.random("more").standard_normal, case.random("bits").random(case.full) < 0.7
    bits = np.packbits(keep.reshape(B, -1), axis=-1, bitorder="little")
    first = np.arange(N * Sq).reshape(1, N, Sq) * Skv
    offset = np.arange(Sq)[::-1].astype(np.int32).reshape(1, 1, Sq).copy()
    with case.context():
        call = _call(case)
    operands = replace(
        call.operands,
        bias=normal((1, N, Sq + Skv)),
        bias_offset=offset,
        scale=0.3 + np.abs(normal((1, N))) / 8,
        soft_cap=2 + np.abs(normal((B, 1))),
        drop_bits=bits,
        drop_offset=np.stack([first // 8, first % 8], axis=-1).astype(np.int32),
    )
    call = call.replace(problem=replace(call.problem, scale=1.0, keep_prob=0.7), operands=operands)
    shared = (
        np.broadcast_to(case.visible(), case.full),
        keep / 0.7,
        np.broadcast_to(np.arange(Sq, dtype=np.int32), (B, 1, Sq)),
        offset[..., None] + np.arange(Skv, dtype=np.int32),
    )
    return Subject("arrays", call, shared)


def test_every_operand():
    _check(_arrays(21, 37))


# --- what is absent or not wanted


SMALL = 7, 11  # of one tile


def _second(subject: Subject, names, wanted=None):
    """A function of all arrays that gives `second` along the tangents of those names, and these arrays."""
    moves, _, cotangents, cotangent_moves = subject.arguments()
    cotangent_moves = dict(zip(("dout", "dlogsumexp"), cotangent_moves, strict=True))
    problem = replace(subject.call.problem, gradients=wanted)

    def run(operands, moves, cotangents, cotangent_moves):
        call = Call.of(problem, operands)
        _, saved = _saved(call, cotangents, [cotangent_moves.get(n) for n in ("dout", "dlogsumexp")])
        gradients, out, lse = backend.second(call, Operands(**moves), saved)
        return {"dout": out, "dlogsumexp": lse, **gradients.present()}

    def some(x):
        return {n: a for n, a in x.items() if n in names}

    return run, (subject.call.operands, some(moves), cotangents, some(cotangent_moves))


COTANGENTS = ("dout", "dlogsumexp")


def test_tangents_alone_add_up():
    """The second derivative is linear in the tangents, of which any may be absent."""
    subject = _arrays(*SMALL)
    with subject.context():
        names = (*PLAIN_DIFFERENTIABLE, *COTANGENTS)
        all_, *alone = (
            jax.tree.map(np.asarray, jax.jit(run)(*args))
            for run, args in (_second(subject, some) for some in (names, *((n,) for n in names)))
        )
    for name, want in all_.items():
        _close(sum(x[name] for x in alone), want, want, name, 1e-12)


@cache
def _of_wanted(wanted: tuple[str, ...] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the second derivative and of the backward, the gradients of these operands alone."""
    subject = _arrays(*SMALL)
    with subject.context():
        run, args = _second(subject, (*PLAIN_DIFFERENTIABLE, *COTANGENTS), wanted)
        operands, cotangents = jax.tree.map(
            jnp.asarray, (subject.call.operands, subject.cotangents("cotangents"))
        )
        call = Call.of(replace(subject.call.problem, gradients=wanted), operands)
        backward = backend.backward(call, _saved(call, cotangents)[1])
        return run(*jax.tree.map(jnp.asarray, args)), backward.present()


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "wanted", [*((n,) for n in (*PLAIN_DIFFERENTIABLE, *COTANGENTS)), ("key", "dout"), ()]
)
def test_wanted_gradients(wanted):
    """Those that are wanted are as ever, the others absent; so in the backward."""
    for all_, few in zip(_of_wanted(None), _of_wanted(wanted), strict=True):
        given = {n: x for n, x in few.items() if x is not None}
        assert set(given) == set(wanted) & set(all_)
        for name, x in given.items():
            np.testing.assert_array_equal(x, all_[name], err_msg=name)


# Matrix products of a tile, by which tangents are given: of tangent, jvp and second, and by which gradients are wanted.
QKV = STORED
PRODUCTS = [
    ("tangent", QKV, None, 5),
    ("tangent", ("query",), None, 3),
    ("tangent", ("value",), None, 2),
    ("tangent", ("bias",), None, 2),
    ("jvp", QKV, None, 6),
    ("jvp", ("key",), None, 4),
    ("backward", (), None, 5),
    ("backward", (), ("query",), 3),
    ("backward", (), ("key", "value"), 4),
    ("backward", (), ("value",), 2),
    ("backward", (), ("bias",), 2),
    ("second", (*QKV, *COTANGENTS), None, 14),
    ("second", QKV, QKV, 10),
    ("second", QKV, ("query",), 7),
    ("second", COTANGENTS, None, 5),
    ("second", ("dlogsumexp",), ("query", "key"), 3),
    ("second", ("query",), ("dout", "dlogsumexp"), 3),
    ("second", (), None, 0),
]


@pytest.mark.parametrize(("method", "given", "wanted", "count"), PRODUCTS)
def test_products(method, given, wanted, count):
    """What is absent or not wanted costs no product."""
    case = Case(name="products", Sq=SMALL[0], Skv=SMALL[1], bias="BNQK")
    subject = _subject(case)
    call = subject.call.replace(problem=replace(subject.call.problem, gradients=wanted))
    tangents = Operands(**{n: x for n, x in subject.moving.items() if n in given})
    dout, dlse = subject.cotangents("cotangents")
    moved = [x if n in given else None for n, x in zip(COTANGENTS, (dout, dlse), strict=True)]
    out, m, l = dout, dlse, np.abs(dlse)

    def run(operands, tangents, out, m, l):
        saved = Saved(
            out=out, m=m, l=l, dout=dout, dlogsumexp=dlse, dout_tangent=moved[0], dlogsumexp_tangent=moved[1]
        )
        arguments = {"jvp": (tangents,), "backward": (saved,)}.get(method, (tangents, saved))
        return getattr(backend, method)(call.replace(operands=operands), *arguments)

    assert primitives(run, call.operands, tangents, out, m, l)["dot_general"] == count


# --- batch dims


MAPPED = [
    ("tangents.value", "dlogsumexp"),
    ("dlogsumexp_tangent",),
    ("query", "dout_tangent", "tangents.bias"),
    ("m", "l", "value", "tangents.soft_cap"),
]


@partial(jax.jit, static_argnums=0)
def _every_method(problem: Problem, arrays):
    """Of operands, saved arrays and, with a prefix, tangents."""

    def of(prefix):
        return {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}

    operands = Operands(**{n: x for n, x in arrays.items() if n in OPERANDS})
    saved = Saved(**{f.name: arrays[f.name] for f in fields(Saved) if f.name in arrays})
    tangents, others = Operands(**of("tangents.")), Operands(**of("others."))
    call = Call.of(problem, operands, saved, tangents)
    forward = Saved(out=saved.out, m=saved.m, l=saved.l)
    return {
        "backward": backend.backward(call, saved).present(),
        "tangent": backend.tangent(call, tangents, forward),
        "jvp": backend.jvp(call, tangents),
        "second": backend.second(call, tangents, saved),
        "second_tangent": backend.second_tangent(call, tangents, others, forward),
    }


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mapped", MAPPED, ids=",".join)
def test_batch_dims_of_size_one(mapped):
    """A batch dim that vmap added has its full size in any of the arrays, and 1 in the others: as with all in full."""
    subject, size = _arrays(*SMALL), 3
    problem = subject.call.problem.map_front(query=0, key=0, value=0, out=0)
    factors = 1 + subject.random("mapped").random(size) / 8

    def one(name, x):
        return np.stack([x * f for f in factors]).astype(x.dtype) if name in mapped else x[None]

    with subject.context():
        moves, others, cotangents, cotangent_moves = subject.arguments()
        _, saved = jax.jit(lambda *args: _saved(Call.of(subject.call.problem, args[0]), *args[1:]))(
            subject.call.operands, cotangents, cotangent_moves
        )
        given = {
            **subject.call.operands.present(),
            **saved.present(),
            **{f"tangents.{n}": x for n, x in moves.items()},
            **{f"others.{n}": x for n, x in others.items()},
        }
        some = {name: one(name, np.asarray(x)) for name, x in given.items()}
        full = {name: np.broadcast_to(x, (size, *x.shape[1:])) for name, x in some.items()}
        found, want = _every_method(problem, some), _every_method(problem, full)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        _close(x, y, y, str(mapped), 1e-12)


# --- NaN and infinity


GARBAGE_MASKS = ("lengths", "causal_dense")


@cache
def _garbled(mask: str):
    """A call with masked pairs, its arrays by name, and where each of them is masked for good."""
    case = Case(name=f"garbage-{mask}", mask=mask, bias="BNQK", soft_cap=3.0)
    subject = _subject(case)
    visible = np.broadcast_to(case.visible(), case.full)
    group = visible.reshape(*case.B, case.K, -1, case.Sq, case.Skv)
    keys = ~np.moveaxis(group.any(axis=(-3, -2)), -1, -2)[..., None]  # B Skv K 1
    rows = ~np.moveaxis(visible.any(axis=-1), -1, -2)[..., None]  # B Sq N 1
    by_name = {
        "query": rows,
        "dout": rows,
        "dout_tangent": rows,
        "key": keys,
        "value": keys,
        "bias": ~visible,
    }
    by_row = ~visible.any(axis=-1)
    moves, others, cotangents, cotangent_moves = subject.arguments()
    arrays = {
        **subject.moving,
        **{f"tangents.{n}": x for n, x in moves.items()},
        **{f"others.{n}": x for n, x in others.items()},
        **dict(zip(("dout", "dlogsumexp"), cotangents, strict=True)),
        **dict(zip(("dout_tangent", "dlogsumexp_tangent"), cotangent_moves, strict=True)),
    }
    masked = {n: by_name.get(n.rpartition(".")[2], by_row) for n in arrays}
    rest = {n: x for n, x in subject.call.operands.present().items() if n not in arrays}

    @jax.jit
    def results(arrays):
        call = Call.of(subject.call.problem, Operands(**rest, **{n: arrays[n] for n in subject.moving}))
        _, saved = _saved(call)
        found = _every_method(call.problem, arrays | rest | {n: getattr(saved, n) for n in ("out", "m", "l")})
        found["second"] = {
            **found["second"][0].present(),
            "out": found["second"][1],
            "lse": found["second"][2],
        }
        return found

    return subject, arrays, masked, visible, lambda x: jax.tree.map(np.asarray, results(x))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("garbage", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("mask", GARBAGE_MASKS)
def test_what_is_masked_does_not_leak(mask, garbage):
    """Garbage in masked positions of operands, cotangents and tangents changes no bit of any derivative."""
    _, arrays, masked, _, results = _garbled(mask)
    assert sum(m.any() for m in masked.values()) > len(masked) / 2

    def filled(x):
        return {n: np.where(masked[n], np.asarray(x, a.dtype), a) for n, a in arrays.items()}

    clean, dirty = results(filled(0)), results(filled(garbage))
    for (path, a), b in zip(jax.tree.leaves_with_path(clean), jax.tree.leaves(dirty), strict=True):
        assert np.isfinite(a).all(), path
        np.testing.assert_array_equal(b, a, err_msg=str(path))


@pytest.mark.parametrize("where", ["tangents.query", "tangents.key", "tangents.value", "dout_tangent"])
@pytest.mark.parametrize("mask", GARBAGE_MASKS)
def test_what_is_visible_shows(mask, where):
    """A NaN of a tangent turns those rows into NaN that see it, and changes no bit of the others."""
    subject, arrays, _, visible, results = _garbled(mask)
    b, at, head = 1, 9, 1
    dirty = dict(arrays)
    dirty[where] = dirty[where].copy()
    dirty[where][b, at, head, 2] = np.nan
    clean, found = results(arrays), results(dirty)
    rows = np.zeros(visible.shape[:-1], bool)
    if where in ("tangents.query", "dout_tangent"):
        rows[b, head, at] = visible[b, head, at].any()
    else:
        heads = slice(head * subject.call.dims.G, (head + 1) * subject.call.dims.G)
        rows[b, heads] = visible[b, heads, :, at]
    assert rows.any() and not rows.all()
    seen = (
        (rows[..., None] & visible)
        .reshape(visible.shape[0], subject.call.dims.K, -1, visible.shape[-1])
        .any(axis=-2)
    )
    rows, seen = np.moveaxis(rows, -1, -2), np.moveaxis(seen, -1, -2)
    moved = {
        "tangent": (found["tangent"][0], clean["tangent"][0]),
        "jvp": (found["jvp"][-2], clean["jvp"][-2]),
    }
    for x, y in moved.values():
        assert np.isnan(x[rows]).any() == (where != "dout_tangent")
        np.testing.assert_array_equal(x[~rows], y[~rows])
    for name, touched in (("query", rows), ("key", seen), ("value", seen)):
        x, y = found["second"][name], clean["second"][name]
        assert name == "value" or np.isnan(x[touched]).any(axis=-1).all(), name
        np.testing.assert_array_equal(x[~touched], y[~touched], err_msg=name)


def test_a_bias_of_minus_infinity_masks():
    """In derivatives of both orders, with a soft cap and its tangent, in rows that are masked as a whole, too."""
    case = Case(name="minus-infinity", bias="BNQK", soft_cap=3.0, mask="dense_column", dtype="float64")
    subject = _subject(case)
    visible = case.random("visible").random(case.full) < 0.6
    visible &= case.visible()
    operands = replace(
        subject.call.operands,
        mask=None,
        soft_cap=np.full((1, 1), 3.0),
        bias=np.where(visible, subject.call.operands.bias, -np.inf),
    )
    subject = Subject(case.name, subject.call.replace(operands=operands), (visible, *subject.shared[1:]))
    want = Subject(
        case.name,
        subject.call.replace(operands=replace(operands, bias=np.where(visible, operands.bias, 0))),
        subject.shared,
    )
    with subject.context():
        found, _ = jax.tree.map(
            np.asarray, _ours(subject.call.problem, subject.call.operands, *subject.arguments())
        )
    for name, x in _expected(want, np.dtype("float64")).items():
        _close(found[name], x, x, name, 1e-10)


# --- derivatives of derivatives, which JAX takes of the loops in forward mode


@pytest.mark.parametrize("lengths", [(37, 70)])
def test_third_order(lengths):
    """Of `second` and `second_tangent`, whose saved arrays move with the operands; causal, over several tiles."""
    case = Case(
        name="third", Sq=lengths[0], Skv=lengths[1], mask="causal_bottom", dtype="float64", B=(1,), N=2, K=1
    )
    case = replace(case, D=4, Dv=4)
    subject = _subject(case)
    problem = subject.call.problem
    moves, others, cotangents, _ = subject.arguments()
    third = subject.moves("third")
    rest = {n: x for n, x in subject.call.operands.present().items() if n not in DIFFERENTIABLE}

    def call(x):
        return Call.of(problem, Operands(**rest, **x))

    @jax.jit
    def ours(x):
        out, m, l, dout, tau = backend.jvp(call(x), Operands(**third))
        tangents = Operands(**moves)

        def second(x, out, m):
            saved = Saved(out=out, m=m, l=l, dout=cotangents[0], dlogsumexp=cotangents[1])
            gradients, *both = backend.second(call(x), tangents, saved)
            return gradients.present(), both

        def second_tangent(x, out, m):
            return backend.second_tangent(call(x), tangents, Operands(**others), Saved(out=out, m=m, l=l))

        # The max stands for the log-sum-exp that moves, the sum stays.
        point, along = (x, out, m), (third, dout, tau)
        return jax.jvp(second, point, along)[1], jax.jvp(second_tangent, point, along)[1]

    @jax.jit
    def automatic(x, moves, others, third, cotangents):
        f = partial(_dense, subject.shared, problem, np.dtype("float64"))

        def tangent(x):
            return jax.jvp(f, (x,), (moves,))[1]

        def second(x):
            gradients = jax.jvp(lambda x: jax.vjp(f, x)[1](cotangents)[0], (x,), (moves,))[1]
            return gradients, list(tangent(x))

        def second_tangent(x):
            return jax.jvp(tangent, (x,), (others,))[1]

        return jax.jvp(second, (x,), (third,))[1], jax.jvp(second_tangent, (x,), (third,))[1]

    with subject.context():
        found, want = ours(subject.moving), automatic(subject.moving, moves, others, third, cotangents)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        _close(x, y, y, "third order", 1e-10)


# --- sizes


def _all_of(x, moves, others, cotangents, cotangent_moves, **options):
    """Every derivative of a call with these arguments, whose sizes may be symbolic."""
    call = request_of(jax_fa.flash_attention, **x, **options, return_logsumexp=True).call
    call = call.replace(problem=replace(call.problem, mask=None))
    # (Slopes and the bias have leading dims in a call.)
    moves, others = (
        Operands(**{n: a.reshape(getattr(call.operands, n).shape) for n, a in m.items()})
        for m in (moves, others)
    )
    forward, saved = _saved(call, cotangents, cotangent_moves)
    gradients, *both = backend.second(call, moves, saved)
    return {
        "forward": forward,
        "backward": backend.backward(call, saved).present(),
        "tangent": backend.tangent(call, moves, saved),
        "jvp": backend.jvp(call, moves),
        "second": (gradients.present(), both),
        "second_tangent": backend.second_tangent(call, moves, others, saved),
    }


def _random_arguments(Sq, Skv, N=4, K=2, D=16):
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.standard_normal(shape)

    def operands():
        return {
            "query": normal(1, Sq, N, D),
            "key": normal(1, Skv, K, D),
            "value": normal(1, Skv, K, D),
            "bias": normal(N, 1, Skv),
            "alibi_slopes": normal(N),
        }

    x, moves, others = operands(), operands(), operands()
    x["bias"] += 800  # exp of it is infinite
    cotangents = [(normal(1, Sq, N, D), normal(1, N, Sq)) for _ in range(2)]
    return x, moves, others, *cotangents


@pytest.mark.parametrize("sizes", [pytest.param("a, 40", marks=pytest.mark.slow), "a, b"])
def test_symbolic_lengths(sizes):
    """One exported program for all lengths, which are padded inside; what is added changes nothing."""
    run = jax.jit(_all_of)
    symbols = dict(zip("ab", jax.export.symbolic_shape("a, b"), strict=True))
    Sq, Skv = (symbols[n] if n in symbols else int(n) for n in sizes.split(", "))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct([{37: Sq, 40: Skv}.get(n, n) for n in x.shape], x.dtype),
        _random_arguments(37, 40),
    )
    with jax.enable_x64(True):
        exported = jax.export.export(run)(*shapes)
        for lengths in (37, 40), (16, 70) if sizes == "a, b" else (3, 40):
            arguments = _random_arguments(*lengths)
            found, want = exported.call(*arguments), run(*arguments)
            for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(want), strict=True):
                _close(x, y, y, str(path), 1e-10)


@pytest.mark.parametrize("name", ["real-causal", pytest.param("real-bias", marks=pytest.mark.slow)])
def test_the_tiles_of_the_library(name, real_tiles):
    """Several tiles, the last ones ragged."""
    (case,) = (case for case in REAL_TILES if case.name == name)
    _check(_subject(case))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("method", ["tangent", "jvp", "second", "second_tangent"])
def test_memory_is_linear_in_the_length(method, real_tiles):
    """Twice the length needs at most about twice the memory."""

    def temporary(length: int) -> int:
        def normal(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        q, kv, stats = normal(1, length, 4, 32), normal(1, length, 2, 32), normal(1, 4, length)
        x = {"query": q, "key": kv, "value": kv, "alibi_slopes": normal(4), "bias": normal(4, 1, length)}

        def run(*arguments):
            return _all_of(*arguments, mask=masks.Causal())[method]

        return temporary_bytes(jax.jit(run).lower(x, x, x, (q, stats), (q, stats)))

    short, long = temporary(2048), temporary(4096)
    assert long <= 2.2 * short + 2**20
    # Bytes: half of the logits of all heads. (The second derivative has two dozen arrays of each tile.)
    assert long < 2 * 4 * 4096 * 4096
