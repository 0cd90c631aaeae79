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

inline void StoreRow(const float* src, void* dst, DType dtype, int64_t stride, int64_t n) {
  if (dtype == DType::kF32) {
    float* d = static_cast<float*>(dst);
    for (int64_t i = 0; i < n; ++i) d[i * stride] = src[i];
  } else if (dtype == DType::kBF16) {
    uint16_t* d = static_cast<uint16_t*>(dst);
    for (int64_t i = 0; i < n; ++i) d[i * stride] = FromFloatBF16(src[i]);
  } else {
    uint16_t* d = static_cast<uint16_t*>(dst);
    for (int64_t i = 0; i < n; ++i) d[i * stride] = FromFloatF16(src[i]);
  }
}

inline int64_t Panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

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

inline int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline void Fill(float* p, int64_t from, int64_t to, float x) {
  const F v = Set(x);
  for (; from + kLanes <= to; from += kLanes) Store(p + from, v);
  for (; from < to; ++from) p[from] = x;
}

// Rows j0 .. j0 + n of key or value as transposed panels [panel][width][kPanel].
inline void PackTransposed(const View& x, int64_t width, int64_t b, int64_t k, int64_t j0, int64_t n,
                               float* stage, float* panels) {
  const bool direct = x.dtype == DType::kF32 && x.col == 1 && width % kLanes == 0;
  const int64_t ld = RoundUp(width, kLanes);
  for (int64_t r = 0; r < Panels(n) * kPanel; r += kLanes) {
    float* dst = panels + (r / kPanel) * width * kPanel + r % kPanel;
    if (direct && r + kLanes <= n) {
      const float* src = reinterpret_cast<const float*>(x.Bytes(b, k, j0 + r));
      for (int64_t d = 0; d < width; d += kLanes) TransposeBlock(src + d, x.row, dst + d * kPanel, kPanel);
      continue;
    }
    for (int64_t i = 0; i < kLanes; ++i) {
      if (r + i < n) {
        LoadRow(x.Bytes(b, k, j0 + r + i), x.dtype, x.col, width, stage + i * ld);
      } else {
        Fill(stage + i * ld, 0, ld, 0.0f);
      }
    }
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) TransposeBlock(stage + d, ld, dst + d * kPanel, kPanel);
    for (; d < width; ++d)
      for (int i = 0; i < kLanes; ++i) dst[d * kPanel + i] = stage[i * ld + d];
  }
}
