"""The backend for NVIDIA Hopper GPUs: Pallas Mosaic GPU kernels with TMA and warpgroup matrix products (WGMMA).

The kernels are imported when the first call is lowered for a GPU. On CPU they run where Pallas' interpreter is forced
(`plgpu.force_gpu_interpret_mode`), slowly: for tests.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp

from jax_fa import compat
from jax_fa.backends.mosaic import choice, device, tuning
from jax_fa.backends.mosaic.options import Options
from jax_fa.call import STORED, Call, Operands, Saved

_OLDEST = (0, 11)
_DTYPES = ("bfloat16", "float16")


class Mosaic:
    """See `backends.Backend`."""

    name = Options.backend
    platforms = ("cuda",)
    emulated_on = ("cpu",)
    splits_rows = True

    def why_not(self, call: Call, *, platform: str, what: str) -> str | None:
        return _no_gpu(platform) or _no_kernel(call, what)

    def notes(self, call: Call) -> tuple[str, ...]:
        return _notes(call)

    def forward(self, call: Call) -> tuple[Any, ...]:
        from jax_fa.backends.mosaic.forward import forward

        tiles = choice.tiles_of("forward", call)

        def run(operands: Operands) -> tuple[Any, ...]:
            return forward(call.replace(operands=operands), tiles)

        return _run(run, call.without_hints().operands)

    def backward(self, call: Call, saved: Saved) -> Operands:
        if 0 in call.dims.B:  # vmap of nothing, of the cotangents alone
            found = {name: jnp.zeros(call.gradient_shape(name), call.acc) for name in call.gradient_names}
            return call.gradients(found)

        def run(operands: Operands, saved: Saved) -> Operands:
            return _backward(call.replace(operands=operands), saved)

        return _run(run, call.without_hints().operands, call.full(saved))


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
    capability = device.compute_capability()
    if capability is None:
        return "the GPU is not known where this is lowered: no device here, and no abstract device set"
    if capability != "9.0":
        return f"needs a Hopper GPU (compute capability 9.0), this one has {capability}"
    return None


def _no_kernel(call: Call, what: str) -> str | None:
    problem, operands, d = call.problem, call.operands, call.dims
    for array in STORED:
        x = getattr(operands, array)
        if str(x.dtype) not in _DTYPES:
            return f"{array} has dtype {x.dtype}; it serves {' and '.join(_DTYPES)}"
        if x.dtype != operands.query.dtype:
            return f"{array} has dtype {x.dtype} and query {operands.query.dtype}"
    if call.symbolic:
        return "a dimension is symbolic"
    # A derivative may have no cotangents (vmap of nothing), of a call that is not empty.
    if 0 in (*(d.B if what == "forward" else ()), d.Sq, d.Skv, d.N, d.K, d.D, d.Dv):
        return "a dimension is empty"
    for array in (*STORED, "out"):
        axes = problem.axes(array)
        if axes[-1] != len(axes) - 1:
            return f"the head_dim of {array} is not its last axis in memory"
    if operands.bias_offset is not None:
        return "it reads a bias by tiles and takes none that is indexed by row (bias_offset)"
    if operands.drop_bits is not None:
        return "it draws dropout bits itself and reads none (drop_mask)"
    if operands.dropout_start is not None:
        return "it draws the dropout bits of whole sequences, and none of shards"
    if max(d.D, d.Dv) > tuning.MAX_HEAD_DIM:
        return f"head_dim {max(d.D, d.Dv)} is above {tuning.MAX_HEAD_DIM}"
    return next((why for which in choice.kernels(call, what) if (why := choice.why_not(which, call))), None)


def _notes(call: Call) -> tuple[str, ...]:
    """Copies that this call costs and an aligned one would not."""
    from jax_fa.backends.mosaic.operands import aligned, whole_rows

    problem, operands, found = call.problem, call.operands, []
    for array in STORED:
        x = getattr(operands, array)
        axes = problem.axes(array)
        padded = jax.eval_shape(lambda x, axes=axes: aligned(x, axes), x)
        if padded.shape != x.shape:
            found.append(f"{array} {x.shape} is copied once, padded to {padded.shape}")
    for array in ("bias", "mask"):
        x = getattr(operands, array)
        if not choice.is_tile(x):
            continue
        padded = jax.eval_shape(whole_rows, x)
        if padded.shape != x.shape or padded.dtype != x.dtype:
            found.append(
                f"{array} {x.dtype}{list(x.shape)} is copied once, to {padded.dtype}{list(padded.shape)}"
            )
    return tuple(found)


def _backward(call: Call, saved: Saved) -> Operands:
    from jax_fa.backends.mosaic.dbias import dbias
    from jax_fa.backends.mosaic.dkv import dkv
    from jax_fa.backends.mosaic.dq import dq
    from jax_fa.backends.mosaic.operands import RowStatistics

    statistics, bias = RowStatistics.of(call, saved), call.operands.bias
    rows = dq(call, statistics, choice.tiles_of("dq", call))
    keys = dkv(call, statistics, choice.tiles_of("dkv", call))
    found = {"query": rows.query, "key": keys.key, "value": keys.value, "alibi_slopes": rows.slopes}
    if choice.needs_dbias(call):
        found["bias"] = dbias(call, statistics, choice.tiles_of("dbias", call))
    elif bias is not None and not choice.is_tile(bias):
        by_row = rows.bias_rows is not None
        found["bias"] = rows.bias_rows[..., None] if by_row else keys.bias_keys[..., None, :]
    for name in ("scale", "soft_cap"):
        if (x := getattr(rows, name)) is not None:
            found[name] = x.sum(axis=-1)
    return call.gradients(found)


def _run(fn, *args):
    return (compat.interpreted(fn) if compat.interpreting_gpu() else fn)(*args)
