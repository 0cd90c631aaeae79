"""Results of the library against the reference: every element within its bound."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_fa.testing.fuzz.inputs import Inputs, from_stored, smallest_of, unit_of
from jax_fa.testing.fuzz.numbers import Number
from jax_fa.testing.fuzz.reference import FLT_MAX, Attention


@dataclass(frozen=True)
class Fault:
    result: str
    text: str
    ratio: float  # error over bound


@dataclass(frozen=True)
class Verdict:
    faults: tuple[Fault, ...]
    worst: dict[str, float]  # the largest error of each result, in units of its bound
    reached: int = 0  # elements that a value which is not finite may reach
    digest: str = ""  # of the bits of all results


def check(inputs: Inputs, found: dict[str, Any]) -> Verdict:
    """Of everything that the program returned."""
    wanted = inputs.reference(found.get("seed"))
    faults: list[Fault] = []
    worst: dict[str, float] = {}
    reached = 0
    for name, x in found.items():
        if name == "seed":
            continue
        number, tainted, stored, dtype = _expected(inputs, wanted, name, x)
        by_elements = inputs.program.mapped and not inputs.program.vmap_outside
        if by_elements or inputs.program.how == "doubled":  # each part of a sum is stored
            number = number.rounded(2 * unit_of(dtype), 2 * smallest_of(dtype))
        if by_elements or wanted.added:
            # ... and may overflow, the one to infinity and the other to the other one.
            most = float(jnp.finfo(dtype).max)
            tainted = tainted | (wanted.size_in_parts(name) * (1 + 4 * unit_of(dtype)) >= most)
        # ... and so is each part of a sum over the keys, or on each device.
        if wanted.added and name.removesuffix("'") in ("dquery", "dkey", "dvalue"):
            number = number.rounded(unit_of(dtype), 4 * smallest_of(dtype))
        reached += int(np.count_nonzero(tainted))
        ratio, text = _compare(stored, number, tainted, dtype)
        worst[name] = ratio
        if text:
            faults.append(Fault(name, text, ratio))
    text = _lost_nan(inputs, wanted, found)
    if text:
        faults.append(Fault("out", text, np.inf))
    return Verdict(tuple(faults), worst, reached)


def _expected(inputs: Inputs, wanted: Attention, name: str, x: Any) -> tuple[Number, Any, Any, Any]:
    """(what it must be, where it may be anything, the result in canonical form, its dtype)."""
    p, stored = inputs.program, np.asarray(x)
    base, moved = (name[:-1], True) if name.endswith("'") else (name, False)
    if base == "max":
        largest, tainted = wanted.results["largest"], wanted.tainted["largest"]
        at = np.max(largest.value, axis=-1, initial=-FLT_MAX)
        error = np.max(np.broadcast_to(largest.error, largest.value.shape), axis=-1, initial=0.0)
        return Number(at, error), tainted.any(axis=-1), stored, stored.dtype
    number = wanted.results[base]
    if moved:
        shape = number.value.shape
        number = number.tangent or Number(np.zeros(shape), 0.0)
        number = number.map(lambda a: np.broadcast_to(a, shape))
    canonical = (
        inputs.gradient(base[1:], stored)
        if base.startswith("d")
        else from_stored(p, base, stored, int(bool(p.mapped)))
    )
    return number, wanted.tainted[name], canonical, stored.dtype


def _compare(x: Any, number: Number, tainted: Any, dtype: Any) -> tuple[float, str]:
    """(the largest error in bounds, what is wrong)."""
    x, r = np.asarray(x, np.float64), number.value
    if x.shape != r.shape:
        return np.inf, f"has shape {x.shape}, expected {r.shape}"
    if x.size == 0:
        return 0.0, ""
    with np.errstate(all="ignore"):
        bound = number.error + unit_of(dtype) * np.abs(r) + smallest_of(dtype)
        off = np.abs(x - r)
        most = float(jnp.finfo(dtype).max)
        exact = np.abs(r) >= FLT_MAX  # the mark of fully masked rows
        overflows = (np.abs(r) + bound >= most) & np.isinf(x) & (np.sign(x) == np.sign(r)) & ~exact
        marks = np.sign(r) * min(FLT_MAX, most)
        ratio = np.where(exact, np.where(x == marks, 0.0, np.inf), off / bound)
        ratio = np.where(tainted | overflows, 0.0, np.where(np.isnan(ratio), np.inf, ratio))
        unbounded = ~(bound < np.inf) & ~exact
        ratio = np.where(unbounded, 0.0, ratio)
    worst = float(ratio.max())
    if worst <= 1.0:
        return worst, ""
    at = np.unravel_index(int(ratio.argmax()), ratio.shape)
    count = int(np.count_nonzero(ratio > 1))
    place = tuple(int(i) for i in at)
    allowed = float(np.broadcast_to(bound, r.shape)[at])
    return worst, (
        f"[{', '.join(map(str, place))}] is {float(x[at]):.9g}, expected {float(r[at]):.9g} within {allowed:.3g} "
        f"({worst:.3g} bounds; {count} of {x.size} elements are wrong)"
    )


def _lost_nan(inputs: Inputs, wanted: Attention, found: dict[str, Any]) -> str:
    """A visible NaN in query, key or value must show in the output of each row that sees it."""
    p, data = inputs.program, inputs.data
    masks_more = data.infinite_bias and p.bias is not None
    if data.garbage != "nan" or not data.visible_garbage or masks_more or p.dropout or p.Dv == 0:
        return ""
    given = {name: wanted.given[name] for name in ("query", "key", "value")}
    rows = wanted.rows_that_see(given)
    if not rows.any():
        return ""
    out = from_stored(p, "out", np.asarray(found["out"]), int(bool(p.mapped))).astype(np.float64)
    rank = len(wanted.batch)
    rows = np.swapaxes(rows.reshape(*rows.shape[:rank], p.N, p.Sq), -1, -2)
    lost = rows & ~np.isnan(out).any(axis=-1)
    return f"has {np.count_nonzero(lost)} rows without a NaN that see one" if lost.any() else ""
