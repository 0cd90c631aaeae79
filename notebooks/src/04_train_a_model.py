# %% [markdown]
# # Training a model
#
# You will see how to replace the attention of a Flax nnx model by `jax_fa`: one line changes, the loss curve stays the same,
# and a training step takes less memory. You will also see a policy for rematerialization (`jax.checkpoint`) with which
# attention is never computed a second time.

# %%
import pydoc_data.topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import jax_fa
from jax_fa.demo.colours import colour
from jax_fa.integrations.flax import make_attention_fn
from jax_fa.masks import Causal

# A text that comes with every Python: its language reference.
topics = pydoc_data.topics.topics
text = "\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
characters = np.frombuffer(text, np.uint8).astype(np.int32)
print(f"{len(characters)} characters")

B, S, STEPS = 1, 512, 80
LAYERS, HEADS, WIDTH = 2, 4, 128

# %% [markdown]
# ## The model
#
# The model is an ordinary small GPT. `nnx.MultiHeadAttention` takes its attention function as an argument, and that is the
# line to change.


# %%
class Block(nnx.Module):
    def __init__(self, attention, rngs):
        self.attend = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs, **attention)
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attend(self.norms[0](x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class GPT(nnx.Module):
    def __init__(self, attention, rngs):
        self.embedding = nnx.Embed(128, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(S, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(attention, rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens, mask=None, remat=None):
        x = self.embedding(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            run = (remat or (lambda f: f))(lambda block, x: block(x, mask))
            x = run(block, x)
        return self.embedding.attend(self.norm(x))


# %% [markdown]
# Flax's attention takes the causal mask as an S×S array. `jax_fa` takes it as an object, with which the kernel skips masked
# tiles. (`attention_fn=jax_fa.integrations.flax.attention_fn` accepts the array too, so that nothing else has to change.)

# %%
STOCK, FLASH = "flax", "jax_fa"
ATTENTION = {
    STOCK: {},
    FLASH: {"attention_fn": make_attention_fn(mask=Causal())},  # <- the line
}
MASK = {STOCK: nnx.make_causal_mask(jnp.zeros((1, S))), FLASH: None}


def loss_of(graph, mask, remat=None):
    def loss(parameters, tokens):
        model = nnx.merge(graph, parameters)
        scores = jax.nn.log_softmax(model(tokens[:, :-1], mask, remat))
        return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))

    return loss


optimizer = optax.adam(3e-3)


def compiled_step(name):
    """(state before the first step, compiled train step)"""
    graph, parameters = nnx.split(GPT(ATTENTION[name], nnx.Rngs(0)))
    loss = loss_of(graph, MASK[name])

    def step(parameters, moments, tokens):
        value, gradients = jax.value_and_grad(loss)(parameters, tokens)
        updates, moments = optimizer.update(gradients, moments, parameters)
        return optax.apply_updates(parameters, updates), moments, value

    state = parameters, optimizer.init(parameters)
    tokens = jax.ShapeDtypeStruct((B, S + 1), jnp.int32)
    return graph, state, jax.jit(step, donate_argnums=(0, 1)).lower(*state, tokens).compile()


# %% [markdown]
# ## Training, side by side
#
# Both models begin with the same parameters and get the same batches.

# %%
models = {name: compiled_step(name) for name in ATTENTION}
states = {name: model[1] for name, model in models.items()}
losses = {name: [] for name in models}
random = np.random.default_rng(0)
for _ in range(STEPS):
    starts = random.integers(len(characters) - S, size=(B, 1))
    batch = characters[starts + np.arange(S + 1)]
    for name, (_, _, step) in models.items():
        *states[name], value = step(*states[name], batch)
        losses[name].append(float(value))

difference = np.abs(np.subtract(*losses.values())).max()
print(f"last loss: {', '.join(f'{name} {values[-1]:.4f}' for name, values in losses.items())}")
print(f"largest difference of the curves: {difference:.1e} nats")
assert difference < 0.01  # rounding, which training amplifies from step to step
assert losses[FLASH][-1] < losses[FLASH][0] - 1

fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
ax.plot(losses[STOCK], label=STOCK, color=colour(STOCK), linewidth=4, alpha=0.4)
ax.plot(losses[FLASH], "--", label=FLASH, color=colour(FLASH))
ax.set(xlabel="step", ylabel="loss, nats per character", title="The two curves coincide")
ax.legend()
plt.show()

# %% [markdown]
# Memory is another matter: what XLA allocates for a step, besides its arguments and results.

# %%
memory = {name: step.memory_analysis().temp_size_in_bytes / 2**20 for name, (_, _, step) in models.items()}
assert memory[FLASH] < 0.75 * memory[STOCK]

fig, ax = plt.subplots(figsize=(7, 1.6), layout="constrained")
bars = ax.barh(list(memory), list(memory.values()), color=[colour(name) for name in memory])
ax.bar_label(bars, fmt="%.0f MiB", padding=3)
ax.set(xlabel="temporary memory of a training step, MiB", xlim=(0, 1.15 * max(memory.values())))
ax.invert_yaxis()
plt.show()

# %% [markdown]
# ## Rematerialization that leaves attention alone
#
# `jax.checkpoint` saves memory: it computes the forward of a block again during the backward. For attention that is a bad
# trade. It is the most expensive part of a block, and its backward needs little: the output and two scalars per row. These
# have checkpoint names, `jax_fa.OUT_NAME` and `jax_fa.STATS_NAME`, so a policy can keep them.

# %%
keep = jax.checkpoint_policies.save_only_these_names(jax_fa.OUT_NAME, jax_fa.STATS_NAME)


def count(jaxpr, name):
    """How often a primitive occurs in a jaxpr, inner ones included."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == name
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(parameter, "eqns") or hasattr(parameter, "jaxpr"):
                found += count(getattr(parameter, "jaxpr", parameter), name)
    return found


POLICIES = {
    "no remat": None,
    "remat of everything": jax.checkpoint,
    "remat that keeps attention": lambda f: jax.checkpoint(f, policy=keep),
}
graph, parameters = nnx.split(GPT(ATTENTION[FLASH], nnx.Rngs(0)))
tokens = jnp.asarray(batch)
calls, sizes, gradients = {}, {}, {}
for name, remat in POLICIES.items():
    loss = loss_of(graph, None, remat)
    gradient = jax.grad(loss)
    jaxpr = jax.make_jaxpr(gradient)(parameters, tokens)
    calls[name] = count(jaxpr.jaxpr, "flash_attention_fwd")
    gradients[name] = jax.jit(gradient)(parameters, tokens)
    # What the forward keeps for the backward: the residuals in the VJP function.
    kept = jax.eval_shape(lambda p, loss=loss: jax.vjp(lambda p: loss(p, tokens), p)[1], parameters)
    sizes[name] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) / 2**20
    print(f"{name:28} attention forward {calls[name]} times, {sizes[name]:.1f} MiB kept for the backward")

assert calls == dict(zip(POLICIES, (LAYERS, 2 * LAYERS, LAYERS), strict=True))
everything, attention = sizes["remat of everything"], sizes["remat that keeps attention"]
assert everything < attention < 0.5 * sizes["no remat"]
# The difference is the output and two float32 per row, head and layer.
assert abs((attention - everything) * 2**20 - LAYERS * 4 * B * S * (WIDTH + 2 * HEADS)) < 1000
for name in POLICIES:
    same = jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-5), gradients[name], gradients["no remat"])
    assert all(jax.tree.leaves(same))

# %% [markdown]
# ## A sample
#
# After so few steps a tiny model has learnt the look of the text, not its meaning.

# %%
model = nnx.merge(models[FLASH][0], states[FLASH][0])


@jax.jit
def next_character(parameters, window, position, key):
    scores = nnx.merge(models[FLASH][0], parameters)(window[None])[0, position]
    return jax.random.categorical(key, scores / 0.7)


prompt = "The function "
window = np.zeros(S, np.int32)
window[: len(prompt)] = [ord(c) for c in prompt]
for position in range(len(prompt) - 1, 120):
    key = jax.random.fold_in(jax.random.key(0), position)
    window[position + 1] = next_character(states[FLASH][0], window, position, key)
sample = "".join(map(chr, window[:121]))
print(sample)
assert sample.startswith(prompt)
