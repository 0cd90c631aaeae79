"""The environment variables `JAX_FA_*` that are read when programs run: what each may be, and typos."""

import difflib
import os
import warnings
from collections.abc import Callable, Iterator

from jax_fa.backends import native

_PREFIX = "JAX_FA_"
# Read when the package is built, or by the emulator of CANN.
_ELSEWHERE = ("JAX_FA_NATIVE", "JAX_FA_EMULATOR_LEAKS")


def _instruction_set(text: str) -> str | None:
    if native.extension is None or native.extension.instruction_sets().get(text):
        return None
    there = (isa for isa, works in native.extension.instruction_sets().items() if works)
    return f"one of the instruction sets that this machine has: {', '.join(there)}"


def _caches(text: str) -> str | None:
    parts = text.split(",")
    right = len(parts) == 3 and all(part.isdecimal() and int(part) > 0 for part in parts)
    return None if right else "bytes of the first, second and third cache, such as 32768,524288,16777216"


def _one_of(*allowed: str) -> Callable[[str], str | None]:
    return lambda text: None if text in allowed else f"one of {', '.join(allowed)}"


def _directory(text: str) -> str | None:
    return None if os.path.isdir(text) else "a directory that exists"


def _any(text: str) -> str | None:
    return None


# For each what a value must be that it is not; None: it is right. What is empty is not set.
_CHECKS: dict[str, Callable[[str], str | None]] = {
    "JAX_FA_CANN_ABI": _one_of("long", "short"),
    "JAX_FA_CANN_EMULATOR": _directory,
    "JAX_FA_CANN_PATH": _any,  # what is there is said where CANN is searched
    "JAX_FA_CPU_CACHES": _caches,
    "JAX_FA_CPU_ISA": _instruction_set,
    "JAX_FA_STRICT": _one_of("0", "1"),
}


def given() -> dict[str, str]:
    """Those that are set, by name."""
    return {name: text for name in _CHECKS if (text := os.environ.get(name))}


def wrong() -> Iterator[str]:
    """What is wrong with values that are set: a sentence for each."""
    for name, text in given().items():
        if (wanted := _CHECKS[name](text)) is not None:
            yield f"the environment variable {name} must be {wanted}; got {text!r}."


def unknown() -> Iterator[str]:
    """A sentence for each variable that nothing reads: a typo."""
    for name in sorted(os.environ):
        if name.startswith(_PREFIX) and name not in (*_CHECKS, *_ELSEWHERE):
            near = difflib.get_close_matches(name, _CHECKS, n=1)
            meant = f"did you mean {near[0]}?" if near else f"those there are: {', '.join(_CHECKS)}."
            yield f"jax_fa reads no environment variable {name}; {meant}"


def check() -> None:
    """Raises ValueError for the first value that is wrong."""
    for sentence in wrong():
        raise ValueError(sentence)


for _sentence in unknown():
    warnings.warn(_sentence, stacklevel=2)
