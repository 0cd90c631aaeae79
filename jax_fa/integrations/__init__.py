"""jax_fa inside models written with other libraries.

Layers: `flax`, `equinox` and `haiku`, each of which imports that library. Keras, and all else that calls
`jax.nn.dot_product_attention`, is served by `patch_jax_nn`.

Functions with the arguments of other libraries, which they do not import: `tokamax` (AlphaFold 3), `gemma` (and tunix),
`levanter`, `maxtext` and `axlearn`.
"""

from jax_fa.integrations.jax_nn import patch_jax_nn

__all__ = ["patch_jax_nn"]
