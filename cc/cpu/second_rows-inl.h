// Rows of the second derivative: from products to weights, ds and their tangents.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/backward_rows-inl.h"
#include "cpu/backward_sums-inl.h"
#include "cpu/dropout-inl.h"
#include "cpu/logits-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/second_plan-inl.h"
#include "cpu/softmax-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// A row of each array, from key j0 of a block on; null where there is none.
struct SecondRow {
  float* of[kSecondArrays];
  float* operator[](SecondArray i) const { return of[i]; }
};

// Turns products a.k + q.b of keys j0 + [from, to), in x, into tangents of logits before the soft cap. `dots`: the products
// q.k. Both are relative to key j0.
inline void TangentsBeforeSoftCap(const Call& c, const Row& row, int64_t j0, int64_t from, int64_t to,
                                  const float* dots, float* x, float* tmp) {
  const int64_t n = to - from;
  const F scale = Set(ScaleOf(c, row));
  x += from;
  if (c.query_tangent || c.key_tangent) {
    Combine(n, x, x, [&](F y, F) { return y * scale; });
  } else {
    Fill(x, 0, n, 0.0f);
  }
  if (c.scale_tangent) {
    const F by = Set(*c.scale_tangent.At<float>(row.b, row.n));
    Combine(n, x, dots + from, [&](F y, F dot) { return Fma(by, dot, y); });
  }
  if (c.bias_tangent)
    Combine(n, x, BiasOf(c, c.bias_tangent, row, j0, from, to, tmp), [](F y, F more) { return y + more; });
  if (c.slopes_tangent) AddDistances(c, row, j0 + from, n, -*c.slopes_tangent.At<float>(row.b, row.n, row.i), x);
}

// The soft cap f(x) = cap t, t = tanh u, u = x / cap, of n logits `s`, and of their tangents `x`:
//
//   f' = 1 - t^2,  f_cap = t - u f',  T = f' x' + f_cap cap',  f'' x' + f'_cap cap' = r = -2 t (f' x' - u f' cap') / cap
//   f_capx x' + f_capcap cap' = -u r
//
// All 0 where the bias is -inf. `by_cap` and `curve_by_cap` may be null.
inline void CapTangents(const Call& c, const Row& row, int64_t n, const float* bias, float* s, float* x, float* by_x,
                        float* curve, float* by_cap, float* curve_by_cap) {
  const float soft_cap = SoftCapOf(c, row);
  const F inverse = Set(1.0f / soft_cap), cap = Set(soft_cap), none = Set(0.0f), minus_inf = Set(-__builtin_inff());
  const F cap_tangent = Set(c.soft_cap_tangent ? *c.soft_cap_tangent.At<float>(row.b, row.n) : 0.0f);
  for (int64_t j = 0; j < n; j += kLanes) {
    const int rest = Rest(n - j);
    const F u = LoadFirst(s + j, rest) * inverse, t = Tanh(u), b = bias != nullptr ? LoadFirst(bias + j, rest) : none;
    const Mask masked = Equal(b, minus_inf);
    const F f1 = Set(1.0f) - t * t, f_cap = ByCap(u, t), along = LoadFirst(x + j, rest) * f1;
    const F r = Set(-2.0f) * t * inverse * (along - u * f1 * cap_tangent);
    StoreFirst(s + j, Select(masked, minus_inf, t * cap), rest);
    StoreFirst(x + j, Select(masked, none, Fma(f_cap, cap_tangent, along)), rest);
    StoreFirst(by_x + j, Select(masked, none, f1), rest);
    StoreFirst(curve + j, Select(masked, none, r), rest);
    if (by_cap == nullptr) continue;
    StoreFirst(by_cap + j, Select(masked, none, f_cap), rest);
    StoreFirst(curve_by_cap + j, Select(masked, none, none - u * r), rest);
  }
}

// What a row of the first pass is for: the second pass may compute it again, but adds nothing to the sums.
enum class Sums : bool { kNone, kAdd };

// Turns a row of products with keys j0 + [c0, c1), of which v are visible, into weights, ds, T and U (0 where masked), and
// with `add` adds to the row's tau and sigma and to the sums what does not depend on those.
inline void FirstPassRow(const Call& c, const SecondPlan& plan, const SecondScratch& s, const Row& row, int64_t r,
                         int64_t j0, Range v, int64_t c0, int64_t c1, bool marked, const SecondRow& x, Sums add,
                         const HeadSums& sums) {
  const SecondTerms& terms = plan.terms;
  float *p = x[kWeight], *ds = x[kDs], *t = x[kLogit], *u = x[kDp];
  const bool empty = v.Empty(), cap = SoftCapOf(c, row) != 0.0f;
  if (empty) v = {c0, c0};
  const int64_t n = v.hi - v.lo;
  if (x[kDot] != nullptr) __builtin_memcpy(x[kDot] + c0, p + c0, sizeof(float) * static_cast<size_t>(c1 - c0));
  if (sums.scale != nullptr && terms.products)
    __builtin_memcpy(s.raw + c0, t + c0, sizeof(float) * static_cast<size_t>(c1 - c0));
  F scale = Set(ScaleOf(c, row)), t_scale = scale;
  if (!terms.dp) Fill(ds, c0, c1, 0.0f);
  if (!terms.dp_tangent) Fill(u, c0, c1, 0.0f);
  if (!terms.logits) Fill(t, c0, c1, 0.0f);
  if (cap || c.bias_tangent || c.slopes_tangent || c.scale_tangent) {
    TangentsBeforeSoftCap(c, row, j0, v.lo, v.hi, p, t, s.tmp);
    t_scale = Set(1.0f);
  }
  if (!IsPlain(c, row)) {
    if (!empty) {
      const float* bias = BeforeSoftCap(c, row, j0, v.lo, v.hi, p + v.lo, s.tmp);
      if (cap)
        CapTangents(c, row, n, bias, p + v.lo, t + v.lo, x[kByX] + v.lo, x[kCurve] + v.lo,
                    x[kByCap] == nullptr ? nullptr : x[kByCap] + v.lo, s.curve_by_cap + v.lo);
      MaskOut(c, row, j0, v.lo, v.hi, -__builtin_inff(), p);
    }
    scale = Set(1.0f);
  }
  if (marked) Combine(n, t + v.lo, s.nan_marker + v.lo, [](F y, F more) { return y + more; });
  Fill(p, c0, v.lo, -__builtin_inff());
  Fill(p, v.hi, c1, -__builtin_inff());
  float* const others[] = {ds, t, u, x[kByX], x[kCurve], x[kByCap]};
  for (float* y : others) {  // masked products may be NaN
    if (y == nullptr) continue;
    Fill(y, c0, v.lo, 0.0f);
    Fill(y, v.hi, c1, 0.0f);
    if (!empty) MaskOut(c, row, j0, v.lo, v.hi, 0.0f, y);
  }
  float* keep = x[kKeep];  // 1 / keep_prob or 0
  if (keep != nullptr) {
    Fill(keep, c0, c1, 0.0f);
    Fill(keep, v.lo, v.hi, 1.0f / KeepProbOf(c, row));
    if (!empty) Drop(c, row, j0, v.lo, v.hi, keep);
  }
  const F m = Set(s.m[r]), inverse = Set(s.inverse[r]), delta = Set(s.delta[r]), none = Set(0.0f);
  F tau = none, by_ds = none, by_p = none;
  for (int64_t j = c0; j < c1; j += kLanes) {
    const F w = Weight(Load(p + j), scale, m) * inverse;
    F dp = Load(ds + j), dp_tangent = Load(u + j);
    if (keep != nullptr) {
      const F kept = Load(keep + j);
      const Mask dropped = IsZero(kept);  // a product 0 * NaN would not be 0
      dp = Select(dropped, none, dp * kept);
      dp_tangent = Select(dropped, none, dp_tangent * kept);
      Store(keep + j, Select(dropped, none, w * kept));
    }
    const F d = w * (dp - delta), along = Load(t + j) * t_scale;
    Store(p + j, w);
    Store(ds + j, d);
    Store(t + j, along);
    Store(u + j, dp_tangent);
    tau = Fma(w, along, tau);
    by_ds = Fma(d, along, by_ds);
    by_p = Fma(w, dp_tangent, by_p);
  }
  if (cap) Combine(c1 - c0, x[kCurve] + c0, ds + c0, [](F y, F by) { return y * by; });
  if (add == Sums::kNone || empty) return;
  s.tau_sum[r] += Sum(tau);
  s.sigma_sum[r] += Sum(by_ds) + Sum(by_p);
  const int64_t g = row.n % c.G();
  if (cap && sums.soft_cap != nullptr) sums.soft_cap[g] += WeightedSum(s.curve_by_cap, v.lo, v.hi, ds);
  if (sums.scale != nullptr && terms.products) {
    __builtin_memcpy(s.tmp + v.lo, ds + v.lo, sizeof(float) * static_cast<size_t>(n));
    if (cap) Combine(n, s.tmp + v.lo, x[kByX] + v.lo, [](F y, F by) { return y * by; });
    sums.scale[g] += WeightedSum(s.raw, v.lo, v.hi, s.tmp);
  }
}

// Turns them, tau and sigma being known, into what is multiplied with the operands (see SecondArray), 0 where masked, and
// adds to the sums.
inline void SecondPassRow(const Call& c, const SecondPlan& plan, const SecondScratch& s, const Row& row, int64_t r,
                          int64_t j0, Range v, int64_t c0, int64_t c1, const SecondRow& x, const HeadSums& sums) {
  if (v.Empty()) v = {c0, c0};
  const bool cap = SoftCapOf(c, row) != 0.0f;
  const float* keep = x[kKeep] != nullptr ? x[kKeep] : x[kWeight];
  const F tau = Set(s.tau[r]), sigma = Set(s.sigma[r]);
  const float scale_tangent = c.scale_tangent ? *c.scale_tangent.At<float>(row.b, row.n) : 0.0f;
  const F scale = Set(ScaleOf(c, row)), more = Set(scale_tangent);
  const bool in_sums = c.dbias || sums.slopes != nullptr || sums.scale != nullptr;  // of GX, which then is scaled later
  const bool finite =
      s.tau[r] * 0.0f == 0.0f && s.sigma[r] * 0.0f == 0.0f && s.inverse[r] * 0.0f == 0.0f && s.delta[r] * 0.0f == 0.0f;
  const auto scaled = [&](F gx, F dx) { return Fma(more, dx, gx * scale); };
  F by_cap = Set(0.0f);
  for (int64_t j = c0; j < c1; j += kLanes) {
    const F p = Load(x[kWeight] + j), kept = Load(keep + j), from_mean = Load(x[kLogit] + j) - tau;
    F dx = Load(x[kDs] + j), gx = Fma(dx, from_mean, p * (Load(x[kDp] + j) - sigma));
    if (x[kByCap] != nullptr && cap) by_cap = Fma(gx, Load(x[kByCap] + j), by_cap);
    if (cap) {
      const F by_x = Load(x[kByX] + j);
      gx = Fma(gx, by_x, Load(x[kCurve] + j));
      dx = dx * by_x;
    }
    Store(x[kGX] + j, in_sums ? gx : scaled(gx, dx));
    Store(x[kDX] + j, in_sums ? dx : dx * scale);
    Store(x[kTangent] + j, kept * from_mean);
    Store(x[kKept] + j, kept);
  }
  float* const all[] = {x[kGX], x[kDX], x[kTangent], x[kKept]};
  for (float* y : all) {
    if (finite) break;  // then they are 0 where masked
    Fill(y, c0, v.lo, 0.0f);
    Fill(y, v.hi, c1, 0.0f);
    if (!v.Empty()) MaskOut(c, row, j0, v.lo, v.hi, 0.0f, y);
  }
  if (!v.Empty()) {
    const int64_t g = row.n % c.G();
    if (cap && sums.soft_cap != nullptr) sums.soft_cap[g] += Sum(by_cap);
    if (c.dbias) AddToBias(c, plan.writes_all_bias, row, j0, v.lo, v.hi, x[kGX]);
    if (sums.scale != nullptr) sums.scale[g] += WeightedSum(x[kDot], v.lo, v.hi, x[kGX]);
    if (sums.slopes != nullptr)
      sums.slopes[g * sums.slope_rows + row.i % sums.slope_rows] += SlopeGradient(c, row, j0, v.lo, v.hi, x[kGX]);
  }
  if (!in_sums) return;
  for (int64_t j = c0; j < c1; j += kLanes) {
    const F gx = Load(x[kGX] + j), dx = Load(x[kDX] + j);
    Store(x[kGX] + j, scaled(gx, dx));
    Store(x[kDX] + j, dx * scale);
  }
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
