"""CANN's positional shift (pse) as what the kernels take: a bias added after scaling, or ALiBi slopes.

    type 0   x = scale * s + pse
    type 1   x = scale * (s + pse)
    type 2   x = scale * s - slope * |j - i|
    type 3   x = scale * s - slope * sqrt(|j - i|)

Everything here is plain JAX above the custom derivative, so pse has a gradient in every type and shape.
Nothing is expanded to Sq x Skv: in every stored form the elements that one row reads for consecutive keys are
contiguous, so a row needs only the index of its key 0 (`bias_offset`), or its slope and its own position.

Source: aclnnFlashAttentionScoreV2, realShiftOptional and pseType; ops-transformer `op_kernel/arch22/pse.h`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import arguments
from jax_fa.call import Dims
from jax_fa.cann.masks import MaskArguments
from jax_fa.cann.packed import Packed
from jax_fa.cann.spec import ALIBI_ROWS, ALIBI_TYPES, PSE_TYPES
from jax_fa.entry import Terms
from jax_fa.indices import FAR, is_int


def check_mode_of_pse(pse, sparse_mode: int) -> None:
    if sparse_mode in (7, 8) and pse is not None:
        raise ValueError(f"pse must be None in sparse_mode={sparse_mode}, as in CANN; got an array.")


@dataclass(frozen=True)
class Pse:
    """The arguments of a call that shift its logits."""

    values: Any
    type: Any
    q_start_idx: Any = None
    kv_start_idx: Any = None

    @property
    def start(self) -> int:
        """How much further than key 0 the first row stands, for slopes."""
        start = _start("q_start_idx", self.q_start_idx) - _start("kv_start_idx", self.kv_start_idx)
        return start if self.type in ALIBI_TYPES else 0

    def terms(self, sparse: MaskArguments, *, scale, dtype, d: Dims, packed: Packed | None) -> Terms:
        """Checks pse and turns it into terms of the logits.

        Args:
          sparse: the arguments of the mask.
          scale: see `flash_attention_score`.
          dtype: query's. d: the sizes of the call. packed: the sequences in layout TND.
        """
        form = _terms(self.values, self.type, sparse, scale=scale, dtype=dtype, d=d, packed=packed)
        if not self.start:
            return form
        index = jnp.arange(d.Sq, dtype=jnp.int32)[(None,) * (len(d.B) + 1)]
        position = index if form.position is None else form.position
        return form._replace(position=position + self.start)


def _start(name: str, given) -> int:
    """Where a piece of a longer sequence begins: a list of one int, or nothing."""
    if given is None or (isinstance(given, (list, tuple)) and not given):
        return 0
    one = given[0] if isinstance(given, (list, tuple)) and len(given) == 1 else given
    if not is_int(one):
        raise TypeError(f"{name} must be a list of one int, or None; got {arguments.shown(given)}.")
    if not 0 <= one < FAR:
        raise ValueError(f"{name} must be in 0..{FAR - 1}; got {one}.")
    return int(one)


def _terms(
    pse, pse_type: int, sparse: MaskArguments, *, scale, dtype, d: Dims, packed: Packed | None
) -> Terms:
    if pse_type not in PSE_TYPES:
        raise ValueError(f"pse_type must be 0, 1, 2 or 3; got {pse_type!r}.")
    if pse is None:
        if pse_type in ALIBI_TYPES:
            raise ValueError(f"pse must hold the ALiBi slopes when pse_type={pse_type}; got None.")
        return Terms()
    if not hasattr(pse, "dtype") or isinstance(pse, jax.ShapeDtypeStruct):
        pse = arguments.array("pse", pse)
    wanted = jnp.dtype(np.float32 if pse_type in ALIBI_TYPES else dtype)
    if pse.dtype != wanted:
        owner = "" if pse_type in ALIBI_TYPES else "query's dtype "
        raise TypeError(f"pse must have {owner}{wanted} when pse_type={pse_type}; got {pse.dtype}.")
    pse = jnp.asarray(pse)
    if pse_type in ALIBI_TYPES:
        form = _slopes(pse, pse_type, d, packed)
        if sparse.mode == 6 and packed is not None and form.position is None:
            # The band whose offset extends causal to a prefix there does not move the rows.
            form = form._replace(position=jnp.arange(d.Sq, dtype=jnp.int32)[None])
        return form
    causal = sparse.causal()
    form = _dense(pse, d, causal) if packed is None else _packed(pse, d, packed, causal)
    if form.bias is None or pse_type == 0 or (isinstance(scale, (int, float)) and scale == 1):
        return form
    return form._replace(bias=_scaled(form.bias.astype(jnp.float32), scale))


def _scaled(pse, scale):
    """scale * pse, in which -inf stays -inf: it masks the key, whatever the scale."""
    masked = jnp.isneginf(pse)
    return jnp.where(masked, -jnp.inf, jnp.where(masked, 0, pse) * jnp.asarray(scale, jnp.float32))


def _slopes(slopes, pse_type: int, d: Dims, packed: Packed | None) -> Terms:
    kind = ALIBI_TYPES[pse_type]
    count = d.B[0] if packed is None else packed.count
    if slopes.shape not in ((d.N,), (count, d.N)):
        raise ValueError(
            f"pse must hold slopes of shape (N,)={(d.N,)} or (B, N)={(count, d.N)} when pse_type={pse_type}; "
            f"got shape {slopes.shape}."
        )
    _check_equal_lengths(f"pse_type={pse_type}", d, packed)
    if packed is None:
        return Terms(alibi=kind, alibi_slopes=slopes)
    rows = packed.rows()
    # Where the lengths are known they are equal, and a row's own position lies at its own index.
    position = rows.first_key + rows.position if packed.lengths() is None else None
    if slopes.ndim == 2:
        slopes = slopes[rows.sequence].T  # one per row, `N Sq`
    return Terms(alibi=kind, alibi_slopes=slopes, position=None if position is None else position[None])


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
            return Terms(bias=pse)
        if pse.shape[2] == ALIBI_ROWS and Sq > ALIBI_ROWS:
            _check_equal_lengths("an ALiBi table", d, None)
            _check_causal(pse, causal)
            return _from_table(pse, d)
    raise ValueError(
        f"pse must have shape (B, N, Sq, Skv)={(B, N, Sq, Skv)}, where B may be 1 and Sq may be 1 or, as a "
        f"table of the last rows with Sq > {ALIBI_ROWS}, {ALIBI_ROWS}; got shape {pse.shape}."
    )


def _check_causal(pse, causal: bool) -> None:
    """An ALiBi table has no values for keys after a row's own position: they must be masked for every row."""
    if not causal:
        raise ValueError(
            f"pse of shape {pse.shape} is an ALiBi table, which defines keys up to a row's own position: it "
            "needs sparse_mode 2 or 3, or 0 or 4 with next_tokens <= 0."
        )


def _from_table(table, d: Dims) -> Terms:
    """The last 1024 rows of a bias whose values depend on row - column alone: each row reads one of them, shifted."""
    row = jnp.arange(d.Sq, dtype=jnp.int32)
    threshold = d.Sq - ALIBI_ROWS
    last = row >= threshold
    r = jnp.where(last, row - threshold, row % ALIBI_ROWS)
    first_column = jnp.where(last, 0, d.Skv - row - (ALIBI_ROWS - r))
    return Terms(
        bias=table.reshape(*table.shape[:2], -1),
        bias_offset=(r * d.Skv + first_column)[None, None],
        bias_apart=table.shape[0] == d.B[0],
    )


def _packed(pse, d: Dims, packed: Packed, causal: bool) -> Terms:
    """The form that the shape of pse names."""
    lengths = packed.lengths()
    one_row = d.N * (d.Skv if lengths is None else int(lengths[1].sum()))
    full = None if lengths is None else d.N * int(np.dot(*lengths))
    longest = pse.shape[-1:] if lengths is None else (int(lengths[1].max()),)
    form: Any
    # CANN too tries the form of one row first.
    if pse.shape == (one_row,):
        form = _one_row
    elif pse.ndim == 1 and full in (None, pse.size):
        form = _blocks
    elif pse.ndim == 4 and pse.shape[0] in (1, packed.count) and pse.shape[1:] == (d.N, ALIBI_ROWS, *longest):
        _check_equal_lengths("an ALiBi table", d, packed)
        _check_causal(pse, causal)
        form = _packed_table
    else:
        blocks = "N*sum(Sq_b*Skv_b)" + ("" if full is None else f"={full}")
        raise ValueError(
            f"pse must have shape ({blocks},), (N*sum(Skv_b)={one_row},) or, as an ALiBi table, "
            f"(1 or {packed.count}, N={d.N}, {ALIBI_ROWS}, max(Skv_b)) in layout TND; got shape {pse.shape}."
        )
    if 0 in pse.shape:
        return Terms()
    flat, offset = form(pse, d, packed)
    if flat.size >= 2**31:
        raise ValueError(f"pse must hold fewer than 2**31 elements in layout TND; got shape {pse.shape}.")
    return Terms(bias=flat[None], bias_offset=offset, bias_apart=True)


def _heads(d: Dims):
    return jnp.arange(d.N, dtype=jnp.int32)[:, None]


def _one_row(flat, d: Dims, packed: Packed):
    """Blocks `[N, Skv_b]`, one after another."""
    rows = packed.rows()
    return flat, (d.N - 1) * rows.first_key + _heads(d) * rows.skv


def _blocks(flat, d: Dims, packed: Packed):
    """Blocks `[N, Sq_b, Skv_b]`, one after another."""
    rows = packed.rows()
    sq, skv = packed.sizes()
    before = jnp.cumsum(sq * skv, dtype=jnp.int32) - sq * skv
    row = _heads(d) * rows.sq + rows.position
    return flat, d.N * before[rows.sequence] + row * rows.skv - rows.first_key


def _packed_table(table, d: Dims, packed: Packed):
    """Entry (r, c) holds the distance `row - column = longest - 1024 + r - c`, whatever the sequence.

    Only column 0 and row 0 are read: together one vector of all distances, the largest one first.
    """
    rows = packed.rows()
    B, _, _, longest = table.shape
    column, row = table[..., 0].astype(jnp.float32), table[:, :, 0, 1:].astype(jnp.float32)
    distances = jnp.concatenate([column[..., ::-1], row], axis=-1)
    before = 0
    if packed.lengths() is None:
        # Lengths that differ cannot be refused: distances beyond the table count as its first and last one.
        before = d.Sq
        distances = jnp.pad(distances, ((0, 0), (0, 0), (before, d.Skv)), mode="edge")
    else:
        distances = distances[..., :longest]
    size = distances.shape[-1]
    b = rows.sequence if B > 1 else 0
    start = (b * d.N + _heads(d)) * size
    return distances.reshape(-1), start + before + longest - 1 - rows.position - rows.first_key
