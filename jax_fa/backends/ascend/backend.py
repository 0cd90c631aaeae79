"""The Ascend backend: one XLA custom call into CANN's `aclnnFlashAttentionScore`, forward and backward.

What CANN does not compute is supplied here in plain JAX around the call:

* its backward has no gradient for pse: that of bias and slopes comes from the portable backend;
* it has no gradient of the log-sum-exp: the term `ds += p dlogsumexp` is what two more columns of value give,
  zeros there, dlogsumexp in dout and -1 in out, since CANN's backward is ds = p (dout v^T - rowsum(dout out));
* its scale and keep_prob are host numbers: a traced scale multiplies the query, in float32 as CANN would do,
  and a traced keep probability divides out, with CANN's own at 1. In the backward, dout / keep_prob and
  out * keep_prob in the places of dout and out give CANN's gradients;
* -inf in pse and in sinks becomes a finite number (`shift`);
* sinks go to CANN where it has the functions and the call fits them, and are plain JAX around the call elsewhere;
* values wider than keys: query and key get zeros;
* no rows, no keys, no batch: no call.

A call becomes one `OperatorCall` (`translation`, with `sparse_modes`, `sequences`, `layout`, `dense`, `shift` and
`keep_bits`), which `custom_call` runs, in pieces where it is too large (`split`). `installation` finds CANN, `plugins`
registers the custom calls with JAX plugins, `limits` lists what is not served and `costs` what is served at a cost.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_fa import softmax
from jax_fa.backends.ascend import costs, custom_call, dense, installation, limits, plugins
from jax_fa.backends.ascend import layout as layouts
from jax_fa.backends.ascend.operator_call import OperatorCall, Residuals
from jax_fa.backends.ascend.options import Options, max_work
from jax_fa.backends.ascend.shift import LOWEST_SINK, masks_fully, maximum_from_cann, maximum_to_cann
from jax_fa.backends.ascend.translation import Translation
from jax_fa.backends.xla import backend as portable
from jax_fa.call import STORED, Call, Dims, Operands, Saved, narrowed, rounding_unit, widened
from jax_fa.softmax import FLT_MAX


class Ascend:
    """See `backends.Backend`."""

    name = Options.backend
    platforms = installation.platforms  # grows with jax_fa.ascend.register_platform
    emulated_on = ("cpu",)

    def why_not(self, call: Call, *, platform: str, what: str) -> str | None:
        plugins.register_with_present(platform)
        return limits.why_not_here(call, platform) or limits.why_not(call, what)

    def why_no_sinks(self, call: Call, what: str) -> str | None:
        if dense.is_empty(call):
            return "there are no logits"
        return Translation(call, installation.here()).why_no_sinks(what)

    def notes(self, call: Call) -> tuple[str, ...]:
        return costs.notes(call)

    def forward(self, call: Call) -> tuple[Any, ...]:
        out, m, l = _forward(call)
        if not call.problem.saves_rounding:
            return out.astype(call.dtype), m, l
        if out.dtype == call.dtype:  # CANN hands the rounded output alone
            return out, m, l, jnp.zeros(out.shape, call.dtype)
        narrow, lost = narrowed(out, call.dtype)
        return narrow, m, l, (lost / rounding_unit(call.dtype)).astype(call.dtype)

    def backward(self, call: Call, saved: Saved) -> Operands:
        return _backward(call, call.full(saved))


backend = Ascend()


# --- forward


def _forward(call: Call):
    """out, not rounded where CANN did not, and the statistics."""
    d, stats = call.dims, call.stats_shape
    if dense.is_empty(call):
        out = jnp.zeros(call.out_shape, call.dtype)
        return out, jnp.full(stats, -FLT_MAX, jnp.float32), jnp.zeros(stats, jnp.float32)
    plan = Translation(call, installation.here())
    op = plan.operator_call()
    out, m, l = custom_call.forward(op, max_work(call.problem))
    # CANN marks rows without a key by a sum of FLT_MAX, and those of sequences without keys by zeros.
    seen = ~((l == 0) | (l >= FLT_MAX))
    if op.sink is not None:
        seen &= ~(m <= LOWEST_SINK)
    if op.masking_logit is not None:
        seen &= ~masks_fully(m, op.masking_logit)
    m, l = jnp.where(seen, m, -FLT_MAX), jnp.where(seen, l, 0)
    m = m if op.pse is None else maximum_from_cann(m)
    if (kept := plan.keep_factor()) is not None:
        out = layouts.times(out, op.layout, d.N, 1 / kept)
    if op.sequences is not None:
        out = op.sequences.put_rows(out, d.Sq, 0.0)
        m, l = op.sequences.put_rows(m, d.Sq, -FLT_MAX).T, op.sequences.put_rows(l, d.Sq, 0.0).T
    m, l = m.reshape(stats), l.reshape(stats)
    out, m, l = _clean_masked_rows(call, op, layouts.from_layout(call, "out", out, op.layout), m, l)
    if op.sink is None:
        return out, m, l
    with_sink = softmax.with_sink(m, l, call.operands.sinks[..., None])
    return out, *(jnp.where(l == 0, x, y) for x, y in zip(with_sink, (m, l), strict=True))


def _clean_masked_rows(call: Call, op: OperatorCall, out, m, l):
    """Fully masked rows as zeros, where CANN does not write them so."""
    d = call.dims
    masked_by_pse = op.pse is not None and op.pse_type < 2
    # In layout TND, CANN promises nothing for such rows.
    promised = op.sequences is None or not (op.sparse.full or op.sparse.may_mask)
    if promised and not masked_by_pse:
        return out, m, l
    seen = l != 0
    if not promised or op.masking_logit is None:
        seen &= dense.rows_with_keys(call)
        m, l = jnp.where(seen, m, -FLT_MAX), jnp.where(seen, l, 0)
    rows = jnp.moveaxis(seen, -1, -2)[..., None]
    keep = jnp.broadcast_to(rows, (*d.B, d.Sq, d.N, 1))
    return jnp.where(keep.transpose(np.argsort(call.problem.out_axes)), out, 0), m, l


# --- backward


def _backward(call: Call, saved: Saved) -> Operands:
    """Gradients of query, key, value and, where present, bias, alibi_slopes and scale."""
    if dense.is_empty(call):
        return portable.backward(call, saved)
    plan = Translation(call, installation.here())
    op = plan.operator_call()
    dq, dk, dv, dsink = _cann_gradients(plan, op, saved)
    gradients: dict[str, Any] = {}
    if op.sink is not None:
        gradients["sinks"] = jnp.where(jnp.isneginf(call.operands.sinks), 0, dsink)
    if call.operands.scale is not None:
        gradients["scale"] = _scale_gradient(call, op.layout, dq)
    if plan.folds_scale:
        dq = layouts.times(dq, op.layout, call.dims.N, plan.scale_factor())
    for name, gradient in zip(STORED, (dq, dk, dv), strict=True):
        gradients[name] = layouts.from_layout(call, name, gradient, op.layout)
    if plan.shifted:
        # XLA drops what is not read: nothing of this remains where nobody asks for these gradients.
        plain = portable.backward(call, saved)
        gradients |= {"bias": plain.bias, "alibi_slopes": plain.alibi_slopes}
    return call.gradients(gradients)


def _cann_gradients(plan: Translation, op: OperatorCall, saved: Saved):
    """dq, dk, dv in the layout, and the gradient of the sink `N`."""
    d = plan.call.dims
    residuals, dlse = _residuals(plan, op, saved)
    if dlse is not None:
        op, residuals = _with_logsumexp(op, d, residuals, dlse)
    dq, dk, dv, dsink = custom_call.backward(op, residuals, max_work(plan.call.problem))
    dq, dk = layouts.narrow(dq, op.layout, op.N, d.D), layouts.narrow(dk, op.layout, op.K, d.D)
    dv = layouts.narrow(dv, op.layout, op.K, d.Dv)
    if op.sequences is not None:
        dq = op.sequences.put_rows(dq, d.Sq, 0.0)
        dk, dv = (op.sequences.put_keys(x, d.Skv) for x in (dk, dv))
    return dq, dk, dv, dsink


def _residuals(plan: Translation, op: OperatorCall, saved: Saved):
    """What CANN's backward takes besides, and the cotangent of the log-sum-exp in the order of its statistics."""
    call, d, kept = plan.call, plan.call.dims, plan.keep_factor()
    m, l, dlse, out, dout = saved.m, saved.l, saved.dlogsumexp, saved.out, saved.dout
    if saved.rounding is not None and (op.query.dtype != out.dtype or kept is not None):
        out = widened(out, saved.rounding, jnp.float32)
    out, dout = (layouts.to_layout(call, "out", x, op.layout) for x in (out, dout))
    if kept is not None:
        out, dout = layouts.times(out, op.layout, d.N, kept), layouts.times(dout, op.layout, d.N, 1 / kept)
    out, dout = out.astype(op.query.dtype), dout.astype(op.query.dtype)
    flat = (-1, d.N, d.Sq)
    if op.pse is not None:  # exp(logit - m) is 0 for every key of a row that pse masks
        m = jnp.where(l == 0, 0, maximum_to_cann(m))
    if op.sink is not None:  # exp(sink - m) / l is 0 in fully masked rows
        m = jnp.where(l == 0, 0, m)
    m, l = m.reshape(flat), jnp.where(l == 0, FLT_MAX, l).reshape(flat)
    dlse = None if dlse is None else dlse.reshape(flat).astype(jnp.float32)
    if op.sequences is not None:
        out, dout = op.sequences.take_rows(out), op.sequences.take_rows(dout)
        m, l = (op.sequences.take_rows(x[0].T) for x in (m, l))
        dlse = None if dlse is None else op.sequences.take_rows(dlse[0].T)
    return Residuals(out, m, l, dout), dlse


def _with_logsumexp(op: OperatorCall, d: Dims, saved: Residuals, dlse):
    """The call whose gradients have the log-sum-exp's in them (see the top), and its residuals."""
    dtype = op.query.dtype
    high = dlse.astype(dtype)
    low = (dlse - high.astype(jnp.float32)).astype(dtype)  # one 16-bit value would lose digits
    columns = layouts.by_row(jnp.stack([high, low], axis=-1), op.layout)
    Dv = limits.columns_with_logsumexp(d)
    D = max(op.D, Dv)

    def widen(x, heads: int, width: int):
        return layouts.widen(x, op.layout, heads, width)

    dout = layouts.append(saved.dout, op.layout, op.N, columns)
    out = layouts.append(saved.out, op.layout, op.N, jnp.full_like(columns, -1))
    query, key, value = widen(op.query, op.N, D), widen(op.key, op.K, D), widen(op.value, op.K, Dv)
    widened = replace(op, query=query, key=key, value=value, D=D, Dv=Dv)
    return widened, saved._replace(out=widen(out, op.N, Dv), dout=widen(dout, op.N, Dv))


def _scale_gradient(call: Call, layout: str, dq):
    """Of a traced scale, from the gradient dq of the scaled query, `*B N`."""
    d = call.dims
    query = layouts.to_layout(call, "query", call.operands.query, layout)
    return layouts.dot(dq, query, layout, d.N).reshape(*d.B, d.N)
