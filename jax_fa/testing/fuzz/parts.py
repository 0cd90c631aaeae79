"""What is off in a call that is put together from parts of its keys.

Each part has a weight of its own, from a log-sum-exp that is off by its rounding, and an output that is rounded to the dtype.
Neither cancels against what is computed of the keys. Gradients are sums of what each part gives, which is stored.
"""

from typing import Any

import numpy as np

from jax_fa.testing.fuzz.numbers import Number


class Parts:
    """... of a `reference.Attention`, which says whether it is put together (`merged`), or its gradients are (`added`)."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.sizes: dict[str, Number] = {}  # of gradients: the magnitudes of their summands

    def relative_error(self) -> Any:
        """Of a part's weight or output, `*B K G Sq 1`."""
        c = self.call
        size = np.abs(c.s.value).max(axis=-1, keepdims=True, where=c.seen, initial=0.0)
        if c.sink_weight is not None:
            size = np.maximum(size, np.abs(c.sinks.value))
        return c.narrow + c.eps * (8 + 2 * size)

    def largest_values(self) -> Any:
        """No output of a part is beyond, `*B K 1 1 Dv`."""
        keep = self.call.keep
        kept = 1.0 if keep is None else float(np.max(keep, initial=0.0))
        return np.abs(self.call.v.value).max(axis=-2, keepdims=True, initial=0.0) * kept

    def output(self, out: Number) -> Number:
        c = self.call
        moved, tangent = c.weights.tangent, out.tangent
        if not c.merged or moved is None or tangent is None:
            return out
        size = np.abs(moved.value).sum(axis=-1, keepdims=True) * self.largest_values()
        error = tangent.error + self.relative_error() * size + c.least
        return out._new(out.value, out.error, out._new(tangent.value, error))

    def delta(self, delta: Number, dout: Number, dlse: Number | None) -> Number:
        """... with all that a part's cotangents are off by."""
        if not self.call.merged:
            return delta
        size = (np.abs(dout.value) * self.largest_values()).sum(axis=-1, keepdims=True)
        size = size + np.abs(delta.value) + (0.0 if dlse is None else np.abs(dlse.value)[..., None])
        return delta._new(delta.value, delta.error + self.relative_error() * size, delta.tangent)

    def lost(self, x: Number, size: Any) -> Number:
        """The cotangent of a part's output is rounded once more, and may be small: then its weights among its keys are not."""
        if not self.call.merged:
            return x
        return x._new(x.value, x.error + self.call.least * size, x.tangent)

    def gradient(self, name: str, a: Number, b: Number, scale: Number | None = None) -> Number:
        """`a b` times the scale. What each part gives is rounded, and so are their sums."""
        x, c = _product(a, b, scale), self.call
        if not c.added or not c.narrow:
            return x
        size = _product(a.magnitude, b.magnitude, None if scale is None else scale.magnitude)
        self.sizes[f"d{name}"] = size
        return x.off_by(2 * c.narrow, size)


def _product(a: Number, b: Number, scale: Number | None) -> Number:
    return a @ b if scale is None else (a @ b) * scale
