"""What is drawn at random: programs, which are compiled, and data, of which each program sees many."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_fa.testing.fuzz import kinds

LENGTHS = (
    0,
    1,
    2,
    3,
    5,
    7,
    8,
    13,
    15,
    16,
    17,
    29,
    31,
    32,
    33,
    47,
    63,
    64,
    65,
    95,
    96,
    97,
    127,
    128,
    129,
    191,
)
LONG = (211, 255, 256, 257, 383, 384, 385, 449, 511, 512, 513, 577, 599, 600)
WIDTHS = (1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 32, 40, 64, 65, 80, 100, 128, 130)
MOST_WORK = 3e6  # multiplications of one product: what float64 takes some milliseconds for


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
    mask: tuple[str, ...] = ()  # keys of `kinds.KINDS`, all of which hold
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
    how: str = "jit"  # see `calls.HOW`
    seed: int = 0  # of the values that are part of the program

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return ", ".join(f"{name}={x!r}" for name, x in given.items() if x not in (None, (), False))

    @property
    def batch(self) -> tuple[int, ...]:
        """With the dim that vmap adds."""
        return ((2,) if self.mapped else ()) + self.B

    @property
    def work(self) -> float:
        return math.prod((*self.batch, self.N, self.Sq, self.Skv, self.D + self.Dv)) * 1.0

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
        return ("out",) if self.entry == "dot_product_attention" else ("out", "lse")

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
    if program.backend == "ascend" or program.dtype == "float64":
        garbage = None
    if program.backend == "ascend":
        spread, size = min(spread, 8.0), 1.0
    return Data(
        seed=seed,
        spread=spread,
        size=size,
        infinite_bias=bool(random.random() < 0.2),
        garbage=garbage,
        visible_garbage=bool(garbage in ("nan", "inf", "-inf") and random.random() < 0.4),
    )


# --- programs


def _bias(random: np.random.Generator, batch: str = "B") -> str:
    letters = "".join(c if random.random() < 0.6 else {"B": "b"}.get(c, "1") for c in f"{batch}NQK")
    return letters[int(random.integers(0, 4)) if random.random() < 0.4 else 0 :]


def _mask(random: np.random.Generator, square: bool, slopes: bool) -> tuple[str, ...]:
    count = int(random.choice([0, 1, 1, 1, 2, 2, 3]))
    names = [str(x) for x in random.choice(list(kinds.KINDS), count, replace=False)]
    names = [name for name in names if square or name not in kinds.SQUARE]
    placing = [name for name in names if name in kinds.PLACING]
    return tuple(name for name in names if not slopes or name not in placing[1:])


def draw_program(seed: int, backends: tuple[str, ...]) -> Program:
    """A program of the seed, on one of the backends."""
    random = np.random.default_rng((seed, 0))

    def chance(p: float) -> bool:
        return bool(random.random() < p)

    def one(*options: Any) -> Any:
        return options[int(random.integers(len(options)))]

    backend = one(*backends)
    layout = one("BSND", "BSND", "BNSD", "SBND", "SND", "NSD")
    B: tuple[int, ...] = ()
    if layout == "SBND":
        B = (int(random.integers(1, 4)),)
    elif layout in ("BSND", "BNSD"):
        B = one((), (1,), (2,), (3,), (2, 2), (1, 3))
    derivative = one("none", "none", "reverse", "reverse", "reverse", "forward", "second")
    dtypes = ["float32", "float32", "bfloat16", "float16"] + (["float64"] if backend == "xla" else [])
    scale, slopes = one(None, None, "known", "traced"), one(None, None, None, "N", "BN")
    cap, dropout = one(None, None, None, "known", "traced"), one(None, None, None, "known", "traced")
    if backend == "ascend":
        cap, derivative = None, one("none", "reverse")
    while True:
        K = int(random.integers(1, 4))
        N = K * one(1, 1, 2, 3, 5)
        lengths = LENGTHS if chance(0.85) else LONG
        Sq, Skv = one(*lengths), one(*LENGTHS, *lengths)
        if chance(0.4):
            Skv = Sq
        D = one(*WIDTHS)
        Dv = D if chance(0.5) else one(*WIDTHS)
        work = math.prod((2, *B, N, Sq, Skv, D + Dv))
        if work <= MOST_WORK * (1 if derivative == "none" else 0.4):
            break
    bias = _bias(random) if chance(0.4) else None
    dtype = one(*dtypes)
    program = Program(
        backend=backend,
        B=B,
        Sq=Sq,
        Skv=Skv,
        N=N,
        K=K,
        D=D,
        Dv=Dv,
        dtype=dtype,
        layout=layout,
        mask=_mask(random, Sq == Skv, slopes is not None),
        known_mask=chance(0.3),
        bias=bias,
        bias_dtype=dtype if chance(0.5) or backend == "ascend" else "float32",
        slopes=slopes,
        sinks=one(None, None, None, "N", "BN"),
        scale=scale,
        cap=cap,
        dropout=dropout,
        derivative=derivative,
        max_logits=chance(0.15),
        seed=seed,
    )
    entry = random.random()
    if entry < 0.2:
        from jax_fa.testing.fuzz import score

        return score.draw_program(random, program)
    if entry < 0.3:
        return _as_jax_nn(random, program)
    return _mapped(random, program) if chance(0.2) and backend != "ascend" else _called(random, program)


def _as_jax_nn(random: np.random.Generator, p: Program) -> Program:
    """A program of `dot_product_attention`."""
    B = p.B[:1]
    fields: dict[str, Any] = {
        "entry": "dot_product_attention",
        "layout": "BSND",
        "B": B,
        "Dv": p.D,
        "slopes": None,
    }
    can = (
        "causal",
        "lengths",
        "key_lengths",
        "query_lengths",
        "dense_BNQK",
        "dense_QK",
        "dense_B1QK",
        "dense_K",
    )
    count = int(random.choice([0, 1, 1, 2, 3]))
    mask: tuple[str, ...] = ()
    for name in random.choice(can, count, replace=False):
        alike = [
            other
            for other in mask
            if ("dense" in name and "dense" in other) or ("lengths" in name and "lengths" in other)
        ]
        mask = mask if alike else (*mask, str(name))
    return dataclasses.replace(p, **fields, mask=mask)


def _mapped(random: np.random.Generator, program: Program) -> Program:
    can = [*program.operands]
    if program.mask and not program.known_mask:
        can.append("mask")
    if program.dropout:
        can.append("dropout_key")
    chosen = tuple(name for name in can if random.random() < 0.5) or ("query",)
    return dataclasses.replace(
        program,
        mapped=chosen,
        mapped_last=bool(random.random() < 0.5),
        vmap_outside=bool(random.random() < 0.5),
        max_logits=False,
    )


def _called(random: np.random.Generator, program: Program) -> Program:
    from jax_fa.testing.fuzz import calls

    if random.random() > 0.15:
        return program
    can = [name for name, serves in calls.HOW.items() if serves(program)]
    return dataclasses.replace(program, how=str(random.choice(can))) if can else program
