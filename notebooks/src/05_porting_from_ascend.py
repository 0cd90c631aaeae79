# %% [markdown]
# # Porting from Ascend
#
# `jax_fa.flash_attention_score` is `torch_npu.npu_fusion_attention` for JAX arrays: the same names, layouts, sparse
# modes, pse types, dropout masks and statistics, on any device, under `jit`, and with gradients. On Ascend it is one
# call into CANN's `aclnnFlashAttentionScore`. Here the same calls run on CPU, through the same C++ adapter, into
# the emulator of CANN that the package brings.
#
# ## The table
#
# | `torch_npu.npu_fusion_attention(...)` | `jax_fa.flash_attention_score(...)` | |
# |---|---|---|
# | `query`, `key`, `value` | the same, by position | key and value may have fewer heads |
# | `head_num`, `input_layout` | the same, by keyword | `"BSH"`, `"SBH"`, `"BSND"`, `"BNSD"`, `"TND"` |
# | `pse` (v2: `pse_type`) | the same | without a v2, write `pse_type=1`, or nothing |
# | `padding_mask` | – | CANN does not support it |
# | `atten_mask` | the same | 1 = masked; not needed in modes 2, 3, 4, 6, 7 and 8 |
# | `scale` | **`scale_value`** | both are 1.0 by default |
# | `keep_prob` | the same, and **`drop_mask`** | the mask is an argument; nothing is drawn inside |
# | `pre_tockens`, `next_tockens` (v2: `pre_tokens`, ...) | **`pre_tokens`, `next_tokens`** | unbounded: 2147483647 |
# | `inner_precise` | the same | fully masked rows are always as with 2 |
# | `prefix`, `sparse_mode` | the same | |
# | `actual_seq_qlen`, `actual_seq_kvlen` | the same | cumulative |
# | `gen_mask_parallel`, `sync` | – | about drawing the dropout mask |
# | v2: `query_rope`, `key_rope`, `q_start_idx`, `kv_start_idx`; newer: `sink` | – | not supported |
# | result `[0]` | `.attention_out` | |
# | results `[1]`, `[2]` | `.softmax_max`, `.softmax_sum` | TND: see section 2 |
# | results `[3]` to `[6]`: `softmax_out`, `seed`, `offset`, `numels` | – | empty, and about the dropout mask |
#
# ```python
# out, maximum, total, *_ = torch_npu.npu_fusion_attention(
#     q, k, v, 32, "BSH", atten_mask=mask_2048, scale=128**-0.5, keep_prob=1.0, sparse_mode=3)
#
# maximum, total, out = jax_fa.flash_attention_score(
#     q, k, v, head_num=32, input_layout="BSH", scale_value=128**-0.5, keep_prob=1.0, sparse_mode=3)
# ```

# %%
import ctypes
import inspect
import json
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

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


def score(*args, **kwargs):
    """flash_attention_score on the emulated device."""
    result = jax_fa.flash_attention_score(*args, **kwargs, implementation="ascend")
    return jax.block_until_ready(result)


# %% [markdown]
# ## 1. A stand-in for torch_npu
#
# So that the calls below can run side by side, here is `torch_npu.npu_fusion_attention` in NumPy and float64, written
# from its documentation and public sources: its arguments, its seven results. It is the reference for everything below
# and shares no code with the library. (`pse_type` is v2's. `keep`, as zeros and ones, stands for the mask that
# torch_npu draws.) First the masks and the formula, for one sequence:


# %%
def visible_keys(mode, sq, skv, mask, pre, following, prefix, first, last):
    """Which keys are visible to each row: the table of sparse modes; d is Skv - Sq."""
    i, j, d = np.arange(sq)[:, None], np.arange(skv), skv - sq
    if mask is None:  # then CANN ignores the mode
        return np.ones((sq, skv), bool)
    own = (
        np.asarray(mask)[..., :sq, :skv] == 0
    )  # the caller's mask, in modes 0, 1 and 5; TND: for the longest
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
# Then the layouts, and the whole call. A layout is only the order in which elements are stored.


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
    """What `attend` gives for every sequence."""
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
    """What autograd calls in torch_npu: dq, dk, dv, and no gradient of pse."""
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
# The table's left column is torch_npu's schema, its right column our signature. `twin` is the table as a function: it
# ports a call. That names and defaults match is checked here.

# %%
SCHEMA = """Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None,
Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., int pre_tockens=2147483647,
int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, int[]? actual_seq_qlen=None,
int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False"""
RENAMED = {"scale": "scale_value", "pre_tockens": "pre_tokens", "next_tockens": "next_tokens"}
GONE = {"padding_mask", "gen_mask_parallel", "sync"}
OURS_ONLY = {"drop_mask", "pse_type", "implementation"}


def twin(call):
    """The keywords of torch_npu as ours."""
    ours = {RENAMED.get(name, name): value for name, value in call.items() if name not in GONE}
    if "keep" in ours:  # section 5
        ours["drop_mask"] = np.packbits(np.ravel(ours.pop("keep")), bitorder="little")
    return ours


ours = inspect.signature(jax_fa.flash_attention_score).parameters
theirs = dict(part.split()[-1].partition("=")[::2] for part in SCHEMA.split(","))
assert twin(theirs).keys() == ours.keys() - OURS_ONLY
for name, default in theirs.items():
    if default and name not in GONE:
        assert ours[RENAMED.get(name, name)].default == eval(default), name
print("same names and defaults:", ", ".join(twin(theirs)))

# %% [markdown]
# ## 2. A first call, and every layout
#
# Two batch entries, 24 rows, 32 keys, 4 query heads on 2 key heads, values narrower than keys; causal from the bottom
# right corner. The call in a model for torch_npu, and its equivalent:

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
ours = jax_fa.flash_attention_score(
    *folded, head_num=N, input_layout="BSH", scale_value=SCALE, sparse_mode=3, implementation="ascend"
)

for mine, other in zip(ours, (softmax_max, softmax_sum, attention_out), strict=True):
    close(mine, other)
assert ours.softmax_max.shape == ours.softmax_sum.shape == (B, N, SQ, 8)
assert np.all(ours.softmax_max == ours.softmax_max[..., :1])  # eight equal lanes, as CANN has them
(call,) = asked()
assert call["function"].startswith("aclnnFlashAttentionScore") and call["sparseMode"] == 3
print(*(f"{name}: {call[name]}" for name in ("function", "inputLayout", "headNum", "sparseMode")), sep="\n")
print("attenMask:", call["tensors"]["attenMask"]["shape"])

# %% [markdown]
# `implementation="ascend"` asks for CANN by name; without it, the best backend of the platform is taken. No mask was
# given, and CANN got the one it wants: in modes 2, 3, 4, 6, 7 and 8 `jax_fa` brings it along, as a constant that a program
# holds once. (BSH goes to CANN as BSND, which is the same memory.)
#
# From here on `both` makes the two calls, by the table. All five layouts, in three dtypes; for TND every entry of the
# batch is a packed sequence:


# %%
def in_memory_order(x, ends):
    """Statistics of TND as torch_npu stores them by default: sequences of (N, S, 8), one after another."""
    parts = np.split(np.asarray(x), ends[:-1])
    return np.concatenate([part.swapaxes(0, 1).reshape(part.shape) for part in parts])


def both(*operands, tolerance=2e-6, **call):
    """Our result on the emulated device, which must be that of the stand-in: output, maximum and sum."""
    theirs = torch_npu.npu_fusion_attention(*operands, **call)
    ours = score(*operands, **twin(call))
    close(ours.attention_out, theirs[0], tolerance)
    for mine, other in ((ours.softmax_max, theirs[1]), (ours.softmax_sum, theirs[2])):
        packed = call["input_layout"] == "TND"
        close(in_memory_order(mine, call["actual_seq_qlen"]) if packed else mine, other)
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
    for dtype, tolerance in (("float32", 2e-6), ("bfloat16", 2e-2), ("float16", 2e-3)):
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
# For TND, `jax_fa` gives the statistics as their shape says, row by row: torch_npu's `softmax_layout="TND"`. Its default
# is another order under the same shape; `in_memory_order` above is the way there.

# %% [markdown]
# ## 3. Sparse modes
#
# Every mode as a torch_npu call with the mask that it needs there, and as ours: with that mask, and without it in the modes
# where it is redundant. With a query of 0 all visible keys have the same weight, and with the identity as values the output
# is the weights, so a result is a picture of the visible keys. It is compared with the table in `visible_keys`.

# %%
lengths = (6, 8, 10), (9, 10, 13)  # three packed sequences: rows, keys
ends = {"actual_seq_qlen": np.cumsum(lengths[0]).tolist(), "actual_seq_kvlen": np.cumsum(lengths[1]).tolist()}
i, j = np.arange(SQ)[:, None], np.arange(SKV)
own = (i // 4 + j // 4) % 3 == 1
outside_band = (j < i - 10) | (j > i + 4)
outside_prefix = ((j > i + SKV - SQ) & (j >= 20))[None, None]
PREFIX_C = np.concatenate([C, np.tile(np.arange(2048) >= 1024, (1024, 1))])  # 3072 x 2048
MODES = [
    (0, "default: tokens and mask", {"atten_mask": outside_band, "pre_tockens": 10, "next_tockens": 4}),
    (1, "all: the mask alone", {"atten_mask": own}),
    (2, "left up causal", {"atten_mask": C}),
    (3, "right down causal", {"atten_mask": C}),
    (4, "band: pre 9, next 2", {"atten_mask": C, "pre_tockens": 9, "next_tockens": 2}),
    (5, "prefix 20 and mask", {"atten_mask": outside_prefix, "prefix": [20]}),
    (6, "prefix 20, compressed", {"atten_mask": PREFIX_C, "prefix": [20]}),
    (7, "TND, in the last next -2", {"atten_mask": C, "next_tockens": -2, **ends}),
    (8, "TND, in the first next 1", {"atten_mask": C, "next_tockens": 1, **ends}),
]
eye = [np.zeros((1, SQ, 1, SKV)), np.zeros((1, SKV, 1, SKV)), np.eye(SKV)[None, :, None]]
eye = [jnp.asarray(x, jnp.float32) for x in eye]

fig, axes = plt.subplots(3, 3, figsize=(9, 7.4), layout="constrained")
for ax, (mode, title, arguments) in zip(axes.flat, MODES, strict=True):
    layout = "TND" if mode > 6 else "BSND"
    probe = [x[0] for x in eye] if layout == "TND" else eye
    arguments = {"head_num": 1, "input_layout": layout, "sparse_mode": mode, **arguments}
    out = both(*probe, **arguments).attention_out
    call = asked()[-1]
    if mode not in (0, 1, 5):  # the same without the mask, to the last bit, and the same call of CANN
        del arguments["atten_mask"]
        assert np.array_equal(score(*probe, **twin(arguments)).attention_out, out) and asked() == [call]
    assert call["sparseMode"] == mode
    shape = "x".join(map(str, call["tensors"]["attenMask"]["shape"]))
    ax.imshow(np.reshape(out, (SQ, SKV)) > 0, cmap="Blues", vmin=0, vmax=1.5)
    for row, column in zip(*(x[:-1] for x in ends.values()), strict=True) if layout == "TND" else ():
        ax.axhline(row - 0.5, color="#b5341f", linewidth=0.8)
        ax.axvline(column - 0.5, color="#b5341f", linewidth=0.8)
    ax.set_title(f"{mode} {title}", fontsize=10)
    ax.set_xlabel(f"CANN got mode {call['sparseMode']}, mask {shape}", fontsize=8)
    ax.set(xticks=[], yticks=[])
fig.supylabel("24 rows; 32 keys to the right; blue: visible", fontsize=9)
plt.show()

# %% [markdown]
# Two things to know. torch_npu ignores a mode without its mask; here the mode holds.

# %%
bsnd = {"head_num": N, "input_layout": "BSND", "scale": SCALE}
ignored = torch_npu.npu_fusion_attention(q, k, v, **bsnd, sparse_mode=3)[0]
close(ignored, score(q, k, v, **twin(bsnd)).attention_out)  # as if it were not there
assert np.abs(score(q, k, v, **twin(bsnd), sparse_mode=3).attention_out - ignored).max() > 0.1

# %% [markdown]
# And a fully masked row (in mode 3 with more rows than keys, for example) is 0, with CANN's marks in the statistics,
# `-FLT_MAX` and `+FLT_MAX`, for every `inner_precise`. CANN is called with `inner_precise=2`, without which such a row may
# hold a mean of values. `max + log(sum)` is the log-sum-exp, -FLT_MAX for such rows.

# %%
tall = jnp.concatenate([q, q], axis=1)  # 48 rows, 32 keys: rows 0 to 15 see nothing
ours = both(tall, k, v, **bsnd, atten_mask=C, sparse_mode=3)
assert asked()[-1]["innerPrecise"] == 2
assert not ours.attention_out[:, :16].any()
assert np.all(ours.softmax_max[:, :, :16] == -FLT_MAX) and np.all(ours.softmax_sum[:, :, :16] == FLT_MAX)
mask = jax_fa.masks.Causal("bottom-right")
_, logsumexp = jax_fa.flash_attention(tall, k, v, mask=mask, scale=SCALE, return_logsumexp=True)
close((ours.softmax_max + np.log(ours.softmax_sum))[..., 0], logsumexp)

# %% [markdown]
# ## 4. pse
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
close(score(*x, **one, pse=whole[:, :, -1024:]).attention_out, out)

# %% [markdown]
# What a pse adds to the logits, measured with the probe of section 3. Types 0 and 1 get the same matrix, and the
# scale is 1/4; the slopes are 1/4 in type 2 and 1 in type 3.

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
    m, l, weights = (np.asarray(x)[0] for x in result)
    added = np.log(weights[:, 0]) + m[0, :, :1] + np.log(l[0, :, :1])
    close(added, wanted, 1e-5)
    picture = axes[pse_type].imshow(added, cmap="RdBu_r", vmin=-8, vmax=8)
    axes[pse_type].set(xticks=[], yticks=[])
    axes[pse_type].set_title(title, fontsize=10)
fig.colorbar(picture, ax=axes, shrink=0.8)
plt.show()

# %% [markdown]
# ## 5. Dropout
#
# torch_npu draws a mask inside the call, from the device's generator, and gives back seed, offset and length, with which its
# backward draws it again. `flash_attention_score` draws nothing: the mask is an argument, in CANN's form. One bit per
# weight, in the order `[B, N, Sq, Skv]` (TND: blocks `[N, Sq_b, Skv_b]` one after another), rows not padded, the **least
# significant bit of a byte first, 1 = keep**. Bytes past the end are not read, so a mask that torch_npu drew (rounded up to
# 16 bytes) can be passed as it is.

# %%
KEEP = 0.75
keep = random.random((B, N, SQ, SKV)) < KEEP
drop_mask = np.packbits(keep.reshape(-1), bitorder="little")
assert len(drop_mask) == B * N * SQ * SKV // 8

out, _, softmax_sum, *_ = torch_npu.npu_fusion_attention(q, k, v, **bsnd, keep_prob=KEEP, keep=keep)
ours = score(q, k, v, **twin(bsnd), keep_prob=KEEP, drop_mask=drop_mask)
close(ours.attention_out, out)
close(ours.softmax_sum, softmax_sum)  # taken before dropout
longer = np.concatenate([drop_mask, np.zeros(16, np.uint8)])
same = score(q, k, v, **twin(bsnd), keep_prob=KEEP, drop_mask=longer)
assert np.array_equal(same.attention_out, ours.attention_out)
wrong = np.packbits(keep.reshape(-1))  # NumPy's default order is the other one
assert np.abs(score(q, k, v, **twin(bsnd), keep_prob=KEEP, drop_mask=wrong).attention_out - out).max() > 0.1

# Packed sequences: the bits of one block follow those of the block before, inside a byte too.
blocks = [keep[0, :, :sq, :skv].reshape(-1) for sq, skv in ((5, 9), (0, 4), (19, 19))]
assert len(blocks[0]) % 8
_ = both(q[0], k[0], v[0], **tnd, keep_prob=KEEP, keep=np.concatenate(blocks))

# %% [markdown]
# `jax_fa.dropout_mask` draws such a mask from a JAX key. Its bits are those that `dropout_rate` and `dropout_key` of
# `flash_attention` use, where they are drawn tile by tile and never stored (on Ascend they are stored, since CANN reads
# them from memory). So a port can begin with an explicit mask and end without one.

# %%
key = jax.random.key(7)
drawn = jax_fa.dropout_mask(key, 1 - KEEP, (B, N, SQ, SKV))
bits = np.unpackbits(np.asarray(drawn), bitorder="little").reshape(B, N, SQ, SKV)
out = both(q, k, v, **bsnd, keep_prob=KEEP, keep=bits).attention_out
for name in ("ascend", "xla"):
    rate = {"dropout_rate": 1 - KEEP, "dropout_key": key}
    close(jax_fa.flash_attention(q, k, v, scale=SCALE, **rate, implementation=name), out)

eye[0] = eye[0][:, :SQ]
bits = bits[:1, :1]
kept = np.reshape(
    both(*eye, head_num=1, input_layout="BSND", keep_prob=KEEP, keep=bits).attention_out, (SQ, SKV)
)
fig, axes = plt.subplots(1, 2, figsize=(9, 2.7), layout="constrained")
axes[0].imshow(bits[0, 0, :8], cmap="Blues", vmin=0, vmax=3, aspect="auto")
for row, byte in np.ndindex(8, 4):
    text = f"{int(drawn[4 * row + byte]):02x}"
    axes[0].text(8 * byte + 3.5, row, text, ha="center", va="center", fontsize=9)
axes[0].set(xticks=np.arange(8, 32, 8) - 0.5, xticklabels=[], yticks=[])
axes[0].grid(axis="x", color="black")
axes[0].tick_params(length=0)
axes[0].set_title("rows 0 to 7: bytes in hex over their bits, lowest first", fontsize=9)
axes[1].imshow(kept, cmap="Blues", vmin=0, vmax=3 / KEEP / SKV, aspect="auto")
axes[1].set(xticks=[], yticks=[])
axes[1].set_title("equal weights after dropout: 0, or 1 / 32 / 0.75", fontsize=9)
plt.show()
_ = asked()

# %% [markdown]
# ## 6. Gradients and jit
#
# In torch_npu `out.backward(dy)` calls `npu_fusion_attention_grad` with the saved maximum, sum and output. In JAX the
# function is differentiated, inside `jit` or not, and the backward is CANN's `aclnnFlashAttentionScoreGrad`. A pse has a
# gradient here, which CANN does not compute: it comes from plain JAX.

# %%
dy = normal(B, SQ, N, DV)
call = {**bsnd, "sparse_mode": 3, "pse_type": 0, "keep_prob": KEEP, "keep": keep}


def loss(q, k, v, pse, implementation="ascend"):
    result = jax_fa.flash_attention_score(q, k, v, pse, **twin(call), implementation=implementation)
    return jnp.sum(result.attention_out * dy)


gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
ours = jax.block_until_ready(jax.jit(gradient)(q, k, v, full))
functions = [call["function"] for call in asked()]
print(*functions)
assert len(functions) == 2 and functions[1].startswith("aclnnFlashAttentionScoreGrad")
theirs = torch_npu.npu_fusion_attention_grad(q, k, v, dy, **call, pse=full, atten_mask=C)
for name, mine, float64, xla in zip("qkv", ours, theirs, gradient(q, k, v, full, "xla"), strict=False):
    print(f"d{name}: off by {close(mine, float64):.0e} from float64, by {close(mine, xla):.0e} from xla")
float64 = np.stack(run(q, k, v, **call, pse=full, atten_mask=C, dy=dy)[6])
print(f"dpse: off by {close(ours[3], float64):.0e} from float64")


def moved(h):
    """The loss of the stand-in, a step along the gradient of all four."""
    x = [np.asarray(y, np.float64) + h * np.asarray(g) for y, g in zip((q, k, v, full), ours, strict=True)]
    return np.sum(torch_npu.npu_fusion_attention(*x[:3], **call, pse=x[3], atten_mask=C)[0] * np.asarray(dy))


quotient = (moved(1e-5) - moved(-1e-5)) / 2e-5
norm = sum(np.sum(np.square(g, dtype=np.float64)) for g in ours)
assert abs(quotient / norm - 1) < 1e-5
print(f"|gradient|^2 = {norm:.4f}, difference quotient along it {quotient:.4f}")

# %% [markdown]
# ## 7. Costs, before anything runs
#
# `explain` takes the arguments of a call, arrays or their shapes, and runs nothing. Its notes name hidden costs. Calls of a
# real size:

# %%
x, y = (jax.ShapeDtypeStruct((2, 4096, heads * 128), jnp.bfloat16) for heads in (16, 4))
real = {"head_num": 16, "input_layout": "BSH", "scale_value": 128**-0.5}
mask = jax.ShapeDtypeStruct((2, 1, 4096, 4096), jnp.bool_)
pse = jax.ShapeDtypeStruct((1, 16, 4096, 4096), jnp.bfloat16)
CALLS = [
    ({"sparse_mode": 3}, "none"),
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
# ## 8. Pitfalls
#
# Errors say what is wrong and what to do:


# %%
def refused(message, *operands, **call):
    try:
        jax_fa.flash_attention_score(*operands, **{"head_num": N, "input_layout": "BSND", **call})
    except (ValueError, TypeError) as error:
        assert message in str(error), error
        print(f"{type(error).__name__}: {error}\n")
    else:
        raise AssertionError(f"not refused: {message}")


refused("pass scale_value instead", q, k, v, scale=SCALE)
refused("must have shape (2048, 2048)", q, k, v, sparse_mode=2, atten_mask=own)
refused("got another pattern", q, k, v, sparse_mode=3, atten_mask=~C)  # the wrong way round
refused("must have one of the shapes", q, k, v, atten_mask=np.zeros((B, 1, 1, SKV), bool))
refused("are for layout TND", q, k, v, sparse_mode=7)
refused("drop_mask must be given", q, k, v, keep_prob=0.9)
refused("query's dtype", *(x.astype(jnp.bfloat16) for x in (q, k, v)), pse=full)
x = q[0], k[0], v[0]
refused("cumulative", *x, input_layout="TND", actual_seq_qlen=[14, 10], actual_seq_kvlen=[20, 12])
# Zeros after the last end, as torch_npu allows, are sequences without tokens.
packed = {"head_num": N, "input_layout": "TND", "scale_value": SCALE}
filled = score(*x, **packed, actual_seq_qlen=[5, 24, 0], actual_seq_kvlen=[9, 32, 0])
close(
    filled.attention_out, score(*x, **packed, actual_seq_qlen=[5, 24], actual_seq_kvlen=[9, 32]).attention_out
)

# %% [markdown]
# These are valid calls, so nothing raises. Each is a silent difference if overlooked:

# %%
# 1. The scale is 1.0 by default, as in torch_npu; flash_attention has 1 / sqrt(D).
plain = jax_fa.flash_attention(q, k, v)
close(score(q, k, v, **twin(bsnd)).attention_out, plain)
assert np.abs(score(q, k, v, head_num=N, input_layout="BSND").attention_out - plain).max() > 0.1

# 2. Polarity: 1 is masked in atten_mask; True is visible in the masks of the other entries.
hides = score(q, k, v, **twin(bsnd), sparse_mode=1, atten_mask=own).attention_out
close(hides, jax_fa.flash_attention(q, k, v, mask=jnp.asarray(~own)))

# 3. The corner: modes 0 and 2 count from the top left, as jax.nn does; 3 to 6 from the bottom right.
top_left = jax_fa.flash_attention(q, k, v, mask=jax_fa.masks.Causal())
bottom_right = jax_fa.flash_attention(q, k, v, mask=jax_fa.masks.Causal("bottom-right"))
close(score(q, k, v, **twin(bsnd), sparse_mode=2).attention_out, top_left)
close(score(q, k, v, **twin(bsnd), sparse_mode=3).attention_out, bottom_right)
assert np.abs(top_left - bottom_right).max() > 0.1

# 4. pse is scaled by default. A bias as in the other entries is pse_type=0, or pse / scale.
biased = jax_fa.flash_attention(q, k, v, bias=full)
close(score(q, k, v, full, **twin(bsnd), pse_type=0).attention_out, biased)
close(score(q, k, v, full / SCALE, **twin(bsnd)).attention_out, biased)

# 5. Lengths in place of ends: where they happen to rise, rows past the last one belong to no sequence, and are 0.
x, packed = (q[0], k[0, :SQ], v[0, :SQ]), {"head_num": N, "input_layout": "TND"}
for given, rows in (((5, 24), 24), ((5, 19), 19)):
    out = score(*x, **packed, actual_seq_qlen=given, actual_seq_kvlen=given).attention_out
    assert out[:rows].any(axis=(1, 2)).all() and not out[rows:].any()
print("all as described")
