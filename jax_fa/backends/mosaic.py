"""The backend for NVIDIA Hopper GPUs: Pallas Mosaic GPU kernels with the copy engine and warpgroup matrix products.

The kernels are in `jax_fa/mosaic/`, imported when the first call is lowered for a GPU. On CPU they run where Pallas'
interpreter is forced (`plgpu.force_gpu_interpret_mode`), slowly: for tests.
"""

import jax
import jax.numpy as jnp

from jax_fa import compat
from jax_fa.mosaic import tuning
from jax_fa.problem import Operands, Problem, dims
from jax_fa.tiles import is_symbolic

name = "mosaic"
platforms = ("cuda",)

_OLDEST = (0, 11)
_DTYPES = ("bfloat16", "float16")


def why_not(problem: Problem, operands: Operands, *, platform: str, backward: bool) -> str | None:
    return _no_gpu(platform) or _no_kernel(problem, operands, backward)


def _no_gpu(platform: str) -> str | None:
    if jax.__version_info__[:2] < _OLDEST:
        return f"needs jax 0.11 or newer; this is {jax.__version__}"
    if platform == "cpu":
        if compat.interpreting_gpu():
            return None
        return "runs on CPU only in Pallas' interpreter (plgpu.force_gpu_interpret_mode)"
    capability = compat.compute_capability()
    if capability is None:
        return "the GPU is not known where this is lowered: no device here, and no abstract device set"
    if capability != "9.0":
        return f"needs a Hopper GPU (compute capability 9.0), this one has {capability}"
    return None


def _no_kernel(problem: Problem, operands: Operands, backward: bool) -> str | None:
    d = dims(problem, operands)
    arrays = {"query": operands.query, "key": operands.key, "value": operands.value}
    for array, x in arrays.items():
        if str(x.dtype) not in _DTYPES:
            return f"{array} has dtype {x.dtype}; it serves {' and '.join(_DTYPES)}"
        if x.dtype != operands.query.dtype:
            return f"{array} has dtype {x.dtype} and query {operands.query.dtype}"
    sizes = (*d.B, d.Sq, d.Skv, d.N, d.K, d.D, d.Dv)
    if any(map(is_symbolic, sizes)):
        return "a dimension is symbolic"
    if 0 in sizes:
        return "a dimension is empty"
    for array in ("query", "key", "value", "out"):
        axes = getattr(problem, f"{array}_axes")
        if axes[-1] != len(axes) - 1:
            return f"the head_dim of {array} is not its last axis in memory"
    if operands.drop_bits is not None:
        return "it draws dropout bits itself and reads none (drop_mask)"
    if max(d.D, d.Dv) > tuning.MAX_HEAD_DIM:
        return f"head_dim {max(d.D, d.Dv)} is above {tuning.MAX_HEAD_DIM}"
    if backward:
        return "the gradient has no kernel yet"
    if _tiles("forward", problem, operands) is None:
        return "bias and mask tiles leave no room in shared memory"
    return None


def _tiles(which: tuning.Which, problem: Problem, operands: Operands) -> tuning.Tiles | None:
    d = dims(problem, operands)
    whole = [
        x for x in (operands.bias, operands.mask) if x is not None and x.shape[-2] > 1 and x.shape[-1] > 1
    ]
    element_bytes = sum(1 if x.dtype == jnp.bool_ else x.dtype.itemsize for x in whole)
    staying, moving = (d.Skv, d.Sq) if which == "key_gradient" else (d.Sq * d.G, d.Skv)
    return tuning.tiles_for(which, d.D, d.Dv, rows=staying, width=moving, element_bytes=element_bytes)


def forward(problem: Problem, operands: Operands):
    """(out, softmax max, softmax sum): out stored in out_axes, the statistics `*B N Sq`."""
    from jax_fa.mosaic import forward as kernel

    tiles = _tiles("forward", problem, operands)
    return _run(lambda operands: kernel.forward(problem, operands, tiles), operands)


def _run(fn, *args):
    return (compat.interpreted(fn) if compat.interpreting_gpu() else fn)(*args)


def backward(problem: Problem, operands: Operands, out, m, l, dout, dlogsumexp) -> Operands:
    """Gradients of query, key, value and, where present, bias and alibi_slopes."""
    raise NotImplementedError
