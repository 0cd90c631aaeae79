"""The native CPU backend: C++ kernels (`cc/cpu/`) behind the XLA FFI.

The kernels take arrays in the order they are stored in, so no operand is transposed or copied on the way.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import compat, dropout, native
from jax_fa.problem import (
    DIFFERENTIABLE,
    IN_CANN_FORM,
    STORED,
    Operands,
    Problem,
    Saved,
    dims,
    gradient_shape,
    out_shape,
)

missing: str | None = None  # why the extension is not there
try:
    import jax_fa._native as _native
except ImportError as error:
    missing = str(error)

name = "cpu"
platforms = ("cpu",)

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_MAX_HEAD_DIM = 768
_ALIBI = {None: 0, "linear": 1, "sqrt": 2}
_ROUNDING, _DLOGSUMEXP = 1, 2  # bits of `saved`: arrays beyond out, m, l and dout


if missing is None:
    # At import, so that exported programs find their targets in a process that traces none.
    for target, handler in _native.registrations().items():
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
        compat.guarantee_custom_call(target)


def why_not(problem: Problem, operands: Operands, *, platform: str, backward: bool) -> str | None:
    """Why this call cannot run here, or None."""
    if missing is not None:
        return native.absence(missing)
    wanted = os.environ.get("JAX_FA_CPU_ISA")
    if wanted and not _native.instruction_sets().get(wanted):
        return f"JAX_FA_CPU_ISA={wanted!r} is not one this machine has: {_available()}"
    if operands.query.dtype not in _DTYPES:
        return (
            f"serves float32, bfloat16 and float16, not {operands.query.dtype}: cast query, key and value (in Flax: the "
            'layer\'s dtype="float32"), or leave implementation at None, which takes xla'
        )
    d = dims(problem, operands)
    if not all(isinstance(size, (int, np.integer)) for size in (*d.B, d.Sq, d.Skv, d.N, d.K, d.D, d.Dv)):
        return "symbolic dimensions are not supported"
    if max(d.D, d.Dv) > _MAX_HEAD_DIM:
        return f"head_dim is at most {_MAX_HEAD_DIM}, not {max(d.D, d.Dv)}"
    return None


def instruction_set() -> str | None:
    """The one that calls take here; None where there is none."""
    return None if missing is not None else _native.chosen_instruction_set()


def _available() -> str:
    return ", ".join(isa for isa, there in _native.instruction_sets().items() if there)


def forward(problem: Problem, operands: Operands) -> tuple[Any, ...]:
    """out stored in out_axes, softmax max and sum `*B N Sq`, and rounding like out if the problem says so."""
    d = dims(problem, operands)
    stats = jax.ShapeDtypeStruct((*d.B, d.N, d.Sq), jnp.float32)
    out = jax.ShapeDtypeStruct(out_shape(problem, d), operands.query.dtype)
    present, arrays = _arrays(operands)
    outs = (out, stats, stats, *([out] if problem.saves_rounding else []))
    call = jax.ffi.ffi_call("jax_fa_cpu_forward", outs)
    saved = _ROUNDING if problem.saves_rounding else 0
    return tuple(call(*arrays, problem=_attribute(problem, present, saved)))


def backward(problem: Problem, operands: Operands, saved: Saved) -> Operands:
    """Gradients of the differentiable operands that are present."""
    d = dims(problem, operands, saved)
    present, arrays = _arrays(operands)
    names = [name for name in DIFFERENTIABLE if getattr(operands, name) is not None]

    def result(name: str) -> jax.ShapeDtypeStruct:
        operand = getattr(operands, name)
        # Sums over broadcast dims are float32, also where the operand is not.
        dtype = operand.dtype if name in STORED else jnp.float32
        return jax.ShapeDtypeStruct(gradient_shape(problem, d, name, operand.shape), dtype)

    rest, extra = [saved.out, saved.m, saved.l, saved.dout], 0
    if saved.rounding is not None:
        rest, extra = [*rest, saved.rounding], extra | _ROUNDING
    if saved.dlogsumexp is not None:
        rest, extra = [*rest, saved.dlogsumexp.astype(jnp.float32)], extra | _DLOGSUMEXP
    call = jax.ffi.ffi_call("jax_fa_cpu_backward", [result(name) for name in names])
    found = call(*arrays, *rest, problem=_attribute(problem, present, extra))
    given = Operands(**dict.fromkeys(STORED) | dict(zip(names, found, strict=True)))
    return given.map(lambda name, x: x.astype(getattr(operands, name).dtype))


def _arrays(operands: Operands) -> tuple[int, list[Any]]:
    """Which operands are given, as a bit mask in field order, and their arrays."""
    present, arrays = 0, []
    for bit, (name, x) in enumerate(operands.items()):
        if x is None or name in IN_CANN_FORM:
            continue
        present |= 1 << bit
        if name == "alibi_slopes" or (name == "bias" and x.dtype not in _DTYPES):
            x = x.astype(jnp.float32)
        arrays.append(x)
    return present, arrays


def _letters(axes: tuple[int, ...]) -> str:
    """Axes as letters: attributes must be hashable, so an array will not do."""
    return "".join(chr(ord("a") + axis) for axis in axes)


def _attribute(problem: Problem, present: int, saved: int) -> dict[str, Any]:
    """The static part as the handlers' struct; every field has exactly the type that C++ expects."""
    return {
        "present": np.uint32(present),
        "saved": np.uint32(saved),
        "query_axes": _letters(problem.query_axes),
        "key_axes": _letters(problem.key_axes),
        "value_axes": _letters(problem.value_axes),
        "out_axes": _letters(problem.out_axes),
        "scale": np.float32(problem.scale),
        "keep_prob": np.float32(problem.keep_prob),
        "soft_cap": np.float32(problem.logits_soft_cap or 0.0),
        "alibi": np.uint8(_ALIBI[problem.alibi]),
        "bias_apart": np.uint8(problem.bias_apart),
        "threshold": np.uint32(dropout.threshold(problem.keep_prob)),
    }
