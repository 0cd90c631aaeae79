"""`python -m jax_fa.bench`."""

from jax_fa import program
from jax_fa.bench import main

if __name__ == "__main__":
    program.start(main)
