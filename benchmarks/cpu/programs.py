"""A case as calls without arguments, by direction: ours, those of `jax.nn` and of PyTorch."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa
from cpu.cases import PACKED, Case
from jax_fa.masks import Causal, CumulativeLengths, SlidingWindow

Programs = dict[str, Callable[[], Any]]
# A peer where it is installed.
torch: Any = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
_TANGENTS = ("q_tangent", "k_tangent", "v_tangent")


def everyone(case: Case) -> dict[str, Programs]:
    """Those that can compute the case, by name; ours is "cpu"."""
    found = {"cpu": ours(case)}
    for name in case.peers:
        if name == "torch":
            if torch is not None:
                found[name] = _torch_programs(case)
        elif name == "xla":
            found[name] = ours(case, "xla")
        elif case.dtype != "float16":  # XLA's CPU compiler refuses jax.nn's float16 products
            found[name] = _jax_programs(
                case, partial(jax.nn.dot_product_attention, is_causal=case.mask == "causal")
            )
    return found


def ours(case: Case, implementation: str = "cpu") -> Programs:
    keywords: dict[str, Any] = {"implementation": implementation}
    if case.mask == "causal":
        keywords["mask"] = Causal()
    elif case.mask.startswith("window"):
        keywords["mask"] = SlidingWindow(int(case.mask.split()[1]) - 1, 0)
    elif case.mask == "packed":
        keywords["mask"] = CumulativeLengths(np.cumsum(PACKED))
    rng = np.random.default_rng(1)
    if case.extra.startswith("bias"):
        keywords["bias"] = jnp.asarray(rng.standard_normal(_bias_shape(case), np.float32))
    elif case.extra == "mask":
        keywords["mask"] = jnp.asarray(rng.random((case.B, 1, case.Sq, case.keys)) < 0.9)
    elif case.extra == "dropout":
        keywords |= {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}
    elif case.extra == "soft cap":
        keywords["logits_soft_cap"] = 20.0
    return _jax_programs(case, partial(jax_fa.flash_attention, **keywords))


def _bias_shape(case: Case) -> tuple[int, ...]:
    B = 1 if case.extra.endswith("over batch") else case.B
    N = 1 if case.extra.endswith("over heads") else case.N
    return B, N, case.Sq, case.keys


def _arrays(case: Case) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    K = case.K or case.N
    shapes: dict[str, tuple[int, ...]] = {
        "q": (case.B, case.Sq, case.N, case.D),
        "k": (case.B, case.keys, K, case.D),
        "v": (case.B, case.keys, K, case.D),
        "dout": (case.B, case.Sq, case.N, case.D),
    }
    if case.derivatives:
        shapes |= {name: shapes[name[0]] for name in _TANGENTS}
    if case.extra.startswith("learnt bias"):
        shapes["bias"] = _bias_shape(case)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _jax_programs(case: Case, attention: Callable[..., Any]) -> Programs:
    a = {name: jnp.asarray(x, case.dtype) for name, x in _arrays(case).items()}
    dout = a.pop("dout")
    tangents = tuple(a.pop(name) for name in _TANGENTS if case.derivatives)
    operands = tuple(a.values())

    def attend(q, k, v, *bias):
        return attention(q, k, v, bias=bias[0]) if bias else attention(q, k, v)

    if case.derivatives:
        return _derivatives(attend, operands, tangents, dout)

    @jax.jit
    def forward(q, *rest):
        for _ in range(case.chain):
            q = attend(q, *rest)
        return q

    programs: Programs = {"forward": lambda: jax.block_until_ready(forward(*operands))}
    if not case.forward_only:

        @jax.jit
        def pull_back(vjp, dout):
            found = []
            for _ in range(case.chain):
                found.append(vjp(dout))
                dout = found[-1][0]
            return found

        vjp = jax.jit(lambda *operands: jax.vjp(attend, *operands)[1])(*operands)
        programs["backward"] = lambda: jax.block_until_ready(pull_back(vjp, dout))
    return programs


def _derivatives(attend, operands, tangents, dout) -> Programs:
    """Output and tangent; gradients and their tangents; the pull-back of the gradients alone."""

    def gradients(*operands):
        return jax.vjp(attend, *operands)[1](dout)

    forward = jax.jit(attend)
    backward = jax.jit(lambda vjp: vjp(dout))
    first = jax.jit(lambda *operands: jax.vjp(attend, *operands)[1])(*operands)
    jvp = jax.jit(partial(jax.jvp, attend))
    hvp = jax.jit(partial(jax.jvp, gradients))
    pull_back = jax.jit(lambda vjp, tangents: vjp(tangents))
    vjp = jax.jit(lambda *operands: jax.vjp(gradients, *operands)[1])(*operands)
    return {
        "forward": lambda: jax.block_until_ready(forward(*operands)),
        "backward": lambda: jax.block_until_ready(backward(first)),
        "jvp": lambda: jax.block_until_ready(jvp(operands, tangents)),
        "hvp": lambda: jax.block_until_ready(hvp(operands, tangents)),
        "double backward": lambda: jax.block_until_ready(pull_back(vjp, tangents)),
    }


def _torch_programs(case: Case) -> Programs:
    """PyTorch in its best layout: contiguous BNSD."""
    attend = torch.nn.functional.scaled_dot_product_attention
    arrays = {name: x if name == "bias" else x.swapaxes(1, 2) for name, x in _arrays(case).items()}
    dtype = getattr(torch, case.dtype)
    a = {name: torch.from_numpy(np.ascontiguousarray(x)).to(dtype) for name, x in arrays.items()}
    keywords = {"is_causal": case.mask == "causal", "enable_gqa": bool(case.K)}
    learnt = []
    if "bias" in a:
        keywords["attn_mask"] = a["bias"].requires_grad_()
        learnt.append(a["bias"])
    q, k, v = (a[name].requires_grad_(not case.forward_only) for name in "qkv")

    def forward():
        x = q
        with torch.no_grad():
            for _ in range(case.chain):
                x = attend(x, k, v, **keywords)
        return x

    programs: Programs = {"forward": forward}
    if not case.forward_only:
        out = attend(q, k, v, **keywords)

        def backward():
            found, dout = [], a["dout"]
            for _ in range(case.chain):
                found.append(torch.autograd.grad(out, (q, k, v, *learnt), dout, retain_graph=True))
                dout = found[-1][0]
            return found

        programs["backward"] = backward
    return programs


def temporary_bytes(case: Case) -> dict[str, int]:
    """What XLA allocates besides arguments and results for forward and backward together."""
    q, k, v, dout = (jax.ShapeDtypeStruct(x.shape, case.dtype) for x in _arrays(case).values())
    causal = case.mask == "causal"
    found = {}
    for name, attention in {
        "xla": partial(jax_fa.dot_product_attention, implementation="xla"),
        "jax.nn": jax.nn.dot_product_attention,
    }.items():

        def both(q, k, v, dout, attention=attention):
            out, vjp = jax.vjp(partial(attention, is_causal=causal), q, k, v)
            return out, vjp(dout)

        memory: Any = jax.jit(both).lower(q, k, v, dout).compile().memory_analysis()
        found[name] = memory.temp_size_in_bytes
    return found
