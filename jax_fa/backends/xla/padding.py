"""Symbolic sequence lengths (`jax.export`), padded to whole tiles."""

from dataclasses import fields, replace

import jax.numpy as jnp
from jax import lax

from jax_fa.backends.xla import tiling
from jax_fa.call import LIKE_OUT, STORED, Call, Saved, Size, is_symbolic

BY_ROW = ("lower", "upper", "alibi_slopes", "drop_offset", "bias_offset", "position", "segment_row")


class Padding:
    """Makes symbolic sequence lengths whole numbers of tiles; the keys added are masked, the rows cut off again."""

    def __init__(self, call: Call) -> None:
        tile = tiling.MIN_TILE
        self.call, d = call, call.dims
        self.extra = {
            size: (size + tile - 1) // tile * tile - size for size in (d.Sq, d.Skv) if is_symbolic(size)
        }

    def _pad(self, x, sizes: dict[int, Size]):
        """x padded at the end of each axis in `sizes` (axis: length), unless that axis has size 1."""
        widths = [(0, 0)] * x.ndim
        for axis, size in sizes.items():
            if size in self.extra and x.shape[axis] == size:
                widths[axis] = (0, self.extra[size])
        return jnp.pad(x, widths)

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
        operands = call.operands.map(self.operand)
        if Skv in self.extra and operands.upper is None:
            rank = call.problem.batch_rank
            operands = replace(operands, upper=jnp.full((1,) * (rank + 2), Skv, jnp.int32))
        return call.replace(operands=operands)

    def saved(self, saved: Saved) -> Saved:
        problem, Sq = self.call.problem, self.call.dims.Sq
        seq = problem.out_axes[problem.batch_rank]

        def pad(name: str, x):
            return None if x is None else self._pad(x, {seq if name in LIKE_OUT else x.ndim - 1: Sq})

        return Saved(**{f.name: pad(f.name, getattr(saved, f.name)) for f in fields(saved)})

    @staticmethod
    def cut(x, shape):
        """The part of x that was there before padding."""
        return lax.slice(x, [0] * x.ndim, shape)
