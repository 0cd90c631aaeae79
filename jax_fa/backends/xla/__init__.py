"""The portable backend: blocked attention in plain JAX, on every platform.

It is the meaning of the op: loops over row tiles and, inside, over those key tiles with a key that is visible
to some row of the tile. No array of Sq x Skv exists; the largest temporary is one tile of logits for all heads.

Forward, per row tile (Dao et al. 2022, arXiv:2205.14135, algorithm 1; Dao 2023, arXiv:2307.08691):
    s = cap(scale q k^T + bias),  m = max s,  l = sum exp(s - m),  out = sum keep exp(s - m) v / (keep_prob l)
Backward from the saved m and l, with D = rowsum(dout out) - dlogsumexp, out as it was before rounding:
    p = exp(s - m) / l,  dp = keep / keep_prob (dout v^T),  ds = p (dp - D)
    dq = scale ds k,  dk = scale ds^T q,  dv = (keep / keep_prob p)^T dout,  dbias = ds

Rows of ds sum to 0 (to dlogsumexp), so that what all keys have in common cancels in dq. Rounding to 16 bits would leave
some of it, in p v (of which D is made) as well as in ds k: under differentiation both take their weights wide.

NaN in masked positions (padding often holds it) must not propagate, and 0 * NaN is NaN in a matrix product. So in
masked tiles non-finite values enter the products as 0, and where they are visible they come back through the
probabilities: key and query through s anyway, value added to s, dout through 1 / l. A row with a visible non-finite
value is NaN as a whole, with its statistics.
"""

from typing import Any

from jax_fa.backends.xla.backward import backward
from jax_fa.backends.xla.canonical import Canonical
from jax_fa.backends.xla.forward import forward
from jax_fa.backends.xla.padding import Padding
from jax_fa.call import Call, Operands, Saved


class Xla:
    """See `backends.Backend`."""

    name = "xla"
    platforms = None
    emulated_on = ()

    def why_not(self, call: Call, *, platform: str, what: str) -> str | None:
        """Nothing is refused."""
        return None

    def notes(self, call: Call) -> tuple[str, ...]:
        return ()

    def forward(self, call: Call) -> tuple[Any, ...]:
        padding = Padding(call)
        if not padding.extra:
            return forward(Canonical(call))
        results = forward(Canonical(padding.padded()))
        shapes = (call.out_shape, call.stats_shape, call.stats_shape, call.out_shape)
        return tuple(padding.cut(x, shape) for x, shape in zip(results, shapes, strict=False))

    def backward(self, call: Call, saved: Saved) -> Operands:
        padding = Padding(call)
        if not padding.extra:
            return backward(Canonical(call), saved)
        padded = backward(Canonical(padding.padded()), padding.saved(saved))
        return padded.map(lambda name, x: padding.cut(x, call.gradient_shape(name)))

    # TEMPORARY
    def _along(self, call, tangents, fn):
        import jax
        import jax.numpy as jnp
        from dataclasses import replace

        t = tangents.present()
        B = call.dims.B
        from jax_fa.call import stored_shape, canonical_shape, STORED

        def full(name, x):
            if name in STORED:
                axes = call.problem.axes(name)
                r = len(B)
                return jnp.broadcast_to(x, stored_shape((*B, *canonical_shape(x.shape, axes)[r:]), axes))
            r = len(B)
            o = getattr(call.operands, name)
            return jnp.broadcast_to(x, tuple(max(a, b) for a, b in zip(x.shape, o.shape)))

        ops = {n: full(n, getattr(call.operands, n)) for n in t}
        return jax.jvp(
            lambda o: fn(call.replace(operands=replace(call.operands, **o))),
            (ops,),
            ({n: full(n, x) for n, x in t.items()},),
        )

    def jvp(self, call, tangents):
        def fn(c):
            from jax_fa import softmax

            out, m, l, *r = self.forward(c)
            return (out, softmax.logsumexp(m, l)), (out, m, l, *r)

        (a, b), (c, d) = self._along(call, tangents, fn)
        return (*b, *c)

    def tangent(self, call, tangents, saved):
        return self.jvp(call, tangents)[-2:]

    def second_tangent(self, call, tangents, others, saved):
        from dataclasses import replace

        return self._along(call, others, lambda c: self.tangent(c, tangents, None))[1]

    def second(self, call, tangents, saved):
        import jax, jax.numpy as jnp
        from dataclasses import replace

        dout, dlse = self.tangent(call, tangents, saved)
        names = call.gradient_names
        acc = call.acc
        out = saved.out.astype(acc)
        t = tangents.present()

        def fn(c):
            return self.backward(c, c_saved)

        def run(ops, sv):
            return self.backward(
                replace(call, operands=replace(call.operands, **ops)), replace(saved, rounding=None, **sv)
            )

        B = call.dims.B
        d = {
            n: getattr(saved, n) for n in ("dout", "dlogsumexp") if getattr(saved, n + "_tangent") is not None
        }
        sv = {"out": out, "m": saved.m, "l": saved.l, **d}
        svt = {
            "out": dout.astype(acc),
            "m": dlse,
            "l": jnp.zeros_like(saved.l),
            **{n: getattr(saved, n + "_tangent") for n in d},
        }
        g = jax.jvp(run, ({n: getattr(call.operands, n) for n in t}, sv), (t, svt))[1]
        return g, dout, dlse


backend = Xla()
