"""What an entry is made of: from checked arguments to a `Call`, and from its result to what the caller gets.

An entry is a function that returns a `Request`. `@entry` makes it public: the decorated function has the signature and
the docstring, runs the request, and says in its own name what is wrong with an argument.
"""

import functools
import inspect
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import arguments, checks, compat, dropout, indices, masks, softmax
from jax_fa.attention import Attention, attention
from jax_fa.backends import python_ints, strictness
from jax_fa.call import (
    Call,
    Dims,
    Operands,
    Problem,
    accumulator_dtype,
    canonical_shape,
)
from jax_fa.flex import masks as functions
from jax_fa.flex import programs

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Request(Generic[R]):
    """What an entry asks for: a call, what to compute of it, and what the entry returns of the result."""

    call: Any  # a Call, or a PagedCall
    finish: Callable[[Any], R]
    run: Callable[[Any], Any] = attention


def entry(build: Callable[P, Request[R]]) -> Callable[P, R]:
    """Decorates a function that returns a `Request`: the decorated one returns the result."""
    signature = inspect.signature(build)
    arguments.declare(build.__name__, signature)

    @functools.wraps(build)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        request = request_of(run, *args, **kwargs)
        result = request.run(request.call)
        with compat.allow_promotion():
            return request.finish(result)

    # (mypy knows no attributes of functions.)
    run.request = build  # type: ignore[attr-defined]
    returned = typing.get_args(signature.return_annotation)[0]
    run.__signature__ = signature.replace(return_annotation=returned)  # type: ignore[attr-defined]
    run.__annotations__ = build.__annotations__ | {"return": returned}
    return run


def request_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Request:
    """What an entry (as it is public) asks for with these arguments; raises what it raises."""
    arguments.check_names(function.__name__, kwargs)
    with compat.allow_promotion():
        return function.request(*args, **kwargs)  # type: ignore[attr-defined]


def largest_logits(result: Attention):
    """Of every head, `*B N`; -FLT_MAX where all rows are fully masked, or there are none."""
    x = result.largest_logit
    if x.shape[-1] == 1:  # decoding, where one more operation would take its share of the time
        return x[..., 0]
    return jnp.max(x, axis=-1, initial=-softmax.FLT_MAX)


# --- from arguments to a call


class Terms(NamedTuple):
    """What is added to the logits, and the function that they then go through.

    With `bias_offset`, the bias is an operand already (see `Operands`), and so are slopes of rank B + 2. Without
    `position`, the mask places the rows.
    """

    bias: Any = None
    bias_offset: Any = None
    bias_apart: bool = False
    alibi: str | None = None
    alibi_slopes: Any = None
    position: Any = None
    score_mod: Callable | None = None


class Dropout(NamedTuple):
    """Seeded: a rate and a `jax.random` key. Explicit: keep bits, and what kept weights are divided by."""

    rate: Any = 0.0
    key: Any = None
    keep_prob: float | None = None
    bits: Any = None
    offset: Any = None


_NO_TERMS, _NO_DROPOUT = Terms(), Dropout()


def build(
    arrays: checks.Arrays,
    *,
    mask: masks.Mask | None = None,
    terms: Terms = _NO_TERMS,
    scale=None,
    logits_soft_cap=None,
    dropped: Dropout = _NO_DROPOUT,
    logsumexp: bool = False,
    backend: tuple[str | None, Any] = (None, None),
    hints: Any = None,
) -> Call:
    """The call of these arguments, which are checked against each other; `backend` is what `backends.chosen` gives.

    Scalars that are data (see `arguments.scalar`) become operands, the others belong to the program.
    """
    d, axes = arrays.dims, arrays.axes
    rank, acc = len(d.B), accumulator_dtype(computed_dtype(arrays.query.dtype))
    name, options = backend
    scale, soft_cap = checks.head_scales(scale, d), checks.head_soft_caps(logits_soft_cap, d)
    seeds = _Seeds.of(dropped, d)
    keep_prob = dropped.keep_prob
    called = _Functions.of(terms.score_mod, mask, d, acc)
    problem = Problem(
        query_axes=axes,
        key_axes=axes,
        value_axes=axes,
        out_axes=axes,
        scale=_static(scale, 1.0),
        logits_soft_cap=_static(soft_cap, None),
        alibi=terms.alibi,  # type: ignore[arg-type]
        keep_prob=_static(seeds.limit, dropout.LIMIT) / dropout.LIMIT if keep_prob is None else keep_prob,
        mask=None if mask is None else mask.static(),
        bias_apart=terms.bias_apart,
        score_mod=called.score_mod,
        mask_mods=called.mask_mods,
        block_size=called.block_size,
        logsumexp=logsumexp,
        precision=compat.matmul_precision(),
        strict=strictness.active(),
        implementation=name,
        options=options,
    )
    query, key, value = map(_computed, arrays[:3])
    if mask is not None:
        python_ints.watch(problem.mask, d.Sq, (arrays.query.shape, arrays.key.shape, arrays.query.dtype))
    first, *others = mask_operands(_of_mask(masks.parts, mask, arrays))
    operands = Operands(
        query=query,
        key=key,
        value=value,
        **first.present(),
        **_term_operands(terms, mask, arrays, acc),
        dropout_seed=seeds.seed,
        dropout_stream=seeds.stream,
        drop_bits=dropped.bits,
        drop_offset=dropped.offset,
        scale=_data(scale, rank, acc),
        soft_cap=_data(soft_cap, rank, acc),
        keep_threshold=_data(seeds.limit, rank, jnp.uint32),
        **called.operands,
        hints=hints,
    )
    return replace(Call.of(problem, operands), parts=tuple(others))


def _computed(x):
    dtype = computed_dtype(x.dtype)
    return x if x.dtype == dtype else x.astype(dtype)


def mask_operands(parts: Sequence[masks.Rules]) -> list[Operands]:
    """The masks alone, of each part."""
    return [
        Operands(**{"mask" if n == "dense" else n: x for n, x in part._asdict().items()}) for part in parts
    ]


def _of_mask(fn: Callable, mask: masks.Mask | None, arrays: checks.Arrays) -> Any:
    """`fn(mask, B, N, Sq, Skv)`: arrays `*#B #N #Sq ...`, placed like the query."""
    d = arrays.dims

    def run(mask):
        return fn(mask, d.B, d.N, d.Sq, d.Skv)

    leaves: list[Any]
    tree: Any
    leaves, tree = jax.tree.flatten(mask)
    unknown = [indices.known(x) is None for x in leaves]
    if not any(new and compat.explicit_mesh(x) is not None for new, x in zip(unknown, leaves, strict=True)):
        return run(mask)
    *batch, rows, heads, _ = canonical_shape(compat.explicit_axes(arrays.query), arrays.axes)

    def specs(found):
        def spec(name: str, x):
            full, axes = (*d.B, d.N, d.Sq), (*batch, heads, None if name == "segment_key" else rows)
            given = (
                axis if size == whole else None
                for axis, size, whole in zip(axes, x.shape, full, strict=False)
            )
            return (*given, *(None,) * (x.ndim - len(full)))

        if isinstance(found, masks.Rules):
            return masks.Rules(**{n: None if x is None else spec(n, x) for n, x in found._asdict().items()})
        if found is None:
            return None
        return tuple(map(specs, found)) if isinstance(found, tuple) else spec("", found)

    def whole(values):
        known = iter(values)
        return run(
            tree.unflatten(
                [next(known) if new else np.asarray(x) for new, x in zip(unknown, leaves, strict=True)]
            )
        )

    return compat.automatic(whole, [x for new, x in zip(unknown, leaves, strict=True) if new], specs)


def _term_operands(terms: Terms, mask: masks.Mask | None, arrays: checks.Arrays, acc) -> dict[str, Any]:
    d, bias, position = arrays.dims, terms.bias, terms.position
    if terms.bias_offset is None:
        bias = checks.bias(bias, (*d.B, d.N, d.Sq, d.Skv), acc)
    if terms.alibi_slopes is not None and position is None:
        position = _of_mask(masks.positions, mask, arrays)
    slopes = checks.slopes(terms.alibi_slopes, d.B, d.N)
    return {"bias": bias, "bias_offset": terms.bias_offset, "alibi_slopes": slopes, "position": position}


class _Functions(NamedTuple):
    """The functions of a call, and the operands that they take."""

    score_mod: Any
    mask_mods: tuple[Any, ...]
    block_size: tuple[int, int] | None
    operands: dict[str, Any]

    @classmethod
    def of(cls, score_mod: Callable | None, mask: masks.Mask | None, d: Dims, acc) -> "_Functions":
        score = [] if score_mod is None else [programs.traced("score_mod", score_mod, acc)]
        members = functions.functions_of(mask)
        every = [*score, *(programs.Traced(member.program, member.arrays) for member in members)]
        if not every:
            return cls(None, (), None, {})
        rank = len(d.B) + 2
        blocks = functions.blocks_of(members, rank - 1)
        packed = [program.packed(programs.whole(arrays), acc) for program, arrays in every]
        floats, words = ([x for vectors in packed for x in vectors[i]] for i in range(2))
        operands = {
            "function_floats": _vector(floats, rank),
            "function_words": _vector(words, rank),
            "function_place": _place(d),
            "blocks": blocks.blocks,
            "block_pairs": blocks.pairs,
        }
        found = tuple(program for program, _ in every)
        return cls(found[0] if score else None, found[len(score) :], blocks.size, operands)


def _vector(parts: list[Any], rank: int):
    """One vector of several, with leading dims of size 1; None for nothing."""
    found = [x for x in parts if x.size]
    return masks.lead(jnp.concatenate(found), rank) if found else None


def _place(d: Dims):
    """The batch index, over all of *B, and the head of every query head: `*B N 2`."""
    batch = jnp.arange(math.prod(d.B), dtype=jnp.int32).reshape(*d.B, 1)
    head = jnp.arange(d.N, dtype=jnp.int32)
    return jnp.stack(jnp.broadcast_arrays(batch, head), axis=-1)


class _Seeds(NamedTuple):
    """Operands of seeded dropout."""

    limit: Any  # of 2**16 values, how many keep their weight
    seed: Any = None
    stream: Any = None

    @classmethod
    def of(cls, dropped: Dropout, d: Dims) -> "_Seeds":
        rate = checks.dropout_rate(dropped.rate, dropped.key)
        limit = dropout.kept_numbers(rate)
        if isinstance(rate, float) and not rate:
            return cls(limit)
        return cls(
            limit, masks.lead(dropout.seed_words(dropped.key), len(d.B) + 1), dropout.streams(d.B, d.N)
        )


def _static(x, otherwise):
    """A scalar that is part of the program; `otherwise` where it is data."""
    return otherwise if isinstance(x, jax.Array) else x


def _data(x, rank: int, dtype):
    """What is data, a scalar or `*#B #N 1 1`, as `*#B #N`; None where it is part of the program."""
    if not isinstance(x, jax.Array):
        return None
    return masks.lead(x.astype(dtype).reshape(x.shape[:-2]), rank + 1)


def computed_dtype(dtype):
    """The dtype a call computes in: 8-bit floats and smaller are widened, exactly, since their weights would underflow."""
    return jnp.dtype(jnp.bfloat16 if jnp.finfo(dtype).bits < 16 else dtype)


def with_sinks(call: Call, sinks, *, max_logits: bool = False) -> Callable[[Call], Attention]:
    """`attention` with the sinks of an entry, checked against its call; None is none. `max_logits`: these are wanted."""
    if sinks is None:
        return attention
    sinks = checks.sinks(sinks, call.dims, call.acc)
    return functools.partial(attention, sinks=sinks, max_logits=bool(max_logits))
