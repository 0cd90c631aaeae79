"""`jax.nn.dot_product_attention`, the function to compare with."""

import jax
import jax.numpy as jnp


def attention(query, key, value, bias=None, mask=None, **options):
    """jax.nn's attention; float16 on CPU, which it refuses under jit, in float32 and rounded."""
    operands, dtype = (query, key, value, bias), query.dtype
    if refuses(dtype):
        operands = jax.tree.map(lambda x: x.astype(jnp.float32), operands)
    result = jax.nn.dot_product_attention(*operands, mask, **options)
    return jax.tree.map(lambda x: x.astype(dtype), result)


def refuses(dtype) -> bool:
    """Whether jax.nn cannot compile a call of this dtype here.

    It asks for the dot algorithm F16_F16_F32 and means to do without where that is missing, but under jit
    the error comes only when lowering, past its `except`.
    """
    return dtype == jnp.float16 and jax.default_backend() == "cpu"
