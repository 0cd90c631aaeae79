"""`python -m jax_fa.bench`."""

from jax_fa.bench import main
from jax_fa.demo import program

if __name__ == "__main__":
    program.start(main)
