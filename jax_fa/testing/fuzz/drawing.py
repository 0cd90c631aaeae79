"""Programs at random."""

import dataclasses
import math
from typing import Any

import numpy as np

from jax_fa.testing.fuzz import inputs, kinds, npu, paged, score, sharded, ways
from jax_fa.testing.fuzz.program import Program

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


def _bias(random: np.random.Generator, batch: str = "B") -> str:
    letters = "".join(c if random.random() < 0.6 else {"B": "b"}.get(c, "1") for c in f"{batch}NQK")
    return letters[int(random.integers(0, 4)) if random.random() < 0.4 else 0 :]


def _mask(random: np.random.Generator, square: bool, slopes: bool) -> tuple[str, ...]:
    count = int(random.choice([0, 1, 1, 1, 2, 2, 3]))
    names = [str(x) for x in random.choice(list(kinds.KINDS), count, replace=False)]
    names = [name for name in names if square or name not in kinds.SQUARE]
    placing = [name for name in names if name in kinds.PLACING]
    return tuple(name for name in names if not slopes or name not in placing[1:])


def _sizes(random: np.random.Generator, B: tuple[int, ...], most: float) -> dict[str, Any]:
    while True:
        K = int(random.integers(1, 4))
        N = K * int(random.choice([1, 1, 2, 3, 5]))
        lengths = LENGTHS if random.random() < 0.85 else LONG
        Sq, Skv = int(random.choice(lengths)), int(random.choice([*LENGTHS, *lengths]))
        if random.random() < 0.4:
            Skv = Sq
        D, Dv = (int(random.choice(WIDTHS)) for _ in range(2))
        if random.random() < 0.5:
            Dv = D
        if math.prod((2, *B, N, Sq, Skv, D + Dv)) <= most:
            return {"Sq": Sq, "Skv": Skv, "N": N, "K": K, "D": D, "Dv": Dv}


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
    if backend == "mosaic":
        dtypes = ["bfloat16", "float16"]
    scale, slopes = one(None, None, "known", "traced"), one(None, None, None, "N", "BN")
    cap, dropout = one(None, None, None, "known", "traced"), one(None, None, None, "known", "traced")
    if backend == "ascend":
        cap, derivative = None, one("none", "reverse")
    sizes = _sizes(random, B, MOST_WORK * (1 if derivative == "none" else 0.4))
    bias = _bias(random) if chance(0.4) else None
    dtype = one(*dtypes)
    program = Program(
        backend=backend,
        B=B,
        **sizes,
        dtype=dtype,
        layout=layout,
        mask=_mask(random, sizes["Sq"] == sizes["Skv"], slopes is not None),
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
        return _of_npu(random, score.draw_program(random, program))
    if entry < 0.3:
        return _as_jax_nn(random, program)
    if entry < 0.4:
        return paged.draw_program(random, program)
    if chance(0.3):
        program = dataclasses.replace(program, joined=_joined(random, program))
    return _mapped(random, program) if chance(0.2) and backend != "ascend" else _called(random, program)


def _joined(random: np.random.Generator, p: Program) -> str:
    """How the masks are joined. (Where rows stand is said for those of which all hold.)"""
    if p.slopes and any(name in kinds.PLACING for name in p.mask):
        return "all"
    can = [name for name, way in kinds.COMBINATIONS.items() if way.fewest <= len(p.mask)]
    return str(random.choice(can)) if can else "all"


def _of_npu(random: np.random.Generator, p: Program) -> Program:
    if random.random() < 0.6:
        return p
    grad = npu.serves_gradients(p) and random.random() < 0.5
    return dataclasses.replace(p, how="npu_grad" if grad else "npu")


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
    drawn = dataclasses.replace(
        program,
        mapped=chosen,
        mapped_last=bool(random.random() < 0.5),
        vmap_outside=bool(random.random() < 0.5),
        max_logits=False,
    )
    return drawn if inputs.maps_an_array(drawn) else dataclasses.replace(drawn, mapped=("query", "mask"))


def _called(random: np.random.Generator, program: Program) -> Program:
    if random.random() > 0.25:
        return program
    can = [name for name, serves in ways.HOW.items() if serves(program) and name != "eager"]
    how = str(random.choice(can)) if can and random.random() < 0.8 else "eager"
    return sharded.fitted(program) if how == "sharded" else dataclasses.replace(program, how=how)
