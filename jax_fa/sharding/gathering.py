"""What is gathered on every device although it is sharded, in sentences."""

import warnings
from collections.abc import Sequence
from typing import Any

from jax_fa.call import OF_BLOCKS, OF_FUNCTIONS
from jax_fa.sharding.blocks import Blocks, blocks_by_name, usable
from jax_fa.sharding.labels import Labels, Partition, dim_of


def gathered_by_types(
    partition: Partition, arrays: Sequence[tuple[str, Any]], *, with_rule: bool = True
) -> list[str]:
    """What is gathered of named avals whose types say how they are sharded, one sentence each.

    Without the rule, XLA gathers the sequences that loops go over.
    """
    if partition.call.symbolic:
        return []
    labels = [partition.of(name, x.shape) for name, x in arrays]
    blocks = [blocks_by_name(x.sharding, len(x.shape)) for _, x in arrays]
    given: dict[Any, Blocks] = {}
    for names, cut in zip(labels, blocks, strict=True):
        for axis, x in cut.items():
            if names[axis] is not None:
                given.setdefault(names[axis], x)
    found = [
        (name, names, {axis for axis in cut if with_rule or dim_of(partition, name, axis) == 0})
        for (name, _), names, cut in zip(arrays, labels, blocks, strict=True)
    ]
    return gathered(partition, found, usable(partition, given))


def gathered(
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
