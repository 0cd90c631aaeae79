"""Trains the GPT of the self-test on a mesh, its batch, heads and sequence sharded, and compares losses with one device.

    python -m jax_fa.demo.sharded [--processes 1] [--devices 4] [--data 1] [--heads 1] [--strategy ring] [--order zigzag]

Devices are those of the CPU. With several processes each has some of them and knows the others by `jax.distributed`, as it
is on a cluster, where only the addresses differ.
"""

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa
from jax_fa import sequence_parallel
from jax_fa.demo import comparison, gpt, program
from jax_fa.masks import Causal

AXES = ("data", "heads", "sequence")
OK, MISS = 0, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 if the losses are those of one device, 1 if not."""
    parser = _parser()
    options = parser.parse_args(argv)
    total = options.processes * options.devices
    if total % (options.data * options.heads):
        parser.error(
            f"--data times --heads must divide the {total} devices of {options.processes} processes; "
            f"got {options.data} and {options.heads}"
        )
    if options.processes > 1 and options.process is None:
        return _start_processes(sys.argv[1:] if argv is None else argv, options.processes)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    if options.processes > 1:
        jax.distributed.initialize(options.address, options.processes, options.process)
    return _compare(options)


def _compare(options: argparse.Namespace) -> int:
    config = gpt.Config(layers=2, seq_len=options.seq_len, steps=options.steps)
    shape = (options.data, options.heads, jax.device_count() // (options.data * options.heads))
    mesh = jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    first = jax.process_index() == 0
    if first:
        sizes = ", ".join(f"{name} {size}" for name, size in zip(AXES, shape, strict=True))
        print(
            f"{jax.process_count()} processes, {jax.device_count()} devices: {sizes}; {options.strategy}, {options.order}"
        )
    sharded = train(config, mesh, options.strategy, options.order)
    if not first:
        return OK
    alone = train_alone(config)
    for step, losses in enumerate(zip(sharded, alone, strict=True), 1):
        print("step {}: loss {:.6f} sharded, {:.6f} on one device".format(step, *losses))
    difference = float(np.max(np.abs(np.subtract(sharded, alone))))
    tolerance = comparison.TOLERANCE[config.dtype.name]
    same = difference <= tolerance
    print(f"{'OK' if same else 'MISS'}: losses differ by at most {difference:.1e}; {tolerance} is allowed")
    return OK if same else MISS


def train(
    config: gpt.Config,
    mesh: jax.sharding.Mesh,
    strategy: sequence_parallel.Strategy,
    order: sequence_parallel.Order,
) -> list[float]:
    """The loss of each step, with everything that has a sequence sharded over it."""
    devices = mesh.shape["sequence"]
    spec = P("data", "sequence", "heads")
    attend = jax.shard_map(
        partial(
            jax_fa.sequence_parallel_attention,
            axis_name="sequence",
            mask=Causal(),
            strategy=strategy,
            order=order,
        ),
        mesh=mesh,
        in_specs=(spec,) * 3,
        out_specs=spec,
    )

    def attention(query, key, value, *, is_causal: bool):
        return attend(query, key, value)

    def arrange(x, axis: int):
        """What is in its natural order, in that of the devices."""
        return sequence_parallel.reorder(x, devices=devices, axis=axis, order=order)

    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    step = jax.jit(
        partial(gpt.train_step, config, attention, arrange=arrange),
        in_shardings=(whole, rows),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )
    state = jax.tree.map(partial(_put, whole), gpt.init(config))
    losses = []
    for batch in gpt.batches(config):
        state, loss = step(state, _put(rows, batch))
        losses.append(float(loss))
    return losses


def train_alone(config: gpt.Config) -> list[float]:
    """The same on one device of this process."""
    with jax.default_device(jax.local_devices()[0]):
        step = jax.jit(partial(gpt.train_step, config, jax_fa.dot_product_attention), donate_argnums=0)
        state, losses = gpt.init(config), []
        for batch in gpt.batches(config):
            state, loss = step(state, jnp.asarray(batch))
            losses.append(float(loss))
    return losses


def _put(sharding: NamedSharding, x):
    """An array of all processes, each of which has all of x."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _start_processes(argv: Sequence[str], count: int) -> int:
    """Runs this program in each of several processes that know one another; the largest exit code."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-P", "-m", "jax_fa.demo.sharded", *argv, "--address", address]
    # A process of its own sets how many devices it has, which one of XLA's flags would set, too.
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = " ".join(flag for flag in flags if not flag.startswith("--xla_force_host_platform_device_count"))
    environment = os.environ | {"XLA_FLAGS": kept}
    running = [subprocess.Popen([*command, "--process", str(i)], env=environment) for i in range(count)]
    try:
        return max(abs(process.wait()) for process in running)
    finally:
        for process in running:
            process.kill()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jax_fa.demo.sharded", description=(__doc__ or "").splitlines()[0]
    )

    def number(name: str, default: int, text: str) -> None:
        parser.add_argument(
            name, type=program.positive, default=default, metavar="N", help=f"{text} (default: {default})"
        )

    number("--processes", 1, "processes, which communicate")
    number("--devices", 4, "devices of each process")
    number("--data", 1, "devices over which the batch of 2 is sharded")
    number("--heads", 1, "devices over which the 4 query and 2 key heads are sharded")
    number("--seq-len", 512, "characters of a sequence, sharded over the other devices")
    number("--steps", 8, "training steps")
    parser.add_argument("--strategy", choices=("ring", "all_gather", "ulysses"), default="ring")
    parser.add_argument("--order", choices=("contiguous", "zigzag"), default="contiguous")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    program.start(main)
