"""The backend for NVIDIA Hopper GPUs: Pallas Mosaic GPU kernels with TMA and warpgroup matrix products.

The kernels are in `jax_fa/mosaic/`, imported when the first call is lowered for a GPU. On CPU they run where Pallas'
interpreter is forced (`plgpu.force_gpu_interpret_mode`), slowly: for tests.
"""

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_fa import compat
from jax_fa.backends.mosaic import tuning
from jax_fa.backends.mosaic.options import Options
from jax_fa.backends.mosaic.tuning import Tiles
from jax_fa.call import Call, Dims, Operands, Problem, Saved

__all__ = ["Options", "Tiles", "backend"]

_OLDEST = (0, 11)
_DTYPES = ("bfloat16", "float16")


class Mosaic:
    """See `backends.Backend`."""

    name = Options.backend
    platforms = ("cuda",)
    emulated_on = ("cpu",)

    def why_not(self, call: Call, *, platform: str, what: str) -> str | None:
        return _no_gpu(platform) or _no_kernel(call, what == "backward")

    def notes(self, call: Call) -> tuple[str, ...]:
        return _notes(call)

    def forward(self, call: Call) -> tuple[Any, ...]:
        from jax_fa.backends.mosaic.forward import forward

        tiles = _tiles("forward", call)
        assert tiles is not None  # why_not asked
        return _run(
            lambda operands: forward(call.replace(operands=operands), tiles), call.without_hints().operands
        )

    def backward(self, call: Call, saved: Saved) -> Operands:
        if 0 in call.dims.B:  # vmap of nothing, of the cotangents alone
            found = {name: jnp.zeros(call.gradient_shape(name), call.acc) for name in call.gradient_names}
            return call.gradients(found)
        return _run(partial(_backward, call.problem, call.dims), call.without_hints().operands, saved)


backend = Mosaic()


def _no_gpu(platform: str) -> str | None:
    if platform == "cpu":
        if compat.interpreting_gpu():
            return None
        return "runs on CUDA only; on CPU in Pallas' interpreter, for tests (plgpu.force_gpu_interpret_mode)"
    if jax.__version_info__[:2] < _OLDEST:
        return (
            "needs jax 0.11 or newer, which needs Python 3.12 or newer; this is jax "
            f"{jax.__version__} on Python {sys.version.split()[0]}"
        )
    capability = compat.compute_capability()
    if capability is None:
        return "the GPU is not known where this is lowered: no device here, and no abstract device set"
    if capability != "9.0":
        return f"needs a Hopper GPU (compute capability 9.0), this one has {capability}"
    return None


def _no_kernel(call: Call, backward: bool) -> str | None:
    problem, operands, d = call.problem, call.operands, call.dims
    arrays = {"query": operands.query, "key": operands.key, "value": operands.value}
    for array, x in arrays.items():
        if str(x.dtype) not in _DTYPES:
            return f"{array} has dtype {x.dtype}; it serves {' and '.join(_DTYPES)}"
        if x.dtype != operands.query.dtype:
            return f"{array} has dtype {x.dtype} and query {operands.query.dtype}"
    if call.symbolic:
        return "a dimension is symbolic"
    if 0 in (*d.B, d.Sq, d.Skv, d.N, d.K, d.D, d.Dv):
        return "a dimension is empty"
    for array in ("query", "key", "value", "out"):
        axes = problem.axes(array)
        if axes[-1] != len(axes) - 1:
            return f"the head_dim of {array} is not its last axis in memory"
    if operands.bias_offset is not None:
        return "it reads a bias by tiles and takes none that is indexed by row (bias_offset)"
    if operands.drop_bits is not None:
        return "it draws dropout bits itself and reads none (drop_mask)"
    if max(d.D, d.Dv) > tuning.MAX_HEAD_DIM:
        return f"head_dim {max(d.D, d.Dv)} is above {tuning.MAX_HEAD_DIM}"
    for which in _kernels(operands, backward):
        if _tiles(which, call) is None:
            return "tiles of bias and mask leave no room in shared memory"
    return None


def _kernels(operands: Operands, backward: bool) -> tuple[tuning.Which, ...]:
    if not backward:
        return ("forward",)
    return ("query_gradient", "key_gradient", *(("bias_gradient",) if _is_tile(operands.bias) else ()))


def _is_tile(x) -> bool:
    """Whether a bias or mask has Sq x Skv numbers."""
    return x is not None and x.shape[-2] > 1 and x.shape[-1] > 1


def _notes(call: Call) -> tuple[str, ...]:
    """Copies that this call costs and an aligned one would not."""
    from jax_fa.backends.mosaic.operands import aligned, whole_rows

    problem, operands, found = call.problem, call.operands, []
    for array in ("query", "key", "value"):
        x = getattr(operands, array)
        axes = problem.axes(array)
        padded = jax.eval_shape(lambda x, axes=axes: aligned(x, axes), x)
        if padded.shape != x.shape:
            found.append(f"{array} {x.shape} is copied once, padded to {padded.shape}")
    for array in ("bias", "mask"):
        x = getattr(operands, array)
        if not _is_tile(x):
            continue
        padded = jax.eval_shape(whole_rows, x)
        if padded.shape != x.shape or padded.dtype != x.dtype:
            found.append(
                f"{array} {x.dtype}{list(x.shape)} is copied once, to {padded.dtype}{list(padded.shape)}"
            )
    return tuple(found)


def _tiles(which: tuning.Which, call: Call) -> tuning.Tiles | None:
    operands, d, options = call.operands, call.dims, call.problem.options
    if isinstance(options, Options) and (tiles := options.of(which)) is not None:
        return tiles
    whole = [
        x for x in (operands.bias, operands.mask) if x is not None and x.shape[-2] > 1 and x.shape[-1] > 1
    ]
    element_bytes = sum(1 if x.dtype == jnp.bool_ else x.dtype.itemsize for x in whole)
    staying, moving = (d.Skv, d.Sq) if which == "key_gradient" else (d.Sq * d.G, d.Skv)
    return tuning.tiles_for(
        which,
        d.D,
        d.Dv,
        rows=staying,
        width=moving,
        element_bytes=element_bytes,
        vectors=_vectors(which, operands),
    )


def _vectors(which: tuning.Which, operands: Operands) -> int:
    """How many arrays of one scalar per key, or per row, come with every tile that moves."""
    bias, mask, segments = operands.bias, operands.mask, operands.segment_row is not None
    if which == "bias_gradient":
        return 0
    if which != "key_gradient":
        found = sum(x is not None and x.shape[-2] == 1 < x.shape[-1] for x in (bias, mask)) + segments
        return found + (which == "query_gradient")  # its sums
    upper = operands.upper is not None or segments or (mask is not None and mask.shape[-1] == 1)
    bias_rows = bias is not None and bias.shape[-1] == 1
    present = (operands.lower, operands.alibi_slopes, operands.position)
    upper = upper or operands.lower is not None  # which makes upper bounds too
    statistics = 3
    return statistics + segments + upper + bias_rows + sum(x is not None for x in present)


def _backward(problem: Problem, d: Dims, operands: Operands, given: Saved) -> Operands:
    from jax_fa.backends.mosaic.dbias import bias_gradient
    from jax_fa.backends.mosaic.dkv import key_gradient
    from jax_fa.backends.mosaic.dq import query_gradient
    from jax_fa.backends.mosaic.operands import RowStatistics

    def tiles(which: tuning.Which) -> tuning.Tiles:
        found = _tiles(which, call)
        assert found is not None  # why_not asked
        return found

    call = Call(problem, operands, d)
    saved = RowStatistics.of(problem, operands, given)
    found = query_gradient(problem, operands, d, saved, tiles("query_gradient"))
    found |= key_gradient(problem, operands, d, saved, tiles("key_gradient"))
    if _is_tile(operands.bias):
        found["bias"] = bias_gradient(problem, operands, d, saved, tiles("bias_gradient"))
    elif operands.bias is not None:
        found["bias"] = (
            found["bias_rows"][..., None] if "bias_rows" in found else found["bias_keys"][..., None, :]
        )
    if operands.alibi_slopes is not None:
        found["alibi_slopes"] = found["slopes"]
    for scalar in ("scale", "soft_cap"):
        if scalar in found:
            found[scalar] = found[scalar].sum(axis=-1)

    return call.gradients(found)


def _run(fn, *args):
    return (compat.interpreted(fn) if compat.interpreting_gpu() else fn)(*args)
