"""The rule: one label for each dim of a call's operands and results, and why an axis is gathered all the same."""

from typing import Any

from jax_fa import compat
from jax_fa.call import LIKE_OUT, OPERANDS, STORED, Axes, Call, Shape, canonical_shape, stored_shape

Labels = tuple[Any, ...]

_BY_ROW = (
    "bias",
    "mask",
    "lower",
    "upper",
    "alibi_slopes",
    "drop_offset",
    "bias_offset",
    "position",
    "segment_row",
)


class Partition:
    """The labels of one call's arrays."""

    def __init__(self, call: Call, *, rows: bool = True, sums: bool = True) -> None:
        """`rows`: whether query rows may be split; `sums`: whether devices may sum results."""
        self.call, self.dims, self.sums = call, call.dims, sums
        # Seeded dropout and functions count rows from the first one of the call.
        counts = call.operands.dropout_seed is not None or bool(call.problem.functions)
        self.rows = "Sq" if rows and not counts else None

    def of(self, name: str, shape: Shape) -> Labels:
        """Of an operand, a saved array or a result."""
        if name in OPERANDS:
            return self._operand(name, shape)
        if name in LIKE_OUT:
            return self._labels(shape, (self.rows, "N", None), self.call.problem.out_axes)
        return self._labels(shape, ("N", self.rows))

    def size(self, label) -> int:
        d = self.dims
        return d.B[label] if isinstance(label, int) else getattr(d, label)

    def why(self, name: str, axis: int, label) -> str:
        """Why an axis with this label is gathered."""
        d, dim = self.dims, dim_of(self, name, axis)
        if label is not None and not self.sums:
            return "in a partly manual mesh the gradients of what devices share are not summed by the kernels' rule"
        if label in ("N", "K"):
            return f"N={d.N} query heads that read K={d.K} key heads do not split evenly"
        if label is not None:
            return "its size is not divisible, or other arrays are sharded in another way"
        if dim == 2:
            return "attention sums over head_dim"
        if dim == 0 and name in ("key", "value"):
            return "each row attends to all keys (shard the sequence inside jax.shard_map)"
        if self.rows is None and self.call.operands.dropout_seed is not None:
            return "dropout counts rows from the first of the sequence"
        if self.rows is None and self.call.problem.functions:
            return "functions count rows from the first of the sequence"
        if self.rows is None and name == "query":
            return "rows are not split here"
        return "it is needed whole"

    def _labels(self, shape: Shape, names: Labels, axes: Axes | None = None) -> Labels:
        """Labels of an array stored in the order of `axes`; `names` are those of its dims after `*B`."""
        labels = (*range(len(self.dims.B)), *names)
        if axes is not None:
            labels = stored_shape(labels, axes)
        return tuple(
            label if label is not None and 1 < size == self.size(label) else None
            for label, size in zip(labels, shape, strict=True)
        )

    def _operand(self, name: str, shape: Shape) -> Labels:
        if name in STORED:
            names = (self.rows, "N", None) if name == "query" else (None, "K", None)
            return self._labels(shape, names, self.call.problem.axes(name))
        rest = len(shape) - len(self.dims.B)
        if name in ("dropout_seed", "drop_bits"):
            return self._labels(shape, (None,) * rest)
        by_row = name in _BY_ROW
        if name == "bias" and self.call.operands.bias_offset is not None:
            by_row = False
        return self._labels(shape, ("N", self.rows if by_row else None, None, None)[:rest])


def explicit_axes(call: Call) -> tuple[Any, ...]:
    """The explicit mesh axes of the output's dims `*B Sq N Dv`.

    They are those of the query, where it has none those of key and value, and of Dv those of the value.
    """
    problem, operands, rank = call.problem, call.operands, call.problem.batch_rank
    query, key, value = (
        canonical_shape(compat.explicit_axes(getattr(operands, name)), problem.axes(name)) for name in STORED
    )
    found: dict[int, Any] = dict.fromkeys(range(rank + 3))
    taken: set[str] = set()
    for axes, dims in (
        (query, range(rank + 2)),
        *((x, (*range(rank), rank + 1)) for x in (key, value)),
        (value, (rank + 2,)),
    ):
        for dim in dims:
            names = axes[dim] if isinstance(axes[dim], tuple) else (axes[dim],)
            if found[dim] is None and not {None, *taken} & set(names):
                found[dim] = axes[dim]
                taken.update(names)
    return tuple(found.values())


def dim_of(partition: Partition, name: str, axis: int) -> int | None:
    """Which dim after the batch an axis of query, key, value and what is like out is: 0 the sequence, 1 heads, 2 head_dim."""
    problem = partition.call.problem
    return problem.axes(name).index(axis) - problem.batch_rank if name in (*STORED, *LIKE_OUT) else None
