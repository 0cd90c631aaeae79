"""What is not finite, or hardly a number, in places that are masked and in a few that are not."""

from typing import Any

import numpy as np

from jax_fa.testing.fuzz.program import Data, Program

Groups = list[tuple[dict[str, np.ndarray], bool]]  # arrays by name, and whether these are shaped like results


def spoil(p: Program, data: Data, visible: Any, groups: Groups, random: np.random.Generator) -> None:
    """Puts it into the arrays, in place of half of what is masked."""
    assert data.garbage is not None
    filling = float(data.garbage)
    full = (*p.batch, p.N, p.Sq, p.Skv)
    visible = np.broadcast_to(visible, full)
    rows = ~np.swapaxes(visible.any(axis=-1), -1, -2)[..., None]  # *B Sq N 1
    group = visible.reshape(*p.batch, p.K, p.N // p.K, p.Sq, p.Skv)
    keys = ~np.swapaxes(group.any(axis=(-3, -2)), -1, -2)[..., None]  # *B Skv K 1
    pairs = ~visible
    of_rows = ~visible.any(axis=-1)
    # (The log-sum-exp of a fully masked row is its sink, where there is one.)
    masked = {
        "query": rows,
        "key": keys,
        "value": keys,
        "bias": pairs,
        "out": rows,
        "lse": of_rows & (p.sinks is None),
    }
    for arrays, of_results in groups:
        for name, x in arrays.items():
            if name not in masked or x.size == 0:
                continue
            lead = bool(p.mapped) and (of_results or name in p.mapped)
            where = _for(masked[name], x.shape, lead, bool(p.mapped))
            half = random.random(x.shape) < random.choice([0.5, 1.0])
            with np.errstate(over="ignore"):
                x = np.where(where & half, np.asarray(filling).astype(x.dtype), x)
            if data.visible_garbage and random.random() < 0.3:
                x = x.copy()
                x.reshape(-1)[int(random.integers(x.size))] = filling
            arrays[name] = x


def _for(masked: Any, shape: tuple[int, ...], lead: bool, mapped: bool) -> Any:
    """Which elements of an array of this shape nothing but masked pairs need."""
    if mapped and not lead:
        masked = masked.all(axis=0)
    shape_in = (1,) * (masked.ndim - len(shape)) + shape
    if lead and len(shape) < masked.ndim:
        shape_in = (shape[0], *(1,) * (masked.ndim - len(shape)), *shape[1:])
    axes = tuple(i for i, size in enumerate(shape_in) if size == 1 and masked.shape[i] != 1)
    found = masked.all(axis=axes, keepdims=True) if axes else masked
    return np.broadcast_to(found, shape_in).reshape(shape)
