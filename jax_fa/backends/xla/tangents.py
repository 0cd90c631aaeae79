"""The tangents of a call's operands, and what they make of the logits of one tile."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from jax_fa.backends.xla.canonical import Canonical
from jax_fa.backends.xla.functions import Functions
from jax_fa.backends.xla.logits import Logits, Tile
from jax_fa.call import Operands


class LogitTangent(NamedTuple):
    """Of a tile, `*#B #K #G rows keys`. Where a pair is masked only `s` is 0, the others may be anything."""

    s: Any  # of the logits, T
    inner: Any  # of the logits before the soft cap, less (y / cap) times the tangent of the cap
    before: Any  # X' of the logits before the score_mod; None: 0
    product: Any  # of q k^T; None: 0


class Tangents:
    """Tangents in the order of their operands; bias, slopes and factors canonical. An absent one is None."""

    def __init__(self, call: Canonical, tangents: Operands) -> None:
        self.call = call
        self.query, self.key, self.value = tangents.query, tangents.key, tangents.value
        self.bias, self.slopes = call.by_head(tangents.bias), call.by_head(tangents.alibi_slopes)
        self.scale, self.soft_cap = call.factor(tangents.scale), call.factor(tangents.soft_cap)
        self.floats = None
        if tangents.function_floats is not None:
            self.floats = Functions(call).vector(tangents.function_floats)
        moving = (self.query, self.key, self.bias, self.slopes, self.scale, self.soft_cap, self.floats)
        self.move_logits = any(x is not None for x in moving)

    def of_logits(self, tile: Tile, logits: Logits, q, k, visible) -> LogitTangent:
        """q and k are pairs, each of rows (or keys) and their tangent; for tangents that `move_logits`."""
        call = self.call
        product: Any = None
        (q, q_tangent), (k, k_tangent) = q, k
        if q_tangent is not None:
            product = call.product("kgid,kjd->kgij", q_tangent, k)
        if k_tangent is not None:
            product = _plus(product, call.product("kgid,kjd->kgij", q, k_tangent))
        x: Any = None if product is None else call.scale * product
        if self.scale is not None:
            x = _plus(x, self.scale * logits.product)
        if self.bias is not None:
            x = _plus(x, tile.bias(self.bias))
        if self.slopes is not None:
            x = _plus(x, -tile.alibi(self.slopes))
        before = x
        if logits.score is not None:
            x = logits.score.tangent(x, self.floats)
        s, cap = x, logits.cap
        if cap is not None:
            if self.soft_cap is not None:
                x = _plus(x, -cap.ratio * self.soft_cap)
            s = cap.slope * x
            if self.soft_cap is not None:
                s = s + cap.tanh * self.soft_cap
        return LogitTangent(s if visible is None else jnp.where(visible, s, 0), x, before, product)


def _plus(x, y):
    return y if x is None else x + y
