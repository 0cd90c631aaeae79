"""jax_fa inside models written with other libraries.

Each library has a module of its own, which imports that library: `flax`, `equinox` and `haiku`. Keras, and all else
that calls `jax.nn.dot_product_attention`, is served by `patch_jax_nn`.
"""

from jax_fa.integrations.jax_nn import patch_jax_nn

__all__ = ["patch_jax_nn"]
