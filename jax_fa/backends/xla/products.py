"""Products of a factor that has more digits than the call's dtype."""

from functools import partial

import jax.numpy as jnp
from jax import lax

from jax_fa.backends.xla.canonical import Canonical
from jax_fa.call import narrowed


def wide_product(call: Canonical, spec: str, x, y):
    """The product of wide x and y; in 16-bit calls x is rounded twice, which costs less than 32-bit products.

    (Not on CPU, where XLA widens 16-bit products anyway.)
    """
    if call.dtype == call.acc:
        return call.product(spec, x, y)

    def split(x, y):
        high, low = narrowed(x, call.dtype)
        low = jnp.where(jnp.isfinite(low), low, 0).astype(call.dtype)
        return call.product(spec, high, y) + call.product(spec, low, y)

    return lax.platform_dependent(x, y, cpu=partial(call.product, spec), default=split)
