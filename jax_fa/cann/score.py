"""The public entries with the names of CANN's operator: `flash_attention_score` and its backward.

Names, layouts and rules are those of `aclnnFlashAttentionScore`; `torch_npu` holds the entries with torch_npu's names.
`operator` turns the arguments into a `Call`; `masks` holds the sparse modes, `pse` the positional shift, `drop_mask` the
keep bits, `packed` the arithmetic of layout TND, `statistics` and `sinks` what their names say, `spec` the constants.
"""

import warnings
from typing import Any, NamedTuple

from jaxtyping import Array, ArrayLike, Float, Float32

from jax_fa import backends, entry
from jax_fa.attention import Attention
from jax_fa.cann import backward, spec
from jax_fa.cann.masks import MaskArguments
from jax_fa.cann.operator import Operator
from jax_fa.cann.pse import Pse


class FlashAttentionScoreOutput(NamedTuple):
    softmax_max: Float32[Array, "B N Sq 8"]  # TND: T N 8
    softmax_sum: Float32[Array, "B N Sq 8"]
    attention_out: Float[Array, "..."]  # in query's layout


class FlashAttentionScoreGradOutput(NamedTuple):
    dq: Float[Array, "..."]
    dk: Float[Array, "..."]
    dv: Float[Array, "..."]
    dpse: Float[Array, "..."] | None  # of pse, where there is one
    dsink: Float32[Array, " N"] | None


@entry.entry
def flash_attention_score(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    pse: ArrayLike | None = None,
    drop_mask: ArrayLike | None = None,
    atten_mask: ArrayLike | None = None,
    prefix: Any = None,
    *,
    head_num: int,
    input_layout: str = "BSH",
    scale_value: float | ArrayLike = 1.0,
    keep_prob: float | int = 1.0,
    pre_tokens: int = spec.UNBOUNDED,
    next_tokens: int = spec.UNBOUNDED,
    inner_precise: int = 0,
    sparse_mode: int = 0,
    pse_type: int = 1,
    q_start_idx: Any = None,
    kv_start_idx: Any = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    query_rope: ArrayLike | None = None,
    key_rope: ArrayLike | None = None,
    sink: ArrayLike | None = None,
    implementation: backends.Implementation = None,
) -> entry.Request[FlashAttentionScoreOutput]:
    """CANN's `aclnnFlashAttentionScore` for JAX arrays, on every backend, differentiable.

        x = scale_value * (query key^T + pse), x = -FLT_MAX where masked
        softmax_max = max_j x, softmax_sum = sum_j exp(x - softmax_max)
        attention_out = (keep / keep_prob * exp(x - softmax_max) / softmax_sum) value

    B batch, Sq and Skv lengths, N query heads, K key/value heads (query head n reads key head n // (N // K)),
    D query/key head_dim, Dv value head_dim, `d = Skv - Sq`.

    Args:
      query: float16, bfloat16 or float32, in `input_layout`, with N = head_num.
      key: query's dtype, layout, B and D. K must divide N.
      value: key's dtype and shape, except that Dv may be smaller than D.
      pse: positional shift, see pse_type. Types 0 and 1, query's dtype: `[B, N, Sq, Skv]`,
        `[1, N, Sq, Skv]`, `[B or 1, N, 1, Skv]`, or `[B or 1, N, 1024, Skv]`, the last 1024 rows of a matrix
        whose values depend on row - column only (Sq = Skv > 1024 and causal masking). TND: one dimension,
        with blocks `[N, Sq_b, Skv_b]` or `[N, Skv_b]` one after another, or `[B or 1, N, 1024, max Skv_b]`,
        whose entry (r, c) holds the distance `row - column = max Skv_b - 1024 + r - c` (Sq_b = Skv_b and
        causal masking). Types 2 and 3, float32: slopes `[N]` or `[B, N]`, with Sq = Skv. Differentiable in
        every form.
      drop_mask: uint8 of any shape: a stream of bits, least significant first, 1 = keep, of which bit
        `((b*N + n)*Sq + i)*Skv + j` belongs to key j of row i (TND: blocks `[N, Sq_b, Skv_b]` one after
        another, without padding). See `jax_fa.dropout_mask`.
      atten_mask: bool or uint8, 1 = masked. Sparse modes 0 and 1: `[B, N, Sq, Skv]`, `[B, 1, Sq, Skv]`,
        `[1, 1, Sq, Skv]` or `[Sq, Skv]` (mode 5: the first two, with B = 1 all; TND: `[max Sq_b, max Skv_b]`,
        `[B, 1 or N, max Sq_b, max Skv_b]` or `[sum Sq_b, sum Skv_b]`). Other modes need none; the `[2048, 2048]` mask
        that CANN wants (mode 6: `[3072, 2048]`) is accepted, checked where its values are known, and not read.
      prefix: sparse modes 5 and 6: one integer per batch entry in `max(0, d) .. Skv`. Values that are known are part
        of the program; those not known when tracing mean the nearer end of 0 .. Skv.
      head_num: N.
      input_layout: "BSH", "SBH", "BSND", "BNSD", or "TND" for sequences of different lengths packed along T.
      scale_value: factor of the logits, a finite number or an array that holds one. Note the default: 1, not
        `1 / sqrt(D)`.
      keep_prob: in (0, 1]: what kept weights are divided by. Below 1 it needs drop_mask; a drop_mask is
        applied at keep_prob = 1 too.
      pre_tokens: how many keys before its own position are visible to a row, in sparse modes 0 (position i) and 4
        (position i + d). 2147483647 is unbounded.
      next_tokens: how many keys after its own position are visible to a row, in sparse modes 0, 4, 7 and 8.
      inner_precise: 0, 1 or 2: fully masked rows are the same in all three (as with 2 in CANN).
      sparse_mode: 0 band and mask, 1 mask, 2 causal from the top left, 3 causal from the bottom right, 4
        band from the bottom right, 5 and 6 prefix joined with mode 3, 7 and 8 (TND) modes 3 and 2 with
        another band in the last and first sequence. The table is in docs/sparse-modes.md.
      pse_type: 0 `scale*s + pse`, 1 `scale*(s + pse)`, 2 `scale*s - slope*|j - i|`, 3 the same with
        `sqrt(|j - i|)`; i and j count within their own sequence from its first row and key. A pse of -inf masks its
        key, also where scale_value is 0 or negative.
      q_start_idx: pse types 2 and 3: a list of one int, the position of the first row; None is 0.
      kv_start_idx: likewise, the position of the first key.
      actual_seq_qlen: TND: where each sequence ends along T, cumulative, without a leading 0; empty
        sequences are fine, and so are zeros after the last end, which are empty sequences. Rows past the last end
        are fully masked. Values that are known (lists, NumPy arrays, concrete arrays) are checked, and under jit and on Ascend
        part of the program. Traced ends count as their running maximum, at most T, and T stands for the sums of the lengths
        in the shapes above; the caller must then ensure that pse has the size of its sequences and, for ALiBi, that
        Sq_b = Skv_b.
      actual_seq_kvlen: TND: the same of key and value.
      query_rope: the rotated part of query, in its layout, with a head_dim of its own: the logits are
        `query key^T + query_rope key_rope^T`.
      key_rope: that of key.
      sink: float32 `[N]`: one more logit for each row of a head, without a value. Differentiable.
      implementation: None (the best backend that can), the name of a backend, or the options of one:
        `jax_fa.ascend.Options`, `jax_fa.mosaic.Options`.

    Returns:
      softmax_max and softmax_sum, float32 `[B, N, Sq, 8]`, TND `[T, N, 8]`, eight equal lanes: natural
      exponentials, after scale, pse and mask, before dropout; and attention_out, query's dtype and layout, with Dv for
      D. The pair has the gradient of the log-sum-exp, softmax_max + log(softmax_sum): the max is a constant, and the
      sum carries it. Whatever depends on the log-sum-exp alone, such as a merge of several blocks by any formula, then
      has the right gradient.

      A fully masked row has out 0, gradients 0, max -FLT_MAX and sum +FLT_MAX; where there is no key
      at all (Skv = 0, TND: Skv_b = 0) max and sum are 0.

    Differences from CANN:
      * The sparse mode and the tokens hold also without atten_mask, mode 0 included. (CANN then ignores them, so that
        a causal mode without a mask is not causal there.)
      * With an atten_mask in mode 0 the mask and the band both hold. (In CANN the tokens say which blocks may be
        skipped, and a mask that differs from the band is undefined.)
      * TND accepts sequences with rows and without keys in every mode, and a mask for each sequence.
      * pse and the statistics have gradients.

    Raises:
      ValueError: shapes or values that do not fit.
      TypeError: dtypes that do not fit.
      NotImplementedError: the backend named cannot serve this call (and why).

    Source: aclnnFlashAttentionScoreV2 and aclnnFlashAttentionVarLenScoreV4 in the CANN operator library's
    documentation; stats of TND as with softmaxOutLayout "same_as_input".
    """
    operator = Operator(
        arrays=(query, key, value),
        ropes=(query_rope, key_rope),
        head_num=head_num,
        input_layout=input_layout,
        scale=scale_value,
        inner_precise=inner_precise,
        pse=Pse(pse, pse_type, q_start_idx, kv_start_idx),
        sparse=MaskArguments(sparse_mode, pre_tokens, next_tokens, atten_mask, prefix),
        dropped=(keep_prob, drop_mask, None),
        ends=(actual_seq_qlen, actual_seq_kvlen),
        sink=sink,
        implementation=implementation,
    )
    built = operator.built()
    _warn_without_mask(operator.sparse)

    def finish(result: Attention) -> FlashAttentionScoreOutput:
        out, m, l = built.results(result)
        return FlashAttentionScoreOutput(m, l, out)

    return entry.Request(built.call, finish, built.run)


_warned = False


def _warn_without_mask(sparse: MaskArguments) -> None:
    """Says once what is otherwise than in CANN."""
    global _warned
    if _warned or sparse.atten_mask is not None or sparse.mode == 1:
        return
    if sparse.mode == 0 and min(sparse.pre_tokens, sparse.next_tokens) >= spec.UNBOUNDED:
        return
    _warned = True
    warnings.warn(
        f"flash_attention_score applies sparse_mode={sparse.mode} and its tokens without an atten_mask, where CANN and "
        "jax_fa.npu_fusion_attention ignore them. (Said once.)",
        UserWarning,
        stacklevel=5,
    )


@entry.entry
def flash_attention_score_grad(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    dy: ArrayLike,
    softmax_max: ArrayLike,
    softmax_sum: ArrayLike,
    attention_in: ArrayLike,
    pse: ArrayLike | None = None,
    drop_mask: ArrayLike | None = None,
    atten_mask: ArrayLike | None = None,
    prefix: Any = None,
    *,
    head_num: int,
    input_layout: str = "BSH",
    scale_value: float | ArrayLike = 1.0,
    keep_prob: float | int = 1.0,
    pre_tokens: int = spec.UNBOUNDED,
    next_tokens: int = spec.UNBOUNDED,
    inner_precise: int = 0,
    sparse_mode: int = 0,
    pse_type: int = 1,
    q_start_idx: Any = None,
    kv_start_idx: Any = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    query_rope: ArrayLike | None = None,
    key_rope: ArrayLike | None = None,
    sink: ArrayLike | None = None,
    implementation: backends.Implementation = None,
) -> entry.Request[FlashAttentionScoreGradOutput]:
    """CANN's `aclnnFlashAttentionScoreGrad`: the backward with statistics and an output that are given.

        p = exp(x - softmax_max) / softmax_sum, ds = p (dp - rowsum(dy * attention_in))

    with x as in `flash_attention_score` and dp the gradient of the weights. Whatever the statistics are: where those of
    several blocks of keys are merged, and attention_in is the merged output, the result is the share of this block, as
    context-parallel code wants it. It is differentiable itself, in all of these arrays, to any order.

    Args:
      dy: the cotangent of attention_out, with its shape and dtype.
      softmax_max: as the forward gives it, or merged. Rows whose sum is 0 or +FLT_MAX have gradients 0.
      softmax_sum: likewise.
      attention_in: the output of the forward, or the merged one.
      query, key, value, and all others: as in `flash_attention_score`.

    Returns:
      dq, dk, dv, each with the shape and dtype of its array; dpse of pse (None without one), which CANN itself does not
      compute; and dsink (None without a sink), the share of the keys of this call. With query_rope and key_rope, dq and dk
      hold the gradients of these beside their own, along head_dim.

    Raises:
      ValueError, TypeError, NotImplementedError: as `flash_attention_score`.

    Source: aclnnFlashAttentionScoreGradV2 in the CANN operator library's documentation.
    """
    operator = Operator(
        arrays=(query, key, value),
        ropes=(query_rope, key_rope),
        head_num=head_num,
        input_layout=input_layout,
        scale=scale_value,
        inner_precise=inner_precise,
        pse=Pse(pse, pse_type, q_start_idx, kv_start_idx),
        sparse=MaskArguments(sparse_mode, pre_tokens, next_tokens, atten_mask, prefix),
        dropped=(keep_prob, drop_mask, None),
        ends=(actual_seq_qlen, actual_seq_kvlen),
        sink=sink,
        implementation=implementation,
    )

    def finish(found: backward.Gradients) -> FlashAttentionScoreGradOutput:
        return FlashAttentionScoreGradOutput(*found)

    return backward.request(operator, softmax_max, softmax_sum, attention_in, dy, finish=finish)
