"""pse as CANN takes it: what is added to the logits, with a finite value where it is -inf.

A pse of -inf masks its key. CANN's online softmax computes exp(-inf - -inf) where it meets a block of keys that are
all masked so: NaN, for the whole row, and in the backward for the keys of the whole sequence. A finite value far below
every logit masks as well, except in rows without any other key. Such rows are found by their maximum, which is that
value; in float16, whose lowest values are masks of the callers' too, by reading the bias.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_fa.softmax import FLT_MAX

# What -inf becomes as a logit. Finite biases may be lower (callers mask with the lowest value of their dtype, which
# masks nothing in a row without other keys), but do not lie near it.
_MASKED = 2.0**126
# What a sink of -inf becomes: far above what masked keys get, far below every logit.
LOWEST_SINK = -(2.0**125)
_NEXT_TO_LOWEST = np.nextafter(np.finfo(np.float32).max, np.float32(0))


class Shift(NamedTuple):
    """pse and its type, and the logit of the keys that it masks; None where other keys may have it too."""

    pse: Any = None
    pse_type: int = 1
    masking_logit: float | None = None
    starts: tuple[int, int] = (0, 0)  # of the positions of rows and keys, for slopes

    def of_batch(self, B: int) -> "Shift":
        """With a batch: CANN's backward takes one row for all only as `[B, N, 1, Skv]`."""
        if self.pse is None or self.pse.ndim != 4 or self.pse.shape[2] != 1:
            return self
        return self._replace(pse=jnp.broadcast_to(self.pse, (B, *self.pse.shape[1:])))


def after_scaling(bias, dtype, scale: float, typed: bool) -> Shift:
    """A bias that is added to scaled logits; without pseType (`typed`) it is divided by the scale first."""
    masked, bias = jnp.isneginf(bias), bias.astype(dtype)
    if typed:
        return _finite(bias, masked | jnp.isneginf(bias), 0, 1.0)
    if scale != 1:
        most = float(jnp.finfo(dtype).max)  # what a dtype cannot hold then is a mask by intent
        bias = jnp.clip(bias.astype(jnp.float32) / np.float32(scale), -most, most).astype(dtype)
    return _finite(bias, masked, 1, scale)


def before_scaling(pse, scale: float) -> Shift:
    """A pse that is added to logits which are scaled then. -inf masks whatever the scale."""
    masked = jnp.isinf(pse) if scale < 0 else jnp.isneginf(pse)
    # What overflows once it is scaled masks, too.
    masked = masked | jnp.isneginf(pse.astype(jnp.float32) * np.float32(scale))
    return _finite(pse, masked, 1, scale)


def _finite(pse, masked, pse_type: int, scale: float) -> Shift:
    # Scaled, it must stay finite; and what it stands for is negative, also where the scale is.
    most = min(_MASKED / max(1.0, abs(scale)), float(jnp.finfo(pse.dtype).max))
    value = np.copysign(most, -scale).astype(pse.dtype)
    logit = float(np.float32(value) * np.float32(scale))
    if pse.dtype == jnp.float32:
        # The lowest number of all is what CANN gives to keys that its own mask masks.
        pse = jnp.clip(pse, -_NEXT_TO_LOWEST, _NEXT_TO_LOWEST)
    pse = jnp.where(masked, jnp.asarray(value), pse)
    return Shift(pse, pse_type, logit if logit < -(2.0**100) else None)


def maximum_to_cann(m):
    """A row's maximum as CANN has it, where pse was moved away from the lowest number."""
    return jnp.maximum(m, -_NEXT_TO_LOWEST)


def maximum_from_cann(m):
    return jnp.where(m <= -_NEXT_TO_LOWEST, -FLT_MAX, m)


def masks_fully(m, masking_logit: float):
    """Whether a row of maximum m has no key but those that a pse of -inf masks."""
    return (m < 0.75 * masking_logit) & (m > 1.25 * masking_logit)
