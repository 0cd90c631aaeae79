"""Blocks: the rows of a device and the keys of one shard that are computed by one call, and arrays cut to them."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_fa.call import Call, Operands, Problem, Saved, accumulator_dtype

Keys = dict[str, Any]  # arrays stored like key and value: these, and their tangents


class Block(NamedTuple):
    """Rows of this device and keys of one shard that are computed by one call."""

    rows: tuple[int, int]  # the first one and how many
    keys: tuple[int, int]
    length: int  # all keys of the shard
    row_start: Any  # the position of the first row
    starts: list[Any]  # the positions at which the equal chunks of keys begin


@dataclass(frozen=True)
class Rows:
    """The rows of a block, of what is stored like out and of statistics."""

    call: Call
    block: Block

    def _axis(self, x) -> int:
        problem = self.call.problem
        like_out = x.ndim == problem.batch_rank + 3
        return problem.out_axes[problem.batch_rank] if like_out else problem.batch_rank + 1

    def of(self, arrays) -> list[Any]:
        return [cut(x, self._axis(x), *self.block.rows) for x in arrays]

    def add(self, arrays, parts) -> tuple[Any, ...]:
        return self.put(arrays, [a + b for a, b in zip(self.of(arrays), parts, strict=True)])

    def put(self, arrays, parts) -> tuple[Any, ...]:
        first, count = self.block.rows
        if count == self.call.dims.Sq:
            return tuple(parts)
        pairs = zip(arrays, parts, strict=True)
        return tuple(lax.dynamic_update_slice_in_dim(x, part, first, self._axis(x)) for x, part in pairs)

    def saved(self, saved: Saved) -> Saved:
        return replace(saved, **dict(zip(saved.present(), self.of(saved.present().values()), strict=True)))


class Gradients:
    """Sums of the gradients of blocks."""

    def __init__(self, problem: Problem, call: Call) -> None:
        self.call, self.wanted = call, call.gradient_names
        self.problem = replace(problem, gradients=tuple(self.wanted))

    def _acc(self, name: str):
        return accumulator_dtype(getattr(self.call.operands, name).dtype)

    def start(self) -> dict[str, Any]:
        """Zeros for all but the gradients of key and value, which travel."""
        here = [name for name in self.wanted if name not in ("key", "value")]
        return {name: jnp.zeros(self.call.gradient_shape(name), self._acc(name)) for name in here}

    def add(self, sums: dict[str, Any], back: Keys, found: dict[str, Any], block: Block):
        """(sums, what goes back) with the gradients of a block."""
        sums, back, problem = dict(sums), dict(back), self.call.problem
        rank = problem.batch_rank
        for name, part in found.items():
            part = part.astype(self._acc(name))
            if name in ("key", "value"):
                axis = problem.axes(name)[rank]
                if name not in back:
                    shape = list(part.shape)
                    shape[axis] = block.length
                    back[name] = jnp.zeros(shape, part.dtype)
                back[name] = add_at(back[name], part, {axis: block.keys[0]})
            elif name == "bias":
                sums[name] = add_columns(sums[name], part, rank, block)
            elif name == "query":
                sums[name] = add_at(sums[name], part, {problem.query_axes[rank]: block.rows[0]})
            else:
                sums[name] = sums[name] + part
        return sums, back

    def finish(self, sums: dict[str, Any], back: Keys | None) -> Operands:
        found = sums | (back or {})
        operands = self.call.operands

        def of(name: str):
            x = found.get(name)
            dtype = getattr(operands, name).dtype
            return jnp.zeros(self.call.gradient_shape(name), dtype) if x is None else x.astype(dtype)

        return Operands(**{name: of(name) for name in self.wanted})


def cut(x, axis: int, first: int, count: int):
    """A part of an axis; one of size 1 broadcasts and stays."""
    return x if x.shape[axis] in (1, count) else lax.slice_in_dim(x, first, first + count, axis=axis)


def columns(x, axis: int, block: Block):
    """Those of a block's keys, of an array with all keys along the axis."""
    if x.shape[axis] == 1:
        return x
    chunk = block.keys[1] // len(block.starts)
    parts = [lax.dynamic_slice_in_dim(x, start, chunk, axis) for start in block.starts]
    return jnp.concatenate(parts, axis) if len(parts) > 1 else parts[0]


def add_at(total, part, at: dict[int, Any]):
    """`total` with `part` added from the indices `at` on, by axis."""
    if total.shape == part.shape:
        return total + part
    start = [
        jnp.asarray(at.get(axis, 0) if size != 1 else 0, jnp.int32) for axis, size in enumerate(total.shape)
    ]
    before = lax.dynamic_slice(total, start, part.shape)
    return lax.dynamic_update_slice(total, before + part, start)


def add_columns(total, part, rank: int, block: Block):
    """The gradient of a bias with that of a block."""
    rows = {rank + 1: block.rows[0]}
    if total.shape[-1] == 1:
        return add_at(total, part, rows)
    chunks = jnp.split(part, len(block.starts), axis=-1)
    for start, chunk in zip(block.starts, chunks, strict=True):
        total = add_at(total, chunk, rows | {rank + 2: start})
    return total


def added(a, b):
    """Of two trees; None: 0."""
    return b if a is None else a if b is None else jax.tree.map(jnp.add, a, b)
