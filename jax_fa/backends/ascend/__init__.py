"""The Ascend backend, and what its users call: where CANN was found, platform names, the emulator. See docs/ascend.md."""

from jax_fa.backends.ascend.backend import backend
from jax_fa.backends.ascend.installation import Library, emulator_dir, library, release
from jax_fa.backends.ascend.options import Options
from jax_fa.backends.ascend.plugins import register_platform

__all__ = ["Library", "Options", "backend", "emulator_dir", "library", "register_platform", "release"]
