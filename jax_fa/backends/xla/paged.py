"""Attention to pages: a loop over tiles of whole pages, which are gathered one tile at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import softmax
from jax_fa.call import is_symbolic
from jax_fa.paged.call import PagedCall

TILE_KEYS = 512  # keys of a tile, if a page has no more


def forward(call: PagedCall) -> tuple[Any, Any, Any]:
    """out `B Sq N Dv`, softmax max and softmax sum `B N Sq`."""
    tiles, d = _Tiles(call), call.dims
    shape = (*d.B, d.K, d.G, d.Sq)
    start = jnp.zeros((*shape, d.Dv), call.acc), *softmax.start(shape, call.acc)
    with jax.numpy_dtype_promotion("standard"):
        out, m, l = jax.lax.fori_loop(*tiles.visited(), tiles.attend, start)
    out = softmax.finish(out, l).reshape(*d.B, d.N, d.Sq, d.Dv).swapaxes(1, 2)
    return out.astype(call.problem.out_dtype), m.reshape(call.stats_shape), l.reshape(call.stats_shape)


class _Tiles:
    """The tiles of a call: as many pages of every sequence as hold TILE_KEYS keys."""

    def __init__(self, call: PagedCall) -> None:
        self.call, self.operands, self.dims = call, call.operands, call.dims
        self.table = call.pages()
        self.page_size = self.operands.key_pages.shape[1]
        self.pages = max(TILE_KEYS // self.page_size, 1)
        if not is_symbolic(self.table.shape[1]):
            self.pages = min(self.pages, self.table.shape[1])
        self.keys = self.pages * self.page_size
        self.lower, self.upper = (x[:, None, None, :, None] for x in call.bounds())  # B K G Sq keys
        self.dtype = _common_dtype(call)
        o, K = self.operands, self.dims.K
        B, Sq, N, D = o.query.shape
        self.query = o.query.reshape(B, Sq, K, N // K, D).transpose(0, 2, 3, 1, 4).astype(self.dtype)
        problem = call.problem
        self.scale = problem.scale if o.scale is None else _of_sequences(o.scale)
        self.cap = problem.logits_soft_cap if o.soft_cap is None else _of_sequences(o.soft_cap)
        # Values that are parts of keys have the scale of keys.
        self.value_scale = o.key_scale if o.value_pages is None else o.value_scale

    def visited(self) -> tuple[Any, Any]:
        """The first tile in which a key is visible to any row, and the end of the last one."""
        first = jnp.min(self.lower, initial=self.dims.Skv) // self.keys
        return first, (jnp.max(self.upper, initial=0) + self.keys - 1) // self.keys

    def attend(self, index, carry):
        out, m, l = carry
        # Behind the last page of a sequence, it again: its positions there are not visible.
        at = jnp.minimum(index * self.pages + jnp.arange(self.pages), self.table.shape[1] - 1)
        at = jnp.take(self.table, at, axis=1)
        position = index * self.keys + jnp.arange(self.keys, dtype=jnp.int32)
        key = self.gathered(self.operands.key_pages, at).astype(self.dtype)
        if self.operands.value_pages is None:
            value = key[..., : self.dims.Dv]
        else:
            value = self.gathered(self.operands.value_pages, at).astype(self.dtype)
        s = self.logits(key, at)
        # A value that is not finite enters the product as 0, and comes back through the logits where it is visible.
        bad = ~jnp.all(jnp.isfinite(value), axis=-1, keepdims=True)
        factors = self.factors(self.value_scale, at)
        if factors is not None:
            bad |= _per_key(~jnp.isfinite(factors))
        s = jnp.where(_per_logit(bad), jnp.nan, s)
        s = jnp.where((self.lower <= position) & (position < self.upper), s, -jnp.inf)
        m, l, rescale, p = softmax.update(m, l, s)
        if factors is not None:
            p = p * jnp.where(_per_logit(bad), 0, factors)
        value = jnp.where(bad, 0, value)
        acc = self.call.acc
        more = jnp.einsum("bkgqt,btkv->bkgqv", p.astype(self.dtype), value, preferred_element_type=acc)
        return out * rescale[..., None] + more, m, l

    def logits(self, key, at):
        s = jnp.einsum("bkgqd,btkd->bkgqt", self.query, key, preferred_element_type=self.call.acc)
        if (factors := self.factors(self.operands.key_scale, at)) is not None:
            s = s * factors
        s = s * self.scale
        return s if self.cap is None else self.cap * jnp.tanh(s / self.cap)

    def gathered(self, pages, at):
        """`B keys ...` of a pool `#P #S ...`."""
        found = pages[jnp.minimum(at, pages.shape[0] - 1)]
        found = jnp.broadcast_to(found, (*at.shape, self.page_size, *pages.shape[2:]))
        return found.reshape(at.shape[0], self.keys, *pages.shape[2:])

    def factors(self, scale, at):
        """Scales of keys as factors of logits; None for none."""
        return (
            None if scale is None else _per_logit(self.gathered(scale, at)[..., None]).astype(self.call.acc)
        )


def _per_logit(x):
    """`B keys K 1` as `B K 1 1 keys`."""
    return x[..., 0].swapaxes(1, 2)[:, :, None, None]


def _per_key(x):
    """The other way round."""
    return x[:, :, 0, 0].swapaxes(1, 2)[..., None]


def _of_sequences(x):
    """`#B` as `#B K G Sq keys`."""
    return x[:, None, None, None, None]


def _common_dtype(call: PagedCall) -> Any:
    """What products multiply: 8-bit pages are exact in every wider dtype, 32-bit ones are not in 16 bits."""
    pages = call.operands.key_pages.dtype
    return call.dtype if pages.itemsize == 1 or pages == call.dtype else np.dtype(call.acc)
