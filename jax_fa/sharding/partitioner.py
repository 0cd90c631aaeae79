"""What XLA's partitioners ask of a call, and the primitive by which they find it."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive

from jax_fa import compat
from jax_fa.call import Shape
from jax_fa.sharding.blocks import Blocks, blocks_of, kept, sharding_of, summed, usable, without_sums
from jax_fa.sharding.gathering import gathered, warn
from jax_fa.sharding.labels import Labels, Partition

Arrays = Sequence[tuple[str, Shape]]  # names and shapes
TARGET = "jax_fa_split"  # the custom call that XLA's partitioners find


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
        return [sharding_of(labels, used, compat.device_count(shardings)) for labels in self.results]

    def split(self, arguments, results, shapes) -> tuple[bytes, list[Any], list[Any]]:
        """From shardings and the shapes of arguments: what one device computes, and the shardings that it needs."""
        shardings = [*arguments, *results]
        devices = compat.device_count(shardings)
        used = self._used(self.inputs + self.results, shardings)
        cut = [set(blocks_of(x, len(labels))) for x, labels in zip(arguments, self.inputs, strict=True)]
        warn(gathered(self.partition, list(zip(self.names, self.inputs, cut, strict=True)), used))

        def local(*leaves):
            parts = zip(self.run(*leaves), self.results, strict=True)
            return [summed(x, labels, used, devices) for x, labels in parts]

        needed = [
            kept(sharding, sharding_of(labels, used, devices), len(labels))
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
            for axis, blocks in blocks_of(sharding, len(labels)).items():
                if labels[axis] is not None:
                    given.setdefault(labels[axis], blocks)
        used = usable(self.partition, given)
        return used if self.partition.sums else without_sums(used, self.results)

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
