// Vectors of AVX2, FMA and F16C, as simd-inl.h lists them.
#pragma once

#ifndef JAX_FA_ISA  // parsed alone
#define JAX_FA_ISA avx2
#endif

#include <immintrin.h>

#include "cpu/philox.h"
#include "cpu/target-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

using F = __m256;
using Mask = __m256;
inline F Load(const float* p) { return _mm256_loadu_ps(p); }
inline void Store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F Set(float x) { return _mm256_set1_ps(x); }
inline F Repeat(const float* p) { return Set(*p); }
inline F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F Max(F a, F b) { return _mm256_max_ps(a, b); }
inline __m256i FirstInt(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Mask First(int n) { return _mm256_castsi256_ps(FirstInt(n)); }
inline F LoadFirst(const float* p, int n) { return _mm256_maskload_ps(p, FirstInt(n)); }
inline void StoreFirst(float* p, F x, int n) { _mm256_maskstore_ps(p, FirstInt(n), x); }
inline F Select(Mask m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
inline float Sum(F x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float MaxOf(F x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline F LoadBF16(const uint16_t* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline F LoadF16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline F LoadI8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// See convert-inl.h.
inline F LoadF8E5M2(const uint8_t* p) {
  const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtph_ps(_mm_slli_epi16(x, 8));
}
inline F LoadF8E4M3(const uint8_t* p) {
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128i nan = _mm_cvtepi8_epi16(_mm_cmpeq_epi8(_mm_add_epi8(x, x), _mm_set1_epi8(-2)));  // of all ones
  const __m128i twice = _mm_slli_epi16(_mm_cvtepi8_epi16(x), 7);                                 // the sign
  const __m128i half = _mm_and_si128(twice, _mm_set1_epi16(-0x4001));
  return _mm256_cvtph_ps(_mm_or_si128(nan, half)) * Set(256.0f);
}
// The first n < kLanes elements, then zeros; nothing behind them is read. `inside`: p + n is at least kLanes elements into its array.
inline __m128i LoadFirst16(const uint16_t* p, int n, bool inside) {
  alignas(32) static const uint8_t kBytes[32] = {0,   1,   2,   3,   4,   5,   6,   7,   8,   9,   10,
                                                 11,  12,  13,  14,  15,  128, 128, 128, 128, 128, 128,
                                                 128, 128, 128, 128, 128, 128, 128, 128, 128, 128};
  if (inside) {  // the last kLanes elements, moved to the front
    const __m128i last = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + n - kLanes));
    return _mm_shuffle_epi8(last, _mm_loadu_si128(reinterpret_cast<const __m128i*>(kBytes + 2 * (kLanes - n))));
  }
  uint16_t x[kLanes] = {};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
}
inline F LoadFirstBF16(const uint16_t* p, int n, bool inside) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(LoadFirst16(p, n, inside)), 16));
}
inline F LoadFirstF16(const uint16_t* p, int n, bool inside) { return _mm256_cvtph_ps(LoadFirst16(p, n, inside)); }
inline void StoreF16(uint16_t* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void StoreBF16(uint16_t* p, F x) {
  const __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i y = _mm256_blendv_epi8(r, nan, is_nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(y, y), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline F Sqrt(F x) { return _mm256_sqrt_ps(x); }
inline F Abs(F x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline F Count() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
inline Mask NonZero(const uint8_t* p) {
  const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(x, _mm256_setzero_si256()));
}
inline Mask Bits(uint32_t bits) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(
      _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), each), each));
}
inline Mask IsZero(F x) { return _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ); }
inline Mask Equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
inline Mask Equal(const int32_t* p, int32_t x) {
  const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(y, _mm256_set1_epi32(x)));
}
// x log2(e) = n + f with n integral and f in [-1/2, 1/2], for x from -88 on; below, 2^n is 0. With n + 127 in the low bits of
// `whole`, shifting it gives the bits of 2^n.
struct Octaves {
  F whole, fraction;
};
inline Octaves SplitOctaves(F x) {
  const F t = _mm256_max_ps(Set(-88.0296919f), x), magic = Set(0x1.8p23f + 127.0f);  // NaN stays
  const F whole = Fma(t, Set(kLog2E), magic);
  return {whole, Fma(t, Set(kLog2E), magic - whole)};
}
inline F ScaleByOctaves(F x, const Octaves& t) {
  return x * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t.whole), 23));
}

// x as it is: the compiler does not merge the multiplication that gave it with an addition into one rounding.
JAX_FA_INLINE F Rounded(F x) {
  asm("" : "+v"(x));
  return x;
}
JAX_FA_INLINE float Rounded(float x) {
  asm("" : "+v"(x));
  return x;
}

// kLanes rows of kLanes floats each, transposed in registers.
inline void TransposeBlock(const float* src, int64_t src_row, float* dst, int64_t dst_row) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = Load(src + i * src_row);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Store(dst + i * dst_row, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    Store(dst + (i + 4) * dst_row, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}

// sums[i]: the sum of the lanes of x[i].
inline void SumFour(const F* x, float* sums) {
  const F a = _mm256_add_ps(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
  const F b = _mm256_add_ps(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
  const F c = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1)));
}

// See philox.h.
inline void KeepColumns(const uint32_t seed[2], const uint32_t stream[2], uint32_t row, uint32_t block,
                        uint32_t threshold, uint32_t keep[4]) {
  if (threshold > 0xffffu) {
    keep[0] = keep[1] = keep[2] = keep[3] = ~0u;
    return;
  }
  // Four counters a vector, each word in the low half of 64 bits: the multiplication reads only that half, so what is
  // left in the high half does no harm. Two vectors at a time: with all four the words would not fit the registers.
  const __m256i mul0 = _mm256_set1_epi64x(kMul0), mul1 = _mm256_set1_epi64x(kMul1);
  const __m256i limit = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  const __m256i in_order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  for (int b = 0; b < 4; b += 2) {
    __m256i c0[2], c1[2], c2[2], c3[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      c0[h] = _mm256_add_epi64(_mm256_setr_epi64x(0, 1, 2, 3),
                               _mm256_set1_epi64x(static_cast<int64_t>(block) * 16 + 4 * (b + h)));
      c1[h] = _mm256_set1_epi64x(row);
      c2[h] = _mm256_set1_epi64x(stream[0]);
      c3[h] = _mm256_set1_epi64x(stream[1]);
    }
    uint32_t k0 = seed[0], k1 = seed[1];
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256i p0 = _mm256_mul_epu32(c0[h], mul0), p1 = _mm256_mul_epu32(c2[h], mul1);
        c0[h] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1[h], key0));
        c2[h] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3[h], key1));
        c1[h] = p1;
        c3[h] = p0;
      }
      k0 += kWeyl0;
      k1 += kWeyl1;
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      // Words 0 and 1, then 2 and 3, of the four counters; where a half is not below the limit, the difference is 0.
      const auto dropped = [&](__m256i even, __m256i odd) {
        const __m256i both = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
        const __m256i x = _mm256_permutevar8x32_epi32(both, in_order);
        return _mm256_cmpeq_epi16(_mm256_subs_epu16(limit, x), _mm256_setzero_si256());
      };
      const __m256i bytes = _mm256_packs_epi16(dropped(c0[h], c1[h]), dropped(c2[h], c3[h]));
      keep[b + h] = ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xd8)));
    }
  }
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
