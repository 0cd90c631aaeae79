"""The native CPU backend: C++ kernels (`cc/cpu/`) behind the XLA FFI.

The kernels take arrays in the order they are stored in, so no operand is transposed or copied on the way.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import compat, dropout
from jax_fa.backends import native
from jax_fa.call import OF_FUNCTIONS, PLAIN_DIFFERENTIABLE, STORED, Call, Operands, Problem, Saved
from jax_fa.paged.call import PagedCall

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_MAX_HEAD_DIM = 768
_ALIBI = {None: 0, "linear": 1, "sqrt": 2}

if native.extension is not None:
    # At import, so that exported programs find their targets in a process that traces none.
    for kept, type_ in native.extension.registered_types().items():
        compat.register_ffi_type(kept, type_)
    for target, handler in native.extension.registrations().items():
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
        compat.guarantee_custom_call(target)


class Cpu:
    """See `backends.Backend`."""

    name = "cpu"
    platforms = ("cpu",)
    emulated_on = ()
    splits_rows = True

    def why_not(self, call: Call | PagedCall, *, platform: str, what: str) -> str | None:
        if native.missing is not None:
            return native.absence()
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

    def why_no_functions(self, call: Call) -> str | None:
        problem, operands = call.problem, call.operands
        if problem.score_mod is not None or operands.blocks is None:
            return f"does not support {problem.names_of_functions}: xla does"
        if len(problem.mask_mods) > 1:
            return (
                "takes one BlockMask and no other function of a pair beside it: make it of f(...) & g(...), or leave "
                "implementation at None, which takes xla"
            )
        if operands.block_pairs is None:
            return (
                "takes a BlockMask of known values, and of up to 128 MiB of pairs in blocks that are masked in part: xla serves "
                "those of traced arrays, and larger ones"
            )
        return None

    def why_no_sinks(self, call: Call, what: str) -> str | None:
        return None

    def notes(self, call: Call | PagedCall) -> tuple[str, ...]:
        return (f"kernels {tuning()}",)

    def forward(self, call: Call) -> tuple[Any, ...]:
        return _run("forward", call, _forward_results(call))

    def jvp(self, call: Call, tangents: Operands) -> tuple[Any, ...]:
        return _run("jvp", call, [*_forward_results(call), _like_out(call), _stats(call)], tangents=tangents)

    def tangent(self, call: Call, tangents: Operands, saved: Saved) -> tuple[Any, Any]:
        results = [_like_out(call), _stats(call)]
        out, logsumexp = _run("tangent", call, results, saved=saved.of_forward(), tangents=tangents)
        return out, logsumexp

    def backward(self, call: Call, saved: Saved) -> Operands:
        names = [name for name in call.gradient_names if name in PLAIN_DIFFERENTIABLE]
        found = _run("backward", call, [_gradient(call, name) for name in names], saved=saved)
        return call.gradients(dict(zip(names, found, strict=True)))

    def second(self, call: Call, tangents: Operands, saved: Saved) -> tuple[Operands, Any, Any]:
        results = {name: _gradient(call, name) for name in call.gradient_names}
        for name, like in (("dout", _like_out(call)), ("dlogsumexp", _stats(call))):
            if call.problem.gradients is None or name in call.problem.gradients:
                results[name] = like
        arrays = _run("second", call, list(results.values()), saved=saved, tangents=tangents)
        found = dict(zip(results, arrays, strict=True))
        return call.gradients(found), found.get("dout"), found.get("dlogsumexp")

    def paged(self, call: PagedCall) -> tuple[Any, ...]:
        o, stats = call.operands, jax.ShapeDtypeStruct(call.stats_shape, jnp.float32)
        factors = [
            None if x is None else x.astype(jnp.float32)
            for x in (o.key_scale, o.value_scale, o.scale, o.soft_cap)
        ]
        first = o.query, o.key_pages, o.value_pages, o.page_table, o.lengths
        arrays = [x for x in (*first, *call.bounds(), *factors) if x is not None]
        optional = o.value_pages, *factors  # in the order of their bits
        problem = {
            "present": np.uint32(sum(1 << bit for bit, x in enumerate(optional) if x is not None)),
            "scale": np.float32(call.problem.scale),
            "soft_cap": np.float32(call.problem.logits_soft_cap or 0.0),
        }
        out = jax.ShapeDtypeStruct(call.out_shape, call.problem.out_dtype)
        return tuple(jax.ffi.ffi_call("jax_fa_cpu_paged", (out, stats, stats))(*arrays, problem=problem))


backend = Cpu()


def instruction_set() -> str | None:
    """The one that calls take here; None where there is none."""
    return None if native.extension is None else native.extension.chosen_instruction_set()


def tuning() -> str | None:
    """Its caches and tiles, as the kernels describe them; None likewise."""
    return None if native.extension is None else native.extension.cpu_tuning()


def _stats(call: Call) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(call.stats_shape, jnp.float32)


def _like_out(call: Call) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(call.out_shape, call.dtype)


def _forward_results(call: Call) -> list[jax.ShapeDtypeStruct]:
    out, stats = _like_out(call), _stats(call)
    return [out, stats, stats, *([out] if call.problem.saves_rounding else [])]


def _gradient(call: Call, name: str) -> jax.ShapeDtypeStruct:
    """As the kernels give it: sums over broadcast dims are float32, also where the operand is not."""
    return jax.ShapeDtypeStruct(call.gradient_shape(name), call.dtype if name in STORED else jnp.float32)


def _run(
    what: str,
    call: Call,
    results: list[jax.ShapeDtypeStruct],
    *,
    saved: Saved | None = None,
    tangents: Operands | None = None,
) -> tuple[Any, ...]:
    """Calls the handler of that name."""
    present, arrays = _arrays(call.operands)
    given = {} if saved is None else saved.present()
    for name in ("dlogsumexp", "dlogsumexp_tangent"):
        if name in given:
            given[name] = given[name].astype(jnp.float32)
    along = Operands() if tangents is None else tangents
    names = (
        [*given, "rounding"] if what in ("forward", "jvp") and call.problem.saves_rounding else list(given)
    )
    wanted = call.problem.gradients
    may_be_unwanted = {"backward": PLAIN_DIFFERENTIABLE, "second": native.extension.second_names()}.get(
        what, ()
    )
    unwanted = [name for name in may_be_unwanted if wanted is not None and name not in wanted]
    word = _saved_word(names, along.present(), unwanted)
    run = jax.ffi.ffi_call(f"jax_fa_cpu_{what}", results)
    return tuple(
        run(*arrays, *given.values(), *_arrays(along)[1], problem=_attribute(call.problem, present, word))
    )


def _arrays(operands: Operands) -> tuple[int, list[Any]]:
    """Which operands are given, as a bit mask in field order, and their arrays."""
    present, arrays = 0, []
    for bit, (name, x) in enumerate(operands.items()):
        if x is None or name in OF_FUNCTIONS:  # the kernels read `block_pairs`
            continue
        present |= 1 << bit
        if name == "alibi_slopes" or (name == "bias" and x.dtype not in _DTYPES):
            x = x.astype(jnp.float32)
        arrays.append(x)
    return present, arrays


def _letters(axes: tuple[int, ...]) -> str:
    """Axes as letters: attributes must be hashable, so an array will not do."""
    return "".join(chr(ord("a") + axis) for axis in axes)


def _saved_word(saved: Iterable[str], tangents: Iterable[str] = (), unwanted: Iterable[str] = ()) -> int:
    """The bits for what is saved, for tangents that are given, and for gradients that are not wanted, all by name."""
    given, along, left_out = (
        getattr(native.extension, f"{which}_bits")() for which in ("saved", "tangent", "unwanted")
    )
    bits = [given.get(name, 0) for name in saved]  # 0: never absent
    bits += [along[name] for name in tangents]
    bits += [left_out[name] for name in unwanted]
    return sum(bits)


def _attribute(problem: Problem, present: int, saved: int) -> dict[str, Any]:
    """The static part as the handlers' struct; every field has exactly the type that C++ expects."""
    return {
        "present": np.uint32(present),
        "saved": np.uint32(saved),
        **{f"{name}_axes": _letters(problem.axes(name)) for name in (*STORED, "out")},
        "scale": np.float32(problem.scale),
        "keep_prob": np.float32(problem.keep_prob),
        "soft_cap": np.float32(problem.logits_soft_cap or 0.0),
        "alibi": np.uint8(_ALIBI[problem.alibi]),
        "bias_apart": np.uint8(problem.bias_apart),
        "partial": np.uint8(problem.partial),
        "threshold": np.uint32(dropout.threshold(problem.keep_prob)),
    }
