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

Tangent, along tangents a, b, e of query, key, value and those of bias, slopes, scale and cap, where cap is f(x):
    x' = scale (a k^T + q b^T) + scale' q k^T + bias' - slopes' distance,  t = f' x' + df/dcap cap'
    tau = sum p t,  out' = (keep / keep_prob p t) v + (keep / keep_prob p) e - tau out,  logsumexp' = tau
In one pass with the forward, tau is the mean of t over the keys so far and t - tau takes the place of t: where the mean
changes, the difference times the sum of p v is added, as the sums are rescaled where the max changes.

Second, the derivative of the backward along those tangents and those of dout and dlogsumexp:
    u = keep / keep_prob (dout' v^T + dout e^T)
    sigma = D' = sum ds t + sum p keep / keep_prob (dout e^T) + rowsum(dout' out) - tau dlogsumexp - dlogsumexp'
    g = ds' = ds (t - tau) + p (u - sigma),  gx = g f' + ds f'' (x' - x cap' / cap)
    dq' = (scale gx + scale' ds f') k + scale ds f' b,  dk' likewise of q and a,  dbias' = gx,  dslopes' = -gx distance
    dv' = (keep / keep_prob p (t - tau))^T dout + (keep / keep_prob p)^T dout',  out' as above but of t - tau
The sums over a row come first, in a loop over its keys of their own. All of this is the Hessian of
<dout, out> + <dlogsumexp, logsumexp>, so it is its own transpose.

The derivative of the tangent along other tangents is left to JAX, in forward mode, which is what all these loops serve.
Then m moves as the log-sum-exp does and l stays: p depends on nothing else.

NaN in masked positions (padding often holds it) must not propagate, and 0 * NaN is NaN in a matrix product. So in
masked tiles non-finite values enter the products as 0, and where they are visible they come back through the
probabilities: key and query through s anyway, value added to s, dout and dout' through 1 / l, and tangents through t or,
that of value, added to the weights that it is multiplied with. A row with a visible non-finite value is NaN as a whole,
with its statistics.
"""

from typing import Any

from jax_fa.backends.xla import paged
from jax_fa.backends.xla.backward import backward
from jax_fa.backends.xla.canonical import Canonical
from jax_fa.backends.xla.forward import forward
from jax_fa.backends.xla.padding import Padding
from jax_fa.backends.xla.second import second
from jax_fa.backends.xla.tangent import jvp, second_tangent, tangent
from jax_fa.backends.xla.tiling import is_one_tile
from jax_fa.call import Call, Operands, Saved
from jax_fa.paged.call import PagedCall


class Xla:
    """See `backends.Backend`."""

    name = "xla"
    platforms = None
    emulated_on = ()
    splits_rows = True

    def why_not(self, call: Call | PagedCall, *, platform: str, what: str) -> str | None:
        """Nothing is refused."""
        return None

    def why_no_functions(self, call: Call) -> str | None:
        return None

    def notes(self, call: Call | PagedCall) -> tuple[str, ...]:
        return ()

    def splits_alone(self, call: Call) -> bool:
        """Without loops: XLA would gather rows that it slices, and compute the bounds of loops from all devices' masks."""
        return is_one_tile(call.dims) and not call.problem.functions

    def forward(self, call: Call) -> tuple[Any, ...]:
        padding = Padding(call)
        shapes = (call.out_shape, call.stats_shape, call.stats_shape, call.out_shape)
        return padding.cut_all(forward(Canonical(padding.padded())), shapes)

    def backward(self, call: Call, saved: Saved) -> Operands:
        padding = Padding(call)
        return padding.cut_gradients(backward(Canonical(padding.padded()), padding.saved(saved)))

    def tangent(self, call: Call, tangents: Operands, saved: Saved) -> tuple[Any, Any]:
        padding = Padding(call)
        args = padding.tangents(tangents), padding.saved(saved)
        return padding.cut_all(
            tangent(Canonical(padding.padded()), *args), (call.out_shape, call.stats_shape)
        )

    def jvp(self, call: Call, tangents: Operands) -> tuple[Any, ...]:
        padding = Padding(call)
        results = jvp(Canonical(padding.padded()), padding.tangents(tangents))
        # out, m, l, perhaps rounding; the tangents of out and of the log-sum-exp
        rounding = [call.out_shape] if call.problem.saves_rounding else []
        shapes = (
            call.out_shape,
            call.stats_shape,
            call.stats_shape,
            *rounding,
            call.out_shape,
            call.stats_shape,
        )
        return padding.cut_all(results, shapes)

    def second(self, call: Call, tangents: Operands, saved: Saved) -> tuple[Operands, Any, Any]:
        padding = Padding(call)
        args = padding.tangents(tangents), padding.saved(saved)
        gradients, *others = second(Canonical(padding.padded()), *args)
        return padding.cut_gradients(gradients), *padding.cut_all(others, (call.out_shape, call.stats_shape))

    def second_tangent(
        self, call: Call, tangents: Operands, others: Operands, saved: Saved
    ) -> tuple[Any, Any]:
        padding = Padding(call)
        args = padding.tangents(tangents), padding.tangents(others), padding.saved(saved)
        return padding.cut_all(second_tangent(padding.padded(), *args), (call.out_shape, call.stats_shape))

    def paged(self, call: Any) -> tuple[Any, Any, Any]:
        return paged.forward(call)


backend = Xla()
