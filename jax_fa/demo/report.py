"""What the self-test prints."""

import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jaxlib

import jax_fa
from jax_fa.backends import cpu
from jax_fa.demo.checks import Case, Result
from jax_fa.demo.colours import colour
from jax_fa.demo.comparison import Agreement, Run
from jax_fa.demo.gpt import Config


def _title(text: str) -> None:
    print(f"\n{text}", flush=True)


def environment() -> None:
    """Versions, devices, and what the CPU kernels chose here."""
    versions = {
        "jax_fa": jax_fa.__version__,
        "Python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    kinds = Counter(f"{device.platform} ({device.device_kind})" for device in jax.devices())
    print(f"devices: {', '.join(f'{count} x {kind}' for kind, count in kinds.items())}")
    print(f"CPU kernels: {cpu.tuning() or 'none'}")


def backends(explanation: jax_fa.Explanation) -> None:
    """Which backend the model's attention runs on, and why not on the others."""
    _title("Backends for the attention of the model below")
    print(explanation)


def checks_header() -> None:
    _title(
        "Errors: largest error / largest value, against float64 (ok: ours at most twice jax.nn's and 8 epsilons)"
    )
    print(f"{'':42}{'':10}{'output':^18}{'log-sum-exp':^18}{'gradients':^18}".rstrip())
    print(f"{'case':42}{'dtype':10}" + (f"{'ours':>8}{'jax.nn':>9} " * 3).rstrip())


def check(result: Result) -> None:
    case: Case = result.case
    if result.ours is None:
        print(f"{case.name:42}{case.dtype:10}  not served: {result.refused}")
        return
    errors = "".join(f"{a:8.1e}{b:9.1e} " for a, b in zip(result.ours, result.jax_nn, strict=True))
    print(f"{case.name:42}{case.dtype:10}{errors} {'ok' if result.ok else 'MISS'}", flush=True)


def comparison_header(config: Config) -> None:
    _title(
        f"Training a GPT on Python's documentation, with each attention in turn: {config.steps} steps of "
        f"{config.batch} x {config.seq_len} characters, {config.layers} layers, {config.heads} heads on "
        f"{config.kv_heads}, head_dim {config.head_dim}, {config.dtype.name}"
    )


def progress(steps: int) -> Callable[[int, dict[str, Run]], None]:
    """A bar on stderr where that is a terminal; elsewhere a line on stdout at each of few steps, or every tenth of the way."""
    began = time.monotonic()

    def update(done: int, runs: dict[str, Run]) -> None:
        losses = ", ".join(f"{name} {run.losses[-1]:.4f}" for name, run in runs.items())
        if sys.stderr.isatty():
            left = (time.monotonic() - began) / done * (steps - done)
            width = 30
            bar = "#" * (width * done // steps)
            line = f"  [{bar:{width}}] {done}/{steps}  loss: {losses}  {left:.0f} s left"
            line = line[: shutil.get_terminal_size().columns - 1]
            print(f"\r{line}\x1b[K", end="\n" if done == steps else "", file=sys.stderr, flush=True)
        elif done == 1 or steps <= 20 or done * 10 // steps != (done - 1) * 10 // steps:
            print(f"  step {done:4}  loss: {losses}", flush=True)

    return update


def comparison(runs: dict[str, Run], agreement: Agreement) -> None:
    """The table of both runs, and how ours compares."""
    ours, theirs = runs.values()
    print()
    _comparison_row("", list(runs), "")
    _comparison_row("last loss", [f"{run.losses[-1]:.4f}" for run in runs.values()], _curves(agreement))
    for label, name, show in (
        ("time of a step (median)", "step_seconds", _seconds),
        ("temporary memory of a step", "step_bytes", _mebibytes),
        ("... of attention alone", "attention_bytes", _mebibytes),
        ("compile time of a step", "compile_seconds", _seconds),
    ):
        _comparison_row(
            label, [show(getattr(run, name)) for run in runs.values()], _ratio(ours, theirs, name)
        )


def _comparison_row(label: str, values: Sequence[str], comment: str) -> None:
    line = f"  {label:28}" + "".join(f"{value:>12}" for value in values) + f"   {comment}"
    print(line.rstrip())


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def _mebibytes(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 2**20:.1f} MiB"


def _ratio(ours: Run, theirs: Run, name: str) -> str:
    a, b = getattr(ours, name), getattr(theirs, name)
    return f"{a / b:.2f} x" if a is not None and b else "unknown"


def _curves(agreement: Agreement) -> str:
    word = "curves agree" if agreement.ok else "MISS: curves differ"
    return f"{word}: at most {agreement.difference:.1e} apart (allowed {agreement.tolerance:g})"


def verdict(results: Sequence[Result], runs: dict[str, Run], agreement: Agreement) -> None:
    """The last line."""
    ours, theirs = runs.values()
    served = [result.ok for result in results if result.ours is not None]
    ok = all(served) and agreement.ok
    print(
        f"\n{'OK' if ok else 'MISS'}: {sum(served)} of {len(served)} cases right"
        f"{f' ({len(results) - len(served)} not served)' if len(served) < len(results) else ''}, losses "
        f"{'agree' if agreement.ok else 'DIFFER'}; a step takes {_ratio(ours, theirs, 'step_seconds')} the time "
        f"and {_ratio(ours, theirs, 'step_bytes')} the temporary memory of jax.nn's."
    )


def plot(path: Path, config: Config, runs: dict[str, Run]) -> None:
    """Loss curves and step times, drawn without a display."""
    from matplotlib.figure import Figure  # imported only when asked for

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, seconds = figure.subplots(1, 2)
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        loss.plot(range(1, len(run.losses) + 1), run.losses, style, label=name, color=colour(name))
        seconds.plot(range(1, len(run.seconds) + 1), run.seconds, ".", label=name, color=colour(name))
    loss.set(xlabel="step", ylabel="loss (nats per character)", title="Loss")
    title = f"{config.batch} x {config.seq_len} characters, {config.dtype.name}"
    seconds.set(xlabel="step", ylabel="seconds", title=f"Time of a step ({title})", ylim=(0, None))
    for axes in (loss, seconds):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path)
    print(f"  drawn: {path}")
