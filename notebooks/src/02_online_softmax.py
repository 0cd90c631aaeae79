# %% [markdown]
# # The online softmax, step by step
#
# You will learn how FlashAttention computes `softmax(scale * q k^T) v` exactly without ever holding the `Sq x Skv` logits:
# it reads the keys in tiles, and keeps a maximum, a sum and an output per row. The algorithm is written out in NumPy,
# forward and backward, and every step is compared with the plain softmax and with `jax_fa`.
#
# The steps are those of
# - Milakov and Gimelshein 2018, [arXiv:1805.02867](https://arxiv.org/abs/1805.02867): maximum and sum in one pass;
# - Dao et al. 2022, [arXiv:2205.14135](https://arxiv.org/abs/2205.14135): attention in tiles, and its backward;
# - Dao 2023, [arXiv:2307.08691](https://arxiv.org/abs/2307.08691): the division moved to the end;
# - the description of `aclnnFlashAttentionScore` in CANN's operator documentation, which calls a tile of keys `SkvSplit`
#   and the factor between two tiles `exp[i]`.

# %%
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

import jax_fa
from jax_fa.masks import Causal

# CANN ignores a sparse mode without its mask; the calls below show what the modes are.
warnings.filterwarnings("ignore", message="flash_attention_score applies")

jax.config.update("jax_enable_x64", True)  # float64 on both sides, so that only the algorithm is compared
random = np.random.default_rng(0)

Sq, Skv, D, TILE = 24, 32, 8, 8
SCALE = D**-0.5
q, k, v = (1.4 * random.standard_normal((length, D)) for length in (Sq, Skv, Skv))


def close(a, b, tolerance=1e-12):
    """Whether a is b up to `tolerance`, relative to the largest value."""
    return np.max(np.abs(np.asarray(a) - b)) <= tolerance * max(1.0, np.max(np.abs(b)))


# %% [markdown]
# ## 1. The plain softmax: all logits at once
#
# The maximum is subtracted because `exp` overflows otherwise. The maximum `m` and the sum `l` of a row are what CANN, the
# library of kernels for Ascend, returns as `softmax_max` and `softmax_sum`; `m + log(l)` is the log-sum-exp.


# %%
def plain(q, k, v, visible=True):
    """(out, m, l, weights) with the whole matrix of logits in memory."""
    x = np.where(visible, SCALE * q @ k.T, -np.inf)
    m = x.max(axis=1)
    p = np.exp(x - m[:, None])
    l = p.sum(axis=1)
    weights = p / l[:, None]
    return weights @ v, m, l, weights


OUT, M, L, WEIGHTS = plain(q, k, v)
assert close(WEIGHTS.sum(axis=1), 1.0)
with np.errstate(over="ignore"):
    assert np.isinf(np.exp(np.float32(89.0)))  # the reason for the maximum
print(f"row 0: max {M[0]:.3f}, sum {L[0]:.3f}, log-sum-exp {M[0] + np.log(L[0]):.3f}")

# %% [markdown]
# ## 2. Maximum and sum in one pass
#
# Read the logits of a row one at a time. When a new maximum appears, the sum so far is still relative to the old one. One
# factor rescales it, called the *refresh* here, $e^{m_{i-1} - m_i}$:
#
# $$
# \begin{aligned}
# m_i &= \max(m_{i-1}, x_i) \\
# l_i &= l_{i-1}\, e^{m_{i-1} - m_i} + e^{x_i - m_i}
# \end{aligned}
# $$

# %%
row = SCALE * k @ q[0]
m, l, no_refresh = -np.inf, 0.0, 0.0
for x in row:
    m_new = max(m, x)
    l = l * np.exp(m - m_new) + np.exp(x - m_new)
    no_refresh += np.exp(x - m_new)
    m = m_new
assert close(m, M[0]) and close(l, L[0])
assert not close(no_refresh, L[0], 0.1)  # without the factor the sum is off by more than 10 %
print(f"sum {l:.6f} (plain {L[0]:.6f}); without the refresh it would be {no_refresh:.6f}")

# %% [markdown]
# ## 3. Attention in tiles
#
# The same works with a tile of keys in place of one logit. The output is not normalized inside the loop: `acc` is refreshed
# like the sum, the product `P V` of each tile is added to it, and one division by the sum follows after the loop. (CANN's
# documentation calls these two steps Mul and Add, and the refresh $exp[i]$.)


# %%
def update(state, k_tile, v_tile, q=q):
    """Adds one tile of keys to (m, l, acc); also returns the intermediate results, for the figures."""
    m, l, acc = state
    x = SCALE * q @ k_tile.T
    m_new = np.maximum(m, x.max(axis=1))
    refresh = np.exp(m - m_new)
    p = np.exp(x - m_new[:, None])
    state = m_new, l * refresh + p.sum(axis=1), acc * refresh[:, None] + p @ v_tile
    return state, {"logits": x, "refresh": refresh, "p": p}


def start(rows, width=D):
    return np.full(rows, -np.inf), np.zeros(rows), np.zeros((rows, width))


state, steps = start(Sq), []
for first in range(0, Skv, TILE):
    tile = slice(first, first + TILE)
    state, step = update(state, k[tile], v[tile])
    steps.append((state, step))

    # The invariant: after each tile the state is the plain softmax over the keys visited so far.
    m, l, acc = state
    out_seen, m_seen, l_seen, _ = plain(q, k[: tile.stop], v[: tile.stop])
    assert close(m, m_seen) and close(l, l_seen) and close(acc / l[:, None], out_seen)
    assert np.all(step["refresh"] <= 1) and np.all(l >= 1)  # the largest logit itself adds e^0 = 1

m, l, acc = state
assert close(acc / l[:, None], OUT) and close(m, M) and close(l, L)
print(f"{len(steps)} tiles of {TILE} keys; out differs by at most {np.abs(acc / l[:, None] - OUT).max():.1e}")

# %% [markdown]
# The unnormalized weights $e^{x - m_i}$ after each tile. Every tile adds 8 columns, and rescales the columns before it in the
# rows where it brings a new maximum.

# %%
plt.rcParams |= {"font.size": 10, "axes.titlesize": 10, "image.aspect": "auto"}
fig, axes = plt.subplots(1, len(steps), figsize=(9, 2.9), layout="constrained", sharey=True)
for t, ax in enumerate(axes):
    p = np.full((Sq, Skv), np.nan)
    for u in range(t + 1):  # earlier tiles, with all refreshes since
        later = np.prod([steps[w][1]["refresh"] for w in range(u + 1, t + 1)], axis=0)
        p[:, u * TILE : (u + 1) * TILE] = steps[u][1]["p"] * np.reshape(later, (-1, 1))
    picture = ax.imshow(p, cmap="Blues", vmin=0, vmax=1, extent=(0, Skv, Sq, 0))
    ax.set(title=f"after tile {t + 1}", xlabel="key", xticks=range(0, Skv + 1, TILE), facecolor="#e9e9e9")
axes[0].set(ylabel="row", yticks=range(0, Sq + 1, TILE))
fig.colorbar(picture, ax=axes, label="weight, unnormalized")
assert close(p, np.exp(SCALE * q @ k.T - M[:, None]))  # the last picture is the plain one
plt.show()

# %% [markdown]
# The refresh of each row at tiles 2 to 4. White is 1: no new maximum, and nothing to rescale. A dark cell is a logit far
# above all earlier ones, so that the earlier sum hardly counts any more.

# %%
fig, ax = plt.subplots(figsize=(9, 2.1), layout="constrained")
refreshes = np.stack([step["refresh"] for _, step in steps[1:]])
picture = ax.imshow(refreshes, cmap="Blues_r", vmin=0, vmax=1)
ax.set(xlabel="row", ylabel="tile", yticks=range(len(refreshes)), yticklabels=range(2, len(steps) + 1))
ax.set_xticks(np.arange(Sq + 1) - 0.5, minor=True)
ax.set_yticks(np.arange(len(refreshes) + 1) - 0.5, minor=True)
ax.grid(which="minor", color="#bbbbbb", linewidth=0.5)
ax.tick_params(which="minor", length=0)
fig.colorbar(picture, ax=ax, label=r"$e^{m_{i-1} - m_i}$")
plt.show()

# %% [markdown]
# The state of two rows. The running maximum never decreases. The running sum may decrease, where a refresh is small, as in
# the blue row. The running log-sum-exp increases with every key.

# %%
running_m = np.stack([m for (m, _, _), _ in steps])
running_l = np.stack([l for (_, l, _), _ in steps])
running_lse = running_m + np.log(running_l)
assert np.all(np.diff(running_m, axis=0) >= 0) and np.all(np.diff(running_lse, axis=0) > 0)
falls = np.any(np.diff(running_l, axis=0) < 0, axis=0)
assert falls.any()
shown = np.flatnonzero(falls)[0], np.flatnonzero(~falls & (running_l[-1] > 3))[0]
fig, axes = plt.subplots(1, 3, figsize=(9, 2.7), layout="constrained")
curves = (
    ("maximum $m_i$", running_m),
    ("sum $l_i$", running_l),
    (r"log-sum-exp $m_i + \log l_i$", running_lse),
)
for ax, (title, values) in zip(axes, curves, strict=True):
    for i, shade, style in zip(shown, ("#24608f", "#d98324"), ("o-", "s--"), strict=True):
        ax.plot(np.arange(len(steps)) + 1, values[:, i], style, color=shade, label=f"row {i}")
    ax.set(title=title, xlabel="tiles visited", xticks=range(1, len(steps) + 1))
    ax.grid(alpha=0.3)
axes[2].legend(loc="lower right")
plt.show()

# %% [markdown]
# ## 4. Partial results merge in any order
#
# The state over a set of keys does not depend on the order of the keys, and two states over disjoint sets merge. So tiles
# may be visited in any order, and keys may be split over cores or devices. Dividing by the sum once at the end, instead
# of keeping the output normalized after every tile, changes nothing but the work.


# %%
def merge(a, b):
    m = np.maximum(a[0], b[0])
    ra, rb = np.exp(a[0] - m), np.exp(b[0] - m)
    return m, a[1] * ra + b[1] * rb, a[2] * ra[:, None] + b[2] * rb[:, None]


parts = [update(start(Sq), k[t : t + TILE], v[t : t + TILE])[0] for t in range(0, Skv, TILE)]
for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 0, 1]):
    a, b, c, e = (parts[t] for t in order)
    for m, l, acc in (merge(merge(merge(a, b), c), e), merge(merge(a, b), merge(c, e))):
        assert close(acc / l[:, None], OUT) and close(m, M) and close(l, L)

normalized, (m, l, _) = parts[0][2] / parts[0][1][:, None], parts[0]
for m_t, l_t, acc_t in parts[1:]:
    m_new = np.maximum(m, m_t)
    l_new = l * np.exp(m - m_new) + l_t * np.exp(m_t - m_new)
    normalized = normalized * (l * np.exp(m - m_new) / l_new)[:, None]
    normalized += acc_t * (np.exp(m_t - m_new) / l_new)[:, None]
    m, l = m_new, l_new
assert close(normalized, OUT)
print(f"divisions: {len(parts) * Sq * D} if normalized after every tile, {Sq * D} at the end")

# %% [markdown]
# ## 5. Masked tiles are never visited
#
# With the bottom-right causal mask the keys `j <= i + Skv - Sq` are visible to row `i`. The loop visits only the tiles that
# have a visible key.
#
# A row may be fully masked. With a first maximum of `-FLT_MAX` instead of `-inf`, `exp(-inf - m)` is 0 and not NaN: the sum
# stays 0, and only the division must check for it.

# %%
FLT_MAX = float(np.finfo(np.float32).max)


def tiled(q, k, v, visible, tile=TILE):
    """(out, m, l, visited tiles) in blocks of `tile` rows and keys."""
    out, m_all, l_all, visited = np.zeros((len(q), v.shape[1])), np.zeros(len(q)), np.zeros(len(q)), []
    for r in range(0, len(q), tile):
        rows = slice(r, r + tile)
        _, l, acc = start(len(q[rows]), v.shape[1])
        m = np.full(len(l), -FLT_MAX)
        for c in range(0, len(k), tile):
            keys = slice(c, c + tile)
            if not visible[rows, keys].any():
                continue
            visited.append((r // tile, c // tile))
            x = np.where(visible[rows, keys], SCALE * q[rows] @ k[keys].T, -np.inf)
            m_new = np.maximum(m, x.max(axis=1))
            refresh, p = np.exp(m - m_new), np.exp(x - m_new[:, None])
            m, l, acc = m_new, l * refresh + p.sum(axis=1), acc * refresh[:, None] + p @ v[keys]
        empty = l == 0
        out[rows] = np.where(empty[:, None], 0, acc / np.where(empty, 1, l)[:, None])
        m_all[rows], l_all[rows] = m, l
    return out, m_all, l_all, visited


CAUSAL = np.arange(Skv) <= np.arange(Sq)[:, None] + Skv - Sq
out, m, l, visited = tiled(q, k, v, CAUSAL)
for ours, theirs in zip((out, m, l), plain(q, k, v, CAUSAL), strict=False):
    assert close(ours, theirs)
assert len(visited) == 9  # of 3 x 4 tiles: 2 + 3 + 4

some_empty = CAUSAL.copy()
some_empty[5] = False
out, m, l, _ = tiled(q, k, v, some_empty)
assert not out[5].any() and m[5] == -FLT_MAX and l[5] == 0 and np.isfinite(out).all()
print(f"{len(visited)} of {Sq // TILE * Skv // TILE} tiles visited; a fully masked row gives 0")

# %% [markdown]
# ## 6. Backward: the weights are recomputed from maximum and sum
#
# Nothing of size `Sq x Skv` was saved, so the backward computes the logits again. From the saved `m` and `l` the weights of
# a tile follow at once, $P = e^{x - m} / l$. Then, for the cotangent `dO` of the output:
#
# $$
# \begin{aligned}
# dV &= P^T dO & dP &= dO\, V^T & dS &= P \circ (dP - \delta) \\
# dQ &= s\, dS\, K & dK &= s\, dS^T Q
# \end{aligned}
# $$
#
# $\delta$ is the row sum of $P \circ dP$ over *all* keys, which no single tile has. But $\sum_j P_{ij}\, dO_i \cdot V_j =
# dO_i \cdot O_i$, so it is known before the loop: $\delta$ = rowsum($dO \circ O$).

# %%
dout = random.standard_normal((Sq, D))
out, m, l, weights = plain(q, k, v, CAUSAL)
delta = np.sum(dout * out, axis=1)
assert close(delta, np.sum(weights * (dout @ v.T), axis=1))

# dS of one row is the Jacobian of the softmax, diag(p) - p p^T, times dP.
p, dp = weights[7], v @ dout[7]
assert close(p * (dp - delta[7]), (np.diag(p) - np.outer(p, p)) @ dp)


def backward(q, k, v, visible, m, l, delta, dout, tile=TILE):
    """(dq, dk, dv) from the saved statistics, tile by tile."""
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for c in range(0, len(k), tile):
        for r in range(0, len(q), tile):
            rows, keys = slice(r, r + tile), slice(c, c + tile)
            if not visible[rows, keys].any():
                continue
            x = np.where(visible[rows, keys], SCALE * q[rows] @ k[keys].T, -np.inf)
            p = np.exp(x - m[rows, None]) / l[rows, None]
            assert close(p, weights[rows, keys])
            dp = dout[rows] @ v[keys].T
            ds = p * (dp - delta[rows, None])
            dv[keys] += p.T @ dout[rows]
            dq[rows] += SCALE * ds @ k[keys]
            dk[keys] += SCALE * ds.T @ q[rows]
    return dq, dk, dv


gradients = backward(q, k, v, CAUSAL, m, l, delta, dout)

# %% [markdown]
# The gradients are those of the plain softmax, by `jax.grad` and by a difference quotient.


# %%
def plain_loss(q, k, v):
    x = jnp.where(CAUSAL, SCALE * q @ k.T, -jnp.inf)
    return jnp.sum(jax.nn.softmax(x, axis=1) @ v * dout)


for ours, theirs in zip(gradients, jax.grad(plain_loss, argnums=(0, 1, 2))(q, k, v), strict=True):
    assert close(ours, theirs)

direction = random.standard_normal(k.shape)
up, down = (np.sum(plain(q, k + h * direction, v, CAUSAL)[0] * dout) for h in (1e-5, -1e-5))
assert close((up - down) / 2e-5, np.sum(gradients[1] * direction), 1e-7)

# %% [markdown]
# The gradient of the logits as a figure: subtract from each row of dP its $\delta$, and multiply by P. Red is positive,
# blue negative. Where P is 0, as in the masked corner, dS is 0.

# %%
dp, ds = dout @ v.T, weights * (dout @ v.T - delta[:, None])
pictures = (("dS", ds), (r"$=$  P  $\circ$", weights), ("( dP", dp), (r"$-$  $\delta$ )", delta[:, None]))
fig, axes = plt.subplots(1, 4, figsize=(9, 2.8), layout="constrained", width_ratios=(4, 4, 4, 1), sharey=True)
for ax, (title, values) in zip(axes, pictures, strict=True):
    limit = np.abs(dp if values.shape[1] == 1 else values).max()
    ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=(0, values.shape[1], Sq, 0))
    ax.set_title(title, fontsize=13)
    ax.set(xlabel="key", xticks=range(0, Skv + 1, TILE)) if values.shape[1] > 1 else ax.set(xticks=[])
axes[0].set(ylabel="row", yticks=range(0, Sq + 1, TILE))
plt.show()

# %% [markdown]
# The log-sum-exp has a gradient too. Its derivative by the logits is $P$, so a cotangent `dlse` turns $\delta$ into
# $\delta - dlse$, and nothing else changes.

# %%
dlse = random.standard_normal(Sq)
with_lse = backward(q, k, v, CAUSAL, m, l, delta - dlse, dout)

# %% [markdown]
# ## 7. The same values from `jax_fa`
#
# `flash_attention` in float64 returns the output, the log-sum-exp and the gradients of the loops above.
# `flash_attention_score`, the function with CANN's arguments, returns the maximum and the sum, in float32 and in eight equal
# lanes.

# %%
mask = Causal("bottom-right")


def ours(q, k, v):
    out, lse = jax_fa.flash_attention(q[:, None], k[:, None], v[:, None], mask=mask, return_logsumexp=True)
    return out[:, 0], lse[0]


(out_fa, lse_fa), pullback = jax.vjp(ours, q, k, v)
out, m, l, _ = tiled(q, k, v, CAUSAL)
assert close(out_fa, out) and close(lse_fa, m + np.log(l))
for fa, tile_by_tile in zip(pullback((dout, jnp.zeros(Sq))), gradients, strict=True):
    assert close(fa, tile_by_tile)
for fa, tile_by_tile in zip(pullback((dout, jnp.asarray(dlse))), with_lse, strict=True):
    assert close(fa, tile_by_tile)

q32, k32, v32 = (jnp.asarray(x, jnp.float32)[None, :, None] for x in (q, k, v))
for implementation in (None, "xla"):
    result = jax_fa.flash_attention_score(
        q32,
        k32,
        v32,
        head_num=1,
        input_layout="BSND",
        scale_value=SCALE,
        sparse_mode=3,
        implementation=implementation,
    )
    assert result.softmax_max.shape == result.softmax_sum.shape == (1, 1, Sq, 8)
    assert np.all(result.softmax_max == result.softmax_max[..., :1])
    assert close(result.softmax_max[0, 0, :, 0], m, 1e-6)
    assert close(result.softmax_sum[0, 0, :, 0], l, 1e-6)
    assert close(result.attention_out[0, :, 0], out, 1e-6)
print("out, log-sum-exp and gradients agree in float64; out, softmax_max and softmax_sum in float32")

# %% [markdown]
# ## 8. How exact is it? Error and the number of tiles
#
# More tiles mean more refreshes, and each may round. Here 4096 keys are cut into 1 to 4096 tiles, in float32, and compared
# with float64. The error hardly depends on the number of tiles up to about 128, and stays at a few units in the last place:
# most of it comes from adding 4096 terms.

# %%
LONG, ROWS, WIDTH = 4096, 64, 32
SCALE_LONG = WIDTH**-0.5
ql, kl, vl = (random.standard_normal((n, WIDTH)).astype(np.float32) for n in (ROWS, LONG, LONG))


def long_attention(tile, dtype):
    """(out, log-sum-exp, refreshes other than 1 per row) over tiles of this many keys."""
    q, k, v = (x.astype(dtype) for x in (ql, kl, vl))
    x = (q @ k.T) * dtype(SCALE_LONG)
    m, l = np.full(ROWS, -FLT_MAX, dtype), np.zeros(ROWS, dtype)
    acc, refreshes = np.zeros((ROWS, WIDTH), dtype), np.zeros(ROWS)
    for c in range(0, LONG, tile):
        part = x[:, c : c + tile]
        m_new = np.maximum(m, part.max(axis=1))
        refresh, p = np.exp(m - m_new), np.exp(part - m_new[:, None])
        refreshes += (refresh != 1) & (c > 0)
        m, l = m_new, l * refresh + p.sum(axis=1)
        acc = acc * refresh[:, None] + p @ v[c : c + tile]
    return acc / l[:, None], m + np.log(l), refreshes.mean()


exact_out, exact_lse, _ = long_attention(LONG, np.float64)
tiles = 2 ** np.arange(13)
EPS = np.finfo(np.float32).eps
errors, refreshes = [], []
for count in tiles:
    out_t, lse_t, met = long_attention(LONG // count, np.float32)
    of_out = np.linalg.norm(out_t - exact_out) / np.linalg.norm(exact_out)
    errors.append((of_out / EPS, np.abs(lse_t - exact_lse).max() / np.abs(exact_lse).max() / EPS))
    refreshes.append(met)
errors = np.array(errors)
assert errors[tiles <= LONG // 32].max() <= 2 * errors[0].max() + 2  # tiles of 32 keys and more
assert errors.max() < 32  # one key at a time: still a few units in the last place

fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
ax.plot(tiles, errors[:, 0], "o-", color="#24608f", label="output (relative L2)")
ax.plot(tiles, errors[:, 1], "s--", color="#d98324", label="log-sum-exp (largest)")
ax.set_xscale("log", base=2)
ax.set(xlabel="tiles", ylabel="error, float32 eps", ylim=(0, None), title="Error over 4096 keys")
ax.set_xticks(tiles[::2], tiles[::2])
ax.grid(alpha=0.3)
ax.legend()
plt.show()
print("tiles :", *tiles)
print("out   :", *(f"{e:.2f}" for e in errors[:, 0]), "eps")

# %% [markdown]
# Why so little? A refresh of exactly 1 does not round, and any other one needs a new maximum. In a random row the t-th tile
# brings one with probability 1/t, so the number of such refreshes grows like the logarithm of the number of tiles.

# %%
harmonic = np.array([np.sum(1 / np.arange(2, n + 1)) for n in tiles])
assert np.all(np.abs(refreshes - harmonic) < 1)
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
ax.plot(tiles, refreshes, "o", color="#24608f", label="measured, mean of 64 rows")
ax.plot(tiles, harmonic, color="black", linewidth=1, label="expected, 1/2 + 1/3 + ... + 1/tiles")
ax.set_xscale("log", base=2)
ax.set(xlabel="tiles", ylabel="refreshes per row", title="Refreshes other than 1, over 4096 keys")
ax.set_xticks(tiles[::2], tiles[::2])
ax.grid(alpha=0.3)
ax.legend()
plt.show()

# %% [markdown]
# ## 9. Which tiles each sparse mode of CANN visits
#
# CANN names its masks by a `sparse_mode` from 0 to 8. A tile of keys and rows is *masked* (never visited), *full* (visited
# without masking by element) or *partial*.
#
# The figures show what the function computes: with a query of 0 all visible keys have the same weight, and with the identity
# as values the output is the weights. They are compared with the definition of each mode, written out in NumPy with
# `d = Skv - Sq`. Modes 7 and 8 are for packed sequences (layout TND), where `d` is that of one sequence.


# %%
def probe(Sq, Skv, **arguments):
    """Which keys are visible to each row, boolean Sq x Skv, by the output of flash_attention_score."""
    packed = arguments.get("input_layout") == "TND"
    query, key, value = np.zeros((Sq, 1, Skv)), np.zeros((Skv, 1, Skv)), np.eye(Skv)[:, None]
    operands = [jnp.asarray(x if packed else x[None], jnp.float32) for x in (query, key, value)]
    arguments = {"input_layout": "BSND", **arguments}
    weights = jax_fa.flash_attention_score(*operands, head_num=1, **arguments).attention_out
    weights = np.asarray(weights).reshape(Sq, Skv)
    visible = weights > 0
    count = visible.sum(axis=1, keepdims=True)
    assert close(weights, visible / np.maximum(count, 1), 1e-6)  # uniform over the visible keys
    return visible


ROW_COUNT, KEY_COUNT = 40, 56
rows_q, rows_k = (10, 14, 16), (16, 18, 22)  # three packed sequences
i, j = np.arange(ROW_COUNT)[:, None], np.arange(KEY_COUNT)
d = KEY_COUNT - ROW_COUNT


def packed(within):
    """Block by block: `within(i, j, d, is_first, is_last)` inside each sequence, nothing outside."""
    visible, r, c = np.zeros((ROW_COUNT, KEY_COUNT), bool), 0, 0
    for b, (sq, skv) in enumerate(zip(rows_q, rows_k, strict=True)):
        block = within(np.arange(sq)[:, None], np.arange(skv), skv - sq, b == 0, b == len(rows_q) - 1)
        visible[r : r + sq, c : c + skv] = block
        r, c = r + sq, c + skv
    return visible


hidden = ((i // 8 + j // 8) % 3 == 1) | ((i % 8 > 4) & (j // 16 == 2))  # a mask of the caller's, 1 = masked
own = {"atten_mask": jnp.asarray(hidden)}
tnd = {
    "input_layout": "TND",
    "actual_seq_qlen": tuple(np.cumsum(rows_q).tolist()),
    "actual_seq_kvlen": tuple(np.cumsum(rows_k).tolist()),
}
band = {"pre_tokens": 20, "next_tokens": 3}
MODES = [
    ("0 defaultMask, no mask", {"sparse_mode": 0}, (i >= 0) & (j >= 0)),
    (
        "0 with pre 12, next 20",
        {"sparse_mode": 0, "pre_tokens": 12, "next_tokens": 20},
        (i - 12 <= j) & (j <= i + 20),
    ),
    ("1 allMask", {"sparse_mode": 1, **own}, ~hidden),
    ("2 leftUpCausal", {"sparse_mode": 2}, j <= i),
    ("3 rightDownCausal", {"sparse_mode": 3}, j <= i + d),
    (
        "4 band, pre 20, next 3",
        {"sparse_mode": 4, **band},
        (i + d - 20 <= j) & (j <= i + d + 3),
    ),
    (
        "5 prefix 36, with a mask",
        {"sparse_mode": 5, "prefix": [36], "atten_mask": own["atten_mask"][None, None]},
        ((j <= i + d) | (j < 36)) & ~hidden,
    ),
    ("6 prefix 36, compressed", {"sparse_mode": 6, "prefix": [36]}, (j <= i + d) | (j < 36)),
    ("3 with TND", {"sparse_mode": 3, **tnd}, packed(lambda i, j, d, first, last: j <= i + d)),
    (
        "7 TND, last one: next -5",
        {"sparse_mode": 7, "next_tokens": -5, **tnd},
        packed(lambda i, j, d, first, last: j <= i + d - 5 * last),
    ),
    (
        "8 TND, first one: next 3",
        {"sparse_mode": 8, "next_tokens": 3, **tnd},
        packed(lambda i, j, d, first, last: j <= i + first * (d + 3)),
    ),
]
seen = {}
for title, arguments, definition in MODES:
    seen[title] = probe(ROW_COUNT, KEY_COUNT, **arguments)
    assert np.array_equal(seen[title], np.broadcast_to(definition, (ROW_COUNT, KEY_COUNT))), title


# %%
def kinds(visible, tile=8):
    """Each tile as 0 masked, 1 partial, 2 full."""
    cut = visible.reshape(visible.shape[0] // tile, tile, visible.shape[1] // tile, tile)
    return cut.any(axis=(1, 3)).astype(int) + cut.all(axis=(1, 3))


# A key in a masked tile; a masked and a visible key in a partial tile; a key in a full tile.
colours = ListedColormap(["#e4e4e4", "#fbe3c4", "#7fb2d9", "#24608f"])


def draw(ax, visible):
    each = np.kron(kinds(visible), np.ones((8, 8), int))
    picture = np.where(each == 2, 3, np.where(each == 1, 1 + visible, 0))
    ax.imshow(picture, cmap=colours, vmin=0, vmax=3, extent=(0, KEY_COUNT, ROW_COUNT, 0))
    ax.set_xticks(np.arange(0, KEY_COUNT + 1, 8), [])
    ax.set_yticks(np.arange(0, ROW_COUNT + 1, 8), [])
    ax.grid(color="white", linewidth=0.8)
    ax.tick_params(length=0)


def show(titles, shape, height):
    """One panel for each of these modes, and what the colours mean."""
    fig, axes = plt.subplots(*shape, figsize=(9, height), layout="constrained")
    for ax, title in zip(axes.flat, titles, strict=True):
        draw(ax, seen[title])
        ax.set_title(title)
    for n, text in enumerate(("masked, not visited", "partial, key masked", "partial, key visible", "full")):
        fig.patches.append(plt.Rectangle((0, 0), 0, 0, color=colours(n), label=text))
    fig.legend(handles=fig.patches, loc="outside lower center", ncols=4, frameon=False)
    plt.show()


print(f"{'mode':26} masked partial full tiles")
for title, visible in seen.items():
    print(f"{title:26} {'{:6} {:7} {:4}'.format(*np.bincount(kinds(visible).flat, minlength=3))}")

# %% [markdown]
# Modes of one sequence. Rows run down and keys to the right; a white square is a tile of 8 rows and 8 keys.

# %%
of_one = [title for title, arguments, _ in MODES if not {"atten_mask", "input_layout"} & arguments.keys()]
show(of_one, (2, 3), 4.6)

# %% [markdown]
# Three packed sequences. Mode 3 is causal in each of them; modes 7 and 8 move the diagonal of the last and of the first.

# %%
of_packed = [title for title, arguments, _ in MODES if "input_layout" in arguments]
show(of_packed, (1, 3), 2.7)

# %% [markdown]
# A mask that the caller passes as an array. Its values are known only once it is read, so its masked tiles save no time,
# although they are shown.

# %%
of_array = [title for title, arguments, _ in MODES if "atten_mask" in arguments]
show(of_array, (1, 2), 3.1)

# %% [markdown]
# All the other modes are two integers per row: the keys `lower[i] <= j < upper[i]` are visible to row `i`. The kernels read
# these integers, and no mask of size `Sq x Skv`.


# %%
def intervals(visible):
    """(lower, upper) of each row; empty rows have 0, 0."""
    some = visible.any(axis=1)
    lower = np.where(some, visible.argmax(axis=1), 0)
    return lower, np.where(some, visible.shape[1] - visible[:, ::-1].argmax(axis=1), 0)


for title in of_one + of_packed:
    lower, upper = intervals(seen[title])
    assert np.array_equal(seen[title], (lower[:, None] <= j) & (j < upper[:, None]))

lower, upper = intervals(seen["4 band, pre 20, next 3"])
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
ax.barh(np.arange(ROW_COUNT), upper - lower, left=lower, height=1, color="#b9d5ea", label="visible keys")
for bound, name, shade in ((lower, "lower", "#24608f"), (upper, "upper", "#b35a00")):
    edges = np.arange(ROW_COUNT + 1) - 0.5
    ax.stairs(bound, edges, orientation="horizontal", baseline=None, color=shade, linewidth=2.5, label=name)
ax.set(xlim=(0, KEY_COUNT), ylim=(ROW_COUNT - 0.5, -0.5), xlabel="key", ylabel="row")
ax.set_title("4 band, pre 20, next 3")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
plt.show()

# %% [markdown]
# Fully masked rows are 0, as in section 5. Mode 3 has them where there are more rows than keys.

# %%
tall = probe(24, 16, sparse_mode=3)
assert np.array_equal(tall, np.arange(16) <= np.arange(24)[:, None] - 8)
assert not tall[:8].any() and tall[8:].any(axis=1).all()
lower, upper = intervals(seen["2 leftUpCausal"])
assert np.all(lower == 0) and np.array_equal(upper, np.arange(ROW_COUNT) + 1)
visits = {title: int((kinds(visible) > 0).sum()) for title, visible in seen.items()}
assert visits["2 leftUpCausal"] == 15 and visits["3 rightDownCausal"] == 25  # of 35: 1+2+3+4+5 and 3+4+5+6+7
print("causal, top left: 15 of 35 tiles visited; bottom right: 25")
