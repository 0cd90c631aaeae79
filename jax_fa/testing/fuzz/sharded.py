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
    # (The gradient of a bias in a smaller dtype is rounded to it on each device, before it is added to those of others.)
    bias = "float64" if program.dtype == "float64" else "float32"
    return dataclasses.replace(program, how="sharded", bias_dtype=bias, **sizes)


@dataclasses.dataclass(frozen=True)
class _Lying:
    """How the arrays of a call lie on the devices."""

    program: Program
    devices: int
    order: sequence_parallel.Order
    rows_stay: bool  # on every device

    def axis_of(self, name: str, x: Any) -> int | None:
        """The axis that is sharded, from the end."""
        p, (sequence, _) = self.program, axes_of(self.program)
        at = sequence - x.ndim if sequence >= 0 else sequence
        if name == "query":
            return None if self.rows_stay else at
        if name in ("key", "value"):
            return at
        rows = name in ("bias", "dense") and x.ndim > 1 and x.shape[-2] == p.Sq and p.Sq > 1
        return -2 if rows and not self.rows_stay else None

    @staticmethod
    def spec(at: int | None, rank: int) -> PartitionSpec:
        return (
            PartitionSpec()
            if at is None
            else PartitionSpec(*(AXIS if i - rank == at else None for i in range(rank)))
        )

    def spread(
        self, arrays: dict[Any, Any], name: str | None = None
    ) -> tuple[dict[Any, Any], dict[Any, PartitionSpec]]:
        """The arrays in the order of the devices, and where they lie."""
        moved, specs = {}, {}
        for key, given in arrays.items():
            x = jnp.asarray(given)
            at = self.axis_of(name or key, x)
            specs[key] = self.spec(at, x.ndim)
            moved[key] = (
                x
                if at is None
                else sequence_parallel.reorder(x, devices=self.devices, axis=at, order=self.order)
            )
        return moved, specs

    def whole(self, x: Any, at: int | None) -> Any:
        return (
            x if at is None else sequence_parallel.restore(x, devices=self.devices, axis=at, order=self.order)
        )


def attend(program: Program, operands: Arrays, made: list[Any], options: Arrays) -> Arrays:
    p = program
    devices, how, order = strategy(p)
    lying = _Lying(p, min(devices, len(jax.devices())), order, rows_stay=how == "all_reduce")
    at_of = {
        "out": lying.axis_of("query", operands["query"]),
        "lse": None if lying.rows_stay else -1,
        "max": None,
    }
    rank = {"out": len(p.B) + 3, "lse": len(p.B) + 2, "max": len(p.B) + 1}
    results = ("out", "lse", "max") if p.max_logits else ("out", "lse")
    arrays, specs = lying.spread(operands)
    dense, dense_specs = lying.spread(
        {i: mask.array for i, mask in enumerate(made) if isinstance(mask, masks.Dense)}, "dense"
    )
    others = [mask for i, mask in enumerate(made) if i not in dense]
    traced = {name: x for name, x in options.items() if name == "dropout_key" or isinstance(x, jax.Array)}
    static = {name: x for name, x in options.items() if name not in traced}

    def run(operands, dense, others, traced):
        rest = iter(others)
        found = sequence_parallel.sequence_parallel_attention(
            **operands,
            **static,
            **traced,
            mask=kinds.joined(
                p.joined, [masks.Dense(dense[i]) if i in dense else next(rest) for i in range(len(made))]
            ),
            axis_name=AXIS,
            layout=p.layout,
            implementation=p.backend,
            strategy=how,
            order=order,
            return_logsumexp=True,
            return_max_logits=p.max_logits,
        )
        return dict(zip(results, as_tuple(found), strict=True))

    found = jax.shard_map(
        run,
        mesh=Mesh(np.array(jax.devices()[: lying.devices]), (AXIS,)),
        in_specs=(specs, dense_specs, PartitionSpec(), PartitionSpec()),
        out_specs={name: lying.spec(at_of[name], rank[name]) for name in results},
    )(arrays, dense, others, traced)
    return {name: lying.whole(x, at_of[name]) for name, x in found.items()}
