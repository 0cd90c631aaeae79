"""README and documentation are true: their examples run, and the README gives the two commands."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from tables import mostly_slow

from jax_fa import bench, demo, doctor
from jax_fa.backends import native

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*.md"))]


def _blocks(language: str, document: Path = README) -> list[tuple[int, str]]:
    """(first line, text) of a document's code blocks in a language."""
    text = document.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def _commands() -> list[list[str]]:
    """The words of every command line that a document shows in a block, `$ ` and comments left out."""
    documents = [*DOCUMENTS, ROOT / "benchmarks/README.md", ROOT / "notebooks/README.md"]
    blocks = [block for path in documents for kind in ("sh", "console") for _, block in _blocks(kind, path)]
    lines = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]
    return [
        shlex.split(line.removeprefix("$ "), comments=True)
        for line in lines
        if re.match(r"(\$ )?(python|export) ", line)
    ]


def _is_here(requirement: str) -> bool:
    """Of a library, as `flax`, or one of at least some version, as `jax>=0.11`."""
    name, _, oldest = requirement.partition(">=")
    if find_spec(name) is None:
        return False
    return not oldest or [int(n) for n in version(name).split(".")[:2]] >= [int(n) for n in oldest.split(".")]


def _runs_here(block: str) -> bool:
    """Whether what an example needs is there: the native extension, and libraries that its first line names."""
    if native.missing is not None and any(word in block for word in ("emulator", "jax_fa_ascend")):
        return False
    needs = re.match(r"# needs: (.+)", block)
    return needs is None or all(map(_is_here, needs[1].split(", ")))


WITH_EXAMPLES = [path for path in DOCUMENTS if _blocks("python", path)]


# A process for each page: of most, slow tests, which CI runs with the documentation.
_FIRST = [README, *(path for path in WITH_EXAMPLES if path.name == "index.md")]


@pytest.mark.parametrize("document", mostly_slow(_FIRST, of=WITH_EXAMPLES), ids=lambda path: path.name)
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
    environment["NPROC"] = "16"  # for Pallas' interpreter, whose threads block those of XLA
    command = [sys.executable, "-W", "error", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if document == README:
        best = "cpu" if native.missing is None else "xla"
        assert re.search(rf"^ +cpu +{best}", done.stdout, re.MULTILINE)  # explain's table


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "benchmarks/README.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    """The generator of the documents checks those among the documents, and their anchors."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if not (document.parent / link).exists()]
    assert missing == []


def _anchors(document: Path) -> set[str]:
    """Of headings, as GitHub makes them; the generator makes one dash where GitHub makes several or drops a dot."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_anchors_are_those_of_github_too(document):
    links = re.findall(r"\]\(([\w/-]+\.md)#([^)]+)\)", document.read_text(encoding="utf-8"))
    missing = [(link, anchor) for link, anchor in links if anchor not in _anchors(document.parent / link)]
    assert missing == []


def test_commands_of_ours_take_these_arguments():
    """Long ones are not run here; but their arguments must be those that the program takes."""
    parsers = {"jax_fa.bench": bench._parser(), "jax_fa": demo._parser(), "jax_fa doctor": doctor._parser()}
    found = set()
    for words in _commands():
        if words[0] == "python" and "-m" in words and words[words.index("-m") + 1] in parsers:
            module, *arguments = words[words.index("-m") + 1 :]
            if arguments[:1] == ["doctor"]:
                module, arguments = f"{module} doctor", arguments[1:]
            parsers[module].parse_args(arguments)
            found.add(module)
    assert found == parsers.keys()


def test_commands_install_extras_that_exist():
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    named = {x for words in _commands() for word in words for x in re.findall(r"^\.\[(.+)\]$", word)}
    assert named and {x for names in named for x in names.split(",")} <= extras.keys()


@pytest.mark.skipif(native.missing is not None, reason="the emulator comes with the native extension")
def test_the_command_that_finds_the_emulator(tmp_path):
    (block,) = [block for _, block in _blocks("sh", ROOT / "docs/ascend.md") if "emulator_dir" in block]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    shell = ["sh", "-ec", f'{block}\ntest -f "$JAX_FA_CANN_EMULATOR/libopapi.so"']
    done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_notebook_is_listed():
    sources = sorted(path.stem for path in ROOT.glob("notebooks/src/*.py"))
    listed = re.findall(
        r"^\| \[(\w+)\]\(\1\.ipynb\) \|", (ROOT / "notebooks/README.md").read_text(), re.MULTILINE
    )
    assert listed == sources and len(sources) >= 5


def test_examples_show_every_entry():
    def shown(document):
        return "".join(block for _, block in _blocks("python", document))

    for entry in ("dot_product_attention", "flash_attention", "explain"):
        assert f"jax_fa.{entry}(" in shown(README)
    for entry in ("flash_attention_score", "npu_fusion_attention", "npu_fusion_attention_grad"):
        assert f".{entry}(" in shown(ROOT / "docs/migrate-torch-npu.md")


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= 800


def test_pictures_are_those_of_the_masks():
    """`python -P docs/draw_masks.py` draws them anew."""
    spec = spec_from_file_location("draw_masks", ROOT / "docs/draw_masks.py")
    assert spec is not None and spec.loader is not None
    drawing = module_from_spec(spec)
    spec.loader.exec_module(drawing)
    for name, text in drawing.pictures().items():
        assert (ROOT / "docs/images" / name).read_text(encoding="utf-8") == text, name


def test_two_commands():
    """One installs and runs the main job, one installs what the tests need and passes them."""
    commands = [line for _, block in _blocks("sh") for line in block.splitlines()]
    assert len(commands) == 2
    assert all(command.startswith("python -m pip install ") for command in commands)
    assert "python -P -m jax_fa" in commands[0]
    assert "python -P -m pytest" in commands[1]  # what is tested is what was installed
