"""Strict mode: a fallback to the portable backend is an error.

Whether it holds is asked when an entry is traced, and is part of the call from then on: it is checked wherever and whenever
the call, or a derivative of it, is lowered.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import jax

from jax_fa import arguments

_BY_DEFAULT = os.environ.get("JAX_FA_STRICT") == "1"
_lock = threading.Lock()
# Part of the keys of jit's caches. Making one has JAX trace anew what it has traced before, so it waits for the first use.
_context: Any = None


def strict(enabled: bool = True) -> "contextlib._GeneratorContextManager[None]":
    """A context, or decorator, in which a call that would fall back to `xla` raises.

        with jax_fa.strict():
            step(model, batch)

    A call falls back where `xla` would compute it, or its gradient, tangent or second derivative, on a platform that has a
    native backend: CPU, CUDA and Ascend. It then raises `NotImplementedError` with the reasons that `explain` gives.
    `implementation="xla"` asks for it, and raises nothing; nor does any call on other platforms.

    It holds for the thread that enters it, and for calls that are traced inside, whenever they are lowered. It is part of
    the keys of jit's caches: a function that was traced outside is traced anew inside, and the other way round. What was
    compiled ahead of time or exported before stays as it is. `JAX_FA_STRICT=1` in the environment, read when jax_fa is
    imported, has the same effect everywhere but inside of `strict(False)`.

    Not fallbacks: what a native backend itself computes in plain JAX (the gradient of a bias on Ascend; see the notes of
    `explain`), and derivatives of the third order, which are the portable backend's on every platform.

    Args:
      enabled: False: fallbacks are allowed again.

    Raises:
      NotImplementedError: inside, by a call that would fall back.
      TypeError: enabled is no bool, as in `@strict` without parentheses.
    """
    return _strict(arguments.flag("enabled", enabled))


@contextlib.contextmanager
def _strict(enabled: bool) -> Iterator[None]:
    global _context
    with _lock:
        if _context is None:
            _context = jax.make_user_context(_BY_DEFAULT)
    with _context(enabled):
        yield


def active() -> bool:
    """Whether calls that are traced now are strict."""
    return _BY_DEFAULT if _context is None else _context.value
