"""Exact FlashAttention for JAX: one op, every chip."""

from jax_fa import masks
from jax_fa.api import dot_product_attention, flash_attention
from jax_fa.dropout import dropout_mask

__version__ = "0.1.0"
__all__ = ["dot_product_attention", "dropout_mask", "flash_attention", "masks"]
