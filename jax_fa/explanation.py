"""`explain`: which backend would serve a call on which platform, and why each other one would not."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_fa import api, arguments, backends, cann, compat
from jax_fa.ascend import installation
from jax_fa.masks import Mask
from jax_fa.problem import Dims, Problem, dims

PLATFORMS = ("cpu", "cuda", "tpu", "ascend")
_ENTRIES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "dot_product_attention": (api.dot_product_attention, api.dot_product_attention_request),
    "flash_attention": (api.flash_attention, api.flash_attention_request),
    "flash_attention_score": (cann.flash_attention_score, cann.flash_attention_score_request),
}
# Other names of platforms; JAX calls NVIDIA's and AMD's both "gpu".
_SAME = {"gpu": "cuda", "nvidia": "cuda"}
_KNOWN = (*PLATFORMS, "rocm", "metal", "oneapi")


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` of it is a table.

    Attributes:
      entry: the public function the call was read as.
      dims: the sizes of the call.
      chosen: for each platform the backend that would run, or None.
      reasons: for each platform and backend None if it can serve the call, or why not.
      backward: for each platform the backend of the gradient, or None.
      computes_in: for each platform the precision of the chosen backend, or None.
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
    computes_in: dict[str, str | None]

    def __str__(self) -> str:
        d = self.dims
        lines = [
            f"{self.entry}: B={d.B} Sq={d.Sq} Skv={d.Skv} N={d.N} K={d.K} D={d.D} Dv={d.Dv} {self.dtype}"
        ]
        for platform, reasons in self.reasons.items():
            chosen = self.chosen[platform]
            lines.append(f"  {platform}: {chosen or 'no backend can serve this call'}")
            if self.computes_in[platform]:
                lines.append(f"    computes in: {self.computes_in[platform]}")
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
    *args: Any, entry: str | None = None, platforms: str | Sequence[str] | None = None, **kwargs: Any
) -> Explanation:
    """Says which backend would run a call, without running it.

    Args:
      *args: those of `dot_product_attention`, `flash_attention` or `flash_attention_score`; arrays may be
        of type `jax.ShapeDtypeStruct`.
      **kwargs: likewise.
      entry: which of the three; None: the one whose arguments these are (`dot_product_attention` where both
        it and `flash_attention` would do).
      platforms: names of platforms, one or several: "cpu", "cuda" (or "gpu", as JAX says), "rocm", "tpu", "metal",
        "ascend", "npu", or that of a JAX plugin that is installed; None: JAX's default one first, then cpu, cuda,
        tpu and ascend.

    Returns:
      An `Explanation`; print it.

    Raises:
      ValueError: an unknown entry or platform, and what the entry itself raises for wrong arguments.
      TypeError: likewise.
    """
    entry = _entry(args, kwargs) if entry is None else entry
    arguments.choice("entry", entry, _ENTRIES)
    _check_bound(entry, args, kwargs)
    asked = _platforms(platforms)
    implementation = kwargs.get("implementation")
    leaves: list[Any]
    tree: Any
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [i for i, leaf in enumerate(leaves) if _has_shape(leaf)]
    problems: list[Problem] = []

    def request(*values):
        filled = list(leaves)
        for i, value in zip(arrays, values, strict=True):
            filled[i] = value
        given, named = tree.unflatten(filled)
        problem, operands = _ENTRIES[entry][1](*given, **named)
        problems.append(problem)
        return operands

    operands = jax.eval_shape(request, *(leaves[i] for i in arrays))
    problem = problems[-1]
    reasons, chosen, backward, notes, computes_in = {}, {}, {}, {}, {}
    for given, platform in asked.items():
        reasons[given] = backends.reasons(platform, problem, operands)
        chosen[given] = _first(reasons[given], implementation)
        found = backends.reasons(platform, problem, operands, backward=True)
        backward[given] = _first(found, implementation)
        notes[given] = backends.notes(chosen[given], problem, operands)
        computes_in[given] = _computes_in(chosen[given], platform, operands.query.dtype)
    return Explanation(
        entry=entry,
        problem=problem,
        dims=dims(problem, operands),
        dtype=str(operands.query.dtype),
        chosen=chosen,
        reasons=reasons,
        backward=backward,
        notes=notes,
        computes_in=computes_in,
    )


def _first(reasons: dict[str, str | None], implementation: str | None) -> str | None:
    return next((n for n, why in reasons.items() if why is None and implementation in (None, n)), None)


def _computes_in(backend: str | None, platform: str, dtype) -> str | None:
    """The precision of products and sums."""
    if backend is None:
        return None
    if backend == "ascend":
        return "as CANN's operator does"
    if dtype == jnp.float64:
        return "float64 products and sums"
    if dtype != jnp.float32:
        return f"products of {dtype} values, float32 sums and softmax"
    if backend == "xla" and platform != "cpu":
        return "float32 sums; products as jax_default_matmul_precision says (by default fewer bits on GPU and TPU)"
    return "float32 products and sums"


def here() -> str:
    """JAX's default platform, as `platforms=` names it."""
    platform = jax.default_backend()
    return compat.kind_of_gpu() if platform == "gpu" else platform


def _platforms(given: str | Sequence[str] | None) -> dict[str, str]:
    """The platforms asked for, as they were written, and what backends call them."""
    if given is None:
        return {platform: platform for platform in dict.fromkeys((here(), *PLATFORMS))}
    if isinstance(given, str):
        given = (given,)
    if not isinstance(given, Iterable) or not all(isinstance(platform, str) for platform in given):
        raise TypeError(
            f"platforms must be names of platforms or None; got {arguments.shown(given)}. "
            "Arrays and options of the call go by their own names."
        )
    found = {platform: _SAME.get(platform.lower(), platform) for platform in given}
    known = (*_KNOWN, *(platform for platform in installation.platforms if platform not in _KNOWN))
    for platform, meant in found.items():
        if meant.lower() not in known and platform not in compat.platforms():
            raise ValueError(f"platforms must be among {', '.join((*known, 'gpu'))}; got {platform!r}.")
    if not found:
        raise ValueError("platforms must name at least one platform, or be None; got none.")
    return found


def _entry(args: tuple, kwargs: dict[str, Any]) -> str:
    """The entry whose arguments these are."""
    if "head_num" in kwargs:
        return "flash_attention_score"
    own = arguments.names("flash_attention") - arguments.names("dot_product_attention")
    others = arguments.names("dot_product_attention") - arguments.names("flash_attention")
    named = dict(zip(("query", "key", "value", "bias", "mask"), args, strict=False)) | kwargs
    if own & set(kwargs):
        if both := {name: kwargs[name] for name in sorted(others & set(kwargs))}:
            raise TypeError(
                f"No entry has all these arguments: {', '.join(sorted(own & set(kwargs)))} of flash_attention, "
                f"{', '.join(both)} of dot_product_attention. {arguments.unknown('flash_attention', both)}"
            )
        return "flash_attention"
    key, value = (jnp.shape(named[name]) if _has_shape(named.get(name)) else () for name in ("key", "value"))
    other_value = bool(key and value) and key[-1] != value[-1]
    more_dims = any(_has_shape(x) and len(x.shape) > 4 for x in named.values())
    if isinstance(named.get("mask"), Mask) or other_value or more_dims:
        return "dot_product_attention" if others & set(kwargs) else "flash_attention"
    return "dot_product_attention"


def _has_shape(x) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _check_bound(entry: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises TypeError where these are not the arguments of the entry."""
    if not arguments.names(entry).issuperset(kwargs):
        raise arguments.unknown(entry, kwargs)
    try:
        inspect.signature(_ENTRIES[entry][0]).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"these are not the arguments of jax_fa.{entry}: {error}.") from None
