"""The primitives and every rule JAX needs for them but those of derivatives, which `attention.py` holds.

All take the present arrays of an `Inputs` as a flat list; `tree` (its treedef) says which they are. `problem` is everything
static. Arrays keep the axis order they are stored in, so vmap moves no data: the batching rule writes the new axis into
the problem.

The rules are written once, for all. A `_Kind` says what differs: the name of the method of a backend that computes it, and
which results it has.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla

from jax_fa import backends, compat
from jax_fa.backends.sinks import Around
from jax_fa.call import LIKE_OUT, STORED, Call, Operands, Problem, Saved, has_rounding, stored_shape
from jax_fa.sharding import Partition, Split, explicit_axes, gathered_by_types, restore_splits, split, warn


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a primitive takes. (Each primitive has the parts it needs: the types do not say which.)"""

    operands: Any = None  # Operands
    saved: Any = None  # Saved
    tangents: Any = None  # Operands
    others: Any = None  # Operands, the other tangents of a second derivative

    def call(self, problem: Problem) -> Call:
        return Call.of(problem, self.operands, self.saved, self.tangents, self.others)

    def arrays(self) -> list[tuple[str, Any]]:
        """All arrays but the hints by name, in the order of the leaves."""
        parts = (self.operands, self.saved, self.tangents, self.others)
        return [(name, x) for part in parts if part is not None for name, x in part.present().items()]


@dataclass(frozen=True)
class _Kind:
    """One of the primitives."""

    what: str  # the method of a backend
    results: Callable[
        [Call], list[str]
    ]  # names: out, rounding, m, l, dout, dlogsumexp, or the operand of a gradient
    run: Callable[[Any, Call, Inputs], list[Any]]  # (backend, call, inputs) -> results
    gives_gradients: bool = False


_TANGENTS = [
    "dout",
    "dlogsumexp",
]  # results that are tangents of out and log-sum-exp are called like their cotangents


def _forward_results(call: Call) -> list[str]:
    return ["out", "m", "l", *(["rounding"] if call.problem.saves_rounding else [])]


def _second_results(call: Call) -> list[str]:
    wanted = call.problem.gradients
    return call.gradient_names + [name for name in _TANGENTS if wanted is None or name in wanted]


def _run_backward(backend, call: Call, inputs: Inputs) -> list[Any]:
    gradients = backend.backward(call, inputs.saved)
    return [getattr(gradients, name) for name in call.gradient_names]


def _run_second(backend, call: Call, inputs: Inputs) -> list[Any]:
    gradients, dout, dlogsumexp = backend.second(call, inputs.tangents, inputs.saved)
    found = gradients.present() | {"dout": dout, "dlogsumexp": dlogsumexp}
    return [found[name] for name in _second_results(call)]


FORWARD = _Kind("forward", _forward_results, lambda backend, call, _: list(backend.forward(call)))
BACKWARD = _Kind("backward", lambda call: call.gradient_names, _run_backward, gives_gradients=True)
TANGENT = _Kind("tangent", lambda _: _TANGENTS, lambda b, call, x: list(b.tangent(call, x.tangents, x.saved)))
# Forward and tangent in one pass, which saves the tangent a product.
JVP = _Kind(
    "jvp", lambda call: _forward_results(call) + _TANGENTS, lambda b, call, x: list(b.jvp(call, x.tangents))
)
SECOND = _Kind("second", _second_results, _run_second, gives_gradients=True)
SECOND_TANGENT = _Kind(
    "second_tangent",
    lambda _: _TANGENTS,
    lambda b, call, x: list(b.second_tangent(call, x.tangents, x.others, x.saved)),
)
# Of a `PagedCall`; see `paged/primitive.py`.
PAGED = _Kind("paged", lambda _: ["out", "m", "l"], lambda b, call, _: list(b.paged(call)))


def plain(problem: Problem) -> Problem:
    """The problem of a primitive that gives no gradients."""
    return replace(problem, gradients=None, mapped=0)


def forward(problem: Problem, operands: Operands) -> list[Any]:
    """out, softmax max, softmax sum and, if the problem says so, rounding."""
    return _bind(fwd_p, plain(problem), Inputs(operands=operands))


def jvp(problem: Problem, operands: Operands, tangents: Operands) -> list[Any]:
    """The results of the forward, then the tangents of out and log-sum-exp."""
    return _bind(jvp_p, plain(problem), Inputs(operands=operands, tangents=tangents))


def tangent(problem: Problem, operands: Operands, saved: Saved, tangents: Operands) -> list[Any]:
    """The tangents of out and log-sum-exp."""
    inputs = Inputs(operands=operands, saved=saved.of_forward(), tangents=tangents)
    return _bind(tangent_p, plain(problem), inputs)


def backward(problem: Problem, operands: Operands, saved: Saved) -> Operands:
    """The gradients that the problem asks for of the operands that are present."""
    problem = replace(problem, logsumexp=saved.dlogsumexp is not None)
    inputs = Inputs(operands=operands, saved=saved)
    names = inputs.call(problem).gradient_names
    return Operands(**dict(zip(names, _bind(bwd_p, problem, inputs), strict=True)))


def second(problem: Problem, operands: Operands, saved: Saved, tangents: Operands) -> dict[str, Any]:
    """The derivative of the backward along tangents; and the gradients by its cotangents, "dout" and "dlogsumexp"."""
    inputs = Inputs(operands=operands, saved=saved, tangents=tangents)
    names = _second_results(inputs.call(problem))
    return dict(zip(names, _bind(second_p, problem, inputs), strict=True))


def second_tangent(
    problem: Problem, operands: Operands, saved: Saved, tangents: Operands, others: Operands
) -> list[Any]:
    """The second derivatives of out and log-sum-exp along two tangents."""
    inputs = Inputs(operands=operands, saved=saved.of_forward(), tangents=tangents, others=others)
    return _bind(second_tangent_p, plain(problem), inputs)


def forward_saved(problem: Problem, operands: Operands) -> Saved:
    """The forward as a derivative needs it: 16-bit calls keep what rounding took from the output."""
    if has_rounding(operands.query.dtype):
        out, m, l, rounding = forward(replace(problem, saves_rounding=True), operands)
        return Saved(out=out, m=m, l=l, rounding=rounding)
    out, m, l = forward(replace(problem, saves_rounding=False), operands)
    return Saved(out=out, m=m, l=l)


def forward_results(problem: Problem, saved: Saved) -> list[Any]:
    """Those of what is saved that the problem's forward gives."""
    return [saved.out, saved.m, saved.l, *([saved.rounding] if problem.saves_rounding else [])]


def two_steps(
    problem: Problem, tree, *leaves, keep: Callable[[Saved], Saved] = lambda saved: saved
) -> list[Any]:
    """A jvp as the forward, and the tangent from what it saves; `keep` may name that."""
    inputs = tree.unflatten(leaves)
    saved = keep(forward_saved(problem, inputs.operands))
    return [*forward_results(problem, saved), *tangent(problem, inputs.operands, saved, inputs.tangents)]


def _bind(primitive, problem: Problem, inputs: Inputs) -> list[Any]:
    if primitive in (second_p, second_tangent_p):  # the transposes of the others have use for hints
        inputs = replace(inputs, operands=replace(inputs.operands, hints=None))
    leaves, tree = jax.tree.flatten(compat.vary_alike(inputs))
    return primitive.bind(*leaves, tree=tree, problem=problem)


# --- shapes and abstract evaluation


def _shape(call: Call, name: str):
    if name in LIKE_OUT:
        return call.out_shape
    return call.stats_shape if name in _STATISTICS else call.gradient_shape(name)


_STATISTICS = ("m", "l", "dlogsumexp")


def abstract_eval(kind, *avals, tree, problem):
    call = tree.unflatten(avals).call(problem)
    query = call.operands.query
    axes = explicit_axes(call)
    *batch, rows, heads, _ = axes

    def aval(name):
        shape = _shape(call, name)
        if name in LIKE_OUT:
            return compat.placed(query, shape, query.dtype, stored_shape(axes, problem.out_axes), avals)
        if name in _STATISTICS:
            return compat.placed(query, shape, call.acc, (*batch, heads, rows), avals)
        return getattr(call.operands, name).update(shape=shape, weak_type=False)

    return [aval(name) for name in kind.results(call)]


# --- batching


def _batched_operands(problem, operands, at):
    """Operands with one more batch dim, and the problem that says so; `at` holds each one's mapped axis."""
    where = {name: getattr(at, name) for name in STORED}
    hints = jax.tree.map(
        lambda x, axis: None if x is None else _moved(x, axis, 0),
        operands.hints,
        at.hints,
        is_leaf=lambda x: x is None,
    )
    batched = operands.map(lambda name, x: _moved(x, getattr(at, name), where.get(name) or 0))
    return problem.map_front(**where, out=at.query or 0), replace(batched, hints=hints)


def _moved(x, axis: int | None, to: int):
    """x with its mapped axis at `to`; size 1 there if it has none."""
    if axis is None:
        return jax.numpy.expand_dims(x, to)
    return x if axis == to else jax.numpy.moveaxis(x, axis, to)


def _unflatten_axes(tree, axes):
    """A tree of mapped axes, None where not mapped (which is a leaf here, not an absent operand)."""
    unmapped = object()
    marked = tree.unflatten([unmapped if a is None else a for a in axes])
    return jax.tree.map(lambda a: None if a is unmapped else a, marked)


def _batching_rule(kind, primitive, args, axes, *, tree, problem):
    inputs, at = tree.unflatten(args), _unflatten_axes(tree, axes)
    if kind is JVP and not jax.tree.leaves(at.operands):
        return _batched_tangents(inputs, args, axes, tree, problem)
    problem, operands = _batched_operands(problem, inputs.operands, at.operands)
    if not kind.gives_gradients:
        problem = replace(problem, mapped=0)
    out_at = at.operands.query or 0

    def where(name):
        """Where an array has the new axis: an operand's tangents and gradient where the operand has it."""
        return (
            out_at if name in LIKE_OUT else (getattr(at.operands, name, None) or 0) if name in STORED else 0
        )

    def batched(part, axes):
        if part is None:
            return None
        return replace(
            part,
            **{name: _moved(x, getattr(axes, name), where(name)) for name, x in part.present().items()},
        )

    inputs = Inputs(
        operands=operands,
        saved=batched(inputs.saved, at.saved),
        tangents=batched(inputs.tangents, at.tangents),
        others=batched(inputs.others, at.others),
    )
    return _bind(primitive, problem, inputs), [where(name) for name in kind.results(inputs.call(problem))]


def _batched_tangents(inputs, args, axes, tree, problem):
    """The batching rule of the jvp where the tangents alone are mapped (`jax.jacfwd`): one forward serves them all."""
    lead = [i for i, axis in enumerate(axes) if axis is not None]

    def tangents_of(*mapped):
        filled = list(args)
        for i, x in zip(lead, mapped, strict=True):
            filled[i] = x
        return tree.unflatten(filled).tangents

    saved = forward_saved(problem, inputs.operands)
    primals = forward_results(problem, saved)
    found = jax.vmap(
        lambda *mapped: tangent(problem, inputs.operands, saved, tangents_of(*mapped)),
        in_axes=[axes[i] for i in lead],
    )(*(args[i] for i in lead))
    return [*primals, *found], [*(None for _ in primals), *(0 for _ in found)]


# --- dead code (scan and remat ask for it): results that nobody uses are not computed


def _without_unused(kind, used: list[bool], equation):
    if not any(used):
        return [False] * len(equation.invars), None
    params = equation.params
    problem, tree = params["problem"], params["tree"]
    names = kind.results(tree.unflatten([x.aval for x in equation.invars]).call(problem))
    kept = [name for name, use in zip(names, used, strict=True) if use]
    if kind.gives_gradients:
        outvars = [x for x, use in zip(equation.outvars, used, strict=True) if use]
        params = params | {"problem": replace(problem, gradients=tuple(kept))}
        return [True] * len(equation.invars), equation.replace(outvars=outvars, params=params)
    if kind is JVP and not set(kept) & set(_TANGENTS):
        operands, tree = jax.tree.flatten(Inputs(operands=tree.unflatten(equation.invars).operands))
        outvars = equation.outvars[: len(names) - len(_TANGENTS)]
        forward = equation.replace(
            invars=operands, outvars=outvars, primitive=fwd_p, params=params | {"tree": tree}
        )
        ours = set(map(id, operands))
        return [id(x) in ours for x in equation.invars], forward
    return [True] * len(equation.invars), equation


# --- lowering: the backend is chosen here, for the platform that is compiled for


def _run(kind, backend, problem, tree, *leaves):
    inputs = tree.unflatten(leaves)
    if inputs.operands.sinks is not None:
        backend = Around(backend)
    with jax.default_matmul_precision(problem.precision):
        return tuple(kind.run(backend, inputs.call(problem), inputs))


def _lowering(kind, ctx, *args, tree, problem):
    if problem.shards is not None and hasattr(problem.shards, kind.what):
        run = partial(_run, kind, problem.shards, problem, tree)
        return compat.lower_manual(run, ctx, *args)
    if problem.shards is not None:
        return compat.lower_plain(partial(two_steps, problem, tree), ctx, *args)
    platforms = ctx.platforms or ctx.module_context.platforms
    several = compat.split_devices(ctx) > 1
    if several:
        tree, kept = _without_hints(tree)
        ctx, args = ctx.replace(avals_in=[ctx.avals_in[i] for i in kept]), tuple(args[i] for i in kept)
    inputs = tree.unflatten(ctx.avals_in)
    call = inputs.call(problem)
    what = "forward" if kind is JVP else kind.what
    chosen = [backends.choose(platform, call, what) for platform in platforms]
    if not all(hasattr(backend, kind.what) for backend in chosen):
        # A jvp in two steps, each by its own backend.
        return compat.lower_plain(partial(two_steps, problem, tree), ctx, *args)
    runs = {}
    for platform, backend in zip(platforms, chosen, strict=True):
        rule = several and _needs_rule(ctx, backend, call, platform)
        if several and not rule:
            warn(gathered(backend, platform, inputs, problem))
        here: Callable[..., Any] = _run
        if rule:
            here = partial(_run_split, platform, not compat.is_manual(ctx))
        runs[platform] = (backend.name, rule), partial(here, kind, backend, problem, tree)
    (first, fn), *others = runs.values()
    if any(key != first for key, _ in others):
        branches = {platform: run for platform, (_, run) in runs.items() if platform != platforms[0]}
        fn = partial(jax.lax.platform_dependent, default=fn, **branches)
    return compat.lower_plain(fn, ctx, *args)


# Whose compilers ask Python how to split a custom call. TPU's do not.
RULES_ON = ("cpu", "cuda", "rocm", "gpu")


def _needs_rule(ctx, backend, call: Call, platform: str) -> bool:
    """Whether XLA must be told how to split the call, since it cannot look inside or would communicate."""
    splits_alone = getattr(backend, "splits_alone", None)
    if splits_alone is None:
        return True
    # Plain code needs nothing of this package where an exported program runs, and knows manual axes.
    if compat.for_export(ctx) or compat.is_manual(ctx) or platform not in RULES_ON:
        return False
    return not splits_alone(call)


def gathered(backend, platform: str, inputs: Inputs, problem: Problem) -> list[str]:
    """What devices gather of arrays whose types say how they are sharded, one sentence each."""
    call = inputs.call(problem)
    splits_alone = getattr(backend, "splits_alone", None)
    if splits_alone is not None and splits_alone(call):
        return []
    with_rule = splits_alone is None or platform in RULES_ON
    rows = with_rule and getattr(backend, "splits_rows", False)
    return gathered_by_types(Partition(call, rows=rows), inputs.arrays(), with_rule=with_rule)


def _run_split(platform: str, sums: bool, kind, backend, problem, tree, *leaves):
    """`_run`, with a rule by which XLA splits it.

    `sums`: whether devices may sum results. In a partly manual mesh XLA numbers the devices of each part alone.
    """
    inputs = tree.unflatten(leaves)
    operands = inputs.operands
    if operands.alibi_slopes is not None and operands.position is None:
        # Of rows in the whole sequence.
        rows = jnp.arange(inputs.call(problem).dims.Sq, dtype=jnp.int32)
        operands = replace(operands, position=rows.reshape((1,) * (problem.batch_rank + 1) + (-1,)))
        inputs = replace(inputs, operands=operands)
    arrays, tree = jax.tree.flatten(inputs)
    avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    program = jax.make_jaxpr(partial(_run, kind, backend, problem, tree))(*avals)
    key = _key(kind, backend, platform, sums, problem, inputs, compat.digest(program))
    rule = _rule(kind, backend, platform, sums, problem, tree.unflatten(avals), key)
    return split(rule, program.out_avals, *arrays)


def _rule(kind, backend, platform: str, sums: bool, problem: Problem, inputs: Inputs, key: str) -> Split:
    call, tree = inputs.call(problem), jax.tree.structure(inputs)
    results = [(name, _shape(call, name)) for name in kind.results(call)]
    run = partial(_run, kind, backend, problem, tree)
    shapes = [(name, x.shape) for name, x in inputs.arrays()]
    rows = getattr(backend, "splits_rows", False)
    return Split(Partition(call, rows=rows, sums=sums), run, shapes, results, key, [platform])


def _key(kind, backend, platform: str, sums: bool, problem: Problem, inputs: Inputs, digest: str) -> str:
    """All that is static of a call, so that a program that holds it can be told from every other, and split anywhere."""
    static = {f.name: getattr(problem, f.name) for f in fields(Problem)}
    arrays = {
        f.name: {name: [x.shape, str(x.dtype)] for name, x in part.present().items()}
        for f in fields(Inputs)
        if (part := getattr(inputs, f.name)) is not None
    }
    return json.dumps(
        {
            "kind": kind.what,
            "backend": backend.name,
            "platform": platform,
            "sums": sums,
            "problem": static
            | {name: repr(static[name]) for name in ("mask", "options", "score_mod", "mask_mods")},
            "arrays": arrays,
            "program": digest,
        }
    )


def _restored(key: str) -> Split:
    """What a program that another process has exported asks for."""
    found = json.loads(key)
    static, backend = found["problem"], backends.named(found["backend"])
    reads_mask = not getattr(backend, "splits_rows", False) and static["mask"] != repr(None)
    functions = (static["score_mod"], static["mask_mods"]) != (repr(None), repr(()))
    if reads_mask or functions or static["options"] != repr(None):
        raise NotImplementedError(
            f"a program exported with options, functions or a mask of {backend.name} cannot be split over devices elsewhere."
        )
    static = {name: tuple(x) if isinstance(x, list) else x for name, x in static.items()}
    problem = Problem(**static | {"mask": None, "options": None, "score_mod": None, "mask_mods": ()})
    parts = {
        part: (Saved if part == "saved" else Operands)(
            **dict.fromkeys(_REQUIRED if part == "saved" else ())
            | {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in arrays.items()}
        )
        for part, arrays in found["arrays"].items()
    }
    kind = next(kind for kind in KINDS.values() if kind.what == found["kind"])
    return _rule(kind, backend, found["platform"], found["sums"], problem, Inputs(**parts), key)


_REQUIRED = ("out", "m", "l")


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
    primitive.def_abstract_eval(partial(abstract_eval, kind))
    batching.primitive_batchers[primitive] = partial(_batching_rule, kind, primitive)
    compat.def_dce(primitive, partial(_without_unused, kind))
    rule = partial(_lowering, kind)
    mlir.register_lowering(primitive, rule)
    for platform in backends.PLATFORMS:
        mlir.register_lowering(primitive, rule, platform=platform)
    return primitive


fwd_p = _primitive("flash_attention_fwd", FORWARD)
bwd_p = _primitive("flash_attention_bwd", BACKWARD)
tangent_p = _primitive("flash_attention_tangent", TANGENT)
jvp_p = _primitive("flash_attention_jvp", JVP)
second_p = _primitive("flash_attention_second", SECOND)
second_tangent_p = _primitive("flash_attention_second_tangent", SECOND_TANGENT)
KINDS = {
    fwd_p: FORWARD,
    bwd_p: BACKWARD,
    tangent_p: TANGENT,
    jvp_p: JVP,
    second_p: SECOND,
    second_tangent_p: SECOND_TANGENT,
}
restore_splits((kind.what for kind in KINDS.values()), _restored)
