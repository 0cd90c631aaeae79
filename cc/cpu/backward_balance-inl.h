// Pairs of the backward: rounding p and ds to bfloat16, and balancing the sum of a row's ds, which that changes.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/backward_plan-inl.h"
#include "cpu/logits-inl.h"
#include "cpu/rows-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// A component that all keys have in common does not change the softmax: the ds of a row add up to dlogsumexp, mostly 0,
// and with a sink of weight w to w delta more. Rounded to bfloat16 they do not, nor where the forward rounded its weights
// and delta thus is a little off: the error of the sum, times the common component, may exceed the gradient itself. So it
// is subtracted, in float, from one ds of the row: from the largest, whose key contributes in any case. With a soft cap
// the sum is not known. Where a row has other keys too, the sum is that of the ds before they were rounded. So it is where a
// sink takes its part of dlogsumexp: where that is nearly all, what is left would be a small difference.
inline bool SumIsUnknown(const Call& c) { return c.partial || (c.sinks && c.dlogsumexp); }

struct Balance {
  float* total;  // of each row: the sum of its ds as they were rounded, less what it should be but for dlogsumexp
  int32_t *largest, *key;  // the bits of the largest magnitude of them, and where that is
};

// Stored behind the dq of all rows.
inline Balance BalanceOf(const BackwardPlan& plan, float* dq) {
  float* total = dq + plan.dq_size;
  int32_t* largest = reinterpret_cast<int32_t*>(total + plan.rows);
  return {total, largest, largest + plan.rows};
}

inline void ClearBalance(const Balance& balance, int64_t r, int64_t n) {
  for (int64_t end = r + n; r < end; ++r) balance.total[r] = 0.0f, balance.largest[r] = 0, balance.key[r] = 0;
}

// Takes the ds of sinks, -w delta, into the sums of rows [r, r + n).
template <bool kPairs>
inline void BalanceSinks(const Call& c, const BackwardScratch<kPairs>& s, int64_t b, int64_t k, int64_t r, int64_t n,
                         const Balance& balance) {
  Row row = RowAt(c, b, k, r);
  for (const int64_t end = r + n; r < end; ++r, row = After(c, row))
    balance.total[r] = -(__builtin_expf(*c.sinks.At<float>(row.b, row.n) - s.m[r]) * s.inverse[r] * s.delta[r]);
}

// Adds a row of ds, as pairs, of keys j0 + [0, keys), their sum and their largest magnitudes.
template <bool kPairs>
inline void AddToBalance(const Balance& balance, int64_t r, int64_t j0, int64_t keys, const float* ds, F sum, F most) {
  balance.total[r] += Sum(sum);
  if (!Unit<kPairs>::AnyAbove(most, balance.largest[r])) return;
  const int32_t largest = Unit<kPairs>::Largest(most);
  balance.largest[r] = largest;
  for (int64_t j = 0; j < keys; j += 2 * kLanes) {
    const uint32_t there = Unit<kPairs>::Equals(Load(ds + j / 2), largest);
    if (there == 0) continue;
    balance.key[r] = static_cast<int32_t>(j0 + j) + __builtin_ctz(there);
    return;
  }
}

// Adds to a finished row of dq what is missing. `stage` holds a row.
inline void AddMissing(const Call& c, const Row& row, int64_t k, const Balance& balance, int64_t r, float* stage,
                       float* dq) {
  if (balance.largest[r] == 0 || SoftCapOf(c, row) != 0.0f) return;
  const float target = c.dlogsumexp && !SumIsUnknown(c) ? *c.dlogsumexp.At<float>(row.b, row.n, row.i) : 0.0f;
  const F missing = Set(target - balance.total[r]);
  const float* key = ReadRow<false>(c.key, row.b, k, balance.key[r], c.D, stage);
  Combine(c.D, dq, key, [&](F x, F y) { return Fma(missing, y, x); });
}

// Floats of rows r and, if `two`, r + 1 of p and ds, columns [0, keys), to pairs: of rows in place (in the
// first of the two), and ds of neighbouring columns to ds_rows, which are added to the balance of rows g0 + r on. `scales`:
// null, or what each row of ds is multiplied by for the products with q. `unknown`: as SumIsUnknown.
template <bool kPairs>
inline void JoinRows(const BackwardScratch<kPairs>& s, const Balance& balance, int64_t g0, int64_t r, bool two,
                     int64_t j0, int64_t keys, const float* scales, bool unknown) {
  using U = Unit<kPairs>;
  const auto put = [](F a, F b, float* to) {
    F low, high;
    U::Interleave(a, b, &low, &high);
    Store(to, low);
    Store(to + kLanes, high);
  };
  float *first = s.p + r * s.s_row, *second = first + s.s_row;
  for (int64_t j = 0; j < keys; j += 2 * kLanes)
    put(U::Join(Load(first + j), Load(first + j + kLanes)),
        two ? U::Join(Load(second + j), Load(second + j + kLanes)) : Set(0.0f), first + j);
  first = s.ds + r * s.s_row, second = first + s.s_row;
  float *ds = s.ds_rows + r * s.half_row, *second_ds = ds + s.half_row;
  F sum = Set(0.0f), second_sum = sum, most = sum, second_most = sum;
  for (int64_t j = 0; unknown && j < keys; j += 2 * kLanes) {
    sum = sum - (Load(first + j) + Load(first + j + kLanes));
    if (two) second_sum = second_sum - (Load(second + j) + Load(second + j + kLanes));
  }
  for (int64_t j = 0; j < keys; j += 2 * kLanes) {
    F a = U::Join(Load(first + j), Load(first + j + kLanes)), b = Set(0.0f);
    Store(ds + j / 2, a);
    sum = U::Add(sum, a);
    most = U::Larger(most, a);
    if (two) {
      b = U::Join(Load(second + j), Load(second + j + kLanes));
      Store(second_ds + j / 2, b);
      second_sum = U::Add(second_sum, b);
      second_most = U::Larger(second_most, b);
    }
    if (scales != nullptr) {
      const F f = Set(scales[r]), g = Set(two ? scales[r + 1] : 0.0f);
      a = U::Join(Load(first + j) * f, Load(first + j + kLanes) * f);
      if (two) b = U::Join(Load(second + j) * g, Load(second + j + kLanes) * g);
    }
    put(a, b, first + j);
  }
  AddToBalance<kPairs>(balance, g0 + r, j0, keys, ds, sum, most);
  if (two) AddToBalance<kPairs>(balance, g0 + r + 1, j0, keys, second_ds, second_sum, second_most);
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
