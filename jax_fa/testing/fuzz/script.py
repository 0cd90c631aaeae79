"""Scripts that reproduce failures, and what they call."""

import sys
from pprint import pformat
from typing import Any

_HEAD = """import os

os.environ |= {environment}

from jax_fa.testing.fuzz import script

"""


def reproducing(
    environment: dict[str, str],
    small_tiles: bool,
    program: dict[str, Any] | None,
    data: dict[str, Any] | None,
    seed: int,
    backends: tuple[str, ...],
) -> str:
    """The text of a script; `program` None: the one of the seed, with all its data."""
    head = _HEAD.format(environment=pformat(environment, width=100))
    if program is None:
        return f"{head}script.replay_seed({seed}, {tuple(backends)}, small_tiles={small_tiles})\n"
    body = (
        f"script.replay(\n    {pformat(program, width=96)},\n    {data},\n    small_tiles={small_tiles},\n)\n"
    )
    return head + body


def replay(program: dict[str, Any], data: dict[str, Any], small_tiles: bool = False) -> None:
    """Runs one call, says what is wrong, and ends the process with 1 if anything is."""
    from jax_fa.testing.fuzz import worker
    from jax_fa.testing.fuzz.program import Data, Program
    from jax_fa.testing.fuzz.trial import Runner

    if small_tiles:
        worker.use_small_tiles()
    given = Program.from_dict(program)
    verdict = Runner(given)(Data(**data), twice=True)
    print(given)
    for fault in verdict.faults:
        print(f"{fault.result}: {fault.text}")
    print({name: round(ratio, 3) for name, ratio in verdict.worst.items()})
    sys.exit(1 if verdict.faults else 0)


def replay_seed(seed: int, backends: tuple[str, ...], small_tiles: bool = False) -> None:
    """Runs the program of a seed on its data."""
    from jax_fa.testing.fuzz import worker
    from jax_fa.testing.fuzz.drawing import draw_program

    if small_tiles:
        worker.use_small_tiles()
    worker.run_program(draw_program(seed, backends), draws=1000, seconds=60.0, shrink=0.0)
