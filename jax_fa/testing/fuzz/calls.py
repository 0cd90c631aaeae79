"""A program as a compiled function of the library."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa
from jax_fa.testing.fuzz import functions, npu, paged, score, ways
from jax_fa.testing.fuzz import inputs as given
from jax_fa.testing.fuzz.inputs import Inputs
from jax_fa.testing.fuzz.kinds import KINDS
from jax_fa.testing.fuzz.plain import Arrays, as_tuple, attend
from jax_fa.testing.fuzz.program import Program


def compiled(program: Program, known: Inputs) -> Callable[[Arrays], Arrays]:
    """The function of `Inputs.arguments()`; `known` has the values that are part of the program."""
    run = partial(_run, program, known)
    return run if program.how == "eager" else jax.jit(run)


def _run(program: Program, known: Inputs, arrays: Arrays) -> Arrays:
    p = program
    if p.how == "npu_grad":
        values = known.masks if p.known_mask else arrays["masks"]
        dout = arrays["cotangents"]["out"]
        return npu.with_gradients(p, arrays["operands"], values, arrays["dropout"], p.known_mask, dout)
    if not p.mapped:
        found = _derivatives(p, partial(_attend, p, known), arrays)
    elif p.vmap_outside:
        axes = {
            "operands": {n: _axis(p, n) for n in arrays["operands"]},
            "masks": _axis(p, "mask"),
            "dropout": {n: _axis(p, n) for n in arrays["dropout"]},
        }
        for name, like in (
            ("tangents", arrays["operands"]),
            ("cotangents", None),
            ("cotangent_tangents", None),
        ):
            if name in arrays:
                axes[name] = 0 if like is None else {n: _axis(p, n) for n in like}
        return jax.vmap(lambda a: _derivatives(p, partial(_attend, p, known), a), in_axes=(axes,))(arrays)
    else:
        inside = (
            {n: _axis(p, n) for n in arrays["operands"]},
            _axis(p, "mask"),
            {n: _axis(p, n) for n in arrays["dropout"]},
        )
        found = _derivatives(p, jax.vmap(partial(_attend, p, known), in_axes=inside), arrays)
    return found


def _axis(program: Program, name: str) -> int | None:
    return (-1 if program.mapped_last else 0) if name in program.mapped else None


def _derivatives(program: Program, attend: Callable[..., Any], arrays: Arrays) -> Arrays:
    """Results by name; "d..." are gradients and "...'" tangents."""

    def results(operands):
        found = attend(operands, arrays["masks"], arrays["dropout"])
        other = {n: x for n, x in found.items() if n not in program.results()}
        return {n: found[n] for n in program.results()}, other

    operands = arrays["operands"]

    def reverse(operands, cotangents):
        found, pullback, other = jax.vjp(results, operands, has_aux=True)
        return {**found, **_named("d", pullback(cotangents)[0], "")}, other

    if program.derivative == "none":
        found, other = results(operands)
        return found | other
    if program.derivative == "reverse":
        found, other = reverse(operands, arrays["cotangents"])
        return found | other
    if program.derivative == "forward":
        found, moved, other = jax.jvp(results, (operands,), (arrays["tangents"],), has_aux=True)
    else:
        at = (operands, arrays["cotangents"])
        along = (arrays["tangents"], arrays["cotangent_tangents"])
        found, moved, other = jax.jvp(reverse, at, along, has_aux=True)
    return found | _named("", moved, "'") | other


def _named(before: str, arrays: Arrays, after: str) -> Arrays:
    return {f"{before}{name}{after}": x for name, x in arrays.items()}


# --- the call


def _attend(program: Program, known: Inputs, operands: Arrays, values: Arrays, dropout: Arrays) -> Arrays:
    mask_values = known.masks if program.known_mask else values
    if program.entry == score.ENTRY:
        attend_score = npu.attend if program.how == "npu" else score.attend
        return attend_score(program, operands, mask_values, dropout, program.known_mask)
    options: Arrays = {}
    if program.scale == "known":
        options["scale"] = known.scale
    if program.cap == "known":
        options["logits_soft_cap"] = known.cap
    more: Arrays = {}
    if program.dropout:
        options["dropout_key"] = jax.random.wrap_key_data(dropout["dropout_key"], impl="threefry2x32")
        options["dropout_rate"] = dropout.get("rate", known.rate)
        more["seed"] = given.seed_words(dropout["dropout_key"])
    if program.entry == "dot_product_attention":
        return _as_jax_nn(program, operands, mask_values, options) | more
    if program.entry == paged.ENTRY:
        return paged.attend(program, operands, mask_values, options)
    given_values = {name: _as_known(mask_values[name], program.known_mask) for name in program.mask}
    if program.how == "functions":
        return functions.attend(program, operands, given_values, options) | more
    way = ways.WAYS.get(program.how, attend)
    made = [KINDS[name].make(given_values[name]) for name in program.mask]
    return way(program, operands, made, options) | more


def _as_known(values: Arrays, known: bool) -> Arrays:
    """Scalars that are known as Python integers, and so are half of the arrays."""
    if not known:
        return values
    return {
        name: int(x) if np.ndim(x) == 0 and x.dtype != bool else np.asarray(x) for name, x in values.items()
    }


def _as_jax_nn(program: Program, operands: Arrays, values: Arrays, options: Arrays) -> Arrays:
    p, shape = program, program.B or (1,)
    lengths: dict[str, Any] = {
        f"{word}_seq_lengths": jnp.broadcast_to(jnp.asarray(x), shape)
        for name in p.mask
        if "lengths" in name
        for word, x in (("key_value" if key == "key" else key, x) for key, x in values[name].items())
    }
    mask = None
    for name in p.mask:
        if name.startswith("dense"):
            mask = values[name]["array"]
    out, *others = as_tuple(
        jax_fa.dot_product_attention(
            **operands,
            **options,
            **lengths,
            mask=mask,
            is_causal="causal" in p.mask,
            implementation=p.backend,
            return_residual=True,
            return_max_logits=p.max_logits,
        )
    )
    found = {"out": out, "lse": jnp.swapaxes(others[0], -1, -2)}
    return found | ({"max": others[1]} if p.max_logits else {})
