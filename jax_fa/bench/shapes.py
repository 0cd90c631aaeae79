"""What is measured: a shape, a mask, a dtype and a direction, and how much work that is."""

import re
from dataclasses import asdict, dataclass
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
# How many products of rows and keys each computes, in units of the forward's two: what a derivative needs at least.
PRODUCTS = {
    "forward": 1.0,
    "backward": 2.5,  # the pull-back alone
    "both": 3.5,
    "jvp": 3.0,  # the output and its tangent
    "hvp": 8.5,  # the gradients and their tangents, from query, key and value on
    "double-backward": 6.0,  # the pull-back of the gradients alone
}
DIRECTIONS = tuple(PRODUCTS)
SYNTAX = "B1-S4096-N8-K2-D64: sizes joined by -, of B, S (or Sq and Skv), N, K, D and Dv"
DEFAULT = tuple(f"S{length}-N8-D64" for length in (512, 1024, 2048, 4096))
QUICK = tuple(f"S{length}-N4-D64" for length in (256, 512, 1024))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a call, in the letters of the library."""

    B: int
    Sq: int
    Skv: int
    N: int
    K: int
    D: int
    Dv: int

    def __str__(self) -> str:
        sizes = asdict(self)
        if self.Sq == self.Skv:
            sizes = {"B": self.B, "S": self.Sq} | {x: sizes[x] for x in ("N", "K", "D", "Dv")}
        if self.K == self.N:
            del sizes["K"]
        if self.Dv == self.D:
            del sizes["Dv"]
        return "-".join(f"{letter}{size}" for letter, size in sizes.items())


def parse_shape(text: str) -> Shape:
    """Reads a shape such as `B2-S1024-N8-K2-D64`. B is 1, K is N and Dv is D unless given.

    Raises:
      ValueError: the text is no shape, or one that attention cannot have.
    """
    sizes: dict[str, int] = {}
    for part in text.split("-"):
        match = re.fullmatch(r"(B|Sq|Skv|S|N|K|Dv|D)([1-9]\d*)", part)
        if match is None or match[1] in sizes:
            raise ValueError(f"a shape must be like {SYNTAX}; got {text!r}, where {part!r} does not fit")
        sizes[match[1]] = int(match[2])
    if "S" in sizes and not sizes.keys() & {"Sq", "Skv"}:
        sizes["Sq"] = sizes["Skv"] = sizes.pop("S")
    missing = [letter for letter in ("Sq", "Skv", "N", "D") if letter not in sizes]
    if missing or "S" in sizes:
        raise ValueError(f"a shape must give S (or Sq and Skv), N and D, once each; got {text!r}")
    shape = Shape(**({"B": 1, "K": sizes["N"], "Dv": sizes["D"]} | sizes))
    if shape.N % shape.K:
        raise ValueError(f"in a shape N must be a multiple of K; got N={shape.N}, K={shape.K}")
    return shape


def parse_mask(text: str) -> str:
    """Checks the name of a mask: full, causal (top-left), or window:W (causal, W keys).

    Raises:
      ValueError: it is none of these.
    """
    if text in ("full", "causal") or re.fullmatch(r"window:[1-9]\d*", text):
        return text
    raise ValueError(f"a mask must be full, causal or window:W (W keys up to the row's own); got {text!r}")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every implementation of a row computes."""

    shape: Shape
    mask: str
    dtype: str
    direction: str

    def __post_init__(self) -> None:
        if self.window is not None and self.shape.Sq > self.shape.Skv:
            # Rows of a window past the keys are fully masked, which libraries define differently.
            raise ValueError(f"a window needs Sq <= Skv; got {self.shape}")

    def __str__(self) -> str:
        return f"{self.shape} {self.mask} {self.dtype} {self.direction}"

    @property
    def causal(self) -> bool:
        return self.mask != "full"

    @property
    def window(self) -> int | None:
        """How many keys are visible to a row, its own position included."""
        return int(self.mask.removeprefix("window:")) if self.mask.startswith("window:") else None

    @property
    def pairs(self) -> int:
        """How many (row, key) pairs of a head are visible."""
        Sq, Skv = self.shape.Sq, self.shape.Skv
        if not self.causal:
            return Sq * Skv
        most = min(self.window or Skv, Skv)  # keys of a row that has them all
        ramp = min(Sq, most)  # rows 0 .. ramp - 1 see 1 .. ramp keys
        return ramp * (ramp + 1) // 2 + (Sq - ramp) * most

    @property
    def flops(self) -> float:
        """A multiply-add counts as two."""
        forward = 2.0 * self.shape.B * self.shape.N * self.pairs * (self.shape.D + self.shape.Dv)
        return forward * PRODUCTS[self.direction]


def call_from(record: dict[str, Any]) -> Workload:
    """The call of `dataclasses.asdict(call)`."""
    return Workload(**(record | {"shape": Shape(**record["shape"])}))
