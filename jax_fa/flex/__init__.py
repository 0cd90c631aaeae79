"""Attention whose scores and mask are functions of one pair of a row and a column, as in PyTorch's flex_attention.

`flash_attention(..., score_mod=f, mask_mod=g)` evaluates them tile by tile; a `BlockMask` also says which blocks `g` masks
whole, and these are skipped.
"""

from jax_fa.flex.masks import BlockMask, create_block_mask

__all__ = ["BlockMask", "create_block_mask"]
