"""What the kernels of all gradients do with a tile: probabilities and gradients of logits, from saved statistics.

    p = exp(s - m) / l,  dp = keep / keep_prob (dout v^T),  ds = p (dp - delta) ds/d(logits)

with delta = rowsum(dout out) - dlogsumexp (Dao 2023, arXiv:2307.08691). The two products of a tile are issued together;
the exponentials run beside the second.
"""

from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from jax_fa.backends.mosaic import logits
from jax_fa.backends.mosaic.launch import Block
from jax_fa.backends.mosaic.logits import Logits, Read, Tile
from jax_fa.backends.mosaic.products import MOST_TOGETHER, two_products


class ScoreGradient(NamedTuple):
    """Gradients of a tile of logits."""

    ds: Any  # of the logits before the soft cap
    by_capped: Any  # of those after it; masked ones may be anything


class GradientBlock(Block):
    # Whether `probabilities` are divided by l. If not, dp and delta are in their place: where rows stay and ds alone is
    # needed, that is less work.
    normalized: ClassVar[bool] = False

    @property
    def sum_columns(self) -> int:
        """Columns of the sums that a consumer holds in registers."""
        return self.kernel.D

    def probabilities(self, s, tile: Tile, read: Read, bounded: bool, again: bool):
        """(p, logits without their values) of products s; `again`: in a second, NaN-safe pass."""
        done = logits.finish(tile, s, read, self.kernel.plain, bounded)
        return logits.weights(tile, done, read("maximum"), self.kernel.plain), done.without_x()

    def recomputed(self, first, second, tile: Tile, read: Read, bounded: bool, again: bool = False):
        """(p, logits without their values, dout v^T); `first` and `second`: the tiles of q k^T and of dout v^T."""

        def between(s):
            return self.probabilities(s, tile, read, bounded, again)

        (p, done), dp = two_products(first, second, between, together=self.sum_columns <= MOST_TOGETHER)
        return p, done, dp

    def score_gradient(self, tile: Tile, read: Read, p, done: Logits, dp) -> ScoreGradient:
        """From `recomputed`, where `dp` is what dropout keeps of dout v^T."""
        if self.normalized:
            delta = read("delta")
        else:
            inverse = read("inverse")
            dp, delta = dp * tile.rows(inverse), read("delta") * inverse
        by_capped = ds = p * (dp - tile.rows(delta))
        if done.slope is not None:
            ds = ds * done.slope
        if done.visible is not None:  # dp, and the slope, may be anything in masked positions
            ds = jnp.where(done.visible, ds, 0.0)
        return ScoreGradient(ds, by_capped)
