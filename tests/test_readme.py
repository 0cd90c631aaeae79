"""The README and the documents are true: their examples run, and the README gives the two commands."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from jax_fa.backends import cpu as native

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted(ROOT.glob("docs/*.md"))]


def _blocks(language: str, document: Path = README) -> list[tuple[int, str]]:
    """(first line, text) of a document's code blocks in a language."""
    text = document.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def _runs_here(block: str) -> bool:
    """Whether what an example needs is there: the native extension, and libraries that its first line names."""
    if native.missing is not None and any(word in block for word in ("emulator", "jax_fa_ascend")):
        return False
    needs = re.match(r"# needs: (.+)", block)
    return needs is None or all(map(find_spec, needs[1].split(", ")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_examples_run(document, tmp_path):
    """One after another in a fresh process, with the defaults a reader has, warnings as errors."""
    program = ""
    for line, block in _blocks("python", document):
        if not _runs_here(block):
            continue
        program += "\n" * (line - program.count("\n")) + block  # so that errors name the document's own lines
    file = tmp_path / "examples.py"
    file.write_text(program, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "JAX_FA_CANN_EMULATOR"}
    command = [sys.executable, "-W", "error", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if document == README:
        best = "cpu" if native.missing is None else "xla"
        assert f"cpu: {best}" in done.stdout  # explain's table


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "benchmarks/README.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    """The generator of the documents checks those among the documents, and their anchors."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if not (document.parent / link).exists()]
    assert missing == []


def test_every_notebook_is_listed():
    sources = sorted(path.stem for path in ROOT.glob("notebooks/src/*.py"))
    listed = re.findall(
        r"^\| \[(\w+)\]\(\1\.ipynb\) \|", (ROOT / "notebooks/README.md").read_text(), re.MULTILINE
    )
    assert listed == sources and len(sources) >= 5


def test_examples_show_every_entry():
    shown = "".join(block for _, block in _blocks("python"))
    for entry in ("dot_product_attention", "flash_attention", "flash_attention_score", "explain"):
        assert f"jax_fa.{entry}(" in shown


def test_two_commands():
    """One installs and runs the main job, one installs what the tests need and passes them."""
    commands = [line for _, block in _blocks("sh") for line in block.splitlines()]
    assert len(commands) == 2
    assert all(command.startswith("python -m pip install ") for command in commands)
    assert "python -P -m jax_fa" in commands[0]
    assert "python -P -m pytest" in commands[1]  # what is tested is what was installed
