// Rows of the second derivative: from products to weights, ds and their tangents.
#pragma once

#include "call.h"
#include "cpu/alone-inl.h"
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

// Where the row has a soft cap f of x = cap u: turns f'' (in `curve`) into the tangent of f', r = f'' (x' - u cap'), from u
// and the tangent x' of x, which may be anything where that is 0. That of df / dcap is -u r.
inline void CapTangents(const Call& c, const Row& row, int64_t n, const float* x, const float* u, float* curve) {
  const F tangent = Set(TangentOf(c.soft_cap_tangent, row));
  for (int64_t j = 0; j < n; j += kLanes) {
    const int rest = Rest(n - j);
    const F along = LoadFirst(x + j, rest) - LoadFirst(u + j, rest) * tangent;
    const F twice = LoadFirst(curve + j, rest);
    StoreFirst(curve + j, Select(IsZero(twice), twice, twice * along), rest);
  }
}

// Turns a row of products with keys j0 + [c0, c1), of which v are visible, into weights, ds, T and U (0 where masked), and
// adds to the row's sums if `adds`.
inline void FirstPassRow(const Call& c, const SecondPlan& plan, const SecondScratch& s, const Row& row, int64_t r,
                         int64_t j0, Range v, int64_t c0, int64_t c1, const float* nan_marker, const SecondRow& x,
                         bool adds) {
  const SecondTerms& terms = plan.terms;
  float *p = x[kWeight], *ds = x[kDs], *t = x[kLogit], *u = x[kDp];
  const bool empty = v.Empty(), cap = SoftCapOf(c, row) != 0.0f;
  if (empty) v = {c0, c0};
  const auto keep_as = [&](float* to, const float* from) {
    if (to != nullptr) __builtin_memcpy(to + c0, from + c0, sizeof(float) * static_cast<size_t>(c1 - c0));
  };
  keep_as(x[kDot], p);
  keep_as(x[kDotTangent], t);
  F scale = Set(ScaleOf(c, row)), t_scale = scale;
  if (!terms.dp) Fill(ds, c0, c1, 0.0f);
  if (!terms.dp_tangent) Fill(u, c0, c1, 0.0f);
  if (cap || !terms.products || c.bias_tangent || c.slopes_tangent || c.scale_tangent) {
    ToTangentsOfX(c, row, j0, v.lo, v.hi, p, t, s.tmp);
    t_scale = Set(1.0f);
  }
  if (nan_marker != nullptr) Combine(v.hi - v.lo, t + v.lo, nan_marker + v.lo, [](F y, F more) { return y + more; });
  float* by_cap = x[kByCap] != nullptr ? x[kByCap] : c.soft_cap_tangent ? s.by_cap : nullptr;
  float* quotient = x[kQuotient] != nullptr ? x[kQuotient] : s.quotient;
  if (!IsPlain(c, row, j0, v)) {
    if (!empty) ToLogits(c, row, j0, v.lo, v.hi, nullptr, p, {x[kByX], by_cap, x[kCurve], quotient}, s.tmp);
    scale = Set(1.0f);
  }
  if (cap) CapTangents(c, row, v.hi - v.lo, t + v.lo, quotient + v.lo, x[kCurve] + v.lo);
  ToTangentsOfLogits(c, row, j0, v, c0, c1, x[kByX], by_cap, t);
  FillOutside(p, c0, c1, v, -__builtin_inff());
  float* const others[] = {ds, u, x[kByX], x[kCurve], x[kByCap], x[kQuotient]};
  for (float* y : others) {  // masked products may be NaN
    if (y == nullptr) continue;
    FillOutside(y, c0, c1, v, 0.0f);
    if (!empty) MaskOut(c, row, j0, v.lo, v.hi, 0.0f, y);
  }
  float* keep = x[kKeep];  // 1 / keep_prob or 0
  if (keep != nullptr) {
    Fill(keep, c0, c1, 0.0f);
    Fill(keep, v.lo, v.hi, 1.0f / KeepProbOf(c, row));
    if (!empty) Drop(c, row, j0, v.lo, v.hi, keep);
  }
  const F m = Set(s.m[r]), inverse = Set(s.inverse[r]), delta = Set(s.delta[r]);
  const F none = Set(0.0f), minus_inf = Set(-__builtin_inff());
  for (int64_t j = c0; j < c1; j += kLanes) {
    const F logit = Load(p + j), w = Weight(logit, scale, m) * inverse;
    F dp = Load(ds + j), dp_tangent = Load(u + j), along = Load(t + j) * t_scale;
    if (c.bias) {  // where it is -inf it masks the key
      const Mask masked = Equal(logit, minus_inf);
      along = Select(masked, none, along);
      dp_tangent = Select(masked, none, dp_tangent);
    }
    if (keep != nullptr) {
      const F kept = Load(keep + j);
      const Mask dropped = IsZero(kept);  // a product 0 * NaN would not be 0
      dp = Select(dropped, none, dp * kept);
      dp_tangent = Select(dropped, none, dp_tangent * kept);
      Store(keep + j, Select(dropped, none, w * kept));
    }
    Store(p + j, w);
    Store(ds + j, w * (dp - delta));
    Store(t + j, along);
    Store(u + j, dp_tangent);
  }
  if (terms.dp && MayBeAlone(s.inverse[r])) {
    const int64_t k = v.lo + FindWeight(p + v.lo, v.hi - v.lo, 1.0f);
    const float kept = k < v.lo ? 0.0f : keep != nullptr ? keep[k] : 1.0f;
    if (kept != 0.0f) SetAloneDs(c, row, j0 + k, kept, s.stage, ds + k);
  }
  if (!adds || empty) return;
  F tau = none, by_ds = none, by_p = none, sum = none;
  for (int64_t j = c0; j < c1; j += kLanes) {
    const F w = Load(p + j), d = Load(ds + j), along = Load(t + j);
    tau = Fma(w, along, tau);
    sum = sum + d;
    by_ds = Fma(d, along, by_ds);
    by_p = Fma(w, Load(u + j), by_p);
  }
  s.tau_sum[r] += Sum(tau);
  s.ds_sum[r] += Sum(sum);
  s.sigma_sum[r] += Sum(by_ds) + Sum(by_p);
}

// Turns them, tau and sigma being known, into what is multiplied with the operands (see SecondArray), 0 where masked, and
// adds to the sums.
inline void SecondPassRow(const Call& c, const SecondScratch& s, const Row& row, int64_t r, int64_t j0, Range v,
                          int64_t c0, int64_t c1, const SecondRow& x, const HeadSums& sums) {
  if (v.Empty()) v = {c0, c0};
  const bool cap = SoftCapOf(c, row) != 0.0f;
  const float* keep = x[kKeep] != nullptr ? x[kKeep] : x[kWeight];
  const F tau = Set(s.tau[r]), sigma = Set(s.sigma[r]), excess = Set(s.excess[r]), none = Set(0.0f);
  const F scale = Set(ScaleOf(c, row)), more = Set(TangentOf(c.scale_tangent, row));
  const F nan = Set(s.tau[r] * 0.0f);  // or 0: a marked key reaches its row by tau
  const bool in_sums = c.dbias || sums.slopes != nullptr || sums.scale != nullptr;  // of GX, which then is scaled later
  const bool finite =
      s.tau[r] * 0.0f == 0.0f && s.sigma[r] * 0.0f == 0.0f && s.inverse[r] * 0.0f == 0.0f && s.delta[r] * 0.0f == 0.0f;
  const auto scaled = [&](F gx, F dx) { return Fma(more, dx, gx * scale); };
  F by_cap = none;
  for (int64_t j = c0; j < c1; j += kLanes) {
    const F p = Load(x[kWeight] + j), kept = Load(keep + j) + nan, from_mean = Load(x[kLogit] + j) - tau;
    F dx = Load(x[kDs] + j) - p * excess, gx = Fma(dx, from_mean, p * (Load(x[kDp] + j) - sigma));
    if (cap) {
      const F by_x = Load(x[kByX] + j), curve = dx * Load(x[kCurve] + j);
      if (sums.soft_cap != nullptr)
        by_cap = by_cap + Fma(gx, Load(x[kByCap] + j), none - Load(x[kQuotient] + j) * curve);
      gx = Fma(gx, by_x, curve);
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
    FillOutside(y, c0, c1, v, 0.0f);
    if (!v.Empty()) MaskOut(c, row, j0, v.lo, v.hi, 0.0f, y);
  }
  if (!v.Empty()) {
    const int64_t g = row.n % c.G();
    if (cap && sums.soft_cap != nullptr) sums.soft_cap[g] += Sum(by_cap);
    if (c.dbias) AddToBias(c, sums.writes_bias, row, j0, v.lo, v.hi, x[kGX]);
    if (sums.scale != nullptr) sums.scale[g] += WeightedSum(x[kDot], v.lo, v.hi, x[kGX]);
    if (x[kDotTangent] != nullptr) sums.scale[g] += WeightedSum(x[kDotTangent], v.lo, v.hi, x[kDX]);
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
