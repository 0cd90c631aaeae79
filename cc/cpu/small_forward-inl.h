// The forward of small heads.
#pragma once

#include "call.h"
#include "cpu/forward_results-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/small-inl.h"
#include "cpu/softmax-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Products of plain rows to weights; max and sum.
template <bool kMasked>
inline void PlainWeights(const Call& c, const SmallScratch& s, int64_t n) {
  const F scale = Set(c.scale), none = Set(-__builtin_inff());
  for (int64_t r = 0; r < n; r += kLanes) {
    F m = Set(-kFloatMax), l = Set(0.0f), lo = l, hi = l;
    if (kMasked) lo = Load(s.lo + r), hi = Load(s.hi + r);
    for (int64_t j = 0; j < c.Skv; ++j) {
      float* p = s.p + j * s.layout.of_key + r;
      F x = Rounded(Load(p) * scale);
      if (kMasked) x = OnlyVisible(lo, hi, j, x + Set(s.key_marks[j]), none);
      m = Max(m, x);
      Store(p, x);
    }
    for (int64_t j = 0; j < c.Skv; ++j) {
      float* p = s.p + j * s.layout.of_key + r;
      const F w = Exp(Load(p) - m);
      l = l + w;
      Store(p, w);
    }
    Store(s.m + r, m);
    Store(s.l + r, l);
  }
}

// The same of any rows.
inline void AnyWeights(const Call& c, const SmallScratch& s, Row row, int64_t n, const float* marks) {
  const int64_t s_row = s.layout.of_row;
  Fill(s.m, 0, n, -kFloatMax);
  Fill(s.l, 0, n, 0.0f);
  for (int64_t r = 0; r < n; r += kTileRows) {
    const int64_t count = n - r < kTileRows ? n - r : kTileRows;
    Range visible[kTileRows];
    const Row first = row;
    for (int64_t i = 0; i < count; ++i, row = After(c, row)) visible[i] = Visible(c, row);
    Softmax<false>(c, first, count, 0, 0, s_row, marks, s.tmp, {s.p + r * s_row, s.m + r, s.l + r, nullptr, s_row, 0},
                   [&](int64_t i) { return visible[i]; });
  }
}

inline void SmallForwardHead(const Call& c, const SmallScratch& s, int64_t b, int64_t k) {
  const int64_t n = c.G() * c.Sq, h = k * c.G();
  const bool masked = IsMasked(c);
  if (masked) Fill(s.key_marks, 0, c.Skv, 0.0f);
  const FloatRows q = ReadRows(c.query, b, h, n, c.Sq, c.D, s.q);
  const FloatRows keys = ReadRows(c.key, b, k, c.Skv, c.Skv, c.D, s.keys);
  const FloatRows values = ReadRows(c.value, b, k, c.Skv, c.Skv, c.Dv, s.values, masked ? s.key_marks : nullptr);
  Dots(c, s.layout, n, q, keys, c.D, s.p);
  Row row{b, h, 0};
  if (!s.layout.plain) {
    AnyWeights(c, s, row, n, masked && ZeroOrNaN(s.key_marks, c.Skv) != 0.0f ? s.key_marks : nullptr);
  } else if (masked) {
    for (int64_t r = 0; r < n; ++r, row = After(c, row)) ReadRange(c, s, row, r);
    PlainWeights<true>(c, s, n);
  } else {
    PlainWeights<false>(c, s, n);
  }
  Combination(n, c.Skv, s.p, s.layout.of_row, s.layout.of_key, values, c.Dv, s.sums, s.row);
  FinishRows(c, {b, h, 0}, n, s.sums, s.row, s.m, s.l);
}

inline void SmallForward(const Call& c, const Runner& runner) {
  RunSmall(c, runner, c.B * c.K, HeadsOfTask(c),
           [&](const SmallScratch& s, int64_t head) { SmallForwardHead(c, s, head / c.K, head % c.K); });
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
