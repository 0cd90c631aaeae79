"""Assembles Mosaic GPU kernels where no GPU is, and reads what ptxas says of them.

The compiler of these kernels is part of JAX's CUDA plugin. Its entry for serialized modules (`MosaicGpuCompile`) makes
PTX, has ptxas assemble that for the chip the CUDA driver names, and loads the result; `libcuda.c` stands in for the
driver. Each module is compiled in a process of its own, since the compiler may abort. This file is that process too:

    python -P assembler.py PLUGIN DRIVER MODULE
"""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve()
PACKAGES = ("jax-cuda13-pjrt", "jax-cuda13-plugin")
PTXAS, LIBDEVICE = "bin/ptxas", "nvvm/libdevice/libdevice.10.bc"
DONE = "assembled"


class MissingError(Exception):
    """Something that assembling needs is not here; the message says what, and how to get it."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """Attributes:
    plugin: the library with the compiler.
    driver: the library that stands in for CUDA's driver.
    folder: where the compiler runs; `bin/nvdisasm` is in it if there is one.
    environment: in which it runs.
    """

    plugin: Path
    driver: Path
    folder: Path
    environment: dict[str, str]


@dataclass(kw_only=True)
class Assembled:
    """What ptxas says of a kernel; `registers` are those of a thread at the start, before warpgroups trade them."""

    registers: int = 0
    spill_bytes: int = 0  # stores and loads
    stack_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    sass: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and not self.spill_bytes

    def count(self, instruction: str) -> int | None:
        """How often an instruction stands in the machine code; None where that is not known."""
        return None if self.sass is None else len(re.findall(rf"\s{instruction}\b", self.sass))


# --- what is needed


def find(folder: Path, plugin: Path | None, jax_version: str) -> Tools:
    """Looks for everything and builds the driver in `folder`, which must exist as long as the tools are used."""
    files = _plugin_files(plugin, jax_version)
    cuda = _cuda()
    # Where XLA looks first for ptxas and libdevice (the default of --xla_gpu_cuda_data_dir).
    (folder / "cuda_sdk_lib").symlink_to(cuda)
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(folder),
        "MOSAIC_GPU_CUDA_ROOT": str(folder),  # where it looks for bin/nvdisasm
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_RUNTIME_LIB_PATH": str(files["libmosaic_gpu_runtime.so"]),
    }
    disassembler = shutil.which("nvdisasm", path=f"{cuda / 'bin'}{os.pathsep}{os.environ['PATH']}")
    if disassembler is not None:
        (folder / "bin").mkdir()
        (folder / "bin/nvdisasm").symlink_to(disassembler)
    return Tools(
        plugin=files["xla_cuda_plugin.so"], driver=_driver(folder), folder=folder, environment=environment
    )


def _driver(folder: Path) -> Path:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise MissingError("cc is not on the path: a C compiler is needed for the stand-in of CUDA's driver.")
    source, library = HERE.parent / "libcuda.c", folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        raise MissingError(f"{compiler} cannot build {source.name}: {built.stderr.strip()}")
    return library


def _plugin_files(folder: Path | None, jax_version: str) -> dict[str, Path]:
    wanted = f"pip install --no-deps {' '.join(f'{name}=={jax_version}' for name in PACKAGES)}"
    where = "installed" if folder is None else f"in {folder}"
    search = sys.path if folder is None else [str(folder)]
    found = {}
    for name in PACKAGES:
        one = next(iter(metadata.distributions(name=name, path=search)), None)
        if one is None:
            raise MissingError(f"{name} is not {where}: {wanted} (with --target DIR, and --plugin DIR here).")
        if one.version != jax_version:
            raise MissingError(f"{name} {one.version} is {where}, but jax is {jax_version}: {wanted}.")
        for file in one.files or ():
            found[file.name] = Path(str(one.locate_file(file))).resolve()
    return found


def _cuda() -> Path:
    """The root of a CUDA toolkit, or of what the pip package nvidia-cuda-nvcc (and nvidia-nvvm with it) installs."""
    named = os.environ.get("MOSAIC_GPU_CUDA_ROOT")
    wheels = importlib.util.find_spec("nvidia")
    roots = (
        [Path(named)]
        if named
        else [
            *(Path(place, "cu13") for place in (wheels.submodule_search_locations or () if wheels else ())),
            Path("/usr/local/cuda"),
            *(Path(tool).resolve().parents[1] for tool in [shutil.which("ptxas")] if tool),
        ]
    )
    for root in roots:
        if all((root / file).is_file() for file in (PTXAS, LIBDEVICE)):
            return root.resolve()
    raise MissingError(
        f"{PTXAS} and {LIBDEVICE} of CUDA are not here: pip install nvidia-cuda-nvcc, or let MOSAIC_GPU_CUDA_ROOT name "
        f"the folder they are in (looked in {', '.join(map(str, dict.fromkeys(roots)))})."
    )


def can_disassemble(tools: Tools) -> bool:
    return (tools.folder / "bin/nvdisasm").exists()


# --- a kernel


def assemble(tools: Tools, module: bytes, sass: bool = False) -> Assembled:
    """A serialized module through PTX to machine code; `sass` keeps that as text."""
    with tempfile.NamedTemporaryFile(dir=tools.folder, suffix=".mlirbc") as file:
        file.write(module)
        file.flush()
        command = [sys.executable, "-P", str(HERE), str(tools.plugin), str(tools.driver), file.name]
        environment = tools.environment | ({"MOSAIC_GPU_DUMP_SASS": "1"} if sass else {})
        done = subprocess.run(
            command, cwd=tools.folder, env=environment, capture_output=True, text=True, timeout=600
        )
    found = read(done.stdout)
    if done.returncode or DONE not in done.stdout.splitlines()[-1:]:
        found.error = _reason(done.stderr, done.returncode)
    if sass:
        _, mark, code = done.stdout.partition("\n\t.target")
        found.sass = mark + code if mark else None
    return found


def read(log: str) -> Assembled:
    """What `ptxas -v` printed; a kernel may come with functions of its own, which count with it."""
    found = Assembled()
    for line in log.splitlines():
        if match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line):
            stack, stores, loads = map(int, match.groups())
            found.stack_bytes += stack
            found.spill_bytes += stores + loads
        elif match := re.search(r"Used (\d+) registers", line):
            found.registers = max(found.registers, int(match[1]))
        elif re.search(r"^ptxas.*(warning|Performance Loss)", line) and "are spilled" not in line:
            found.warnings.append(re.sub(r"^ptxas\s*(info|warning)?\s*:\s*(\(\w+\))?\s*", "", line))
    return found


def _reason(stderr: str, code: int) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|fail|abort|what\(\)", line, re.IGNORECASE)]
    return " | ".join((telling or lines)[:3])[:500] or f"the compiler ended with {code}"


def _compile(plugin: str, driver: str, module: str) -> None:
    ctypes.CDLL(driver, mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(plugin)
    library.MosaicGpuCompile.restype = ctypes.c_void_p
    library.MosaicGpuCompile.argtypes = [ctypes.c_char_p, ctypes.c_int]
    data = Path(module).read_bytes()
    kernel = library.MosaicGpuCompile(data, len(data))
    ctypes.CDLL(None).fflush(None)
    print(DONE if kernel else "failed", flush=True)
    os._exit(0 if kernel else 1)  # threads of the compiler may still be there


if __name__ == "__main__":
    _compile(*sys.argv[1:])
