// Dropout of a row of weights.
#pragma once

#include "call.h"
#include "cpu/philox.h"
#include "cpu/rows-inl.h"
#include "cpu/simd-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Zeroes those of p[from..to) that dropout drops.
inline void Drop(const Call& c, const Row& row, int64_t j0, int64_t from, int64_t to, float* p) {
  if (c.seed) {
    const uint32_t* seed = c.seed.At<uint32_t>(row.b, 0);
    const uint32_t* stream = c.stream.At<uint32_t>(row.b, row.n);
    const uint32_t* start = c.dropout_start ? c.dropout_start.At<uint32_t>(row.b, 0) : nullptr;
    const uint32_t i = static_cast<uint32_t>(row.i) + (start ? start[0] : 0);
    const int64_t column = j0 + (start ? start[1] : 0);  // that of p[0]
    for (int64_t block = (column + from) / kKeepColumns; block * kKeepColumns < column + to; ++block) {
      uint32_t keep[4];
      KeepColumns(seed, stream, i, static_cast<uint32_t>(block), ThresholdOf(c, row), keep);
      const int64_t first = block * kKeepColumns - column;  // may lie before `from`, even before 0
      for (int64_t j = 0; j < kKeepColumns; j += kLanes) {
        const int64_t at = first + j;
        const Mask kept = Bits(keep[j / 32] >> (j % 32));
        if (at >= from && at + kLanes <= to) {
          Store(p + at, Select(kept, Load(p + at), Set(0.0f)));
        } else {
          for (int64_t i = at < from ? from - at : 0; i < kLanes && at + i < to; ++i)
            if (!(keep[j / 32] >> (j % 32 + i) & 1)) p[at + i] = 0.0f;
        }
      }
    }
  }
  if (c.drop_bits) {
    const uint8_t* bits = c.drop_bits.At<uint8_t>(row.b, 0);
    const int32_t* offset = c.drop_offset.At<int32_t>(row.b, row.n, row.i);
    for (int64_t j = from; j < to; ++j) {
      const int64_t bit = static_cast<int64_t>(offset[0]) * 8 + offset[1] + j0 + j;
      const int64_t byte = bit >> 3;
      const bool inside = byte >= 0 && byte < c.drop_bytes;
      if (inside && !((bits[byte] >> (bit & 7)) & 1)) p[j] = 0.0f;
    }
  }
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
