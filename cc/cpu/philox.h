// Keep bits of dropout: Philox4x32-10 in the layout that jax_fa/dropout.py defines.
//
// A row's bits come in blocks of 128 columns, made of 16 counters of four words. Columns 32 b + 8 w + 2 i + h are
// the 16-bit halves h of word w of counter 4 b + i.

constexpr int64_t kKeepColumns = 128;
constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u, kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

// Bit c % 32 of keep[c / 32] is 1 where column `block * kKeepColumns + c` of a row is kept.
#if defined(JAX_FA_AVX512)
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
#else
inline void KeepColumns(const uint32_t seed[2], const uint32_t stream[2], uint32_t row, uint32_t block,
                        uint32_t threshold, uint32_t keep[4]) {
  uint32_t c0[16], c1[16], c2[16], c3[16];
  for (uint32_t i = 0; i < 16; ++i) {
    c0[i] = block * 16 + i;
    c1[i] = row;
    c2[i] = stream[0];
    c3[i] = stream[1];
  }
  uint32_t k0 = seed[0], k1 = seed[1];
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 16; ++i) {
      const uint64_t p0 = static_cast<uint64_t>(c0[i]) * kMul0;
      const uint64_t p1 = static_cast<uint64_t>(c2[i]) * kMul1;
      const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c0[i] = n0;
      c1[i] = static_cast<uint32_t>(p1);
      c2[i] = n2;
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  const uint32_t* words[4] = {c0, c1, c2, c3};
  for (int b = 0; b < 4; ++b) {
    uint32_t bits = 0;
    for (int w = 0; w < 4; ++w) {
      for (int i = 0; i < 4; ++i) {
        const uint32_t x = words[w][4 * b + i];
        bits |= static_cast<uint32_t>((x & 0xFFFFu) < threshold) << (8 * w + 2 * i);
        bits |= static_cast<uint32_t>((x >> 16) < threshold) << (8 * w + 2 * i + 1);
      }
    }
    keep[b] = bits;
  }
}
#endif
