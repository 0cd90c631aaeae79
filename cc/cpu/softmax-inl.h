// From a row of products to weights: the online softmax.
#pragma once

#include "call.h"
#include "cpu/dropout-inl.h"
#include "cpu/logits-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/simd-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// The largest of a whole number of vectors, lane by lane. For a row with a NaN the result may be any value: its sum is NaN in
// any case.
inline F RowMax(const float* x, int64_t from, int64_t to) {
  F a = Set(-__builtin_inff()), b = a;
  int64_t j = from;
  for (; j + 2 * kLanes <= to; j += 2 * kLanes) {
    a = Max(a, Load(x + j));
    b = Max(b, Load(x + j + kLanes));
  }
  if (j < to) a = Max(a, Load(x + j));
  return Max(a, b);
}

// exp(scale x - m), the one formula of both passes: the weights of the backward are those that the sum l is made of. The
// logit scale x is rounded like the max among them, so that the largest weight is 1 exactly.
JAX_FA_INLINE F Weight(F x, F scale, F m) { return Exp(Rounded(x * scale) - m); }

// Lanes: rows whose range has key j.
JAX_FA_INLINE F OnlyVisible(F lo, F hi, int64_t j, F x, F masked) {
  const F at = Set(static_cast<float>(j)), next = Set(static_cast<float>(j + 1));
  return Select(Equal(Max(lo, at), at), Select(Equal(Max(hi, next), hi), x, masked), masked);
}

// p = exp(scale s - m) in place over a whole number of vectors; returns the sum, lane by lane. With kPairs the results are
// rounded and stored as pairs of neighbours, from s[from / 2] on, and the last pairs are filled up with zeros. Asks for what
// lies `ahead` of them.
template <bool kPairs>
inline F RowExp(float* s, int64_t from, int64_t to, float scale, float m, int64_t ahead = 0) {
  const F mv = Set(m), f = Set(scale);
  F a = Set(0.0f), b = a;
  int64_t j = from;
  for (; j + 2 * kLanes <= to; j += 2 * kLanes) {
    __builtin_prefetch(s + j + ahead);
    if (kLanes == 16) __builtin_prefetch(s + j + kLanes + ahead);
    const F x = Weight(Load(s + j), f, mv), y = Weight(Load(s + j + kLanes), f, mv);
    if constexpr (kPairs) {
      Store(s + j / 2, Unit<kPairs>::Join(x, y));
    } else {
      Store(s + j, x);
      Store(s + j + kLanes, y);
    }
    a = a + x;
    b = b + y;
  }
  for (; j < to; j += kLanes) {
    const F x = Weight(Load(s + j), f, mv);
    if constexpr (kPairs) {
      Store(s + j / 2, Unit<kPairs>::Join(x, Set(0.0f)));
    } else {
      Store(s + j, x);
    }
    a = a + x;
  }
  return a + b;
}

// The same rounding and storing alone.
template <bool kPairs>
inline void RowJoin(float* s, int64_t from, int64_t to) {
  for (int64_t j = from; j < to; j += 2 * kLanes)
    Store(s + j / 2, Unit<kPairs>::Join(Load(s + j), j + kLanes < to ? Load(s + j + kLanes) : Set(0.0f)));
}

// Columns [from, to) of n rows times the factors of their keys.
inline void ScaleColumns(const float* factors, int64_t n, int64_t from, int64_t to, float* x, int64_t row) {
  const auto scale = [&](float* p, int64_t j) { Store(p + j, Load(p + j) * Load(factors + j)); };
  for (int64_t r = 0; r < n; ++r, x += row) {
    int64_t j = from;
    for (; j + kLanes <= to; j += kLanes) scale(x, j);
    for (; j < to; ++j) x[j] *= factors[j];
  }
}

// Turns a row's products with keys j0 + [c0, c1), of which v are visible, into logits but for a scale, which is returned.
inline float RowLogits(const Call& c, const Row& row, int64_t j0, Range v, int64_t c0, int64_t c1,
                       const float* nan_marker, const SoftCapRows& cap_rows, float* tmp, float* x) {
  const bool plain = IsPlain(c, row, j0, v);
  if (!plain) {
    if (!v.Empty()) ToLogits(c, row, j0, v.lo, v.hi, nan_marker, x, cap_rows, tmp);
  } else if (nan_marker != nullptr) {
    Combine(v.hi - v.lo, x + v.lo, nan_marker + v.lo, [](F y, F more) { return y + more; });
  }
  FillOutside(x, c0, c1, v, -__builtin_inff());
  return plain ? ScaleOf(c, row) : 1.0f;
}

// Raises a row's max m to that of `scale` x, of which x has the lanes. Returns what sums of weights so far are multiplied by, 1
// where it stays.
inline float RaiseMax(F x, float scale, float* m) {
  const float most = Rounded(MaxOf(x) * scale);
  if (!(most > *m)) return 1.0f;
  const float change = *m - most;  // of the first keys a huge one, for which expf takes its slow path to 0
  const float rescale = change < -104.0f ? 0.0f : __builtin_expf(change);
  *m = most;
  return rescale;
}

inline void Rescale(float factor, int64_t n, float* x) {
  const F f = Set(factor);
  for (int64_t d = 0; d < n; d += kLanes) Store(x + d, Load(x + d) * f);
}

// Rows whose online softmax goes on, each with its next products, the first kLanes-aligned column of which is c0: max, sum
// and output (null: there is none yet). `factors`: what visible weights are multiplied by as soon as they are summed, or
// null. `visible(r)`: which of the columns [c0, c1) are.
struct SoftmaxRows {
  float *x, *m, *l, *acc;
  int64_t x_row, acc_row;
  const float* factors = nullptr;
};

// Turns products of n <= kTileRows rows, from `row` on, with keys j0 + [c0, c1) into weights, in steps over all rows: those
// over the lanes of one vector take long, but not that of one row after that of another.
template <bool kPairs, typename Visible>
inline void Softmax(const Call& c, const Row& row, int64_t n, int64_t j0, int64_t c0, int64_t c1,
                    const float* nan_marker, float* tmp, const SoftmaxRows& rows, const Visible& visible) {
  float scale[kTileRows];
  Range v[kTileRows];
  F lanes[kTileRows];
  Row at = row;
  for (int64_t r = 0; r < n; ++r, at = After(c, at)) {
    float* x = rows.x + r * rows.x_row;
    v[r] = visible(r);
    if (v[r].Empty()) v[r] = {c0, c0};
    scale[r] = RowLogits(c, at, j0, v[r], c0, c1, nan_marker, {}, tmp, x);
    lanes[r] = RowMax(x, c0, c1);
  }
  for (int64_t r = 0; r < n; ++r) {
    if (const float rescale = RaiseMax(lanes[r], scale[r], rows.m + r); rescale != 1.0f) {
      if (rows.acc != nullptr) Rescale(rescale, Panels(c.Dv) * kPanel, rows.acc + r * rows.acc_row);
      rows.l[r] *= rescale;
    }
  }
  const bool drops = c.seed || c.drop_bits;
  at = row;
  for (int64_t r = 0; r < n; ++r, at = After(c, at)) {
    float* x = rows.x + r * rows.x_row;
    if (drops || rows.factors != nullptr) {
      lanes[r] = RowExp<false>(x, c0, c1, scale[r], rows.m[r], kRows * rows.x_row);
      if (drops) Drop(c, at, j0, v[r].lo, v[r].hi, x);
      if (rows.factors != nullptr) ScaleColumns(rows.factors, 1, v[r].lo, v[r].hi, x, 0);
      if constexpr (kPairs) RowJoin<kPairs>(x, c0, c1);
    } else {
      lanes[r] = RowExp<kPairs>(x, c0, c1, scale[r], rows.m[r], kRows * rows.x_row);
    }
  }
  for (int64_t r = 0; r < n; ++r) rows.l[r] += Sum(lanes[r]);
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
