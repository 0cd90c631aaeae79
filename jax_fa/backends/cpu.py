"""The native CPU backend: C++ kernels (`cc/cpu/`) behind the XLA FFI.

The kernels take arrays in the order they are stored in, so no operand is transposed or copied on the way.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import compat, dropout
from jax_fa.backends import native
from jax_fa.call import STORED, Call, Operands, Problem, Saved

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_MAX_HEAD_DIM = 768
_ALIBI = {None: 0, "linear": 1, "sqrt": 2}

if native.extension is not None:
    # At import, so that exported programs find their targets in a process that traces none.
    for target, handler in native.extension.registrations().items():
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
        compat.guarantee_custom_call(target)


class Cpu:
    """See `backends.Backend`."""

    name = "cpu"
    platforms = ("cpu",)
    emulated_on = ()

    def why_not(self, call: Call, *, platform: str, what: str) -> str | None:
        if native.missing is not None:
            return native.absence()
        wanted = os.environ.get("JAX_FA_CPU_ISA")
        if wanted and not native.extension.instruction_sets().get(wanted):
            return f"JAX_FA_CPU_ISA={wanted!r} is not one this machine has: {_available()}"
        if call.dtype not in _DTYPES:
            return (
                f"serves float32, bfloat16 and float16, not {call.dtype}: cast query, key and value (in Flax: the "
                'layer\'s dtype="float32"), or leave implementation at None, which takes xla'
            )
        if call.symbolic:
            return "symbolic dimensions are not supported"
        if (widest := max(call.dims.D, call.dims.Dv)) > _MAX_HEAD_DIM:
            return f"head_dim is at most {_MAX_HEAD_DIM}, not {widest}"
        return None

    def notes(self, call: Call) -> tuple[str, ...]:
        return ()

    def forward(self, call: Call) -> tuple[Any, ...]:
        stats = jax.ShapeDtypeStruct(call.stats_shape, jnp.float32)
        out = jax.ShapeDtypeStruct(call.out_shape, call.dtype)
        present, arrays = _arrays(call.operands)
        saves = call.problem.saves_rounding
        run = jax.ffi.ffi_call("jax_fa_cpu_forward", (out, stats, stats, *([out] if saves else [])))
        return tuple(run(*arrays, problem=_attribute(call.problem, present, ("rounding",) if saves else ())))

    def backward(self, call: Call, saved: Saved) -> Operands:
        present, arrays = _arrays(call.operands)

        def result(name: str) -> jax.ShapeDtypeStruct:
            # Sums over broadcast dims are float32, also where the operand is not.
            dtype = call.dtype if name in STORED else jnp.float32
            return jax.ShapeDtypeStruct(call.gradient_shape(name), dtype)

        rest = [saved.out, saved.m, saved.l, saved.dout]
        given = {"rounding": saved.rounding, "dlogsumexp": saved.dlogsumexp}
        given = {name: x for name, x in given.items() if x is not None}
        if "dlogsumexp" in given:
            given["dlogsumexp"] = given["dlogsumexp"].astype(jnp.float32)
        rest += given.values()
        run = jax.ffi.ffi_call("jax_fa_cpu_backward", [result(name) for name in call.gradient_names])
        found = run(*arrays, *rest, problem=_attribute(call.problem, present, tuple(given)))
        return call.gradients(dict(zip(call.gradient_names, found, strict=True)))


backend = Cpu()


def instruction_set() -> str | None:
    """The one that calls take here; None where there is none."""
    return None if native.extension is None else native.extension.chosen_instruction_set()


def _available() -> str:
    return ", ".join(isa for isa, there in native.extension.instruction_sets().items() if there)


def _arrays(operands: Operands) -> tuple[int, list[Any]]:
    """Which operands are given, as a bit mask in field order, and their arrays."""
    present, arrays = 0, []
    for bit, (name, x) in enumerate(operands.items()):
        if x is None:
            continue
        present |= 1 << bit
        if name == "alibi_slopes" or (name == "bias" and x.dtype not in _DTYPES):
            x = x.astype(jnp.float32)
        arrays.append(x)
    return present, arrays


def _letters(axes: tuple[int, ...]) -> str:
    """Axes as letters: attributes must be hashable, so an array will not do."""
    return "".join(chr(ord("a") + axis) for axis in axes)


def _attribute(problem: Problem, present: int, saved: tuple[str, ...]) -> dict[str, Any]:
    """The static part as the handlers' struct; every field has exactly the type that C++ expects."""
    bits = native.extension.saved_bits()
    return {
        "present": np.uint32(present),
        "saved": np.uint32(sum(bits[name] for name in saved)),
        **{f"{name}_axes": _letters(problem.axes(name)) for name in (*STORED, "out")},
        "scale": np.float32(problem.scale),
        "keep_prob": np.float32(problem.keep_prob),
        "soft_cap": np.float32(problem.logits_soft_cap or 0.0),
        "alibi": np.uint8(_ALIBI[problem.alibi]),
        "bias_apart": np.uint8(problem.bias_apart),
        "threshold": np.uint32(dropout.threshold(problem.keep_prob)),
    }
