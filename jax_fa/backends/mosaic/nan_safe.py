"""Keeps NaN and infinity in masked positions from propagating: 0 * NaN is NaN in a matrix product.

Padding often holds NaN or infinity. A kernel's second product sums over keys (or rows) that have weight 0, so a
non-finite value there would spoil the sum. Looking for one in every tile would cost each call; so the sums are looked
at once, when they are done, and only a block whose sums are not finite goes over its tiles again: one tile at a time,
in which non-finite values are replaced by 0 first and, where they belong to a visible key, made to show in the logits
of its rows by a NaN marker. Calls in which nothing may be masked need none of this.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_fa.backends.mosaic.inputs import Inputs
from jax_fa.backends.mosaic.logits import WGMMA
from jax_fa.backends.mosaic.memory import arrive_if, registers, wait_if

CHUNK = 64  # rows and columns that are looked at together


def may_mask(inputs: Inputs) -> bool:
    """Whether some key may be masked for some row."""
    return any(x is not None for x in (inputs.ranges, inputs.mask_keys, inputs.mask_tile))


def smem(consumers: int, width: int, copies: int) -> dict[str, Any]:
    """The fields that a second pass takes in a kernel's shared memory; `copies`: TMA copies of a tile."""
    return {
        "votes": plgpu.SMEM((consumers,), jnp.int32),
        "turn_to_vote": plgpu.Barrier(num_barriers=consumers),
        "voted": plgpu.Barrier(num_arrivals=consumers),
        "nan_marker": plgpu.SMEM((width,), jnp.float32),
        "again_here": plgpu.Barrier(num_arrivals=copies),
        "again_read": plgpu.Barrier(num_arrivals=consumers),
        "cleaned": plgpu.Barrier(),
    }


def vote(smem: Any, warpgroup, consumers: int, *sums) -> None:
    """Tells the block whether this consumer's sums, `64 x columns` each, are finite.

    Consumers vote one after the other: a row lies in one warp, and warps reduce through scratch memory that is at one place
    for all warpgroups of a block.
    """
    nothing = sum((x * 0.0).sum(axis=1) for x in sums)  # NaN for a row that is not
    wait_if(warpgroup > 0, smem.turn_to_vote.at[warpgroup])
    smem.votes[warpgroup] = jnp.max(jnp.where(nothing == 0.0, 0, 1))
    plgpu.commit_smem()
    arrive_if(warpgroup + 1 < consumers, smem.turn_to_vote.at[lax.rem(warpgroup + 1, consumers)])
    plgpu.barrier_arrive(smem.voted)


def again(smem: Any, consumers: int):
    """Whether the block has to go over its tiles again: for every warpgroup of it to ask, once."""
    plgpu.barrier_wait(smem.voted)
    return sum(smem.votes[i] for i in range(consumers)) > 0


def clean(tile, nan_marker=None) -> None:
    """Replaces non-finite values in a tile of shared memory by 0; `nan_marker` gets NaN for its rows, 0 for others."""
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
        if nan_marker is not None:
            nan_marker[row : row + CHUNK] = found
