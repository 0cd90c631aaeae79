"""What is off in a call that is put together from parts of its keys.

Each part has a weight of its own, from a log-sum-exp that is off by its rounding, and an output that is rounded to the dtype.
Neither cancels against what is computed of the keys. Gradients are sums of what each part gives, which is stored. Where a sink
is put beside the results of the keys, these are one part.
"""

from typing import Any

import numpy as np

from jax_fa.testing.fuzz.numbers import Number


class Parts:
    """... of a `reference.Attention`, which says what is put together: outputs (`merged`), those and a sink (`composed`), or
    gradients (`added`)."""

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
        """... of which each part's is rounded, and may be larger than that of all."""
        c = self.call
        if not c.merged:
            return out
        kept = 1.0 if c.keep is None else np.abs(c._grouped(c.keep))
        error = out.error + c.narrow * ((c.weights.value * kept) @ np.abs(c.v.value)) + c.least
        moved, tangent = c.weights.tangent, out.tangent
        if moved is not None and tangent is not None:
            size = np.abs(moved.value).sum(axis=-1, keepdims=True) * self.largest_values()
            more = self.relative_error() * size + c.least
            tangent = out._new(tangent.value, tangent.error + more)
        return out._new(out.value, error, tangent)

    def delta(self, delta: Number, dout: Number, dlse: Number | None) -> Number:
        """... with all that a part's cotangents are off by."""
        if not self._has_cotangents():
            return delta

        def size(of: Number, at: Number, more: Number | None) -> Any:
            found = (np.abs(of.value) * self.largest_values()).sum(axis=-1, keepdims=True)
            return found + np.abs(at.value) + (0.0 if more is None else np.abs(more.value)[..., None])

        unit, own = (4 if self.call.composed else 1) * self.relative_error(), size(dout, delta, dlse)
        tangent = delta.tangent
        if tangent is not None:
            moved = own * (1 + 2 * self._fastest())
            if dout.tangent is not None:
                moved = moved + size(dout.tangent, tangent, None if dlse is None else dlse.tangent)
            if self.call.v.tangent is not None:
                values = np.abs(self.call.v.tangent.value).max(axis=-2, keepdims=True, initial=0.0)
                moved = moved + (np.abs(dout.value) * values).sum(axis=-1, keepdims=True)
            tangent = delta._new(tangent.value, tangent.error + unit * moved)
        return delta._new(delta.value, delta.error + unit * own, tangent)

    def lost(self, x: Number, at: Any) -> Number:
        """The cotangent of a part's output is rounded once more, and may be small: then its weights among its keys are not.

        `at(pairs)` says what x has, of what pairs have for each unit of it.
        """
        c, tangent = self.call, x.tangent
        if not self._has_cotangents():
            return x
        if tangent is not None:
            tangent = x._new(tangent.value, tangent.error + c.least * at(c.seen * (1 + 2 * self._fastest())))
        return x._new(x.value, x.error + c.least * at(c.seen * 1.0), tangent)

    def _fastest(self) -> Any:
        """How fast a weight moves, relative to itself and at most, in halves, `*B K G Sq 1`."""
        c = self.call
        moved = 0.0 if c.s.tangent is None else np.where(c.seen, np.abs(c.s.tangent.value), 0.0)
        return np.broadcast_to(moved, c.seen.shape).max(axis=-1, keepdims=True, initial=0.0)

    def _has_cotangents(self) -> bool:
        """Whether parts have outputs of their own, and so cotangents of these."""
        return self.call.merged or self.call.composed

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
