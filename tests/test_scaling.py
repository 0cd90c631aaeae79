"""`benchmarks/scaling.py`: its work and bytes are those of masks and of compiled programs."""

import re
import subprocess
import sys
from functools import partial
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa
from jax_fa.masks import Causal, SlidingWindow

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import scaling  # noqa: E402
from scaling import Attention  # noqa: E402

S, N, K, D = 256, 8, 4, 16
CALLS = {
    "causal": Attention(S, N, K, D, 4),
    "full": Attention(S, N, K, D, 4, causal=False),
    "window": Attention(S, N, K, D, 4, window=40),
}
MASKS = {"causal": Causal(), "full": None, "window": SlidingWindow(39, 0)}
WAYS = [(s, o) for s in scaling.STRATEGIES for o in scaling.ORDERS if (s, o) != ("ulysses", "zigzag")]


def _positions(devices: int, order: str):
    parts = np.split(np.arange(S), scaling.chunks(order, devices).size)
    return [np.concatenate([parts[i] for i in held]) for held in scaling.chunks(order, devices)]


@pytest.mark.parametrize("order", scaling.ORDERS)
@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("name", CALLS)
def test_work_is_that_of_visible_pairs(name, devices, order):
    call = CALLS[name]
    i, j = np.indices((S, S))
    visible = (j <= i) | (not call.causal)
    if call.window:
        visible &= i - j < call.window
    at = _positions(devices, order)
    expected = [
        [visible[np.ix_(at[d], at[(d - t) % devices])].sum() for d in range(devices)] for t in range(devices)
    ]
    np.testing.assert_array_equal(scaling.work(call, devices, order), expected)
    assert call.pairs == visible.sum()


# Bytes that each device sends for one of the result.
FACTORS = {
    "all-gather": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
}
COLLECTIVE = re.compile(
    r" = (\S.*?) (all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\((.*)"
)


def _sent(compiled, devices: int) -> float:
    """Bytes that a device sends in a program: the one that sends most."""
    sent = np.zeros(devices)
    for shapes, name, rest in COLLECTIVE.findall(compiled.as_text()):
        sizes = [
            prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"f32\[([\d,]*)\]", shapes)
        ]
        if name == "collective-permute":
            pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
            senders = [int(x) for x in re.findall(r"\{(\d+),", pairs[1] if pairs else "")]
            sent[senders] += 4 * sum(sizes)
        else:
            sent += 4 * sum(sizes) * FACTORS[name](devices)
    return float(sent.max())


def _programs():
    """Every way; by default on two devices, and the ring of a model on fewer, too."""
    for strategy, order in WAYS:
        for name in CALLS if (strategy, order) == ("ring", "contiguous") else ["causal"]:
            for devices in (2, 4, 8):
                few = devices == 2 or (name, strategy, order) == ("causal", "ring", "zigzag")
                yield pytest.param(name, strategy, order, devices, marks=[] if few else pytest.mark.slow)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("name", "strategy", "order", "devices"), list(_programs()))
def test_bytes_are_those_of_compiled_programs(name, strategy, order, devices):
    call = CALLS[name]
    mesh = jax.make_mesh(
        (devices,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    sharded = P(None, "sequence")
    attention = partial(
        jax_fa.sequence_parallel_attention,
        axis_name="sequence",
        mask=MASKS[name],
        strategy=strategy,
        order=order,
        implementation="xla",
    )
    attention = jax.shard_map(attention, mesh=mesh, in_specs=(sharded,) * 3, out_specs=sharded)

    place = partial(jax.device_put, device=NamedSharding(mesh, sharded))
    dout, *qkv = (place(jnp.ones((1, S, heads, D))) for heads in (N, N, K, K))
    pull = jax.vjp(attention, *qkv)[1]
    programs = jax.jit(attention).lower(*qkv), jax.jit(lambda pull, dout: pull(dout)).lower(pull, dout)
    found = [_sent(program.compile(), devices) for program in programs]
    expected = [one.sent for one in scaling.passes(call, devices, strategy, order)]
    assert found[0] == expected[0] > 0
    # Where shards do not go all around, the device that sends most keys on sends no gradient home.
    home = (
        0 if (strategy, order) != ("ring", "contiguous") or name == "full" else 2 * K * D * 4 * S // devices
    )
    assert expected[1] - home <= found[1] <= expected[1]


def test_zigzag_is_even_and_contiguous_is_not():
    call = Attention(2**17)
    for devices in (8, 64):
        of_device = scaling.work(call, devices, "zigzag").sum(axis=0)
        assert of_device.max() / of_device.min() < 1.001
        assert scaling.work(call, devices, "contiguous").sum(axis=0).max() > 1.7 * of_device.max()


def test_more_devices_take_less_memory_and_time():
    call, chip, link = Attention(2**19), scaling.CHIPS["h200"], scaling.LINKS["infiniband"]
    before = None
    for devices in (1, 2, 8, 64):
        best = min(scaling.plans(call, devices, chip, link), key=lambda plan: plan.seconds)
        assert 0 < best.efficiency <= 1
        if before is not None:
            assert best.seconds < before.seconds and best.bytes < before.bytes
        before = best


@pytest.mark.slow
def test_the_script(tmp_path):
    script = [sys.executable, "-P", str(ROOT / "benchmarks/scaling.py")]
    done = subprocess.run(
        [*script, "--link", "nvlink", "--plot", str(tmp_path / "x.svg")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("\n|") >= len(scaling.LENGTHS) * len(scaling.DEVICES)
    assert (tmp_path / "x.svg").stat().st_size > 10_000
    failed = subprocess.run([*script, "--heads", "7"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and "got 7, 8, 128" in failed.stderr
