// Vectors of the instruction set, and what is written with them once for all sets: exp, tanh, units of products.
//
// A simd_<set>-inl.h header defines the vector of kLanes floats F, the type Mask of its comparisons, and
//
//   Load, Store, LoadFirst, StoreFirst (the first n lanes), LoadBF16, LoadF16, LoadFirstBF16, LoadFirstF16, StoreBF16,
//   StoreF16, LoadI8, LoadF8E4M3, LoadF8E5M2; Set, Repeat (an element, for the products), Count (0, 1, 2, ...); Fma, Max, Abs, Sqrt, and the operators
//   + - * / of the compiler's vectors; First, Bits, NonZero (of kLanes bytes), IsZero, Equal (masks), Select; Sum, MaxOf
//   (over lanes), SumFour, TransposeBlock; Rounded; Octaves, SplitOctaves, ScaleByOctaves (parts of exp); KeepColumns (see
//   philox.h); Unit<true> where it has pairs.
#pragma once

#include "cpu/target-inl.h"
#include JAX_FA_SIMD

namespace jax_fa::JAX_FA_ISA {
namespace {

constexpr float kFloatMax = 3.40282346638528859812e+38f;

// e^x for x <= 0 up to rounding, as 2^n times a polynomial in f in [-1/2, 1/2], x log2(e) being n + f: of all with p(0) = 1
// the one of least relative error. Relative error at most 1.5e-7 for f = x log2(e), beyond that rounding f adds to it;
// e^0 is 1 exactly, -inf gives 0, NaN gives NaN.
inline F Exp(F x) {
  const Octaves t = SplitOctaves(x);
  const F f = t.fraction;
  F p = Set(1.32029823e-3f);
  p = Fma(p, f, Set(9.67495193e-3f));
  p = Fma(p, f, Set(5.55104738e-2f));
  p = Fma(p, f, Set(2.40221660e-1f));
  p = Fma(p, f, Set(6.93146596e-1f));
  p = Fma(p, f, Set(1.0f));
  return ScaleByOctaves(p, t);
}

// tanh(x) = x P(x^2) / Q(x^2) on [-9, 9] (a rational minimax approximation; a few ulp). NaN stays NaN.
inline F Tanh(F x) {
  const F t = Max(Set(-9.0f), Set(0.0f) - Max(Set(-9.0f), Set(0.0f) - x));
  const F y = t * t;
  F p = Set(-2.76076847742355e-16f);
  p = Fma(p, y, Set(2.00018790482477e-13f));
  p = Fma(p, y, Set(-8.60467152213735e-11f));
  p = Fma(p, y, Set(5.12229709037114e-08f));
  p = Fma(p, y, Set(1.48572235717979e-05f));
  p = Fma(p, y, Set(6.37261928875436e-04f));
  p = Fma(p, y, Set(4.89352455891786e-03f));
  F q = Set(1.19825839466702e-06f);
  q = Fma(q, y, Set(1.18534705686654e-04f));
  q = Fma(q, y, Set(2.26843463243900e-03f));
  q = Fma(q, y, Set(4.89352518554385e-03f));
  return t * p / q;
}

template <>
struct Unit<false> {
  static constexpr int64_t kElements = 1;
  static JAX_FA_INLINE F MulAdd(F a, F b, F c) { return Fma(a, b, c); }
};

template <bool kPairs>
JAX_FA_INLINE int64_t Units(int64_t elements) {
  return (elements + Unit<kPairs>::kElements - 1) / Unit<kPairs>::kElements;
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
