"""The tests check every annotation of the library: of functions with and without shapes, of results, and of classes."""

import beartype
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jax_fa
from jax_fa import call, dropout
from jax_fa.sequence_parallel import order


@jaxtyping.jaxtyped(typechecker=beartype.beartype)
def _number(x) -> int:
    return x


SEED = jnp.zeros(2, jnp.uint32)
WRONG = {
    "argument": lambda: dropout.threshold("0.5"),
    "item": lambda: call.canonical_shape((1, 2, 3), ("0", "1", "2")),
    "result": lambda: _number("1"),
    "field": lambda: call.Dims(B=3, Sq=1, Skv=1, N=1, K=1, D=1, Dv=1),
    "array": lambda: order.reorder([1, 2], devices=1),
    "dtype": lambda: dropout.keep_tile(SEED, SEED, np.arange(3.0), 0, 4, 1),
    "shape": lambda: dropout.keep_tile(SEED, SEED, np.zeros((3, 1), np.int32), 0, 4, 1),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_what_an_annotation_forbids_is_refused(call):
    with pytest.raises(Exception) as refused:
        call()
    assert type(refused.value).__module__.split(".")[0] in ("beartype", "jaxtyping"), refused.value


def test_the_fixture_lets_it_through(no_type_checker):
    assert _number("1") == "1"
    dropout.keep_tile(SEED, SEED, np.arange(3.0), 0, 4, 1)
    with pytest.raises(TypeError, match="__round__"):
        dropout.threshold("0.5")


def test_an_entry_keeps_its_name_and_signature():
    assert jax_fa.flash_attention.__name__ == "flash_attention"
    assert dropout.threshold.__name__ == "threshold" and dropout.threshold.__wrapped__ is not None
