"""How a call splits over devices: batch, heads and query rows shard, everything else is whole.

The rule is written once, in labels. Each operand and result is described by one label per dim, in the order
it is stored; a label is a batch dim (an int), "N", "K", "Sq", or None for what must be whole: the keys' sequence, a
head_dim, or a dim of size 1 that broadcasts. Nothing is communicated but sums: the gradient of an operand that lacks a
label that is sharded, as a key lacks "Sq", is a sum over shards.

XLA asks for the shardings of operands and results (`Split`), and these are read as what they mean: which block of each
label every device has. So the rule needs no mesh, and a program means the same in another process.

Sharded keys are gathered: sequence parallelism is a function that the caller names, not a rule.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.sharding import NamedSharding

from jax_fa import compat
from jax_fa.call import (
    LIKE_OUT,
    OF_BLOCKS,
    OF_FUNCTIONS,
    OPERANDS,
    STORED,
    Axes,
    Call,
    Shape,
    canonical_shape,
    stored_shape,
)

Labels = tuple[Any, ...]
Arrays = Sequence[tuple[str, Shape]]  # names and shapes
TARGET = "jax_fa_split"  # the custom call that XLA's partitioners find

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
        d, dim = self.dims, _dim(self, name, axis)
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


# --- which block of each label a device has


@dataclass(frozen=True, eq=False)
class Blocks:
    number: int
    of: np.ndarray  # the block of each device


def _blocks_of(sharding, ndim: int) -> dict[int, Blocks]:
    """Of each dim of an array that is cut."""
    tiles, devices = compat.tiles(sharding, ndim)
    found = {}
    for axis, number in enumerate(tiles[:ndim]):
        if number > 1:
            block = np.empty(devices.size, np.int64)
            block[devices] = np.indices(tiles)[axis]
            found[axis] = Blocks(number, block)
    return found


def _usable(partition: Partition, given: dict[Any, Blocks]) -> dict[Any, Blocks]:
    """The blocks that the call is split into, of those that its arrays have."""
    d = partition.dims
    used: dict[Any, Blocks] = {}

    def use(label, blocks: Blocks) -> bool:
        # Every combination of blocks must be on some device, and each on as many.
        together = [*used.values(), blocks]
        combinations = math.prod(x.number for x in together)
        at = np.ravel_multi_index([x.of for x in together], [x.number for x in together])
        counts = np.bincount(at, minlength=combinations)
        fits = partition.size(label) % blocks.number == 0 and bool(np.all(counts == counts[0]))
        if fits:
            used[label] = blocks
        return fits

    for label in range(len(d.B)):
        if label in given:
            use(label, given[label])
    key_blocks = None
    if (heads := given.get("N")) is not None and d.N % heads.number == 0:
        key_blocks = _of_key_heads(heads, d.N // heads.number, d.G, d.K)
        if key_blocks is not None and not use("N", heads):
            key_blocks = None
    if key_blocks is None and (heads := given.get("K")) is not None and d.K % heads.number == 0:
        key_blocks = heads if use("N", heads) else None
    if "Sq" in given:
        use("Sq", given["Sq"])
    if key_blocks is not None and key_blocks.number > 1:
        used["K"] = key_blocks
    return used


def _without_sums(used: dict[Any, Blocks], results: list[Labels]) -> dict[Any, Blocks]:
    """Those of the labels that every result has."""

    def has(labels: Labels, label) -> bool:
        return label in labels or (label == "N" and "K" in labels and used.get("K") is used["N"])

    kept = {label: x for label, x in used.items() if label == "K" or all(has(y, label) for y in results)}
    return kept if "N" in kept else {label: x for label, x in kept.items() if label != "K"}


def _of_key_heads(heads: Blocks, size: int, G: int, K: int) -> Blocks | None:
    """The key heads that blocks of so many query heads read; None: not all read as many."""
    if size % G == 0:
        return heads
    return Blocks(K, heads.of * size // G) if G % size == 0 else None


def _sharding(labels: Labels, used: dict[Any, Blocks], devices: int):
    """XLA's, of an array with these labels."""
    cut = [used.get(label) for label in labels]
    blocks = [x.of for x in cut if x is not None]
    if not blocks:
        return compat.replicated()
    order = np.lexsort([np.arange(devices), *reversed(blocks)])
    return compat.tiled(order.reshape(*(1 if x is None else x.number for x in cut), -1))


def _psum(x, labels: Labels, used: dict[Any, Blocks], devices: int):
    """The sum of a result over the blocks of labels that it lacks."""
    # (Key heads come with query heads: blocks of these that read the same key heads are told apart by "N".)
    if set(used) - {"K"} <= set(labels):
        return x
    own = _combined([used[label] for label in labels if label in used], devices)
    whole = _combined(list(used.values()), devices)
    # Devices that have the same of everything are copies: the first of each sum with one another, and so on.
    copy = np.array([np.sum(whole[:device] == whole[device]) for device in range(devices)])
    groups: dict[tuple[int, int], list[int]] = {}
    for device in range(devices):
        groups.setdefault((int(own[device]), int(copy[device])), []).append(device)
    return compat.sum_over(x, list(groups.values())) if len(groups) < devices else x


def _combined(blocks: list[Blocks], devices: int) -> np.ndarray:
    """One integer for each device that says which blocks it has."""
    at = np.zeros(devices, np.int64)
    for x in blocks:
        at = at * x.number + x.of
    return at


# --- what XLA's partitioners ask


class Split:
    """A computation of a call as a function that XLA's partitioners can split.

    `key` says everything about it that shapes and dtypes do not. It is what programs hold, so that the keys of the
    compilation cache hold it.
    """

    def __init__(
        self, partition: Partition, run: Callable, inputs: Arrays, results: Arrays, key: str, platforms
    ) -> None:
        self.partition, self.run, self.key, self.platforms = partition, run, key, tuple(platforms)
        self.names = [name for name, _ in inputs]
        self.inputs, self.results = ([partition.of(*x) for x in arrays] for arrays in (inputs, results))

    def infer(self, shardings) -> list[Any]:
        """The shardings of results, from those of operands."""
        used = self._used(self.inputs, shardings)
        if "K" in used and used["K"] is not used["N"]:
            # Blocks of key heads that several devices have in common: what no PartitionSpec says should not leave.
            del used["K"]
        return [_sharding(labels, used, compat.device_count(shardings)) for labels in self.results]

    def split(self, arguments, results, shapes) -> tuple[bytes, list[Any], list[Any]]:
        """From shardings and the shapes of arguments: what one device computes, and the shardings that it needs."""
        shardings = [*arguments, *results]
        devices = compat.device_count(shardings)
        used = self._used(self.inputs + self.results, shardings)
        cut = [set(_blocks_of(x, len(labels))) for x, labels in zip(arguments, self.inputs, strict=True)]
        warn(_gathered(self.partition, list(zip(self.names, self.inputs, cut, strict=True)), used))

        def local(*leaves):
            with compat.plain():
                parts = self.run(*leaves)
            return [_psum(x, labels, used, devices) for x, labels in zip(parts, self.results, strict=True)]

        needed = [
            _kept(sharding, _sharding(labels, used, devices), len(labels))
            for sharding, labels in zip(shardings, self.inputs + self.results, strict=True)
        ]
        needed_arguments, needed_results = needed[: len(arguments)], needed[len(arguments) :]
        local_shapes = [
            compat.local(sharding, x) for sharding, x in zip(needed_arguments, shapes, strict=True)
        ]
        module = compat.local_module(local, local_shapes, devices, self.platforms)
        return module, needed_arguments, needed_results

    def _used(self, arrays: list[Labels], shardings) -> dict[Any, Blocks]:
        given: dict[Any, Blocks] = {}
        for labels, sharding in zip(arrays, shardings, strict=True):
            for axis, blocks in _blocks_of(sharding, len(labels)).items():
                if labels[axis] is not None:
                    given.setdefault(labels[axis], blocks)
        used = _usable(self.partition, given)
        return used if self.partition.sums else _without_sums(used, self.results)

    def rule(self) -> tuple[str, tuple[str, ...], dict[str, int]]:
        """The labels in the language of Shardy: query heads are the compound factor (k g)."""
        d = self.partition.dims
        whole: list[str] = []

        def factor(label) -> str:
            if isinstance(label, int):
                return f"b{label}"
            if label == "Sq":
                return "q"
            if label == "K" or (label == "N" and d.G == 1):
                return "k"
            if label == "N":
                return "(k g)" if d.K > 1 else "g"
            whole.append(f"w{len(whole)}")
            return whole[-1]

        sides = [
            ", ".join(" ".join(map(factor, labels)) for labels in side)
            for side in (self.inputs, self.results)
        ]
        compound = "(k g)" in sides[0]
        return " -> ".join(sides), tuple(whole), {"g": d.G} if compound else {}


def _kept(given, needed, ndim: int):
    """The given sharding where it cuts an array as the needed one does."""
    before, after = _blocks_of(given, ndim), _blocks_of(needed, ndim)
    same = before.keys() == after.keys() and all(np.array_equal(before[i].of, after[i].of) for i in before)
    return given if same and given is not None else needed


# --- what is gathered all the same


def gathered_by_types(
    partition: Partition, arrays: Sequence[tuple[str, Any]], *, with_rule: bool = True
) -> list[str]:
    """What is gathered of named avals whose types say how they are sharded, one sentence each.

    Without the rule, XLA gathers the sequences that loops go over.
    """
    if partition.call.symbolic:
        return []
    labels = [partition.of(name, x.shape) for name, x in arrays]
    blocks = [_blocks_by_name(x.sharding, len(x.shape)) for _, x in arrays]
    given: dict[Any, Blocks] = {}
    for names, cut in zip(labels, blocks, strict=True):
        for axis, x in cut.items():
            if names[axis] is not None:
                given.setdefault(names[axis], x)
    found = [
        (name, names, {axis for axis in cut if with_rule or _dim(partition, name, axis) == 0})
        for (name, _), names, cut in zip(arrays, labels, blocks, strict=True)
    ]
    return _gathered(partition, found, _usable(partition, given))


def _dim(partition: Partition, name: str, axis: int) -> int | None:
    """Which dim after the batch an axis of query, key, value and what is like out is: 0 the sequence, 1 heads, 2 head_dim."""
    problem = partition.call.problem
    return problem.axes(name).index(axis) - problem.batch_rank if name in (*STORED, *LIKE_OUT) else None


def _blocks_by_name(sharding, ndim: int) -> dict[int, Blocks]:
    """Of each dim of an array that a `NamedSharding` cuts."""
    if not isinstance(sharding, NamedSharding):
        return {}
    sizes = dict(sharding.mesh.shape)
    at = dict(zip(sizes, (x.reshape(-1) for x in np.indices(tuple(sizes.values()))), strict=True))
    found = {}
    for axis, entry in enumerate(tuple(sharding.spec)[:ndim]):
        names = entry if isinstance(entry, tuple) else (entry,)
        names = tuple(name for name in names if sizes.get(name, 1) > 1)
        if names:
            number = math.prod(sizes[name] for name in names)
            found[axis] = Blocks(
                number, np.ravel_multi_index([at[x] for x in names], [sizes[x] for x in names])
            )
    return found


def _gathered(
    partition: Partition, arrays: Sequence[tuple[str, Labels, set[int]]], used: dict[Any, Blocks]
) -> list[str]:
    """One sentence for each axis that is gathered, of those in which arrays are cut."""
    found: dict[tuple[int, str], list[str]] = {}
    for name, labels, cut in arrays:
        # (What functions close over is put into one vector, of which XLA may have cut any part.)
        for axis in () if name in (*OF_FUNCTIONS, *OF_BLOCKS) else sorted(cut):
            label = labels[axis]
            if label not in used and not (label == "K" and "N" in used):
                found.setdefault((axis, partition.why(name, axis, label)), []).append(name)
    return [
        f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} gathered whole on every device along axis {axis}, "
        f"which is sharded: {why}"
        for (axis, why), names in found.items()
    ]


_warned: set[str] = set()


def warn(sentences: Sequence[str]) -> None:
    """Warns of each once."""
    for text in sentences:
        if text not in _warned:
            _warned.add(text)
            warnings.warn(text, UserWarning, stacklevel=2)


# --- the primitive


_splits: dict[str, Split] = {}


def split(x: Split, results: Sequence[Any], *arrays) -> tuple[Any, ...]:
    """Its results (like these avals) of arrays, by a custom call that the partitioners split."""
    _splits.setdefault(x.key, x)
    return tuple(_split_p.bind(*arrays, key=x.key, avals=tuple((r.shape, r.dtype) for r in results)))


def restore_splits(kinds: Iterable[str], made: Callable[[str], Split]) -> None:
    """Says how to make a `Split` from a key that is JSON with one of these as its "kind".

    For an exported program that asks for one which this process has not made.
    """
    _makers.update(dict.fromkeys(kinds, made))


def _found(key: str) -> Split:
    if key not in _splits:
        _splits[key] = _makers[json.loads(key)["kind"]](key)
    return _splits[key]


_makers: dict[str, Callable[[str], Split]] = {}
compat.def_partitioner(TARGET, _found)


def _lower(ctx, *leaves, key: str, avals):
    return compat.partitioned_call(ctx, TARGET, key, _splits[key].rule(), *leaves)


_split_p = Primitive("flash_attention_split")
_split_p.multiple_results = True
_split_p.def_abstract_eval(lambda *_, key, avals: [jax.core.ShapedArray(*aval) for aval in avals])
compat.def_lowering(_split_p, _lower)
