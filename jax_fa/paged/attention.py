"""The entry: `paged_attention`, attention to a KV cache that lies in pages."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Float, Int, Num

from jax_fa import arguments, backends, checks, compat, entry, softmax
from jax_fa.attention import Attention
from jax_fa.backends import strictness
from jax_fa.backends.sinks import shares
from jax_fa.call import accumulator_dtype
from jax_fa.paged import checks as paged_checks
from jax_fa.paged import primitive
from jax_fa.paged.call import PagedCall, PagedOperands, PagedProblem


@entry.entry
def paged_attention(
    query: Float[ArrayLike, "..."],
    key_pages: Num[ArrayLike, "..."],
    value_pages: Num[ArrayLike, "..."] | None,
    page_table: Int[ArrayLike, "..."],
    lengths: Int[ArrayLike, "..."],
    *,
    value_dim: int | None = None,
    key_scale: Float[ArrayLike, "..."] | None = None,
    value_scale: Float[ArrayLike, "..."] | None = None,
    scale: float | ArrayLike | None = None,
    local_window_size: int | ArrayLike | None = None,
    logits_soft_cap: float | ArrayLike | None = None,
    sinks: Float[ArrayLike, "..."] | None = None,
    implementation: backends.Implementation = None,
    return_logsumexp: bool = False,
) -> entry.Request[Any]:
    """Causal attention of the newest tokens of each sequence to a KV cache that lies in pages of one pool.

    Token j of sequence b is row `j % S` of page `page_table[b, j // S]`. Every page is read where it lies; no contiguous
    copy of a sequence is made. A page may belong to several sequences (a shared prefix).

    Letters: B sequences, Sq query tokens of each, N query heads, K key/value heads (query head n reads key head
    n // (N // K)), D query/key head_dim, Dv value head_dim; P pages in the pool, S tokens of a page, M pages of a sequence.

    Args:
      query: shape `(B, Sq, N, D)`, or `(B, N, D)` for one token of each sequence; any floating dtype. The queries are the
        last Sq positions of their sequence: row i is at position p = lengths - Sq + i, and keys 0 .. p are visible to it.
        So keys and values of the new tokens are written to their pages first, and lengths counts them. Sq = 1 decodes;
        more rows verify draft tokens (speculative decoding) or are a chunk of a prompt (chunked prefill).
      key_pages: shape `(P, S, K, D)`; query's dtype, float32, bfloat16, float16, int8, float8_e4m3fn or float8_e5m2. Elements
        are widened as they are read.
      value_pages: shape `(P, S, K, Dv)`, key_pages' dtype. None: values are parts of the keys; see value_dim.
      page_table: integers, shape `(B, M)`. M S is the capacity of a sequence. Entries beyond the length may be anything: no
        page that they name is read. Within the length, a page number out of range is moved to the nearest page of the pool.
      lengths: integers, shape `(B,)`: tokens of each sequence, the queries' included. Traced values are clipped to 0 .. M S. In a
        sequence shorter than Sq the first rows have no position, and are fully masked.
      value_dim: with value_pages=None, a value is the first value_dim elements of its key, without a copy. Multi-head
        latent attention (MLA) in its absorbed form: K = 1, D = 576, value_dim=512.
      key_scale: what keys are multiplied by, floating, any shape that broadcasts to `(P, S, K)`: for every page, head and
        token, or fewer. None: 1. (A product with the key is multiplied, so no scaled key is ever stored.)
      value_scale: likewise of values. With value_pages=None, values have the scale of keys.
      scale: factor of the logits; None: `1 / sqrt(D)`. See `dot_product_attention`.
      local_window_size: keys p - local_window_size .. p are visible to a row at position p: local_window_size + 1 of them, as
        in `dot_product_attention`. At least 0; None: all. May be traced. Tiles outside the windows are not read, but for a
        page that begins before the window.
      logits_soft_cap: positive; None: no cap. See `dot_product_attention`.
      sinks: attention sinks, shape `(N,)` or `(B, N)`; see `flash_attention`.
      implementation: None (the best backend that can) or the name of a backend.
      return_logsumexp: also return the log-sum-exp.

    Returns:
      The output, `(B, Sq, N, Dv)` or `(B, N, Dv)`, query's dtype. With return_logsumexp a tuple of it and the natural
      log-sum-exp of the logits of visible keys, and of the sink: float32 (float64 for float64 queries), `(B, N, Sq)` or
      `(B, N)`. A fully masked row, such as all of a sequence of length 0, gives 0 and log-sum-exp -FLT_MAX (or the sink).

      The result for a sequence depends on shapes and on this sequence alone: not on the other lengths of the batch, the
      number of threads, or where its pages lie. In a batch of another shape it may differ in its last bits: the `cpu`
      backend splits the capacity M S into parts, whose size depends on B and M.

    Derivatives exist by query, floating pages, scales, scale, logits_soft_cap and sinks, in forward and reverse mode: those of
    `flash_attention` of the gathered pages, which then are copied.

    Differences from others:
      * JAX's `paged_attention` for TPU has pages `(K, P, S, D)`: `pages.transpose(1, 2, 0, 3)`. It scales no logits: pass
        `scale=1.0`.
      * vLLM's and FlashInfer's layout NHD is this one; vLLM counts the window with the token itself:
        `local_window_size=sliding_window - 1`.

    Raises:
      ValueError: shapes or values that do not fit.
      TypeError: dtypes that do not fit.
      NotImplementedError: the backend named cannot serve this call (and why).

    Source: Kwon et al. 2023, arXiv:2309.06180.
    """
    backend, options = backends.chosen(implementation)
    arguments.flag("return_logsumexp", return_logsumexp)
    q = arguments.array("query", query)
    one_row = q.ndim == 3
    pools = paged_checks.Pools.of(q, key_pages, value_pages, value_dim)
    scale, cap = checks.scale(scale, q.shape[-1]), checks.soft_cap(logits_soft_cap)
    computed = entry.computed_dtype(q.dtype)
    rows, acc = q.astype(computed), accumulator_dtype(computed)
    table, lengths = paged_checks.table_and_lengths(page_table, lengths, q, pools)
    operands = PagedOperands(
        query=rows[:, None] if one_row else rows,
        key_pages=pools.key,
        value_pages=pools.value,
        page_table=table,
        lengths=lengths,
        key_scale=pools.scale("key_scale", key_scale),
        value_scale=pools.scale("value_scale", value_scale),
        scale=_data(scale, acc),
        soft_cap=_data(cap, acc),
        window=paged_checks.window(local_window_size),
    )
    problem = PagedProblem(
        scale=1.0 if isinstance(scale, jax.Array) else scale,
        logits_soft_cap=None if isinstance(cap, jax.Array) else cap,
        value_dim=value_dim,
        out_dtype=computed if sinks is None else acc,
        precision=compat.matmul_precision(),
        strict=strictness.active(),
        implementation=backend,
        options=options,
    )
    call = operands.call(problem)
    if sinks is not None:
        sinks = checks.sinks(sinks, call.dims, acc)

    def finish(result: Attention):
        out, lse = result.out.astype(q.dtype), result.logsumexp
        out, lse = (out[:, 0], lse[..., 0]) if one_row else (out, lse)
        return (out, lse) if return_logsumexp else out

    return entry.Request(call, finish, partial(_attention, sinks=sinks))


def _data(x, dtype):
    """A scalar that is data, `1`; None where it is part of the program."""
    return x.astype(dtype).reshape(1) if isinstance(x, jax.Array) else None


def _attention(call: PagedCall, *, sinks) -> Attention:
    out, m, l = primitive.forward(call.problem, call.operands)
    largest = jax.lax.stop_gradient(m)
    if sinks is not None:  # (The output is not rounded yet.)
        with compat.allow_promotion():
            share = jnp.where(l == 0, 0, shares(m, l, sinks[..., None])[0])
            out = out * jnp.swapaxes(share, 1, 2)[..., None]
            m, l = softmax.with_sink(m, l, sinks[..., None])
    return Attention(out, m, l, largest)
