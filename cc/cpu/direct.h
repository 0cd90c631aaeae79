// Few query rows (decoding): the time is that of reading keys and values once, so they are read where they lie
// instead of being packed. A task takes all key heads of a range of keys.

constexpr int64_t kDirectRows = 16, kDirectKeys = 128;

template <bool kPairs>
inline bool IsDirect(const Call& c, int64_t rows) {
  const int64_t vector = kLanes * Unit<kPairs>::kNumbers;
  return rows <= kDirectRows && c.key.col == 1 && c.value.col == 1 && c.D % vector == 0 && c.Dv % kPanel == 0 &&
         c.key.row % Unit<kPairs>::kNumbers == 0 && c.Skv > 0;
}

// Lane j of the result: the sum of the lanes of x[j].
inline F SumEach(F* x) {
#if defined(JAX_FA_AVX512)
  F a[8], b[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)  // within 128 bits: x[2i] in the even lanes, x[2i + 1] in the odd ones
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d p = _mm512_castps_pd(a[2 * i]), q = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  }
  const F c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
  const F d = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
#else
  float sums[kLanes];
  for (int i = 0; i < kLanes; ++i) sums[i] = Sum(x[i]);
  return Load(sums);
#endif
}

// One vector of numbers of an array, or of units, from where they lie.
template <bool kPairs, DType kType>
JAX_FA_INLINE F LoadAs(const char* p, int64_t i) {
  if constexpr (kPairs || kType == DType::kF32) {
    return Load(reinterpret_cast<const float*>(p) + i);
  } else if constexpr (kType == DType::kBF16) {
    return LoadBF16(reinterpret_cast<const uint16_t*>(p) + i);
  } else {
    return LoadF16(reinterpret_cast<const uint16_t*>(p) + i);
  }
}

// kR rows of queries times kLanes / kR keys: lane i of the result is row i / (kLanes / kR), key i % (kLanes / kR).
template <bool kPairs, DType kType, int kR>
inline F DotKeys(const float* q, int64_t q_row, int64_t units, const char* const* keys) {
  constexpr int kKeys = kLanes / kR;
  F sums[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sums[i] = Set(0.0f);
  for (int64_t d = 0; d < units; d += kLanes) {
    F x[kR];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) x[r] = Load(q + r * q_row + d);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      const F key = LoadAs<kPairs, kType>(keys[i], d);
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) sums[r * kKeys + i] = Unit<kPairs>::MulAdd(key, x[r], sums[r * kKeys + i]);
    }
  }
  return SumEach(sums);
}

// Rows r .. r + kR of logits for kLanes keys.
template <bool kPairs, DType kType, int kR>
inline void DotRows(const float* q, int64_t q_row, int64_t units, const char* const* keys, float* logits,
                    int64_t s_row) {
  constexpr int kKeys = kLanes / kR;
  for (int j = 0; j < kLanes; j += kKeys) {
    float lanes[kLanes];
    Store(lanes, DotKeys<kPairs, kType, kR>(q, q_row, units, keys + j));
    for (int r = 0; r < kR; ++r) __builtin_memcpy(logits + r * s_row + j, lanes + r * kKeys, sizeof(float) * kKeys);
  }
}

template <bool kPairs, DType kType>
inline void DotAll(int64_t n, const float* q, int64_t q_row, int64_t units, const char* const* keys, float* logits,
                   int64_t s_row) {
  int64_t r = 0;
  for (; r + 4 <= n; r += 4) DotRows<kPairs, kType, 4>(q + r * q_row, q_row, units, keys, logits + r * s_row, s_row);
  for (; r + 2 <= n; r += 2) DotRows<kPairs, kType, 2>(q + r * q_row, q_row, units, keys, logits + r * s_row, s_row);
  for (; r < n; ++r) DotRows<kPairs, kType, 1>(q + r * q_row, q_row, units, keys, logits + r * s_row, s_row);
}

// The rows of all key heads (n of each, one head after the other in the scratch) over the keys j0 + [0, width) that lie
// within `all`. Keys, then values, are read in the order of the memory where heads lie side by side, which the
// processor's own prefetching follows. Returns false, having changed nothing, where a hidden value is not finite: the
// packed products keep such values apart.
template <bool kPairs, typename Scratch>
inline bool DirectBlock(const Call& c, const Scratch& s, int64_t b, int64_t n, int64_t j0, int64_t width, Range all) {
  const int64_t units = Units<kPairs>(c.D), dv = c.Dv, per = Unit<kPairs>::kNumbers;
  const int64_t first = all.lo > j0 ? all.lo - j0 : 0, last = all.hi < j0 + width ? all.hi - j0 : width;
  if (first >= last) return true;
  const int64_t c0 = first / kLanes * kLanes, c1 = RoundUp(last, kLanes);
  if (IsMasked(c)) {
    float bad = 0.0f;
    for (int64_t j = c0; j < last; ++j)
      for (int64_t k = 0; k < c.K; ++k)
        bad += ZeroOrNaN(ReadRow<kPairs>(c.value, b, k, j0 + j, dv, s.stage), dv);
    if (bad != 0.0f) return false;
  }
  for (int64_t j = c0; j < c1; j += kLanes) {
    for (int64_t k = 0; k < c.K; ++k) {
      const char* keys[kLanes];  // past the last key its row again, which is not looked at
      for (int64_t i = 0; i < kLanes; ++i) keys[i] = c.key.Bytes(b, k, j0 + (j + i < last ? j + i : last - 1));
      const float* q = s.q + k * n * s.q_row;
      float* logits = s.logits + k * n * s.s_row + j;
      if (kPairs || c.key.dtype == DType::kF32) {
        DotAll<kPairs, DType::kF32>(n, q, s.q_row, units, keys, logits, s.s_row);
      } else if (c.key.dtype == DType::kBF16) {
        DotAll<kPairs, DType::kBF16>(n, q, s.q_row, units, keys, logits, s.s_row);
      } else {
        DotAll<kPairs, DType::kF16>(n, q, s.q_row, units, keys, logits, s.s_row);
      }
    }
  }
  for (int64_t r = 0; r < c.K * n; ++r)
    SoftmaxRow<kPairs>(c, RowAt(c, b, r / n, r % n), j0, Within(s.lo[r], s.hi[r], j0, width), c0, c1, nullptr, s.tmp,
                       s.logits + r * s.s_row, s.m + r, s.l + r, s.acc + r * dv);
  constexpr int64_t kStep = 16;
  const bool in_place = !kPairs && c.value.dtype == DType::kF32;
  for (int64_t j = c0; j < last; j += kStep) {
    const int64_t given = j + kStep < last ? kStep : last - j;
    for (int64_t k = 0; k < c.K; ++k) {
      if constexpr (kPairs) {
        PackRows<kPairs>(given, dv, s.stage, s.own.values, [&](int64_t i, float* own) {
          return ReadRow<kPairs>(c.value, b, k, j0 + j + i, dv, own);
        });
      } else if (!in_place) {
        for (int64_t i = 0; i < given; ++i) {
          const uint16_t* row = c.value.At<uint16_t>(b, k, j0 + j + i);
          for (int64_t d = 0; d < dv; d += kLanes)
            Store(s.own.values + (d / kPanel * given + i) * kPanel + d % kPanel,
                  c.value.dtype == DType::kBF16 ? LoadBF16(row + d) : LoadF16(row + d));
        }
      }
      for (int64_t p = 0; p < Panels(dv); ++p) {
        const float* panel = s.own.values + p * Units<kPairs>(given) * kPanel;
        int64_t row = kPanel;
        if (in_place) {
          panel = reinterpret_cast<const float*>(c.value.Bytes(b, k, j0 + j, p * kPanel));
          row = c.value.row;
        }
        Gemm<kPairs, true>(n, Units<kPairs>(given), s.logits + k * n * s.s_row + j / per, s.s_row, 1, panel,
                           s.acc + k * n * dv + p * kPanel, dv, row);
      }
    }
  }
  return true;
}
