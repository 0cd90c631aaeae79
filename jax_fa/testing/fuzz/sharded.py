"""A call whose sequence is sharded over several devices, by `sequence_parallel_attention`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jax_fa import masks, sequence_parallel
from jax_fa.testing.fuzz import kinds
from jax_fa.testing.fuzz.plain import Arrays, as_tuple, axes_of
from jax_fa.testing.fuzz.program import Program

DEVICES = 4  # of the process, or one: then that has all
AXIS = "s"
_STRATEGIES: tuple[sequence_parallel.Strategy, ...] = ("ring", "all_gather", "ulysses", "all_reduce")
_ORDERS: tuple[sequence_parallel.Order, ...] = ("contiguous", "zigzag")


def strategy(program: Program) -> tuple[int, sequence_parallel.Strategy, sequence_parallel.Order]:
    """(the number of devices, strategy, order)."""
    random = np.random.default_rng((program.seed, 6))
    devices = int(random.choice([2, 3, 4]))
    usable = [name for name in _STRATEGIES if name != "ulysses" or _splits_heads(program, devices)]
    return devices, usable[int(random.integers(len(usable)))], _ORDERS[int(random.integers(2))]


def _splits_heads(program: Program, devices: int) -> bool:
    return program.N % devices == 0 and 0 in (program.K % devices, devices % program.K)


def serves(program: Program) -> bool:
    p = program
    return p.backend != "ascend" and not p.mapped and p.derivative != "second" and "band_rows" not in p.mask


def fitted(program: Program) -> Program:
    """The same with lengths that the devices share."""
    devices, name, _ = strategy(program)
    chunk = 2 * devices
    sizes = {n: max(chunk, -(-getattr(program, n) // chunk) * chunk) for n in ("Sq", "Skv")}
    if name == "all_reduce" and program.Sq != program.Skv:
        sizes.pop("Sq")
    return dataclasses.replace(program, how="sharded", **sizes)


def attend(program: Program, operands: Arrays, made: list[Any], options: Arrays) -> Arrays:
    p = program
    devices, how, order = strategy(p)
    devices = min(devices, len(jax.devices()))
    sequence, _ = axes_of(p)
    mesh = Mesh(np.array(jax.devices()[:devices]), (AXIS,))
    rows_stay = how == "all_reduce"

    def axis_of(name: str, x: Any) -> int | None:
        """The axis that is sharded, from the end."""
        at = sequence - x.ndim if sequence >= 0 else sequence
        if name == "query":
            return None if rows_stay else at
        if name in ("key", "value"):
            return at
        rows = name in ("bias", "dense") and x.ndim > 1 and x.shape[-2] == p.Sq and p.Sq > 1
        return -2 if rows and not rows_stay else None

    def spec(at: int | None, rank: int) -> PartitionSpec:
        return (
            PartitionSpec()
            if at is None
            else PartitionSpec(*[AXIS if i - rank == at else None for i in range(rank)])
        )

    def spread(name: str, x: Any) -> tuple[Any, PartitionSpec]:
        x = jnp.asarray(x)
        at = axis_of(name, x)
        return (
            x if at is None else sequence_parallel.reorder(x, devices=devices, axis=at, order=order)
        ), spec(at, x.ndim)

    given = {name: spread(name, x) for name, x in operands.items()}
    dense = {i: spread("dense", mask.array) for i, mask in enumerate(made) if isinstance(mask, masks.Dense)}
    others = [mask for i, mask in enumerate(made) if i not in dense]
    traced = {name: x for name, x in options.items() if name == "dropout_key" or isinstance(x, jax.Array)}
    static = {name: x for name, x in options.items() if name not in traced}

    def run(operands, dense, others, traced):
        rest = iter(others)
        joined = [masks.Dense(dense[i]) if i in dense else next(rest) for i in range(len(made))]
        out, *more = as_tuple(
            sequence_parallel.sequence_parallel_attention(
                **operands,
                **static,
                **traced,
                mask=kinds.joined(p.joined, joined),
                axis_name=AXIS,
                layout=p.layout,
                implementation=p.backend,
                strategy=how,
                order=order,
                return_logsumexp=True,
                return_max_logits=p.max_logits,
            )
        )
        return {"out": out, "lse": more[0]} | ({"max": more[1]} if p.max_logits else {})

    rank = len(p.B) + 3
    at_of = {"out": axis_of("query", operands["query"]), "lse": None if rows_stay else -1}
    specs = {name: spec(at, rank if name == "out" else rank - 1) for name, at in at_of.items()}
    found = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(
            {name: where for name, (_, where) in given.items()},
            {i: where for i, (_, where) in dense.items()},
            PartitionSpec(),
            PartitionSpec(),
        ),
        out_specs=specs | ({"max": PartitionSpec()} if p.max_logits else {}),
    )(
        {name: x for name, (x, _) in given.items()},
        {i: x for i, (x, _) in dense.items()},
        others,
        traced,
    )

    def whole(name: str, x: Any) -> Any:
        at = at_of.get(name)
        return x if at is None else sequence_parallel.restore(x, devices=devices, axis=at, order=order)

    return {name: whole(name, x) for name, x in found.items()}
