// A float vector of the instruction set this file is compiled for, in some thirty functions.
//
// Included once per instruction set, inside that set's namespace (see kernel.inl). The portable path uses
// the vector extensions of GCC and Clang, which also serve Arm.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define JAX_FA_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define JAX_FA_AVX2 1
#endif

#if defined(JAX_FA_AVX512)
constexpr int kLanes = 16, kPanelVectors = 4, kRows = 6;
using F = __m512;
using Mask = __mmask16;
inline F Load(const float* p) { return _mm512_loadu_ps(p); }
inline void Store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F Set(float x) { return _mm512_set1_ps(x); }
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
inline F LoadF16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// The first n < kLanes numbers, then zeros; nothing behind them is read. `inside`: kLanes numbers lie before p too.
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
// t = n + f with n integral and f in [-1/2, 1/2]; for t = -inf, f is 0.
inline F Fraction(F t) { return _mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n for integral n <= 0; 0 below the normal numbers.
inline F ScaleByPowerOf2(F x, F n) { return _mm512_scalef_ps(x, n); }
inline F NotBelow(F x, float) { return x; }  // Fraction and ScaleByPowerOf2 take any x
#elif defined(JAX_FA_AVX2)
constexpr int kLanes = 8, kPanelVectors = 2, kRows = 6;
using F = __m256;
using Mask = __m256;
inline F Load(const float* p) { return _mm256_loadu_ps(p); }
inline void Store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F Set(float x) { return _mm256_set1_ps(x); }
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
inline F LoadF16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// The first n < kLanes numbers, then zeros; nothing behind them is read. `inside`: kLanes numbers lie before p too.
inline __m128i LoadFirst16(const uint16_t* p, int n, bool inside) {
  alignas(32) static const uint8_t kBytes[32] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                                                 128, 128, 128, 128, 128, 128, 128, 128,
                                                 128, 128, 128, 128, 128, 128, 128, 128};
  if (inside) {  // the last kLanes numbers, moved to the front
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
inline F Fraction(F t) { return t - _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F NotBelow(F x, float least) { return _mm256_max_ps(_mm256_set1_ps(least), x); }  // NaN stays
inline F ScaleByPowerOf2(F x, F n) {
  const F lowest = _mm256_set1_ps(-126.0f);
  const Mask tiny = _mm256_cmp_ps(n, lowest, _CMP_LT_OQ);
  const __m256i e = _mm256_slli_epi32(
      _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_max_ps(lowest, n)), _mm256_set1_epi32(127)), 23);
  return _mm256_blendv_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(e)), _mm256_setzero_ps(), tiny);
}
#else
constexpr int kLanes = 4, kPanelVectors = 4, kRows = 4;
typedef float F __attribute__((vector_size(16), aligned(4)));
typedef int32_t Mask __attribute__((vector_size(16), aligned(4)));
inline F Load(const float* p) { F x; __builtin_memcpy(&x, p, sizeof x); return x; }
inline void Store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
inline F Set(float x) { return F{x, x, x, x}; }
inline F Fma(F a, F b, F c) { return a * b + c; }
inline F Max(F a, F b) { return a > b ? a : b; }
inline Mask First(int n) { return Mask{0, 1, 2, 3} < Mask{n, n, n, n}; }
inline F LoadFirst(const float* p, int n) { F x{}; for (int i = 0; i < n; ++i) x[i] = p[i]; return x; }
inline void StoreFirst(float* p, F x, int n) { for (int i = 0; i < n; ++i) p[i] = x[i]; }
inline F Select(Mask m, F yes, F no) { return m ? yes : no; }
inline float Sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float MaxOf(F x) {
  const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}
inline F LoadBF16(const uint16_t* p) { F x; for (int i = 0; i < 4; ++i) x[i] = ToFloatBF16(p[i]); return x; }
inline F LoadF16(const uint16_t* p) { F x; for (int i = 0; i < 4; ++i) x[i] = ToFloatF16(p[i]); return x; }
// The first n < kLanes numbers, then zeros; nothing behind them is read.
inline F LoadFirstBF16(const uint16_t* p, int n, bool) {
  F x{}; for (int i = 0; i < n; ++i) x[i] = ToFloatBF16(p[i]); return x;
}
inline F LoadFirstF16(const uint16_t* p, int n, bool) {
  F x{}; for (int i = 0; i < n; ++i) x[i] = ToFloatF16(p[i]); return x;
}
inline void StoreF16(uint16_t* p, F x) { for (int i = 0; i < 4; ++i) p[i] = FromFloatF16(x[i]); }
inline void StoreBF16(uint16_t* p, F x) { for (int i = 0; i < 4; ++i) p[i] = FromFloatBF16(x[i]); }
inline F Sqrt(F x) { F r; for (int i = 0; i < 4; ++i) r[i] = __builtin_sqrtf(x[i]); return r; }
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
inline F Fraction(F t) { F f; for (int i = 0; i < 4; ++i) f[i] = t[i] - __builtin_rintf(t[i]); return f; }
inline F NotBelow(F x, float least) { const F v = Set(least); return x < v ? v : x; }  // NaN stays
inline F ScaleByPowerOf2(F x, F n) {
  const F lowest = Set(-126.0f);
  const Mask tiny = n < lowest;
  F clamped = n < lowest ? lowest : n;
  clamped = clamped == clamped ? clamped : Set(0.0f);
  const Mask e = (__builtin_convertvector(clamped, Mask) + 127) << 23;
  F power; __builtin_memcpy(&power, &e, sizeof power);
  return tiny ? Set(0.0f) : x * power;
}
#endif

constexpr int kPanel = kLanes * kPanelVectors;  // columns of a packed panel

// x as it is: the compiler does not merge the multiplication that gave it with an addition into one rounding.
#if defined(__x86_64__)
JAX_FA_INLINE F Rounded(F x) { asm("" : "+v"(x)); return x; }
JAX_FA_INLINE float Rounded(float x) { asm("" : "+v"(x)); return x; }
#elif defined(__aarch64__)
JAX_FA_INLINE F Rounded(F x) { asm("" : "+w"(x)); return x; }
JAX_FA_INLINE float Rounded(float x) { asm("" : "+w"(x)); return x; }
#else
JAX_FA_INLINE F Rounded(F x) { asm("" : "+m"(x)); return x; }
JAX_FA_INLINE float Rounded(float x) { asm("" : "+m"(x)); return x; }
#endif

constexpr float kLog2E = 1.44269504088896340736f;

// 2^x for x <= 0 up to rounding, by a polynomial on [-1/2, 1/2]: of all with p(0) = 1 the one of least relative error.
// Relative error about 1e-7 near 0; 2^0 is 1 exactly, -inf gives 0, NaN gives NaN.
inline F Exp2(F x) {
  const F t = NotBelow(x, -300.0f);
  const F f = Fraction(t);
  F p = Set(1.32029823e-3f);
  p = Fma(p, f, Set(9.67495193e-3f));
  p = Fma(p, f, Set(5.55104738e-2f));
  p = Fma(p, f, Set(2.40221660e-1f));
  p = Fma(p, f, Set(6.93146596e-1f));
  p = Fma(p, f, Set(1.0f));
  return ScaleByPowerOf2(p, t - f);
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

// What the products are made of: 32-bit units in the lanes of an F, one float or (where the instruction set has
// bfloat16 products) two neighbours along the sum, the first in the low half.
template <bool kPairs>
struct Unit {
  static constexpr int64_t kNumbers = 1;
  static JAX_FA_INLINE F MulAdd(F a, F b, F c) { return Fma(a, b, c); }
};

#if defined(JAX_FA_AVX512) && defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
template <>
struct Unit<true> {
  static constexpr int64_t kNumbers = 2;
  static JAX_FA_INLINE F MulAdd(F a, F b, F c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  // The first n < 2 kLanes numbers of a row as units, then zeros; nothing behind them is read.
  static JAX_FA_INLINE F LoadFirst(const uint16_t* p, int n) {
    if (n % 2 == 0) return _mm512_maskz_loadu_ps(First(n / 2), p);
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint32_t{1} << n) - 1u), p));
  }
  // acc plus the numbers themselves.
  static JAX_FA_INLINE F Add(F acc, F units) { return MulAdd(units, (F)_mm512_set1_epi16(0x3f80), acc); }
  // The larger one of each magnitude in `most` and number in `units`, by their bits.
  static JAX_FA_INLINE F Larger(F most, F units) {
    return (F)_mm512_max_epu16((__m512i)most, _mm512_and_si512((__m512i)units, _mm512_set1_epi16(0x7fff)));
  }
  // The bits of the largest magnitude.
  static JAX_FA_INLINE int32_t Largest(F most) {
    const __m512i x = (__m512i)most;
    const __m256i y = _mm256_max_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    const __m128i z = _mm_max_epu16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    return 0xffff - _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(z, _mm_set1_epi16(-1))), 0);
  }
  static JAX_FA_INLINE bool AnyAbove(F most, int32_t magnitude) {
    return _mm512_cmpgt_epu16_mask((__m512i)most, _mm512_set1_epi16(static_cast<int16_t>(magnitude))) != 0;
  }
  // A bit for each number of that magnitude.
  static JAX_FA_INLINE uint32_t Equals(F units, int32_t magnitude) {
    const __m512i x = _mm512_and_si512((__m512i)units, _mm512_set1_epi16(0x7fff));
    return _mm512_cmpeq_epi16_mask(x, _mm512_set1_epi16(static_cast<int16_t>(magnitude)));
  }
  // Two vectors of floats, rounded, in their order.
  static JAX_FA_INLINE F Join(F first, F second) { return (F)_mm512_cvtne2ps_pbh(second, first); }
  // From 32 columns of two rows: pairs (row a, row b) of the first and of the last 16 columns.
  static JAX_FA_INLINE void Interleave(F a, F b, F* first, F* last) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
    *first = _mm512_castsi512_ps(_mm512_permutex2var_epi16(x, low, y));
    *last = _mm512_castsi512_ps(_mm512_permutex2var_epi16(x, high, y));
  }
};
#else
constexpr bool kHasPairs = false;
#endif

template <bool kPairs>
JAX_FA_INLINE int64_t Units(int64_t numbers) {
  return (numbers + Unit<kPairs>::kNumbers - 1) / Unit<kPairs>::kNumbers;
}
