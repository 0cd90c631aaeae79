// The forward of small heads.
#pragma once

#include "call.h"
#include "cpu/forward-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/small-inl.h"
#include "cpu/softmax-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

inline void SmallForwardHead(const Call& c, const SmallScratch& s, int64_t b, int64_t k) {
  const int64_t n = c.G() * c.Sq, h = k * c.G();
  const FloatRows q = ReadRows(c.query, b, h, n, c.Sq, c.D, s.q);
  const FloatRows keys = ReadRows(c.key, b, k, c.Skv, c.Skv, c.D, s.keys);
  float* const marks = IsMasked(c) ? s.key_marks : nullptr;
  if (marks != nullptr) Fill(marks, 0, s.s_row, 0.0f);
  const FloatRows values = ReadRows(c.value, b, k, c.Skv, c.Skv, c.Dv, s.values, marks);
  const bool any = marks != nullptr && ZeroOrNaN(marks, s.s_row) != 0.0f;
  Dots(n, q, c.Skv, keys, c.D, s.p, s.s_row);
  Row row{b, h, 0};
  for (int64_t r = 0; r < n; r += kTileRows) {
    const int64_t count = n - r < kTileRows ? n - r : kTileRows;
    Range visible[kTileRows];
    const Row first = row;
    for (int64_t i = 0; i < count; ++i, row = After(c, row)) {
      visible[i] = Visible(c, row);
      s.m[r + i] = -kFloatMax;
      s.l[r + i] = 0.0f;
    }
    Softmax<false>(c, first, count, 0, 0, s.s_row, any ? marks : nullptr, s.tmp,
                   {s.p + r * s.s_row, s.m + r, s.l + r, nullptr, s.s_row, 0}, [&](int64_t i) { return visible[i]; });
  }
  Combination(n, c.Skv, s.p, s.s_row, 1, values, c.Dv, s.sums, s.row);
  row = {b, h, 0};
  for (int64_t r = 0; r < n; ++r, row = After(c, row)) FinishRow(c, row, s.sums + r * s.row, s.m[r], s.l[r]);
}

inline void SmallForward(const Call& c, const Runner& runner) {
  RunSmall(c, runner, c.B * c.K,
           [&](const SmallScratch& s, int64_t head) { SmallForwardHead(c, s, head / c.K, head % c.K); });
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
