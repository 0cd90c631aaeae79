# %% [markdown]
# # Porting from Ascend
#
# You will learn how to run code written for `torch_npu.npu_fusion_attention` in JAX: only the name of the module changes, and
# layouts, sparse modes, pse, dropout masks and gradients keep their meaning. You will also see the few differences that
# raise no error.
#
# On Ascend such a call is one call of CANN's `aclnnFlashAttentionScore`. Here the calls run on CPU, through the same C++
# adapter, with an emulator of CANN that the package contains.

# %% [markdown]
# ## The names
#
# A row is one argument under its names in three libraries.
#
# | `torch_npu` and `jax_fa.npu_fusion_attention` | MindSpore, `ops.flash_attention_score` | `jax_fa.flash_attention_score` |
# |---|---|---|
# | `query`, `key`, `value`, `head_num`, `input_layout` | the same | the same, the last two by keyword |
# | `pse` (v2: `pse_type`) | `real_shift` | `pse`, `pse_type` |
# | `atten_mask`: 1 = masked; without it no sparse mode | `attn_mask` | `atten_mask`; modes hold without it too |
# | `scale` | `scalar_value` | `scale_value` |
# | `keep_prob`, `dropout_mask`; here also `dropout_key` | `keep_prob`, `drop_mask` | `keep_prob`, `drop_mask` |
# | `pre_tockens`, `next_tockens` (v2: `pre_tokens`, ...) | `pre_tokens`, `next_tokens` | `pre_tokens`, `next_tokens` |
# | `inner_precise`, `prefix`, `sparse_mode` | the same | the same |
# | `actual_seq_qlen`, `actual_seq_kvlen` | the same | the same |
# | `sink`; v2: `query_rope`, `key_rope`, `q_start_idx`, `kv_start_idx` | – | the same |
# | `padding_mask`, `gen_mask_parallel`, `sync`, `seed`, `offset` | `padding_mask` | – (ignored on the left) |
# | results: attention, max, sum, empty, seed, offset, numels | attention | max, sum, attention |

# %%
import ctypes
import inspect
import json
import os
import warnings
from types import SimpleNamespace

# Many small programs follow, and compiling them is nearly all that takes time.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

import jax_fa

os.environ["JAX_FA_CANN_EMULATOR"] = jax_fa.ascend.emulator_dir()  # before the first call
library = jax_fa.ascend.library()
assert library.error is None and library.emulator
print("CANN's functions here:", *library.functions, sep="\n  ")

INFINITE = 2147483647
FLT_MAX = np.finfo(np.float32).max
C = np.triu(np.ones((2048, 2048), bool), 1)  # the compressed mask of CANN's causal and band modes

emulator = ctypes.CDLL(library.runtime)
emulator.jaxFaEmulatorLog.restype = ctypes.c_char_p


def asked():
    """The calls that the emulator has received since the last time."""
    calls = json.loads(emulator.jaxFaEmulatorLog())
    emulator.jaxFaEmulatorReset()
    return calls


# %% [markdown]
# ## 1. A training step
#
# This is the attention of a decoder as it is written for torch_npu: layout BSH, four query heads and two key heads, dropout,
# a causal mask in sparse mode 2. Two arguments are new. `implementation` asks for the emulated device by name; without it,
# the best backend of the platform is taken. `dropout_key` is needed because JAX has no global random generator.

# %%
torch_npu = jax_fa
B, S, N, K, D = 2, 64, 4, 2, 16
keys = jax.random.split(jax.random.key(0), 5)
query = jax.random.normal(keys[0], (B, S, N * D))
key, value = (jax.random.normal(one, (B, S, K * D)) for one in keys[1:3])
target = jax.random.normal(keys[3], (B, S, N * D))


def attend_in_training(query, key, value, dropout_key):
    return torch_npu.npu_fusion_attention(
        query, key, value, N, "BSH",
        pse=None,
        padding_mask=None,
        atten_mask=C,
        scale=D**-0.5,
        keep_prob=0.9,
        pre_tockens=65536,
        next_tockens=0,
        inner_precise=0,
        sparse_mode=2,
        dropout_key=dropout_key,
        implementation="ascend",
    )[0]  # fmt: skip


def loss(arrays, dropout_key):
    return jnp.mean(jnp.square(attend_in_training(*arrays, dropout_key) - target))


@jax.jit
def step(arrays, dropout_key):
    value, gradients = jax.value_and_grad(loss)(arrays, dropout_key)
    return value, [x - 50 * g for x, g in zip(arrays, gradients, strict=True)]


arrays, losses = [query, key, value], []
for dropout_key in jax.random.split(keys[4], 8):
    value_now, arrays = step(arrays, dropout_key)
    losses.append(float(value_now))
jax.block_until_ready(arrays)
calls = asked()
assert len(calls) == 16 and losses[-1] < losses[0]
for call in calls[:2]:
    told = {name: call[name] for name in ("inputLayout", "headNum", "sparseMode", "keepProb")}
    print(
        call["function"],
        *(f"{name}={x}" for name, x in told.items()),
        "attenMask",
        call["tensors"]["attenMask"]["shape"],
    )
print("losses:", *(f"{x:.3f}" for x in losses))


def score(*args, **kwargs):
    """npu_fusion_attention on the emulated device."""
    result = jax_fa.npu_fusion_attention(*args, **kwargs, implementation="ascend")
    return jax.block_until_ready(result)


# %% [markdown]
# ## 2. A stand-in for torch_npu
#
# torch_npu needs an Ascend device, so here is a stand-in: its arguments and its seven results, in NumPy and float64, written
# from its documentation and public sources. It is the reference for everything below and shares no code with `jax_fa`. The
# next two cells are long; skip them if you only want to see the calls.
#
# First the masks and the formula, for one sequence.


# %%
def visible_keys(mode, sq, skv, mask, pre, following, prefix, first, last):
    """Which keys are visible to each row: the table of sparse modes; d is Skv - Sq."""
    i, j, d = np.arange(sq)[:, None], np.arange(skv), skv - sq
    if mask is None:  # then CANN ignores the mode
        return np.ones((sq, skv), bool)
    # The caller's mask, in modes 0, 1 and 5; with TND it is as large as the longest sequence needs.
    own = np.asarray(mask)[..., :sq, :skv] == 0
    return {
        0: lambda: own & (i - pre <= j) & (j <= i + following),
        1: lambda: own,
        2: lambda: j <= i + 0 * d,
        3: lambda: j <= i + d,
        4: lambda: (i + d - pre <= j) & (j <= i + d + following),
        5: lambda: own & ((j <= i + d) | (j < prefix)),
        6: lambda: (j <= i + d) | (j < prefix),
        7: lambda: j <= i + d + (following if last else 0),
        8: lambda: j <= i + (d + following if first else 0),
    }[mode]()


def attend(q, k, v, visible, pse, pse_type, scale, weight, dy):
    """out, max, sum, dq, dk, dv and the logits' gradient of one sequence; q (N, sq, D), k (K, skv, D), v (K, skv, Dv)."""
    group = len(q) // len(k)
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    s = q @ k.swapaxes(1, 2)
    away = np.abs(np.arange(s.shape[2]) - np.arange(s.shape[1])[:, None])
    if pse is None:
        x = s * scale
    elif pse_type in (0, 1):
        x = s * scale + pse if pse_type == 0 else (s + pse) * scale
    else:
        x = s * scale - pse[:, None, None] * (away if pse_type == 2 else np.sqrt(away))
    m = np.max(x, axis=-1, where=visible, initial=-FLT_MAX)
    e = np.where(visible, np.exp(np.where(visible, x - m[..., None], 0)), 0)
    l = np.where(e.sum(axis=-1) == 0, FLT_MAX, e.sum(axis=-1))  # FLT_MAX marks a fully masked row
    p = e / l[..., None]
    out = (weight * p) @ v
    dy = np.zeros_like(out) if dy is None else dy
    dp = weight * (dy @ v.swapaxes(1, 2))
    ds = p * (dp - np.sum(dy * out, axis=-1, keepdims=True))
    by_query_head = scale * ds.swapaxes(1, 2) @ q, (weight * p).swapaxes(1, 2) @ dy
    dk, dv = (g.reshape(-1, group, *g.shape[1:]).sum(axis=1) for g in by_query_head)
    return out, m, l, scale * ds @ k, dk, dv, ds


# %% [markdown]
# Then the layouts, and the whole call. A layout is the order in which elements are stored. (`pse_type` is an argument of
# `npu_fusion_attention_v2`. `keep`, an array of zeros and ones, stands for the dropout mask that torch_npu draws.)


# %%
def split(x, layout, heads, ends):
    """The sequences of a stored array, each (heads, S, D)."""
    x = np.asarray(x, np.float64)
    if layout == "TND":
        return [part.swapaxes(0, 1) for part in np.split(x, ends[:-1])]
    x = x.swapaxes(0, 1) if layout == "SBH" else x
    x = x.reshape(*x.shape[:2], heads, -1) if layout in ("BSH", "SBH") else x
    return list(x if layout == "BNSD" else x.swapaxes(1, 2))


def join(parts, layout):
    """The stored array of sequences (heads, S, D)."""
    if layout == "TND":
        return np.concatenate([part.swapaxes(0, 1) for part in parts])
    x = np.stack(parts)
    x = x if layout == "BNSD" else x.swapaxes(1, 2)
    x = x.reshape(*x.shape[:2], -1) if layout in ("BSH", "SBH") else x
    return x.swapaxes(0, 1) if layout == "SBH" else x


def run(query, key, value, head_num, input_layout, pse=None, atten_mask=None, scale=1.0, keep_prob=1.0,
        pre_tockens=INFINITE, next_tockens=INFINITE, prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None,
        sparse_mode=0, pse_type=1, keep=None, dy=None):  # fmt: skip
    """The results of `attend` for every sequence."""
    layout, N, ends = input_layout, head_num, (actual_seq_qlen, actual_seq_kvlen)
    K = {"BNSD": 1, "BSND": 2, "TND": 1}.get(layout)
    K = key.shape[-1] * N // query.shape[-1] if K is None else key.shape[K]
    q = split(query, layout, N, ends[0])
    k, v = (split(x, layout, K, ends[1]) for x in (key, value))
    dy = [None] * len(q) if dy is None else split(dy, layout, N, ends[0])
    found, bits = [], None if keep is None else np.ravel(keep)
    for b in range(len(q)):
        sq, skv = q[b].shape[1], k[b].shape[1]
        mask, shift, weight = atten_mask, pse, 1.0
        if np.ndim(mask) == 4:
            mask = mask[b % len(mask)]
        if np.ndim(shift) in (2, 4):
            shift = shift[b % len(shift)]
        if keep is not None:
            weight, bits = np.split(bits, [N * sq * skv])
            weight = weight.reshape(N, sq, skv) / keep_prob
        band = pre_tockens, next_tockens, None if prefix is None else prefix[b]
        visible = visible_keys(sparse_mode, sq, skv, mask, *band, b == 0, b == len(q) - 1)
        shift = None if shift is None else np.asarray(shift, np.float64)
        found.append(attend(q[b], k[b], v[b], visible, shift, pse_type, scale, weight, dy[b]))
    return list(zip(*found, strict=True))


def npu_fusion_attention(query, key, value, head_num, input_layout, padding_mask=None, inner_precise=0,
                         gen_mask_parallel=True, sync=False, **more):  # fmt: skip
    out, *statistics = run(query, key, value, head_num, input_layout, **more)[:3]
    # Eight equal lanes each. TND: shape (T, N, 8), but in memory sequence after sequence of (N, S, 8).
    if input_layout == "TND":
        m, l = (np.concatenate([part.reshape(-1, head_num) for part in x]) for x in statistics)
    else:
        m, l = (np.stack(x) for x in statistics)
    m, l = (np.repeat(x[..., None], 8, axis=-1) for x in (m, l))
    return join(out, input_layout), m, l, np.zeros(0), 0, 0, 0


def npu_fusion_attention_grad(query, key, value, dy, head_num, input_layout, **more):
    """The function that autograd calls in torch_npu: dq, dk, dv, and no gradient of pse."""
    gradients = run(query, key, value, head_num, input_layout, dy=dy, **more)[3:6]
    return *(join(x, input_layout) for x in gradients), np.zeros(0)


torch_npu = SimpleNamespace(
    npu_fusion_attention=npu_fusion_attention, npu_fusion_attention_grad=npu_fusion_attention_grad
)


def close(ours, theirs, tolerance=2e-6):
    """Asserts equality up to `tolerance`, relative to the largest value; returns the difference."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    np.testing.assert_array_equal(np.abs(ours) == FLT_MAX, np.abs(theirs) == FLT_MAX)
    ours, theirs = (np.where(np.abs(x) == FLT_MAX, np.sign(x), x) for x in (ours, theirs))
    off = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
    assert off < tolerance, off
    return off


# %% [markdown]
# The schema of torch_npu and our signature have the same names in the same positions, with the same defaults.

# %%
SCHEMA = """Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None,
Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., int pre_tockens=2147483647,
int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, int[]? actual_seq_qlen=None,
int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False, str softmax_layout="",
Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, int offset=0"""
theirs = [part.split()[-1].partition("=")[::2] for part in SCHEMA.split(",")]
ours = list(inspect.signature(jax_fa.npu_fusion_attention).parameters.values())
for (name, default), parameter in zip(theirs, ours, strict=False):
    assert parameter.name == name and (not default or parameter.default == eval(default)), name
print("by keyword only:", *(x.name for x in ours[len(theirs) :]))


def port(call):
    """The keywords of a call; keep bits (section 6) as CANN has them."""
    call = dict(call)
    if "keep" in call:
        call["dropout_mask"] = np.packbits(np.ravel(call.pop("keep")), bitorder="little")
    return call


# %% [markdown]
# ## 3. A first call, and every layout
#
# The arrays have two batch entries, 24 rows, 32 keys, 4 query heads, 2 key heads, and values narrower than keys. The mask is
# causal, from the bottom right corner. The same call is made with the stand-in and with `jax_fa`.

# %%
B, SQ, SKV, N, K, D, DV = 2, 24, 32, 4, 2, 16, 8
SCALE = D**-0.5
random = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(random.standard_normal(shape), jnp.float32)


def fold(x):
    return x.reshape(*x.shape[:2], -1)  # BSND to BSH


q, k, v = normal(B, SQ, N, D), normal(B, SKV, K, D), normal(B, SKV, K, DV)
folded = [fold(x) for x in (q, k, v)]

attention_out, softmax_max, softmax_sum, *_ = torch_npu.npu_fusion_attention(
    *folded, N, "BSH", atten_mask=C, scale=SCALE, sparse_mode=3
)
ours = jax_fa.npu_fusion_attention(
    *folded, N, "BSH", atten_mask=C, scale=SCALE, sparse_mode=3, implementation="ascend"
)

for mine, other in zip(ours, (attention_out, softmax_max, softmax_sum), strict=False):
    close(mine, other)
assert ours.softmax_max.shape == ours.softmax_sum.shape == (B, N, SQ, 8)
assert np.all(ours.softmax_max == ours.softmax_max[..., :1])  # eight equal lanes, as CANN has them
(call,) = asked()
assert call["function"].startswith("aclnnFlashAttentionScore") and call["sparseMode"] == 3
print(*(f"{name}: {call[name]}" for name in ("function", "inputLayout", "headNum", "sparseMode")), sep="\n")
print("attenMask:", call["tensors"]["attenMask"]["shape"])

# %% [markdown]
# (BSH is passed to CANN as BSND, which is the same memory.)
#
# From here on `both` makes the two calls and compares them. Here are all five layouts, and three dtypes for one of them. With
# TND every entry of the batch is a packed sequence.


# %%
def both(*operands, tolerance=2e-6, **call):
    """Our result on the emulated device, which must be that of the stand-in: output, maximum and sum."""
    theirs = torch_npu.npu_fusion_attention(*operands, **call)
    ours = score(*operands, **port(call))
    for mine, other, off in zip(ours[:3], theirs[:3], (tolerance, 2e-6, 2e-6), strict=True):
        close(mine, other, off)
    return ours


STORE = {
    "BSH": fold,
    "SBH": lambda x: fold(x).swapaxes(0, 1),
    "BSND": lambda x: x,
    "BNSD": lambda x: x.swapaxes(1, 2),
    "TND": lambda x: x.reshape(-1, *x.shape[2:]),
}
for layout, store in STORE.items():
    ends = {"actual_seq_qlen": (SQ, 2 * SQ), "actual_seq_kvlen": (SKV, 2 * SKV)} if layout == "TND" else {}
    dtypes = {"float32": 2e-6} | ({"bfloat16": 2e-2, "float16": 2e-3} if layout == "BSH" else {})
    for dtype, tolerance in dtypes.items():
        x = [store(y.astype(dtype)) for y in (q, k, v)]
        call = {"head_num": N, "input_layout": layout, "scale": SCALE, "atten_mask": C, "sparse_mode": 3}
        both(*x, **call, **ends, tolerance=tolerance)
        print(f"{layout:5}{dtype:9} {{function}} as {{inputLayout}}".format(**asked()[-1]))

# Sequences of 5, 0 and 19 rows and 9, 4 and 19 keys. The ends are cumulative, without a leading 0.
RAGGED = {"actual_seq_qlen": [5, 5, 24], "actual_seq_kvlen": [9, 13, 32]}
tnd = {"head_num": N, "input_layout": "TND", "scale": SCALE, **RAGGED}
ours = both(q[0], k[0], v[0], **tnd, atten_mask=C, sparse_mode=3)
assert ours.softmax_max.shape == (SQ, N, 8)

# %% [markdown]
# The statistics of TND have the shape `[T, N, 8]`, but torch_npu stores them sequence after sequence, each as `[N, Sq_b, 8]`.
# So does `jax_fa` by default. With `softmax_layout="TND"` they are stored row by row.

# %%
by_row = score(q[0], k[0], v[0], **tnd, atten_mask=C, sparse_mode=3, softmax_layout="TND")
blocks = np.split(np.asarray(by_row.softmax_max), RAGGED["actual_seq_qlen"][:-1])
close(np.concatenate([x.swapaxes(0, 1).reshape(x.shape) for x in blocks]), ours.softmax_max)
_ = asked()

# %% [markdown]
# ## 4. Sparse modes
#
# Every mode runs here, with the mask that it needs. With a query of 0 all visible keys have the same weight, and with the
# identity as values the output is the weights, so the output shows the visible keys. It is compared with `visible_keys`
# above. The table lists the mode and the mask that CANN was called with.

# %%
lengths = (6, 8, 10), (9, 10, 13)  # three packed sequences: rows, keys
ends = {"actual_seq_qlen": np.cumsum(lengths[0]).tolist(), "actual_seq_kvlen": np.cumsum(lengths[1]).tolist()}
i, j = np.arange(SQ)[:, None], np.arange(SKV)
own = (i // 4 + j // 4) % 3 == 1
outside_band = (j < i - 10) | (j > i + 4)
outside_prefix = ((j > i + SKV - SQ) & (j >= 20))[None, None]
PREFIX_C = np.concatenate([C, np.tile(np.arange(2048) >= 1024, (1024, 1))])  # 3072 x 2048
MODES = [
    (0, "default, pre 10, next 4", {"atten_mask": outside_band, "pre_tockens": 10, "next_tockens": 4}),
    (1, "the mask alone", {"atten_mask": own}),
    (2, "causal, top left", {"atten_mask": C}),
    (3, "causal, bottom right", {"atten_mask": C}),
    (4, "band, pre 9, next 2", {"atten_mask": C, "pre_tockens": 9, "next_tockens": 2}),
    (5, "prefix 20, full mask", {"atten_mask": outside_prefix, "prefix": [20]}),
    (6, "prefix 20, compressed", {"atten_mask": PREFIX_C, "prefix": [20]}),
    (7, "TND, last: next -2", {"atten_mask": C, "next_tockens": -2, **ends}),
    (8, "TND, first: next 1", {"atten_mask": C, "next_tockens": 1, **ends}),
]
eye = [np.zeros((1, SQ, 1, SKV)), np.zeros((1, SKV, 1, SKV)), np.eye(SKV)[None, :, None]]
eye = [jnp.asarray(x, jnp.float32) for x in eye]

visible = {}
for mode, title, arguments in MODES:
    layout = "TND" if mode > 6 else "BSND"
    probe = [x[0] for x in eye] if layout == "TND" else eye
    arguments = {"head_num": 1, "input_layout": layout, "sparse_mode": mode, **arguments}
    out = both(*probe, **arguments).attention
    call = asked()[-1]
    assert call["sparseMode"] == mode
    shape = "x".join(map(str, call["tensors"]["attenMask"]["shape"]))
    print(f"{title:24} mode {call['sparseMode']}, mask {shape}")
    visible[f"{mode}: {title}"] = np.reshape(out, (SQ, SKV)) > 0


# %%
def show(titles, shape, height):
    """One panel per mode: rows run down, keys to the right, blue is visible."""
    fig, axes = plt.subplots(*shape, figsize=(9, height), layout="constrained", sharex=True, sharey=True)
    for ax, title in zip(axes.flat, titles, strict=True):
        ax.imshow(visible[title], cmap=BLUE, extent=(0, SKV, SQ, 0), aspect="auto")
        ax.set(xticks=range(0, SKV + 1, 8), yticks=range(0, SQ + 1, 8))
        ax.set_title(title, fontsize=10)
    fig.supxlabel("key")
    fig.supylabel("row")
    return axes.flat


BLUE = ListedColormap(["#ececec", "#24608f"])
show(list(visible)[:6], (2, 3), 4.6)
plt.show()

# %% [markdown]
# Mode 6 takes its prefix from a compressed mask of 3072 x 2048, and equals mode 5 here. Modes 7 and 8 are for packed
# sequences, three in this call, whose blocks are outlined: every sequence is causal, and the diagonal of the last one
# (mode 7) or of the first one (mode 8) is moved.

# %%
assert np.array_equal(visible["5: prefix 20, full mask"], visible["6: prefix 20, compressed"])
for ax in show(list(visible)[7:], (1, 2), 3.2):
    corners = [[0, *end] for end in ends.values()]
    for top, bottom, left, right in zip(corners[0], corners[0][1:], corners[1], corners[1][1:], strict=False):
        box = (left, top), right - left, bottom - top
        ax.add_patch(plt.Rectangle(*box, fill=False, edgecolor="#b35a00", linewidth=2.5, clip_on=False))
plt.show()

# %% [markdown]
# CANN ignores a sparse mode without its mask, and so does `npu_fusion_attention`. `flash_attention_score` applies the mode
# all the same, and warns about it once, so there the compressed mask may be left out.

# %%
bsnd = {"head_num": N, "input_layout": "BSND", "scale": SCALE}
every_key = torch_npu.npu_fusion_attention(q, k, v, **bsnd)[0]
close(score(q, k, v, **bsnd, sparse_mode=3).attention, every_key)
applied = {"head_num": N, "input_layout": "BSND", "scale_value": SCALE, "sparse_mode": 3}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    without = jax_fa.flash_attention_score(q, k, v, **applied)
close(without.attention_out, score(q, k, v, **bsnd, atten_mask=C, sparse_mode=3).attention)

# %% [markdown]
# A fully masked row, as in mode 3 with more rows than keys, is 0. Its statistics are those of CANN, a maximum of `-FLT_MAX`
# and a sum of `+FLT_MAX`. This holds for every `inner_precise`: CANN is called with `inner_precise=2`, without which such a
# row may be a mean of values. `max + log(sum)` is the log-sum-exp, `-FLT_MAX` for such rows.

# %%
tall = jnp.concatenate([q, q], axis=1)  # 48 rows, 32 keys: rows 0 to 15 are fully masked
ours = both(tall, k, v, **bsnd, atten_mask=C, sparse_mode=3)
assert asked()[-1]["innerPrecise"] == 2
assert not ours.attention[:, :16].any()
assert np.all(ours.softmax_max[:, :, :16] == -FLT_MAX) and np.all(ours.softmax_sum[:, :, :16] == FLT_MAX)
mask = jax_fa.masks.Causal("bottom-right")
_, logsumexp = jax_fa.flash_attention(tall, k, v, mask=mask, scale=SCALE, return_logsumexp=True)
close((ours.softmax_max + np.log(ours.softmax_sum))[..., 0], logsumexp)

# %% [markdown]
# ## 5. pse
#
# `pse` (position shift encoding) changes the logits before the softmax. `s` is the product of query and key.
#
# | `pse_type` | logits | `pse` |
# |---|---|---|
# | 0 | `scale * s + pse` | query's dtype, `[B or 1, N, Sq or 1, Skv]` |
# | 1, the default and v1's only one | `scale * (s + pse)`: **pse is scaled too** | the same |
# | 2 | `scale * s - slope * abs(j - i)` | float32 slopes, `[N]` or `[B, N]`; Sq = Skv |
# | 3 | `scale * s - slope * sqrt(abs(j - i))` | the same |

# %%
full = normal(B, N, SQ, SKV)
slopes = jnp.asarray(2.0 ** -np.arange(1, N + 1), jnp.float32)
PSE = [(0, full), (1, full), (1, full[:1, :, :1]), (2, slopes), (3, jnp.stack([slopes, -slopes]))]
for pse_type, pse in PSE:
    keys = SQ if pse_type > 1 else SKV
    both(q, k[:, :keys], v[:, :keys], **bsnd, pse=pse, pse_type=pse_type)
    assert asked()[-1]["pseType"] == pse_type
    print(f"pse_type {pse_type}, pse {list(pse.shape)}: as in float64")

# The compressed form: the last 1024 rows of a pse that depends on row - column only, under a causal mask.
S = 1100
x = [normal(1, S, 1, 8) for _ in range(3)]
one = {"head_num": 1, "input_layout": "BSND", "sparse_mode": 2}
whole = jnp.asarray(-np.abs(np.arange(S) - np.arange(S)[:, None])[None, None] / 64, jnp.float32)
out = torch_npu.npu_fusion_attention(*x, **one, pse=whole, atten_mask=C)[0]
close(score(*x, **one, pse=whole[:, :, -1024:], atten_mask=C).attention, out)

# %% [markdown]
# The figure shows the term that each type adds to the logits, measured as in section 4. Types 0 and 1 have the same matrix
# and a scale of 1/4; the slopes are 1/4 in type 2 and 1 in type 3.

# %%
eye[0] = jnp.zeros_like(eye[1])  # as many rows as keys
away = np.abs(np.arange(SKV) - np.arange(SKV)[:, None])
matrix = 4 * np.cos(np.arange(SKV) / 3 - np.arange(SKV)[:, None] / 5)
fig, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
ADDED = [
    ("0: pse", matrix[None, None], matrix),
    ("1: scale * pse", matrix[None, None], matrix / 4),
    ("2: -slope * |j - i|", [0.25], -away / 4),
    (r"3: -slope * $\sqrt{|j - i|}$", [1.0], -np.sqrt(away)),
]
for pse_type, (title, pse, wanted) in enumerate(ADDED):
    pse = jnp.asarray(pse, jnp.float32)
    result = both(*eye, head_num=1, input_layout="BSND", scale=0.25, pse=pse, pse_type=pse_type)
    weights, m, l = (np.asarray(x)[0] for x in result[:3])
    added = np.log(weights[:, 0]) + m[0, :, :1] + np.log(l[0, :, :1])
    close(added, wanted, 1e-5)
    picture = axes[pse_type].imshow(added, cmap="RdBu_r", vmin=-8, vmax=8)
    axes[pse_type].set(xticks=[], yticks=[], xlabel="key")
    axes[pse_type].set_title(title, fontsize=10)
axes[0].set_ylabel("row")
fig.colorbar(picture, ax=axes, shrink=0.8, label="added to the logit")
plt.show()

# %% [markdown]
# ## 6. Dropout
#
# torch_npu draws a mask inside the call, from the generator of the device. Here the bits come from a `dropout_key`, or from a
# `dropout_mask` in the format of CANN:
#
# - one bit per weight, 1 = keep, in the order `[B, N, Sq, Skv]`, without padding of rows;
# - the **least significant bit of a byte first**;
# - for TND, blocks `[N, Sq_b, Skv_b]` one after another;
# - bytes past the end are not read, so a mask that torch_npu drew, rounded up to 16 bytes, can be passed as it is.

# %%
KEEP = 0.75
keep = random.random((B, N, SQ, SKV)) < KEEP
drop_mask = np.packbits(keep.reshape(-1), bitorder="little")
assert len(drop_mask) == B * N * SQ * SKV // 8

out, _, softmax_sum, *_ = torch_npu.npu_fusion_attention(q, k, v, **bsnd, keep_prob=KEEP, keep=keep)
dropping = bsnd | {"keep_prob": KEEP}
ours = score(q, k, v, **dropping, dropout_mask=drop_mask)
close(ours.attention, out)
close(ours.softmax_sum, softmax_sum)  # taken before dropout
longer = np.concatenate([drop_mask, np.zeros(16, np.uint8)])
assert np.array_equal(score(q, k, v, **dropping, dropout_mask=longer).attention, ours.attention)
wrong = np.packbits(keep.reshape(-1))  # NumPy's default order is the other one
assert np.abs(score(q, k, v, **dropping, dropout_mask=wrong).attention - out).max() > 0.1

# Packed sequences: the bits of one block follow those of the block before, inside a byte too.
blocks = [keep[0, :, :sq, :skv].reshape(-1) for sq, skv in ((5, 9), (0, 4), (19, 19))]
assert len(blocks[0]) % 8
_ = both(q[0], k[0], v[0], **tnd, keep_prob=KEEP, keep=np.concatenate(blocks))

# %% [markdown]
# `jax_fa.dropout_mask` draws such a mask from a JAX key. The same key as `dropout_key` has the same bits, here and in
# `flash_attention`, so a port can begin with an explicit mask and end without one. (Most backends draw the bits tile by tile
# and never store them. On Ascend they are stored, since CANN reads them from memory.)

# %%
key = jax.random.key(7)
drawn = jax_fa.dropout_mask(key, 1 - KEEP, (B, N, SQ, SKV))
bits = np.unpackbits(np.asarray(drawn), bitorder="little").reshape(B, N, SQ, SKV)
out = both(q, k, v, **bsnd, keep_prob=KEEP, keep=bits).attention
close(score(q, k, v, **dropping, dropout_key=key).attention, out)
for name in ("ascend", "xla"):
    rate = {"dropout_rate": 1 - KEEP, "dropout_key": key}
    close(jax_fa.flash_attention(q, k, v, scale=SCALE, **rate, implementation=name), out)


# %% [markdown]
# The order of the bits as a figure: the first four rows of the mask, where 1 keeps a weight, and their bytes in hexadecimal.
# The byte 0x6f is 0110 1111 in binary, and its bits are stored from the right.

# %%
fig, ax = plt.subplots(figsize=(9, 2.5), layout="constrained")
ax.imshow(bits[0, 0, :4], cmap=ListedColormap(["#ececec", "#b9d5ea"]), extent=(0, SKV, 4, 0), aspect="auto")
for row, column in np.ndindex(4, SKV):
    ax.text(column + 0.5, row + 0.68, bits[0, 0, row, column], ha="center", va="center", fontsize=8)
for row, byte in np.ndindex(4, SKV // 8):
    text = f"0x{int(drawn[SKV // 8 * row + byte]):02x}"
    ax.text(8 * byte + 4, row + 0.28, text, ha="center", va="center", fontsize=10, weight="bold")
ax.vlines(range(8, SKV, 8), 0, 4, color="black", linewidth=1.5)
ax.hlines(range(1, 4), 0, SKV, color="black", linewidth=0.8)
ax.set(xlabel="key", ylabel="row", xticks=range(0, SKV + 1, 8), yticks=np.arange(4) + 0.5)
ax.set_yticklabels(range(4))
plt.show()
_ = asked()

# %% [markdown]
# ## 7. Gradients and jit
#
# In torch_npu `out.backward(dy)` calls `npu_fusion_attention_grad` with the saved maximum, sum and output. In JAX the
# function is differentiated by `jax.grad`, inside `jit` or not, and the backward is CANN's `aclnnFlashAttentionScoreGrad`.
# Here `pse` has a gradient too. CANN does not compute it, so it comes from plain JAX.

# %%
dy = normal(B, SQ, N, DV)
call = {**bsnd, "atten_mask": C, "sparse_mode": 3, "pse_type": 0, "keep_prob": KEEP, "keep": keep}


def score_along_dy(q, k, v, pse, implementation="ascend"):
    result = jax_fa.npu_fusion_attention(q, k, v, pse=pse, **port(call), implementation=implementation)
    return jnp.sum(result.attention * dy)


gradient = jax.grad(score_along_dy, argnums=(0, 1, 2, 3))
ours = jax.block_until_ready(jax.jit(gradient)(q, k, v, full))
functions = [call["function"] for call in asked()]
print(*functions)
assert len(functions) == 2 and functions[1].startswith("aclnnFlashAttentionScoreGrad")
theirs = torch_npu.npu_fusion_attention_grad(q, k, v, dy, **call, pse=full)
for name, mine, float64, xla in zip("qkv", ours, theirs, gradient(q, k, v, full, "xla"), strict=False):
    print(f"d{name}: off by {close(mine, float64):.0e} from float64, by {close(mine, xla):.0e} from xla")
float64 = np.stack(run(q, k, v, **call, pse=full, dy=dy)[6])
print(f"dpse: off by {close(ours[3], float64):.0e} from float64")


def moved(h):
    """The loss of the stand-in, a step along the gradient of all four."""
    x = [np.asarray(y, np.float64) + h * np.asarray(g) for y, g in zip((q, k, v, full), ours, strict=True)]
    return np.sum(torch_npu.npu_fusion_attention(*x[:3], **call, pse=x[3])[0] * np.asarray(dy))


quotient = (moved(1e-5) - moved(-1e-5)) / 2e-5
norm = sum(np.sum(np.square(g, dtype=np.float64)) for g in ours)
assert abs(quotient / norm - 1) < 1e-5
print(f"|gradient|^2 = {norm:.4f}, difference quotient along it {quotient:.4f}")

# %% [markdown]
# ## 8. A context-parallel ring
#
# Four devices hold a quarter of the sequence each, and pass keys and values around. In step `r`, device `d` attends to the
# block of device `d - r`: to its own with causal mode 3, to earlier ones without a mask, to later ones not at all. Outputs
# are merged by maximum and sum.
#
# The backward is a second loop, which calls `npu_fusion_attention_grad` for each block, with the merged statistics and
# output. Both loops are as in public code for torch_npu, but the devices are simulated here.

# %%
DEVICES = 4
q4, k4, v4, dy4 = (normal(2, N, 64, D) for _ in range(4))
parts = [[np.split(x, DEVICES, axis=2) for x in (q4, k4, v4, dy4)]][0]
bnsd = {"head_num": N, "input_layout": "BNSD", "implementation": "ascend"}


def block_of(device, step):
    """The block that a device attends to in a step, and the options of the call; None: nothing is visible."""
    source = device - step
    if source < 0:
        return None
    return source, {"atten_mask": C, "sparse_mode": 3} if step == 0 else {
        "atten_mask": None,
        "sparse_mode": 0,
    }


def update(state, part):
    """Merges the result of one more block."""
    if state is None:
        return part
    (out_a, max_a, sum_a), (out_b, max_b, sum_b) = state, part
    top = jnp.maximum(max_a, max_b)
    a, b = sum_a * jnp.exp(max_a - top), sum_b * jnp.exp(max_b - top)
    weight = (a / (a + b))[..., :1]
    return out_a * weight + out_b * (1 - weight), top, a + b


states, gradients = [None] * DEVICES, [[0.0] * DEVICES for _ in range(3)]
for device, step in np.ndindex(DEVICES, DEVICES):
    if (found := block_of(device, step)) is None:
        continue
    source, options = found
    part = jax_fa.npu_fusion_attention(
        parts[0][device], parts[1][source], parts[2][source], scale=SCALE, **options, **bnsd
    )
    states[device] = update(states[device], part[:3])
for device, step in np.ndindex(DEVICES, DEVICES):
    if (found := block_of(device, step)) is None:
        continue
    source, options = found
    attention, softmax_max, softmax_sum = states[device]
    dq, dk, dv, *_ = jax_fa.npu_fusion_attention_grad(
        parts[0][device], parts[1][source], parts[2][source], parts[3][device], softmax_max=softmax_max,
        softmax_sum=softmax_sum, attention_in=attention, scale_value=SCALE, **options, **bnsd,
    )  # fmt: skip
    for total, at, part in zip(gradients, (device, source, source), (dq, dk, dv), strict=True):
        total[at] += part

call = {"head_num": N, "input_layout": "BNSD", "atten_mask": C, "scale": SCALE, "sparse_mode": 2}
whole = torch_npu.npu_fusion_attention(q4, k4, v4, **call)
for i, name in enumerate(("attention", "softmax_max", "softmax_sum")):
    print(f"{name}: off by {close(np.concatenate([x[i] for x in states], axis=2), whole[i]):.0e}")
theirs = torch_npu.npu_fusion_attention_grad(q4, k4, v4, dy4, **call)
for name, mine, other in zip("qkv", gradients, theirs, strict=False):
    print(f"d{name}: off by {close(np.concatenate(mine, axis=2), other):.0e}")
functions = [call["function"] for call in asked()]
print(len(functions), "calls:", *sorted(set(functions)))

# %% [markdown]
# In JAX the second loop is not needed. Maximum and sum are differentiable, so `jax.grad` of the merged output is right. (On
# several devices, `jax.grad` through `shard_map` and `ppermute` also passes the gradients back around the ring.)


# %%
def merged(q, k, v):
    """Two blocks of keys, without a mask."""
    parts = [
        jax_fa.npu_fusion_attention(q, k[:, :, at], v[:, :, at], scale=SCALE, **bnsd)[:3]
        for at in (slice(0, 32), slice(32, 64))
    ]
    return update(*parts)[0]


del call["atten_mask"]
theirs = torch_npu.npu_fusion_attention_grad(q4, k4, v4, dy4, **call)
for name, mine, other in zip("qkv", jax.vjp(merged, q4, k4, v4)[1](dy4), theirs, strict=False):
    print(f"d{name}: off by {close(mine, other):.0e}")
_ = asked()

# %% [markdown]
# ## 9. Costs, before anything runs
#
# `explain` takes the arguments of a call, arrays or their shapes, and runs nothing. Its notes name hidden costs, here for
# calls of a realistic size.

# %%
x, y = (jax.ShapeDtypeStruct((2, 4096, heads * 128), jnp.bfloat16) for heads in (16, 4))
real = {"head_num": 16, "input_layout": "BSH", "scale": 128**-0.5}
mask = jax.ShapeDtypeStruct((2, 1, 4096, 4096), jnp.bool_)
pse = jax.ShapeDtypeStruct((1, 16, 4096, 4096), jnp.bfloat16)
CALLS = [
    ({"sparse_mode": 3, "atten_mask": C}, "none"),
    (
        {"sparse_mode": 1, "atten_mask": mask},
        "no sparse mode expresses this mask: a full one of 33554432 bytes",
    ),
    ({"pse": pse}, "the gradient of bias or slopes is computed in plain JAX"),
]
for arguments, expected in CALLS:
    told = jax_fa.explain(x, y, y, **real, **arguments, platforms=("ascend",))
    notes = told.notes["ascend"] or ("none",)
    print(f"{', '.join(arguments)}: served by {told.chosen['ascend']}; notes:", *notes, sep="\n  ")
    assert told.chosen == told.backward == {"ascend": "ascend"} and notes[0].startswith(expected)

# %% [markdown]
# ## 10. Pitfalls
#
# These calls raise. The errors say what is wrong and what to do.


# %%
def refused(message, *operands, **call):
    try:
        jax_fa.npu_fusion_attention(*operands, **{"head_num": N, "input_layout": "BSND", **call})
    except (ValueError, TypeError) as error:
        assert message in str(error), error
        print(f"{type(error).__name__}: {error}\n")
    else:
        raise AssertionError(f"not refused: {message}")


refused("pass scale instead", q, k, v, scale_value=SCALE)
refused("must have shape (2048, 2048)", q, k, v, sparse_mode=2, atten_mask=own)
refused("got another pattern", q, k, v, sparse_mode=3, atten_mask=~C)  # the wrong way round
refused("must have one of the shapes", q, k, v, atten_mask=np.zeros((B, 1, 1, SKV), bool))
refused("are for layout TND", q, k, v, sparse_mode=7)
refused("dropout_key must be a jax.random key", q, k, v, keep_prob=0.9)
refused("query's dtype", *(x.astype(jnp.bfloat16) for x in (q, k, v)), pse=full)
x = q[0], k[0], v[0]
lengths = {"actual_seq_qlen": [10, 14], "actual_seq_kvlen": [12, 20]}
refused("For lengths pass (10, 24)", *x, input_layout="TND", **lengths)
# Zeros after the last end, as torch_npu allows, are sequences without tokens.
packed = {"head_num": N, "input_layout": "TND", "scale": SCALE}
filled = score(*x, **packed, actual_seq_qlen=[5, 24, 0], actual_seq_kvlen=[9, 32, 0])
plain = score(*x, **packed, actual_seq_qlen=[5, 24], actual_seq_kvlen=[9, 32])
close(filled.attention, plain.attention)

# %% [markdown]
# These calls are valid and raise nothing, but each gives other values than one may expect.

# %%
# 1. The scale is 1.0 by default, as in torch_npu; flash_attention has 1 / sqrt(D).
plain = jax_fa.flash_attention(q, k, v)
close(score(q, k, v, **bsnd).attention, plain)
assert np.abs(score(q, k, v, N, "BSND").attention - plain).max() > 0.1

# 2. Polarity: 1 is masked in atten_mask; True is visible in the masks of the other entries.
hides = score(q, k, v, **bsnd, sparse_mode=1, atten_mask=own).attention
close(hides, jax_fa.flash_attention(q, k, v, mask=jnp.asarray(~own)))

# 3. The corner: modes 0 and 2 count from the top left, as jax.nn does; 3 to 6 from the bottom right.
top_left = jax_fa.flash_attention(q, k, v, mask=jax_fa.masks.Causal())
bottom_right = jax_fa.flash_attention(q, k, v, mask=jax_fa.masks.Causal("bottom-right"))
close(score(q, k, v, **bsnd, atten_mask=C, sparse_mode=2).attention, top_left)
close(score(q, k, v, **bsnd, atten_mask=C, sparse_mode=3).attention, bottom_right)
assert np.abs(top_left - bottom_right).max() > 0.1

# 4. pse is scaled by default. A bias as in the other entries is pse_type=0, or pse / scale.
biased = jax_fa.flash_attention(q, k, v, bias=full)
close(score(q, k, v, pse=full, **bsnd, pse_type=0).attention, biased)
close(score(q, k, v, pse=full / SCALE, **bsnd).attention, biased)
print("all as described")
