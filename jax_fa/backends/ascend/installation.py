"""CANN as this process sees it: which library, which functions, which platforms call it."""

import atexit
import functools
import importlib.util
import os
import pkgutil
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jax_fa import compat
from jax_fa.backends import native
from jax_fa.backends.ascend.plugins import register_with_plugin

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


@functools.cache
def library() -> Library:
    """Loads CANN, on the first call of the process, and says what was found. Raises nothing.

    The search order stands in docs/ascend.md.
    """
    if native.extension is None:
        return Library(native.absence(), None, None, None, None, False, (), ())
    found = native.extension.cann_library()
    given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in found.items()}
    return Library(**given)


def here() -> Library | None:
    """The library of this machine, or None where there is none (programs are then lowered for another one)."""
    found = library()
    return None if found.error is not None else found


def absence() -> str | None:
    """Why this process cannot call CANN at all, in one sentence; None where it can."""
    if native.extension is None:
        return native.absence()
    has_cann = getattr(
        native.extension, "has_cann", lambda: True
    )  # extensions of before this function had it
    return None if has_cann() else "the native extension was built without the CANN adapter (Linux only)"


def emulated() -> bool:
    """Whether this process was told to call an emulator."""
    return bool(os.environ.get(EMULATOR))


def emulator_dir() -> str:
    """The directory with the CANN emulator that was installed with this package.

    Set `JAX_FA_CANN_EMULATOR` to it (before the first call) and `implementation="ascend"` runs on CPU, through
    the same custom calls and the same C++ as on an Ascend device. For tests and porting; it is slow.

    Raises:
      RuntimeError: the package was installed without its native parts.
    """
    path = Path(__file__).parent.parent.parent / "emulator"
    if not (path / "libopapi.so").exists():
        reason = f"{path} is not there; reinstall with a C++17 compiler at hand"
        raise RuntimeError(
            f"the CANN emulator is not installed: {native.absence() if native.missing else reason}"
        )
    return str(path)


def release() -> None:
    """Waits for this library's own streams and frees them and all workspaces kept for coming calls.

    Call it while nothing is running. On an Ascend device XLA allocates the workspaces where it can, so that there
    is usually nothing to free.
    """
    if native.extension is not None:
        native.extension.cann_release()


def register_platform(name: str) -> None:
    """Makes a platform name one of Ascend's, beside "ascend" and "npu", whatever their case.

    Programs lowered for that platform may then call CANN, and the custom calls are registered with the
    platform's plugin (now, or when it appears).

    Args:
      name: the name that `jax.devices()[0].platform` or `lowering_platforms=` gives, and the plugin's name in
        `jax.ffi.register_ffi_target`. Names that JAX itself uses are refused.

    Raises:
      ValueError: not a name, or one of JAX's own platforms.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name must be the name of a platform, such as 'ascend'; got {name!r}.")
    if name.lower() in ("cpu", "gpu", "cuda", "rocm", "tpu", "metal", "oneapi"):
        raise ValueError(f"name must not be a platform of JAX itself; got {name!r}.")
    if name.lower() not in platforms:
        platforms.append(name.lower())
    _register_device_calls(dict.fromkeys((name, name.upper())))


def _register_device_calls(names) -> None:
    if native.extension is None:
        return
    for target, handler in native.extension.ascend_registrations(False).items():
        for name in names:
            register_with_plugin(target, handler, name, _warn)


def _warn(target: str, platform: str, error: Exception) -> None:
    warnings.warn(
        f"jax_fa could not register its custom call {target!r} with the plugin of platform {platform!r}: "
        f"{type(error).__name__}: {error}. Programs for that platform that use implementation='ascend' will "
        "not run there; implementation='xla' does.",
        RuntimeWarning,
        stacklevel=3,
    )


def _release_at_exit() -> None:
    # An emulator may count what is left. On a device, work of others may still be queued.
    if emulated():
        release()


def _register() -> None:
    if native.extension is not None:
        atexit.register(_release_at_exit)
        for target, handler in native.extension.ascend_registrations(True).items():
            jax.ffi.register_ffi_target(target, handler, platform="cpu")
    for target in (FORWARD, BACKWARD):
        compat.guarantee_custom_call(target)
    if _plugin_is_installed():
        _register_device_calls(["ASCEND"])


def _plugin_is_installed() -> bool:
    """Whether a plugin of one of Ascend's names is there to be loaded by JAX, or is loaded."""
    found = {entry.name for entry in metadata.entry_points(group="jax_plugins")}
    if (namespace := importlib.util.find_spec("jax_plugins")) is not None:
        found |= {module.name for module in pkgutil.iter_modules(namespace.submodule_search_locations)}
    return any(name in plugin.lower() for plugin in found for name in platforms)


_register()
