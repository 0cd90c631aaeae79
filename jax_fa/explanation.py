"""`explain`: which backend would serve a call on which platform, and why each other one would not."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jax_fa import api, backends, cann
from jax_fa.masks import Mask
from jax_fa.problem import Dims, Problem, dims

PLATFORMS = ("cpu", "cuda", "tpu", "ascend")
_REQUESTS: dict[str, Callable[..., Any]] = {
    "dot_product_attention": api.dot_product_attention_request,
    "flash_attention": api.flash_attention_request,
    "flash_attention_score": cann.flash_attention_score_request,
}


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` of it is a table.

    Attributes:
      entry: the public function the call was read as.
      dims: the sizes of the call.
      chosen: for each platform the backend that would run, or None.
      reasons: for each platform and backend None if it can serve the call, or why not.
      backward: for each platform the backend of the gradient, or None.
      notes: for each platform what the chosen backend gets from elsewhere, or what costs more than one might think.
    """

    entry: str
    problem: Problem
    dims: Dims
    dtype: str
    chosen: dict[str, str | None]
    reasons: dict[str, dict[str, str | None]]
    backward: dict[str, str | None]
    notes: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        d = self.dims
        lines = [
            f"{self.entry}: B={d.B} Sq={d.Sq} Skv={d.Skv} N={d.N} K={d.K} D={d.D} Dv={d.Dv} {self.dtype}"
        ]
        for platform, reasons in self.reasons.items():
            chosen = self.chosen[platform]
            lines.append(f"  {platform}: {chosen or 'no backend can serve this call'}")
            lines += [f"    note: {note}" for note in self.notes[platform]]
            if self.backward[platform] != chosen:
                lines.append(f"    gradient: {self.backward[platform] or 'no backend can serve it'}")
            for name, why in reasons.items():
                if name != chosen:
                    lines.append(f"    not {name}: {why or self._passed_over(name, chosen)}")
        return "\n".join(lines)

    def _passed_over(self, name: str, chosen: str | None) -> str:
        if self.problem.implementation not in (None, name):
            return f"implementation={self.problem.implementation!r} was asked for"
        return f"could, but {chosen} comes first"


def explain(
    *args: Any, entry: str | None = None, platforms: tuple[str, ...] | None = None, **kwargs: Any
) -> Explanation:
    """Says which backend would run a call, without running it.

    Args:
      *args: those of `dot_product_attention`, `flash_attention` or `flash_attention_score`; arrays may be
        of type `jax.ShapeDtypeStruct`.
      **kwargs: likewise.
      entry: which of the three; None: the one whose arguments these are (`dot_product_attention` where both
        it and `flash_attention` would do).
      platforms: names of platforms; None: JAX's default one first, then cpu, cuda, tpu and ascend.

    Returns:
      An `Explanation`; print it.

    Raises:
      ValueError: an unknown entry, and what the entry itself raises for wrong arguments.
      TypeError: likewise.
    """
    entry = _entry(args, kwargs) if entry is None else entry
    if entry not in _REQUESTS:
        raise ValueError(f"entry must be one of {', '.join(_REQUESTS)}; got {entry!r}.")
    platforms = platforms or tuple(dict.fromkeys((here(), *PLATFORMS)))
    implementation = kwargs.get("implementation")
    leaves: list[Any]
    tree: Any
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
    problems: list[Problem] = []

    def request(*values):
        filled = list(leaves)
        for i, value in zip(arrays, values, strict=True):
            filled[i] = value
        given, named = tree.unflatten(filled)
        problem, operands = _REQUESTS[entry](*given, **named)
        problems.append(problem)
        return operands

    operands = jax.eval_shape(request, *(leaves[i] for i in arrays))
    problem = problems[-1]
    reasons, chosen, backward, notes = {}, {}, {}, {}
    for platform in platforms:
        reasons[platform] = backends.reasons(platform, problem, operands)
        chosen[platform] = _first(reasons[platform], implementation)
        found = backends.reasons(platform, problem, operands, backward=True)
        backward[platform] = _first(found, implementation)
        notes[platform] = backends.notes(chosen[platform], problem, operands)
    return Explanation(
        entry=entry,
        problem=problem,
        dims=dims(problem, operands),
        dtype=str(operands.query.dtype),
        chosen=chosen,
        reasons=reasons,
        backward=backward,
        notes=notes,
    )


def _first(reasons: dict[str, str | None], implementation: str | None) -> str | None:
    return next((n for n, why in reasons.items() if why is None and implementation in (None, n)), None)


def here() -> str:
    """JAX's default platform, as `platforms=` names it."""
    platform = jax.default_backend()
    return "cuda" if platform == "gpu" else platform


def _entry(args: tuple, kwargs: dict[str, Any]) -> str:
    """The entry whose arguments these are."""
    if "head_num" in kwargs:
        return "flash_attention_score"
    own = set(inspect.signature(api.flash_attention).parameters)
    own -= set(inspect.signature(api.dot_product_attention).parameters)
    other_value = False
    if len(args) >= 3:
        other_value = args[1].shape[-1] != args[2].shape[-1]
    if own & set(kwargs) or isinstance(kwargs.get("mask"), Mask) or other_value:
        return "flash_attention"
    return "dot_product_attention"
