"""Random calls of the library against a float64 reference: `python -m jax_fa.testing.fuzz --help`."""
