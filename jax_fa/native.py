"""Why the compiled extension is not here, and what to do about it."""

from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

_PACKAGE = Path(__file__).parent
_ROOT = _PACKAGE.parent


def absence(error: str) -> str:
    """One sentence for the error that importing `jax_fa._native` raised."""
    if not _is_source_tree():
        return f"the native extension is not installed ({error}); reinstall with a C++17 compiler at hand"
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
