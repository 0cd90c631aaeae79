"""Programs of `paged_attention`: the keys and values of a call, cut into pages that lie anywhere in a pool.

Keys of 8 bits and with scales are what they stand for in the reference, which float64 holds.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

import jax_fa
from jax_fa.testing.fuzz import kinds
from jax_fa.testing.fuzz.kinds import Kind
from jax_fa.testing.fuzz.plain import Arrays
from jax_fa.testing.fuzz.program import Program

ENTRY = "paged_attention"
SIZES = (1, 2, 3, 8, 16, 40)  # of a page
SPARE = 3  # pages of the pool that no sequence has
STORED = ("key", "value")
UNIT = 2.0**-5  # what an int8 of 1 stands for
SCALES = (0.25, 1.0, 1.3)  # of a page, head and token


def page_size(program: Program) -> int:
    return int(program.mask[0].removeprefix("pages_"))


def are_data(program: Program) -> bool:
    """Whether the pages are 8 bits wide, or have scales: then they have no gradients here."""
    return program.page_scales or "8" in (program.pages or "")


def least_value(program: Program) -> float:
    """What a stored value of 1 stands for, at least."""
    p = program
    if p.entry != ENTRY:
        return 1.0
    return (UNIT if p.pages == "int8" else 1.0) * (min(SCALES) if p.page_scales else 1.0)


# --- which pages


def _pages(size: int) -> Kind:
    """Every page belongs to one sequence; what is behind the length is masked by other kinds."""

    def draw(random, s):
        sequences, each = s.B[0], s.Skv // size
        pages = sequences * each + SPARE
        order = random.value.permutation(pages)[: sequences * each].astype(np.int32)
        scales = {}
        for name in STORED:
            shape = tuple(n if random.shape.random() < 0.5 else 1 for n in (pages, size, s.K))
            scales[f"{name}_scale"] = np.asarray(random.value.choice(SCALES, shape), np.float32)
        return {"table": order.reshape(sequences, each), **scales}

    return Kind(draw, lambda v: v, lambda s, v: np.ones((1, 1), bool))


KINDS = {f"pages_{size}": _pages(size) for size in SIZES} | {"behind": kinds.behind()}


# --- programs


def draw_program(random: np.random.Generator, base: Program) -> Program:
    """A program of this entry, of the sizes and the backend of another one."""

    def one(*options: Any) -> Any:
        return options[int(random.integers(len(options)))]

    size = one(*SIZES)
    count = max(1, -(-base.Skv // size))
    floats = one(None, None, "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int8")
    p = dataclasses.replace(
        base,
        entry=ENTRY,
        backend="xla" if base.backend == "ascend" else base.backend,
        layout="BSND",
        B=(one(1, 2, 3),),
        Sq=one(1, 1, 1, 2, 3, 5, 17, 40),
        Skv=count * size,
        dtype=one("float32", "bfloat16", "float16"),
        mask=(f"pages_{size}", "key_lengths", "causal_bottom", *one((), ("behind",))),
        known_mask=False,
        bias=None,
        slopes=None,
        dropout=None,
        max_logits=False,
        pages=floats,
        page_scales=one(False, True),
        derivative=one("none", "none", "reverse", "forward"),
    )
    return dataclasses.replace(p, derivative="none") if are_data(p) else p


# --- data


def as_stored(program: Program, name: str, drawn: np.ndarray) -> np.ndarray:
    """Keys or values, contiguous, in the dtype of the pages."""
    dtype = jnp.dtype(program.pages or program.dtype)
    x = np.asarray(drawn, np.float64)
    if dtype == np.int8:
        return np.clip(np.rint(x / UNIT), -128, 127).astype(np.int8)
    return np.clip(x, -400, 400).astype(dtype)  # (Beyond 448 there is no number of 8 bits.)


def meaning(program: Program, name: str, stored: np.ndarray, values: Any) -> np.ndarray:
    """What the stored elements stand for."""
    x = np.asarray(stored, np.float64) * (UNIT if stored.dtype == np.int8 else 1)
    if not program.page_scales:
        return x
    p, v, size = program, values[program.mask[0]], page_size(program)
    count = p.B[0] * (p.Skv // size) + SPARE
    scale = np.broadcast_to(v[f"{name}_scale"], (count, size, p.K))[v["table"]]
    return x * scale.reshape(p.B[0], p.Skv, p.K, 1)


# --- the call


def attend(program: Program, operands: Arrays, values: Arrays, options: Arrays) -> Arrays:
    p, size = program, page_size(program)
    v = values[p.mask[0]]
    table = jnp.asarray(v["table"])
    pools: dict[str, Any] = {}
    for name in STORED:
        x = operands[name]
        rows = x.reshape(p.B[0] * (p.Skv // size), size, p.K, x.shape[-1])
        pool = jnp.full((rows.shape[0] + SPARE, *rows.shape[1:]), 99, x.dtype)
        pools[f"{name}_pages"] = pool.at[table.reshape(-1)].set(rows)
    lengths = jnp.broadcast_to(jnp.asarray(values["key_lengths"]["key"]), p.B)
    # Entries behind the length may be anything.
    used = jnp.arange(table.shape[1]) * size < lengths[:, None]
    given = {name: x for name, x in operands.items() if name not in STORED}
    unit = np.float32(UNIT if p.pages == "int8" else 1)
    if p.page_scales or p.pages == "int8":
        scales = {name: v[f"{name}_scale"] * unit if p.page_scales else unit for name in STORED}
        options = options | {f"{name}_scale": x for name, x in scales.items()}
    if "behind" in p.mask:
        options = options | {"local_window_size": values["behind"]["left"]}
    out, lse = jax_fa.paged_attention(
        **given,
        **pools,
        **options,
        page_table=jnp.where(used, table, 2**31 - 1),
        lengths=lengths,
        implementation=p.backend,
        return_logsumexp=True,
    )
    return {"out": out, "lse": lse}
