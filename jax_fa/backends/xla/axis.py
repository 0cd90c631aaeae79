"""A sequence axis cut into tiles."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fa.call import Size, is_symbolic

# JAX would test every index for being negative: four operations to be traced and compiled for each slice.
FROM_THE_FRONT: Any = {"allow_negative_indices": False}


@dataclass(frozen=True)
class Axis:
    """A sequence axis cut into equal tiles; the last one is moved back to end with the axis."""

    size: Size
    tile: Size

    @classmethod
    def of(cls, size: Size, most: int) -> "Axis":
        """Tiles of at most `most`, as equal as can be; exactly `most` for a symbolic size, which must be padded."""
        if is_symbolic(size):
            return cls(size, most)
        count = max(1, -(-size // most))
        return cls(size, -(-size // count))

    @classmethod
    def by(cls, size: int, tile: int) -> "Axis":
        """Tiles of this size, or one."""
        return cls(size, min(size, tile))

    @property
    def count(self) -> Size:
        return self.size // self.tile if is_symbolic(self.size) else -(-self.size // self.tile)

    @property
    def ragged(self) -> bool:
        """The last tile overlaps the one before."""
        return not is_symbolic(self.size) and self.count * self.tile != self.size

    def start(self, t):
        if not self.ragged:
            return t * self.tile
        last = self.size - self.tile
        if jnp.ndim(t):
            return jnp.minimum(t * self.tile, last)
        # Every cut asks for it: `jnp` would take three times as long to trace. (With x64 the turns of a loop are int64.)
        t = lax.convert_element_type(t, np.int32)
        return lax.min(lax.mul(t, np.int32(self.tile)), np.int32(last))

    def positions(self, t):
        return self.start(t) + jnp.arange(self.tile, dtype=jnp.int32)

    def fresh(self, t):
        """Which positions of tile t no earlier tile has; None if all."""
        return self.positions(t) >= t * self.tile if self.ragged else None

    def cut(self, x, axis: int, t):
        """Tile t of x along an axis of this size; an axis of size 1 broadcasts and stays whole."""
        if x.shape[axis] == 1 or self.tile == self.size:
            return x
        return lax.dynamic_slice_in_dim(x, self.start(t), self.tile, axis, **FROM_THE_FRONT)

    def put(self, x, part, axis: int, t):
        """x with tile t along the axis replaced."""
        if self.tile == self.size:
            return part.astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), self.start(t), axis, **FROM_THE_FRONT)
