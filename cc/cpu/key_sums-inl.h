// The gradients of keys and values: what tasks that share a key head sum apart, and the way to the results.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/scratch-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// The sums of a key head: dk, then dv, in rows of whole vectors. Those of a split follow those of the one before.
struct KeySums {
  int64_t dk_row, dv_row;  // floats of a row
  int64_t dv_at, size;     // where dv begins, and how many floats both have
  int64_t splits;          // of a key head
  int64_t key_block;       // keys of a task that adds
};

// The gradients of keys j0 + [0, width), which then are complete; `scale`: what those of keys lack.
inline void StoreKeySums(const Call& c, const KeySums& sums, int64_t b, int64_t k, int64_t j0, int64_t width,
                         const float* dk, const float* dv, float scale) {
  for (int64_t j = 0; c.dkey && j < width; ++j)
    StoreRow(dk + j * sums.dk_row, scale, c.dkey.Bytes(b, k, j0 + j), c.dkey.dtype, c.dkey.col, c.D);
  for (int64_t j = 0; c.dvalue && j < width; ++j)
    StoreRow(dv + j * sums.dv_row, 1.0f, c.dvalue.Bytes(b, k, j0 + j), c.dvalue.dtype, c.dvalue.col, c.Dv);
}

// Adds the sums of all splits, in the place of the first, and stores them; `scale_of(b, k)`: see above.
template <typename Fn>
inline void AddKeySums(const Call& c, const KeySums& sums, const Runner& runner, float* parts, const Fn& scale_of) {
  const int64_t blocks = (c.Skv + sums.key_block - 1) / sums.key_block;
  Run(runner, c.B * c.K * blocks, [&](int64_t task) {
    const int64_t head = task / blocks, b = head / c.K, k = head % c.K, j0 = task % blocks * sums.key_block;
    const int64_t width = j0 + sums.key_block < c.Skv ? sums.key_block : c.Skv - j0;
    float* const of_head = parts + head * sums.splits * sums.size;
    float *const dk = of_head + j0 * sums.dk_row, *const dv = of_head + sums.dv_at + j0 * sums.dv_row;
    const auto add = [&](float* total, int64_t row, int64_t columns) {
      for (int64_t split = 1; split < sums.splits; ++split)
        for (int64_t at = 0; at < width * row; at += row)
          for (int64_t d = at; d < at + columns; d += kLanes)
            Store(total + d, Load(total + d) + Load(total + split * sums.size + d));
    };
    if (c.dkey) add(dk, sums.dk_row, c.D);
    if (c.dvalue) add(dv, sums.dv_row, c.Dv);
    StoreKeySums(c, sums, b, k, j0, width, dk, dv, scale_of(b, k));
  });
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
