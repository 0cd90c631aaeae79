"""Derivatives along tangents and of second order, against those of a dense attention in float64."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.jet import jet
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from tables import mostly_slow

import jax_fa
from jax_fa.testing import derivatives, oracle, programs
from jax_fa.testing.cases import BY_NAME, CASES, FEATURES, REAL_TILES, Case, expected

# --- the table

# A tangent of logits of some hundreds exceeds 16 bits: the naive implementation, which is the measure, overflows.
_SECOND = tuple(case for case in CASES if not (case.spread >= 500 and case.dtype in ("bfloat16", "float16")))


def _directions(case: Case) -> dict[str, Any]:
    """As the case stores its operands: x, its tangents, the cotangents z, and theirs."""
    z, z_tangent = case.cotangents(), derivatives.cotangent_tangents(case)
    return {
        "x": case.stored_operands(),
        "x_tangent": derivatives.stored(case, derivatives.tangents(case)),
        "y_tangent": derivatives.stored(case, derivatives.tangents(case, "other tangents")),
        "z": (case.stored(z[0]), z[1]),
        "z_tangent": (case.stored(z_tangent[0]), z_tangent[1]),
    }


def _gradients(attend, x, z):
    return jax.vjp(attend, x)[1](z)[0]


def _tangent(attend, x, x_tangent):
    return jax.jvp(attend, (x,), (x_tangent,))[1]


_TANGENT = (
    *FEATURES,
    *(case for case in CASES if case.dtype != "float32" or case.name.startswith("lengths")),
)


@pytest.mark.one_in(4)
@pytest.mark.in_turn
@pytest.mark.parametrize("case", mostly_slow(_TANGENT, of=CASES), ids=str)
def test_tangent(case, backend):
    """jax.jvp of the output and the log-sum-exp."""
    attend = partial(case.flash_attention, implementation=backend)
    with case.context():
        at = _directions(case)
        run = jax.jit(lambda x, t: jax.jvp(attend, (x,), (t,)))
        _, found = run(at["x"], at["x_tangent"])
    derivatives.check(case, "tangent", found)
    _check_masked_rows(case, found)


def _check_masked_rows(case: Case, found) -> None:
    """0 exactly."""
    if case.mask is not None:
        masked = ~np.broadcast_to(case.visible(), case.full).any(axis=-1)
        assert not case.canonical(found[0])[np.moveaxis(masked, -1, -2)].any()
        assert not np.asarray(found[1])[masked].any()


@pytest.mark.one_in(4)
@pytest.mark.in_turn(1)
@pytest.mark.parametrize("case", mostly_slow(FEATURES, of=_SECOND), ids=str)
def test_double_backward(case, backend):
    """The gradient of <x', gradients>, by the operands and by the cotangents."""
    gradients = partial(_gradients, partial(case.flash_attention, implementation=backend))
    with case.context():
        at = _directions(case)
        run = jax.jit(lambda x, z, t: jax.vjp(gradients, x, z)[1](t))
        of_operands, of_cotangents = run(at["x"], at["z"], at["x_tangent"])
    derivatives.check(case, "second", of_operands)
    derivatives.check(case, "tangent", of_cotangents)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "case",
    mostly_slow([BY_NAME[n] for n in ("mqa", "everything", "bfloat16-bias")], of=_SECOND),
    ids=str,
)
def test_every_second_order(case, backend):
    """Forward over reverse, reverse over forward, and forward over forward."""
    attend = partial(case.flash_attention, implementation=backend)
    tangent, gradients = partial(_tangent, attend), partial(_gradients, attend)

    def run(x, x_tangent, y_tangent, z, z_tangent):
        return {
            "mixed": jax.jvp(gradients, (x, z), (x_tangent, z_tangent))[1],
            # <z, tangent> and <x', gradients> are one function.
            "second": jax.vjp(lambda x: tangent(x, x_tangent), x)[1](z)[0],
            "second_tangent": jax.jvp(lambda x: tangent(x, x_tangent), (x,), (y_tangent,))[1],
        }

    with case.context():
        found = jax.jit(run)(**_directions(case))
    for what, x in found.items():
        derivatives.check(case, what, x)
    _check_masked_rows(case, found["second_tangent"])


@pytest.mark.parametrize("case", [c for c in REAL_TILES if c in CASES and c.dtype == "float32"], ids=str)
def test_with_the_tiles_of_the_library(case, backend, real_tiles):
    attend = partial(case.flash_attention, implementation=backend)

    def run(x, x_tangent, y_tangent, z, z_tangent):
        still = jax.tree.map(jnp.zeros_like, z)
        return {
            "tangent": _tangent(attend, x, x_tangent),
            "second": jax.jvp(partial(_gradients, attend), (x, z), (x_tangent, still))[1],
        }

    for what, found in jax.jit(run)(**_directions(case)).items():
        derivatives.check(case, what, found)


# --- what the oracle is worth


@pytest.mark.parametrize("case", [BY_NAME["everything"], BY_NAME["mask-lengths"]], ids=str)
def test_the_oracle_itself(case):
    """Its derivatives are the central differences of its results, and its results those of the other oracle."""
    with jax.enable_x64(True):
        at = derivatives.directions(case, "float64")
        attend = jax.jit(partial(derivatives.attention, constants=derivatives.constants(case, "float64")))

        def gradients(x, z):
            return jax.jit(partial(_gradients, attend))(x, z)

        def difference(function, points, tangents):
            """Along the tangents."""
            h = 2e-6
            up, down = (
                function(*jax.tree.map(lambda x, t, h=h: x + h * t, points, tangents)) for h in (h, -h)
            )
            return jax.tree.map(lambda a, b: (a - b) / (2 * h), up, down)

        still = jax.tree.map(np.zeros_like, at.z)
        want = derivatives.Derivatives(
            tangent=difference(attend, (at.x,), (at.x_tangent,)),
            second=difference(gradients, (at.x, at.z), (at.x_tangent, still)),
            mixed=difference(gradients, (at.x, at.z), (at.x_tangent, at.z_tangent)),
            second_tangent=difference(
                jax.jit(lambda x: _tangent(attend, x, at.x_tangent)), (at.x,), (at.y_tangent,)
            ),
        )
        found = derivatives.dense_derivatives(case, "float64")
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), found, want)
        results, first = (
            derivatives.of_case(case, attend(at.x)),
            derivatives.of_case(case, gradients(at.x, at.z)),
        )
    right, want_first = expected(case)
    np.testing.assert_allclose(results.out, right.out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(results.lse, right.lse, rtol=1e-12, atol=1e-12)
    for name, x in first.items():
        np.testing.assert_allclose(x, want_first[name], rtol=1e-10, atol=1e-10)


# --- finite differences


def _in_float64() -> list:
    """The rows of the table that differ in float64."""
    # Peaked rows are no rows of finite differences.
    kept = {
        replace(c, name="", dtype="float64", bias_dtype=None, feature=True): c for c in CASES if c.spread == 1
    }
    few = ("everything", "mask-segments_mixed")
    return [
        pytest.param(
            replace(c, name=case.name), id=case.name, marks=() if case.name in few else pytest.mark.slow
        )
        for c, case in kept.items()
    ]


@pytest.mark.parametrize("case", _in_float64())
def test_finite_differences(case):
    """Both modes over both modes, on the portable backend."""
    with case.context():
        x = jax.tree.map(jnp.asarray, case.stored_operands())
        attend = partial(case.flash_attention, implementation="xla")
        check_grads(attend, (x,), order=2, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4)


def test_traced_scalars(backend):
    """Scale and soft cap that are data have derivatives, too."""
    case = BY_NAME["soft-cap"]
    x, dense = case.operands(), derivatives.directions(case, "float64")
    scalars, direction = {"scale": 0.3, "soft_cap": 1.7}, {"scale": 0.2, "soft_cap": -0.4}
    z = case.cotangents()

    def attend(x):
        x = dict(x)
        cap = x.pop("soft_cap")
        return jax_fa.flash_attention(
            **x, mask=case.library_mask(), logits_soft_cap=cap, implementation=backend, return_logsumexp=True
        )

    def run(attend, x, t, z):
        still = jax.tree.map(jnp.zeros_like, z)
        return {
            "tangent": _tangent(attend, x, t),
            "second": jax.jvp(partial(_gradients, attend), (x, z), (t, still))[1],
        }

    found = jax.jit(partial(run, attend))(x | scalars, derivatives.tangents(case) | direction, z)
    with jax.enable_x64(True):
        attend = partial(derivatives.attention, constants=derivatives.constants(case, "float64"))
        want = jax.jit(partial(run, attend))(dense.x | scalars, dense.x_tangent | direction, dense.z)
        want_of_case = {name: derivatives.of_case(case, x) for name, x in want.items()}
    for a, b in zip(found["tangent"], want_of_case["tangent"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    for name, b in want_of_case["second"].items():
        np.testing.assert_allclose(found["second"][name], b, rtol=1e-4, atol=1e-4, err_msg=name)


# --- transformations, against those of jax.nn


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


B, S, N, D = 2, 5, 2, 3
X = {"q": _normal(B, S, N, D), "kv": _normal(B, S, 1, D)}
T = jax.tree.map(lambda x: np.roll(x, 1), X)


def _attend(attention, x):
    """A function of two arrays, smooth and of all their elements."""
    return jnp.sin(attention(x["q"], x["kv"], jnp.cos(x["kv"]), is_causal=True))


def _loss(f, x):
    return jnp.sum(f(x) ** 2)


def _penalty(f, x):
    return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(partial(_loss, f))(x)))


# By name: (function, x, tangents) -> results.
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, x, t: jax.jvp(f, (x,), (t,)),
    "linearize": lambda f, x, t: jax.linearize(f, x)[1](t),
    "vjp": lambda f, x, t: jax.vjp(f, x)[1](f(t)),
    "jacfwd": lambda f, x, t: jax.jacfwd(f)(x),
    "jacrev": lambda f, x, t: jax.jacrev(f)(x),
    "hessian": lambda f, x, t: jax.hessian(partial(_loss, f))(x),
    "jvp of jvp": lambda f, x, t: jax.jvp(lambda x: jax.jvp(f, (x,), (t,))[1], (x,), (t,)),
    "jvp of grad": lambda f, x, t: jax.jvp(jax.grad(partial(_loss, f)), (x,), (t,)),
    "grad of jvp": lambda f, x, t: jax.grad(lambda x: jnp.sum(jax.jvp(f, (x,), (t,))[1] ** 2))(x),
    "grad of grad": lambda f, x, t: jax.grad(partial(_penalty, f))(x),
}
KEEP = jax.checkpoint_policies.save_only_these_names(jax_fa.OUT_NAME, jax_fa.STATS_NAME)


def _twice(f, x):
    """A scan over two layers."""
    return jax.lax.scan(lambda x, _: (x | {"q": f(x)}, None), x, None, length=2)[0]["q"]


def _on_two_devices(f, x):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])
    return jax.shard_map(f, mesh=mesh, in_specs=P("x"), out_specs=P("x"))(x)


def _shared_keys(f, x):
    """Every device has queries of its own and all keys, which collect the derivatives of all devices."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])
    specs = {"q": P(None, None, "x"), "kv": P()}
    return jax.shard_map(f, mesh=mesh, in_specs=(specs,), out_specs=specs["q"])(x)


# By name: what a transformation is taken of, and what is taken of it.
PLACES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "jit": (lambda f, x: f(x), jax.jit),
    "eager": (lambda f, x: f(x), lambda run: run),
    "vmap": (
        lambda f, x: f(jax.tree.map(lambda a: a[None], x))[0],
        lambda run: jax.jit(jax.vmap(run, in_axes=({"q": 0, "kv": 0}, 0))),
    ),
    "vmap-shared": (
        lambda f, x: f(jax.tree.map(lambda a: a[None], x))[0],
        lambda run: jax.jit(jax.vmap(run, in_axes=({"q": 0, "kv": None}, {"q": None, "kv": 0}))),
    ),
    "scan": (_twice, jax.jit),
    "remat": (lambda f, x: jax.checkpoint(f)(x), jax.jit),
    "remat-keep": (lambda f, x: jax.checkpoint(f, policy=KEEP)(x), jax.jit),
    "shard_map": (_on_two_devices, jax.jit),
    "shard_map-shared": (_shared_keys, jax.jit),
}
# By default those that the others do not have.
_PLACES = mostly_slow(
    [place for place in PLACES if place not in ("eager", "vmap", "remat", "shard_map")], of=PLACES
)


@cache
def _by_jax_nn(place: str) -> dict[str, Any]:
    """Every transformation of jax.nn; a place has no effect on numbers but by what it computes."""
    of, taken = PLACES[place] if place in ("vmap", "vmap-shared", "scan") else PLACES["jit"]
    run = partial(of, partial(_attend, jax.nn.dot_product_attention))
    x, t = _arguments(place)
    return taken(lambda x, t: {name: transform(run, x, t) for name, transform in TRANSFORMS.items()})(x, t)


def _arguments(place: str):
    """One example each where vmap does not map."""
    if place != "vmap-shared":
        return X, T
    return X | {"kv": X["kv"][0]}, T | {"q": T["q"][0]}


@pytest.mark.one_in(4)
@pytest.mark.in_turn
@pytest.mark.parametrize("place", _PLACES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformation(name, place, backend):
    of, taken = PLACES[place]
    attention = partial(jax_fa.dot_product_attention, implementation=backend)
    run = partial(of, partial(_attend, attention))
    found = taken(partial(TRANSFORMS[name], run))(*_arguments(place))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), found, _by_jax_nn(place)[name])


@pytest.mark.in_turn
@pytest.mark.parametrize("length", [1, 100, 1024, pytest.param(4096, marks=pytest.mark.slow)])
def test_lengths(length, backend, real_tiles):
    """Jvp, hvp and double backward of short and long sequences."""
    x = {"q": _normal(1, length, 1, 8), "kv": _normal(1, length, 1, 8)}
    t = jax.tree.map(lambda x: np.roll(x, 1), x)

    def run(attention):
        f = partial(_attend, attention)
        names = ("jvp", "jvp of grad", "grad of grad")
        return jax.jit(lambda x, t: {name: TRANSFORMS[name](f, x, t) for name in names})(x, t)

    found = run(partial(jax_fa.dot_product_attention, implementation=backend))
    want = run(jax.nn.dot_product_attention)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), found, want)


_DROP_IN = {
    "bias": {"bias": _normal(1, 4, 1, 19), "scale": 0.4},
    "mask": {"mask": np.tri(13, 19, 3, bool)},
    "window": {"local_window_size": (4, 2)},
    "lengths": {"key_value_seq_lengths": np.array([19, 7], np.int32), "is_causal": True},
}


@pytest.mark.in_turn
@pytest.mark.parametrize("name", _DROP_IN)
def test_drop_in(name, backend):
    """jax.jvp of jax.nn.dot_product_attention in float64 is the oracle, in float32 the measure."""
    options = dict(_DROP_IN[name])
    x = [_normal(2, 13, 4, 8), _normal(2, 19, 2, 8), _normal(3, 19, 2, 8)[:2]]
    x += [options.pop("bias")] if "bias" in options else []
    t = [np.roll(a, 1) for a in x]

    def run(attention, x, t):
        def attend(q, k, v, *bias):
            return attention(q, k, v, *bias, **options)

        def gradients(*x):
            return jax.grad(lambda *x: jnp.sum(attend(*x) ** 2), argnums=tuple(range(len(x))))(*x)

        return jax.jit(lambda x, t: (jax.jvp(attend, x, t), jax.jvp(gradients, x, t)))(tuple(x), tuple(t))

    found = run(partial(jax_fa.dot_product_attention, implementation=backend), x, t)
    by_naive = run(jax.nn.dot_product_attention, x, t)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x, t = ([a.astype(np.float64) for a in arrays] for arrays in (x, t))
        want = run(jax.nn.dot_product_attention, x, t)
    floor = oracle.FLOOR["float32"]
    for ours, right, theirs in zip(*map(jax.tree.leaves, (found, want, by_naive)), strict=True):
        oracle.assert_close_to_oracle(ours, right, theirs, name, floor)


def test_the_score_entry():
    """The other entry differentiates as often."""
    q, kv = _normal(2, 9, 2, 8), _normal(2, 11, 2, 8)

    def score(q, kv):
        return jax_fa.flash_attention_score(q, kv, kv, head_num=2, input_layout="BSND", scale_value=0.3)[2]

    def ours(q, kv):
        return jax_fa.flash_attention(q, kv, kv, scale=0.3)

    def run(f):
        def gradient(q):
            return jax.grad(lambda q: jnp.sum(f(q, kv) ** 2))(q)

        return jax.jvp(f, (q, kv), (q, kv)), jax.jvp(gradient, (q,), (q,)), jax.vjp(gradient, q)[1](q)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), run(score), run(ours))


def _flax_layer(ours: bool):
    linen = pytest.importorskip("flax.linen")
    from jax_fa.integrations import flax

    attention = {"attention_fn": flax.attention_fn} if ours else {}
    layer = linen.MultiHeadDotProductAttention(num_heads=2, **attention)
    parameters = layer.init(jax.random.key(0), jnp.ones((1, 3, 8)))
    return lambda x: layer.apply(parameters, x)


def _equinox_layer(ours: bool):
    layers = pytest.importorskip("equinox").nn
    from jax_fa.integrations import equinox

    layer = (equinox if ours else layers).MultiheadAttention(2, 8, key=jax.random.key(0))
    return lambda x: layer(x[0], x[0], x[0])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layer", [_flax_layer, _equinox_layer])
def test_layers_of_other_libraries(layer):
    """Their derivatives are those of the libraries' own attention."""
    x = _normal(1, 7, 8)

    def run(f):
        gradient = jax.grad(lambda x: jnp.sum(f(x) ** 2))
        return jax.jvp(f, (x,), (x,)), jax.jvp(gradient, (x,), (x,)), jax.vjp(gradient, x)[1](x)

    found, want = run(layer(ours=True)), run(layer(ours=False))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, want)


# --- the third order


def test_third_order_in_forward_mode(backend):
    """Forward mode goes on over both modes."""

    def run(attention):
        f = partial(_attend, attention)
        gradient = jax.grad(partial(_loss, f))

        def along(function):
            return lambda x: jax.jvp(function, (x,), (T,))[1]

        return jax.jit(lambda x: (along(along(along(f)))(x), along(along(gradient))(x)))(X)

    found = run(partial(jax_fa.dot_product_attention, implementation=backend))
    want = run(jax.nn.dot_product_attention)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), found, want)


def test_third_order_in_reverse_mode_is_refused(backend):
    """By one error that says what is served, whatever is under it."""
    f = partial(_attend, partial(jax_fa.dot_product_attention, implementation=backend))
    loss = partial(_loss, f)

    def penalty(x):
        return _loss(lambda x: jax.grad(partial(_penalty, f))(x)["q"], x)

    def of_hvp(x):
        return jnp.sum(jax.jvp(jax.grad(loss), (x,), (T,))[1]["q"] ** 2)

    def of_second_tangent(x):
        return jnp.sum(jax.jvp(lambda x: jax.jvp(f, (x,), (T,))[1], (x,), (T,))[1])

    for function in (penalty, of_hvp, of_second_tangent):
        with pytest.raises(NotImplementedError, match=r"of the third order and above in forward mode only"):
            jax.grad(function)(X)


def test_taylor_mode(backend):
    """Coefficients of the third order along a curve; the value stands still, and lengths are integers."""
    x, lengths = (X["q"], X["kv"]), jnp.full(B, S - 1)
    curve = [[_normal(*a.shape) for _ in range(3)] for a in x]

    def run(attention):
        return jet(lambda q, k: attention(q, k, X["kv"], key_value_seq_lengths=lengths), x, curve)

    found = run(partial(jax_fa.dot_product_attention, implementation=backend))
    want = run(jax.nn.dot_product_attention)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, want)


# --- what is not wanted costs nothing


def _equations(function, *args) -> list:
    """Those of ours."""
    found = programs.equations(jax.make_jaxpr(function)(*args))
    return [e for e in found if e.primitive.name.startswith("flash_attention")]


_Q, _KV, _BIAS = _normal(1, 9, 4, 8), _normal(1, 11, 2, 8), _normal(1, 4, 9, 11)


def _with_bias(q, k, v, bias):
    return jax_fa.flash_attention(q, k, v, bias=bias)


@pytest.mark.parametrize("at", range(4), ids=["query", "key", "value", "bias"])
def test_one_operand_alone_is_differentiated(at):
    """Of the others there are neither tangents nor gradients."""
    x = [_Q, _KV, _KV, _BIAS]
    name = ("query", "key", "value", "bias")[at]

    def one(a):
        return _with_bias(*x[:at], a, *x[at + 1 :])

    (jvp,) = _equations(lambda a, t: jax.jvp(one, (a,), (t,)), x[at], x[at])
    assert jvp.primitive.name == "flash_attention_jvp"
    assert len(jvp.invars) == len(x) + 1
    *_, backward = _equations(jax.grad(lambda a: jnp.sum(one(a))), x[at])
    assert backward.primitive.name == "flash_attention_bwd"
    assert backward.params["problem"].gradients == (name,) and len(backward.outvars) == 1

    def gradient(a):
        return jax.grad(lambda a: jnp.sum(one(a)))(a)

    *_, second = _equations(lambda a, t: jax.jvp(gradient, (a,), (t,)), x[at], x[at])
    assert second.primitive.name == "flash_attention_second"
    assert [v.aval.shape for v in second.outvars] == [x[at].shape]


def test_a_jvp_is_one_pass():
    """Under jit, too; and a gradient keeps its forward and its backward, one each."""
    x = (_Q, _KV, _KV, _BIAS)
    names = programs.primitives(jax.jit(lambda *x: jax.jvp(_with_bias, x, x)), *x)
    ours = {name: n for name, n in names.items() if name.startswith("flash_attention")}
    assert ours == {"flash_attention_jvp": 1}
    names = programs.primitives(jax.jit(jax.grad(lambda *x: jnp.sum(_with_bias(*x)))), *x)
    ours = {name: n for name, n in names.items() if name.startswith("flash_attention")}
    assert ours == {"flash_attention_fwd": 1, "flash_attention_bwd": 1}


@pytest.mark.parametrize(("policy", "forwards"), [(KEEP, 1), (None, 2)], ids=["keep", "nothing"])
def test_remat_of_a_double_backward(policy, forwards):
    """What the policy keeps is not computed again by a derivative of any order."""
    f = jax.checkpoint(lambda q: jnp.sin(jax_fa.flash_attention(jnp.sin(q), _KV, _KV)), policy=policy)
    names = programs.primitives(jax.grad(lambda q: jnp.sum(f(q))), _Q)
    assert names["flash_attention_fwd"] == forwards
    gradient = jax.grad(lambda q: jnp.sum(f(q)))
    kept = programs.primitives(jax.grad(lambda q: jnp.sum(gradient(q) ** 2)), _Q)
    assert kept["flash_attention_fwd"] <= 2 * forwards


def test_an_unmapped_bias_has_no_gradient_per_example(backend):
    """vmap over examples sums it in the kernel."""
    size = 6
    q, kv = _normal(size, 9, 4, 8), _normal(size, 11, 2, 8)

    def loss(bias):
        outs = jax.vmap(lambda q, kv: jax_fa.flash_attention(q, kv, kv, bias=bias, implementation=backend))(
            q, kv
        )
        return jnp.sum(jnp.sin(outs))

    (backward,) = (
        e for e in _equations(jax.grad(loss), _BIAS[0]) if e.primitive.name == "flash_attention_bwd"
    )
    assert [v.aval.size for v in backward.outvars] == [_BIAS.size]
    want = sum(
        jax.grad(
            lambda b, i=i: jnp.sum(
                jnp.sin(jax.nn.dot_product_attention(q[i : i + 1], kv[i : i + 1], kv[i : i + 1], b))
            )
        )(_BIAS)
        for i in range(size)
    )
    np.testing.assert_allclose(jax.grad(loss)(_BIAS[0]), want[0], rtol=1e-5, atol=1e-5)

    def hvp(bias):
        return jax.jvp(jax.grad(loss), (bias,), (bias,))[1]

    (second,) = (e for e in _equations(hvp, _BIAS[0]) if e.primitive.name == "flash_attention_second")
    assert all(v.aval.size <= _BIAS.size for v in second.outvars)


# --- what is masked does not leak


@pytest.mark.parametrize("garbage", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)], ids=str)
def test_garbage_in_masked_positions(garbage, backend):
    """Of operands, cotangents and tangents: it changes no bit."""
    case = Case(name="nan-derivatives", mask="lengths", bias="BNQK", dropout=0.2)
    visible = np.broadcast_to(case.visible(), case.full)
    keys = ~np.moveaxis(visible.any(axis=-2), -1, -2)[..., :: case.N // case.K]
    rows = ~np.moveaxis(visible.any(axis=-1), -1, -2)
    hidden = {"query": rows, "key": keys, "value": keys, "out": rows}
    assert keys.any() and rows.any()

    def filled(arrays, filling):
        def fill(name, x):
            x = np.asarray(x)
            where = ~visible if name == "bias" else hidden[name][..., None]
            return np.where(where, np.float32(filling), x)

        return {name: fill(name, x) for name, x in arrays.items()}

    attend = partial(case.flash_attention, implementation=backend)

    @jax.jit
    def run(x, x_tangent, z, z_tangent):
        gradients = partial(_gradients, attend)
        return {
            "tangent": _tangent(attend, x, x_tangent),
            "mixed": jax.jvp(gradients, (x, z), (x_tangent, z_tangent))[1],
            "double backward": jax.vjp(gradients, x, z)[1](x_tangent),
            "second tangent": _tangent(lambda x: _tangent(attend, x, x_tangent), x, x_tangent),
        }

    def results(filling):
        z, z_tangent = case.cotangents(), derivatives.cotangent_tangents(case)
        x, x_tangent = (filled(a, filling) for a in (case.operands(), derivatives.tangents(case)))
        dout, dout_tangent = (filled({"out": a[0]}, filling)["out"] for a in (z, z_tangent))
        return run(x, x_tangent, (dout, z[1]), (dout_tangent, z_tangent[1]))

    clean, dirty = results(0.0), results(garbage)
    for (path, a), b in zip(jax.tree.leaves_with_path(clean), jax.tree.leaves(dirty), strict=True):
        where = jax.tree_util.keystr(path)
        assert np.isfinite(a).all(), where
        np.testing.assert_array_equal(b, a, err_msg=where)
