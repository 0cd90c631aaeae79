"""The one place for what differs between JAX versions or is not public."""

import jax
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec


def varying_axes(x) -> frozenset[str]:
    """The manual mesh axes (`shard_map`) over which a value or aval differs."""
    return frozenset(getattr(jax.typeof(x), "vma", ()))


def vary(x, axes: frozenset[str]):
    """Marks x as differing over the manual axes given; the transpose sums over those it did not vary over."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


class Placement:
    """Where an aval lies: its mesh axes, in canonical order, and its manual axes."""

    def __init__(self, aval, axes: tuple[int, ...]) -> None:
        self._aval = aval
        spec = tuple(aval.sharding.spec)
        self._spec = [spec[axis] if axis < len(spec) else None for axis in axes]

    def aval(self, shape, dtype, canonical):
        """An aval placed the same way, whose dim i is canonical dim `canonical[i]`."""
        spec = PartitionSpec(*(self._spec[i] for i in canonical))
        sharding = NamedSharding(self._aval.sharding.mesh, spec)
        return self._aval.update(shape=tuple(shape), dtype=dtype, sharding=sharding, weak_type=False)


def lower_plain(fn, ctx, *args):
    """Lowers a traceable function inside another primitive's lowering rule.

    Shardings and manual axes are types of the surrounding program; inside, everything is local and plain.
    """
    plain = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return mlir.lower_fun(fn, multiple_results=True)(ctx.replace(avals_in=plain), *args)
