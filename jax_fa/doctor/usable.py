"""Which devices are there, and which backends can be used on them."""

import os
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp

import jax_fa
from jax_fa import explanation
from jax_fa.backends import cpu, every, native
from jax_fa.backends.ascend import installation
from jax_fa.doctor.findings import Section

DTYPES = ("float32", "bfloat16")  # whose results are checked
_SERVABLE = (*DTYPES, "float16", "float64")
# Devices as files of the system, and what JAX lacks where it does not see them.
_HARDWARE = {
    "/dev/nvidia0": ("cuda", 'an NVIDIA GPU: python -m pip install "jax[cuda13]"'),
    "/dev/davinci0": ("ascend", "an Ascend device: install its JAX plugin, and register its platform"),
}


def devices() -> Section:
    """Those that JAX has, and what the CPU kernels chose."""
    found = Section("Devices")
    kinds = Counter(f"{device.platform} ({device.device_kind})" for device in jax.devices())
    found.add("JAX has", *(f"{count} x {kind}" for kind, count in kinds.items()))
    found.add("processors", _processors())
    if native.extension is not None:
        sets = native.extension.instruction_sets()
        found.add(
            "instruction sets",
            ", ".join(f"{isa}{'' if there else ' (not here)'}" for isa, there in sets.items()),
        )
        found.add("CPU kernels", cpu.tuning() or "none")
    for file, (platform, what) in _HARDWARE.items():
        if Path(file).exists() and platform not in here():
            found.hints.append(f"The system has {file}, and JAX does not see it. For {what}.")
    return found


def _processors() -> str:
    count = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    return f"{count}" if allowed == count else f"{count}, of which this process may use {allowed}"


def here() -> tuple[str, ...]:
    """JAX's default platform, and CPU, which is always there."""
    return tuple(dict.fromkeys((explanation.here(), "cpu")))


def serving(platform: str, dtype: str) -> dict[str, str | None]:
    """For every backend None if it serves a plain call there, or why not."""
    x = jax.ShapeDtypeStruct((1, 128, 4, 64), jnp.dtype(dtype))
    return jax_fa.explain(x, x, x, entry="flash_attention", platforms=platform).reasons[platform]


def backends() -> Section:
    """Each with the dtypes that it serves on each platform here, or why it serves none."""
    found = Section("Backends")
    for backend in every():
        served, why_not = _served(backend.name)
        for platform, dtypes in served.items():
            found.add(backend.name, f"usable on {platform}: {', '.join(dtypes)}")
        if not served:
            found.add(backend.name, f"not here: {why_not}")
    searched = installation.library()
    if searched.error is not None:
        found.add("CANN", searched.error)
        if os.environ.get("JAX_FA_CANN_PATH"):
            found.hints.append("JAX_FA_CANN_PATH is set, and no CANN runtime that can be used is there.")
    else:
        where = "emulator" if searched.emulator else "library"
        found.add(
            "CANN", f"{where} {searched.long or searched.short}, functions {', '.join(searched.functions)}"
        )
    return found


def _served(name: str) -> tuple[dict[str, list[str]], str]:
    """By platform the dtypes that the backend serves; and why it does not serve the last that it does not."""
    served: dict[str, list[str]] = {}
    why_not = ""
    # float64 is one of JAX's with jax_enable_x64 alone.
    dtypes = [dtype for dtype in _SERVABLE if jax.dtypes.canonicalize_dtype(dtype) == dtype]
    for platform in here():
        for dtype in dtypes:
            if (why := serving(platform, dtype)[name]) is None:
                served.setdefault(platform, []).append(dtype)
            else:
                why_not = why
    return served, why_not
