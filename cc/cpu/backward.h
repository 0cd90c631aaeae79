// Backward from the saved softmax max and sum: dq, dk, dv, and sums for bias, ALiBi slopes, scale and soft cap.
//
//   p = exp(s - m) / l,  dp = keep / keep_prob (dout v^T),  ds = p (dp - delta),  delta = dout.out - dlogsumexp
//   dq = scale ds k,  dk = scale ds^T q,  dv = (keep / keep_prob p)^T dout,  dbias = ds,  dscale = ds q.k
//
// Key blocks are the outer loop: dk and dv of a block stay in L2 while all query rows pass; dq lies in a float
// buffer. A task is a range of keys of all the key heads that share one bias gradient (without bias: of one
// head), so every sum has one owner and a fixed order, whatever the number of threads.

// delta = dout.out - dlogsumexp of rows [r, r + n), with what rounding took from out where that is known. Summed in the
// order of the products dout.v, so that for a row with one visible key, where out is v, the two cancel exactly.
template <int kMost, typename Scratch>
inline void Deltas(const Call& c, const Scratch& s, int64_t b, int64_t k, int64_t r, int64_t n) {
  const int64_t width = RoundUp(c.Dv, kLanes);
  const float *dout[kMost], *out[kMost];
  float sum[kMost] = {};
  for (int64_t i = 0; i < kMost; ++i) {
    const Row row = RowAt(c, b, k, i < n ? r + i : r);
    dout[i] = ReadRow<false>(c.dout, b, row.n, row.i, c.Dv, s.stage + 2 * i * width);
    float* exact = s.stage + (2 * i + 1) * width;
    out[i] = ReadRow<false>(c.out, b, row.n, row.i, c.Dv, exact);
    if (c.rounding) {  // then out is of 16 bits, and its row a copy
      const F unit = Set(c.out.dtype == DType::kBF16 ? 1.0f / 256.0f : 1.0f / 2048.0f);
      const float* rest = ReadRow<false>(c.rounding, b, row.n, row.i, c.Dv, s.dv);  // not used yet
      Combine(c.Dv, exact, rest, [&](F x, F lost) { return Fma(lost, unit, x); });
    }
  }
  for (int64_t d = 0; d < c.Dv; ++d)
#pragma GCC unroll 4
    for (int i = 0; i < kMost; ++i) sum[i] += dout[i][d] * out[i][d];
  for (int64_t i = 0; i < n; ++i) {
    const Row row = RowAt(c, b, k, r + i);
    s.delta[r + i] = c.dlogsumexp ? sum[i] - *c.dlogsumexp.At<float>(b, row.n, row.i) : sum[i];
  }
}

// Per row: max, 1 / sum (0 for a fully masked row; NaN where q or dout is not finite, which so propagates to the
// row's visible keys only), delta, and the visible range; that of each block of rows too.
template <bool kPairs>
inline void PrepareRows(const Call& c, const BackwardPlan& plan, const BackwardScratch<kPairs>& s, int64_t b,
                        int64_t k) {
  const bool masked = IsMasked(c);
  constexpr int64_t kTogether = kLanes >= 8 ? 4 : 2;  // two rows of each lie in the stage
  for (int64_t r = 0; r < plan.rows; r += kTogether)
    Deltas<kTogether>(c, s, b, k, r, r + kTogether < plan.rows ? kTogether : plan.rows - r);
  for (int64_t r = 0; r < plan.rows; ++r) {
    const Row row = RowAt(c, b, k, r);
    const Range v = Visible(c, row);
    s.lo[r] = static_cast<int32_t>(v.Empty() ? 0 : v.lo);
    s.hi[r] = static_cast<int32_t>(v.Empty() ? 0 : v.hi);
    int32_t &from = s.block_lo[r / kBackwardRows], &to = s.block_hi[r / kBackwardRows];
    if (r % kBackwardRows == 0) from = INT32_MAX, to = 0;
    if (!v.Empty()) {
      from = s.lo[r] < from ? s.lo[r] : from;
      to = s.hi[r] > to ? s.hi[r] : to;
    }
    s.m[r] = *c.m.At<float>(b, row.n, row.i);
    const float l = *c.l.At<float>(b, row.n, row.i);
    s.inverse[r] = l == 0.0f ? 0.0f : 1.0f / l;
    if (masked) {
      s.inverse[r] += ZeroOrNaN(ReadRow<false>(c.dout, b, row.n, row.i, c.Dv, s.stage), c.Dv);
      s.inverse[r] += ZeroOrNaN(ReadRow<false>(c.query, b, row.n, row.i, c.D, s.stage), c.D);
      if (v.Empty()) s.inverse[r] = 0.0f;
    }
  }
}

// Rows [r0, r0 + n) of the query heads of key head k, or keys, as panels. In masked calls those that are not all
// finite are 0: what they would bring is in `inverse`, or masked.
template <bool kPairs, typename At>
inline void PackClean(const View& x, bool masked, int64_t n, int64_t width, float* stage, float* panels,
                      const At& at) {
  PackRows<kPairs>(n, width, stage, panels, [&](int64_t i, float* own) {
    const Row row = at(i);
    const auto* numbers = ReadRow<kPairs>(x, row.b, row.n, row.i, width, own);
    if (!masked || ZeroOrNaN(numbers, width) == 0.0f) return numbers;
    Fill(own, 0, Units<kPairs>(width), 0.0f);
    return reinterpret_cast<decltype(numbers)>(own);
  });
}

// The part of dbias that a row of ds adds.
inline void AddToBias(const Call& c, bool alone, const Row& row, int64_t j0, int64_t from, int64_t to, const float* ds) {
  float* db = nullptr;
  if (c.bias_offset) {
    const int64_t first = BiasIndex(c, row, j0 + from);
    const Range given = BiasElements(c, first, to - from);
    if (given.Empty()) return;
    db = c.dbias.At<float>(row.b, row.n, 0, first + given.lo);
    to = from + given.hi, from += given.lo;
    if (c.bias_apart && (c.mask || c.segment_row)) {  // the element of a masked pair may be another head's
      for (int64_t j = from; j < to; ++j)
        if (ds[j] != 0.0f) db[(j - from) * c.dbias.col] += ds[j];
      return;
    }
  } else {
    db = c.dbias.At<float>(row.b, row.n, row.i, j0 + from);
  }
  if (alone) {
    __builtin_memcpy(db, ds + from, sizeof(float) * static_cast<size_t>(to - from));
  } else if (c.dbias.col == 0) {
    float sum = 0.0f;
    for (int64_t j = from; j < to; ++j) sum += ds[j];
    *db += sum;
  } else if (c.dbias.col == 1) {
    Combine(to - from, db, ds + from, [](F x, F more) { return x + more; });
  } else {
    for (int64_t j = from; j < to; ++j) db[(j - from) * c.dbias.col] += ds[j];
  }
}

// Minus the sum of ds times the distance, which is a row's part of the gradient of the slope.
inline double SlopeGradient(const Call& c, const Row& row, int64_t j0, int64_t from, int64_t to, const float* ds) {
  double sum = 0.0;
  const int64_t base = j0 - PositionOf(c, row);
  for (int64_t j = from; j < to; ++j) {
    const float away = __builtin_fabsf(static_cast<float>(base + j));
    sum -= ds[j] * (c.alibi == Alibi::kSqrt ? __builtin_sqrtf(away) : away);
  }
  return sum;
}

// What each query head of a key head adds up, over its rows and a range of keys; null where it is not asked for.
struct HeadSums {
  double *slopes = nullptr, *scale = nullptr, *soft_cap = nullptr;
  int64_t slope_rows = 1;  // Sq where each row has a slope of its own
};

// A row's part of the gradient of the scale: the sum of ds times the product q.k, which may be anything where masked.
inline double ScaleGradient(const float* products, int64_t from, int64_t to, const float* ds) {
  F sum = Set(0.0f);
  for (int64_t j = from; j < to; j += kLanes) {
    const F x = LoadFirst(ds + j, Rest(to - j));
    sum = sum + Select(IsZero(x), x, x * LoadFirst(products + j, Rest(to - j)));
  }
  return Sum(sum);
}

// Turns a row of products q.k and dout.v with keys j0 + [c0, c1), of which v are visible, into weights p and ds,
// in place, 0 where masked.
template <bool kPairs>
inline void RowGradients(const Call& c, const BackwardScratch<kPairs>& s, const Row& row, int64_t r, int64_t j0, Range v,
                         int64_t c0, int64_t c1, float* p, float* ds, const HeadSums& sums) {
  if (v.Empty()) v = {c0, c0};
  float* slope = SoftCapOf(c, row) != 0.0f ? s.slope : nullptr;
  float* by_cap = slope != nullptr && sums.soft_cap != nullptr ? s.by_cap : nullptr;
  F scale = Set(ScaleOf(c, row));
  if (sums.scale != nullptr)
    __builtin_memcpy(s.products + c0, p + c0, sizeof(float) * static_cast<size_t>(c1 - c0));
  if (!IsPlain(c, row)) {
    if (!v.Empty()) ToLogits(c, row, j0, v.lo, v.hi, nullptr, p, slope, by_cap, s.tmp);
    scale = Set(1.0f);
  }
  Fill(p, c0, v.lo, -__builtin_inff());
  Fill(p, v.hi, c1, -__builtin_inff());
  const F m = Set(s.m[r]), inverse = Set(s.inverse[r]), delta = Set(s.delta[r]);
  if (!c.seed && !c.drop_bits) {
    for (int64_t j = c0; j < c1; j += kLanes) {
      const F w = Weight(Load(p + j), scale, m) * inverse;
      Store(p + j, w);
      Store(ds + j, w * (Load(ds + j) - delta));
    }
  } else {
    float* keep = s.tmp;  // 1 / keep_prob or 0
    Fill(keep, 0, c1, 0.0f);
    Fill(keep, v.lo, v.hi, 1.0f / KeepProbOf(c, row));
    Drop(c, row, j0, v.lo, v.hi, keep);
    const F none = Set(0.0f);
    for (int64_t j = c0; j < c1; j += kLanes) {
      const F w = Weight(Load(p + j), scale, m) * inverse, kept = Load(keep + j);
      const Mask dropped = IsZero(kept);  // a product 0 * NaN would not be 0
      Store(p + j, Select(dropped, none, w * kept));
      Store(ds + j, w * (Select(dropped, none, Load(ds + j) * kept) - delta));
    }
  }
  if (by_cap != nullptr && !v.Empty()) {
    Combine(v.hi - v.lo, by_cap + v.lo, ds + v.lo, [](F by, F x) { return x * by; });
    Hide(c, row, j0, v.lo, v.hi, 0.0f, by_cap);
    double sum = 0.0;
    for (int64_t j = v.lo; j < v.hi; ++j) sum += by_cap[j];
    sums.soft_cap[row.n % c.G()] += sum;
  }
  if (slope != nullptr) Combine(v.hi - v.lo, ds + v.lo, slope + v.lo, [](F x, F by) { return x * by; });
  float* const both[] = {p, ds};
  for (float* x : both) {  // masked products may be NaN, and so may `inverse`
    Fill(x, c0, v.lo, 0.0f);
    Fill(x, v.hi, c1, 0.0f);
    if (!v.Empty()) Hide(c, row, j0, v.lo, v.hi, 0.0f, x);
  }
  if (v.Empty()) return;
  if (c.dbias) AddToBias(c, s.writes_all_bias, row, j0, v.lo, v.hi, ds);
  if (sums.scale != nullptr) sums.scale[row.n % c.G()] += ScaleGradient(s.products, v.lo, v.hi, ds);
  if (sums.slopes != nullptr)
    sums.slopes[row.n % c.G() * sums.slope_rows + row.i % sums.slope_rows] += SlopeGradient(c, row, j0, v.lo, v.hi, ds);
}

// Keys that have a component in common move no softmax, for the ds of a row add up to dlogsumexp, mostly 0. Rounded to
// pairs they do not, and neither does their delta fit quite where the forward rounded its weights: what is missing from
// their sum, times what is common, may be larger than the gradient. It is given to one key of the row, as a float: to that
// of the largest ds, so that nothing enters which does not contribute anyway. A soft cap has no such sum.
struct Balance {
  float* total;               // of each row: the sum of its ds as they were rounded
  int32_t *largest, *key;     // the bits of the largest magnitude of them, and where that is
};

// It lies behind the dq of all rows.
inline Balance BalanceOf(const BackwardPlan& plan, float* dq) {
  float* total = dq + plan.rows * plan.dq_row;
  int32_t* largest = reinterpret_cast<int32_t*>(total + plan.rows);
  return {total, largest, largest + plan.rows};
}

// Adds a row of ds, as pairs, of keys j0 + [0, keys), their sum and their largest magnitudes.
template <bool kPairs>
inline void AddToBalance(const Balance& balance, int64_t r, int64_t j0, int64_t keys, const float* ds, F sum, F most) {
  balance.total[r] += Sum(sum);
  if (!Unit<kPairs>::AnyAbove(most, balance.largest[r])) return;
  const int32_t largest = Unit<kPairs>::Largest(most);
  balance.largest[r] = largest;
  for (int64_t j = 0; j < keys; j += 2 * kLanes) {
    const uint32_t there = Unit<kPairs>::Equals(Load(ds + j / 2), largest);
    if (there == 0) continue;
    balance.key[r] = static_cast<int32_t>(j0 + j) + __builtin_ctz(there);
    return;
  }
}

// Adds to a finished row of dq what is missing. `stage` holds a row.
inline void AddMissing(const Call& c, const Row& row, int64_t k, const Balance& balance, int64_t r, float* stage,
                       float* dq) {
  if (balance.largest[r] == 0 || SoftCapOf(c, row) != 0.0f) return;
  const float target = c.dlogsumexp ? *c.dlogsumexp.At<float>(row.b, row.n, row.i) : 0.0f;
  const F missing = Set(target - balance.total[r]);
  const float* key = ReadRow<false>(c.key, row.b, k, balance.key[r], c.D, stage);
  Combine(c.D, dq, key, [&](F x, F y) { return Fma(missing, y, x); });
}

// Floats of p and ds, columns [0, keys), to pairs: of rows in place (in the first of each two rows), and ds of
// neighbouring columns to ds_rows, which are added to the balance of rows g0 + [0, rows). `scales`: null, or what each row
// of ds is multiplied by for the products with q.
template <bool kPairs>
inline void JoinRows(const BackwardScratch<kPairs>& s, const Balance& balance, int64_t g0, int64_t rows, int64_t j0,
                     int64_t keys, const float* scales) {
  using U = Unit<kPairs>;
  const auto put = [](F a, F b, float* to) {
    F low, high;
    U::Interleave(a, b, &low, &high);
    Store(to, low);
    Store(to + kLanes, high);
  };
  for (int64_t r = 0; r < rows; r += 2) {
    const bool two = r + 1 < rows;
    float *first = s.p + r * s.s_row, *second = first + s.s_row;
    for (int64_t j = 0; j < keys; j += 2 * kLanes)
      put(U::Join(Load(first + j), Load(first + j + kLanes)),
          two ? U::Join(Load(second + j), Load(second + j + kLanes)) : Set(0.0f), first + j);
    first = s.ds + r * s.s_row, second = first + s.s_row;
    float *ds = s.ds_rows + r * s.half_row, *second_ds = ds + s.half_row;
    F sum = Set(0.0f), second_sum = sum, most = sum, second_most = sum;
    for (int64_t j = 0; j < keys; j += 2 * kLanes) {
      F a = U::Join(Load(first + j), Load(first + j + kLanes)), b = Set(0.0f);
      Store(ds + j / 2, a);
      sum = U::Add(sum, a);
      most = U::Larger(most, a);
      if (two) {
        b = U::Join(Load(second + j), Load(second + j + kLanes));
        Store(second_ds + j / 2, b);
        second_sum = U::Add(second_sum, b);
        second_most = U::Larger(second_most, b);
      }
      if (scales != nullptr) {
        const F f = Set(scales[r]), g = Set(two ? scales[r + 1] : 0.0f);
        a = U::Join(Load(first + j) * f, Load(first + j + kLanes) * f);
        if (two) b = U::Join(Load(second + j) * g, Load(second + j + kLanes) * g);
      }
      put(a, b, first + j);
    }
    AddToBalance<kPairs>(balance, g0 + r, j0, keys, ds, sum, most);
    if (two) AddToBalance<kPairs>(balance, g0 + r + 1, j0, keys, second_ds, second_sum, second_most);
  }
}

// dk and dv of a block: tiles of kRows keys, over the rows to which any of them is visible, a chunk of rows at a time.
template <bool kPairs>
inline void KeyGradients(const Call& c, const BackwardPlan& plan, const BackwardScratch<kPairs>& s, int64_t rows,
                         int64_t width, const RowTile* tiles, int64_t count) {
  constexpr int64_t kMostParts = 512 / kRows + 1;
  const int64_t per = Unit<kPairs>::kNumbers, units = Units<kPairs>(rows), parts = (width + kRows - 1) / kRows;
  Range seen_by[kMostParts];  // rows, in units
  for (int64_t t = 0; t < parts; ++t) {
    const int64_t a = width * t / parts, e = width * (t + 1) / parts;
    seen_by[t] = {units, 0};
    for (int64_t u = 0; u < count; ++u) {
      if (tiles[u].from >= e || tiles[u].to <= a) continue;
      const int64_t first = tiles[u].r / per;
      seen_by[t].lo = first < seen_by[t].lo ? first : seen_by[t].lo;
      seen_by[t].hi = Units<kPairs>(tiles[u].r + tiles[u].n);
    }
  }
  struct Product {
    const float *weights, *panels;
    float* sum;
    int64_t sum_row, panel_count;
  };
  const Product products[] = {{s.p, s.dout_panels, s.dv, s.dv_row, Panels(c.Dv)},
                              {s.ds, s.q_panels, s.dk, plan.dq_row, Panels(c.D)}};
  const int64_t weights_row = per * s.s_row;  // pairs of rows lie in every second one
  for (const Product& x : products) {
    for (int64_t d = 0; d < x.panel_count; ++d) {
      for (int64_t u0 = 0; u0 < units; u0 += kChunk) {
        for (int64_t t = 0; t < parts; ++t) {
          const int64_t a = width * t / parts, e = width * (t + 1) / parts;
          const int64_t from = seen_by[t].lo > u0 ? seen_by[t].lo : u0;
          const int64_t to = seen_by[t].hi < u0 + kChunk ? seen_by[t].hi : u0 + kChunk;
          if (from >= to) continue;
          Gemm<kPairs, true>(e - a, to - from, x.weights + from * weights_row + a, 1, weights_row,
                             x.panels + (d * units + from) * kPanel, x.sum + a * x.sum_row + d * kPanel, x.sum_row);
        }
      }
    }
  }
}

// Rows [g0, g0 + rows) over one block of keys, already packed.
template <bool kPairs>
inline void BackwardBlock(const Call& c, const BackwardPlan& plan, const BackwardScratch<kPairs>& s, int64_t b, int64_t k,
                          int64_t g0, int64_t rows, int64_t j0, int64_t width, float* dq, bool one_scale,
                          const HeadSums& sums) {
  const int64_t per = Unit<kPairs>::kNumbers, keys = RoundUp(width, per * kLanes);
  const Balance balance = BalanceOf(plan, dq);
  RowTile tiles[kBackwardRows];
  const int64_t count = MakeTiles(s.lo + g0, s.hi + g0, rows, j0, width, tiles);
  if (count == 0) return;
  const auto row_at = [&](int64_t i) { return RowAt(c, b, k, g0 + i); };
  Row from = row_at(0);
  for (int64_t r = 0; r < rows; ++r, from = After(c, from)) {
    CopyRow<kPairs>(c.query, b, from.n, from.i, c.D, s.q + r * s.q_row);
    CopyRow<kPairs>(c.dout, b, from.n, from.i, c.Dv, s.dout + r * s.dout_row);
  }
  PackClean<kPairs>(c.query, IsMasked(c), rows, c.D, s.stage, s.q_panels, row_at);
  PackClean<kPairs>(c.dout, IsMasked(c), rows, c.Dv, s.stage, s.dout_panels, row_at);

  const int64_t depth = Units<kPairs>(c.D), dv_depth = Units<kPairs>(c.Dv);
  const bool direct = IsDirect(c);
  if (direct) {
    int64_t first = width, last = 0;
    for (int64_t t = 0; t < count; ++t) {
      first = tiles[t].from < first ? tiles[t].from : first;
      last = tiles[t].to > last ? tiles[t].to : last;
    }
    for (int64_t j = first / kLanes * kLanes; j < last; j += kLanes)
      DirectDots<kPairs>(c, b, k, rows, s.q, s.q_row, j0 + j, j0 + last, s.stage, s.p + j, s.s_row);
  }
  for (int64_t panel = 0; panel < Panels(width); ++panel) {
    for (int64_t t = 0; t < count; ++t) {
      const RowTile& tile = tiles[t];
      if (tile.to <= panel * kPanel || tile.from >= (panel + 1) * kPanel) continue;
      const int64_t at = tile.r * s.s_row + panel * kPanel;
      if (!direct)
        Gemm<kPairs, false>(tile.n, depth, s.q + tile.r * s.q_row, s.q_row, 1, s.keys_t + panel * depth * kPanel,
                            s.p + at, s.s_row);
      Gemm<kPairs, false>(tile.n, dv_depth, s.dout + tile.r * s.dout_row, s.dout_row, 1,
                          s.values_t + panel * dv_depth * kPanel, s.ds + at, s.s_row);
    }
  }

  float scales[kBackwardRows];
  if (!one_scale)
    for (int64_t r = 0; r < rows; ++r) scales[r] = ScaleOf(c, row_at(r));
  int64_t done = 0;
  const auto clear = [&](int64_t to) {  // rows to which none of these keys is visible
    for (; done < to; ++done) {
      Fill(s.p + done * s.s_row, 0, keys, 0.0f);
      Fill(s.ds + done * s.s_row, 0, keys, 0.0f);
    }
  };
  for (int64_t t = 0; t < count; ++t) {
    const RowTile& tile = tiles[t];
    clear(tile.r);
    const int64_t c0 = tile.from / kLanes * kLanes, c1 = RoundUp(tile.to, kLanes);
    Row row = row_at(tile.r);
    for (int64_t r = tile.r; r < tile.r + tile.n; ++r, row = After(c, row)) {
      float *p = s.p + r * s.s_row, *ds = s.ds + r * s.s_row;
      RowGradients<kPairs>(c, s, row, g0 + r, j0, Within(s.lo[g0 + r], s.hi[g0 + r], j0, width), c0, c1, p, ds,
                           sums);
      float* const both[] = {p, ds};
      for (float* x : both) {
        Fill(x, 0, c0, 0.0f);
        Fill(x, c1, keys, 0.0f);
      }
    }
    done = tile.r + tile.n;
  }
  clear(rows);
  if constexpr (kPairs) JoinRows<kPairs>(s, balance, g0, rows, j0, keys, one_scale ? nullptr : scales);

  const float* ds_rows = kPairs ? s.ds_rows : s.ds;
  const int64_t ds_row = kPairs ? s.half_row : s.s_row, key_units = Units<kPairs>(width);
  for (int64_t d = 0; d < Panels(c.D); ++d) {
    for (int64_t u0 = 0; u0 < key_units; u0 += kChunk) {
      for (int64_t t = 0; t < count; ++t) {
        const RowTile& tile = tiles[t];
        const int64_t from = tile.from / per > u0 ? tile.from / per : u0, end = Units<kPairs>(tile.to);
        const int64_t to = end < u0 + kChunk ? end : u0 + kChunk;
        if (from >= to) continue;
        Gemm<kPairs, true>(tile.n, to - from, ds_rows + tile.r * ds_row + from, ds_row, 1,
                           s.keys + (d * key_units + from) * kPanel, dq + (g0 + tile.r) * plan.dq_row + d * kPanel,
                           plan.dq_row);
      }
    }
  }
  if (!kPairs && !one_scale) {
    for (int64_t r = 0; r < rows; ++r) {
      const F f = Set(scales[r]);
      Combine(keys, s.ds + r * s.s_row, s.ds + r * s.s_row, [&](F x, F) { return x * f; });
    }
  }
  KeyGradients<kPairs>(c, plan, s, rows, width, tiles, count);
}

// Whether the query heads of a key head have the same scale, which its dk then takes at the end.
inline bool HaveOneScale(const Call& c, int64_t b, int64_t k) {
  for (int64_t n = k * c.G() + 1; n < (k + 1) * c.G(); ++n)
    if (ScaleOf(c, b, n) != ScaleOf(c, b, k * c.G())) return false;
  return true;
}


template <bool kPairs>
inline void BackwardHead(const Call& c, const BackwardPlan& plan, const BackwardScratch<kPairs>& s, int64_t b, int64_t k,
                         int64_t key0, int64_t key1, float* dq, const HeadSums& sums) {
  const bool one_scale = HaveOneScale(c, b, k);
  const float key_scale = one_scale ? ScaleOf(c, b, k * c.G()) : 1.0f;
  PrepareRows<kPairs>(c, plan, s, b, k);
  Fill(dq, 0, plan.rows * plan.dq_row + BalanceSize<kPairs>(plan), 0.0f);
  for (int64_t j0 = key0; j0 < key1; j0 += plan.key_block) {
    const int64_t width = j0 + plan.key_block < key1 ? plan.key_block : key1 - j0;
    Fill(s.dk, 0, width * plan.dq_row, 0.0f);
    Fill(s.dv, 0, width * s.dv_row, 0.0f);
    bool packed = false;
    for (int64_t block = 0; block < plan.row_blocks; ++block) {
      if (s.block_lo[block] >= j0 + width || s.block_hi[block] <= j0) continue;
      if (!packed) {
        if (!IsDirect(c)) PackTransposed<kPairs>(c.key, c.D, b, k, j0, width, s.stage, s.keys_t);
        PackTransposed<kPairs>(c.value, c.Dv, b, k, j0, width, s.stage, s.values_t);
        PackClean<kPairs>(c.key, IsMasked(c), width, c.D, s.stage, s.keys,
                          [&](int64_t j) { return Row{b, k, j0 + j}; });
        packed = true;
      }
      const int64_t g0 = block * kBackwardRows, rows = g0 + kBackwardRows < plan.rows ? kBackwardRows : plan.rows - g0;
      BackwardBlock<kPairs>(c, plan, s, b, k, g0, rows, j0, width, dq, one_scale, sums);
    }
    for (int64_t j = 0; j < width; ++j) {
      StoreRow(s.dk + j * plan.dq_row, key_scale, c.dkey.Bytes(b, k, j0 + j), c.dkey.dtype, c.dkey.col, c.D);
      StoreRow(s.dv + j * s.dv_row, 1.0f, c.dvalue.Bytes(b, k, j0 + j), c.dvalue.dtype, c.dvalue.col, c.Dv);
    }
  }
}

// The rows of dq of a key head, which then are complete.
template <bool kPairs>
inline void FinishQueries(const Call& c, const BackwardPlan& plan, int64_t b, int64_t k, float* stage, float* dq) {
  Row row{b, k * c.G(), 0};  // not RowAt, which divides by Sq: it may be 0
  for (int64_t r = 0; r < plan.rows; ++r, row = After(c, row), dq += plan.dq_row) {
    if constexpr (kPairs) AddMissing(c, row, k, BalanceOf(plan, dq - r * plan.dq_row), r, stage, dq);
    StoreRow(dq, ScaleOf(c, row), c.dquery.Bytes(b, row.n, row.i), c.dquery.dtype, c.dquery.col, c.D);
  }
}

// Adds the dq of another range of keys.
template <bool kPairs>
inline void AddPart(const BackwardPlan& plan, float* part, float* total) {
  for (int64_t x = 0; x < plan.rows * plan.dq_row; x += kLanes) Store(total + x, Load(total + x) + Load(part + x));
  if constexpr (kPairs) {
    const Balance from = BalanceOf(plan, part), to = BalanceOf(plan, total);
    for (int64_t r = 0; r < plan.rows; ++r) {
      to.total[r] += from.total[r];
      if (from.largest[r] <= to.largest[r]) continue;
      to.largest[r] = from.largest[r];
      to.key[r] = from.key[r];
    }
  }
}

// Adds part(b, n, i) to x for all batch entries, heads and its rows. Neighbours that go to the same element are added
// up in double.
template <typename Part>
inline void AddAll(const Call& c, const View& x, int64_t rows, const Part& part) {
  const auto each = [&](const auto& fn) {
    for (int64_t n = 0; n < c.N; ++n)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t b = 0; b < c.B; ++b) fn(b, n, i);
  };
  each([&](int64_t b, int64_t n, int64_t i) { *x.At<float>(b, n, i) = 0.0f; });
  float none = 0.0f, *at = &none;
  double sum = 0.0;
  each([&](int64_t b, int64_t n, int64_t i) {
    float* to = x.At<float>(b, n, i);
    if (to != at) {
      *at += static_cast<float>(sum);
      at = to, sum = 0.0;
    }
    sum += part(b, n, i);
  });
  *at += static_cast<float>(sum);
}

// The sums of all key heads and ranges of keys.
class AllSums {
 public:
  AllSums(const Call& c, const BackwardPlan& plan)
      : c_(c), splits_(plan.splits), rows_(c.dslopes.row != 0 ? c.Sq : 1),
        slopes_(c.dslopes ? c.G() * rows_ : 0), scale_(c.dscale ? c.G() : 0), soft_cap_(c.dsoft_cap ? c.G() : 0),
        memory_(2 * c.B * c.K * splits_ * Size()) {
    for (int64_t i = 0; i < c.B * c.K * splits_ * Size(); ++i) memory_.doubles()[i] = 0.0;
  }

  HeadSums Of(int64_t head, int64_t split) const {
    double* p = memory_.doubles() + (head * splits_ + split) * Size();
    return {slopes_ ? p : nullptr, scale_ ? p + slopes_ : nullptr, soft_cap_ ? p + slopes_ + scale_ : nullptr, rows_};
  }

  void Store() const {
    const int64_t G = c_.G();
    const auto total = [&](int64_t b, int64_t n, int64_t at) {
      double sum = 0.0;
      for (int64_t split = 0; split < splits_; ++split)
        sum += memory_.doubles()[((b * c_.K + n / G) * splits_ + split) * Size() + at];
      return sum;
    };
    if (slopes_)
      AddAll(c_, c_.dslopes, rows_, [&](int64_t b, int64_t n, int64_t i) { return total(b, n, n % G * rows_ + i); });
    if (scale_) AddAll(c_, c_.dscale, 1, [&](int64_t b, int64_t n, int64_t) { return total(b, n, slopes_ + n % G); });
    if (soft_cap_)
      AddAll(c_, c_.dsoft_cap, 1, [&](int64_t b, int64_t n, int64_t) { return total(b, n, slopes_ + scale_ + n % G); });
  }

 private:
  int64_t Size() const { return slopes_ + scale_ + soft_cap_; }  // of one key head and split

  const Call& c_;
  const int64_t splits_, rows_, slopes_, scale_, soft_cap_;
  const Buffer memory_;
};

// The gradients of slopes, scale and soft cap are overwritten.
template <bool kPairs>
void BackwardAs(const Call& c, const Runner& runner) {
  const BackwardPlan plan(c);
  const int64_t heads = c.B * c.K, head_size = plan.rows * plan.dq_row + BalanceSize<kPairs>(plan);
  const Buffer dq_parts(plan.splits > 1 ? heads * plan.splits * head_size : 0);  // per key head and split
  const AllSums sums(c, plan);

  const bool large = head_size > (int64_t{1} << 20);  // too large to be kept by each thread
  Run(runner, plan.groups * plan.splits, [&](int64_t task) {
    const int64_t group = task / plan.splits, split = task % plan.splits;
    const int64_t key0 = split * plan.split_keys;
    const int64_t key1 = key0 + plan.split_keys < c.Skv ? key0 + plan.split_keys : c.Skv;
    const BackwardScratch<kPairs> s(c, plan, plan.splits == 1 && !large);
    const Buffer own_dq(plan.splits == 1 && large ? head_size : 0);
    for (int64_t i = plan.starts[group]; i < plan.starts[group + 1]; ++i) {
      const int64_t head = plan.heads[i], b = head / c.K, k = head % c.K, part = head * plan.splits + split;
      float* dq = plan.splits > 1 ? dq_parts.get() + part * head_size : large ? own_dq.get() : s.dq;
      BackwardHead<kPairs>(c, plan, s, b, k, key0, key1, dq, sums.Of(head, split));
      if (plan.splits > 1) continue;
      FinishQueries<kPairs>(c, plan, b, k, s.stage, dq);
    }
  });

  if (plan.splits > 1) {
    Run(runner, heads, [&](int64_t head) {
      float* total = dq_parts.get() + head * plan.splits * head_size;
      for (int64_t split = 1; split < plan.splits; ++split)
        AddPart<kPairs>(plan, total + split * head_size, total);
      const int64_t sizes[] = {StageSize(c)};
      float* stage[1];
      TakeScratch(sizes, stage);
      FinishQueries<kPairs>(c, plan, head / c.K, head % c.K, stage[0], total);
    });
  }
  sums.Store();
}
