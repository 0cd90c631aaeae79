// Vectors of four floats in the vector extensions of GCC and Clang, as simd-inl.h lists them: for every processor.
#pragma once

#ifndef JAX_FA_ISA  // parsed alone
#define JAX_FA_ISA portable
#endif

#include "cpu/convert-inl.h"
#include "cpu/philox_loops-inl.h"
#include "cpu/target-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

using F __attribute__((vector_size(16), aligned(4))) = float;
using Mask __attribute__((vector_size(16), aligned(4))) = int32_t;
inline F Load(const float* p) {
  F x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void Store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
inline F Set(float x) { return F{x, x, x, x}; }
inline F Repeat(const float* p) { return Set(*p); }
inline F Fma(F a, F b, F c) { return a * b + c; }
inline F Max(F a, F b) { return a > b ? a : b; }
inline Mask First(int n) { return Mask{0, 1, 2, 3} < Mask{n, n, n, n}; }
inline F LoadFirst(const float* p, int n) {
  F x{};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
inline void StoreFirst(float* p, F x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x[i];
}
inline F Select(Mask m, F yes, F no) { return m ? yes : no; }
inline float Sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float MaxOf(F x) {
  const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}
inline F LoadBF16(const uint16_t* p) {
  F x;
  for (int i = 0; i < 4; ++i) x[i] = ToFloatBF16(p[i]);
  return x;
}
inline F LoadF16(const uint16_t* p) {
  F x;
  for (int i = 0; i < 4; ++i) x[i] = ToFloatF16(p[i]);
  return x;
}
inline F LoadI8(const int8_t* p) {
  const float x[kLanes] = {static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
                           static_cast<float>(p[3])};
  return Load(x);
}
inline F LoadF8E4M3(const uint8_t* p) {
  const float x[kLanes] = {ToFloatF8E4M3(p[0]), ToFloatF8E4M3(p[1]), ToFloatF8E4M3(p[2]), ToFloatF8E4M3(p[3])};
  return Load(x);
}
inline F LoadF8E5M2(const uint8_t* p) {
  const float x[kLanes] = {ToFloatF8E5M2(p[0]), ToFloatF8E5M2(p[1]), ToFloatF8E5M2(p[2]), ToFloatF8E5M2(p[3])};
  return Load(x);
}
// The first n < kLanes elements, then zeros; nothing behind them is read.
inline F LoadFirstBF16(const uint16_t* p, int n, bool) {
  F x{};
  for (int i = 0; i < n; ++i) x[i] = ToFloatBF16(p[i]);
  return x;
}
inline F LoadFirstF16(const uint16_t* p, int n, bool) {
  F x{};
  for (int i = 0; i < n; ++i) x[i] = ToFloatF16(p[i]);
  return x;
}
inline void StoreF16(uint16_t* p, F x) {
  for (int i = 0; i < 4; ++i) p[i] = FromFloatF16(x[i]);
}
inline void StoreBF16(uint16_t* p, F x) {
  for (int i = 0; i < 4; ++i) p[i] = FromFloatBF16(x[i]);
}
inline F Sqrt(F x) {
  F r;
  for (int i = 0; i < 4; ++i) r[i] = __builtin_sqrtf(x[i]);
  return r;
}
inline F Abs(F x) { return x < 0.0f ? -x : x; }
inline F Count() { return F{0, 1, 2, 3}; }
inline Mask NonZero(const uint8_t* p) { return Mask{p[0], p[1], p[2], p[3]} != Mask{0, 0, 0, 0}; }
inline Mask Bits(uint32_t bits) {
  const int b = static_cast<int>(bits);
  return (Mask{b, b, b, b} & Mask{1, 2, 4, 8}) != Mask{0, 0, 0, 0};
}
inline Mask IsZero(F x) { return x == Set(0.0f); }
inline Mask Equal(F a, F b) { return a == b; }
inline Mask Equal(const int32_t* p, int32_t x) { return Mask{p[0], p[1], p[2], p[3]} == Mask{x, x, x, x}; }
// x as it is: the compiler does not merge the multiplication that gave it with an addition into one rounding.
#if defined(__x86_64__)
#define JAX_FA_ANY_PLACE "+x"  // a vector register, as the compiler calls it here
#elif defined(__aarch64__)
#define JAX_FA_ANY_PLACE "+w"
#else
#define JAX_FA_ANY_PLACE "+m"
#endif
JAX_FA_INLINE F Rounded(F x) {
  asm("" : JAX_FA_ANY_PLACE(x));
  return x;
}
JAX_FA_INLINE float Rounded(float x) {
  asm("" : JAX_FA_ANY_PLACE(x));
  return x;
}
#undef JAX_FA_ANY_PLACE

// x log2(e) = n + f with n integral and f in [-1/2, 1/2], for x from -88 on; below, 2^n is 0. With n + 127 in the low bits of
// `whole`, shifting it gives the bits of 2^n.
struct Octaves {
  F whole, fraction;
};
inline Octaves SplitOctaves(F x) {
  const F least = Set(-88.0296919f), t = x < least ? least : x, magic = Set(0x1.8p23f + 127.0f);  // NaN stays
  const F whole = Rounded(Fma(t, Set(kLog2E), magic));
  return {whole, Fma(t, Set(kLog2E), Rounded(magic - whole))};
}
inline F ScaleByOctaves(F x, const Octaves& t) {
  F power;
  for (int i = 0; i < 4; ++i) power[i] = BitsToFloat(FloatToBits(t.whole[i]) << 23);
  return x * power;
}

// kLanes rows of kLanes floats each, transposed in registers.
inline void TransposeBlock(const float* src, int64_t src_row, float* dst, int64_t dst_row) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) dst[j * dst_row + i] = src[i * src_row + j];
}

// sums[i]: the sum of the lanes of x[i].
inline void SumFour(const F* x, float* sums) {
  for (int i = 0; i < 4; ++i) sums[i] = Sum(x[i]);
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
