"""Keeps what is masked from being heard, whatever it holds: 0 * NaN is NaN in a matrix product.

Padding often holds NaN or infinity. A kernel's second product sums over keys (or rows) that have weight 0, so a
non-finite number there would spoil the sum. Looking for one in every tile would cost each call; so the sums are looked
at once, when they are done, and only a block whose sums are not finite goes over its tiles again, carefully: one
tile at a time, in which non-finite numbers are replaced by 0 first and, where they belong to a row of their own, made
to show in the logits of those that see them. Where masks hide nothing, there is nothing to keep out.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa.backends.mosaic.logits import WGMMA
from jax_fa.backends.mosaic.memory import registers

CHUNK = 64  # rows and columns that are looked at together


def hides(arrays) -> bool:
    """Whether some row may not see some key."""
    return any(name in arrays for name in ("ranges", "mask_keys", "mask_tile"))


def scratch(consumers: int, width: int, copies: int) -> dict[str, Any]:
    """For the second pass; `copies`: how many bring a tile."""
    return {
        "votes": plgpu.SMEM((consumers,), jnp.int32),
        "voted": plgpu.Barrier(num_arrivals=consumers),
        "poison": plgpu.SMEM((width,), jnp.float32),
        "careful_here": plgpu.Barrier(num_arrivals=copies),
        "careful_read": plgpu.Barrier(num_arrivals=consumers),
        "cleaned": plgpu.Barrier(),
    }


def vote(memory, warpgroup, *sums) -> None:
    """Says whether this consumer's sums, `64 x columns` each, are finite."""
    nothing = sum((x * 0.0).sum(axis=1) for x in sums)  # NaN for a row that is not
    memory["votes"][warpgroup] = jnp.max(jnp.where(nothing == 0.0, 0, 1))
    plgpu.commit_smem()
    plgpu.barrier_arrive(memory["voted"])


def again(memory, consumers: int):
    """Whether the block has to go over its tiles again: for every warpgroup of it to ask, once."""
    plgpu.barrier_wait(memory["voted"])
    return sum(memory["votes"][i] for i in range(consumers)) > 0


def clean(tile, poison=None) -> None:
    """Replaces what is not finite in a tile of shared memory by 0; `poison` gets NaN for its rows, 0 for others."""
    rows, columns = tile.shape
    step = min(CHUNK, columns)
    for row in range(0, rows, CHUNK):
        found = None
        for column in range(0, columns, step):
            part = tile.at[row : row + CHUNK, column : column + step]
            x = registers(part, WGMMA)
            nothing = x.astype(jnp.float32) * 0.0
            part[...] = jnp.where(nothing == 0.0, x, jnp.zeros_like(x))
            nothing = nothing.sum(axis=1)
            found = nothing if found is None else found + nothing
        if poison is not None:
            poison[row : row + CHUNK] = found
