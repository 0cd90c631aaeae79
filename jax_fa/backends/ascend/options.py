"""What a caller can choose of this backend."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jax_fa.arguments import shown
from jax_fa.call import Problem


@dataclass(frozen=True, kw_only=True)
class Options:
    """`implementation=jax_fa.ascend.Options(...)`: the backend by name, and how it runs.

    Args:
      max_work: a call of more multiply-adds than this (`B*N*Sq*Skv*(D + Dv)`, as if nothing were masked) is split into
        several launches, over batch, heads and rows; None: never. The default is about a second's work of an Ascend
        910B, far below what its watchdogs allow.

    Raises:
      ValueError: max_work is not a positive int or None.
    """

    backend: ClassVar[str] = "ascend"
    max_work: int | None = 2**46

    def __post_init__(self) -> None:
        work = self.max_work
        if work is None:
            return
        if isinstance(work, bool) or not isinstance(work, (int, np.integer)) or work <= 0:
            raise ValueError(f"max_work must be a positive int or None; got {shown(work)}.")
        object.__setattr__(self, "max_work", int(work))


def max_work(problem: Problem) -> int | None:
    options = problem.options if isinstance(problem.options, Options) else Options()
    return options.max_work
