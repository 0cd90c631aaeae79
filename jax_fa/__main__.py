"""`python -m jax_fa`: checks results on this machine and compares speed and memory with jax.nn. See `jax_fa.demo`.

`python -m jax_fa doctor` reports what is installed and what can be used. See `jax_fa.doctor`.
"""

import sys

from jax_fa import doctor
from jax_fa.demo import main, program

if __name__ == "__main__":
    if sys.argv[1:2] == ["doctor"]:
        program.start(lambda: doctor.main(sys.argv[2:]))
    program.start(main)
