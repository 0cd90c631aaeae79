"""The functions of a call (`flex.Program`), evaluated in one tile.

A score_mod f(x; floats) is one more step of the logits, so that with y = f(x):
    y' = f_x x' + f_floats floats'
    dx = f_x dy,  dfloats = sum of f_floats dy over all pairs
and the second derivative has the tangents of dx and of dfloats along x', floats' and those of dy. What JAX makes of f gives
them all; f is one value by one value, so nothing larger than the tile exists.
"""

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from jax_fa.backends.xla.canonical import Canonical


class Functions:
    """Those of a call, whose arrays are canonical: `*#B #K #G #rows #keys` and, of vectors, their elements."""

    def __init__(self, call: Canonical) -> None:
        problem, operands = call.problem, call.operands
        self.call, self.score_mod = call, problem.score_mod
        rank = len(call.B) + 4
        self.place = call.by_head(operands.function_place)
        self.floats = self.vector(operands.function_floats)
        words = self.vector(operands.function_words)
        first = 0
        self.words = {}
        for i, program in enumerate(problem.functions):
            self.words[i] = (
                jnp.zeros((1,) * rank + (0,), jnp.uint32)
                if words is None
                else words[..., first : first + program.words]
            )
            first += program.words

    def vector(self, x):
        """`*#B 1 n` -> `*#B 1 1 1 1 n`; None is the empty one."""
        if x is None:
            return jnp.zeros((1,) * (len(self.call.B) + 4) + (0,), self.call.acc)
        x = self.call.squeeze(x)
        return x.reshape(*x.shape[:-2], 1, 1, 1, 1, x.shape[-1])

    def indices(self, tile) -> tuple[Any, ...]:
        """Batch, head, row and column of the pairs of a tile."""
        lead = (1,) * (len(self.call.B) + 2)
        batch, head = (self.place[..., i, None, None] for i in range(2))
        row, column = tile.rows.positions(tile.t), tile.keys.positions(tile.u)
        return batch, head, row.reshape(*lead, -1, 1), column.reshape(*lead, 1, -1)

    def visible(self, tile) -> list[Any]:
        """What each mask_mod says of the pairs of a tile."""
        skip = self.score_mod is not None
        no_floats = self.vector(None)
        return [
            program.over(no_floats, self.words[i + skip], *self.indices(tile))
            for i, program in enumerate(self.call.problem.mask_mods)
        ]


class Score:
    """The score_mod in one tile: y = f(x)."""

    def __init__(self, functions: Functions, tile, x, masked, visible) -> None:
        """`masked`: where a bias of -inf masks a pair (None: nowhere); x may be anything there."""
        self.functions, self.visible = functions, visible
        self.indices = functions.indices(tile)
        self.floats, self.words = functions.floats, functions.words[0]
        x = x if masked is None else jnp.where(masked, 0, x)
        y = self._of(x, self.floats)
        self.x = jnp.broadcast_to(x, y.shape)
        # A score of -inf masks the pair, whatever comes after.
        self.masked = y == -jnp.inf if masked is None else (y == -jnp.inf) | masked
        self.value = y

    def _of(self, x, floats, indices=None):
        found = self.functions.score_mod.over(floats, self.words, x, *(indices or self.indices))
        # (It lacks the dims of x where the function does not read the score.)
        shape = jnp.broadcast_shapes(found.shape, x.shape)
        return jnp.broadcast_to(found, shape).astype(self.functions.call.acc)

    def _slope(self, x, floats):
        shape = jnp.broadcast_shapes(x.shape, floats.shape[:-1])
        y, back = jax.vjp(lambda x: jnp.broadcast_to(self._of(x, floats), shape), jnp.broadcast_to(x, shape))
        return back(jnp.ones_like(y))[0]

    def _shown(self, x):
        return jnp.where(self.masked, 0, x)

    @cached_property
    def slope(self):
        """f_x."""
        return self._shown(self._slope(self.x, self.floats))

    def tangent(self, x, floats):
        """y' along tangents of x and of the floats; None: 0."""
        return self._shown(self._along(self._of, x, floats))

    def slope_tangent(self, x, floats):
        """f_x' likewise."""
        return self._shown(self._along(self._slope, x, floats))

    def _along(self, fn, x, floats):
        return _derivative(fn, (self.x, self.floats), (x, floats))

    def floats_cotangent(self, dy, like):
        """dfloats, `*#B 1 1 n` as the sum `like` has them; `dy` is `*B K G rows keys`."""
        return self._summed(self._back, (self.x, self.floats, dy), like)

    def floats_second(self, dy, dy_tangent, x, floats, like):
        """The tangent of `floats_cotangent` along those of dy, x and the floats."""

        def along(at, moved, dy):
            live = None if x is None else self._pairs(x)
            return _derivative(self._back, (at, moved, dy), (live, floats, dy_tangent))

        return self._summed(along, (self.x, self.floats, dy), like)

    def _pairs(self, x):
        """x, and 0 where the pair is masked."""
        x = self._shown(x)
        return x if self.visible is None else jnp.where(self.visible, x, 0)

    def _summed(self, fn, args, like):
        x, floats, dy = args
        lead = like.shape[:-3]
        floats = jnp.broadcast_to(floats, (*lead, *floats.shape[len(lead) :]))
        found = fn(x, floats, self._pairs(dy)).reshape(like.shape)
        return found if self.visible is None else jnp.where(jnp.any(self._all_live), found, 0)

    @cached_property
    def _all_live(self):
        live = ~self.masked
        return live if self.visible is None else live & self.visible

    def _back(self, x, floats, dy):
        """The cotangent of the floats.

        0 times a derivative that is not finite would be NaN: masked pairs take the place of one that is visible.
        """
        indices: Any = self.indices
        if self.visible is not None:
            live = self._all_live
            first = jnp.unravel_index(jnp.argmax(live), live.shape)

            def instead(a):
                a_first = a[tuple(0 if size == 1 else i for i, size in zip(first, a.shape, strict=True))]
                return jnp.where(live, a, a_first)

            x, *indices = map(instead, (x, *indices))
        shape = dy.shape
        _, back = jax.vjp(lambda floats: jnp.broadcast_to(self._of(x, floats, indices), shape), floats)
        return back(dy)[0]


def _derivative(fn, at: tuple[Any, ...], along: tuple[Any, ...]):
    """That of fn along tangents, which may have dims that the arrays lack; None: 0."""
    pairs = [
        (x, jnp.zeros_like(x)) if t is None else jnp.broadcast_arrays(x, t.astype(x.dtype))
        for x, t in zip(at, along, strict=True)
    ]
    return jax.jvp(fn, tuple(x for x, _ in pairs), tuple(t for _, t in pairs))[1]
