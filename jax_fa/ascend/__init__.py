"""Running on Huawei Ascend: where CANN was found, platform names, the emulator. See docs/ascend.md."""

from jax_fa.ascend.installation import Library, emulator_dir, library, register_platform, release

__all__ = ["Library", "emulator_dir", "library", "register_platform", "release"]
