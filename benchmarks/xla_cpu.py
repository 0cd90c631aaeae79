"""Times the portable backend against `jax.nn.dot_product_attention` on this machine's default device.

    python benchmarks/xla_cpu.py [--rounds 9] [--only TEXT] [--json FILE]

Both are compiled, then called in turn within one process; see README.md beside this file.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import jax_fa
from jax_fa.demo import program as process
from jax_fa.testing import timing

OURS, THEIRS = "jax_fa", "jax.nn"
ATTENTIONS: dict[str, Callable[..., Any]] = {
    OURS: partial(jax_fa.dot_product_attention, implementation="xla"),
    THEIRS: jax.nn.dot_product_attention,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    B: int = 1
    S: int = 4096
    N: int = 8
    K: int = 8
    D: int = 64
    dtype: str = "float32"
    static: dict[str, Any] = field(default_factory=dict)


_CAUSAL = {"is_causal": True}
CASES = (
    Case(name="causal", static=_CAUSAL),
    Case(name="causal bf16", dtype="bfloat16", static=_CAUSAL),
    Case(name="causal GQA 8:2", K=2, static=_CAUSAL),
    Case(name="full"),
    Case(name="window 256", static={"is_causal": True, "local_window_size": (255, 0)}),
    Case(name="causal S=1024", S=1024, static=_CAUSAL),
    Case(name="full S=1024", S=1024),
    Case(name="causal S=1024 B=4", B=4, S=1024, static=_CAUSAL),
    Case(name="causal S=256 B=8", B=8, S=256, static=_CAUSAL),
)


@dataclass(kw_only=True)
class Measured:
    """One compiled program."""

    compile_seconds: float  # trace, lower and compile
    temporary_bytes: int
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return timing.median(self.seconds)


def programs(case: Case, attention: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The functions that are timed, by name."""

    def forward(q, k, v, dout):
        return attention(q, k, v, **case.static)

    def forward_backward(q, k, v, dout):
        out, pullback = jax.vjp(lambda *qkv: attention(*qkv, **case.static), q, k, v)
        return out, pullback(dout)

    return {"forward": forward, "forward+backward": forward_backward}


def operands(case: Case) -> tuple[jax.Array, ...]:
    """Query, key, value and the cotangent of the output."""
    random = np.random.default_rng(0)
    shapes = [(case.B, case.S, heads, case.D) for heads in (case.N, case.K, case.K, case.N)]
    return tuple(jnp.asarray(random.standard_normal(s, np.float32), case.dtype) for s in shapes)


def measure(case: Case, rounds: int) -> dict[str, dict[str, Measured]]:
    """For each program and each attention what was measured, calling the attentions in turn."""
    arguments = operands(case)
    results: dict[str, dict[str, Measured]] = {}
    for program in ("forward", "forward+backward"):
        compiled = {}
        results[program] = {}
        for name, attention in ATTENTIONS.items():
            function = programs(case, attention)[program]
            compiled[name], seconds = timing.timed(_compile, function, arguments)
            memory = compiled[name].memory_analysis()
            results[program][name] = Measured(
                compile_seconds=seconds, temporary_bytes=memory.temp_size_in_bytes if memory else 0
            )
        runs = {name: partial(call, *arguments) for name, call in compiled.items()}
        for name, taken in timing.alternate(runs, rounds).items():
            results[program][name].seconds = taken
    return results


def _compile(function: Callable[..., Any], arguments: tuple[jax.Array, ...]) -> Any:
    return jax.jit(function).lower(*arguments).compile()


HEADER = (
    f"{'case':18} {'program':17}{'jax_fa':>9}{'jax.nn':>9}{'ratio':>7}   "
    f"{'temp':>9}{'temp':>10}{'ratio':>7}   {'compile':>8}{'compile':>8}"
)


def row(case: Case, program: str, ours: Measured, theirs: Measured) -> str:
    mib = 2**20
    return (
        f"{case.name:18} {program:17}{1e3 * ours.median:7.1f}ms{1e3 * theirs.median:7.1f}ms"
        f"{ours.median / theirs.median:7.2f}   "
        f"{ours.temporary_bytes / mib:6.1f}MiB{theirs.temporary_bytes / mib:7.1f}MiB"
        f"{ours.temporary_bytes / theirs.temporary_bytes:7.3f}   "
        f"{ours.compile_seconds:7.2f}s{theirs.compile_seconds:7.2f}s"
    )


def environment() -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "jax_fa": jax_fa.__version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "device": f"{device.platform}: {device.device_kind}",
        "machine": platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="calls of each program (default: 9)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every single time there, as they come"
    )
    options = parser.parse_args()
    if options.json:
        try:
            process.check_writable(options.json)
        except ValueError as error:
            parser.error(str(error))

    found: dict[str, Any] = {"environment": environment(), "rounds": options.rounds, "cases": []}
    print(", ".join(f"{name} {value}" for name, value in found["environment"].items()))
    print(HEADER)
    for case in CASES:
        if options.only not in case.name:
            continue
        for name, by_name in measure(case, options.rounds).items():
            print(row(case, name, by_name[OURS], by_name[THEIRS]), flush=True)
            measured = {attention: asdict(m) for attention, m in by_name.items()}
            found["cases"].append({**asdict(case), "program": name, "measured": measured})
            if options.json:
                process.write(options.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    process.start(main)
