"""Features of the page Comparison: small calls on CPU, and what is said of their results.

The reference is float64 NumPy. A call that raises, or whose numbers are not those of the reference, counts as "no".
"""

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
libraries = importlib.import_module("compare_libraries")

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
    except Exception as error:  # each library has its own; the cell names it
        return f"yes, its gradient no ({type(error).__name__})"
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


def answer(library, probe: Probe) -> str:
    try:
        return probe(library)
    except libraries.Unavailable:
        return "no"
    except Exception as error:  # each library has its own; the cell names it
        return f"no ({type(error).__name__})"


def tried(title: str) -> dict[str, Any]:
    """Every feature of a library that is installed."""
    library = libraries.LIBRARIES[title]()
    cells = {}
    for name, probe in FEATURES.items():
        cells[name] = answer(library, probe)
        if cells[name].startswith("no (") and hasattr(library, "otherwise"):
            setting, context = library.otherwise()
            with context:
                found = answer(library, probe)
            if not found.startswith("no"):
                cells[name] = f"{found}, with {setting}"
    package = importlib.import_module(library.package)
    return {"version": package.__version__, "cells": cells}
