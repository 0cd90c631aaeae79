"""`python -m jax_fa`: is it right here, and what does it bring? See `jax_fa.demo`."""

from jax_fa import program
from jax_fa.demo import main

if __name__ == "__main__":
    program.start(main)
