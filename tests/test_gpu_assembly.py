"""`benchmarks/gpu_assembly.py`: what it reads from ptxas, and what it says where something is missing."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

from gpu import assembler  # noqa: E402

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : (C7509) Potential Performance Loss: wgmma.mma_async instructions are serialized due to loops
ptxas info    : Compiling entry function 'entry_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for entry_mosaic_gpu_kernel
    16 bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""


def test_the_words_of_ptxas():
    found = assembler.read(LOG.format(spill=12))
    assert (found.registers, found.stack_bytes, found.spill_bytes) == (168, 16, 24)
    (warning,) = found.warnings
    assert warning.startswith("Potential Performance Loss: wgmma.mma_async")
    assert not found.ok and assembler.read(LOG.format(spill=0)).ok


def test_instructions_are_counted():
    code = "\n\t.target\n /*14e0*/  HGMMA.64x128x16.F32 R24 ;\n /*14f0*/  STL [R1], R0 ;\n HGMMA.64x64 ;\n"
    found = assembler.Assembled(sass=code)
    assert [found.count(name) for name in ("HGMMA", "STL", "LDL")] == [2, 1, 0]
    assert assembler.Assembled().count("HGMMA") is None


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", BENCHMARKS / "gpu_assembly.py", *arguments]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_what_is_missing_is_one_sentence(tmp_path):
    done = _run("--plugin", str(tmp_path))
    assert (done.returncode, done.stderr) == (2, "")
    if jax.__version_info__[:2] < (0, 11):
        assert (
            done.stdout
            == f"The kernels need jax 0.11 or newer, and that Python 3.12; this is jax {jax.__version__}.\n"
        )
    else:
        assert done.stdout.startswith(
            f"jax-cuda13-pjrt is not in {tmp_path}: pip install --no-deps jax-cuda13-"
        )
        assert done.stdout.count("\n") == 1


def _plugin(folder: Path, version: str) -> Path:
    """A folder as `pip install --target` leaves it, with empty files."""
    files = {
        "jax_cuda13_pjrt": "jax_plugins/xla_cuda13/xla_cuda_plugin.so",
        "jax_cuda13_plugin": "jax_cuda13_plugin/libmosaic_gpu_runtime.so",
    }
    for name, file in files.items():
        information = folder / f"{name}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        )
        (information / "RECORD").write_text(f"{file},,\n")
        (folder / file).parent.mkdir(parents=True)
        (folder / file).touch()
    return folder


def test_a_plugin_of_another_version(tmp_path):
    with pytest.raises(
        assembler.MissingError, match=r"jax-cuda13-pjrt 0\.1 is in .*, but jax is 0\.2: pip install"
    ):
        assembler.find(tmp_path, _plugin(tmp_path, "0.1"), "0.2")


def test_without_cuda_or_a_compiler(tmp_path, monkeypatch):
    plugin = _plugin(tmp_path, "0.2")
    monkeypatch.setattr(assembler, "_cuda", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(assembler.MissingError, match="cc is not on the path: a C compiler is needed"):
        assembler.find(tmp_path, plugin, "0.2")
    monkeypatch.undo()
    monkeypatch.setattr(assembler, "PTXAS", "bin/no-such-assembler")
    with pytest.raises(
        assembler.MissingError, match=r"no-such-assembler .* are not here: pip install nvidia-cuda-nvcc"
    ):
        assembler.find(tmp_path, plugin, "0.2")


def test_a_kernel_that_breaks_the_compiler_is_an_error(tmp_path):
    """The process that compiles may die in any way; here the plugin is no library at all."""
    tools = assembler.Tools(
        plugin=tmp_path / "plugin.so", environment=dict(os.environ), folder=tmp_path, driver=tmp_path / "none"
    )
    found = assembler.assemble(tools, b"module")
    assert not found.ok and "cannot open shared object file" in found.error
