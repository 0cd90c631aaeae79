"""`python -m jax_fa.bench`."""

import sys

from jax_fa.bench import main

if __name__ == "__main__":
    sys.exit(main())
