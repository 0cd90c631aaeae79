"""The Mosaic GPU backend lowered for GPUs that are not there: what becomes a kernel, what runs around it, and where.

Nothing runs here. Options are combined so that every two of them meet.
"""

import itertools
import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from mosaic_tools import REFUSED, TARGET, abstract, gpu, lowered, needs_new_jax, operations

import jax_fa
from jax_fa.attention import attention
from jax_fa.backends import mosaic
from jax_fa.call import DIFFERENTIABLE, Call, Operands, Problem
from jax_fa.entry import request_of
from jax_fa.masks import Causal, Lengths, SlidingWindow
from jax_fa.testing.spread import pairwise, spanning

SLOW = pytest.mark.slow
B, N, K = 2, 4, 2
LENGTHS = ((2048, 2016), (1000, 1008), (1, 2048))


def _float(*shape: int, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


# What else a call takes, by lengths: arrays, and what is no array.
FEATURES = {
    "plain": lambda Sq, Skv: ({}, {}),
    "causal": lambda Sq, Skv: ({}, {"mask": Causal("bottom-right")}),
    "window": lambda Sq, Skv: ({}, {"mask": SlidingWindow(100, 7)}),
    "lengths": lambda Sq, Skv: ({"mask": Lengths(key=_float(B, dtype=jnp.int32))}, {}),
    "bias-tile": lambda Sq, Skv: ({"bias": _float(N, Sq, Skv)}, {}),
    "bias-tile-16-bits": lambda Sq, Skv: ({"bias": _float(B, 1, Sq, Skv, dtype=jnp.bfloat16)}, {}),
    "bias-per-key": lambda Sq, Skv: ({"bias": _float(B, N, 1, Skv)}, {}),
    "bias-per-row": lambda Sq, Skv: ({"bias": _float(B, 1, Sq, 1)}, {}),
    "mask-tile": lambda Sq, Skv: ({"mask": _float(B, 1, Sq, Skv, dtype=bool)}, {}),
    "mask-per-row": lambda Sq, Skv: ({"mask": _float(B, 1, Sq, 1, dtype=bool)}, {}),
    "mask-per-key": lambda Sq, Skv: ({"mask": _float(B, 1, 1, Skv, dtype=bool)}, {}),
    "dropout": lambda Sq, Skv: ({"dropout_key": _key()}, {"dropout_rate": 0.1}),
    "soft-cap": lambda Sq, Skv: ({}, {"logits_soft_cap": 20.0}),
    "slopes": lambda Sq, Skv: ({"alibi_slopes": _float(N)}, {}),
    "scale-as-data": lambda Sq, Skv: ({"scale": _float()}, {"mask": Causal()}),
    "everything": lambda Sq, Skv: (
        {"bias": _float(B, N, Sq, Skv), "alibi_slopes": _float(B, N), "dropout_key": _key()},
        {"mask": Causal() & SlidingWindow(100), "logits_soft_cap": 20.0, "dropout_rate": 0.1},
    ),
}
SQUARE = ("bias-tile", "bias-tile-16-bits", "mask-tile", "everything")  # an operand is Sq x Skv itself


def _key():
    return jax.eval_shape(lambda: jax.random.key(0))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A call as its caller writes it, by avals."""

    feature: str = "plain"
    head_dims: tuple[int, int] = (64, 64)
    dtype: str = "bfloat16"
    layout: str = "BSND"
    lengths: tuple[int, int] = LENGTHS[0]
    implementation: str | None = None

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.lengths)), "+".join(map(str, self.head_dims))
        return "-".join((self.feature, self.dtype, self.layout, *sizes, self.implementation or "default"))

    def _stored(self, S: int, heads: int, D: int):
        sizes = {"B": B, "S": S, "N": heads, "D": D}
        return _float(*(sizes[c] for c in self.layout), dtype=self.dtype)

    def operands(self) -> dict:
        (Sq, Skv), (D, Dv) = self.lengths, self.head_dims
        arrays, _ = FEATURES[self.feature](Sq, Skv)
        return {
            "query": self._stored(Sq, N, D),
            "key": self._stored(Skv, K, D),
            "value": self._stored(Skv, K, Dv),
            **arrays,
        }

    def static(self) -> dict:
        _, static = FEATURES[self.feature](*self.lengths)
        return {**static, "layout": self.layout, "implementation": self.implementation}

    def attend(self, operands: dict):
        return jax_fa.flash_attention(**operands, **self.static(), return_logsumexp=True)

    def gradient(self, operands: dict):
        floats = ("query", "key", "value", "bias", "alibi_slopes", "scale")
        given = {name: x for name, x in operands.items() if name in floats}
        others = {name: x for name, x in operands.items() if name not in floats}
        results, pullback = jax.vjp(lambda x: self.attend(x | others), given)
        return results, pullback(jax.tree.map(jnp.ones_like, results))

    def explain(self, **options):
        return jax_fa.explain(
            **self.operands(), **self.static() | options, entry="flash_attention", platforms=("cuda",)
        )

    def copied(self) -> bool:
        """Whether the head_dim of query, key or value is one that TMA cannot read as it lies."""
        return any(D % (8 if D <= 64 else 16) for D in self.head_dims)

    def check(self, module: str) -> None:
        """No operation but the kernels makes an array of Sq x Skv, nor rearranges one of the size of key."""
        (Sq, Skv), (D, Dv) = self.lengths, self.head_dims
        others = [(name, size) for name, size in operations(module) if name != "custom_call"]
        if self.feature not in SQUARE:
            large = [(name, size) for name, size in others if size >= B * N * Sq * Skv]
            assert Sq == 1 or not large, large
        smallest = B * min(Sq * N, Skv * K) * min(D, Dv)
        if not self.copied() and self.feature not in SQUARE and Sq > 1:
            moved = [(name, size) for name, size in others if size >= smallest and name in MOVING]
            assert not moved, moved


# What would copy an array. Scalars per row, which the kernels want in an order of their own, are smaller than key.
MOVING = (
    "transpose",
    "pad",
    "slice",
    "concatenate",
    "gather",
    "copy",
    "dynamic_slice",
    "dynamic_update_slice",
)
OPTIONS = {
    "feature": tuple(FEATURES),
    "dtype": ("bfloat16", "float16"),
    "layout": ("BSND", "BNSD", "SBND"),
    "lengths": LENGTHS,
    "implementation": ("mosaic", None),
}
# Head dims that the kernels treat alike: read as they lie in tiles of 64 or less, wider ones, what is copied first,
# and values of another width.
ALIKE = {
    "narrow": ((8, 8), (16, 16), (32, 32), (64, 64)),
    "wide": ((80, 80), (96, 96), (128, 128), (160, 160), (192, 192), (256, 256)),
    "copied": ((24, 24), (40, 40), (72, 72), (5, 7)),
    "unequal": ((192, 128), (64, 16)),
}


def _spread() -> tuple[Asked, ...]:
    """Every two options meet; the head dims that are alike take turns."""
    turns = {kind: itertools.cycle(head_dims) for kind, head_dims in ALIKE.items()}
    rows = pairwise(OPTIONS | {"head_dims": tuple(ALIKE)})
    return tuple(Asked(**row | {"head_dims": next(turns[row["head_dims"]])}) for row in rows)


SPREAD = _spread()
FIRST = spanning([vars(call) for call in SPREAD])  # that many hold every option
LONG = ("dropout", "everything")  # features whose kernels of the backward take many seconds to lower


def _calls(slow) -> list:
    """The spread; of it, calls are slow for which `slow(index, call)` is true."""
    marks = [SLOW if slow(i, call) else () for i, call in enumerate(SPREAD)]
    return [pytest.param(call, id=str(call), marks=mark) for call, mark in zip(SPREAD, marks, strict=True)]


@needs_new_jax
@pytest.mark.parametrize("call", _calls(lambda i, call: i >= FIRST and call.feature not in LONG))
def test_forward(call):
    """By default every option appears: the programs of gradients have forwards in them, too."""
    module = lowered(call.attend, call.operands()).mlir_module()
    assert module.count(f"@{TARGET}") == 1
    call.check(module)


def _abstract(asked: Asked) -> Call:
    return abstract(
        lambda x: request_of(jax_fa.flash_attention, **x, **asked.static()).call, asked.operands()
    )


@needs_new_jax
@pytest.mark.parametrize("call", _calls(lambda i, call: call.feature in LONG))
def test_gradient(call):
    module = lowered(call.gradient, call.operands()).mlir_module()
    assert module.count(f"@{TARGET}") >= 3  # forward, dq, dkv
    call.check(module)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="JAX 0.11 numbers the kernels of a process in their text"
)
@pytest.mark.parametrize(
    "feature",
    ["plain", "mask-per-row", pytest.param("dropout", marks=SLOW), pytest.param("everything", marks=SLOW)],
)
def test_64_bit_mode_changes_no_kernel(feature):
    """A kernel's integers have 32 bits, whatever `jax_enable_x64` says of Python's."""
    call = Asked(feature=feature, lengths=(100, 200), implementation="mosaic")

    def kernels(x64: bool) -> list[str]:
        with jax.enable_x64(x64):
            module = lowered(call.gradient, call.operands()).mlir_module()
        return [line.partition(" loc(")[0] for line in module.splitlines() if f"@{TARGET}" in line]

    wide, narrow = kernels(True), kernels(False)
    assert len(narrow) >= 3 and wide == narrow


@needs_new_jax
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_a_mapped_axis_is_no_copy(axis):
    """The kernel reads and writes arrays in which vmap finds its axis anywhere but behind the head_dim."""
    shape = [2, 1024, 4, 64]
    shape.insert(axis, 3)
    x = _float(*shape, dtype=jnp.bfloat16)
    module = lowered(jax.vmap(_attend, axis, axis), x, x, x).mlir_module()
    assert module.count(f"@{TARGET}") == 1
    assert {name for name, size in operations(module) if size >= x.size} == {"custom_call"}


def _segments(heads: int, S: int) -> dict:
    """Segments, positions and a slope per row, which a mask or a cache gives a call."""
    ints = _float(1, heads, S, dtype=jnp.int32)
    return {"segment_row": ints, "segment_key": ints, "position": ints, "alibi_slopes": _float(B, N, S)}


@needs_new_jax
@pytest.mark.parametrize(
    ("feature", "extra"),
    [
        ("slopes", _segments(1, 1024)),
        pytest.param("slopes", _segments(N, 1024), marks=SLOW),
        ("bias-per-row", {"scale": _float(1, N), "soft_cap": _float(B, N)}),
        pytest.param("dropout", {"keep_threshold": _float(1, N, dtype=jnp.uint32)}, marks=SLOW),
    ],
    ids=["segments", "segments-by-head", "scale-soft-cap", "dropout"],
)
def test_operands_that_masks_and_traced_arguments_make(feature, extra):
    S = 1024
    call = Asked(lengths=(S, S), feature=feature, implementation="mosaic")
    found = _abstract(call)
    avals = replace(found.operands, **extra)

    def gradient(operands):
        floats = {name: x for name, x in operands.items() if name in DIFFERENTIABLE and x is not None}
        out, pullback = jax.vjp(
            lambda x: attention(Call.of(found.problem, replace(operands, **x))).out, floats
        )
        return out, pullback(out)

    module = lowered(gradient, avals).mlir_module()
    assert module.count(f"@{TARGET}") == 3
    call.check(module)


@needs_new_jax
def test_an_indexed_bias_is_refused():
    x = jax.ShapeDtypeStruct((1, 8, 1, 16), jnp.bfloat16)
    axes = (0, 1, 2, 3)
    problem = Problem(query_axes=axes, key_axes=axes, value_axes=axes, out_axes=axes, scale=1.0)
    bias, offset = _float(1, 1, 15), _float(1, 1, 8, dtype=jnp.int32)
    given = Operands(query=x, key=x, value=x, bias=bias, bias_offset=offset)
    with gpu():
        found = mosaic.backend.why_not(Call.of(problem, given), platform="cuda", what="backward")
    assert found == "it reads a bias by tiles and takes none that is indexed by row (bias_offset)"


# --- which GPUs


HOPPER = ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H800", "NVIDIA H20", "NVIDIA GH200 480GB")
OTHERS = {
    "NVIDIA A100-SXM4-40GB": "needs a Hopper GPU (compute capability 9.0), this one has 8.0",
    "NVIDIA B200": "needs a Hopper GPU (compute capability 9.0), this one has 10.0",
    "NVIDIA GB200": "needs a Hopper GPU (compute capability 9.0), this one has 10.0",
    None: "the GPU is not known where this is lowered: no device here, and no abstract device set",
}


@needs_new_jax
@pytest.mark.parametrize("kind", HOPPER)
def test_hopper_gpus_are_served(kind):
    call = Asked()
    with gpu(kind):
        found = call.explain()
    assert found.chosen == {"cuda": "mosaic"}
    assert TARGET in lowered(call.attend, call.operands(), kind=kind).mlir_module()


@needs_new_jax
@pytest.mark.parametrize("kind", OTHERS, ids=str)
def test_other_gpus_get_the_portable_backend(kind):
    """By default, and `explain` says why; where this backend is asked for, the error says it."""
    call = Asked()
    with gpu(kind):
        found = call.explain()
    assert found.chosen == {"cuda": "xla"} and found.reasons["cuda"]["mosaic"] == OTHERS[kind]
    assert re.search(rf"mosaic +{re.escape(OTHERS[kind])}", str(found))
    assert TARGET not in lowered(call.attend, call.operands(), kind=kind).mlir_module()
    asked = Asked(implementation="mosaic")
    with pytest.raises(NotImplementedError) as error:
        lowered(asked.attend, asked.operands(), kind=kind)
    assert OTHERS[kind] in str(error.value)


@needs_new_jax
def test_one_program_for_two_platforms():
    """The kernel for GPUs, another backend on CPU, where the program runs after a round trip through bytes."""
    call = Asked(lengths=(64, 72), feature="causal")
    program = lowered(call.attend, call.operands(), platforms=("cpu", "cuda"))
    assert TARGET in program.mlir_module()
    random = np.random.default_rng(0)
    x = {
        name: jnp.asarray(random.standard_normal(x.shape), jnp.bfloat16)
        for name, x in call.operands().items()
    }
    again = export.deserialize(program.serialize())
    # The exported program is optimized as a whole, as is this one.
    for ours, direct in zip(jax.jit(again.call)(x), jax.jit(call.attend)(x), strict=True):
        np.testing.assert_array_equal(ours, direct)


@needs_new_jax
def test_programs_differ_by_device():
    """One function, lowered for one GPU after another: nothing is kept from before."""
    call = Asked()
    kinds = ("NVIDIA H200", "NVIDIA A100-SXM4-40GB", "NVIDIA H200", None)
    fn = jax.jit(call.attend)
    found = []
    for kind in kinds:
        with gpu(kind):
            found.append(TARGET in export.export(fn, platforms=["cuda"])(call.operands()).mlir_module())
    assert found == [True, False, True, False]


# --- refusals


def _reason(fn, *args) -> str:
    """What the error says that refuses to lower."""
    with pytest.raises(NotImplementedError) as error:
        lowered(fn, *args)
    message = str(error.value)
    assert message.startswith("implementation='mosaic' cannot serve this call on platform 'cuda'. mosaic: ")
    return message.partition("mosaic: ")[2]


def _attend(*args, **options):
    return jax_fa.flash_attention(*args, **options, implementation="mosaic")


_X = _float(2, 64, 4, 64, dtype=jnp.bfloat16)
_WIDE = _float(2, 64, 4, 264, dtype=jnp.bfloat16)
_EMPTY = _float(2, 0, 4, 64, dtype=jnp.bfloat16)
_LAST = _float(2, 64, 4, 64, 3, dtype=jnp.bfloat16)


def _too_large(x):
    tiles = mosaic.Options(tiles={"forward": mosaic.Tiles(width=256, stages=4, consumers=2)})
    return jax_fa.flash_attention(x, x, x, implementation=tiles)


def _last_axis(x):
    return jax.vmap(lambda x: _attend(x, x, x), -1, -1)(x)


def _drop_mask(x, bits):
    folded = x.reshape(2, 64, 4 * 64)
    return jax_fa.flash_attention_score(
        *(3 * (folded,)), drop_mask=bits, keep_prob=0.9, head_num=4, implementation="mosaic"
    )


@needs_new_jax
@pytest.mark.parametrize(
    ("fn", "args", "reason"),
    [
        (_attend, 3 * [_float(2, 64, 4, 64)], "query has dtype float32; it serves bfloat16 and float16."),
        (_attend, [_X, _X, _WIDE], "head_dim 264 is above 256."),
        (_attend, 3 * [_WIDE], "head_dim 264 is above 256."),
        (_attend, [_EMPTY, _X, _X], "a dimension is empty."),
        (_attend, [_X, _EMPTY, _EMPTY], "a dimension is empty."),
        (_last_axis, [_LAST], "the head_dim of query is not its last axis in memory."),
        (
            _drop_mask,
            [_X, _float(2 * 4 * 64 * 64 // 8, dtype=jnp.uint8)],
            "it draws dropout bits itself and reads none (drop_mask).",
        ),
        (
            _too_large,
            [_X],
            "the tiles given for forward (width=256, stages=4, consumers=2) need 284672 bytes of shared memory for this "
            "call; there are 232448.",
        ),
    ],
    ids=["dtype", "value-head-dim", "head-dim", "no-query", "no-key", "axes", "drop-mask", "tiles"],
)
def test_what_is_refused(fn, args, reason):
    assert _reason(fn, *args) == reason


@needs_new_jax
def test_symbolic_sizes_get_the_portable_backend():
    (S,) = export.symbolic_shape("S")
    x = jax.ShapeDtypeStruct((2, S, 4, 64), jnp.bfloat16)
    assert TARGET not in lowered(lambda x: jax_fa.flash_attention(x, x, x), x).mlir_module()
    assert _reason(lambda x: _attend(x, x, x), x) == "a dimension is symbolic."


@needs_new_jax
def test_no_interpreter_no_kernel_on_cpu():
    found = jax_fa.explain(_X, _X, _X, platforms=("cpu",), implementation="mosaic").reasons["cpu"]["mosaic"]
    assert (
        found
        == "runs on CUDA only; on CPU in Pallas' interpreter, for tests (plgpu.force_gpu_interpret_mode)"
    )


def test_an_old_jax_is_refused(monkeypatch):
    """Before anything of Pallas is imported."""
    if jax.__version_info__[:2] >= (0, 11):
        monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
        monkeypatch.setattr(jax, "__version__", "0.10.2")
    told = jax_fa.explain(_X, _X, _X, platforms=("cpu", "cuda")).reasons
    assert told["cpu"]["mosaic"].startswith("runs on CUDA only; ")
    why = told["cuda"]["mosaic"]
    assert why.startswith(
        f"needs jax 0.11 or newer, which needs Python 3.12 or newer; this is jax {jax.__version__} on Python 3."
    )
    assert why == REFUSED or jax.__version__ == "0.10.2"
