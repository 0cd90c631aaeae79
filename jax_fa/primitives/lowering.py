"""From a primitive to code: a backend is chosen here, for the platform that is compiled for, and XLA told how to split it.

What XLA asks for when it splits is a function of a string: all that is static of a call, so that it can be asked for where an
exported program runs, in a process that has not traced it.
"""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_fa import backends, compat
from jax_fa.backends.sinks import Around
from jax_fa.call import Call, Operands, Problem, Saved
from jax_fa.primitives.kinds import ALL, JVP, Inputs, Kind, shape_of
from jax_fa.sharding import Partition, Split, gathered_by_types, restore_splits, split, warn


def _run(kind, backend, problem, tree, *leaves):
    inputs = tree.unflatten(leaves)
    if inputs.operands.sinks is not None:
        backend = Around(backend)
    with jax.default_matmul_precision(problem.precision):
        return tuple(kind.run(backend, inputs.call(problem), inputs))


def lower(kind: Kind, two_steps: Callable[..., list[Any]], ctx, *args, tree, problem: Problem):
    """The rule of a primitive. `two_steps`: a jvp as the forward, and the tangent from what it saves, each by its own backend."""
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
    results = [(name, shape_of(call, name)) for name in kind.results(call)]
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
    kind = next(kind for kind in ALL if kind.what == found["kind"])
    return _rule(kind, backend, found["platform"], found["sums"], problem, Inputs(**parts), key)


_REQUIRED = ("out", "m", "l")


def _without_hints(tree):
    """The tree without hints, of which only whole calls have use, and which leaves stay: a shard would gather them."""
    inputs = tree.unflatten(range(tree.num_leaves))
    kept, tree = jax.tree.flatten(replace(inputs, operands=replace(inputs.operands, hints=None)))
    return tree, kept


restore_splits((kind.what for kind in ALL), _restored)
