"""Which results may be anything: those that a value which is not finite reaches, by the mask alone."""

from typing import Any

import numpy as np

from jax_fa.testing.fuzz.numbers import Number

OPERANDS = ("query", "key", "value", "bias", "alibi_slopes", "sinks", "scale", "logits_soft_cap")
HUGE = 1e37  # beyond it, float32 may overflow on the way


def turned(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)


class Taint:
    """... of a `reference.Attention`."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.shape = call.structural.shape

    def _pairs(self, name: str, x: Any, moved: bool) -> np.ndarray:
        """Which pairs of a row and a key a value that is not finite belongs to; `moved`: it is a tangent."""
        x = self.call._arranged(name, np.asarray(x, np.float64))
        bad = ~np.isfinite(x)
        if name in ("bias", "sinks") and not moved:  # -inf is no key, and no sink
            return bad & ~np.isneginf(x)
        if name in ("query", "out"):
            return bad.any(axis=-1, keepdims=True)
        if name in ("key", "value"):
            return np.swapaxes(bad.any(axis=-1, keepdims=True), -1, -2)
        if name == "lse":
            return bad[..., None]
        return bad

    def rows(self, arrays: dict[str, Any], moved: bool = False) -> np.ndarray:
        """`*B K G Sq`: rows with a visible key that see such a value."""
        c = self.call
        found = np.zeros(self.shape[:-1], bool)
        for name, x in arrays.items():
            if x is None:
                continue
            pairs = self._pairs(name, x, moved)
            if not pairs.any():
                continue
            found |= (c.structural & pairs).any(axis=-1)
            if name in ("sinks", "lse") and "sinks" in c.given:  # which a fully masked row has, too
                found |= np.broadcast_to(pairs[..., 0], found.shape)
        return found

    def find(self) -> None:
        c = self.call
        overflow = (np.abs(c.s.value) + c.s.error > HUGE) & c.structural
        overflow |= (np.abs(c.dot.value) + c.dot.error / c.eps > HUGE) & c.structural
        forward = self.rows(c.given) | overflow.any(axis=-1)
        tangent = forward | self.rows(c.tangents, moved=True)
        self.forward_rows = forward
        self._mark(("out", "lse", "m", "l", "largest"), "", forward)
        self._mark(("out", "lse"), "'", tangent)
        if c.cotangents is None:
            return
        backward = forward | self.rows(dict(zip(("out", "lse"), c.cotangents, strict=True)))
        second = backward | tangent | self.rows(dict(zip(("out", "lse"), c.cotangent_tangents, strict=True)))
        for suffix, rows in (("", backward), ("'", second)):
            pairs = c.structural & rows[..., None]
            at = {
                "query": rows[..., None],
                "key": turned(pairs.any(axis=-2, keepdims=True)),
                "bias": pairs,
            }
            at["value"] = at["key"]
            for name in OPERANDS:
                if f"d{name}" not in c.results:
                    continue
                bad = at.get(name, rows[..., None])
                if name in ("query", "key", "value"):
                    width = np.asarray(c.given[name]).shape[-1]
                    bad = np.broadcast_to(bad, (*bad.shape[:-1], width))
                if name not in ("query", "key", "value", "bias"):
                    bad = bad.any(axis=(-1, -2), keepdims=True)
                counted = Number(bad.astype(np.float64))
                c.tainted[f"d{name}{suffix}"] = c._given_back(name, counted).value > 0

    def _mark(self, names: tuple[str, ...], suffix: str, rows: np.ndarray) -> None:
        c, rank = self.call, len(self.call.batch)
        flat = rows.reshape(*rows.shape[:rank], c.N, c.Sq)
        for name in names:
            wide = np.swapaxes(flat, -1, -2)[..., None] if name == "out" else flat
            c.tainted[name + suffix] = np.broadcast_to(wide, c.results[name].value.shape)
