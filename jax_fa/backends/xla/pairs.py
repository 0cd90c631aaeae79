"""What a derivative makes of the pairs of a row tile and a key tile, from saved statistics."""

from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_fa import softmax
from jax_fa.backends.xla.canonical import Canonical
from jax_fa.backends.xla.logits import Logits, Tile, every, finite, nan_unless_finite
from jax_fa.backends.xla.tangents import LogitTangent, Tangents
from jax_fa.backends.xla.tiling import tiling
from jax_fa.call import Operands, Saved, has_rounding, rounding_unit, widened


class Vectors(NamedTuple):
    """Rows of what is stored by row, `*#B K G rows ...`; None: absent."""

    q: Any
    dout: Any
    q_tangent: Any
    dout_tangent: Any


class Row(NamedTuple):
    """What all key tiles of a row tile have in common."""

    t: Any
    given: Vectors
    clean: Vectors  # with 0 where it is not finite, which the probabilities or the tangents bring back
    out: Any  # as it was before rounding
    m: Any
    inverse: Any  # 1 / l, NaN for a row with a cotangent (or a tangent of one) that is not finite
    mean: Any  # rowsum(dout out), the mean of dp by p; None without cotangents
    near: Any  # ... from which a dp that is the same sum may be as far away by rounding
    dlogsumexp: Any  # None: 0
    fresh: Any  # which rows no earlier tile has; None: all


class Tiles:
    """A call, its tangents and what is saved of it, cut into tiles."""

    def __init__(self, call: Canonical, saved: Saved, tangents: Operands | None = None) -> None:
        self.call, self.saved = call, saved
        self.tangents = Tangents(call, Operands() if tangents is None else tangents)
        self.rows, self.keys = tiling(call)
        rules = (call.lower, call.upper, call.mask, call.segment_row, call.problem.mask_mods or None)
        self.masked = self.rows.ragged or self.keys.ragged or any(x is not None for x in rules)

    def clean(self, x):
        """x with 0 where it is not finite, if some pairs are masked."""
        return x if x is None or not self.masked else finite(x)

    def statistics(self, name: str, t):
        """A row tile of an array `*#B N Sq`; None if it is absent."""
        x = getattr(self.saved, name)
        return None if x is None else self.rows.cut(self.call.by_head(x), -1, t).astype(self.call.acc)

    def like_out(self, name: str, t):
        x = getattr(self.saved, name)
        return None if x is None else self.call.query_tile(x, self.call.problem.out_axes, self.rows, t)

    def row(self, t) -> Row:
        call, rows, problem = self.call, self.rows, self.call.problem
        out = widened(self.like_out("out", t), self.like_out("rounding", t), call.acc)
        q, q_tangent = (
            None if x is None else call.query_tile(x, problem.query_axes, rows, t)
            for x in (call.operands.query, self.tangents.query)
        )
        given = Vectors(q, self.like_out("dout", t), q_tangent, self.like_out("dout_tangent", t))
        inverse = softmax.inverse(self.statistics("l", t))
        mean, near = (None, None) if given.dout is None else self.mean(given.dout, out)
        if self.masked:
            for x in (given.dout, given.dout_tangent):
                inverse = inverse if x is None else inverse + nan_unless_finite(x).astype(call.acc)
        fresh = rows.fresh(t)
        return Row(
            t=t,
            given=given,
            clean=Vectors(*map(self.clean, given)),
            out=out,
            m=self.statistics("m", t),
            inverse=inverse,
            mean=mean,
            near=near,
            dlogsumexp=self.statistics("dlogsumexp", t),
            fresh=None if fresh is None else fresh[:, None],
        )

    @property
    def rounding_of_out(self) -> float:
        """How far out may be from the value of a key that has all the weight, relative to it.

        Dropout divides the value, so that out has been rounded several times, once to the dtype of the call.
        """
        call, several = self.call, 4 * float(jnp.finfo(self.call.acc).eps)
        dropped = call.operands.dropout_seed is not None or call.operands.drop_bits is not None
        if not (dropped and has_rounding(call.dtype)):
            return several
        unit = rounding_unit(call.dtype)
        return several + (unit if self.saved.rounding is None else unit * unit)

    def mean(self, x, out) -> tuple[Any, Any]:
        """rowsum(x out), and how far by rounding x v may be from it where out is v.

        Each is a sum of Dv terms in an order of its own, which is off by about the root of Dv units in the last place of the
        sum of their magnitudes: a third of that if all have one sign.
        """
        terms = x.astype(self.call.acc) * out
        unit = float(jnp.finfo(terms.dtype).eps) * self.call.dims.Dv**0.5 + self.rounding_of_out
        mean = jnp.sum(terms, axis=-1)
        # (NaN where the mean is not finite.)
        return mean, jnp.sum(jnp.abs(terms * unit), axis=-1) + 0 * mean


@jax.custom_jvp
def less(x, y, near):
    """x - y, and 0 where that is no more than `near`, by which both may be off."""
    difference = x - y
    return jnp.where(jnp.abs(difference) <= near, 0, difference)


@less.defjvp
def _less_jvp(primals, tangents):
    """That of the difference: what rounding hides may move."""
    return less(*primals), tangents[0] - tangents[1]


class Pairs:
    """The pairs of a row tile and key tile u; each of their values is computed when it is first asked for.

    So what is absent or not wanted costs nothing. (One body of a loop must not leave a value to another.)
    """

    def __init__(self, tiles: Tiles, row: Row, u) -> None:
        self.tiles, self.row, self.call = tiles, row, tiles.call
        self.tile = Tile(tiles.call, tiles.rows, tiles.keys, row.t, u)
        self.visible, self.keep = self.tile.visible(), self.tile.keep()

    def shown(self, x):
        """x, and 0 where the pair is masked."""
        return x if self.visible is None else jnp.where(self.visible, x, 0)

    def counted(self, x):
        """x, and 0 where the pair is masked, or counted by an earlier tile of rows."""
        counted = every(self.visible, self.row.fresh)
        return x if counted is None else jnp.where(counted, x, 0)

    def kept(self, x):
        """x of the pairs that dropout keeps, divided by the keep probability."""
        if self.keep is None:
            return x
        return jnp.where(self.keep, x if self.call.keep_prob is None else x / self.call.keep_prob, 0)

    def _keys(self, x, axes):
        return None if x is None else self.call.key_tile(x, axes, self.tiles.keys, self.tile.u)

    @cached_property
    def k(self):
        return self._keys(self.call.operands.key, self.call.problem.key_axes)

    @cached_property
    def v(self):
        return self._keys(self.call.operands.value, self.call.problem.value_axes)

    @cached_property
    def k_tangent(self):
        return self._keys(self.tiles.tangents.key, self.call.problem.key_axes)

    @cached_property
    def v_tangent(self):
        return self._keys(self.tiles.tangents.value, self.call.problem.value_axes)

    @cached_property
    def logits(self) -> Logits:
        return self.tile.logits(self.row.given.q, self.k, self.visible)

    @cached_property
    def p(self):
        """Probabilities."""
        return self.shown(softmax.weights(self.logits.x, self.row.m) * self.row.inverse[..., None])

    @cached_property
    def dp(self):
        """The cotangent of the probabilities."""
        return self.kept(self.call.product("kgid,kjd->kgij", self.row.given.dout, self.v))

    @cached_property
    def ds(self):
        """The cotangent of the logits."""
        ds = self.from_mean(self.dp, self.row.mean, self.row.near)
        if self.row.dlogsumexp is not None:
            ds = ds + self.row.dlogsumexp[..., None]
        return self.counted(self.p * ds)

    def from_mean(self, x, mean, near):
        """x less its mean by p: in rows of which one key may have all the weight, 0 where that is no more than `near`.

        The mean is a sum in another order than the x of such a key. Where they differ in a last bit, queries of 1e18 make a
        gradient of 1e12. (By rows, as to ask each p takes longer; the other keys of such a row have hardly a weight.)
        """
        near = jnp.where(self.row.inverse == 1, near, -1)
        return less(x, mean[..., None], near[..., None])

    @cached_property
    def dy(self):
        """The cotangent of the logits before the soft cap."""
        cap = self.logits.cap
        return self.ds if cap is None else self.counted(self.ds * cap.slope)

    @cached_property
    def dx(self):
        """The cotangent of the logits before the score_mod."""
        score = self.logits.score
        return self.dy if score is None else self.counted(self.dy * score.slope)

    @cached_property
    def tangent(self) -> LogitTangent:
        """The tangent of the logits."""
        row, tangents = self.row.given, self.tiles.tangents
        return tangents.of_logits(
            self.tile, self.logits, (row.q, row.q_tangent), (self.k, self.k_tangent), self.visible
        )

    @cached_property
    def moved(self):
        """kappa p + 0, with NaN where a value's tangent is not finite."""
        weights = self.kept(self.p)
        if self.visible is None:
            return weights
        return weights + self.shown(nan_marker(self.call, self.v_tangent))


def nan_marker(call: Canonical, x):
    """0 or, for the keys of vectors (`*#B K keys ...`) that are not finite, NaN; over the rows."""
    return nan_unless_finite(x)[..., None, None, :].astype(call.acc)
