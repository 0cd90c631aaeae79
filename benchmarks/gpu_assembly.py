"""Assembles the kernels for NVIDIA GPUs without a GPU and prints what ptxas says: registers, spills, warnings.

    python -P benchmarks/gpu_assembly.py [--only TEXT] [--json FILE] [--sass DIR] [--candidates] [--plugin DIR]

Every line of the tables of tiles and every feature, forward and backward. It needs jax 0.11 or newer (which needs Python
3.12), the pip packages jax-cuda13-pjrt and jax-cuda13-plugin of the same version (`--no-deps` is enough; installed, or by
`--target DIR` and `--plugin DIR`), ptxas with its libdevice (CUDA 13, or the pip package nvidia-cuda-nvcc) and a C
compiler. Exits with 0, 1 if a kernel spills registers or is not assembled, 2 if something is missing.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the CUDA plugin is for its compiler only
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the kernels of this checkout, whatever is installed

import jax
import jax.numpy as jnp
from gpu import assembler

import jax_fa
from jax_fa.backends.mosaic import choice, tuning
from jax_fa.call import Call
from jax_fa.demo import program
from jax_fa.entry import request_of
from jax_fa.masks import Causal, Dense, Lengths, SlidingWindow

OLDEST = (0, 11)
DEVICE = "NVIDIA H200"
SIZES = {"B": 2, "Q": 1024, "K": 1024, "N": 4, "heads": 4}  # heads: of key and value
DIFFERENTIABLE = ("query", "key", "value", "bias", "alibi_slopes", "scale")
# Besides the bounds of the tables: what pads, what mixes, what is in between.
BETWEEN = ((32, 32), (80, 80), (96, 96), (160, 160), (192, 128), (128, 256), (16, 64))
# Kernels that share the tiles of another.
TILES_OF = {
    "forward_rounding": "forward",
    "dk": "dkv",
    "dv": "dkv",
}  # the first is the forward of a derivative
FEW = ("full", "causal", "bias", "everything")


# --- what is assembled


@dataclass(frozen=True, kw_only=True)
class Feature:
    """Attributes:
    arrays: operands besides query, key and value: the letters of their dims (1: broadcast) and their dtype.
    options: from these arrays to arguments of `flash_attention`.
    sizes: of the letters, where they are not the usual ones.
    """

    arrays: dict[str, tuple[str, str]] = field(default_factory=dict)
    options: Callable[[dict[str, Any]], dict[str, Any]] = dict
    sizes: dict[str, int] = field(default_factory=dict)


def features() -> dict[str, Feature]:
    def always(**options: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda arrays: arrays | options

    def everything(x: dict[str, Any]) -> dict[str, Any]:
        mask = Causal() & Lengths(key=x["lengths"]) & Dense(x["mask"])
        options = {"logits_soft_cap": 30.0, "dropout_rate": 0.1, "dropout_key": jax.random.key(0)}
        return {"bias": x["bias"], "alibi_slopes": x["alibi_slopes"], "mask": mask} | options

    bias = {"bias": ("1NQK", "bfloat16")}
    slopes = {"alibi_slopes": ("N", "float32")}
    lengths = {"lengths": ("B", "int32")}
    return {
        "full": Feature(),
        "causal": Feature(options=always(mask=Causal())),
        "window": Feature(options=always(mask=SlidingWindow(255))),
        "lengths": Feature(arrays=lengths, options=lambda x: {"mask": Lengths(key=x["lengths"])}),
        "part of a tile": Feature(sizes={"Q": 1000, "K": 1000}),
        "padded": Feature(sizes={"Q": 1001, "K": 1003}),
        "grouped heads": Feature(sizes={"N": 8, "heads": 1}, options=always(mask=Causal())),
        "one query": Feature(sizes={"Q": 1, "N": 8, "heads": 2}),
        "few keys": Feature(sizes={"K": 40}),
        "scale < 0": Feature(options=always(scale=-0.3)),
        "bias": Feature(arrays=bias),
        "bias float32": Feature(arrays={"bias": ("BNQK", "float32")}),
        "bias by row": Feature(arrays={"bias": ("BNQ1", "float32")}),
        "bias by key": Feature(arrays={"bias": ("B11K", "float32")}),
        "bias by head, key": Feature(arrays={"bias": ("BN1K", "float32")}, sizes={"heads": 1}),
        "mask": Feature(arrays={"mask": ("11QK", "bool")}),
        "mask by key": Feature(arrays={"mask": ("B11K", "bool")}),
        "bias, mask by key": Feature(arrays={"bias": ("1NQK", "bfloat16"), "mask": ("B11K", "bool")}),
        "slopes": Feature(arrays=slopes, options=always(mask=Causal())),
        "scale as data": Feature(arrays={"scale": ("", "float32")}),
        "soft cap": Feature(options=always(logits_soft_cap=30.0)),
        "dropout": Feature(options=always(dropout_rate=0.1, dropout_key=jax.random.key(0))),
        "everything": Feature(
            arrays=bias | slopes | lengths | {"mask": ("11QK", "bool")},
            options=everything,
            sizes={"heads": 2},
        ),
    }


@dataclass(frozen=True, kw_only=True)
class Case:
    D: int
    Dv: int
    dtype: str
    name: str  # of the feature
    feature: Feature
    tiles: tuple[tuning.Which, tuning.Tiles] | None = None  # a kernel and the tiles it has to take

    def __str__(self) -> str:
        return f"D={self.D} Dv={self.Dv} {self.dtype} {self.name}"

    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        sizes = SIZES | self.feature.sizes
        B, Sq, Skv, N, K = (sizes[name] for name in SIZES)
        shapes = {
            "query": (B, Sq, N, self.D),
            "key": (B, Skv, K, self.D),
            "value": (B, Skv, K, self.Dv),
        }
        found = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype)) for name, shape in shapes.items()}
        for name, (letters, dtype) in self.feature.arrays.items():
            shape = tuple(1 if letter == "1" else sizes[letter] for letter in letters)
            found[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        return found


def cases() -> Iterator[Case]:
    table = sorted({row.head_dim for rows in tuning.TABLES.values() for row in rows})
    known = features()
    for name, feature in known.items():
        for D in table:
            yield Case(D=D, Dv=D, dtype="bfloat16", name=name, feature=feature)
    for name in FEW:
        for D, Dv in BETWEEN:
            yield Case(D=D, Dv=Dv, dtype="bfloat16", name=name, feature=known[name])
        for D in table:
            yield Case(D=D, Dv=D, dtype="float16", name=name, feature=known[name])


def candidates() -> Iterator[Case]:
    """Every configuration that `gpu_attention.py --tune` would measure."""
    known = features()
    for which, rows in tuning.TABLES.items():
        for row in rows:
            for tiles in tuning.candidates(which, row.head_dim, row.head_dim):
                for name in ("full", "causal"):
                    D = row.head_dim
                    yield Case(
                        D=D, Dv=D, dtype="bfloat16", name=name, feature=known[name], tiles=(which, tiles)
                    )


# --- lowering


def lowered(case: Case) -> tuple[dict[str, bytes], dict[str, str], dict[str, Any]]:
    """(serialized modules by kernel, reasons by direction that has none, tiles by kernel)."""
    refused: dict[str, str] = {}
    modules: dict[str, bytes] = {}
    for direction in ("backward", "forward"):
        try:
            modules |= _modules(_program(case, direction), case.arrays(), direction)
        except NotImplementedError as error:
            refused[direction] = str(error).rpartition("mosaic: ")[2]
    return modules, refused, _tiles(case)


def _arguments(case: Case, arrays: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `flash_attention`."""
    implementation = "mosaic" if case.tiles is None else jax_fa.mosaic.Options(tiles=dict([case.tiles]))
    stored = ("query", "key", "value")
    options = case.feature.options({name: x for name, x in arrays.items() if name not in stored})
    return {name: arrays[name] for name in stored} | options | {"implementation": implementation}


def _tiles(case: Case) -> dict[str, Any]:
    """Of every kernel that has any for this call."""
    calls: list[Call] = []

    def build(arrays: dict[str, Any]) -> Any:
        calls.append(request_of(jax_fa.flash_attention, **_arguments(case, arrays)).call)
        return calls[-1].operands

    operands = jax.eval_shape(build, case.arrays())
    call = Call.of(calls[0].problem, operands)
    return {which: choice.tiles_of(which, call) for which in tuning.TABLES if not choice.why_not(which, call)}


def _program(case: Case, direction: str) -> Callable[[dict[str, Any]], Any]:
    def forward(differentiable: dict[str, Any], others: dict[str, Any]) -> Any:
        return jax_fa.flash_attention(**_arguments(case, differentiable | others), return_logsumexp=True)

    def program(arrays: dict[str, Any]) -> Any:
        differentiable = {name: x for name, x in arrays.items() if name in DIFFERENTIABLE}
        others = {name: x for name, x in arrays.items() if name not in DIFFERENTIABLE}
        if direction == "forward":
            return forward(differentiable, others)
        results, pullback = jax.vjp(lambda x: forward(x, others), differentiable)
        return results, pullback(results)

    return program


def _modules(program: Callable[..., Any], arrays: dict[str, Any], direction: str) -> dict[str, bytes]:
    from jax.experimental.mosaic.gpu import core

    device = jax.sharding.AbstractDevice(device_kind=DEVICE, num_cores=132, platform="cuda")
    core.KNOWN_KERNELS.clear()
    jax.clear_caches()
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        jax.jit(program).trace(arrays).lower(lowering_platforms=("cuda",))
    return {_name(module, i): module for i, module in enumerate(core.KNOWN_KERNELS.values())}


def _name(module: bytes, i: int) -> str:
    """A kernel's name stands in its module, as `jax_fa_forward_mosaic_gpu`."""
    found = re.search(rb"jax_fa_(\w+?)_mosaic_gpu", module)
    return found[1].decode() if found else f"kernel {i}"


# --- the report

HEAD = ("kernel", "D", "Dv", "dtype", "feature", "tiles", "registers", "spill", "stack", "notes")
WIDTHS = (18, 3, 3, 8, 18, 7, 9, 5, 5, 0)


def line(row: dict[str, Any]) -> str:
    """A row of the table; tiles are width/stages/consumers."""
    cells = [str(row[name]) for name in HEAD[:-1]] + ["; ".join(row["notes"])]
    found = (
        f"{cell:>{width}}" if name in ("D", "Dv", "registers", "spill", "stack") else f"{cell:{width}}"
        for name, cell, width in zip(HEAD, cells, WIDTHS, strict=True)
    )
    return "  ".join(found).rstrip()


def row_of(case: Case, kernel: str, tiles: Any, found: assembler.Assembled) -> dict[str, Any]:
    notes = [f"FAILED: {found.error}"] if found.error else []
    counts = {name: found.count(name) for name in ("HGMMA", "LDL", "STL")}
    if found.sass is not None:
        notes.append(" ".join(f"{name} {count}" for name, count in counts.items()))
    return _row(case, kernel, tiles) | {
        "registers": found.registers,
        "spill": found.spill_bytes,
        "stack": found.stack_bytes,
        "notes": notes + found.warnings,
        "warnings": found.warnings,
        "counts": counts,
        "ok": found.ok,
    }


def _row(case: Case, kernel: str, tiles: Any) -> dict[str, Any]:
    shown = f"{tiles.width}/{tiles.stages}/{tiles.consumers}" if tiles is not None else "-"
    return {
        "kernel": kernel,
        "D": case.D,
        "Dv": case.Dv,
        "dtype": case.dtype,
        "feature": case.name,
        "tiles": shown,
        "registers": "-",
        "spill": "-",
        "stack": "-",
        "warnings": [],
        "counts": {},
        "ok": True,
    }


Rows = list[dict[str, Any]]


class Report:
    """Prints rows in order as they are done, and keeps them."""

    def __init__(self, sass: Path | None, rows_file: Path | None) -> None:
        self.rows: Rows = []
        self.rows_file = rows_file
        self.sass = sass
        print(line({name: name for name in HEAD} | {"notes": ["notes"]}), flush=True)

    def add(self, row: dict[str, Any], code: str | None = None) -> None:
        self.rows.append(row)
        if self.rows_file is not None:
            program.write(
                self.rows_file, json.dumps({"jax": jax.__version__, "rows": self.rows}, indent=1) + "\n"
            )
        print(line(row), flush=True)
        if self.sass is not None and code is not None:
            name = f"{row['kernel']}-{row['D']}-{row['Dv']}-{row['dtype']}-{row['feature']}-{row['tiles']}"
            (self.sass / f"{re.sub(r'[^0-9A-Za-z_-]+', '_', name)}.sass").write_text(code)


def assemble_all(tools: assembler.Tools, todo: list[Case], report: Report, jobs: int) -> None:
    """Lowers case after case in this thread, while others assemble those before it."""
    waiting: list[tuple[Case, str, Any, Future[assembler.Assembled]]] = []

    def finish(left: int) -> None:
        while len(waiting) > left:
            case, kernel, tiles, future = waiting.pop(0)
            found = future.result()
            report.add(row_of(case, kernel, tiles, found), found.sass)

    with ThreadPoolExecutor(jobs) as pool:
        for case in todo:
            try:
                modules, refused, tiles = lowered(case)
            except Exception as error:  # whatever Pallas may raise
                finish(0)
                why = str(error).strip().split("\n")[0]
                failed = {"notes": [f"FAILED to lower: {type(error).__name__}: {why}"[:500]], "ok": False}
                report.add(_row(case, "-", None) | failed)
                continue
            if refused:
                finish(0)
            for direction, why in refused.items():
                report.add(_row(case, direction, None) | {"notes": [f"no kernel: {why}"]})
            for kernel, module in modules.items():
                which = TILES_OF.get(kernel, kernel)
                if case.tiles is not None and case.tiles[0] != which:
                    continue
                future = pool.submit(assembler.assemble, tools, module, sass=report.sass is not None)
                waiting.append((case, kernel, tiles.get(which), future))
            finish(2 * jobs)
        finish(0)


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    if options.json:
        try:
            program.check_writable(options.json)
        except ValueError as error:
            parser.error(str(error))
    if jax.__version_info__[:2] < OLDEST:
        print(f"The kernels need jax 0.11 or newer, and that Python 3.12; this is jax {jax.__version__}.")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        try:
            tools = assembler.find(Path(folder), options.plugin, jax.__version__)
            if options.sass and not assembler.can_disassemble(tools):
                raise assembler.MissingError(
                    "nvdisasm is not here, for --sass: pip install nvidia-cuda-nvdisasm."
                )
        except assembler.MissingError as missing:
            print(missing)
            return 2
        return _run(options, tools)


def _run(options: argparse.Namespace, tools: assembler.Tools) -> int:
    known = candidates() if options.candidates else cases()
    todo = [case for case in known if options.only in str(case)]
    if options.sass:
        options.sass.mkdir(parents=True, exist_ok=True)
    report = Report(options.sass, options.json)
    assemble_all(tools, todo, report, options.jobs)
    kernels = [row for row in report.rows if row["registers"] != "-"]
    bad = [row for row in report.rows if not row["ok"]]
    warned = sum(bool(row["warnings"]) for row in kernels)
    print(f"\n{len(kernels)} kernels, {warned} with warnings; {len(bad)} rows with a spill or an error")
    for row in bad:
        print(line(row))
    return 1 if bad or not kernels else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", default="", metavar="TEXT", help='only "D=128 Dv=128 bfloat16 causal" with it'
    )
    parser.add_argument("--candidates", action="store_true", help="the tiles worth measuring, not the tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there, as they come")
    parser.add_argument(
        "--sass",
        type=Path,
        metavar="DIR",
        help="also write machine code there, and count matrix products (HGMMA) and local memory (LDL, STL)",
    )
    parser.add_argument(
        "--plugin", type=Path, metavar="DIR", help="where pip install --target put the plugin"
    )
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="compilers at a time")
    return parser


if __name__ == "__main__":
    program.start(main)
