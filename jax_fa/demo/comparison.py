"""Trains one model with several attentions at once, a step of each in turn: noise hits all alike."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa.demo import gpt
from jax_fa.testing import timing

# Largest difference of two loss curves, in nats, that is put down to rounding, which training amplifies from
# step to step. Seen on CPU within 150 steps: 1e-6 in float32 (GPUs may round its products to fewer bits) and
# 0.02 in the 16-bit dtypes.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.1, "float16": 0.1}


@dataclass(kw_only=True)
class Run:
    """What one attention did."""

    step_bytes: int | None  # temporary memory of the compiled train step; None where XLA does not tell
    attention_bytes: int | None  # ... of attention alone, forward and backward
    compile_seconds: float
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        """The median; the first step, which also touches its memory for the first time, does not count."""
        return timing.median(self.seconds[1:] or self.seconds)


@dataclass(frozen=True)
class Agreement:
    difference: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN, too


def run(
    config: gpt.Config,
    attentions: dict[str, Callable[..., Any]],
    progress: Callable[[int, dict[str, Run]], None],
) -> dict[str, Run]:
    """Trains with each attention; calls `progress(steps done, runs)` after every step."""
    runs, steps, states = {}, {}, {}
    tokens = jax.ShapeDtypeStruct((config.batch, config.seq_len + 1), jnp.int32)
    for name, attention in attentions.items():
        states[name] = gpt.init(config)
        step = jax.jit(partial(gpt.train_step, config, attention), donate_argnums=0)
        steps[name], seconds = timing.timed(_compile, step, states[name], tokens)
        runs[name] = Run(
            compile_seconds=seconds,
            step_bytes=_temporary_bytes(steps[name]),
            attention_bytes=_temporary_bytes(_compile_attention(config, attention)),
        )
    batches = gpt.batches(config)
    for done, (batch, names) in enumerate(
        zip(batches, timing.turns(attentions, config.steps), strict=True), 1
    ):
        for name in names:
            (states[name], loss), seconds = timing.timed(steps[name], states[name], batch)
            runs[name].seconds.append(seconds)
            runs[name].losses.append(float(loss))
        progress(done, runs)
    return runs


def agreement(config: gpt.Config, a: Run, b: Run) -> Agreement:
    difference = np.max(np.abs(np.subtract(a.losses, b.losses)))
    return Agreement(float(difference), TOLERANCE[config.dtype.name])


def operands(config: gpt.Config) -> list[jax.ShapeDtypeStruct]:
    """Query, key and value as the model's attention gets them."""
    heads = (config.heads, config.kv_heads, config.kv_heads)
    return [
        jax.ShapeDtypeStruct((config.batch, config.seq_len, n, config.head_dim), config.dtype) for n in heads
    ]


def _compile(function, *arguments):
    return function.lower(*arguments).compile()


def _compile_attention(config: gpt.Config, attention: Callable[..., Any]):
    def total(*qkv):
        return attention(*qkv, is_causal=True).astype(jnp.float32).sum()

    return _compile(jax.jit(jax.grad(total, argnums=(0, 1, 2))), *operands(config))


def _temporary_bytes(compiled) -> int | None:
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes
