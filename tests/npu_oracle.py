"""`torch_npu.npu_fusion_attention` in plain NumPy, with its gradients: what a call of it must give.

The arguments are torch_npu's own, so that a test hands the same ones to this and to the library. The mathematics is that
of `cann_oracle`, in float64 or (`dtype`) with a naive implementation's roundings. Imports nothing from the library.
"""

from typing import Any

import numpy as np

from jax_fa.testing import cann_oracle as oracle

UNBOUNDED = 2147483647


def npu_fusion_attention(
    query,
    key,
    value,
    head_num,
    input_layout,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    scale=1.0,
    keep_prob=1.0,
    pre_tockens=UNBOUNDED,
    next_tockens=UNBOUNDED,
    inner_precise=0,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
    gen_mask_parallel=True,
    sync=False,
    softmax_layout="",
    sink=None,
    dropout_mask=None,
    seed=0,
    offset=0,
    *,
    pse_type=1,
    q_start_idx=None,
    kv_start_idx=None,
    query_rope=None,
    key_rope=None,
    keep: Any = None,  # drawn bits, `B N Sq Skv` (TND: `1 N T T`)
    dy: Any,
    dtype: Any = None,
) -> dict[str, np.ndarray]:
    """attention, max, sum and gradients by the names of their arrays."""
    layout, N = input_layout.upper(), head_num
    packed = layout == "TND"
    K = _heads(query, key, layout, N)
    q_ends, kv_ends = (_ends(x, packed) for x in (actual_seq_qlen, actual_seq_kvlen))

    def parts(x, heads: int, ends):
        return oracle.split(np.asarray(x, np.float64), layout, heads, ends)

    q, k, v = parts(query, N, q_ends), parts(key, K, kv_ends), parts(value, K, kv_ends)
    D = q[0].shape[-1]
    if query_rope is not None:
        q, k = (
            [np.concatenate(pair, axis=-1) for pair in zip(x, parts(rope, heads, ends), strict=True)]
            for x, rope, heads, ends in ((q, query_rope, N, q_ends), (k, key_rope, K, kv_ends))
        )
    lengths = [(len(a), len(b)) for a, b in zip(q, k, strict=True)]
    shifts = None
    if pse is not None:
        start = 0 if pse_type < 2 else (q_start_idx or [0])[0] - (kv_start_idx or [0])[0]
        form, shared = _pse_form(np.shape(pse), pse_type, lengths, N, packed)
        shifts = oracle.Pse(np.asarray(pse), pse_type, form, shared, lengths, packed, N, start)
    weights = _weights(dropout_mask, keep, lengths, N, packed)
    with_rows = [b for b, (rows, _) in enumerate(lengths) if rows]
    found = []
    for b, dout in enumerate(parts(dy, N, q_ends)):
        seen = np.ones(lengths[b], bool)
        if atten_mask is not None:
            seen = oracle.visible(
                sparse_mode,
                *lengths[b],
                pre=pre_tockens,
                following=next_tockens,
                prefix=prefix[b] if prefix else 0,
                apart=sparse_mode in (7, 8) and b == with_rows[-1 if sparse_mode == 7 else 0],
            )
        if atten_mask is not None and sparse_mode in (0, 1, 5):
            seen = seen & ~_own_mask(np.asarray(atten_mask) != 0, b, lengths, N)
        sequence = oracle.Sequence(
            q=q[b],
            k=k[b],
            v=v[b],
            visible=np.broadcast_to(seen, (N, *lengths[b])),
            scale=float(scale),
            shift=0.0 if shifts is None else shifts.shift(b, float(scale)),
            weight=weights[b] / keep_prob,
            dout=dout,
            sink=sink,
        )
        found.append(sequence.compute(dtype))
    tail = 0 if not packed else len(query) - q_ends[-1], 0 if not packed else len(key) - kv_ends[-1]
    stacked = {
        name: _padded(oracle.join([x[name] for x in found], layout), tail[name in ("dk", "dv")])
        for name in ("out", "dq", "dk", "dv")
    }
    results = {"attention": stacked["out"], "value": stacked["dv"]}
    results |= _gradients(stacked, query_rope is not None, layout, N, K, D)
    for name in ("max", "sum"):
        fill = -oracle.FLT_MAX if name == "max" else oracle.FLT_MAX
        results[name] = _statistics([x[name] for x in found], layout, softmax_layout, tail[0], fill)
    if shifts is not None:
        results["pse"] = shifts.gradient([x["dx"] for x in found], float(scale))
    if sink is not None:
        results["sink"] = np.sum([x["dsink"] for x in found], axis=0)
    return results


def _heads(query, key, layout: str, N: int) -> int:
    if layout in ("BSH", "SBH"):
        return key.shape[-1] // (query.shape[-1] // N)
    return key.shape[layout.index("N")]


def _ends(ends, packed: bool) -> tuple[int, ...]:
    """Zeros after the last end are empty sequences."""
    return tuple(np.maximum.accumulate(np.asarray(ends)).tolist()) if packed else ()


def _pse_form(shape, pse_type: int, lengths, N: int, packed: bool) -> tuple[str, bool]:
    if pse_type > 1:
        return "slopes", len(shape) == 1
    if packed and len(shape) == 1:
        return ("row" if shape == (N * sum(skv for _, skv in lengths),) else "full"), False
    table = shape[2] == 1024 and lengths[0][0] != 1024
    return "table" if table else "row" if shape[2] == 1 else "full", shape[0] == 1


def _weights(dropout_mask, keep, lengths, N: int, packed: bool) -> list[Any]:
    if dropout_mask is not None:
        return oracle.keep_bits(np.asarray(dropout_mask), lengths, N)
    if keep is None:
        return [1.0 for _ in lengths]
    if not packed:
        return list(keep)
    starts = np.cumsum([(0, 0), *lengths], axis=0)
    return [
        keep[0, :, r : r + sq, c : c + skv] for (r, c), (sq, skv) in zip(starts[:-1], lengths, strict=True)
    ]


def _own_mask(mask, b: int, lengths, N: int) -> np.ndarray:
    sq, skv = lengths[b]
    if mask.ndim == 4:
        mask = mask[b if len(mask) > 1 else 0]
    total = tuple(sum(pair[i] for pair in lengths) for i in (0, 1))
    longest = tuple(max(pair[i] for pair in lengths) for i in (0, 1))
    if mask.shape[-2:] == longest:
        return mask[..., :sq, :skv]
    assert mask.shape[-2:] == total
    row, column = (sum(pair[i] for pair in lengths[:b]) for i in (0, 1))
    return mask[..., row : row + sq, column : column + skv]


def _padded(x: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((rows, *x.shape[1:]), x.dtype)]) if rows else x


def _gradients(stacked, with_rope: bool, layout: str, N: int, K: int, D: int) -> dict[str, np.ndarray]:
    if not with_rope:
        return {"query": stacked["dq"], "key": stacked["dk"]}
    found: dict[str, np.ndarray] = {}
    for name, x, heads in (("query", stacked["dq"], N), ("key", stacked["dk"], K)):
        folded = layout in ("BSH", "SBH")
        x = x.reshape(*x.shape[:2], heads, -1) if folded else x
        own, rope = x[..., :D], x[..., D:]
        if folded:
            own, rope = (a.reshape(*a.shape[:2], -1) for a in (own, rope))
        found |= {name: own, f"{name}_rope": rope}
    return found


def _statistics(parts, layout: str, softmax_layout: str, tail: int, fill: float) -> np.ndarray:
    if layout != "TND" or softmax_layout == "TND":
        found = oracle.join_statistics(parts, layout)
        return np.concatenate([found, np.full((tail, *found.shape[1:]), fill)]) if tail else found
    # Sequence after sequence, each as `[N, Sq_b]`; the shape is `[T, N, 8]` all the same.
    N = len(parts[0])
    flat = np.concatenate([part.reshape(-1) for part in parts] + [np.full(tail * N, fill)])
    return np.repeat(flat.reshape(-1, N)[..., None], 8, axis=-1)
