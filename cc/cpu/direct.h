// Few query rows (decoding): the time is that of reading keys and values once, so they are read where they lie
// instead of being packed. While the products of one kind run, the memory that the next ones need is on its way.

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

// Rows j .. j + kLanes of keys (units, `row` apart) times one row of queries.
template <bool kPairs>
inline F DotKeys(const float* q, int64_t units, const float* keys, int64_t row) {
  F sums[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sums[i] = Set(0.0f);
  for (int64_t d = 0; d < units; d += kLanes) {
    const F x = Load(q + d);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] = Unit<kPairs>::MulAdd(Load(keys + i * row + d), x, sums[i]);
  }
  return SumEach(sums);
}

// Rows j .. j + n of an array will be read soon.
inline void Expect(const View& x, int64_t b, int64_t k, int64_t j, int64_t n, int64_t width) {
  const int64_t bytes = width * ItemSize(x.dtype);
  for (int64_t i = j; i < j + n; ++i)
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(x.Bytes(b, k, i) + at, 0, 2);
}

// Rows [r0, r0 + n) of a task over the keys j0 + [0, width) that lie within `all`. Returns false, having changed
// nothing, where a hidden value is not finite: the packed products keep such values apart.
template <bool kPairs, typename Scratch>
inline bool DirectBlock(const Call& c, const Scratch& s, int64_t b, int64_t k, int64_t r0, int64_t n, int64_t j0,
                        int64_t width, Range all) {
  const int64_t units = Units<kPairs>(c.D), dv = c.Dv, per = Unit<kPairs>::kNumbers;
  const int64_t first = all.lo > j0 ? all.lo - j0 : 0, last = all.hi < j0 + width ? all.hi - j0 : width;
  if (first >= last) return true;
  const bool in_place = kPairs || c.key.dtype == DType::kF32;
  const int64_t c0 = first / kLanes * kLanes, c1 = RoundUp(last, kLanes);
  if (IsMasked(c)) {
    float bad = 0.0f;
    for (int64_t j = c0; j < last; ++j)
      bad += ZeroOrNaN(ReadRow<kPairs>(c.value, b, k, j0 + j, dv, s.stage), dv);
    if (bad != 0.0f) return false;
  }
  for (int64_t j = c0; j < c1; j += kLanes) {
    const int64_t given = j + kLanes < last ? kLanes : last - j;  // from c0 on: those before `first` are hidden
    Expect(c.value, b, k, j0 + j, given, dv);
    const float* keys = s.own.keys;
    int64_t row = units;
    if (in_place && given == kLanes) {
      keys = reinterpret_cast<const float*>(c.key.Bytes(b, k, j0 + j));
      row = c.key.row / per;
    } else {
      for (int64_t i = 0; i < kLanes; ++i) {
        if (i < given) {
          CopyRow<kPairs>(c.key, b, k, j0 + j + i, c.D, s.own.keys + i * units);
        } else {
          Fill(s.own.keys + i * units, 0, units, 0.0f);
        }
      }
    }
    for (int64_t r = 0; r < n; ++r) Store(s.logits + r * s.s_row + j, DotKeys<kPairs>(s.q + r * s.q_row, units, keys, row));
  }
  for (int64_t r = 0; r < n; ++r)
    SoftmaxRow<kPairs>(c, RowAt(c, b, k, r0 + r), j0, Within(s.lo[r], s.hi[r], j0, width), c0, c1, nullptr, s.tmp,
                       s.logits + r * s.s_row, s.m + r, s.l + r, s.acc + r * dv);
  constexpr int64_t kStep = 32;
  for (int64_t j = c0; j < last; j += kStep) {
    const int64_t given = j + kStep < last ? kStep : last - j;
    const int64_t next = j0 + kDirectKeys + j;
    if (next < all.hi) Expect(c.key, b, k, next, next + given < all.hi ? given : all.hi - next, c.D);
    const bool values_in_place = !kPairs && c.value.dtype == DType::kF32;
    if (!values_in_place) {
      PackRows<kPairs>(given, dv, s.stage, s.own.values, [&](int64_t i, float* own) {
        return ReadRow<kPairs>(c.value, b, k, j0 + j + i, dv, own);
      });
    }
    for (int64_t p = 0; p < Panels(dv); ++p) {
      const float* panel = s.own.values + p * Units<kPairs>(given) * kPanel;
      int64_t row = kPanel;
      if (values_in_place) {
        panel = reinterpret_cast<const float*>(c.value.Bytes(b, k, j0 + j, p * kPanel));
        row = c.value.row;
      }
      Gemm<kPairs, true>(n, Units<kPairs>(given), s.logits + j / per, s.s_row, 1, panel, s.acc + p * kPanel, dv, row);
    }
  }
  return true;
}
