// Rows of the backward: what the saved statistics give for each, and from products to p and ds.
#pragma once

#include "call.h"
#include "cpu/alone-inl.h"
#include "cpu/arrays-inl.h"
#include "cpu/backward_plan-inl.h"
#include "cpu/backward_sums-inl.h"
#include "cpu/dropout-inl.h"
#include "cpu/exact_out-inl.h"
#include "cpu/logits-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/softmax-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

constexpr int kDeltas = kLanes >= 8 ? 4 : 2;  // rows together: two of each lie in the stage

// delta = dout.out - dlogsumexp of rows [r, r + n), with what rounding took from out where that is known. Summed in the
// order of the products dout.v, so that for a row with one visible key, where out is v, the two cancel exactly. `stage` is
// that of StageSize, `rest_stage` holds a row.
template <int kMost>
inline void Deltas(const Call& c, int64_t b, int64_t k, int64_t r, int64_t n, float* stage, float* rest_stage,
                   float* delta) {
  const int64_t width = RoundUp(c.Dv, kLanes);
  const float *dout[kMost], *out[kMost];
  float sum[kMost] = {};
  for (int64_t i = 0; i < kMost; ++i) {
    const Row row = RowAt(c, b, k, i < n ? r + i : r);
    dout[i] = ReadRow<false>(c.dout, b, row.n, row.i, c.Dv, stage + 2 * i * width);
    out[i] = ExactOut(c, row, stage + (2 * i + 1) * width, rest_stage);
  }
  for (int64_t d = 0; d < c.Dv; ++d)
#pragma GCC unroll 4
    for (int i = 0; i < kMost; ++i) sum[i] += dout[i][d] * out[i][d];
  for (int64_t i = 0; i < n; ++i) {
    const Row row = RowAt(c, b, k, r + i);
    delta[i] = c.dlogsumexp ? sum[i] - *c.dlogsumexp.At<float>(b, row.n, row.i) : sum[i];
  }
}

// The saved max, and 1 / sum, or 0 for a fully masked row.
inline void ReadStatistics(const Call& c, const Row& row, float* m, float* inverse) {
  const float l = *c.l.At<float>(row.b, row.n, row.i);
  *m = *c.m.At<float>(row.b, row.n, row.i);
  *inverse = l == 0.0f ? 0.0f : 1.0f / l;
}

// The visible range of each row, and of each block of rows.
template <bool kPairs>
inline void RangesOfRows(const Call& c, const BackwardPlan& plan, const BackwardScratch<kPairs>& s, int64_t b,
                         int64_t k) {
  Row row{b, k * c.G(), 0};
  for (int64_t r = 0, block = -1; r < plan.rows; ++r, row = After(c, row)) {
    const Range v = Visible(c, row);
    s.lo[r] = static_cast<int32_t>(v.Empty() ? 0 : v.lo);
    s.hi[r] = static_cast<int32_t>(v.Empty() ? 0 : v.hi);
    if (r == (block + 1) * plan.block_rows) {
      ++block;
      s.block_lo[block] = INT32_MAX, s.block_hi[block] = 0;
    }
    if (v.Empty()) continue;
    s.block_lo[block] = s.lo[r] < s.block_lo[block] ? s.lo[r] : s.block_lo[block];
    s.block_hi[block] = s.hi[r] > s.block_hi[block] ? s.hi[r] : s.block_hi[block];
  }
}

// Whether any row of a block of key head k may see a key of [key0, key1).
template <bool kPairs>
inline bool SeesAny(const Call& c, const BackwardPlan& plan, const BackwardScratch<kPairs>& s, int64_t b, int64_t k,
                    int64_t block, int64_t key0, int64_t key1) {
  if (s.block_lo[block] >= key1 || s.block_hi[block] <= key0) return false;
  const int64_t g0 = block * plan.block_rows,
                rows = plan.rows - g0 < plan.block_rows ? plan.rows - g0 : plan.block_rows;
  return SeesBlocks(c, b, k, g0, rows, key0, key1);
}

// Per row [r, r + n): max, 1 / sum (0 for a fully masked row; NaN where q or dout is not finite, which so propagates to
// the row's visible keys only), and delta.
template <bool kPairs>
inline void PrepareRows(const Call& c, const BackwardScratch<kPairs>& s, int64_t b, int64_t k, int64_t r, int64_t n) {
  for (int64_t i = 0; i < n; i += kDeltas)  // dv is not used yet
    Deltas<kDeltas>(c, b, k, r + i, i + kDeltas < n ? kDeltas : n - i, s.stage, s.dv, s.delta + r + i);
  Row row = RowAt(c, b, k, r);
  for (int64_t end = r + n; r < end; ++r, row = After(c, row)) {
    ReadStatistics(c, row, s.m + r, s.inverse + r);
    if (!IsMasked(c)) continue;
    s.inverse[r] += ZeroOrNaN(ReadRow<false>(c.dout, b, row.n, row.i, c.Dv, s.stage), c.Dv);
    s.inverse[r] += ZeroOrNaN(ReadRow<false>(c.query, b, row.n, row.i, c.D, s.stage), c.D);
    if (s.hi[r] == 0) s.inverse[r] = 0.0f;
  }
}

// Turns n logits but for a scale into weights p, and dout.v into ds. `keep`: 1 / keep_prob or 0; `flags`: whether a key is
// visible, else both are 0, whatever the products are.
template <bool kDrops, bool kMasks>
inline void ToGradients(int64_t n, F scale, F m, F inverse, F delta, const float* keep, const uint8_t* flags, float* p,
                        float* ds) {
  const F none = Set(0.0f);
  EachVector(n, [&](int64_t j, auto lanes) {
    const F w = Weight(lanes.Get(p + j), scale, m) * inverse;
    F weight = w, dp = lanes.Get(ds + j);
    if constexpr (kDrops) {
      const F kept = lanes.Get(keep + j);
      const Mask dropped = IsZero(kept);  // a product 0 * NaN would not be 0
      weight = Select(dropped, none, w * kept);
      dp = Select(dropped, none, dp * kept);
    }
    F by_logit = w * (dp - delta);
    if constexpr (kMasks) {
      const Mask visible = lanes.Flags(flags + j);
      weight = Select(visible, weight, none);
      by_logit = Select(visible, by_logit, none);
    }
    lanes.Put(p + j, weight);
    lanes.Put(ds + j, by_logit);
  });
}

// Turns a row of products q.k and dout.v with keys j0 + [c0, c1), of which v are visible, into weights p and ds,
// in place, 0 where masked.
inline void RowGradients(const Call& c, const GradientRows& s, const Row& row, int64_t r, int64_t j0, Range v,
                         int64_t c0, int64_t c1, float* p, float* ds, const HeadSums& sums) {
  if (v.Empty()) v = {c0, c0};
  float* slope = SoftCapOf(c, row) != 0.0f ? s.slope : nullptr;
  float* by_cap = slope != nullptr && sums.soft_cap != nullptr ? s.by_cap : nullptr;
  F scale = Set(ScaleOf(c, row));
  if (sums.scale != nullptr) __builtin_memcpy(s.products + c0, p + c0, sizeof(float) * static_cast<size_t>(c1 - c0));
  if (!IsPlain(c, row, j0, v)) {
    if (!v.Empty()) ToLogits(c, row, j0, v.lo, v.hi, nullptr, p, {slope, by_cap}, s.tmp);
    scale = Set(1.0f);
  }
  FillOutside(p, c0, c1, v, -__builtin_inff());
  const F m = Set(s.m[r]), inverse = Set(s.inverse[r]), delta = Set(s.delta[r]);
  Flags own;
  const uint8_t* flags = slope == nullptr ? FlagsOf(c, row, j0, v.lo, v.hi, &own) : nullptr;
  const int64_t first = flags != nullptr ? v.lo : c0, n = (flags != nullptr ? v.hi : c1) - first;
  const auto to_gradients = [&](auto* run, const float* keep) {
    run(n, scale, m, inverse, delta, keep, flags, p + first, ds + first);
  };
  float kept = 1.0f;
  if (!c.seed && !c.drop_bits) {
    to_gradients(flags != nullptr ? ToGradients<false, true> : ToGradients<false, false>, nullptr);
  } else {
    float* keep = s.tmp;
    kept = 1.0f / KeepProbOf(c, row);
    Fill(keep, c0, c1, kept);
    FillOutside(keep, c0, c1, v, 0.0f);
    Drop(c, row, j0, v.lo, v.hi, keep);
    to_gradients(flags != nullptr ? ToGradients<true, true> : ToGradients<true, false>, keep + first);
  }
  if (MayBeAlone(s.inverse[r])) {
    const int64_t j = v.lo + FindWeight(p + v.lo, v.hi - v.lo, kept);
    if (j >= v.lo) SetAloneDs(c, row, j0 + j, kept, s.stage, ds + j);
  }
  if (by_cap != nullptr && !v.Empty()) {
    Combine(v.hi - v.lo, by_cap + v.lo, ds + v.lo, [](F by, F x) { return x * by; });
    MaskOut(c, row, j0, v.lo, v.hi, 0.0f, by_cap);
    double sum = 0.0;
    for (int64_t j = v.lo; j < v.hi; ++j) sum += by_cap[j];
    sums.soft_cap[row.n % c.G()] += sum;
  }
  if (slope != nullptr) Combine(v.hi - v.lo, ds + v.lo, slope + v.lo, [](F x, F by) { return x * by; });
  float* const both[] = {p, ds};
  for (float* x : both) {  // masked products may be NaN, and so may `inverse`
    FillOutside(x, c0, c1, v, 0.0f);
    if (!v.Empty() && flags == nullptr) MaskOut(c, row, j0, v.lo, v.hi, 0.0f, x);
  }
  if (v.Empty()) return;
  if (c.dbias) AddToBias(c, sums.writes_bias, row, j0, v.lo, v.hi, ds);
  if (sums.scale != nullptr) sums.scale[row.n % c.G()] += WeightedSum(s.products, v.lo, v.hi, ds);
  if (sums.slopes != nullptr)
    sums.slopes[row.n % c.G() * sums.slope_rows + row.i % sums.slope_rows] += SlopeGradient(c, row, j0, v.lo, v.hi, ds);
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
