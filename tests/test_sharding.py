"""Several devices: batch and heads shard without communication, shard_map and explicit axes work."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa
from jax_fa.masks import Causal, Lengths
from jax_fa.testing import oracle
from jax_fa.testing.cases import Case, check

DEVICES = jax.devices("cpu")
pytestmark = pytest.mark.skipif(len(DEVICES) < 8, reason="needs eight CPU devices")


def _mesh(kind: AxisType = AxisType.Auto, **axes: int):
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(kind,) * len(axes),
        devices=DEVICES[: np.prod([*axes.values()])],
    )


# --- jit with sharded arguments


@dataclass(frozen=True)
class Layout:
    """How a call is spread: its mesh, and which mesh axis holds the batch and the heads."""

    name: str
    case: Case
    mesh: dict[str, int]
    batch: str | None = None
    query_heads: str | None = None
    key_heads: str | None = None
    rows: str | None = None
    # What communication the gradient needs: of operands that all devices share.
    shared: bool = False

    def __str__(self) -> str:
        return self.name

    def spec(self, name: str) -> P:
        """The spec of an operand as it is stored."""
        of_rows = name in ("query", "out")
        heads, rows = (self.query_heads, self.rows) if of_rows else (self.key_heads, None)
        stored = {"BSND": (self.batch, rows, heads, None), "BNSD": (self.batch, heads, rows, None)}
        stored["SBND"] = (rows, self.batch, heads, None)
        if name in ("query", "key", "value", "out"):
            return P(*stored[self.case.layout])
        if name == "lse":
            return P(self.batch, self.query_heads, self.rows)
        dims = {"B": self.batch, "N": self.query_heads, "Q": self.rows}
        letters = self.case.bias if name == "bias" else self.case.slopes
        return P(*(dims.get(c) for c in letters))


_SMALL = Case(name="sharded", B=(8,), Sq=19, Skv=33, N=4, K=2, D=8, Dv=8, mask="causal_bottom_lengths")
LAYOUTS = (
    Layout("batch", _SMALL, {"x": 8}, batch="x"),
    Layout("batch-dropout", replace(_SMALL, dropout=0.3, bias="BNQK"), {"x": 4}, batch="x"),
    Layout("batch-SBND", replace(_SMALL, layout="SBND", mask="dense_padding"), {"x": 8}, batch="x"),
    Layout("heads", replace(_SMALL, B=(2,), N=16, K=8), {"x": 8}, query_heads="x", key_heads="x"),
    Layout(
        "heads-everything",
        replace(_SMALL, B=(2,), K=4, N=4, slopes="N", bias="1NQK", soft_cap=3.0, dropout=0.2),
        {"x": 4},
        query_heads="x",
        key_heads="x",
    ),
    Layout(
        "batch-and-heads-BNSD",
        replace(_SMALL, B=(4,), N=4, K=2, layout="BNSD", mask="window_bottom"),
        {"x": 4, "y": 2},
        batch="x",
        query_heads="y",
        key_heads="y",
    ),
    Layout("batch-bfloat16", replace(_SMALL, dtype="bfloat16", mask="causal"), {"x": 8}, batch="x"),
    Layout(
        "batch-segments",
        replace(_SMALL, B=(4,), mask="segments_mixed", slopes="BN"),
        {"x": 4, "y": 2},
        batch="x",
        query_heads="y",
        key_heads="y",
    ),
    # One key head serves all devices: its gradient is a sum over them.
    Layout("heads-of-one-key", replace(_SMALL, B=(2,), N=8, K=1), {"x": 8}, query_heads="x", shared=True),
    Layout("batch-shared-bias", replace(_SMALL, bias="1NQK", slopes="N"), {"x": 8}, batch="x", shared=True),
)


def _compiled(layout: Layout, function, *args):
    """The compiled program of sharded arguments (each a pair of a tree and its specs), and those arguments."""
    mesh = _mesh(**layout.mesh)
    placed = [
        jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)
        for tree, specs in args
    ]
    return jax.jit(function).lower(*placed).compile(), placed


def _operands(layout: Layout):
    x = layout.case.stored_operands()
    return x, {name: layout.spec(name) for name in x}


@pytest.mark.in_turn
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_forward(layout, backend):
    """Right numbers, results where the query lies, and no communication."""
    case = layout.case
    program, args = _compiled(
        layout, partial(case.flash_attention, implementation=backend), _operands(layout)
    )
    out, lse = program(*args)
    check(case, np.asarray(out), np.asarray(lse))
    for name, x in (("out", out), ("lse", lse)):
        assert x.sharding.is_equivalent_to(NamedSharding(_mesh(**layout.mesh), layout.spec(name)), x.ndim), (
            name
        )
    assert "all-" not in program.as_text()


@pytest.mark.in_turn(1)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradient(layout, backend):
    """Right numbers; only the gradients of what all devices share are summed over them."""
    case = layout.case
    dout, dlse = case.cotangents()
    cotangents = ((case.stored(dout), layout.spec("out")), (dlse, layout.spec("lse")))
    program, args = _compiled(
        layout, partial(case.gradient, implementation=backend), _operands(layout), *cotangents
    )
    (out, lse), gradients = program(*args)
    check(case, np.asarray(out), np.asarray(lse), {n: np.asarray(g) for n, g in gradients.items()})
    text = program.as_text()
    if layout.shared:
        assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text
    else:
        assert "all-" not in text


def _derivatives(attend, x):
    """Results and derivatives along tangents of several kinds: jvp, jvp of grad, grad of grad, grad of jvp."""
    along = jax.tree.map(lambda a: jnp.cos(3 * a), x)

    def loss(x):
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(attend(x)))

    def norm(x):
        return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(jax.grad(loss)(x)))

    def speed(x):
        return sum(jnp.sum(jnp.cos(t)) for t in jax.tree.leaves(jax.jvp(attend, (x,), (along,))[1]))

    return (
        jax.jvp(attend, (x,), (along,)),
        jax.jvp(jax.grad(loss), (x,), (along,)),
        jax.grad(norm)(x),
        jax.grad(speed)(x),
    )


def _same(found, want) -> None:
    def close(a, b):
        # Relative to the largest: a gradient of slopes is a sum of large terms that cancel.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-4 * max(1.0, float(jnp.max(jnp.abs(b)))))

    jax.tree.map(close, found, want)


ALONG = ("batch-and-heads-BNSD", "heads-of-one-key", "batch-shared-bias")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.name in ALONG], ids=str)
def test_derivatives_along_tangents(layout, backend):
    """The same values as on one device; only sums of what all devices share are communicated."""
    case = replace(layout.case, mask="causal_bottom")  # no rows whose log-sum-exp is -FLT_MAX
    run = partial(_derivatives, partial(case.flash_attention, implementation=backend))
    program, args = _compiled(layout, run, _operands(layout))
    want = jax.jit(run)(case.stored_operands())
    _same(program(*args), want)
    text = program.as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    assert layout.shared or "all-reduce" not in text


@pytest.mark.parametrize(
    ("query", "key"),
    [
        pytest.param(P(None, "x"), P(None, "x"), id="sequences"),
        pytest.param(P("x"), P(None, "x"), id="batch-and-sequence"),
        pytest.param(P(None, None, "x"), P(), id="query-heads-across-groups"),
        pytest.param(P(None, None, None, "x"), P(None, None, None, "x"), id="head-dims"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*gathered whole:UserWarning")
def test_other_shardings_are_right_too(query, key, backend):
    """What does not split without communication is gathered, not refused and not wrong."""
    mesh = _mesh(x=4)
    case = replace(_SMALL, name="gathered", B=(4,), Sq=20, Skv=36, mask="causal_bottom")
    dout, dlse = case.cotangents()
    specs = {"query": query, "key": key, "value": key}
    x = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in case.stored_operands().items()}
    run = jax.jit(partial(case.gradient, implementation=backend))
    (out, lse), gradients = run(x, jax.device_put(dout, NamedSharding(mesh, query)), dlse)
    check(case, np.asarray(out), np.asarray(lse), {n: np.asarray(g) for n, g in gradients.items()})


# --- shard_map


def _qkv(batch: int, heads: int, key_heads: int) -> list[np.ndarray]:
    normal = np.random.default_rng(batch + heads).standard_normal
    return [
        normal((batch, n, h, 8)).astype(np.float32)
        for n, h in ((19, heads), (33, key_heads), (33, key_heads))
    ]


@pytest.mark.parametrize(
    ("specs", "sizes"),
    [
        pytest.param((P("x"), P("x"), P("x")), (8, 4, 2), id="batch"),
        pytest.param((P(None, None, "x"),) * 3, (1, 16, 8), id="heads"),
        # Every device has rows of its own and all keys: the gradients of key and value are sums over devices.
        pytest.param((P(None, None, "x"), P(), P()), (2, 8, 1), id="shared-keys"),
    ],
)
def test_shard_map(specs, sizes, backend):
    """Inside shard_map (with its checks on) everything is local; the gradient of what is shared is summed."""
    mesh = _mesh(x=8)
    qkv = _qkv(*sizes)
    lengths = np.resize(np.array([33, 7], np.int32), sizes[0])
    mapped_lengths = P("x") if specs[0] == P("x") else P()

    def local(q, k, v, lengths):
        mask = Causal("bottom-right") & Lengths(key=lengths)
        return jax_fa.flash_attention(q, k, v, mask=mask, implementation=backend, return_logsumexp=True)

    lse_spec = P("x") if specs[0] == P("x") else P(None, "x")
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(*specs, mapped_lengths), out_specs=(specs[0], lse_spec), check_vma=True
    )

    def loss(qkv, lengths):
        out, lse = sharded(*qkv, lengths)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse > -1e30, jnp.cos(lse), 0)), (out, lse)

    (_, (out, lse)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv, lengths)
    sq, skv = qkv[0].shape[1], qkv[1].shape[1]
    corner = oracle.band(sq, skv, None, 0, offset=(lengths - sq)[:, None, None])
    visible = corner & oracle.lengths(sq, skv, key=lengths)
    want = oracle.attention(*qkv, visible=visible)
    np.testing.assert_allclose(out, want.out, atol=1e-5)
    np.testing.assert_allclose(lse, want.lse, atol=1e-5)
    dlse = np.where(want.lse > -1e30, -np.sin(want.lse), 0)
    for found, right in zip(gradients, want.gradients(np.cos(want.out), dlse).values(), strict=True):
        np.testing.assert_allclose(found, right, atol=1e-4)


def test_shared_rows_under_shard_map(backend):
    """Keys split over devices, queries shared: partial results, whose log-sum-exp has a gradient, merge."""
    mesh = _mesh(x=4)
    q, k, v = _qkv(2, 4, 2)
    k, v = k[:, :32], v[:, :32]

    def local(q, k, v):
        out, lse = jax_fa.flash_attention(q, k, v, implementation=backend, return_logsumexp=True)
        most = jax.lax.stop_gradient(jax.lax.pmax(jax.lax.stop_gradient(lse), "x"))
        weight = jnp.exp(lse - most)
        total = jax.lax.psum(weight, "x")
        share = jnp.moveaxis(weight / total, 1, 2)[..., None]
        return jax.lax.psum(share * out, "x")

    split = P(None, "x")
    run = jax.shard_map(local, mesh=mesh, in_specs=(P(), split, split), out_specs=P(), check_vma=True)
    found, gradients = jax.jit(
        lambda qkv: (run(*qkv), jax.grad(lambda qkv: jnp.sum(jnp.sin(run(*qkv))))(qkv)),
    )((q, k, v))
    want = oracle.attention(q, k, v)
    np.testing.assert_allclose(found, want.out, atol=1e-5)
    for g, right in zip(gradients, want.gradients(np.cos(want.out)).values(), strict=True):
        np.testing.assert_allclose(g, right, atol=1e-4)


@pytest.mark.in_turn
@pytest.mark.parametrize("shared", [False, True])
def test_derivatives_along_tangents_under_shard_map(shared, backend):
    """Also where all devices read the same keys, whose derivatives are sums over devices."""
    mesh = _mesh(x=4)
    q, k, v = _qkv(4, 2, 1)
    specs = (P("x"), *(P(None) if shared else P("x"),) * 2)
    if shared:
        q, k, v = q.reshape(1, -1, *q.shape[2:]), k[:1], v[:1]
        specs = (P(None, "x"), P(), P())

    def attend(x):
        return jax_fa.flash_attention(*x, implementation=backend)

    split = jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=specs[0], check_vma=True)
    found = jax.jit(partial(_derivatives, split))((q, k, v))
    want = jax.jit(partial(_derivatives, attend))((q, k, v))
    _same(found, want)


# --- explicit axes


@pytest.mark.parametrize(
    ("spec", "stats_spec", "sizes"),
    [
        pytest.param(P("x"), P("x"), (8, 4, 2), id="batch"),
        pytest.param(P(None, None, "x"), P(None, "x"), (1, 16, 8), id="heads"),
    ],
)
def test_explicit_axes(spec, stats_spec, sizes, backend):
    """Where shardings are part of types, the output's type is the query's, and gradients have their operand's."""
    mesh = _mesh(AxisType.Explicit, x=8)
    qkv = _qkv(*sizes)

    def attend(q, k, v):
        return jax_fa.flash_attention(q, k, v, mask=Causal(), implementation=backend, return_logsumexp=True)

    def gradient(qkv):
        def loss(qkv):
            out, lse = attend(*qkv)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse)), (out, lse)

        found = jax.grad(loss, has_aux=True)(qkv)
        types.append(jax.tree.map(lambda x: jax.typeof(x).sharding.spec, found))
        return found

    types: list = []
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in qkv]
        gradients, (out, lse) = jax.jit(gradient)(placed)

    def named(spec: P) -> tuple:
        return tuple(axis for axis in spec if axis is not None), tuple(spec).index("x")

    found_gradients, found_results = types[0]
    assert [named(s) for s in (*found_gradients, found_results[0])] == [named(spec)] * 4
    assert named(found_results[1]) == named(stats_spec)
    want = oracle.attention(*qkv, visible=oracle.causal(qkv[0].shape[1], qkv[1].shape[1]))
    np.testing.assert_allclose(np.asarray(out), want.out, atol=1e-5)
    np.testing.assert_allclose(np.asarray(lse), want.lse, atol=1e-5)
    for found, right in zip(
        gradients, want.gradients(np.cos(want.out), -np.sin(want.lse)).values(), strict=True
    ):
        np.testing.assert_allclose(np.asarray(found), right, atol=1e-4)


def test_derivatives_along_tangents_of_explicit_axes(backend):
    mesh = _mesh(AxisType.Explicit, x=8)
    qkv = tuple(_qkv(8, 4, 2))
    run = partial(_derivatives, lambda x: jax_fa.flash_attention(*x, mask=Causal(), implementation=backend))
    with jax.set_mesh(mesh):
        placed = tuple(jax.device_put(x, NamedSharding(mesh, P("x"))) for x in qkv)
        found = jax.jit(run)(placed)
    (out, tangent), *_ = found
    assert out.sharding.spec == tangent.sharding.spec == P("x", None, None, None)
    want = jax.jit(run)(qkv)
    _same(found, want)


def test_gradients_of_what_devices_share_along_explicit_axes(backend):
    """Keys are whole where rows are cut: sums over devices, which are compiled where the mesh is set."""
    mesh = _mesh(AxisType.Explicit, x=4)
    q, k, v = _qkv(2, 4, 2)
    q = np.concatenate([q, q[:, :1]], axis=1)  # 20 rows

    def loss(*qkv):
        return jnp.sum(jnp.sin(jax_fa.flash_attention(*qkv, mask=Causal(), implementation=backend)))

    run = jax.jit(jax.grad(loss, (0, 1, 2)))
    with jax.set_mesh(mesh):
        placed = zip((q, k, v), (P(None, "x"), P(), P()), strict=True)
        found = run(*(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in placed))
    _same(found, run(q, k, v))


@pytest.mark.parametrize("derivative", ["second", "transpose"])
def test_cotangents_that_are_zero_have_explicit_axes(derivative, backend):
    """Second derivatives with sinks, of the output alone; and the transpose in value."""
    mesh = _mesh(AxisType.Explicit, x=8)
    qkv = tuple(_qkv(8, 4, 2))
    sinks = jnp.linspace(-1, 1, 4)

    def attend(q, k, v):
        return jax_fa.flash_attention(q, k, v, mask=Causal(), sinks=sinks, implementation=backend)

    def run(q, k, v):
        if derivative == "transpose":
            return jax.linear_transpose(lambda v: attend(q, k, v), v)(q)
        gradient = jax.grad(lambda q: jnp.sum(jnp.sin(attend(q, k, v))))
        return jax.jvp(gradient, (q,), (jnp.cos(q),))

    with jax.set_mesh(mesh):
        found = jax.jit(run)(*(jax.device_put(x, NamedSharding(mesh, P("x"))) for x in qkv))
    assert all(x.sharding.spec[0] == "x" for x in found)
    _same(found, jax.jit(run)(*qkv))


def test_float64_in_a_context():
    """XLA asks how to split a call from a thread of its own, which `jax.enable_x64` does not reach."""
    with jax.enable_x64(True):
        qkv = [jnp.asarray(x, jnp.float64) for x in _qkv(8, 4, 2)]

        def loss(*qkv):
            return jnp.sum(jnp.sin(jax_fa.flash_attention(*qkv, mask=Causal())))

        run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        found = run(*(jax.device_put(x, NamedSharding(_mesh(x=8), P("x"))) for x in qkv))
        want = run(*qkv)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), found, want)


def test_vmap_with_a_sharded_axis(backend):
    """vmap over the axis that is spread over devices keeps it spread."""
    mesh = _mesh(x=8)
    qkv = [jax.device_put(x[:, None], NamedSharding(mesh, P("x"))) for x in _qkv(8, 4, 2)]
    run = jax.jit(jax.vmap(partial(jax_fa.flash_attention, mask=Causal(), implementation=backend)))
    program = run.lower(*qkv).compile()
    out = program(*qkv)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), out.ndim)
    assert "all-" not in program.as_text()
    want = oracle.attention(*(np.asarray(x)[:, 0] for x in qkv), visible=oracle.causal(19, 33))
    np.testing.assert_allclose(np.asarray(out)[:, 0], want.out, atol=1e-5)


@pytest.mark.parametrize("mapped", ["cotangents", "scales"])
def test_vmap_of_what_is_not_an_array_of_the_call(mapped, backend):
    """Only the cotangents, or only the scale, mapped and spread over devices."""
    mesh = _mesh(x=4)
    q, k, v = _qkv(2, 4, 2)
    dout = np.random.default_rng(0).standard_normal((4, *q.shape)).astype(np.float32)
    scales = np.array([0.1, 0.2, 0.3, 0.4], np.float32)

    def gradient(dout, scale):
        attend = partial(jax_fa.flash_attention, mask=Causal(), scale=scale, implementation=backend)
        return jax.vjp(attend, q, k, v)[1](dout)

    axes = (0, None) if mapped == "cotangents" else (None, 0)
    given = (dout, scales[0]) if mapped == "cotangents" else (dout[0], scales)
    spread = [
        jax.device_put(x, NamedSharding(mesh, P("x"))) if a == 0 else x
        for x, a in zip(given, axes, strict=True)
    ]
    found = jax.jit(jax.vmap(gradient, in_axes=axes))(*spread)
    one = jax.jit(gradient)
    for i in range(4):
        want = one(*(x[i] if a == 0 else x for x, a in zip(given, axes, strict=True)))
        for a, b in zip(found, want, strict=True):
            np.testing.assert_allclose(np.asarray(a)[i], b, rtol=2e-5, atol=2e-5)
