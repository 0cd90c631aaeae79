"""What the common table does not see of the native CPU backend: its instruction sets, refusals and copies.

(Its threads, memory and processes: test_native_processes.py. Its kernels by themselves: test_native_cpp.py.)
"""

import math
import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa.backends import native
from jax_fa.masks import Causal
from jax_fa.testing.cases import BY_NAME, Case, check

if native.missing is not None:
    pytest.skip(f"needs the native extension: {native.missing}", allow_module_level=True)
if jax.default_backend() != "cpu":
    pytest.skip("needs CPU devices by default", allow_module_level=True)

ISA = "JAX_FA_CPU_ISA"


# --- instruction sets

_SPREAD = (
    "lengths-61-67",
    "mqa",
    "gqa",
    "wide-values",
    "bias-causal",
    "slopes",
    "soft-cap",
    "dropout",
    "mask-dense",
    "mask-nothing",
    "bfloat16-plain",
    "bfloat16-everything",
    "float16-causal",
    "everything-BNSD",
)
# Several blocks of rows and of keys.
BLOCKS = Case(name="native-blocks", B=(1,), Sq=403, Skv=530, N=2, K=1, D=64, Dv=64, mask="causal_bottom")
# Few rows: the keys are split among tasks.
DECODE = Case(name="native-decode", Sq=1, Skv=2100, slopes="N")
# Some rows and an odd number of keys, read in place two at a time.
SOME = Case(name="native-some-rows", Sq=20, Skv=2051)
SPREAD = (*(BY_NAME[name] for name in _SPREAD), BLOCKS, DECODE, SOME)


@cache
def _program(case: Case):
    """One compiled program for all sets: the set is chosen at every call."""
    dout, dlse = case.cotangents()
    run = jax.jit(partial(case.gradient, implementation="cpu"))
    return partial(run, case.stored_operands(), case.stored(dout), dlse)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("isa", native.extension.instruction_sets())
@pytest.mark.parametrize("case", SPREAD, ids=str)
def test_every_instruction_set(case, isa, monkeypatch):
    if not native.extension.instruction_sets()[isa]:
        pytest.skip(f"this machine does not have {isa}")
    monkeypatch.setenv(ISA, isa)
    (out, lse), gradients = jax.block_until_ready(_program(case)())
    check(case, out, lse, gradients)


def test_the_set_that_is_asked_for_runs(monkeypatch):
    """Vectors of other lengths sum in another order, which shows: the variable is not just ignored."""
    there = [isa for isa, has in native.extension.instruction_sets().items() if has]
    assert "portable" in there
    monkeypatch.delenv(ISA, raising=False)
    best = native.extension.chosen_instruction_set()
    run = _program(replace(BLOCKS, name="native-blocks-bf16", dtype="bfloat16"))
    bits = {}
    for isa in ("", *there):
        monkeypatch.setenv(ISA, isa)
        (out, lse), gradients = run()
        parts = [np.asarray(x).tobytes() for x in (out, lse, *gradients.values())]
        bits[isa] = b"".join(parts)
        assert native.extension.chosen_instruction_set() == (isa or best)
    assert bits[""] == bits[best]
    assert len({bits[isa] for isa in there}) == len(there)


def test_a_set_can_vanish_between_calls(monkeypatch):
    """What was compiled is checked again when it runs."""
    run = _program(BY_NAME["mqa"])
    jax.block_until_ready(run())
    monkeypatch.setenv(ISA, "sse9")
    # JAX raises the one where it ran the program at once, the other where it waited for it.
    errors = (ValueError, jax.errors.JaxRuntimeError)
    with pytest.raises(errors, match=f"{ISA} names no instruction set that this machine has"):
        jax.block_until_ready(run())
    monkeypatch.delenv(ISA)
    jax.block_until_ready(run())


# --- refusals


def _float(*shape: int, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A call that this backend refuses, and what it says."""

    name: str
    reason: str
    D: int = 8
    Dv: int = 8
    dtype: str = "float32"
    isa: str = ""  # what the variable asks for
    lacks: str | None = None  # a set to take from the machine
    missing: str | None = None

    def __str__(self) -> str:
        return self.name

    def context(self):
        return jax.enable_x64(True) if self.dtype == "float64" else nullcontext()

    def arrays(self) -> list[np.ndarray]:
        normal = np.random.default_rng(self.D).standard_normal
        return [normal((2, 5, 2, d)).astype(self.dtype) for d in (self.D, self.D, self.Dv)]


_SETS = ", ".join(isa for isa, there in native.extension.instruction_sets().items() if there)
_WITHOUT_FIRST = ", ".join(_SETS.split(", ")[1:])
REFUSALS = (
    Refusal(
        name="float64",
        dtype="float64",
        reason="serves float32, bfloat16 and float16, not float64: cast query, key and value (in Flax: the layer's "
        'dtype="float32"), or leave implementation at None, which takes xla',
    ),
    Refusal(name="head-dim", D=769, reason="head_dim is at most 768, not 769"),
    Refusal(name="head-dim-of-values", Dv=769, reason="head_dim is at most 768, not 769"),
    Refusal(
        name="no-extension",
        missing="no such file",
        reason=native.absence("no such file"),
    ),
)


@pytest.fixture
def circumstances(request, monkeypatch):
    """The machine as a Refusal has it."""
    refusal: Refusal = request.param
    sets = native.extension.instruction_sets()
    if refusal.lacks is not None:
        sets[refusal.lacks] = False
    monkeypatch.setattr(native.extension, "instruction_sets", lambda: sets)
    monkeypatch.setattr(native, "missing", refusal.missing)
    monkeypatch.setenv(ISA, refusal.isa)
    with refusal.context():
        yield refusal


def _calls_kernel(text: str) -> bool:
    return "jax_fa_cpu_" in text


@pytest.mark.parametrize("circumstances", REFUSALS, ids=str, indirect=True)
def test_refusals(circumstances):
    """By name a refusal is an error; else xla serves the call; and `explain` says why."""
    x = circumstances.arrays()
    with pytest.raises(
        NotImplementedError,
        match=re.escape(
            f"implementation='cpu' cannot serve this call on platform 'cpu'. cpu: {circumstances.reason}."
        ),
    ):
        jax.jit(lambda *x: jax_fa.flash_attention(*x, implementation="cpu"))(*x)

    found = jax_fa.explain(*x, entry="flash_attention", platforms=("cpu",))
    assert found.chosen == {"cpu": "xla"} and found.reasons["cpu"]["cpu"] == circumstances.reason

    # Functions of their own, so that nothing compiled under other circumstances is found again.
    default = jax.jit(lambda *x: jax_fa.flash_attention(*x))
    assert not _calls_kernel(default.lower(*x).as_text())
    named = jax.jit(lambda *x: jax_fa.flash_attention(*x, implementation="xla"))
    np.testing.assert_array_equal(default(*x), named(*x))


@pytest.mark.parametrize("isa", ["sse9", _SETS.split(", ")[0]], ids=["unknown", "absent"])
def test_an_instruction_set_that_is_not_there(isa, monkeypatch):
    """It was asked for by name, so no other one takes its place, nor does `xla`."""
    sets = native.extension.instruction_sets() | {_SETS.split(", ")[0]: isa == "sse9"}
    monkeypatch.setattr(native.extension, "instruction_sets", lambda: sets)
    monkeypatch.setenv(ISA, isa)
    x = [_float(1, 5, 2, 8)] * 3
    allowed = _SETS if isa == "sse9" else _WITHOUT_FIRST
    with pytest.raises(ValueError, match=re.escape(f"this machine has: {allowed}; got {isa!r}.")):
        jax.jit(lambda *x: jax_fa.flash_attention(*x))(*x)


def test_what_is_not_refused():
    """The largest head_dims, and no setting at all: the kernel is the default."""
    x = [_float(1, 5, 2, 768)] * 3
    assert _calls_kernel(jax.jit(lambda *x: jax_fa.flash_attention(*x)).lower(*x).as_text())
    assert jax_fa.explain(*x).chosen["cpu"] == "cpu"
    case = Case(name="native-largest-head", B=(1,), Sq=9, Skv=11, N=2, K=1, D=768, Dv=768)
    (out, lse), gradients = _program(case)()
    check(case, out, lse, gradients)


@pytest.mark.parametrize("shape", ["b, 5, 2, 8", "2, s, 2, 8", "2, 5, 2, d"])
def test_symbolic_dims(shape):
    """Programs for sizes not known yet are xla's, also where its name is given."""
    x = [_float(*jax.export.symbolic_shape(shape))] * 3

    def export(implementation):
        run = jax.jit(partial(jax_fa.flash_attention, scale=0.5, implementation=implementation))
        return jax.export.export(run, platforms=("cpu",))(*x)

    for implementation in (None, "xla"):
        assert not _calls_kernel(export(implementation).mlir_module())
    with pytest.raises(
        NotImplementedError,
        match=r"implementation='cpu' cannot serve .*cpu: symbolic dimensions are not supported\.",
    ):
        export("cpu")


# --- copies

B, S, N, K, D = 2, 40, 4, 2, 16


def _moves(text: str) -> list[str]:
    """What a compiled program does, but for the kernels, that makes an array of the size of key or larger."""
    makes_none = ("parameter", "bitcast", "get-tuple-element", "custom-call")
    found = re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", text)
    large = [(dims, op) for dims, op in found if math.prod(map(int, dims.split(","))) >= B * S * K * D]
    assert large
    return [f"{op} [{dims}]" for dims, op in large if op not in makes_none]


def _with_layout(layout: str):
    return partial(jax_fa.flash_attention, layout=layout, mask=Causal(), implementation="cpu")


def _cann(layout: str):
    def run(q, k, v):
        found = jax_fa.flash_attention_score(
            q, k, v, head_num=N, input_layout=layout, sparse_mode=3, implementation="cpu"
        )
        return found.attention_out

    return run


# One head per element. (The head axis of size 1 is there from the start: adding it under vmap is a reshape,
# for which JAX itself moves the mapped axis to the front.)
_head_by_head = jax.vmap(_with_layout("SND"), in_axes=1, out_axes=1)


def _transposed(q, k, v):
    """Every array is moved by hand: what `_moves` must find."""
    x = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    return jnp.swapaxes(_with_layout("BSND")(*x), 1, 2)


BSND, BNSD, SBND = [(B, S, N, D), (B, S, K, D)], [(B, N, S, D), (B, K, S, D)], [(S, B, N, D), (S, B, K, D)]
STORED = {
    "BSND": (_with_layout("BSND"), BSND),
    "BNSD": (_with_layout("BNSD"), BNSD),
    "SBND": (_with_layout("SBND"), SBND),
    "CANN-SBH": (_cann("SBH"), [(S, B, N * D), (S, B, K * D)]),
    "CANN-BSH": (_cann("BSH"), [(B, S, N * D), (B, S, K * D)]),
    "vmap-over-heads": (_head_by_head, [(B * S, N, 1, D)] * 2),
}


def _compiled(function, shapes, dtype, gradient: bool) -> str:
    query, key = (_float(*shape, dtype=dtype) for shape in shapes)

    def backward(q, k, v, dout):
        out, pullback = jax.vjp(function, q, k, v)
        return out, pullback(dout)

    given = (query, key, key, query) if gradient else (query, key, key)
    return jax.jit(backward if gradient else function).lower(*given).compile().as_text()


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", STORED)
def test_no_copies(stored, dtype, gradient):
    """The kernels read every operand and write every result where and as it lies."""
    text = _compiled(*STORED[stored], dtype, gradient)
    assert text.count('custom_call_target="jax_fa_cpu_') == 1 + gradient
    assert _moves(text) == []


def test_copies_are_found():
    found = " ".join(_moves(_compiled(_transposed, BNSD, "float32", gradient=True)))
    assert "transpose" in found or "copy" in found
