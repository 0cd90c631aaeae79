"""The Ascend backend: one XLA custom call into CANN's `aclnnFlashAttentionScore`, forward and backward.

What CANN does not compute is supplied here in plain JAX around the call:

* its backward has no gradient for pse: that of bias and slopes comes from the portable backend;
* it has no gradient of the log-sum-exp: the term `ds += p dlogsumexp` is what two more columns of value give,
  zeros there, dlogsumexp in dout and -1 in out, since CANN's backward is ds = p (dout v^T - rowsum(dout out));
* its scale and keep_prob are host numbers: a traced scale multiplies the query, in float32 as CANN would do,
  and a traced keep probability divides out, with CANN's own at 1. In the backward, dout / keep_prob and
  out * keep_prob in the places of dout and out give CANN's gradients;
* -inf in pse becomes a finite number (`shift`);
* values wider than keys: query and key get zeros;
* no rows, no keys, no batch: no call.

`jax_fa/ascend/` holds the translation (`request`), masks (`modes`), layouts, dropout bits, the custom calls (`call`)
and their splitting (`split`).
"""

import math
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_fa.backends import native
from jax_fa.backends.ascend import call as custom
from jax_fa.backends.ascend import installation
from jax_fa.backends.ascend import layout as layouts
from jax_fa.backends.ascend.options import Options
from jax_fa.backends.ascend.request import Request, Translation
from jax_fa.backends.ascend.shift import masks_fully
from jax_fa.backends.xla import backend as portable
from jax_fa.call import Call, Dims, Operands, Problem, Saved, narrowed, rounding_unit
from jax_fa.cann import spec
from jax_fa.softmax import FLT_MAX

# The large-head_dim operator, where nothing else is installed.
_SHORT_HEAD_DIM, _SHORT_KEYS = 576, 1024


class Ascend:
    """See `backends.Backend`."""

    name = Options.backend
    platforms = installation.platforms  # grows with jax_fa.ascend.register_platform
    emulated_on = ("cpu",)

    def why_not(self, call: Call, *, platform: str, what: str) -> str | None:
        return _why_not_here(call.problem, platform) or _why_not(call, what)

    def notes(self, call: Call) -> tuple[str, ...]:
        return _notes(call)

    def forward(self, call: Call) -> tuple[Any, ...]:
        out, m, l = _forward(call)
        if not call.problem.saves_rounding:
            return out.astype(call.dtype), m, l
        if out.dtype == call.dtype:  # CANN hands the rounded output alone
            return out, m, l, jnp.zeros(out.shape, call.dtype)
        narrow, lost = narrowed(out, call.dtype)
        return narrow, m, l, (lost / rounding_unit(call.dtype)).astype(call.dtype)

    def backward(self, call: Call, saved: Saved) -> Operands:
        return _backward(call, saved)


backend = Ascend()


def _why_not_here(problem: Problem, platform: str) -> str | None:
    on_cpu = platform.lower() == "cpu"
    if on_cpu and not installation.emulated():
        return (
            f"runs on {', '.join(installation.platforms)}; on cpu only against an emulator of CANN: set "
            f"{installation.EMULATOR} to its directory (jax_fa.ascend.emulator_dir())"
        )
    if native.missing is not None:
        return native.absence()
    if not on_cpu:
        return None
    if installation.library().error is not None:
        return f"no CANN: {installation.library().error}"
    if problem.implementation != Options.backend:
        return "on cpu it is an emulator, for calls that name it"
    return None


def _why_not(call: Call, what: str) -> str | None:
    problem, operands, d = call.problem, call.operands, call.dims
    backward = what == "backward"
    if call.dtype.name not in spec.DTYPES:
        return f"serves float32, bfloat16 and float16, not {call.dtype}"
    if call.symbolic:
        return "symbolic dimensions are not supported"
    if problem.logits_soft_cap is not None or operands.soft_cap is not None:
        return "CANN has no soft cap of logits"
    if max(d.D, d.Dv) > spec.MAX_HEAD_DIM:
        return f"head_dim is at most {spec.MAX_HEAD_DIM}, not {max(d.D, d.Dv)}"
    if max(d.Sq, d.Skv) > spec.MAX_LENGTH:
        return f"sequences have at most {spec.MAX_LENGTH} tokens, not {max(d.Sq, d.Skv)}"
    if d.N > spec.MAX_HEADS * d.K:
        return f"at most {spec.MAX_HEADS} query heads share a key head, not {d.G}"
    if backward and problem.logsumexp and _wide_enough(d) > spec.MAX_HEAD_DIM:
        return f"the gradient of the log-sum-exp takes 2 more columns than head_dim's {spec.MAX_HEAD_DIM}"
    here = installation.here()
    if here is not None and here.long is None:
        return _why_not_short(problem, operands, d, backward, str(here.short))
    return None


def _why_not_short(problem, operands, d: Dims, backward: bool, file: str) -> str | None:
    """The limits of the one operator of an installation without the built-in one."""
    only = f"this CANN has only the large-head_dim operator ({file}), which "
    if backward:
        return only + "has no backward"
    x = operands
    for feature, given in (
        ("no mask", problem.mask is not None or x.mask is not None or x.lower is not None),
        ("no bias", x.bias is not None or x.alibi_slopes is not None),
        ("no dropout", x.dropout_seed is not None or x.drop_bits is not None),
        ("no traced scale", x.scale is not None),
    ):
        if given:
            return f"{only}has {feature}"
    if x.query.dtype != jnp.float16:
        return f"{only}serves float16, not {x.query.dtype}"
    if max(d.D, d.Dv) > _SHORT_HEAD_DIM:
        return f"{only}has a head_dim of at most {_SHORT_HEAD_DIM}, not {max(d.D, d.Dv)}"
    if d.Skv <= _SHORT_KEYS:
        return f"{only}needs more than {_SHORT_KEYS} keys, not {d.Skv}"
    if layouts.choose(problem, d) != "BSND":
        return f"{only}takes arrays in the order B, S, N, D"
    return None


def _notes(call: Call) -> tuple[str, ...]:
    """What a call that CANN serves gets beside CANN: one sentence each."""
    plan, problem, x, d = Translation(call, installation.here()), call.problem, call.operands, call.dims
    dtype, found = x.query.dtype, []
    if plan.shifted:
        found.append("the gradient of bias or slopes is computed in plain JAX: CANN has none")
    if x.bias is not None:
        again = "; rows that it masks fully are found by reading it once more" if dtype == jnp.float16 else ""
        found.append(f"a copy of the bias is made, with a finite number where it is -inf{again}")
    if x.bias_offset is not None and not plan.own_pse:
        found.append("the bias is expanded to Sq x Skv: CANN has no per-row offsets")
    if problem.logsumexp:
        found.append("the gradient of the log-sum-exp costs CANN's backward a wider head_dim")
    if plan.wide and plan.wide_pse:
        found.append(
            f"computed in float32: CANN takes a bias in query's dtype only, and {dtype} would round it; pass the "
            "bias in that dtype for 16-bit kernels"
        )
    if plan.wide and x.scale is not None:
        found.append(
            f"computed in float32: CANN's scale is a host number, and {dtype} would round a scaled query; pass a "
            "Python number for 16-bit kernels"
        )
    if plan.sequences is None and plan.sparse.full:
        B, N = _mask_lead(x, d)
        found.append(
            f"no sparse mode expresses this mask: a full one of {B * N * d.Sq * d.Skv} bytes is built"
        )
    if x.dropout_seed is not None:
        bits = math.prod(d.B) * d.N * d.Sq * d.Skv
        found.append(f"keep bits are drawn in plain JAX and stored: {-(-bits // 8)} bytes")
    if plan.sequences is None and _transposes(problem, d):
        found.append("query, key, value and out lie in different orders: some are transposed")
    return tuple(found)


def _mask_lead(operands: Operands, d: Dims) -> tuple[int, int]:
    x = operands
    given = (x.lower, x.upper, x.mask, x.segment_row, x.segment_key)
    arrays = [x for x in given if x is not None]
    rank = len(d.B)
    N = max((x.shape[rank] for x in arrays), default=1)
    full = N > 1 or any(math.prod(x.shape[:rank]) > 1 for x in arrays)
    return math.prod(d.B) if full else 1, N


def _transposes(problem: Problem, d: Dims) -> bool:
    return not layouts.fits_all(problem, d, layouts.choose(problem, d))


# --- forward


def _forward(call: Call):
    """out, not rounded where CANN did not, and the statistics."""
    problem, d, stats = call.problem, call.dims, call.stats_shape
    if _empty(d):
        out = jnp.zeros(call.out_shape, call.dtype)
        return out, jnp.full(stats, -FLT_MAX, jnp.float32), jnp.zeros(stats, jnp.float32)
    plan = Translation(call, installation.here())
    r = plan.request()
    out, m, l = custom.forward(r, _max_work(problem))
    # CANN marks rows without a key by a sum of FLT_MAX, and those of sequences without keys by zeros.
    seen = (l != 0) & (l < FLT_MAX)
    if r.masking_logit is not None:
        seen &= ~masks_fully(m, r.masking_logit)
    m, l = jnp.where(seen, m, -FLT_MAX), jnp.where(seen, l, 0)
    if (kept := plan.keep_factor()) is not None:
        out = layouts.times(out, r.layout, d.N, 1 / kept)
    if r.sequences is not None:
        out = r.sequences.put_rows(out, d.Sq, 0.0)
        m, l = r.sequences.put_rows(m, d.Sq, -FLT_MAX).T, r.sequences.put_rows(l, d.Sq, 0.0).T
    m, l = m.reshape(stats), l.reshape(stats)
    out = layouts.from_layout(out, problem.out_axes, r.layout, (*d.B, d.Sq, d.N, d.Dv))
    masked_by_pse = r.pse is not None and r.pse_type < 2
    promised = r.sequences is None or not r.sparse.full  # in layout TND, CANN promises nothing for such rows
    if promised and not masked_by_pse:
        return out, m, l
    seen = l != 0
    if not promised or r.masking_logit is None:
        seen &= plan.seen()
        m, l = jnp.where(seen, m, -FLT_MAX), jnp.where(seen, l, 0)
    rows = jnp.moveaxis(seen, -1, -2)[..., None]
    keep = jnp.broadcast_to(rows, (*d.B, d.Sq, d.N, 1))
    return jnp.where(keep.transpose(np.argsort(problem.out_axes)), out, 0), m, l


def _empty(d: Dims) -> bool:
    return 0 in (*d.B, d.N, d.Sq, d.Skv)


# --- backward


def _max_work(problem: Problem) -> int | None:
    options = problem.options if isinstance(problem.options, Options) else Options()
    return options.max_work


def _backward(call: Call, saved: Saved) -> Operands:
    """Gradients of query, key, value and, where present, bias, alibi_slopes and scale."""
    problem, operands, d = call.problem, call.operands, call.dims
    if _empty(d):
        return portable.backward(call, saved)
    plan = Translation(call, installation.here())
    r = plan.request()
    dq, dk, dv = _cann_gradients(problem, d, plan, r, saved)
    gradients: dict[str, Any] = {}
    if operands.scale is not None:
        gradients["scale"] = _scale_gradient(call, r.layout, dq)
    if plan.folds_scale:
        dq = layouts.times(dq, r.layout, d.N, plan.scale_factor())
    for name, gradient in (("query", dq), ("key", dk), ("value", dv)):
        shape = layouts.full(problem, operands, name, d)
        gradients[name] = layouts.from_layout(gradient, problem.axes(name), r.layout, shape)
    if plan.shifted:
        # XLA drops what is not read: nothing of this remains where nobody asks for these gradients.
        plain = portable.backward(call, saved)
        gradients |= {"bias": plain.bias, "alibi_slopes": plain.alibi_slopes}
    return call.gradients(gradients)


def _wide_enough(d: Dims) -> int:
    """Columns of value with those for the log-sum-exp."""
    return -(-(d.Dv + 2) // spec.HEAD_DIM_BLOCK) * spec.HEAD_DIM_BLOCK


def _cann_gradients(problem: Problem, d: Dims, plan: Translation, r: Request, saved: Saved):
    """dq, dk, dv in the layout."""
    m, l, dlogsumexp = saved.m, saved.l, saved.dlogsumexp
    out, dout = saved.out, saved.dout
    kept = plan.keep_factor()
    if saved.rounding is not None and (r.query.dtype != out.dtype or kept is not None):
        lost = saved.rounding.astype(jnp.float32) * rounding_unit(out.dtype)
        out = out.astype(jnp.float32) + lost
    shape = (*d.B, d.Sq, d.N, d.Dv)
    out, dout = (layouts.to_layout(x, problem.out_axes, r.layout, shape) for x in (out, dout))
    if kept is not None:
        out, dout = layouts.times(out, r.layout, d.N, kept), layouts.times(dout, r.layout, d.N, 1 / kept)
    out, dout = out.astype(r.query.dtype), dout.astype(r.query.dtype)
    flat = (math.prod(d.B), d.N, d.Sq)
    if r.pse is not None:  # exp(logit - m) is 0 for every key of a row that pse masks
        m = jnp.where(l == 0, 0, m)
    m, l = m.reshape(flat), jnp.where(l == 0, FLT_MAX, l).reshape(flat)
    dlse = None if dlogsumexp is None else dlogsumexp.reshape(flat).astype(jnp.float32)
    if r.sequences is not None:
        out, dout = r.sequences.take_rows(out), r.sequences.take_rows(dout)
        m, l = (r.sequences.take_rows(x[0].T) for x in (m, l))
        dlse = None if dlse is None else r.sequences.take_rows(dlse[0].T)
    if dlse is not None:
        r, out, dout = _with_logsumexp(r, d, out, dout, dlse)
    dq, dk, dv = custom.backward(r, out, m, l, dout, _max_work(problem))
    dq, dk = layouts.narrow(dq, r.layout, r.N, d.D), layouts.narrow(dk, r.layout, r.K, d.D)
    dv = layouts.narrow(dv, r.layout, r.K, d.Dv)
    if r.sequences is not None:
        dq = r.sequences.put_rows(dq, d.Sq, 0.0)
        dk, dv = (jnp.pad(x, [(0, d.Skv - x.shape[0]), (0, 0), (0, 0)]) for x in (dk, dv))
    return dq, dk, dv


def _with_logsumexp(r: Request, d: Dims, out, dout, dlse):
    """The call whose gradients have the log-sum-exp's in them (see the top), its out and its dout."""
    dtype = r.query.dtype
    high = dlse.astype(dtype)
    low = (dlse - high.astype(jnp.float32)).astype(dtype)  # a 16-bit number alone would lose digits
    columns = layouts.by_row(jnp.stack([high, low], axis=-1), r.layout)
    Dv = _wide_enough(d)
    D = max(r.D, Dv)
    widened = replace(
        r,
        query=layouts.widen(r.query, r.layout, r.N, D),
        key=layouts.widen(r.key, r.layout, r.K, D),
        value=layouts.widen(r.value, r.layout, r.K, Dv),
        D=D,
        Dv=Dv,
    )
    dout = layouts.append(dout, r.layout, r.N, columns)
    out = layouts.append(out, r.layout, r.N, jnp.full_like(columns, -1))
    return widened, layouts.widen(out, r.layout, r.N, Dv), layouts.widen(dout, r.layout, r.N, Dv)


def _scale_gradient(call: Call, layout: str, dq):
    """Of a traced scale, from the gradient dq of the scaled query, `*B N`."""
    problem, operands, d = call.problem, call.operands, call.dims
    shape = layouts.full(problem, operands, "query", d)
    query = layouts.to_layout(operands.query, problem.query_axes, layout, shape)
    return layouts.dot(dq, query, layout, d.N).reshape(*d.B, d.N)
