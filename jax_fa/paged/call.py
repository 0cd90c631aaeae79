"""A paged call: what is static (`PagedProblem`), what is data (`PagedOperands`), and how large it is (`PagedCall`).

Letters as in `call.py`; P pages in the pool, S tokens of a page, M pages of a sequence. Skv is the capacity of a sequence, M S.
`#X` is a dimension of size 1 or X.
"""

from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa.call import Call, Dims, Operands, Problem, accumulator_dtype, is_symbolic


@dataclass(frozen=True, kw_only=True)
class PagedProblem:
    """Everything about a call that is known when it is traced, except shapes and dtypes."""

    scale: float
    logits_soft_cap: float | None = None
    value_dim: int | None = (
        None  # without value_pages: a value is so many elements of its key, from the first on
    )
    out_dtype: Any = None  # np.dtype
    # As in `call.Problem`.
    precision: str | None = None
    strict: bool = False
    implementation: str | None = None
    options: Hashable = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PagedOperands:
    """The arrays of a call. An absent one is None."""

    query: Any  # B Sq N D, of the last Sq positions of each sequence
    key_pages: Any  # P S K D
    value_pages: Any = None  # P S K Dv
    page_table: Any  # B M int32; entries beyond the length, and page numbers out of range, may be anything
    lengths: Any  # B int32, any values
    key_scale: Any = None  # #P #S #K float: what keys are multiplied by
    value_scale: Any = None
    # Traced scalars; the static ones are in the problem.
    scale: Any = None  # #B float32 (float64 for float64 calls)
    soft_cap: Any = None  # #B, likewise
    window: Any = None  # #B int32: how many keys before its own position are visible to a row; None: all

    def call(self, problem: PagedProblem) -> "PagedCall":
        return PagedCall.of(problem, self)

    def arrays(self) -> list[tuple[str, Any]]:
        """All arrays by name, in the order of the leaves."""
        return [(f.name, x) for f in fields(self) if (x := getattr(self, f.name)) is not None]


@dataclass(frozen=True)
class PagedCall:
    """A problem, its operands (arrays or avals), and their sizes. `dims.B` is `(B,)`."""

    problem: PagedProblem
    operands: PagedOperands
    dims: Dims

    @classmethod
    def of(cls, problem: PagedProblem, operands: PagedOperands) -> "PagedCall":
        B, Sq, N, D = operands.query.shape
        _, S, K, _ = operands.key_pages.shape
        value = operands.value_pages
        Dv = problem.value_dim if value is None else value.shape[-1]
        return cls(problem, operands, Dims((B,), Sq, operands.page_table.shape[1] * S, N, K, D, Dv))

    @property
    def dtype(self) -> np.dtype:
        return self.operands.query.dtype

    @property
    def acc(self) -> np.dtype:
        """What is summed in, and the dtype of the softmax statistics."""
        return accumulator_dtype(self.dtype)

    @property
    def symbolic(self) -> bool:
        """Whether some dim is symbolic."""
        return any(is_symbolic(size) for _, x in self.operands.arrays() for size in x.shape)

    @property
    def out_shape(self) -> tuple[Any, ...]:
        d = self.dims
        return (*d.B, d.Sq, d.N, d.Dv)

    @property
    def stats_shape(self) -> tuple[Any, ...]:
        d = self.dims
        return (*d.B, d.N, d.Sq)

    def derived(self) -> Call:
        """The call whose derivatives are this one's, of avals: keys and values are gathered (see `primitive.contiguous`)."""
        d, o = self.dims, self.operands
        exact = o.key_scale is None and o.value_scale is None and o.key_pages.dtype == self.dtype
        dtype, order = self.dtype if exact else self.acc, (0, 1, 2, 3)
        problem = Problem(
            query_axes=order,
            key_axes=order,
            value_axes=order,
            out_axes=order,
            scale=self.problem.scale,
            logits_soft_cap=self.problem.logits_soft_cap,
            logsumexp=True,
            precision=self.problem.precision,
            strict=self.problem.strict,
            implementation=self.problem.implementation,
            options=self.problem.options,
        )
        bound = jax.ShapeDtypeStruct((*d.B, 1, d.Sq), jnp.int32)
        operands = Operands(
            query=jax.ShapeDtypeStruct((*d.B, d.Sq, d.N, d.D), dtype),
            key=jax.ShapeDtypeStruct((*d.B, d.Skv, d.K, d.D), dtype),
            value=jax.ShapeDtypeStruct((*d.B, d.Skv, d.K, d.Dv), dtype),
            lower=bound,
            upper=bound,
        )
        return Call.of(problem, operands)

    def pages(self):
        """The page table with page numbers moved into the pool."""
        return jnp.clip(self.operands.page_table, 0, self.operands.key_pages.shape[0] - 1)

    def bounds(self) -> tuple[Any, Any]:
        """`lower, upper` of the keys that are visible to each row, `B Sq` int32: key j where lower <= j < upper."""
        d, o = self.dims, self.operands
        ends = jnp.clip(o.lengths, 0, d.Skv)
        upper = jnp.maximum(ends[:, None] - (d.Sq - 1) + jnp.arange(d.Sq, dtype=jnp.int32), 0)
        if o.window is None:
            return jnp.zeros_like(upper), upper
        return jnp.maximum(upper - 1 - jnp.maximum(o.window, 0)[:, None], 0), upper
