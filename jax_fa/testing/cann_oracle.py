"""What `flash_attention_score` must give, in plain NumPy; imports nothing from the library.

A call is a list of sequences: the entries of the batch, or the packed sequences of layout TND. Each is
computed with whole Sq x Skv arrays, straight from the formulas, either in float64 (the oracle) or as a naive
implementation in the inputs' dtype would (the yardstick for errors).
"""

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy bfloat16)
import numpy as np

FLT_MAX = float(np.finfo(np.float32).max)


# --- one sequence


@dataclass
class Sequence:
    """One batch entry: q `Sq N D`, k `Skv K D`, v `Skv K Dv`; everything else `N Sq Skv`."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    visible: np.ndarray
    scale: float
    shift: Any = 0.0  # what pse adds to scale * s
    weight: Any = 1.0  # keep / keep_prob
    dout: Any = None  # as out; only `compute` needs it
    sink: Any = None  # `N`: one more logit of each row, without a value

    def compute(self, dtype=None) -> dict[str, np.ndarray]:
        """out, max, sum and gradients; in float64, or with a naive implementation's roundings to dtype."""
        wide: Any = np.float64 if dtype is None else np.float32

        def narrow(x) -> Any:
            return x.astype(wide) if dtype is None else x.astype(dtype).astype(wide)

        q, k, v, dout = (x.astype(wide).swapaxes(0, 1) for x in (self.q, self.k, self.v, self.dout))
        K, group = len(k), len(q) // len(k)
        k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
        scale, weight = wide(self.scale), np.asarray(self.weight, wide)
        x = q @ k.swapaxes(1, 2) * scale + np.asarray(self.shift, wide)
        m = np.max(x, axis=-1, where=self.visible, initial=-FLT_MAX)
        p = np.where(self.visible, np.exp(np.where(self.visible, x - m[..., None], 0)), 0)
        l, sink_weight = p.sum(axis=-1), None
        if self.sink is not None:
            sink = self.sink.astype(wide)[:, None]
            top = np.maximum(m, sink)
            p, l = p * np.exp(m - top)[..., None], l * np.exp(m - top) + np.exp(sink - top)
            m, sink_weight = top, np.exp(sink - top) / l
        w = p / np.where(l == 0, 1, l)[..., None]
        out = narrow(narrow(weight * w) @ v)
        dw = weight * (dout @ v.swapaxes(1, 2))
        dx = w * (dw - np.sum(out * dout, axis=-1, keepdims=True))
        dq, dk, dv = (
            narrow(dx) @ k * scale,
            narrow(dx).swapaxes(1, 2) @ q * scale,
            narrow(weight * w).swapaxes(1, 2) @ dout,
        )
        dk, dv = (g.reshape(K, group, *g.shape[1:]).sum(axis=1) for g in (dk, dv))
        stored = {"out": out, "dq": dq, "dk": dk, "dv": dv}
        found = {name: narrow(g).swapaxes(0, 1) for name, g in stored.items()}
        # CANN's marks: a fully masked row whose sequence has keys, and a row of a sequence without keys.
        l = np.where(l == 0, FLT_MAX if k.shape[1] else 0, l)
        m = m if k.shape[1] else np.zeros_like(m)
        if sink_weight is not None:
            found["dsink"] = -np.sum(sink_weight * np.sum(out * dout, axis=-1), axis=-1)
        return found | {"max": m, "sum": l, "dx": dx}


# --- which keys are visible to a row: the table of sparse modes, one sequence at a time


def visible(mode: int, sq: int, skv: int, *, pre: int, following: int, prefix: int = 0, apart: bool = False):
    """Boolean `Sq Skv`; `apart`: the sequence with the band in modes 7 and 8."""
    i, j = np.arange(sq)[:, None], np.arange(skv)[None, :]
    d = skv - sq
    everything = np.ones((sq, skv), bool)
    if mode == 0:
        return (i - pre <= j) & (j <= i + following)
    if mode == 1:
        return everything
    if mode == 2:
        return j <= i + 0 * d
    if mode == 3:
        return j <= i + d
    if mode == 4:
        return (-pre <= j - (i + d)) & (j - (i + d) <= following)
    if mode in (5, 6):
        return (j <= i + d) | (j < prefix)
    if apart:
        return j <= i + d + following
    return j <= i + (d if mode == 7 else 0)


def compressed(mode: int) -> np.ndarray:
    causal = np.triu(np.ones((2048, 2048), np.uint8), 1)
    if mode != 6:
        return causal
    below = np.zeros((1024, 2048), np.uint8)
    below[:, 1024:] = 1
    return np.concatenate([causal, below])


# --- pse: which stored number each (head, row, column) of a sequence reads, and its factor


@dataclass
class Pse:
    """`form`: full, row (one row for all), table (ALiBi, 1024 rows), slopes; `shared`: the same for all."""

    stored: np.ndarray
    kind: int  # pse_type
    form: str
    shared: bool = False
    lengths: list[tuple[int, int]] = field(default_factory=list)  # of all sequences
    packed: bool = False
    heads: int = 1
    start: int = 0  # how much further than key 0 the first row stands

    def index(self, b: int) -> np.ndarray:
        """Flat index into `stored`, `N Sq Skv`."""
        (sq, skv), N = self.lengths[b], self.heads
        at = np.zeros((N, sq, skv), np.int64)
        entry = 0 if self.shared else b
        for n in range(N):
            for i in range(sq):
                at[n, i] = self._row(entry, b, n, i, np.arange(skv))
        return at

    def _row(self, entry: int, b: int, n: int, i: int, j: np.ndarray):
        (sq, skv), N = self.lengths[b], self.heads
        r: Any
        c: Any
        if self.form == "slopes":
            return entry * N + n
        if self.form == "table":
            longest = self.stored.shape[-1]
            if self.packed:  # entry (r, c) is the distance longest - 1024 + r - c
                beyond = i - j - (longest - 1024)
                r, c = np.where(beyond >= 0, beyond, 0), np.where(beyond >= 0, 0, -beyond)
            elif i >= sq - 1024:
                r, c = i - (sq - 1024), j
            else:
                r, c = i % 1024, skv - (i - j) - (1024 - i % 1024)
            c = np.where(j <= i, c, 0)  # keys after the row: not defined, masked
            return ((entry * N + n) * 1024 + r) * longest + c
        rows = sq if self.form == "full" else 1
        row = i if self.form == "full" else 0
        if self.packed:
            before = sum(a * c if self.form == "full" else c for a, c in self.lengths[:b]) * N
            return before + (n * rows + row) * skv + j
        return ((entry * N + n) * rows + row) * skv + j

    def factor(self, b: int, scale: float):
        sq, skv = self.lengths[b]
        away = np.abs(np.arange(skv)[None, :] - np.arange(sq)[:, None] - self.start)
        return (1.0, scale, -away, -np.sqrt(away))[self.kind]

    def shift(self, b: int, scale: float) -> np.ndarray:
        return self.factor(b, scale) * self.stored.reshape(-1).astype(np.float64)[self.index(b)]

    def gradient(self, dx: list[np.ndarray], scale: float) -> np.ndarray:
        found = np.zeros(self.stored.size, dx[0].dtype)
        for b, part in enumerate(dx):
            np.add.at(found, self.index(b), (self.factor(b, scale) * part).astype(part.dtype))
        return found.reshape(self.stored.shape)

    def cancellation(self, dx: list[np.ndarray], scale: float) -> float:
        """How much larger the terms of the gradient's sums are than the sums: at least 1."""
        terms = np.zeros(self.stored.size)
        for b, part in enumerate(dx):
            np.add.at(terms, self.index(b), np.abs(self.factor(b, scale) * part))
        size = np.linalg.norm(self.gradient(dx, scale))
        return max(1.0, float(np.linalg.norm(terms) / size)) if size else 1.0


# --- dropout


def keep_bits(drop_mask: np.ndarray, lengths: list[tuple[int, int]], N: int) -> list[np.ndarray]:
    """The stream, least significant bit first, cut into blocks `N Sq Skv`."""
    stream = np.unpackbits(drop_mask.reshape(-1), bitorder="little")
    blocks = []
    for sq, skv in lengths:
        blocks.append(stream[: N * sq * skv].reshape(N, sq, skv).astype(bool))
        stream = stream[N * sq * skv :]
    return blocks


# --- layouts


def split(x: np.ndarray, layout: str, heads: int, ends: tuple[int, ...] = ()) -> list[np.ndarray]:
    """The sequences of a stored array, each `S heads D`."""
    if layout == "TND":
        starts = (0, *ends[:-1])
        return [x[a:b] for a, b in zip(starts, ends, strict=True)]
    if layout == "SBH":
        x = np.swapaxes(x, 0, 1)
    if layout in ("BSH", "SBH"):
        x = x.reshape(*x.shape[:2], heads, x.shape[2] // heads)
    return list(np.swapaxes(x, 1, 2) if layout == "BNSD" else x)


def join(parts: list[np.ndarray], layout: str) -> np.ndarray:
    """The stored array of sequences `S heads D`."""
    if layout == "TND":
        return np.concatenate(parts)
    x = np.stack(parts)
    if layout == "BNSD":
        return np.swapaxes(x, 1, 2)
    if layout == "BSND":
        return x
    x = x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])
    return np.swapaxes(x, 0, 1) if layout == "SBH" else x


def join_statistics(parts: list[np.ndarray], layout: str) -> np.ndarray:
    """`B N Sq 8` (TND: `T N 8`) of statistics `N Sq`."""
    x = np.concatenate([p.T for p in parts]) if layout == "TND" else np.stack(parts)
    return np.repeat(x[..., None], 8, axis=-1)


# --- the measure of error

# What a correct result may differ from the oracle by, whatever the naive one does: a quarter of a unit in the
# last place in the mean; twice that in the maximum, which is what rounding the exact number may cost.
FLOOR = {"float32": 1e-6, "bfloat16": 2**-9, "float16": 2**-12}


def assert_close(ours, exact, naive, dtype: str, what: str, times: float = 1.0) -> None:
    """Ours errs at most twice as much as the naive result, plus a floor: in relative L2 and in max-abs.

    The floor is relative to the terms of a sum: `times` larger where most of them cancel.

    The naive result must itself be near the oracle, or the comparison would allow anything.
    """
    ours, exact, naive = (np.asarray(x, np.float64) for x in (ours, exact, naive))
    assert ours.shape == exact.shape, f"{what}: shape {ours.shape}, expected {exact.shape}"
    assert np.isfinite(ours).all(), f"{what}: {np.count_nonzero(~np.isfinite(ours))} values are not finite"
    marked = np.abs(exact) >= FLT_MAX
    np.testing.assert_array_equal(ours[marked], exact[marked])
    ours, exact, naive = (np.where(marked, 0, x) for x in (ours, exact, naive))
    for name, norm in (("L2", np.linalg.norm), ("max", lambda x: np.max(np.abs(x), initial=0))):
        size = norm(exact.reshape(-1)) or 1
        error, allowed = (norm((x - exact).reshape(-1)) / size for x in (ours, naive))
        assert allowed <= 30 * times * FLOOR[dtype], (
            f"{what}: the naive result is off by {allowed:.3g} ({name})"
        )
        bound = 2 * allowed + times * FLOOR[dtype] * (2 if name == "max" else 1)
        assert error <= bound, f"{what}: {name} error {error:.3g} exceeds {bound:.3g} (naive: {allowed:.3g})"
