"""What tests and benchmarks share: the table of cases, oracles in NumPy, reading of programs, the emulator's controls.

Nothing of the library imports it, and it needs what the `test` extra installs.
"""
