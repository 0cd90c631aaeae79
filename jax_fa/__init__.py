"""Exact FlashAttention for JAX: one op, every chip."""

__version__ = "0.2.0"  # first: the extension is held against it

import sys

from jax_fa import backends, masks, sequence_parallel
from jax_fa.api import dot_product_attention, flash_attention
from jax_fa.attention import OUT_NAME, STATS_NAME
from jax_fa.backends import ascend, mosaic
from jax_fa.backends.strictness import strict
from jax_fa.cann.score import (
    FlashAttentionScoreGradOutput,
    FlashAttentionScoreOutput,
    flash_attention_score,
    flash_attention_score_grad,
)
from jax_fa.cann.torch_npu import (
    NpuFusionAttentionGradOutput,
    NpuFusionAttentionOutput,
    npu_fusion_attention,
    npu_fusion_attention_grad,
)
from jax_fa.dropout import dropout_mask
from jax_fa.explanation import Explanation, explain
from jax_fa.explanation.flops import Flops, flops
from jax_fa.flex import BlockMask, create_block_mask
from jax_fa.paged.attention import paged_attention
from jax_fa.sequence_parallel import sequence_parallel_attention
from jax_fa.softmax import merge

# Rooms of `backends` by their public names, for `import jax_fa.ascend` too.
sys.modules |= {f"{__name__}.ascend": ascend, f"{__name__}.mosaic": mosaic}

__all__ = [
    "OUT_NAME",
    "STATS_NAME",
    "BlockMask",
    "Explanation",
    "FlashAttentionScoreGradOutput",
    "FlashAttentionScoreOutput",
    "Flops",
    "NpuFusionAttentionGradOutput",
    "NpuFusionAttentionOutput",
    "ascend",
    "backends",
    "create_block_mask",
    "dot_product_attention",
    "dropout_mask",
    "explain",
    "flash_attention",
    "flash_attention_score",
    "flash_attention_score_grad",
    "flops",
    "masks",
    "merge",
    "mosaic",
    "npu_fusion_attention",
    "npu_fusion_attention_grad",
    "paged_attention",
    "sequence_parallel",
    "sequence_parallel_attention",
    "strict",
]
