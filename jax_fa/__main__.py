"""`python -m jax_fa`: checks results on this machine and compares speed and memory with jax.nn. See `jax_fa.demo`."""

from jax_fa.demo import main, program

if __name__ == "__main__":
    program.start(main)
