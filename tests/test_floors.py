"""Imports only point down: every file has a floor, and imports files of lower floors only."""

import ast
from pathlib import Path

import pytest

import jax_fa

ROOT = Path(jax_fa.__file__).parent
FLOORS = [
    {"problem", "compat", "gather", "integers", "arguments", "native", "program", "_native"},
    {"segments", "packed"},
    {"masks", "softmax", "dropout", "ascend.installation", "mosaic", "mosaic.widths"},
    {"tiles", "mosaic.tuning", "mosaic.memory"},
    {"mosaic.geometry", "mosaic.launch"},
    {"mosaic.logits", "mosaic.operands"},
    {"mosaic.careful"},
    {"mosaic.rows"},
    {"mosaic.forward", "mosaic.query_gradient", "mosaic.key_gradient", "mosaic.bias_gradient"},
    {"backends.xla", "backends.cpu", "backends.mosaic", "request", "pse", "sparse", "partition"},
    {"ascend", "ascend.layout", "ascend.modes", "ascend.drop", "ascend.shift"},
    {"ascend.sequences"},
    {"ascend.request"},
    {"ascend.split"},
    {"ascend.call"},
    {"backends.ascend"},  # what CANN does not compute, the portable backend does
    {"backends"},
    {"primitives"},
    {"attention"},
    {"api", "cann", "ring"},
    {"explanation"},
    {""},  # jax_fa/__init__.py: public names only
    {"demo.baseline", "demo.colours", "demo.gpt"},
    {"demo.checks", "demo.race"},
    {"demo.report"},
    {"demo"},
    {"__main__"},
    {"integrations.jax_nn"},
    {"integrations"},
    {"integrations.flax", "integrations.equinox", "integrations.haiku"},
    {"bench.shapes"},
    {"bench.contestants"},
    {"bench.measure"},
    {"bench.record"},
    {"bench.report"},
    {"bench"},
    {"bench.__main__"},
]
FLOOR = {f"jax_fa.{name}".rstrip("."): floor for floor, names in enumerate(FLOORS) for name in names}
# Modules of JAX that only some files may touch.
PRIVATE = {"jax._src": {"jax_fa.compat"}, "jax.interpreters": {"jax_fa.compat", "jax_fa.primitives"}}


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


def test_every_file_has_a_floor():
    assert sorted(set(FILES) - set(FLOOR)) == []


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module):
    ours = {name for name in _of(module) if name.split(".")[0] == "jax_fa"}
    wrong = {name for name in ours if FLOOR[name] >= FLOOR[module]}
    assert not wrong, f"{module} (floor {FLOOR[module]}) imports { ({name: FLOOR[name] for name in wrong}) }"


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
