// From the arrays as they are stored (any dtype, any strides) to float panels, and back.

// `n` numbers with the given stride to contiguous floats.
inline void LoadRow(const void* src, DType dtype, int64_t stride, int64_t n, float* dst) {
  int64_t i = 0;
  if (dtype == DType::kF32) {
    const float* s = static_cast<const float*>(src);
    if (stride == 1) {
      for (; i + kLanes <= n; i += kLanes) Store(dst + i, Load(s + i));
    }
    for (; i < n; ++i) dst[i] = s[i * stride];
    return;
  }
  const uint16_t* s = static_cast<const uint16_t*>(src);
  if (dtype == DType::kBF16) {
    if (stride == 1) {
      for (; i + kLanes <= n; i += kLanes) Store(dst + i, LoadBF16(s + i));
    }
    for (; i < n; ++i) dst[i] = ToFloatBF16(s[i * stride]);
  } else {
    if (stride == 1) {
      for (; i + kLanes <= n; i += kLanes) Store(dst + i, LoadF16(s + i));
    }
    for (; i < n; ++i) dst[i] = ToFloatF16(s[i * stride]);
  }
}

// `n` floats, times `factor`, to where and as what they are stored.
inline void StoreRow(const float* src, float factor, void* dst, DType dtype, int64_t stride, int64_t n) {
  const F f = Set(factor);
  int64_t i = 0;
  if (dtype == DType::kF32) {
    float* d = static_cast<float*>(dst);
    if (stride == 1)
      for (; i + kLanes <= n; i += kLanes) Store(d + i, Load(src + i) * f);
    for (; i < n; ++i) d[i * stride] = src[i] * factor;
    return;
  }
  uint16_t* d = static_cast<uint16_t*>(dst);
  if (dtype == DType::kBF16) {
    if (stride == 1)
      for (; i + kLanes <= n; i += kLanes) StoreBF16(d + i, Load(src + i) * f);
    for (; i < n; ++i) d[i * stride] = FromFloatBF16(src[i] * factor);
  } else {
    if (stride == 1)
      for (; i + kLanes <= n; i += kLanes) StoreF16(d + i, Load(src + i) * f);
    for (; i < n; ++i) d[i * stride] = FromFloatF16(src[i] * factor);
  }
}

// The same for a 16-bit dtype, and to `rounding` what rounding took away, in halves of the dtype's epsilon.
// `src` has room for whole vectors.
template <DType kType>
inline void StoreRounded(const float* src, float factor, void* dst, int64_t stride, void* rounding,
                         int64_t rounding_stride, int64_t n) {
  constexpr bool kBF16 = kType == DType::kBF16;
  constexpr float kUnits = kBF16 ? 256.0f : 2048.0f;
  const auto store = [](uint16_t* p, F x) { kBF16 ? StoreBF16(p, x) : StoreF16(p, x); };
  uint16_t *d = static_cast<uint16_t*>(dst), *e = static_cast<uint16_t*>(rounding);
  for (int64_t i = 0; i < n; i += kLanes) {
    uint16_t kept[kLanes], lost[kLanes];
    const bool whole = i + kLanes <= n && stride == 1 && rounding_stride == 1;
    uint16_t *to = whole ? d + i : kept, *rest = whole ? e + i : lost;
    const F x = Rounded(Load(src + i) * Set(factor));
    store(to, x);
    store(rest, (x - (kBF16 ? LoadBF16(to) : LoadF16(to))) * Set(kUnits));
    if (whole) continue;
    for (int64_t j = 0; j < kLanes && i + j < n; ++j) {
      d[(i + j) * stride] = kept[j];
      e[(i + j) * rounding_stride] = lost[j];
    }
  }
}

inline int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t Panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

inline void Fill(float* p, int64_t from, int64_t to, float x) {
  const F v = Set(x);
  for (; from + kLanes <= to; from += kLanes) Store(p + from, v);
  for (; from < to; ++from) p[from] = x;
}

// 0 if all n numbers are finite, else NaN.
inline float ZeroOrNaN(const float* x, int64_t n) {
  F sum = Set(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = Fma(Load(x + i), Set(0.0f), sum);
  float total = Sum(sum);
  for (; i < n; ++i) total += x[i] * 0.0f;
  return total;
}

inline float ZeroOrNaN(const uint16_t* x, int64_t n) {  // bfloat16
  F sum = Set(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = Fma(LoadBF16(x + i), Set(0.0f), sum);
  float total = Sum(sum);
  for (; i < n; ++i) total += ToFloatBF16(x[i]) * 0.0f;
  return total;
}

// Floats that staging rows of a call takes: kLanes rows, or two rows filled up to whole panels.
inline int64_t StageSize(const Call& c) {
  const int64_t wide = c.D > c.Dv ? c.D : c.Dv, rows = kLanes * RoundUp(wide, kLanes), panels = 2 * Panels(wide) * kPanel;
  return rows > panels ? rows : panels;
}

// --- rows as units: floats, or the bfloat16 numbers as they are

template <bool kPairs>
struct Number { using Type = float; };
template <>
struct Number<true> { using Type = uint16_t; };

// A row of an array as contiguous numbers: where it lies if it can be read from there, else copied to `stage`.
template <bool kPairs>
inline const typename Number<kPairs>::Type* ReadRow(const View& x, int64_t b, int64_t h, int64_t i, int64_t n,
                                                    float* stage) {
  using T = typename Number<kPairs>::Type;
  const char* src = x.Bytes(b, h, i);
  if ((kPairs || x.dtype == DType::kF32) && (x.col == 1 || n == 1)) return reinterpret_cast<const T*>(src);
  if constexpr (kPairs) {
    uint16_t* dst = reinterpret_cast<uint16_t*>(stage);
    const uint16_t* s = reinterpret_cast<const uint16_t*>(src);
    for (int64_t d = 0; d < n; ++d) dst[d] = s[d * x.col];
    return dst;
  } else {
    LoadRow(src, x.dtype, x.col, n, stage);
    return stage;
  }
}

// A row of an array as units, the last one filled up with zero.
template <bool kPairs>
inline void CopyRow(const View& x, int64_t b, int64_t h, int64_t i, int64_t n, float* units) {
  const auto* row = ReadRow<kPairs>(x, b, h, i, n, units);
  if (reinterpret_cast<const void*>(row) != units) __builtin_memcpy(units, row, sizeof(*row) * static_cast<size_t>(n));
  if (kPairs && n % 2 != 0) reinterpret_cast<uint16_t*>(units)[n] = 0;
}

// One row of `n` numbers into row `r` of panels of `rows` rows each ([panel][rows][kPanel]); the last panel
// is filled up with zeros.
inline void PackRow(const float* src, int64_t n, int64_t r, int64_t rows, float* panels) {
  for (int64_t p = 0; p * kPanel < n; ++p) {
    float* dst = panels + (p * rows + r) * kPanel;
    const int64_t width = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
    int64_t c = 0;
    for (; c + kLanes <= width; c += kLanes) Store(dst + c, Load(src + p * kPanel + c));
    for (; c < width; ++c) dst[c] = src[p * kPanel + c];
    for (; c < kPanel; ++c) dst[c] = 0.0f;
  }
}

// kLanes rows of kLanes floats each, transposed in registers.
inline void TransposeBlock(const float* src, int64_t src_row, float* dst, int64_t dst_row) {
#if defined(JAX_FA_AVX512)
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
#elif defined(JAX_FA_AVX2)
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
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) dst[j * dst_row + i] = src[i * src_row + j];
#endif
}

// Rows j0 .. j0 + n of key or value as transposed panels [panel][units of width][kPanel]. `stage` holds kLanes rows.
template <bool kPairs>
inline void PackTransposed(const View& x, int64_t width, int64_t b, int64_t k, int64_t j0, int64_t n, float* stage,
                           float* panels) {
  const int64_t units = Units<kPairs>(width), ld = RoundUp(units, kLanes), per = Unit<kPairs>::kNumbers;
  const bool direct = (kPairs || x.dtype == DType::kF32) && x.col == 1 && width % (kLanes * per) == 0 && x.row % per == 0;
  for (int64_t r = 0; r < Panels(n) * kPanel; r += kLanes) {
    float* dst = panels + (r / kPanel) * units * kPanel + r % kPanel;
    if (direct && r + kLanes <= n) {
      const float* src = reinterpret_cast<const float*>(x.Bytes(b, k, j0 + r));
      for (int64_t d = 0; d < units; d += kLanes) TransposeBlock(src + d, x.row / per, dst + d * kPanel, kPanel);
      continue;
    }
    for (int64_t i = 0; i < kLanes; ++i) {
      if (r + i < n) {
        CopyRow<kPairs>(x, b, k, j0 + r + i, width, stage + i * ld);
      } else {
        Fill(stage + i * ld, 0, ld, 0.0f);
      }
    }
    int64_t d = 0;
    for (; d + kLanes <= units; d += kLanes) TransposeBlock(stage + d, ld, dst + d * kPanel, kPanel);
    for (; d < units; ++d)
      for (int i = 0; i < kLanes; ++i) dst[d * kPanel + i] = stage[i * ld + d];
  }
}

// Two rows of `n` bfloat16 numbers (the second may be null: zeros) as pairs: row `r` of panels of `rows` rows each.
template <bool kPairs>
inline void PackPairs(const uint16_t* first, const uint16_t* second, int64_t n, int64_t r, int64_t rows,
                      float* panels) {
  const auto put = [](float* dst, F a, F b) {
    F low, high;
    Unit<kPairs>::Interleave(a, b, &low, &high);
    Store(dst, low);
    Store(dst + kLanes, high);
  };
  const auto whole = [](const uint16_t* x) { return Load(reinterpret_cast<const float*>(x)); };
  float* dst = panels + r * kPanel;
  int64_t at = 0;
  if (second != nullptr) {
    for (; at + kPanel <= n; at += kPanel, dst += rows * kPanel)
#pragma GCC unroll 4
      for (int64_t c = 0; c < kPanel; c += 2 * kLanes) put(dst + c, whole(first + at + c), whole(second + at + c));
  }
  for (; at < n; at += kPanel, dst += rows * kPanel) {
    for (int64_t c = 0; c < kPanel; c += 2 * kLanes) {
      const int64_t rest = n - at - c;
      const auto part = [&](const uint16_t* x) {
        return x == nullptr || rest <= 0 ? Set(0.0f)
               : rest < 2 * kLanes       ? Unit<kPairs>::LoadFirst(x + at + c, static_cast<int>(rest))
                                         : whole(x + at + c);
      };
      put(dst + c, part(first), part(second));
    }
  }
}

// Rows given by `read(i, stage)` (a pointer to `width` numbers; may use the stage), i = 0 .. n - 1, as panels
// [panel][units of n][kPanel]. `stage` holds two rows, filled up to whole panels.
template <bool kPairs, typename Read>
inline void PackRows(int64_t n, int64_t width, float* stage, float* panels, const Read& read) {
  if constexpr (!kPairs) {
    for (int64_t i = 0; i < n; ++i) PackRow(read(i, stage), width, i, n, panels);
  } else {
    const int64_t full = Panels(width) * kPanel;
    uint16_t* stages[2] = {reinterpret_cast<uint16_t*>(stage), reinterpret_cast<uint16_t*>(stage) + full};
    for (int64_t i = 0; i < n; i += 2) {
      const uint16_t* first = read(i, reinterpret_cast<float*>(stages[0]));
      const uint16_t* second = i + 1 < n ? read(i + 1, reinterpret_cast<float*>(stages[1])) : nullptr;
      PackPairs<kPairs>(first, second, width, i / 2, Units<true>(n), panels);
    }
  }
}

// Values j0 .. j0 + n of one head as panels. `poison`: null where nothing is masked, else it gets NaN for each key
// whose values are not all finite; those values are 0, so that they reach only the rows to which they are visible.
// Returns whether there are any.
template <bool kPairs>
inline bool PackValues(const Call& c, int64_t b, int64_t k, int64_t j0, int64_t n, float* stage, float* poison,
                       float* panels) {
  bool any = false;
  PackRows<kPairs>(n, c.Dv, stage, panels, [&](int64_t j, float* own) {
    const auto* row = ReadRow<kPairs>(c.value, b, k, j0 + j, c.Dv, own);
    if (poison != nullptr) {
      poison[j] = ZeroOrNaN(row, c.Dv);
      if (poison[j] != 0.0f) {
        any = true;
        Fill(own, 0, Units<kPairs>(c.Dv), 0.0f);
        return reinterpret_cast<decltype(row)>(own);
      }
    }
    return row;
  });
  return any;
}
