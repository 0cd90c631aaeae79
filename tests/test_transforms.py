"""jit, scan, remat, second derivatives, export: the transformations that are not vmap or sharding."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import some_pairs

import jax_fa
from jax_fa.masks import Causal, CumulativeLengths, Lengths, Prefix, SegmentIds, SlidingWindow
from jax_fa.testing import oracle
from jax_fa.testing.cases import BY_NAME, check
from jax_fa.testing.programs import primitives

OUT, STATS = "flash_attention_out", "flash_attention_stats"
SQ, N, K, D = 37, 4, 2, 8


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _layer(backend, x, w):
    """Self-attention with a residual connection."""
    qkv = (x @ w).reshape(*x.shape[:2], N + 2 * K, D)
    q, k, v = qkv[:, :, :N], qkv[:, :, N : N + K], qkv[:, :, N + K :]
    return x + jax_fa.flash_attention(q, k, v, mask=Causal(), implementation=backend).reshape(x.shape)


X = _normal(2, SQ, N * D)
W = _normal(3, N * D, (N + 2 * K) * D) / 8


# --- scan and remat


@pytest.mark.parametrize("policy", [None, (OUT, STATS)], ids=["plain", "keep-results"])
def test_scan_over_layers_with_remat(policy, backend):
    """jit(grad(scan(remat(layer)))) is the gradient of the layers one after the other."""
    keep = None if policy is None else jax.checkpoint_policies.save_only_these_names(*policy)
    layer = jax.checkpoint(partial(_layer, backend), policy=keep)

    def scanned(x, w):
        return jnp.sum(jnp.sin(jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0]))

    def one_by_one(x, w):
        for i in range(len(w)):
            x = _layer(backend, x, w[i])
        return jnp.sum(jnp.sin(x))

    found = jax.jit(jax.value_and_grad(scanned, argnums=(0, 1)))(X, W)
    want = jax.value_and_grad(one_by_one, argnums=(0, 1))(X, W)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, want)


@pytest.mark.parametrize(
    ("names", "forwards"),
    [((OUT, STATS), 1), ((OUT,), 2), ((STATS,), 2), ((), 2)],
    ids=["out+stats", "out", "stats", "nothing"],
)
def test_kept_results_save_the_second_forward(names, forwards):
    """A remat policy that keeps output and statistics runs the forward once; any other runs it twice."""
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    layer = jax.checkpoint(partial(_layer, None), policy=policy)
    found = primitives(jax.grad(lambda x, w: jnp.sum(layer(x, w))), X, W[0])
    assert (found["flash_attention_fwd"], found["flash_attention_bwd"]) == (forwards, 1)


def test_what_nobody_uses_is_not_computed():
    """The gradient of key alone still needs the one backward; no gradient needs none."""
    q, kv = _normal(1, 9, N, D), _normal(1, 9, K, D)

    def loss(k):
        return jnp.sum(jax_fa.flash_attention(q, k, kv))

    assert primitives(loss, kv)["flash_attention_bwd"] == 0
    assert primitives(jax.grad(loss), kv)["flash_attention_bwd"] == 1


# --- forward mode and second derivatives


def _second_order(attention):
    def loss(qkv):
        return jnp.sum(jnp.sin(attention(*qkv)))

    return loss


SMALL = tuple(_normal(1, n, heads, 2) for n, heads in ((3, 2), (4, 1), (4, 1)))


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3, "local_window_size": 1}], ids=str
)
def test_hessian(options, backend):
    """jax.hessian (forward over reverse), against the hessian of jax.nn."""
    ours = _second_order(partial(jax_fa.dot_product_attention, implementation=backend, **options))
    theirs = _second_order(partial(jax.nn.dot_product_attention, **options))
    found, want = jax.jit(jax.hessian(ours))(SMALL), jax.jit(jax.hessian(theirs))(SMALL)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, want)


def test_hessian_vector_product(backend):
    """jvp(grad) over several tiles and with a bias, against jax.nn."""
    primals = (_normal(1, SQ, 2, 4), _normal(1, 45, 1, 4), _normal(1, 45, 1, 4), _normal(2, SQ, 45))
    tangents = tuple(np.roll(x, 1) for x in primals)

    def product(attention):
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(attention(*x, is_causal=True))))
        return jax.jit(lambda x, t: jax.jvp(gradient, (x,), (t,)))(primals, tangents)

    found = product(partial(jax_fa.dot_product_attention, implementation=backend))
    want = product(jax.nn.dot_product_attention)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, want)


@pytest.mark.parametrize("is_causal", [False, True], ids=["all-tiles", "tiles-by-mask"])
def test_reverse_over_reverse(is_causal, backend):
    """grad(grad), as for a gradient penalty, over several tiles, against jax.nn."""
    q, kv = _normal(1, SQ, 2, 4), _normal(1, 45, 1, 4)

    def penalty(attention):
        gradient = jax.grad(lambda q: jnp.sum(jnp.sin(attention(q, kv, kv, is_causal=is_causal))))
        return jax.jit(jax.grad(lambda q: jnp.sum(gradient(q) ** 2)))(q)

    found = penalty(partial(jax_fa.dot_product_attention, implementation=backend))
    np.testing.assert_allclose(found, penalty(jax.nn.dot_product_attention), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("what", "dtype"),
    some_pairs(["parts", "parts, sinks", "sinks, largest", "logsumexp"], ["float32", "bfloat16"], every=2),
)
def test_linear_transpose_of_what_statistics_multiply(what, dtype):
    """They do not depend on value: unions, the largest logit beside sinks, and a caller's own merge."""
    q, k, v, ct = (jnp.asarray(_normal(2, 9, heads, 4), dtype) for heads in (4, 2, 2, 4))

    def attend(v):
        out, *others = jax.tree.leaves(
            jax_fa.flash_attention(
                *(q, k, v),
                mask=Lengths(key=2) | SlidingWindow(2, 0) if "parts" in what else None,
                sinks=jnp.linspace(-1, 1, 4) if "sinks" in what else None,
                return_max_logits="largest" in what,
                return_logsumexp="logsumexp" in what,
            )
        )
        weights = jnp.swapaxes(others[0], 1, 2)[..., None] if "logsumexp" in what else 1
        return out * jnp.asarray(weights, dtype)

    (want,) = jax.vjp(attend, v)[1](ct)
    for run in (attend, jax.jit(attend), jax.checkpoint(attend)):
        (found,) = jax.linear_transpose(run, v)(ct)
        np.testing.assert_allclose(*(np.float32(x) for x in (found, want)), rtol=1e-2, atol=1e-6)


def test_linear_transpose(backend):
    """jax.linear_transpose in value, in which attention is linear, against jax.nn; in no other."""
    q, k, v, ct = (_normal(2, 9, heads, 4) for heads in (4, 2, 2, 4))

    def transpose(attention):
        run = partial(attention, is_causal=True)
        return jax.jit(lambda q, ct: jax.linear_transpose(lambda v: run(q, k, v), v)(ct)[0])(q, ct)

    found = transpose(partial(jax_fa.dot_product_attention, implementation=backend))
    np.testing.assert_allclose(found, transpose(jax.nn.dot_product_attention), rtol=1e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match="linear in value alone, and has no transpose in query"):
        jax.linear_transpose(lambda q: jax_fa.dot_product_attention(q, k, v), q)(ct)


# --- export


def _specs(batch) -> list:
    shapes = [(batch, SQ, N, D), (batch, SQ, K, D), (batch, SQ, K, D)]
    return [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]


def _attend_and_gradient(q, k, v):
    def loss(q, k, v):
        out = jax_fa.flash_attention(q, k, v, mask=Causal())
        return jnp.sum(jnp.sin(out)), out

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)


def _second_derivatives(q, k, v):
    """A jvp, a Hessian-vector product, and the gradient of a jvp and of a gradient."""
    x, along = (q, k, v), (jnp.cos(q), jnp.sin(k), jnp.cos(v))

    def attend(x):
        return jax_fa.flash_attention(*x, mask=Causal())

    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(attend(x))))
    return (
        jax.jvp(attend, (x,), (along,)),
        jax.jvp(gradient, (x,), (along,)),
        jax.grad(lambda x: jnp.sum(jnp.sin(jax.jvp(attend, (x,), (along,))[1])))(x),
        jax.vjp(gradient, x)[1](along),
    )


@pytest.mark.parametrize("function", [_attend_and_gradient, _second_derivatives])
@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda", "tpu")], ids="+".join)
def test_export(platforms, function):
    """Exported for one platform or several, with derivatives, and called on the CPU."""
    x = [_normal(2, *spec.shape[1:]) for spec in _specs(2)]
    run = jax.jit(function)
    exported = jax.export.export(run, platforms=platforms)(*_specs(2))
    assert exported.platforms == platforms
    found = jax.tree.leaves(exported.call(*x))
    for a, b in zip(found, jax.tree.leaves(run(*x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_export_with_a_symbolic_batch():
    """One exported program for every batch size."""
    (batch,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(_attend_and_gradient), platforms=("cpu",))(*_specs(batch))
    for size in (1, 3):
        q, k, v = (_normal(size, *spec.shape[1:]) for spec in _specs(size))
        (_, out), gradients = exported.call(q, k, v)
        want = oracle.attention(q, k, v, visible=oracle.causal(SQ, SQ))
        np.testing.assert_allclose(out, want.out, atol=1e-5)
        for found, right in zip(gradients, want.gradients(np.cos(want.out)).values(), strict=True):
            np.testing.assert_allclose(found, right, atol=1e-4)


def test_export_of_second_derivatives_with_a_symbolic_length():
    (length,) = jax.export.symbolic_shape("s")
    specs = [jax.ShapeDtypeStruct((2, length, n, D), jnp.float32) for n in (N, K, K)]
    run = jax.jit(_second_derivatives)
    exported = jax.export.export(run, platforms=("cpu",))(*specs)
    x = [_normal(2, 150, n, D) for n in (N, K, K)]
    for a, b in zip(jax.tree.leaves(exported.call(*x)), jax.tree.leaves(run(*x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# --- results are finite


@pytest.mark.parametrize("name", ["mask-lengths", "mask-nothing", "everything", "float16-causal"])
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_nan_and_inf_detectors_stay_quiet(name, jit, backend):
    """Rows that see nothing and padding make neither NaN nor infinity, nowhere on the way."""
    case = BY_NAME[name]
    dout, dlse = case.cotangents()
    operands, arrays = case.stored_operands(), case.arrays()

    def gradient(operands, arrays, dout, dlse):
        return case.gradient(operands, dout, dlse, implementation=backend, **arrays)

    with jax.debug_nans(True), jax.debug_infs(True):
        run = jax.jit(gradient) if jit else gradient
        (out, lse), gradients = jax.block_until_ready(run(operands, arrays, case.stored(dout), dlse))
    check(case, out, lse, gradients)


def test_nan_detector_speaks():
    """... while a real NaN is reported."""
    x = _normal(1, 9, 1, 2)
    x[0, 3] = np.nan
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        jax.block_until_ready(jax_fa.flash_attention(x, x, x))


@pytest.mark.parametrize("entry", ["dot_product_attention", "flash_attention", "flash_attention_score"])
def test_strict_settings_of_the_caller_are_theirs(entry):
    """jax_numpy_rank_promotion="raise" and strict dtype promotion hold for the caller's code, not for ours."""
    x = jnp.ones((2, 9, 2, 4))
    calls = {
        "dot_product_attention": lambda q: jax_fa.dot_product_attention(
            q,
            x,
            x,
            jnp.ones((1, 9)),
            is_causal=True,
            query_seq_lengths=jnp.array([3, 9]),
            local_window_size=4,
            return_residual=True,
            dropout_rate=0.5,
            dropout_key=jax.random.key(0),
        ),
        "flash_attention": lambda q: jax_fa.flash_attention(
            q,
            x,
            x,
            mask=jax_fa.masks.Prefix(jnp.array([1, 2])),
            alibi_slopes=jnp.ones(2),
            return_logsumexp=True,
        ),
        "flash_attention_score": lambda q: jax_fa.flash_attention_score(
            q, x, x, jnp.ones((1, 2, 9, 9)), head_num=2, input_layout="BSND", sparse_mode=3
        ),
    }

    def loss(q):
        return sum(jnp.sum(part) for part in jax.tree.leaves(calls[entry](q)))

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert jnp.isfinite(jax.jit(jax.grad(loss))(x)).all()
        assert jnp.isfinite(jax.grad(loss)(x)).all()
        tangent = jax.jvp(jax.grad(loss), (x,), (x,))[1]
    assert jnp.isfinite(tangent).all()


def _paged(q, k, v):
    table, lengths = jnp.zeros((2, 1), jnp.int32), jnp.full(2, 5)
    return jax_fa.paged_attention(q[:, :1], k, v, table, lengths, implementation="xla")


PRECISE = {
    "flash_attention": partial(jax_fa.flash_attention, mask=Causal(), implementation="xla"),
    "paged_attention": _paged,
}


@pytest.mark.parametrize("derivative", ["none", "gradient", "second", "third"])
@pytest.mark.parametrize("entry", PRECISE)
def test_the_precision_is_that_where_the_call_is_traced(entry, derivative):
    """Also of gradients, as JAX has it; a program is lowered when the context is gone."""

    def run(*x):
        with jax.default_matmul_precision("highest"):
            return PRECISE[entry](*x)

    def gradient(*x):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(run(*x))), (0, 1, 2))(*x)

    def second(*x):
        return jax.jvp(gradient, x, x)

    def third(*x):
        return jax.jvp(second, x, x)

    functions = {"none": run, "gradient": gradient, "second": second, "third": third}
    traced = jax.jit(functions[derivative]).trace(*(_normal(2, 9, heads, 8) for heads in (4, 2, 2)))
    products = re.findall(r"stablehlo\.dot_general.*", traced.lower(lowering_platforms=("tpu",)).as_text())
    assert products and all("HIGHEST" in line for line in products)


@pytest.mark.parametrize("derivative", [False, True])
def test_float64_where_another_thread_or_context_lowers(derivative):
    """`jax.enable_x64` holds for what traces the call."""

    def run(*x):
        return jnp.sum(jnp.sin(jax_fa.flash_attention(*x, mask=Causal())))

    with jax.enable_x64(True):
        x = [jnp.asarray(_normal(2, 9, heads, 8), jnp.float64) for heads in (4, 2, 2)]
        function = jax.jit(jax.grad(run, (0, 1, 2)) if derivative else run)
        traced, want = function.trace(*x), function(*x)
    found = traced.lower().compile()(*x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), found, want)


def test_export_of_segments_with_symbolic_lengths():
    """Masks search sorted ends and ids whose number is not known when they are exported."""
    batch, length = jax.export.symbolic_shape("b, s")
    x = np.random.default_rng(0).standard_normal((2, 19, 2, 8)).astype(np.float32)
    ids = np.random.default_rng(1).integers(0, 3, (2, 19)).astype(np.int32)
    ends = np.array([[4, 4, 11], [0, 7, 19]], np.int32)

    def run(x, ids, ends):
        packed = CumulativeLengths(ends, within=Causal())
        segments = SegmentIds(ids, within=Causal("bottom-right"))
        prefixes = CumulativeLengths(ends, within=Prefix(jnp.maximum(ends - 2, 0)))
        twice = segments & SegmentIds(ids // 2, within=Prefix(ids))
        given = (packed, segments, prefixes, twice)
        return [jax_fa.flash_attention(x, x, x, mask=mask) for mask in given]

    shapes = ((batch, length, 2, 8), jnp.float32), ((batch, length), jnp.int32), ((batch, 3), jnp.int32)
    program = jax.export.export(jax.jit(run))(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    for found, want in zip(program.call(x, ids, ends), run(x, ids, ends), strict=True):
        np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-5)
