"""Handing the custom calls to JAX plugins for Ascend, which may be here, come later, or never come.

Importing jax_fa changes nothing in jaxlib, unless a plugin of one of Ascend's names is installed. Where one is, and where
`register_platform` names a platform, `xla_client.register_custom_call_handler` is wrapped: a plugin calls it to declare
how it takes custom calls, and is handed ours at that moment. Any other plugin for a platform of Ascend's is handed them
when the first program is lowered for that platform.

A plugin's refusal is a warning: an error would be raised while JAX starts the plugin, which then has no devices.
"""

import functools
import importlib.util
import pkgutil
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
from jaxlib import xla_client

from jax_fa.backends import native
from jax_fa.backends.ascend import installation

_handed: set[str] = set()  # the plugins' own names of their platforms


def register_platform(name: str) -> None:
    """Makes a platform name one of Ascend's, beside "ascend" and "npu", in any case of letters.

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
    if name.lower() not in installation.platforms:
        installation.platforms.append(name.lower())
    _watch()
    register_with_present(name)


def register_at_import() -> None:
    for name in tuple(installation.platforms):
        register_with_present(name)
    if _plugin_is_installed():
        _watch()


def register_with_present(platform: str) -> None:
    """Hands the custom calls to the plugin of a platform, if both are here and it does not have them yet."""
    name = platform.lower()
    if name not in installation.platforms:
        return
    for plugin, handler in list(getattr(xla_client, "_custom_callback_handler", {}).items()):
        if plugin.lower() == name:
            _hand_over(plugin, handler)


@functools.cache
def _watch() -> None:
    """Hands the custom calls to plugins that appear from now on."""
    register = xla_client.register_custom_call_handler

    @functools.wraps(register)
    def register_and_hand_over(platform: str, handler: Callable[..., Any]) -> None:
        register(platform, handler)
        register_with_present(platform)

    xla_client.register_custom_call_handler = register_and_hand_over


def _hand_over(plugin: str, handler: Callable[..., Any]) -> None:
    if plugin in _handed or installation.absence() is not None:
        return
    _handed.add(plugin)
    for target, function in native.extension.ascend_registrations(False).items():
        try:
            try:
                jax.ffi.register_ffi_target(target, function, platform=plugin)
            except TypeError:  # a plugin of before custom calls had traits takes one argument less
                handler(target, function, plugin, 1)
        except Exception as error:
            _warn(target, plugin, error)


def _warn(target: str, plugin: str, error: Exception) -> None:
    warnings.warn(
        f"jax_fa could not register its custom call {target!r} with the plugin of platform {plugin!r}: "
        f"{type(error).__name__}: {error}. Programs for that platform that use implementation='ascend' will "
        "not run there; implementation='xla' does.",
        RuntimeWarning,
        stacklevel=2,
    )


def _plugin_is_installed() -> bool:
    """Whether a plugin of one of Ascend's names is there to be loaded by JAX."""
    found = {entry.name for entry in metadata.entry_points(group="jax_plugins")}
    namespace = importlib.util.find_spec("jax_plugins")
    if namespace is not None and namespace.submodule_search_locations is not None:
        found |= {module.name for module in pkgutil.iter_modules(namespace.submodule_search_locations)}
    return any(name in plugin.lower() for plugin in found for name in installation.platforms)


register_at_import()
