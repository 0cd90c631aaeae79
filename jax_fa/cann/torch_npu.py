"""The entries with torch_npu's names: `npu_fusion_attention` and its backward.

Names, positions, defaults and results are torch_npu's, so that a call runs as it is. What `score` and this file have in
common is in `operator` and `backward`.

Source: torch_npu's documentation of `npu_fusion_attention`; its operator schemas (op-plugin, `op_plugin_functions.yaml`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Float32

from jax_fa import backends, entry
from jax_fa.arguments import array, flag, integer, shown
from jax_fa.attention import Attention
from jax_fa.cann import backward, spec
from jax_fa.cann.masks import MaskArguments, check_mode
from jax_fa.cann.operator import Operator, named
from jax_fa.cann.pse import Pse, check_mode_of_pse
from jax_fa.indices import list_of_integers

_NAMES = {
    "pre_tokens": "pre_tockens",
    "next_tokens": "next_tockens",
    "drop_mask": "dropout_mask",
}
_FORWARD = _NAMES | {"scale_value": "scale"}


class NpuFusionAttentionOutput(NamedTuple):
    attention: Float[Array, "..."]  # in query's layout
    softmax_max: Float32[Array, "B N Sq 8"]  # TND: T N 8
    softmax_sum: Float32[Array, "B N Sq 8"]
    softmax_out: Float[Array, " 0"]
    seed: int
    offset: int
    numels: int


class NpuFusionAttentionGradOutput(NamedTuple):
    dq: Float[Array, "..."]
    dk: Float[Array, "..."]
    dv: Float[Array, "..."]
    dpse: Float[Array, "..."]
    dsink: Float32[Array, "..."]


@entry.entry
def npu_fusion_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    head_num: int,
    input_layout: str,
    pse: ArrayLike | None = None,
    padding_mask: Any = None,
    atten_mask: ArrayLike | None = None,
    scale: float | ArrayLike = 1.0,
    keep_prob: float | int = 1.0,
    pre_tockens: int = spec.UNBOUNDED,
    next_tockens: int = spec.UNBOUNDED,
    inner_precise: int = 0,
    prefix: Any = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: ArrayLike | None = None,
    dropout_mask: ArrayLike | None = None,
    seed: int = 0,
    offset: int = 0,
    *,
    pse_type: int = 1,
    q_start_idx: Any = None,
    kv_start_idx: Any = None,
    query_rope: ArrayLike | None = None,
    key_rope: ArrayLike | None = None,
    dropout_key: Any = None,
    implementation: backends.Implementation = None,
) -> entry.Request[NpuFusionAttentionOutput]:
    """`torch_npu.npu_fusion_attention` for JAX arrays, on every backend, differentiable.

        attention = dropout(softmax(scale * (query key^T + pse), atten_mask), keep_prob) value

    A call of torch_npu runs as it is, but for dropout: with keep_prob below 1 it needs dropout_key or dropout_mask. The
    arguments mean what they mean in CANN, whose operator `flash_attention_score` describes in detail.

    Args:
      query: float16, bfloat16 or float32, in `input_layout`, with N = head_num heads.
      key: query's dtype, layout, B and D; its number of heads K must divide N.
      value: key's dtype and shape, except that its head_dim may be smaller.
      head_num: N.
      input_layout: "BSH", "SBH", "BSND", "BNSD", or "TND" for packed sequences, in upper or lower case.
      pse: positional shift, see pse_type and `flash_attention_score`. Differentiable.
      padding_mask: ignored: CANN has reserved it.
      atten_mask: bool or uint8, 1 = masked. Without it, CANN ignores sparse_mode, prefix, pre_tockens and next_tockens, and so
        does this function: every key is visible. In sparse modes 2, 3, 4, 6, 7 and 8 it is the compressed `[2048, 2048]` mask
        (mode 6: `[3072, 2048]`); in modes 0, 1 and 5 a mask of its own, see `flash_attention_score`.
      scale: factor of the logits, a finite number or an array that holds one. The default is 1.
      keep_prob: in (0, 1]; below 1 weights are dropped, and the kept ones divided by it.
      pre_tockens: how many keys before its own position are visible to a row, in sparse modes 0 and 4.
      next_tockens: how many keys after its own position are visible to a row, in sparse modes 0, 4, 7 and 8.
      inner_precise: 0, 1 or 2: fully masked rows are 0 in all three, as with 2 in CANN.
      prefix: sparse modes 5 and 6: one length per batch entry.
      actual_seq_qlen: TND: where each sequence ends along T, cumulative. Zeros after the last end are empty sequences; rows
        past it are fully masked.
      actual_seq_kvlen: TND: the same of key and value.
      sparse_mode: see `flash_attention_score`; the table is in docs/sparse-modes.md.
      gen_mask_parallel: ignored: about drawing the dropout mask.
      sync: ignored likewise.
      softmax_layout: TND: "TND" stores the statistics row by row; "" stores them sequence after sequence, each as
        `[N, Sq_b, 8]`, in an array that has shape `[T, N, 8]` all the same.
      sink: float32 `[N]`: one more logit for each row of a head, without a value. Differentiable.
      dropout_mask: uint8, the keep bits, as drop_mask of `flash_attention_score`.
      seed: returned as it is: dropout is drawn from dropout_key.
      offset: likewise.
      pse_type: 1 `scale*(s + pse)`; as in v2: 0 `scale*s + pse`, 2 and 3 ALiBi slopes.
      q_start_idx: pse types 2 and 3: a list of one int, the position of the first row. None is 0.
      kv_start_idx: likewise, the position of the first key.
      query_rope: the rotated part of query, in its layout, with a head_dim of its own: the logits are
        `query key^T + query_rope key_rope^T`. Differentiable.
      key_rope: that of key.
      dropout_key: a `jax.random` key; the bits are those of `flash_attention`.
      implementation: None (the best backend that can), the name of a backend, or the options of one.

    Returns:
      attention, in query's layout and dtype; softmax_max and softmax_sum, float32 `[B, N, Sq, 8]` (TND `[T, N, 8]`), eight
      equal lanes; softmax_out, empty; seed and offset as they came; numels, the number of weights, 0 where traced ends do
      not say it. Fully masked rows: attention 0, max -FLT_MAX, sum +FLT_MAX; without any key, max and sum are 0.

    Raises:
      ValueError: shapes or values that do not fit.
      TypeError: dtypes that do not fit.
      NotImplementedError: the backend named cannot serve this call (and why).
    """
    with named(_FORWARD):
        _check_ignored(padding_mask, gen_mask_parallel, sync, seed, offset)
        layout = _upper(input_layout)
        built = Operator(
            arrays=(query, key, value),
            ropes=(query_rope, key_rope),
            head_num=head_num,
            input_layout=layout,
            scale=scale,
            inner_precise=inner_precise,
            pse=Pse(pse, pse_type, q_start_idx, kv_start_idx),
            sparse=_sparse(sparse_mode, pre_tockens, next_tockens, atten_mask, prefix, pse, layout),
            dropped=_dropped(keep_prob, dropout_mask, dropout_key),
            ends=(actual_seq_qlen, actual_seq_kvlen),
            sink=sink,
            softmax_blocks=_in_blocks(softmax_layout, layout),
            implementation=implementation,
        ).built()

    def finish(result: Attention) -> NpuFusionAttentionOutput:
        out, m, l = built.results(result)
        return NpuFusionAttentionOutput(out, m, l, jnp.zeros((0,), out.dtype), seed, offset, built.numels)

    return entry.Request(built.call, finish, built.run)


@entry.entry
def npu_fusion_attention_grad(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    dy: ArrayLike,
    head_num: int,
    input_layout: str,
    *,
    pse: ArrayLike | None = None,
    padding_mask: Any = None,
    atten_mask: ArrayLike | None = None,
    softmax_max: ArrayLike | None = None,
    softmax_sum: ArrayLike | None = None,
    softmax_in: Any = None,
    attention_in: ArrayLike | None = None,
    scale_value: float | ArrayLike = 1.0,
    keep_prob: float | int = 1.0,
    pre_tockens: int = spec.UNBOUNDED,
    next_tockens: int = spec.UNBOUNDED,
    inner_precise: int = 0,
    seed: int = 0,
    offset: int = 0,
    numels: int = 0,
    prefix: Any = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: ArrayLike | None = None,
    pse_type: int = 1,
    q_start_idx: Any = None,
    kv_start_idx: Any = None,
    dropout_mask: ArrayLike | None = None,
    dropout_key: Any = None,
    implementation: backends.Implementation = None,
) -> entry.Request[NpuFusionAttentionGradOutput]:
    """`torch_npu.npu_fusion_attention_grad`: the backward with statistics and an output that are given.

        p = exp(x - softmax_max) / softmax_sum, ds = p (dp - rowsum(dy * attention_in))

    Context-parallel code calls it for each block of keys, with the statistics and the output of all blocks merged; the
    gradients of the blocks then add up to those of the whole. (Gradients of `npu_fusion_attention` itself need no call of
    this: `jax.grad` has them.) It is differentiable in all of its arrays.

    Args:
      dy: the cotangent of attention, with its shape and dtype.
      softmax_max: float32, as `npu_fusion_attention` gives it, in the order that softmax_layout says; or merged.
      softmax_sum: likewise. Rows where it is 0 or +FLT_MAX have gradients 0.
      softmax_in: ignored.
      attention_in: attention as `npu_fusion_attention` gives it, or merged.
      scale_value: the scale of `npu_fusion_attention`. (torch_npu gives it this name here.)
      seed, offset, numels: ignored: dropout is drawn again from dropout_key.
      query, key, value, and all others: as in `npu_fusion_attention`.

    Returns:
      dq, dk, dv, each with the shape and dtype of its array; dpse, of pse (empty without one; torch_npu's is always empty);
      and dsink (empty without a sink).

    Raises:
      ValueError, TypeError, NotImplementedError: as `npu_fusion_attention`.
    """

    with named(_NAMES):
        _check_ignored(padding_mask, gen_mask_parallel, sync, seed, offset)
        layout = _upper(input_layout)
        operator = Operator(
            arrays=(query, key, value),
            ropes=(None, None),
            head_num=head_num,
            input_layout=layout,
            scale=scale_value,
            inner_precise=inner_precise,
            pse=Pse(pse, pse_type, q_start_idx, kv_start_idx),
            sparse=_sparse(sparse_mode, pre_tockens, next_tockens, atten_mask, prefix, pse, layout),
            dropped=_dropped(keep_prob, dropout_mask, dropout_key),
            ends=(actual_seq_qlen, actual_seq_kvlen),
            sink=sink,
            softmax_blocks=_in_blocks(softmax_layout, layout),
            implementation=implementation,
        )
        given = softmax_max, softmax_sum, attention_in, dy
        return backward.request(operator, *given, finish=_gradients)


def _gradients(found: backward.Gradients) -> NpuFusionAttentionGradOutput:
    """Results that are not there are empty."""
    empty = jnp.zeros((0,), jnp.float32)
    dpse = empty.astype(found.query.dtype) if found.pse is None else found.pse
    dsink = empty if found.sink is None else found.sink
    return NpuFusionAttentionGradOutput(found.query, found.key, found.value, dpse, dsink)


def _upper(input_layout) -> str:
    if not isinstance(input_layout, str):
        raise TypeError(f"input_layout must be a string; got {shown(input_layout)}.")
    return input_layout.upper()


def _in_blocks(softmax_layout, input_layout) -> bool:
    """Whether the statistics have torch_npu's own order."""
    known = isinstance(softmax_layout, str) and softmax_layout in ("", "TND")
    if not known or (softmax_layout == "TND" and input_layout != "TND"):
        raise ValueError(
            f'softmax_layout must be "", or "TND" with input_layout="TND"; got {shown(softmax_layout)} with '
            f"{shown(input_layout)}."
        )
    return input_layout == "TND" and softmax_layout == ""


def _sparse(mode, pre_tokens, next_tokens, atten_mask, prefix, pse, layout) -> MaskArguments:
    """As CANN reads them: without atten_mask they are ignored (and checked)."""
    for name, x in (("sparse_mode", mode), ("pre_tokens", pre_tokens), ("next_tokens", next_tokens)):
        integer(name, x)
    check_mode(mode, packed=layout == "TND")
    if prefix is not None:
        list_of_integers("prefix", prefix)
    if atten_mask is None:
        check_mode_of_pse(pse, mode)
        return MaskArguments(0)
    return MaskArguments(mode, pre_tokens, next_tokens, atten_mask, prefix)


def _check_ignored(padding_mask, gen_mask_parallel, sync, seed, offset) -> None:
    if padding_mask is not None:
        array("padding_mask", padding_mask)
    flag("gen_mask_parallel", gen_mask_parallel)
    flag("sync", sync)
    for name, x in (("seed", seed), ("offset", offset)):
        back = isinstance(x, jax.Array) and x.ndim == 0  # what came back from a jitted call
        if not (back and jnp.issubdtype(x.dtype, jnp.integer)):
            integer(name, x)


def _dropped(keep_prob, dropout_mask, dropout_key):
    number = isinstance(keep_prob, (int, float, np.number))
    if dropout_mask is None and dropout_key is None and number and 0 < keep_prob < 1:
        raise ValueError(
            f"dropout_key must be a jax.random key, or dropout_mask be given, when keep_prob is below 1 (it is "
            f"{keep_prob}); got None."
        )
    return keep_prob, dropout_mask, dropout_key
