// Rows of tangents of the logits. With x = c q.k + bias - slope distance and the logit f(x), f the soft cap or nothing,
// the tangents a of q, b of k and a prime for those of the rest:
//
//   x' = c (a.k + q.b) + c' q.k + bias' - slope' distance,  T = f'(x) x' + (df / dcap) cap'
#pragma once

#include "call.h"
#include "cpu/logits-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/simd-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Whether products have a tangent, and what else the logits are made of, which may move those of some keys by far more than
// those of others: by the distance. If neither has one, T is 0.
inline bool MovesProducts(const Call& c) { return c.query_tangent || c.key_tangent; }
inline bool MovesByPlace(const Call& c) {
  return c.bias_tangent || c.slopes_tangent || c.scale_tangent || c.soft_cap_tangent;
}
inline bool MovesLogits(const Call& c) { return MovesProducts(c) || MovesByPlace(c); }

// Of what is one scalar for each head.
inline float TangentOf(const View& x, const Row& row) { return x ? *x.At<float>(row.b, row.n) : 0.0f; }

// Turns products a.k + q.b of keys j0 + [from, to) into x', in place. `products`: q.k, read where the scale has a tangent.
// Columns are relative to key j0; `tmp` holds to - from floats.
inline void ToTangentsOfX(const Call& c, const Row& row, int64_t j0, int64_t from, int64_t to, const float* products,
                          float* x, float* tmp) {
  const int64_t n = to - from;
  x += from;
  if (!MovesProducts(c)) {
    Fill(x, 0, n, 0.0f);
  } else {
    const F scale = Set(ScaleOf(c, row));
    Combine(n, x, x, [&](F y, F) { return y * scale; });
  }
  if (c.scale_tangent) {
    const F by = Set(TangentOf(c.scale_tangent, row));
    Combine(n, x, products + from, [&](F y, F product) { return Fma(by, product, y); });
  }
  if (c.bias_tangent)
    Combine(n, x, BiasOf(c, c.bias_tangent, row, j0, from, to, tmp), [](F y, F more) { return y + more; });
  if (c.slopes_tangent) {
    const F minus = Set(-*c.slopes_tangent.At<float>(row.b, row.n, row.i));
    WithDistances(c, row, j0 + from, n, x, [&](F y, F away) { return Fma(minus, away, y); });
  }
}

// Turns x' of keys j0 + v into T, in place, and fills the rest of j0 + [c0, c1) and what is masked with 0. `by_x` and
// `by_cap`: see SoftCapRows; read where the row has a soft cap, the second where that has a tangent.
inline void ToTangentsOfLogits(const Call& c, const Row& row, int64_t j0, Range v, int64_t c0, int64_t c1,
                               const float* by_x, const float* by_cap, float* x) {
  if (SoftCapOf(c, row) != 0.0f) {
    Combine(v.hi - v.lo, x + v.lo, by_x + v.lo, [](F y, F by) { return y * by; });
    if (c.soft_cap_tangent) {
      const F tangent = Set(TangentOf(c.soft_cap_tangent, row));
      Combine(v.hi - v.lo, x + v.lo, by_cap + v.lo, [&](F y, F by) { return Fma(tangent, by, y); });
    }
  }
  FillOutside(x, c0, c1, v, 0.0f);
  if (!v.Empty()) MaskOut(c, row, j0, v.lo, v.hi, 0.0f, x);
}

// Sets T of keys j0 + [c0, c1) to 0 where a bias of -inf masks the key, which shows in the logits alone.
inline void ClearByLogits(const Call& c, int64_t c0, int64_t c1, const float* logits, float* x) {
  if (!c.bias) return;
  const F minus_inf = Set(-__builtin_inff()), none = Set(0.0f);
  Combine(c1 - c0, x + c0, logits + c0, [&](F y, F s) { return Select(Equal(s, minus_inf), none, y); });
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
