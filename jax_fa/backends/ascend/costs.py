"""What a call that CANN serves costs besides CANN: the notes of `explain`."""

import jax.numpy as jnp

from jax_fa.backends.ascend import dense, installation
from jax_fa.backends.ascend import layout as layouts
from jax_fa.backends.ascend.keep_bits import MAX_DRAWN_BYTES
from jax_fa.backends.ascend.translation import Translation
from jax_fa.call import STORED, Call


def notes(call: Call) -> tuple[str, ...]:
    """One sentence each."""
    if dense.is_empty(call):
        return ()
    plan = Translation(call, installation.here())
    found = _of_bias(plan)
    d = call.dims
    if d.Dv > d.D:
        found.append(f"query and key are padded with zeros to value's head_dim {d.Dv}")
    if call.problem.logsumexp:
        found.append("the gradient of the log-sum-exp costs CANN's backward a wider head_dim")
    found += _of_dtype(plan)
    found += _of_sinks(plan)
    if plan.sequences is None and plan.sparse.full:
        size = dense.mask_bytes(call)
        found.append(f"no sparse mode expresses this mask: a full one of {size} bytes is built")
    if call.operands.dropout_seed is not None:
        size, least = plan.drawn_bytes()
        most = max(MAX_DRAWN_BYTES, least)
        at_once = f", at most {most} at a time" if size > most else ""
        found.append(f"keep bits are drawn in plain JAX and stored: {size} bytes{at_once}")
    if call.operands.keep_threshold is not None:
        found.append("out and dout are divided by the keep probability in plain JAX: CANN's is a host number")
    layout = layouts.choose(call)
    if plan.sequences is None and not all(layouts.fits(call, name, layout) for name in (*STORED, "out")):
        found.append("query, key, value and out lie in different orders: some are transposed")
    return tuple(found)


def _of_bias(plan: Translation) -> list[str]:
    x, found = plan.call.operands, []
    if plan.shifted:
        found.append("the gradient of bias or slopes is computed in plain JAX: CANN has none")
    if x.bias is not None:
        half = plan.call.dtype == jnp.float16
        again = "; rows that it masks fully are found by reading it once more" if half else ""
        found.append(f"a copy of the bias is made, with a finite number where it is -inf{again}")
    if x.bias_offset is not None and not plan.own_pse:
        found.append("the bias is expanded to Sq x Skv: CANN has no per-row offsets")
    return found


def _of_sinks(plan: Translation) -> list[str]:
    if plan.call.operands.sinks is None:
        return []
    reasons = {"forward": plan.why_no_sinks("forward"), "gradient": plan.why_no_sinks("backward")}
    return [
        f"sinks, {what}: {'by CANN' if why is None else f'in plain JAX around the call, since {why}'}"
        for what, why in reasons.items()
    ]


def _of_dtype(plan: Translation) -> list[str]:
    dtype, found = plan.call.dtype, []
    if plan.wide and plan.wide_pse:
        found.append(
            f"computed in float32: CANN takes a bias in query's dtype only, and {dtype} would round it; pass the "
            "bias in that dtype for 16-bit kernels"
        )
    if plan.wide and plan.call.operands.scale is not None:
        found.append(
            f"computed in float32: CANN's scale is a host number, and {dtype} would round a scaled query; pass a "
            "Python number for 16-bit kernels"
        )
    return found
