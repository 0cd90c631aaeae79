"""The two primitives, forward `fwd_p` and backward `bwd_p`, and every rule JAX needs for them.

Both take the present arrays of an `Inputs` as a flat list; `tree` (its treedef) says which they are. `problem` is
everything static. Arrays keep the axis order they are stored in, so vmap moves no data: the batching rule writes the
new axis into the problem.

The rules are written once, for both. A `_Kind` says what differs: the name of the method of a backend that computes it,
and which results it has.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jax_fa import backends, compat
from jax_fa.backends.xla import backend as portable
from jax_fa.call import DIFFERENTIABLE, LIKE_OUT, STORED, Call, Operands, Problem, Saved, Shape
from jax_fa.sharding import Partition


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a primitive takes."""

    operands: Operands
    saved: Saved | None = None

    def call(self, problem: Problem) -> Call:
        return Call.of(problem, self.operands, self.saved)

    def shapes(self) -> dict[str, Shape]:
        """The shapes of all arrays but the hints, in the order of the leaves."""
        saved = (
            {} if self.saved is None else {f.name: getattr(self.saved, f.name) for f in fields(self.saved)}
        )
        given = self.operands.present() | {name: x for name, x in saved.items() if x is not None}
        return {name: x.shape for name, x in given.items()}


@dataclass(frozen=True)
class _Kind:
    """One of the primitives."""

    what: str  # the method of a backend
    results: Callable[[Call], list[str]]  # names: out, rounding, m, l, or the operand whose gradient it is
    run: Callable[[Any, Call, Any], list[Any]]  # (backend, call, saved) -> results


def _forward_results(call: Call) -> list[str]:
    return ["out", "m", "l", *(["rounding"] if call.problem.saves_rounding else [])]


def _run_forward(backend, call: Call, saved) -> list[Any]:
    return list(backend.forward(call))


def _run_backward(backend, call: Call, saved) -> list[Any]:
    gradients = backend.backward(call, saved)
    return [getattr(gradients, name) for name in call.gradient_names]


FORWARD = _Kind("forward", _forward_results, _run_forward)
BACKWARD = _Kind("backward", lambda call: call.gradient_names, _run_backward)


def forward(problem: Problem, operands: Operands) -> list[Any]:
    """Binds the forward: out, softmax max, softmax sum and, if the problem says so, rounding."""
    return _bind(fwd_p, problem, Inputs(operands=operands))


def backward(problem: Problem, operands: Operands, saved: Saved) -> Operands:
    """Binds the backward: gradients of the differentiable operands that are present."""
    found = _bind(bwd_p, problem, compat.vary_alike(Inputs(operands=operands, saved=saved)))
    names = [name for name in DIFFERENTIABLE if getattr(operands, name) is not None]
    return Operands(**dict(zip(names, found, strict=True)))


def _bind(primitive, problem: Problem, inputs: Inputs) -> list[Any]:
    leaves, tree = jax.tree.flatten(inputs)
    return primitive.bind(*leaves, tree=tree, problem=problem)


# --- shapes and abstract evaluation


def _shape(call: Call, name: str):
    if name in LIKE_OUT:
        return call.out_shape
    return call.stats_shape if name in ("m", "l") else call.gradient_shape(name)


def _abstract_eval(kind, *avals, tree, problem):
    call = tree.unflatten(avals).call(problem)
    rank, query = problem.batch_rank, call.operands.query
    # out is placed like query, in its own order of axes; the statistics are `*B N Sq`.
    placed = compat.Placement(query, problem.query_axes)
    like_out = [problem.out_axes.index(i) for i in range(rank + 3)]
    stats = (*range(rank), rank + 1, rank)

    def aval(name):
        shape = _shape(call, name)
        if name in LIKE_OUT:
            return placed.aval(shape, query.dtype, like_out)
        if name in ("m", "l"):
            return placed.aval(shape, call.acc, stats)
        return getattr(call.operands, name).update(shape=shape)

    return [aval(name) for name in kind.results(call)]


# --- batching


def _batched_operands(problem, operands, at):
    """Operands with one more batch dim, and the problem that says so; `at` holds each one's mapped axis."""

    def front(x, axis):
        if axis is None:
            return x[None]
        return x if axis == 0 else jax.numpy.moveaxis(x, axis, 0)

    def batch(name, x):
        axis = getattr(at, name)
        return x if name in STORED and axis is not None else front(x, axis)

    where = {name: getattr(at, name) for name in STORED}
    out_at = at.query or 0
    hints = jax.tree.map(
        lambda x, axis: None if x is None else front(x, axis),
        operands.hints,
        at.hints,
        is_leaf=lambda x: x is None,
    )
    return problem.map_front(**where, out=out_at), replace(operands.map(batch), hints=hints), out_at


def _batched_saved(saved, at, out_at: int, size: int):
    """Saved arrays with the new batch dim in full: out and what is like it at `out_at`, statistics at the front."""

    def full(x, axis, to):
        if x is None:
            return None
        if axis is None:
            return jax.numpy.broadcast_to(jax.numpy.expand_dims(x, to), (*x.shape[:to], size, *x.shape[to:]))
        return x if axis == to else jax.numpy.moveaxis(x, axis, to)

    names = [f.name for f in fields(saved)]
    to = {name: out_at if name in LIKE_OUT else 0 for name in names}
    return Saved(**{name: full(getattr(saved, name), getattr(at, name), to[name]) for name in names})


def _unflatten_axes(tree, axes):
    """A tree of mapped axes, None where not mapped (which is a leaf here, not an absent operand)."""
    unmapped = object()
    marked = tree.unflatten([unmapped if a is None else a for a in axes])
    return jax.tree.map(lambda a: None if a is unmapped else a, marked)


def _batching_rule(kind, primitive, args, axes, *, tree, problem):
    inputs, at = tree.unflatten(args), _unflatten_axes(tree, axes)
    problem, operands, out_at = _batched_operands(problem, inputs.operands, at.operands)
    saved = inputs.saved
    if saved is not None:
        size = next(x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None)
        saved = _batched_saved(saved, at.saved, out_at, size)
    inputs = Inputs(operands=operands, saved=saved)

    def where(name):
        if name in LIKE_OUT:
            return out_at
        return getattr(at.operands, name) or 0 if name in STORED else 0

    return _bind(primitive, problem, inputs), [where(name) for name in kind.results(inputs.call(problem))]


# --- forward-mode derivatives (forward over reverse gives Hessian-vector products)


def _run(kind, backend, problem, tree, *leaves):
    inputs = tree.unflatten(leaves)
    return tuple(kind.run(backend, inputs.call(problem), inputs.saved))


def _jvp_rule(kind, primals, tangents, *, tree, problem):
    """The derivative of the portable backend, which is differentiable JAX in forward mode."""
    tangents = [ad.instantiate_zeros(t) for t in tangents]
    with compat.allow_promotion():
        return jax.jvp(partial(_run, kind, portable, problem, tree), primals, tuple(tangents))


# --- lowering: the backend is chosen here, for the platform that is compiled for


def _lowering(kind, ctx, *args, tree, problem):
    platforms = ctx.platforms or ctx.module_context.platforms
    partitioned = compat.is_partitioned(ctx)
    if partitioned:
        tree, kept = _without_hints(tree)
        ctx, args = ctx.replace(avals_in=[ctx.avals_in[i] for i in kept]), tuple(args[i] for i in kept)
    inputs = tree.unflatten(ctx.avals_in)
    call = inputs.call(problem)
    chosen = [backends.choose(platform, call, kind.what) for platform in platforms]
    first, *others = (partial(_run, kind, backend, problem, tree) for backend in chosen)
    fn: Callable[..., Any] = first
    if len(set(map(id, chosen))) > 1:
        fn = partial(
            jax.lax.platform_dependent, default=first, **dict(zip(platforms[1:], others, strict=True))
        )
    if partitioned:
        results = {name: _shape(call, name) for name in kind.results(call)}
        fn = Partition(call).wrap(fn, inputs.shapes(), results, summed=kind is BACKWARD)
    return compat.lower_plain(fn, ctx, *args)


def _without_hints(tree):
    """The tree without hints, of which only whole calls have use, and which leaves stay: a shard would gather them."""
    inputs = tree.unflatten(range(tree.num_leaves))
    kept, tree = jax.tree.flatten(replace(inputs, operands=replace(inputs.operands, hints=None)))
    return tree, kept


# --- assembly


def _primitive(name: str, kind: _Kind) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(partial(_abstract_eval, kind))
    batching.primitive_batchers[primitive] = partial(_batching_rule, kind, primitive)
    ad.primitive_jvps[primitive] = partial(_jvp_rule, kind)
    rule = partial(_lowering, kind)
    mlir.register_lowering(primitive, rule)
    for platform in backends.PLATFORMS:
        mlir.register_lowering(primitive, rule, platform=platform)
    compat.see_devices_when_lowering(primitive)
    return primitive


fwd_p = _primitive("flash_attention_fwd", FORWARD)
bwd_p = _primitive("flash_attention_bwd", BACKWARD)
KINDS = {fwd_p: FORWARD, bwd_p: BACKWARD}
