"""Reading programs: jaxprs, and the memory that XLA plans."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params


def equations(closed) -> Iterator:
    """Every equation of a jaxpr, those of inner jaxprs too."""
    for eqn in getattr(closed, "jaxpr", closed).eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def primitives(function, *args) -> Counter:
    """How often each primitive stands in the jaxpr of a call."""
    return Counter(eqn.primitive.name for eqn in equations(jax.make_jaxpr(function)(*args)))


# Also the pass that tests leave out where results alone count (conftest.py): what it moves out of a loop lives all the time.
ALL_PASSES: Any = {"xla_disable_hlo_passes": ""}


def temporary_bytes(lowered: Any) -> int:
    """Bytes of temporary memory that the compiled program needs. Nothing runs: XLA plans memory."""
    return lowered.compile(compiler_options=ALL_PASSES).memory_analysis().temp_size_in_bytes
