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

from jax_fa import arguments, compat, dropout, indices, masks, softmax
from jax_fa.attention import Attention, attention
from jax_fa.backends import python_ints, strictness
from jax_fa.call import (
    Axes,
    Call,
    Dims,
    Operands,
    Problem,
    Shape,
    Size,
    accumulator_dtype,
    canonical_shape,
    is_symbolic,
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


class Arrays(NamedTuple):
    """Query, key and value of a call, checked against each other. `axes` puts them into the order `*B S N D`."""

    query: Any
    key: Any
    value: Any
    axes: Axes
    dims: Dims


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
    arrays: Arrays,
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

    Scalars that are traced become operands, those that are known belong to the program.
    """
    d, axes = arrays.dims, arrays.axes
    rank, acc = len(d.B), accumulator_dtype(computed_dtype(arrays.query.dtype))
    name, options = backend
    scale, soft_cap = _scale(scale, d), _soft_cap(logits_soft_cap, d)
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


def _of_mask(fn: Callable, mask: masks.Mask | None, arrays: Arrays) -> Any:
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
        return tuple(map(specs, found)) if isinstance(found, tuple) else spec("", found)

    def whole(values):
        known = iter(values)
        return run(
            tree.unflatten(
                [next(known) if new else np.asarray(x) for new, x in zip(unknown, leaves, strict=True)]
            )
        )

    return compat.automatic(whole, [x for new, x in zip(unknown, leaves, strict=True) if new], specs)


def _term_operands(terms: Terms, mask: masks.Mask | None, arrays: Arrays, acc) -> dict[str, Any]:
    d, bias, position = arrays.dims, terms.bias, terms.position
    if terms.bias_offset is None:
        bias = checked_bias(bias, (*d.B, d.N, d.Sq, d.Skv), acc)
    if terms.alibi_slopes is not None and position is None:
        position = _of_mask(masks.positions, mask, arrays)
    slopes = _slopes(terms.alibi_slopes, d.B, d.N)
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
        rate = _dropout_rate(dropped.rate, dropped.key)
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


def checked(query, key, value, axes: Axes, layout: str) -> Arrays:
    """Raises unless shapes and dtypes fit together; `layout` names the stored dims in errors."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != len(axes):
            raise ValueError(f"{name} must have {len(axes)} dimensions ({layout}); got shape {x.shape}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must have a floating dtype; got {x.dtype}.")
        if x.dtype != query.dtype:
            raise TypeError(
                f"{name} must have query's dtype {query.dtype}; got {x.dtype}. Cast them to one dtype, such as "
                f"{name}.astype(query.dtype)."
            )
    rank = len(axes) - 3
    q, k, v = (canonical_shape(x.shape, axes) for x in (query, key, value))
    if k[:rank] != q[:rank]:
        raise ValueError(_expect("key", layout, "batch dims B", q[:rank], k[:rank], query, key))
    if k[-1] != q[-1]:
        raise ValueError(_expect("key", layout, "query's head_dim D", q[-1], k[-1], query, key))
    if v[: rank + 2] != k[: rank + 2]:
        want, got = k[: rank + 2], v[: rank + 2]
        raise ValueError(_expect("value", layout, "key's (*B, Skv, K)", want, got, key, value, "key"))
    if q[-1] == 0:
        raise ValueError(f"query must have head_dim D of at least 1; got shape {query.shape} ({layout}).")
    N, K = q[rank + 1], k[rank + 1]
    if K == 0 or N % K != 0:
        raise ValueError(
            f"query must have a number of heads N that is a multiple of key's K; got N={N}, K={K} "
            f"from shapes {query.shape} and {key.shape} ({layout})."
        )
    for name, x, what, size in (("query", query, "Sq", q[rank]), ("key", key, "Skv", k[rank])):
        if not is_symbolic(size) and size > indices.FAR:
            raise ValueError(
                f"{name} must have a length {what} of at most 2**29 = {indices.FAR}, which 32-bit positions allow; got "
                f"shape {x.shape} ({layout}). Split the sequence: jax_fa.merge joins the parts."
            )
    return Arrays(query, key, value, axes, Dims(q[:rank], q[rank], k[rank], N, K, q[-1], v[-1]))


def _expect(name, layout, what, want, got, other, x, other_name="query") -> str:
    return (
        f"{name} must have {what}={want}; got {got}. "
        f"({other_name} has shape {other.shape}, {name} {x.shape}; layout {layout}.)"
    )


def _scale(scale, d: Dims) -> float | jax.Array:
    if scale is None:
        return 1.0 / math.sqrt(d.D)
    return _finite("scale", arguments.per_head("scale", scale, d.B, d.N))


def scale_of(scale, D: Size) -> float | jax.Array:
    """The factor of the logits that an entry is given: a float where it is known, else traced."""
    return 1.0 / math.sqrt(D) if scale is None else finite_scale("scale", scale)


def finite_scale(name: str, scale) -> float | jax.Array:
    """A factor of the logits: finite where it is known."""
    return _finite(name, arguments.scalar(name, scale))


def _finite(name: str, scale) -> float | jax.Array:
    values = indices.known(scale)
    if values is not None and not np.all(np.isfinite(values)):
        raise ValueError(f"{name} must be finite; got {scale}.")
    return scale


def soft_cap_of(cap) -> float | jax.Array | None:
    """The soft cap of the logits, likewise."""
    return None if cap is None else _positive(arguments.scalar("logits_soft_cap", cap))


def _soft_cap(cap, d: Dims) -> float | jax.Array | None:
    if cap is None:
        return None
    return _positive(arguments.per_head("logits_soft_cap", cap, d.B, d.N))


def _positive(cap) -> float | jax.Array:
    values = indices.known(cap)
    if values is not None and not np.all((values > 0) & np.isfinite(values)):
        raise ValueError(f"logits_soft_cap must be positive and finite, or None for no cap; got {cap}.")
    if isinstance(cap, float):
        return cap
    cap = cap.astype(jnp.float64 if cap.dtype == jnp.float64 else jnp.float32)
    return jnp.where((cap > 0) & (cap < jnp.inf), cap, jnp.nan)


def _dropout_rate(rate, key) -> float | jax.Array:
    rate = arguments.scalar("dropout_rate", rate)
    if isinstance(rate, float) and not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1); got {rate}.")
    if key is None and not (isinstance(rate, float) and rate == 0.0):
        what = f"dropout_rate > 0 (it is {rate})" if isinstance(rate, float) else "dropout_rate is traced"
        raise ValueError(f"dropout_key must be a jax.random key when {what}; got None.")
    return rate


def checked_bias(bias, full: Shape, acc):
    """A bias as an operand; raises unless it broadcasts to `full`, the shape of all logits."""
    if bias is None:
        return None
    bias = jnp.asarray(bias)
    if bias.dtype == jnp.bool_:
        raise TypeError("bias must be numeric, it is added to the logits; got dtype bool. Pass it as mask.")
    if jnp.issubdtype(bias.dtype, jnp.complexfloating):
        raise TypeError(f"bias must be real; got dtype {bias.dtype}.")
    if not masks.broadcasts(bias.shape, full):
        raise ValueError(f"bias must broadcast to (*B, N, Sq, Skv)={full}; got shape {bias.shape}.")
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        bias = bias.astype(acc)
    return masks.lead(bias, len(full))


def with_sinks(call: Call, sinks, *, max_logits: bool = False) -> Callable[[Call], Attention]:
    """`attention` with the sinks of an entry, checked against its call; None is none. `max_logits`: these are wanted."""
    if sinks is None:
        return attention
    sinks = checked_sinks(sinks, call.dims, call.acc)
    return functools.partial(attention, sinks=sinks, max_logits=bool(max_logits))


def checked_sinks(sinks, dims: Dims, acc):
    """Sinks as `*#B N` in the dtype of the statistics."""
    sinks = arguments.array("sinks", sinks)
    if not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise TypeError(f"sinks must have a floating dtype; got {sinks.dtype}.")
    B, N = dims.B, dims.N
    if sinks.shape[-1:] != (N,) or not masks.broadcasts(sinks.shape, (*B, N)):
        raise ValueError(f"sinks must have shape (N,) or (*B, N) with B={B}, N={N}; got {sinks.shape}.")
    return masks.lead(sinks, len(B) + 1).astype(acc)


def _slopes(slopes, batch: Shape, N: Size) -> Any:
    if slopes is None:
        return None
    slopes = jnp.asarray(slopes)
    if slopes.ndim == len(batch) + 2:
        return slopes  # an operand already (see build)
    if not jnp.issubdtype(slopes.dtype, jnp.floating):
        raise TypeError(f"alibi_slopes must have a floating dtype; got {slopes.dtype}.")
    if slopes.shape[-1:] != (N,) or not masks.broadcasts(slopes.shape, (*batch, N)):
        raise ValueError(
            f"alibi_slopes must have shape (N,) or (*B, N) with B={batch}, N={N}; got {slopes.shape}."
        )
    return masks.lead(slopes, len(batch) + 1)[..., None]
