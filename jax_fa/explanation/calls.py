"""The attention calls of a function: the primitives in the program that JAX traces of it."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Var
from jax.sharding import NamedSharding

from jax_fa import arguments, compat, primitives
from jax_fa.call import Call
from jax_fa.masks import Mask

# Frames between a caller and what is called: our own, and those of checks of annotations.
_OURS = tuple(str(Path(module.__file__).parent) for module in (arguments, jaxtyping))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Found:
    """A primitive in a traced program."""

    kind: Any
    inputs: Any  # `primitives.kinds.Inputs` or `PagedOperands`, of avals
    problem: Any
    source: str
    times: int

    @property
    def call(self) -> Any:
        return self.inputs.call(self.problem)


def calls_of(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> list[Found]:
    """The attention calls of a function."""
    leaves: list[Any]
    tree: Any
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [i for i, leaf in enumerate(leaves) if has_shape(leaf) and not _stays(leaf)]

    def run(*values):
        filled = list(leaves)
        for i, value in zip(arrays, values, strict=True):
            filled[i] = value
        given, named = tree.unflatten(filled)
        return jax.tree.map(lambda x: x if has_shape(x) else None, function(*given, **named))

    jaxpr = jax.make_jaxpr(run)(*(leaves[i] for i in arrays)).jaxpr
    # Where mesh axes are automatic, types do not say how arguments are sharded.
    placed = {
        var: jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype, sharding=sharding)
        for i, var in zip(arrays, jaxpr.invars, strict=True)
        if isinstance(sharding := getattr(leaves[i], "sharding", None), NamedSharding)
    }
    return list(_walk(jaxpr, 1, placed))


def call_of(function: Callable[..., Any], args: tuple, options: dict[str, Any], mask: Mask | None) -> Call:
    """The call of an entry with a mask, or the first of its parts; what is known of the mask stays known.

    Raises:
      ValueError: what the entry raises.
      TypeError: likewise.
    """
    arguments.check_names(function.__name__, options)
    leaves: list[Any]
    tree: Any
    leaves, tree = jax.tree.flatten(mask)
    unknown = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]

    def run(arrays, *args, **options):
        given = iter(arrays)
        known = [next(given) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in leaves]
        return function(*args, mask=tree.unflatten(known), **options)

    return calls_of(run, (unknown, *args), options)[0].call


def _walk(
    jaxpr: Jaxpr, times: int, placed: dict[Any, Any], outside: Sequence[compat.Frame] = ()
) -> Iterator[Found]:
    """`placed`: the avals of variables of which more is known than their types say. `outside`: the frames of the equation
    that holds the jaxpr, which those inside may not go beyond.
    """
    for equation in jaxpr.eqns:
        frames = [*compat.frames(equation), *outside]
        kind = primitives.KINDS.get(equation.primitive)
        if kind is not None:
            tree, problem = equation.params["tree"], equation.params["problem"]
            inputs = tree.unflatten([_aval(x, placed) for x in equation.invars])
            yield Found(kind, inputs, problem, _source(frames), times)
        inner = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                within = value.jaxpr if isinstance(value, ClosedJaxpr) else value
                same = equation.primitive.name in ("jit", "pjit") and len(within.invars) == len(
                    equation.invars
                )
                given = (
                    {v: _aval(x, placed) for v, x in zip(within.invars, equation.invars, strict=True)}
                    if same
                    else {}
                )
                yield from _walk(within, inner, given, frames)


def _aval(x, placed: dict[Any, Any]):
    """(Literals have no hash.)"""
    return placed.get(x, x.aval) if isinstance(x, Var) else x.aval


def _source(frames: list[compat.Frame]) -> str:
    """The line that called into this package, inside of what is explained."""
    inside = list(itertools.takewhile(lambda frame: frame.file != __file__, frames))
    called = max((i for i, frame in enumerate(inside) if frame.file.startswith(_OURS)), default=-1) + 1
    return "{}:{} ({})".format(*inside[called]) if called < len(inside) else "the function itself"


def _is_jaxpr(x) -> bool:
    return isinstance(x, (ClosedJaxpr, Jaxpr))


def has_shape(x) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _stays(x) -> bool:
    """Whether this is no array that JAX traces: NumPy's scalars are numbers and flags, as Python's are, and arrays of other
    libraries and of no numbers are what the entry makes of them."""
    if isinstance(x, (np.generic, np.ndarray)):
        return x.ndim == 0 or not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == np.bool_)
    return hasattr(x, "__array__") and not isinstance(x, jax.Array) and not hasattr(x, "__jax_array__")
