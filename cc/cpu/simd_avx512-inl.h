// Vectors of AVX-512 (F, BW, DQ, VL), as simd-inl.h lists them.
#pragma once

#ifndef JAX_FA_ISA  // parsed alone
#define JAX_FA_ISA avx512
#endif

#include <immintrin.h>

#include "cpu/philox.h"
#include "cpu/target-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

using F = __m512;
using Mask = __mmask16;
inline F Load(const float* p) { return _mm512_loadu_ps(p); }
inline void Store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F Set(float x) { return _mm512_set1_ps(x); }
inline F Repeat(const float* p) { return Set(*p); }
inline F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F Max(F a, F b) { return _mm512_max_ps(a, b); }
inline Mask First(int n) { return static_cast<Mask>((1u << n) - 1u); }
inline F LoadFirst(const float* p, int n) { return _mm512_maskz_loadu_ps(First(n), p); }
inline void StoreFirst(float* p, F x, int n) { _mm512_mask_storeu_ps(p, First(n), x); }
inline F Select(Mask m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
inline float Sum(F x) { return _mm512_reduce_add_ps(x); }
inline float MaxOf(F x) { return _mm512_reduce_max_ps(x); }
inline F LoadBF16(const uint16_t* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline F LoadF16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline F LoadI8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// See convert-inl.h.
inline F LoadF8E5M2(const uint8_t* p) {
  const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtph_ps(_mm256_slli_epi16(x, 8));
}
inline F LoadF8E4M3(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __mmask16 finite = _mm_cmpneq_epi8_mask(_mm_add_epi8(x, x), _mm_set1_epi8(-2));
  const __m256i twice = _mm256_slli_epi16(_mm256_cvtepi8_epi16(x), 7);  // the sign
  const __m256i half = _mm256_and_si256(twice, _mm256_set1_epi16(-0x4001));
  return _mm512_cvtph_ps(_mm256_mask_blend_epi16(finite, _mm256_set1_epi16(0x7e00), half)) * Set(256.0f);
}
// The first n < kLanes elements, then zeros; nothing behind them is read. `inside`: p + n is at least kLanes elements into its array.
inline F LoadFirstBF16(const uint16_t* p, int n, bool) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(First(n), p)), 16));
}
inline F LoadFirstF16(const uint16_t* p, int n, bool) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(First(n), p)); }
inline void StoreF16(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void StoreBF16(uint16_t* p, F x) {
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i nan = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  r = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), r, nan);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}
inline F Sqrt(F x) { return _mm512_sqrt_ps(x); }
inline F Abs(F x) { return _mm512_abs_ps(x); }
inline F Count() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Mask NonZero(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_test_epi8_mask(x, x);
}
inline Mask Bits(uint32_t bits) { return static_cast<Mask>(bits); }
inline Mask IsZero(F x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_EQ_OQ); }
inline Mask Equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask Equal(const int32_t* p, int32_t x) {
  return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(x));
}
// x log2(e) = n + f with n integral and f in [-1/2, 1/2]; for x = -inf, f is 0.
struct Octaves {
  F whole, fraction;
};
inline Octaves SplitOctaves(F x) {
  const F t = x * Set(kLog2E), f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return {t - f, f};
}
inline F ScaleByOctaves(F x, const Octaves& t) { return _mm512_scalef_ps(x, t.whole); }

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
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = Load(src + i * src_row);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d b0 = _mm512_castps_pd(b[i]), b1 = _mm512_castps_pd(b[i + 1]);
    const __m512d b2 = _mm512_castps_pd(b[i + 2]), b3 = _mm512_castps_pd(b[i + 3]);
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(b0, b2));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(b0, b2));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b1, b3));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b1, b3));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Store(dst + i * dst_row, _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88));
    Store(dst + (i + 4) * dst_row, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88));
    Store(dst + (i + 8) * dst_row, _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd));
    Store(dst + (i + 12) * dst_row, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd));
  }
}

// sums[i]: the sum of the lanes of x[i].
inline void SumFour(const F* x, float* sums) {
  // Within 128 bits: x[2i] in the even lanes, x[2i + 1] in the odd ones.
  const F a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const F b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  const __m512d p = _mm512_castps_pd(a), q = _mm512_castps_pd(b);
  const F c = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
}

// See philox.h.
inline void KeepColumns(const uint32_t seed[2], const uint32_t stream[2], uint32_t row, uint32_t block,
                        uint32_t threshold, uint32_t keep[4]) {
  if (threshold > 0xffffu) {
    keep[0] = keep[1] = keep[2] = keep[3] = ~0u;
    return;
  }
  // Eight counters a vector, each word in the low half of 64 bits: the multiplication reads only that half, so
  // what is left in the high half does no harm.
  const __m512i first = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i mul0 = _mm512_set1_epi64(kMul0), mul1 = _mm512_set1_epi64(kMul1);
  __m512i c0[2], c1[2], c2[2], c3[2];
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    c0[h] = _mm512_add_epi64(first, _mm512_set1_epi64(static_cast<int64_t>(block) * 16 + 8 * h));
    c1[h] = _mm512_set1_epi64(row);
    c2[h] = _mm512_set1_epi64(stream[0]);
    c3[h] = _mm512_set1_epi64(stream[1]);
  }
  uint32_t k0 = seed[0], k1 = seed[1];
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512i p0 = _mm512_mul_epu32(c0[h], mul0), p1 = _mm512_mul_epu32(c2[h], mul1);
      c0[h] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1[h], key0, 0x96);  // xor of three
      c2[h] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3[h], key1, 0x96);
      c1[h] = p1;
      c3[h] = p0;
    }
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  const __m512i low = _mm512_setr_epi32(0, 2, 4, 6, 16, 18, 20, 22, 8, 10, 12, 14, 24, 26, 28, 30);
  const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(threshold));
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    // Words 0 and 1, then 2 and 3, of counters 0..3 and (upper half) 4..7.
    const __m512i a = _mm512_permutex2var_epi32(c0[h], low, c1[h]), b = _mm512_permutex2var_epi32(c2[h], low, c3[h]);
    keep[2 * h] = _mm512_cmplt_epu16_mask(_mm512_shuffle_i64x2(a, b, 0x44), limit);
    keep[2 * h + 1] = _mm512_cmplt_epu16_mask(_mm512_shuffle_i64x2(a, b, 0xee), limit);
  }
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
