"""What a mask is: the class `Mask`, and what it says of rows.

In a structured mask key j is visible to row i where `lower[i] <= j < upper[i]`. Each kind turns itself into such
intervals (`Mask.rows`); its docstring gives the brute-force definition that the tests hold it against.
Intersections (`a & b`) of intervals are intervals again. Two kinds may need more (`Mask.rules`): `Dense` is an
arbitrary boolean array, kept as it is and combined with the intervals, and `SegmentIds` whose segments are
interleaved compare labels. Unions (`a | b`) and complements (`~a`) are several such parts (`Mask.parts`, see `parts`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import arguments, indices
from jax_fa.call import Shape, Size
from jax_fa.indices import is_int, known
from jax_fa.masks.parts import Parts, Terms, both, complement, either

Align = Literal["top-left", "bottom-right"]


@dataclass(frozen=True)
class Rows:
    """Where rows stand: their positions in their own sequence, and the lengths of their two sequences."""

    i: Any  # what broadcasts to *B N Sq
    sq: Any
    skv: Any
    batch_rank: int
    all_sq: Size  # the lengths of the arrays
    all_skv: Size
    at: Any = None  # which rows of the arrays these are, int32 `rows`; None: all of them

    def of(self, x):
        """x, which has an entry for each row of the arrays in its last dim (or one for all), for these rows."""
        if self.at is None or x.shape[-1] == 1:
            return x
        return jnp.take(x, self.at, axis=-1)

    def per_batch(self, values, high: Size | None = None):
        """Values `*B` (or one for all) as int32 that broadcast with `i`, moved into 0..high if that is given."""
        x = indices.int32(values)
        x = x[..., None, None] if x.ndim else x
        return x if high is None else jnp.clip(x, 0, high)

    def per_row(self, values):
        """Values of shape `*B`, or `*B #N #Sq`."""
        x = indices.int32(values)
        return self.of(x) if x.ndim == self.batch_rank + 2 else self.per_batch(values)

    def corner(self, align: Align):
        """How far the alignment moves every row."""
        return self.skv - self.sq if align == "bottom-right" else 0


@dataclass(frozen=True)
class Placement:
    """The key position of a row: its index, moved to the corner, and by an offset; or that of a packed mask."""

    corner: bool = False
    offset: Any = 0
    packed: Any = None
    binds: bool = True  # a mask that does not bind gives way to others

    @property
    def plain(self) -> bool:
        return not self.corner and self.packed is None and is_int(self.offset) and self.offset == 0

    def same(self, other: "Placement") -> bool:
        same_packed = self.packed is other.packed
        return self.corner == other.corner and same_packed and alike(self.offset, other.offset)


def alike(a, b) -> bool:
    """Whether these are known to hold the same values."""
    if a is b:
        return True
    x, y = (None if v is None else known(v) for v in (a, b))
    return x is not None and y is not None and np.array_equal(x, y)


class _Traced:
    """Stands in the static description of a mask for a value that is not known when tracing."""

    def __repr__(self) -> str:
        return "TRACED"


TRACED = _Traced()


def _equal(a: "Mask", b: Any) -> bool:
    """Of one class, with the same values; arrays whose values are not known are equal to themselves alone."""
    same = type(a) is type(b)
    return same and all(_same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))  # type: ignore[arg-type]


def _same(a, b) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if hasattr(a, "shape") or hasattr(b, "shape"):
        return alike(a, b)
    return bool(a == b)


def _hash(mask: "Mask") -> int:
    return hash((type(mask), *(_hashable(mask, getattr(mask, f.name)) for f in fields(mask))))  # type: ignore[arg-type]


def _hashable(mask: "Mask", value):
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(mask, v) for v in value)
    if hasattr(value, "shape") and not isinstance(value, np.integer):
        raise TypeError(
            f"{type(mask).__name__} holds arrays, which are data and have no hash: pass the mask to a jitted function as an "
            "argument that is not static, or make it of Python ints and tuples."
        )
    return value


class Mask:
    """Which keys are visible to a query row. Combine masks with `&`, `|` and `~`.

    A new kind is a frozen dataclass with this base and a method `rows` (or `rules`). It is a JAX pytree by being
    defined: fields that hold arrays or masks are its leaves, all others are static.
    """

    # NumPy would apply & to an array element by element.
    __array_ufunc__ = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # `dataclass` leaves what is there: its own would compare arrays element by element.
        for name, method in (("__eq__", _equal), ("__hash__", _hash)):
            if name not in cls.__dict__:
                setattr(cls, name, method)
        jax.tree_util.register_pytree_node(cls, _flatten, partial(_unflatten, cls))

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value: join masks by &, | and ~, not by `and`, `or` or `not`.")

    def __and__(self, other) -> "Mask":
        return Intersection(members(self) + members(as_mask(other)))

    def __rand__(self, other) -> "Mask":
        return as_mask(other) & self

    def __or__(self, other) -> "Mask":
        return Union(_alternatives(self) + _alternatives(as_mask(other)))

    def __ror__(self, other) -> "Mask":
        return as_mask(other) | self

    def __invert__(self) -> "Mask":
        return self.mask if isinstance(self, Complement) else Complement(self)

    def check(self, batch: Shape, heads: Size, sq: Size, skv: Size) -> None:
        """Raises ValueError or TypeError where the mask does not fit a call of these sizes."""

    def rows(self, rows: Rows, skv: Size) -> tuple[Any, Any]:
        """(lower, upper) for the given rows, each None where unbounded; `skv` counts all keys."""
        raise NotImplementedError

    def rules(self, rows: Rows) -> Terms:
        """What the mask says of the given rows, where two bounds do not say it all."""
        return Terms(*self.rows(rows, rows.all_skv))

    def parts(self, rows: Rows) -> Parts:
        """The same as disjoint parts, where one interval does not say it."""
        return (self.rules(rows),)

    def aligned(self, rows: Rows) -> Rows:
        """The rows, with the lengths of sequences that the mask gives: masks joined with it align to these."""
        return rows

    def placement(self, rows: Rows) -> "Placement | None":
        """At which key position the mask puts the rows; None: it says nothing of it."""
        return None

    def static(self) -> "Mask":
        """This mask with every array replaced by TRACED: hashable, a description and not a mask to use."""
        names = [f.name for f in fields(self)]  # type: ignore[arg-type]
        return _bare(type(self), {name: _static_value(getattr(self, name)) for name in names})


def _bare(cls: type, values: dict[str, Any]):
    """An object of cls without the checks of its constructor: JAX puts placeholders into pytrees."""
    mask: Any = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(mask, name, value)
    return mask


def _static_value(value):
    if isinstance(value, Mask):
        return value.static()
    if isinstance(value, (list, tuple)):
        return tuple(_static_value(v) for v in value)
    if isinstance(value, np.integer):
        return int(value)
    return TRACED if hasattr(value, "shape") else value


def _is_data(value) -> bool:
    """Whether a field of a mask holds arrays, or masks, which may hold some."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_data, value))
    return isinstance(value, Mask) or (hasattr(value, "shape") and not isinstance(value, np.integer))


def _flatten(mask: Mask):
    # What was a leaf stays one, whatever `jax.tree.map` has put in its place.
    names = tuple(f.name for f in fields(mask))  # type: ignore[arg-type]
    leaves = getattr(mask, "_leaves", None)
    if leaves is None:
        leaves = tuple(name for name in names if _is_data(getattr(mask, name)))
    static = {name: _static_value(getattr(mask, name)) for name in names if name not in leaves}
    return [getattr(mask, name) for name in leaves], (leaves, tuple(static.items()))


def _unflatten(cls: type, aux, children):
    leaves, static = aux
    return _bare(cls, dict(static) | dict(zip(leaves, children, strict=True)) | {"_leaves": leaves})


def broadcasts(shape: Shape, full: Shape) -> bool:
    if len(shape) > len(full):
        return False
    tail = full[len(full) - len(shape) :]
    return all(a == b or a == 1 for a, b in zip(shape, tail, strict=True))


def check_batch_shape(name: str, value, batch: Shape) -> None:
    shape = np.shape(value)
    if shape and shape != tuple(batch):
        raise ValueError(
            f"{name} must have one entry per batch entry, shape {tuple(batch)}; got shape {shape}."
        )


def lead(x, rank: int):
    """x with leading dims of size 1, up to the given rank."""
    return None if x is None else x.reshape((1,) * (rank - x.ndim) + x.shape)


@dataclass(frozen=True)
class Dense(Mask):
    """`visible(i, j) = array[..., i, j]`: any boolean array that broadcasts to `*B N Sq Skv`.

    Dimensions of size 1 are never materialized.
    """

    array: Any

    def __post_init__(self) -> None:
        dtype = getattr(self.array, "dtype", None) or arguments.host_array("mask", self.array).dtype
        if dtype != jnp.bool_:
            raise TypeError(
                f"mask must be boolean (True = visible); got dtype {dtype}. For an additive mask use bias."
            )

    def check(self, batch, heads, sq, skv) -> None:
        full = (*batch, heads, sq, skv)
        if not broadcasts(np.shape(self.array), full):
            raise ValueError(
                f"mask must broadcast to (*B, N, Sq, Skv)={full}; got shape {np.shape(self.array)}."
            )

    def rules(self, rows: Rows) -> Terms:
        return Terms(dense=jnp.asarray(arguments.truth(self.array)))


def _several(given) -> tuple[Mask, ...]:
    """Masks, or boolean arrays, as a tuple of masks."""
    if not isinstance(given, (list, tuple)) or not given:
        raise TypeError(f"masks must be a tuple of at least one mask; got {arguments.shown(given)}.")
    return tuple(map(as_mask, given))


@dataclass(frozen=True)
class Intersection(Mask):
    """`visible(i, j)`: visible in every one of `masks`."""

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", _several(self.masks))

    def parts(self, rows: Rows) -> Parts:
        rows = aligned(self, rows)
        return functools.reduce(both, (mask.parts(rows) for mask in self.masks))


@dataclass(frozen=True)
class Union(Mask):
    """`visible(i, j)`: visible in any one of `masks`. Lengths in one of them do not align the others."""

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", _several(self.masks))

    def parts(self, rows: Rows) -> Parts:
        return functools.reduce(either, (mask.parts(rows) for mask in self.masks))


@dataclass(frozen=True)
class Complement(Mask):
    """`visible(i, j)`: not visible in `mask`."""

    mask: Mask

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", as_mask(self.mask))

    def parts(self, rows: Rows) -> Parts:
        return complement(self.mask.parts(rows))


def members(mask: Mask) -> tuple[Mask, ...]:
    """The masks that are joined by &."""
    return mask.masks if isinstance(mask, Intersection) else (mask,)


def _alternatives(mask: Mask) -> tuple[Mask, ...]:
    return mask.masks if isinstance(mask, Union) else (mask,)


def replaced(fn: Callable[[Mask], Mask], mask: Mask) -> Mask:
    """The mask with each kind in it replaced: `fn` is not called for what `&`, `|` and `~` make."""
    if isinstance(mask, (Intersection, Union)):
        return type(mask)(tuple(replaced(fn, x) for x in mask.masks))
    return Complement(replaced(fn, mask.mask)) if isinstance(mask, Complement) else fn(mask)


def kinds(mask: Mask) -> tuple[Mask, ...]:
    """The masks that a mask is made of by `&`, `|` and `~`."""
    if isinstance(mask, (Intersection, Union)):
        return tuple(kind for x in mask.masks for kind in kinds(x))
    return kinds(mask.mask) if isinstance(mask, Complement) else (mask,)


def placed(mask: Mask, rows: Rows) -> list[tuple[Mask, Rows]]:
    """`kinds`, each with the rows that align it."""
    if isinstance(mask, Intersection):
        rows = aligned(mask, rows)
    if isinstance(mask, (Intersection, Union)):
        return [found for x in mask.masks for found in placed(x, rows)]
    return placed(mask.mask, rows) if isinstance(mask, Complement) else [(mask, mask.aligned(rows))]


def as_mask(mask) -> Mask:
    """A `Mask` as it is, a boolean array as `Dense`."""
    if isinstance(mask, Mask):
        return mask
    if hasattr(mask, "dtype") and hasattr(mask, "shape"):
        return Dense(mask)
    raise TypeError(
        f"mask must be a jax_fa.masks.Mask or a boolean array; got {type(mask).__name__}. "
        "For an additive mask use bias."
    )


def aligned(mask: Mask, rows: Rows) -> Rows:
    """The rows, with the lengths that the mask gives."""
    for member in members(mask):
        rows = member.aligned(rows)
    return rows
