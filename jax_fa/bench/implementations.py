"""Who is measured: every backend of jax_fa that can serve a call here, and other libraries that are installed."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa
from jax_fa import backends
from jax_fa.bench.shapes import Workload
from jax_fa.explanation import here
from jax_fa.masks import Causal, Mask, SlidingWindow

PEERS = ("jax.nn", "jax.nn cudnn", "torch")


@dataclass(frozen=True)
class Program:
    """One implementation's way to compute a call."""

    run: Callable[[], Any]  # computes, waits, and returns what was computed
    arrays: Callable[[Any], list[np.ndarray]]  # results of run, as BSND float32
    temp_bytes: int | None  # temporary memory, None where nobody tells


class RefusedError(Exception):
    """An implementation cannot serve a call; the message says why."""


def present() -> dict[str, Callable[[Workload], Program]]:
    """Every implementation of this machine's default device, by name: ours, best first, and then the others."""
    ours: dict[str, Callable[[Workload], Program]] = {
        backend.name: partial(_ours, backend.name)
        for backend in backends.every()
        if backend.platforms is None or here() in backend.platforms
    }
    theirs: dict[str, Callable[[Workload], Program]] = {"jax.nn": partial(_jax_nn, None)}
    if jax.default_backend() == "gpu":
        theirs["jax.nn cudnn"] = partial(_jax_nn, "cudnn")
    if importlib.util.find_spec("torch") is not None:
        theirs["torch"] = _torch
    return ours | theirs


def operands(call: Workload) -> dict[str, np.ndarray]:
    """Random query, key, value, their tangents and the cotangent, float32, BSND: the same for every implementation."""
    random, s = np.random.default_rng(0), call.shape
    shapes = {
        "query": (s.B, s.Sq, s.N, s.D),
        "key": (s.B, s.Skv, s.K, s.D),
        "value": (s.B, s.Skv, s.K, s.Dv),
        "dout": (s.B, s.Sq, s.N, s.Dv),
    }
    shapes |= {f"{name}_tangent": shapes[name] for name in ("query", "key", "value")}
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _ours(implementation: str, call: Workload) -> Program:
    mask: Mask | None = None
    if call.window is not None:
        mask = SlidingWindow(left=call.window - 1, right=0)
    elif call.causal:
        mask = Causal()
    attention = partial(jax_fa.flash_attention, mask=mask, implementation=implementation)
    try:
        return _jax(call, attention)
    except NotImplementedError as error:
        raise RefusedError(str(error)) from error


def _jax_nn(implementation: str | None, call: Workload) -> Program:
    if call.shape.D != call.shape.Dv:
        raise RefusedError("jax.nn wants Dv = D")
    window = None if call.window is None else (call.window - 1, 0)
    attention = partial(
        jax.nn.dot_product_attention,
        is_causal=call.causal,
        local_window_size=window,
        implementation=implementation,
    )
    return _tried(lambda: _jax(call, attention))


def _tried(prepare: Callable[[], Program]) -> Program:
    """The program after one call of it: whatever another library's limits raise there or before is its refusal."""
    try:
        program = prepare()
        program.run()
    except Exception as error:
        raise RefusedError(_first_line(error)) from error
    return program


def _jax(call: Workload, attention: Callable[..., Any]) -> Program:
    a = {name: jnp.asarray(x, call.dtype) for name, x in operands(call).items()}
    qkv, dout = (a["query"], a["key"], a["value"]), a["dout"]
    tangents = tuple(a[f"{name}_tangent"] for name in ("query", "key", "value"))

    def both(dout, *qkv):
        out, pullback = jax.vjp(attention, *qkv)
        return (out, *pullback(dout))

    def gradients(dout, *qkv):
        return both(dout, *qkv)[1:]

    def pull_back(pullback, cotangents):
        return pullback(cotangents)

    def hvp(qkv, tangents, dout):
        return jax.jvp(partial(gradients, dout), qkv, tangents)

    def prepare() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What the direction computes, and of what."""
        match call.direction:
            case "forward":
                return attention, qkv
            case "both":
                return both, (dout, *qkv)
            case "backward":
                return pull_back, (jax.jit(lambda *x: jax.vjp(attention, *x)[1])(*qkv), dout)
            case "jvp":
                return partial(jax.jvp, attention), (qkv, tangents)
            case "hvp":
                return hvp, (qkv, tangents, dout)
            case _:
                return pull_back, (jax.jit(lambda *x: jax.vjp(gradients, *x)[1])(dout, *qkv), tangents)

    function, arguments = prepare()
    program = jax.jit(function).lower(*arguments).compile()
    analysis = program.memory_analysis()
    return Program(
        run=lambda: jax.block_until_ready(program(*arguments)),
        arrays=lambda results: [np.asarray(x, np.float32) for x in jax.tree.leaves(results)],
        temp_bytes=None if analysis is None else analysis.temp_size_in_bytes,
    )


def _torch(call: Workload) -> Program:
    """PyTorch's scaled_dot_product_attention, in its best layout: contiguous BNSD."""
    if call.window is not None:
        raise RefusedError("torch has no sliding window without an S×S mask")
    if call.direction not in ("forward", "backward", "both"):
        raise RefusedError(f"there is no program of torch for {call.direction} here")
    torch: Any = importlib.import_module("torch")
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise RefusedError("this torch has no CUDA")
    return _tried(lambda: _torch_program(call, torch, on_gpu))


def _torch_program(call: Workload, torch: Any, on_gpu: bool) -> Program:
    device = "cuda" if on_gpu else "cpu"

    def tensor(x):
        return torch.from_numpy(np.ascontiguousarray(x.swapaxes(1, 2))).to(device, getattr(torch, call.dtype))

    a = {name: tensor(x) for name, x in operands(call).items()}
    learns = call.direction != "forward"
    q, k, v = (a[name].requires_grad_(learns) for name in ("query", "key", "value"))
    attention = partial(
        torch.nn.functional.scaled_dot_product_attention,
        is_causal=call.causal,
        enable_gqa=call.shape.N != call.shape.K,
    )

    def wait(result):
        if on_gpu:
            torch.cuda.synchronize()
        return result

    def forward():
        with torch.no_grad():
            return wait([attention(q, k, v)])

    def both():
        out = attention(q, k, v)
        return wait([out, *torch.autograd.grad(out, (q, k, v), a["dout"])])

    if call.direction == "forward":
        run = forward
    elif call.direction == "both":
        run = both
    else:
        out = attention(q, k, v)

        def run():
            return wait(torch.autograd.grad(out, (q, k, v), a["dout"], retain_graph=True))

    return Program(
        run=run,
        arrays=lambda found: [x.detach().float().cpu().numpy().swapaxes(1, 2) for x in found],
        temp_bytes=None,
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]
