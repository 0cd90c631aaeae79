"""Where it runs: the processor, what was chosen for it, and the versions of all that takes part."""

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import jax_fa
from cpu import limits
from jax_fa.backends import cpu
from jax_fa.bench import record

PACKAGES = ("jax", "jaxlib", "numpy", "torch")


def describe() -> dict[str, Any]:
    return {
        "processor": record.cpu_model(),
        "architecture": platform.machine(),
        "cores": limits.THREADS,
        "caches": caches(),
        "instruction_set": cpu.instruction_set(),
        "tuning": cpu.tuning(),
        "versions": {"python": platform.python_version(), "jax_fa": jax_fa.__version__}
        | {name: _version(name) for name in PACKAGES},
    }


def file_name(found: dict[str, Any]) -> str:
    """Of the file of results of a machine and an instruction set. The caches tell processors apart that give the same name."""
    caches = " ".join(f"{size}k" for size in found["caches"].values())
    text = f"{found['processor']} {caches} {found['instruction_set']}".lower()
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-") + ".json"


def caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """KiB of the caches that hold data, where Linux says so."""
    found = {}
    for index in sorted(folder.glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found["L1d" if level == "1" else f"L{level}"] = int(size.removesuffix("K"))
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
