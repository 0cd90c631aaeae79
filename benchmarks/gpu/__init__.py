"""The parts of `benchmarks/gpu_attention.py`.

`work` (what is measured), `record` (rows, files, tables) and `supervise` (starts and watches the worker) are plain
Python. Everything else runs in the worker process, which alone touches JAX, PyTorch and the device.
"""
