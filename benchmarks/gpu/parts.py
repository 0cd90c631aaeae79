"""All parts by name, and the smaller ones: the machine, a training step, tuning."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jax_fa
from gpu import checks, contestants, jobs, machine, timing, work
from gpu.jobs import Context, Job
from jax_fa.backends.mosaic import tuning as mosaic_tuning
from jax_fa.demo import comparison, gpt

HEAD_DIMS = ((128, 128), (64, 64), (256, 256), (192, 128), (96, 96), (32, 32))


def describe(context: Context) -> None:
    """Device, driver and versions, and then what the machine can do."""
    if not context.events.knows("machine", "device"):
        _device(context)
    timing.limits(context)


def _device(context: Context) -> None:
    device, driver = jax.devices()[0], machine.driver()
    versions = machine.versions()
    absent = []
    for name in ("torch", "tokamax"):
        module, why = machine.load(name)
        versions[name] = None if module is None else str(getattr(module, "__version__", "of no version"))
        absent += [] if why is None else [why]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    shown = "; ".join([shown, *absent])
    context.events.row(
        "machine",
        "device",
        "ok",
        device=device.device_kind,
        driver=driver,
        versions=versions,
        multiprocessors=getattr(device, "core_count", None),
        max_hertz=machine.max_hertz(driver),
        text=f"{device.device_kind}; {driver}; {shown}",
    )


# --- training


def training(context: Context) -> None:
    jobs.run_all(context, "training", [_training_job(context)], group=1)


def _config(rehearse: bool) -> gpt.Config:
    if rehearse:
        return gpt.Config(layers=1, heads=2, kv_heads=1, head_dim=16, seq_len=64, batch=1, steps=3)
    dtype = jnp.dtype(jnp.bfloat16)
    return gpt.Config(
        layers=4, heads=8, kv_heads=4, head_dim=128, seq_len=4096, batch=4, steps=10, dtype=dtype
    )


def _training_job(context: Context) -> Job:
    config = _config(context.rehearse)
    label = f"GPT {config.layers} layers, width {config.width}, {config.batch}×{config.seq_len} characters"

    def beat(*_: Any) -> None:
        context.events.begin("training", label, 120.0)

    def run(_: list[Any]) -> tuple[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        usable = {}
        for name, attention in _attentions(context).items():
            beat()
            found[name] = {}  # in this order
            error = jobs.attempt(lambda a=attention: _try(config, a))  # type: ignore[misc]
            if isinstance(error, Exception):
                jobs.explain(error)
                found[name] = {"why": machine.first_line(error)}
            else:
                usable[name] = attention
        beat()
        runs = comparison.run(config, usable, beat)
        for name, result in runs.items():
            found[name] = _step(result)
        return _training_row(config, found, runs)

    return Job(label=label, prepare=list, run=run, limit=120.0)


def _attentions(context: Context) -> dict[str, Callable[..., Any]]:
    theirs = jax.nn.dot_product_attention
    return {
        "jax_fa": partial(jax_fa.dot_product_attention, implementation=context.implementation),
        "jax.nn xla": partial(theirs, implementation="xla"),
        "jax.nn cudnn": partial(theirs, implementation="cudnn"),
    }


def _try(config: gpt.Config, attention: Callable[..., Any]) -> None:
    """One gradient at the width of the model and a short length: whoever fails here takes no part."""
    shape = (1, 256, config.heads, config.head_dim)
    q, k, v = (jax.random.normal(jax.random.key(i), shape, config.dtype) for i in range(3))

    def total(q: Any, k: Any, v: Any) -> Any:
        return jnp.sum(attention(q, k, v, is_causal=True).astype(jnp.float32))

    jax.block_until_ready(jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v))


def _step(result: comparison.Run) -> dict[str, Any]:
    return timing.spread_of(result.seconds[1:]) | {
        "temp_bytes": result.step_bytes,
        "last_loss": result.losses[-1],
    }


def _training_row(
    config: gpt.Config, found: dict[str, Any], runs: dict[str, comparison.Run]
) -> tuple[str, dict[str, Any]]:
    row: dict[str, Any] = {"contestants": found, "ratio": None, "best_peer": None}
    peers = [name for name in runs if name != "jax_fa"]
    if "jax_fa" not in runs:
        return "skip", row | {"why": f"ours: {found['jax_fa']['why']}"}
    if not peers:
        return "ok", row
    best = min(peers, key=lambda name: found[name]["milliseconds"])
    row |= {
        "best_peer": best,
        "ratio": found[best]["milliseconds"] / found["jax_fa"]["milliseconds"],
    }
    agreement = comparison.agreement(config, runs["jax_fa"], runs[best])
    if not agreement.ok:
        return "FAIL", row | {"why": f"losses differ by {agreement.difference:.3g} from {best}"}
    return "ok", row


# --- tuning

_KERNELS = ("forward", "dq", "dkv")


class Tuning(NamedTuple):
    candidates: Callable[[Any, int, int], list[Any]]  # configurations of a kernel, for head_dims D and Dv
    implementation: Callable[[Any, Any], Any]  # what has a kernel take a configuration


def tune(context: Context) -> None:
    tuning = _stub(context) if context.rehearse else Tuning(mosaic_tuning.candidates, _options)
    jobs.run_all(context, "tune", _tune_jobs(context, tuning), group=2 * context.threads)


def _options(which: Any, config: Any) -> Any:
    return jax_fa.mosaic.Options(tiles={which: config})


def _stub(context: Context) -> Tuning:
    """For a rehearsal, on CPU."""

    def candidates(which: str, D: int, Dv: int) -> list[str]:
        return ["a", "b"] if which == "forward" and D == HEAD_DIMS[0][0] else []

    return Tuning(candidates, lambda which, config: context.implementation)


def _tune_jobs(context: Context, tuning: Tuning) -> Iterator[Job]:
    for D, Dv in HEAD_DIMS:
        for which in _KERNELS:
            for causal in (False, True):
                for config in tuning.candidates(which, D, Dv):
                    implementation = tuning.implementation(which, config)
                    yield _tune_job(context, implementation, which, (D, Dv), causal, config)


def _tune_job(
    context: Context, implementation: Any, which: str, dims: tuple[int, int], causal: bool, config: Any
) -> Job:
    tuned = f"{which} D={dims[0]} Dv={dims[1]} {'causal' if causal else 'full'}"
    B, S, N = (1, 64, 2) if context.rehearse else (4, 4096, max(1, work.WIDTH // dims[0]))
    forward, pull, avals = _tune_programs(implementation, which, (B, S, N, *dims), causal)
    lowered: list[Any] = []

    def prepare() -> list[Callable[[], Any]]:
        lowered.append(forward.lower(*avals[:3]))
        if pull is not None:
            saved = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered[0].out_info)
            lowered.append(pull.lower(saved, avals[3]))
        return [one.compile for one in lowered]

    def run(found: list[Any]) -> tuple[str, dict[str, Any]]:
        for result in found:
            if isinstance(result, Exception):
                return "skip", {"why": machine.first_line(result), "tuned": tuned}
        keys = jax.random.split(jax.random.key(0), 4)
        arrays = [contestants.normal(k, aval) for k, aval in zip(keys, avals, strict=True)]
        arguments = arrays[:3] if pull is None else [found[0](*arrays[:3]), arrays[3]]
        program = contestants.Program(
            call=lambda i: found[-1](*arguments), wait=jax.block_until_ready, arrays=jax.tree.leaves
        )
        timing.sample(program, 3)
        calls = work.calls_per_sample(timing.sample(program, 3)[0], 0.01)
        times = timing.spread_of([timing.sample(program, calls)[0] for _ in range(5)])
        text = f"{times['milliseconds']:.3f} ms ±{times['spread']:.0%}"
        return "ok", times | {"tuned": tuned, "config": str(config), "text": text}

    return Job(label=f"{tuned} {config}", prepare=prepare, run=run)


def _tune_programs(
    implementation: Any, which: str, sizes: tuple[int, ...], causal: bool
) -> tuple[Any, Any, list[jax.ShapeDtypeStruct]]:
    """(forward, pullback or None, types of query, key, value and cotangent).

    A pullback that returns the query's gradient alone leaves XLA free to drop the kernel of the others.
    """
    B, S, N, D, Dv = sizes
    mask = jax_fa.masks.Causal() if causal else None
    attention = partial(jax_fa.flash_attention, mask=mask, implementation=implementation)
    types = [jax.ShapeDtypeStruct((B, S, N, size), jnp.bfloat16) for size in (D, D, Dv, Dv)]
    if which == "forward":
        return jax.jit(lambda q, k, v: attention(q, k, v)), None, types
    kept = slice(0, 1) if which == "dq" else slice(1, 3)
    residuals = jax.jit(lambda q, k, v: jax.vjp(attention, q, k, v)[1])
    return residuals, jax.jit(lambda pullback, dout: pullback(dout)[kept]), types


PARTS: dict[str, Callable[[Context], None]] = {
    "machine": describe,
    "checks": checks.run,
    "forward": timing.forward,
    "backward": timing.backward,
    "alphafold": timing.alphafold,
    "training": training,
    "tune": tune,
}


def run(context: Context, chosen: tuple[str, ...], deadline: float) -> None:
    """All parts in turn, each within its share of the time."""
    for part in chosen:
        if context.events.knows(part, "end"):
            continue
        if context.events.deadly(part):
            why = "given up: it hung or broke the device too often"
            context.events.row(part, "the rest", "skip", why=why)
            context.events.row(part, "end", "done")
            continue
        start = time.time()
        context.deadline = start + work.share(part, chosen, deadline - start)
        context.events.begin(part, "start", jobs.TRACE)
        try:
            PARTS[part](context)
        except Exception as error:
            jobs.explain(error)
            context.events.row(part, "all", "error", why=machine.first_line(error))
        context.events.row(part, "end", "done", seconds=time.time() - start)
