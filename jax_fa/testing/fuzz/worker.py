"""A process of programs: what its parent starts, with instruction set, caches and threads in the environment.

Writes a line of JSON for each thing that happens.
"""

import json
import sys
import time
from typing import Any

import jax

from jax_fa.backends.xla import tiling
from jax_fa.testing.fuzz.drawing import draw_program
from jax_fa.testing.fuzz.program import Data, Program, draw_data
from jax_fa.testing.fuzz.shrink import fails_alike, shrunk
from jax_fa.testing.fuzz.trial import Runner

LEAST = 5  # draws of data for each program, however long they take
SMALL_TILES = {"MIN_TILE": 16, "MAX_ROWS": 16, "MAX_KEYS": 32, "ONE_TILE_ELEMENTS": 0}


def use_small_tiles() -> None:
    """So that short sequences cross several tiles of the portable backend."""
    for name, size in SMALL_TILES.items():
        setattr(tiling, name, size)


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def run_program(program: Program, draws: int, seconds: float, shrink: float) -> None:
    """The program on so many draws of data, or fewer where that takes more seconds of a processor."""
    start, run = time.process_time(), Runner(program)
    calls, reached, digest, failed = 0, 0, "", False
    worst: dict[str, float] = {}
    for seed in range(draws):
        if seed >= LEAST and time.process_time() - start > seconds:
            break
        data = draw_data(program, seed)
        try:
            verdict = run(data, twice=seed == 0)
        except NotImplementedError as error:
            say(refused=program.seed, why=str(error))
            return
        calls += 1
        reached += verdict.reached
        digest = verdict.digest if seed == 0 else digest
        for name, ratio in verdict.worst.items():
            worst[name] = max(worst.get(name, 0.0), ratio)
        if verdict.faults and not failed:  # one failure for each program
            failed = True
            _report(program, data, verdict.faults, shrink)
    say(done=program.seed, calls=calls, reached=reached, worst=worst, digest=digest)


def _report(program: Program, data: Data, faults: Any, shrink: float) -> None:
    first = faults[0]
    small, small_data = program, data
    if shrink and first.result not in ("bits",):
        small, small_data = shrunk(program, data, fails_alike(first.result), shrink)
    say(
        failure=program.seed,
        result=first.result,
        text=first.text,
        ratio=max(fault.ratio for fault in faults),
        others=[fault.result for fault in faults[1:]],
        program=program.as_dict(),
        data=data.as_dict(),
        small_program=small.as_dict(),
        small_data=small_data.as_dict(),
    )


def main(options: dict[str, Any]) -> None:
    if options["small_tiles"]:
        use_small_tiles()
    for seed in range(*options["seeds"]):
        say(begin=seed)
        program = draw_program(seed, tuple(options["backends"]))
        run_program(program, options["draws"], options["seconds"], options["shrink"])
        if seed % 10 == 9:
            jax.clear_caches()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
