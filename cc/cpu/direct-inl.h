// Few query rows (decoding): the time is that of reading keys and values once, so they are read in place
// instead of being packed. A task takes all key heads of a range of keys.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/direct_dots-inl.h"
#include "cpu/direct_values-inl.h"
#include "cpu/forward_plan-inl.h"
#include "cpu/gemm-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/softmax-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Calls what(k, j, count) for all heads and `per` elements at a time of [first, last), `count` of them from j on and at
// most `most`. Where heads lie side by side, a few neighbours of each head in turn, which is near the order of the memory.
template <typename What>
inline void ReadInOrder(const Call& c, const View& x, int64_t first, int64_t last, int64_t per, int64_t most,
                        const What& what) {
  const int64_t n = last - first, together = c.K > 1 && x.head < x.row ? DirectNeighbours(x.dtype) : n;
  for (int64_t from = 0; from < n; from += together)
    for (int64_t k = 0; k < c.K; ++k)
      for (int64_t i = from; i < n && i < from + together; i += per * most) {
        const int64_t given = (n - i + per - 1) / per;
        what(k, first + i, given < most ? given : most);
      }
}

// The rows of all key heads (n of each, one head after the other in the scratch) over the keys j0 + [0, width), of which
// [first, last) are visible to any row.
template <bool kPairs>
struct DirectBlock {
  static constexpr int64_t kPer = Unit<kPairs>::kElements;

  const Call& c;
  const ForwardScratch<kPairs>& s;
  int64_t b, n, j0, width, first, last;
  int64_t dv = Panels(c.Dv) * kPanel;

  void Dots(int64_t k, int64_t j) const {
    DirectDots<kPairs>(c, b, k, n, s.q + k * n * s.q_row, s.q_row, j0, j, last, s.stage, s.logits + k * n * s.s_row,
                       s.s_row);
  }

  void Soften(int64_t k, const float* nan_marker) const {
    const int64_t c0 = first / kLanes * kLanes, c1 = RoundUp(last, kLanes);
    for (int64_t r = k * n; r < (k + 1) * n; ++r)
      SoftmaxRow<kPairs>(c, RowAt(c, b, k, r - k * n), j0, Within(s.lo[r], s.hi[r], j0, width), c0, c1, nan_marker,
                         s.tmp, s.logits + r * s.s_row, s.m + r, s.l + r, s.acc + r * dv);
  }

  // From the products of a head on, with packed values. Those that are not finite are kept apart from the rows to which
  // they are masked.
  void Packed(int64_t k) const {
    const int64_t units = Units<kPairs>(width), from = first / kLanes * kLanes / kPer, to = Units<kPairs>(last);
    float* nan_marker = IsMasked(c) ? s.own.nan_marker : nullptr;
    const bool any = PackValues<kPairs>(c.value, c.Dv, b, k, j0, width, s.stage, nan_marker, s.own.values);
    Soften(k, any ? nan_marker : nullptr);
    for (int64_t p = 0; p < Panels(c.Dv); ++p)
      Gemm<kPairs, true>(n, to - from, s.logits + k * n * s.s_row + from, s.s_row, 1,
                         s.own.values + (p * units + from) * kPanel, s.acc + k * n * dv + p * kPanel, dv);
  }

  // Where a value is not finite and its key may be masked, whose weight of 0 gives NaN: once more, with packed values.
  // The max stays as it is; the sum is what it was without this block.
  void Again(int64_t k) const {
    for (int64_t r = k * n; r < (k + 1) * n; ++r)
      s.l[r] = s.before_l[r] * (s.m[r] > s.before_m[r] ? __builtin_expf(s.before_m[r] - s.m[r]) : 1.0f);
    for (int64_t j = first; j < last; j += kDirectTile) Dots(k, j);
    Packed(k);
  }

  // Adds the sums of the block, which start from zero: to continue those of the blocks before would cost accuracy.
  void AddSums(int64_t k) const {
    float *acc = s.acc + k * n * dv, *sums = s.sums + k * n * dv;
    if (IsMasked(c) && ZeroOrNaN(sums, n * dv) != 0.0f) return Again(k);
    Combine(n * dv, acc, sums, [](F x, F more) { return x + more; });
  }

  void Run() const {
    const int64_t rows = n * c.K;
    ReadInOrder(c, c.key, first, last, 1, kDirectTile, [&](int64_t k, int64_t j, int64_t) { Dots(k, j); });
    if (c.value.col != 1) {
      for (int64_t k = 0; k < c.K; ++k) Packed(k);
      return;
    }
    __builtin_memcpy(s.before_m, s.m, sizeof(float) * static_cast<size_t>(rows));
    __builtin_memcpy(s.before_l, s.l, sizeof(float) * static_cast<size_t>(rows));
    for (int64_t k = 0; k < c.K; ++k) Soften(k, nullptr);
    Fill(s.sums, 0, rows * dv, 0.0f);
    ReadInOrder(c, c.value, first / kPer * kPer, last, kPer, DirectNeighbours(c.value.dtype) / kPer,
                [&](int64_t k, int64_t j, int64_t count) {
                  DirectValues<kPairs>(c, b, k, n, j0, j, count, last, s.zeros, s.logits + k * n * s.s_row, s.s_row,
                                       s.sums + k * n * dv, dv);
                });
    for (int64_t k = 0; k < c.K; ++k) AddSums(k);
  }
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
