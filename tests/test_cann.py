"""`flash_attention_score` against the NumPy of cann_oracle.py: values, statistics, gradients, errors."""

import zlib
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa import (
    FlashAttentionScoreOutput,
    dropout,
    dropout_mask,
    flash_attention,
    flash_attention_score,
    masks,
)
from jax_fa.backends import native
from jax_fa.cann import drop_mask
from jax_fa.entry import request_of
from jax_fa.testing import cann_oracle as oracle
from jax_fa.testing.programs import temporary_bytes
from jax_fa.testing.spread import covering, pairwise

FLT_MAX = np.finfo(np.float32).max
HUGE = 2147483647


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call. `lengths` are (Sq, Skv) of each sequence; outside of TND they are equal."""

    name: str
    layout: str = "BSND"
    lengths: tuple[tuple[int, int], ...] = ((37, 45), (37, 45))
    dtype: str = "float32"
    N: int = 4
    K: int = 2
    D: int = 16
    Dv: int = 16
    scale: float = 0.25
    mode: int = 0
    pre: int = HUGE
    following: int = HUGE
    prefix: tuple[int, ...] = ()
    mask: str | None = None  # a key of MASKS, or "compressed"
    pse: tuple[int, str] | None = None  # (pse_type, form): see cann_oracle.Pse; "1 form": shared by the batch
    keep_prob: float | None = None  # None: no drop mask
    traced: bool = False  # ends and prefix are traced arrays
    gradients: bool = True

    @property
    def packed(self) -> bool:
        return self.layout == "TND"

    @property
    def sizes(self) -> tuple[int, int]:
        """(Sq, Skv) of the dense shapes: of the longest sequences in TND."""
        return max(sq for sq, _ in self.lengths), max(skv for _, skv in self.lengths)

    @property
    def ends(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(tuple(int(x) for x in np.cumsum([pair[i] for pair in self.lengths])) for i in (0, 1))


MASKS = {
    "full": lambda c: (len(c.lengths), c.N, *c.sizes),
    "batch": lambda c: (len(c.lengths), 1, *c.sizes),
    "one": lambda c: (1, 1, *c.sizes),
    "plain": lambda c: c.sizes,
    "sum": lambda c: (c.ends[0][-1], c.ends[1][-1]),
}
DTYPES = ("float32", "bfloat16", "float16")
TOKENS = {0: (9, 5), 4: (10, 3), 7: (HUGE, -2), 8: (HUGE, 2)}
PACKED = ((5, 9), (0, 0), (20, 33), (0, 4), (3, 0), (1, 4))
SQUARE = ((5, 5), (0, 0), (20, 20), (13, 13))


def _case(name: str, *options: Any, **more: Any) -> Case:
    for option in options:
        more = option | more
    return Case(name=name, **more)


def _layout_cases():
    """Every layout with every sparse mode; dtypes and the longer of the two lengths take turns."""
    for a, layout in enumerate(("BSH", "SBH", "BSND", "BNSD")):
        for mode in range(7):
            pre, following = TOKENS.get(mode, (HUGE, HUGE))
            long_query = (a + mode) % 3 == 2
            prefix = ((0, 20) if long_query else (8, 20)) if mode in (5, 6) else ()
            lengths = ((45, 37) if long_query else (37, 45),) * 2
            yield Case(
                name=f"{layout}-mode{mode}",
                layout=layout,
                mode=mode,
                pre=pre,
                following=following,
                prefix=prefix,
                lengths=lengths,
                dtype=DTYPES[(a + mode) % 3],
                traced=mode == 6 and a > 1,
                gradients=(a + mode) % 4 == 0,
            )
    for a, mode in enumerate((0, 1, 2, 3, 4, 6, 7, 8)):
        pre, following = TOKENS.get(mode, (HUGE, HUGE))
        prefix = (9, 0, 20, 4, 0, 3) if mode == 6 else ()
        pre = 25 if mode == 0 else pre
        common = {"mode": mode, "pre": pre, "following": following, "prefix": prefix}
        packed = common | {"layout": "TND", "lengths": PACKED}
        yield _case(f"TND-mode{mode}", packed, dtype=DTYPES[a % 3])
        yield _case(f"TND-mode{mode}-traced", packed, traced=True, dtype=DTYPES[(a + 1) % 3], gradients=False)


def _mask_cases():
    forward = {"gradients": False}
    for a, form in enumerate(("full", "batch", "one", "plain")):
        yield _case(f"mask-{form}", forward, mask=form, mode=a % 2, dtype=DTYPES[a % 3])
    yield _case("mask-and-band", mask="batch", pre=9, following=5)
    yield _case("mask-and-prefix", forward, mask="full", mode=5, prefix=(8, 30))
    yield _case("mask-and-prefix-traced", forward, mask="batch", mode=5, prefix=(8, 30), traced=True)
    for mode in (2, 3, 4):
        yield _case(f"mask-compressed-{mode}", forward, mask="compressed", mode=mode, pre=7, following=1)
    yield _case("mask-compressed-6", forward, mask="compressed", mode=6, prefix=(8, 30))
    packed = {"layout": "TND", "lengths": PACKED, "gradients": False}
    yield _case("mask-TND-longest", packed, mask="plain", pre=25, following=5)
    yield _case("mask-TND-longest-traced", packed, mask="plain", mode=1, traced=True)
    yield _case("mask-TND-sum", packed, mask="sum", mode=1)
    yield _case("mask-TND-each", packed, mask="batch", mode=1)
    yield _case("mask-TND-each-traced", packed, mask="batch", mode=1, traced=True)
    yield _case("mask-plain-5", forward, mask="plain", mode=5, prefix=(20,), lengths=((37, 45),))
    yield _case("mask-TND-compressed", packed, mask="compressed", mode=8, following=2)


def _pse_cases():
    for a, form in enumerate(("full", "1 full", "row", "1 row")):
        yield _case(f"pse0-{form}", pse=(0, form), dtype=DTYPES[a % 3])
        yield _case(f"pse1-{form}", pse=(1, form), dtype=DTYPES[(a + 1) % 3], mode=3)
    square = {"lengths": ((37, 37), (37, 37))}
    for kind in (2, 3):
        yield _case(f"pse{kind}-slopes", square, pse=(kind, "slopes"), mode=2, layout="BNSD")
        yield _case(f"pse{kind}-1 slopes", square, pse=(kind, "1 slopes"), dtype=DTYPES[kind - 1])
    long = {"lengths": ((1060, 1060),), "N": 2, "K": 1}
    yield _case("pse1-table", long, pse=(1, "table"), mode=2)
    yield _case("pse0-table", long, pse=(0, "1 table"), following=0, dtype="bfloat16")
    packed = {"layout": "TND", "lengths": PACKED}
    yield _case("pse0-TND-full", packed, pse=(0, "full"), mode=3)
    yield _case("pse1-TND-full-traced", packed, pse=(1, "full"), mode=3, traced=True, dtype="bfloat16")
    yield _case("pse1-TND-row", packed, pse=(1, "row"))
    yield _case("pse0-TND-row-traced", packed, pse=(0, "row"), traced=True, dtype="float16")
    packed = {"layout": "TND", "lengths": SQUARE}
    yield _case("pse1-TND-table", packed, pse=(1, "table"), mode=3)
    yield _case("pse0-TND-1 table-traced", packed, pse=(0, "1 table"), mode=2, traced=True)
    yield _case("pse2-TND-slopes", packed, pse=(2, "slopes"), mode=3)
    yield _case("pse3-TND-slopes", packed, pse=(3, "slopes"), dtype="bfloat16")
    yield _case("pse3-TND-1 slopes", packed, pse=(3, "1 slopes"), traced=True)
    yield _case("pse2-TND-slopes-traced", packed, pse=(2, "slopes"), mode=3, traced=True, dtype="float16")
    yield _case("pse2-TND-prefix", packed, pse=(2, "slopes"), mode=6, prefix=(3, 0, 20, 9))
    yield _case("pse1-TND-full-longer-keys", packed | {"lengths": PACKED}, pse=(1, "full"), dtype="float16")
    long = {"layout": "TND", "lengths": ((1040, 1040), (7, 7)), "N": 2, "K": 2}
    yield _case("pse1-TND-table-long", long, pse=(1, "table"), mode=3)


def _other_cases():
    yield _case("drop", keep_prob=0.75)
    yield _case("drop-BSH-bf16", layout="BSH", keep_prob=0.5, mode=3, dtype="bfloat16")
    yield _case("drop-keep-all", layout="BNSD", keep_prob=1.0)
    yield _case("drop-TND", layout="TND", lengths=PACKED, keep_prob=0.75)
    yield _case(
        "drop-TND-traced", layout="TND", lengths=PACKED, keep_prob=0.75, mode=3, traced=True, dtype="float16"
    )
    yield _case(
        "everything", layout="SBH", keep_prob=0.75, pse=(1, "full"), mask="batch", pre=20, following=9, Dv=8
    )
    yield _case("MHA", N=3, K=3)
    yield _case("MQA-BSH", layout="BSH", N=4, K=1, Dv=8, mode=3)
    yield _case("small-value-SBH", layout="SBH", N=6, K=3, D=24, Dv=8)
    yield _case("small-value-TND", layout="TND", lengths=PACKED, D=24, Dv=16, mode=3)
    yield _case("default-scale", scale=1.0, pse=(1, "full"))
    yield _case("two-keys", lengths=((37, 2),))
    yield _case("one-row", lengths=((1, 45),), mode=3)
    yield _case("negative-tokens", pre=-3, following=9)
    yield _case("no-keys", lengths=((5, 0), (5, 0)))
    yield _case("no-rows", lengths=((0, 5), (0, 5)))
    for layout in ("BSH", "SBH"):  # whose last axis holds heads and head_dim
        yield _case(f"no-rows-{layout}", layout=layout, lengths=((0, 5), (0, 5)), keep_prob=0.75)
    yield _case("rows-without-keys", mode=3, lengths=((45, 20), (45, 20)))


CASES = [*_layout_cases(), *_mask_cases(), *_pse_cases(), *_other_cases()]


# --- running a case


@dataclass(frozen=True)
class Inputs:
    """The arrays of a case, as the caller has them."""

    q: Any
    k: Any
    v: Any
    dout: Any
    pse: Any = None
    drop_mask: Any = None
    atten_mask: Any = None


@cache
def inputs(case: Case) -> Inputs:
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))

    def random(axis: int, heads: int, D: int):
        parts = [rng.standard_normal((pair[axis], heads, D)) for pair in case.lengths]
        return oracle.join(parts, case.layout).astype(case.dtype)

    q, k, v = random(0, case.N, case.D), random(1, case.K, case.D), random(1, case.K, case.Dv)
    drop = None
    if case.keep_prob is not None:
        bits = case.N * sum(sq * skv for sq, skv in case.lengths)
        drop = np.packbits(rng.random(bits) < 0.7, bitorder="little")
    mask = None
    if case.mask == "compressed":
        mask = oracle.compressed(case.mode)
    elif case.mask is not None:
        mask = rng.random(MASKS[case.mask](case)) < 0.3
        mask[..., : mask.shape[-2] // 4, :] = True  # fully masked rows
        mask = mask if case.mask == "plain" else mask.astype(np.uint8)
    return Inputs(q, k, v, random(0, case.N, case.Dv), _random_pse(case, rng), drop, mask)


def _random_pse(case: Case, rng):
    if case.pse is None:
        return None
    form = case.pse[1]
    B = 1 if form.startswith("1 ") else len(case.lengths)
    form = form.removeprefix("1 ")
    if form == "slopes":
        return rng.random((B, case.N) if B > 1 else (case.N,)).astype(np.float32)
    if form == "table":
        return rng.standard_normal((B, case.N, 1024, case.sizes[1])).astype(case.dtype)
    if case.packed:
        size = case.N * sum((sq if form == "full" else 1) * skv for sq, skv in case.lengths)
        return rng.standard_normal(size).astype(case.dtype)
    rows = case.sizes[0] if form == "full" else 1
    return rng.standard_normal((B, case.N, rows, case.sizes[1])).astype(case.dtype)


def static_arguments(case: Case) -> dict[str, Any]:
    pse_type = {} if case.pse is None else {"pse_type": case.pse[0]}
    return pse_type | {
        "head_num": case.N,
        "input_layout": case.layout,
        "scale_value": case.scale,
        "keep_prob": 1.0 if case.keep_prob is None else case.keep_prob,
        "pre_tokens": case.pre,
        "next_tokens": case.following,
        "sparse_mode": case.mode,
    }


def integer_arguments(case: Case) -> dict[str, Any]:
    given = {}
    if case.packed:
        given |= {"actual_seq_qlen": case.ends[0], "actual_seq_kvlen": case.ends[1]}
    if case.prefix:
        given["prefix"] = case.prefix
    return given


def run(case: Case, jit: bool = True, integers=None, **options: Any) -> dict[str, Any]:
    """Everything the library gives for a case."""
    x = inputs(case)
    integers = integer_arguments(case) if integers is None else integers
    traced = {name: jnp.asarray(v) for name, v in integers.items()} if case.traced else {}

    def both(q, k, v, pse, dout, drop_mask, atten_mask, traced):
        def forward(q, k, v, pse):
            given = static_arguments(case) | integers | traced | options
            result = flash_attention_score(q, k, v, pse, drop_mask, atten_mask, **given)
            return result.attention_out, result

        if not case.gradients:
            return forward(q, k, v, pse)[1], ()
        _, vjp, result = jax.vjp(forward, q, k, v, pse, has_aux=True)
        return result, vjp(dout)

    both = jax.jit(both) if jit else both
    result, grads = both(x.q, x.k, x.v, x.pse, x.dout, x.drop_mask, x.atten_mask, traced)
    assert isinstance(result, FlashAttentionScoreOutput)
    named = {"out": result.attention_out, "max": result.softmax_max, "sum": result.softmax_sum}
    return named | dict(zip(("dq", "dk", "dv", "dpse"), grads, strict=bool(grads)))


def expected(case: Case, naive: bool) -> dict[str, Any]:
    """Everything the oracle, or a naive implementation in the case's dtype, gives."""
    x = inputs(case)
    pse = _oracle_pse(case, x.pse)
    keep = None if x.drop_mask is None else oracle.keep_bits(x.drop_mask, list(case.lengths), case.N)
    q, dout = (oracle.split(a, case.layout, case.N, case.ends[0]) for a in (x.q, x.dout))
    k, v = (oracle.split(a, case.layout, case.K, case.ends[1]) for a in (x.k, x.v))
    parts = []
    for b in range(len(case.lengths)):
        sequence = oracle.Sequence(
            q=q[b],
            k=k[b],
            v=v[b],
            visible=_visible(case, b, x.atten_mask),
            scale=case.scale,
            shift=0.0 if pse is None else pse.shift(b, case.scale),
            weight=1.0 if keep is None else keep[b] / case.keep_prob,
            dout=dout[b],
        )
        parts.append(sequence.compute(np.dtype(case.dtype) if naive else None))
    found = {name: oracle.join([p[name] for p in parts], case.layout) for name in ("out", "dq", "dk", "dv")}
    found |= {name: oracle.join_statistics([p[name] for p in parts], case.layout) for name in ("max", "sum")}
    if pse is not None:
        found["dpse"] = pse.gradient([p["dx"] for p in parts], case.scale)
        if not naive:
            found["cancellation"] = pse.cancellation([p["dx"] for p in parts], case.scale)
        found["dpse"] = found["dpse"].astype(x.pse.dtype) if naive else found["dpse"]
    return found


def _oracle_pse(case: Case, stored) -> oracle.Pse | None:
    if case.pse is None:
        return None
    kind, form = case.pse
    return oracle.Pse(
        stored, kind, form.removeprefix("1 "), form.startswith("1 "), list(case.lengths), case.packed, case.N
    )


def _visible(case: Case, b: int, mask) -> np.ndarray:
    """`N Sq Skv` of sequence b."""
    sq, skv = case.lengths[b]
    with_rows = [i for i, (rows, _) in enumerate(case.lengths) if rows]
    seen = oracle.visible(
        case.mode,
        sq,
        skv,
        pre=case.pre,
        following=case.following,
        prefix=case.prefix[b] if case.prefix else 0,
        apart=case.mode in (7, 8) and b == with_rows[-1 if case.mode == 7 else 0],
    )
    seen = np.broadcast_to(seen, (case.N, sq, skv))
    if mask is None or case.mask == "compressed":
        return seen
    if case.mask == "sum":
        row, column = (ends[b] for ends in case.ends)
        return seen & (mask[row - sq : row, column - skv : column] == 0)
    return seen & (np.broadcast_to(mask, MASKS["full"](case))[b, :, :sq, :skv] == 0)


def check(case: Case, found: dict[str, Any]) -> None:
    exact, naive = expected(case, naive=False), expected(case, naive=True)
    cancellation = exact.pop("cancellation", 1.0)
    for name, reference in exact.items():
        if name not in found:
            assert not case.gradients
            continue
        x = found[name]
        wanted = {"max": "float32", "sum": "float32", "dpse": None}.get(name, case.dtype)
        assert wanted is None or x.dtype == wanted, f"{name} has dtype {x.dtype}"
        dtype = "float32" if name in ("max", "sum") else case.dtype
        times = cancellation if name == "dpse" else 1.0
        oracle.assert_close(x, reference, naive[name], dtype, f"{case.name}: {name}", times)
    assert case.pse is not None or found.get("dpse") is None


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_statistics_and_gradients(case):
    check(case, run(case))


def _features(case: Case) -> dict[str, Any]:
    """What the portable backend may treat differently."""
    layout = {"TND": "packed"}.get(case.layout, "dense")
    pse = case.pse and (min(case.pse[0], 2), case.pse[1].removeprefix("1 "))
    drop = case.keep_prob not in (None, 1.0)
    return {
        "layout": layout,
        "mode": case.mode,
        "mask": case.mask,
        "pse": pse,
        "drop": drop,
        "traced": case.traced,
    }


_PORTABLE = covering([_features(case) for case in CASES])


def pairwise_rows():
    """By default every two features of the table meet, and all that have drop bits; the rest is slow."""
    seen: list[dict[str, Any]] = []
    for case in CASES:
        features = _features(case)
        chosen = features["drop"] or (features in _PORTABLE and features not in seen)
        seen.append(features)
        yield pytest.param(case, marks=[] if chosen else pytest.mark.slow, id=case.name)


@pytest.mark.one_in(4)
@pytest.mark.skipif(native.missing is not None, reason="the table above ran on the portable backend")
@pytest.mark.parametrize("case", list(pairwise_rows()))
def test_the_portable_backend(case):
    check(case, run(case, implementation="xla"))


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("form", "implementation"),
    [
        *((form, None) for form in ("list", "tuple", "numpy", "jax", "traced")),
        ("tuple", "xla"),
        ("traced", "xla"),
    ],
)
@pytest.mark.parametrize(
    "name", ["TND-mode3", "TND-mode7", "TND-mode8", "drop-TND", "pse1-TND-full-longer-keys"]
)
def test_lists_of_ends_filled_up_with_zeros(name, form, implementation):
    """Lists of a fixed length: zeros after the last end are empty sequences. What lies behind it is 0."""
    case = next(case for case in CASES if case.name == name)
    filled = {n: (*x, 0, 0) for n, x in integer_arguments(case).items()}
    if form == "traced":
        found = run(replace(case, traced=True), integers=filled, implementation=implementation)
    else:
        convert = {"list": list, "tuple": tuple, "numpy": np.array, "jax": jnp.array}[form]
        converted = {n: convert(x) for n, x in filled.items()}
        found = run(case, implementation=implementation, **converted)
    check(case, found)


@pytest.mark.parametrize("traced", [False, True])
def test_tokens_after_the_last_end(traced, backend):
    """They give 0, and have gradients of 0."""
    q, k, v = (_random(16, 2, 8, seed=i) for i in range(3))

    def total(q, k, v, ends):
        given = {"head_num": 2, "input_layout": "TND", "sparse_mode": 3, "implementation": backend}
        result = flash_attention_score(q, k, v, actual_seq_qlen=ends, actual_seq_kvlen=ends, **given)
        return jnp.sum(jnp.sin(result.attention_out)), result.attention_out

    gradient = jax.grad(total, argnums=(0, 1, 2), has_aux=True)
    if traced:
        gradients, out = jax.jit(gradient)(q, k, v, jnp.array([5, 12, 0]))
    else:
        gradients, out = gradient(q, k, v, (5, 12, 0))
    for x in (out, *gradients):
        np.testing.assert_array_equal(x[12:], 0)
        assert np.abs(x[:12]).any()


def test_the_ends_that_the_backend_of_cann_gets_do_not_decrease():
    q = _random(8, 2, 8)
    options = {"actual_seq_qlen": [4, 8, 0, 0], "actual_seq_kvlen": (4, 8, 0, 0), "implementation": "ascend"}
    call = request_of(flash_attention_score, q, q, q, head_num=2, input_layout="TND", **options).call
    given, mask = call.operands.hints, call.problem.mask
    assert given.actual_seq_qlen == given.actual_seq_kvlen == (4, 8, 8, 8)
    assert mask.query == mask.key == (4, 8, 8, 8)


# What the docstring asks of integers: values that break it, the error where they are known, and what they mean
# where they are not.
PRECONDITIONS = {
    "ends-decrease": ("actual_seq_qlen", [5, 3], "must be cumulative ends", [5, 5]),
    "ends-negative": ("actual_seq_kvlen", [-2, 8], "must be cumulative ends", [0, 8]),
    "rows-beyond-T": ("actual_seq_qlen", [3, 9], "must end at most at query's T=8", [3, 8]),
    "keys-beyond-T": ("actual_seq_kvlen", [3, 11], "must end at most at key's T=10", [3, 10]),
    "prefix-low": ("prefix", [-1, 5], r"prefix must be in max\(0, Skv - Sq\) .. Skv", [2, 5]),
    "prefix-high": ("prefix", [11, 5], r"prefix must be in max\(0, Skv - Sq\) .. Skv", [10, 5]),
}


@pytest.mark.parametrize("form", ["list", "tuple", "numpy", "jax", "traced"])
@pytest.mark.parametrize("name", PRECONDITIONS)
def test_preconditions(name, form):
    argument, wrong, message, meant = PRECONDITIONS[name]
    if argument == "prefix":
        q, k, given = (
            _random(2, 8, 2, 8),
            _random(2, 10, 2, 8, seed=1),
            {"input_layout": "BSND", "sparse_mode": 6},
        )
    else:
        q, k, given = _random(8, 2, 8), _random(10, 2, 8, seed=1), {"input_layout": "TND", "sparse_mode": 2}
        given |= {"actual_seq_qlen": (3, 8), "actual_seq_kvlen": (3, 10)}

    def call(integers):
        return flash_attention_score(q, k, k, head_num=2, **given | {argument: integers})

    if form == "traced":
        found, want = jax.jit(call)(jnp.array(wrong)), call(meant)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, want)
    else:
        convert = {"list": list, "tuple": tuple, "numpy": np.array, "jax": jnp.array}[form]
        with pytest.raises(ValueError, match=message):
            call(convert(wrong))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("pse_type", "layout", "scale"),
    [
        tuple(row.values())
        for row in pairwise({"pse_type": (0, 1), "layout": ("BSND", "TND"), "scale": (0.0, 0.5, -1.0)})
    ],
)
def test_a_pse_of_minus_infinity_masks(pse_type, layout, scale, backend):
    """Whatever the scale; a row of it is 0, with gradients of 0."""
    q, k = _random(1, 6, 2, 8), _random(1, 7, 2, 8, seed=1)
    pse = np.array(_random(1, 2, 6, 7, seed=2))
    pse[..., 3, :] = pse[..., 2] = -np.inf
    masked = np.isneginf(pse)
    given = {"head_num": 2, "input_layout": layout, "scale_value": scale, "pse_type": pse_type}
    given["implementation"] = backend

    def loss(pse, q, k):
        shape = pse
        if layout == "TND":
            q, k, shape = q[0], k[0], pse.reshape(-1)
            out = flash_attention_score(
                q, k, k, shape, actual_seq_qlen=(6,), actual_seq_kvlen=(7,), **given
            ).attention_out[None]
        else:
            out = flash_attention_score(q, k, k, shape, **given).attention_out
        return jnp.sum(jnp.sin(out)), out

    (_, out), (dpse, dq, dk) = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
        jnp.asarray(pse), q, k
    )
    finite = np.where(masked, 0, pse) * (scale if pse_type == 1 else 1)
    want = flash_attention(q, k, k, scale=scale, bias=jnp.asarray(finite), mask=jnp.asarray(~masked))
    np.testing.assert_allclose(out, want, atol=1e-6)
    np.testing.assert_array_equal(out[:, 3], 0)
    np.testing.assert_array_equal(np.asarray(dpse)[masked], 0)
    np.testing.assert_array_equal(dq[:, 3], 0)
    np.testing.assert_array_equal(dk[:, 2], 0)
    assert all(np.isfinite(x).all() for x in (out, dpse, dq, dk))


FORMS = {
    "full": lambda T, N: {"pse": _abstract(N * 2 * (T // 2) ** 2)},
    "row": lambda T, N: {"pse": _abstract(N * T)},
    "slopes": lambda T, N: {"pse": _abstract(2, N), "pse_type": 3},
    "table": lambda T, N: {"pse": _abstract(2, N, 1024, T // 2), "sparse_mode": 3},
}


@pytest.mark.parametrize("form", FORMS)
def test_memory_of_packed_sequences_with_pse(form, real_tiles):
    """Nothing is spread out to T x T: forward and backward need a multiple of pse and of the rows."""
    T, N = 4096, 4
    q = _abstract(T, N, 32)
    given = FORMS[form](T, N)
    pse = given.pop("pse")
    ends = (T // 2, T)

    def loss(q, pse):
        call = {
            "head_num": N,
            "input_layout": "TND",
            "actual_seq_qlen": ends,
            "actual_seq_kvlen": ends,
        } | given
        return jnp.sum(flash_attention_score(q, q, q, pse, implementation="xla", **call).attention_out ** 2)

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(q, pse)
    spread = 4 * N * T * T
    stored = 4 * int(np.prod(pse.shape))
    assert temporary_bytes(lowered) < 3 * stored + spread // 4


def test_memory_of_a_table(real_tiles):
    """A table of 1024 rows serves all rows from where it lies."""
    S, N = 4096, 2
    q, table = _abstract(1, S, N, 32), _abstract(1, N, 1024, S)

    def loss(q, table):
        call = {"head_num": N, "input_layout": "BSND", "sparse_mode": 2, "implementation": "xla"}
        return jnp.sum(flash_attention_score(q, q, q, table, **call).attention_out ** 2)

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(q, table)
    assert temporary_bytes(lowered) < 3 * 4 * N * 1024 * S + 4 * N * S * S // 4


@pytest.mark.parametrize("name", ["BSND-mode5", "TND-mode3", "pse1-TND-row", "drop-TND", "mask-TND-longest"])
def test_without_jit(name):
    case = next(case for case in CASES if case.name == name)
    case = replace(case, gradients=False)
    check(case, run(case, jit=False))


@pytest.mark.parametrize("name", ["BSND-mode3", "TND-mode8", "pse1-1 full", "drop"])
def test_lengths_around_the_real_tiles(name, real_tiles):
    case = next(case for case in CASES if case.name == name)
    lengths = ((130, 150), (0, 0), (390, 370 + 25)) if case.packed else ((520, 530),)
    long = replace(case, name=f"{name}-long", lengths=lengths, N=2, K=1, dtype="float32", gradients=True)
    check(long, run(long))


# --- the pieces one by one


def _random(*shape: int, dtype="float32", seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def test_a_structural_mode_needs_no_mask_and_reads_no_compressed_mask():
    q = _random(2, 9, 16)
    plain = flash_attention_score(q, q, q, head_num=2, sparse_mode=2)
    causal = jnp.asarray(oracle.compressed(2))
    given = flash_attention_score(q, q, q, atten_mask=causal[None, None], head_num=2, sparse_mode=2)
    # A traced mask cannot be checked, and is not needed.
    traced = jax.jit(lambda mask: flash_attention_score(q, q, q, atten_mask=mask, head_num=2, sparse_mode=2))
    for other in (given, traced(causal), traced(1 - causal)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, other)


def test_mode_four_with_unbounded_tokens_sees_everything():
    q, k = _random(1, 5, 8), _random(1, 9, 8, seed=1)
    every = flash_attention_score(q, k, k, head_num=2)
    jax.tree.map(
        np.testing.assert_array_equal, every, flash_attention_score(q, k, k, head_num=2, sparse_mode=4)
    )


def test_rows_past_the_last_sequence_see_nothing():
    q = _random(9, 2, 8)
    ends = {"actual_seq_qlen": [3, 5], "actual_seq_kvlen": [3, 5]}
    m, l, out = flash_attention_score(q, q, q, head_num=2, input_layout="TND", **ends)
    np.testing.assert_array_equal(out[5:], 0)
    np.testing.assert_array_equal(m[5:], -FLT_MAX)
    np.testing.assert_array_equal(l[5:], FLT_MAX)
    short = flash_attention_score(q[:5], q[:5], q[:5], head_num=2, input_layout="TND", **ends)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[:5], b, rtol=1e-5, atol=1e-6), (m, l, out), tuple(short)
    )


def test_a_mask_over_all_sequences_may_stop_at_the_last_end():
    q = _random(9, 2, 8)
    given = {"head_num": 2, "input_layout": "TND", "actual_seq_qlen": [3, 5], "actual_seq_kvlen": [2, 6]}
    mask = np.random.default_rng(0).random((9, 9)) < 0.5
    whole = flash_attention_score(q, q, q, atten_mask=mask, **given)
    part = flash_attention_score(q, q, q, atten_mask=mask[:5, :6], **given)
    jax.tree.map(np.testing.assert_array_equal, whole, part)


def test_a_packed_table_is_the_bias_of_its_distances():
    lengths, N = (1030, 40), 2
    ends = tuple(int(x) for x in np.cumsum(lengths))
    q = _random(ends[-1], N, 8)
    slopes = np.asarray([0.5, 0.01], np.float32)
    distance = (1030 - 1024) + np.arange(1024)[:, None] - np.arange(1030)
    table = -slopes[:, None, None] * np.abs(distance).astype(np.float32)
    given = {
        "head_num": N,
        "input_layout": "TND",
        "actual_seq_qlen": ends,
        "actual_seq_kvlen": ends,
        "sparse_mode": 3,
    }
    by_table = flash_attention_score(q, q, q, table[None], **given)
    by_slopes = flash_attention_score(q, q, q, slopes, pse_type=2, **given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), by_table, by_slopes)


def test_the_drop_mask_of_the_librarys_own_dropout():
    B, Sq, Skv, N, D = 2, 19, 21, 4, 8
    q, k = _random(B, Sq, N, D), _random(B, Skv, N, D, seed=1)
    key = jax.random.key(3)
    bits = dropout_mask(key, 0.25, (B, N, Sq, Skv))
    theirs = flash_attention_score(q, k, k, drop_mask=bits, head_num=N, input_layout="BSND", keep_prob=0.75)
    ours = flash_attention(q, k, k, scale=1.0, dropout_rate=0.25, dropout_key=key)
    np.testing.assert_allclose(theirs.attention_out, ours, rtol=1e-5, atol=1e-6)


def test_vmap():
    q, k = _random(3, 2, 9, 16), _random(3, 2, 11, 16, seed=1)

    def one(q, k):
        return flash_attention_score(q, k, k, head_num=2, sparse_mode=3)

    batched = jax.vmap(one)(q, k)
    single = [one(a, b) for a, b in zip(q, k, strict=True)]
    jax.tree.map(
        lambda x, *parts: np.testing.assert_allclose(x, np.stack(parts), rtol=1e-5, atol=1e-6),
        batched,
        *single,
    )


def test_the_request_keeps_static_structure_for_backends():
    q = jax.ShapeDtypeStruct((2, 8, 32), jnp.float32)

    def mask_of(**more):
        found = {}

        def trace(q):
            found["call"] = request_of(flash_attention_score, q, q, q, head_num=2, **more).call
            return 0

        jax.eval_shape(trace, q)
        return found["call"].problem.mask

    assert mask_of() is None
    assert mask_of(sparse_mode=3) == masks.Causal("bottom-right")
    assert mask_of(pre_tokens=3, next_tokens=HUGE) == masks.Band(3, None)
    assert mask_of(sparse_mode=5, prefix=[1, 2]) == masks.Prefix((1, 2), "bottom-right")


# --- drop-mask positions: 64-bit arithmetic in 32 bits


def _positions(offset) -> list[int]:
    return [8 * int(byte) + int(bit) for byte, bit in np.asarray(offset).reshape(-1, 2)]


@pytest.mark.parametrize("columns", [1, 7, 8, 4097, 2**20 - 1, 2**20])
def test_bit_positions_beyond_32_bits(columns):
    last = min(2**34 // columns, 2**31) - 1  # of a stream of 2**31 bytes
    rows = [0, 1, 7, 8, last // 3 + 1, last // 2, last]
    first_key = 12345
    found = dropout.bit_offset(jnp.asarray(rows, jnp.int32), columns, (0, 3), first_key)
    assert found.dtype == jnp.int32
    assert _positions(found) == [3 + row * columns - first_key for row in rows]
    assert ((np.asarray(found)[..., 1] >= 0) & (np.asarray(found)[..., 1] < 8)).all()


def test_blocks_before_packed_sequences_beyond_32_bits():
    sq, skv, N = [100_003, 0, 70_001, 5, 33], [50_021, 7, 20_011, 0, 11], 2
    sizes = [N * a * b for a, b in zip(sq, skv, strict=True)]
    assert sum(sizes) > 2**32
    found = drop_mask.blocks_before(jnp.asarray(sq, jnp.int32), jnp.asarray(skv, jnp.int32), N)
    assert _positions(np.stack(found, axis=-1)) == [sum(sizes[:b]) for b in range(len(sizes))]


# --- errors


def _request(layout="BSND", B=2, Sq=8, Skv=10, N=4, K=2, D=16, Dv=16, dtype="float32", **more):
    """The request of a call whose arrays are never made."""
    shapes = {
        "BSND": lambda S, N, D: (B, S, N, D),
        "BNSD": lambda S, N, D: (B, N, S, D),
        "BSH": lambda S, N, D: (B, S, N * D),
        "SBH": lambda S, N, D: (S, B, N * D),
        "TND": lambda S, N, D: (S, N, D),
    }
    shape = shapes.get(layout, shapes["BSND"])
    arrays = {"query": (Sq, N, D), "key": (Skv, K, D), "value": (Skv, K, Dv)}
    given = {name: jax.ShapeDtypeStruct(shape(*sizes), dtype) for name, sizes in arrays.items()}
    given |= {name: more.pop(name) for name in (*arrays, "pse", "drop_mask", "atten_mask") if name in more}
    abstract = {name: x for name, x in given.items() if isinstance(x, jax.ShapeDtypeStruct)}
    concrete = {name: x for name, x in given.items() if name not in abstract}
    static = {"head_num": N, "input_layout": layout} | more

    def call(abstract):
        request_of(flash_attention_score, **abstract, **concrete, **static)
        return 0

    jax.eval_shape(call, abstract)


def _abstract(*shape: int, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


PACK = {"layout": "TND", "Sq": 8, "Skv": 10, "actual_seq_qlen": [3, 8], "actual_seq_kvlen": [4, 10]}
SAME = PACK | {"Skv": 8, "actual_seq_kvlen": [3, 8]}
OTHER_PATTERN = np.zeros((2048, 2048), bool)
ERRORS = [
    # names
    ({"layout": "NSBD"}, ValueError, "input_layout must be one of BSH, SBH, BSND, BNSD, TND; got 'NSBD'"),
    ({"sparse_mode": 9}, ValueError, "sparse_mode must be one of 0, 1, 2, 3, 4, 5, 6 .*; got 9"),
    ({"sparse_mode": 7}, ValueError, r"sparse_mode must be .* \(7 and 8 are for layout TND\); got 7"),
    (
        PACK | {"sparse_mode": 5},
        ValueError,
        "sparse_mode must be one of 0, 1, 2, 3, 4, 6, 7, 8 with layout TND; got 5",
    ),
    ({"pse_type": 4}, ValueError, "pse_type must be 0, 1, 2 or 3; got 4"),
    ({"inner_precise": 3}, ValueError, "inner_precise must be 0, 1 or 2; got 3"),
    ({"implementation": "cuda"}, ValueError, "implementation must be None or one of .*; got 'cuda'"),
    ({"scale_value": None}, TypeError, "scale_value must be a real number or a scalar array; got None"),
    ({"scale_value": np.inf}, ValueError, "scale_value must be finite; got inf"),
    ({"scale_value": np.float32("nan")}, ValueError, "scale_value must be finite; got nan"),
    ({"scale_value": "0.5"}, TypeError, "scale_value must be a real number or a scalar array; got '0.5'"),
    ({"scale_value": True}, TypeError, "scale_value must be a real number or a scalar array; got True"),
    ({"scale_value": 1j}, TypeError, "scale_value must be a real number or a scalar array; got 1j"),
    ({"scale_value": np.ones(2)}, ValueError, r"scale_value must be a scalar; got shape \(2,\)"),
    # shapes and dtypes
    ({"head_num": 2.5}, TypeError, "head_num must be an int; got 2.5"),
    ({"head_num": 0}, ValueError, "head_num must be in 1..256; got 0"),
    ({"N": 512, "K": 256}, ValueError, "head_num must be in 1..256; got 512"),
    (
        {"head_num": 2},
        ValueError,
        r"head_num must be query's number of heads 4 \(shape \(2, 8, 4, 16\), BSND\); got 2",
    ),
    (
        {"layout": "BSH", "head_num": 3},
        ValueError,
        "query must have a last axis H .* multiple of head_num=3; got H=64",
    ),
    (
        {"layout": "BSH", "key": _abstract(2, 10, 24)},
        ValueError,
        "key must have .* multiple of query's head_dim D=16; got H=24",
    ),
    (
        {"layout": "SBH", "value": _abstract(10, 2, 31)},
        ValueError,
        "value must have .* number of heads K=2; got H=31",
    ),
    (
        {"query": np.zeros((2, 8, 4, 16))},
        TypeError,
        "query must have dtype float16, bfloat16 or float32; got float64",
    ),
    ({"dtype": "int8"}, TypeError, "query must have dtype float16, bfloat16 or float32; got int8"),
    (
        {"key": _abstract(2, 10, 2, 16, dtype="float16")},
        TypeError,
        "key must have query's dtype float32; got float16",
    ),
    (
        {"query": _abstract(2, 8, 64)},
        ValueError,
        r"query must have 4 dimensions \(BSND\); got shape \(2, 8, 64\)",
    ),
    ({"layout": "BSH", "query": _abstract(2, 8, 4, 16)}, ValueError, r"query must have 3 dimensions \(BSH\)"),
    ({"key": _abstract(3, 10, 2, 16)}, ValueError, r"key must have batch dims B=\(2,\); got \(3,\)"),
    ({"key": _abstract(2, 10, 2, 8)}, ValueError, "key must have query's head_dim D=16; got 8"),
    (
        {"value": _abstract(2, 9, 2, 16)},
        ValueError,
        r"value must have key's \(\*B, Skv, K\)=\(2, 10, 2\); got \(2, 9, 2\)",
    ),
    ({"K": 3}, ValueError, "query must have a number of heads N that is a multiple of key's K; got N=4, K=3"),
    ({"Dv": 32}, ValueError, r"value must have a head_dim in 1..D=16; got 32"),
    # limits
    ({"D": 769, "Dv": 16}, ValueError, "query must have D of at most 768; got 769"),
    ({"Sq": 2**20 + 1}, ValueError, "query must have Sq of at most 1048576; got 1048577"),
    ({"Skv": 2**20 + 1}, ValueError, "key must have Skv of at most 1048576; got 1048577"),
    (
        PACK | {"Sq": 2**20 + 1},
        ValueError,
        "query must have T of at most 1048576; got 1048577",
    ),
    (PACK | {"Skv": 2**20 + 1}, ValueError, "key must have T of at most 1048576; got 1048577"),
    ({"B": 2**21 + 1}, ValueError, "query must have B of at most 2097152; got 2097153"),
    (
        {"B": 2049, "sparse_mode": 6, "prefix": [2] * 2049},
        ValueError,
        "query must have B with prefix of at most 2048; got 2049",
    ),
    # tokens
    ({"pre_tokens": True}, TypeError, "pre_tokens must be an int; got True"),
    (
        {"pre_tokens": -1, "next_tokens": -1},
        ValueError,
        "do not fit sparse_mode=0: the band between them must meet",
    ),
    (
        {"pre_tokens": -3, "next_tokens": 2},
        ValueError,
        "do not fit sparse_mode=0: .* got pre_tokens=-3, next_tokens=2",
    ),
    (
        {"pre_tokens": -10},
        ValueError,
        "do not fit sparse_mode=0: the band between them must meet the 8 x 10 logits",
    ),
    ({"next_tokens": -8}, ValueError, "do not fit sparse_mode=0"),
    ({"sparse_mode": 4, "pre_tokens": -8}, ValueError, "do not fit sparse_mode=4"),
    ({"sparse_mode": 4, "next_tokens": -10}, ValueError, "do not fit sparse_mode=4"),
    (PACK | {"next_tokens": -1}, ValueError, "sparse_mode=0: next_tokens must be at least 0 with layout TND"),
    (
        PACK | {"sparse_mode": 4, "pre_tokens": -1},
        ValueError,
        "sparse_mode=4: pre_tokens must be at least 0 with layout TND",
    ),
    (
        PACK | {"pre_tokens": -4, "next_tokens": 3},
        ValueError,
        r"sparse_mode=0: pre_tokens \+ next_tokens must be at least 0",
    ),
    (PACK | {"sparse_mode": 7}, ValueError, "sparse_mode=7: next_tokens must be at most 0"),
    (
        PACK | {"sparse_mode": 7, "next_tokens": 0, "pre_tokens": 5},
        ValueError,
        r"pre_tokens must be at least .*\[6\], in sparse_mode=7; got 5",
    ),
    (
        PACK | {"sparse_mode": 8, "pre_tokens": 3},
        ValueError,
        r"pre_tokens must be at least .*\[4\], in sparse_mode=8; got 3",
    ),
    (
        PACK | {"sparse_mode": 3, "actual_seq_kvlen": [2, 10]},
        ValueError,
        r"sparse_mode=3 leaves rows of sequence 0 \(Sq=3, Skv=2",
    ),
    (PACK | {"sparse_mode": 4, "next_tokens": -2}, ValueError, "sparse_mode=4 leaves rows of sequence 0"),
    (
        PACK | {"sparse_mode": 0, "pre_tokens": 0, "actual_seq_kvlen": [2, 10]},
        ValueError,
        "sparse_mode=0 leaves rows of sequence 0",
    ),
    (PACK | {"sparse_mode": 7, "next_tokens": -2}, ValueError, "sparse_mode=7 leaves rows of sequence 1"),
    # prefix
    (
        {"sparse_mode": 5},
        ValueError,
        "prefix must hold one length per batch entry in sparse_mode=5; got None",
    ),
    ({"sparse_mode": 6, "prefix": [3]}, ValueError, "prefix must have B=2 entries; got 1"),
    (
        {"sparse_mode": 6, "prefix": [3, 11]},
        ValueError,
        r"prefix must be in max\(0, Skv - Sq\) .. Skv = 2 .. 10; got \[3, 11\]",
    ),
    (
        {"sparse_mode": 6, "prefix": np.asarray([1, 9])},
        ValueError,
        r"prefix must be in .* 2 .. 10; got \[1, 9\]",
    ),
    ({"sparse_mode": 5, "prefix": [2.0, 3.0]}, TypeError, "prefix must hold integers; got dtype float32"),
    (
        {"sparse_mode": 5, "prefix": np.zeros((2, 1), int)},
        ValueError,
        r"prefix must have one dimension; got shape \(2, 1\)",
    ),
    ({"prefix": [3, 4]}, ValueError, r"prefix is for sparse_mode 5 and 6; got \[3, 4\] with 0"),
    (
        PACK | {"sparse_mode": 6, "prefix": [0, 3]},
        ValueError,
        r"prefix must be in .* \[1, 1\] .. \[4, 6\]; got \[0, 3\]",
    ),
    # atten_mask
    (
        {"atten_mask": _abstract(8, 10)},
        TypeError,
        r"atten_mask must have dtype bool or uint8 \(1 = masked\); got float32",
    ),
    (
        {"atten_mask": np.zeros((2, 1, 1, 10), bool)},
        ValueError,
        r"atten_mask must have one of the shapes \(2, 4, 8, 10\), .*; got \(2, 1, 1, 10\)",
    ),
    (
        {"atten_mask": np.zeros((8, 10), bool), "sparse_mode": 5, "prefix": np.array([3, 3])},
        ValueError,
        "atten_mask must have one of the shapes .* in sparse_mode=5",
    ),
    (
        {"atten_mask": np.zeros((8, 10), bool), "sparse_mode": 3},
        ValueError,
        r"atten_mask must have shape \(2048, 2048\) in sparse_mode=3; got \(8, 10\)",
    ),
    (
        {"atten_mask": np.zeros((2048, 2048), bool), "sparse_mode": 6, "prefix": [3, 3]},
        ValueError,
        r"atten_mask must have shape \(3072, 2048\) in sparse_mode=6",
    ),
    (
        {"atten_mask": OTHER_PATTERN, "sparse_mode": 2},
        ValueError,
        r"atten_mask must be np.triu\(np.ones\(\(2048, 2048\)\), 1\) in sparse_mode=2; got another pattern",
    ),
    (
        PACK | {"atten_mask": np.zeros((8, 8), bool)},
        ValueError,
        r"atten_mask must have shape .*=\(5, 6\) or .*=\(8, 10\), or \(B, 1 or N, max Sq_b, max Skv_b\) with B=2, N=4, "
        r"in layout TND; got \(8, 8\)",
    ),
    (
        PACK | {"atten_mask": np.zeros((2, 5, 6), bool)},
        ValueError,
        r"atten_mask must have shape .* in layout TND; got \(2, 5, 6\)",
    ),
    # pse
    (
        {"pse": _abstract(2, 4, 8, 10, dtype="float16")},
        TypeError,
        "pse must have query's dtype float32 when pse_type=1; got float16",
    ),
    (
        {"pse": _abstract(4, dtype="float16"), "pse_type": 2, "Skv": 8, "dtype": "float16"},
        TypeError,
        "pse must have float32 when pse_type=2; got float16",
    ),
    (
        {"pse": _abstract(2, 1, 8, 10)},
        ValueError,
        r"pse must have shape \(B, N, Sq, Skv\)=\(2, 4, 8, 10\), .*; got shape \(2, 1, 8, 10\)",
    ),
    ({"pse": _abstract(8, 10)}, ValueError, r"pse must have shape .*; got shape \(8, 10\)"),
    ({"pse": _abstract(2, 4, 1024, 10)}, ValueError, r"pse must have shape .*; got shape \(2, 4, 1024, 10\)"),
    (
        {"pse": _abstract(2, 4, 1024, 1026), "Sq": 1025, "Skv": 1026, "sparse_mode": 2},
        ValueError,
        "an ALiBi table needs query and key of equal length; got Sq=1025, Skv=1026",
    ),
    (
        {"pse": _abstract(2, 4, 1024, 1025), "Sq": 1025, "Skv": 1025},
        ValueError,
        "is an ALiBi table, .* needs sparse_mode 2 or 3, or 0 or 4 with next_tokens <= 0",
    ),
    ({"pse_type": 2}, ValueError, "pse must hold the ALiBi slopes when pse_type=2; got None"),
    (
        {"pse_type": 3, "pse": _abstract(4)},
        ValueError,
        "pse with pse_type=3 needs query and key of equal length; got Sq=8, Skv=10",
    ),
    (
        {"pse_type": 2, "pse": _abstract(2)},
        ValueError,
        r"pse must hold slopes of shape \(N,\)=\(4,\) or \(B, N\)=\(2, 4\) when pse_type=2; got shape \(2,\)",
    ),
    (
        PACK | {"pse_type": 2, "pse": _abstract(4)},
        ValueError,
        r"pse_type=2 needs query and key of equal length; got Sq=\[3, 5\], Skv=\[4, 6\]",
    ),
    (
        PACK | {"pse": _abstract(7)},
        ValueError,
        r"pse must have shape \(N\*sum\(Sq_b\*Skv_b\)=168,\), \(N\*sum\(Skv_b\)=40,\) .*; got shape \(7,\)",
    ),
    (SAME | {"pse": _abstract(1, 4, 1024, 8), "sparse_mode": 3}, ValueError, "pse must have shape"),
    (SAME | {"pse": _abstract(1, 4, 1024, 5)}, ValueError, "is an ALiBi table"),
    (
        PACK | {"pse": _abstract(1, 4, 1024, 6)},
        ValueError,
        "an ALiBi table needs query and key of equal length",
    ),
    (
        PACK | {"pse": _abstract(168), "sparse_mode": 8},
        ValueError,
        "pse must be None in sparse_mode=8, as in CANN; got an array",
    ),
    (
        SAME | {"pse": _abstract(4), "pse_type": 2, "sparse_mode": 7, "next_tokens": 0},
        ValueError,
        "pse must be None in sparse_mode=7",
    ),
    (
        {"layout": "TND", "Sq": 2**20, "Skv": 2**20, "actual_seq_qlen": [2**15], "actual_seq_kvlen": [2**15]}
        | {"pse": _abstract(2**32)},
        ValueError,
        r"pse must hold fewer than 2\*\*31 elements in layout TND",
    ),
    # dropout
    ({"keep_prob": 0.0}, ValueError, r"keep_prob must be a Python number in \(0, 1\]; got 0.0"),
    ({"keep_prob": 1.5}, ValueError, r"keep_prob must be a Python number in \(0, 1\]; got 1.5"),
    (
        {"keep_prob": 0.5},
        ValueError,
        r"drop_mask must be given when keep_prob is below 1 \(it is 0.5\); got None",
    ),
    (
        {"drop_mask": _abstract(79, dtype="uint8"), "keep_prob": 0.5},
        ValueError,
        "drop_mask must have at least 80 bytes, one bit per weight; got 79",
    ),
    (PACK | {"drop_mask": _abstract(20, dtype="uint8")}, ValueError, "drop_mask must have at least 21 bytes"),
    (
        {"drop_mask": _abstract(80, dtype="int8"), "keep_prob": 0.5},
        TypeError,
        "drop_mask must have dtype uint8; got int8",
    ),
    (
        {"drop_mask": _abstract(2**31, dtype="uint8")},
        ValueError,
        r"drop_mask and B\*N\*Sq must stay below 2\*\*31",
    ),
    # packed sequences
    (
        {"layout": "TND"},
        ValueError,
        "actual_seq_qlen must hold the cumulative lengths of the sequences in layout TND; got None",
    ),
    (
        PACK | {"actual_seq_kvlen": []},
        ValueError,
        r"actual_seq_kvlen must hold the cumulative lengths .*; got \[\]",
    ),
    (
        {"actual_seq_qlen": [8]},
        ValueError,
        r"actual_seq_qlen is for layout TND; got \[8\] with input_layout='BSND'",
    ),
    (
        PACK | {"actual_seq_kvlen": [10]},
        ValueError,
        "actual_seq_qlen and actual_seq_kvlen must name the same sequences, at least one; got 2 and 1",
    ),
    (
        PACK | {"actual_seq_qlen": [5, 4]},
        ValueError,
        r"actual_seq_qlen must be cumulative ends that start at 0 or more and do not decrease, but for zeros "
        r"after the last one; got \(5, 4\)",
    ),
    (
        PACK | {"actual_seq_qlen": [0, 8, 4], "actual_seq_kvlen": [0, 4, 10]},
        ValueError,
        "actual_seq_qlen must be",
    ),
    (
        PACK | {"actual_seq_qlen": [4, 0, 8], "actual_seq_kvlen": [1, 4, 10]},
        ValueError,
        "actual_seq_qlen must be",
    ),
    (PACK | {"actual_seq_kvlen": jnp.array([9, 4])}, ValueError, "actual_seq_kvlen must be cumulative ends"),
    (
        PACK | {"actual_seq_qlen": jnp.array([3, 9])},
        ValueError,
        "actual_seq_qlen must end at most at query's T=8",
    ),
    (PACK | {"actual_seq_qlen": [-1, 3]}, ValueError, "actual_seq_qlen must be cumulative ends"),
    (
        PACK | {"actual_seq_kvlen": np.asarray([4, 11])},
        ValueError,
        "actual_seq_kvlen must end at most at key's T=10",
    ),
    (
        PACK | {"actual_seq_qlen": [3.0, 8.0]},
        TypeError,
        "actual_seq_qlen must hold integers; got dtype float32",
    ),
]


@pytest.mark.parametrize(("given", "kind", "text"), ERRORS, ids=range(len(ERRORS)))
def test_errors(given, kind, text, no_type_checker):
    with pytest.raises(kind, match=text):
        _request(**given)


RIGHT = [
    {},
    {"inner_precise": 1},
    {"inner_precise": 2},
    PACK,
    SAME | {"pse_type": 3, "pse": _abstract(2, 4)},
    {"B": 1, "atten_mask": np.zeros((8, 10), bool), "sparse_mode": 5, "prefix": [3]},
    {"B": 1, "atten_mask": np.zeros((1, 1, 8, 10), bool), "sparse_mode": 5, "prefix": [3]},
    PACK | {"atten_mask": np.zeros((2, 1, 5, 6), bool)},
    PACK | {"actual_seq_qlen": [3, 8, 0, 0], "actual_seq_kvlen": [4, 10, 0, 0]},
    {"scale_value": np.float32(0.5)},
    {"scale_value": jnp.ones((), jnp.bfloat16)},
    {"scale_value": 2},
    {"atten_mask": oracle.compressed(2)[None, None], "sparse_mode": 2},
    {"atten_mask": oracle.compressed(6).astype(bool), "sparse_mode": 6, "prefix": np.asarray([2, 10])},
    {"prefix": [], "actual_seq_qlen": (), "actual_seq_kvlen": []},
    {"B": 0},
    {"drop_mask": _abstract(10, 8, dtype="uint8"), "keep_prob": 0.5},
]


@pytest.mark.parametrize("given", RIGHT, ids=range(len(RIGHT)))
def test_the_call_that_the_errors_vary_is_right(given):
    _request(**given)


def test_the_public_function_raises_when_it_is_traced():
    q = jnp.zeros((1, 4, 8))
    with pytest.raises(ValueError, match="sparse_mode must be one of"):
        jax.jit(lambda q: flash_attention_score(q, q, q, head_num=2, sparse_mode=12)).trace(q)
