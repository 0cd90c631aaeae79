// The key that has all the weight of a row.
//
// Its ds, p (dout.v kept - dout.out + dlogsumexp), is what the other keys are by, whose weights are lost in rounding: mostly 0.
// But dout.v and dout.out are sums in different orders, and queries of 1e18 turn a last bit into a gradient of 1e12. So their
// elements are subtracted before they are summed: out is v, but for what the others add. (That may count: a key with a weight
// of 1e-8 can have a far larger v.)
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/exact_out-inl.h"
#include "cpu/logits-inl.h"
#include "cpu/rows-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Only a row whose sum is 1 has such a key.
inline bool MayBeAlone(float inverse) { return inverse == 1.0f; }

// Which of n weights is this one; -1: none.
inline int64_t FindWeight(const float* p, int64_t n, float weight) {
  F at = Set(-1.0f);
  EachVector(n, [&](int64_t j, auto lanes) {
    at = Select(Equal(lanes.Get(p + j), Set(weight)), Count() + Set(static_cast<float>(j)), at);
  });
  return static_cast<int64_t>(MaxOf(at));
}

// How far dropout's v kept and the out that was stored may be from each other, relative to out: 1 / keep_prob and products
// with it are rounded, in the forward and here, and so is out to 16 bits, with or without what that took from it. Without
// dropout all of these are exact.
inline float RoundingOfKept(const Call& c) {
  constexpr float kRounded = 0x1p-22f;  // four times
  if (c.out.dtype == DType::kF32) return kRounded;
  return kRounded + (c.rounding ? RoundingUnit(c) * RoundingUnit(c) : RoundingUnit(c));
}

// Sets the ds of key j, which has all the weight of the row; what is not finite stays so. `kept`: what dropout multiplies the
// key by, not 0. `stage` holds three rows.
inline void SetAloneDs(const Call& c, const Row& row, int64_t j, float kept, float* stage, float* ds) {
  if (*ds * 0.0f != 0.0f) return;
  const int64_t width = RoundUp(c.Dv, kLanes);
  const float* dout = ReadRow<false>(c.dout, row.b, row.n, row.i, c.Dv, stage);
  const float* out = ExactOut(c, row, stage + width, stage + 2 * width);
  const float* v = ReadRow<false>(c.value, row.b, row.n / c.G(), j, c.Dv, stage + 2 * width);
  const F factor = Set(kept), unit = Set(kept == 1.0f ? 0.0f : RoundingOfKept(c));
  F sum = Set(0.0f), rounding = sum;
  EachVector(c.Dv, [&](int64_t d, auto lanes) {
    const F x = lanes.Get(dout + d), y = lanes.Get(out + d);
    sum = Fma(x, Rounded(lanes.Get(v + d) * factor) - y, sum);
    rounding = Fma(Abs(x * unit), Abs(y), rounding);
  });
  const float difference = Sum(sum);
  *ds = __builtin_fabsf(difference) <= Sum(rounding) ? 0.0f : difference;
  if (c.dlogsumexp) *ds += *c.dlogsumexp.At<float>(row.b, row.n, row.i);
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
