// The kernels for one instruction set: included by one .cc file each, which sets JAX_FA_ISA (the namespace)
// and is compiled with that set's flags. Everything but the entries has internal linkage, and nothing of
// the standard library is used, so that code of one set is never called for another (see call.h).
#pragma once

#include "call.h"
#include "cpu/backward-inl.h"
#include "cpu/forward-inl.h"
#include "cpu/one_key-inl.h"
#include "cpu/packed_forward-inl.h"
#include "cpu/second-inl.h"
#include "cpu/simd-inl.h"
#include "cpu/small_backward-inl.h"
#include "cpu/small_forward-inl.h"
#include "cpu/tangent-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// As many independent multiply-adds as fill the pipeline; returns how many floating-point operations.
template <bool kPairs>
inline double FmaLoop(int64_t iterations, float* sink) {
  constexpr int kChains = 12;
  F acc[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) acc[i] = Set(static_cast<float>(i));
  const F a = Set(sink[0]), b = Set(sink[1]);
  for (int64_t n = 0; n < iterations; ++n)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = Unit<kPairs>::MulAdd(a, b, acc[i]);
  F total = acc[0];
#pragma GCC unroll 12
  for (int i = 1; i < kChains; ++i) total = total + acc[i];
  sink[2] = Sum(total);
  return 2.0 * kLanes * Unit<kPairs>::kElements * kChains * static_cast<double>(iterations);
}

}  // namespace

double RunFma(int64_t iterations, bool bf16, float* sink) {
  return bf16 ? FmaLoop<kHasPairs>(iterations, sink) : FmaLoop<false>(iterations, sink);
}
void RunForward(const Call& c, const Runner& runner) {
  if (TakesOneKey(c)) {
    RunOneKey(c, runner, OneKeyForward);
  } else if (IsSmall(c)) {
    SmallForward(c, runner);
  } else if (InPairs(c)) {
    ForwardAs<kHasPairs>(c, runner);
  } else {
    ForwardAs<false>(c, runner);
  }
}
void RunBackward(const Call& c, const Runner& runner) {
  if (TakesOneKey(c)) {
    RunOneKey(c, runner, OneKeyBackward);
  } else if (IsSmall(c)) {
    SmallBackward(c, runner);
  } else if (InPairs(c)) {
    BackwardAs<kHasPairs>(c, runner);
  } else {
    BackwardAs<false>(c, runner);
  }
}
// Derivatives along tangents are computed in floats for every dtype: a tangent of the logits, rounded to 16 bits, would
// lose what its difference from the row's mean has left.
void RunTangent(const Call& c, const Runner& runner) {
  TangentAs(c, runner);
  // A backward takes max and sum as those of its own products, which are the forward's.
  if (c.with_forward && !IsForwardPacked(c) && HasLarge(c)) RunForward(c, runner);
}
void RunSecond(const Call& c, const Runner& runner) { SecondAs(c, runner); }

}  // namespace jax_fa::JAX_FA_ISA
