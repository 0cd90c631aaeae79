"""Where it runs: paths, the device, versions, and what a plain product and a plain copy reach there."""

import importlib
import importlib.util
import os
import platform
import subprocess
import sys
import types
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "torch", "tokamax", "numpy")
# Wanted by tokamax for benchmarks of its own, at import. Where they are missing, empty modules will do.
ONLY_IMPORTED = ("xprof", "xprof.cli", "xprof.cli.tools", "tensorboardX")


def prepare(wheels: Path | None, unpacked: Path, rehearse: bool, processes: int) -> None:
    """Puts the library and wheels on the path. Before JAX is imported.

    `processes` share the device's memory.
    """
    if importlib.util.find_spec("jax_fa") is None:
        sys.path.insert(0, str(ROOT))
    if rehearse:
        os.environ["JAX_PLATFORMS"] = "cpu"
        fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        os.environ["XLA_FLAGS"] = f"{fast} {os.environ.get('XLA_FLAGS', '')}"
    # PyTorch lives in the same process and needs memory of its own.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.7 / processes:.3f}")
    folders = (ROOT, ROOT.parent) if wheels is None else (wheels,)
    for wheel in sorted(path for folder in folders for path in folder.glob("*.whl") if path.is_file()):
        # Unpacked, since data files and extension modules cannot be used from inside an archive; behind all that is
        # installed, which wins.
        folder = unpacked / wheel.stem
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        sys.path.append(str(folder))
    importlib.invalidate_caches()


_failed: dict[str, str] = {}


def load(name: str) -> tuple[Any, str | None]:
    """(the module, None) or (None, why it cannot be had)."""
    if name == "tokamax":
        _stand_in()
    if name not in _failed:
        try:
            return importlib.import_module(name), None
        except Exception as error:  # a peer may fail in any way of its own
            _failed[name] = f"{name} cannot be imported: {first_line(error)}"
    return None, _failed[name]


def _stand_in() -> None:
    for name in ONLY_IMPORTED:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
    tools: Any = sys.modules["xprof.cli.tools"]
    if not hasattr(tools, "get_kernel_stats_tool"):
        tools.get_kernel_stats_tool = None


def first_line(error: BaseException) -> str:
    lines = [text for text in str(error).strip().split("\n") if text.strip()] or [""]
    # An assertion of NumPy says what in its second line.
    text = " ".join(lines[:3]) if isinstance(error, AssertionError) else lines[0]
    return f"{type(error).__name__}: {text}"[:300]


def versions() -> dict[str, str | None]:
    found = {"python": platform.python_version(), "jax_fa": _commit()}
    return found | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    import jax_fa

    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    if Path(jax_fa.__file__).is_relative_to(ROOT) and (ROOT / ".git").exists():
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            return f"{jax_fa.__version__} at {found.stdout.strip()}"
        except (OSError, subprocess.SubprocessError):
            pass
    return f"{jax_fa.__version__}, commit not known"


def driver() -> str:
    """What the driver says of the device."""
    query = "name,driver_version,clocks.max.sm,clocks.max.mem,memory.total,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi is not there ({type(error).__name__})"


def max_hertz(described: str) -> float | None:
    """The highest clock of the multiprocessors, from `driver()`."""
    fields = [field.strip() for field in described.split("\n")[0].split(",")]
    return float(fields[2].removesuffix(" MHz")) * 1e6 if len(fields) > 2 and "MHz" in fields[2] else None
