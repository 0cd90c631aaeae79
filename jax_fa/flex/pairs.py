"""Which pairs are visible in the blocks of a mask that are masked in part, for backends that cannot evaluate its function.

Blocks that show the same pairs are kept once: of a causal mask there is one.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa.flex.programs import Program

HIDDEN, PARTIAL, FULL = 0, 1, 2  # states of a block
CHUNK = 2**20  # pairs that are evaluated at a time
MOST_BYTES = 2**27  # of pairs, one byte each


def pairs_of(program: Program, words, lengths, block, states) -> tuple[Any, Any]:
    """(int32 `*lead R C`, bool `*lead P rows columns`) from known states: a table, and the pairs that it names.

    The table has 0 for a block that is masked whole, 1 for one that is not masked at all, and 2 + i for one whose pairs are
    number i of its entry. P is a power of two, lest a program is compiled for every other count. (None, None): there are too
    many.
    """
    lead, blocks = states.shape[:-2], states.shape[-2:]
    states = np.asarray(states).reshape(-1, *blocks)
    table = np.where(states == FULL, 1, 0).astype(np.int32)
    at = np.stack(np.nonzero(states == PARTIAL), axis=-1).astype(np.int32)
    size = math.prod(block)
    chunk = max(1, CHUNK // size)
    found: list[dict[bytes, int]] = [{} for _ in states]
    for first in range(0, len(at), chunk):
        part = at[first : first + chunk]
        # (One shape for all, so that one program is compiled.)
        filled = np.concatenate([part, np.zeros((min(chunk, len(at)) - len(part), 3), np.int32)])
        visible = np.asarray(_visible(program, lead[-1], lengths, block, words, filled))
        for (entry, row, column), shown in zip(part, visible, strict=False):
            numbers = found[entry]
            table[entry, row, column] = 2 + numbers.setdefault(shown.tobytes(), len(numbers))
        count = 2 ** (max(map(len, found)) - 1).bit_length()
        if len(states) * count * size > MOST_BYTES:
            return None, None
    count = 2 ** (max(1, *map(len, found)) - 1).bit_length()
    pairs = np.zeros((len(states), count, size), np.bool_)
    for own, numbers in zip(pairs, found, strict=True):
        for shown, number in numbers.items():
            own[number] = np.frombuffer(shown, np.bool_)
    return jnp.asarray(table.reshape(*lead, *blocks)), jnp.asarray(pairs.reshape(*lead, count, *block))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _visible(program: Program, heads: int, lengths, block, words, at):
    """Of blocks `at` = (entry, row, column) `n 3`, bool `n rows columns`."""
    entry, row, column = (at[:, i, None, None] for i in range(3))
    row = row * block[0] + jnp.arange(block[0], dtype=jnp.int32)[:, None]
    column = column * block[1] + jnp.arange(block[1], dtype=jnp.int32)
    empty = jnp.zeros((1, 1, 1, 0), jnp.float32)
    visible = program.over(empty, words[None, None, None], entry // heads, entry % heads, row, column)
    return visible & (row < lengths[0]) & (column < lengths[1])
