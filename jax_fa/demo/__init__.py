"""A self-test: checks results, then trains a small GPT with jax_fa and with jax.nn, side by side."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jax_fa
from jax_fa.demo import baseline, checks, comparison, gpt, program, report

DTYPES = ("float32", "bfloat16", "float16")
OK, MISS = 0, 1  # bad arguments exit with 2, from argparse


@jax.numpy_dtype_promotion("standard")  # jax.nn mixes 16-bit dtypes with float32 itself
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the self-test; returns its exit code: 0 all values agree, 1 some do not, 3 the plot could not be written."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.versions:
        report.environment()
        return OK
    try:
        if options.plot:
            program.check_plot(options.plot)
        config = _config(options)
        explanation = _explain(config, options.implementation)
    except (ValueError, NotImplementedError) as error:
        parser.error(str(error))
    ours = partial(jax_fa.dot_product_attention, implementation=options.implementation)

    report.environment()
    report.backends(explanation)
    report.checks_header()
    results = []
    for case in checks.QUICK_CASES if options.quick else checks.CASES:
        results.append(checks.check(case, ours))
        report.check(results[-1])

    report.comparison_header(config)
    runs = comparison.run(
        config, {"jax_fa": ours, "jax.nn": baseline.attention}, report.progress(config.steps)
    )
    agreement = comparison.agreement(config, *runs.values())
    report.comparison(runs, agreement)
    written = True
    if options.plot:
        written = program.write_or_report(
            f"--plot {options.plot}", lambda: report.plot(options.plot, config, runs)
        )
    report.verdict(results, runs, agreement)
    if not (all(result.ok for result in results) and agreement.ok):
        return MISS
    return OK if written else program.UNWRITTEN


def _explain(config: gpt.Config, implementation: str | None) -> jax_fa.Explanation:
    """What would run the model's attention here. Raises NotImplementedError where nothing can."""
    query, key, value = comparison.operands(config)

    def ask(platforms: tuple[str, ...] | None = None) -> jax_fa.Explanation:
        call: dict[str, Any] = {"is_causal": True, "implementation": implementation, "platforms": platforms}
        return jax_fa.explain(query, key, value, entry="dot_product_attention", **call)

    here = next(iter(ask().chosen))  # the first platform is the one we are on
    explanation = ask(platforms=(here,))
    if explanation.chosen[here] is None:
        raise NotImplementedError(f"no backend can serve the model's attention.\n{explanation}")
    return explanation


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jax_fa",
        description="Checks jax_fa against float64 and jax.nn.dot_product_attention, then trains a small GPT "
        "on Python's own documentation, once with each, and compares losses, step times and memory.",
        epilog="`python -m jax_fa doctor` reports what is installed and which backends can be used here. "
        "Exit codes: 0 all values agree, 1 some do not, 2 bad arguments, 3 the plot could not be written.",
    )
    parser.add_argument(
        "--versions",
        action="store_true",
        help="print versions, devices and what the CPU kernels chose, and end",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, a smaller model: under a minute")
    parser.add_argument(
        "--seq-len", type=program.positive, metavar="S", help="characters per sequence (default 1024)"
    )
    parser.add_argument(
        "--batch", type=program.positive, metavar="B", help="sequences per step (default: 2; quick: 1)"
    )
    parser.add_argument(
        "--steps", type=program.positive, metavar="N", help="training steps (default: 100; quick: 12)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of activations (default: float32)"
    )
    parser.add_argument(
        "--implementation", metavar="NAME", help="jax_fa backend (default: the best that can)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw loss curves and step times (needs matplotlib)"
    )
    return parser


def _config(options: argparse.Namespace) -> gpt.Config:
    defaults = gpt.Config(layers=2, batch=1, steps=12) if options.quick else gpt.Config()
    return gpt.Config(
        layers=defaults.layers,
        seq_len=options.seq_len or defaults.seq_len,
        batch=options.batch or defaults.batch,
        steps=options.steps or defaults.steps,
        dtype=jnp.dtype(options.dtype),
    )
