"""The README is true: its examples run, and it gives the two commands."""

import re
import subprocess
import sys
from pathlib import Path

from jax_fa.backends import cpu as native

README = Path(__file__).parents[1] / "README.md"


def _blocks(language: str) -> list[tuple[int, str]]:
    """(first line, text) of the README's code blocks in a language."""
    text = README.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def test_examples_run(tmp_path):
    """One after another in a fresh process, with the defaults a reader has, warnings as errors."""
    program = ""
    for line, block in _blocks("python"):
        program += "\n" * (line - program.count("\n")) + block  # so that errors name the README's own lines
    file = tmp_path / "readme.py"
    file.write_text(program, encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "error", file], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    best = "cpu" if native.missing is None else "xla"
    assert f"cpu: {best}" in done.stdout  # explain's table


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
