"""What is installed, what the environment says, and where compiled programs are kept."""

import os
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import jax

import jax_fa
from jax_fa.backends import native
from jax_fa.backends import variables as ours
from jax_fa.doctor.findings import Section

_REQUIRED = ("jax", "jaxlib", "numpy", "jaxtyping")
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "jax-metal")
_HOSTS = ("flax", "equinox", "dm-haiku", "keras", "torch")
_THEIRS = ("JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "NPROC")


def versions() -> Section:
    """Of this package, of what it needs and of what it works with, with the place of each that may be doubted."""
    found = Section("Installed")
    found.add("jax_fa", f"{jax_fa.__version__}, from {Path(jax_fa.__file__).parent}")
    found.add("Python", f"{platform.python_version()}, {sys.executable}")
    found.add("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    for name in (*_REQUIRED, *_PLUGINS, *_HOSTS):
        if (version := _version(name)) is not None:
            found.add(name, version)
    if (jax_version := _version("jax")) is not None and jax_version != _version("jaxlib"):
        found.hints.append(f"jax is {jax_version} and jaxlib {_version('jaxlib')}: install the same of both.")
    _extension(found)
    return found


def _extension(found: Section) -> None:
    if native.extension is not None:
        found.add("compiled kernels", native.extension.__file__)
        return
    found.add("compiled kernels", "none")
    text = f"Without compiled kernels, calls on CPU run on xla, several times slower: {native.absence()}."
    broken = any(Path(jax_fa.__file__).parent.glob("_native*"))
    (found.wrong if broken else found.hints).append(text)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def variables() -> Section:
    """Variables that are set, of this package and of JAX; names and values that cannot be meant."""
    found = Section("Environment")
    theirs = {name: os.environ[name] for name in _THEIRS if os.environ.get(name)}
    for name, text in (ours.given() | theirs).items():
        found.add(name, text)
    if not found.rows:
        found.add("none", "of the variables that matter is set")
    found.wrong += [text[0].upper() + text[1:] for text in ours.wrong()]
    found.wrong += ours.unknown()  # which begin with the name of this package
    return found


def _writable(directory: Path) -> bool:
    """By trying: what a file system takes, permissions do not say."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def caches() -> Section:
    """JAX's cache of compiled programs."""
    found = Section("Compiled programs")
    directory: str | None = jax.config.values["jax_compilation_cache_dir"]
    if not directory:
        found.add("cache", "none: every process compiles anew (jax_compilation_cache_dir is not set)")
    elif "://" in directory:
        found.add("cache", f"{directory} (not looked at)")
    else:
        path = Path(directory)
        there = (
            path if path.exists() else next(parent for parent in path.absolute().parents if parent.exists())
        )
        right = there.is_dir() and _writable(there)
        found.add("cache", f"{directory} ({'writable' if right else 'not writable'})")
        if not right:
            found.wrong.append(
                f"JAX cannot write {directory}: set jax_compilation_cache_dir to another directory."
            )
    return found
