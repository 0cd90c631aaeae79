"""Derivatives along tangents and of second order, against those of a dense attention in float64."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa.testing import derivatives
from jax_fa.testing.cases import BY_NAME, CASES, FEATURES, REAL_TILES, Case

# --- the table

# A tangent of logits of some hundreds exceeds 16 bits: the naive implementation, which is the measure, overflows.
_SECOND = tuple(case for case in CASES if not (case.spread >= 500 and case.dtype in ("bfloat16", "float16")))
# Second order takes several programs a case: by default, what the others do not have.
_FEW = tuple(case if case in FEATURES else pytest.param(case, marks=pytest.mark.slow) for case in _SECOND)


def _directions(case: Case) -> dict[str, Any]:
    """As the case stores its operands: x, its tangents, the cotangents z, and theirs."""
    z, z_tangent = case.cotangents(), derivatives.cotangent_tangents(case)
    return {
        "x": case.stored_operands(),
        "x_tangent": derivatives.stored(case, derivatives.tangents(case)),
        "y_tangent": derivatives.stored(case, derivatives.tangents(case, "other tangents")),
        "z": (case.stored(z[0]), z[1]),
        "z_tangent": (case.stored(z_tangent[0]), z_tangent[1]),
    }


def _gradients(attend, x, z):
    return jax.vjp(attend, x)[1](z)[0]


def _tangent(attend, x, x_tangent):
    return jax.jvp(attend, (x,), (x_tangent,))[1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tangent(case, backend):
    """jax.jvp of the output and the log-sum-exp."""
    attend = partial(case.flash_attention, implementation=backend)
    with case.context():
        at = _directions(case)
        run = jax.jit(lambda x, t: jax.jvp(attend, (x,), (t,)))
        results, found = run(at["x"], at["x_tangent"])
    derivatives.check(case, "tangent", found)
    _check_masked_rows(case, found)


def _check_masked_rows(case: Case, found) -> None:
    """0 exactly."""
    if case.mask is not None:
        masked = ~np.broadcast_to(case.visible(), case.full).any(axis=-1)
        assert not case.canonical(found[0])[np.moveaxis(masked, -1, -2)].any()
        assert not np.asarray(found[1])[masked].any()


@pytest.mark.parametrize("case", _FEW, ids=str)
def test_second_order(case, backend):
    """Each way to a second derivative: reverse over reverse, forward over reverse, reverse over forward, forward twice."""
    attend = partial(case.flash_attention, implementation=backend)
    tangent, gradients = partial(_tangent, attend), partial(_gradients, attend)

    def run(x, x_tangent, y_tangent, z, z_tangent):
        first, pullback = jax.vjp(gradients, x, z)
        of_operands, of_cotangents = pullback(x_tangent)
        forward, pullback = jax.vjp(tangent, x, x_tangent)
        return {
            "second": of_operands,
            "tangent": of_cotangents,
            "mixed": jax.jvp(gradients, (x, z), (x_tangent, z_tangent))[1],
            "reverse over forward": pullback(z)[0],
            "second_tangent": jax.jvp(lambda x: tangent(x, x_tangent), (x,), (y_tangent,))[1],
        }

    with case.context():
        found = jax.jit(run)(**_directions(case))
    # <z, tangent> and <x', gradients> are one function: their gradients are the same.
    derivatives.check(case, "second", found.pop("reverse over forward"))
    for what, x in found.items():
        derivatives.check(case, what, x)
    _check_masked_rows(case, found["second_tangent"])
