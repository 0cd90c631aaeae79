# %% [markdown]
# # Derivatives of every order
#
# You will see three training steps that need forward-mode or second derivatives of attention: MeanFlow, with a `jvp` inside
# the loss, a gradient penalty, with a `grad` inside it, and meta-learning, with the gradient of a training step. Each runs
# with `jax.nn` and with `jax_fa`, which gives the same values in less time and memory.
#
# Implementations of FlashAttention usually lack these derivatives, so such code falls back to dense attention, which stores
# the logits of all pairs of queries and keys several times.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jax_fa
from jax_fa.demo.colours import colour

ATTENTION = {
    "jax.nn": jax.nn.dot_product_attention,
    "jax_fa": jax_fa.dot_product_attention,  # <- the line
}
B, S, HEADS, D = 1, 1024, 4, 32
WIDTH = HEADS * D

# %% [markdown]
# ## A layer
#
# Attention with a residual connection and a small MLP, as transformers have. The parameters are a dict.


# %%
def parameters(key):
    shapes = {
        "qkv": (WIDTH, 3 * WIDTH),
        "out": (WIDTH, WIDTH),
        "up": (WIDTH, 2 * WIDTH),
        "down": (2 * WIDTH, WIDTH),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape) / shape[0] ** 0.5
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def layer(attention, weights, x, causal=False):
    q, k, v = (part.reshape(*x.shape[:2], HEADS, D) for part in jnp.split(x @ weights["qkv"], 3, axis=-1))
    mixed = attention(q, k, v, is_causal=causal).reshape(x.shape)
    x = x + mixed @ weights["out"]
    return x + jax.nn.gelu(x @ weights["up"]) @ weights["down"]


weights = parameters(jax.random.key(0))
x, noise = jax.random.normal(jax.random.key(1), (2, B, S, WIDTH))

# %% [markdown]
# ## Side by side
#
# Each training step is compiled with both implementations, and both must give the same loss and the same new parameters.
# Then they run in turn, and times are medians. Memory is what XLA allocates besides arguments and results. (The kernels'
# own scratch memory is bounded, and XLA does not count it.)

# %%
ROUNDS = 3
figures = {}


def descend(loss, weights, *data):
    """A step of gradient descent."""
    value, gradients = jax.value_and_grad(loss)(weights, *data)
    return value, jax.tree.map(lambda w, g: w - 0.01 * g, weights, gradients)


def compare(name, step, *arguments):
    """`step(attention, *arguments)` gives a loss and new parameters."""
    programs = {
        who: jax.jit(lambda *a, attention=attention: step(attention, *a)).lower(*arguments).compile()
        for who, attention in ATTENTION.items()
    }
    results = {who: program(*arguments) for who, program in programs.items()}
    for ours, theirs in zip(*(jax.tree.leaves(results[who]) for who in ("jax_fa", "jax.nn")), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    seconds = {who: [] for who in programs}
    for _ in range(ROUNDS):
        for who, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[who].append(time.perf_counter() - start)
    figures[name] = {
        who: (np.median(seconds[who]), program.memory_analysis().temp_size_in_bytes / 2**20)
        for who, program in programs.items()
    }
    print(f"{name}: loss {results['jax_fa'][0]:.6f} (jax_fa), {results['jax.nn'][0]:.6f} (jax.nn)")
    for who, (median, memory) in figures[name].items():
        print(f"  {who:7} {1e3 * median:7.0f} ms {memory:7.0f} MiB")


# %% [markdown]
# ## MeanFlow: a jvp inside the loss
#
# A MeanFlow model `u(z, r, t)` learns the mean velocity between two times. By its identity, `u = v - (t - r) du/dt`, where
# the derivative follows the flow: a `jax.jvp` of the network along `(v, 0, 1)`. The target has no gradient, so a step takes
# the network, its tangent, and the backward of the network.


# %%
def meanflow_loss(attention, weights, x, noise, r, t):
    z = (1 - t) * x + t * noise
    v = noise - x

    def u(z, r, t):
        return layer(attention, weights, z + jnp.sin(t) + jnp.cos(r))

    mean, rate = jax.jvp(u, (z, r, t), (v, jnp.zeros_like(r), jnp.ones_like(t)))
    target = jax.lax.stop_gradient(v - (t - r) * rate)
    return jnp.mean((mean - target) ** 2)


def meanflow_step(attention, weights, *data):
    return descend(lambda *a: meanflow_loss(attention, *a), weights, *data)


r, t = jnp.full((B, 1, 1), 0.2), jnp.full((B, 1, 1), 0.7)
compare("MeanFlow", meanflow_step, weights, x, noise, r, t)

# %% [markdown]
# ## A gradient penalty: a gradient inside the loss
#
# The gradient of a critic with respect to its input should have norm 1 at every example (WGAN-GP). Training such a critic
# takes the gradient of a gradient, and so does training an energy whose forces are known.


# %%
def penalty_loss(attention, weights, x):
    def critic(x):
        return jnp.sum(jnp.mean(layer(attention, weights, x), axis=1) @ weights["out"][:, 0])

    norms = jnp.sqrt(jnp.sum(jax.grad(critic)(x) ** 2, axis=(1, 2)))
    return jnp.mean((norms - 1) ** 2)


def penalty_step(attention, weights, *data):
    return descend(lambda *a: penalty_loss(attention, *a), weights, *data)


compare("gradient penalty", penalty_step, weights, x)

# %% [markdown]
# ## Meta-learning: a training step inside the loss
#
# In MAML the weights take a step on one half of the data, and the loss on the other half is differentiated through that step.
# Test-time training does the same. Here attention is causal, and the model predicts the next element.


# %%
def prediction_loss(attention, weights, x):
    return jnp.mean((layer(attention, weights, x, causal=True)[:, :-1] - x[:, 1:]) ** 2)


def meta_loss(attention, weights, support, query):
    gradients = jax.grad(lambda w: prediction_loss(attention, w, support))(weights)
    adapted = jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients)
    return prediction_loss(attention, adapted, query)


def meta_step(attention, weights, *data):
    return descend(lambda *a: meta_loss(attention, *a), weights, *data)


compare("meta-learning", meta_step, weights, x, noise)

# %% [markdown]
# ## Time and memory
#
# The time of each step:


# %%
def bars(which, ylabel):
    """One group of bars per training step: `which` is 0 for seconds and 1 for MiB."""
    _, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    places = np.arange(len(figures))
    for i, who in enumerate(ATTENTION):
        heights = [found[who][which] * (1e3, 1)[which] for found in figures.values()]
        drawn = ax.bar(places + 0.38 * (i - 0.5), heights, 0.36, label=who, color=colour(who))
        ax.bar_label(drawn, fmt="%.0f")
    ax.set_xticks(places, figures)
    ax.set_ylabel(ylabel)
    ax.margins(y=0.12)
    ax.legend()
    plt.show()


bars(0, "ms per step")

# %% [markdown]
# And its temporary memory:

# %%
bars(1, "MiB")
for name, found in figures.items():
    (fast, small), (slow, large) = found["jax_fa"], found["jax.nn"]
    print(f"{name}: jax.nn takes {slow / fast:.1f}x the time and {large / small:.1f}x the memory")
    assert large > 2 * small

# %% [markdown]
# ## Memory against the length
#
# These programs are only compiled, so the lengths may be long. The temporary memory of `jax.nn` grows with the square of the
# length, that of `jax_fa` with the length.

# %%
LENGTHS = (1024, 2048, 4096)


def memory(step, attention, length):
    shape = jax.ShapeDtypeStruct((B, length, WIDTH), jnp.float32)
    compiled = jax.jit(lambda *a: step(attention, *a)).lower(weights, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


sizes = {
    # The shortest of these lengths is that of the step above.
    who: [figures["gradient penalty"][who][1], *(memory(penalty_step, a, length) for length in LENGTHS[1:])]
    for who, a in ATTENTION.items()
}
assert LENGTHS[0] == S
exponents = {who: float(np.polyfit(np.log(LENGTHS), np.log(found), 1)[0]) for who, found in sizes.items()}
for who, found in sizes.items():
    print(f"{who:7}", ", ".join(f"{size:.0f} MiB" for size in found), f"(exponent {exponents[who]:.2f})")
assert exponents["jax_fa"] < 1.2 and exponents["jax.nn"] > 1.6

fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
for who, found in sizes.items():
    ax.loglog(LENGTHS, found, "o-", label=f"{who}, exponent {exponents[who]:.2f}", color=colour(who))
ax.set(title="Memory of a step with a gradient penalty", xlabel="sequence length", ylabel="MiB")
ax.set_xticks(LENGTHS, LENGTHS)
ax.minorticks_off()
ax.grid(alpha=0.3)
ax.legend()
plt.show()

# %% [markdown]
# `explain` shows which backend computes which derivative.

# %%
like = jax.ShapeDtypeStruct((B, S, HEADS, D), jnp.float32)
found = jax_fa.explain(like, like, like, platforms=("cpu",))
print(found)
assert found.tangent["cpu"] is not None and found.second["cpu"] is not None
