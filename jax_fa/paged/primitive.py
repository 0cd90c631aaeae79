"""The primitive of paged attention and its rules. It has the same ones as the primitives of `primitives`.

Its derivative is that of attention to keys and values that are gathered from the pages: contiguous, as a copy.
"""

import json
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval, xla

from jax_fa import attention, backends, checks, compat, entry, masks, primitives, rules, sharding
from jax_fa.call import Call, Shape
from jax_fa.paged.call import PagedCall, PagedOperands, PagedProblem
from jax_fa.primitives.kinds import PAGED
from jax_fa.primitives.lowering import RULES_ON

WHAT = PAGED.what
_RESULTS = ("out", "m", "l")
_OF_SEQUENCES = ("query", "page_table", "lengths")  # `B ...`
_SCALARS = ("scale", "soft_cap", "window")  # `#B`; the others are `#P ...`


def forward(problem: PagedProblem, operands: PagedOperands) -> list[Any]:
    """out `B Sq N Dv`, softmax max and softmax sum `B N Sq`."""
    leaves, tree = jax.tree.flatten(compat.vary_alike(operands))
    return paged_p.bind(*leaves, tree=tree, problem=problem)


def _abstract_eval(*avals, tree, problem):
    operands = tree.unflatten(avals)
    call, query = operands.call(problem), operands.query
    batch, rows, heads = _explicit_axes(operands)
    out = compat.placed(query, call.out_shape, problem.out_dtype, (batch, rows, heads, None), operands)
    stats = compat.placed(query, call.stats_shape, call.acc, (batch, heads, rows), operands)
    return [out, stats, stats]


def _explicit_axes(operands: PagedOperands) -> tuple[Any, Any, Any]:
    """The explicit mesh axes of the results' sequences, rows and heads: query's, else those of the pages' heads.

    (So they are in the derivatives, those of attention to gathered pages.)
    """
    batch, rows, heads, _ = compat.explicit_axes(operands.query)
    for pages in (operands.key_pages, operands.value_pages):
        if heads is None and pages is not None:
            heads = compat.once((batch, rows, compat.explicit_axes(pages)[2]))[2]
    return batch, rows, heads


# --- batching: more sequences, and where pages are mapped, more of them in one pool


def _batching_rule(args, axes, *, tree, problem):
    operands = tree.unflatten(args)
    names = [name for name, _ in operands.arrays()]
    mapped = {name for name, axis in zip(names, axes, strict=True) if axis is not None}
    moved = {  # with the mapped axis in front, of size 1 where there is none
        name: x[None] if axis is None else jnp.moveaxis(x, axis, 0)
        for name, x, axis in zip(names, args, axes, strict=True)
    }
    size = next(moved[name].shape[0] for name in mapped)
    batch, pages = moved["query"].shape[1], moved["key_pages"].shape[1]
    several_pools = bool(mapped - {*_OF_SEQUENCES, *_SCALARS})
    # An explicit mesh axis that cuts the batch must stay in front: JAX has no type for its blocks one after another.
    batch_first = compat.explicit_mesh(operands.query) is not None

    def merged(name: str, x):
        if name in _SCALARS and name not in mapped and x.shape[1] == 1:
            return x[0]
        if name in (*_OF_SEQUENCES, *_SCALARS):
            x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
            x = x.swapaxes(0, 1) if batch_first else x
        elif not several_pools:
            return x[0]
        else:
            x = jnp.broadcast_to(x, (size, pages, *x.shape[2:]))
        return x.reshape(-1, *x.shape[2:])

    if several_pools:
        first = jnp.arange(size, dtype=jnp.int32)[:, None, None] * pages
        moved["page_table"] = jnp.clip(moved["page_table"], 0, pages - 1) + first
    results = forward(problem, PagedOperands(**{name: merged(name, x) for name, x in moved.items()}))
    sizes = (batch, size) if batch_first else (size, batch)
    return [x.reshape(*sizes, *x.shape[1:]) for x in results], [int(batch_first)] * len(results)


# --- derivatives


def contiguous(call: PagedCall) -> Call:
    """The same call of keys and values that are gathered from the pages."""
    o, problem = call.operands, call.problem
    table = call.pages()
    exact = o.key_scale is None and o.value_scale is None and o.key_pages.dtype == call.dtype
    dtype = call.dtype if exact else call.acc

    d = call.dims
    ends = jnp.clip(o.lengths, 0, d.Skv)
    left = None if o.window is None else jnp.broadcast_to(jnp.maximum(o.window, 0), d.B)
    tokens = jnp.arange(d.Skv, dtype=jnp.int32)
    seen = tokens < ends[:, None]
    if left is not None:
        seen &= tokens >= (ends - d.Sq - left)[:, None]

    def take(pages):
        batch, heads = compat.explicit_axes(o.query)[0], compat.explicit_axes(pages)[2]
        axes = compat.once((batch, None, None, heads, None))
        return compat.taken(pages, table, axes[: pages.ndim + 1]).astype(dtype)

    def gathered(pages, scale):
        x = take(pages)
        if scale is not None:
            # What no row sees may be NaN, and by 0 that is still NaN in the derivatives of the product.
            visible = seen.reshape(x.shape[:3])[..., None]
            factor = take(jnp.broadcast_to(scale, pages.shape[:3]))
            x = jnp.where(visible[..., None], x, 0) * jnp.where(visible, factor, 0)[..., None]
        return x.reshape(*d.B, -1, *pages.shape[2:])

    key = gathered(o.key_pages, o.key_scale)
    value = key[..., : d.Dv] if o.value_pages is None else gathered(o.value_pages, o.value_scale)
    made = entry.build(
        checks.arrays(o.query.astype(dtype), key, value, (0, 1, 2, 3), "BSND"),
        mask=masks.Band(left=left, right=0, offset=ends - d.Sq),
        scale=problem.scale,
        logits_soft_cap=problem.logits_soft_cap,
        logsumexp=True,
        backend=(problem.implementation, problem.options),
    )
    given = {
        name: x.astype(made.acc)[:, None]
        for name in ("scale", "soft_cap")
        if (x := getattr(o, name)) is not None
    }
    return made.replace(
        problem=replace(made.problem, precision=problem.precision, strict=problem.strict),
        operands=replace(made.operands, **given),
    )


def _jvp(primals, tangents, *, tree, problem):
    active = [
        i
        for i, t in enumerate(tangents)
        if type(t) is not ad.Zero and getattr(t, "dtype", None) != jax.dtypes.float0
    ]

    def run(moving):
        return _of_gathered(problem, tree, primals, dict(zip(active, moving, strict=True)))

    return jax.jvp(run, ([primals[i] for i in active],), ([tangents[i] for i in active],))


def _of_gathered(problem: PagedProblem, tree, args, others: dict[int, Any]) -> list[Any]:
    """The results from attention to gathered pages, with other arrays in the place of some."""
    leaves = [others.get(i, x) for i, x in enumerate(args)]
    with compat.allow_promotion():
        found = attention.attention(contiguous(tree.unflatten(leaves).call(problem)))
    return [found.out.astype(problem.out_dtype), found.m, found.l]


_LINEAR = (["value_pages"], ["value_scale"])  # in either of them out is linear (`jax.linear_transpose`)


def _partial_eval(trace, *tracers, tree, problem):
    """As a function of the values or of their scales, out is unknown and the statistics are not."""
    results = trace.default_process_primitive(paged_p, tracers, {"tree": tree, "problem": problem})
    if [name for name, x in tree.unflatten(tracers).arrays() if not x.is_known()] not in _LINEAR:
        return results
    known = [x.pval.get_known() if x.is_known() else jnp.zeros_like(x) for x in tracers]
    return [results[0], *forward(problem, tree.unflatten(known))[1:]]


def _transpose(cotangents, *args, tree, problem):
    """Of out as a function of the values or of their scales."""
    linear = {i: x.aval for i, x in enumerate(args) if ad.is_undefined_primal(x)}
    names = [name for name, x in tree.unflatten(args).arrays() if ad.is_undefined_primal(x)]
    if names not in _LINEAR:
        raise NotImplementedError(
            f"paged attention is linear in value_pages or value_scale alone, and has no transpose in {', '.join(names)}."
        )
    found: list[Any] = [None] * len(args)
    if type(cotangents[0]) is not ad.Zero:
        ((at, aval),) = linear.items()
        out = jax.linear_transpose(lambda x: _of_gathered(problem, tree, args, {at: x})[0], aval)
        (found[at],) = out(cotangents[0])
    return found


# --- sharding: sequences and heads


class PagedPartition(sharding.Partition):
    """The labels of a paged call's arrays: 0 is the batch."""

    def __init__(self, call: PagedCall) -> None:
        self.paged, self.dims, self.sums = call, call.dims, True

    def of(self, name: str, shape: Shape) -> sharding.Labels:
        labels: dict[str, sharding.Labels] = {
            "query": (0, None, "N", None),
            "page_table": (0, None),
            "out": (0, None, "N", None),
            "m": (0, "N", None),
            "l": (0, "N", None),
            **dict.fromkeys(("lengths", *_SCALARS), (0,)),
        }
        return tuple(
            label if label is not None and 1 < size == self.size(label) else None
            for label, size in zip(labels.get(name, (None, None, "K", None)), shape, strict=False)
        )

    def why(self, name: str, axis: int, label) -> str:
        d = self.dims
        if label in ("N", "K"):
            return f"N={d.N} query heads that read K={d.K} key heads do not split evenly"
        if label is not None:
            return "its size is not divisible, or other arrays are sharded in another way"
        if name.endswith(("_pages", "_scale")) and axis == 0:
            return "any sequence may use any page (shard the pool inside jax.shard_map)"
        if name == "query" and axis == 1:
            return "rows are not split here"
        return "it is needed whole"


def _run(backend, problem, tree, *leaves):
    with jax.default_matmul_precision(problem.precision):
        return tuple(backend.paged(tree.unflatten(leaves).call(problem)))


def _run_split(platform: str, backend, problem, tree, *leaves):
    avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    program = jax.make_jaxpr(partial(_run, backend, problem, tree))(*avals)
    operands = tree.unflatten(avals)
    static = {f.name: getattr(problem, f.name) for f in fields(PagedProblem)}
    key = json.dumps(
        {
            "kind": WHAT,
            "backend": backend.name,
            "platform": platform,
            "problem": static | {"out_dtype": str(problem.out_dtype), "options": repr(problem.options)},
            "arrays": {name: [x.shape, str(x.dtype)] for name, x in operands.arrays()},
            "program": compat.digest(program),
        }
    )
    return sharding.split(_rule(backend, platform, problem, operands, key), program.out_avals, *leaves)


def _rule(backend, platform: str, problem: PagedProblem, operands: PagedOperands, key: str) -> sharding.Split:
    call, tree = operands.call(problem), jax.tree.structure(operands)
    shapes = [(name, x.shape) for name, x in operands.arrays()]
    results = list(zip(_RESULTS, (call.out_shape, call.stats_shape, call.stats_shape), strict=True))
    return sharding.Split(
        PagedPartition(call), partial(_run, backend, problem, tree), shapes, results, key, [platform]
    )


def _restored(key: str) -> sharding.Split:
    """What a program that another process has exported asks for."""
    found = json.loads(key)
    static, backend = found["problem"], backends.named(found["backend"])
    if static["options"] != repr(None):
        raise NotImplementedError(
            f"a program exported with options of {backend.name} cannot be split over devices elsewhere."
        )
    problem = PagedProblem(**static | {"options": None, "out_dtype": jnp.dtype(static["out_dtype"])})
    operands = PagedOperands(
        **{name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in found["arrays"].items()}
    )
    return _rule(backend, found["platform"], problem, operands, key)


# --- lowering: the backend is chosen here, for the platform that is compiled for


def _lowering(ctx, *args, tree, problem):
    platforms = ctx.platforms or ctx.module_context.platforms
    call = tree.unflatten(ctx.avals_in).call(problem)
    runs = {}
    for platform in platforms:
        backend = backends.choose(platform, call, WHAT)
        rule = compat.split_devices(ctx) > 1 and _needs_rule(ctx, backend, platform)
        here: Any = partial(_run_split, platform) if rule else _run
        runs[platform] = (backend.name, rule), partial(here, backend, problem, tree)
    (first, fn), *others = runs.values()
    if any(key != first for key, _ in others):
        branches = {platform: run for platform, (_, run) in runs.items() if platform != platforms[0]}
        fn = partial(jax.lax.platform_dependent, default=fn, **branches)
    return compat.lower_plain(fn, ctx, *args)


def _needs_rule(ctx, backend, platform: str) -> bool:
    """XLA can split plain code by itself, but computes the bounds of loops from all devices' lengths."""
    if backend.platforms is not None:
        return True
    return platform in RULES_ON and not compat.for_export(ctx) and not compat.is_manual(ctx)


# --- assembly

paged_p = Primitive("flash_attention_paged")
paged_p.multiple_results = True
paged_p.def_impl(partial(xla.apply_primitive, paged_p))
paged_p.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[paged_p] = _batching_rule
ad.primitive_jvps[paged_p] = _jvp
ad.primitive_transposes[paged_p] = _transpose
partial_eval.custom_partial_eval_rules[paged_p] = _partial_eval
rules.def_jet(paged_p)
mlir.register_lowering(paged_p, _lowering)
for name in backends.PLATFORMS:
    mlir.register_lowering(paged_p, _lowering, platform=name)
sharding.restore_splits([WHAT], _restored)
primitives.KINDS[paged_p] = PAGED
