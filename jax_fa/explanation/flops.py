"""`flops`: how much arithmetic a call asks for, which XLA does not know of a kernel that it only calls.

(Its cost analysis counts every custom call as -1, on CPU and GPU alike; none says what it costs.)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jax_fa import api, arguments, compat, masks
from jax_fa.call import Dims, is_symbolic
from jax_fa.explanation.calls import call_of
from jax_fa.masks import Mask, Rules

Convention = Literal["model", "hardware"]


class _Products(NamedTuple):
    """How many multiply-adds of a visible pair go over head_dim D, and how many over Dv."""

    d: int
    dv: int


# "hardware" has the logits, and what else the kernels compute once more; second derivatives in two passes.
_PRODUCTS = {
    "model": {
        "forward": _Products(1, 1),
        "backward": _Products(2, 2),
        "jvp": _Products(3, 3),
        "second": _Products(6, 6),
    },
    "hardware": {
        "forward": _Products(1, 1),
        "backward": _Products(3, 2),
        "jvp": _Products(3, 3),
        "second": _Products(11, 7),
    },
}


@dataclass(frozen=True, kw_only=True)
class Flops:
    """What `flops` counts: floating-point operations, of which a multiply-add is two.

    Attributes:
      forward: the output.
      backward: the gradients by query, key and value, from what the forward saved: `jax.grad` is both.
      jvp: the output and its tangent.
      second: the derivative of the backward along tangents, from what was saved.
      pairs: how many pairs of a row and a key are visible, over all batch entries and query heads.
      exact: False where the mask has arrays whose values are not known: pairs then counts all that the rest of it shows.
    """

    forward: int
    backward: int
    jvp: int
    second: int
    pairs: int
    exact: bool


def flops(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any = None,
    convention: Convention = "model",
    **options: Any,
) -> Flops:
    """Counts the floating-point operations of a call of `flash_attention`, for model utilization. Runs nothing.

    `jax.jit(...).lower(...).compile().cost_analysis()` does not count kernels that XLA only calls. Add these, once per
    layer.

    Counted are the matrix products of visible pairs of rows and keys: a causal mask has about half of all, a window those
    within it, packed sequences those of each sequence. The softmax, bias and dropout are not counted.

    Args:
      query: an array or a `jax.ShapeDtypeStruct`; see `flash_attention`.
      key: likewise.
      value: likewise.
      mask: likewise; in a mask, arrays may be of type `jax.ShapeDtypeStruct`.
      convention: "model" counts what the formulas need, whoever computes them: the backward is twice the forward, as in
        model FLOPs utilization (MFU). "hardware" also counts what the algorithm computes again instead of storing it: the
        backward is 2.5 times the forward where Dv is D (HFU, and the rates that the FlashAttention papers give).
      **options: the other arguments of `flash_attention`, which are checked.

    Returns:
      A `Flops`: the counts of the forward and of each derivative.

    Raises:
      ValueError: an unknown convention, sizes that are symbolic, and what `flash_attention` raises.
      TypeError: likewise.
      NotImplementedError: likewise.

    Source: model and hardware FLOPs: Chowdhery et al. 2022, arXiv:2204.02311; the counts: Dao 2023, arXiv:2307.08691.
    """
    arguments.choice("convention", convention, _PRODUCTS)
    given = None if mask is None else api.one_mask(mask)
    d = call_of(api.flash_attention, (query, key, value), options, given).dims
    if any(map(is_symbolic, (*d.B, d.Sq, d.Skv, d.N, d.D, d.Dv))):
        raise ValueError(f"flops counts known sizes; got {d}.")
    shown = None if given is None else masks.known_part(given)
    pairs = _pairs(shown, d)
    counts = {
        what: 2 * pairs * (products.d * d.D + products.dv * d.Dv)
        for what, products in _PRODUCTS[convention].items()
    }
    return Flops(**counts, pairs=pairs, exact=shown is given)


def _pairs(mask: Mask | None, d: Dims) -> int:
    """How many pairs of rows and keys the mask shows."""
    rows = math.prod(d.B) * d.N * d.Sq
    if mask is None or not rows * d.Skv:
        return rows * d.Skv
    with compat.eager():
        parts = jax.tree.map(np.asarray, masks.parts(mask, d.B, d.N, d.Sq, d.Skv))
    return sum(_visible(rules, (*d.B, d.N, d.Sq), d.Skv) for rules in parts)


def _visible(rules: Rules, full: tuple[int, ...], skv: int) -> int:
    """How many pairs one part shows, without an array of rows and keys where there is none."""
    lower = np.zeros((1,) * len(full), np.int64) if rules.lower is None else rules.lower.astype(np.int64)
    upper = np.full((1,) * len(full), skv, np.int64) if rules.upper is None else rules.upper.astype(np.int64)
    dense = rules.dense
    if dense is not None and dense.shape[-1] == 1:
        upper, dense = np.where(dense[..., 0], upper, 0), None
    found, each = 0, 1
    given = [x for x in (rules.segment_row, rules.segment_key) if x is not None]
    given += [] if dense is None else [dense[..., 0]]
    lead = np.broadcast_shapes(*(x.shape[:-1] for x in (lower, upper, *given)))
    each = math.prod(full[:-1]) // math.prod(lead)  # of what has size 1 there
    for at in np.ndindex(*lead):

        def of(x, at=at):
            return x[tuple(min(i, n - 1) for i, n in zip(at, x.shape, strict=False))]

        bounds = np.broadcast_to(of(lower), full[-1:]), np.broadcast_to(of(upper), full[-1:])
        labels = None if rules.segment_row is None else (of(rules.segment_row), of(rules.segment_key))
        if dense is not None and labels is None and dense.shape[-2] == 1:
            found += _of_keys(of(dense)[0], *bounds)
        elif dense is not None:
            found += sum(_of_array(of(dense), *bounds, labels))
        elif labels is not None:
            found += _of_labels(*labels, *bounds)
        else:
            found += int(np.maximum(bounds[1] - bounds[0], 0).sum())
    return found * each


def _of_labels(row, key, lower, upper) -> int:
    """Keys between the bounds whose label is that of the row, where it has one."""
    size = len(key)
    codes = np.sort(key.astype(np.int64) * size + np.arange(size))  # by label, then by position

    def before(bound):
        return np.searchsorted(codes, row.astype(np.int64) * size + bound)

    counts = np.where(row < 0, upper - lower, before(upper) - before(lower))
    return int(np.where(upper > lower, counts, 0).sum())


def _of_keys(dense, lower, upper) -> int:
    """Likewise of a boolean array of keys, that of all rows."""
    before = np.concatenate([[0], np.cumsum(dense)])
    return int((before[np.maximum(upper, lower)] - before[lower]).sum())


def _of_array(dense, lower, upper, labels, block: int = 512) -> Iterator[int]:
    """Likewise of a boolean array `#rows keys`, in blocks of rows."""
    j = np.arange(dense.shape[-1])
    for i in range(0, len(lower), block):
        rows = slice(i, i + block)
        shown = (j >= lower[rows, None]) & (j < upper[rows, None])
        shown &= dense if len(dense) == 1 else dense[rows]
        if labels is not None:
            row = np.broadcast_to(labels[0], lower.shape)[rows, None]
            shown &= (row < 0) | (row == labels[1])
        yield int(shown.sum())
