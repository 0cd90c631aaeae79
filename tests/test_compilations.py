"""Programs are shared: a second call compiles nothing, under jit and outside of it, whatever its values are."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa.masks import Causal, CumulativeLengths, Lengths, SegmentIds
from jax_fa.testing.cases import BY_NAME

S, N, D = 19, 4, 8


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


def _compilations(function: Callable[[], Any]) -> int:
    count = []

    def listen(event: str, *_, **__) -> None:
        if event.endswith("backend_compile_duration"):
            count.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(count)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_one_program_per_shape(jit, backend):
    def gradient(x, length):
        mask = Causal() & Lengths(key=length)
        run = partial(jax_fa.flash_attention, mask=mask, implementation=backend)
        return jax.grad(lambda x: jnp.sum(run(x, x, x)))(x)

    run = jax.jit(gradient) if jit else gradient
    x, length = _normal(2, S, N, D), jnp.array([3, S], jnp.int32)
    other, other_length = x + 1, length - 2
    assert _compilations(lambda: run(x, length)) > 0
    assert _compilations(lambda: run(other, other_length)) == 0
    assert _compilations(lambda: run(x[:, :18], other_length)) > 0


# --- outside of jit, where each operation is a program of its own, and a loop of a function made anew would be a new one


def _sum(function: Callable, x):
    return jnp.sum(jnp.sin(function(x, x, x)))


def _masked(make: Callable[[jax.Array], Any], x, at):
    return jax_fa.flash_attention(x, x, x, mask=make(at))


def _union(at):
    return ~Lengths(key=at[:2]) | Causal()


def _gradient(x, at):
    attend = partial(jax_fa.flash_attention, mask=CumulativeLengths(at, at))
    return jax.grad(partial(_sum, attend))(x[0])


def _second_derivative(x, at):
    attend = partial(jax_fa.flash_attention, mask=Causal())
    return jax.jvp(jax.grad(partial(_sum, attend)), (x,), (x,))


def _third_derivative(x, at):
    def along(function, x):
        return jax.jvp(function, (x,), (x,))[1]

    attend = partial(jax_fa.flash_attention, mask=Causal())
    return along(partial(along, partial(along, partial(_sum, attend))), x)


def _pages(x, at):
    table = jnp.array([[1, 0], [2, 3]], jnp.int32)
    return jax_fa.paged_attention(x[:, 0], *(x.reshape(2, S, 2, 2 * D)[..., :D],) * 2, table, at[:2])


def _score_mod(score, batch, head, row, column):
    return score * 2 - abs(row - column)


def _npu(x, at):
    call = partial(jax_fa.npu_fusion_attention, head_num=N, input_layout="TND", sparse_mode=3)
    mask = jnp.ones((2048, 2048), bool)
    ends = {"actual_seq_qlen": at, "actual_seq_kvlen": at}
    return call(
        x[0], x[0], x[0], atten_mask=jnp.triu(mask, 1), keep_prob=0.5, dropout_key=jax.random.key(0), **ends
    )


_CALLS: dict[str, Callable[[jax.Array, jax.Array], Any]] = {
    "packed": lambda x, at: jax_fa.flash_attention(x[0], x[0], x[0], mask=CumulativeLengths(at, at)),
    "packed, gradient": _gradient,
    "lengths": partial(_masked, lambda at: Lengths(query=at[:2], key=at[:2])),
    "segments": partial(_masked, lambda at: SegmentIds(*(jnp.searchsorted(at, jnp.arange(S))[None],) * 2)),
    "union": partial(_masked, _union),
    "second derivative": _second_derivative,
    "third derivative": _third_derivative,
    "pages": _pages,
    "score_mod": lambda x, at: jax_fa.flash_attention(x, x, x, score_mod=_score_mod),
    "npu_fusion_attention": _npu,
}


@pytest.mark.parametrize("name", _CALLS)
def test_a_second_call_without_jit_compiles_nothing(name):
    x, other, at = _normal(2, S, N, D), _normal(2, S, N, D) + 1, jnp.array([3, 11, S], jnp.int32)
    call = _CALLS[name]
    assert _compilations(lambda: call(x, at)) > 0
    assert _compilations(lambda: call(other, at)) == 0


_INTEGERS: dict[str, Callable[[jax.Array, list[int]], Any]] = {
    "ends": lambda x, at: jax_fa.npu_fusion_attention(
        x[0], x[0], x[0], N, "TND", actual_seq_qlen=at, actual_seq_kvlen=at
    ),
    "ends, gradient": lambda x, at: jax.grad(
        lambda x: jnp.sum(
            jax_fa.npu_fusion_attention(x, x, x, N, "TND", actual_seq_qlen=at, actual_seq_kvlen=at)[0]
        )
    )(x[0]),
    "ends, prefix": lambda x, at: jax_fa.flash_attention_score(
        x[0], x[0], x[0], head_num=N, input_layout="TND", sparse_mode=6, prefix=_lengths(at), actual_seq_qlen=at,
        actual_seq_kvlen=at,
    ),
    "prefix": lambda x, at: jax_fa.flash_attention_score(
        x, x, x, head_num=N, input_layout="BSND", sparse_mode=5, prefix=at[:2]
    ),
}  # fmt: skip


def _lengths(ends: list[int]) -> list[int]:
    return np.diff(ends, prepend=0).tolist()


@pytest.mark.parametrize("name", _INTEGERS)
def test_lists_of_integers_are_data_outside_of_jit(name):
    """Where CANN is not asked. As they are parts of a program they give the same."""
    call, x = _INTEGERS[name], _normal(2, S, N, D)
    assert _compilations(lambda: call(x, [3, 11, S])) > 0
    found = []
    assert _compilations(lambda: found.append(call(x, [7, 9, S]))) == 0
    want = jax.jit(lambda x: call(x, [7, 9, S]))(x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found[0], want)


_SCALARS: dict[str, Callable[[jax.Array, Any], Any]] = {
    "scale": lambda x, a: jax_fa.flash_attention(x, x, x, scale=a),
    "scale, gradient": lambda x, a: jax.grad(lambda a: jnp.sum(jax_fa.flash_attention(x, x, x, scale=a)))(a),
    "scale of jax.nn": lambda x, a: jax_fa.dot_product_attention(x, x, x, scale=a, is_causal=True),
    "scale of pages": lambda x, a: jax_fa.paged_attention(
        x[:, 0], x, x, jnp.array([[0, 1], [1, 1]]), jnp.array([30, 3]), scale=a
    ),
    "scale of torch_npu": lambda x, a: jax_fa.npu_fusion_attention(x, x, x, N, "BSND", scale=a)[0],
    "soft cap": lambda x, a: jax_fa.flash_attention(x, x, x, logits_soft_cap=a),
    "dropout": lambda x, a: jax_fa.flash_attention(
        x, x, x, dropout_rate=a - 0.5, dropout_key=jax.random.key(0)
    ),
}


@pytest.mark.parametrize("name", _SCALARS)
def test_arrays_of_one_number_are_data_outside_of_jit(name):
    """A loop whose temperature is annealed is one program. As parts of a program they give the same."""
    call, x = _SCALARS[name], _normal(2, S, N, D)
    assert _compilations(lambda: call(x, jnp.float32(0.75))) > 0
    found, other = [], jnp.float32(0.625)
    assert _compilations(lambda: found.append(call(x, other))) == 0
    want = jax.jit(lambda x: call(x, other))(x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found[0], want)


@pytest.mark.parametrize("name", ["everything", "bfloat16-causal"])
def test_results_are_bitwise_repeatable(name, backend):
    """The same program twice, and the same program compiled anew."""
    case = BY_NAME[name]
    dout, dlse = case.cotangents()
    args = (case.stored_operands(), case.stored(dout), dlse)

    def program():
        return jax.jit(lambda *x: case.gradient(*x, implementation=backend))

    run = program()
    first, again = run(*args), run(*args)
    anew = []
    assert _compilations(lambda: anew.append(program()(*args))) == 1
    for other in (again, anew[0]):
        jax.tree.map(np.testing.assert_array_equal, first, other)
