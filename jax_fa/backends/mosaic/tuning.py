"""Tile sizes of the kernels, by head_dim: one table per kernel, checked when it is read.

What bounds the choices, on a chip of compute capability 9.0 (CUDA programming guide, tables of compute capabilities;
"FlashAttention-3", Shah et al. 2024, arXiv:2407.08608):

- A block has 65,536 registers, handed out to warpgroups of 128 threads. A consumer with 64 rows holds, per thread,
  `width / 2` registers of each 64 x width float32 tile: the accumulators, the logits, and half as many for the
  probabilities in 16 bits. Two consumers get 240 registers a thread, three get 160.
- 227 KiB of shared memory hold the query tile, and `stages` tiles of keys and of values, which the producer fills
  ahead.
- Each tile of keys serves all rows of a block: 64 rows per consumer. With two consumers and head_dim 128 a block reads
  its keys at half of the second-level cache's rate while the tensor cores are busy, so fewer rows would starve them.

The tables were measured on one NVIDIA H200 (JAX 0.11.2, driver 580.159.04; bfloat16, B=4, S=4096, N·D=2048) among
`candidates` and a few others, each configuration once, in five samples; 96, 192/128 and 32 without causal masks, and the
gradients at 192/192 not at all. A second stage counts most: it is worth a third of the time of a gradient, more than twice
the rows. `benchmarks/gpu_attention.py --tune` measures again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from jax_fa.arguments import integer
from jax_fa.backends.mosaic.widths import padded_head_dim

Which = Literal["forward", "dq", "dkv", "dbias"]

SMEM_BYTES = 227 * 1024
SMEM_UNIT = 1024  # what every array in shared memory begins at a multiple of
# Barriers, both arrays of a NaN-safe pass, and two units for the compiler's reductions.
SMEM_RESERVE = 5 * SMEM_UNIT
ROWS = 64  # rows of one warpgroup's matrix product
# Scalars per row (or key) that leave through shared memory: softmax max and sum; at most four sums over keys; one over rows.
SCALARS: dict[Which, int] = {"forward": 2, "dq": 4, "dkv": 1, "dbias": 0}


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one kernel cuts its work."""

    width: int  # of the tiles that the producer loads: keys, or rows where keys stay
    stages: int  # of them in flight
    consumers: int  # warpgroups that compute, each with 64 rows (or keys)

    # Registers of a thread, of consumers and of the producer: what a block has, 65,536, is dealt out in eights.
    REGISTERS: ClassVar[dict[int, tuple[int, int]]] = {1: (240, 40), 2: (240, 24), 3: (160, 32)}

    def __post_init__(self) -> None:
        for name in ("width", "stages", "consumers"):
            object.__setattr__(self, name, integer(name, getattr(self, name), least=1))
        if self.width % ROWS or self.width > 256:
            raise ValueError(f"width must be a multiple of {ROWS}, at most 256; got {self.width}.")
        if self.consumers not in self.REGISTERS:
            raise ValueError(
                f"consumers must be one of {', '.join(map(str, self.REGISTERS))}; got {self.consumers}."
            )


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table: the tiles for head_dims (the larger of key's and value's) up to a bound."""

    head_dim: int
    tiles: Tiles


# Measured: up to 64 three consumers are 7 to 9 % faster than two, and two stages as fast as four within the spread; at
# 128 tiles of 64 keys with three consumers cost 3 to 9 %; at 192/128 these are 8 % faster than two consumers.
FORWARD = (
    Row(head_dim=64, tiles=Tiles(width=128, stages=2, consumers=3)),
    Row(head_dim=128, tiles=Tiles(width=128, stages=2, consumers=2)),
    Row(head_dim=192, tiles=Tiles(width=64, stages=2, consumers=3)),
    Row(head_dim=256, tiles=Tiles(width=64, stages=2, consumers=2)),
)
# dq holds two tiles of logits beside its sum. Measured: up to 64, 64 keys, three stages and three consumers are 4 % faster
# without a mask and 5 % slower with a causal one, and with them a test with logits of 20,000 fails in the interpreter
# (test_large_logits_have_right_weights): so its tiles are as wide as the forward's. At 256 two stages with one consumer
# took 21 to 26 % less than one stage with two.
DQ = (
    Row(head_dim=64, tiles=Tiles(width=128, stages=2, consumers=2)),
    Row(head_dim=192, tiles=Tiles(width=64, stages=2, consumers=2)),
    Row(head_dim=256, tiles=Tiles(width=64, stages=2, consumers=1)),
)
# dk and dv are two sums; above 128 they are computed one after the other. Measured:
# up to 64, tiles of 128 rows are 15 % faster than of 64 although some calls spill with them (AlphaFold's, with bias and
# mask, is 3 % faster as a whole, grouped heads 4 %); at 256 as for dq, 16 %.
DKV = (
    Row(head_dim=64, tiles=Tiles(width=128, stages=2, consumers=2)),
    Row(head_dim=192, tiles=Tiles(width=64, stages=2, consumers=2)),
    Row(head_dim=256, tiles=Tiles(width=64, stages=2, consumers=1)),
)
# All four arrays move; the sum is a tile of logits. Measured at 32, in AlphaFold's shape: 2 % of its whole
# backward against tiles of 128, in one run, which is no more than runs differ by.
DBIAS = (
    Row(head_dim=64, tiles=Tiles(width=64, stages=3, consumers=3)),
    Row(head_dim=256, tiles=Tiles(width=64, stages=2, consumers=2)),
)
TABLES: dict[Which, tuple[Row, ...]] = {
    "forward": FORWARD,
    "dq": DQ,
    "dkv": DKV,
    "dbias": DBIAS,
}
MAX_HEAD_DIM = FORWARD[-1].head_dim


def smem_bytes(which: Which, tiles: Tiles, D: int, Dv: int, element_bytes: int = 0, vectors: int = 4) -> int:
    """Shared memory of a kernel; `element_bytes` and `vectors` as in `tiles_for`."""
    D, Dv = padded_head_dim(D), padded_head_dim(Dv)
    rows = ROWS * tiles.consumers
    moving = tiles.stages * tiles.width * ((D + Dv) * 2 + rows * element_bytes)
    staying = rows * (D + Dv) * 2
    if which == "forward":
        staying = rows * (D if D == Dv else D + Dv) * 2
    if which == "dbias":
        moving += tiles.stages * rows * (D + Dv) * 2
        staying = rows * tiles.width * 4
    scalars = _whole_units(SCALARS[which] * rows * 4)
    return moving + staying + vectors * _whole_units(tiles.stages * tiles.width * 4) + scalars + SMEM_RESERVE


def _whole_units(size: int) -> int:
    return -(-size // SMEM_UNIT) * SMEM_UNIT


def why_not(
    which: Which, tiles: Tiles, D: int, Dv: int, element_bytes: int = 0, vectors: int = 4
) -> str | None:
    """None, or why a kernel cannot take these tiles; the arguments as in `tiles_for`."""
    sizes = f"width={tiles.width}, stages={tiles.stages}, consumers={tiles.consumers}"
    given = f"the tiles given for {which} ({sizes})"
    needed = smem_bytes(which, tiles, D, Dv, element_bytes, vectors)
    if needed > SMEM_BYTES:
        return f"{given} need {needed} bytes of shared memory for this call; there are {SMEM_BYTES}"
    # The least that a thread holds at any time: its sums and one tile of logits.
    registers, there = (_sum_columns(which, D, Dv) + tiles.width) // 2, Tiles.REGISTERS[tiles.consumers][0]
    if registers >= there:
        return f"{given} need more than {registers} registers a thread for this head_dim; there are {there}"
    return None


def _sum_columns(which: Which, D: int, Dv: int) -> int:
    """Columns of the sums that a consumer holds in registers; that of dbias is a tile of logits, counted as such."""
    D, Dv = padded_head_dim(D), padded_head_dim(Dv)
    together = max(D, Dv) if max(D, Dv) > 128 else D + Dv
    return {"forward": Dv, "dq": D, "dkv": together, "dbias": 64}[which]


def tiles_for(
    which: Which, D: int, Dv: int, *, rows: int, width: int, element_bytes: int = 0, vectors: int = 4
) -> Tiles | None:
    """The tiles of a call, or None if none fit into shared memory.

    Args:
      which: the kernel.
      D, Dv: head_dims.
      rows: how many rows (or keys) there are to stay, of the same head; fewer need fewer consumers.
      width: how many keys (or rows) there are to move; fewer need no wider tile.
      element_bytes: bytes of bias and mask per logit, which come with every tile.
      vectors: arrays of one scalar per key (or row) that moves, which come with every tile too.
    """
    tiles = next((row.tiles for row in TABLES[which] if max(D, Dv) <= row.head_dim), None)
    if tiles is None:
        return None
    consumers = min(tiles.consumers, -(-rows // ROWS))
    tiles = replace(tiles, consumers=consumers, width=min(tiles.width, -(-width // ROWS) * ROWS))
    for smaller in _shrinking(tiles):
        if smem_bytes(which, smaller, D, Dv, element_bytes, vectors) <= SMEM_BYTES:
            return smaller
    return None


def _shrinking(tiles: Tiles) -> Iterator[Tiles]:
    """Fewer stages first, then narrower tiles, then fewer consumers."""
    for consumers in range(tiles.consumers, 0, -1):
        for width in range(tiles.width, 0, -ROWS):
            for stages in range(tiles.stages, 1 if tiles.stages > 1 and width > ROWS else 0, -1):
                yield Tiles(width=width, stages=stages, consumers=consumers)


def candidates(which: Which, D: int, Dv: int) -> list[Tiles]:
    """Tiles worth measuring: those that fit, and whose sums and logits fit the registers."""
    found: list[Tiles] = []
    sums = _sum_columns(which, D, Dv)
    for consumers in (2, 3, 1):
        if consumers == 1 and found:  # half the rows for every tile that moves: only where no more fit
            break
        registers = Tiles.REGISTERS[consumers][0]
        for width in (64, 128, 192, 256):
            logits = width * (1.5 if which == "forward" else 2.5)
            for stages in (1, 2, 3, 4):
                tiles = Tiles(width=width, stages=stages, consumers=consumers)
                fits = smem_bytes(which, tiles, D, Dv) <= SMEM_BYTES
                if fits and (sums + logits) / 2 + 24 <= registers:
                    found.append(tiles)
    return found
