"""How a call splits over devices: batch, heads and query rows shard, everything else is whole.

The rule is written once, in labels. Each operand and result is described by one label per dim, in the order
it is stored; a label is a batch dim (an int), "N", "K", "Sq", or None for what must be whole: the keys' sequence, a
head_dim, or a dim of size 1 that broadcasts. Nothing is communicated but sums: the gradient of an operand that lacks a
label that is sharded, as a key lacks "Sq", is a sum over shards.

XLA asks for the shardings of operands and results (`Split`), and these are read as what they mean: which block of each
label every device has. So the rule needs no mesh, and a program means the same in another process.

Sharded keys are gathered: sequence parallelism is a function that the caller names, not a rule.
"""

from jax_fa.sharding.gathering import gathered_by_types, warn
from jax_fa.sharding.labels import Labels, Partition, explicit_axes
from jax_fa.sharding.partitioner import TARGET, Split, restore_splits, split

__all__ = [
    "TARGET",
    "Labels",
    "Partition",
    "Split",
    "explicit_axes",
    "gathered_by_types",
    "restore_splits",
    "split",
    "warn",
]
