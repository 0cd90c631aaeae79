"""What CANN does not serve: the reasons that `why_not` gives."""

import jax.numpy as jnp

from jax_fa.backends.ascend import installation
from jax_fa.backends.ascend import layout as layouts
from jax_fa.backends.ascend.options import Options
from jax_fa.call import Call, Dims
from jax_fa.cann import spec


def why_not_here(call: Call, platform: str) -> str | None:
    """What the platform and this process lack."""
    on_cpu = platform.lower() == "cpu"
    if on_cpu and not installation.emulated():
        return (
            f"runs on {', '.join(installation.platforms)}; on cpu only against an emulator of CANN: set "
            f"{installation.EMULATOR} to its directory (jax_fa.ascend.emulator_dir())"
        )
    if (absence := installation.absence()) is not None:
        return absence
    if not on_cpu:
        return None
    if installation.library().error is not None:
        return f"no CANN: {installation.library().error}"
    if call.problem.implementation != Options.backend:
        return "on cpu it is an emulator, for calls that name it"
    return None


def why_not(call: Call, what: str) -> str | None:
    """What CANN lacks."""
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
    if backward and problem.logsumexp and columns_with_logsumexp(d) > spec.MAX_HEAD_DIM:
        return f"the gradient of the log-sum-exp takes 2 more columns than head_dim's {spec.MAX_HEAD_DIM}"
    here = installation.here()
    if here is not None and here.long is None:
        reason = "has no backward" if backward else _why_not_large_head_dim(call)
        only = f"this CANN has only the large-head_dim operator ({here.short})"
        return None if reason is None else f"{only}, which {reason}"
    return None


def columns_with_logsumexp(d: Dims) -> int:
    """Columns of value with those for the gradient of the log-sum-exp."""
    return -(-(d.Dv + 2) // spec.HEAD_DIM_BLOCK) * spec.HEAD_DIM_BLOCK


def _why_not_large_head_dim(call: Call) -> str | None:
    """The limits of the one operator of an installation without the built-in one."""
    x, d = call.operands, call.dims
    for feature, given in (
        ("mask", call.problem.mask is not None or x.mask is not None or x.lower is not None),
        ("bias", x.bias is not None or x.alibi_slopes is not None),
        ("dropout", x.dropout_seed is not None or x.drop_bits is not None),
        ("traced scale", x.scale is not None),
    ):
        if given:
            return f"has no {feature}"
    if call.dtype != jnp.float16:
        return f"serves float16, not {call.dtype}"
    if max(d.D, d.Dv) > spec.LARGE_HEAD_DIM:
        return f"has a head_dim of at most {spec.LARGE_HEAD_DIM}, not {max(d.D, d.Dv)}"
    if d.Dv < d.D:
        return f"takes values of query's head_dim {d.D}, not {d.Dv}"
    if d.Skv <= spec.LARGE_HEAD_DIM_KEYS:
        return f"needs more than {spec.LARGE_HEAD_DIM_KEYS} keys, not {d.Skv}"
    if layouts.choose(call) != "BSND":
        return "takes arrays in the order B, S, N, D"
    return None
