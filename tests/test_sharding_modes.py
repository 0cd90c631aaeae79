"""Automatic, explicit, manual and partly manual mesh axes: every mask and every derivative is what it is on one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tables import some_pairs

import jax_fa
from jax_fa.masks import (
    Causal,
    CumulativeLengths,
    Dense,
    Lengths,
    Prefix,
    SegmentIds,
    SlidingWindow,
)

DEVICES = jax.devices("cpu")
pytestmark = pytest.mark.skipif(len(DEVICES) < 8, reason="needs eight CPU devices")

B, SQ, SKV, N, K, D = 4, 16, 32, 4, 2, 8
_RANDOM = np.random.default_rng(0)


def _normal(*shape):
    return _RANDOM.standard_normal(shape, np.float32)


def _integers(high, *shape):
    return _RANDOM.integers(0, high, shape).astype(np.int32)


QKV = (_normal(B, SQ, N, D), _normal(B, SKV, K, D), _normal(B, SKV, K, D))
_IDS = np.sort(_integers(3, B, SQ)), np.sort(_integers(3, B, SKV))
_ENDS = np.sort(_integers(SQ, B, 3)), np.sort(_integers(SKV, B, 3))
_LENGTHS = 5 + _integers(SKV - 5, B)
# All hold arrays of the batch.
MASKS = {
    "segments": SegmentIds(*_IDS),
    "segments-of-one-array": Causal() & SegmentIds(_IDS[0], np.pad(_IDS[0], ((0, 0), (0, SKV - SQ)))),
    "segments-mixed": SegmentIds(*(_RANDOM.permuted(x, axis=1) for x in _IDS), within=Causal(), padding_id=0),
    "segments-twice": SegmentIds(*_IDS) & SegmentIds(*(x[:, ::-1] for x in _IDS)),
    "cumulative": CumulativeLengths(*_ENDS),
    "cumulative-window": CumulativeLengths(*_ENDS, within=SlidingWindow(4, 0)),
    "lengths": Causal("bottom-right") & Lengths(key=_LENGTHS),
    "offset": Causal(offset=_integers(9, B)),
    "prefix": Prefix(_LENGTHS % SQ),
    "dense": Dense(_integers(2, B, 1, SQ, SKV).astype(bool)),
}
MESHES = ("auto", "explicit", "explicit-batch", "manual", "partly-manual", "partly-manual-explicit")


def _mesh(kind: str):
    """Four devices along the batch, two along the heads."""
    explicit = kind.startswith("explicit") or kind.endswith("-explicit")
    x = AxisType.Explicit if explicit else AxisType.Auto
    y = AxisType.Auto if kind == "explicit-batch" else x
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(x, y), devices=DEVICES)


_SPEC = P("x", None, "y")


def _on(kind: str, fn, args, out_specs):
    """`fn(qkv, mask)` on a mesh; in shard_map where axes are manual. `out_specs`: of its results, there."""
    qkv, mask = args
    mesh = _mesh(kind)
    with jax.set_mesh(mesh):
        qkv = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, _SPEC)), qkv)
        mask = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("x"))), mask)
        if kind == "manual":
            fn = jax.shard_map(fn, in_specs=((_SPEC,) * 3, P("x")), out_specs=out_specs)
        elif kind.startswith("partly"):
            fn = jax.shard_map(fn, in_specs=(P("x"), P("x")), out_specs=P("x"), axis_names={"x"})
        return jax.jit(fn)(qkv, mask)


def _attend(backend, qkv, mask, **more):
    return jax_fa.flash_attention(*qkv, mask=mask, implementation=backend, **more)


def _same(found, want, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tolerance * max(1, np.max(np.abs(b))))


@pytest.mark.one_in(3)
@pytest.mark.in_turn
@pytest.mark.parametrize(("mask", "mesh"), some_pairs(MASKS, MESHES, every=3))
def test_masks(mask, mesh, backend):
    """Output and gradients where the mask's arrays are sharded like the batch."""

    def run(qkv, mask):
        def loss(qkv):
            out = _attend(backend, qkv, mask)
            return jnp.sum(jnp.sin(out)), out

        return jax.grad(loss, has_aux=True)(qkv)

    want = jax.jit(run)(QKV, MASKS[mask])
    _same(_on(mesh, run, (QKV, MASKS[mask]), ((_SPEC,) * 3, _SPEC)), want)


@pytest.mark.in_turn(1)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_without_jit(mask, backend):
    mesh = _mesh("explicit")
    with jax.set_mesh(mesh):
        qkv = [jax.device_put(x, NamedSharding(mesh, _SPEC)) for x in QKV]
        out = _attend(
            backend, qkv, jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("x"))), MASKS[mask])
        )
    assert out.sharding.spec == P("x", None, "y", None)
    _same(out, _attend(backend, QKV, MASKS[mask]))


@pytest.mark.in_turn
@pytest.mark.parametrize(
    "mask", [mask for mask in MASKS if mask != "segments-twice"]
)  # which may place a row twice
def test_masks_that_place_rows_for_alibi(mask, backend):
    """Or leave them at their indices, as most do."""

    def run(qkv, mask):
        return _attend(backend, qkv, mask, alibi_slopes=jnp.linspace(0.1, 0.4, N))

    _same(_on("explicit", run, (QKV, MASKS[mask]), _SPEC), jax.jit(run)(QKV, MASKS[mask]))


def _hessian_product(attend, qkv, along):
    return jax.jvp(jax.grad(lambda x: jnp.sum(jnp.sin(attend(x)))), (qkv,), (along,))[1]


def _gradient_of_gradient(attend, qkv, along):
    def norm(x):
        return sum(jnp.sum(jnp.sin(g)) for g in jax.grad(lambda x: jnp.sum(jnp.sin(attend(x))))(x))

    return jax.grad(norm)(qkv)


def _gradient_of_tangent(attend, qkv, along):
    return jax.grad(lambda x: jnp.sum(jnp.cos(jax.jvp(attend, (x,), (along,))[1])))(qkv)


def _tangent(order, attend, qkv, along):
    """Along one direction, `order` times."""
    if order == 0:
        return attend(qkv)
    return jax.jvp(lambda x: _tangent(order - 1, attend, x, along), (qkv,), (along,))[1]


DERIVATIVES = {
    "tangent": partial(_tangent, 1),
    "hessian-product": _hessian_product,
    "gradient-of-gradient": _gradient_of_gradient,
    "gradient-of-tangent": _gradient_of_tangent,
    "second-tangent": partial(_tangent, 2),
    "third-tangent": partial(_tangent, 3),
    "tangent-of-gradient-of-gradient": lambda attend, qkv, along: jax.jvp(
        lambda x: _gradient_of_gradient(attend, x, along), (qkv,), (along,)
    )[1],
}


@pytest.mark.in_turn
@pytest.mark.parametrize(("derivative", "mesh"), some_pairs(DERIVATIVES, MESHES, every=3))
def test_derivatives(derivative, mesh, backend):
    """Over several tiles of rows and keys."""
    third = derivative.startswith(("third", "tangent-of"))
    if third and backend != "xla":
        pytest.skip("the portable backend's")

    def run(qkv, mask):
        along = jax.tree.map(lambda x: jnp.cos(3 * x), qkv)
        return DERIVATIVES[derivative](lambda x: _attend(backend, x, mask), qkv, along)

    out = _SPEC if derivative.endswith("tangent") and not derivative.startswith("gradient") else (_SPEC,) * 3
    want = jax.jit(run)(QKV, MASKS["lengths"])
    _same(_on(mesh, run, (QKV, MASKS["lengths"]), out), want, 2e-5 if not third else 2e-4)


@pytest.mark.filterwarnings("ignore:.*gathered whole:UserWarning")
@pytest.mark.parametrize(
    ("query", "key", "key_heads", "gathers"),
    [
        pytest.param(P("x", None, "y"), P("x", None, "y"), 2, False, id="heads"),
        pytest.param(P(("x", "y")), P(("x", "y")), 2, False, id="batch"),
        # Gradients of key and value are sums over devices.
        pytest.param(P("x", "y"), P("x"), 2, True, id="rows"),
        pytest.param(P("x", None, "y"), P("x"), 1, True, id="one-key-head"),
    ],
)
def test_automatic_axes_beside_manual_ones(query, key, key_heads, gathers, backend):
    mesh = _mesh("auto")
    qkv = (_normal(8, SQ, 4, D), _normal(8, SKV, key_heads, D), _normal(8, SKV, key_heads, D))

    def run(qkv):
        def loss(qkv):
            out = _attend(backend, qkv, Causal())
            return jnp.sum(jnp.sin(out)), out

        return jax.grad(loss, has_aux=True)(qkv)

    placed = tuple(
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(qkv, (query, key, key), strict=True)
    )
    split = jax.shard_map(run, mesh=mesh, in_specs=P("x"), out_specs=P("x"), axis_names={"x"})
    program = jax.jit(split).lower(placed).compile()
    _same(program(placed), jax.jit(run)(qkv))
    assert gathers or " all-gather(" not in program.as_text()


# --- types of explicit axes


@pytest.mark.parametrize("key_heads", [8, 4, 2])
@pytest.mark.parametrize(
    ("query", "key", "value", "out"),
    [
        (P("x"), P("x"), P("x"), P("x")),
        (P(None, None, "x"), P(None, None, "x"), P(None, None, "x"), P(None, None, "x")),
        (P(None, "x"), P(), P(), P(None, "x")),
        (P("y", "x"), P("y"), P("y"), P("y", "x")),
        (P(("x", "y")), P(("x", "y")), P(("x", "y")), P(("x", "y"))),
        (P("x", None, "y"), P("x", None, "y"), P("x", None, "y"), P("x", None, "y")),
        (P(), P("x"), P("x"), P("x")),
        (P(), P(None, None, "y"), P(None, None, "y"), P(None, None, "y")),
        (P(), P(), P(None, None, None, "x"), P(None, None, None, "x")),
        (P(), P(), P(), P()),
        # jax.nn gathers these queries, or fails.
        (P("x"), P(), P(), P("x")),
        (P("y", None, "x"), P("y"), P("y"), P("y", None, "x")),
        (P(None, "x"), P(None, "x"), P(None, "x"), P(None, "x")),
    ],
    ids=str,
)
def test_types_are_those_of_jax_nn(query, key, value, out, key_heads):
    """The output's is that of jax.nn wherever that has one and keeps the query's; gradients' are their operands'."""
    mesh = _mesh("explicit")
    specs = query, key, value
    if key_heads == 2 and P(None, None, "x") in (key, value):
        pytest.skip("JAX has no such arrays")
    shapes = (8, SQ, 8, D), (8, SKV, key_heads, D), (8, SKV, key_heads, D)
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    types = []

    def named(x):
        return P(*jax.typeof(x).sharding.spec, *(None,) * (4 - len(jax.typeof(x).sharding.spec)))

    def run(attend, *qkv):
        def loss(*qkv):
            found = attend(*qkv)
            types.append(named(found))
            return jnp.sum(jnp.sin(found))

        gradients = jax.grad(loss, (0, 1, 2))(*qkv)
        types.extend(map(named, gradients))
        return gradients

    with jax.set_mesh(mesh):
        jax.jit(partial(run, jax_fa.dot_product_attention)).lower(*args)
        found, types = types, []
        try:
            jax.jit(partial(run, jax.nn.dot_product_attention)).lower(*args)
        except Exception:  # it cannot type this call
            types = []
    assert found == [P(*spec, *(None,) * (4 - len(spec))) for spec in (out, *specs)]
    queries_alone = any(q is not None and i != 1 and i >= len(tuple(key)) for i, q in enumerate(tuple(query)))
    assert queries_alone or not types or types[0] == found[0]


@pytest.mark.parametrize("placed", range(3), ids=("query", "key", "value"))
@pytest.mark.parametrize("spec", [P("x"), P(None, None, "y")], ids=str)
def test_where_no_mesh_is_set_the_types_of_some_arrays_have_one(placed, spec, backend):
    """As JAX's own functions, which take the mesh of the others."""
    x = list(QKV)
    x[placed] = jax.device_put(x[placed], NamedSharding(_mesh("explicit"), spec))

    def loss(*qkv):
        return jnp.sum(jnp.sin(_attend(backend, qkv, Causal())))

    for run in (partial(_attend, backend, mask=Causal()), lambda qkv: jax.grad(loss, (0, 1, 2))(*qkv)):
        _same(jax.jit(run)(x), jax.jit(run)(list(QKV)))


# --- CANN's backward, whose cotangents and statistics are arguments


@pytest.mark.parametrize("shared", [("pse", "sink"), ("key", "value", "pse", "sink")], ids=["terms", "keys"])
def test_gradients_of_what_devices_share_are_summed(shared, backend):
    """In shard_map, as `jax.grad` sums them; and so are their derivatives."""
    operands = dict(zip(("query", "key", "value"), (_normal(B, SQ, n, D) for n in (N, K, K)), strict=True))
    operands |= {"pse": _normal(1, N, SQ, SQ), "sink": _normal(N), "dy": _normal(B, SQ, N, D)}

    def gradients(x):
        qkv, dy = (x["query"], x["key"], x["value"]), x["dy"]
        options = {"head_num": x["query"].shape[2], "input_layout": "BSND", "implementation": backend}
        terms = {"pse": x["pse"], "sink": x["sink"], "scale_value": jnp.float32(0.3)}
        saved = jax_fa.flash_attention_score(*qkv, **terms, **options)
        return tuple(jax_fa.flash_attention_score_grad(*qkv, dy, *saved, **terms, **options))

    def moved(x):
        return jax.jvp(gradients, (x,), (jax.tree.map(jnp.cos, x),))

    x = {name: a[:1] if name in shared and name in ("key", "value") else a for name, a in operands.items()}
    axes = {"pse": P(None, "y"), "sink": P("y")}
    specs = {name: axes.get(name, P(None if name in shared else "x", None, "y")) for name in x}
    results = tuple(specs[name] for name in ("query", "key", "value", "pse", "sink"))
    whole = x | {name: jnp.repeat(x[name], B, axis=0) for name in ("key", "value") if name in shared}

    def summed(found):
        names = ("query", "key", "value", "pse", "sink")
        return [
            jnp.sum(a, axis=0, keepdims=True) if name in shared and name in ("key", "value") else a
            for name, a in zip(names, found, strict=True)
        ]

    def split(x):  # one key for all batch entries of a device
        per_device = B // 4
        return moved(x | {n: jnp.repeat(x[n], per_device, axis=0) for n in ("key", "value") if n in shared})

    run = jax.shard_map(split, mesh=_mesh("manual"), in_specs=(specs,), out_specs=(results, results))
    _same(jax.jit(run)(x), [summed(found) for found in jax.jit(moved)(whole)])


@pytest.mark.parametrize("traced", [False, True], ids=["known", "traced"])
@pytest.mark.parametrize("rows", [None, "x"])
def test_statistics_of_packed_sequences_in_torch_npus_order(rows, traced, backend):
    """Their order mixes rows and heads, which explicit axes cut."""
    known = (5, 8, 12)

    @jax.jit
    def run(q, k, v, ends):
        ends = ends if traced else known
        options = {"actual_seq_qlen": ends, "actual_seq_kvlen": ends, "sparse_mode": 3}
        out, *saved = jax_fa.npu_fusion_attention(q, k, v, N, "TND", scale=0.3, **options)[:3]
        again = dict(zip(("softmax_max", "softmax_sum"), saved, strict=True))
        found = jax_fa.npu_fusion_attention_grad(
            q, k, v, q, N, "TND", attention_in=out, scale_value=0.3, **again, **options
        )
        return out, saved, found[:3]

    qkv = [_normal(12, heads, D) for heads in (N, K, K)]
    mesh = _mesh("explicit")
    with jax.set_mesh(mesh):
        specs = P(rows, "y"), P(None, "y"), P(None, "y"), P()
        args = *qkv, jnp.array(known, jnp.int32)
        found = run(*(jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, specs, strict=True)))
    _same(found, run(*args))
