// Vectors of NEON (AArch64), as simd-inl.h lists them.
#pragma once

#ifndef JAX_FA_ISA  // parsed alone
#define JAX_FA_ISA neon
#endif

#include <arm_neon.h>

#include "cpu/convert-inl.h"
#include "cpu/philox.h"
#include "cpu/target-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

using F = float32x4_t;
using Mask = uint32x4_t;
inline F Load(const float* p) { return vld1q_f32(p); }
inline void Store(float* p, F x) { vst1q_f32(p, x); }
inline F Set(float x) { return vdupq_n_f32(x); }
// A load into one lane, which the products take by element (see tuning.h). It stays where it is: GCC would load the
// elements of all rows of a tile first, which takes more registers than there are.
JAX_FA_INLINE F Repeat(const float* p) {
  asm volatile("" ::: "memory");
  return Set(*p);
}
inline F Fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F Max(F a, F b) { return vmaxq_f32(a, b); }
inline Mask First(int n) { return vcltq_s32(int32x4_t{0, 1, 2, 3}, vdupq_n_s32(n)); }
inline F LoadFirst(const float* p, int n) {
  if (n >= kLanes) return Load(p);
  F x = Set(0.0f);
  if ((n & 2) != 0) x = vcombine_f32(vld1_f32(p), vdup_n_f32(0.0f));
  if (n == 1) x = vld1q_lane_f32(p, x, 0);
  if (n == 3) x = vld1q_lane_f32(p + 2, x, 2);
  return x;
}
inline void StoreFirst(float* p, F x, int n) {
  if (n >= kLanes) return Store(p, x);
  if ((n & 2) != 0) vst1_f32(p, vget_low_f32(x));
  if (n == 1) vst1q_lane_f32(p, x, 0);
  if (n == 3) vst1q_lane_f32(p + 2, x, 2);
}
inline F Select(Mask m, F yes, F no) { return vbslq_f32(m, yes, no); }
inline float Sum(F x) { return vaddvq_f32(x); }
inline float MaxOf(F x) { return vmaxvq_f32(x); }
inline F FromBF16(uint16x4_t x) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(x), 16)); }
inline F FromF16(uint16x4_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
inline F LoadBF16(const uint16_t* p) { return FromBF16(vld1_u16(p)); }
inline F LoadF16(const uint16_t* p) { return FromF16(vld1_u16(p)); }
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
// The first n < kLanes elements, then zeros; nothing behind them is read. `inside`: p + n is at least kLanes elements
// into its array.
inline uint16x4_t LoadFirst16(const uint16_t* p, int n, bool inside) {
  if (inside) {  // the last kLanes elements, moved to the front
    const uint64x1_t last = vreinterpret_u64_u16(vld1_u16(p + n - kLanes));
    return vreinterpret_u16_u64(vshl_u64(last, vdup_n_s64(-16 * (kLanes - n))));
  }
  uint64_t x = 0;
  for (int i = 0; i < n; ++i) x |= static_cast<uint64_t>(p[i]) << (16 * i);
  return vcreate_u16(x);
}
inline F LoadFirstBF16(const uint16_t* p, int n, bool inside) { return FromBF16(LoadFirst16(p, n, inside)); }
inline F LoadFirstF16(const uint16_t* p, int n, bool inside) { return FromF16(LoadFirst16(p, n, inside)); }
inline void StoreF16(uint16_t* p, F x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
inline void StoreBF16(uint16_t* p, F x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t nan = vorrq_u32(bits, vdupq_n_u32(0x400000));
  vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, nan), 16));
}
inline F Sqrt(F x) { return vsqrtq_f32(x); }
inline F Abs(F x) { return vabsq_f32(x); }
inline F Count() { return F{0, 1, 2, 3}; }
inline Mask NonZero(const uint8_t* p) {
  uint32_t bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  const uint32x4_t x = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
  return vtstq_u32(x, x);
}
inline Mask Bits(uint32_t bits) { return vtstq_u32(vdupq_n_u32(bits), uint32x4_t{1, 2, 4, 8}); }
inline Mask IsZero(F x) { return vceqzq_f32(x); }
inline Mask Equal(F a, F b) { return vceqq_f32(a, b); }
inline Mask Equal(const int32_t* p, int32_t x) { return vceqq_s32(vld1q_s32(p), vdupq_n_s32(x)); }
// x log2(e) = n + f with n integral and f in [-1/2, 1/2], for x from -88 on; below, 2^n is 0. With n + 127 in the low bits of
// `whole`, shifting it gives the bits of 2^n.
struct Octaves {
  F whole, fraction;
};
inline Octaves SplitOctaves(F x) {
  const F t = vmaxq_f32(x, Set(-88.0296919f)), magic = Set(0x1.8p23f + 127.0f);  // NaN stays
  const F whole = Fma(t, Set(kLog2E), magic);
  return {whole, Fma(t, Set(kLog2E), magic - whole)};
}
inline F ScaleByOctaves(F x, const Octaves& t) {
  return x * vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(t.whole), 23));
}

// x as it is: the compiler does not merge the multiplication that gave it with an addition into one rounding.
JAX_FA_INLINE F Rounded(F x) {
  asm("" : "+w"(x));
  return x;
}
JAX_FA_INLINE float Rounded(float x) {
  asm("" : "+w"(x));
  return x;
}

// kLanes rows of kLanes floats each, transposed in registers.
inline void TransposeBlock(const float* src, int64_t src_row, float* dst, int64_t dst_row) {
  const F a = Load(src), b = Load(src + src_row), c = Load(src + 2 * src_row), d = Load(src + 3 * src_row);
  const float64x2_t ab0 = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), ab1 = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
  const float64x2_t cd0 = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), cd1 = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
  Store(dst, vreinterpretq_f32_f64(vtrn1q_f64(ab0, cd0)));
  Store(dst + dst_row, vreinterpretq_f32_f64(vtrn1q_f64(ab1, cd1)));
  Store(dst + 2 * dst_row, vreinterpretq_f32_f64(vtrn2q_f64(ab0, cd0)));
  Store(dst + 3 * dst_row, vreinterpretq_f32_f64(vtrn2q_f64(ab1, cd1)));
}

// sums[i]: the sum of the lanes of x[i].
inline void SumFour(const F* x, float* sums) {
  Store(sums, vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])));
}

// One round of Philox for four counters.
JAX_FA_INLINE void PhiloxRound(uint32x4_t (&c)[4], uint32_t key0, uint32_t key1) {
  const auto multiply = [](uint32x4_t x, uint32_t by, uint32x4_t* low, uint32x4_t* high) {
    const uint32x4_t a = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(x), by));
    const uint32x4_t b = vreinterpretq_u32_u64(vmull_high_n_u32(x, by));
    *low = vuzp1q_u32(a, b);
    *high = vuzp2q_u32(a, b);
  };
  uint32x4_t low0, high0, low1, high1;
  multiply(c[0], kMul0, &low0, &high0);
  multiply(c[2], kMul1, &low1, &high1);
  c[0] = veorq_u32(veorq_u32(high1, c[1]), vdupq_n_u32(key0));
  c[1] = low1;
  c[2] = veorq_u32(veorq_u32(high0, c[3]), vdupq_n_u32(key1));
  c[3] = low0;
}

// See philox.h.
inline void KeepColumns(const uint32_t seed[2], const uint32_t stream[2], uint32_t row, uint32_t block,
                        uint32_t threshold, uint32_t keep[4]) {
  if (threshold > 0xffffu) {
    keep[0] = keep[1] = keep[2] = keep[3] = ~0u;
    return;
  }
  uint32x4_t c[4][4];  // [counters][word]
#pragma GCC unroll 4
  for (uint32_t i = 0; i < 4; ++i) {
    c[i][0] = vaddq_u32(vdupq_n_u32(block * 16 + 4 * i), uint32x4_t{0, 1, 2, 3});
    c[i][1] = vdupq_n_u32(row);
    c[i][2] = vdupq_n_u32(stream[0]);
    c[i][3] = vdupq_n_u32(stream[1]);
  }
  uint32_t k0 = seed[0], k1 = seed[1];
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (auto& counters : c) PhiloxRound(counters, k0, k1);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  const uint16x8_t limit = vdupq_n_u16(static_cast<uint16_t>(threshold));
  const uint8x16_t bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto below = [&](int w) { return vmovn_u16(vcltq_u16(vreinterpretq_u16_u32(c[i][w]), limit)); };
    const uint8x16_t low = vandq_u8(vcombine_u8(below(0), below(1)), bit);
    const uint8x16_t high = vandq_u8(vcombine_u8(below(2), below(3)), bit);
    uint8x16_t sums = vpaddq_u8(low, high);  // bytes w of the word: the bits of word w
    sums = vpaddq_u8(sums, sums);
    sums = vpaddq_u8(sums, sums);
    keep[i] = vgetq_lane_u32(vreinterpretq_u32_u8(sums), 0);
  }
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
