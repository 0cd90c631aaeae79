// Whether the products of the forward are those of derivatives along tangents.
#pragma once

#include "call.h"
#include "cpu/forward_plan-inl.h"
#include "cpu/one_key-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/small-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Products of packed keys in floats. Of others a large logit differs from itself by more than weights can bear.
inline bool IsForwardPacked(const Call& c) {
  return !TakesOneKey(c) && !IsSmall(c) && !InPairs(c) && !IsDirect(c) && !IsNarrow(c);
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
