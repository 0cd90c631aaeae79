"""Times the native CPU kernels against the machine's peak, `jax.nn`, our portable backend and PyTorch.

    python benchmarks/cpu_attention.py [--rounds 7] [--only TEXT] [--json FILE]

All that is compared in a row is called in turn within one process, and every ratio is of medians of one run;
see README.md beside this file.
"""

import argparse
import importlib.util
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import jax_fa
from jax_fa import _native
from jax_fa.demo import program
from jax_fa.masks import Causal, SlidingWindow
from jax_fa.testing import timing

# A peer where it is installed.
torch: Any = importlib.import_module("torch") if importlib.util.find_spec("torch") else None

# How many products a direction computes, in units of the forward's two, and ours that it is measured beside.
PRODUCTS = {"forward": 1.0, "backward": 2.5, "jvp": 3.0, "hvp": 8.5, "double backward": 6.0}
BESIDE = {"jvp": "forward", "hvp": "backward", "double backward": "backward"}
PAUSE = 0.05  # seconds before a call, while the threads of the one before go on spinning
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    B: int = 1
    Sq: int = 4096
    Skv: int = 0  # 0: Sq
    N: int = 8
    K: int = 0  # 0: N
    D: int = 64
    dtype: str = "float32"
    mask: str = "full"
    extra: str = ""  # bias, mask or dropout; biases: one for each batch entry, with its gradient
    peers: bool = True
    derivatives: bool = False  # those along tangents and of second order, too

    @property
    def keys(self) -> int:
        return self.Skv or self.Sq

    @property
    def forward_flops(self) -> float:
        """Multiply-adds of the visible pairs, counted as two operations each, in two products."""
        pairs = float(self.Sq) * self.keys
        if self.mask == "causal":
            pairs = self.Sq * (self.Sq + 1) / 2
        elif self.mask.startswith("window"):
            width = int(self.mask.split()[1])
            pairs = sum(min(i + 1, width) for i in range(self.Sq))
        return 4.0 * self.B * self.N * self.D * pairs

    @property
    def decodes(self) -> bool:
        return self.Sq == 1


def _cases() -> list[Case]:
    cases = []
    for dtype in ("float32", "bfloat16", "float16"):
        for D in (64, 128):
            for mask in ("full", "causal"):
                derivatives = dtype == "float32"
                cases.append(Case(name="S=4096", D=D, mask=mask, dtype=dtype, derivatives=derivatives))
        for mask in ("full", "causal"):
            cases.append(Case(name="S=1024", Sq=1024, mask=mask, dtype=dtype))
        cases.append(Case(name="S=128", Sq=128, dtype=dtype))
        for D in (100, 128):
            cases.append(Case(name="decode", Sq=1, Skv=32768, N=32, K=8, D=D, dtype=dtype))
    cases.append(Case(name="window", Sq=16384, mask="window 512", peers=False))
    cases.append(Case(name="S=16384", Sq=16384, mask="causal", peers=False))
    cases.append(Case(name="GQA 8:2", K=2, mask="causal"))
    for extra in ("bias", "mask", "dropout"):
        cases.append(Case(name=f"with {extra}", extra=extra, peers=False))
    # As windows of vision models are: what a call costs for each entry.
    cases.append(Case(name="B=131072", B=131072, Sq=4, N=1, D=8, extra="biases"))
    return cases


# --- what a case runs

_TANGENTS = ("q_tangent", "k_tangent", "v_tangent")


def _arrays(case: Case) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    K = case.K or case.N
    shapes = {
        "q": (case.B, case.Sq, case.N, case.D),
        "k": (case.B, case.keys, K, case.D),
        "v": (case.B, case.keys, K, case.D),
        "dout": (case.B, case.Sq, case.N, case.D),
    }
    shapes |= {name: shapes[name[0]] for name in _TANGENTS}
    if case.extra == "biases":
        shapes["bias"] = (case.B, case.N, case.Sq, case.keys)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _ours(case: Case, implementation: str) -> Callable[..., Any]:
    keywords: dict[str, Any] = {"implementation": implementation}
    if case.mask == "causal":
        keywords["mask"] = Causal()
    elif case.mask.startswith("window"):
        keywords["mask"] = SlidingWindow(int(case.mask.split()[1]) - 1, 0)
    rng = np.random.default_rng(1)
    if case.extra == "bias":
        keywords["bias"] = jnp.asarray(rng.standard_normal((1, case.N, case.Sq, case.keys), np.float32))
    elif case.extra == "mask":
        keywords["mask"] = jnp.asarray(rng.random((case.B, 1, case.Sq, case.keys)) < 0.9)
    elif case.extra == "dropout":
        keywords |= {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}
    return partial(jax_fa.flash_attention, **keywords)


def _jax_programs(case: Case, attention: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    a = {name: jnp.asarray(x, case.dtype) for name, x in _arrays(case).items()}
    dout, *tangents = (a.pop(name) for name in ("dout", *_TANGENTS))
    operands = tuple(a.values())

    def attend(q, k, v, *bias):
        return attention(q, k, v, bias=bias[0]) if bias else attention(q, k, v)

    forward = jax.jit(attend)
    programs = {"forward": lambda: jax.block_until_ready(forward(*operands))}
    if not case.decodes:
        pull_back = jax.jit(lambda vjp, dout: vjp(dout))

        @jax.jit
        def differentiate(*operands):
            return jax.vjp(attend, *operands)[1]

        vjp = differentiate(*operands)
        programs["backward"] = lambda: jax.block_until_ready(pull_back(vjp, dout))
    if case.derivatives:
        programs |= _derivatives(attend, operands, tuple(tangents), dout)
    return programs


def _derivatives(attend, operands, tangents, dout) -> dict[str, Callable[[], Any]]:
    """Output and tangent; gradients and their tangents; the pull-back of the gradients alone."""

    def gradients(*operands):
        return jax.vjp(attend, *operands)[1](dout)

    jvp = jax.jit(partial(jax.jvp, attend))
    hvp = jax.jit(partial(jax.jvp, gradients))
    pull_back = jax.jit(lambda vjp, tangents: vjp(tangents))
    vjp = jax.jit(lambda *operands: jax.vjp(gradients, *operands)[1])(*operands)
    return {
        "jvp": lambda: jax.block_until_ready(jvp(operands, tangents)),
        "hvp": lambda: jax.block_until_ready(hvp(operands, tangents)),
        "double backward": lambda: jax.block_until_ready(pull_back(vjp, tangents)),
    }


def _torch_programs(case: Case) -> dict[str, Callable[[], Any]]:
    """PyTorch in its best layout: contiguous BNSD."""
    attend = torch.nn.functional.scaled_dot_product_attention
    arrays = {name: x if name == "bias" else x.swapaxes(1, 2) for name, x in _arrays(case).items()}
    a = {
        name: torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, case.dtype))
        for name, x in arrays.items()
    }
    keywords = {"is_causal": case.mask == "causal", "enable_gqa": bool(case.K)}
    learnt = []
    if "bias" in a:
        keywords["attn_mask"] = a["bias"].requires_grad_()
        learnt.append(a["bias"])
    q, k, v = (a[name].requires_grad_(not case.decodes) for name in "qkv")

    def forward():
        with torch.no_grad():
            return attend(q, k, v, **keywords)

    programs: dict[str, Callable[[], Any]] = {"forward": forward}
    if not case.decodes:
        out = attend(q, k, v, **keywords)
        programs["backward"] = lambda: torch.autograd.grad(
            out, (q, k, v, *learnt), a["dout"], retain_graph=True
        )
    return programs


# --- the machine's limits


def fma_peak(dtype: str = "float32") -> float:
    """Multiply-add operations per second of all cores, of the kind that the kernels use for a dtype."""
    isa = _native.chosen_instruction_set()
    if isa is None:
        raise SystemExit(f"JAX_FA_CPU_ISA must be one of {_native.instruction_sets()}")
    iterations, bf16 = 10_000_000, dtype == "bfloat16"

    def work() -> None:
        _native.fma_operations(isa, iterations, bf16)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    return THREADS * _native.fma_operations(isa, 1, bf16) * iterations / _together(threads)


def read_bandwidth(x: np.ndarray) -> float:
    """Bytes per second that all cores read from memory."""
    parts = np.array_split(x, THREADS)
    threads = [threading.Thread(target=part.max) for part in parts]
    return x.nbytes / _together(threads)


def _together(threads: list[threading.Thread]) -> float:
    """Seconds until all are done."""

    def run() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return timing.timed(run)[1]


# --- measuring


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """One row per direction: medians of everything compared, called in turn."""
    programs_by_name = {"cpu": _jax_programs(case, _ours(case, "cpu"))}
    if case.peers:
        programs_by_name["xla"] = _jax_programs(case, _ours(case, "xla"))
        theirs = partial(jax.nn.dot_product_attention, is_causal=case.mask == "causal")
        if case.dtype != "float16":  # XLA's CPU compiler refuses jax.nn's float16 products
            programs_by_name["jax.nn"] = _jax_programs(case, theirs)
        if torch is not None:
            programs_by_name["torch"] = _torch_programs(case)
    memory = np.ones(2**26, np.float32)
    rows = []
    for direction in PRODUCTS:
        runs = {
            name: programs[direction] for name, programs in programs_by_name.items() if direction in programs
        }
        if not runs:
            continue
        if direction in BESIDE:
            runs[f"cpu {BESIDE[direction]}"] = programs_by_name["cpu"][BESIDE[direction]]
        peaks: list[float] = []
        bandwidths: list[float] = []

        def measure_limits(peaks=peaks, bandwidths=bandwidths) -> None:
            time.sleep(PAUSE)
            peaks.append(fma_peak(case.dtype))
            bandwidths.append(read_bandwidth(memory))

        seconds = timing.alternate(runs, rounds, pause=PAUSE, after_round=measure_limits)
        median = {name: timing.median(times) for name, times in seconds.items()}
        flops = case.forward_flops * PRODUCTS[direction]
        item = jnp.dtype(case.dtype).itemsize
        read = 2 * case.B * case.keys * (case.K or case.N) * case.D * item
        rows.append(
            asdict(case)
            | {
                "direction": direction,
                "seconds": median,
                "gflops": flops / median["cpu"] / 1e9,
                "of_peak": flops / median["cpu"] / timing.median(peaks),
                "of_bandwidth": read / median["cpu"] / timing.median(bandwidths),
                "ratio": {name: median[name] / median["cpu"] for name in median if name != "cpu"},
            }
        )
    return rows


def _describe(row: dict[str, Any]) -> str:
    label = f"{row['name']:>12} D={row['D']:<3} {row['dtype']:>8} {row['mask']:>10} {row['direction']:>15}"
    limit = f"{row['of_bandwidth']:5.0%} of bandwidth" if row["Sq"] == 1 else f"{row['of_peak']:5.0%} of peak"
    ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["ratio"].items())
    return f"{label}  {row['seconds']['cpu'] * 1e3:9.3f} ms {row['gflops']:7.1f} GF/s {limit}  {ratios}"


def _check(parser: argparse.ArgumentParser, path: Path) -> None:
    try:
        program.check_writable(path)
    except ValueError as error:
        parser.error(str(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=7, help="calls of each implementation (default: %(default)s)"
    )
    parser.add_argument("--only", default="", help="only cases whose line contains this text")
    parser.add_argument("--json", type=Path, help="also write all figures to this file, as they come")
    options = parser.parse_args()
    if options.json:
        _check(parser, options.json)
    versions = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "jax_fa": jax_fa.__version__,
        "torch": None if torch is None else torch.__version__,
        "machine": f"{platform.machine()}, {THREADS} cores",
        "instruction_set": _native.chosen_instruction_set(),
    }
    print("  ".join(f"{name} {value}" for name, value in versions.items()))
    print(f"FMA peak {fma_peak() / 1e9:.0f} GF/s; ratios say how many times longer the other takes")
    rows = []
    for case in _cases():
        text = f"{case.name} D={case.D} {case.dtype} {case.mask}"
        if options.only in text:
            for row in measure(case, options.rounds):
                print(_describe(row), flush=True)
                rows.append(row)
            if options.json:
                program.write(options.json, json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    program.start(main)
