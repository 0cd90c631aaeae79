"""One attention call in CANN's words: from a Problem and its Operands to the arguments of the operator."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_fa import dropout, masks
from jax_fa.backends.ascend import layout as layouts
from jax_fa.backends.ascend import modes, shift
from jax_fa.backends.ascend.drop import Drawn, Keep, Packed, Stored
from jax_fa.backends.ascend.installation import Library
from jax_fa.backends.ascend.modes import Sparse
from jax_fa.backends.ascend.sequences import Sequences
from jax_fa.backends.ascend.shift import Shift
from jax_fa.call import Call, Dims, Operands, Problem
from jax_fa.cann import spec
from jax_fa.indices import take_last

V2 = ("aclnnFlashAttentionScoreV2", "aclnnFlashAttentionScoreGradV2")
PACKED_V2 = ("aclnnFlashAttentionVarLenScoreV2", "aclnnFlashAttentionUnpaddingScoreGradV2")
PACKED_V4 = ("aclnnFlashAttentionVarLenScoreV4", "aclnnFlashAttentionUnpaddingScoreGradV4")
_ALIBI = {"linear": 2, "sqrt": 3}


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of the operator.

    Arrays have the layout's order. In layout TND, B counts the sequences, and Sq and Skv the rows of all.
    """

    layout: str
    B: int
    Sq: int
    Skv: int
    N: int
    K: int
    D: int
    Dv: int
    query: Any
    key: Any
    value: Any
    scale: float
    keep_prob: float
    sparse: Sparse
    mask: Any = None  # our own: [B or 1, N or 1, Sq, Skv] (TND: two dims), 1 = masked
    pse: Any = None
    pse_type: int = 1
    masking_logit: float | None = None  # of keys that a pse of -inf masks: see shift.Shift
    keep: Keep | None = None
    sequences: Sequences | None = None
    softmax_layout: str = ""


@dataclass(frozen=True)
class Translation:
    """What a call is in CANN's words, for the library of this machine (None: for some other one).

    Without a library at hand, V2 of the functions is counted on, and V4 is not.
    """

    call: Call  # of arrays or avals; avals are enough for the questions
    library: Library | None

    @property
    def problem(self) -> Problem:
        return self.call.problem

    @property
    def operands(self) -> Operands:
        return self.call.operands

    @property
    def dims(self) -> Dims:
        return self.call.dims

    @property
    def given(self) -> spec.Arguments | None:
        """The caller's own arguments, of a `flash_attention_score`."""
        hints = self.operands.hints
        return hints if isinstance(hints, spec.Arguments) else None

    # --- questions

    def exports(self, functions: tuple[str, str]) -> bool:
        return self.library is None or self.library.exports(*functions)

    @cached_property
    def whole(self) -> bool:
        """Whether this is the caller's `flash_attention_score`, not a shard of it or many of them."""
        d, cann = self.dims, self.given
        return cann is not None and cann.sizes == (*d.B, d.N, d.Sq, d.Skv)

    @cached_property
    def own_pse(self) -> bool:
        """Whether the caller's pse goes as it came."""
        x, cann, rank = self.operands, self.given, len(self.dims.B)
        if cann is None or cann.pse is None or not self.whole or math.prod(cann.pse.shape[:rank]) != 1:
            return False
        if x.scale is not None and math.prod(x.scale.shape) != 1:
            return False
        return cann.pse_type < 2 or self.exports(PACKED_V2 if cann.actual_seq_qlen else V2)

    @cached_property
    def slopes(self) -> bool:
        """Whether CANN evaluates ALiBi slopes: its V2 does, for queries and keys of one length without a bias."""
        x, d = self.operands, self.dims
        return self._plain_slopes and x.bias is None and d.Sq == d.Skv and self.exports(V2)

    @property
    def _plain_slopes(self) -> bool:
        """Whether there are slopes, one per head, of distances between indices."""
        x = self.operands
        return x.alibi_slopes is not None and x.alibi_slopes.shape[-1] == 1 and x.position is None

    @property
    def shifted(self) -> bool:
        """Whether the logits have a bias or slopes."""
        return self.operands.bias is not None or self.operands.alibi_slopes is not None

    @property
    def folds_scale(self) -> bool:
        """Whether the scale goes into the query, and CANN is told 1: where it is data, and where it is 0.

        CANN's scale is a host number. Functions without pseType add pse before they scale: 0 would take it away.
        """
        return self.operands.scale is not None or (self.problem.scale == 0 and self.shifted)

    @property
    def scale(self) -> float:
        """The scale that CANN is told."""
        return 1.0 if self.folds_scale else self.problem.scale

    def scale_factor(self):
        """What the query is multiplied by, float32 `[B or 1, N or 1]`, where the scale is folded into it."""
        if self.operands.scale is None:
            return jnp.full((1, 1), self.problem.scale, jnp.float32)
        return self.flat(self.operands.scale).astype(jnp.float32)

    def keep_factor(self):
        """The keep probability where it is data, float32 `[B or 1, N or 1]`: CANN's is a host number. Else None."""
        limit = self.operands.keep_threshold
        return None if limit is None else self.flat(limit).astype(jnp.float32) / dropout.LIMIT

    @cached_property
    def wide(self) -> bool:
        """Whether 16-bit arrays go as float32: pse must have their dtype, and a scale that is data multiplies them."""
        x = self.operands
        return x.query.dtype != jnp.float32 and (x.scale is not None or self.wide_pse)

    @property
    def wide_pse(self) -> bool:
        """Whether pse would lose digits in query's dtype."""
        x = self.operands
        if self.own_pse:
            return False
        if x.bias is not None and x.bias.dtype != x.query.dtype:
            return True
        return x.alibi_slopes is not None and not self.slopes

    @cached_property
    def sequences(self) -> Sequences | None:
        """The sequences of a call that goes to CANN in layout TND; None for one that does not."""
        x, mask = self.operands, self._packed_mask_kind
        if mask is None or math.prod(self.dims.B) != 1 or self.dims.N > spec.MAX_HEADS:
            return None
        q_ends, kv_ends = mask.query, mask.query if mask.key is None else mask.key
        if not all(isinstance(e, tuple) and all(isinstance(n, int) for n in e) for e in (q_ends, kv_ends)):
            return None
        # What is dense over the packed axes would have to be cut into sequences again, and drawn bits too.
        if x.dropout_seed is not None or (x.drop_bits is not None and not self.whole):
            return None
        if x.mask is not None and (self.given is None or self.given.mask is None or not self.whole):
            return None
        if self.shifted and not self.own_pse:
            alike = q_ends == kv_ends and self._plain_slopes and self.exports(PACKED_V2)
            if x.bias is not None or not alike:
                return None
        sparse = self._packed_sparse(mask, q_ends, kv_ends)
        if sparse is None or not q_ends or 0 in (q_ends[-1], kv_ends[-1]):
            return None
        found = Sequences.of(q_ends, kv_ends, sparse)
        return found if found.q_ends and found.q_ends[-1] else None

    @property
    def _packed_mask_kind(self) -> masks.CumulativeLengths | None:
        """The sequences of the mask, alone or with a dense mask beside them."""
        if self.problem.mask is None:
            return None
        members = masks.members(self.problem.mask)  # type: ignore[arg-type]
        packed = [m for m in members if isinstance(m, masks.CumulativeLengths)]
        dense = [m for m in members if isinstance(m, masks.Dense)]
        return packed[0] if len(packed) == 1 and len(packed) + len(dense) == len(members) else None

    def _packed_sparse(self, mask, q_ends, kv_ends) -> Sparse | None:
        lengths = [np.diff(ends, prepend=0).tolist() for ends in (q_ends, kv_ends)]
        cann = self.given
        if self.operands.mask is not None:
            return Sparse(mode=1, full=True)
        if cann is not None and cann.sparse_mode in (2, 3):
            return Sparse(mode=cann.sparse_mode)
        if cann is not None and cann.sparse_mode in (6, 7, 8):
            return Sparse(
                mode=cann.sparse_mode, pre=cann.pre_tokens, next=cann.next_tokens, prefix=cann.prefix or ()
            )
        return modes.of_packed(mask.within, list(zip(*lengths, strict=True)))

    @cached_property
    def sparse(self) -> Sparse:
        """The sparse mode of a call that is not packed."""
        d, cann = self.dims, self.given
        found = modes.of_mask(self.problem.mask, d)  # type: ignore[arg-type]
        if found is None:
            if self.whole and cann is not None and cann.sparse_mode == 5 and cann.prefix:
                return Sparse(mode=5, prefix=cann.prefix, hides=True, full=True)
            return Sparse(mode=1, hides=True, full=True)
        if not self.whole or cann is None or found.full:
            return found
        # The mode that the caller named, where several say the same.
        if cann.sparse_mode in (2, 3) and found.mode in (2, 3):
            return replace(found, mode=cann.sparse_mode)
        if cann.sparse_mode == 4 and found.mode != 0:
            far = d.Sq + d.Skv
            return replace(found, mode=4, pre=min(cann.pre_tokens, far), next=min(cann.next_tokens, far))
        return found

    # --- arguments

    def request(self) -> Request:
        if self.sequences is not None:
            return self._packed_request(self.sequences)
        d, layout = self.dims, layouts.choose(self.problem, self.dims)
        return Request(
            layout=layout,
            B=math.prod(d.B),
            Sq=d.Sq,
            Skv=d.Skv,
            **self._shift()._asdict(),
            keep=self._keep(),
            sparse=self.sparse,
            mask=self._full_mask() if self.sparse.full else None,
            **self._arrays(layout),
        )

    def _arrays(self, layout: str) -> dict[str, Any]:
        """query, key and value in the layout, and the numbers every layout has."""
        problem, x, d = self.problem, self.operands, self.dims
        D = max(d.D, d.Dv)  # CANN's values are no wider than its keys
        heads = {"query": d.N, "key": d.K, "value": d.K}
        dtype = jnp.float32 if self.wide else x.query.dtype
        found: dict[str, Any] = {}
        for name, count in heads.items():
            shape = layouts.full(problem, x, name, d)
            array = layouts.to_layout(getattr(x, name), problem.axes(name), layout, shape)
            array = array if name == "value" else layouts.widen(array, layout, count, D)
            if name == "query" and self.folds_scale:
                array = layouts.times(array, layout, count, self.scale_factor())
            found[name] = array.astype(dtype)
        drops = x.dropout_seed is not None or x.drop_bits is not None
        return found | {
            "N": d.N,
            "K": d.K,
            "D": D,
            "Dv": d.Dv,
            "scale": self.scale,
            "keep_prob": problem.keep_prob if drops else 1.0,
        }

    def _packed_request(self, sequences: Sequences) -> Request:
        arrays = self._arrays("TND")
        arrays |= {
            "query": sequences.take_rows(arrays["query"]),
            "key": arrays["key"][: sequences.kv_ends[-1]],
            "value": arrays["value"][: sequences.kv_ends[-1]],
        }
        added = self._shift(sequences)
        bits = self.operands.drop_bits
        in_rows = added.pse_type == 1 and self.library is not None and self.exports(PACKED_V4)
        return Request(
            layout="TND",
            B=len(sequences.q_ends),
            Sq=sequences.q_ends[-1],
            Skv=sequences.kv_ends[-1],
            **added._asdict(),
            keep=None if bits is None else Packed(bits.reshape(-1)),
            sparse=sequences.sparse,
            mask=self._packed_mask(sequences) if sequences.sparse.full else None,
            sequences=sequences,
            softmax_layout="same_as_input" if in_rows else "",
            **arrays,
        )

    # --- masks

    def _visible(self):
        """Which keys are visible, boolean `[B or 1, N or 1, Sq or 1, Skv or 1]`."""
        x, d = self.operands, self.dims
        j = jnp.arange(d.Skv, dtype=jnp.int32)
        visible = jnp.ones((1, 1, 1, 1), bool)
        if x.lower is not None:
            visible = visible & (j >= self.flat(x.lower)[..., None])
        if x.upper is not None:
            visible = visible & (j < self.flat(x.upper)[..., None])
        if x.mask is not None:
            visible = visible & self.flat(x.mask)
        if x.segment_row is not None:
            row, key = self.flat(x.segment_row)[..., None], self.flat(x.segment_key)[..., None, :]
            visible = visible & ((row < 0) | (row == key))
        return visible

    def _full_mask(self):
        """`[B or 1, N or 1, Sq, Skv]`, True = masked."""
        d, visible = self.dims, self._visible()
        B, N = visible.shape[:2]
        # CANN has no mask [1, N, Sq, Skv], and in mode 5 none without the batch.
        B = math.prod(d.B) if N > 1 or self.sparse.mode == 5 else B
        return jnp.broadcast_to(~visible, (B, N, d.Sq, d.Skv))

    def _packed_mask(self, sequences: Sequences):
        """The mask of the longest sequences where that says it, else of all rows and keys."""
        rows, keys = sequences.longest()
        own, within = self.given, self._packed_mask_kind.within  # type: ignore[union-attr]
        given = None if own is None else own.mask
        if given is not None and given.shape[-2:] != (rows, keys):
            return self._full_mask()[0, 0, : sequences.q_ends[-1], : sequences.kv_ends[-1]]
        masked = jnp.zeros((rows, keys), bool) if given is None else given.reshape(rows, keys) != 0
        i, j = jnp.arange(rows, dtype=jnp.int32)[:, None], jnp.arange(keys, dtype=jnp.int32)
        if isinstance(within, masks.Band):  # from the top left: mode 0
            if within.left is not None:
                masked = masked | (j < i - int(min(within.left, rows)))
            if within.right is not None:
                masked = masked | (j > i + int(min(within.right, keys)))
        return masked

    def seen(self):
        """Which rows have a visible key, boolean `*B N Sq`: one that neither the mask nor a bias of -inf masks."""
        d, visible = self.dims, self._visible()
        if self.operands.bias is not None:
            visible = visible & (self._bias_operand() != -jnp.inf)
        found = jnp.any(jnp.broadcast_to(visible, (*visible.shape[:-1], d.Skv)), axis=-1)
        return jnp.broadcast_to(found, (math.prod(d.B), d.N, d.Sq)).reshape(*d.B, d.N, d.Sq)

    # --- pse

    def _shift(self, sequences: Sequences | None = None) -> Shift:
        """The caller's own form of pse, slopes, or a bias."""
        x, cann = self.operands, self.given
        v2 = self.exports(V2 if sequences is None else PACKED_V2)
        dtype = jnp.float32 if self.wide else x.query.dtype
        if self.own_pse and cann is not None:
            pse = cann.pse.reshape(cann.pse.shape[len(self.dims.B) :])
            pse = pse if sequences is None else sequences.take_entries(pse)
            if cann.pse_type > 1:
                return Shift(pse, cann.pse_type)
            if cann.pse_type == 1 and not self.folds_scale:
                return shift.before_scaling(pse, self.scale)
            if cann.pse_type == 1:  # the query is scaled already
                scaled = pse.astype(jnp.float32) * self.scale_factor().reshape(())
                pse = jnp.where(pse == -jnp.inf, -jnp.inf, scaled)
            return shift.after_scaling(pse, dtype, self.scale, v2)
        if not self.shifted:
            return Shift()
        if self.slopes or sequences is not None:
            slopes = self.flat(x.alibi_slopes[..., 0]).astype(jnp.float32)
            return Shift(
                slopes[0] if slopes.shape[0] == 1 else slopes, _ALIBI[self.problem.alibi or "linear"]
            )
        return shift.after_scaling(self._bias(), dtype, self.scale, v2)

    def _bias_operand(self):
        """The bias operand, `[B or 1, N or 1, Sq or 1, Skv or 1]`."""
        x, d = self.operands, self.dims
        if x.bias_offset is None:
            return self.flat(x.bias)
        bias, offset = self.flat(x.bias), self.flat(x.bias_offset)
        index = offset[..., None] + jnp.arange(d.Skv, dtype=jnp.int32)
        lead = jnp.broadcast_shapes(bias.shape[:2], index.shape[:2])
        return take_last(bias, jnp.broadcast_to(index, (*lead, *index.shape[2:])))

    def _bias(self):
        """Everything that is added to the scaled logits, `[B or 1, N, Sq or 1, Skv]`."""
        x, d = self.operands, self.dims
        total: Any = None if x.bias is None else self._bias_operand()
        if x.alibi_slopes is not None:
            term = -self.flat(x.alibi_slopes)[..., None].astype(jnp.float32) * self._distance()
            total = term if total is None else total.astype(jnp.float32) + term
        B, _, rows, _ = total.shape
        return jnp.broadcast_to(total, (B, d.N, rows, d.Skv))

    def _distance(self):
        """What ALiBi slopes multiply, float32 `[B or 1, N or 1, Sq or 1, Skv]`."""
        x, d = self.operands, self.dims
        i = jnp.arange(d.Sq, dtype=jnp.int32) if x.position is None else self.flat(x.position)
        away = jnp.abs(jnp.arange(d.Skv, dtype=jnp.int32) - i[..., None]).astype(jnp.float32)
        return jnp.sqrt(away) if self.problem.alibi == "sqrt" else away

    # --- dropout

    def _keep(self) -> Stored | Drawn | None:
        x, d = self.operands, self.dims
        if x.dropout_seed is None and x.drop_bits is None:
            return None
        if x.dropout_seed is None and self.whole and len(d.B) == 1:
            return Stored(x.drop_bits.reshape(-1), (d.B[0], d.N, d.Sq, d.Skv))
        return Drawn(self.problem, x, d)

    def flat(self, x):
        """`*#B ...` with its batch dims as one, of size 1 or B."""
        B = self.dims.B
        rest = x.shape[len(B) :]
        if math.prod(x.shape[: len(B)]) == 1:
            return x.reshape(1, *rest)
        return jnp.broadcast_to(x, (*B, *rest)).reshape(-1, *rest)
