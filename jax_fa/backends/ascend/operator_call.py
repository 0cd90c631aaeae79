"""One call of CANN's operator: its arguments, in CANN's terms."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from jax_fa.backends.ascend.keep_bits import KeepBits
from jax_fa.backends.ascend.sequences import Sequences
from jax_fa.backends.ascend.sparse_modes import SparseMode


@dataclass(frozen=True, kw_only=True)
class OperatorCall:
    """Arrays have the layout's order. In layout TND, B counts the sequences, and Sq and Skv the rows of all."""

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
    sparse: SparseMode
    mask: Any = None  # our own: [B or 1, N or 1, Sq, Skv] (TND: two dims), 1 = masked
    pse: Any = None
    pse_type: int = 1
    masking_logit: float | None = None  # of keys that a pse of -inf masks: see shift.Shift
    keep: KeepBits | None = None
    sequences: Sequences | None = None
    softmax_layout: str = ""
    sink: Any = None  # float32 `N`
    starts: tuple[int, int] = (0, 0)  # of the positions of rows and keys, for ALiBi

    @property
    def G(self) -> int:
        return self.N // self.K


class Residuals(NamedTuple):
    """What the backward operator takes besides: out and dout in the layout, statistics `B N Sq` (TND: `T N`)."""

    out: Any
    m: Any
    l: Any
    dout: Any
