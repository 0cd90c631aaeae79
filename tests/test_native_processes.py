"""The native CPU backend and its process: threads, memory, fork, exit, export.

What is tested here depends on the whole process, so every test starts its own: it runs one of the functions
called `child_...`, which fail by raising.
"""

import gc
import os
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa.backends import cpu, native
from jax_fa.call import DIFFERENTIABLE, STORED, Operands, Saved
from jax_fa.masks import Causal
from jax_fa.testing.cases import Case, check

if native.missing is not None:
    pytest.skip(f"needs the native extension: {native.missing}", allow_module_level=True)
if not hasattr(os, "sched_setaffinity"):
    pytest.skip("needs Linux, to give a process some of the processors", allow_module_level=True)

MIB = 2**20
TIMEOUT = 120  # seconds; far more than any child needs, so only one that hangs meets it
# One device, unlike the process of the tests: XLA has no fewer threads than devices.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def _run(child, *args, cpus: int | None = None, timeout: int = TIMEOUT, **environment: str) -> str:
    """Runs a function of this file in a process of its own, quietly; returns what it printed."""
    allowed = sorted(os.sched_getaffinity(0))[:cpus]
    code = (
        f"import os, sys; os.sched_setaffinity(0, {allowed}); sys.path[:] = {sys.path}; "
        f"import {__name__} as here; here.{child.__name__}(*{args})"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), (
        f"{done.returncode}\n{done.stdout}\n{done.stderr[-8000:]}"
    )
    return done.stdout


def _pool_size() -> int:
    """The threads of XLA's pool, which runs our tasks, as the kernel names them."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("tf_XLAEigen")


def _gradient(case: Case):
    """A call with its gradients, and its arguments."""
    dout, dlse = case.cotangents()
    run = jax.jit(partial(case.gradient, implementation="cpu"))
    return run, (case.stored_operands(), case.stored(dout), dlse)


# --- threads

_LONG = Case(name="threads", B=(1,), Sq=700, Skv=700, N=4, K=4, D=32, Dv=32, mask="causal")
CALLS = (
    replace(_LONG, name="threads-causal"),
    replace(_LONG, name="threads-gqa-dropout", K=2, mask=None, dropout=0.2),
    replace(_LONG, name="threads-bfloat16", dtype="bfloat16", layout="BNSD"),
    replace(_LONG, name="threads-bias", B=(3,), Sq=200, Skv=600, K=1, bias="NQK", slopes="N"),
    replace(_LONG, name="threads-bias-of-keys", B=(2,), Sq=150, Skv=800, K=2, bias="K", mask="dense_padding"),
    # Few rows: their keys are split among tasks, and the parts merged.
    replace(_LONG, name="threads-decode", Sq=1, Skv=4000, K=2, mask=None),
)


def _subnormal(case: Case):
    """A call among numbers that a thread may flush to zero or not."""
    run, (x, dout, dlse) = _gradient(case)
    tiny = np.float32(1e-36)  # normal itself; its products with attention weights are not
    return run, (x | {"value": x["value"] * tiny}, dout, dlse * tiny)


def _statistics():
    """A call that returns the softmax's max and sum themselves."""
    x = _LONG.operands()

    def run(q, k, v):
        return jax_fa.flash_attention_score(q, k, v, head_num=4, input_layout="BSND", implementation="cpu")

    return jax.jit(run), (x["query"], x["key"], x["value"])


def _tangents(case: Case):
    """Tangents of a call, with the forward and from what it saved, along its own operands."""
    call = dense.call_of(case, "cpu")

    def run(operands):
        again = call.replace(operands=operands)
        out, m, l, *tangents = cpu.backend.jvp(again, operands)
        return *tangents, *cpu.backend.tangent(again, operands, Saved(out=out, m=m, l=l))

    return jax.jit(run), (Operands(**{name: getattr(call.operands, name) for name in STORED}),)


def _second(case: Case):
    """The second derivative along the operands themselves and the cotangents."""
    call = dense.call_of(case, "cpu")

    def run(operands, cotangents):
        again = call.replace(operands=operands)
        out, m, l = cpu.backend.forward(again)
        saved = Saved(out=out, m=m, l=l, **cotangents, dout_tangent=out)
        return cpu.backend.second(again, Operands(**{x: getattr(operands, x) for x in along}), saved)

    along = [name for name in DIFFERENTIABLE if getattr(call.operands, name) is not None]
    dout, dlse = case.cotangents()
    return jax.jit(run), (call.operands, {"dout": case.stored(dout), "dlogsumexp": dlse})


def child_results(path: str) -> None:
    """Runs all calls twice and saves the bits of what they return."""
    programs = {case.name: _gradient(case) for case in CALLS}
    programs |= {"subnormal": _subnormal(_LONG), "statistics": _statistics()}
    programs["tangents"] = _tangents(replace(_LONG, name="threads-tangents", mask=None))
    programs |= {f"second {case.name}": _second(case) for case in CALLS if case.dtype == "float32"}
    found = {}
    for name, (run, args) in programs.items():
        first, again = (jax.tree.leaves(run(*args)) for _ in range(2))
        for i, (a, b) in enumerate(zip(first, again, strict=True)):
            bits = np.frombuffer(np.asarray(a).tobytes(), np.uint8)
            assert bits.tobytes() == np.asarray(b).tobytes(), f"{name}: result {i} changes from call to call"
            assert bits.any(), f"{name}: result {i} is zero throughout"
            found[f"{name} {i}"] = bits
    np.savez(path, threads=_pool_size(), **found)


def test_the_number_of_threads_changes_no_bit(tmp_path):
    runs = []
    for threads in (1, 2, 3):
        path = tmp_path / f"{threads}.npz"
        _run(child_results, str(path), NPROC=str(threads))
        with np.load(path) as found:
            runs.append(dict(found))
        assert runs[-1].pop("threads") == threads
    first, *others = runs
    for other in others:
        assert sorted(other) == sorted(first)
        different = [name for name in first if first[name].tobytes() != other[name].tobytes()]
        assert different == []


# --- many calls at once

BRANCHES = tuple(
    Case(name=f"soak-{i}", B=(1,), Sq=96 + 8 * (i % 3), Skv=300, N=2, K=1, D=16, Dv=16) for i in range(24)
)


def _loss(implementation, q, k, v):
    out, lse = jax_fa.flash_attention(
        q, k, v, mask=Causal("bottom-right"), return_logsumexp=True, implementation=implementation
    )
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))


def child_soak(calls: int, python_threads: int) -> None:
    """One program of calls that do not wait for each other, by one thread or several."""
    operands = [tuple(case.operands().values()) for case in BRANCHES]

    def total(operands):
        return sum(_loss("cpu", *x) for x in operands)

    run = jax.jit(jax.value_and_grad(total))
    one = jax.jit(jax.value_and_grad(lambda x: _loss("xla", *x)))
    want = [one(x) for x in operands]
    value, gradients = first = jax.block_until_ready(run(operands))
    np.testing.assert_allclose(value, sum(w[0] for w in want), rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients, [w[1] for w in want]
    )

    failures = []

    def repeat() -> None:
        try:
            for _ in range(calls):
                jax.tree.map(np.testing.assert_array_equal, run(operands), first)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=repeat) for _ in range(python_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("cpus", "calls", "python_threads"),
    [
        pytest.param(1, 20, 1, id="one-processor", marks=pytest.mark.slow),
        pytest.param(2, 20, 1, id="two-processors"),
        pytest.param(1, 10, 4, id="one-processor-four-callers"),
        pytest.param(2, 10, 4, id="two-processors-four-callers", marks=pytest.mark.slow),
    ],
)
def test_many_calls_at_once(cpus, calls, python_threads):
    """Calls that share too few threads wait for each other, never for ever, and give what one alone gives."""
    if len(os.sched_getaffinity(0)) < cpus:
        pytest.skip(f"needs {cpus} processors")
    _run(child_soak, calls, python_threads, cpus=cpus)


def child_many(calls: int) -> None:
    """So many calls one after another, while signals come in: the same bits, and no more memory in the end."""
    run, arguments = _gradient(Case(name="many", B=(1,), Sq=33, Skv=65, N=2, K=1, dropout=0.2))
    first = jax.tree.map(np.asarray, run(*arguments))
    handled = []
    signal.signal(signal.SIGALRM, lambda number, frame: handled.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
    before = 0
    for i in range(calls):
        found = run(*arguments)
        if i % 100 == 0:
            jax.tree.map(np.testing.assert_array_equal, found, first)
        if i == calls // 5:
            gc.collect()
            before = _resident("VmRSS")
    signal.setitimer(signal.ITIMER_REAL, 0)
    gc.collect()
    grown = _resident("VmRSS") - before
    assert handled and grown < 2 * MIB, f"{len(handled)} signals; {grown / MIB:.1f} MiB grown"


@pytest.mark.parametrize("calls", [500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_calls_take_no_memory(calls):
    _run(child_many, calls, timeout=1800)


# --- how a process ends, and makes others


def _small(x=1.0):
    q = jnp.full((1, 65, 2, 8), x)
    return jax.grad(lambda q: jnp.sum(jnp.sin(jax_fa.flash_attention(q, q, q, implementation="cpu"))))(q)


def child_leaves_at_once() -> None:
    x = jnp.ones((1, 2048, 4, 64))
    jax.jit(jax.grad(lambda x: _loss("cpu", x, x, x)))(x)


def test_a_process_may_end_while_a_call_runs():
    _run(child_leaves_at_once)


def child_forks() -> None:
    before = np.asarray(_small())
    with warnings.catch_warnings():
        # JAX and, from 3.12 on, Python warn of any fork; this child uses neither's threads.
        warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
        warnings.filterwarnings("ignore", message=r".* use of fork\(\)", category=DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        a = np.random.default_rng(0).standard_normal((64, 64))
        os._exit(0 if np.isfinite(a @ a).all() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    np.testing.assert_array_equal(_small(), before)


def test_fork():
    """A forked child that computes without us ends well, and its parent goes on."""
    _run(child_forks)


def child_spawns() -> None:
    import multiprocessing

    before = np.asarray(_small())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(_grandchild), before)
        pool.close()
        pool.join()


def _grandchild() -> np.ndarray:
    return np.asarray(_small())


def test_spawn():
    """A spawned child runs the kernel as its parent did."""
    _run(child_spawns)


# --- the extension: absent, and found by exported programs


def child_has_no_extension() -> None:
    sys.modules["jax_fa._native"] = None  # what import finds
    for name in [name for name in sys.modules if name == "jax_fa" or name.startswith("jax_fa.")]:
        if name != "jax_fa._native":
            del sys.modules[name]
    import jax_fa as fresh
    from jax_fa.backends import native as backend

    assert backend.missing is not None and "jax_fa._native" in backend.missing
    x = jnp.ones((1, 9, 2, 8))
    assert f"cpu     {native.absence(backend.missing)}" in str(fresh.explain(x, x, x))
    np.testing.assert_allclose(fresh.flash_attention(x, x, x), x)


def test_without_the_extension():
    _run(child_has_no_extension)


EXPORTED = Case(name="exported", mask="causal")
# Not a function of this file, whose imports would do more than a user's process does.
USER = """
import sys
from pathlib import Path
import numpy as np
import jax_fa
from jax import export

at = Path(sys.argv[1])
program = export.deserialize((at / "program").read_bytes())
with np.load(at / "given.npz") as given:
    out, gradients = program.call(*(given[str(i)] for i in range(4)))
np.savez(at / "found.npz", out, *gradients)
"""


def test_exported_programs_run_elsewhere(tmp_path):
    """A serialized program calls the kernel in a process that has traced nothing, only imported jax_fa."""
    pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers to serialize")
    x, dout = EXPORTED.operands(), EXPORTED.cotangents()[0]

    @jax.jit
    def run(q, k, v, dout):
        out, pullback = jax.vjp(lambda *x: jax_fa.flash_attention(*x, mask=Causal()), q, k, v)
        return out, pullback(dout)

    given = (x["query"], x["key"], x["value"], dout)
    exported = jax.export.export(run, platforms=("cpu",))(*given)
    text = exported.mlir_module()
    assert "jax_fa_cpu_forward" in text and "jax_fa_cpu_backward" in text
    (tmp_path / "program").write_bytes(exported.serialize())
    np.savez(tmp_path / "given.npz", **{str(i): a for i, a in enumerate(given)})
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys; sys.path[:] = {sys.path}\n{USER}", str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    with np.load(tmp_path / "found.npz") as found:
        ours = list(found.values())
    with jax.default_device(jax.devices("cpu")[0]):
        direct = jax.tree.leaves(run(*given))
    for there, here in zip(ours, direct, strict=True):
        np.testing.assert_array_equal(there, here)
    check(EXPORTED, ours[0])


# --- memory


def _resident(what: str) -> int:
    """Bytes of memory that this process holds (VmRSS), or has held at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{what}:")[1].split()[0])


def _backward(q, k, v, dout):
    """Forward and backward of one causal call."""
    attend = partial(jax_fa.flash_attention, mask=Causal(), implementation="cpu")
    out, pullback = jax.vjp(attend, q, k, v)
    return out, pullback(dout)


def _jvp(q, k, v, other):
    """Forward and tangents, from the backend itself."""
    request = jax_fa.flash_attention.request(q, k, v, mask=Causal(), implementation="cpu")
    out, _, _, *tangents = cpu.backend.jvp(request.call, Operands(query=other, key=v, value=q))
    return out, tangents


def child_memory(function: str, S: int, D: int, limit: int) -> None:
    """One causal call; `limit` bounds what it needs beyond arguments and results."""

    def program(S: int):
        x = jax.ShapeDtypeStruct((1, S, 8, D), jnp.float32)
        return jax.jit(globals()[function]).lower(x, x, x, x).compile()

    def arguments(S: int) -> list[jax.Array]:
        def make(i: int) -> jax.Array:
            x = np.random.default_rng(i).standard_normal((1, S, 8, D), np.float32)
            return jax.block_until_ready(jnp.asarray(x))

        return [make(i) for i in range(4)]

    jax.block_until_ready(program(64)(*arguments(64)))
    run = program(S)
    args = arguments(S)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew: making the arguments took memory too
    before = _resident("VmRSS")
    found = jax.tree.leaves(jax.block_until_ready(run(*args)))
    results = sum(x.nbytes for x in found)
    grown, planned = _resident("VmHWM") - before - results, run.memory_analysis().temp_size_in_bytes
    print(f"S={S}: {grown / MIB:.1f} MiB grown, {planned / MIB:.1f} MiB of it planned")
    assert grown < limit and planned < limit
    assert all(bool(jnp.isfinite(x).all()) for x in found)


@pytest.mark.parametrize(
    ("function", "S", "D", "limit"),
    [
        (_backward, 8192, 64, 64 * MIB),
        pytest.param(_backward, 32768, 64, 200 * 10**6, marks=pytest.mark.slow),
        pytest.param(_jvp, 4096, 64, 64 * MIB, marks=pytest.mark.slow),
        (_jvp, 4096, 128, 64 * MIB),
    ],
)
def test_memory(function, S, D, limit):
    """Beyond arguments and results a call needs little; its logits would be 2 GiB, and 32 GiB.

    On two processors: each thread has memory of its own.
    """
    print(_run(child_memory, function.__name__, S, D, limit, cpus=2, timeout=600))
