"""The native CPU backend and the arrays of a call: what it refuses before it reads, and scalars as data."""

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa.backends import cpu, native, xla
from jax_fa.call import Call, Operands, Problem, Saved

if native.missing is not None:
    pytest.skip(f"needs the native extension: {native.missing}", allow_module_level=True)
if jax.default_backend() != "cpu":
    pytest.skip("needs CPU devices by default", allow_module_level=True)

# --- arrays that do not fit

B, SQ, SKV, N, K, D, DV = 2, 5, 7, 4, 2, 8, 9
AXES = (0, 1, 2, 3)
PROBLEM = Problem(
    query_axes=AXES, key_axes=(0, 2, 1, 3), value_axes=AXES, out_axes=AXES, scale=0.5, alibi="linear"
)


def _operands(**changes: Any) -> Operands:
    """One of everything that is not an alternative of something else."""
    f32, i32, u32 = jnp.float32, jnp.int32, jnp.uint32
    arrays = {
        "query": jnp.ones((B, SQ, N, D), f32),
        "key": jnp.ones((B, K, SKV, D), f32),
        "value": jnp.ones((B, SKV, K, DV), f32),
        "bias": jnp.ones((B, N, 1, SKV), f32),
        "mask": jnp.ones((1, 1, SQ, SKV), bool),
        "lower": jnp.zeros((B, 1, SQ), i32),
        "upper": jnp.full((1, 1, SQ), SKV, i32),
        "alibi_slopes": jnp.ones((1, N, 1), f32),
        "dropout_seed": jnp.ones((B, 2), u32),
        "dropout_stream": jnp.ones((B, N, 2), u32),
        "drop_bits": jnp.ones((1, 100), jnp.uint8),
        "drop_offset": jnp.zeros((1, 1, SQ, 2), i32),
        "position": jnp.zeros((1, 1, SQ), i32),
        "segment_row": jnp.zeros((1, 1, SQ), i32),
        "segment_key": jnp.zeros((B, 1, SKV), i32),
        "scale": jnp.ones((B, 1), f32),
        "soft_cap": jnp.ones((1, N), f32),
        "keep_threshold": jnp.full((1, 1), 65536, u32),
        "dropout_start": jnp.zeros((1, 2), u32),
        "blocks": jnp.ones((1, N, 3, 2), i32),
        "block_pairs": jnp.ones((B, 1, 2, 2, 4), bool),
    }
    return Operands(**arrays | changes)


def _float(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


STATS, OUT = _float(B, N, SQ), _float(B, SQ, N, DV)
SAVED = {"out": OUT, "m": STATS, "l": STATS, "dout": OUT}


def _results(operands: Operands) -> dict[str, jax.ShapeDtypeStruct]:
    names = ("query", "key", "value", "bias", "alibi_slopes", "scale", "soft_cap")
    return {name: _float(*getattr(operands, name).shape) for name in names}


def _forward(operands: Operands, outs: Any = (OUT, STATS, STATS)) -> Any:
    present, arrays = cpu._arrays(operands)
    call = jax.ffi.ffi_call("jax_fa_cpu_forward", outs)
    return jax.block_until_ready(call(*arrays, problem=cpu._attribute(PROBLEM, present, 0)))


def _backward(operands: Operands, saved: dict[str, Any], results: dict[str, Any]) -> Any:
    present, arrays = cpu._arrays(operands)
    call = jax.ffi.ffi_call("jax_fa_cpu_backward", list(results.values()))
    given = [jnp.ones(x.shape, x.dtype) for x in saved.values()]
    return jax.block_until_ready(call(*arrays, *given, problem=cpu._attribute(PROBLEM, present, 0)))


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """An array of another shape or dtype, and what the error says of it."""

    name: str
    array: Any
    message: str

    def __str__(self) -> str:
        return f"{self.name}-{'x'.join(map(str, self.array.shape))}-{self.array.dtype}"


WRONG = (
    Wrong(
        name="query",
        array=jnp.ones((B, SQ + 1, N, D)),
        message="query is float32 (2, 6, 4, 8); expected float32 or bfloat16 or float16 (1 or 2, 5, 4, 8)",
    ),
    Wrong(
        name="query",
        array=jnp.ones((B, SQ, N, D), jnp.int32),
        message="query is int32 (2, 5, 4, 8); expected",
    ),
    Wrong(name="key", array=jnp.ones((B, 3, SKV, D)), message="key is float32 (2, 3, 7, 8), that is 3 heads"),
    Wrong(
        name="key",
        array=jnp.ones((B, K, SKV)),
        message="key is float32 (2, 2, 7), of rank 3; expected rank 4",
    ),
    Wrong(name="value", array=jnp.ones((B, 6, K, DV)), message="value is float32 (2, 6, 2, 9); expected"),
    Wrong(name="value", array=jnp.ones((3, SKV, K, DV)), message="value is float32 (3, 7, 2, 9); expected"),
    Wrong(
        name="bias",
        array=jnp.ones((B, N, 2, SKV)),
        message="bias is float32 (2, 4, 2, 7); expected float32 or bfloat16 or float16 (1 or 2, 1 or 4, 1 or 5, 1 or 7)",
    ),
    Wrong(name="mask", array=jnp.ones((1, 1, SQ, 6), bool), message="mask is bool (1, 1, 5, 6); expected"),
    Wrong(name="lower", array=jnp.zeros((B, 1, 4), jnp.int32), message="lower is int32 (2, 1, 4); expected"),
    Wrong(name="upper", array=jnp.zeros((1, 1, SQ)), message="upper is float32 (1, 1, 5); expected int32"),
    Wrong(
        name="alibi_slopes", array=jnp.ones((1, 1, 1)), message="alibi_slopes is float32 (1, 1, 1); expected"
    ),
    Wrong(
        name="dropout_seed",
        array=jnp.ones((B, 1), jnp.uint32),
        message="dropout_seed is uint32 (2, 1); expected",
    ),
    Wrong(
        name="drop_offset",
        array=jnp.ones((1, 1, SQ, 1), jnp.int32),
        message="drop_offset is int32 (1, 1, 5, 1)",
    ),
    Wrong(
        name="segment_key",
        array=jnp.ones((1, 1, 1), jnp.int32),
        message="segment_key is int32 (1, 1, 1); expected",
    ),
    Wrong(
        name="scale",
        array=jnp.ones((B, 1, 1)),
        message="scale is float32 (2, 1, 1), of rank 3; expected rank 2",
    ),
    Wrong(
        name="soft_cap",
        array=jnp.ones((1, 3)),
        message="soft_cap is float32 (1, 3); expected float32 (1 or 2, 1 or 4)",
    ),
    Wrong(
        name="keep_threshold",
        array=jnp.ones((1, 1)),
        message="keep_threshold is float32 (1, 1); expected uint32",
    ),
    Wrong(
        name="dropout_start",
        array=jnp.ones((1, 1), jnp.uint32),
        message="dropout_start is uint32 (1, 1); expected",
    ),
    Wrong(
        name="blocks",
        array=jnp.ones((1, N, 2, 2), jnp.int32),
        message="blocks is int32 (1, 4, 2, 2); expected int32 (1 or 2, 1 or 4, 3, 2)",
    ),
    Wrong(
        name="block_pairs",
        array=jnp.ones((1, 1, 2, 0, 4), bool),
        message="block_pairs is bool (1, 1, 2, 0, 4); expected blocks of at least one row and key",
    ),
)


def _refused(message: str) -> Any:
    return pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=re.escape(f"jax_fa cpu: {message}"))


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_operands_that_do_not_fit_are_refused(wrong):
    """By the handlers themselves: an exported program may be called with anything."""
    right = _operands()
    operands = _operands(**{wrong.name: wrong.array})
    with _refused(wrong.message):
        _forward(operands)
    with _refused(wrong.message):
        _backward(operands, SAVED, _results(right))


def test_what_fits_is_not_refused():
    operands = _operands()
    assert len(_forward(operands)) == 3
    assert len(_backward(operands, SAVED, _results(operands))) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": _float(B, SQ, N, D)}, "out is float32 (2, 5, 4, 8); expected float32 (1 or 2, 5, 4, 9)"),
        (
            {"dout": _float(3, SQ, N, DV)},
            "the cotangent of out is float32 (3, 5, 4, 9); expected float32 (1 or 2, 5, 4, 9)",
        ),
        (
            {"dout": _float(B, SQ, N, DV, dtype=jnp.bfloat16)},
            "the cotangent of out is bfloat16 (2, 5, 4, 9); expected",
        ),
        ({"l": _float(B, N, 1)}, "softmax sum is float32 (2, 4, 1); expected float32 (1 or 2, 4, 5)"),
        ({"m": _float(B, SQ)}, "softmax max is float32 (2, 5), of rank 2; expected rank 3"),
        ({"l": None}, "there are 24 arguments; expected 25"),
    ],
)
def test_saved_arrays_that_do_not_fit_are_refused(changes, message):
    operands = _operands()
    saved = {name: x for name, x in (SAVED | changes).items() if x is not None}
    with _refused(message):
        _backward(operands, saved, _results(operands))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "query",
            (1, SQ, N, D),
            "the gradient of query is float32 (1, 5, 4, 8); expected float32 (2, 5, 4, 8)",
        ),
        (
            "bias",
            (B, N, SQ, SKV),
            "the gradient of bias is float32 (2, 4, 5, 7); expected float32 (2, 4, 1, 7)",
        ),
        ("scale", (3, 1), "the gradient of scale is float32 (3, 1); expected float32 (2, 1)"),
        ("soft_cap", (1, 1), "the gradient of soft_cap is float32 (1, 1); expected float32 (1 or 2, 4)"),
        ("soft_cap", None, "there are 6 results; expected 7"),
    ],
)
def test_results_that_do_not_fit_are_refused(name, shape, message):
    operands = _operands()
    results = _results(operands) | {name: None if shape is None else _float(*shape)}
    with _refused(message):
        _backward(operands, SAVED, {key: x for key, x in results.items() if x is not None})
    if name == "query":
        for outs in ((OUT, STATS), (OUT, STATS, STATS, OUT)):
            with _refused(f"there are {len(outs)} results; expected 3"):
                _forward(operands, outs)


# --- derivatives along tangents

TANGENTS = ("query", "bias", "soft_cap")
COTANGENTS = {"dlogsumexp": STATS, "dout_tangent": OUT}
ALONG = {
    # What each takes besides operands and tangents, and gives.
    "jvp": ({}, {"out": OUT, "m": STATS, "l": STATS, "dout": OUT, "dlogsumexp": STATS}),
    "tangent": ({"out": OUT, "m": STATS, "l": STATS}, {"dout": OUT, "dlogsumexp": STATS}),
    "second": (SAVED | COTANGENTS, _results(_operands()) | {"dout": OUT, "dlogsumexp": STATS}),
}


def _along(what: str, *, unwanted: tuple[str, ...] = (), **changes: Any) -> Any:
    """Runs the handler; `changes` are shapes of saved arrays, of tangents (by `query_tangent`) and results, None: absent."""
    operands = _operands()
    saved, results = ALONG[what]
    tangents = {f"{name}_tangent": _float(*getattr(operands, name).shape) for name in TANGENTS}
    given = {name: changes.get(name, x) for name, x in (saved | tangents).items()}
    wanted = {name: changes.get(f"result_{name}", x) for name, x in results.items()}
    present, arrays = cpu._arrays(operands)
    word = cpu._saved_word([*saved], TANGENTS, unwanted)
    call = jax.ffi.ffi_call(f"jax_fa_cpu_{what}", [x for x in wanted.values() if x is not None])
    arrays += [jnp.ones(x.shape, x.dtype) for x in given.values() if x is not None]
    return jax.block_until_ready(call(*arrays, problem=cpu._attribute(PROBLEM, present, word)))


@pytest.mark.parametrize("what", ALONG)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"query_tangent": _float(B, SQ, N, DV)},
            "the tangent of query is float32 (2, 5, 4, 9); expected float32 (1 or 2, 5, 4, 8)",
        ),
        (
            {"query_tangent": _float(B, SQ, N, D, dtype=jnp.bfloat16)},
            "the tangent of query is bfloat16 (2, 5, 4, 8); expected float32",
        ),
        (
            {"bias_tangent": _float(B, N, SQ, SKV)},
            "the tangent of bias is float32 (2, 4, 5, 7); expected float32 (1 or 2, 4, 1, 7)",
        ),
        (
            {"soft_cap_tangent": _float(1, 1)},
            "the tangent of soft_cap is float32 (1, 1); expected float32 (1 or 2, 4)",
        ),
        (
            {"soft_cap_tangent": _float(4)},
            "the tangent of soft_cap is float32 (4), of rank 1; expected rank 2",
        ),
        (
            {"result_dout": _float(1, SQ, N, DV)},
            "the tangent of out is float32 (1, 5, 4, 9); expected float32 (2, 5, 4, 9)",
        ),
        (
            {"result_dlogsumexp": _float(B, N)},
            "the tangent of log-sum-exp is float32 (2, 4), of rank 2; expected rank 3",
        ),
    ],
)
def test_tangents_that_do_not_fit_are_refused(what, changes, message):
    with _refused(message):
        _along(what, **changes)


@pytest.mark.parametrize("what", ALONG)
def test_tangents_that_fit_are_not_refused(what):
    """Those mapped where their operand is not, and the other way round, too."""
    full = {"soft_cap_tangent": _float(B, N), "query_tangent": _float(1, SQ, N, D)}
    for changes in ({}, full):
        assert len(_along(what, **changes)) == len(ALONG[what][1])
    for name in ("query_tangent", "result_dout"):
        with _refused("there are "):
            _along(what, **{name: None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": _float(B, SQ, N, D)}, "out is float32 (2, 5, 4, 8); expected float32 (1 or 2, 5, 4, 9)"),
        (
            {"dout_tangent": _float(B, SQ, N, D)},
            "the tangent of out's cotangent is float32 (2, 5, 4, 8); expected float32 (1 or 2, 5, 4, 9)",
        ),
        (
            {"result_key": _float(B, SKV, K, D)},
            "the gradient of key is float32 (2, 7, 2, 8); expected float32 (2, 2, 7, 8)",
        ),
    ],
)
def test_saved_arrays_of_the_second_that_do_not_fit_are_refused(changes, message):
    with _refused(message):
        _along("second", **changes)


def test_results_that_are_not_wanted():
    """The second leaves them out, and the tangents have none that could be."""
    unwanted = ("query", "scale", "dout")
    left = {f"result_{name}": None for name in unwanted}
    assert len(_along("second", unwanted=unwanted, **left)) == len(ALONG["second"][1]) - len(unwanted)
    with _refused("there are 9 results; expected 6"):
        _along("second", unwanted=unwanted)
    for what in ("jvp", "tangent"):
        with _refused("`saved` has bits for arrays that there are not"):
            _along(what, unwanted=("query",))


@pytest.mark.parametrize(
    "wanted", [("query",), ("key",), ("value", "bias"), ("scale", "alibi_slopes", "soft_cap"), ()]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_that_are_wanted(wanted, dtype):
    """The backward gives these alone, and of the same bits."""
    operands = _operands()
    for name in ("query", "key", "value"):
        x = jax.random.normal(jax.random.key(1), getattr(operands, name).shape, dtype)
        operands = replace(operands, **{name: x})
    out, m, l = cpu.backend.forward(Call.of(PROBLEM, operands))
    saved = Saved(out=out, m=m, l=l, dout=out)
    every = cpu.backend.backward(Call.of(PROBLEM, operands), saved)
    some = cpu.backend.backward(Call.of(replace(PROBLEM, gradients=wanted), operands), saved)
    assert set(some.present()) == set(wanted)
    for name in wanted:
        np.testing.assert_array_equal(getattr(some, name), getattr(every, name))


# --- scalars as data


def _qkv(dtype: str, *, batch: int = 2, sq: int = 37, skv: int = 45) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(3), 3)
    shapes = ((batch, sq, N, 16), (batch, skv, K, 16), (batch, skv, K, 16))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("argument", "value"),
    [("scale", 0.3), ("scale", -0.3), ("scale", 0.0), ("logits_soft_cap", 2.5), ("dropout_rate", 0.25)],
)
def test_a_scalar_means_the_same_as_data(argument, value, dtype):
    """The same bits, forward and backward, whether it is known when the call is traced or not."""
    q, k, v = _qkv(dtype)
    keywords: dict[str, Any] = {"implementation": "cpu"}
    if argument == "dropout_rate":
        keywords["dropout_key"] = jax.random.key(1)

    def loss(q, k, v, value):
        out = jax_fa.flash_attention(q, k, v, **keywords, **{argument: value})
        return jnp.sum(out.astype(jnp.float32) * v[:, :1, :1].astype(jnp.float32)), out

    def run(*arguments):
        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arguments)

    static = jax.jit(lambda q, k, v: run(q, k, v, value))(q, k, v)
    data = jax.jit(run)(q, k, v, jnp.float32(value))
    for a, b in zip(jax.tree.leaves(static), jax.tree.leaves(data), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("argument", ["scale", "logits_soft_cap"])
@pytest.mark.parametrize("value", [0.3, 4.0])
def test_the_gradient_of_a_scalar(argument, value):
    """Summed over all heads and rows, and one for each entry under vmap; as the portable backend has it."""
    q, k, v = _qkv("float32")

    def loss(value, q, implementation):
        out = jax_fa.flash_attention(q, k, v, implementation=implementation, **{argument: value})
        return jnp.sum(out * out)

    gradients = {
        name: jax.jit(jax.grad(partial(loss, implementation=name)))(jnp.float32(value), q)
        for name in ("cpu", "xla")
    }
    np.testing.assert_allclose(gradients["cpu"], gradients["xla"], rtol=2e-5, atol=1e-5)

    values = jnp.float32([value, 2 * value, 0.5 * value])
    mapped = jax.jit(jax.vmap(jax.grad(partial(loss, implementation="cpu")), (0, None)))(values, q)
    for x, found in zip(values, mapped, strict=True):
        alone = jax.jit(jax.grad(partial(loss, implementation="cpu")))(x, q)
        np.testing.assert_allclose(alone, found, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sq", [3, 230])
def test_a_scale_for_each_head_of_a_group(sq, dtype):
    """Heads that share keys may differ: the gradient of a key is the sum of theirs, each with its scale."""
    q, k, v = _qkv(dtype, sq=sq)
    problem = Problem(query_axes=AXES, key_axes=AXES, value_axes=AXES, out_axes=AXES, scale=1.0)
    operands = Operands(query=q, key=k, value=v, scale=jnp.float32([[0.5, 0.0, -0.25, 1.0]]))

    def gradients(backend, operands):
        call = Call.of(problem, operands)
        out, m, l = backend.forward(call)
        found = backend.backward(call, Saved(out=out, m=m, l=l, dout=out))
        return [found.query, found.key, found.value, found.scale]

    found = jax.jit(partial(gradients, cpu.backend))(operands)
    wide = operands.map(lambda name, x: x.astype(jnp.float32))
    expected = jax.jit(partial(gradients, xla.backend))(wide)
    unit = 2e-5 if dtype == "float32" else 2e-2
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            a.astype(jnp.float32), b, rtol=unit, atol=unit * float(jnp.max(jnp.abs(b)))
        )


# --- bias of many entries, and bits of each


def test_bias_gradients_of_many_entries():
    """Some entries share a bias and some have their own; each sum has its own entries only."""
    batch, shared, S = 300, 3, 4
    q, k, v = (
        jax.random.normal(key, (batch, shared, S, 1, 8)) for key in jax.random.split(jax.random.key(0), 3)
    )
    bias = jax.random.normal(jax.random.key(1), (batch, 1, 1, S, S))

    def loss(bias, q, k, v, implementation):
        out = jax_fa.dot_product_attention(q, k, v, bias=bias, implementation=implementation)
        return jnp.sum(out * out)

    found = jax.jit(jax.vmap(jax.grad(partial(loss, implementation="cpu"))))(bias, q, k, v)
    for entry in (0, 1, 150, batch - 1):
        expected = jax.grad(partial(loss, implementation="cpu"))(bias[entry], q[entry], k[entry], v[entry])
        np.testing.assert_allclose(found[entry], expected, rtol=1e-5, atol=1e-6)


def test_explicit_bits_under_vmap():
    """Each mapped entry reads its own bits."""
    S, heads = 13, 2
    q = jax.random.normal(jax.random.key(0), (3, 1, S, heads, 8))
    bits = jax.random.randint(jax.random.key(1), (3, (heads * S * S + 7) // 8), 0, 256, jnp.uint8)

    def attend(q, bits):
        return jax_fa.flash_attention_score(
            q, q, q, None, bits, head_num=heads, input_layout="BSND", keep_prob=0.5, implementation="cpu"
        ).attention_out

    mapped = jax.jit(jax.vmap(attend))(q, bits)
    for i in range(3):
        np.testing.assert_array_equal(mapped[i], jax.jit(attend)(q[i], bits[i]))
    assert not np.array_equal(mapped[0], jax.jit(attend)(q[0], bits[1]))
