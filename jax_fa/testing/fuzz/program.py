"""Programs, which are compiled, and data, of which each program sees many."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Program:
    """One program: everything that is known when it is compiled. All fields are JSON."""

    entry: str = "flash_attention"
    backend: str | None = None
    B: tuple[int, ...] = (2,)
    Sq: int = 5
    Skv: int = 7
    N: int = 2
    K: int = 1
    D: int = 8
    Dv: int = 8
    dtype: str = "float32"
    layout: str = "BSND"
    mask: tuple[str, ...] = ()  # keys of `kinds.KINDS`
    joined: str = "all"  # how: see `kinds.COMBINATIONS`
    known_mask: bool = False  # its values are part of the program
    bias: str | None = None  # as `kinds.dense_shape`
    bias_dtype: str = "float32"
    slopes: str | None = None  # "N" or "BN"
    sinks: str | None = None
    scale: str | None = None  # "known" or "traced"
    cap: str | None = None
    dropout: str | None = None
    derivative: str = "none"  # "reverse", "forward", "second"
    mapped: tuple[str, ...] = ()  # what vmap maps: operands, "mask", "dropout_key"
    mapped_last: bool = False  # ... along the last axis, not the first
    vmap_outside: bool = True  # of the derivative, not inside
    max_logits: bool = False
    how: str = "jit"  # see `ways.HOW` and `npu`
    pages: str | None = None  # their dtype, if it is not the query's
    page_scales: bool = False
    seed: int = 0  # of the values that are part of the program

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return ", ".join(f"{name}={x!r}" for name, x in given.items() if x not in (None, (), False))

    @property
    def batch(self) -> tuple[int, ...]:
        """With the dim that vmap adds."""
        return ((2,) if self.mapped else ()) + self.B

    @property
    def operands(self) -> tuple[str, ...]:
        """Those that are given and have derivatives."""
        more = {
            "bias": self.bias,
            "alibi_slopes": self.slopes,
            "sinks": self.sinks,
            "scale": self.scale == "traced",
            "logits_soft_cap": self.cap == "traced",
        }
        return ("query", "key", "value", *(name for name, there in more.items() if there))

    def results(self) -> tuple[str, ...]:
        """Those that are differentiated."""
        alone = self.entry == "dot_product_attention" or self.how == "npu_grad"
        return ("out",) if alone else ("out", "lse")

    def as_dict(self) -> dict[str, Any]:
        """The fields that are not the defaults."""
        default = dataclasses.asdict(Program())
        return {name: x for name, x in dataclasses.asdict(self).items() if x != default[name]}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Program":
        given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class Data:
    """What one call is given. The arrays come from the seed."""

    seed: int
    spread: float = 1.0  # standard deviation of the logits, roughly
    size: float = 1.0  # of values and cotangents
    infinite_bias: bool = False
    garbage: str | None = None  # "nan", "inf", "-inf", "3e38", "1e-40", in masked places
    visible_garbage: bool = False  # ... and in some others

    def as_dict(self) -> dict[str, Any]:
        default = dataclasses.asdict(Data(seed=-1))
        return {name: x for name, x in dataclasses.asdict(self).items() if x != default[name]}


def draw_data(program: Program, seed: int) -> Data:
    random = np.random.default_rng((program.seed, seed, 1))
    spread = float(random.choice([1.0, 1.0, 1.0, 0.01, 8.0, 60.0, 400.0]))
    size = float(random.choice([1.0, 1.0, 1.0, 1.0, 1e-4, 1e3]))
    garbage = str(random.choice(["nan", "inf", "-inf", "3e38", "1e-40"])) if random.random() < 0.3 else None
    # (Eight bits hold little of it.)
    if program.backend == "ascend" or program.dtype == "float64" or program.pages or program.page_scales:
        garbage = None
    if program.backend == "ascend":
        spread, size = min(spread, 8.0), 1.0
    return Data(
        seed=seed,
        spread=spread,
        size=size,
        # (A bias of -inf is no mask to the NaN-safe pass of these kernels.)
        infinite_bias=bool(random.random() < 0.2) and not (garbage and program.backend == "mosaic"),
        garbage=garbage,
        visible_garbage=bool(garbage in ("nan", "inf", "-inf") and random.random() < 0.4),
    )
