"""Attention over a sequence that is sharded over devices, inside `jax.shard_map`.

`sequence_parallel_attention` is an entry like the others: it makes a `Call`, here of one device's shard, whose problem
holds a `Shards`: how the keys of other devices reach its rows. A `Shards` computes the forward and every derivative as a
backend does, from calls on one device, so that the rules of derivatives in `attention.py` hold here too.

Let (out_s, lse_s) be the results of one device's rows over the keys of shard s alone, and w_s = exp(lse_s - lse):

    forward   lse = log sum_s exp(lse_s),  out = sum_s w_s out_s
    backward  that of each shard, from the softmax max and sum over *all* keys: dq is the sum over shards, dk and dv of a
              shard are sums over the devices that it visits
    tangent   lse' = sum_s w_s lse_s',  out' = sum_s w_s (out_s' + lse_s' (out_s - out))
    second    the backward is that of each shard alone from the cotangents w_s dout and w_s (dlse + dout (out_s - out)) of
              out_s and lse_s: the sum of the seconds of the shards, along the tangents of these cotangents too
    second tangent, along a and b: the derivative of the tangent's formulas along b, with w_s' = w_s (lse_s' - lse')

Nothing of another shard is saved: every pass sends keys and values around again.

Sources: ring attention, Liu et al. 2023, arXiv:2310.01889; Ulysses, Jacobs et al. 2023, arXiv:2309.14509; balanced orders,
Brandon et al. 2023 (striped), arXiv:2311.09431, of which zigzag is the form with two chunks for each device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_fa import masks, primitives, softmax
from jax_fa.call import Axes, Call, Operands, Problem, Saved, has_rounding, narrowed, rounding_unit, widened
from jax_fa.sequence_parallel.blocks import Block, Gradients, Keys, Rows, added, columns, cut
from jax_fa.sequence_parallel.order import Spread
from jax_fa.sequence_parallel.schedule import Schedule
from jax_fa.sequence_parallel.visibility import local_bound

_BY_ROW = ("lower", "upper", "alibi_slopes", "position", "segment_row")
Visit = Callable[[Any, Keys, Any], tuple[Any, Keys | None]]


@dataclass(frozen=True)
class Shards:
    """Computes what a backend does (see `backends.Backend`) where keys lie on several devices."""

    axis: str
    devices: int
    zigzag: bool
    rows: bool
    travel: str | None  # how keys come to rows: "ring", "gather", or "stay": they do not
    schedule: Schedule | None
    row_parts: (
        int  # into how many calls the rows and keys of a shard are cut, where one cannot say where both lie
    )
    key_parts: int

    @property
    def _spread(self) -> Spread:
        return Spread(self.axis, self.devices, self.zigzag, self.rows)

    # --- what the primitives ask for

    def forward(self, call: Call) -> tuple[Any, ...]:
        problem, acc = self._problem(call), call.acc

        def visit(total, keys, source):
            for block in self._blocks(call, keys, source):
                saved = primitives.forward_saved(problem, self._operands(call, call.operands, keys, block))
                part = widened(saved.out, saved.rounding, acc), saved.m, saved.l
                whole = Rows(call, block).of(total)
                total = Rows(call, block).put(total, joined(call.problem.out_axes, whole, part))
            return total, None

        start = (jnp.zeros(call.out_shape, acc), *softmax.start(call.stats_shape, acc))
        (sums, m, l), _ = self._around(call, _keys(call.operands), visit, start)
        exact = sums * softmax.rows_as_stored(softmax.inverse(l), call.problem.out_axes)
        if not call.problem.saves_rounding:
            return exact.astype(call.dtype), m, l
        out, lost = narrowed(exact, call.dtype)
        return out, m, l, (lost / rounding_unit(call.dtype)).astype(call.dtype)

    def backward(self, call: Call, saved: Saved) -> Operands:
        saved = call.full(saved)
        partial = call.problem.partial or self.travel == "ring" or self.key_parts > 1
        step = Gradients(replace(self._problem(call), partial=partial), call)

        def visit(sums, keys, source):
            back: Keys = {}
            for block in self._blocks(call, keys, source):
                operands = self._operands(call, call.operands, keys, block)
                found = primitives.backward(step.problem, operands, Rows(call, block).saved(saved))
                sums, back = step.add(sums, back, found.present(), block)
            return sums, back

        return step.finish(*self._around(call, _keys(call.operands), visit, step.start(), saved))

    def tangent(self, call: Call, tangents: Operands, saved: Saved) -> tuple[Any, Any]:
        moved, tau = self._tangent(call, tangents, call.full(saved))
        return moved.astype(call.dtype), tau

    def _tangent(self, call: Call, tangents: Operands, saved: Saved) -> tuple[Any, Any]:
        """The tangents of out and log-sum-exp, as they are summed."""

        def visit(total, keys, source):
            for block in self._blocks(call, keys, source):
                rows = Rows(call, block)
                own = self._own(call, tangents, keys, block)
                at = Weighted(call, own, rows.saved(saved))
                part = at.weighted(own.moved + at.row(own.tau) * at.apart), at.weight * own.tau
                total = rows.add(total, part)
            return total, None

        start = (jnp.zeros(call.out_shape, call.acc), jnp.zeros(call.stats_shape, call.acc))
        return self._around(call, _keys(call.operands, tangents), visit, start, saved)[0]

    def second(self, call: Call, tangents: Operands, saved: Saved) -> tuple[Operands, Any, Any]:
        saved, step = call.full(saved), Gradients(self._problem(call), call)
        moved, tau = self._tangent(call, tangents, saved)

        def visit(sums, keys, source):
            back: Keys = {}
            for block in self._blocks(call, keys, source):
                rows = Rows(call, block)
                own = self._own(call, tangents, keys, block)
                at = Weighted(call, own, rows.saved(saved))
                part = at.cotangents(*rows.of((moved, tau)))
                found = primitives.second(step.problem, own.operands, part, own.along)
                sums, back = step.add(sums, back, found, block)
            return sums, back

        start = step.start()
        gradients = step.finish(*self._around(call, _keys(call.operands, tangents), visit, start, saved))
        return gradients, moved.astype(call.dtype), tau

    def second_tangent(
        self, call: Call, tangents: Operands, others: Operands, saved: Saved
    ) -> tuple[Any, Any]:
        problem, saved = self._problem(call), call.full(saved)
        moved, tau = self._tangent(call, others, saved)
        travelling = _keys(call.operands, tangents)
        travelling |= {f"{name}_other": x for name, x in _keys(others).items()}

        def visit(total, keys, source):
            for block in self._blocks(call, keys, source):
                rows = Rows(call, block)
                own = self._own(call, tangents, keys, block)
                at = Weighted(call, own, rows.saved(saved))
                other = self._operands(call, others, keys, block, "_other")
                both = primitives.second_tangent(problem, own.operands, own.saved, own.along, other)
                out_b, lse_b = primitives.tangent(problem, own.operands, own.saved, other)
                all_b, tau_b = rows.of((moved, tau))
                more = at.row(lse_b - tau_b) * (own.moved + at.row(own.tau) * at.apart)
                out = both[0] + at.row(both[1]) * at.apart + at.row(own.tau) * (out_b - all_b) + more
                part = at.weighted(out), at.weight * (both[1] + (lse_b - tau_b) * own.tau)
                total = rows.add(total, part)
            return total, None

        start = (jnp.zeros(call.out_shape, call.acc), jnp.zeros(call.stats_shape, call.acc))
        (out, lse), _ = self._around(call, travelling, visit, start, saved)
        return out.astype(call.dtype), lse

    def _own(self, call: Call, tangents: Operands, keys: Keys, block: Block) -> "Own":
        operands = self._operands(call, call.operands, keys, block)
        along = self._operands(call, tangents, keys, block, "_tangent")
        problem = replace(self._problem(call), saves_rounding=has_rounding(call.dtype))
        out, m, l, *rounding, moved, tau = primitives.jvp(problem, operands, along)
        saved = Saved(out=out, m=m, l=l, rounding=rounding[0] if rounding else None)
        return Own(operands, along, saved, moved.astype(call.acc), tau)

    # --- what a call of one block takes

    def _problem(self, call: Call) -> Problem:
        return replace(call.problem, shards=None, saves_rounding=False)

    def _blocks(self, call: Call, keys: Keys, source) -> list[Block]:
        """`source`: whose keys these are; None: those of all devices."""
        axis = call.problem.key_axes[call.problem.batch_rank]
        rows, length = call.dims.Sq, keys["key"].shape[axis]
        row_starts = [0]
        if self.rows:
            row_starts = self._spread.starts(lax.axis_index(self.axis), rows)
        starts = [0] if source is None else self._spread.starts(source, length)
        key_parts = 1 if source is None else self.key_parts
        row_size, size = rows // self.row_parts, length // key_parts
        return [
            Block(
                rows=(p * row_size, row_size),
                keys=(q * size, size),
                length=length,
                row_start=row_starts[p],
                starts=starts if key_parts == 1 else starts[q : q + 1],
            )
            for p in range(self.row_parts)
            for q in range(key_parts)
        ]

    def _operands(self, call: Call, given: Operands, keys: Keys, block: Block, suffix: str = "") -> Operands:
        """The operands of a block, or their tangents; what is stored by key is among `keys`, by its name and suffix."""
        problem = call.problem
        rank = problem.batch_rank

        def part(name: str, x):
            if name in ("key", "value"):
                return cut(keys[name + suffix], problem.axes(name)[rank], *block.keys)
            if name == "query":
                return cut(x, problem.query_axes[rank], *block.rows)
            if name in ("bias", "mask"):
                return columns(cut(x, rank + 1, *block.rows), rank + 2, block)
            if name == "segment_key":
                return columns(x, rank + 1, block)
            if name in _BY_ROW:
                x = cut(x, rank + 1, *block.rows)
            if name in ("lower", "upper"):
                return local_bound(x, block.starts, block.keys[1] // len(block.starts))
            return x - block.starts[0] if name == "position" else x

        found = given.map(part)
        if found.dropout_seed is None:
            return found
        start = jnp.stack([jnp.asarray(block.row_start), jnp.asarray(block.starts[0])]).astype(jnp.uint32)
        return replace(found, dropout_start=masks.lead(start, rank + 1))

    # --- how keys come to rows

    def _around(
        self, call: Call, own: Keys, visit: Visit, carry, since: Saved | None = None
    ) -> tuple[Any, Keys | None]:
        """Visits the keys of all devices: the carry, and what `visit` gives back to the owners of the keys, summed.

        `since`: what is there before. Keys go around again in each pass, and are not kept from one to the next.
        """
        if self.travel == "ring":
            return self._ring(own, visit, carry, since)
        me = lax.axis_index(self.axis)
        if self.travel == "stay":
            return visit(carry, own, me)
        return self._gathered(call, own, visit, carry)

    def _send(self, x, pairs: list[tuple[int, int]]):
        return lax.ppermute(x, self.axis, pairs)

    def _ring(self, own: Keys, visit: Visit, carry, since) -> tuple[Any, Keys | None]:
        schedule, me = self.schedule, lax.axis_index(self.axis)
        assert schedule is not None
        total = moving = arriving = None
        first, *later = schedule.distances
        if later:
            own, _ = barrier((own, since), me)
        here, steps = own, [first, *later]
        for distance, following in zip(steps, [*later, None], strict=True):
            sent = None
            if following is not None:
                sent = self._send(here if abs(following) > 1 else own, schedule.on(following))
            back = None
            if distance in schedule.visited:
                carry, back = alone(visit, (carry, here, (me - distance) % self.devices), me)
            total = added(total, arriving)
            if distance == 0:
                total, arriving = back, None
            else:
                arriving, moving = self._homeward(schedule, distance, following, added(moving, back))
            if following is not None:
                # The next send waits for this step: there are two shards of others at a time, and not all of them.
                # Gradients on their way have until the end of the next step.
                here, carry, total = barrier((sent, carry, total), me)
        return carry, added(total, arriving)

    def _homeward(self, schedule: Schedule, distance: int, following: int | None, moving):
        """Sends gradients home from the last device that their keys visit, and the others on with their keys."""
        if moving is None:
            return None, None
        pairs = schedule.home(distance)
        arriving = self._send(moving, pairs) if pairs else None
        if following is None or abs(following) == 1:
            return arriving, None
        return arriving, self._send(moving, schedule.on(following))

    def _gathered(self, call: Call, own: Keys, visit: Visit, carry) -> tuple[Any, Keys | None]:
        spread, axes = self._spread, _key_axes(call, own)
        whole = {
            name: spread.shards(lax.all_gather(x, self.axis, axis=axes[name], tiled=True), axes[name], True)
            for name, x in own.items()
        }
        carry, back = visit(carry, whole, None)
        back = back and {
            name: lax.psum_scatter(
                spread.shards(x, axes[name], False), self.axis, scatter_dimension=axes[name], tiled=True
            )
            for name, x in back.items()
        }
        return carry, back


def _keys(operands: Operands, tangents: Operands | None = None) -> Keys:
    """Key and value, and their tangents (those that are there), by name."""
    found = {name: getattr(operands, name) for name in ("key", "value")}
    if tangents is not None:
        found |= {f"{name}_tangent": getattr(tangents, name) for name in ("key", "value")}
    return {name: x for name, x in found.items() if x is not None}


def _key_axes(call: Call, keys: Keys) -> dict[str, int]:
    """Along which axis of each array the keys lie."""
    problem = call.problem
    return {name: problem.axes(name.split("_")[0])[problem.batch_rank] for name in keys}


class Own(NamedTuple):
    """The forward and tangent of one block: of its rows over its own keys alone."""

    operands: Operands
    along: Operands
    saved: Saved
    moved: Any  # the tangents of out
    tau: Any  # and of log-sum-exp


class Weighted:
    """How the results of one block enter those of all keys: `weight` is exp(lse_s - lse)."""

    def __init__(self, call: Call, own: Own, whole: Saved) -> None:
        self.call, self.own, self.whole = call, own, whole
        part = own.saved
        self.weight = jnp.exp(part.m - whole.m) * part.l * softmax.inverse(whole.l)
        out, out_s = (widened(x.out, x.rounding, call.acc) for x in (whole, part))
        self.apart = out_s - out

    def row(self, x):
        """Statistics as factors of what is stored like out."""
        return softmax.rows_as_stored(x, self.call.problem.out_axes)

    def weighted(self, x):
        return self.row(self.weight) * x

    def cotangents(self, moved, tau) -> Saved:
        """What the block's own second takes; `moved` and `tau` are the tangents of out and log-sum-exp over all keys."""
        call, own, whole, axes = self.call, self.own, self.whole, self.call.problem.out_axes
        dout = whole.dout.astype(call.acc)
        # The cotangent of lse_s is the weight times this, and the tangent of the weight is it times `turned`.
        inner = softmax.row_sums(dout * self.apart, axes)
        if whole.dlogsumexp is not None:
            inner = inner + whole.dlogsumexp
        turned = own.tau - tau
        inner_tangent = softmax.row_sums(dout * (own.moved - moved), axes) + turned * inner
        dout_tangent = self.row(turned) * dout
        if whole.dout_tangent is not None:
            given = whole.dout_tangent.astype(call.acc)
            dout_tangent = dout_tangent + given
            inner_tangent = inner_tangent + softmax.row_sums(given * self.apart, axes)
        if whole.dlogsumexp_tangent is not None:
            inner_tangent = inner_tangent + whole.dlogsumexp_tangent
        return replace(
            own.saved,
            dout=self.weighted(dout).astype(call.dtype),
            dlogsumexp=self.weight * inner,
            dout_tangent=self.weighted(dout_tangent).astype(call.dtype),
            dlogsumexp_tangent=self.weight * inner_tangent,
        )


def joined(axes: Axes, whole, part):
    """(sum, m, l) with another part of the keys, of which the sum is given divided by l."""
    (acc, m_a, l_a), (out, m_b, l_b) = whole, part
    m = jnp.maximum(m_a, m_b)
    a, b = jnp.exp(m_a - m), jnp.exp(m_b - m) * l_b
    return acc * softmax.rows_as_stored(a, axes) + out * softmax.rows_as_stored(b, axes), m, l_a * a + b


# XLA for CPU drops barriers before it fuses and schedules: it would begin all steps at once. But it does not know that a
# device's index is not negative, so that a branch is a barrier.


def alone(fn: Callable[..., Any], args: tuple, me):
    """`fn(*args)`, where nothing of it begins before all of the arguments are there."""

    def cpu(args, me):
        def never(*args):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, *args))

        return lax.cond(me < 0, never, fn, *args)

    return lax.platform_dependent(
        args, me, cpu=cpu, default=lambda args, me: fn(*lax.optimization_barrier(args))
    )


def barrier(x, me):
    """x, where nothing that takes a part of it begins before all of it is there."""
    return alone(lambda x: x, (x,), me)
