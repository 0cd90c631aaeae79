"""Which kernels a call needs, and which tiles they take: those of `Options`, or of the tables in tuning.py."""

import jax.numpy as jnp

from jax_fa.backends.mosaic import tuning
from jax_fa.backends.mosaic.options import Options
from jax_fa.backends.mosaic.tuning import Tiles, Which
from jax_fa.call import Call, Operands


def is_tile(x) -> bool:
    """Whether a bias or mask has Sq x Skv elements."""
    return x is not None and x.shape[-2] > 1 and x.shape[-1] > 1


def kernels(call: Call, what: str) -> tuple[Which, ...]:
    """Those of `what`, "forward" or "backward"."""
    if what == "forward":
        return ("forward",)
    return ("dq", "dkv", "dbias") if needs_dbias(call) else ("dq", "dkv")


def needs_dbias(call: Call) -> bool:
    """Whether the gradient of a bias is wanted that is not a sum over rows or keys."""
    return "bias" in call.gradient_names and is_tile(call.operands.bias)


def tiles_of(which: Which, call: Call) -> Tiles:
    """The tiles of a kernel of a call that `why_not` has nothing against."""
    found = _given(which, call) or _of_table(which, call)
    assert found is not None
    return found


def why_not(which: Which, call: Call) -> str | None:
    """None, or why a kernel has no tiles for the call."""
    given, d = _given(which, call), call.dims
    if given is None:
        found = _of_table(which, call)
        return "tiles of bias and mask leave no room in shared memory" if found is None else None
    return tuning.why_not(
        which, given, d.D, d.Dv, _element_bytes(call.operands), vectors(which, call.operands)
    )


def _given(which: Which, call: Call) -> Tiles | None:
    options = call.problem.options
    return options.of(which) if isinstance(options, Options) else None


def _of_table(which: Which, call: Call) -> Tiles | None:
    d, operands = call.dims, call.operands
    staying, moving = (d.Skv, d.Sq) if which == "dkv" else (d.Sq * d.G, d.Skv)
    return tuning.tiles_for(
        which,
        d.D,
        d.Dv,
        rows=staying,
        width=moving,
        element_bytes=_element_bytes(operands),
        vectors=vectors(which, operands),
    )


def _element_bytes(operands: Operands) -> int:
    """Bytes of bias and mask per logit."""
    whole = [x for x in (operands.bias, operands.mask) if is_tile(x)]
    return sum(1 if x.dtype == jnp.bool_ else x.dtype.itemsize for x in whole)


def vectors(which: Which, operands: Operands) -> int:
    """How many arrays of one scalar per key, or per row, come with every tile that moves."""
    bias, mask, segments = operands.bias, operands.mask, operands.segment_row is not None
    if which == "dbias":
        return 0
    if which != "dkv":
        return sum(x is not None and x.shape[-2] == 1 < x.shape[-1] for x in (bias, mask)) + segments
    upper = operands.upper is not None or segments or (mask is not None and mask.shape[-1] == 1)
    bias_rows = bias is not None and bias.shape[-1] == 1
    present = (operands.lower, operands.alibi_slopes, operands.position)
    upper = upper or operands.lower is not None  # which makes upper bounds too
    statistics = 3
    return statistics + segments + upper + bias_rows + sum(x is not None for x in present)
