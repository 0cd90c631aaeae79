"""Functions of one pair of a row and a column, traced once and evaluated tile by tile.

A `score_mod` or `mask_mod` is written for scalars. What it closes over becomes operands of the call: numbers that have
gradients in one vector of floats, everything else bit by bit in one vector of 32-bit words. So however many arrays a
function has, the primitives carry two, and what they are is known here alone.
"""

import functools
import inspect
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from jax_fa import compat
from jax_fa.arguments import shown

INDICES = ("batch", "head", "row", "column")


class _Array(NamedTuple):
    """One that a function closes over."""

    shape: tuple[int, ...]
    dtype: np.dtype
    float: bool  # it is in the vector of floats

    @property
    def size(self) -> int:
        """In its vector."""
        count = math.prod(self.shape)
        return count * 2 if not self.float and self.dtype.itemsize == 8 else count


@dataclass(frozen=True, eq=False)
class Program:
    """A traced function without its arrays. Equal to another if it computes the same of them."""

    jaxpr: Jaxpr  # of (score,) batch, head, row, column; its constants are the arrays
    arrays: tuple[_Array, ...]
    scored: bool
    name: str
    _key: Hashable = field(repr=False)
    _hash: int = field(repr=False)

    def __eq__(self, other) -> bool:
        return isinstance(other, Program) and self._hash == other._hash and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def __deepcopy__(self, memo) -> "Program":
        return self  # nothing in it changes

    def __reduce__(self):
        raise TypeError(
            f"a {self.name} and the BlockMask that is made of it cannot be pickled, since they hold a traced program. Make it "
            "anew by create_block_mask."
        )

    @property
    def floats(self) -> int:
        """How many it takes of the vector of floats."""
        return sum(x.size for x in self.arrays if x.float)

    @property
    def words(self) -> int:
        return sum(x.size for x in self.arrays if not x.float)

    @functools.cached_property
    def _read(self) -> dict[str, bool]:
        read = {id(v) for eqn in self.jaxpr.eqns for v in eqn.invars} | {id(v) for v in self.jaxpr.outvars}
        names = (("score",) if self.scored else ()) + INDICES
        return {name: id(v) in read for name, v in zip(names, self.jaxpr.invars, strict=True)}

    def uses(self, name: str) -> bool:
        """Whether the result depends on the index of this name."""
        return self._read[name]

    def __call__(self, floats, words, *given):
        """The result for scalars, with the arrays in these vectors."""
        arrays, at = [], {True: 0, False: 0}
        for x in self.arrays:
            vector = floats if x.float else words
            arrays.append(_unpacked(vector[at[x.float] : at[x.float] + x.size], x))
            at[x.float] += x.size
        (result,) = jaxpr_as_fun(ClosedJaxpr(self.jaxpr, arrays))(*given)
        aval: Any = self.jaxpr.outvars[0].aval
        return jnp.asarray(result, aval.dtype)  # a program that is a constant gives a Python number

    def over(self, floats, words, *given):
        """The results for arrays of one rank that broadcast; the vectors have one dim more.

        A dim of size 1 in all that the function reads stays 1.
        """
        rank = given[-1].ndim
        read = self._read.values()
        given = tuple(x if use else x.reshape(-1)[0] for x, use in zip(given, read, strict=True))
        args, axes = [], []
        for x, extra in ((floats, 1), (words, 1), *((x, 0) for x in given)):
            lead = x.shape[: x.ndim - extra]
            axes.append([size != 1 for size in lead] or [False] * rank)
            args.append(x.reshape([size for size in lead if size != 1] + list(x.shape[len(lead) :])))
        fn: Callable = self
        full = [1] * rank
        for axis in reversed(range(rank)):
            where = [0 if mapped[axis] else None for mapped in axes]
            if any(at is not None for at in where):
                fn = jax.vmap(fn, in_axes=where)
                full[axis] = -1
        found = fn(*args)
        sizes = iter(found.shape)
        return found.reshape([1 if size == 1 else next(sizes) for size in full])

    def packed(self, arrays: Sequence[Any], dtype) -> tuple[list[Any], list[Any]]:
        """Its arrays, whole on every device (see `whole`), as vectors: floats of this dtype, and words."""
        floats: list[Any] = []
        words: list[Any] = []
        for x, kind in zip(arrays, self.arrays, strict=True):
            x = jnp.asarray(x)
            if kind.float:
                floats.append(x.reshape(-1).astype(dtype))
            else:
                words.append(_words(jax.lax.stop_gradient(x)))
        return floats, words


def whole(arrays: Sequence[Any]) -> list[Any]:
    """Those that a function closes over, where mesh axes may cut them."""
    return [compat.gathered(jnp.asarray(x)) for x in arrays]


def _words(x):
    """The bits of an array, as uint32."""
    if x.dtype == jnp.bool_ or x.dtype.itemsize < 4:
        x = x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)
    return jax.lax.bitcast_convert_type(x.reshape(-1), jnp.uint32).reshape(-1)


def _unpacked(vector, kind: _Array):
    if kind.float:
        return vector.reshape(kind.shape).astype(kind.dtype)
    if kind.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(vector.reshape(*kind.shape, 2), kind.dtype)
    small = kind.dtype == jnp.bool_ or kind.dtype.itemsize < 4
    between = kind.dtype
    if small:
        between = np.dtype(np.float32 if jnp.issubdtype(kind.dtype, jnp.floating) else np.int32)
    return jax.lax.bitcast_convert_type(vector.reshape(kind.shape), between).astype(kind.dtype)


class Traced(NamedTuple):
    program: Program
    arrays: tuple[Any, ...]


def traced(name: str, function: Callable, score_dtype: Any = None) -> Traced:
    """A function that an argument of this name holds: a `mask_mod`, or with a dtype of scores a `score_mod`.

    Raises:
      TypeError: what is no function of these arguments, cannot be traced, or returns something else than a scalar of the
        right dtype.
      ValueError: a function with side effects, or one that is another each time it is called.
    """
    scored = score_dtype is not None
    wanted = f"({', '.join((*(('score',) if scored else ()), *INDICES))})"
    _check_signature(name, function, 4 + scored, wanted)
    given = [jax.ShapeDtypeStruct((), score_dtype)] if scored else []
    given += [jax.ShapeDtypeStruct((), jnp.int32)] * 4
    closed, again = (_jaxpr(name, function, given) for _ in range(2))
    _check_result(name, closed, scored)
    if closed.effects:
        effects = ", ".join(sorted(str(effect) for effect in closed.effects))
        raise ValueError(
            f"{name} must be a pure function; this one has side effects ({effects}), such as prints, callbacks or writes to "
            "references."
        )
    if _key(closed.jaxpr, False) != _key(again.jaxpr, False) or not _same(closed.consts, again.consts):
        raise ValueError(
            f"{name} must be a pure function; this one gives another program each time it is traced. Random numbers and "
            "counters do not belong into it: close over an array of them."
        )
    arrays = tuple(_array(name, x, scored) for x in closed.consts)
    key = (_key(closed.jaxpr, True), arrays, scored)
    program = Program(closed.jaxpr, arrays, scored, name, key, hash(key))
    return Traced(program, tuple(closed.consts))


def _check_signature(name: str, function: Callable, count: int, wanted: str) -> None:
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{name} must be a function {wanted} of scalars; got {shown(function)}.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*(None,) * count)
    except TypeError as error:
        called = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            f"{name} must be a function of {count} arguments, {wanted}; got {called}{signature}."
        ) from error


def _jaxpr(name: str, function: Callable, given: list[Any]) -> ClosedJaxpr:
    def array(x):
        try:
            return jnp.asarray(x)
        except TypeError as error:
            raise TypeError(f"{name} must return one scalar; it returns {shown(x)}.") from error

    def called(*args):
        # Python numbers, which are constants of a program, as arrays.
        return jax.tree.map(array, function(*args))

    try:
        # (A function of its own each time: JAX keeps the program of one that it has seen.)
        with compat.untyped():
            return jax.make_jaxpr(called)(*given)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise TypeError(
            f"{name} must be a function that JAX can trace: its arguments are traced scalars, which have no truth value and "
            "index no NumPy array. Use jnp.where, & and | in place of if, and, or; make arrays that it indexes jax arrays."
        ) from error


def _check_result(name: str, closed: ClosedJaxpr, scored: bool) -> None:
    kind = "floating" if scored else "boolean"
    right = len(closed.out_avals) == 1 and closed.out_avals[0].shape == ()
    if right:
        dtype = closed.out_avals[0].dtype
        right = jnp.issubdtype(dtype, jnp.floating) if scored else dtype == jnp.bool_
    if not right:
        got = ", ".join(aval.str_short() for aval in closed.out_avals) or "nothing"
        advice = "" if scored else " To change scores pass score_mod."
        if scored and got.startswith("bool"):
            advice = " To mask pairs pass mask_mod."
        raise TypeError(f"{name} must return one scalar of {kind} dtype; it returns {got}.{advice}")


def _array(name: str, x, scored: bool) -> _Array:
    aval = jax.typeof(x)
    dtype = aval.dtype
    plain = any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))
    if not plain or dtype in (jnp.int4, jnp.uint4, jnp.int2, jnp.uint2):
        raise TypeError(
            f"{name} must close over arrays of floating, integer or boolean dtype; got one of shape {aval.shape} and dtype "
            f"{dtype}."
        )
    if not all(isinstance(size, int) for size in aval.shape):
        raise TypeError(f"{name} must close over arrays of known shapes; got one of shape {aval.shape}.")
    return _Array(tuple(aval.shape), np.dtype(dtype), scored and bool(jnp.issubdtype(dtype, jnp.floating)))


# --- which programs are the same


def _key(jaxpr: Jaxpr, functions: bool) -> Hashable:
    """All that a program computes, in terms that compare by value; `functions`: with those that it holds, which do so by
    identity.
    """
    numbers: dict[int, int] = {}

    def var(v) -> Hashable:
        if isinstance(v, Literal):
            return v.aval.str_short(), _value(v.val)
        return numbers.setdefault(id(v), len(numbers))

    def param(x) -> Hashable:
        if isinstance(x, ClosedJaxpr):
            return _key(x.jaxpr, functions), tuple(map(_value, x.consts))
        if isinstance(x, Jaxpr):
            return _key(x, functions)
        if isinstance(x, (tuple, list)):
            return type(x).__name__, tuple(map(param, x))
        if isinstance(x, dict):
            return tuple((k, param(v)) for k, v in x.items())
        if not functions and not isinstance(x, (str, int, float, complex, np.dtype, np.generic)):
            return type(x).__name__
        try:
            hash(x)
        except TypeError:
            return _value(x)
        return type(x).__name__, x

    inputs = tuple(v.aval.str_short() for v in (*jaxpr.constvars, *jaxpr.invars))
    for v in (*jaxpr.constvars, *jaxpr.invars):
        var(v)
    equations = tuple(
        (
            eqn.primitive.name,
            tuple(map(var, eqn.invars)),
            tuple((var(v), v.aval.str_short()) for v in eqn.outvars),
            tuple((k, param(v)) for k, v in eqn.params.items()),
        )
        for eqn in jaxpr.eqns
    )
    return inputs, equations, tuple(map(var, jaxpr.outvars))


def _value(x) -> Hashable:
    """A value that is part of a program."""
    if isinstance(x, (bool, int, float, complex, np.generic)) or (isinstance(x, np.ndarray) and x.size <= 64):
        x = np.asarray(x)
        return x.shape, str(x.dtype), x.tobytes()
    return type(x).__name__, id(x)


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two traces close over the same arrays, of those whose values are known."""
    if [(x.shape, x.dtype) for x in map(jax.typeof, a)] != [(x.shape, x.dtype) for x in map(jax.typeof, b)]:
        return False
    known = [(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, np.ndarray) and x is not y]
    return all(np.array_equal(x, y, equal_nan=x.dtype.kind == "f") for x, y in known)
