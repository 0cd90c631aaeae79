"""Decoding with a KV cache in pages, beside the same cache without pages. One line per cache; times are minima.

Run: python benchmarks/paged_attention.py [--seconds 10] [--heads 32:8] [--length 32768] [--order random|sequential]

`rate` is that of tokens, as a fraction of the contiguous bfloat16 cache's, and of that of bfloat16 pages of the same size.
Fractions are medians over rounds, in which all take turns: machines change their pace.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa

HEAD_DIM = 128
SIZES = (16, 128)


def main() -> None:
    args = _parser().parse_args()
    query_heads, key_heads = map(int, args.heads.split(":"))
    runs = _runs(query_heads, key_heads, args.length, args.order)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + args.seconds
    while time.perf_counter() < end:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    print(f"{'cache':24} {'ms':>8} {'rate: contiguous':>18} {'bfloat16 pages':>16}")
    for name, took in seconds.items():
        pages = f"bfloat16 pages of {name.split()[-1]}"
        of = [_fraction(seconds, reference, name) for reference in ("contiguous", pages)]
        print(f"{name:24} {min(took) * 1e3:8.2f} {of[0]:>18} {of[1]:>16}")


def _fraction(seconds: dict[str, list[float]], reference: str, name: str) -> str:
    if reference not in seconds or reference == name:
        return ""
    pairs = zip(seconds[reference], seconds[name], strict=True)
    return f"{statistics.median(theirs / ours for theirs, ours in pairs):.2f}"


def _runs(heads: int, key_heads: int, length: int, order: str) -> dict[str, Callable[[], Any]]:
    random = np.random.default_rng(0)
    query = jnp.asarray(random.standard_normal((1, heads, HEAD_DIM)), jnp.bfloat16)
    keys, values = (
        jnp.asarray(random.standard_normal((length, key_heads, HEAD_DIM)), jnp.float32) for _ in range(2)
    )
    lengths = jnp.array([length])
    scale = jnp.full((1, 1, key_heads), 1 / 30)
    whole = [x[None].astype(jnp.bfloat16) for x in (keys, values)]

    @jax.jit
    def contiguous(query, key, value, lengths):
        mask = jax_fa.masks.Causal(offset=lengths - 1)
        return jax_fa.flash_attention(query[:, None], key, value, mask=mask)

    runs = {"contiguous": _timed(contiguous, query, *whole, lengths)}
    for size in SIZES:
        count = length // size
        at = random.permutation(count) if order == "random" else np.arange(count)
        table = jnp.asarray(at, jnp.int32)[None]
        pools = [x.reshape(count, size, key_heads, HEAD_DIM) for x in (keys, values)]
        scales = jnp.broadcast_to(scale, (count, size, key_heads)) + 0
        for dtype in ("bfloat16", "int8", "float8_e4m3fn"):
            given = {} if dtype == "bfloat16" else {"key_scale": scales, "value_scale": scales}
            stored = [(x * 30 if given else x).astype(dtype) for x in pools]
            runs[f"{dtype} pages of {size}"] = _timed(
                jax.jit(jax_fa.paged_attention), query, *stored, table, lengths, **given
            )
    return runs


def _timed(function: Callable, *args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(function(*args, **options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--heads", default="32:8", metavar="N:K")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--order", choices=("random", "sequential"), default="random")
    return parser


if __name__ == "__main__":
    main()
