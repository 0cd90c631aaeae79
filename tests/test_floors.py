"""Imports only point down: every room has a floor, and imports from lower ones only. Inside a floor there is no cycle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import jax_fa

ROOT = Path(jax_fa.__file__).parent
# A name is a module or a package; the most exact one counts.
FLOORS = [
    {
        "arguments",
        "checks",
        "compat",
        "call",
        "indices",
        "dropout",
        "softmax",
        "masks",
        "flex",
        "cann.spec",
        "paged.call",
        "_native",
    },
    {"backends"},
    {"sharding", "primitives"},
    {"attention", "rules"},
    {"entry"},
    {"api", "cann"},
    {"sequence_parallel", "paged"},
    {"explanation"},
    {""},  # jax_fa/__init__.py: public names only
    {"testing"},
    {"demo", "bench", "doctor", "integrations", "__main__"},
]
# Modules of JAX that only some files may touch.
PRIVATE = {
    "jax._src": {"jax_fa.compat"},
    "jax.interpreters": {"jax_fa.compat", "jax_fa.primitives", "jax_fa.rules", "jax_fa.paged.primitive"},
}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module(path): path for path in sorted(ROOT.rglob("*.py"))}


def _imports(tree: ast.AST, module: str, package: bool) -> set[str]:
    """Every module a file names in an import, in functions too; `from x import y` is x.y if that is a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + package]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in FILES or not base.startswith("jax_fa") else base)
    return found


def _of(module: str) -> set[str]:
    path = FILES[module]
    return _imports(ast.parse(path.read_text()), module, path.name == "__init__.py")


def _floor(module: str) -> int | None:
    parts = module.split(".")[1:]
    names = [".".join(parts[:i]) for i in range(len(parts), 0, -1)] or [""]
    return next((floor for name in names for floor, rooms in enumerate(FLOORS) if name in rooms), None)


def test_every_file_has_a_floor():
    assert [module for module in FILES if _floor(module) is None] == []


def _ours(module: str) -> set[str]:
    return {name for name in _of(module) if name.split(".")[0] == "jax_fa"}


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module):
    wrong = {name for name in _ours(module) if _floor(name) > _floor(module)}
    assert not wrong, (
        f"{module} (floor {_floor(module)}) imports { ({name: _floor(name) for name in wrong}) }"
    )


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_a_floor_has_no_cycle(floor):
    inside = {module for module in FILES if _floor(module) == floor}
    TopologicalSorter({module: _ours(module) & inside for module in inside}).prepare()


@pytest.mark.parametrize("module", FILES)
def test_private_modules_of_jax_stay_in_one_place(module):
    for private, allowed in PRIVATE.items():
        used = {name for name in _of(module) if f"{name}.".startswith(f"{private}.")}
        assert not used or module in allowed, f"{module} touches {used}; only {allowed} may"


@pytest.mark.parametrize(
    ("source", "module", "package", "found"),
    [
        ("import jax_fa.masks as m", "jax_fa.api", False, {"jax_fa.masks"}),
        ("from jax_fa import masks, __version__", "jax_fa.api", False, {"jax_fa.masks", "jax_fa"}),
        ("from jax_fa.masks import Band", "jax_fa.api", False, {"jax_fa.masks"}),
        ("from jax_fa.backends import xla", "jax_fa.api", False, {"jax_fa.backends.xla"}),
        ("from . import masks", "jax_fa.api", False, {"jax_fa.masks"}),
        ("from .masks import Band", "jax_fa.api", False, {"jax_fa.masks"}),
        ("from . import xla", "jax_fa.backends", True, {"jax_fa.backends.xla"}),
        ("from ..masks import Band", "jax_fa.backends.xla", False, {"jax_fa.masks"}),
        ("def f():\n  from jax._src import core", "jax_fa.api", False, {"jax._src.core"}),
    ],
)
def test_the_reader_of_imports(source, module, package, found):
    assert _imports(ast.parse(source), module, package) == found
