"""Correctness on the device: the tests' table of cases against float64, and what a table of small ones leaves out."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

import jax_fa
from gpu import jobs, machine, timing
from gpu.jobs import Context, Job
from jax_fa import backends
from jax_fa.entry import request_of
from jax_fa.testing import cases, oracle
from jax_fa.testing.case_masks import KINDS
from jax_fa.testing.cases import CASES, REAL_TILES, Case

DTYPES = ("bfloat16", "float16")
TILED: dict[str, Any] = {"Sq": 300, "Skv": 330, "D": 64, "Dv": 64}  # several tiles of any kernel
LONG: dict[str, Any] = {"B": (1,), "N": 2, "K": 1, "D": 64, "Dv": 64}
LIMIT = 15.0  # seconds for a case on the device, which takes milliseconds
NAN_MASKS = ("lengths", "segments_causal", "dense_padding", "causal", "window", "cumulative")
AGAINST_XLA = (
    "plain-128",
    "causal-64",
    "edge-1030",
    "gqa-8-1",
    "tiles-segments",
    "tiles-bias-1NQK",
    "tiles-dropout",
)
LINEAR = ("query", "key", "value")


def run(context: Context) -> None:
    found = _jobs(context)
    if context.most_checks is not None:
        found = (job for job, _ in zip(found, range(context.most_checks), strict=False))
    first, every = context.nth
    found = itertools.islice(found, first, None, every)
    jobs.run_all(context, "checks", found, group=2 * context.threads)


def _jobs(context: Context) -> Iterator[Job]:
    """By importance: time may run out."""
    important, dtypes = list(_extra()), DTYPES
    for case in important[:4]:  # alone, in case it is the backward that hangs
        yield _case_job(context, _as(replace(case, name=f"forward-{case.name}"), dtypes[0]), backward=False)
    for case in important:
        yield _case_job(context, _as(case, dtypes[0]), against_xla=case.name in AGAINST_XLA)
    for mask in NAN_MASKS:
        yield _nan_job(context, Case(name=f"nan-{mask}-bfloat16", mask=mask, dtype=dtypes[0], **TILED))
    tiled = [replace(c, name=f"{c.name}-tiled", **TILED) for c in CASES if c.feature and 0 not in c.full]
    later = list(dict.fromkeys([*tiled, *REAL_TILES, *CASES]))
    for dtype, some in ((dtypes[0], later), (dtypes[1], important), (dtypes[1], later)):
        for case in some:
            # A case of the other 16-bit dtype has its own turn; float64 is not these kernels' business.
            if case.dtype in ("float32", dtype):
                yield _case_job(context, _as(case, dtype))


def _as(case: Case, dtype: str) -> Case:
    return case if case.dtype == dtype else replace(case, name=f"{case.name}-{dtype}", dtype=dtype)


def _extra() -> Iterator[Case]:
    """Head dims, lengths around the edges of tiles, and one of each feature across tiles; the plainest first."""
    yield Case(name="plain-128", B=(1,), Sq=256, Skv=256, N=2, K=2, D=128, Dv=128)
    yield Case(name="causal-128", B=(1,), Sq=256, Skv=256, N=2, K=2, D=128, Dv=128, mask="causal")
    yield Case(name="plain-64", **TILED)
    yield Case(name="causal-64", mask="causal", **TILED)
    for D, Dv in ((128, 128), (256, 256), (96, 96), (192, 128)):
        yield Case(name=f"dims-{D}-{Dv}", mask="causal_bottom", **TILED | {"D": D, "Dv": Dv})
    for S in (127, 128, 129, 1000, 1024, 1030, 2048):
        yield Case(name=f"edge-{S}", Sq=S, Skv=S, mask="causal", **LONG)
    for S in (129, 1030):
        yield Case(name=f"edge-full-{S}", Sq=S, Skv=S + 1, **LONG)
    yield Case(name="gqa-8-1", B=(1,), Sq=257, Skv=257, N=8, K=1, D=128, Dv=128, mask="causal")
    yield Case(
        name="alphafold", B=(3,), N=4, K=4, Sq=300, Skv=300, D=32, Dv=32, mask="dense_padding", bias="1NQK"
    )
    # "nothing": no row sees a key.
    masks = "window window_bottom segments dense dense_padding nothing lengths key_lengths segments_causal"
    for mask in (*masks.split(), "prefix_window", "causal_dense", "cumulative_causal"):
        assert mask in KINDS
        yield Case(name=f"tiles-{mask}", mask=mask, **TILED)
    for bias in ("1NQK", "BNQK", "B1QK", "BN1K", "BNQ1", "B11K", "1N11", "QK"):
        yield Case(name=f"tiles-bias-{bias}", bias=bias, **TILED)
    yield Case(name="tiles-bias-float32", bias="BNQK", bias_dtype="float32", mask="causal", **TILED)
    yield Case(name="tiles-dropout", dropout=0.3, **TILED)
    yield Case(name="tiles-dropout-causal", dropout=0.1, mask="causal", **TILED)
    yield Case(name="tiles-soft-cap", soft_cap=4.0, mask="causal", **TILED)
    yield Case(name="tiles-slopes", slopes="N", mask="causal", **TILED)
    yield Case(name="tiles-BNSD", layout="BNSD", mask="causal", **TILED)


def refusal(case: Case, implementation: str, platform: str, what: str) -> str | None:
    """Why a backend does not serve a case, or None."""
    if implementation not in backends.names():
        return f"there is no backend {implementation!r}"
    request = request_of(
        jax_fa.flash_attention,
        **case.stored_operands(),
        **case.arrays(),
        scale=case.scale,
        logits_soft_cap=case.soft_cap,
        dropout_rate=case.dropout,
        layout=case.layout,
        implementation=implementation,
        return_logsumexp=True,
    )
    return backends.reasons(platform, request.call, what)[implementation]


def program(case: Case, implementation: str, backward: bool = True) -> Any:
    """Out, log-sum-exp and all gradients as one function."""

    def both(x: Any, dout: Any, dlse: Any) -> Any:
        (out, lse), gradients = case.gradient(x, dout, dlse, implementation=implementation)
        return {"out": out, "lse": lse, "gradients": gradients}

    def forward(x: Any, dout: Any, dlse: Any) -> Any:
        out, lse = case.flash_attention(x, implementation=implementation)
        return {"out": out, "lse": lse}

    return jax.jit(both if backward else forward)


def arguments(case: Case) -> tuple[Any, Any, Any]:
    dout, dlse = case.cotangents()
    return case.stored_operands(), case.stored(dout), dlse


class SkippedError(Exception):
    """The backend refuses the case, and says why."""


def _lower(
    context: Context, case: Case, implementation: str, backward: bool = True
) -> tuple[Callable[[], Any], str | None]:
    """(what compiles the case, why without gradients)."""
    platform = "cpu" if context.rehearse else "cuda"
    if why := refusal(case, implementation, platform, "forward"):
        raise SkippedError(why)
    no_gradient = refusal(case, implementation, platform, "backward") if backward else "not asked for"
    return program(case, implementation, no_gradient is None).lower(*arguments(case)).compile, no_gradient


def _case_job(context: Context, case: Case, against_xla: bool = False, backward: bool = True) -> Job:
    notes: dict[str, Any] = {}

    def prepare() -> list[Callable[[], Any]]:
        try:
            compile_it, notes["no_gradient"] = _lower(context, case, context.implementation, backward)
        except SkippedError as why:
            notes["skip"] = str(why)
            return []
        thunks = [lambda: _reference(case), compile_it]
        if against_xla:
            thunks.append(_lower(context, case, "xla")[0])
        return thunks

    def run(found: list[Any]) -> tuple[str, dict[str, Any]]:
        if "skip" in notes:
            return "skip", {"why": notes["skip"]}
        for result in found:
            if isinstance(result, Exception):
                raise result
        results = _run_twice(case, found[1])
        more: dict[str, Any] = {}
        if notes["no_gradient"] is not None:
            more["why"] = f"forward only: {notes['no_gradient']}"
        try:
            cases.check(case, results["out"], results["lse"], results.get("gradients"))
        except AssertionError as error:
            context.events.begin("checks", case.name, jobs.COMPILE)
            return "close", {"why": _second_opinion(case, results, error)}
        if against_xla:
            theirs = jax.device_get(found[2](*arguments(case)))
            cases.check(case, theirs["out"], theirs["lse"], theirs["gradients"])
            apart = timing.difference(jax.tree.leaves(results["out"]), jax.tree.leaves(theirs["out"]))
            more["text"] = f"{apart:.1e} from xla"
        return "pass", more

    return Job(label=case.name, prepare=prepare, run=run, limit=LIMIT)


def _reference(case: Case) -> None:
    """Computes what `cases.check` then finds in its cache."""
    cases.expected(case)
    cases.naive(case)


def _second_opinion(case: Case, results: Any, error: AssertionError) -> str:
    """Raises the error, unless the portable backend is as far from float64.

    The tolerance is measured by a naive implementation, which is lucky now and then (in the largest error of a
    gradient that sums over broadcast dims), and too far off itself in float16 from some thousand keys on, where its
    probabilities are subnormal.
    """
    compiled = program(case, "xla", "gradients" in results).lower(*arguments(case)).compile()
    theirs = _errors(case, jax.device_get(compiled(*arguments(case))))
    for name, (mine, floor) in _errors(case, results).items():
        for a, b in zip(mine, theirs[name][0], strict=True):
            if not a <= 1.5 * b + floor:
                raise AssertionError(f"{error}; {name} of xla is off by {b:.3g}, not {a:.3g}") from error
    return f"{machine.first_line(error)}; no worse than xla"


def _errors(case: Case, results: Any) -> dict[str, tuple[tuple[float, float], float]]:
    """By array ((relative L2, largest) error, floor), as the tests measure them."""
    want, gradients = cases.expected(case)
    floor = oracle.FLOOR[case.dtype]
    found = {
        "out": (oracle.errors(case.canonical(results["out"]), want.out), floor),
        "lse": (oracle.errors(results["lse"], want.lse), oracle.FLOOR[case.acc]),
    }
    for name, gradient in case.canonical_gradients(results.get("gradients", {})).items():
        times = max(1.0, want.cancellation.get(name, 1.0))
        found[name] = oracle.errors(gradient, gradients[name]), times * floor
    return found


def _run_twice(case: Case, compiled: Any) -> Any:
    first, second = (jax.device_get(compiled(*arguments(case))) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.tobytes() == b.tobytes(), f"{case}: two runs differ"
    return first


def _nan_job(context: Context, case: Case) -> Job:
    notes: dict[str, str] = {}

    def prepare() -> list[Callable[[], Any]]:
        try:
            return [_lower(context, case, context.implementation)[0]]
        except SkippedError as why:
            notes["skip"] = str(why)
            return []

    def run(found: list[Any]) -> tuple[str, dict[str, Any]]:
        if "skip" in notes:
            return "skip", {"why": notes["skip"]}
        if isinstance(found[0], Exception):
            raise found[0]
        clean, dirty = (jax.device_get(found[0](*_filled(case, value))) for value in (0.0, np.nan))
        paths = jax.tree.leaves_with_path(clean)
        for (path, a), b in zip(paths, jax.tree.leaves(dirty), strict=True):
            what = f"{case}: {jax.tree_util.keystr(path)}"
            assert np.isfinite(a.astype(np.float32)).all(), f"{what} is not finite without NaN"
            assert a.tobytes() == b.tobytes(), f"{what} changes with NaN where nothing is visible"
        return "pass", {}

    return Job(label=case.name, prepare=prepare, run=run)


def _filled(case: Case, value: float) -> tuple[Any, Any, Any]:
    """Arguments with a value in all keys that no row sees and all rows that see no key."""
    given: Any = case.visible()
    visible: Any = np.broadcast_to(given, case.full)
    group = visible.reshape(*case.B, case.K, -1, case.Sq, case.Skv)
    keys = ~np.moveaxis(group.any(axis=(-3, -2)), -1, -2)  # B Skv K
    rows = ~np.moveaxis(visible.any(axis=-1), -1, -2)  # B Sq N
    hidden = {"query": rows, "key": keys, "value": keys}
    x, (dout, dlse) = case.operands(), case.cotangents()

    def fill(array: np.ndarray, where: np.ndarray) -> np.ndarray:
        return np.where(where[..., None], array.dtype.type(value), array)

    return {name: fill(x[name], hidden[name]) for name in LINEAR}, fill(dout, rows), dlse
