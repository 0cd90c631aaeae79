"""A small causal GPT on characters: grouped heads, rotary positions, Adam. The attention is an argument.

Letters as everywhere: B batch, S characters, N query heads, K key/value heads, D head_dim; here also e = N D,
the width of the model. Every dtype is spelt out, so that it runs the same with JAX's 64-bit mode on or off.
"""

import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

VOCABULARY = 128  # ASCII


@dataclass(frozen=True, kw_only=True)
class Config:
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    seq_len: int = 1024
    batch: int = 2
    steps: int = 100
    learning_rate: float = 3e-3
    warmup: int = 10
    dtype: np.dtype = np.dtype("float32")  # noqa: RUF009 (it is immutable); of activations; parameters and Adam's moments are float32

    def __post_init__(self) -> None:
        if self.seq_len >= (size := text().size):
            raise ValueError(f"seq_len must be less than the text's {size} characters; got {self.seq_len}.")

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class State(NamedTuple):
    step: Int[Array, ""]
    parameters: Any
    mean: Any  # Adam's moments
    square: Any


def text() -> UInt8[np.ndarray, " characters"]:
    """Python's own language reference, which every Python brings along."""
    topics = pydoc_data.topics.topics
    joined = "\n\n".join(topics[name] for name in sorted(topics))
    return np.frombuffer(joined.encode("ascii", "replace"), np.uint8)


def batches(config: Config) -> Iterator[Int[np.ndarray, "B T"]]:
    """A batch for each step, always the same ones: sequences that begin anywhere in the text."""
    characters = text().astype(np.int32)
    random = np.random.default_rng(0)
    for _ in range(config.steps):
        starts = random.integers(characters.size - config.seq_len, size=(config.batch, 1))
        yield characters[starts + np.arange(config.seq_len + 1)]


def init(config: Config) -> State:
    """The state before the first step, always the same."""
    random = np.random.default_rng(1)

    def normal(fan_in: int, *shape: int):
        return jnp.asarray(random.standard_normal(shape, np.float32) / np.float32(np.sqrt(fan_in)))

    layers, width = config.layers, config.width
    parameters = {
        "embedding": normal(width, VOCABULARY, width),
        "layers": {
            "qkv": normal(width, layers, width, config.heads + 2 * config.kv_heads, config.head_dim),
            "out": normal(width * layers, layers, width, width),
            "up": normal(width, layers, width, 4 * width),
            "down": normal(4 * width * layers, layers, 4 * width, width),
        },
    }
    mean, square = (jax.tree.map(jnp.zeros_like, parameters) for _ in range(2))
    return State(jnp.zeros((), jnp.int32), parameters, mean, square)


def _normalize(x):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def _as_given(x, axis: int):
    return x


def _rotate(x: Float[Array, "B S N D"], arrange: Callable[[Any, int], Any]) -> Float[Array, "B S N D"]:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864)."""
    S, half = x.shape[1], x.shape[-1] // 2
    angle = np.arange(S)[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    sin, cos = (arrange(f(angle, dtype=np.float32), 0) for f in (np.sin, np.cos))
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def logits(
    config: Config,
    attention: Callable[..., Any],
    parameters: Any,
    tokens: Int[Array, "B S"],
    arrange: Callable[[Any, int], Any] = _as_given,
) -> Float[Array, "B S V"]:
    """`arrange(x, axis)` puts what is in the natural order of positions into that of tokens."""
    cast = jax.tree.map(lambda p: p.astype(config.dtype), parameters)
    N, K = config.heads, config.kv_heads

    def block(x, layer):
        q, k, v = jnp.split(jnp.einsum("bse,ehd->bshd", _normalize(x), layer["qkv"]), (N, N + K), axis=2)
        mixed = attention(_rotate(q, arrange), _rotate(k, arrange), v, is_causal=True)
        x = x + mixed.reshape(x.shape) @ layer["out"]
        x = x + jax.nn.gelu(_normalize(x) @ layer["up"]) @ layer["down"]
        return x, None

    x, _ = jax.lax.scan(block, cast["embedding"][tokens], cast["layers"])
    return jnp.einsum("bse,ve->bsv", _normalize(x), cast["embedding"], preferred_element_type=jnp.float32)


def loss(
    config: Config,
    attention: Callable[..., Any],
    parameters: Any,
    tokens: Int[Array, "B T"],
    arrange: Callable[[Any, int], Any] = _as_given,
):
    """Mean cross-entropy of the next character, in nats. `arrange`: the order in which the model gets them."""
    given, following = arrange(tokens[:, :-1], 1), arrange(tokens[:, 1:], 1)
    scores = jax.nn.log_softmax(logits(config, attention, parameters, given, arrange))
    return -jnp.mean(jnp.take_along_axis(scores, following[..., None], axis=-1))


def train_step(
    config: Config,
    attention: Callable[..., Any],
    state: State,
    tokens: Int[Array, "B T"],
    arrange: Callable[[Any, int], Any] = _as_given,
):
    """(new state, loss): one step of Adam."""
    gradient = jax.value_and_grad(loss, argnums=2)
    value, gradients = gradient(config, attention, state.parameters, tokens, arrange)
    return _adam(config, state, gradients), value


def _adam(config: Config, state: State, gradients: Any) -> State:
    """Kingma & Ba 2014, arXiv:1412.6980, with a linear warm-up."""
    b1, b2 = 0.9, 0.99
    step = state.step + 1
    t = step.astype(jnp.float32)
    rate = config.learning_rate * jnp.minimum(1, t / config.warmup) * jnp.sqrt(1 - b2**t) / (1 - b1**t)
    mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, gradients)
    square = jax.tree.map(lambda s, g: b2 * s + (1 - b2) * g * g, state.square, gradients)
    parameters = jax.tree.map(
        lambda p, m, s: p - rate * m / (jnp.sqrt(s) + 1e-8), state.parameters, mean, square
    )
    return State(step, parameters, mean, square)
