"""What `cpu_attention.py` and `cpu_sweep.py` are made of."""
