"""Masks that are functions of one pair, and which blocks of pairs they leave visible."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fa import compat, indices
from jax_fa.arguments import integer, shown
from jax_fa.flex.pairs import CHUNK, FULL, HIDDEN, PARTIAL, pairs_of
from jax_fa.flex.programs import Program, traced, whole
from jax_fa.masks.base import Mask, Rows, Terms, broadcasts, kinds, lead, members


@dataclass(frozen=True)
class Function(Mask):
    """`visible(i, j) = mask_mod(batch, head, i, j)`; made by `of_function`."""

    program: Program
    arrays: tuple[Any, ...]

    def rules(self, rows: Rows) -> Terms:
        return Terms()


def of_function(mask_mod: Callable) -> Function:
    return Function(*traced("mask_mod", mask_mod))


@dataclass(frozen=True)
class BlockMask(Function):
    """A `mask_mod` and, for blocks of rows and columns, whether it masks all, some or no pairs of each.

    Made by `create_block_mask`; a mask for `mask=`, also joined with others by `&`. It is a pytree whose leaves are the
    arrays below and what the function closes over.

    Attributes:
      states: uint8 `*#B #N blocks of rows, blocks of columns`: 0 where all pairs are masked, 1 where some are, 2 where none is.
      block_size: rows and columns of a block.
      lengths: rows and columns of the call.
      table: int32 like states: 0 where all pairs are masked, 1 where none is, 2 + i where those of `pairs[..., i, :, :]` are
        visible. None: not known, as of a mask that is made of traced arrays.
      pairs: bool `*#B #N P rows columns`; None likewise.
      sparsity: the share of blocks that are masked whole, in 0..1.
    """

    states: Any
    block_size: tuple[int, int]
    lengths: tuple[int, int]
    table: Any = None
    pairs: Any = None

    @property
    def sparsity(self) -> Any:
        return jnp.mean(self.states == HIDDEN)

    def check(self, batch, heads, sq, skv) -> None:
        if (sq, skv) != self.lengths:
            raise ValueError(
                f"a BlockMask must be made for the lengths of the call, Sq={sq} and Skv={skv}; this one is for "
                f"rows={self.lengths[0]} and columns={self.lengths[1]}."
            )
        given, full = self.states.shape[:-2], (*batch, heads)
        if not broadcasts(given, full):
            raise ValueError(
                f"a BlockMask must be made for the batch and heads of the call, (*B, N)={full}, or for None of them; this one "
                f"is for {tuple(given)}."
            )


def create_block_mask(
    mask_mod: Callable,
    batch: int | Sequence[int] | None,
    heads: int | None,
    rows: int,
    columns: int,
    block_size: int | tuple[int, int] = 128,
) -> BlockMask:
    """A block-sparse mask from a function of one pair: `torch.nn.attention.flex_attention.create_block_mask` for JAX.

    The function is evaluated once for every pair, a few blocks at a time: O(S^2) work in O(S) memory, and one byte for each
    block is kept. Blocks that it masks whole are then skipped in the forward and in every derivative. Make the mask once,
    outside of the loop over layers or steps, or inside `jax.jit`, where it may depend on data.

    If all arrays that it closes over are known, so is the mask, inside of `jax.jit` too: it is made when that traces, and keeps
    the pairs of blocks that are masked in part, one byte each, unless those that differ take more than 128 MiB. The CPU kernels
    take such masks alone.

    Args:
      mask_mod: `mask_mod(batch, head, row, column) -> bool`, of int32 scalars that are traced; True = visible. It may close
        over arrays, traced ones too: `document[batch, row] == document[batch, column]`.
      batch: how many batch entries (several batch dims: a tuple); None: the mask is the same for all, and mask_mod may not use
        its batch index. `batch` counts all batch entries of a call, in row-major order of `*B`.
      heads: how many query heads; None likewise.
      rows: Sq of the call.
      columns: Skv of the call.
      block_size: rows and columns of a block, one number or two.

    Returns:
      A `BlockMask`, for `mask=`.

    Raises:
      TypeError: a function of other arguments or results, sizes that are no integers.
      ValueError: a function with side effects, sizes that are not positive, an index that is used for None.

    Source: Dong et al. 2024, arXiv:2412.05496.
    """
    found = traced("mask_mod", mask_mod)
    entries = (
        (() if batch is None else tuple(batch))
        if isinstance(batch, (tuple, list)) or batch is None
        else (batch,)
    )
    sizes = block_size if isinstance(block_size, (tuple, list)) else (block_size, block_size)
    if len(sizes) != 2:
        raise ValueError(
            f"block_size must be one number or two, of rows and of columns; got {shown(block_size)}."
        )
    given = {"rows": (rows,), "columns": (columns,), "block_size": sizes, "batch": entries}
    given["heads"] = () if heads is None else (heads,)
    counts = {
        name: tuple(integer(name, x, least=1, most=indices.FAR) for x in values)
        for name, values in given.items()
    }
    for name, count in (("batch", batch), ("head", heads)):
        if count is None and found.program.uses(name):
            argument = "heads" if name == "head" else name
            raise ValueError(
                f"{argument} must say how many there are, for mask_mod uses the index {name}; got None, which is for masks that "
                "are the same for all."
            )
    (high, wide), (sq,), (skv,) = counts["block_size"], counts["rows"], counts["columns"]
    block, lengths = (high, wide), (sq, skv)
    lead = (*counts["batch"], *(counts["heads"] or (1,)))
    arrays = [indices.known(x) for x in found.arrays]
    known = all(x is not None for x in arrays)
    with compat.eager() if known else compat.allow_promotion():
        _, words = found.program.packed(arrays if known else whole(found.arrays), jnp.float32)
        packed = jnp.concatenate([jnp.zeros(0, jnp.uint32), *words])
        states = _states(found.program, lead, lengths, block, packed)
        table, pairs = pairs_of(found.program, packed, lengths, block, states) if known else (None, None)
    if known and compat.explicit_mesh(states) is not None:  # no `shard_map` may close over such arrays
        states, table, pairs = (None if x is None else np.asarray(x) for x in (states, table, pairs))
    return BlockMask(found.program, found.arrays, states, block, lengths, table, pairs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _states(program: Program, lead: tuple[int, ...], lengths, block, words):
    """uint8 `*lead blocks of rows, blocks of columns`."""
    entries = 1
    for size in lead:
        entries *= size
    heads = lead[-1]
    blocks = [-(-length // size) for length, size in zip(lengths, block, strict=True)]
    chunk = max(1, min(blocks[1], CHUNK // (entries * block[0] * block[1])))
    chunks = -(-blocks[1] // chunk)
    entry = jnp.arange(entries, dtype=jnp.int32)[:, None, None]
    batch, head = entry // heads, entry % heads

    def of_rows(r):
        row = (r * block[0] + jnp.arange(block[0], dtype=jnp.int32))[:, None]

        def of_columns(c):
            column = c * chunk * block[1] + jnp.arange(chunk * block[1], dtype=jnp.int32)
            empty = jnp.zeros((1, 1, 1, 0), jnp.float32)
            visible = program.over(empty, words[None, None, None], batch, head, row[None], column[None, None])
            there = (row < lengths[0]) & (column < lengths[1])
            visible = jnp.broadcast_to(visible, (entries, *there.shape))
            tiles = (entries, block[0], chunk, block[1])
            some = jnp.any((visible & there).reshape(tiles), axis=(1, 3))
            every = jnp.all((visible | ~there).reshape(tiles), axis=(1, 3))
            return jnp.where(some, jnp.where(every, FULL, PARTIAL), HIDDEN).astype(jnp.uint8)

        found = lax.map(of_columns, jnp.arange(chunks, dtype=jnp.int32))
        return jnp.moveaxis(found, 0, 1).reshape(entries, chunks * chunk)[:, : blocks[1]]

    found = lax.map(of_rows, jnp.arange(blocks[0], dtype=jnp.int32))
    return jnp.moveaxis(found, 0, 1).reshape(*lead, *blocks)


# --- of a call


def functions_of(mask: Mask | None) -> list[Function]:
    """Those that a mask joins by &. Elsewhere in it there may be none: `|` and `~` work on intervals of keys, of which they
    say nothing.
    """
    if mask is None:
        return []
    found = [member for member in members(mask) if isinstance(member, Function)]
    if len(found) < sum(isinstance(kind, Function) for kind in kinds(mask)):
        raise NotImplementedError(
            "~ and | cannot take a BlockMask, which is no number of intervals of keys. Write ~f(...), or f(...) | g(...), in "
            "the function that it is made of."
        )
    return found


class Blocks(NamedTuple):
    """Those of a call, of which `Operands` says more."""

    size: tuple[int, int] | None = None  # None: there are none
    blocks: Any = None  # `*#B #N R C`: 0 where all pairs are masked; with pairs it is the table
    pairs: Any = None  # `*#B #N P rows columns`; None: not known


def blocks_of(functions: Sequence[Function], rank: int) -> Blocks:
    """Of the masks of a call with so many dims `*B N`."""
    found: Any = None
    size = None
    for mask in functions:
        if not isinstance(mask, BlockMask):
            continue
        if size not in (None, mask.block_size):
            raise ValueError(
                f"BlockMasks that are joined must have the same block_size; got {size} and {mask.block_size}."
            )
        size = mask.block_size
        states = lead(mask.states, rank + 2)
        found = states if found is None else jnp.minimum(found, states)
    if len(functions) == 1 and isinstance(mask := functions[0], BlockMask) and _has_pairs(mask):
        # (A state of 0 counts, whatever the table has.)
        table = jnp.where(found == HIDDEN, 0, lead(mask.table, rank + 2))
        return Blocks(size, table, lead(mask.pairs, rank + 3))
    return Blocks(size, found)


def _has_pairs(mask: BlockMask) -> bool:
    """Whether its pairs are known and still belong to its states, whatever was done to the leaves."""
    if mask.table is None or mask.pairs is None:
        return False
    shape = mask.states.shape
    wanted = (*shape[:-2], *mask.block_size)
    return mask.table.shape == shape and (*mask.pairs.shape[:-3], *mask.pairs.shape[-2:]) == wanted
