// AVX-512 with products of pairs of bfloat16 (VDPBF16PS), and tables of bytes (VBMI).
#pragma once

#ifndef JAX_FA_ISA  // parsed alone
#define JAX_FA_ISA avx512_bf16
#endif

#include "cpu/convert-inl.h"
#include "cpu/simd_avx512-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// The bytes of the bfloat16 of every magnitude of 7 bits.
template <DType kType>
struct MagnitudeBytes {
  alignas(64) uint8_t low[128] = {}, high[128] = {};
  constexpr MagnitudeBytes() {
    for (uint32_t x = 0; x < 128; ++x) {
      low[x] = static_cast<uint8_t>(MagnitudeBF16(kType, x));
      high[x] = static_cast<uint8_t>(MagnitudeBF16(kType, x) >> 8);
    }
    if (kType == DType::kI8) high[0] = static_cast<uint8_t>(MagnitudeBF16(kType, 128) >> 8);  // see Widen
  }
};

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

  // 8-bit elements, up to 64 at a time, as the bfloat16 that they are: by a table for each byte of it. Where there are n < 64
  // elements, zeros follow, and nothing behind them is read.
  template <DType kType>
  class Widen {
   public:
    // A row as two vectors of units.
    template <bool kAll>
    JAX_FA_INLINE void Row(const char* p, int64_t n, F* units) const {
      Take(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), Bytes<kAll>(p, n)), units);
    }
    // Two rows as four vectors of units (row a, row b).
    template <bool kAll>
    JAX_FA_INLINE void Pair(const char* a, const char* b, int64_t n, F* units) const {
      const __m512i quarters = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      const __m512i x = _mm512_permutexvar_epi32(quarters, Bytes<kAll>(a, n));
      const __m512i y = _mm512_permutexvar_epi32(quarters, Bytes<kAll>(b, n));
      Take(_mm512_unpacklo_epi8(x, y), units);
      Take(_mm512_unpackhi_epi8(x, y), units + 2);
    }

   private:
    template <bool kAll>
    static JAX_FA_INLINE __m512i Bytes(const char* p, int64_t n) {
      return kAll ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, p);
    }

    // Unpacking takes the elements of each 128 bits apart: callers put them into the order that makes up for it.
    JAX_FA_INLINE void Take(__m512i x, F* units) const {
      const __m512i sign = _mm512_set1_epi8(-128), magnitude = kType == DType::kI8 ? _mm512_abs_epi8(x) : x;
      const __m512i low = _mm512_permutex2var_epi8(low_[0], magnitude, low_[1]);
      // Of a magnitude of 8 bits, -128, tables see the lower 7: their 0 is 128, whose lower byte is that of 0.
      __m512i high = kType == DType::kI8
                         ? _mm512_maskz_permutex2var_epi8(_mm512_test_epi8_mask(x, x), high_[0], magnitude, high_[1])
                         : _mm512_permutex2var_epi8(high_[0], magnitude, high_[1]);
      high = _mm512_ternarylogic_epi64(high, x, sign, 0xf8);  // high | (x & sign)
      units[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi8(low, high));
      units[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi8(low, high));
    }

    static constexpr MagnitudeBytes<kType> kTable{};
    static __m512i Half(const uint8_t* p) { return _mm512_load_si512(p); }
    const __m512i low_[2] = {Half(kTable.low), Half(kTable.low + 64)};
    const __m512i high_[2] = {Half(kTable.high), Half(kTable.high + 64)};
  };
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
