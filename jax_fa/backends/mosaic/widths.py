"""Widths of rows in shared memory, which is swizzled in atoms of 16, 32 or 64 elements of 16 bits."""

import math


def padded_head_dim(D: int) -> int:
    """Columns of a tile in shared memory: whole swizzle atoms of 16, 32 or 64 elements; a copy fills the rest with 0."""
    if D <= 64:
        return max(16, 1 << (D - 1).bit_length())
    return D if D % 16 == 0 else -(-D // 32) * 32


def swizzle_elements(columns: int) -> int:
    """Elements of the widest swizzle atom that divides a row of 16-bit values: 64, 32 or 16."""
    return math.gcd(columns, 64)
