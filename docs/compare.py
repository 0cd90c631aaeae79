"""The page Comparison: calls of libraries that are tried, and what the sources of others say.

    python -P docs/compare.py                  # writes comparison.md from comparison.json
    python -P docs/compare.py --try jax.nn     # tries that library's calls first, and keeps what came out

A call that raises, or whose numbers are not those of float64 NumPy, counts as "no".
"""

import argparse
import functools
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

HERE = Path(__file__).parent
DATA, PAGE = HERE / "comparison.json", HERE / "comparison.md"
B, S, N, K, D = 2, 16, 4, 2, 8
I, J = np.arange(S)[:, None], np.arange(S)
LENGTHS = np.array([S, 7], np.int32)
IDS = np.stack([J // 6, J // 9]).astype(np.int32)


def reference(q, k, v, *, mask=None, bias=0.0, cap=None, sinks=None):
    """Output and log-sum-exp in float64; `mask` broadcasts to `*B N S S`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[-2] // x.shape[-2], axis=-2) for x in (k, v))
    x = np.einsum("...ind,...jnd->...nij", q, k) / math.sqrt(q.shape[-1]) + bias
    x = x if cap is None else cap * np.tanh(x / cap)
    x = x if mask is None else np.where(mask, x, -np.inf)
    sink = np.exp(np.full(x.shape[-3], -np.inf) if sinks is None else sinks)[:, None, None]
    total = np.exp(x).sum(axis=-1, keepdims=True) + sink
    return np.einsum("...nij,...jnd->...ind", np.exp(x) / total, v), np.log(total[..., 0])


class Unavailable(Exception):  # noqa: N818 (no error: an answer)
    """The library has no argument for this."""


def take(given: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The arguments by the library's names; raises Unavailable for those that it has no name for."""
    missing = [name for name in given if name not in names]
    if missing:
        raise Unavailable(missing[0])
    return {names[name]: x for name, x in given.items()}


# --- the libraries: `attend(q, k, v, **canonical)` gives out, or (out, lse) with lse=True


class OfJax:
    """A function of JAX arrays `*B S N D`."""

    package = "jax"

    def __init__(self) -> None:
        import jax

        self.jax, self.np = jax, jax.numpy
        jax.config.update("jax_enable_x64", True)

    def attend(self, q, k, v, **given):
        """`call`, of arrays of JAX alone, as some libraries check."""
        made = self.np.asarray
        given = {n: made(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}
        return self.call(*map(made, (q, k, v)), **given)

    def call(self, q, k, v, **given):
        raise NotImplementedError

    def run(self, fn, *args):
        return self.jax.tree.map(np.asarray, self.jax.jit(fn)(*map(self.np.asarray, args)))

    def gradient(self, fn, x):
        return self.run(self.jax.grad(lambda x: (fn(x) ** 2).sum()), x)

    def forward_mode(self, fn, x):
        return self.run(lambda x: self.jax.jvp(fn, (x,), (self.np.ones_like(x),))[1], x)

    def second(self, fn, x):
        def norm(x):
            return (self.jax.grad(lambda x: (fn(x) ** 2).sum())(x) ** 2).sum()

        return self.run(self.jax.grad(norm), x)

    def memory(self, size: int) -> int:
        x = self.jax.ShapeDtypeStruct((1, size, 2, 16), self.np.float32)
        compiled = self.jax.jit(lambda x: self.attend(x, x, x)).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes


class JaxFa(OfJax):
    title, package = "jax_fa", "jax_fa"

    def call(self, q, k, v, **given):
        import jax_fa
        from jax_fa import masks

        kinds = {
            "window": lambda x: masks.SlidingWindow(*x),
            "lengths": lambda x: masks.Lengths(key=x),
            "segments": masks.SegmentIds,
            "mask": masks.Dense,
        }
        found = [kinds[name](given.pop(name)) for name in list(given) if name in kinds]
        names: ClassVar = {
            "bias": "bias",
            "cap": "logits_soft_cap",
            "sinks": "sinks",
            "lse": "return_logsumexp",
        }
        names |= {"score": "score_mod", "dropout": "dropout_rate", "alibi": "alibi_slopes"}
        if "dropout" in given:
            given |= {"dropout_key": self.jax.random.key(0)}
            names |= {"dropout_key": "dropout_key"}
        mask = functools.reduce(lambda a, b: a & b, found) if found else None
        return jax_fa.flash_attention(q, k, v, mask=mask, **take(given, names))


class JaxNn(OfJax):
    title = "jax.nn"
    names: ClassVar = {
        "mask": "mask",
        "bias": "bias",
        "window": "local_window_size",
        "lengths": "key_value_seq_lengths",
        "lse": "return_residual",
    }

    def call(self, q, k, v, **given):
        return self.jax.nn.dot_product_attention(q, k, v, **take(given, self.names))


class Tokamax(OfJax):
    title, package = "tokamax", "tokamax"
    names: ClassVar = {
        "mask": "mask",
        "bias": "bias",
        "window": "local_window_size",
        "lengths": "key_value_seq_lengths",
        "cap": "logits_soft_cap",
    }

    def __init__(self) -> None:
        super().__init__()
        self.library = importlib.import_module("tokamax")
        flags = importlib.import_module("absl.flags")
        if not flags.FLAGS.is_parsed():
            flags.FLAGS(["compare"], known_only=True)

    def call(self, q, k, v, **given):
        return self.library.dot_product_attention(q, k, v, **take(given, self.names))


class OfTorch:
    """A function of PyTorch tensors, on CPU, called with `*B N S D`."""

    package = "torch"

    def __init__(self) -> None:
        self.torch = importlib.import_module("torch")

    def call(self, q, k, v, **given):
        raise NotImplementedError

    def attend(self, q, k, v, **given):
        made = self.torch.as_tensor
        given = {n: made(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}
        found = self.call(*(made(x).transpose(-2, -3) for x in (q, k, v)), **given)
        out, *rest = found if isinstance(found, tuple) else (found,)
        out = out.transpose(-2, -3)
        return (out, *rest) if rest else out

    def run(self, fn, *args):
        found = fn(*map(self.torch.as_tensor, args))
        detached = [
            x.detach().numpy() for x in (found if isinstance(found, tuple) else (found,))
        ]
        return tuple(detached) if isinstance(found, tuple) else detached[0]

    def gradient(self, fn, x):
        x = self.torch.tensor(x, requires_grad=True)
        (found,) = self.torch.autograd.grad((fn(x) ** 2).sum(), x)
        return found.numpy()

    def forward_mode(self, fn, x):
        x = self.torch.as_tensor(x)
        return self.torch.func.jvp(fn, (x,), (self.torch.ones_like(x),))[1].numpy()

    def second(self, fn, x):
        x = self.torch.tensor(x, requires_grad=True)
        (first,) = self.torch.autograd.grad((fn(x) ** 2).sum(), x, create_graph=True)
        (found,) = self.torch.autograd.grad((first**2).sum(), x)
        return found.numpy()


class Sdpa(OfTorch):
    title = "PyTorch SDPA"

    def call(self, q, k, v, **given):
        if "bias" in given and "mask" not in given:
            given["mask"] = given.pop("bias")  # one argument for both
        return self.torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            enable_gqa=q.shape[-3] != k.shape[-3],
            **take(given, {"mask": "attn_mask", "dropout": "dropout_p"}),
        )


class Flex(OfTorch):
    title = "PyTorch flex_attention"

    def call(self, q, k, v, **given):
        flex = importlib.import_module("torch.nn.attention.flex_attention")
        seen: list[Callable] = []
        scores: list[Callable] = []
        functions = {
            "window": lambda x: seen.append(
                lambda b, h, i, j: (i - j <= x[0]) & (j - i <= x[1])
            ),
            "lengths": lambda x: seen.append(lambda b, h, i, j: j < x[b]),
            "segments": lambda x: seen.append(lambda b, h, i, j: x[b, i] == x[b, j]),
            "mask": lambda x: seen.append(lambda b, h, i, j: x[0, 0, i, j]),
            "bias": lambda x: scores.append(lambda s, b, h, i, j: s + x[0, h, i, j]),
            "cap": lambda x: scores.append(
                lambda s, b, h, i, j: x * self.torch.tanh(s / x)
            ),
            "score": lambda x: scores.append(x),
        }
        for name in [name for name in given if name in functions]:
            functions[name](given.pop(name))

        def score(s, b, h, i, j):
            for fn in scores:
                s = fn(s, b, h, i, j)
            return s

        block = None
        if seen:
            (fn,) = seen
            block = flex.create_block_mask(
                fn, q.shape[0], q.shape[1], q.shape[-2], k.shape[-2], device="cpu"
            )
        options = take(given, {"lse": "return_lse"}) | {
            "enable_gqa": q.shape[-3] != k.shape[-3]
        }
        return flex.flex_attention(
            q, k, v, score_mod=score if scores else None, block_mask=block, **options
        )


LIBRARIES = {kind.title: kind for kind in (JaxFa, JaxNn, Tokamax, Sdpa, Flex)}


# --- the features: what is called, and what is said of the result


def normal(*shape: int, seed: int = 0, dtype="float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def qkv(
    heads: int = N, width: int = D, batch: tuple[int, ...] = (B,), dtype: str = "float32"
):
    return (
        normal(*batch, S, N, D, dtype=dtype),
        normal(*batch, S, heads, D, seed=1, dtype=dtype),
        normal(*batch, S, heads, width, seed=2, dtype=dtype),
    )


def holds(
    library, args, given: dict[str, Any], meaning: dict[str, Any], atol: float = 2e-5
) -> str:
    found = library.run(lambda *args: library.attend(*args, **given), *args)
    return (
        "yes"
        if np.allclose(found, reference(*args, **meaning)[0], rtol=0, atol=atol)
        else "no"
    )


BIAS = normal(1, N, S, S, seed=3)
TRI = J <= I


def fully_masked(library) -> str:
    """A boolean mask hides every key from one row: what its output is."""
    args, mask = qkv(), np.broadcast_to(TRI & (I != 3), (1, 1, S, S)).copy()
    row = library.run(lambda *args: library.attend(*args, mask=mask), *args)[:, 3]
    if np.isnan(row).any():
        return "NaN"
    return (
        "0"
        if not row.any()
        else "mean of values"
        if np.allclose(row, args[2].mean(axis=1), atol=1e-4)
        else "other"
    )


def nan_in_masked(library) -> str:
    """NaN in a key and a value that a boolean mask hides from all rows: whether the output is free of it."""
    q, k, v = qkv()
    k[:, 5], v[:, 5] = np.nan, np.nan
    mask = np.broadcast_to(J != 5, (1, 1, S, S)).copy()
    found = library.run(lambda *args: library.attend(*args, mask=mask), q, k, v)
    return "propagates" if np.isnan(found).any() else "does not propagate"


def log_sum_exp(library) -> str:
    """The log-sum-exp of the logits as a further result, and its gradient."""
    q, k, v = qkv(dtype="float64")
    found = library.run(lambda *args: library.attend(*args, lse=True)[1], q, k, v)
    want = reference(q, k, v)[1]
    want = want if found.shape == want.shape else np.swapaxes(want, -1, -2)
    if not np.allclose(found, want, atol=1e-4):
        return "no"
    try:
        differentiable = library.gradient(
            lambda q: library.attend(q, k, v, lse=True)[1], q
        ).any()
    except Exception:  # whatever a library raises: it has no such gradient
        differentiable = False
    return "yes, differentiable" if differentiable else "yes, without gradient"


def dropout(library) -> str:
    """Dropout of the attention weights by an argument: the outputs differ from those without it."""
    args = qkv()
    found = library.run(lambda *args: library.attend(*args, dropout=0.5), *args)
    return "no" if np.allclose(found, reference(*args)[0], atol=1e-3) else "yes"


def score_function(library) -> str:
    """A function of a score and its place: here the score minus half of the distance."""
    args = qkv()
    given = {"score": lambda s, b, h, i, j: s - 0.5 * abs(i - j)}
    return holds(library, args, given, {"bias": -0.5 * abs(I - J)})


def derivative(library, method: str) -> str:
    """Against finite differences of the float64 reference."""
    q, k, v = qkv(dtype="float64")
    step = 1e-5
    if method == "forward_mode":
        found = library.forward_mode(lambda q: library.attend(q, k, v), q)
        want = (reference(q + step, k, v)[0] - reference(q - step, k, v)[0]) / (2 * step)
        return "yes" if np.allclose(found, want, atol=1e-4) else "no"

    found = library.second(lambda q: library.attend(q, k, v), q)
    direction = normal(*q.shape, seed=7, dtype="float64")

    def norm(t: float) -> float:
        return float((reference_gradient(q + t * direction, k, v) ** 2).sum())

    want = (norm(step) - norm(-step)) / (2 * step)
    return (
        "yes" if abs((found * direction).sum() - want) < 1e-3 * max(1, abs(want)) else "no"
    )


def reference_gradient(q, k, v):
    """Of the sum of squared outputs, for the query, with as many key heads as query heads."""
    x = np.einsum("bind,bjnd->bnij", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)
    of_weights = np.einsum("bind,bjnd->bnij", 2 * reference(q, k, v)[0], v)
    of_logits = weights * (of_weights - (weights * of_weights).sum(axis=-1, keepdims=True))
    return np.einsum("bnij,bjnd->bind", of_logits, k) / math.sqrt(q.shape[-1])


def bias_gradient(library) -> str:
    """The gradient of a bias `(1, N, S, S)`, against finite differences."""
    args, bias = qkv(dtype="float64"), BIAS.astype(np.float64)
    found = library.gradient(lambda bias: library.attend(*args, bias=bias), bias)
    direction = normal(*bias.shape, seed=8, dtype="float64")

    def loss(t: float) -> float:
        return float((reference(*args, bias=bias + t * direction)[0] ** 2).sum())

    want = (loss(1e-5) - loss(-1e-5)) / 2e-5
    return (
        "yes" if abs((found * direction).sum() - want) < 1e-4 * max(1, abs(want)) else "no"
    )


def memory(library) -> str:
    """Temporary memory of a compiled forward, float32, with 2048 in place of 1024 positions."""
    if not hasattr(library, "memory"):
        return "not tried"
    one, two = library.memory(1024), library.memory(2048)
    return f"×{two / max(one, 1):.1f} ({two / 2**20:.2g} MiB)"


Probe = Callable[[Any], str]
MEMORY = "temporary memory on CPU, 2·S"
SINKS = np.float32([0.5, -1, 2, 0])
FEATURES: dict[str, Probe] = {
    "grouped-query attention": lambda x: holds(x, qkv(K), {}, {}),
    "value head_dim `Dv != D`": lambda x: holds(x, qkv(width=5), {}, {}),
    "two batch dims": lambda x: holds(x, qkv(batch=(2, 3)), {}, {}),
    "additive bias": lambda x: holds(x, qkv(), {"bias": BIAS}, {"bias": BIAS}),
    "gradient of the bias": bias_gradient,
    "sliding window (an argument)": lambda x: holds(
        x, qkv(), {"window": (3, 1)}, {"mask": (I - J <= 3) & (J - I <= 1)}
    ),
    "lengths of keys (an argument)": lambda x: holds(
        x, qkv(), {"lengths": LENGTHS}, {"mask": (LENGTHS[:, None] > J)[:, None, None]}
    ),
    "packed sequences (an argument)": lambda x: holds(
        x, qkv(), {"segments": IDS}, {"mask": (IDS[:, :, None] == IDS[:, None])[:, None]}
    ),
    "soft cap": lambda x: holds(x, qkv(), {"cap": 2.0}, {"cap": 2.0}),
    "attention sinks (an argument)": lambda x: holds(
        x, qkv(), {"sinks": SINKS}, {"sinks": SINKS}
    ),
    "ALiBi slopes (an argument)": lambda x: holds(
        x, qkv(), {"alibi": abs(SINKS)}, {"bias": -abs(SINKS)[:, None, None] * abs(I - J)}
    ),
    "function of a score": score_function,
    "dropout (an argument)": dropout,
    "log-sum-exp": log_sum_exp,
    "forward mode": lambda x: derivative(x, "forward_mode"),
    "second derivatives": lambda x: derivative(x, "second"),
    "float16 on CPU": lambda x: holds(x, qkv(dtype="float16"), {}, {}, 5e-3),
    "float64 throughout": lambda x: holds(x, qkv(dtype="float64"), {}, {}, 1e-12),
    "fully masked row": fully_masked,
    "NaN in masked keys and values": nan_in_masked,
    MEMORY: memory,
}


def tried(title: str) -> dict[str, Any]:
    """Every feature of a library that is installed."""
    library = LIBRARIES[title]()
    cells = {}
    for name, probe in FEATURES.items():
        try:
            cells[name] = probe(library)
        except Unavailable:
            cells[name] = "no"
        except Exception as error:  # each library has its own; the cell names it
            cells[name] = f"no ({type(error).__name__})"
    package = importlib.import_module(library.package)
    return {"version": package.__version__, "cells": cells}


# --- the page

HEAD = """# Comparison

Two tables, made by `docs/compare.py`. The first holds what came out when a small call was run on CPU and compared with
float64 NumPy: "no" where the library has no such argument, where the call raised (the exception is named), or where its
numbers are others. The second holds what documentation and source code say, also of libraries that need other hardware,
as of November 2026; – is what was not looked up.
"""
TAIL = """
Tried on CPU alone, JAX under `jit`: kernels for GPUs have limits of their own, and other memory. `PyTorch flex_attention`
was called without `torch.compile`; its windows, lengths, packed sequences, bias and soft cap are functions. Each feature is a
function in `docs/compare.py`, which repeats the calls: `python -P docs/compare.py --try jax.nn`.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def page(data: dict[str, Any]) -> str:
    run, read = data["tried"], data["read"]
    first = [name for name in LIBRARIES if name in run]
    found = [
        HEAD,
        "## Calls that were run\n",
        table(
            ["", *(f"{name} {run[name]['version']}" for name in first)],
            [
                [feature, *(run[name]["cells"].get(feature, "–") for name in first)]
                for feature in FEATURES
            ],
        ),
        TAIL.lstrip(),
        "## From documentation and source code\n",
        table(
            ["", *read],
            [
                [feature, *(read[x]["cells"].get(feature, "–") for x in read)]
                for feature in data["rows"]
            ],
        ),
        "Read: " + "; ".join(f"{name}: {read[name]['source']}" for name in read) + ".\n",
    ]
    return "\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--try",
        dest="libraries",
        nargs="*",
        default=[],
        choices=list(LIBRARIES),
        metavar="LIBRARY",
    )
    given = parser.parse_args()
    data = json.loads(DATA.read_text(encoding="utf-8"))
    for title in given.libraries:
        data["tried"][title] = tried(title)
    DATA.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(data), encoding="utf-8")


if __name__ == "__main__":
    main()
