"""Shared memory of the Mosaic GPU kernels: how much they take, and whose it is.

Pallas' interpreter bounds no memory and has no warps, so it shows neither.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_tools import both_directions, inside, interpreter, jaxprs_of, lowered, needs_new_jax

import jax_fa
from jax_fa import compat, masks
from jax_fa.backends.mosaic import Tiles, choice, operands, tuning
from jax_fa.backends.mosaic.geometry import Geometry
from jax_fa.call import Call, Operands, Problem

pytestmark = needs_new_jax
Sq, Skv, N = 500, 600, 2


def _float(*shape: int, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


# --- how much


_ROWS, _HEADS = _float(1, N, Sq, dtype=jnp.int32), _float(1, N)
_SEGMENTS = {"segment_row": _ROWS, "segment_key": _float(1, N, Skv, dtype=jnp.int32)}
_SCALARS = {"alibi_slopes": _float(1, N, Sq), "position": _ROWS, "scale": _HEADS, "soft_cap": _HEADS}
_DROPPING = {
    "dropout_seed": _float(1, 2, dtype=jnp.uint32),
    "dropout_stream": _float(1, N, 2, dtype=jnp.uint32),
    "keep_threshold": _float(1, N, dtype=jnp.uint32),
}
FEATURES = {
    "plain": {},
    "tiles": {
        "bias": _float(1, N, Sq, Skv),
        "mask": _float(1, N, Sq, Skv, dtype=bool),
        "lower": _ROWS,
        "upper": _ROWS,
        **_SEGMENTS,
        **_SCALARS,
        **_DROPPING,
    },
    "one bias per row": {
        "bias": _float(1, N, Sq, 1),
        "mask": _float(1, N, 1, Skv, dtype=bool),
        **_SEGMENTS,
        **_SCALARS,
    },
    "one bias per key": {"bias": _float(1, N, 1, Skv), "mask": _float(1, N, Sq, 1, dtype=bool), **_DROPPING},
}


def _call(D: int, Dv: int, more: dict) -> Call:
    axes = (0, 1, 2, 3)
    problem = Problem(query_axes=axes, key_axes=axes, value_axes=axes, out_axes=axes, scale=1.0)
    query, key, value = (
        _float(1, S, N, width, dtype=jnp.bfloat16) for S, width in ((Sq, D), (Skv, D), (Skv, Dv))
    )
    return Call.of(problem, Operands(query=query, key=key, value=value, **more))


def _kernels(which: tuning.Which, call: Call, tiles: Tiles) -> list:
    """The kernels of a call that take the tiles of this name."""
    from jax_fa.backends.mosaic.dbias import DbiasKernel
    from jax_fa.backends.mosaic.dkv import DkvKernel
    from jax_fa.backends.mosaic.dq import DqKernel
    from jax_fa.backends.mosaic.forward import ForwardKernel

    g = Geometry.of(call, tiles, pack=which != "dbias")
    found = []

    def make(given: Operands):
        call = Call.of(g.problem, given)
        row = jnp.zeros(call.stats_shape, jnp.float32)
        dout = jnp.zeros(call.out_shape, call.dtype)
        saved = operands.RowStatistics(dout=dout, maximum=row, inverse=row, delta=row)
        if which == "forward":
            found.append(ForwardKernel(g, operands.for_rows(g, call)))
        elif which == "dq":
            found.append(DqKernel(g, operands.for_rows(g, call, saved)))
        elif which == "dbias":
            found.append(DbiasKernel(g, operands.for_rows(g, call, saved), (1, N)))
        else:
            inputs = operands.for_keys(g, call, saved)
            only_dv = replace(inputs, value=None, delta=None)
            found.append(DkvKernel(g, inputs, ("key", "value")))
            found.append(DkvKernel(g, inputs, ("key",)))
            found.append(DkvKernel(g, only_dv, ("value",)))

    jax.eval_shape(make, call.operands)
    return found


def _bytes(kernel) -> int:
    """What Pallas allocates: arrays in whole units, barriers of 8 bytes, and two units for reductions."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    leaves = jax.tree.leaves(kernel.smem(), is_leaf=lambda x: isinstance(x, plgpu.Barrier))
    total = plgpu.CompilerParams().reduction_scratch_bytes
    for x in leaves:
        if isinstance(x, plgpu.Barrier):
            total += 8 * int(np.prod(x.num_barriers))
        else:
            size = math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
            total += -(-size // tuning.SMEM_UNIT) * tuning.SMEM_UNIT
    return total


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("consumers", [1, 2, 3])
@pytest.mark.parametrize("which", tuning.TABLES)
def test_memory_is_counted(which, consumers, feature):
    """What the tables of tiles are told that a kernel takes is no less than what it takes."""
    for D, Dv in ((16, 16), (192, 128), (256, 256)):
        call = _call(D, Dv, FEATURES[feature])
        if which == "dbias" and not choice.is_tile(call.operands.bias):
            continue
        element_bytes, vectors = choice._element_bytes(call.operands), choice.vectors(which, call.operands)
        for width, stages in ((64, 1), (256, 3)):
            tiles = Tiles(width=width, stages=stages, consumers=consumers)
            counted = tuning.smem_bytes(which, tiles, D, Dv, element_bytes, vectors)
            for kernel in _kernels(which, call, tiles):
                assert _bytes(kernel) <= counted, (D, Dv, tiles)


def test_a_call_that_fills_the_memory_is_lowered():
    """The tiles of the table for this call left 112 bytes less than there are."""
    S = 512
    query, value = (_float(1, S, 1, D, dtype=jnp.bfloat16) for D in (192, 128))
    more = _float(1, 1, S, S), _float(1, 1, S, S, dtype=bool), _float(1, S, dtype=jnp.int32)

    def attend(query, value, bias, mask, ids):
        mask = masks.Dense(mask) & masks.SegmentIds(ids)
        return jax_fa.flash_attention(query, query, value, bias=bias, mask=mask, implementation="mosaic")

    assert "jax_fa_forward" in lowered(attend, query, value, *more).mlir_module()


# --- whose


_SYNCHRONIZING = {"barrier_wait", "barrier_arrive"}


def _synchronizes(eqn) -> set[str]:
    names = {e.primitive.name for inner in jaxprs_of(eqn) for j in inside(inner) for e in j.eqns}
    return (names | {eqn.primitive.name}) & _SYNCHRONIZING


def test_consumers_take_turns_to_reduce_over_warps():
    """Rows lie in several warps. The compiler reduces over these through scratch memory that is the same for all warpgroups
    of a block, and does not synchronize them: consumers that reduce at the same time would read one another's values."""
    program = both_directions(_call(64, 64, FEATURES["one bias per row"]))
    around = []
    for jaxpr in inside(program):
        for i, eqn in enumerate(jaxpr.eqns):
            if eqn.primitive.name.startswith("reduce_") and 0 in eqn.params["axes"]:
                sides = jaxpr.eqns[i - 1 :: -1], jaxpr.eqns[i + 1 :]
                around.append([next(filter(_synchronizes, eqns), None) for eqns in sides])
    around = [sides for sides in around if any(sides)]  # the others are XLA's
    assert len(around) == 3  # forward, dq, dkv
    for before, after in around:  # all consumers but one wait for a turn, and pass it on
        assert (before.primitive.name, after.primitive.name) == ("cond", "cond")
        assert (_synchronizes(before), _synchronizes(after)) == ({"barrier_wait"}, {"barrier_arrive"})


def test_kernels_are_interpreted_one_at_a_time():
    """XLA runs kernels that do not depend on one another, such as those of the parts of a mask, side by side; the
    interpreter has one memory for all."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(x, out, shared):
        @pl.loop(0, 8)
        def _(i):
            shared[...] = x[...]
            out[...] = shared[...]

    x = jnp.arange(128, dtype=jnp.float32)
    scratch = [plgpu.SMEM(x.shape, x.dtype)]
    kernel = plgpu.kernel(body, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype), scratch_types=scratch)
    with interpreter():
        run = jax.jit(compat.interpreted(kernel))
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda i: np.asarray(run(x + i)), range(8)))
    np.testing.assert_array_equal(found, np.asarray(x) + np.arange(8)[:, None])
