"""Notices a decode loop whose positions are Python ints: each of them is a program of its own."""

import warnings
from collections.abc import Hashable
from dataclasses import fields
from typing import Any, NamedTuple

from jax_fa.indices import is_int
from jax_fa.masks import Mask

_STEPS = 8  # in a row before it is said
_MOST_ROWS = 8  # of a step: more are chunks, of which a program may well hold several
_MOST_CALLS = 64


class _Last(NamedTuple):
    ints: tuple[int, ...]
    steps: int  # by how many rows the ints have moved on, one call after the other


_last: dict[Hashable, _Last] = {}
_warned = False


def watch(mask: Hashable, rows: Any, call: Hashable) -> None:
    """Takes the mask of a call as `Mask.static` gives it; `call` says what else its program depends on.

    Warns once in a process, of the eighth step in a row.
    """
    global _warned
    if _warned or not is_int(rows) or not 0 < rows <= _MOST_ROWS:
        return
    form, ints = _taken_apart(mask)
    if not ints:
        return
    key = form, call
    last = _last.get(key, _Last(ints, 0))
    moved = {b - a for a, b in zip(last.ints, ints, strict=True)} - {0}
    if not moved and key in _last:
        return  # another layer
    if len(_last) >= _MOST_CALLS:
        _last.clear()
    _last[key] = _Last(ints, last.steps + 1 if moved == {rows} else 0)
    if _last[key].steps == _STEPS:
        _warned = True
        warnings.warn(
            f"{_STEPS} calls in a row had the same mask but for Python ints, which grew by the {rows} rows of the query, as "
            f"positions in a decode loop do: {mask!r} is the last. Python ints are part of the program, so each call compiles "
            "anew. Pass positions and lengths as arrays, such as Causal(offset=jnp.int32(position)), and one program serves "
            "all of them.",
            UserWarning,
            stacklevel=2,
        )


def _taken_apart(value) -> tuple[Hashable, tuple[int, ...]]:
    """A static value without its ints, and these."""
    if is_int(value):
        return int, (int(value),)
    if isinstance(value, Mask):
        parts = [(f.name, getattr(value, f.name)) for f in fields(value)]  # type: ignore[arg-type]
        found = [(name, *_taken_apart(x)) for name, x in parts]
        return (type(value), *((name, form) for name, form, _ in found)), sum((x for *_, x in found), ())
    if isinstance(value, tuple):
        each = [_taken_apart(x) for x in value]
        return tuple(form for form, _ in each), sum((x for _, x in each), ())
    return value, ()
