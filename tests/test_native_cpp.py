"""The C++ tests of the native kernels and of the adapter to CANN: builds them as a project of their own and runs them."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

pytestmark = pytest.mark.cpp
CC = Path(__file__).parent.parent / "cc"
COMPILERS = (os.environ.get("CXX", "c++"), "g++", "clang++")
HEADERS = sorted(str(path.relative_to(CC)) for path in CC.rglob("*.h"))
CROSS = ("aarch64-linux-gnu-g++", "qemu-aarch64")  # Debian: g++-aarch64-linux-gnu, qemu-user
ON_ARM = platform.machine() in ("aarch64", "arm64")
CPUINFO = Path("/proc/cpuinfo")
# AMX is tested where the processor has it, elsewhere its arithmetic in plain C++.
HAS_AMX = CPUINFO.exists() and "amx_bf16" in CPUINFO.read_text()

if shutil.which("cmake") is None:
    pytest.skip("needs cmake, which is not installed", allow_module_level=True)
if not any(map(shutil.which, COMPILERS)):
    pytest.skip(f"needs a C++ compiler; none of {', '.join(COMPILERS)} is installed", allow_module_level=True)


def _run(*command, **environment: str) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def _build(directory: Path, **options: str) -> Path:
    _run(
        "cmake",
        "-S",
        CC / "tests",
        "-B",
        directory,
        f"-DJAX_FA_EMULATE_AMX={'OFF' if HAS_AMX else 'ON'}",
        f"-DJAX_FA_XLA_INCLUDE={'' if 'CMAKE_TOOLCHAIN_FILE' in options else jax.ffi.include_dir()}",
        *(f"-D{name}={value}" for name, value in options.items()),
    )
    _run("cmake", "--build", directory, "--parallel", os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "4"))
    return directory / "kernel_test"


def _run_emulated(directory: Path, mode: str) -> str:
    for tool in CROSS:
        if shutil.which(tool) is None:
            pytest.skip(f"needs {' and '.join(CROSS)}; {tool} is not installed")
    toolchain = str(CC / "tests/aarch64.cmake")
    program = _build(directory, CMAKE_TOOLCHAIN_FILE=toolchain, JAX_FA_CANN="OFF", JAX_FA_WERROR="ON")
    found = _run(CROSS[1], "-L", "/usr/aarch64-linux-gnu", program, mode)
    assert found.startswith("neon portable")
    return found


def _run_cann(directory: Path, mode: str, **environment: str) -> str:
    """The adapter to CANN against the emulator of the same build."""
    return _run(
        directory / "cann_test", mode, JAX_FA_CANN_EMULATOR=str(directory / "emulator"), **environment
    )


def _shared_code(directory: Path) -> list[str]:
    """Symbols of the kernels that a linker merges with those of other files, by name."""
    objects = sorted(directory.rglob("kernel_*.cc.o")) + sorted(directory.rglob("kernel_*.cc.obj"))
    objects = [o for o in objects if o.name.split(".")[0] != "kernel_test"]
    assert objects
    found = []
    for path in objects:
        for line in _run("nm", "--format=posix", path).splitlines():
            symbol = re.match(r"(\S+) [WVu]\b", line)
            if symbol and symbol[1] != "DW.ref.__gxx_personality_v0":  # a pointer, the same for every set
                found.append(f"{path.name}: {symbol[1]}")
    return found


@pytest.mark.parametrize("header", HEADERS)
def test_header_is_complete(header):
    """It can be parsed alone, with no flags of an instruction set, as editors and linters do."""
    flags = ("-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-psabi", "-I", CC, "-I", CC / "tests")
    flags += ("-isystem", jax.ffi.include_dir())  # of XLA, for what handlers have in common
    compilers = ("g++", "clang++")
    if ON_ARM != ("simd_neon" in header):
        if ON_ARM and re.search("simd_(avx|amx)", header):
            pytest.skip("of another processor")
        compilers = compilers if ON_ARM else CROSS[:1]
    if not any(map(shutil.which, compilers)):
        pytest.skip(f"needs {' or '.join(compilers)}, which is not installed")
    for compiler in filter(shutil.which, compilers):
        _run(compiler, *flags, "-include", header, "-x", "c++", os.devnull)


def test_quick(tmp_path):
    program = _build(tmp_path)
    found = _run(program, "quick")
    print(found, _run(program, "random", 0, 50), _run(tmp_path / "ffi_test", 3000))
    sets = found.split("(")[0].split()
    assert platform.system() != "Linux" or ("amx_bf16" in sets) == ("avx512_bf16" in sets)
    print(_run_cann(tmp_path, "quick"))
    if shutil.which("nm"):
        assert _shared_code(tmp_path) == []


def test_neon_emulated(tmp_path):
    """The kernels for AArch64, built by a cross compiler, in an emulator of the processor."""
    print(_run_emulated(tmp_path, "sample"))


@pytest.mark.slow
def test_neon_emulated_quick(tmp_path):
    print(_run_emulated(tmp_path, "emulated"))


@pytest.mark.slow
def test_full(tmp_path):
    print(_run(_build(tmp_path, JAX_FA_WERROR="ON"), "full"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, which is not installed")
def test_no_shared_code_without_optimization(tmp_path):
    _build(tmp_path, CMAKE_BUILD_TYPE="Debug")
    assert _shared_code(tmp_path) == []


@pytest.mark.slow
def test_address_and_undefined_sanitizers(tmp_path):
    program = _build(tmp_path, JAX_FA_SANITIZE="address,undefined")
    options = {"UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    print(_run(program, "sanitized", **options))
    print(_run(tmp_path / "ffi_test", "20000", **options))
    print(_run_cann(tmp_path, "quick", **options))


@pytest.mark.slow
def test_thread_sanitizer(tmp_path):
    program = _build(tmp_path, JAX_FA_SANITIZE="thread")
    print(_run(program, "threads", TSAN_OPTIONS="halt_on_error=1"))
    print(_run_cann(tmp_path, "threads", TSAN_OPTIONS="halt_on_error=1"))
