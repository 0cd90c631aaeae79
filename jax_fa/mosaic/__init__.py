"""Kernels for NVIDIA Hopper GPUs in Pallas Mosaic GPU; `backends/mosaic.py` calls them.

Nothing here is imported before a call is lowered for a GPU: Pallas takes a second to import, and JAX 0.10 cannot.
"""
