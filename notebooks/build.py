"""Runs the notebooks from their sources and writes them with outputs; with --check, compares and writes nothing.

    python notebooks/build.py [NAME ...]
    python notebooks/build.py --check [NAME ...]

`src/NN_name.py` (jupytext's percent format) is the truth; `NN_name.ipynb` is made from it. A NAME may be short:
`01` is `01_equivalence`; without names, all. Needs the extra `notebooks`, and runs the jax_fa that is installed.
"""

import argparse
import hashlib
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

try:
    import jupytext
    import matplotlib.font_manager  # noqa: F401 - made here once, its cache is no news in a cell's output
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError
    from nbformat import NotebookNode
except ImportError as error:
    sys.exit(f"notebooks/build.py needs the extra: python -m pip install '.[notebooks]' ({error}).")

HERE = Path(__file__).resolve().parent
MAX_SECONDS = 120
MAX_BYTES = 400_000
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# What a kernel reads at its start; a profile of the user's own does not count. Figures are white, also on a dark page.
PROFILE = """\
c.InlineBackend.figure_formats = {"png"}
c.InlineBackend.rc = {"figure.dpi": 90, "savefig.dpi": 90, "figure.facecolor": "white"}
c.IPKernelApp.log_level = 40
"""
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # what is printed is a CPU's
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # the debugger has an opinion on frozen modules
}


class NotebookError(Exception):
    """A notebook is not as it should be; the message says how."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="notebooks/build.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="01_equivalence, or 01; default: all")
    parser.add_argument("--check", action="store_true", help="run and compare, write nothing")
    args = parser.parse_args(arguments)
    refused = 0
    for source in _sources(args.names, parser):
        start = time.monotonic()
        try:
            done = check(source) if args.check else build(source)
        except NotebookError as why:
            refused += 1
            done = f"FAILED: {why}"
        print(f"{source.stem}: {time.monotonic() - start:.1f} s, {done}", flush=True)
    return 1 if refused else 0


def build(source: Path) -> str:
    """Runs a source and writes its notebook; says what was written."""
    notebook = run(source)
    text = _text(notebook)
    if len(text) > MAX_BYTES:
        raise NotebookError(
            f"the notebook would have {len(text)} bytes; at most {MAX_BYTES}. Fewer or smaller plots."
        )
    path = _path(source)
    path.write_bytes(text)
    return f"wrote {path.name} ({len(text) / 1000:.0f} kB)"


def check(source: Path) -> str:
    """Runs a source and compares it with the notebook on disk."""
    notebook = run(source)
    path = _path(source)
    if not path.exists():
        raise NotebookError(f"there is no {path.name}. Run notebooks/build.py {source.stem}.")
    found = nbformat.read(path, as_version=4)
    again = f"Run notebooks/build.py {source.stem} again."
    if len(found.cells) != len(notebook.cells):
        raise NotebookError(
            f"{path.name} has {len(found.cells)} cells, its source {len(notebook.cells)}. {again}"
        )
    for number, (ours, theirs) in enumerate(zip(notebook.cells, found.cells, strict=True)):
        if any(ours[key] != theirs[key] for key in ("cell_type", "id", "source")):
            raise NotebookError(f"cell {number} of {path.name} is not that of its source. {again}")
        if ours.get("outputs") and not theirs.get("outputs"):
            raise NotebookError(f"cell {number} of {path.name} has no outputs. {again}")
        _check_outputs(number, theirs)
    if path.stat().st_size > MAX_BYTES:
        raise NotebookError(f"{path.name} has {path.stat().st_size} bytes; at most {MAX_BYTES}. {again}")
    return f"{path.name} is up to date"


def run(source: Path) -> NotebookNode:
    """The notebook of a source, with outputs, from a fresh kernel in an empty directory."""
    notebook = _read(source)
    with tempfile.TemporaryDirectory() as home:
        work = Path(home, "work")  # not the checkout, which must not be on the kernel's path
        work.mkdir()
        profile = Path(home, "ipython", "profile_default")
        profile.mkdir(parents=True)
        (profile / "ipython_kernel_config.py").write_text(PROFILE)
        environment = {**os.environ, **ENVIRONMENT, "IPYTHONDIR": str(profile.parent)}
        _execute(notebook, work, environment)
    notebook.metadata = NotebookNode(METADATA)  # the kernel adds its version
    for number, cell in enumerate(notebook.cells):
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = _tidy(cell.outputs)
            _check_outputs(number, cell)
    return notebook


def _execute(notebook: NotebookNode, work: Path, environment: dict[str, str]) -> None:
    # No kernel directories: the kernel is this interpreter's, whatever else is installed under its name.
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    deadline = time.monotonic() + MAX_SECONDS
    client = NotebookClient(
        notebook,
        km=manager,
        record_timing=False,
        resources={"metadata": {"path": str(work)}},
        timeout_func=lambda cell: max(1, int(deadline - time.monotonic())),
    )
    late = f"ran past {MAX_SECONDS} s"
    try:
        client.execute(env=environment)
    except CellTimeoutError as error:
        raise NotebookError(late) from error
    except CellExecutionError as error:
        traceback = re.sub(r"\x1b\[[\d;]*m", "", str(error))
        raise NotebookError(f"cell {_failing(notebook)} raises\n{traceback}") from error
    if time.monotonic() > deadline:
        raise NotebookError(late)


def _failing(notebook: NotebookNode) -> int:
    for number, cell in enumerate(notebook.cells):
        if any(output.output_type == "error" for output in cell.get("outputs", ())):
            return number
    return -1


def _read(source: Path) -> NotebookNode:
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = NotebookNode()
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        # Of the text, so that a new cell does not rename those after it.
        name = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        seen[name] += 1
        cell.id = name if seen[name] == 1 else f"{name}-{seen[name]}"
    return notebook


def _tidy(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Joins pieces of a stream, which come as the kernel flushes, and drops what changes from run to run."""
    tidy: list[NotebookNode] = []
    for output in outputs:
        last = tidy[-1] if tidy else None
        if output.output_type == "stream" and last is not None and last.get("name") == output.name:
            last.text += output.text
            continue
        if "image/png" in output.get("data", {}):
            output.data.pop("text/plain", None)  # <Figure size ...>
            output.metadata = NotebookNode()
        tidy.append(output)
    return tidy


def _check_outputs(number: int, cell: NotebookNode) -> None:
    for output in cell.get("outputs", ()):
        if output.output_type == "error":
            raise NotebookError(f"cell {number} holds an error: {output.ename}: {output.evalue}")
        if output.get("name") == "stderr":
            raise NotebookError(
                f"cell {number} writes to stderr; a notebook shows no warnings:\n{output.text}"
            )


def _text(notebook: NotebookNode) -> bytes:
    nbformat.validate(notebook)
    return (nbformat.writes(notebook).rstrip("\n") + "\n").encode()


def _path(source: Path) -> Path:
    return HERE / f"{source.stem}.ipynb"


def _sources(names: list[str], parser: argparse.ArgumentParser) -> list[Path]:
    sources = sorted((HERE / "src").glob("[0-9][0-9]_*.py"))
    if not names:
        return sources
    chosen = []
    for name in names:
        stem = Path(name).stem
        found = [source for source in sources if stem in (source.stem, source.stem[:2])]
        if not found:
            parser.error(f"NAME must be one of {', '.join(s.stem for s in sources)}; got {name!r}.")
        chosen += found
    return chosen


if __name__ == "__main__":
    sys.exit(main())
