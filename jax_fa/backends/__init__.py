"""The backends, best first, and the choice among them.

A backend is an object of the `Backend` protocol. Those of this package register themselves below; others do so by
`register`, or in tests by `registered`.
"""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any, Protocol, TypeAlias, runtime_checkable

from jax_fa import arguments
from jax_fa.backends import ascend, cpu, mosaic, variables, xla
from jax_fa.call import Call, Operands, Saved

__all__ = ["Backend", "Implementation", "register", "registered"]

# What `implementation=` takes: None, the name of a backend, or its options object (`jax_fa.ascend.Options`, ...).
Implementation: TypeAlias = Any
# A `Call`; of "paged" a `PagedCall`.
AnyCall: TypeAlias = Any


@runtime_checkable
class Backend(Protocol):
    """Runs attention calls on some platforms. `forward` and `backward` are plain traceable functions.

    A backend may have more methods; what it lacks, the portable backend computes.

    * `tangent(call, tangents, saved)`: the tangents of out and log-sum-exp (`*B N Sq`) along `tangents`, the `Operands` that
      move; from what the forward saved.
    * `jvp(call, tangents)`: what `forward` and `tangent` give together, in one pass.
    * `second(call, tangents, saved)`: the derivative of `backward` along tangents, as `Operands`, and the gradients by its
      cotangents dout and dlogsumexp. `saved` may hold tangents of the cotangents.
    * `paged(call)`: out, softmax max and softmax sum of a `PagedCall` (`paged/call.py`), which `why_not` then gets in place of a
      `Call` where `what` is "paged".

    Calls on several devices carry a rule by which XLA splits batch and heads (`sharding/`). A backend may say more:

    * `splits_rows = True`: query rows too. Then `problem.mask` says nothing, for it counts from the first row; the operands do.
    * `why_no_functions(call)`: why it cannot compute a call with `problem.functions`, or None; such a call goes to no backend
      without this method. It evaluates them or, of one mask, reads `operands.block_pairs`.
    * `splits_alone(call)`, for plain JAX: whether XLA splits this call without a rule, and without communication.

    `operands.sinks` are absent, and what a backend computes without them is made into what it is with them (`sinks.py`). One with
    `why_no_sinks(call, what)` may take them itself: None where `what`, "forward", "backward" or "tangent", does, or why not. Its
    output and statistics then have the sink; a gradient of the sinks may be among those that it gives. With `problem.partial`,
    statistics are of other keys too, so that weights need not sum to 1.

    Attributes:
      name: what `implementation=` calls it.
      platforms: lower-case names of the platforms it serves; None: all.
      emulated_on: platforms that it serves through an emulator or interpreter; `why_not` says whether one is there.
    """

    @property
    def name(self) -> str: ...

    @property
    def platforms(self) -> Collection[str] | None: ...

    @property
    def emulated_on(self) -> Collection[str]: ...

    def why_not(self, call: Call, *, platform: str, what: str) -> str | None:
        """None, or why it cannot compute `what` of the call, whose operands may be avals.

        `what` is "forward", "backward", or one of the methods that it has besides.
        """

    def forward(self, call: Call) -> tuple[Any, ...]:
        """out as stored, softmax max and softmax sum `*B N Sq`; and rounding like out if `problem.saves_rounding`."""

    def backward(self, call: Call, saved: Saved) -> Operands:
        """The gradients `call.gradient_names`, in the shapes `call.gradient_shape` and the dtypes of the operands."""

    def notes(self, call: Call) -> tuple[str, ...]:
        """What `explain` says of a call that it serves, one sentence each."""


_backends: list[Backend] = [cpu.backend, mosaic.backend, ascend.backend, xla.backend]
# JAX's own platforms that need a lowering rule of their own; the default rule serves every other.
PLATFORMS = ("cpu",)


def register(backend: Backend, before: str = "xla") -> None:
    """Adds a backend, which then is preferred to the one named `before` wherever both serve a call.

    Programs that JAX has compiled already keep the backend they were compiled with.

    Args:
      backend: an object of the `Backend` protocol.
      before: the name of a backend.

    Raises:
      TypeError: something that is not a backend.
      ValueError: a name that is taken, or `before` names no backend.
    """
    if not isinstance(backend, Backend) or isinstance(backend, type):
        wanted = "name, platforms, emulated_on, why_not, forward, backward and notes"
        raise TypeError(f"backend must be an object with {wanted}; got {arguments.shown(backend)}.")
    if backend.name in names():
        raise ValueError(f"backend must have a name of its own; got {backend.name!r}, which is taken.")
    if before not in names():
        raise ValueError(f"before must be one of {', '.join(map(repr, names()))}; got {before!r}.")
    _backends.insert(names().index(before), backend)


@contextlib.contextmanager
def registered(backend: Backend, before: str = "xla") -> Iterator[None]:
    """A context in which a backend is registered: for tests. Trace and compile what is to use it inside."""
    register(backend, before)
    try:
        yield
    finally:
        _backends.remove(backend)


def every() -> tuple[Backend, ...]:
    """All backends, in the order of preference."""
    return tuple(_backends)


# What callers may know backends as.
_BEST = " None takes the best backend of the platform that a program is compiled for"
_ADVICE = {
    "cudnn": f"{_BEST}: on NVIDIA GPUs 'mosaic' or 'xla'. dot_product_attention alone takes 'cudnn', which is jax.nn's.",
    **dict.fromkeys(
        ("gpu", "cuda", "mosaic_gpu", "triton", "pallas"), f"{_BEST}: on NVIDIA GPUs 'mosaic' or 'xla'."
    ),
    **dict.fromkeys(("tpu", "rocm"), f"{_BEST}: there 'xla'."),
    **dict.fromkeys(("npu", "cann"), f"{_BEST}: on Ascend 'ascend'."),
    "native": f"{_BEST}: on CPU 'cpu'.",
}
_WRITTEN = {"cpu": "CPU", "cuda": "CUDA"}


def names() -> tuple[str, ...]:
    return tuple(backend.name for backend in _backends)


def chosen(implementation: Implementation) -> tuple[str | None, Any]:
    """(name, options) of what `implementation=` was given; ValueError for what names no backend.

    Every entry asks, so this is where values of environment variables that cannot be meant are told, too.
    """
    variables.check()
    if implementation is None:
        return None, None
    name: Any
    if isinstance(implementation, str):
        name, options = implementation, None
    else:  # an options object says in its class which backend it is for
        name, options = getattr(type(implementation), "backend", None), implementation
    if name in names():
        return name, options
    allowed = f"None or one of {', '.join(map(repr, names()))}"
    if not isinstance(implementation, str):
        allowed += ", or the Options of one of them"
    advice = _ADVICE.get(implementation, "") if isinstance(implementation, str) else ""
    if isinstance(implementation, type) and getattr(implementation, "backend", None) in names():
        advice = f" Pass an object of this class: {implementation.__name__}(...)."
    raise ValueError(f"implementation must be {allowed}; got {arguments.shown(implementation)}.{advice}")


_WHAT = {
    "paged": "paged attention",
    "backward": "the gradient of this call",
    "tangent": "the tangent (jvp) of this call",
    "second": "the second derivative of this call",
}


def reasons(platform: str, call: AnyCall, what: str = "forward") -> dict[str, str | None]:
    """For every backend by name: None if it can serve this call on the platform, or why not."""
    found: dict[str, str | None] = {}
    call = call if what == "paged" else call.without_sinks()
    for backend in _backends:
        if not hasattr(backend, what):
            found[backend.name] = f"does not compute {_WHAT.get(what, 'derivatives of this order')}: xla does"
            continue
        serves = backend.platforms is None or platform.lower() in backend.platforms
        if not serves and platform.lower() not in backend.emulated_on:
            where = ", ".join(_WRITTEN.get(served, served) for served in backend.platforms or ())
            found[backend.name] = f"runs on {where} only, not on {_WRITTEN.get(platform, platform)}"
        else:
            why = None if what == "paged" else _why_no_functions(backend, call)
            found[backend.name] = why or backend.why_not(call, platform=platform, what=what)
    return found


def _why_no_functions(backend: Backend, call: Call) -> str | None:
    if not call.problem.functions:
        return None
    if hasattr(backend, "why_no_functions"):
        return backend.why_no_functions(call)
    return f"does not support {call.problem.names_of_functions}: xla does"


def choose(platform: str, call: AnyCall, what: str = "forward") -> Backend:
    """The first backend that can serve the call, or the one it names; NotImplementedError with every reason."""
    found = reasons(platform, call, what)
    if (name := best(found, call, what)) is not None:
        if call.problem.strict and name == xla.backend.name:
            _refuse_fallback(platform, call, what, found)
        return named(name)
    implementation = call.problem.implementation
    listed = "; ".join(f"{name}: {why}" for name, why in found.items() if implementation in (None, name))
    which = _WHAT.get(what, "this call")
    who = f"implementation={implementation!r} cannot" if implementation else "No backend can"
    raise NotImplementedError(f"{who} serve {which} on platform {platform!r}. {listed}.")


def _refuse_fallback(platform: str, call: AnyCall, what: str, found: dict[str, str | None]) -> None:
    """Raises where another backend than the portable one was asked for, or is native to the platform."""
    asked = call.problem.implementation
    if asked == xla.backend.name:
        return
    native = {b.name for b in _backends if b.platforms is not None and platform.lower() in b.platforms}
    others = native if asked is None else {asked}
    if why := "; ".join(f"{name}: {reason}" for name, reason in found.items() if name in others):
        which = _WHAT.get(what, "this call")
        raise NotImplementedError(
            f"jax_fa is strict (jax_fa.strict, JAX_FA_STRICT) and {which} would fall back to xla on platform "
            f"{platform!r}. {why}."
        )


def best(found: dict[str, str | None], call: AnyCall, what: str) -> str | None:
    """Of the `reasons`, the name of the backend that runs; None: none does."""
    asked = call.problem.implementation
    if asked is not None and what != "paged" and not hasattr(named(asked), what):
        asked = xla.backend.name  # which supplies the derivatives that others lack
    return next((name for name, why in found.items() if why is None and asked in (None, name)), None)


def named(name: str) -> Backend:
    return next(backend for backend in _backends if backend.name == name)


def notes(name: str | None, call: AnyCall) -> tuple[str, ...]:
    """What the backend of that name says of a call that it serves."""
    return () if name is None else named(name).notes(call)
