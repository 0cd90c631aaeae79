"""Reading programs: jaxprs."""

from collections import Counter
from collections.abc import Iterator

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
