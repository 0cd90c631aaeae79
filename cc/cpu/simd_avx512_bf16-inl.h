// AVX-512 with products of pairs of bfloat16 (VDPBF16PS).
#pragma once

#ifndef JAX_FA_ISA  // parsed alone
#define JAX_FA_ISA avx512_bf16
#endif

#include "cpu/simd_avx512-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

template <>
struct Unit<true> {
  static constexpr int64_t kElements = 2;
  static JAX_FA_INLINE F MulAdd(F a, F b, F c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // The first n < 2 kLanes elements of a row as units, then zeros; nothing behind them is read.
  static JAX_FA_INLINE F LoadFirst(const uint16_t* p, int n) {
    if (n % 2 == 0) return _mm512_maskz_loadu_ps(First(n / 2), p);
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint32_t{1} << n) - 1u), p));
  }
  // acc plus the elements themselves.
  static JAX_FA_INLINE F Add(F acc, F units) {
    return MulAdd(units, _mm512_castsi512_ps(_mm512_set1_epi16(0x3f80)), acc);
  }
  // The bits of the magnitudes.
  static JAX_FA_INLINE __m512i Magnitudes(F units) {
    return _mm512_and_si512(_mm512_castps_si512(units), _mm512_set1_epi16(0x7fff));
  }
  // The larger one of each magnitude in `most` and element of `units`, by their bits.
  static JAX_FA_INLINE F Larger(F most, F units) {
    return _mm512_castsi512_ps(_mm512_max_epu16(_mm512_castps_si512(most), Magnitudes(units)));
  }
  // The bits of the largest magnitude.
  static JAX_FA_INLINE int32_t Largest(F most) {
    const __m512i x = _mm512_castps_si512(most);
    const __m256i y = _mm256_max_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    const __m128i z = _mm_max_epu16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    return 0xffff - _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(z, _mm_set1_epi16(-1))), 0);
  }
  static JAX_FA_INLINE bool AnyAbove(F most, int32_t magnitude) {
    return _mm512_cmpgt_epu16_mask(_mm512_castps_si512(most), _mm512_set1_epi16(static_cast<int16_t>(magnitude))) != 0;
  }
  // A bit for each element of that magnitude.
  static JAX_FA_INLINE uint32_t Equals(F units, int32_t magnitude) {
    return _mm512_cmpeq_epi16_mask(Magnitudes(units), _mm512_set1_epi16(static_cast<int16_t>(magnitude)));
  }
  // Two vectors of floats, rounded, in their order.
  static JAX_FA_INLINE F Join(F first, F second) { return reinterpret_cast<F>(_mm512_cvtne2ps_pbh(second, first)); }
  // From 32 columns of two rows: pairs (row a, row b) of the first and of the last 16 columns.
  static JAX_FA_INLINE void Interleave(F a, F b, F* first, F* last) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
    *first = _mm512_castsi512_ps(_mm512_permutex2var_epi16(x, low, y));
    *last = _mm512_castsi512_ps(_mm512_permutex2var_epi16(x, high, y));
  }
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
