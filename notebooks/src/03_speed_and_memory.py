# %% [markdown]
# # Speed and memory against sequence length
#
# You will see how time and memory of attention grow with the sequence length: time with its square everywhere, memory with
# its square for `jax.nn.dot_product_attention` on CPU, but only linearly for `jax_fa`. You will also see how much time a
# causal mask and a sliding window save.
#
# Everything is measured on the machine that runs the notebook, with the functions of `python -m jax_fa.bench`.

# %%
import time
from functools import partial

import jax
import matplotlib.pyplot as plt
import numpy as np

import jax_fa
from jax_fa.bench import implementations, measure, record, shapes
from jax_fa.demo.colours import colour

LENGTHS = (512, 1024, 2048)
present = implementations.present()
print("implementations:", ", ".join(present))
for name, value in record.environment().items():
    print(f"{name}: {value}")
assert {"xla", "jax.nn"} <= present.keys()

# %% [markdown]
# Which backend runs, and why not the others:

# %%
x = jax.ShapeDtypeStruct((1, 1024, 4, 64), np.float32)
print(jax_fa.explain(x, x, x, is_causal=True, platforms=("cpu",)))
chosen = jax_fa.explain(x, x, x, platforms=("cpu",)).chosen["cpu"]

# %% [markdown]
# ## Measuring
#
# All implementations must compute the same values. They are called in turn, in an order that is reversed from round to
# round, so that other work on the machine affects all of them alike. Times are medians. Memory is what XLA allocates
# besides arguments and results, which is known from compiling alone. (PyTorch does not report it.)

# %%
ROUNDS = 3


def run(mask, direction, lengths=LENGTHS, names=tuple(present)):
    """The results of each implementation, one for each length."""
    found = {name: [] for name in names}
    for length in lengths:
        shape = shapes.parse_shape(f"S{length}-N4-D64")
        call = shapes.Workload(shape=shape, mask=mask, dtype="float32", direction=direction)
        for result in measure.measure(call, {name: present[name] for name in names}, ROUNDS):
            assert result.agrees, f"{result.implementation} computes other values"
            if result.refused is None:
                found[result.implementation].append(result)
    return {name: results for name, results in found.items() if results}


def slope(lengths, values):
    """The exponent with which values grow, over the last three lengths."""
    return float(np.polyfit(np.log(lengths[-3:]), np.log(values[-3:]), 1)[0])


forward = run("full", "forward")
training = run("full", "both")


# %%
def draw(ax, results, value, title, ylabel):
    for name, of_length in results.items():
        lengths = [result.call.shape.Sq for result in of_length]
        values = [value(result) for result in of_length]
        if None in values or 0 in values:
            continue  # not reported, or no memory is needed
        label = f"{name}: {slope(lengths, values):.2f}"
        ax.loglog(lengths, values, "o-", color=colour(name), label=label)
    finish(ax, title, LENGTHS)
    ax.set_ylabel(ylabel)


def finish(ax, title, lengths, ncols=2):
    ax.set(title=title, xlabel="sequence length")
    ax.set_xticks(lengths, lengths)
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=ncols, fontsize=9, frameon=False)


fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
draw(axes[0], forward, lambda r: 1e3 * r.median, "time, forward", "ms")
draw(axes[1], training, lambda r: 1e3 * r.median, "time, forward and backward", "")
plt.show()

# %% [markdown]
# The numbers below the panels are the slopes: the exponents of the length. They tend to 2, the square of the length, as calls
# become long enough for their overhead not to matter. The implementations differ in the height of their lines.

# %%
for results, what in ((forward, "forward"), (training, "forward and backward")):
    ours, theirs = results[chosen][-1], results["jax.nn"][-1]
    print(f"{what} at {LENGTHS[-1]}: jax.nn takes {theirs.median / ours.median:.1f}x the time of {chosen}")
    assert theirs.median > 1.2 * ours.median

# %% [markdown]
# ## Memory
#
# Temporary memory has a slope of 2 for `jax.nn`, which stores the logits of all pairs of queries and keys, and of at most 1
# for `jax_fa`: `xla` stores a tile of logits, however long the sequence, and the native kernels store two statistics per
# row. (The kernels' own scratch memory is bounded, and XLA does not count it.)

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
draw(axes[0], forward, lambda r: r.temp_bytes and r.temp_bytes / 2**20, "temporary memory, forward", "MiB")
draw(axes[1], training, lambda r: r.temp_bytes and r.temp_bytes / 2**20, "forward and backward", "")
plt.show()

# %%
# Only compiled and not run, so lengths may be long.
LONG = (2048, 8192)


def temporary_bytes(name, length):
    """What XLA allocates for forward and backward."""

    def both(dout, *qkv):
        if name == "jax.nn":
            out, pullback = jax.vjp(jax.nn.dot_product_attention, *qkv)
        else:
            out, pullback = jax.vjp(partial(jax_fa.flash_attention, implementation=name), *qkv)
        return out, *pullback(dout)

    x = jax.ShapeDtypeStruct((1, length, 4, 64), np.float32)
    return jax.jit(both).lower(x, x, x, x).compile().memory_analysis().temp_size_in_bytes


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
# `jax_fa` never visits a masked tile. With a causal mask it takes about half the time of no mask, and with a window of 128
# keys its time grows with the length, not with its square. `jax.nn` computes all pairs and masks them afterwards.
#
# Here all masks and lengths are called in turn, and the fastest call of each counts, since other work on the machine makes
# calls slower, never faster. The heads are fewer than above, which takes less time.

# %%
MASKS = {"full": "#24608f", "causal": "#d98324", "window:128": "#3f8f5a"}
names = tuple(name for name in ("cpu", "xla", "jax.nn") if name in present)
programs = {}
for name in names:
    for mask in MASKS:
        for length in (512, 1024, 2048, 4096):
            if length < 4096 or (mask == "window:128" and name != "jax.nn"):  # the others are slow there
                shape = shapes.parse_shape(f"S{length}-N2-D64")
                call = shapes.Workload(shape=shape, mask=mask, dtype="float32", direction="forward")
                programs[name, mask, length] = present[name](call)
                programs[name, mask, length].run()  # the first call is slower, and does not count
seconds = dict.fromkeys(programs, np.inf)


def call_all(rounds):
    for _ in range(rounds):
        for label, program in programs.items():
            time.sleep(measure.PAUSE)
            start = time.perf_counter()
            program.run()
            seconds[label] = min(seconds[label], time.perf_counter() - start)


def saved(name):
    """The time of a causal call as a part of that of no mask, and the exponent of the time with a window."""
    part = seconds[name, "causal", 2048] / seconds[name, "full", 2048]
    if name == "jax.nn":
        return part, None
    return part, np.log(seconds[name, "window:128", 4096] / seconds[name, "window:128", 1024]) / np.log(4)


call_all(ROUNDS + 2)
for _ in range(5):  # on a busy machine a few calls may all have been disturbed
    part, grows = saved(chosen)
    if part < 0.85 and grows < 1.6:
        break
    call_all(ROUNDS)

fig, axes = plt.subplots(1, len(names), figsize=(9, 4), layout="constrained", sharey=True)
for ax, name in zip(axes, names, strict=True):
    for mask, shade in MASKS.items():
        lengths, times = zip(
            *((n, 1e3 * t) for (x, y, n), t in seconds.items() if (x, y) == (name, mask)), strict=True
        )
        label = f"{mask}: {slope(lengths, times):.2f}"
        ax.loglog(lengths, times, "o-", color=shade, label=label)
    finish(ax, name, (512, 1024, 2048, 4096), ncols=1)
axes[0].set_ylabel("ms, forward")
plt.show()

# %%
for name in names:
    part, grows = saved(name)
    print(f"{name}: causal takes {part:.2f} of the time of no mask")
    if grows is not None:
        print(f"{name}: with a window of 128 time grows as length^{grows:.2f}")
    if name == chosen:
        assert part < 0.85 and grows < 1.6  # about 0.5 and 1 are what to expect
