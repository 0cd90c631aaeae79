"""The backends, best first, and the choice among them.

A backend is a module with
    name: str                       what `implementation=` calls it
    platforms: sequence | None      lower-case platforms it serves (but see ON_CPU_TOO); None: all
    why_not(problem, operands, *, platform, backward)
                                    None, or why it cannot serve this call (operands may be avals)
    forward(problem, operands)      -> out, softmax max, softmax sum; and rounding if problem.saves_rounding
    backward(problem, operands, saved) -> Operands of gradients
    notes(problem, operands)        optional: what `explain` says of a call that it serves, one sentence each
where forward and backward are plain traceable functions.
"""

from types import ModuleType

from jax_fa import arguments
from jax_fa.backends import ascend, cpu, mosaic, xla
from jax_fa.problem import Operands, Problem

BACKENDS: tuple[ModuleType, ...] = (cpu, mosaic, ascend, xla)
# Served by a backend of another platform through an emulator or interpreter of it; that backend itself says whether.
ON_CPU_TOO = ("ascend", "mosaic")
# JAX's own platforms that need a lowering rule of their own; the default rule serves every other.
PLATFORMS = ("cpu",)


# What callers may know backends as.
_BEST = " None takes the best backend of the platform that a program is compiled for"
_ADVICE = {
    "cudnn": f"{_BEST}: on NVIDIA GPUs 'mosaic' or 'xla', and no cuDNN.",
    **dict.fromkeys(
        ("gpu", "cuda", "mosaic_gpu", "triton", "pallas"), f"{_BEST}: on NVIDIA GPUs 'mosaic' or 'xla'."
    ),
    **dict.fromkeys(("tpu", "rocm"), f"{_BEST}: there 'xla'."),
    **dict.fromkeys(("npu", "cann"), f"{_BEST}: on Ascend 'ascend'."),
    "native": f"{_BEST}: on CPU 'cpu'.",
}
_WRITTEN = {"cpu": "CPU", "cuda": "CUDA"}


def names() -> tuple[str, ...]:
    return tuple(backend.name for backend in BACKENDS)


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for a name that is no backend."""
    if implementation is None or (isinstance(implementation, str) and implementation in names()):
        return
    allowed = f"None or one of {', '.join(map(repr, names()))}"
    advice = _ADVICE.get(implementation, "") if isinstance(implementation, str) else ""
    raise ValueError(f"implementation must be {allowed}; got {arguments.shown(implementation)}.{advice}")


def reasons(
    platform: str, problem: Problem, operands: Operands, backward: bool = False
) -> dict[str, str | None]:
    """For every backend by name: None if it can serve this call on the platform, or why not."""
    found: dict[str, str | None] = {}
    for backend in BACKENDS:
        serves = backend.platforms is None or platform.lower() in backend.platforms
        if not serves and not (platform == "cpu" and backend.name in ON_CPU_TOO):
            where = ", ".join(_WRITTEN.get(served, served) for served in backend.platforms)
            found[backend.name] = f"runs on {where} only, not on {_WRITTEN.get(platform, platform)}"
        else:
            found[backend.name] = backend.why_not(problem, operands, platform=platform, backward=backward)
    return found


def choose(platform: str, problem: Problem, operands: Operands, backward: bool = False) -> ModuleType:
    """The first backend that can serve the call, or the one it names; NotImplementedError with every reason."""
    found = reasons(platform, problem, operands, backward)
    for backend in BACKENDS:
        wanted = problem.implementation in (None, backend.name)
        if wanted and found[backend.name] is None:
            return backend
    listed = "; ".join(
        f"{name}: {why}" for name, why in found.items() if problem.implementation in (None, name)
    )
    what = "the gradient of this call" if backward else "this call"
    who = f"implementation={problem.implementation!r} cannot" if problem.implementation else "No backend can"
    raise NotImplementedError(f"{who} serve {what} on platform {platform!r}. {listed}.")


def notes(name: str | None, problem: Problem, operands: Operands) -> tuple[str, ...]:
    """What the backend of that name says of a call that it serves."""
    for backend in BACKENDS:
        if backend.name == name and hasattr(backend, "notes"):
            return backend.notes(problem, operands)
    return ()
