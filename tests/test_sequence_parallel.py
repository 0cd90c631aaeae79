"""Attention over a sharded sequence: the same as on one device, with the communication and memory that are promised."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa
from jax_fa import masks
from jax_fa.masks import Causal, Lengths, SegmentIds, SlidingWindow
from jax_fa.sequence_parallel import position_ids, reorder, restore, visited_tiles
from jax_fa.testing import oracle
from jax_fa.testing.cases import BY_NAME, CASES, FEATURES, Case, check

# Of out and log-sum-exp, and of gradients, in float32: relative to one device, in the 2-norm.
CLOSE, CLOSE_GRADIENTS = 1e-6, 2e-6
SEQUENCE = {"BSND": -3, "SND": -3, "BNSD": -2, "NSD": -2, "SBND": 0}


@cache
def _mesh(devices: int, kind: AxisType = AxisType.Auto):
    return jax.make_mesh((devices,), ("x",), axis_types=(kind,), devices=jax.devices()[:devices])


def _split(case: Case, devices: int = 8) -> Case:
    """The case with lengths that 2 * devices chunks divide, and some shards that some rows do not see."""
    return replace(case, Sq=2 * devices * 3, Skv=2 * devices * 4)


class Program:
    """A case on several devices: whole arrays in, whole arrays out, in their natural order."""

    def __init__(
        self, case: Case, devices: int, strategy: str, order: str, backend: str | None = None
    ) -> None:
        self.case, self.devices, self.order = case, devices, order
        self.options = {"strategy": strategy, "order": order, "implementation": backend}
        self.whole_rows = strategy == "all_reduce"
        mask = case.library_mask()
        members = () if mask is None else masks.members(masks.as_mask(mask))
        self.arrays = {str(i): m.array for i, m in enumerate(members) if isinstance(m, masks.Dense)}
        self.members = members

    def axes(self, name: str, x) -> tuple[int | None, ...]:
        """The axes along which an array is sharded: query's rows, and the keys."""
        if name in ("query", "out", "key", "value"):
            axis = SEQUENCE[self.case.layout] % x.ndim
        elif name == "lse":
            axis = x.ndim - 1
        elif x.ndim < 2 or x.shape[-2] == 1 or name == "alibi_slopes":
            return ()
        else:
            axis = x.ndim - 2
        return () if self.whole_rows and name not in ("key", "value") else (axis,)

    def spec(self, name: str, x) -> P:
        return P(*("x" if axis in self.axes(name, x) else None for axis in range(x.ndim)))

    def ordered(self, name: str, x, turn=reorder):
        for axis in self.axes(name, x):
            x = turn(jnp.asarray(x), devices=self.devices, axis=axis, order=self.order)
        return jnp.asarray(x)

    def local(self, x, arrays):
        mask: Any = None
        for i, member in enumerate(self.members):
            member = masks.Dense(arrays[str(i)]) if str(i) in arrays else member
            mask = member if mask is None else mask & member
        case = self.case
        return jax_fa.sequence_parallel_attention(
            **x,
            axis_name="x",
            mask=mask,
            scale=case.scale,
            logits_soft_cap=case.soft_cap,
            dropout_rate=case.dropout,
            dropout_key=case.dropout_key() if case.dropout else None,
            layout=case.layout,
            return_logsumexp=True,
            **self.options,
        )

    def attend(self, x):
        """(out, log-sum-exp) of whole operands."""
        x, arrays = ({n: self.ordered(n, a) for n, a in given.items()} for given in (x, self.arrays))
        specs = tuple({n: self.spec(n, a) for n, a in given.items()} for given in (x, arrays))
        rank = len(self.case.B)
        like = (
            jax.ShapeDtypeStruct((1,) * (rank + 3), jnp.float32),
            jax.ShapeDtypeStruct((1,) * (rank + 2), jnp.float32),
        )
        outs = tuple(self.spec(name, x) for name, x in zip(("out", "lse"), like, strict=True))
        found = jax.shard_map(self.local, mesh=_mesh(self.devices), in_specs=specs, out_specs=outs)(x, arrays)
        return tuple(self.ordered(n, a, restore) for n, a in zip(("out", "lse"), found, strict=True))

    @partial(jax.jit, static_argnums=0)
    def gradient(self, x, dout, dlse):
        results, pullback = jax.vjp(self.attend, x)
        return results, pullback((dout, dlse))[0]


def _distance(found, want) -> float:
    found, want = (np.asarray(x, np.float64) for x in (found, want))
    return float(np.linalg.norm(found - want) / (np.linalg.norm(want) or 1))


def _assert_same(program: Program) -> None:
    """Results and gradients are those of one device."""
    case = program.case
    dout, dlse = case.cotangents()
    args = case.stored_operands(), jnp.asarray(case.stored(dout)), jnp.asarray(dlse)
    (out, lse), gradients = program.gradient(*args)
    one = jax.jit(partial(case.gradient, implementation=program.options["implementation"]))
    (want, want_lse), want_gradients = one(*args)
    empty = np.asarray(want_lse) < -1e38
    np.testing.assert_array_equal(np.asarray(lse)[empty], np.asarray(want_lse)[empty])
    assert _distance(out, want) <= CLOSE
    assert _distance(np.where(empty, 0, lse), np.where(empty, 0, want_lse)) <= CLOSE
    assert sorted(gradients) == sorted(want_gradients)
    for name, gradient in gradients.items():
        assert _distance(gradient, want_gradients[name]) <= CLOSE_GRADIENTS, name


FAST = (
    "mqa",
    "no-batch",
    "mask-window_bottom",
    "mask-prefix_bottom",
    "mask-lengths",
    "mask-cumulative_causal",
    "mask-segments_mixed_causal",
    "mask-causal_dense",
    "mask-nothing",
    "everything",
    "everything-BNSD",
    "layout-SBND",
)
# (devices, strategy, order)
WAYS = (
    (4, "ring", "contiguous"),
    (4, "ring", "zigzag"),
    (4, "all_gather", "zigzag"),
    (2, "ulysses", "zigzag"),
    (4, "all_reduce", "zigzag"),
)


def _serves(case: Case, devices: int, strategy: str) -> bool:
    return strategy != "ulysses" or (
        case.N % devices == 0 and (case.K % devices == 0 or devices % case.K == 0)
    )


@pytest.mark.parametrize(("devices", "strategy", "order"), WAYS)
@pytest.mark.parametrize("name", FAST)
def test_as_on_one_device(name, devices, strategy, order):
    case = _split(BY_NAME[name])
    if not _serves(case, devices, strategy):
        case = replace(case, N=4, K=1)
    _assert_same(
        Program(case, devices, strategy, order, "cpu" if jax_fa.backends.native.missing is None else "xla")
    )


SPLIT = [case for case in CASES if case.dtype == "float32" and 0 not in (*case.B, case.Sq, case.Skv)]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses", "all_reduce"])
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_the_whole_table(case, strategy, order, devices, backend):
    if not _serves(case, devices, strategy):
        case = replace(case, N=devices, K=1)
    _assert_same(Program(_split(case), devices, strategy, order, backend))
