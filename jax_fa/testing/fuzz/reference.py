"""Attention by its definition in float64, with all derivatives and with bounds of what each result may be off.

    s = cap tanh((scale q k^T + bias - slope distance) / cap),  p = exp(s) / (sum of exp(s) + exp(sink)),  out = (keep p) v
    ds = p (keep dout v^T - delta) cap',  delta = rowsum(keep p dout v^T) - dlse,  dq = scale ds k,  dk = scale ds^T q

Imports nothing of the library. Derivatives along a direction are those of these very formulas (see `numbers`).

Values that are not finite are taken out before, and the rows that they reach are known by the mask alone: a result that
such a row has a part in is `tainted`, and may be anything; every other one must be as if they were not there.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from jax_fa.testing.fuzz.numbers import TINY, Number, growth
from jax_fa.testing.fuzz.parts import Parts
from jax_fa.testing.fuzz.taint import OPERANDS, Taint, turned

FLT_MAX = float(np.finfo(np.float32).max)


@dataclass
class Attention:
    """A call in canonical form: query `*#B Sq N D`, key and value `*#B Skv K D`, statistics `*B N Sq`.

    `given` holds the operands by name; slopes, sinks, scale and cap have heads last, `*#B #N`. The others broadcast to
    `*B N Sq Skv`. `unit`: the unit roundoff of the dtype; `narrow`: that with which weights and their gradients may enter
    products; `eps`: that of sums.
    """

    batch: tuple[int, ...]
    given: dict[str, np.ndarray]
    scale: float
    visible: Any = True
    distance: Any = None
    keep: Any = None
    cap: float | None = None
    unit: float = 2.0**-24
    smallest: float = 0.0
    least_value: float = (
        1.0  # the least scale of a value, which weights are multiplied by before they are rounded
    )
    eps: float = 2.0**-24
    narrow: float = 0.0
    loose_delta: bool = False  # the backward takes delta from the rounded output
    scales_out: bool = False  # the output is rounded, multiplied and rounded again, and so is its cotangent
    cap_off: float = 0.0  # how far the tanh of the soft cap is off, however small it is
    scales_ds: bool = False  # for dk, before it is rounded: heads of one key may have scales of their own
    merged: bool = False  # from outputs and log-sum-exps of parts of the keys
    composed: bool = False  # with sinks, from the results without
    added: bool = False  # gradients are sums of some that are stored: of parts of the keys, or on devices
    tangents: dict[str, np.ndarray] = field(default_factory=dict)
    cotangents: Any = None  # of out and of the log-sum-exp, which may be None
    cotangent_tangents: Any = (None, None)

    def __post_init__(self) -> None:
        q, k = self.given["query"], self.given["key"]
        self.Sq, self.N, self.D = q.shape[-3:]
        self.Skv, self.K = k.shape[-3:-1]
        self.G = self.N // self.K
        self.full = (*self.batch, self.N, self.Sq, self.Skv)
        self.results: dict[str, Number] = {}
        self._gradients: dict[str, Number] = {}  # before they are summed to the shapes of operands
        self.parts = Parts(self)
        self.tainted: dict[str, np.ndarray] = {}

    # --- from how arrays are given to `*B K G rows columns`, and back

    def _split(self, x: np.ndarray, rest: int) -> np.ndarray:
        """`*#B #N ...` as `*#B K G ...` or `*#B 1 1 ...`; `rest` dims follow the heads."""
        x = np.asarray(x)
        rank = len(self.batch) + 1 + rest
        x = x.reshape((1,) * (rank - x.ndim) + x.shape)
        at = x.ndim - rest - 1
        heads = (self.K, self.G) if x.shape[at] == self.N else (1, 1)
        return x.reshape(*x.shape[:at], *heads, *x.shape[at + 1 :])

    def _arranged(self, name: str, x: np.ndarray) -> np.ndarray:
        if name in ("query", "out"):
            return self._split(np.swapaxes(x, -2, -3), 2)
        if name in ("key", "value"):
            return np.swapaxes(x, -2, -3)[..., None, :, :]
        if name == "bias":
            return self._split(x, 2)
        if name == "lse":
            return self._split(x, 1)
        return self._split(x, 0)[..., None, None]

    def _given_back(self, name: str, x: Number) -> Number:
        """A gradient of the shape of its operand."""
        shape = np.shape(self.given[name])
        if name in ("key", "value"):
            x = x.sum(axis=-3)
        elif name == "bias" or name == "query":
            x = x.map(lambda a: a.reshape(*a.shape[:-4], self.N, *a.shape[-2:]))
        else:
            x = x.map(lambda a: a.reshape(*a.shape[:-4], self.N))
        if name in ("query", "key", "value"):
            x = x.map(lambda a: np.swapaxes(a, -2, -3))
        return _sum_to(x, shape)

    def _number(self, name: str) -> Number:
        """An operand as computed with: what is not finite is 0."""
        x = _clean(self._arranged(name, np.asarray(self.given[name], np.float64)))
        tangent = None
        if self.tangents:
            moved = self.tangents.get(name)
            if moved is not None:
                tangent = Number(
                    _clean(self._arranged(name, np.asarray(moved, np.float64))), 0.0, None, self.eps
                )
        return Number(x, 0.0, tangent, self.eps)

    def _grouped(self, x: Any, rest: int = 2) -> np.ndarray:
        return self._split(np.asarray(x), rest)

    # --- the masks

    @cached_property
    def structural(self) -> np.ndarray:
        """`*B K G Sq Skv`: visible by the mask."""
        shape = (*self.batch, self.K, self.G, self.Sq, self.Skv)
        return np.broadcast_to(self._grouped(self.visible), shape)

    @cached_property
    def seen(self) -> np.ndarray:
        """... and not masked by a bias of -inf."""
        if "bias" not in self.given:
            return self.structural
        return self.structural & ~np.isneginf(self._grouped(np.asarray(self.given["bias"], np.float64)))

    # --- forward

    def compute(self) -> None:
        with np.errstate(all="ignore"):
            self._forward()
            if self.cotangents is not None:
                self._backward()
            Taint(self).find()

    def _logits(self) -> Number:
        q, k, v = (self._number(name) for name in ("query", "key", "value"))
        scale = (
            self._number("scale")
            if "scale" in self.given
            else Number(np.asarray(self.scale), 0.0, None, self.eps)
        )
        self.q, self.k, self.v, self.scale_number = q, k, v, scale
        self.dot = q @ k.map(turned)
        x = self.dot * scale
        if "bias" in self.given:
            x = x + self._number("bias")
        if "alibi_slopes" in self.given:
            self.away = self._grouped(self.distance).astype(np.float64)
            # (A distance in float32, and its product.)
            x = x - (self._number("alibi_slopes") * self.away).rounded(4 * self.eps)
        self.by_x: Number | None = None
        cap = self.cap
        if "logits_soft_cap" in self.given or cap is not None:
            c = (
                self._number("logits_soft_cap")
                if cap is None
                else Number(np.asarray(cap), 0.0, None, self.eps)
            )
            self.u = x / c
            t = self.u.tanh()
            t = t._new(t.value, t.error + self.cap_off, t.tangent)
            self.by_x = t._of(1.0) - t * t
            self.by_cap = t - self.u * self.by_x
            x = t * c
        return x.map(lambda a: np.broadcast_to(a, self.seen.shape))

    def _forward(self) -> None:
        self.s = x = self._logits()
        seen = self.seen
        m = np.max(x.value, axis=-1, keepdims=True, where=seen, initial=-FLT_MAX)
        error = np.max(np.broadcast_to(x.error, seen.shape), axis=-1, keepdims=True, where=seen, initial=0.0)
        self._result("largest", Number(m[..., 0], error[..., 0]), (self.K, self.G, self.Sq))
        if "sinks" in self.given:
            self.sinks = sinks = self._number("sinks")
            sink_values = self._arranged("sinks", np.asarray(self.given["sinks"], np.float64))
            there = ~np.isneginf(sink_values)
            m = np.maximum(m, np.where(there, sinks.value, -FLT_MAX))
        top = Number(m, 0.0, None, self.eps)
        e = (x - top).map(lambda a: np.where(seen, a, 0.0)).exp().where(seen)
        l = e.sum(axis=-1, keepdims=True)
        self.sink_weight: Number | None = None
        if "sinks" in self.given:
            of_sink = (sinks - top).exp().where(there)
            l = l + of_sink
        self.empty = l.value == 0
        safe = Number(np.where(self.empty, 1.0, l.value), l.error, l.tangent, self.eps)
        if "sinks" in self.given:
            self.sink_weight = of_sink / safe
        p = e / safe
        self.weights = p
        self.p = p.map(lambda a: np.minimum(a, FLT_MAX))
        narrow = self._narrowed(p)
        out = self._with_sink_rounded(narrow @ self.v)
        if self.sink_weight is not None or self.scales_out:
            lost = self.least * (float(np.max(self.keep, initial=1.0)) if self.scales_out else 1.0)
            out = out._new(out.value, out.error + self.narrow * np.abs(out.value) + lost, out.tangent)
        self.out = out = self.parts.output(out)
        lse = self._with_error_of_sum(top + safe.log(), p, x, top)
        lse = lse._new(
            np.where(self.empty, -FLT_MAX, lse.value), np.where(self.empty, 0, lse.error), lse.tangent
        )
        self.lse_tangent = None if lse.tangent is None else lse.tangent.value
        rows = (self.K, self.G, self.Sq)
        self._result("lse", lse.map(lambda a: a[..., 0]), rows)
        most = error[..., 0]
        self._result("m", Number(np.where(self.empty, -FLT_MAX, m)[..., 0], most), rows)
        l_error = l.error[..., 0] + l.value[..., 0] * np.expm1(np.minimum(2 * most, 50))
        self._result("l", Number(np.where(self.empty, 0, l.value)[..., 0], l_error), rows)
        self._stored("out", out)

    def rows_that_see(self, arrays: dict[str, Any]) -> np.ndarray:
        """`*B K G Sq`: rows to which something is visible that is not finite in one of these."""
        return Taint(self).rows(arrays)

    def _with_error_of_sum(self, lse: Number, p: Number, x: Number, top: Number) -> Number:
        """The log-sum-exp with its bound.

        It is off by the relative error of the sum: the mean, by weight, of those of its terms (of which one is the sink), and
        what adding them loses. `Number.exp` bounds terms likewise, but an error of a logit moves the mean no further than
        itself, however large it is. The max and the logarithm are rounded themselves, and may cancel.
        """

        def of_term(weight: Any, at: Any, error: Any) -> Any:
            return weight * (error + self.eps * (8 + 2 * np.abs(at - top.value)))

        where = np.where(self.seen, x.value, top.value)
        error = of_term(p.value, where, x.error).sum(axis=-1, keepdims=True)
        if self.sink_weight is not None:
            error = error + of_term(self.sink_weight.value, self.sinks.value, 0.0)
        size = np.abs(top.value) + 3 * np.abs(lse.value - top.value)
        return lse._new(
            lse.value, error + self.eps * (growth(self.Skv) + size + np.abs(lse.value)), lse.tangent
        )

    def _moves_sink(self, x: Number) -> bool:
        """Whether an array is multiplied by the share that the keys have in the sum, which moves."""
        weight = self.sink_weight
        return weight is not None and None not in (weight.tangent, x.tangent)

    def _share_factor(self) -> Any:
        """How fast the keys' share in the sum moves, relative to it: by their tangents and by the sink's, which may cancel."""
        # (Not 1 - the weight of the sink, which may be 1.)
        p, moved, rest = self.weights.value, self.s.tangent, self.sink_weight
        assert rest is not None
        by_keys = 0.0 if moved is None else (p * np.where(self.seen, moved.value, 0.0)).sum(-1, keepdims=True)
        by_sink = 0.0 if self.sinks.tangent is None else self.sinks.tangent.value
        share = np.maximum(p.sum(-1, keepdims=True), TINY)
        return rest.value * (np.abs(by_keys) / share + np.abs(by_sink))

    def _with_sink_rounded(self, x: Number) -> Number:
        """The tangent of what is the product of an array and of the keys' share in the sum, by its two terms."""
        if not self._moves_sink(x):
            return x
        tangent, factor = x.tangent, self._share_factor()
        assert tangent is not None
        size = np.abs(tangent.value) + 2 * np.abs(x.value) * factor
        more = (self.narrow + 8 * self.eps) * size + self.least * (2 + factor)
        return x._new(x.value, x.error, x._new(tangent.value, tangent.error + more))

    def _narrowed(self, p: Number) -> Number:
        """Weights that are kept, rounded before they are divided by the probability of that, or after."""
        rounded = p.rounded(self.narrow, self.least / self.least_value)
        return rounded if self.keep is None else rounded * self._grouped(self.keep)

    @property
    def least(self) -> float:
        return self.smallest if self.narrow else 0.0

    def _result(self, name: str, x: Number, heads: tuple[int, ...]) -> None:
        rank = len(self.batch)
        shape = (*self.batch, *heads)

        def whole(a):
            a = np.broadcast_to(a, shape)
            return a.reshape(*a.shape[:rank], self.N, *a.shape[rank + 2 :])

        self.results[name] = x.map(whole)

    def _stored(self, name: str, x: Number) -> None:
        """`*B K G Sq width` as `*B Sq N width`."""
        rank = len(self.batch)

        def whole(a):
            a = np.broadcast_to(a, (*self.batch, self.K, self.G, *a.shape[-2:]))
            return np.swapaxes(a.reshape(*a.shape[:rank], self.N, *a.shape[-2:]), -2, -3)

        self.results[name] = x.map(whole)

    # --- backward

    def _cotangent(self, at: int, name: str) -> Number | None:
        x, moved = self.cotangents[at], self.cotangent_tangents[at]
        if x is None:
            return None
        x = _clean(self._arranged(name, np.asarray(x, np.float64)))
        tangent = None
        if moved is not None:
            tangent = Number(_clean(self._arranged(name, np.asarray(moved, np.float64))), 0.0, None, self.eps)
        return Number(x, 0.0, tangent, self.eps)

    def _backward(self) -> None:
        dout, dlse = self._cotangent(0, "out"), self._cotangent(1, "lse")
        assert dout is not None
        narrow, least = self.narrow, self.least
        if self.sink_weight is not None or self.scales_out:
            dout = self._with_sink_rounded(dout.rounded(narrow, least))
        dw = dout @ self.v.map(turned)
        if self.keep is not None:
            dw = dw * self._grouped(self.keep)
        terms = self.p * dw
        delta = terms.sum(axis=-1, keepdims=True)
        delta = self._as_computed(delta, dout, terms)
        if dlse is not None:
            delta = delta - dlse.map(lambda a: a[..., None])
        delta = self.parts.delta(delta, dout, dlse)
        dx = self._flushed_first((self.p * (dw - delta)).where(self.seen))
        largest = self.parts.largest_values().sum(axis=-1, keepdims=True)
        dx = self.parts.lost(dx, lambda pairs: pairs * largest)
        ds = dx if self.by_x is None else (dx * self.by_x).where(self.seen)
        narrow_ds = ds.rounded(narrow, least)
        dq = self.parts.gradient("query", narrow_ds, self.k, self.scale_number)
        if self.scales_ds:
            scaled = (ds * self.scale_number).rounded(narrow, least)
            dk = self.parts.gradient("key", scaled.map(turned), self.q)
        else:
            dk = self.parts.gradient("key", narrow_ds.map(turned), self.q, self.scale_number)
        dv = self.parts.gradient("value", self._narrowed(self.weights).map(turned), dout)
        kept = 1.0 if self.keep is None else self._grouped(self.keep)
        dv = self.parts.lost(dv, lambda pairs: turned(pairs * kept).sum(axis=-1, keepdims=True))
        dq = self._moved(dq, ds)
        found = {"query": dq, "key": dk, "value": dv}
        if "bias" in self.given:
            found["bias"] = ds
        if "alibi_slopes" in self.given:
            found["alibi_slopes"] = -(ds * self.away).rounded(4 * self.eps)
        if "scale" in self.given:
            found["scale"] = ds * self.dot
        if "logits_soft_cap" in self.given:
            found["logits_soft_cap"] = (dx * self.by_cap).where(self.seen)
        if self.sink_weight is not None:
            found["sinks"] = -(self.sink_weight * delta)
        for name, x in found.items():
            size = x.magnitude
            if name in ("alibi_slopes", "scale", "logits_soft_cap", "sinks"):
                x, size = (self._of_heads(y) for y in (x, size))
            self.results[f"d{name}"] = self._given_back(name, x)
            self._gradients[f"d{name}"] = x
            if self.added:
                self.parts.sizes.setdefault(f"d{name}", size)

    def _of_heads(self, x: Number) -> Number:
        x = x.map(lambda a: np.broadcast_to(a, (*self.batch, self.K, self.G, *a.shape[-2:])))
        return x.sum(axis=(-1, -2), keepdims=True)

    def size_in_parts(self, name: str) -> Any:
        """The sum of the magnitudes of what adds up to a gradient, or its tangent, and is stored by itself.

        That is what each entry of the first dim of the batch gives, or each part of the keys.
        """
        base = name.removesuffix("'")
        if base in self.parts.sizes:
            size = self.parts.sizes[base]
            size = size if name == base or size.tangent is None else size.tangent
            return self._given_back(base[1:], size.still).value
        x = self._gradients.get(base)
        x = x.tangent if x is not None and name != base else x
        shape = np.shape(self.given.get(base[1:], 0.0))
        if x is None or not self.batch or shape[:1] != (1,):  # it is no sum over them
            return 0.0
        parts = (self._given_back(base[1:], Number(x.value[i : i + 1])) for i in range(x.value.shape[0]))
        return sum(np.abs(part.value) for part in parts)

    def _flushed_first(self, dx: Number) -> Number:
        """The tangent of p (dw - delta) where this product is 0 before it is multiplied by how fast p moves."""
        if dx.tangent is None or self.s.tangent is None:
            return dx
        moves = np.abs(self.s.tangent.value - (0.0 if self.lse_tangent is None else self.lse_tangent))
        error = dx.tangent.error + dx.flushed * np.where(self.seen, moves, 0.0)
        return dx._new(dx.value, dx.error, dx._new(dx.tangent.value, error))

    def _as_computed(self, delta: Number, dout: Number, terms: Number) -> Number:
        """delta by way of the output: rowsum(dout out), where the output may be rounded."""
        size = (np.abs(dout.value) * np.abs(self.out.value)).sum(axis=-1, keepdims=True)
        summed = np.abs(terms.value).sum(axis=-1, keepdims=True)
        unit = self.unit if self.loose_delta else self.unit**2
        from_out = (np.abs(dout.value) * self.out.error).sum(axis=-1, keepdims=True)
        if self.narrow and not self.loose_delta:
            from_out = from_out + self.narrow * self.narrow * summed
        return delta._new(delta.value, delta.error + from_out + 8 * (unit + self.eps) * size, delta.tangent)

    def _moved(self, dq: Number, ds: Number) -> Number:
        """What may be put on another key where gradients are rounded, so that they still add up."""
        if not self.narrow:
            return dq
        size = np.abs(ds.value).sum(axis=-1, keepdims=True) * 2 * self.narrow
        largest = np.abs(self.k.value).max(axis=-2, keepdims=True, initial=0.0)
        more = size * largest * np.abs(self.scale_number.value)
        return dq._new(dq.value, dq.error + more, dq.tangent)


def _clean(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), x, 0.0)


def _sum_to(x: Number, shape: tuple[int, ...]) -> Number:
    lead = x.value.ndim - len(shape)
    if lead:
        x = x.sum(axis=tuple(range(lead)))
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and x.value.shape[i] != 1)
    return x.sum(axis=axes, keepdims=True) if axes else x


__all__ = ["FLT_MAX", "OPERANDS", "TINY", "Attention", "growth"]
