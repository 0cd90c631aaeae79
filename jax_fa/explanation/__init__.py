"""`explain`: which backend runs which attention call on which platform, and why each other one does not.

It traces: the calls are the primitives that it finds in the traced program, so it explains a whole model as well as a
single call of an entry, and reads no argument itself.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax.extend import backend as extend_backend

from jax_fa import api, arguments, backends
from jax_fa.backends.ascend import installation
from jax_fa.call import Dims, Problem
from jax_fa.cann.score import flash_attention_score
from jax_fa.cann.torch_npu import npu_fusion_attention
from jax_fa.explanation.calls import Found, calls_of, has_shape
from jax_fa.masks import Mask
from jax_fa.paged.attention import paged_attention
from jax_fa.paged.call import PagedProblem
from jax_fa.primitives import lowering

PLATFORMS = ("cpu", "cuda", "tpu", "ascend")
_ENTRIES: dict[str, Callable[..., Any]] = {
    "dot_product_attention": api.dot_product_attention,
    "flash_attention": api.flash_attention,
    "flash_attention_score": flash_attention_score,
    "npu_fusion_attention": npu_fusion_attention,
    "paged_attention": paged_attention,
}
# Other names of platforms; JAX calls NVIDIA's and AMD's both "gpu".
_SAME = {"gpu": "cuda", "nvidia": "cuda"}
_KNOWN = (*PLATFORMS, "rocm", "metal", "oneapi")


@dataclass(frozen=True)
class Explanation:
    """What `explain` found of one call. `str()` of it is a table.

    Attributes:
      entry: the public function the call was read as; for a call in a function what it computes: "forward", "backward",
        "paged", "jvp" (a forward with its tangent), "tangent", "second" or "second_tangent" (derivatives of the second order).
      dims: the sizes of the call.
      chosen: for each platform the backend that would run, or None.
      reasons: for each platform and backend None if it can serve the call, or why not.
      backward: for each platform the backend of the gradient, or None.
      tangent: likewise, of the tangent (jvp).
      second: likewise, of second derivatives; the derivative of a tangent is the portable backend's.
      computes_in: for each platform the precision of the chosen backend, or None.
      notes: for each platform what the chosen backend gets from elsewhere, or what costs more than one might think.
      source: the line of the program that made the call, `file:line (function)`; `the function itself` where what is
        explained is an entry.
      times: how often it runs, as far as the lengths of the scans around it say.
    """

    entry: str
    problem: Problem | PagedProblem
    dims: Dims
    dtype: str
    chosen: dict[str, str | None]
    reasons: dict[str, dict[str, str | None]]
    backward: dict[str, str | None]
    tangent: dict[str, str | None]
    second: dict[str, str | None]
    notes: dict[str, tuple[str, ...]]
    computes_in: dict[str, str | None]
    source: str = ""
    times: int = 1

    def __str__(self) -> str:
        d = self.dims
        title = f"{self.entry}: B={d.B} Sq={d.Sq} Skv={d.Skv} N={d.N} K={d.K} D={d.D} Dv={d.Dv} {self.dtype}"
        rows: list[tuple[str, ...]] = [("on", "backend", "gradient", "tangent", "second", "computes in")]
        derivatives = (self.backward, self.tangent, self.second)
        rows += [
            (
                platform,
                chosen or "none",
                *(found[platform] or "none" for found in derivatives),
                self.computes_in[platform] or "-",
            )
            for platform, chosen in self.chosen.items()
        ]
        others = [
            (platform, name, why or self._passed_over(name, self.chosen[platform]))
            for platform, reasons in self.reasons.items()
            for name, why in reasons.items()
            if name != self.chosen[platform]
        ]
        notes = [(platform, note) for platform, found in self.notes.items() for note in found]
        lines = [title, *_columns(rows), "  why no other:", *_columns(_once(others), "    ")]
        return "\n".join([*lines, *(["  notes:", *_columns(_once(notes), "    ")] if notes else [])])

    def _passed_over(self, name: str, chosen: str | None) -> str:
        if self.problem.implementation not in (None, name):
            return f"implementation={self.problem.implementation!r} was asked for"
        return f"could, but {chosen} comes first"


class Explanations(tuple[Explanation, ...]):
    """The explanations of all attention calls of a function, in the order of the program. `str()` of it is a table."""

    def __str__(self) -> str:
        if not self:
            return "no attention call of jax_fa"
        return "\n\n".join(f"{i + 1}. {_located(x)}\n{x}" for i, x in enumerate(self))


def _located(x: Explanation) -> str:
    return x.source + (f", {x.times} times" if x.times > 1 else "")


def _columns(rows: Sequence[tuple[str, ...]], indent: str = "  ") -> list[str]:
    """Rows as lines whose columns begin at one place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def _once(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """A first column that repeats the one above is left empty."""
    return [("" if i and row[0] == rows[i - 1][0] else row[0], *row[1:]) for i, row in enumerate(rows)]


@overload
def explain(
    function: Callable[..., Any], /, *args: Any, platforms: str | Iterable[str] | None = None, **kwargs: Any
) -> Explanations: ...
@overload
def explain(
    *args: Any, entry: str | None = None, platforms: str | Iterable[str] | None = None, **kwargs: Any
) -> Explanation: ...
def explain(
    *args: Any, entry: str | None = None, platforms: str | Iterable[str] | None = None, **kwargs: Any
) -> Explanation | Explanations:
    """Says which backend would run, without running anything.

    `explain(query, key, value, ...)` explains one call of an entry, `explain(function, *args, **kwargs)` every
    attention call in any function of JAX, a whole model or training step too.

    Args:
      *args: those of `dot_product_attention`, `flash_attention`, `paged_attention`, `flash_attention_score` or
        `npu_fusion_attention`; or a function and its arguments. Arrays may be of type `jax.ShapeDtypeStruct`. In a function's
        arguments, whatever is not an array stays as it is, as a static argument does.
      **kwargs: likewise.
      entry: which of them; None: the one whose arguments these are (`dot_product_attention` where both
        it and `flash_attention` would do). Not with a function.
      platforms: names of platforms, one or several: "cpu", "cuda" (or "gpu", as JAX says), "rocm", "tpu", "metal",
        "ascend", "npu", or that of a JAX plugin that is installed; None: JAX's default one first, then cpu, cuda,
        tpu and ascend.

    Returns:
      An `Explanation`; for a function an `Explanations`, a tuple of one for each call, with its source line. Print it.

    Raises:
      ValueError: an unknown entry or platform, and what the entry itself raises for wrong arguments.
      TypeError: likewise.
    """
    if args and callable(args[0]) and not has_shape(args[0]):
        if entry is not None:
            raise ValueError(f"entry is for the arguments of a call; got entry={entry!r} with a function.")
        asked = _platforms(platforms)
        function, *rest = args
        found = calls_of(function, tuple(rest), kwargs)
        return Explanations(_explanation(x.kind.what, x, asked) for x in found)
    entry = _entry(args, kwargs) if entry is None else entry
    arguments.choice("entry", entry, _ENTRIES)
    _check_bound(entry, args, kwargs)
    asked = _platforms(platforms)
    named = kwargs.get("implementation")
    if isinstance(named, str) and named == "cudnn" and entry == "dot_product_attention":
        raise ValueError("implementation='cudnn' is a call of jax.nn, which explain does not read.")
    found = calls_of(_ENTRIES[entry], args, kwargs)
    # Of the parts of a union, the one with most operands.
    told = _explanation(entry, max(found, key=lambda x: len(x.inputs.arrays())), asked)
    if len(found) == 1:
        return told
    note = f"{len(found)} such calls, one for each disjoint part of the visible keys, are merged"
    return replace(told, notes={platform: (*notes, note) for platform, notes in told.notes.items()})


def _explanation(entry: str, found: Found, asked: dict[str, str]) -> Explanation:
    call, what = found.call, found.kind.what
    if what == "jvp":  # its forward's backend may lack it, and then does a forward
        what = "forward"
    # The derivatives of a paged call are those of another.
    derived = call.derived() if what == "paged" else call
    reasons, chosen, notes, computes_in = {}, {}, {}, {}
    derivatives: dict[str, dict[str, str | None]] = {"backward": {}, "tangent": {}, "second": {}}
    for given, platform in asked.items():
        reasons[given] = backends.reasons(platform, call, what)
        chosen[given] = backends.best(reasons[given], call, what)
        for which, backend in derivatives.items():
            backend[given] = backends.best(backends.reasons(platform, derived, which), derived, which)
        notes[given] = (*backends.notes(chosen[given], call), *_gathered(chosen[given], platform, found))
        computes_in[given] = _computes_in(chosen[given], platform, call.dtype)
    return Explanation(
        entry=entry,
        problem=call.problem,
        dims=call.dims,
        dtype=str(call.dtype),
        chosen=chosen,
        reasons=reasons,
        **derivatives,
        notes=notes,
        computes_in=computes_in,
        source=found.source,
        times=found.times,
    )


def _gathered(backend: str | None, platform: str, found: Found) -> list[str]:
    if backend is None or found.kind.what == "paged":
        return []
    return lowering.gathered(backends.named(backend), platform, found.inputs, found.problem)


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
    if platform != "gpu":
        return platform
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


def _platforms(given: str | Iterable[str] | None) -> dict[str, str]:
    """The platforms asked for, as they were written, and what backends call them."""
    if given is None:
        return {platform: platform for platform in dict.fromkeys((here(), *PLATFORMS))}
    if isinstance(given, str):
        given = (given,)
    names = tuple(given) if isinstance(given, Iterable) and not has_shape(given) else None
    if names is None or not all(isinstance(platform, str) for platform in names):
        raise TypeError(
            f"platforms must be names of platforms or None; got {arguments.shown(given)}. "
            "Arrays and options of the call go by their own names."
        )
    found = {platform: _SAME.get(platform.lower(), platform) for platform in names}
    known = (*_KNOWN, *(platform for platform in installation.platforms if platform not in _KNOWN))
    for platform, meant in found.items():
        if meant.lower() not in known and platform not in extend_backend.backends():
            raise ValueError(f"platforms must be among {', '.join((*known, 'gpu'))}; got {platform!r}.")
    if not found:
        raise ValueError("platforms must name at least one platform, or be None; got none.")
    return found


def _entry(args: tuple, kwargs: dict[str, Any]) -> str:
    """The entry whose arguments these are."""
    if len(args) > 3 and isinstance(args[3], int):  # head_num, which torch_npu has by position
        return "npu_fusion_attention"
    if "head_num" in kwargs:
        torch_alone = arguments.names("npu_fusion_attention") - arguments.names("flash_attention_score")
        return "npu_fusion_attention" if torch_alone & set(kwargs) else "flash_attention_score"
    if "page_table" in kwargs or (len(args) > 4 and all(map(_holds_integers, args[3:5]))):
        return "paged_attention"
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
    key, value = (jnp.shape(named[name]) if has_shape(named.get(name)) else () for name in ("key", "value"))
    other_value = bool(key and value) and key[-1] != value[-1]
    more_dims = any(has_shape(x) and len(x.shape) > 4 for x in named.values())
    if isinstance(named.get("mask"), Mask) or other_value or more_dims:
        return "dot_product_attention" if others & set(kwargs) else "flash_attention"
    return "dot_product_attention"


def _holds_integers(x) -> bool:
    return has_shape(x) and jnp.issubdtype(x.dtype, jnp.integer)


def _check_bound(entry: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises TypeError where these are not the arguments of the entry."""
    if not arguments.names(entry).issuperset(kwargs):
        raise arguments.unknown(entry, kwargs)
    try:
        inspect.signature(_ENTRIES[entry]).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"these are not the arguments of jax_fa.{entry}: {error}.") from None
