"""The Mosaic GPU kernels as JAX has them before it lowers them: what Pallas' interpreter does not show."""

from functools import partial

import numpy as np
import pytest
from jax.extend.core import Literal
from mosaic_tools import abstract, both_directions, inside, needs_new_jax, request

from jax_fa.testing.cases import Case

pytestmark = needs_new_jax


def _equations(**options) -> list:
    """All of the forward and the backward of a call of several tiles."""
    case = Case(name="several", B=(1,), Sq=512, Skv=512, N=2, K=2, D=64, Dv=64, dtype="bfloat16", **options)
    call = abstract(partial(request, case), case.stored_operands())
    return [eqn for jaxpr in inside(both_directions(call)) for eqn in jaxpr.eqns]


@pytest.mark.parametrize("mask", ["causal", "segments", "dense", "dense_padding", "lengths"])
def test_masked_logits_stand_beside_no_constant(mask):
    """Beside one, the compiler moves a product in front of the choice, and rounds it where it rounds none that is not masked."""
    found = [eqn for eqn in _equations(mask=mask) if eqn.primitive.name in ("jit", "pjit")]
    choices = [
        eqn.invars for eqn in found if eqn.params["name"] == "_where" and eqn.outvars[0].aval.ndim == 2
    ]
    assert choices
    for values in choices:
        assert -np.inf not in [x.val for x in values if isinstance(x, Literal)]


@pytest.mark.parametrize("mask", [None, "causal"])
def test_dropout_makes_programs_no_larger_than_it_must(mask):
    """JAX lowers a kernel in time that grows faster than its equations, of which written-out rounds of Philox had many."""
    plain, dropping = len(_equations(mask=mask)), len(_equations(mask=mask, dropout=0.1))
    assert dropping < 3 * plain
