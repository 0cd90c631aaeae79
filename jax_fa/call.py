"""One call: what is static (`Problem`), what is data (`Operands`), how large it is, and what a derivative adds (`Saved`).

Letters, here and everywhere: `*B` leading batch dimensions, `Sq` and `Skv` sequence lengths, `N` query
heads, `K` key/value heads, `G = N // K` (query head n reads key head n // G), `D` query/key head_dim, `Dv`
value head_dim. `#X` is a dimension of size 1 or X.
"""

from collections.abc import Hashable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Axes = tuple[int, ...]
Size = Any  # an int, or a symbolic dimension of `jax.export`
Shape = tuple[Size, ...]
STORED = ("query", "key", "value")  # in an axis order of their own; the other operands are stored canonically


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything about a call that is known when it is traced, except shapes and dtypes.

    Query, key, value and out travel in the axis order they are stored in: `x.transpose(axes)` has the
    canonical meaning `*B S N D`. Every other operand is stored canonically.
    """

    query_axes: Axes
    key_axes: Axes
    value_axes: Axes
    out_axes: Axes
    scale: float
    logits_soft_cap: float | None = None
    alibi: Literal["linear", "sqrt"] | None = None
    keep_prob: float = 1.0
    # What the mask is (a `masks.Mask` without its arrays), for backends with a mask language of their own.
    mask: Hashable = None
    # Functions of one pair (`flex.Program`): what a score becomes before the soft cap, and what must hold for it to be visible.
    score_mod: Any = None
    mask_mods: tuple[Any, ...] = ()
    block_size: tuple[int, int] | None = None  # rows and columns of a block of `Operands.blocks`
    # The gradients of what broadcasts keep the first `mapped` batch dims in full: vmap added them.
    mapped: int = 0
    # Which gradients a derivative gives, by the names of operands and, of the second, "dout" and "dlogsumexp"; None: all.
    gradients: tuple[str, ...] | None = None
    # The forward also returns what rounding took from the output (see `Saved`): for a derivative in 16 bits.
    saves_rounding: bool = False
    # With bias_offset: no two key heads (of any batch entries) read the same element of bias.
    bias_apart: bool = False
    # The statistics and the output of a derivative are those of these keys and of others together.
    partial: bool = False
    # The caller asks for the log-sum-exp or has sinks; of a backward: the log-sum-exp has a cotangent.
    logsumexp: bool = False
    # How the sequence is spread over devices (a `sequence_parallel.Shards`); None: this device has all of it. Then key
    # and value are a part of the keys, and what says something of keys (bounds, columns, positions) does so of all.
    shards: Any = None
    # `jax.default_matmul_precision` where the call is traced. It is lowered later, elsewhere, and so is its gradient.
    precision: str | None = None
    # A fallback to the portable backend is an error (see `backends.strictness`).
    strict: bool = False
    # The backend that the caller named, and its options object where that was given.
    implementation: str | None = None
    options: Hashable = None

    def __post_init__(self) -> None:
        for name in (*STORED, "out"):
            axes = self.axes(name)
            if sorted(axes) != list(range(self.batch_rank + 3)):
                raise ValueError(f"{name}_axes={axes} must be a permutation of {self.batch_rank + 3} axes.")
        if not 0.0 < self.keep_prob <= 1.0:
            raise ValueError(f"{self.keep_prob=} must be in (0, 1].")

    @property
    def batch_rank(self) -> int:
        return len(self.query_axes) - 3

    @property
    def functions(self) -> tuple[Any, ...]:
        """The programs of `score_mod` and `mask_mods`, in the order in which they share vectors."""
        return (() if self.score_mod is None else (self.score_mod,)) + self.mask_mods

    @property
    def names_of_functions(self) -> str:
        """The arguments that hold them."""
        return " and ".join(dict.fromkeys(program.name for program in self.functions))

    def axes(self, name: str) -> Axes:
        """The axis order of query, key, value, or of out and what is stored like it."""
        return {"query": self.query_axes, "key": self.key_axes, "value": self.value_axes}.get(
            name, self.out_axes
        )

    def map_front(self, **batched: int | None) -> "Problem":
        """This problem with one more batch dim at the front; `batched` says where each array keeps it."""
        axes: dict[str, Any] = {}
        for name in (*STORED, "out"):
            at = batched.get(name) or 0
            axes[f"{name}_axes"] = (at, *(axis + (axis >= at) for axis in self.axes(name)))
        return replace(self, mapped=self.mapped + 1, **axes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Operands:
    """The arrays of a call, or their gradients. An absent one is None."""

    query: Any = None  # *#B Sq N D, in the order of query_axes
    key: Any = None  # *#B Skv K D
    value: Any = None  # *#B Skv K Dv
    bias: Any = None  # *#B #N #Sq #Skv, any float dtype, added after scaling; see bias_offset
    mask: Any = None  # *#B #N #Sq #Skv bool, True = visible
    lower: Any = None  # *#B #N #Sq int32: key j is visible only if lower <= j; None: 0
    upper: Any = None  # *#B #N #Sq int32: ... and j < upper; None: Skv
    alibi_slopes: Any = None  # *#B N #Sq float32
    dropout_seed: Any = None  # *#B 2 uint32: the Philox key
    dropout_stream: Any = None  # *#B #N 2 uint32: (head, batch) words of the Philox counter
    drop_bits: Any = None  # *#B bytes uint8: explicit keep bits, LSB first, 1 = keep
    drop_offset: Any = None  # *#B #N #Sq 2 int32: (byte, bit) of a row's key 0 in drop_bits
    # With it, bias is *#B #N elements, and that of key j is bias[bias_offset + j]. Out of range for masked keys at most.
    bias_offset: Any = None  # *#B #N #Sq int32
    position: Any = None  # *#B #N #Sq int32: the key position of a row, for ALiBi; None: its index
    # Key j is visible only if segment_row < 0 (the bounds say it all) or segment_row == segment_key[j].
    segment_row: Any = None  # *#B #N #Sq int32
    segment_key: Any = None  # *#B #N Skv int32
    # Traced scalars; the static ones are in the problem.
    scale: Any = None  # *#B #N float32 (float64 for float64 calls)
    soft_cap: Any = None  # *#B #N, likewise
    keep_threshold: Any = None  # *#B #N uint32: see dropout.threshold
    # The row and column of seeded dropout at which row 0 and key 0 of this call lie; None: 0.
    dropout_start: Any = None  # *1 2 uint32
    # One more logit of each row, without a value. Backends need not know of it: see `backends/sinks.py`.
    sinks: Any = None  # *#B N, of the statistics' dtype
    # A mask by blocks (see `flex.BlockMask`), of which functions are the other form. With block_pairs, bool, blocks are int32: 0
    # where all pairs are masked, 1 where none is, 2 + i for pairs i. Without, uint8: 0 where all are masked.
    blocks: Any = None  # *#B #N R C; see block_size
    block_pairs: Any = None  # *#B #N P rows keys
    # What functions close over (see `flex.Program`), and where this call's entries lie for them.
    function_floats: Any = None  # *#B 1 n float32 or float64: what score_mod is differentiable in
    function_words: Any = None  # *#B 1 n uint32
    function_place: Any = None  # *#B #N 2 int32: the batch index, over all of *B, and the head
    # The same call in the terms of the one backend that understands them: a pytree of arrays `*#B ...`, without gradient.
    # Everything else drops it unseen.
    hints: Any = None

    def items(self) -> list[tuple[str, Any]]:
        """All operands by name but the hints, absent ones (None) too."""
        return [(name, getattr(self, name)) for name in OPERANDS]

    def present(self) -> dict[str, Any]:
        """The operands that are given, but the hints."""
        return {name: x for name, x in self.items() if x is not None}

    def map(self, fn) -> "Operands":
        """Applies `fn(name, array)` to every operand that is present; drops the hints."""
        return Operands(**{name: None if x is None else fn(name, x) for name, x in self.items()})


OPERANDS = tuple(f.name for f in fields(Operands) if f.name != "hints")
OF_FUNCTIONS = ("function_floats", "function_words", "function_place")
OF_BLOCKS = ("blocks", "block_pairs")
DIFFERENTIABLE = (*STORED, "bias", "alibi_slopes", "scale", "soft_cap", "sinks", "function_floats")
# Those that kernels take, and of which they give derivatives: functions are evaluated by the portable backend alone, and the
# derivatives of sinks are taken care of in `sinks.py`.
PLAIN_OPERANDS = tuple(name for name in OPERANDS if name not in OF_FUNCTIONS)
PLAIN_DIFFERENTIABLE = tuple(name for name in DIFFERENTIABLE if name in PLAIN_OPERANDS and name != "sinks")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a derivative has besides the operands: results of the forward and, where it takes them, the cotangents.

    Batch dims may have size 1 where those of the call do not: what vmap did not map.
    """

    out: Any  # in the order of out_axes
    m: Any  # softmax max, *#B N Sq
    l: Any  # softmax sum, *#B N Sq
    dout: Any = None  # like out
    # Like out, in 16-bit calls: the output without rounding is out + rounding * rounding_unit. The backward
    # subtracts delta = rowsum(dout * output) from numbers of delta's size, so that the digits beyond 16 bits count.
    rounding: Any = None
    dlogsumexp: Any = None  # *#B N Sq
    # The second takes tangents of the cotangents, too.
    dout_tangent: Any = None
    dlogsumexp_tangent: Any = None

    def of_forward(self) -> "Saved":
        """What the forward gave, without cotangents."""
        return Saved(out=self.out, m=self.m, l=self.l, rounding=self.rounding)

    def present(self) -> dict[str, Any]:
        """The arrays that are given."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in found.items() if x is not None}


# Fields of Saved in the order of out_axes; the rest are statistics.
LIKE_OUT = ("out", "dout", "rounding", "dout_tangent")


def rounding_unit(dtype: Any) -> float:
    """What one unit of `Saved.rounding` stands for: half a unit in the last place of 1."""
    return float(jnp.finfo(dtype).eps) / 2


def narrowed(x, dtype: Any) -> tuple[Any, Any]:
    """x in the dtype, and what rounding took from it, as wide as x.

    (Behind a barrier: XLA may drop a pair of casts, and its reduce_precision takes float16's subnormals for 0.)
    """
    narrow = jax.lax.optimization_barrier(x.astype(dtype))
    return narrow, x - narrow.astype(x.dtype)


def widened(x, lost, dtype: Any):
    """x in the dtype, with what rounding took from it (`Saved.rounding`) where that is known."""
    wide = x.astype(dtype)
    return wide if lost is None else wide + lost.astype(dtype) * rounding_unit(x.dtype)


def has_rounding(dtype: Any) -> bool:
    """Whether an output of this dtype is rounded from a wider sum."""
    return jnp.dtype(dtype).itemsize < 4


@dataclass(frozen=True)
class Dims:
    """The sizes of a call; `B` is the full batch shape."""

    B: Shape
    Sq: Size
    Skv: Size
    N: Size
    K: Size
    D: Size
    Dv: Size

    @property
    def G(self) -> Size:
        return self.N // self.K


def canonical_shape(shape: tuple[Any, ...], axes: Axes) -> tuple[Any, ...]:
    return tuple(shape[axis] for axis in axes)


def stored_shape(shape: tuple[Any, ...], axes: Axes) -> tuple[Any, ...]:
    """The shape of an array stored in the order `axes` whose canonical shape is `shape`."""
    return tuple(shape[axes.index(i)] for i in range(len(axes)))


def _dims(problem: Problem, operands: Operands, *others: "Saved | Operands | None") -> Dims:
    """Reads the sizes off the arrays (or avals); `others` as under vmap the cotangents or tangents alone may be mapped."""
    rank = problem.batch_rank
    q, k, v = (canonical_shape(getattr(operands, name).shape, problem.axes(name)) for name in STORED)
    batches = [
        canonical_shape(x.shape, problem.axes(name))[:rank]
        if name in (*STORED, *LIKE_OUT)
        else x.shape[:rank]
        for given in (operands, *others)
        if given is not None
        for name, x in given.present().items()
    ]
    B = tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*batches, strict=True))
    return Dims(B, q[rank], k[rank], q[rank + 1], k[rank + 1], q[rank + 2], v[rank + 2])


def is_symbolic(size: Size) -> bool:
    """A dim of `jax.export.symbolic_shape`, whose value is not known yet."""
    return not isinstance(size, (int, np.integer))


def accumulator_dtype(dtype: Any) -> np.dtype:
    """float32, or float64 for float64 inputs: what is summed, and the dtype of the softmax statistics."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


@dataclass(frozen=True)
class Call:
    """A problem, its operands (arrays or avals), and their sizes. Made by `Call.of`."""

    problem: Problem
    operands: Operands
    dims: Dims
    # The masks alone of the other parts where what is visible to a row is several intervals: for `attention`, which makes a
    # call of each and merges them. Nothing below it has any.
    parts: tuple[Operands, ...] = ()

    @classmethod
    def of(cls, problem: Problem, operands: Operands, *others: Saved | Operands | None) -> "Call":
        """`others`: what is saved and tangents, for a derivative."""
        return cls(problem, operands, _dims(problem, operands, *others))

    def replace(self, *, problem: Problem | None = None, operands: Operands | None = None) -> "Call":
        """The call with another problem or other operands. Its batch stays, also where only saved arrays have it."""
        problem, operands = problem or self.problem, operands or self.operands
        return replace(
            self, problem=problem, operands=operands, dims=replace(_dims(problem, operands), B=self.dims.B)
        )

    @property
    def in_parts(self) -> list[Operands]:
        """The operands of each part, whose visible keys are disjoint."""
        masks = ("mask", "lower", "upper", "segment_row", "segment_key")
        others = ({name: getattr(part, name) for name in masks} for part in self.parts)
        return [self.operands, *(replace(self.operands, **part) for part in others)]

    def without_hints(self) -> "Call":
        return replace(self, operands=replace(self.operands, hints=None))

    def without_sinks(self) -> "Call":
        wanted = self.problem.gradients
        wanted = None if wanted is None else tuple(name for name in wanted if name != "sinks")
        problem = replace(self.problem, gradients=wanted)
        return replace(self, problem=problem, operands=replace(self.operands, sinks=None))

    def full(self, saved: "Saved") -> "Saved":
        """What is saved, with all batch dims in full."""

        def full(name: str, x):
            like_out = name in LIKE_OUT
            return jnp.broadcast_to(x, self.out_shape if like_out else self.stats_shape)

        return replace(saved, **{name: full(name, x) for name, x in saved.present().items()})

    @property
    def dtype(self) -> np.dtype:
        return self.operands.query.dtype

    @property
    def acc(self) -> np.dtype:
        """What is summed in, and the dtype of the softmax statistics."""
        return accumulator_dtype(self.dtype)

    @property
    def symbolic(self) -> bool:
        """Whether some dim is symbolic."""
        d = self.dims
        return any(map(is_symbolic, (*d.B, d.Sq, d.Skv, d.N, d.K, d.D, d.Dv)))

    @property
    def out_shape(self) -> Shape:
        """As stored."""
        d = self.dims
        return stored_shape((*d.B, d.Sq, d.N, d.Dv), self.problem.out_axes)

    @property
    def stats_shape(self) -> Shape:
        d = self.dims
        return (*d.B, d.N, d.Sq)

    @property
    def gradient_names(self) -> list[str]:
        """The operands whose gradients are wanted."""
        wanted = DIFFERENTIABLE if self.problem.gradients is None else self.problem.gradients
        return [
            name for name in DIFFERENTIABLE if name in wanted and getattr(self.operands, name) is not None
        ]

    def gradient_shape(self, name: str) -> Shape:
        """That of the operand; in full are the batch dims that vmap added, for query, key and value all of them."""
        shape = getattr(self.operands, name).shape
        if name in STORED:
            axes, B = self.problem.axes(name), self.dims.B
            return stored_shape((*B, *canonical_shape(shape, axes)[len(B) :]), axes)
        mapped = self.problem.mapped
        return (*self.dims.B[:mapped], *shape[mapped:])

    def gradients(self, found: dict[str, Any]) -> Operands:
        """Gradients by name, as stored, summed over the dims in which their operands broadcast, in their dtypes."""
        summed: dict[str, Any] = {}
        for name in self.gradient_names:
            if name == "sinks" and name not in found:
                continue  # a backend may leave that to `sinks.py`
            operand = getattr(self.operands, name)
            x = sum_to(found[name], self.gradient_shape(name), accumulator_dtype(operand.dtype))
            summed[name] = x.astype(operand.dtype)
        return Operands(**summed)


def sum_to(x, shape: Shape, dtype: Any = None):
    """x summed, in the dtype, over the dims that have size 1 in `shape`."""
    axes = [axis for axis, (size, want) in enumerate(zip(x.shape, shape, strict=True)) if size != want]
    return jnp.sum(x, axis=axes, keepdims=True, dtype=dtype) if axes else x
