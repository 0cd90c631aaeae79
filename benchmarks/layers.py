"""Models of two blocks (causal attention, MLP), by layers of other libraries: with their attention and with ours.

A maker takes the library, the length of sequences and whose attention it is, and gives parameters and a function of them and a
batch. Both models of a maker begin with the same numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BATCH, HEADS, WIDTH = 2, 4, 32

Made = tuple[Any, Callable[[Any, Any], Any]]


def walk(size: int) -> jax.Array:
    """A random walk of vectors, whose next step the models learn to predict."""
    return jnp.cumsum(jax.random.normal(jax.random.key(0), (BATCH, size, WIDTH)), axis=1) / size**0.5


def _tri(size: int):
    return jnp.tri(size, dtype=bool)


def linen(library: Any, size: int, ours: bool) -> Made:
    from jax_fa.integrations.flax import attention_fn

    class Model(library.Module):
        @library.compact
        def __call__(self, x):
            fn = attention_fn if ours else library.dot_product_attention
            mask = library.make_causal_mask(x[..., 0])
            for _ in range(2):
                x = x + library.MultiHeadDotProductAttention(HEADS, attention_fn=fn)(x, mask=mask)
                x = x + library.Dense(WIDTH)(library.gelu(library.Dense(2 * WIDTH)(x)))
            return x

    model = Model()
    return model.init(jax.random.key(0), walk(size)), model.apply


def nnx(library: Any, size: int, ours: bool) -> Made:
    from jax_fa.integrations.flax import attention_fn

    class Block(library.Module):
        def __init__(self, rngs):
            fn = attention_fn if ours else library.dot_product_attention
            self.attention = library.MultiHeadAttention(
                HEADS, WIDTH, attention_fn=fn, decode=False, rngs=rngs
            )
            self.up = library.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
            self.down = library.Linear(2 * WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(x, mask=library.make_causal_mask(x[..., 0]))
            return x + self.down(library.gelu(self.up(x)))

    rngs = library.Rngs(0)
    graph, parameters, rest = library.split(library.Sequential(Block(rngs), Block(rngs)), library.Param, ...)
    return parameters, lambda parameters, x: library.merge(graph, parameters, rest)(x)


def equinox(library: Any, size: int, ours: bool) -> Made:
    from jax_fa.integrations.equinox import use_flash_attention

    keys = jax.random.split(jax.random.key(0), (2, 2))
    model = [
        (
            library.nn.MultiheadAttention(HEADS, WIDTH, key=a),
            library.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, key=b),
        )
        for a, b in keys
    ]
    arrays, rest = library.partition(use_flash_attention(model) if ours else model, library.is_inexact_array)
    tree: Any
    leaves, tree = jax.tree.flatten(arrays)  # the trees differ in the class

    def apply(leaves, x):
        for attention, mlp in library.combine(tree.unflatten(leaves), rest):
            x = x + attention(x, x, x, _tri(size))
            x = x + jax.vmap(mlp)(x)
        return x

    return leaves, jax.vmap(apply, in_axes=(None, 0))


def haiku(library: Any, size: int, ours: bool) -> Made:
    from jax_fa.integrations.haiku import MultiHeadAttention

    def apply(x):
        w_init = library.initializers.VarianceScaling(1.0)
        for _ in range(2):
            layer = MultiHeadAttention if ours else library.MultiHeadAttention
            x = x + layer(HEADS, WIDTH // HEADS, w_init=w_init)(x, x, x, _tri(size)[None, None])
            x = x + library.nets.MLP([2 * WIDTH, WIDTH], activation=jax.nn.gelu)(x)
        return x

    model = library.without_apply_rng(library.transform(apply))
    return model.init(jax.random.key(0), walk(size)), model.apply


def keras(library: Any, size: int, ours: bool) -> Made:
    from jax_fa.integrations import patch_jax_nn

    library.utils.set_random_seed(0)
    x = inputs = library.Input((size, WIDTH))
    for _ in range(2):
        layer = library.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)
        x = x + layer(x, x, use_causal_mask=True)
        x = x + library.layers.Dense(WIDTH)(library.layers.Dense(2 * WIDTH, "gelu")(x))
    model = library.Model(inputs, x)

    def apply(parameters, x):
        return model.stateless_call(parameters, [v.value for v in model.non_trainable_variables], x)[0]

    return [v.value for v in model.trainable_variables], patch_jax_nn()(apply) if ours else apply


class Layer(NamedTuple):
    """A maker and the module that it takes."""

    make: Callable[[Any, int, bool], Made]
    module: str


LAYERS = {
    "flax-linen": Layer(linen, "flax.linen"),
    "flax-nnx": Layer(nnx, "flax.nnx"),
    "equinox": Layer(equinox, "equinox"),
    "haiku": Layer(haiku, "haiku"),
    "keras": Layer(keras, "keras"),
}
