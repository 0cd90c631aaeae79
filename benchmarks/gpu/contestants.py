"""Who is timed, and how each computes a shape: forward, backward alone, and both.

Everyone gets bfloat16 arrays of the same numbers in the same order in memory, (B, S, N, D); PyTorch sees them as
(B, N, S, D) by strides, which is the order that its flash kernels read themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa
from gpu import machine
from gpu.work import LONGEST_QUADRATIC, Shape

Arrays = dict[str, Any]
LARGE = 2**31  # bytes
DIRECTIONS = ("forward", "backward", "both")


@dataclass(frozen=True, kw_only=True)
class Program:
    """One contestant's way to compute one direction of a shape.

    Attributes:
      call: enqueues a call on one of the sets of inputs, and returns its results, perhaps unfinished.
      wait: returns when those, and all that was enqueued before, are finished.
      arrays: results as JAX arrays in the order of `Inputs`: the output, or the gradients, or both.
      temp_bytes: temporary memory of a call, None where nobody tells.
      events: seconds per call of so many calls by the device's own clock, where there is access to one.
    """

    call: Callable[[int], Any]
    wait: Callable[[Any], Any]
    arrays: Callable[[Any], list[Any]]
    temp_bytes: int | None = None
    events: Callable[[int], float] | None = None


class AbsentError(Exception):
    """A contestant is not here, or is known not to serve a shape; the message says why."""


class Inputs:
    """Random sets of inputs of a shape, and cotangents, on the device: never zeros, which take less power."""

    def __init__(self, shape: Shape, sets: int) -> None:
        self.shape, self.sets = shape, sets
        keys = jax.random.split(jax.random.key(0), sets)
        self.operands = [self._operands(key) for key in keys]
        self.douts = [normal(jax.random.fold_in(key, 9), self.avals()["query"]) for key in keys]
        self.constants: Arrays = {}
        if shape.bias:
            length = jnp.arange(shape.B) * 7 % (shape.S // 4) + 3 * shape.S // 4
            self.constants["mask"] = (jnp.arange(shape.S) < length[:, None])[:, None, None, :]

    def _operands(self, key: Any) -> Arrays:
        names = self.avals()
        return {
            name: normal(k, aval)
            for k, (name, aval) in zip(jax.random.split(key, len(names)), names.items(), strict=True)
        }

    def avals(self) -> dict[str, jax.ShapeDtypeStruct]:
        return operand_avals(self.shape)


@partial(jax.jit, static_argnums=1)
def normal(key: Any, aval: jax.ShapeDtypeStruct) -> Any:
    return jax.random.normal(key, aval.shape, aval.dtype)


def operand_avals(shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    """What is differentiated."""
    array = jax.ShapeDtypeStruct((shape.B, shape.S, shape.N, shape.D), jnp.bfloat16)
    found = {name: array for name in ("query", "key", "value")}
    if shape.bias:
        found["bias"] = jax.ShapeDtypeStruct((1, shape.N, shape.S, shape.S), jnp.bfloat16)
    return found


def constant_avals(shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    return {"mask": jax.ShapeDtypeStruct((shape.B, 1, 1, shape.S), jnp.bool)} if shape.bias else {}


# --- JAX


@dataclass(frozen=True, kw_only=True)
class JaxContestant:
    """A function with the arguments of `jax.nn.dot_product_attention`."""

    name: str
    function: Callable[..., Any]
    why_not: Callable[[Shape], str | None] = lambda shape: None

    def prepare(self, shape: Shape, directions: tuple[str, ...]) -> list[Callable[[], Any]]:
        """Traces and lowers now; returns what compiles: see `_parts`."""
        if why := self.why_not(shape):
            raise AbsentError(why)
        return [lowered.compile for lowered in self._lowered(shape, directions)]

    def _lowered(self, shape: Shape, directions: tuple[str, ...]) -> list[Any]:
        def attend(operands: Arrays, constants: Arrays) -> Any:
            return self.function(**operands, **constants, is_causal=shape.causal)

        def residuals(operands: Arrays, constants: Arrays) -> Any:
            return jax.vjp(lambda x: attend(x, constants), operands)[1]

        def both(operands: Arrays, constants: Arrays, dout: Any) -> Any:
            out, pullback = jax.vjp(lambda x: attend(x, constants), operands)
            return out, pullback(dout)[0]

        avals, constants = operand_avals(shape), constant_avals(shape)
        dout = avals["query"]
        found = []
        if "forward" in directions:
            found.append(jax.jit(attend).lower(avals, constants))
        if "backward" in directions:
            found.append(jax.jit(residuals).lower(avals, constants))
            saved = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found[-1].out_info)
            found.append(jax.jit(lambda pullback, dout: pullback(dout)[0]).lower(saved, dout))
        if "both" in directions:
            found.append(jax.jit(both).lower(avals, constants, dout))
        return found

    def programs(self, inputs: Inputs, directions: tuple[str, ...], compiled: list[Any]) -> dict[str, Any]:
        """By direction a `Program`, or the exception that stands in its way."""
        parts, found = list(compiled), {}
        if "forward" in directions:
            found["forward"] = self._program(
                parts.pop(0), lambda i: (inputs.operands[i], inputs.constants), inputs
            )
        if "backward" in directions:
            forward, pull = parts.pop(0), parts.pop(0)
            found["backward"] = self._backward(forward, pull, inputs)
        if "both" in directions:
            found["both"] = self._program(
                parts.pop(0), lambda i: (inputs.operands[i], inputs.constants, inputs.douts[i]), inputs
            )
        return found

    def _backward(self, forward: Any, pull: Any, inputs: Inputs) -> Any:
        for part in (forward, pull):
            if isinstance(part, Exception):
                return part
        try:
            saved = [forward(inputs.operands[0], inputs.constants)]
            # Probabilities that were kept (S×S) fill the memory, and no cache.
            if sum(x.nbytes for x in jax.tree.leaves(saved)) < LARGE:
                saved += [forward(operands, inputs.constants) for operands in inputs.operands[1:]]
        except Exception as error:
            return error
        return self._program(pull, lambda i: (saved[i % len(saved)], inputs.douts[i % len(saved)]), inputs)

    def _program(self, compiled: Any, arguments: Callable[[int], tuple], inputs: Inputs) -> Any:
        if isinstance(compiled, Exception):
            return compiled
        return Program(
            call=lambda i: compiled(*arguments(i % inputs.sets)),
            wait=jax.block_until_ready,
            arrays=jax.tree.leaves,
            temp_bytes=temp_bytes(compiled),
        )


def temp_bytes(compiled: Any) -> int | None:
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


# --- PyTorch


@dataclass(frozen=True, kw_only=True)
class TorchContestant:
    """`scaled_dot_product_attention`, held to one of its backends."""

    name: str
    backend: str  # of torch.nn.attention.SDPBackend
    device: str

    def prepare(self, shape: Shape, directions: tuple[str, ...]) -> list[Callable[[], Any]]:
        if shape.bias:
            raise AbsentError("a bias and a mask together would be one array of B·N·S·S")
        _, why = machine.load("torch")
        if why:
            raise AbsentError(why)
        return []  # nothing to compile

    def programs(self, inputs: Inputs, directions: tuple[str, ...], compiled: list[Any]) -> dict[str, Any]:
        torch, _ = machine.load("torch")
        try:
            return self._programs(torch, inputs)
        except Exception as error:
            return dict.fromkeys(directions, error)

    def _programs(self, torch: Any, inputs: Inputs) -> dict[str, Any]:
        names = ("query", "key", "value")
        sets = [[_tensor(torch, x[name], self.device) for name in names] for x in inputs.operands]
        douts = [_tensor(torch, dout, self.device) for dout in inputs.douts]
        for tensors in sets:
            for tensor in tensors:
                tensor.requires_grad_()
        backend = getattr(torch.nn.attention.SDPBackend, self.backend)

        def attend(i: int) -> Any:
            with torch.nn.attention.sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    *sets[i], is_causal=inputs.shape.causal
                )

        def forward(i: int) -> Any:
            with torch.no_grad():
                return [attend(i % inputs.sets)]

        # In the order of JAX's leaves, which is that of the names: key, query, value.
        def gradients(out: Any, i: int) -> Any:
            q, k, v = torch.autograd.grad(out, sets[i], douts[i], retain_graph=True)
            return [k, q, v]

        outs = [attend(i) for i in range(inputs.sets)]

        def both(i: int) -> Any:
            out = attend(i % inputs.sets)
            return [out, *gradients(out, i % inputs.sets)]

        calls = {
            "forward": forward,
            "backward": lambda i: gradients(outs[i % inputs.sets], i % inputs.sets),
            "both": both,
        }
        on_gpu = self.device == "cuda"
        return {
            direction: Program(
                call=call,
                wait=lambda _: torch.cuda.synchronize() if on_gpu else None,
                arrays=lambda found: [_array(torch, x) for x in found],
                events=partial(_by_events, torch, call) if on_gpu else None,
            )
            for direction, call in calls.items()
        }


def _by_events(torch: Any, call: Callable[[int], Any], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(calls):
        call(i)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def _tensor(torch: Any, x: Any, device: str) -> Any:
    """The same bits, as BNSD by strides. NumPy's bfloat16 is not PyTorch's, so they travel as integers."""
    bits = torch.from_numpy(np.array(x).view(np.int16))
    return bits.to(device).view(torch.bfloat16).transpose(1, 2)


def _array(torch: Any, x: Any) -> Any:
    bits = x.detach().transpose(1, 2).contiguous().view(torch.int16).cpu().numpy()
    return jnp.asarray(bits.view(jnp.bfloat16))


# --- all of them


def ours(implementation: str, name: str = "jax_fa") -> JaxContestant:
    function = partial(jax_fa.dot_product_attention, implementation=implementation)
    return JaxContestant(name=name, function=function)


def _too_long(shape: Shape) -> str | None:
    fits = shape.S <= LONGEST_QUADRATIC and not shape.bias
    return None if fits else f"its S×S logits are too large (tried up to S={LONGEST_QUADRATIC})"


def tokamax() -> JaxContestant:
    module, why = machine.load("tokamax")
    function = None if module is None else module.dot_product_attention
    return JaxContestant(
        name="tokamax mosaic",
        function=partial(function or _nobody, implementation="mosaic"),
        why_not=lambda shape: why,
    )


def _nobody(**_: Any) -> Any:
    raise NotImplementedError


def everyone(implementation: str, rehearse: bool) -> list[Any]:
    """Ours first, then the peers."""
    jax_nn, device = jax.nn.dot_product_attention, "cpu" if rehearse else "cuda"
    return [
        ours(implementation),
        JaxContestant(name="jax.nn xla", function=partial(jax_nn, implementation="xla"), why_not=_too_long),
        JaxContestant(name="jax.nn cudnn", function=partial(jax_nn, implementation="cudnn")),
        tokamax(),
        TorchContestant(name="torch flash", backend="FLASH_ATTENTION", device=device),
        TorchContestant(name="torch cudnn", backend="CUDNN_ATTENTION", device=device),
    ]
