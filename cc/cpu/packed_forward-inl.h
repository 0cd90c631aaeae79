// Whether the products of the forward are those of derivatives along tangents, and where that matters.
#pragma once

#include "call.h"
#include "cpu/forward_plan-inl.h"
#include "cpu/one_key-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/small-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Products of packed keys in floats, unlike those of few rows, of small heads and of pairs.
inline bool IsForwardPacked(const Call& c) {
  return !TakesOneKey(c) && !IsSmall(c) && !InPairs(c) && !IsDirect(c) && !IsNarrow(c);
}

// Whether a row has logits so large that they differ from themselves, summed in another order, by more than weights can
// bear: by a few 2^-24 of them. (-kFloatMax: all its keys are masked.)
inline bool IsLarge(float m) { return m > 0x1p15f || (m < -0x1p15f && m != -kFloatMax); }

inline bool HasLarge(const Call& c) {
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t n = 0; n < c.N; ++n)
      for (int64_t i = 0; i < c.Sq; ++i)
        if (IsLarge(*c.m.At<float>(b, n, i))) return true;
  return false;
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
