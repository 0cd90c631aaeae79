"""How a call splits over devices: batch and heads shard with no communication, everything else is whole.

The rule is written once, in labels. Each operand and result is described by one label per dim, in the order
it is stored; a label is a batch dim (an int), "N", "K", or None for what must be whole: a sequence, a
head_dim, or a dim of size 1 that broadcasts. The gradient of an operand that broadcasts over a sharded dim
is a sum over shards, and only there a `psum` appears.

Sharded sequences are gathered: sequence parallelism is a function that the caller names, not a rule.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from jax_fa import compat
from jax_fa.call import LIKE_OUT, OPERANDS, STORED, Axes, Call, Shape, stored_shape

Labels = tuple[Any, ...]


class Partition:
    """The labels of one call's arrays."""

    def __init__(self, call: Call) -> None:
        self.call, self.dims = call, call.dims

    def of(self, name: str, shape: Shape) -> Labels:
        """Of an operand, a saved array or a result."""
        if name in OPERANDS:
            return self._operand(name, shape)
        if name in LIKE_OUT:
            return self._labels(shape, (None, "N", None), self.call.problem.out_axes)
        return self._labels(shape, ("N", None))

    def _labels(self, shape: Shape, names: Labels, axes: Axes | None = None) -> Labels:
        """Labels of an array stored in the order of `axes`; `names` are those of its dims after `*B`."""
        d = self.dims
        labels = (*range(len(d.B)), *names)
        if axes is not None:
            labels = stored_shape(labels, axes)
        sizes: dict[Any, int] = {"N": d.N, "K": d.K} | dict(enumerate(d.B))
        return tuple(
            label if sizes.get(label, 1) > 1 and size == sizes[label] else None
            for label, size in zip(labels, shape, strict=True)
        )

    def _operand(self, name: str, shape: Shape) -> Labels:
        if name in STORED:
            heads = "N" if name == "query" else "K"
            return self._labels(shape, (None, heads, None), self.call.problem.axes(name))
        by_batch = name in ("dropout_seed", "drop_bits")
        rest = len(shape) - len(self.dims.B)
        return self._labels(shape, (None,) * rest if by_batch else ("N", *(None,) * (rest - 1)))

    def wrap(
        self, run: Callable, inputs: list[tuple[str, Shape]], results: list[tuple[str, Shape]]
    ) -> Callable:
        """`run` (flat arrays of these names and shapes to flat results) as a function that XLA's partitioners can split.

        Each result is a sum over every sharded dim that it does not have: a gradient. (Others have them all.)
        """
        taken, given = ([self.of(*item) for item in arrays] for arrays in (inputs, results))
        return self._wrap(run, taken, given)

    def _wrap(self, run: Callable, inputs: list[Labels], results: list[Labels]) -> Callable:
        def partition(mesh, args, outs):
            given = _given(mesh, [*args, *outs], inputs + results)
            axes = self._usable(mesh, given)

            def local(*leaves):
                with compat.plain():
                    parts = run(*leaves)
                return tuple(_psum(part, axes, labels) for part, labels in zip(parts, results, strict=True))

            return mesh, local, _shardings(mesh, axes, results), _shardings(mesh, axes, inputs)

        def infer(mesh, args, outs):
            axes = self._usable(mesh, _given(mesh, args, inputs))
            return _shardings(mesh, axes, results)

        rule, whole, sizes = self._shardy_rule(inputs, results)
        wrapped = custom_partitioning(lambda *leaves: tuple(run(*leaves)))
        wrapped.def_partition(
            partition,
            infer_sharding_from_operands=infer,
            decode_shardings=False,
            sharding_rule=rule,
            need_replication_factors=whole,
            **sizes,
        )
        return wrapped

    def _usable(self, mesh, given: dict[Any, tuple[str, ...]]) -> dict[Any, tuple[str, ...]]:
        """The mesh axes each label is sharded over, without those that would split a group of heads badly."""
        d = self.dims

        def divides(label, size):
            return size % math.prod(mesh.shape[axis] for axis in given.get(label, ())) == 0

        axes: dict[Any, tuple[str, ...]] = {
            i: given[i] for i, size in enumerate(d.B) if i in given and divides(i, size)
        }
        heads = given.get("N") or given.get("K") or ()
        given = {**given, "N": heads}
        if heads and divides("N", d.K):
            axes["N"] = axes["K"] = heads
        elif heads and d.K == 1 and divides("N", d.N):
            axes["N"] = heads  # one key head serves all shards; its gradient is their sum
        return axes

    def _shardy_rule(
        self, inputs: list[Labels], results: list[Labels]
    ) -> tuple[str, tuple[str, ...], dict[str, int]]:
        """The labels in the language of Shardy: query heads are the compound factor (k g)."""
        d = self.dims
        whole: list[str] = []

        def factor(label) -> str:
            if isinstance(label, int):
                return f"b{label}"
            if label == "K" or (label == "N" and d.G == 1):
                return "k"
            if label == "N":
                return "(k g)" if d.K > 1 else "g"
            whole.append(f"w{len(whole)}")
            return whole[-1]

        sides = [", ".join(" ".join(map(factor, labels)) for labels in side) for side in (inputs, results)]
        compound = "(k g)" in sides[0]
        return " -> ".join(sides), tuple(whole), {"g": d.G} if compound else {}


def _given(mesh, arrays, labels: list[Labels]) -> dict[Any, tuple[str, ...]]:
    """For each label the mesh axes of the first array that shards it."""
    axes: dict[Any, tuple[str, ...]] = {}
    for array, names in zip(arrays, labels, strict=True):
        for label, entry in zip(names, compat.mesh_axes(array.sharding, mesh), strict=False):
            if label is not None and entry:
                axes.setdefault(label, entry)
    return axes


def _shardings(mesh, axes: dict[Any, tuple[str, ...]], arrays: list[Labels]) -> tuple[NamedSharding, ...]:
    return tuple(NamedSharding(mesh, PartitionSpec(*(axes.get(x) for x in labels))) for labels in arrays)


def _psum(part, axes: dict[Any, tuple[str, ...]], labels: Labels):
    missing = {axis for label, names in axes.items() if label not in labels for axis in names}
    missing -= {axis for label in labels for axis in axes.get(label, ())}
    return jax.lax.psum(part, tuple(sorted(missing))) if missing else part
