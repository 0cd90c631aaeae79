"""Times a loop of decode steps with a KV cache, one layer of attention, against `jax.nn`, in one run.

    python -P benchmarks/decode_loop.py [--context 8192] [--tokens 256] [--rounds 3] [--dtype float32,bfloat16]

Each program is one `lax.scan` over the tokens with a donated cache, as in docs/inference.md: a step writes a key and a value,
and attends to all before it. Heads are those of a small language model (16 query heads, 8 key heads, head_dim 128). Both are
called in turn; the figures are the least times of each.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

import jax_fa
from jax_fa.masks import Causal

B, N, K, D = 1, 16, 8, 128
traced: list[Callable] = []


def ours(query, key, value, position):
    return jax_fa.flash_attention(query, key, value, mask=Causal(offset=position))


def theirs(query, key, value, position):
    lengths = jnp.full((B,), position + 1, jnp.int32)
    return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths)


def write(whole, part, position):
    """As bits: XLA for CPU converts a whole bfloat16 array to update a row of it."""
    integer = {2: jnp.uint16, 4: jnp.uint32}[whole.dtype.itemsize]
    bits, new = (jax.lax.bitcast_convert_type(x, integer) for x in (whole, part))
    bits = jax.lax.dynamic_update_slice_in_dim(bits, new, position, axis=1)
    return jax.lax.bitcast_convert_type(bits, whole.dtype)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def decode(attend, cache, tokens, position):
    """`tokens`: queries, keys and values, `(T, B, 1, heads, D)` each."""
    traced.append(attend)

    def one(carry, token):
        cache, position = carry
        query, *new = token
        cache = tuple(write(whole, part, position) for whole, part in zip(cache, new, strict=True))
        return (cache, position + 1), attend(query, *cache, position)

    (cache, _), outs = jax.lax.scan(one, (cache, position), tokens)
    return cache, outs


def measure(dtype: str, context: int, tokens: int, rounds: int) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    given = [jax.random.normal(k, (tokens, B, 1, h, D), dtype) for k, h in zip(keys, (N, K, K), strict=False)]
    start = [jax.random.normal(k, (B, context, K, D), dtype) for k in keys[3:]]
    position = jnp.int32(context - tokens)
    least, results = dict.fromkeys((ours, theirs), float("inf")), {}
    for turn in range(rounds + 1):  # the first one compiles
        for attend in least:
            cache = tuple(map(jnp.copy, jax.block_until_ready(start)))
            begin = time.perf_counter()
            cache, results[attend] = jax.block_until_ready(decode(attend, cache, given, position))
            if turn:
                least[attend] = min(least[attend], time.perf_counter() - begin)
    assert traced == [ours, theirs], "each compiles once"
    apart = float(jnp.max(jnp.abs(jnp.subtract(*(x.astype(jnp.float32) for x in results.values())))))
    traced.clear()
    a, b = (least[attend] / tokens * 1e6 for attend in (ours, theirs))
    print(
        f"{dtype:9} context {context}, {tokens} tokens: {a:8.1f} us a token; jax.nn {b:8.1f} us, {b / a:.1f}x as long; "
        f"outputs differ by at most {apart:.1g}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--context", type=int, default=8192, help="capacity of the cache (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=256, help="the last ones of it (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--dtype", default="float32,bfloat16", help="(default: %(default)s)")
    options = parser.parse_args()
    for dtype in options.dtype.split(","):
        measure(dtype, options.context, options.tokens, options.rounds)


if __name__ == "__main__":
    main()
