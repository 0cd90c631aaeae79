"""From the arguments of CANN's operator to a `Call`, and from results to what CANN hands out.

Every entry of this room gives its arguments, under whatever names it has them, to one `Operator`.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import backends, checks, compat, entry
from jax_fa.arguments import array, choice, integer, shown
from jax_fa.attention import Attention
from jax_fa.call import Axes, Call, Dims
from jax_fa.cann import sinks, spec, statistics
from jax_fa.cann.drop_mask import dropout
from jax_fa.cann.masks import MaskArguments
from jax_fa.cann.packed import Packed, sequences
from jax_fa.cann.pse import Pse, check_mode_of_pse
from jax_fa.indices import known, list_of_integers

_CANN = "ascend"  # the backend that asks it


class _Layout(NamedTuple):
    axes: Axes  # put arrays of rank 4 (TND: 3) into the order *B S N D
    unfolded: str | None = None  # the layout once an axis H = N * D is split into heads and head_dim


_LAYOUTS = {
    "BSH": _Layout((0, 1, 2, 3), unfolded="BSND"),
    "SBH": _Layout((1, 0, 2, 3), unfolded="SBND"),
    "BSND": _Layout((0, 1, 2, 3)),
    "BNSD": _Layout((0, 2, 1, 3)),
    "TND": _Layout((0, 1, 2)),
}


@dataclass(frozen=True, kw_only=True)
class Operator:
    """The arguments of the operator, which `flash_attention_score` describes."""

    arrays: tuple[Any, Any, Any]  # query, key, value
    ropes: tuple[Any, Any] = (None, None)  # of query and key
    head_num: Any
    input_layout: Any
    scale: Any
    inner_precise: Any
    pse: Pse
    sparse: MaskArguments
    dropped: tuple[Any, Any, Any]  # keep_prob, drop_mask, dropout_key
    ends: tuple[Any, Any]  # actual_seq_qlen, actual_seq_kvlen
    sink: Any = None
    softmax_blocks: bool = False  # in layout TND, the statistics have torch_npu's own order
    implementation: Any = None

    def built(self) -> "Built":
        """The call; raises where the arguments do not fit."""
        backend = backends.chosen(self.implementation)
        self._check_choices()
        scale = checks.finite_scale("scale_value", self.scale)
        arrays = self._arrays()
        d, dtype = arrays.dims, arrays.query.dtype
        lists = _as_lists(backend[0])
        packed = sequences(self.input_layout, *self.ends, d, lists=lists)
        sparse, pse, sink = self.sparse, self.pse, sinks.checked(self.sink, d)
        _check_limits(d, packed, sparse.prefix)
        check_mode_of_pse(pse.values, sparse.mode)
        call = entry.build(
            arrays,
            mask=sparse.mask(d, packed, lists=lists),
            terms=pse.terms(sparse, scale=scale, dtype=dtype, d=d, packed=packed),
            scale=scale,
            dropped=dropout(*self.dropped, d, packed),
            backend=backend,
            hints=_own_form(sparse, pse, d, packed, lists),
        )
        return Built(self, call, packed, sink)

    # --- checks and shapes

    def _check_choices(self) -> None:
        choice("input_layout", self.input_layout, _LAYOUTS)
        choices = {
            "inner_precise": self.inner_precise,
            "sparse_mode": self.sparse.mode,
            "pse_type": self.pse.type,
        }
        for name, x in choices.items():
            integer(name, x)
        if self.inner_precise not in (0, 1, 2):
            raise ValueError(f"inner_precise must be 0, 1 or 2; got {self.inner_precise!r}.")

    def _arrays(self) -> checks.Arrays:
        """query, key and value with separate head and head_dim axes, and the rotated parts beside the others."""
        head_num, input_layout = self.head_num, self.input_layout
        if isinstance(head_num, bool) or not isinstance(head_num, (int, np.integer)):
            raise TypeError(f"head_num must be an int; got {shown(head_num)}.")
        if not 0 < head_num <= spec.MAX_HEADS:
            raise ValueError(f"head_num must be in 1..{spec.MAX_HEADS}; got {head_num}.")
        axes, unfolded = _LAYOUTS[input_layout]
        names = ("query", "key", "value")
        query, key, value = (self._stored(name, x) for name, x in zip(names, self.arrays, strict=True))
        if unfolded:
            query, key, value = _unfold(query, key, value, head_num)
        query, key = self._with_rope(query, key)
        found = checks.arrays(query, key, value, axes, self._layout_text)
        d = found.dims
        if d.N != head_num:
            raise ValueError(
                f"head_num must be query's number of heads {d.N} (shape {found.query.shape}, {self._layout_text}); "
                f"got {head_num}."
            )
        if not 0 < d.Dv <= d.D:
            raise ValueError(
                f"value must have a head_dim in 1..D={d.D}; got {d.Dv} from shape {found.value.shape} "
                f"({self._layout_text})."
            )
        return found

    @property
    def _layout_text(self) -> str:
        unfolded = _LAYOUTS[self.input_layout].unfolded
        return f"{self.input_layout} as {unfolded}" if unfolded else self.input_layout

    def _stored(self, name: str, x):
        """An array in the layout, as a JAX array."""
        x = x if hasattr(x, "dtype") else array(name, x)
        if x.dtype.name not in spec.DTYPES:
            *some, last = spec.DTYPES
            raise TypeError(f"{name} must have dtype {', '.join(some)} or {last}; got {x.dtype}.")
        axes, unfolded = _LAYOUTS[self.input_layout]
        rank = 3 if unfolded else len(axes)
        if x.ndim != rank:
            raise ValueError(
                f"{name} must have {rank} dimensions ({self.input_layout}); got shape {x.shape}."
            )
        return jnp.asarray(x)

    def _with_rope(self, query, key):
        """The logits are query key^T + query_rope key_rope^T: products of the parts side by side."""
        ropes = dict(zip(("query_rope", "key_rope"), zip(self.ropes, (query, key), strict=True), strict=True))
        absent = [name for name, (rope, _) in ropes.items() if rope is None]
        if len(absent) == 1:
            raise ValueError(f"query_rope and key_rope go together; got {absent[0]}=None.")
        if absent:
            return query, key
        joined = []
        for name, (rope, x) in ropes.items():
            rope = self._stored(name, rope)
            if rope.ndim < x.ndim:  # unfolded
                heads = x.shape[2]
                rope = rope.reshape(*rope.shape[:2], heads, _divide(name, rope, "its number of heads", heads))
            if rope.dtype != x.dtype or rope.shape[:-1] != x.shape[:-1]:
                raise ValueError(
                    f"{name} must have the dtype {x.dtype} and, but for head_dim, the shape {x.shape} of "
                    f"{name.removesuffix('_rope')}; got {rope.dtype} and {rope.shape}."
                )
            joined.append(jnp.concatenate([x, rope], axis=-1))
        return joined

    def beside(self, x, rope, heads: int):
        """An array of so many heads and its rotated part, along head_dim; both as stored, as is the result. None is no part."""
        if rope is None:
            return x
        if not _LAYOUTS[self.input_layout].unfolded:
            return jnp.concatenate([x, rope], axis=-1)
        parts = (a.reshape(*a.shape[:2], heads, a.shape[2] // heads) for a in (x, rope))
        joined = jnp.concatenate(list(parts), axis=-1)
        return joined.reshape(*joined.shape[:2], x.shape[2] + rope.shape[2])


@dataclass(frozen=True)
class Built:
    """A call that is ready to run, and the way back to the operator's layout."""

    operator: Operator
    call: Call
    packed: Packed | None
    sink: Any

    @property
    def numels(self) -> int:
        """How many weights there are: keep bits of a dropout mask. 0 where the lengths are traced."""
        d = self.call.dims
        if self.packed is None:
            return math.prod((*d.B, d.N, d.Sq, d.Skv))
        lengths = self.packed.lengths()
        return 0 if lengths is None else d.N * sum(int(a) * int(b) for a, b in zip(*lengths, strict=True))

    def results(self, result: Attention):
        """(attention_out, softmax_max, softmax_sum)."""
        d = self.call.dims
        m, l = result.softmax_max, result.softmax_sum
        m, l = statistics.stored(m, l, d, self.packed, blocks=self.operator.softmax_blocks)
        return self.folded(result.out), m, l

    def run(self, call: Call) -> Attention:
        return entry.with_sinks(call, self.sink)(call)

    def folded(self, x):
        """query, key, value, out or their kin as stored, with heads and head_dim as one axis where the layout has one."""
        unfolded = _LAYOUTS[self.operator.input_layout].unfolded
        # (Of an empty array, -1 is no size.)
        return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3]) if unfolded else x

    def like_out(self, name: str, x):
        """An argument that is shaped and stored like attention_out."""
        call = self.call
        if not hasattr(x, "dtype"):
            raise TypeError(f"{name} must be an array like attention_out; got {shown(x)}.")
        if x.dtype != call.dtype:
            raise TypeError(f"{name} must have query's dtype {call.dtype}; got {x.dtype}.")
        wanted = jax.eval_shape(self.folded, jax.ShapeDtypeStruct(call.out_shape, call.dtype)).shape
        if x.shape != wanted:
            raise ValueError(f"{name} must have the shape of attention_out, {wanted}; got {x.shape}.")
        return jnp.asarray(x).reshape(call.out_shape)

    def statistics(self, softmax_max, softmax_sum):
        """The kernels' (max, sum) of those that an entry gave."""
        blocks = self.operator.softmax_blocks
        return statistics.loaded(softmax_max, softmax_sum, self.call.dims, self.packed, blocks=blocks)


def _as_lists(implementation: str | None) -> bool:
    """Whether known ends and prefixes are part of the program.

    CANN takes nothing else, and a mask of T x T costs more than compiling again. Where it cannot be asked, as outside of jit on
    another platform, they are data: each call would compile a program of its own, which JAX keeps.
    """
    asked = {
        platform
        for backend in backends.every()
        if backend.name == _CANN
        for platform in backend.platforms or ()
    }
    return implementation == _CANN or jax.default_backend().lower() in asked or compat.in_program()


def _unfold(query, key, value, head_num):
    """H into N x D: D = H / head_num, K = Hkv / D, Dv = Hv / K."""
    D = _divide("query", query, "head_num", head_num)
    K = _divide("key", key, "query's head_dim D", D)
    Dv = _divide("value", value, "key's number of heads K", K)
    shapes = ((query, (head_num, D)), (key, (K, D)), (value, (K, Dv)))
    return tuple(x.reshape(*x.shape[:2], *heads) for x, heads in shapes)


def _divide(name: str, x, what: str, by: int) -> int:
    size = x.shape[2]
    if size == 0 or size % by:
        raise ValueError(
            f"{name} must have a last axis H that is a positive multiple of {what}={by}; got H={size}."
        )
    return size // by


def _check_limits(d: Dims, packed: Packed | None, prefix) -> None:
    """CANN's limits on sizes."""
    if packed is None:
        B, most = d.B[0], spec.MAX_BATCH if prefix is None else spec.MAX_BATCH_PREFIX
    else:
        B, most = packed.count, spec.MAX_BATCH if prefix is None else spec.MAX_SEQUENCES_PREFIX
    with_prefix = "" if prefix is None else " with prefix"
    rows, keys = ("Sq", "Skv") if packed is None else ("T", "T")
    for name, what, size, limit in (
        ("query", f"B{with_prefix}", B, most),
        ("query", rows, d.Sq, spec.MAX_LENGTH),
        ("key", keys, d.Skv, spec.MAX_LENGTH),
        ("query", "D", d.D, spec.MAX_HEAD_DIM),
    ):
        if isinstance(size, int) and size > limit:  # a symbolic size (jax.export) has no number yet
            raise ValueError(f"{name} must have {what} of at most {limit}; got {size}.")


# --- the call in CANN's terms, for the Ascend backend


def _own_form(
    sparse: MaskArguments, pse: Pse, d: Dims, packed: Packed | None, lists: bool
) -> spec.Arguments | None:
    """Nothing where CANN's host integers are arrays here."""
    query_ends, key_ends = (None, None) if packed is None else (packed.query, packed.key)
    prefix = None if sparse.prefix is None else list_of_integers("prefix", sparse.prefix)
    values = None if prefix is None else known(prefix)
    if prefix is not None and (values is None or not lists):
        return None
    if not isinstance(query_ends, tuple | None) or not isinstance(key_ends, tuple | None):
        return None
    mask = sparse.atten_mask if packed is not None and sparse.full() else None
    # CANN's TND has no mask for each sequence.
    mask = None if mask is None or math.prod(np.shape(mask)[:-2]) != 1 else mask

    def lead(x):
        return None if x is None else jax.lax.stop_gradient(jnp.asarray(x)[(None,) * len(d.B)])

    return spec.Arguments(
        sizes=(*d.B, d.N, d.Sq, d.Skv),
        sparse_mode=int(sparse.mode),
        pre_tokens=max(-spec.UNBOUNDED, min(int(sparse.pre_tokens), spec.UNBOUNDED)),
        next_tokens=max(-spec.UNBOUNDED, min(int(sparse.next_tokens), spec.UNBOUNDED)),
        prefix=None if values is None else tuple(values.tolist()),
        actual_seq_qlen=query_ends,
        actual_seq_kvlen=key_ends,
        pse_type=int(pse.type),
        starts=pse.starts,
        pse=lead(pse.values),
        mask=lead(mask),
    )


# --- names


@contextmanager
def named(names: dict[str, str]) -> Iterator[None]:
    """Errors name the arguments as the entry does: `names` says how it calls those of the operator."""
    try:
        yield
    except (TypeError, ValueError) as error:
        pattern = rf"\b({'|'.join(names)})\b"
        text = re.sub(pattern, lambda found: names[found[0]], str(error))
        raise type(error)(text).with_traceback(error.__traceback__) from error.__cause__
