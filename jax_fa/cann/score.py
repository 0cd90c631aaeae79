"""The public entry with CANN's conventions: `flash_attention_score`.

Names, layouts and rules are those of `aclnnFlashAttentionScore` (and of torch_npu's `npu_fusion_attention`).
This file turns them into a `Call`; `masks` holds the sparse modes, `pse` the positional shift, `drop_mask` the keep
bits, `packed` the arithmetic of layout TND, `spec` the constants.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Float32

from jax_fa import backends, entry
from jax_fa.arguments import array, choice, integer, shown
from jax_fa.call import Axes, Dims
from jax_fa.cann import spec
from jax_fa.cann.drop_mask import keep_bits
from jax_fa.cann.masks import MaskArguments
from jax_fa.cann.packed import Packed, checked_ends
from jax_fa.cann.pse import check_mode_of_pse, pse_terms
from jax_fa.indices import list_of_integers
from jax_fa.softmax import FLT_MAX


class FlashAttentionScoreOutput(NamedTuple):
    softmax_max: Float32[Array, "B N Sq 8"]  # TND: T N 8
    softmax_sum: Float32[Array, "B N Sq 8"]
    attention_out: Float[Array, "..."]  # in query's layout


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
    keep_prob: float = 1.0,
    pre_tokens: int = spec.UNBOUNDED,
    next_tokens: int = spec.UNBOUNDED,
    inner_precise: int = 0,
    sparse_mode: int = 0,
    pse_type: int = 1,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
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
        `[B, 1, max Sq_b, max Skv_b]` or `[sum Sq_b, sum Skv_b]`). Other modes need none; the `[2048, 2048]` mask
        that CANN wants (mode 6: `[3072, 2048]`) is accepted, checked where its values are known, and not read.
      prefix: sparse modes 5 and 6: one integer per batch entry in `max(0, d) .. Skv`. A list or tuple is part
        of the program, an array is data; values not known when tracing mean the nearer end of 0 .. Skv.
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
      actual_seq_qlen: TND: where each sequence ends along T, cumulative, without a leading 0; empty
        sequences are fine, and so are zeros after the last end, which are empty sequences. Rows past the last end
        are fully masked. Lists and tuples are part of the program, arrays are data, checked where their values are
        known. Traced ends count as their running maximum, at most T, and T stands for the sums of the lengths in
        the shapes above; the caller must then ensure that pse has the size of its sequences and, for ALiBi, that
        Sq_b = Skv_b.
      actual_seq_kvlen: TND: the same of key and value.
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
    backend = backends.chosen(implementation)
    _check_choices(input_layout, inner_precise, sparse_mode, pse_type)
    scale_value = entry.finite_scale("scale_value", scale_value)
    arrays = _arrays(query, key, value, input_layout, head_num)
    d, dtype = arrays.dims, arrays.query.dtype
    sequences = _sequences(input_layout, actual_seq_qlen, actual_seq_kvlen, d)
    _check_limits(d, sequences, prefix)
    check_mode_of_pse(pse, sparse_mode)
    sparse = MaskArguments(
        mode=sparse_mode, pre_tokens=pre_tokens, next_tokens=next_tokens, atten_mask=atten_mask, prefix=prefix
    )
    call = entry.build(
        arrays,
        mask=sparse.mask(d, sequences),
        terms=pse_terms(pse, pse_type, sparse, scale=scale_value, dtype=dtype, d=d, packed=sequences),
        scale=scale_value,
        dropped=keep_bits(drop_mask, keep_prob, d, sequences),
        backend=backend,
        hints=_own_form(sparse, pse, pse_type, d, sequences),
    )

    def finish(result):
        m, l = _statistics(result.softmax_max, result.softmax_sum, d, sequences)
        out = result.out
        if _LAYOUTS[input_layout].unfolded:
            out = out.reshape(*out.shape[:2], d.N * d.Dv)
        return FlashAttentionScoreOutput(m, l, out)

    return entry.Request(call, finish)


# --- the call in CANN's terms, for the Ascend backend


def _own_form(
    sparse: MaskArguments, pse, pse_type: int, d: Dims, sequences: Packed | None
) -> spec.Arguments | None:
    """Nothing where CANN's host integers are arrays here."""
    given = [sparse.prefix] if sequences is None else [sparse.prefix, sequences.query, sequences.key]
    if any(hasattr(x, "shape") for x in given):
        return None
    prefix = None if sparse.prefix is None else list_of_integers("prefix", sparse.prefix)
    mask = sparse.atten_mask if sequences is not None and sparse.full() else None
    # CANN's TND has no mask for each sequence.
    mask = None if mask is None or math.prod(np.shape(mask)[:-2]) != 1 else mask

    def lead(x):
        return None if x is None else jax.lax.stop_gradient(jnp.asarray(x)[(None,) * len(d.B)])

    return spec.Arguments(
        sizes=(*d.B, d.N, d.Sq, d.Skv),
        sparse_mode=int(sparse.mode),
        pre_tokens=max(-spec.UNBOUNDED, min(int(sparse.pre_tokens), spec.UNBOUNDED)),
        next_tokens=max(-spec.UNBOUNDED, min(int(sparse.next_tokens), spec.UNBOUNDED)),
        prefix=prefix,  # type: ignore[arg-type]
        actual_seq_qlen=None if sequences is None else sequences.query,  # type: ignore[arg-type]
        actual_seq_kvlen=None if sequences is None else sequences.key,  # type: ignore[arg-type]
        pse_type=int(pse_type),
        pse=lead(pse),
        mask=lead(mask),
    )


# --- checks and shapes


def _check_choices(input_layout, inner_precise, sparse_mode, pse_type) -> None:
    choice("input_layout", input_layout, _LAYOUTS)
    for name, x in (("inner_precise", inner_precise), ("sparse_mode", sparse_mode), ("pse_type", pse_type)):
        integer(name, x)
    if inner_precise not in (0, 1, 2):
        raise ValueError(f"inner_precise must be 0, 1 or 2; got {inner_precise!r}.")


def _arrays(query, key, value, input_layout: str, head_num) -> entry.Arrays:
    """query, key and value with separate head and head_dim axes."""
    if isinstance(head_num, bool) or not isinstance(head_num, (int, np.integer)):
        raise TypeError(f"head_num must be an int; got {shown(head_num)}.")
    if not 0 < head_num <= spec.MAX_HEADS:
        raise ValueError(f"head_num must be in 1..{spec.MAX_HEADS}; got {head_num}.")
    axes, unfolded = _LAYOUTS[input_layout]
    arrays = {"query": query, "key": key, "value": value}
    for name, x in arrays.items():
        x = x if hasattr(x, "dtype") else array(name, x)
        if x.dtype.name not in spec.DTYPES:
            *some, last = spec.DTYPES
            raise TypeError(f"{name} must have dtype {', '.join(some)} or {last}; got {x.dtype}.")
        rank = 3 if unfolded else len(axes)
        if x.ndim != rank:
            raise ValueError(f"{name} must have {rank} dimensions ({input_layout}); got shape {x.shape}.")
        arrays[name] = jnp.asarray(x)
    stored = _unfold(**arrays, head_num=head_num) if unfolded else tuple(arrays.values())
    layout = f"{input_layout} as {unfolded}" if unfolded else input_layout
    query, key, value = stored
    found = entry.checked(query, key, value, axes, layout)
    d = found.dims
    if d.N != head_num:
        raise ValueError(
            f"head_num must be query's number of heads {d.N} (shape {found.query.shape}, {layout}); got {head_num}."
        )
    if not 0 < d.Dv <= d.D:
        raise ValueError(
            f"value must have a head_dim in 1..D={d.D}; got {d.Dv} from shape {found.value.shape} ({layout})."
        )
    return found


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


def _check_limits(d: Dims, sequences: Packed | None, prefix) -> None:
    """CANN's limits on sizes."""
    if sequences is None:
        B, most = d.B[0], spec.MAX_BATCH if prefix is None else spec.MAX_BATCH_PREFIX
    else:
        B, most = sequences.count, spec.MAX_BATCH if prefix is None else spec.MAX_SEQUENCES_PREFIX
    with_prefix = "" if prefix is None else " with prefix"
    rows, keys = ("Sq", "Skv") if sequences is None else ("T", "T")
    for name, what, size, limit in (
        ("query", f"B{with_prefix}", B, most),
        ("query", rows, d.Sq, spec.MAX_LENGTH),
        ("key", keys, d.Skv, spec.MAX_LENGTH),
        ("query", "D", d.D, spec.MAX_HEAD_DIM),
    ):
        if isinstance(size, int) and size > limit:  # a symbolic size (jax.export) has no number yet
            raise ValueError(f"{name} must have {what} of at most {limit}; got {size}.")


def _sequences(input_layout: str, query_ends, key_ends, d: Dims) -> Packed | None:
    """The sequences of layout TND; None in the other layouts."""
    given = {"actual_seq_qlen": query_ends, "actual_seq_kvlen": key_ends}
    for name, ends in given.items():
        absent = ends is None or (isinstance(ends, (list, tuple)) and not ends)
        if input_layout == "TND" and absent:
            raise ValueError(
                f"{name} must hold the cumulative lengths of the sequences in layout TND; got {ends}."
            )
        if input_layout != "TND" and not absent:
            raise ValueError(f"{name} is for layout TND; got {ends} with input_layout={input_layout!r}.")
    if input_layout != "TND":
        return None
    query, key = (list_of_integers(name, ends) for name, ends in given.items())
    if np.shape(query) != np.shape(key) or np.shape(query) == (0,):
        raise ValueError(
            "actual_seq_qlen and actual_seq_kvlen must name the same sequences, at least one; got "
            f"{np.shape(query)[0]} and {np.shape(key)[0]} entries."
        )
    query = checked_ends("actual_seq_qlen", query, d.Sq, "query's T")
    key = checked_ends("actual_seq_kvlen", key, d.Skv, "key's T")
    return Packed(query, key, d.Sq, d.Skv)


# --- statistics


def _statistics(m, l, d: Dims, sequences: Packed | None):
    """CANN's (softmax_max, softmax_sum) from the kernels', `*B N Sq` each."""
    # Rows without a visible key: a sum of FLT_MAX makes exp(x - max) / sum vanish there.
    l = jnp.where(l == 0, FLT_MAX, l)
    no_keys = None
    if d.Skv == 0:
        no_keys = True
    elif sequences is not None:
        rows = sequences.rows()
        no_keys = rows.inside & (rows.skv == 0)

    def store(x):
        x = x if no_keys is None else jnp.where(no_keys, 0.0, x)
        x = x if sequences is None else x.T  # TND: rows first
        return jnp.broadcast_to(x[..., None], (*x.shape, spec.LANES))

    return store(m), store(l)
