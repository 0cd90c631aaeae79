"""What others can add: backends, mask kinds; and options objects in place of a backend's name."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa import backends, masks
from jax_fa.backends import xla
from jax_fa.masks import Causal, Lengths, Mask

SHAPE = (2, 6, 2, 4)


def _operands():
    return (jax.random.normal(jax.random.key(i), SHAPE) for i in range(3))


class Doubling:
    """The portable backend, twice the output: one can see that it ran."""

    name = "doubling"
    platforms = ("cpu",)
    emulated_on = ()

    def why_not(self, call, *, platform, what):
        return "has no backward" if what == "backward" else None

    def notes(self, call):
        return ("doubles",)

    def forward(self, call):
        out, *rest = xla.backend.forward(call)
        return (2 * out, *rest)

    def backward(self, call, saved):
        raise AssertionError("why_not refused it")


def test_a_registered_backend_is_preferred_where_it_serves():
    q, k, v = _operands()
    plain = jax_fa.flash_attention(q, k, v, implementation="xla")
    with backends.registered(Doubling(), before="cpu"):
        assert backends.names()[0] == "doubling"
        np.testing.assert_array_equal(jax.jit(lambda *x: jax_fa.flash_attention(*x))(q, k, v), 2 * plain)
        told = jax_fa.explain(q, k, v, platforms="cpu")
        assert told.chosen == {"cpu": "doubling"} and told.notes["cpu"] == ("doubles",)
        assert told.reasons["cpu"]["xla"] is None and told.backward != told.chosen
        assert told.backward["cpu"] == jax_fa.explain(q, k, v, platforms="cpu").backward["cpu"] != "doubling"
        with pytest.raises(NotImplementedError, match=r"doubling: has no backward"):
            jax.grad(lambda q: jax_fa.flash_attention(q, k, v, implementation="doubling").sum())(q)
    assert "doubling" not in backends.names()
    with pytest.raises(ValueError, match=r"implementation must be None or one of .* got 'doubling'"):
        jax_fa.flash_attention(q, k, v, implementation="doubling")


@pytest.mark.parametrize(
    ("given", "before", "error", "message"),
    [
        (object(), "xla", TypeError, "backend must be an object with name, platforms"),
        (Doubling, "xla", TypeError, "backend must be an object with name, platforms"),
        (xla.backend, "xla", ValueError, "backend must have a name of its own; got 'xla', which is taken"),
        (Doubling(), "gpu", ValueError, "before must be one of 'cpu', 'mosaic', 'ascend', 'xla'; got 'gpu'"),
    ],
)
def test_what_register_refuses(given, before, error, message, no_type_checker):
    with pytest.raises(error, match=message):
        backends.register(given, before)
    assert backends.names() == ("cpu", "mosaic", "ascend", "xla")


@dataclass(frozen=True)
class Dilated(Mask):
    """Every key up to its own position, but none further away than `reach`: lengths as data."""

    reach: Any
    name: str = "dilated"

    def rows(self, rows, skv):
        return rows.i - rows.per_batch(self.reach), rows.i + 1


def test_a_mask_kind_is_a_pytree_by_being_defined():
    mask = Dilated(jnp.asarray([1, 3]))
    leaves, tree = jax.tree.flatten(mask)
    again = jax.tree.unflatten(tree, leaves)
    assert len(leaves) == 1 and again.reach is mask.reach and again.name == mask.name
    assert jax.tree.leaves(Dilated(2)) == [] and hash(jax.tree.structure(Dilated(2))) is not None


def test_a_mask_kind_in_a_call():
    q, k, v = _operands()
    i, j = np.arange(6)[:, None], np.arange(6)
    visible = np.stack([(j <= i) & (j >= i - reach) for reach in (1, 3)])[:, None]
    want = jax_fa.flash_attention(q, k, v, mask=visible)

    @jax.jit
    def run(mask):
        return jax_fa.flash_attention(q, k, v, mask=mask)

    np.testing.assert_allclose(run(Dilated(jnp.asarray([1, 3]))), want, atol=1e-6)
    joined = Dilated(jnp.asarray([1, 3])) & Lengths(key=[4, 6]) & Causal()
    cut = visible & (j < np.asarray([4, 6])[:, None, None, None])
    np.testing.assert_allclose(run(joined), jax_fa.flash_attention(q, k, v, mask=cut), atol=1e-6)
    assert masks.members(joined)[0] == joined.masks[0]


@dataclass(frozen=True)
class Unhashable:
    backend: ClassVar[str] = "none of ours"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cann", "on Ascend 'ascend'"),
        (Unhashable(), "or the Options of one of them; got"),
        (jax_fa.ascend.Options, r"Pass an object of this class: Options\(\.\.\.\)"),
        (3, "got 3"),
    ],
)
def test_what_implementation_refuses(given, message):
    q, k, v = _operands()
    with pytest.raises(ValueError, match=message):
        jax_fa.flash_attention(q, k, v, implementation=given)


def test_options_name_their_backend():
    x = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    for options in (jax_fa.ascend.Options(max_work=None), jax_fa.mosaic.Options()):
        told = jax_fa.explain(x, x, x, implementation=options, platforms="tpu")
        assert told.problem.options is options and told.chosen == {"tpu": None}
        assert told.problem.implementation == type(options).backend


@pytest.mark.parametrize("work", [0, -1, 1.5, True, "all"])
def test_max_work_is_a_positive_int(work, no_type_checker):
    with pytest.raises(ValueError, match="max_work must be a positive int or None; got"):
        jax_fa.ascend.Options(max_work=work)


def test_tiles_are_those_of_kernels(no_type_checker):
    with pytest.raises(ValueError, match="tiles must name kernels among forward"):
        jax_fa.mosaic.Options(tiles={"sideways": jax_fa.mosaic.Tiles(width=64, stages=2, consumers=2)})
    with pytest.raises(TypeError, match=r"tiles must hold jax_fa.mosaic.Tiles; got 64 for 'forward'"):
        jax_fa.mosaic.Options(tiles={"forward": 64})
    one = jax_fa.mosaic.Options(tiles={"forward": jax_fa.mosaic.Tiles(width=64, stages=2, consumers=2)})
    assert hash(one) == hash(jax_fa.mosaic.Options(tiles=one.tiles))
