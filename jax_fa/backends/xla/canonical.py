"""The operands of one call in canonical order, tile by tile.

Arrays stay as they are stored; a tile is cut out first and put into canonical order then, so no layout costs
a copy of a whole operand. In a tile the heads are split as `K G` and batch dims of size 1 are left out:
`*B K G rows D` for query and out, `*B K keys D` for key and value, `*#B #K #G #rows #keys` for the rest.
"""

import math
import string
from typing import Any

import jax.numpy as jnp
from jax import lax

from jax_fa import dropout
from jax_fa.backends.xla.axis import Axis
from jax_fa.call import Axes, Call, Size


class Canonical:
    """The operands of one call, and the way from the order they are stored in to canonical order and back."""

    def __init__(self, call: Call) -> None:
        self.call, self.dims, self.dtype, self.acc = call, call.dims, call.dtype, call.acc
        problem, operands = self.problem, self.operands = call.problem, call.operands
        self.wanted = frozenset(call.gradient_names)
        self.kept = tuple(i for i, size in enumerate(self.dims.B) if size != 1)
        self.B = tuple(self.dims.B[i] for i in self.kept)
        self.bias, self.bias_offset = self.by_head(operands.bias), self.by_head(operands.bias_offset)
        self.mask = self.by_head(operands.mask)
        self.lower, self.upper = self.by_head(operands.lower), self.by_head(operands.upper)
        self.segment_row, self.segment_key = map(self.by_head, (operands.segment_row, operands.segment_key))
        self.blocks = self.by_head(operands.blocks)
        self.slopes, self.position = self.by_head(operands.alibi_slopes), self.by_head(operands.position)
        self.scale = self.factor(operands.scale, problem.scale)
        self.soft_cap = self.factor(operands.soft_cap, problem.logits_soft_cap)
        self.keep_limit, self.keep_prob = self._dropout(operands.keep_threshold, problem.keep_prob)

    def _dropout(self, limit, keep_prob: float) -> tuple[Any, Any]:
        """What a 16-bit number must stay below to keep its weight, and what kept weights are divided by."""
        if limit is None:
            return dropout.threshold(keep_prob), None if keep_prob == 1 else jnp.asarray(keep_prob, self.acc)
        limit = self.by_head(limit)[..., None, None]
        return limit, limit.astype(self.acc) / dropout.LIMIT

    def factor(self, data, static: float | None = None) -> Any:
        """A factor of the logits `... rows keys`, from the array or the number that holds it; None: absent."""
        if data is not None:
            return self.by_head(data)[..., None, None].astype(self.acc)
        return None if static is None else jnp.asarray(static, self.acc)

    @property
    def heads(self) -> Size:
        """Query heads of all batch entries."""
        return math.prod(self.B) * self.dims.N

    @property
    def empty(self) -> bool:
        d = self.dims
        return 0 in (*self.B, d.N, d.Sq, d.Skv)

    def squeeze(self, x):
        """x without the batch dims whose full size is 1."""
        return x.reshape(tuple(x.shape[i] for i in self.kept) + x.shape[self.problem.batch_rank :])

    def by_head(self, x):
        """`*#B #N ...` -> `*#B #K #G ...`."""
        if x is None:
            return None
        x = self.squeeze(x)
        at = len(self.B)
        heads = (self.dims.K, self.dims.G) if x.shape[at] != 1 else (1, 1)
        return x.reshape(*x.shape[:at], *heads, *x.shape[at + 1 :])

    def query_tile(self, x, axes: Axes, rows: Axis, t):
        """Rows of query, out or dout as `*#B K G rows D`."""
        d = self.dims
        x = self._tile(x, axes, rows, t)  # *#B rows N D
        x = x.reshape(*x.shape[:-2], d.K, d.G, x.shape[-1])
        return jnp.moveaxis(x, -4, -2)

    def key_tile(self, x, axes: Axes, keys: Axis, t):
        """Rows of key or value as `*#B K keys D`."""
        return jnp.swapaxes(self._tile(x, axes, keys, t), -3, -2)

    def _tile(self, x, axes: Axes, along: Axis, t):
        x = along.cut(x, axes[self.problem.batch_rank], t)
        return self.squeeze(x.transpose(axes))

    def stored(self, x, axes: Axes):
        """`*B K (G) S D` (batch dims of size 1 left out) in the order of `axes`."""
        d = self.dims
        length, width = x.shape[-2:]
        heads = math.prod(x.shape[len(self.B) : -2])  # not -1, which has no meaning in an empty array
        x = jnp.swapaxes(x.reshape(*d.B, heads, length, width), -3, -2)
        return x.transpose([axes.index(i) for i in range(len(axes))])

    def put_rows(self, total, part, axes: Axes, rows: Axis, t):
        """`total`, which is stored in the order of `axes`, with rows of tile t (`*B K G rows D`) replaced."""
        return rows.put(total, self.stored(part, axes), axes[self.problem.batch_rank], t)

    def product(self, spec: str, x, y):
        """einsum over operands with leading `*#B`, e.g. "kgid,kjd->kgij", accumulated in `acc`.

        A batch dim of size 1 is left out of that operand, so nothing is broadcast in memory.
        """
        letters = string.ascii_uppercase[: len(self.B)]
        inputs, output = spec.split("->")
        names, arrays = [], []
        for part, array in zip(inputs.split(","), (x, y), strict=True):
            lead, rest = array.shape[: len(self.B)], array.shape[len(self.B) :]
            names.append("".join(c for c, size in zip(letters, lead, strict=True) if size != 1) + part)
            arrays.append(array.reshape(*(size for size in lead if size != 1), *rest))
        present = [c for c in letters if any(c in name for name in names)]
        spec = f"{','.join(names)}->{''.join(present)}{output}"
        result = self._einsum(spec, *arrays)
        sizes = dict(zip(present, result.shape, strict=False))
        return result.reshape(*(sizes.get(c, 1) for c in letters), *result.shape[len(present) :])

    def _einsum(self, spec: str, x, y):
        def dot(x, y):
            return jnp.einsum(spec, x, y, preferred_element_type=self.acc)

        def wide(x, y):
            return dot(x.astype(self.acc), y.astype(self.acc))

        if jnp.bfloat16 not in (x.dtype, y.dtype):
            return dot(x, y)
        # XLA runs some products of bfloat16 arrays on CPUs that have instructions for them, and stops at others, by
        # layouts that it chooses itself ("Unsupported element type for DotThunk", as of jaxlib 0.12).
        return lax.platform_dependent(x, y, cpu=wide, default=dot)
