// The output that the forward saved.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/logits-inl.h"
#include "cpu/rows-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// What one of out's roundings counts.
inline float RoundingUnit(const Call& c) { return c.out.dtype == DType::kBF16 ? 1.0f / 256.0f : 1.0f / 2048.0f; }

// A row of out, with what rounding took from it where that is known: in place, or in `own`. `own` and `stage` hold a row.
inline const float* ExactOut(const Call& c, const Row& row, float* own, float* stage) {
  const float* out = ReadRow<false>(c.out, row.b, row.n, row.i, c.Dv, own);
  if (c.rounding) {  // then out is of 16 bits, and its row a copy
    const F unit = Set(RoundingUnit(c));
    const float* rest = ReadRow<false>(c.rounding, row.b, row.n, row.i, c.Dv, stage);
    Combine(c.Dv, own, rest, [&](F x, F lost) { return Fma(lost, unit, x); });
  }
  return out;
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
