"""Exact FlashAttention for JAX: one op, every chip."""

from jax_fa import ascend, masks
from jax_fa.api import dot_product_attention, flash_attention
from jax_fa.cann import FlashAttentionScoreOutput, flash_attention_score
from jax_fa.dropout import dropout_mask
from jax_fa.explanation import Explanation, explain

__version__ = "0.1.0"
__all__ = [
    "Explanation",
    "FlashAttentionScoreOutput",
    "ascend",
    "dot_product_attention",
    "dropout_mask",
    "explain",
    "flash_attention",
    "flash_attention_score",
    "masks",
]
