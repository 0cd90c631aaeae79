"""The backends, best first, and the choice among them.

A backend is a module with
    name: str                       what `implementation=` calls it
    platforms: tuple | None         lower-case platforms it can serve; None: all
    why_not(problem, operands)      None, or why it cannot serve this call (operands may be avals)
    forward(problem, operands)      -> out, softmax max, softmax sum
    backward(problem, operands, out, m, l, dout, dlogsumexp) -> Operands of gradients
where forward and backward are plain traceable functions.
"""

from types import ModuleType

from jax_fa.backends import cpu, xla
from jax_fa.problem import Operands, Problem

BACKENDS: tuple[ModuleType, ...] = (cpu, xla)
# Known names that this version does not bring yet, so that asking for one gets a reason and not a riddle.
PLANNED = {
    "mosaic": "the Pallas Mosaic GPU kernel is not part of this version",
    "ascend": "the CANN adapter is not part of this version",
}
# Platforms that need a lowering rule of their own; the default rule serves every other.
PLATFORMS = tuple(sorted({p for backend in BACKENDS for p in backend.platforms or ()}))


def names() -> tuple[str, ...]:
    return tuple(backend.name for backend in BACKENDS)


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for a name that is no backend, NotImplementedError for one that is not here yet."""
    if implementation is None or implementation in names():
        return
    allowed = f"None or one of {', '.join(map(repr, names()))}"
    if implementation in PLANNED:
        raise NotImplementedError(
            f"implementation={implementation!r}: {PLANNED[implementation]}; use {allowed}."
        )
    raise ValueError(f"implementation must be {allowed}; got {implementation!r}.")


def reasons(platform: str, problem: Problem, operands: Operands) -> dict[str, str | None]:
    """For every backend by name: None if it can serve this call on the platform, or why not."""
    found: dict[str, str | None] = {}
    for backend in BACKENDS:
        if backend.platforms is not None and platform.lower() not in backend.platforms:
            found[backend.name] = f"runs on {', '.join(backend.platforms)} only, not on {platform}"
        else:
            found[backend.name] = backend.why_not(problem, operands)
    return found


def choose(platform: str, problem: Problem, operands: Operands) -> ModuleType:
    """The first backend that can serve the call, or the one it names; NotImplementedError with every reason."""
    found = reasons(platform, problem, operands)
    for backend in BACKENDS:
        wanted = problem.implementation in (None, backend.name)
        if wanted and found[backend.name] is None:
            return backend
    listed = "; ".join(
        f"{name}: {why}" for name, why in found.items() if problem.implementation in (None, name)
    )
    asked = f"implementation={problem.implementation!r}" if problem.implementation else "Any backend"
    raise NotImplementedError(f"{asked} cannot serve this call on platform {platform!r}. {listed}.")
