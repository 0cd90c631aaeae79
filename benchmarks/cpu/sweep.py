"""Shapes of all sizes in which ours is timed beside `jax.nn`, and the worst of them."""

import itertools
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa
from jax_fa.testing import timing

Row = dict[str, Any]
S = (1, 2, 4, 8, 16, 32, 64, 100, 128, 192, 256, 512, 1024, 2048, 4096)
B = (1, 2, 4, 16, 64)
N = (1, 2, 4, 8, 16, 32)
D = (16, 32, 64, 80, 128, 256)
DTYPES = ("float32", "bfloat16")
# Bounds on what a call computes and on the logits that jax.nn writes, so that the whole sweep takes some ten minutes.
MOST_FLOPS = 4e9
MOST_LOGITS = 2**26
SAMPLE = 2e-3  # seconds: short calls are repeated until a sample takes so long


@dataclass(frozen=True)
class Shape:
    S: int
    B: int
    N: int
    D: int
    dtype: str
    causal: bool

    @property
    def fits(self) -> bool:
        logits = self.B * self.N * self.S * self.S
        return logits <= MOST_LOGITS and 4.0 * logits * self.D <= MOST_FLOPS

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"S={self.S} B={self.B} N={self.N} D={self.D} {self.dtype} {mask}"


def shapes(count: int, seed: int) -> list[Shape]:
    """All corners, then `count` more, drawn from all combinations that are not too large. The same for a seed."""
    ends_s, ends_b, ends_n, ends_d = ((sizes[0], sizes[-1]) for sizes in (S, B, N, D))
    corners = map(
        _fitted, itertools.starmap(Shape, itertools.product(ends_s, ends_b, ends_n, ends_d, DTYPES, (False,)))
    )
    every = (Shape(*sizes) for sizes in itertools.product(S, B, N, D, DTYPES, (False, True)))
    found = list(dict.fromkeys(corners))
    rest = [shape for shape in every if shape.fits and shape not in found]
    return found + random.Random(seed).sample(rest, min(count, len(rest)))


def _fitted(shape: Shape) -> Shape:
    """The shape with fewer batch entries, then with fewer heads, while it is too large."""
    for size in reversed(B):
        shape = shape if shape.fits else replace(shape, B=min(size, shape.B))
    for size in reversed(N):
        shape = shape if shape.fits else replace(shape, N=min(size, shape.N))
    return shape


def measure(shape: Shape, rounds: int) -> list[Row]:
    """Forward, and gradient of all three with its forward: the least time of several samples, taken in turn.

    None of what `jax.nn` does not run.
    """
    attentions = {
        "cpu": partial(jax_fa.dot_product_attention, implementation="cpu", is_causal=shape.causal),
        "jax.nn": partial(jax.nn.dot_product_attention, is_causal=shape.causal),
    }
    rng = np.random.default_rng(0)
    size = (shape.B, shape.S, shape.N, shape.D)
    *operands, dout = (jnp.asarray(rng.standard_normal(size, np.float32), shape.dtype) for _ in range(4))
    rows = []
    for direction in ("forward", "gradient"):
        calls = {
            name: _call(attention, operands, dout if direction == "gradient" else None)
            for name, attention in attentions.items()
        }
        try:
            calls["jax.nn"]()
        except (
            jax.errors.JaxRuntimeError
        ):  # JAX 0.10 does not compile the bfloat16 product of one query, key and head
            continue
        seconds = {name: min(times) for name, times in _samples(calls, rounds).items()}
        ratio = seconds["jax.nn"] / seconds["cpu"]
        rows.append(asdict(shape) | {"direction": direction, "seconds": seconds, "ratio": ratio})
    return rows


def _call(attention: Callable[..., Any], operands, dout) -> Callable[[], Any]:
    if dout is None:
        forward = jax.jit(attention)
        return lambda: jax.block_until_ready(forward(*operands))

    @jax.jit
    def gradient(dout, *operands):
        return jax.vjp(attention, *operands)[1](dout)

    return lambda: jax.block_until_ready(gradient(dout, *operands))


def _samples(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call, a sample a round."""
    repeats = {}
    for name, call in calls.items():
        call()
        _, once = timing.timed(call)
        repeats[name] = max(1, min(200, int(SAMPLE / once)))

    def repeated(name: str) -> None:
        for _ in range(repeats[name]):
            calls[name]()

    runs = {name: partial(repeated, name) for name in calls}
    found = timing.alternate(runs, rounds)
    return {name: [t / repeats[name] for t in times] for name, times in found.items()}


def worst(rows: list[Row], count: int = 10) -> list[Row]:
    return sorted(rows, key=lambda row: row["ratio"])[:count]


def summary(rows: list[Row]) -> dict[str, Any]:
    slower = sum(row["ratio"] < 1 for row in rows)
    return {"rows": len(rows), "slower": slower, "worst": worst(rows)}


def line(row: Row) -> str:
    shape = Shape(**{name: row[name] for name in ("S", "B", "N", "D", "dtype", "causal")})
    ours, theirs = (row["seconds"][name] * 1e6 for name in ("cpu", "jax.nn"))
    return f"{shape!s:45} {row['direction']:8} {ours:10.1f} us, jax.nn {theirs:10.1f} us: {row['ratio']:.2f}x"
