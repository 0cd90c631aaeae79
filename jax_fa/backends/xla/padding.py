"""Symbolic sequence lengths (`jax.export`), padded to whole tiles."""

from dataclasses import fields, replace
from typing import Any

import jax.numpy as jnp
from jax import lax

from jax_fa import softmax
from jax_fa.backends.xla import tiling
from jax_fa.call import LIKE_OUT, STORED, Call, Operands, Saved, Size, is_symbolic

BY_ROW = ("lower", "upper", "alibi_slopes", "drop_offset", "bias_offset", "position", "segment_row")


class Padding:
    """Makes symbolic sequence lengths whole numbers of tiles; the keys added are masked, the rows cut off again."""

    def __init__(self, call: Call) -> None:
        tile = tiling.MIN_TILE
        self.call, d = call, call.dims
        self.extra = {
            size: (size + tile - 1) // tile * tile - size for size in (d.Sq, d.Skv) if is_symbolic(size)
        }

    def _pad(self, x, sizes: dict[int, Size], value: float | int = 0):
        """x padded with the value at the end of each axis in `sizes` (axis: length), unless that axis has size 1."""
        widths = [(0, 0)] * x.ndim
        for axis, size in sizes.items():
            if size in self.extra and x.shape[axis] == size:
                widths[axis] = (0, self.extra[size])
        return jnp.pad(x, widths, constant_values=value)

    def operand(self, name: str, x):
        d, rank = self.call.dims, self.call.problem.batch_rank
        whole = {rank + 1: d.Sq, rank + 2: d.Skv}
        if name in STORED:
            return self._pad(x, {self.call.problem.axes(name)[rank]: d.Sq if name == "query" else d.Skv})
        axes = {
            "bias": {} if self.call.operands.bias_offset is not None else whole,
            "mask": whole,
            "segment_key": {rank + 1: d.Skv},
        }
        return self._pad(x, axes.get(name, {rank + 1: d.Sq} if name in BY_ROW else {}))

    def padded(self) -> Call:
        call, Skv = self.call, self.call.dims.Skv
        if not self.extra:
            return call
        operands = call.operands.map(self.operand)
        if Skv in self.extra and operands.upper is None:
            rank = call.problem.batch_rank
            operands = replace(operands, upper=jnp.full((1,) * (rank + 2), Skv, jnp.int32))
        return call.replace(operands=operands)

    def tangents(self, tangents: Operands) -> Operands:
        return tangents.map(self.operand) if self.extra else tangents

    def saved(self, saved: Saved) -> Saved:
        problem, Sq = self.call.problem, self.call.dims.Sq
        if not self.extra:
            return saved
        seq = problem.out_axes[problem.batch_rank]

        def pad(name: str, x):
            if x is None:
                return None
            # No logit exceeds this max: the probabilities of a row that was added are 0.
            value = softmax.FLT_MAX if name == "m" else 0
            return self._pad(x, {seq if name in LIKE_OUT else x.ndim - 1: Sq}, value)

        return Saved(**{f.name: pad(f.name, getattr(saved, f.name)) for f in fields(saved)})

    def cut(self, x, shape):
        """The part of x that was there before padding; None: absent."""
        return x if x is None or not self.extra else lax.slice(x, [0] * x.ndim, shape)

    def cut_all(self, results, shapes) -> tuple[Any, ...]:
        """Those that are there; there may be fewer of them than shapes."""
        return tuple(self.cut(x, shape) for x, shape in zip(results, shapes, strict=False))

    def cut_gradients(self, gradients: Operands) -> Operands:
        return gradients.map(lambda name, x: self.cut(x, self.call.gradient_shape(name)))
