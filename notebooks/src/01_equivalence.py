# %% [markdown]
# # The same values as `jax.nn`, and how accurate they are
#
# You will see how far the results of `jax_fa` are from float64, next to those of `jax.nn.dot_product_attention`, for every
# dtype, kind of mask and backend. You will also see the two cases in which the libraries differ on purpose: fully masked
# rows and NaN in the padding.
#
# One rule is asserted throughout: **our error is at most twice that of `jax.nn` in the same dtype, plus 4 eps.** (`eps` is
# the spacing of the dtype's numbers near 1, `jnp.finfo(dtype).eps`.)

# %%
import os
from dataclasses import dataclass, field
from functools import partial

# Dozens of small programs follow, and compiling them is nearly all that takes time.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jax_fa
from jax_fa.demo.colours import colour
from jax_fa.masks import Causal, CumulativeLengths, Dense, Lengths, Prefix, SlidingWindow

jax.config.update("jax_enable_x64", True)
FLT_MAX = float(np.finfo(np.float32).max)

call = jax.ShapeDtypeStruct((2, 160, 4, 32), jnp.float32)
print(jax_fa.explain(call, call, call, platforms=("cpu",)))

# %% [markdown]
# Two backends are measured: `xla`, which is plain JAX, and `cpu`, the native CPU kernels, where they are installed.
# By default (`implementation=None`) the first of the two is taken, which the next cell checks bit for bit.

# %%
reasons = jax_fa.explain(call, call, call, platforms=("cpu",)).reasons["cpu"]
BACKENDS = [name for name in ("cpu", "xla") if reasons[name] is None]
chosen = jax_fa.explain(call, call, call, platforms=("cpu",)).chosen["cpu"]
assert "xla" in BACKENDS and chosen == BACKENDS[0]

x = jax.random.normal(jax.random.key(0), call.shape, jnp.float32)
by_default = jax_fa.flash_attention(x, x, x, mask=Causal())
assert jnp.array_equal(by_default, jax_fa.flash_attention(x, x, x, mask=Causal(), implementation=chosen))
print("measured:", *BACKENDS)

# %% [markdown]
# ## 1. A drop-in replacement
#
# `jax_fa.dot_product_attention` takes the arguments of `jax.nn`'s. Each line shows a backend, the largest difference of its
# output from that of `jax.nn`, and the options of the call.

# %%
keys = jax.random.split(jax.random.key(1), 4)
query = jax.random.normal(keys[0], (2, 96, 4, 32), jnp.float32)
key, value = (jax.random.normal(k, (2, 96, 2, 32), jnp.float32) for k in keys[1:3])
bias = jax.random.normal(keys[3], (2, 4, 96, 96), jnp.float32)
lengths = [jnp.array(n, jnp.int32) for n in ([96, 50], [70, 96])]
CALLS = [
    {},
    {"is_causal": True},
    {"local_window_size": (20, 5)},
    {"is_causal": True, "local_window_size": 30, "scale": 0.3},
    {"query_seq_lengths": lengths[0], "key_value_seq_lengths": lengths[1]},
    {"bias": bias, "is_causal": True},
    {"mask": bias > -1},
]
for arguments in CALLS:
    theirs = jax.nn.dot_product_attention(query, key, value, **arguments)
    for name in BACKENDS:
        ours = jax_fa.dot_product_attention(query, key, value, **arguments, implementation=name)
        difference = float(jnp.abs(ours - theirs).max())
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and difference < 2e-6
        print(f"{name}: {difference:.1e}  {', '.join(arguments) or 'no option'}")

# %% [markdown]
# ## 2. The definition, in float64
#
# This is the reference for everything below: the formulas, on whole matrices, in NumPy.
#
# Some gradients are sums whose terms nearly cancel: those of ALiBi slopes, and of a bias that broadcasts. Such a sum is only
# as accurate as its terms, so its error is taken relative to the sum of their absolute values, for all implementations.


# %%
def exact(query, key, value, bias=None, slopes=None, *, visible, dout, dlse=0.0):
    """The exact results, and the size of the terms of each, as two dicts of float64."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (query, key, value, dout))
    B, Sq, N, D = q.shape
    Skv, K = k.shape[1:3]
    k, v = np.repeat(k, N // K, axis=2), np.repeat(v, N // K, axis=2)
    distance = np.abs(np.arange(Skv) - np.arange(Sq)[:, None])
    x = np.matmul(q.transpose(0, 2, 1, 3), k.transpose(0, 2, 3, 1)) / np.sqrt(D)
    if bias is not None:
        x = x + np.asarray(bias, np.float64)
    if slopes is not None:
        x = x - np.asarray(slopes, np.float64)[:, None, None] * distance
    m = x.max(axis=-1, where=visible, initial=-FLT_MAX)
    p = np.exp(np.where(visible, x - m[..., None], -np.inf))
    l = p.sum(axis=-1)
    w = p / np.where(l == 0, 1, l)[..., None]
    dout_ = dout.transpose(0, 2, 1, 3)
    dw = dout_ @ v.transpose(0, 2, 3, 1)
    dx = w * (dw - np.sum(w * dw, axis=-1, keepdims=True)) + w * np.asarray(dlse)[..., None]

    def by_query(y):  # B N S D to B S N D
        return y.transpose(0, 2, 1, 3)

    def by_key(y):  # the query heads of one key head are summed
        return by_query(y.reshape(B, K, N // K, Skv, D).sum(axis=2))

    found = {
        "out": by_query(w @ v.transpose(0, 2, 1, 3)),
        "logsumexp": np.where(l == 0, -FLT_MAX, m + np.log(np.where(l == 0, 1, l))),
        "query": by_query(dx @ k.transpose(0, 2, 1, 3)) / np.sqrt(D),
        "key": by_key(dx.swapaxes(-1, -2) @ q.transpose(0, 2, 1, 3)) / np.sqrt(D),
        "value": by_key(w.swapaxes(-1, -2) @ dout_),
        "max": m,
        "sum": l,
    }
    sizes = {name: np.abs(y) for name, y in found.items()}
    if bias is not None:
        found["bias"], sizes["bias"] = (sum_to(y, bias.shape) for y in (dx, np.abs(dx)))
    if slopes is not None:
        found["slopes"] = -(dx * distance).sum(axis=(0, 2, 3))
        sizes["slopes"] = (np.abs(dx) * distance).sum(axis=(0, 2, 3))
    return found, sizes


def sum_to(y, shape):
    """Sums the dims in which an array of this shape broadcasts."""
    y = y.sum(axis=tuple(range(y.ndim - len(shape))))
    axes = tuple(a for a, size in enumerate(shape) if size == 1 and y.shape[a] != 1)
    return y.sum(axis=axes, keepdims=True)


# %% [markdown]
# ## 3. The cases
#
# Each case has a mask twice: as the object that `jax_fa` takes, and as a boolean matrix for the definition above and for
# `jax.nn`. There are 4 query heads and 2 key heads unless stated otherwise. The long causal case has several tiles on
# every backend. All cases run in float32, most of them in bfloat16, and two in float64 and float16 too.


# %%
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass
class Case:
    name: str
    mask: object = None  # for jax_fa
    visible: object = True  # the definition: boolean, broadcastable to (B, N, S, S)
    B: int = 2
    S: int = 160
    K: int = 2
    bias: tuple | None = None
    slopes: bool = False
    dtypes: tuple = ("float32", "bfloat16")
    N: int = field(default=4, init=False)
    D: int = field(default=32, init=False)

    def arrays(self, dtype):
        """Operands and the cotangent of the output; the operands are exactly representable in the dtype."""
        random = np.random.default_rng(len(self.name))

        def normal(*shape):
            return random.standard_normal(shape).astype(dtype)

        operands = {
            "query": normal(self.B, self.S, self.N, self.D),
            "key": normal(self.B, self.S, self.K, self.D),
            "value": normal(self.B, self.S, self.K, self.D),
        }
        dout = normal(self.B, self.S, self.N, self.D)
        if self.bias is not None:
            operands["bias"] = normal(*self.bias)
        if self.slopes:
            wide = np.float64 if dtype == np.float64 else np.float32
            operands["slopes"] = (2.0 ** -np.arange(1, self.N + 1)).astype(wide)
        # Fully masked rows are the subject of section 7: here no gradient comes from them.
        return operands, np.where(self.seen()[..., None], dout.transpose(0, 2, 1, 3), 0).transpose(0, 2, 1, 3)

    def matrix(self):
        return np.broadcast_to(self.visible, (self.B, self.N, self.S, self.S))

    def seen(self):
        """Which rows have a visible key, (B, N, S)."""
        return self.matrix().any(axis=-1)


S = 160
i, j = np.arange(S)[:, None], np.arange(S)
ends = np.array([50, 90, S])
sequence = np.searchsorted(ends, np.arange(S), side="right")
rows, columns, prefix = np.array([S, 110]), np.array([90, S]), np.array([40, 100])
random_mask = (np.random.default_rng(3).random((2, 1, S, S)) < 0.6) | (j == 0)


def per_batch(x):
    return x[:, None, None, None]


CASES = [
    Case("no mask, 4 key heads", K=4),
    Case("causal, long", Causal(), np.tri(640, dtype=bool), B=1, S=640),
    Case("window, 1 key head", SlidingWindow(40, 10), (i - 40 <= j) & (j <= i + 10), K=1),
    Case("lengths", Lengths(query=rows, key=columns), (i < per_batch(rows)) & (j < per_batch(columns))),
    Case("dense", Dense(random_mask), random_mask, dtypes=("float32",)),
    Case("prefix", Prefix(prefix), (j <= i) | (j < per_batch(prefix)), dtypes=("float32",)),
    Case(
        "packed, causal",
        CumulativeLengths(tuple(ends.tolist()), within=Causal()),
        (sequence[:, None] == sequence) & (j <= i),
    ),
    Case("bias (1, N, S, S), causal", Causal(), j <= i, bias=(1, 4, S, S), dtypes=DTYPES),
    Case("bias (N, 1, S)", bias=(4, 1, S), dtypes=("float32",)),
    Case("ALiBi, causal", Causal(), j <= i, slopes=True, dtypes=DTYPES),
]


# %%
def ours(case, implementation):
    """Output, log-sum-exp and gradients of jax_fa, as one compiled function of (operands, dout)."""

    def attention(operands):
        return jax_fa.flash_attention(
            operands["query"],
            operands["key"],
            operands["value"],
            bias=operands.get("bias"),
            alibi_slopes=operands.get("slopes"),
            mask=case.mask,
            return_logsumexp=True,
            implementation=implementation,
        )

    @jax.jit
    def run(operands, dout):
        (out, lse), pullback = jax.vjp(attention, operands)
        return {"out": out, "logsumexp": lse, **pullback((dout, jnp.zeros_like(lse)))[0]}

    return run


def theirs(case):
    """The same with jax.nn, for which slopes become a bias and masks are full matrices."""

    def attention(operands):
        bias = operands.get("bias")
        if case.slopes:
            distance = jnp.abs(jnp.arange(case.S) - jnp.arange(case.S)[:, None])
            bias = -operands["slopes"][:, None, None] * distance.astype(operands["slopes"].dtype)
        return jax.nn.dot_product_attention(
            operands["query"],
            operands["key"],
            operands["value"],
            bias,
            None if case.visible is True else jnp.asarray(case.visible),
            return_residual=True,
        )

    def run(operands, dout):
        (out, lse), pullback = jax.vjp(attention, operands)
        gradients = pullback((dout, jnp.zeros_like(lse)))[0]
        return {"out": out, "logsumexp": jnp.swapaxes(lse, 1, 2), **gradients}

    return run


def jax_nn(case, operands, dout):
    """float16 runs without jit: on CPU jax.nn refuses it under jit."""
    run = theirs(case)
    return (run if operands["query"].dtype == np.float16 else jax.jit(run))(operands, dout)


# %% [markdown]
# ## 4. Errors against float64
#
# All errors are in units of the input dtype's eps, relative to the size of the tensor (its root mean square). `xla` computes
# float64 in float64 throughout. The native kernels do not serve it, and raise an error when requested by name.

# %%
FLOOR = 4.0  # eps


@dataclass
class Measured:
    case: str
    dtype: str
    by: str
    tensor: str
    distribution: np.ndarray  # |error| of the elements, in eps of the size, at 200 quantiles
    overall: float  # relative L2, in eps
    largest: float  # the largest |error|, in eps of the largest value


measured = []
QUANTILES = np.linspace(0, 1, 200)


def measure(case, dtype, by, results, wanted, sizes):
    eps = float(jnp.finfo(dtype).eps)
    for tensor, result in results.items():
        error, size = np.asarray(result, np.float64) - wanted[tensor], sizes[tensor]
        assert error.shape == wanted[tensor].shape
        if tensor in ("out", "logsumexp", "max", "sum"):  # fully masked rows: section 7
            rows = np.broadcast_to(case.seen(), (case.B, case.N, case.S))
            rows = rows.transpose(0, 2, 1) if tensor == "out" else rows
            error, size = error[rows], size[rows]
        rms = np.sqrt(np.mean(size**2))
        assert np.isfinite(error).all(), (case.name, dtype, by, tensor)
        distribution = np.quantile(np.abs(error), QUANTILES) / rms / eps
        overall = float(np.sqrt(np.mean(error**2)) / rms / eps)
        largest = float(np.abs(error).max() / size.max() / eps)
        measured.append(Measured(case.name, dtype, by, tensor, distribution, overall, largest))


references = {}
for case in CASES:
    functions = {name: ours(case, name) for name in BACKENDS}
    for dtype in case.dtypes:
        operands, dout = case.arrays(jnp.dtype(dtype))
        wanted, sizes = exact(**operands, visible=case.matrix(), dout=dout)
        references[case.name, dtype] = operands, wanted, sizes  # for section 5
        arrays = jax.tree.map(jnp.asarray, operands)
        measure(case, dtype, "jax.nn", jax_nn(case, arrays, dout), wanted, sizes)
        for name, run in functions.items():
            if name == "cpu" and dtype == "float64":
                continue
            measure(case, dtype, name, run(arrays, dout), wanted, sizes)

if "cpu" in BACKENDS:
    double = x.astype(jnp.float64)
    try:
        jax_fa.flash_attention(double, double, double, implementation="cpu")
    except NotImplementedError as error:
        print("cpu and float64:", str(error).splitlines()[0])
    else:
        raise AssertionError("the native kernels serve float64 now: measure them")
print(f"{len(measured)} tensors measured")

# %% [markdown]
# Now the rule, for each tensor of each case: at most twice the error of `jax.nn` plus 4 eps, both in relative L2 and for
# the largest error relative to the largest value. For float64 the rule is stricter, since `jax.nn` computes its softmax
# in float32: our error is at most 64 eps.

# %%
naive = {(m.case, m.dtype, m.tensor): m for m in measured if m.by == "jax.nn"}
pairs = [(m, naive[m.case, m.dtype, m.tensor]) for m in measured if m.by != "jax.nn"]
for mine, other in pairs:
    assert mine.overall <= 2 * other.overall + FLOOR, (mine.case, mine.dtype, mine.by, mine.tensor)
    assert mine.largest <= 2 * other.largest + FLOOR, (mine.case, mine.dtype, mine.by, mine.tensor)
    assert mine.dtype != "float64" or mine.overall <= 64

print("largest relative L2 error over all cases, in eps of the dtype")
names = ("out", "logsumexp", "query", "key", "value", "bias", "slopes")
print(f"{'':18}" + "".join(f"{name:>11}" for name in names))
for dtype in DTYPES:
    for by in ("jax.nn", *BACKENDS):
        found = [m for m in measured if (m.dtype, m.by) == (dtype, by)]
        worst = [max((m.overall for m in found if m.tensor == name), default=np.nan) for name in names]
        if found:
            print(f"{dtype:9}{by:9}" + "".join(f"{value:11.3g}" for value in worst))

# %% [markdown]
# The same as a figure. Each point is one tensor of one case; left of the line our error is the smaller one. The log-sum-exp
# of the half-precision dtypes is far to the left, because `jax.nn` returns it in the input's dtype and `jax_fa` in float32;
# so is the gradient of ALiBi slopes. (float64 is left out: there the ratios are about 1e-8.)

# %%
rows = [(dtype, name) for dtype in DTYPES[1:] for name in BACKENDS]
spread = np.random.default_rng(0)
fig, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
for place, (dtype, name) in enumerate(rows):
    for marker, of_lse, what in (("o", False, "outputs and gradients"), ("D", True, "log-sum-exp")):
        ratios = [
            a.overall / b.overall
            for a, b in pairs
            if (a.dtype, a.by) == (dtype, name) and (a.tensor == "logsumexp") == of_lse
        ]
        heights = place + spread.uniform(-0.2, 0.2, len(ratios))
        look = {"color": colour(name), "facecolor": "none" if of_lse else colour(name), "alpha": 0.7}
        ax.scatter(ratios, heights, s=22, marker=marker, **look, label=what if place == 0 else None)
ax.axvline(1, color="black", linewidth=1)
ax.set(xscale="log", xlabel="error of jax_fa / error of jax.nn", title="Errors relative to those of jax.nn")
ax.set_yticks(range(len(rows)), [f"{dtype}, {name}" for dtype, name in rows])
ax.invert_yaxis()
ax.legend(loc="center")
plt.show()

# %% [markdown]
# The errors of single elements of the output, over all cases: the height of a curve is the share of elements with at most
# that error. None has a tail of outliers.

# %%
fig, axes = plt.subplots(1, len(DTYPES), figsize=(9, 2.8), layout="constrained", sharey=True)
for ax, dtype in zip(axes, DTYPES, strict=True):
    for by, style in zip(("jax.nn", *BACKENDS), ("-", "--", ":"), strict=False):
        found = [m.distribution for m in measured if (m.dtype, m.by, m.tensor) == (dtype, by, "out")]
        if found:
            values = np.sort(np.concatenate(found))
            share = np.linspace(0, 1, len(values))
            ax.plot(values, share, style, color=colour(by), label=by, linewidth=2)
    ax.set(xscale="log", xlim=(1e-2, 1e10) if dtype == "float64" else (1e-3, 30), title=dtype)
axes[0].set_ylabel("share of elements")
axes[1].legend()
fig.supxlabel("error of an output element, eps")
plt.show()

# %% [markdown]
# ## 5. Softmax statistics
#
# `flash_attention_score`, the function with CANN's arguments, returns the maximum and the sum of each row, in float32 for
# every dtype and in eight equal lanes. `max + log(sum)` is the log-sum-exp. The reference is float64, and the errors are
# compared with those of a float32 softmax over the whole matrix.


# %%
def statistics(case, operands, implementation):
    """(max, sum) of shape (B, N, S), by jax_fa."""
    arguments = {"sparse_mode": 1}
    if case.visible is not True:
        hidden = ~np.broadcast_to(case.visible, (case.B, 1, case.S, case.S))
        arguments["atten_mask"] = jnp.asarray(hidden)
    if case.bias is not None:
        full = jnp.broadcast_to(operands["bias"], (1, case.N, case.S, case.S))
        arguments |= {"pse": full, "pse_type": 0}
    if case.slopes:
        arguments |= {"pse": operands["slopes"], "pse_type": 2}
    call = partial(
        jax_fa.flash_attention_score,
        head_num=case.N,
        input_layout="BSND",
        scale_value=case.D**-0.5,
        implementation=implementation,
        **arguments,
    )
    result = jax.jit(call)(operands["query"], operands["key"], operands["value"])
    lanes = np.stack([result.softmax_max, result.softmax_sum])
    assert lanes.dtype == np.float32 and lanes.shape == (2, case.B, case.N, case.S, 8)
    assert np.all(lanes == lanes[..., :1])
    return {"max": lanes[0, ..., 0], "sum": lanes[1, ..., 0]}


def plain_statistics(case, operands):
    """The same from whole matrices, in float32."""
    q, k = (np.asarray(operands[name], np.float32) for name in ("query", "key"))
    k = np.repeat(k, case.N // case.K, axis=2)
    x = np.matmul(q.transpose(0, 2, 1, 3), k.transpose(0, 2, 3, 1)) * np.float32(case.D**-0.5)
    if case.bias is not None:
        x = x + np.asarray(operands["bias"], np.float32)
    if case.slopes:
        x = x - operands["slopes"][:, None, None] * np.abs(np.arange(case.S) - np.arange(case.S)[:, None])
    x = np.where(case.matrix(), x, -FLT_MAX).astype(np.float32)
    m = x.max(axis=-1)
    return {"max": m, "sum": np.sum(np.exp(x - m[..., None]), axis=-1)}


first = len(measured)
for case in CASES:
    for dtype in case.dtypes:
        if dtype == "float64":
            continue
        operands, wanted, sizes = references[case.name, dtype]
        # In eps of float32, whatever the operands: these are exact, and the statistics are float32.
        measure(case, "float32", "plain", plain_statistics(case, operands), wanted, sizes)
        for name in BACKENDS:
            found = statistics(case, operands, name)
            measure(case, "float32", name, found, wanted, sizes)
            rows = case.seen()
            lse = np.where(rows, found["max"] + np.log(found["sum"]), 0)
            assert np.abs(lse - np.where(rows, wanted["logsumexp"], 0)).max() < 4e-6
            assert np.all(found["max"][~rows] == -np.float32(FLT_MAX))
plain, result = None, []
for m in measured[first:]:
    if m.by == "plain":
        plain = {**(plain or {}), m.tensor: m}
    else:
        result.append((m.tensor, m.by, m.overall, plain[m.tensor].overall))
for tensor in ("max", "sum"):
    for name in BACKENDS:
        mine, other = np.transpose([(a, b) for t, by, a, b in result if (t, by) == (tensor, name)])
        assert np.all(mine <= 2 * other + FLOOR)
        print(f"softmax_{tensor}, {name}: at most {mine.max():.2f} eps of float32 (plain: {other.max():.2f})")

# %% [markdown]
# ## 6. The gradient of the log-sum-exp
#
# The log-sum-exp of `flash_attention` is differentiable. Here are the errors of the gradients for random cotangents `dout`
# of the output and `dlse` of the log-sum-exp, in eps of float32.

# %%
case = CASES[5]
operands, dout = case.arrays(np.float32)
dlse = np.random.default_rng(4).standard_normal((case.B, case.N, case.S)).astype(np.float32)
wanted, sizes = exact(**operands, visible=case.matrix(), dout=dout, dlse=dlse)
without, _ = exact(**operands, visible=case.matrix(), dout=dout)
for name in BACKENDS:

    def attention(query, key, value, name=name):
        return jax_fa.flash_attention(
            query, key, value, mask=case.mask, return_logsumexp=True, implementation=name
        )

    _, pullback = jax.vjp(attention, *operands.values())
    for tensor, gradient in zip(("query", "key", "value"), pullback((dout, dlse)), strict=True):
        error = np.linalg.norm(gradient - wanted[tensor]) / np.linalg.norm(wanted[tensor])
        error /= np.finfo(np.float32).eps
        assert error < 8, (name, tensor, error)
        print(f"{name}: d{tensor} {error:.2f} eps")
assert np.linalg.norm(wanted["query"] - without["query"]) > 0.1 * np.linalg.norm(without["query"])

# %% [markdown]
# ## 7. Different on purpose: fully masked rows
#
# The softmax over an empty set is not defined. For a fully masked row `jax.nn` returns the mean of all values, and each of
# them gets a gradient. `jax_fa` returns 0, gradients of 0 and a log-sum-exp of `-FLT_MAX`.

# %%
empty = np.broadcast_to(j <= i, (1, 1, S, S)).copy()
empty[:, :, 7] = False
q, k, v = (jnp.asarray(y[:1]) for y in list(CASES[0].arrays(np.float32)[0].values()))
row_only = jnp.zeros_like(q).at[:, 7].set(1.0)  # a loss that depends on row 7 alone


def gradients(function):
    out, pullback = jax.vjp(function, q, k, v)
    return out, pullback(row_only)


out, found = gradients(lambda *x: jax.nn.dot_product_attention(*x, mask=jnp.asarray(empty)))
assert jnp.allclose(out[:, 7], v.mean(axis=1), atol=1e-6)
assert jnp.abs(found[2]).min() > 0  # every value gets a gradient from a fully masked row
print(f"jax.nn     : row 7 is {out[0, 7, 0, :3]}, |dvalue| up to {jnp.abs(found[2]).max():.4f}")
for name in BACKENDS:
    call = {"mask": jnp.asarray(empty), "implementation": name}
    out, found = gradients(lambda *x, call=call: jax_fa.dot_product_attention(*x, **call))
    _, lse = jax_fa.flash_attention(q, k, v, return_logsumexp=True, **call)
    assert not out[:, 7].any() and not any(g.any() for g in found)
    assert jnp.all(lse[..., 7] == -np.float32(FLT_MAX))
    assert jnp.isfinite(out).all()
    print(f"jax_fa, {name}: row 7 is {out[0, 7, 0, :3]}, |dvalue| up to {jnp.abs(found[2]).max():.4f}")

# %% [markdown]
# ## 8. Different on purpose: NaN in the padding
#
# Padding may hold anything, and a weight of 0 times NaN is NaN. In `jax_fa` NaN in masked positions does not propagate:
# output and gradients are, bit for bit, those of clean padding. The table counts the NaN in each result.

# %%
lengths = jnp.array([100], jnp.int32)
padding = jnp.arange(S)[None, :, None, None] >= lengths[:, None, None, None]
dirty_k, dirty_v = jnp.where(padding, jnp.nan, k), jnp.where(padding, jnp.inf, v)
clean_k, clean_v = jnp.where(padding, 0, k), jnp.where(padding, 0, v)
dout = jnp.asarray(CASES[0].arrays(np.float32)[1][:1])


def value_and_gradients(function, k, v):
    out, pullback = jax.vjp(lambda *x: function(*x, key_value_seq_lengths=lengths), q, k, v)
    return out, *pullback(dout)


def broken(results):
    return " ".join(f"{int(jnp.isnan(y).sum()):6}" for y in results)


print(f"{'NaN in':12} {'out':>6} {'dquery':>6} {'dkey':>6} {'dvalue':>6}")
found = value_and_gradients(jax.nn.dot_product_attention, dirty_k, dirty_v)
assert jnp.isnan(found[0]).all()
print(f"{'jax.nn':12} {broken(found)}")
for name in BACKENDS:

    def attention(*x, name=name, **arguments):
        return jax_fa.dot_product_attention(*x, **arguments, implementation=name)

    found, clean = (value_and_gradients(attention, *kv) for kv in ((dirty_k, dirty_v), (clean_k, clean_v)))
    assert all(jnp.array_equal(a, b) for a, b in zip(found, clean, strict=True))
    assert not any(jnp.where(padding, y, 0).any() for y in found[2:])
    print(f"{'jax_fa, ' + name:12} {broken(found)}")

# %% [markdown]
# NaN in a visible position propagates, as it should.

# %%
for name in BACKENDS:
    out = jax_fa.dot_product_attention(q, k.at[:, 50].set(jnp.nan), v, is_causal=True, implementation=name)
    hit = jnp.isnan(out).all(axis=(0, 2, 3))
    assert not hit[:50].any() and hit[50:].all()
print("rows before 50 are untouched, rows from 50 on are NaN")
