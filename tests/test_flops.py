"""`flops` counts what the masks show, against boolean arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa.masks import Causal, Dense, Lengths, Prefix, SegmentIds, SlidingWindow
from jax_fa.testing.case_masks import KINDS
from jax_fa.testing.cases import Case


def _shape(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_every_mask(kind):
    case = Case(name="flops", mask=kind, Dv=24)
    shapes = (_shape(*x.shape) for x in case.operands().values())
    found = jax_fa.flops(*shapes, mask=case.library_mask())
    pairs = int(np.broadcast_to(case.visible(), case.full).sum())
    assert found.exact and found.pairs == pairs
    assert found.forward == 2 * pairs * (case.D + case.Dv) and isinstance(found.forward, int)


def test_conventions():
    x = _shape(2, 3, 6, 16)
    model, hardware = (jax_fa.flops(x, x, x, convention=name) for name in ("model", "hardware"))
    pairs = 2 * 6 * 9
    assert model.pairs == hardware.pairs == pairs and model.forward == hardware.forward == 64 * pairs
    assert [getattr(model, n) / model.forward for n in ("backward", "jvp", "second")] == [2, 3, 6]
    assert [getattr(hardware, n) / hardware.forward for n in ("backward", "jvp", "second")] == [2.5, 3, 9]


def test_sizes():
    """Grouped heads, layouts, a long sequence, arrays, empty ones."""
    q, k, v = _shape(2, 8, 5, 16), _shape(2, 2, 7, 16), _shape(2, 2, 7, 4)
    assert jax_fa.flops(q, k, v, layout="BNSD").forward == 2 * 20 * 2 * 8 * 35
    S = 2**20
    ids = np.repeat(np.arange(2**10), 2**10)
    x = _shape(S, 1, 8)
    assert jax_fa.flops(x, x, x, mask=SegmentIds(ids)).pairs == 2**30
    assert jax_fa.flops(x, x, x, mask=SlidingWindow(1023)).pairs == S * 1024 - 1023 * 512
    padding = np.arange(S) < 5
    assert jax_fa.flops(x, x, x, mask=Causal() & Dense(padding)).pairs == 5 * S - 10
    assert jax_fa.flops(np.ones((0, 1, 8)), np.ones((3, 1, 8)), np.ones((3, 1, 8))).pairs == 0


def test_masks_that_are_not_known():
    """What they may mask counts; what is known beside them does not."""
    x, lengths = _shape(2, 4, 1, 8), jax.ShapeDtypeStruct((2,), jnp.int32)
    found = jax_fa.flops(x, x, x, mask=Causal() & Lengths(key=lengths))
    assert not found.exact and found.pairs == 20
    found = jax_fa.flops(x, x, x, mask=Causal("bottom-right") & Lengths(key=lengths))
    assert not found.exact and found.pairs == 32
    inside = []
    jax.jit(lambda x, n: inside.append(jax_fa.flops(x, x, x, mask=Prefix(n) & SlidingWindow(0))))(
        np.ones((2, 4, 1, 8), np.float32), np.array([1, 2])
    )
    assert [(found.exact, found.pairs) for found in inside] == [(False, 8)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"convention": "flops"}, ValueError, "convention must be one of model, hardware; got 'flops'"),
        ({"is_causal": True}, TypeError, "flash_attention has no argument 'is_causal'; pass mask="),
        ({"bias": np.ones((3, 3), np.float32)}, ValueError, "bias must broadcast to"),
        ({"mask": Lengths(key=(9, 9))}, ValueError, r"key lengths must be in 0\.\.4"),
    ],
)
@pytest.mark.usefixtures("no_type_checker")
def test_wrong_arguments(options, error, message):
    x = _shape(2, 4, 1, 8)
    with pytest.raises(error, match=message):
        jax_fa.flops(x, x, x, **options)


def test_symbolic_sizes_are_refused():
    (S,) = jax.export.symbolic_shape("S")
    x = _shape(1, S, 1, 8)
    with pytest.raises(ValueError, match="flops counts known sizes; got"):
        jax_fa.flops(x, x, x)
