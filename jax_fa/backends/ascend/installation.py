"""CANN as this process has it: which library and which functions, the emulator, and the platforms that call it."""

import atexit
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jax_fa import compat
from jax_fa.backends import native

EMULATOR = "JAX_FA_CANN_EMULATOR"
FORWARD, BACKWARD = "jax_fa_ascend_forward", "jax_fa_ascend_backward"
# Lower-case names of platforms that are Ascend. `register_platform` adds to it.
platforms: list[str] = ["ascend", "npu"]


@dataclass(frozen=True)
class Library:
    """What the CANN loader found.

    Attributes:
      error: None, or why there is no CANN to call: what was searched, in order.
      long: file with the built-in operator's functions (`aclnnFlashAttentionScore`, `...V2`, ...), or None.
      short: file with the large-head_dim operator (`aclnnFlashAttentionScoreWithLargeHeadDim`), or None.
      runtime, nnopbase: files of the runtime and of the operator base library.
      emulator: whether these are emulators that `JAX_FA_CANN_EMULATOR` names.
      functions: names of the operator functions found.
      notes: what was passed over, and why.
    """

    error: str | None
    long: str | None
    short: str | None
    runtime: str | None
    nnopbase: str | None
    emulator: bool
    functions: tuple[str, ...]
    notes: tuple[str, ...]

    def exports(self, *names: str) -> bool:
        return set(names) <= set(self.functions)


def absence() -> str | None:
    """Why this process cannot call CANN at all, in one sentence; None where it can."""
    if native.extension is None:
        return native.absence()
    if not hasattr(native.extension, "has_cann") or native.extension.has_cann():
        return None
    return "the native extension was built without the CANN adapter (Linux only)"


@functools.cache
def library() -> Library:
    """Loads CANN, on the first call of the process, and describes what was found. Raises nothing.

    docs/ascend.md gives the search order.
    """
    if (absent := absence()) is not None:
        return Library(absent, None, None, None, None, False, (), ())
    found = native.extension.cann_library()
    given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in found.items()}
    return Library(**given)


def here() -> Library | None:
    """The library of this machine, or None where there is none (programs are then lowered for another one)."""
    found = library()
    return None if found.error is not None else found


def emulated() -> bool:
    """Whether the environment names an emulator for this process."""
    return bool(os.environ.get(EMULATOR))


def emulator_dir() -> str:
    """The directory with the CANN emulator that was installed with this package.

    Set `JAX_FA_CANN_EMULATOR` to it (before the first call) and `implementation="ascend"` runs on CPU, through
    the same custom calls and the same C++ as on an Ascend device. For tests and porting; it is slow.

    Raises:
      RuntimeError: the package was installed without its native parts, or without the CANN adapter.
    """
    path = Path(__file__).parent.parent.parent / "emulator"
    if absence() is not None or not (path / "libopapi.so").exists():
        reason = absence() or f"{path} is not there; reinstall with a C++17 compiler at hand"
        raise RuntimeError(f"the CANN emulator is not installed: {reason}")
    return str(path)


def release() -> None:
    """Waits for this library's own streams and frees them and all workspaces kept for coming calls.

    Call it while nothing is running. On an Ascend device XLA allocates the workspaces where it can, so that there
    is usually nothing to free.

    Raises:
      jax.errors.JaxRuntimeError: what CANN refused to wait for or to free, after all else is freed.
    """
    if absence() is not None:
        return
    try:
        native.extension.cann_release()
    except RuntimeError as error:
        raise jax.errors.JaxRuntimeError(str(error)) from None


def _release_at_exit() -> None:
    # An emulator may count what is left. On a device, work of others may still be queued.
    if emulated():
        release()


def _register() -> None:
    """At import, so that exported programs find their targets in a process that traces none."""
    for target in (FORWARD, BACKWARD):
        compat.guarantee_custom_call(target)
    if absence() is None:
        atexit.register(_release_at_exit)
        for target, handler in native.extension.ascend_registrations(True).items():
            jax.ffi.register_ffi_target(target, handler, platform="cpu")


_register()
