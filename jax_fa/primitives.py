"""The two primitives: forward `fwd_p` and backward `bwd_p`, and every rule JAX needs for them.

Both take the present operands as a flat list; `tree` (a treedef of `Operands`, or of `Backward`) says which
they are. `problem` is everything static. Arrays keep the axis order they are stored in, so vmap moves no
data: the batching rule writes the new axis into the problem.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jax_fa import backends, compat
from jax_fa.backends import xla as reference
from jax_fa.partition import Partition
from jax_fa.problem import (
    DIFFERENTIABLE,
    IN_CANN_FORM,
    LIKE_OUT,
    STORED,
    Operands,
    Problem,
    Saved,
    accumulator_dtype,
    dims,
    gradient_shape,
    out_shape,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Backward:
    """What the backward takes."""

    operands: Operands
    saved: Saved


def forward(problem: Problem, operands: Operands) -> list[Any]:
    """Binds the forward: out, softmax max, softmax sum and, if the problem says so, rounding."""
    leaves, tree = jax.tree.flatten(operands)
    return fwd_p.bind(*leaves, tree=tree, problem=problem)


def backward(problem: Problem, operands: Operands, saved: Saved) -> Operands:
    """Binds the backward: gradients of the differentiable operands that are present."""
    args = compat.vary_alike(Backward(operands=operands, saved=saved))
    leaves, tree = jax.tree.flatten(args)
    return _gradients(operands, bwd_p.bind(*leaves, tree=tree, problem=problem))


def _gradient_names(operands: Operands) -> list[str]:
    return [name for name in DIFFERENTIABLE if getattr(operands, name) is not None]


def _gradients(operands: Operands, values) -> Operands:
    return Operands(**dict.fromkeys(STORED) | dict(zip(_gradient_names(operands), values, strict=True)))


# --- shape rules


def _fwd_shape_rule(*avals, tree, problem):
    operands = tree.unflatten(avals)
    d = dims(problem, operands)
    stats = (*d.B, d.N, d.Sq)
    out = out_shape(problem, d)
    return [out, stats, stats, *([out] if problem.saves_rounding else [])]


def _bwd_shape_rule(*avals, tree, problem):
    args = tree.unflatten(avals)
    operands = args.operands
    d = dims(problem, operands, args.saved)
    return [
        gradient_shape(problem, d, name, getattr(operands, name).shape) for name in _gradient_names(operands)
    ]


# --- abstract evaluation


def _fwd_abstract_eval(*avals, tree, problem):
    query = tree.unflatten(avals).query
    out, m, l, *rounding = _fwd_shape_rule(*avals, tree=tree, problem=problem)
    # out lies like query, with its own order of axes; the statistics are `*B N Sq`.
    lies = compat.Placement(query, problem.query_axes)
    dtype = accumulator_dtype(query.dtype)
    rank = problem.batch_rank
    stats = (*range(rank), rank + 1, rank)
    like_out = [problem.out_axes.index(i) for i in range(rank + 3)]
    return (
        lies.aval(out, query.dtype, like_out),
        lies.aval(m, dtype, stats),
        lies.aval(l, dtype, stats),
        *(lies.aval(shape, query.dtype, like_out) for shape in rounding),
    )


def _bwd_abstract_eval(*avals, tree, problem):
    operands = tree.unflatten(avals).operands
    shapes = _bwd_shape_rule(*avals, tree=tree, problem=problem)
    names = _gradient_names(operands)
    given = [getattr(operands, name) for name in names]
    return [aval.update(shape=shape) for aval, shape in zip(given, shapes, strict=True)]


# --- batching


def _batched_operands(problem, operands, at):
    """Operands with one more batch dim, and the problem that says so; `at` holds each one's mapped axis."""

    def batch(name, x):
        axis = getattr(at, name)
        if axis is None:
            return x[None]
        return x if name in STORED or axis == 0 else jax.numpy.moveaxis(x, axis, 0)

    where = {name: getattr(at, name) for name in STORED}
    out_at = at.query or 0
    return problem.map_front(**where, out=out_at), operands.map(batch), out_at


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


def _fwd_batching_rule(args, axes, *, tree, problem):
    operands, at = tree.unflatten(args), _unflatten_axes(tree, axes)
    problem, operands, out_at = _batched_operands(problem, operands, at)
    return forward(problem, operands), (out_at, 0, 0, *([out_at] if problem.saves_rounding else []))


def _bwd_batching_rule(args, axes, *, tree, problem):
    call, at = tree.unflatten(args), _unflatten_axes(tree, axes)
    size = next(x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None)
    problem, operands, out_at = _batched_operands(problem, call.operands, at.operands)
    gradients = backward(problem, operands, _batched_saved(call.saved, at.saved, out_at, size))
    names = _gradient_names(operands)
    front = [getattr(at.operands, n) or 0 if n in STORED else 0 for n in names]
    return [getattr(gradients, name) for name in names], front


# --- forward-mode derivatives (forward over reverse gives Hessian-vector products)


def _fwd_run(backend, problem, tree, *leaves):
    return backend.forward(problem, tree.unflatten(leaves))


def _bwd_run(backend, problem, tree, *leaves):
    args = tree.unflatten(leaves)
    gradients = backend.backward(problem, args.operands, args.saved)
    return tuple(getattr(gradients, name) for name in _gradient_names(args.operands))


def _jvp_rule(run, primals, tangents, *, tree, problem):
    """The derivative of the portable backend, which is differentiable JAX in forward mode."""
    tangents = [ad.instantiate_zeros(t) for t in tangents]
    with compat.lenient():
        return jax.jvp(partial(run, reference, problem, tree), primals, tuple(tangents))


# --- sharding


def _fwd_partition(run, tree, problem, avals):
    operands = tree.unflatten(avals)
    rule = Partition(problem, operands)
    inputs = _operand_labels(rule, operands)
    results = [rule.out(), rule.stats(), rule.stats(), *([rule.out()] if problem.saves_rounding else [])]
    return rule.wrap(run, inputs, results, [False] * len(results))


def _bwd_partition(run, tree, problem, avals):
    args = tree.unflatten(avals)
    rule = Partition(problem, args.operands, args.saved)
    saved = [
        rule.out() if f.name in LIKE_OUT else rule.stats()
        for f in fields(args.saved)
        if getattr(args.saved, f.name) is not None
    ]
    names = _gradient_names(args.operands)
    results = [rule.gradient(name, getattr(args.operands, name).shape) for name in names]
    return rule.wrap(run, _operand_labels(rule, args.operands) + saved, results, [True] * len(results))


def _operand_labels(rule, operands):
    return [rule.operand(name, x.shape) for name, x in operands.items() if x is not None]


# --- lowering: the backend is chosen here, for the platform that is compiled for


def _lowering(run, get_operands, partition, backward, ctx, *args, tree, problem):
    platforms = ctx.platforms or ctx.module_context.platforms
    partitioned = compat.is_partitioned(ctx)
    if partitioned:
        tree, kept = _without_cann_form(tree)
        ctx, args = ctx.replace(avals_in=[ctx.avals_in[i] for i in kept]), tuple(args[i] for i in kept)
    operands = get_operands(tree.unflatten(ctx.avals_in))
    chosen = [backends.choose(platform, problem, operands, backward) for platform in platforms]
    first, *others = (partial(run, backend, problem, tree) for backend in chosen)
    fn = first
    if len(set(chosen)) > 1:
        fn = partial(
            jax.lax.platform_dependent, default=first, **dict(zip(platforms[1:], others, strict=True))
        )
    if partitioned:
        fn = partition(fn, tree, problem, ctx.avals_in)
    return compat.lower_plain(fn, ctx, *args)


def _without_cann_form(tree):
    """The tree without what only whole calls can use, and which leaves stay: a shard would gather them for nothing."""
    args = tree.unflatten(range(tree.num_leaves))
    absent = dict.fromkeys(IN_CANN_FORM)
    if isinstance(args, Operands):
        args = replace(args, **absent)
    else:
        args = replace(args, operands=replace(args.operands, **absent))
    kept, tree = jax.tree.flatten(args)
    return tree, kept


def _register_lowering(primitive, run, get_operands, partition, backward):
    rule = partial(_lowering, run, get_operands, partition, backward)
    mlir.register_lowering(primitive, rule)
    for platform in backends.PLATFORMS:
        mlir.register_lowering(primitive, rule, platform=platform)
    compat.see_devices_when_lowering(primitive)


# --- assembly

fwd_p = Primitive("flash_attention_fwd")
fwd_p.multiple_results = True
fwd_p.def_impl(partial(xla.apply_primitive, fwd_p))
fwd_p.def_abstract_eval(_fwd_abstract_eval)
batching.primitive_batchers[fwd_p] = _fwd_batching_rule
ad.primitive_jvps[fwd_p] = partial(_jvp_rule, _fwd_run)
_register_lowering(fwd_p, _fwd_run, lambda operands: operands, _fwd_partition, False)

bwd_p = Primitive("flash_attention_bwd")
bwd_p.multiple_results = True
bwd_p.def_impl(partial(xla.apply_primitive, bwd_p))
bwd_p.def_abstract_eval(_bwd_abstract_eval)
batching.primitive_batchers[bwd_p] = _bwd_batching_rule
ad.primitive_jvps[bwd_p] = partial(_jvp_rule, _bwd_run)
_register_lowering(bwd_p, _bwd_run, lambda args: args.operands, _bwd_partition, True)
