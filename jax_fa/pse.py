"""CANN's positional shift (pse) as what the kernels take: a bias added after scaling, or ALiBi slopes.

    type 0   x = scale * s + pse
    type 1   x = scale * (s + pse)
    type 2   x = scale * s - slope * |j - i|
    type 3   x = scale * s - slope * sqrt(|j - i|)

Everything here is plain JAX above the custom derivative, so pse has a gradient in every type and shape.
Where the stored form is smaller than the bias (ALiBi tables, packed sequences), a gather spreads it out, in
float32: the transposed scatter then adds its many terms in float32 too.

Source: aclnnFlashAttentionScoreV2, realShiftOptional and pseType; ops-transformer `op_kernel/arch22/pse.h`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_fa.packed import Packed
from jax_fa.problem import Dims

ALIBI_ROWS = 1024  # rows of an ALiBi table


class Terms(NamedTuple):
    """Arguments of `request.build`."""

    bias: Any = None
    alibi: str | None = None
    alibi_slopes: Any = None


def terms(pse, pse_type: int, *, scale, dtype, d: Dims, packed: Packed | None, causal: bool) -> Terms:
    """Checks pse and turns it into terms of the logits.

    Args:
      pse: see `flash_attention_score`. pse_type: 0 to 3. scale: the factor of type 1.
      dtype: query's. d: the sizes of the call. packed: the sequences in layout TND.
      causal: no row sees a key after its own position; an ALiBi table is defined for those only.
    """
    if pse_type not in (0, 1, 2, 3):
        raise ValueError(f"pse_type must be 0, 1, 2 or 3; got {pse_type!r}.")
    if pse is None:
        if pse_type in (2, 3):
            raise ValueError(f"pse must hold the ALiBi slopes when pse_type={pse_type}; got None.")
        return Terms()
    if not hasattr(pse, "dtype"):
        pse = jnp.asarray(pse)
    wanted = jnp.dtype(dtype if pse_type in (0, 1) else np.float32)
    if pse.dtype != wanted:
        owner = "query's dtype " if pse_type in (0, 1) else ""
        raise TypeError(f"pse must have {owner}{wanted} when pse_type={pse_type}; got {pse.dtype}.")
    pse = jnp.asarray(pse)
    if pse_type in (2, 3):
        return _slopes(pse, pse_type, d, packed)
    if pse_type == 1 and not (isinstance(scale, (int, float)) and scale == 1):
        pse = pse.astype(jnp.float32) * jnp.asarray(scale, jnp.float32)
    return Terms(bias=_dense(pse, d, causal) if packed is None else _packed(pse, d, packed, causal))


def _slopes(slopes, pse_type: int, d: Dims, packed: Packed | None) -> Terms:
    kind = "linear" if pse_type == 2 else "sqrt"
    count = d.B[0] if packed is None else packed.count
    if slopes.shape not in ((d.N,), (count, d.N)):
        raise ValueError(
            f"pse must hold slopes of shape (N,)={(d.N,)} or (B, N)={(count, d.N)} when pse_type={pse_type}; "
            f"got shape {slopes.shape}."
        )
    _check_equal_lengths(f"pse_type={pse_type}", d, packed)
    if packed is None or slopes.ndim == 1:
        # Equal lengths: distances within a packed sequence are distances within the array.
        return Terms(alibi=kind, alibi_slopes=slopes)
    rows = packed.rows()
    away = jnp.abs(rows.position[:, None] - _position_of_key(rows, d)).astype(jnp.float32)
    away = jnp.sqrt(away) if kind == "sqrt" else away
    return Terms(bias=-slopes[rows.sequence].T[:, :, None] * away)


def _check_equal_lengths(what: str, d: Dims, packed: Packed | None) -> None:
    lengths = None if packed is None else packed.lengths()
    equal = d.Sq == d.Skv if lengths is None else np.array_equal(*lengths)
    if not equal:
        got = (
            f"Sq={d.Sq}, Skv={d.Skv}"
            if lengths is None
            else f"Sq={lengths[0].tolist()}, Skv={lengths[1].tolist()}"
        )
        raise ValueError(f"pse with {what} needs query and key of equal length; got {got}.")


def _dense(pse, d: Dims, causal: bool):
    (B,), N, Sq, Skv = d.B, d.N, d.Sq, d.Skv
    leads = ((B, N), (1, N))
    if pse.ndim == 4 and pse.shape[:2] in leads and pse.shape[3] == Skv:
        if pse.shape[2] in (Sq, 1):
            return pse
        if pse.shape[2] == ALIBI_ROWS and Sq > ALIBI_ROWS:
            _check_equal_lengths("an ALiBi table", d, None)
            _check_causal(pse, causal)
            return _from_table(pse, d)
    raise ValueError(
        f"pse must have shape (B, N, Sq, Skv)={(B, N, Sq, Skv)}, where B may be 1 and Sq may be 1 or, as a "
        f"table of the last rows with Sq > {ALIBI_ROWS}, {ALIBI_ROWS}; got shape {pse.shape}."
    )


def _check_causal(pse, causal: bool) -> None:
    if not causal:
        raise ValueError(
            f"pse of shape {pse.shape} is an ALiBi table, which defines keys up to a row's own position: it "
            "needs sparse_mode 2 or 3, or 0 or 4 with next_tokens <= 0."
        )


def _from_table(table, d: Dims):
    """The full bias, given its last 1024 rows and that values depend on row - column alone."""
    row, column = jnp.arange(d.Sq, dtype=jnp.int32)[:, None], jnp.arange(d.Skv, dtype=jnp.int32)
    threshold = d.Sq - ALIBI_ROWS
    last = row >= threshold
    r = jnp.where(last, row - threshold, row % ALIBI_ROWS)
    c = jnp.where(last, column, d.Skv - (row - column) - (ALIBI_ROWS - r))
    return table.astype(jnp.float32)[:, :, r, jnp.minimum(c, d.Skv - 1)]


def _packed(pse, d: Dims, packed: Packed, causal: bool):
    """The bias `N #Sq Skv` over the packed axes. What it holds outside the sequences is masked."""
    lengths = packed.lengths()
    one_row = d.N * (d.Skv if lengths is None else int(lengths[1].sum()))
    # CANN too tries the form of one row first.
    if pse.shape == (one_row,):
        return _from_one_row(pse, d, packed)
    full = None if lengths is None else d.N * int(np.dot(*lengths))
    if pse.ndim == 1 and full in (None, pse.size):
        return _from_blocks(pse, d, packed)
    longest = pse.shape[-1:] if lengths is None else (int(lengths[1].max()),)
    if pse.ndim == 4 and pse.shape[0] in (1, packed.count) and pse.shape[1:] == (d.N, ALIBI_ROWS, *longest):
        _check_equal_lengths("an ALiBi table", d, packed)
        _check_causal(pse, causal)
        return _from_packed_table(pse, d, packed)
    blocks = "N*sum(Sq_b*Skv_b)" + ("" if full is None else f"={full}")
    raise ValueError(
        f"pse must have shape ({blocks},), (N*sum(Skv_b)={one_row},) or, as an ALiBi table, "
        f"(1 or {packed.count}, N={d.N}, {ALIBI_ROWS}, max(Skv_b)) in layout TND; got shape {pse.shape}."
    )


def _position_of_key(rows, d: Dims):
    """Position of every key in the sequence of every row, `Sq Skv`; out of range for other sequences."""
    return jnp.arange(d.Skv, dtype=jnp.int32) - rows.first_key[:, None]


def _heads(d: Dims):
    return jnp.arange(d.N, dtype=jnp.int32)[:, None, None]


def _from_one_row(flat, d: Dims, packed: Packed):
    """Blocks `[N, Skv_b]`, one after another."""
    keys = packed.keys()
    return _take(flat, d.N * keys.first_key + _heads(d) * keys.skv + keys.position)


def _from_blocks(flat, d: Dims, packed: Packed):
    """Blocks `[N, Sq_b, Skv_b]`, one after another."""
    rows = packed.rows()
    sq, skv = packed.sizes()
    before = jnp.cumsum(sq * skv, dtype=jnp.int32) - sq * skv
    row = d.N * before[rows.sequence] + (_heads(d)[..., 0] * rows.sq + rows.position) * rows.skv
    return _take(flat, row[..., None] + _position_of_key(rows, d))


def _from_packed_table(table, d: Dims, packed: Packed):
    """Entry (r, c) holds the distance `row - column = longest - 1024 + r - c`, whatever the sequence."""
    rows = packed.rows()
    longest = table.shape[-1]
    beyond = rows.position[:, None] - _position_of_key(rows, d) - (longest - ALIBI_ROWS)
    r = jnp.clip(beyond, 0, ALIBI_ROWS - 1)
    c = jnp.clip(-beyond, 0, longest - 1)
    b = rows.sequence[:, None] if table.shape[0] > 1 else 0
    return table.astype(jnp.float32).swapaxes(0, 1)[:, b, r, c]


def _take(flat, index):
    return flat.astype(jnp.float32)[jnp.clip(index, 0, max(0, flat.size - 1))]
