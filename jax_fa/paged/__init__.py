"""Attention to a KV cache that lies in pages. `attention.py` holds the entry `paged_attention`, `call.py` what it is turned into,
`primitive.py` the primitive.
"""
