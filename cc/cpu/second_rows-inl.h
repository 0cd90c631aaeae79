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
#include "cpu/tangent_rows-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// A row of each array, from key j0 of a block on; null where there is none.
struct SecondRow {
  float* of[kSecondArrays];
  float* operator[](SecondArray i) const { return of[i]; }
};

// Where the row has a soft cap f of x = cap u: from f'' (in `curve`), u and the tangent x' of x, the tangent of f', which is
// r = f'' (x' - u cap'), in the place of f'', and that of df / dcap, which is -u r, in the place of u.
inline void CapTangents(const Call& c, const Row& row, int64_t n, const float* x, float* curve, float* u) {
  const F tangent = Set(TangentOf(c.soft_cap_tangent, row)), none = Set(0.0f);
  for (int64_t j = 0; j < n; j += kLanes) {
    const int rest = Rest(n - j);
    const F by = LoadFirst(u + j, rest), r = LoadFirst(curve + j, rest) * (LoadFirst(x + j, rest) - by * tangent);
    StoreFirst(curve + j, r, rest);
    StoreFirst(u + j, none - by * r, rest);
  }
}

// What a row of the first pass is for: the second pass may compute it again, but adds nothing to the sums.
enum class Sums : bool { kNone, kAdd };

// Turns a row of products with keys j0 + [c0, c1), of which v are visible, into weights, ds, T and U (0 where masked), and
// with `add` adds to the row's tau and sigma and to the sums what does not depend on those.
inline void FirstPassRow(const Call& c, const SecondPlan& plan, const SecondScratch& s, const Row& row, int64_t r,
                         int64_t j0, Range v, int64_t c0, int64_t c1, const float* nan_marker, const SecondRow& x,
                         Sums add, const HeadSums& sums) {
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
  if (cap || !terms.products || c.bias_tangent || c.slopes_tangent || c.scale_tangent) {
    ToTangentsOfX(c, row, j0, v.lo, v.hi, p, t, s.tmp);
    t_scale = Set(1.0f);
  }
  if (nan_marker != nullptr) Combine(n, t + v.lo, nan_marker + v.lo, [](F y, F more) { return y + more; });
  float* by_cap = x[kByCap] != nullptr ? x[kByCap] : c.soft_cap_tangent ? s.by_cap : nullptr;
  if (!IsPlain(c, row)) {
    if (!empty) ToLogits(c, row, j0, v.lo, v.hi, nullptr, p, {x[kByX], by_cap, x[kCurve], s.u}, s.tmp);
    scale = Set(1.0f);
  }
  if (cap) CapTangents(c, row, n, t + v.lo, x[kCurve] + v.lo, s.u + v.lo);
  ToTangentsOfLogits(c, row, j0, v, c0, c1, x[kByX], by_cap, t);
  Fill(p, c0, v.lo, -__builtin_inff());
  Fill(p, v.hi, c1, -__builtin_inff());
  float* const others[] = {ds, u, x[kByX], x[kCurve], x[kByCap]};
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
  if (cap && sums.soft_cap != nullptr) sums.soft_cap[g] += WeightedSum(s.u, v.lo, v.hi, ds);
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
  const F scale = Set(ScaleOf(c, row)), more = Set(TangentOf(c.scale_tangent, row));
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
