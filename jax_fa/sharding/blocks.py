"""Which block of each label a device has: read off shardings, chosen for a call, and turned into shardings again."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import NamedSharding

from jax_fa import compat
from jax_fa.sharding.labels import Labels, Partition


@dataclass(frozen=True, eq=False)
class Blocks:
    number: int
    of: np.ndarray  # the block of each device


def blocks_of(sharding, ndim: int) -> dict[int, Blocks]:
    """Of each dim of an array that is cut."""
    tiles, devices = compat.tiles(sharding, ndim)
    found = {}
    for axis, number in enumerate(tiles[:ndim]):
        if number > 1:
            block = np.empty(devices.size, np.int64)
            block[devices] = np.indices(tiles)[axis]
            found[axis] = Blocks(number, block)
    return found


def usable(partition: Partition, given: dict[Any, Blocks]) -> dict[Any, Blocks]:
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


def without_sums(used: dict[Any, Blocks], results: list[Labels]) -> dict[Any, Blocks]:
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


def sharding_of(labels: Labels, used: dict[Any, Blocks], devices: int):
    """XLA's, of an array with these labels."""
    cut = [used.get(label) for label in labels]
    blocks = [x.of for x in cut if x is not None]
    if not blocks:
        return compat.replicated()
    order = np.lexsort([np.arange(devices), *reversed(blocks)])
    return compat.tiled(order.reshape(*(1 if x is None else x.number for x in cut), -1))


def summed(x, labels: Labels, used: dict[Any, Blocks], devices: int):
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


def kept(given, needed, ndim: int):
    """The given sharding where it cuts an array as the needed one does."""
    before, after = blocks_of(given, ndim), blocks_of(needed, ndim)
    same = before.keys() == after.keys() and all(np.array_equal(before[i].of, after[i].of) for i in before)
    return given if same and given is not None else needed


def blocks_by_name(sharding, ndim: int) -> dict[int, Blocks]:
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
