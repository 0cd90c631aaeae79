# %% [markdown]
# # Speed and memory against sequence length
#
# Attention takes time that grows with the square of the length, whoever computes it. Memory is another matter: what
# `jax.nn.dot_product_attention` needs on CPU grows with the square too, what `jax_fa` needs with the length. And a mask
# that hides half of the pairs, or all but a window, can save time, if the implementation skips what it hides.
#
# This notebook measures both on the machine that runs it, with the pieces of `python -m jax_fa.bench`.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import jax_fa
from jax_fa.bench import contestants, measure, record, shapes

LENGTHS = (256, 512, 1024, 2048)
COLOURS = {"cpu": "#24608f", "xla": "#d98324", "jax.nn": "#555555", "torch": "#a33b3b"}
present = contestants.present()
print("contestants:", ", ".join(present))
for name, value in record.environment().items():
    print(f"{name}: {value}")
assert {"xla", "jax.nn"} <= present.keys()

# %% [markdown]
# What would run where, and why not something else:

# %%
x = jax.ShapeDtypeStruct((1, 1024, 4, 64), np.float32)
print(jax_fa.explain(x, x, x, is_causal=True, platforms=("cpu",)))
chosen = jax_fa.explain(x, x, x, platforms=("cpu",)).chosen["cpu"]

# %% [markdown]
# ## Measuring
#
# All contestants of a call are compiled, must compute the same numbers, and are then called in turn, in an order that is
# reversed from round to round: whatever else the machine does hits all alike. Times are medians. The memory is what
# XLA sets aside besides arguments and results; it is known exactly, without running anything. (PyTorch does not tell.)

# %%
ROUNDS = 4


def run(mask, direction, lengths=LENGTHS, names=tuple(present)):
    """{contestant: [result for each length]}"""
    found = {name: [] for name in names}
    for length in lengths:
        shape = shapes.parse_shape(f"S{length}-N4-D64")
        call = shapes.Call(shape=shape, mask=mask, dtype="float32", direction=direction)
        for result in measure.measure(call, {name: present[name] for name in names}, ROUNDS):
            assert result.agrees, f"{result.contestant} computes something else"
            if result.refused is None:
                found[result.contestant].append(result)
    return {name: results for name, results in found.items() if results}


def slope(lengths, values):
    """The exponent with which values grow, between the last two lengths."""
    (a, b), (x, y) = lengths[-2:], values[-2:]
    return float(np.log(y / x) / np.log(b / a))


forward = run("full", "forward")
training = run("full", "both")


# %%
def draw(ax, results, value, title, ylabel):
    for name, of_length in results.items():
        lengths = [result.call.shape.Sq for result in of_length]
        values = [value(result) for result in of_length]
        if None in values or 0 in values:
            continue  # nobody tells, or nothing is needed
        label = f"{name}, slope {slope(lengths, values):.2f}"
        ax.loglog(lengths, values, "o-", color=COLOURS.get(name), label=label, markersize=4)
    finish(ax, title, LENGTHS)
    ax.set_ylabel(ylabel)


def finish(ax, title, lengths):
    ax.set(title=title, xlabel="sequence length")
    ax.set_xticks(lengths, lengths)
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
draw(axes[0], forward, lambda r: 1e3 * r.median, "forward", "ms")
draw(axes[1], training, lambda r: 1e3 * r.median, "forward and backward", "ms")
plt.show()

# %% [markdown]
# The slopes, between the last two lengths, tend to 2 as calls become long enough for their overhead not to count: the
# square of the length, for everyone. The lines differ in height.

# %%
for results, what in ((forward, "forward"), (training, "forward and backward")):
    ours, theirs = results[chosen][-1], results["jax.nn"][-1]
    print(f"{what} at {LENGTHS[-1]}: jax.nn takes {theirs.median / ours.median:.1f}x the time of {chosen}")
    assert theirs.median > 1.2 * ours.median

# %% [markdown]
# ## Memory
#
# The slopes of the temporary memory: 2 for jax.nn, which holds the logits of every pair, and 1 at most for `jax_fa`. The
# portable backend holds a tile, however long the sequence; for the native kernels it is two statistics per row. (What
# these take while they run is bounded, and is not XLA's to count: see the documents.)

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
draw(axes[0], forward, lambda r: r.temp_bytes and r.temp_bytes / 2**20, "forward", "temporary memory, MiB")
draw(axes[1], training, lambda r: r.temp_bytes and r.temp_bytes / 2**20, "forward and backward", "")
plt.show()

# %%
# Compiled for lengths that nobody has to wait for: memory needs no run.
LONG = (2048, 4096, 8192)


def temporary_bytes(name, length):
    call = shapes.Call(
        shape=shapes.parse_shape(f"S{length}-N4-D64"), mask="full", dtype="float32", direction="both"
    )
    return present[name](call).temp_bytes


for name in ("xla", "jax.nn"):
    needed = [temporary_bytes(name, length) for length in LONG]
    grows = slope(LONG, needed)
    print(f"{name:7} {', '.join(f'{n / 2**20:.0f} MiB' for n in needed)}: slope {grows:.2f}")
    if name == "jax.nn":
        assert 1.9 < grows < 2.1
    else:
        assert grows < 1.2
if "cpu" in present:
    statistics = 2 * 4 * LONG[-1] * 4  # two float32 per row and head
    assert temporary_bytes("cpu", LONG[-1]) <= 2 * statistics

# %% [markdown]
# ## What a mask saves
#
# The same lengths with a causal mask, and with a window of 128 keys. `jax_fa` never visits a tile that no row sees: the
# causal mask takes about half the time of no mask, and the window's time grows with the length only. jax.nn computes all
# pairs and then hides.

# %%
names = tuple(name for name in ("cpu", "xla", "jax.nn") if name in present)
WINDOW = (512, 1024, 2048, 4096)
causal = run("causal", "forward", names=names)
window = run("window:128", "forward", WINDOW, names=tuple(name for name in names if name != "jax.nn"))

fig, axes = plt.subplots(1, len(names), figsize=(9, 3.2), layout="constrained", sharey=True)
for ax, name in zip(axes, names, strict=True):
    for label, results, colour in (
        ("full", forward, "#24608f"),
        ("causal", causal, "#d98324"),
        ("window of 128", window, "#3f8f5a"),
    ):
        if name in results:
            lengths = [result.call.shape.Sq for result in results[name]]
            times = [1e3 * result.median for result in results[name]]
            label = f"{label}, slope {slope(lengths, times):.2f}"
            ax.loglog(lengths, times, "o-", color=colour, label=label, markersize=4)
    finish(ax, name, sorted({*LENGTHS, *WINDOW}))
axes[0].set_ylabel("ms, forward")
plt.show()

# %%
for name in names:
    part = causal[name][-1].median / forward[name][-1].median
    print(f"{name}: causal takes {part:.2f} of the time of no mask")
for name, results in window.items():
    grows = slope(WINDOW[1:], [result.median for result in results][1:])
    print(f"{name}: with a window of 128 time grows as length^{grows:.2f}")
# Loose bounds, for machines that do other things as well: half, and 1, are what to expect.
assert causal[chosen][-1].median < 0.85 * forward[chosen][-1].median
times = [result.median for result in window[chosen]]
assert times[-1] / times[1] < 4**1.6  # four times the length; a square would be 16 times the time
