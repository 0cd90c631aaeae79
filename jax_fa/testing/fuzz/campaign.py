"""A run of many programs: rounds, each a process with an environment of its own, and the file of what they found."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jax_fa import ascend, compat
from jax_fa.backends import native
from jax_fa.backends.ascend import installation
from jax_fa.testing.fuzz import script, sharded

PROGRAMS = 20  # of a round
SILENCE = 400.0  # seconds without a line: the process hangs
# Every so many rounds, so many programs are run by another number of threads, too, and must give the same bits.
THREADS_EVERY, THREADS_PROGRAMS = 2, 3
# ... but for kernels in Pallas' interpreter, whose threads wait for one another.
INTERPRETED, INTERPRETER_THREADS = "mosaic", "16"
# Compiling takes most of the time, and half of it goes into optimizations of loops, which small arrays do not need.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# (There are as many threads as devices, at least.)
MORE_DEVICES = f" --xla_force_host_platform_device_count={sharded.DEVICES}"
CACHES = (
    "",
    "32768,524288,16777216",
    "49152,2097152,33554432",
    "65536,1048576,1048576",
)  # first to third, in bytes


@dataclass(frozen=True)
class Options:
    seed: int
    count: int | None = None  # calls
    seconds: float | None = None
    draws: int = 100
    program_seconds: float = 4.0
    shrink: float = 60.0
    near: float = 1.0
    backends: tuple[str, ...] = ()
    instruction_sets: tuple[str, ...] = ()
    out: Path | None = None
    resume: bool = False


@dataclass
class Totals:
    rounds: int = 0
    programs: int = 0
    calls: int = 0
    refused: int = 0
    failures: int = 0
    near: int = 0  # misses that are no failures
    reached: int = 0
    seconds: float = 0.0
    worst: dict[str, float] = field(default_factory=dict)
    sets: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        near = f" and {self.near} near misses" if self.near else ""
        per_minute = 60 * self.calls / max(self.seconds, 1e-9)
        sets = ", ".join(f"{name} {count}" for name, count in sorted(self.sets.items()))
        return (
            f"{self.calls} calls of {self.programs} programs in {self.seconds:.0f} s ({per_minute:.0f} a minute), "
            f"{self.refused} programs refused, {self.failures} failures{near}; calls by instruction set: {sets}"
        )


def present_backends() -> tuple[str, ...]:
    found = ["xla"]
    if native.missing is None:
        found = ["cpu", "cpu", "cpu", "xla"]  # the one with the most code comes most often
    if installation.absence() is None:
        found.append("ascend")
    return tuple(found)


def possible_backends() -> tuple[str, ...]:
    """Those, and what runs in an interpreter when it is asked for."""
    interpreted = (INTERPRETED,) if compat.has_gpu_interpreter() else ()
    return (*dict.fromkeys(present_backends()), *interpreted)


def present_sets() -> tuple[str, ...]:
    if native.missing is not None:
        return ("",)
    return tuple(name for name, there in native.extension.instruction_sets().items() if there)


def environment(options: Options, number: int) -> dict[str, str]:
    """What differs between rounds."""
    random = np.random.default_rng((options.seed, number))
    sets = options.instruction_sets or present_sets()
    found = {
        "JAX_FA_CPU_ISA": sets[number % len(sets)],
        "JAX_FA_CPU_CACHES": str(random.choice(CACHES)),
        "NPROC": INTERPRETER_THREADS if INTERPRETED in options.backends else str(random.integers(1, 4)),
        "XLA_FLAGS": FLAGS + (MORE_DEVICES if random.random() < 0.4 else ""),
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
    }
    if installation.absence() is None:
        found[installation.EMULATOR] = str(ascend.emulator_dir())
    return {name: x for name, x in found.items() if x}


def small_tiles(options: Options, number: int) -> bool:
    return bool(np.random.default_rng((options.seed, number, 1)).random() < 0.5)


class Campaign:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.totals = Totals()
        self._start = time.monotonic()
        self._before = 0.0
        self._digests: dict[int, str] = {}  # of the bits of each program's first call, in this round
        if options.resume:
            self._resume()

    def run(self) -> Totals:
        while not self._over():
            self._round(self.totals.rounds)
            self.totals.rounds += 1
            self._count_time()
            self._write(state=self._state())
            print(f"round {self.totals.rounds}: {self.totals}", flush=True)
        return self.totals

    # --- the file

    def _write(self, **line: Any) -> None:
        if self.options.out is not None:
            with self.options.out.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _state(self) -> dict[str, Any]:
        return {"seed": self.options.seed, **vars(self.totals), "sets": dict(self.totals.sets)}

    def _resume(self) -> None:
        out = self.options.out
        if out is None or not out.exists():
            return
        states = [json.loads(line).get("state") for line in out.read_text().splitlines()]
        states = [state for state in states if state and state["seed"] == self.options.seed]
        if states:
            last = dict(states[-1])
            last.pop("seed")
            self.totals = Totals(**last | {"sets": Counter(last["sets"])})
            self._before = self.totals.seconds

    # --- rounds

    def _count_time(self) -> None:
        self.totals.seconds = self._before + time.monotonic() - self._start

    def _over(self) -> bool:
        self._count_time()
        o, t = self.options, self.totals
        return (o.count is not None and t.calls >= o.count) or (
            o.seconds is not None and t.seconds >= o.seconds
        )

    def _round(self, number: int) -> None:
        variables = environment(self.options, number)
        self._digests.clear()
        first = (self.options.seed * 100_000 + number) * PROGRAMS
        seed, end = first, first + PROGRAMS
        while seed < end and not self._over():
            reached = self._process(number, variables, (seed, end))
            if reached is None:
                break
            seed = reached + 1  # what a program kills is that program alone
        alone = MORE_DEVICES not in variables["XLA_FLAGS"] and INTERPRETED not in self.options.backends
        if number % THREADS_EVERY == 0 and alone and not self._over():
            self._with_other_threads(number, variables, (first, first + THREADS_PROGRAMS))

    def _with_other_threads(self, number: int, variables: dict[str, str], seeds: tuple[int, int]) -> None:
        threads = 1 + int(variables["NPROC"]) % 3
        given = self._given(number, seeds) | {"draws": 1, "shrink": 0.0}
        done = subprocess.run(
            self._command(given),
            env={**os.environ, **variables, "NPROC": str(threads)},
            capture_output=True,
            text=True,
            timeout=SILENCE,
            check=False,
        )
        for line in map(json.loads, done.stdout.splitlines()):
            seed = line.get("done")
            before = self._digests.get(seed, "")
            if before and line["digest"] not in ("", before):
                text = f"{threads} threads give other bits than {variables['NPROC']}"
                self._failed(variables, given, seed, "bits", text, {})

    def _command(self, given: dict[str, Any]) -> list[str]:
        return [sys.executable, "-P", "-m", "jax_fa.testing.fuzz.worker", json.dumps(given)]

    def _given(self, number: int, seeds: tuple[int, int]) -> dict[str, Any]:
        o = self.options
        return {
            "seeds": seeds,
            "draws": o.draws,
            "seconds": o.program_seconds,
            "shrink": o.shrink,
            "backends": o.backends or present_backends(),
            "small_tiles": small_tiles(o, number),
        }

    def _process(self, number: int, variables: dict[str, str], seeds: tuple[int, int]) -> int | None:
        """Runs the programs of these seeds; returns the seed of the one that ended the process, None: none did."""
        at, told, given = seeds[0] - 1, False, self._given(number, seeds)
        child = subprocess.Popen(
            self._command(given),
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        lines, errors, readers = _lines(child)
        try:
            while True:
                self._count_time()
                line = self._next(lines)
                if line is None:
                    break
                at = line.get("begin", at)
                self._note(line, variables, given)
                if self._over():
                    told = True
                    return None
        except queue.Empty:
            self._failed(variables, given, at, "call", f"hangs: no sign of life for {SILENCE:.0f} s", {})
            return at
        finally:
            child.kill()
            code = child.wait()
            for reader in readers:
                reader.join()
            for stream in (child.stdout, child.stderr):
                assert stream is not None
                stream.close()
        if code in (0, -9) or told:
            return None
        self._failed(variables, given, at, "process", f"ended with {code}: {''.join(errors)[-2000:]}", {})
        return at

    def _next(self, lines: "queue.Queue[dict[str, Any] | None]") -> dict[str, Any] | None:
        """The next line; None at the end. While nothing comes, the time may run out."""
        end = time.monotonic() + SILENCE
        while True:
            try:
                return lines.get(timeout=5)
            except queue.Empty:
                if self._over():
                    return {}
                if time.monotonic() > end:
                    raise

    def _note(self, line: dict[str, Any], variables: dict[str, str], given: dict[str, Any]) -> None:
        t = self.totals
        if "refused" in line:
            t.refused += 1
        if "done" in line:
            self._digests[line["done"]] = line["digest"]
            t.programs += 1
            t.calls += line["calls"]
            t.reached += line["reached"]
            t.sets[variables.get("JAX_FA_CPU_ISA", "none")] += line["calls"]
            for name, ratio in line["worst"].items():
                t.worst[name] = max(t.worst.get(name, 0.0), ratio)
        if "failure" in line:
            self._failed(variables, given, line["failure"], line["result"], line["text"], line)

    def _failed(
        self,
        variables: dict[str, str],
        given: dict[str, Any],
        seed: int,
        result: str,
        text: str,
        found: dict[str, Any],
    ) -> None:
        near = "ratio" in found and found["ratio"] <= self.options.near
        if near:
            self.totals.near += 1
        else:
            self.totals.failures += 1
        small, data = found.get("small_program"), found.get("small_data")
        source = script.reproducing(variables, given["small_tiles"], small, data, seed, given["backends"])
        self._write(
            **{"near" if near else "failure": result},
            text=text,
            seed=seed,
            environment=variables,
            small_tiles=given["small_tiles"],
            **{
                name: found[name]
                for name in ("others", "program", "data", "small_program", "small_data")
                if name in found
            },
            script=source,
        )
        print(f"{'NEAR MISS' if near else 'FAILURE'} {result} {text}\n{source}", flush=True)


def _lines(
    child: "subprocess.Popen[str]",
) -> tuple["queue.Queue[dict[str, Any] | None]", list[str], list[threading.Thread]]:
    """What the process says, line by line, what it writes to stderr, and who reads these."""
    lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
    errors: list[str] = []

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.put(json.loads(line))
        lines.put(None)

    def read_errors() -> None:
        assert child.stderr is not None
        for line in child.stderr:
            errors.append(line)
            del errors[:-200]

    readers = [threading.Thread(target=target, daemon=True) for target in (read, read_errors)]
    for reader in readers:
        reader.start()
    return lines, errors, readers
