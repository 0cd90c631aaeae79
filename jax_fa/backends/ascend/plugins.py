"""Handing FFI handlers to plugins of JAX that may be there, come later, or never come.

This is the one place that changes something in jaxlib: the function by which a plugin takes handlers, once there is a
plugin to expect (see `installation`).
"""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
from jaxlib import xla_client

Refused: TypeAlias = Callable[[str, str, Exception], None]
_registered: dict[tuple[str, str], Refused] = {}


def register_with_plugin(target: str, handler, platform: str, refused: Refused) -> None:
    """Registers an FFI handler for a platform whose plugin may be there, come later, or never come.

    `refused(target, platform, error)` hears of a plugin that does not take it. That error rises neither here nor in
    the plugin's own start, where it would take the plugin's devices away.
    """
    _registered[target, platform] = refused
    _guard_late_plugins()
    try:
        jax.ffi.register_ffi_target(target, handler, platform=platform)
    except Exception as error:  # of a plugin that came before the guard below
        plugin = xla_client._custom_callback_handler[platform]
        _offer_again(plugin, (target, handler, platform, 1), error)


def _offer_again(plugin, arguments: tuple, error: Exception) -> None:
    """A plugin of before custom calls had traits takes one argument less; any other refusal is reported."""
    target, _, platform, *_ = arguments
    try:
        if not isinstance(error, TypeError):
            raise error
        plugin(*arguments[:4])
    except Exception as last:
        _registered[target, platform](target, platform, last)


@functools.cache
def _guard_late_plugins() -> None:
    """JAX hands what was registered early to a plugin when that appears: there, a refusal must not rise."""
    register = xla_client.register_custom_call_handler

    @functools.wraps(register)
    def register_guarded(platform: str, handler):
        def guarded(*arguments):
            try:
                return handler(*arguments)
            except Exception as error:
                if (arguments[0], arguments[2]) not in _registered:
                    raise
                _offer_again(handler, arguments, error)

        return register(platform, guarded)

    xla_client.register_custom_call_handler = register_guarded
