"""What each primitive takes and gives.

The rules are written once, for all of them. A `Kind` says what differs: the name of the method of a backend that computes it,
and which results it has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jax_fa.call import LIKE_OUT, Call, Problem


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a primitive takes. (Each primitive has the parts it needs: the types do not say which.)"""

    operands: Any = None  # Operands
    saved: Any = None  # Saved
    tangents: Any = None  # Operands
    others: Any = None  # Operands, the other tangents of a second derivative

    def call(self, problem: Problem) -> Call:
        return Call.of(problem, self.operands, self.saved, self.tangents, self.others)

    def arrays(self) -> list[tuple[str, Any]]:
        """All arrays but the hints by name, in the order of the leaves."""
        parts = (self.operands, self.saved, self.tangents, self.others)
        return [(name, x) for part in parts if part is not None for name, x in part.present().items()]


@dataclass(frozen=True)
class Kind:
    """One of the primitives."""

    what: str  # the method of a backend
    # Names: out, rounding, m, l, dout, dlogsumexp, or the operand of a gradient.
    results: Callable[[Call], list[str]]
    run: Callable[[Any, Call, Inputs], list[Any]]  # (backend, call, inputs) -> results
    gives_gradients: bool = False


# Results that are tangents of out and log-sum-exp are called like their cotangents.
TANGENTS = ["dout", "dlogsumexp"]
STATISTICS = ("m", "l", "dlogsumexp")


def _forward_results(call: Call) -> list[str]:
    return ["out", "m", "l", *(["rounding"] if call.problem.saves_rounding else [])]


def second_results(call: Call) -> list[str]:
    wanted = call.problem.gradients
    return call.gradient_names + [name for name in TANGENTS if wanted is None or name in wanted]


def _run_backward(backend, call: Call, inputs: Inputs) -> list[Any]:
    gradients = backend.backward(call, inputs.saved)
    return [getattr(gradients, name) for name in call.gradient_names]


def _run_second(backend, call: Call, inputs: Inputs) -> list[Any]:
    gradients, dout, dlogsumexp = backend.second(call, inputs.tangents, inputs.saved)
    found = gradients.present() | {"dout": dout, "dlogsumexp": dlogsumexp}
    return [found[name] for name in second_results(call)]


FORWARD = Kind("forward", _forward_results, lambda backend, call, _: list(backend.forward(call)))
BACKWARD = Kind("backward", lambda call: call.gradient_names, _run_backward, gives_gradients=True)
TANGENT = Kind("tangent", lambda _: TANGENTS, lambda b, call, x: list(b.tangent(call, x.tangents, x.saved)))
# Forward and tangent in one pass, which saves the tangent a product.
JVP = Kind(
    "jvp", lambda call: _forward_results(call) + TANGENTS, lambda b, call, x: list(b.jvp(call, x.tangents))
)
SECOND = Kind("second", second_results, _run_second, gives_gradients=True)
SECOND_TANGENT = Kind(
    "second_tangent",
    lambda _: TANGENTS,
    lambda b, call, x: list(b.second_tangent(call, x.tangents, x.others, x.saved)),
)
ALL = (FORWARD, BACKWARD, TANGENT, JVP, SECOND, SECOND_TANGENT)
# Of a `PagedCall`; see `paged/primitive.py`.
PAGED = Kind("paged", lambda _: ["out", "m", "l"], lambda b, call, _: list(b.paged(call)))


def shape_of(call: Call, name: str):
    """Of a result."""
    if name in LIKE_OUT:
        return call.out_shape
    return call.stats_shape if name in STATISTICS else call.gradient_shape(name)
