"""Programs of `flash_attention_score`: CANN's layouts, sparse modes, positional shifts and keep bits."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

import jax_fa
from jax_fa.testing import cann_oracle
from jax_fa.testing.fuzz.kinds import Kind
from jax_fa.testing.fuzz.program import Program

ENTRY = "flash_attention_score"
FLT_MAX = cann_oracle.FLT_MAX
HUGE = 2147483647
TOKENS = {0: (9, 5), 4: (10, 3)}
LAYOUTS = ("BSH", "SBH", "BSND", "BNSD", "TND")


# --- masks


def _seen(mode: int, sq: int, skv: int, prefix: int = 0) -> np.ndarray:
    pre, following = TOKENS.get(mode, (HUGE, HUGE))
    return cann_oracle.visible(mode, sq, skv, pre=pre, following=following, prefix=prefix)


def _mode(mode: int) -> Kind:
    def draw(random, s):
        if mode not in (5, 6):
            return {}
        low = max(0, s.Skv - s.Sq)
        return {"prefix": random.value.integers(low, max(low, s.Skv) + 1, s.B).astype(np.int32)}

    def visible(s, v):
        if "prefix" not in v:
            return _seen(mode, s.Sq, s.Skv)
        return np.stack([_seen(mode, s.Sq, s.Skv, int(x)) for x in v["prefix"]])[:, None]

    return Kind(draw, lambda v: v, visible)


def _packed(mode: int, equal: bool) -> Kind:
    """`equal`: sequences have as many keys as rows."""

    def ends(random, count, size):
        x = np.sort(random.value.integers(0, size + 1, count))
        if random.value.random() < 0.6:
            x[-1] = size
        return x.astype(np.int32)

    def draw(random, s):
        count = int(random.shape.integers(1, 6))
        query = ends(random, count, s.Sq)
        return {"query": query, "key": query.copy() if equal else ends(random, count, s.Skv)}

    def visible(s, v):
        found = np.zeros((1, s.Sq, s.Skv), bool)
        for rows, keys in blocks(v):
            size = rows.stop - rows.start, keys.stop - keys.start
            found[0, rows, keys] = _seen(mode, *size)
        return found

    return Kind(draw, lambda v: v, visible)


def blocks(values: Any) -> list[tuple[slice, slice]]:
    """The rows and keys of each packed sequence."""
    starts = [np.concatenate([[0], values[name][:-1]]) for name in ("query", "key")]
    pairs = zip(starts[0], values["query"], starts[1], values["key"], strict=True)
    return [(slice(int(a), int(b)), slice(int(c), int(d))) for a, b, c, d in pairs]


_PACKED = {f"{name}_{mode}": mode for name in ("packed", "equal") for mode in range(4)}
MODES = {f"sparse_{mode}": mode for mode in range(7)} | _PACKED
SCORE_KINDS = {
    name: _packed(mode, name.startswith("equal")) if name in _PACKED else _mode(mode)
    for name, mode in MODES.items()
}
MASKS = ("dense_BNQK", "dense_B1QK", "dense_QK")  # atten_mask, with True for what is visible


# --- programs


def draw_program(random: np.random.Generator, base: Program) -> Program:
    """A program of this entry, of the sizes and the backend of another one."""

    def one(*options: Any) -> Any:
        return options[int(random.integers(len(options)))]

    layout = one(*LAYOUTS)
    p = dataclasses.replace(
        base,
        entry=ENTRY,
        layout=layout,
        B=() if layout == "TND" else (one(1, 2, 3),),
        D=max(base.D, base.Dv),
        Dv=min(base.D, base.Dv),
        dtype=one("float32", "bfloat16", "float16"),
        bias=None,
        slopes=None,
        sinks=None if base.Skv == 0 else one(None, None, "N"),
        scale=one("known", "known", "traced"),
        cap=None,
        dropout=one(None, None, "bits"),
        max_logits=False,
    )
    if layout == "TND":
        return _draw_packed(random, p)
    mode = one(*(n for n in MODES if n.startswith("sparse")))
    mask: tuple[str, ...] = (mode,)
    if MODES[mode] in (0, 1) or (MODES[mode] == 5 and random.random() < 0.5):
        mask = (*mask, one(*MASKS[: 2 if MODES[mode] == 5 else 3]))
    p = dataclasses.replace(p, mask=mask, bias_dtype=p.dtype)
    if random.random() < 0.3:
        return dataclasses.replace(p, bias=one("BNQK", "bNQK", "BN1K", "bN1K"))
    if p.Sq == p.Skv and random.random() < 0.3:
        return dataclasses.replace(p, slopes=one("N", "BN"))
    return p


def _draw_packed(random: np.random.Generator, p: Program) -> Program:
    mode = int(random.integers(4))
    more = str(random.choice(["", "", "bias", "slopes"])) if p.Sq else ""
    # Shifts and slopes need as many keys as rows here. (Blocks of a shift are as long as sequences, which are known then.
    # Where a sequence has no keys, CANN's marks say so, whatever the sink is. Where the lengths are known, rows without
    # keys are refused in some modes.)
    known = p.known_mask or more == "bias"
    equal = bool(more or p.sinks or (known and mode in (0, 3)))
    fields: dict[str, Any] = {"Skv": p.Sq} if equal else {}
    if more == "slopes":
        fields["slopes"] = "N"
    elif more == "bias":
        fields |= {"bias": str(random.choice(["NQK", "N1K"])), "bias_dtype": p.dtype}
    return dataclasses.replace(
        p, mask=(f"{'equal' if equal else 'packed'}_{mode}",), known_mask=known, **fields
    )


def pse_type(program: Program) -> int:
    """Types 0 and 1 of a shift, 2 and 3 of slopes. 1 where its factor is a power of 2, by which gradients are multiplied.

    (Not in float16, whose subnormal gradients have been rounded by then.)
    """
    if program.slopes:
        return 2 + program.seed % 2
    exact = program.scale == "known" and program.dtype != "float16"
    return program.seed % 2 if program.bias and exact else 0


def known_scale(program: Program) -> float:
    return (1.0, 0.25, 0.5)[program.seed % 3] * (0.25 if program.D > 16 else 1.0)


def distance_power(program: Program) -> float:
    """Of the distance that slopes multiply."""
    return 0.5 if program.entry == ENTRY and program.slopes and pse_type(program) == 3 else 1.0


# --- keep bits


def draw_bits(program: Program, random: np.random.Generator) -> dict[str, Any]:
    p = program
    count = int(np.prod(p.B, dtype=int)) * p.N * p.Sq * p.Skv
    return {"drop_mask": random.integers(0, 256, max(1, -(-count // 8)), dtype=np.uint8)}


def keep_bits(program: Program, bits: np.ndarray, masks: dict[str, Any]) -> np.ndarray:
    p = program
    if p.layout != "TND":
        lengths = [(p.Sq, p.Skv)] * p.B[0]
        return np.stack(cann_oracle.keep_bits(bits, lengths, p.N))
    found = np.ones((p.N, p.Sq, p.Skv), bool)
    parts = blocks(masks[p.mask[0]])
    lengths = [(r.stop - r.start, k.stop - k.start) for r, k in parts]
    for (rows, keys), kept in zip(parts, cann_oracle.keep_bits(bits, lengths, p.N), strict=True):
        found[:, rows, keys] = kept
    return found


KEEP_PROB = 0.75


# --- the call


def attend(program: Program, operands: Any, values: Any, dropout: Any, known: bool) -> dict[str, Any]:
    """`values`: of masks, by kind."""
    result = jax_fa.flash_attention_score(**arguments(program, operands, values, dropout, known))
    return results(program, result.attention_out, result.softmax_max, result.softmax_sum)


def arguments(program: Program, operands: Any, values: Any, dropout: Any, known: bool) -> dict[str, Any]:
    p, mode = program, MODES[program.mask[0]]
    pre, following = TOKENS.get(mode, (HUGE, HUGE))
    integers: dict[str, Any] = {
        name: tuple(int(i) for i in x) if known else jnp.asarray(x) for name, x in values[p.mask[0]].items()
    }
    names = {"query": "actual_seq_qlen", "key": "actual_seq_kvlen", "prefix": "prefix"}
    atten_mask = None
    for name in p.mask[1:]:
        atten_mask = jnp.logical_not(values[name]["array"])
        if name == "dense_QK" and p.seed % 4 == 0:
            atten_mask = atten_mask[None, None]
    return {
        **{name: operands[name] for name in ("query", "key", "value")},
        **{names[name]: x for name, x in integers.items()},
        "pse": _pse(p, operands, values),
        "drop_mask": dropout.get("drop_mask"),
        "atten_mask": atten_mask,
        "head_num": p.N,
        "input_layout": p.layout,
        "scale_value": operands["scale"] if p.scale == "traced" else known_scale(p),
        "keep_prob": KEEP_PROB if p.dropout else 1.0,
        "pre_tokens": pre,
        "next_tokens": following,
        "sparse_mode": mode,
        "pse_type": pse_type(p),
        "sink": operands.get("sinks"),
        "implementation": p.backend,
    }


def _pse(program: Program, operands: Any, values: Any) -> Any:
    p = program
    if p.slopes:
        return operands["alibi_slopes"]
    pse = operands.get("bias")
    if pse is None:
        return None
    if pse_type(p) == 1:
        pse = pse * jnp.asarray(1 / known_scale(p), pse.dtype)
    if p.layout == "TND":  # a block for each sequence
        rows = pse.shape[1] > 1 or p.Sq == 1
        parts = [pse[:, at if rows else slice(None), keys] for at, keys in blocks(values[p.mask[0]])]
        pse = jnp.concatenate([part.reshape(-1) for part in parts])
    return pse


def results(program: Program, out: Any, softmax_max: Any, softmax_sum: Any) -> dict[str, Any]:
    """By name, as of `flash_attention`."""
    m, l = (x[..., lane] for x, lane in ((softmax_max, 3), (softmax_sum, 7)))
    if program.layout == "TND":
        m, l = m.T, l.T
    masked = (l == FLT_MAX) | (l == 0)
    m, l = jnp.where(masked, -FLT_MAX, m), jnp.where(masked, 0, l)
    lse = jnp.where(masked, -FLT_MAX, m + jnp.log(jnp.where(masked, 1, l)))
    return {"out": out, "lse": lse, "m": m, "l": l}
