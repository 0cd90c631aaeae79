"""What is measured: parts and their shares of the time, shapes, and how much work a shape is."""

from collections.abc import Iterator
from dataclasses import dataclass

# In this order. Numbers are shares: a part may take its share of what is left when it starts, so that time which
# one part does not need goes to those behind it.
SHARES = {
    "machine": 25,
    "checks": 200,
    "forward": 110,
    "backward": 130,
    "alphafold": 40,
    "training": 40,
    "tune": 200,
}
# The backward computes five products for the forward's two.
TIMES_FORWARD = {"forward": 1.0, "backward": 2.5, "both": 3.5}
TOKENS, WIDTH = 16384, 2048
# jax.nn's plain path holds S×S logits of every head in memory; beyond this length they do not fit.
LONGEST_QUADRATIC = 4096
# exp2 is computed by the special function unit, at a quarter of the rate of float32 additions, per multiprocessor.
EXP2_PER_CLOCK = 16


def parts(check_only: bool, tune: bool) -> tuple[str, ...]:
    if check_only:
        return ("machine", "checks")
    return tuple(part for part in SHARES if tune or part != "tune")


def phases(chosen: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Parts that one process works on; checks, which nobody times, are shared by several."""
    before = chosen.index("checks")
    return [found for found in (chosen[:before], ("checks",), chosen[before + 1 :]) if found]


def share(part: str, chosen: tuple[str, ...], left: float) -> float:
    """Seconds that a part may take of those left when it starts."""
    following = chosen[chosen.index(part) :]
    return max(left, 0.0) * SHARES[part] / sum(SHARES[p] for p in following)


def phase_seconds(phase: tuple[str, ...], chosen: tuple[str, ...], left: float) -> float:
    """Seconds that a phase may take of those left when it starts: shares of its parts, one after the other."""
    taken = 0.0
    for part in phase:
        taken += share(part, chosen, left - taken)
    return taken


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A call to be timed: self-attention in bfloat16."""

    B: int
    S: int
    N: int
    D: int
    causal: bool = False
    bias: bool = False  # a bias [1, N, S, S] and a mask [B, 1, 1, S], as AlphaFold has them

    def __str__(self) -> str:
        kind = "causal" if self.causal else "bias+mask" if self.bias else "full"
        return f"S={self.S} D={self.D} B={self.B} N={self.N} {kind}"

    @property
    def pairs(self) -> float:
        """Visible pairs of a query and a key in all heads; those of a causal mask count as half, as is custom."""
        return self.B * self.N * float(self.S) ** 2 * (0.5 if self.causal else 1.0)

    def flops(self, direction: str) -> float:
        """A multiply-add counts as two; the forward is two products of `pairs` by D."""
        return 4.0 * self.pairs * self.D * TIMES_FORWARD[direction]

    @property
    def array_bytes(self) -> int:
        """Of query, key and value, two bytes per element."""
        return 3 * 2 * self.B * self.S * self.N * self.D


def shapes(rehearse: bool) -> Iterator[Shape]:
    """Those of the forward and backward tables, the most telling first: time may run out."""
    if rehearse:
        yield from (Shape(B=1, S=64, N=2, D=16, causal=causal) for causal in (False, True))
        return
    for S in (4096, 16384, 2048, 8192):
        for D in (128, 64, 256):
            for causal in (False, True):
                yield Shape(B=TOKENS // S, S=S, N=WIDTH // D, D=D, causal=causal)


def alphafold(rehearse: bool) -> Shape:
    """MSA row attention: every row of the alignment shares one bias."""
    return Shape(B=2, S=64, N=2, D=16, bias=True) if rehearse else Shape(B=128, S=4096, N=4, D=32, bias=True)


def exp_seconds(pairs: float, multiprocessors: int, hertz: float) -> float:
    """The least time for one exponential of every pair on the special function units."""
    return pairs / (EXP2_PER_CLOCK * multiprocessors * hertz)


def calls_per_sample(seconds: float, target: float = 0.02) -> int:
    """How many calls to enqueue between two waits: enough to hide the wait, few enough that the host never blocks.

    JAX lets the host run at most 32 computations ahead of the device.
    """
    return max(3 if seconds < 0.05 else 1, min(24, round(target / max(seconds, 1e-6))))


def rotated_sets(array_bytes: int, cache_bytes: int = 60 * 2**20) -> int:
    """How many sets of inputs to take in turn, so that the second-level cache holds nothing of use from the last."""
    return max(2, min(16, -(-4 * cache_bytes // array_bytes)))
