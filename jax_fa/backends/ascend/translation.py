"""From a call to one call of CANN's operator."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from jax_fa import dropout, masks
from jax_fa.backends.ascend import dense, shift, sparse_modes
from jax_fa.backends.ascend import layout as layouts
from jax_fa.backends.ascend.installation import Library
from jax_fa.backends.ascend.keep_bits import MAX_BYTES, Drawn, DrawnSequences, Given, GivenSequences
from jax_fa.backends.ascend.operator_call import OperatorCall
from jax_fa.backends.ascend.options import max_work
from jax_fa.backends.ascend.sequences import Ends, Sequences
from jax_fa.backends.ascend.shift import LOWEST_SINK, Shift
from jax_fa.backends.ascend.sparse_modes import SparseMode
from jax_fa.call import STORED, Call
from jax_fa.cann import spec

V2 = ("aclnnFlashAttentionScoreV2", "aclnnFlashAttentionScoreGradV2")
PACKED_V2 = ("aclnnFlashAttentionVarLenScoreV2", "aclnnFlashAttentionUnpaddingScoreGradV2")
PACKED_V4 = ("aclnnFlashAttentionVarLenScoreV4", "aclnnFlashAttentionUnpaddingScoreGradV4")
# With a sink: dense, packed.
SINKS = ("aclnnFlashAttentionScoreV3", "aclnnFlashAttentionScoreGradV3")
PACKED_SINKS = ("aclnnFlashAttentionVarLenScoreV5", "aclnnFlashAttentionUnpaddingScoreGradV5")
_PSE_TYPES = {kind: pse_type for pse_type, kind in spec.ALIBI_TYPES.items()}


@dataclass(frozen=True)
class Translation:
    """How CANN computes a call, with the library of this machine (None: with one of another machine).

    Where the library is not known, V2 of the functions is assumed, and V4 is not.
    """

    call: Call  # of arrays or avals; avals are enough for the questions
    library: Library | None

    # --- questions

    def exports(self, functions: tuple[str, str]) -> bool:
        return self.library is None or self.library.exports(*functions)

    @cached_property
    def given(self) -> spec.Arguments | None:
        """The caller's own arguments, if the call is a whole `flash_attention_score`: no shard of it, nor many of them."""
        hints, d = self.call.operands.hints, self.call.dims
        whole = isinstance(hints, spec.Arguments) and hints.sizes == (*d.B, d.N, d.Sq, d.Skv)
        return hints if whole else None

    @cached_property
    def own_pse(self) -> bool:
        """Whether the caller's pse is passed on in its own form."""
        given, d = self.given, self.call.dims
        if given is None or not self._own_pse_fits:
            return False
        if given.actual_seq_qlen is not None:  # it is that of layout TND
            return self.sequences is not None
        table = given.pse_type not in spec.ALIBI_TYPES and given.pse.shape[-2] not in (1, d.Sq)
        return not table or self.sparse.takes_table(d.Sq)

    @property
    def _own_pse_fits(self) -> bool:
        """Whether there is a pse of the caller's that CANN takes in the layout it was given for."""
        scale, given, rank = self.call.operands.scale, self.given, len(self.call.dims.B)
        if given is None or given.pse is None or math.prod(given.pse.shape[:rank]) != 1:
            return False
        if scale is not None and math.prod(scale.shape) != 1:
            return False
        if given.pse_type not in spec.ALIBI_TYPES:
            return True
        return self.exports(PACKED_V2 if given.actual_seq_qlen else V2)

    @cached_property
    def slopes(self) -> bool:
        """Whether CANN evaluates ALiBi slopes: its V2 does, for queries and keys of one length without a bias."""
        d = self.call.dims
        alone = self.call.operands.bias is None
        return self._plain_slopes and alone and d.Sq == d.Skv and self.exports(V2)

    @property
    def _plain_slopes(self) -> bool:
        """Whether there are slopes, one per head, of distances between indices."""
        x = self.call.operands
        return x.alibi_slopes is not None and x.alibi_slopes.shape[-1] == 1 and x.position is None

    @property
    def shifted(self) -> bool:
        """Whether the logits have a bias or slopes."""
        x = self.call.operands
        return x.bias is not None or x.alibi_slopes is not None

    @property
    def folds_scale(self) -> bool:
        """Whether the query is scaled, and CANN's scale is 1: where the scale is data, and where it is 0.

        CANN's scale is a host number. Functions without pseType add pse before they scale: 0 would take it away.
        """
        return self.call.operands.scale is not None or (self.call.problem.scale == 0 and self.shifted)

    @property
    def scale(self) -> float:
        """The scale that CANN gets."""
        return 1.0 if self.folds_scale else self.call.problem.scale

    def scale_factor(self):
        """What the query is multiplied by, float32 `[B or 1, N or 1]`, where the scale is folded into it."""
        scale = self.call.operands.scale
        if scale is None:
            return jnp.full((1, 1), self.call.problem.scale, jnp.float32)
        return dense.flat(self.call, scale).astype(jnp.float32)

    def keep_factor(self):
        """The keep probability where it is data, float32 `[B or 1, N or 1]`: CANN's is a host number. Else None."""
        limit = self.call.operands.keep_threshold
        return None if limit is None else dense.flat(self.call, limit).astype(jnp.float32) / dropout.LIMIT

    @cached_property
    def wide(self) -> bool:
        """Whether 16-bit calls are computed in float32: pse must have their dtype, and a traced scale multiplies query."""
        return self.call.dtype != jnp.float32 and (self.call.operands.scale is not None or self.wide_pse)

    @property
    def wide_pse(self) -> bool:
        """Whether pse would lose digits in query's dtype."""
        x = self.call.operands
        if self.own_pse:
            return False
        if x.bias is not None and x.bias.dtype != x.query.dtype:
            return True
        return x.alibi_slopes is not None and not self.slopes

    # --- the mask

    @property
    def _mask(self) -> masks.Mask | None:
        """The static mask. `Problem` lies below the masks and holds it as any hashable object."""
        return cast(masks.Mask | None, self.call.problem.mask)

    @cached_property
    def sparse(self) -> SparseMode:
        """The sparse mode of a call that is not packed."""
        d, given = self.call.dims, self.given
        if given is None:
            return sparse_modes.of_mask(self._mask, d)
        if given.actual_seq_qlen is not None:  # packed, but not for layout TND
            return sparse_modes.FULL_MASK
        return sparse_modes.of_arguments(given, d, own_mask=self.call.operands.mask is not None)

    @cached_property
    def sequences(self) -> Sequences | None:
        """The sequences of a call that goes to CANN in layout TND; None for one that does not."""
        x, d, ends = self.call.operands, self.call.dims, self._ends
        if ends is None or math.prod(d.B) != 1 or d.N > spec.MAX_HEADS:
            return None
        q_ends, kv_ends = ends
        # What is dense over the packed axes would have to be cut into sequences again.
        if x.drop_bits is not None and (self.given is None or x.dropout_seed is not None):
            return None
        if x.mask is not None and (self.given is None or self.given.mask is None):
            return None
        if self.shifted and not self._own_pse_fits:
            alike = q_ends == kv_ends and self._plain_slopes and self.exports(PACKED_V2)
            if x.bias is not None or not alike:
                return None
        sparse = self._packed_sparse(q_ends, kv_ends)
        if sparse is None or not q_ends or 0 in (q_ends[-1], kv_ends[-1]):
            return None
        found = Sequences.of(q_ends, kv_ends, sparse, with_pse=self.shifted)
        if not (found.q_ends and found.q_ends[-1] and found.kv_ends[-1]):
            return None
        # More are several calls (`split`), if nothing is stored for all together.
        whole = self.shifted or found.sparse.full or x.drop_bits is not None
        if whole and len(found.q_ends) > spec.MAX_SEQUENCES:
            return None
        if x.dropout_seed is not None and self._drawn_bytes(found)[1] >= MAX_BYTES:
            return None
        return found

    def drawn_bytes(self) -> tuple[int, int]:
        """Bytes of drawn keep bits, and of those that no splitting divides."""
        d = self.call.dims
        if self.sequences is not None:
            return self._drawn_bytes(self.sequences)
        return -(-math.prod((*d.B, d.N, d.Sq, d.Skv)) // 8), 0

    def _drawn_bytes(self, sequences: Sequences) -> tuple[int, int]:
        d, (largest, every) = self.call.dims, sequences.logits()
        whole = self.shifted or sequences.sparse.full  # which are stored for all sequences together
        least = d.N * every
        if max_work(self.call.problem) is not None:
            heads = d.G if self.call.operands.bias is None else d.N
            least = heads * (every if whole else largest)
        return -(-d.N * every // 8), -(-least // 8)

    @property
    def _ends(self) -> tuple[Ends, Ends] | None:
        """Where each packed sequence ends, in query and in key, if those are ints; None for a call that is not packed."""
        ends: tuple[Any, Any] = None, None
        if self.given is not None:
            ends = self.given.actual_seq_qlen, self.given.actual_seq_kvlen
        elif (kind := self._packed_mask_kind) is not None:
            ends = kind.query, kind.query if kind.key is None else kind.key
        return ends if all(map(_are_ints, ends)) else None

    @property
    def _packed_mask_kind(self) -> masks.CumulativeLengths | None:
        """The sequences of the mask, alone or with a dense mask beside them."""
        if self._mask is None:
            return None
        members = masks.members(self._mask)
        packed = [m for m in members if isinstance(m, masks.CumulativeLengths)]
        others = [m for m in members if isinstance(m, masks.Dense)]
        return packed[0] if len(packed) == 1 and len(packed) + len(others) == len(members) else None

    def _packed_sparse(self, q_ends: Ends, kv_ends: Ends) -> SparseMode | None:
        pairs = list(zip(*(np.diff(ends, prepend=0).tolist() for ends in (q_ends, kv_ends)), strict=True))
        if self.given is not None:
            own_mask = self.call.operands.mask is not None
            return sparse_modes.of_packed_arguments(self.given, self.call.dims, pairs, own_mask)
        kind = self._packed_mask_kind
        assert kind is not None  # it is where the ends came from
        return sparse_modes.of_packed(kind.within, pairs)

    def _packed_mask(self, sequences: Sequences):
        """The mask of the longest sequences where one serves all, else of all rows and keys."""
        rows, keys = sequences.longest()
        given = None if self.given is None else self.given.mask
        if given is not None and given.shape[-2:] != (rows, keys):
            return sequences.take_keys(sequences.take_rows(dense.mask(self.call)[0, 0]).T).T
        given = None if given is None else given.reshape(rows, keys) != 0
        return sequences.mask(given, *self._packed_tokens())

    def _packed_tokens(self) -> tuple[int | None, int | None]:
        """The band of every sequence, from the top left (mode 0)."""
        if self.given is not None:
            tokens = self.given.pre_tokens, self.given.next_tokens
            return tokens if self.given.sparse_mode == 0 else (None, None)
        kind = self._packed_mask_kind
        within = None if kind is None else kind.within
        if not isinstance(within, masks.Band):
            return None, None
        left, right = (None if n is None else int(n) for n in (within.left, within.right))
        return left, right

    # --- sinks

    def why_no_sinks(self, what: str) -> str | None:
        """None where CANN takes the sinks, or why they are plain JAX around the call."""
        call = self.call
        rank = len(call.dims.B)
        forward, backward = SINKS if self.sequences is None else PACKED_SINKS
        function = forward if what == "forward" else backward
        if self.library is None:
            return "which functions CANN has is not known here"
        if not self.library.exports(function):
            return f"this CANN has no {function}"
        if math.prod(call.operands.sinks.shape[:rank]) != 1:
            return "CANN has one sink per head, whatever the batch entry"
        if what == "forward":
            return None
        if call.problem.logsumexp:
            return f"{function} has no gradient of the log-sum-exp"
        if self.wide or call.dtype == jnp.float32:
            return f"{function} serves float16 and bfloat16"
        if self.sequences is not None and call.dims.D != call.dims.Dv:
            return f"{function} needs values as wide as keys"
        if "sinks" not in call.gradient_names:
            return "nobody asks for the gradient of the sinks"
        return None

    def _sink(self) -> dict[str, Any]:
        sinks = self.call.operands.sinks
        return {} if sinks is None else {"sink": jnp.maximum(sinks.reshape(-1), LOWEST_SINK)}

    # --- the operator's arguments

    def operator_call(self) -> OperatorCall:
        if self.sequences is not None:
            return self._packed_operator_call(self.sequences)
        d, layout, sparse = self.call.dims, layouts.choose(self.call), self.sparse
        B = math.prod(d.B)
        return OperatorCall(
            layout=layout,
            B=B,
            Sq=d.Sq,
            Skv=d.Skv,
            **self._shift().of_batch(B)._asdict(),
            keep=self._keep_bits(),
            sparse=sparse,
            # In mode 5 CANN has no mask without the batch.
            mask=dense.mask(self.call, whole_batch=sparse.mode == 5) if sparse.full else None,
            **self._sink(),
            **self._arrays(layout),
        )

    def _packed_operator_call(self, sequences: Sequences) -> OperatorCall:
        arrays = self._arrays("TND")
        arrays |= {
            "query": sequences.take_rows(arrays["query"]),
            "key": sequences.take_keys(arrays["key"]),
            "value": sequences.take_keys(arrays["value"]),
        }
        added = self._shift(sequences)
        by_sink = (
            self.call.operands.sinks is not None
        )  # those functions take the layout with every type of pse
        in_rows = added.pse_type == 1 and self.library is not None and self.exports(PACKED_V4)
        return OperatorCall(
            layout="TND",
            B=len(sequences.q_ends),
            Sq=sequences.q_ends[-1],
            Skv=sequences.kv_ends[-1],
            **added._asdict(),
            keep=self._keep_sequences(sequences),
            sparse=sequences.sparse,
            mask=self._packed_mask(sequences) if sequences.sparse.full else None,
            sequences=sequences,
            softmax_layout="same_as_input" if by_sink or in_rows else "",
            **self._sink(),
            **arrays,
        )

    def _arrays(self, layout: str) -> dict[str, Any]:
        """query, key and value in the layout, and what every layout has besides."""
        call, x, d = self.call, self.call.operands, self.call.dims
        D = max(d.D, d.Dv)  # CANN's values are no wider than its keys
        dtype = jnp.float32 if self.wide else call.dtype
        found: dict[str, Any] = {}
        for name in STORED:
            heads = d.N if name == "query" else d.K
            array = layouts.to_layout(call, name, getattr(x, name), layout)
            array = array if name == "value" else layouts.widen(array, layout, heads, D)
            if name == "query" and self.folds_scale:
                array = layouts.times(array, layout, heads, self.scale_factor())
            found[name] = array.astype(dtype)
        drops = x.dropout_seed is not None or x.drop_bits is not None
        keep_prob = call.problem.keep_prob if drops else 1.0
        return found | {"N": d.N, "K": d.K, "D": D, "Dv": d.Dv, "scale": self.scale, "keep_prob": keep_prob}

    def _shift(self, sequences: Sequences | None = None) -> Shift:
        """The caller's own form of pse, slopes, or a bias."""
        call, slopes = self.call, self.call.operands.alibi_slopes
        typed = self.exports(V2 if sequences is None else PACKED_V2)
        dtype = jnp.float32 if self.wide else call.dtype
        if self.own_pse:
            return self._own_shift(sequences, dtype, typed)
        if not self.shifted:
            return Shift()
        if self.slopes or sequences is not None:
            slopes = dense.flat(call, slopes[..., 0]).astype(jnp.float32)
            pse_type = _PSE_TYPES[call.problem.alibi or "linear"]
            return Shift(slopes[0] if slopes.shape[0] == 1 else slopes, pse_type)
        return shift.after_scaling(dense.bias(call), dtype, self.scale, typed)

    def _own_shift(self, sequences: Sequences | None, dtype, typed: bool) -> Shift:
        given = self.given
        assert given is not None
        pse = given.pse.reshape(given.pse.shape[len(self.call.dims.B) :])
        if given.pse_type in spec.ALIBI_TYPES:
            pse = pse if sequences is None else sequences.take_entries(pse)
            return Shift(pse, given.pse_type, starts=given.starts)
        pse = pse if sequences is None else sequences.own_pse(pse, self.call.dims.N)
        if given.pse_type == 1 and not self.folds_scale:
            return shift.before_scaling(pse, self.scale)
        if given.pse_type == 1:  # the query is scaled already
            scaled = pse.astype(jnp.float32) * self.scale_factor().reshape(())
            pse = jnp.where(pse == -jnp.inf, -jnp.inf, scaled)
        return shift.after_scaling(pse, dtype, self.scale, typed)

    def _keep_sequences(self, sequences: Sequences) -> GivenSequences | DrawnSequences | None:
        x = self.call.operands
        if x.dropout_seed is not None:
            return DrawnSequences(self.call, *sequences.places())
        return None if x.drop_bits is None else GivenSequences(x.drop_bits.reshape(-1))

    def _keep_bits(self) -> Given | Drawn | None:
        x, d = self.call.operands, self.call.dims
        if x.dropout_seed is None and x.drop_bits is None:
            return None
        if x.dropout_seed is None and self.given is not None and len(d.B) == 1:
            return Given(x.drop_bits.reshape(-1), (d.B[0], d.N, d.Sq, d.Skv))
        return Drawn(self.call)


def _are_ints(ends: Any) -> bool:
    return isinstance(ends, tuple) and all(isinstance(n, int) for n in ends)
