"""Arrays in float64 that know how far a computation in another precision may be off, and their own derivative.

A `Number` is a value, a bound of the absolute error with which arithmetic of unit roundoff `eps` computes it (to first
order, from the magnitudes that enter each sum), and where it is differentiated the tangent along one direction, which is
a `Number` without a tangent. Formulas are written once and give values, bounds and derivatives of both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

TINY = 1e-37  # what becomes 0 where numbers below the normal ones do
FLUSHED = 1.2e-38  # ... of a product, whose factors still come


def growth(terms: int) -> float:
    """Rounding errors of a sum of so many terms, in units of eps times the sum of their magnitudes."""
    return 4.0 + 2.0 * terms**0.5


@dataclass(frozen=True, eq=False)
class Number:
    value: Any  # an array, or one number of NumPy
    error: Any = 0.0
    tangent: "Number | None" = None
    eps: float = 2.0**-24

    # NumPy leaves operators to this class.
    __array_ufunc__ = None

    @property
    def still(self) -> "Number":
        return Number(self.value, self.error, None, self.eps)

    @property
    def magnitude(self) -> "Number":
        """Of the value and of the tangent: of products, the sums of the magnitudes of their terms."""
        tangent = None if self.tangent is None else self.tangent.magnitude
        return self._new(np.abs(self.value), 0.0, tangent)

    @property
    def flushed(self) -> float:
        return FLUSHED if self.eps > 1e-10 else 0.0

    def _new(self, value, error, tangent: "Number | None" = None) -> "Number":
        return Number(value, error, tangent, self.eps)

    def _of(self, x) -> "Number":
        return x if isinstance(x, Number) else Number(np.asarray(x, np.float64), 0.0, None, self.eps)

    def __add__(self, other) -> "Number":
        other = self._of(other)
        value = self.value + other.value
        rounded = self.eps * (np.abs(self.value) + np.abs(other.value))
        tangents = [x.tangent for x in (self, other) if x.tangent is not None]
        tangent = sum(tangents[1:], tangents[0]) if tangents else None
        return self._new(value, self.error + other.error + rounded, tangent)

    def __neg__(self) -> "Number":
        return self._new(-self.value, self.error, None if self.tangent is None else -self.tangent)

    def __sub__(self, other) -> "Number":
        return self + -self._of(other)

    def __mul__(self, other) -> "Number":
        other = self._of(other)
        value, size, other_size = self.value * other.value, np.abs(self.value), np.abs(other.value)
        error = size * other.error + (other_size + other.error) * self.error + self.eps * np.abs(value)
        error = error + self.flushed
        return self._new(value, error, self._product(other, Number.__mul__))

    __rmul__ = __mul__

    def __truediv__(self, other) -> "Number":
        other = self._of(other)
        value = self.value / other.value
        error = (self.error + np.abs(value) * other.error) / np.abs(other.value) + self.eps * np.abs(value)
        error = error + self.flushed
        tangent, quotient = self.tangent, self._new(value, error)
        if other.tangent is not None:
            moved = quotient * other.tangent
            tangent = -moved if tangent is None else tangent - moved
        return self._new(value, error, None if tangent is None else tangent / other.still)

    def __matmul__(self, other: "Number") -> "Number":
        size, other_size = np.abs(self.value), np.abs(other.value)
        rounded = self.eps * growth(self.value.shape[-1])
        error = size @ (other.error + rounded * other_size) + self.value.shape[-1] * self.flushed
        if np.ndim(self.error):
            error = error + self.error @ (other_size + other.error)
        return self._new(self.value @ other.value, error, self._product(other, Number.__matmul__))

    def _product(self, other: "Number", of: Callable[["Number", "Number"], "Number"]) -> "Number | None":
        parts = []
        if other.tangent is not None:
            parts.append(of(self.still, other.tangent))
        if self.tangent is not None:
            parts.append(of(self.tangent, other.still))
        return sum(parts[1:], parts[0]) if parts else None

    def _unary(self, value, error, slope: Callable[[], "Number"]) -> "Number":
        return self._new(value, error, None if self.tangent is None else slope() * self.tangent)

    def exp(self) -> "Number":
        value = np.exp(self.value)
        relative = np.expm1(np.minimum(self.error + self.eps * (8 + 2 * np.abs(self.value)), 50.0))
        error = value * relative + TINY
        return self._unary(value, error, lambda: self._new(value, error))

    def log(self) -> "Number":
        value = np.log(self.value)
        error = self.error / self.value + self.eps * (4 + 2 * np.abs(value))
        return self._unary(value, error, lambda: self._of(1.0) / self.still)

    def tanh(self) -> "Number":
        value = np.tanh(self.value)
        steepest = 1 - np.tanh(np.maximum(np.abs(self.value) - self.error, 0)) ** 2
        error = steepest * self.error + 8 * self.eps * np.abs(value)
        return self._unary(
            value, error, lambda: self._of(1.0) - self._new(value, error) * self._new(value, error)
        )

    def sum(self, axis: Any, keepdims: bool = False) -> "Number":
        counted = self.value.sum(axis=axis, keepdims=keepdims)
        terms = self.value.size // max(1, counted.size)
        size = np.abs(self.value).sum(axis=axis, keepdims=keepdims)
        error = np.broadcast_to(self.error, self.value.shape).sum(axis=axis, keepdims=keepdims)
        tangent = None if self.tangent is None else self.tangent.sum(axis, keepdims)
        return self._new(counted, error + self.eps * growth(terms) * size, tangent)

    def map(self, fn: Callable[[np.ndarray], np.ndarray]) -> "Number":
        """What moves elements about, and changes none."""
        error = fn(np.broadcast_to(self.error, np.shape(self.value)))
        return self._new(fn(self.value), error, None if self.tangent is None else self.tangent.map(fn))

    def where(self, mask: np.ndarray) -> "Number":
        """Exactly 0 elsewhere."""
        return self.map(lambda x: np.where(mask, x, 0.0))

    def off_by(self, unit: float, size: "Number") -> "Number":
        """With more error: so much of a magnitude and of its tangent."""
        tangent = self.tangent
        if tangent is not None and size.tangent is not None:
            tangent = tangent.off_by(unit, size.tangent)
        return self._new(self.value, self.error + unit * size.value, tangent)

    def rounded(self, unit: float, smallest: float = 0.0) -> "Number":
        """Stored with this unit roundoff, and with numbers below `smallest` lost."""
        if unit == 0.0:
            return self
        tangent = None if self.tangent is None else self.tangent.rounded(unit, smallest)
        return self._new(self.value, self.error + unit * np.abs(self.value) + smallest, tangent)
