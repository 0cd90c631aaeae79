"""The clock, and the parts that time shapes: forward, backward, AlphaFold's, and the limits of the machine.

Every contestant gets the same clock: the host's, around a number of calls that are enqueued one after another and
then waited for. A call takes 0.1 to 10 ms on the device and about 20 µs to enqueue, so the device never waits for the
host; where the host needs most of the time to enqueue, the row says HOST-BOUND. A wait costs some 20 µs per 20 ms.
JAX and PyTorch both run asynchronously on one stream each, and only one of them at a time. (A loop inside one JAX
program would be another clock, but XLA may move a call out of it whose inputs do not change, and inputs that change
cost copies. CUDA events would be PyTorch's alone; they are taken too, as a check on the host's clock.)
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu import contestants, jobs, machine, work
from gpu.contestants import Inputs, Program
from gpu.jobs import Context, Job
from jax_fa.testing import timing

# Seconds per call, the share of them spent enqueuing, and seconds by the device's own clock or None.
Samples = tuple[list[float], list[float], list[float | None]]
# Relative L2 between two libraries that both round to bfloat16 on the way.
TOLERANCE = 3e-2


def forward(context: Context) -> None:
    _tables(context, "forward", ("forward",), group=4)


def backward(context: Context) -> None:
    _tables(context, "backward", ("backward", "both"), group=2)


def alphafold(context: Context) -> None:
    """MSA row attention, with the gradient of its bias, and the memory it takes."""
    shape = work.alphafold(context.rehearse)
    everyone = [contestants.ours(context.implementation), contestants.tokamax()]
    if not context.rehearse:
        everyone.append(contestants.ours("xla", "jax_fa xla"))
    found = [_job(context, "alphafold", shape, everyone, (d,)) for d in ("forward", "backward")]
    jobs.run_all(context, "alphafold", found, group=2)


def _tables(context: Context, part: str, directions: tuple[str, ...], group: int) -> None:
    everyone = contestants.everyone(context.implementation, context.rehearse)
    shapes = work.shapes(context.rehearse)
    found = (_job(context, part, shape, everyone, directions) for shape in shapes)
    jobs.run_all(context, part, found, group)


def _job(
    context: Context, part: str, shape: work.Shape, everyone: Sequence[Any], directions: tuple[str, ...]
) -> Job:
    label = f"{shape} {directions[0]}" if part == "alphafold" else str(shape)
    prepared: dict[str, Any] = {}  # by contestant: how many things it compiles, or why it does not take part

    def prepare() -> list[Callable[[], Any]]:
        thunks: list[Callable[[], Any]] = []
        for contestant in everyone:
            found = jobs.attempt(lambda c=contestant: c.prepare(shape, directions))  # type: ignore[misc]
            prepared[contestant.name] = found if isinstance(found, Exception) else len(found)
            thunks += [] if isinstance(found, Exception) else found
        return thunks

    def run(compiled: list[Any]) -> tuple[str, dict[str, Any]]:
        _free()  # what the last row left
        inputs = Inputs(shape, 2 if context.rehearse else work.rotated_sets(shape.array_bytes))
        programs: dict[str, dict[str, Any]] = {d: {} for d in directions}
        parts = list(compiled)
        for contestant in everyone:
            count = prepared[contestant.name]
            if isinstance(count, Exception):
                mine = dict.fromkeys(directions, count)
            else:
                mine = contestant.programs(inputs, directions, parts[:count])
                del parts[:count]
            for direction in directions:
                programs[direction][contestant.name] = mine[direction]
        for direction in directions[1:]:
            name = f"{label} with forward"
            found = _measured(context, part, name, shape, direction, programs[direction])
            context.events.row(part, name, found.pop("status"), **found)
            context.events.begin(part, label, jobs.RUN)
        more = _measured(context, part, label, shape, directions[0], programs[directions[0]])
        return more.pop("status"), more

    return Job(label=label, prepare=prepare, run=run)


def _measured(
    context: Context, part: str, label: str, shape: work.Shape, direction: str, programs: dict[str, Any]
) -> dict[str, Any]:
    """The row of one direction. Ours is the first, which the others are compared with."""
    found: dict[str, Any] = {}
    usable: dict[str, Program] = {}
    first: list[Any] | None = None
    for name, program in programs.items():
        context.events.begin(part, label, jobs.RUN)
        found[name], arrays = _tried(program)
        if arrays is None:
            continue
        usable[name] = program
        found[name]["difference"] = None if first is None else _apart(arrays, first)
        first = arrays if first is None else first
    del first
    for name, timed in _samples(context, part, label, usable).items():
        if isinstance(timed, Exception):
            found[name]["why"] = _why(timed)
        else:
            found[name] |= summary(*timed, shape.flops(direction))
    size = {"flops": shape.flops(direction), "pairs": shape.pairs, "direction": direction}
    return {"status": "ok"} | size | _verdict(shape, found)


def _apart(arrays: list[Any], first: list[Any]) -> float:
    """`difference`; NaN, which is never near enough, where there is none, of arrays of another shape."""
    apart = jobs.attempt(lambda: difference(arrays, first))
    if isinstance(apart, Exception):
        jobs.explain(apart)
        return float("nan")
    return float(apart)


def _tried(program: Any) -> tuple[dict[str, Any], list[Any] | None]:
    """(what is known before timing, results) of a contestant's first call."""
    if isinstance(program, Exception):
        return {"why": _why(program)}, None
    try:
        results = program.call(0)
        program.wait(results)
        return {"temp_bytes": program.temp_bytes}, program.arrays(results)
    except Exception as error:
        return {"why": _why(error)}, None


def _why(error: Exception) -> str:
    if isinstance(error, contestants.AbsentError):
        return str(error)
    jobs.explain(error)
    return machine.first_line(error)


def _samples(
    context: Context, part: str, label: str, programs: dict[str, Program]
) -> dict[str, Samples | Exception]:
    """By contestant its samples, one per round, or what it raised after all."""
    found: dict[str, Samples | Exception] = {}
    counts: dict[str, int] = {}
    for name, program in programs.items():
        context.events.begin(part, label, jobs.RUN)
        count = jobs.attempt(lambda p=program: _calibrated(p))  # type: ignore[misc]
        if isinstance(count, Exception):
            found[name] = count
        else:
            found[name], counts[name] = ([], [], []), count
    for names in timing.turns(list(counts), context.rounds):
        for name in names:
            samples = found[name]
            if isinstance(samples, Exception):
                continue
            context.events.begin(part, label, jobs.RUN)
            one = jobs.attempt(lambda name=name: _one(programs[name], counts[name]))  # type: ignore[misc]
            if isinstance(one, Exception):
                found[name] = one
                continue
            seconds, enqueued, by_events = samples
            seconds.append(one[0])
            enqueued.append(one[1])
            by_events.append(one[2])
    return found


def _calibrated(program: Program) -> int:
    """How many calls make a sample; warms up, too."""
    seconds, _ = sample(program, 1)
    if seconds < 0.1:
        seconds, _ = sample(program, 4)
    return work.calls_per_sample(seconds)


def _one(program: Program, calls: int) -> tuple[float, float, float | None]:
    return *sample(program, calls), None if program.events is None else program.events(calls)


def sample(program: Program, calls: int) -> tuple[float, float]:
    """(seconds per call, share of them until all were enqueued)."""
    gc.collect(0)
    gc.disable()
    try:
        start = time.perf_counter()
        for i in range(calls):
            results = program.call(i)
        enqueued = time.perf_counter()
        program.wait(results)
        end = time.perf_counter()
    finally:
        gc.enable()
    return (end - start) / calls, (enqueued - start) / (end - start)


def summary(
    seconds: list[float], enqueued: list[float], by_events: list[float | None], flops: float
) -> dict[str, Any]:
    return spread_of(seconds) | {
        "tflops": flops / timing.median(seconds) / 1e12,
        "host_bound": bool(np.median(enqueued) > 0.8),
        "event_milliseconds": [None if x is None else 1e3 * x for x in by_events],
    }


def spread_of(seconds: list[float]) -> dict[str, Any]:
    """The median, and half the distance of the quartiles relative to it."""
    return {
        "milliseconds": 1e3 * timing.median(seconds),
        "spread": timing.spread(seconds),
        "samples": list(map(float, seconds)),
    }


def _verdict(shape: work.Shape, found: dict[str, Any]) -> dict[str, Any]:
    """Ratios within this row, and whether all computed the same numbers."""
    mine, *peers = found
    row: dict[str, Any] = {"shape": str(shape), "contestants": found, "ratio": None, "best_peer": None}
    timed = [name for name in peers if "tflops" in found[name]]
    if "tflops" not in found[mine]:
        return row | _refused(found[mine]["why"])
    if timed:
        best = max(timed, key=lambda name: found[name]["tflops"])
        row |= {"best_peer": best, "ratio": found[mine]["tflops"] / found[best]["tflops"]}
    # NaN is not below the tolerance.
    wrong = [name for name in timed if found[name]["difference"] is not None]
    wrong = [name for name in wrong if not found[name]["difference"] <= TOLERANCE]
    if wrong and len(wrong) == len(timed):
        row |= {"status": "FAIL", "why": f"differs from {', '.join(wrong)}"}
    elif wrong:
        row["why"] = f"{', '.join(wrong)} differ, and the others do not"
    temp, quadratic = found[mine]["temp_bytes"], 2 * shape.B * shape.N * shape.S**2
    if shape.bias and temp is not None:
        row |= {"temp_bytes": temp, "quadratic_bytes": quadratic}
        if shape.B >= 16 and temp > quadratic / 4:
            row |= {"status": "FAIL", "why": f"temp {temp} bytes: as if S×S were kept per batch entry"}
    return row


def _refused(why: str) -> dict[str, Any]:
    """Ours has no number: a stated refusal is no error, anything else is."""
    refused = why.startswith("NotImplementedError")
    return {"status": "skip" if refused else "error", "why": f"ours: {why}"}


@jax.jit
def _difference(a: list[Any], b: list[Any]) -> Any:
    def relative(x: Any, y: Any) -> Any:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.linalg.norm((x - y).ravel()) / jnp.linalg.norm(y.ravel())

    return jnp.stack([relative(x, y) for x, y in zip(a, b, strict=True)])


def difference(a: list[Any], b: list[Any]) -> float:
    """Relative L2, the worst of all arrays."""
    return float(np.max(np.asarray(_difference(a, b))))


def _free() -> None:
    """Gives memory back, PyTorch's too."""
    gc.collect()
    torch, _ = machine.load("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- the machine


def limits(context: Context) -> None:
    """What a large product and a large copy reach: the floors that attention is held against."""
    jobs.run_all(context, "machine", _limits(context), group=2)


def _limits(context: Context) -> Iterator[Job]:
    n = 64 if context.rehearse else 8192
    matrix = jax.ShapeDtypeStruct((n, n), jnp.bfloat16)
    array = jax.ShapeDtypeStruct((2**16 if context.rehearse else 2**30,), jnp.bfloat16)
    product = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.bfloat16))
    copy = jax.jit(lambda a: -a)

    def timed(compiled: Any, arguments: list[Any]) -> float:
        if isinstance(compiled, Exception):
            raise compiled
        program = Program(
            call=lambda i: compiled(*arguments), wait=jax.block_until_ready, arrays=jax.tree.leaves
        )
        sample(program, 5)
        return timing.median([sample(program, 10)[0] for _ in range(context.rounds)])

    def run_product(found: list[Any]) -> tuple[str, dict[str, Any]]:
        random = [contestants.normal(jax.random.key(i), matrix) for i in range(2)]
        tflops = 2 * n**3 / timed(found[0], random) / 1e12
        return "ok", {"tflops": tflops, "text": f"{tflops:.1f} TF/s"}

    def run_copy(found: list[Any]) -> tuple[str, dict[str, Any]]:
        seconds = timed(found[0], [contestants.normal(jax.random.key(2), array)])
        rate = 2 * 2 * array.size / seconds / 1e12
        return "ok", {"terabytes": rate, "text": f"{rate:.2f} TB/s read and written"}

    yield Job(
        label=f"product of {n}×{n} bfloat16",
        prepare=lambda: [product.lower(matrix, matrix).compile],
        run=run_product,
    )
    yield Job(label="copy of memory", prepare=lambda: [copy.lower(array).compile], run=run_copy)
