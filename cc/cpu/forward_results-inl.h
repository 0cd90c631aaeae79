// From sums of weighted values, max and sum of weights to the results of the forward: sinks, partial results of ranges of keys,
// storing.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/forward_plan-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/scratch-inl.h"
#include "cpu/simd-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Takes a sink, a logit without a value, into a row's max and sum. Returns what its sum of values is multiplied by.
inline float AddSink(const Call& c, const Row& row, float* m, float* l) {
  const float sink = *c.sinks.At<float>(row.b, row.n), change = sink - *m;
  if (!(change > 0.0f)) {  // the keys' max stays
    *l += change < -104.0f ? 0.0f : __builtin_expf(change);
    return 1.0f;
  }
  const float rescale = change > 104.0f ? 0.0f : __builtin_expf(-change);
  *m = sink;
  *l = *l * rescale + 1.0f;
  return rescale;
}

// The weight of all keys of a row with a sink.
inline float KeyShare(const Call& c, const Row& row, float m, float l) {
  float sum = l;
  const float rescale = AddSink(c, row, &m, &sum);
  return l * rescale / sum;
}

// A row's weighted sum of values, max and sum of weights to the results. The values of a fully masked row are 0.
inline void StoreResult(const Call& c, const Row& row, const float* acc, float m, float l) {
  const bool empty = l == 0.0f;
  const float rescale = c.sinks ? AddSink(c, row, &m, &l) : 1.0f;
  const float factor = empty ? 0.0f : rescale / (l * KeepProbOf(c, row));
  char* out = c.out.Bytes(row.b, row.n, row.i);
  if (!c.rounding) {
    StoreRow(acc, factor, out, c.out.dtype, c.out.col, c.Dv);
  } else {
    char* rounding = c.rounding.Bytes(row.b, row.n, row.i);
    if (c.out.dtype == DType::kBF16) {
      StoreRounded<DType::kBF16>(acc, factor, out, c.out.col, rounding, c.rounding.col, c.Dv);
    } else {
      StoreRounded<DType::kF16>(acc, factor, out, c.out.col, rounding, c.rounding.col, c.Dv);
    }
  }
  *c.m.At<float>(row.b, row.n, row.i) = l == l ? m : l;  // max ignores a NaN
  *c.l.At<float>(row.b, row.n, row.i) = l;
}

// The same where a fully masked row has any values.
inline void FinishRow(const Call& c, const Row& row, float* acc, float m, float l) {
  if (l == 0.0f) Fill(acc, 0, c.Dv, 0.0f);
  StoreResult(c, row, acc, m, l);
}

// Rows of `n` floats each, times a factor, to where and as what they are stored: elements that are neighbours, kLanes or more.
template <typename T, typename Put>
inline void StoreRows(const float* src, int64_t src_row, const float* factors, int64_t rows, int64_t n, T* to,
                      int64_t to_row, const Put& put) {
  for (int64_t r = 0; r < rows; ++r, src += src_row, to += to_row) {
    const F f = Set(factors[r]);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) put(to + i, Scaled(Load(src + i), f));
    if (i < n) put(to + n - kLanes, Scaled(Load(src + n - kLanes), f));
  }
}

// The same for n rows from `row` on.
inline void FinishRows(const Call& c, Row row, int64_t n, float* acc, int64_t acc_row, const float* m, const float* l) {
  if (c.sinks || c.rounding || c.out.col != 1 || c.Dv < kLanes) {
    for (int64_t r = 0; r < n; ++r, row = After(c, row)) FinishRow(c, row, acc + r * acc_row, m[r], l[r]);
    return;
  }
  constexpr int64_t kMost = 64;
  float factors[kMost];
  while (n > 0) {
    int64_t rows = c.Sq - row.i < n ? c.Sq - row.i : n;  // of one head
    rows = rows < kMost ? rows : kMost;
    const float keep = KeepProbOf(c, row);
    float *to_m = c.m.At<float>(row.b, row.n, row.i), *to_l = c.l.At<float>(row.b, row.n, row.i);
    for (int64_t r = 0; r < rows; ++r) {
      const float most = m[r], sum = l[r];
      if (sum == 0.0f) Fill(acc + r * acc_row, 0, c.Dv, 0.0f);
      factors[r] = sum == 0.0f ? 0.0f : 1.0f / (sum * keep);
      to_m[r * c.m.row] = sum == sum ? most : sum;  // max ignores a NaN
      to_l[r * c.l.row] = sum;
    }
    char* const to = c.out.Bytes(row.b, row.n, row.i);
    const auto store = [&](auto* p, const auto& put) {
      StoreRows(acc, acc_row, factors, rows, c.Dv, p, c.out.row, put);
    };
    if (c.out.dtype == DType::kF32) {
      store(reinterpret_cast<float*>(to), [](float* p, F x) { Store(p, x); });
    } else if (c.out.dtype == DType::kBF16) {
      store(reinterpret_cast<uint16_t*>(to), [](uint16_t* p, F x) { StoreBF16(p, x); });
    } else {
      store(reinterpret_cast<uint16_t*>(to), [](uint16_t* p, F x) { StoreF16(p, x); });
    }
    n -= rows, acc += rows * acc_row, m += rows, l += rows;
    row.i += rows;
    if (row.i == c.Sq) row.i = 0, ++row.n;
  }
}

// Merges the partial results of key ranges: output, max and sum of each.
inline void MergeRow(const Call& c, const Row& row, int64_t splits, int64_t split_size, float* part) {
  const int64_t dv = Panels(c.Dv) * kPanel;
  float m = -kFloatMax, l = 0.0f;
  for (int64_t split = 0; split < splits; ++split) {
    const float most = part[split * split_size + dv];
    m = most > m ? most : m;
  }
  for (int64_t split = 0; split < splits; ++split) {
    float* p = part + split * split_size;
    const float f = __builtin_expf(p[dv] - m);
    l += p[dv + 1] * f;
    const F factor = Set(f);
    for (int64_t d = 0; d < dv; d += kLanes) {
      const F before = split == 0 ? Set(0.0f) : Load(part + d);
      Store(part + d, Fma(Load(p + d), factor, before));
    }
  }
  FinishRow(c, row, part, m, l);
}

// Results of ranges of keys, to be merged: per key head, range and row the output, then max and sum.
template <bool kPairs>
class Partials {
 public:
  Partials(const Call& c, const ForwardPlan<kPairs>& plan)
      : plan_(plan),
        dv_(Panels(c.Dv) * kPanel),
        row_(plan.PartRow(c)),
        memory_(plan.splits > 1 ? c.B * c.K * plan.splits * plan.rows * row_ : 0) {}

  void Keep(int64_t head, int64_t split, int64_t r, const float* acc, float m, float l) const {
    float* part = Row(head, split, r);
    if (l == 0.0f) {  // there may be no sums
      Fill(part, 0, dv_, 0.0f);
    } else {
      __builtin_memcpy(part, acc, sizeof(float) * static_cast<size_t>(dv_));
    }
    part[dv_] = m;
    part[dv_ + 1] = l;
  }

  void Merge(const Call& c, const Runner& runner) const {
    Run(runner, c.B * c.K, [&](int64_t head) {
      for (int64_t r = 0; r < plan_.rows; ++r)
        MergeRow(c, RowAt(c, head / c.K, head % c.K, r), plan_.SplitsOf(c, head / c.K), plan_.rows * row_,
                 Row(head, 0, r));
    });
  }

 private:
  float* Row(int64_t head, int64_t split, int64_t r) const {
    return memory_.get() + ((head * plan_.splits + split) * plan_.rows + r) * row_;
  }

  const ForwardPlan<kPairs>& plan_;
  const int64_t dv_, row_;
  const Buffer memory_;
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
