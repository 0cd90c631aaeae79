"""`python -m jax_fa`: checks results on this machine and compares speed and memory with jax.nn. See `jax_fa.demo`."""

from jax_fa import program
from jax_fa.demo import main

if __name__ == "__main__":
    program.start(main)
