"""Rules of the source that are counted: long signatures once, short functions, few files, a light import."""

import ast
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jax_fa

ROOT = Path(jax_fa.__file__).parent
FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}
# Rooms beside the core: backends, CANN, and what builds on the library.
ROOMS = {
    "ascend",
    "backends",
    "bench",
    "cann",
    "demo",
    "doctor",
    "flex",
    "explanation",
    "integrations",
    "mosaic",
    "paged",
    "primitives",
    "sequence_parallel",
    "sharding",
    "testing",
}
LONG_SIGNATURE, SHARED = 10, 8  # parameters
LINES = 60  # of a function
CORE_FILES = 20
IMPORT_SECONDS = 0.25  # on top of JAX


def _functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(file:line name, its node) of every function, inner ones too."""
    found = []
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append((f"{name}:{node.lineno} {node.name}", node))
    return found


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> frozenset[str]:
    given = node.args
    return frozenset(a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)) - {"self", "cls"}


def _is_entry(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """An entry of ours, or the public function of an integration: its signature is that of the other library."""
    if name.startswith("integrations/") and not node.name.startswith("_"):
        return True
    return any(ast.unparse(decorator).split(".")[-1] == "entry" for decorator in node.decorator_list)


def test_no_long_signature_is_spelt_twice():
    """Pass a `Call` on instead. Two entries may share names: each is what its callers write."""
    long = {
        name: (_parameters(node), _is_entry(name, node))
        for name, node in _functions()
        if len(_parameters(node)) >= LONG_SIGNATURE
    }
    assert sum(entry for _, entry in long.values()) >= 3  # the public functions have them
    twice = [
        f"{a} and {b} share {len(long[a][0] & long[b][0])} parameters"
        for a, b in itertools.combinations(long, 2)
        if len(long[a][0] & long[b][0]) >= SHARED and not (long[a][1] and long[b][1])
    ]
    assert not twice, "\n".join(twice)


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Decorators included, the docstring not; what is inside another function counts for both."""
    first = min(n.lineno for n in (node, *node.decorator_list))
    text = node.body[0] if ast.get_docstring(node) is not None else None
    return node.end_lineno - first + 1 - (text.end_lineno - text.lineno + 1 if text else 0)


def test_functions_are_short():
    lines = {name: _lines(node) for name, node in _functions()}
    long = {name: n for name, n in lines.items() if n > LINES}
    assert not long, "\n".join(f"{name}: {n} lines" for name, n in sorted(long.items()))


def test_the_core_has_few_files():
    core = [name for name in FILES if Path(name).parts[0].removesuffix(".py") not in ROOMS]
    assert len(core) <= CORE_FILES, f"{len(core)} files: {', '.join(core)}"


# --- import


def _python(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own, which imports the library that is tested here."""
    start = f"import sys; sys.path.insert(0, {str(ROOT.parent)!r}); "
    # Without bytecode, which an installed package has, an import is mostly compilation.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-P", *arguments[:-1], "-c", start + arguments[-1]],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done


def _own_seconds() -> float:
    """What the modules of the library themselves take, once JAX is there."""
    told = _python("-X", "importtime", "import jax; import jax_fa").stderr
    rows = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+jax_fa(?:\.\S+)?$", told, re.MULTILINE)
    assert rows
    return sum(map(int, rows)) / 1e6


def test_the_import_is_light():
    """The best of three: others use this machine, too."""
    seconds = [_own_seconds()]
    while seconds[-1] >= IMPORT_SECONDS and len(seconds) < 3:
        seconds.append(_own_seconds())
    assert min(seconds) < IMPORT_SECONDS, seconds


def test_the_import_brings_nothing_that_it_does_not_need():
    """Neither what only tests and benchmarks use, nor optional libraries."""
    rooms = sorted(f"jax_fa.{room}" for room in ("bench", "demo", "doctor", "integrations", "testing"))
    optional = ["equinox", "flax", "haiku", "keras", "matplotlib", "tqdm"]
    _python(f"import jax_fa; found = set({rooms + optional}) & set(sys.modules); assert not found, found")


@pytest.mark.parametrize("module", ["jaxlib.xla_client", "jax.ffi", "jax"])
def test_the_import_changes_no_module_of_jax(module):
    """Attributes are the same objects before and after; a package may get submodules."""
    _python(
        f"import jax, jax.ffi, jaxlib.xla_client; module = sys.modules[{module!r}]; before = dict(vars(module)); "
        "import jax_fa; after = vars(module); names = before.keys() | after.keys(); "
        "changed = [n for n in names if before.get(n) is not after.get(n)]; "
        "changed = [n for n in changed if f'{module.__name__}.{n}' not in sys.modules]; assert not changed, changed"
    )


def test_the_oracles_import_nothing_of_the_library():
    for name in ("oracle", "cann_oracle"):
        source = FILES[f"testing/{name}.py"].read_text()
        assert not re.search(r"^\s*(import|from)\s+(jax_fa|\.)", source, re.MULTILINE)
