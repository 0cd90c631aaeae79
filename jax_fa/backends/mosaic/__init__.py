"""The Mosaic GPU backend, and what its users choose: tiles. See docs/gpu.md."""

from jax_fa.backends.mosaic.backend import backend
from jax_fa.backends.mosaic.options import Options
from jax_fa.backends.mosaic.tuning import Tiles

__all__ = ["Options", "Tiles", "backend"]
