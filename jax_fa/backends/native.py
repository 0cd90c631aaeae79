"""The compiled extension, or why it is not here and what to do about it."""

import struct
import sys
import warnings
from dataclasses import fields
from importlib import import_module, metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from jax_fa.call import PLAIN_DIFFERENTIABLE, PLAIN_OPERANDS, Saved

ABI = 6  # of cc/operands.h: what handlers take in ways that names do not show
_PACKAGE = Path(__file__).parent.parent
_ROOT = _PACKAGE.parent


def _load() -> tuple[Any, str | None]:
    """An extension that is there and of no use is warned of: nobody installs that on purpose."""
    try:
        found, wrong = None, _cut_off()
        if wrong is None:
            found = import_module("jax_fa._native")
            wrong = _mismatch(found)
    except ModuleNotFoundError as error:
        return None, str(error)
    except ImportError as error:
        found, wrong = None, str(error)
    if wrong is None:
        return found, None
    warnings.warn(
        f"jax_fa runs without its compiled kernels: {wrong}. Reinstall jax_fa.", RuntimeWarning, stacklevel=2
    )
    return None, wrong


def _cut_off() -> str | None:
    """How the file ends before its ELF header says; None: it does not. The loader would die of that, by a signal."""
    file = next((f for suffix in EXTENSION_SUFFIXES if (f := _PACKAGE / f"_native{suffix}").is_file()), None)
    if file is None:
        return None
    with file.open("rb") as opened:
        header = opened.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
        return None
    (sections,) = struct.unpack_from("<Q", header, 40)  # e_shoff
    size_of_one, count = struct.unpack_from("<2H", header, 58)  # e_shentsize, e_shnum
    end, size = sections + size_of_one * count, file.stat().st_size
    return f"{file} is cut off: it has {size} bytes of at least {end}" if size < end else None


def _mismatch(extension: Any) -> str | None:
    """How it is not the one of this package: another version, or other arrays than Python sends; None: in no way."""
    wanted = {
        "version": sys.modules["jax_fa"].__version__,
        "abi": ABI,
        "operand_names": PLAIN_OPERANDS,
        "differentiable_operands": PLAIN_DIFFERENTIABLE,
        "second_names": (*PLAIN_DIFFERENTIABLE, "dout", "dlogsumexp"),
        "saved_names": tuple(f.name for f in fields(Saved)),
    }
    for name, want in wanted.items():
        got = getattr(extension, name)() if hasattr(extension, name) else None
        if got != want:
            return f"{extension.__file__} was built from other sources: its {name} is {got}, not {want}"
    return None


extension, missing = _load()  # the module `jax_fa._native`; None, and what the import said


def absence(error: str | None = None) -> str:
    """Why there are no compiled kernels, in one sentence; `error` is what the import said, None: that of this process."""
    if not _is_source_tree():
        return f"the native extension is not installed ({error or missing}); reinstall with a C++17 compiler at hand"
    source = f"jax_fa is imported from its source tree {_ROOT}, which holds no compiled kernels"
    if _is_installed():
        return f"{source}, in place of the installed package: start Python with -P, or in another directory"
    return (
        f"{source}: run `python -m pip install {_ROOT}`, then start Python with -P, or in another directory"
    )


def _is_source_tree() -> bool:
    sources = (_ROOT / "pyproject.toml", _ROOT / "cc" / "CMakeLists.txt")
    return all(path.is_file() for path in sources) and not any(
        (_PACKAGE / f"_native{suffix}").exists() for suffix in EXTENSION_SUFFIXES
    )


def _is_installed() -> bool:
    try:
        return bool(metadata.version("jax_fa"))
    except metadata.PackageNotFoundError:
        return False
