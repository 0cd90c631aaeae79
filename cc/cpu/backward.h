// Backward from the saved softmax max and sum: dq, dk, dv, and sums for bias and ALiBi slopes.
//
//   p = exp(s - m) / l,  dp = keep / keep_prob (dout v^T),  ds = p (dp - delta),  delta = dout.out - dlogsumexp
//   dq = scale ds k,  dk = scale ds^T q,  dv = (keep / keep_prob p)^T dout,  dbias = ds
//
// Key blocks are the outer loop: dk and dv of a block stay in L2 while all query rows pass; dq lies in a float
// buffer. A task is a range of keys of all the key heads that share one bias gradient (without bias: of one
// head), so every sum has one owner and a fixed order, whatever the number of threads.

constexpr int64_t kBackwardRows = 192;

struct BackwardPlan {
  int64_t rows, key_block, dq_row, splits, split_keys;
  int64_t groups = 0;
  Buffer memory;
  int64_t* group_of;  // the task group of each key head b * K + k

  explicit BackwardPlan(const Call& c) : memory(6 * c.B * c.K + 2) {
    rows = c.G() * c.Sq;
    const int64_t wide = c.D > c.Dv ? c.D : c.Dv;
    key_block = wide <= 64 ? 256 : wide <= 128 ? 512 : wide <= 256 ? 256 : 128;
    dq_row = Panels(c.D) * kPanel;
    // Heads that add to the same bias gradient form a group; without one, each head is its own.
    const int64_t count = c.B * c.K;
    group_of = memory.ints();
    int64_t* owner = group_of + count;  // of each group: where its bias gradient begins
    const bool shared = c.dbias && (c.dbias.head == 0 || SharesBatch(c));
    for (int64_t head = 0; head < count; ++head) {
      const int64_t b = head / c.K, k = head % c.K;
      int64_t g = groups;
      if (shared) {
        const int64_t own = c.dbias.batch[b] + k * c.G() * c.dbias.head;
        for (g = 0; g < groups && owner[g] != own;) ++g;
        owner[g] = own;
      }
      group_of[head] = g;
      groups = g < groups ? groups : g + 1;
    }
    // Splits keep more threads busy and cost a dq buffer each.
    const int64_t key_blocks = (c.Skv + key_block - 1) / key_block;
    const int64_t dq_bytes = c.B * c.K * rows * dq_row * 4 + 1;
    splits = groups >= 16 ? 1 : (16 + groups - 1) / (groups > 0 ? groups : 1);
    const int64_t affordable = (int64_t{64} << 20) / dq_bytes;
    splits = splits < affordable ? splits : affordable;
    if (c.dbias && c.dbias.col == 0) splits = 1;  // all keys add to one column
    splits = splits < key_blocks ? splits : key_blocks;
    splits = splits < 1 ? 1 : splits;
    split_keys = (key_blocks + splits - 1) / splits * key_block;
    splits = split_keys > 0 ? (c.Skv + split_keys - 1) / split_keys : 1;
    splits = splits < 1 ? 1 : splits;
  }

  // If any two entries share a gradient, one shares the first's: a batch axis broadcasts as a whole.
  static bool SharesBatch(const Call& c) {
    for (int64_t b = 1; b < c.B; ++b)
      if (c.dbias.batch[b] == c.dbias.batch[0]) return true;
    return false;
  }
};

struct BackwardScratch {
  float *q, *dout, *p, *ds, *slope, *keys_t, *values_t, *keys, *dk, *dv, *stage, *tmp, *m, *inverse, *delta, *dq;
  int32_t *lo, *hi;
  int64_t s_row, dv_row;

  BackwardScratch(const Call& c, const BackwardPlan& plan, bool own_dq) {
    const int64_t kb = RoundUp(plan.key_block, kPanel), n = kBackwardRows;
    dv_row = Panels(c.Dv) * kPanel;
    s_row = kb + kLanes;
    const int64_t stage_size = kLanes * RoundUp(c.D > c.Dv ? c.D : c.Dv, kLanes);
    const int64_t sizes[] = {n * plan.dq_row, n * dv_row, n * s_row, n * s_row, s_row, kb * c.D, kb * c.Dv,
                             kb * plan.dq_row, kb * plan.dq_row, kb * dv_row, stage_size, kb,
                             plan.rows, plan.rows, plan.rows, own_dq ? plan.rows * plan.dq_row : 0,
                             plan.rows, plan.rows};
    float* parts[18];
    TakeScratch(sizes, parts);
    float** const names[] = {&q, &dout, &p, &ds, &slope, &keys_t, &values_t, &keys, &dk, &dv, &stage, &tmp, &m, &inverse, &delta, &dq};
    for (int i = 0; i < 16; ++i) *names[i] = parts[i];
    lo = reinterpret_cast<int32_t*>(parts[16]);
    hi = reinterpret_cast<int32_t*>(parts[17]);
  }
};

// Per row: max, 1 / sum (0 for a row that sees nothing; NaN where q or dout is not finite, so that only the
// keys it sees hear of it), delta, and the visible range.
inline void PrepareRows(const Call& c, const BackwardPlan& plan, const BackwardScratch& s, int64_t b, int64_t k) {
  const bool masked = IsMasked(c);
  for (int64_t r = 0; r < plan.rows; ++r) {
    const Row row = RowAt(c, b, k, r);
    const Range v = Visible(c, row);
    s.lo[r] = static_cast<int32_t>(v.Empty() ? 0 : v.lo);
    s.hi[r] = static_cast<int32_t>(v.Empty() ? 0 : v.hi);
    s.m[r] = *c.m.At<float>(b, row.n, row.i);
    const float l = *c.l.At<float>(b, row.n, row.i);
    s.inverse[r] = l == 0.0f ? 0.0f : 1.0f / l;
    LoadRow(c.dout.Bytes(b, row.n, row.i), c.dout.dtype, c.dout.col, c.Dv, s.stage);
    float* out = s.stage + RoundUp(c.Dv, kLanes);
    LoadRow(c.out.Bytes(b, row.n, row.i), c.out.dtype, c.out.col, c.Dv, out);
    double delta = 0.0;
    for (int64_t d = 0; d < c.Dv; ++d) delta += static_cast<double>(s.stage[d]) * out[d];
    if (c.dlogsumexp) delta -= *c.dlogsumexp.At<float>(b, row.n, row.i);
    s.delta[r] = static_cast<float>(delta);
    if (masked) {
      s.inverse[r] += ZeroOrNaN(s.stage, c.Dv);
      LoadRow(c.query.Bytes(b, row.n, row.i), c.query.dtype, c.query.col, c.D, s.stage);
      s.inverse[r] += ZeroOrNaN(s.stage, c.D);
      if (v.Empty()) s.inverse[r] = 0.0f;
    }
  }
}

// One row as panels, times `factor`; zeros if masked calls hold something that is not finite.
inline void PackRowClean(const View& x, int64_t b, int64_t h, int64_t i, int64_t width, float factor, bool clean,
                         float* stage, int64_t r, int64_t rows, float* panels) {
  LoadRow(x.Bytes(b, h, i), x.dtype, x.col, width, stage);
  if (clean && ZeroOrNaN(stage, width) != 0.0f) Fill(stage, 0, width, 0.0f);
  if (factor != 1.0f)
    for (int64_t d = 0; d < width; ++d) stage[d] *= factor;
  PackRow(stage, width, r, rows, panels);
}

// A (rows x depth, as panels of `rows` rows) times transposed panels of keys: rows of tile `t` only.
inline void TimesTransposed(int64_t n, int64_t depth, const float* a, int64_t a_rows, const float* b, float* c,
                            int64_t c_row) {
  for (int64_t d = 0; d < depth; d += kPanel) {
    const int64_t width = depth - d < kPanel ? depth - d : kPanel;
    if (d == 0) {
      Gemm<false>(n, width, a, kPanel, 1, b, c, c_row);
    } else {
      Gemm<true>(n, width, a + d / kPanel * a_rows * kPanel, kPanel, 1, b + d * kPanel, c, c_row);
    }
  }
}

// Turns a row of products q.k and dout.v of keys [c0, c1) into weights p and ds, in place, 0 where hidden.
inline void RowGradients(const Call& c, const BackwardScratch& s, const Row& row, int64_t r, int64_t j0, int64_t from,
                         int64_t to, int64_t c0, int64_t c1, float* p, float* ds, float* dslope) {
  float* slope = c.soft_cap != 0.0f ? s.slope : nullptr;
  if (from < to) ToLogits(c, row, j0, from, to, nullptr, p, slope, s.tmp);
  Fill(p, c0, from, -__builtin_inff());
  Fill(p, to, c1, -__builtin_inff());
  const float delta = s.delta[r], kept = 1.0f / c.keep_prob;
  const F m = Set(s.m[r]), inverse = Set(s.inverse[r]);
  for (int64_t j = c0; j < c1; j += kLanes) Store(p + j, Exp(Load(p + j) - m) * inverse);
  Fill(p, c0, from, 0.0f);  // 0 * NaN, where inverse is NaN
  Fill(p, to, c1, 0.0f);
  if (c.mask && inverse[0] != inverse[0]) {
    for (int64_t j = from; j < to; ++j)
      if (!*c.mask.At<uint8_t>(row.b, row.n, row.i, j0 + j)) p[j] = 0.0f;
  }
  const bool dropout = c.seed || c.drop_bits;
  if (!dropout) {
    const F dl = Set(delta);
    for (int64_t j = c0; j < c1; j += kLanes) Store(ds + j, Load(p + j) * (Load(ds + j) - dl));
  } else {
    float* keep = s.tmp;  // 1 / keep_prob or 0
    Fill(keep, from, to, kept);
    Drop(c, row, j0, from, to, keep);
    for (int64_t j = from; j < to; ++j) {
      ds[j] = p[j] * (keep[j] == 0.0f ? -delta : ds[j] * keep[j] - delta);
      p[j] = keep[j] == 0.0f ? 0.0f : p[j] * keep[j];
    }
  }
  if (slope != nullptr)
    for (int64_t j = from; j < to; ++j) ds[j] *= slope[j];
  Fill(ds, c0, from, 0.0f);
  Fill(ds, to, c1, 0.0f);
  if (IsMasked(c) && c.mask) {  // a hidden value may be NaN
    for (int64_t j = from; j < to; ++j)
      if (!*c.mask.At<uint8_t>(row.b, row.n, row.i, j0 + j)) ds[j] = 0.0f;
  }
  if (c.dbias) {
    float* db = c.dbias.At<float>(row.b, row.n, row.i, j0);
    if (c.dbias.col == 0) {
      float sum = 0.0f;
      for (int64_t j = from; j < to; ++j) sum += ds[j];
      *db += sum;
    } else {
      for (int64_t j = from; j < to; ++j) db[j * c.dbias.col] += ds[j];
    }
  }
  if (dslope != nullptr) {
    double sum = 0.0;
    const int64_t base = j0 - row.i;
    for (int64_t j = from; j < to; ++j) {
      const float away = __builtin_fabsf(static_cast<float>(base + j));
      sum -= ds[j] * (c.alibi == Alibi::kSqrt ? __builtin_sqrtf(away) : away);
    }
    *dslope += static_cast<float>(sum);
  }
}

inline void BackwardHead(const Call& c, const BackwardPlan& plan, const BackwardScratch& s, int64_t b, int64_t k,
                         int64_t key0, int64_t key1, float* dq, float* dslopes) {
  const bool masked = IsMasked(c);
  PrepareRows(c, plan, s, b, k);
  Fill(dq, 0, plan.rows * plan.dq_row, 0.0f);
  for (int64_t j0 = key0; j0 < key1; j0 += plan.key_block) {
    const int64_t width = j0 + plan.key_block < key1 ? plan.key_block : key1 - j0;
    const int64_t keys = RoundUp(width, kLanes);
    Fill(s.dk, 0, keys * plan.dq_row, 0.0f);
    Fill(s.dv, 0, keys * s.dv_row, 0.0f);
    bool packed = false;
    for (int64_t g0 = 0; g0 < plan.rows; g0 += kBackwardRows) {
      const int64_t rows = g0 + kBackwardRows < plan.rows ? kBackwardRows : plan.rows - g0;
      RowTile tiles[kBackwardRows];
      int64_t count = 0;
      const int64_t parts = (rows + kRows - 1) / kRows;
      for (int64_t t = 0; t < parts; ++t) {
        RowTile tile{rows * t / parts, 0, width, 0};
        tile.n = rows * (t + 1) / parts - tile.r;
        for (int64_t r = g0 + tile.r; r < g0 + tile.r + tile.n; ++r) {
          const int64_t from = s.lo[r] - j0 > 0 ? s.lo[r] - j0 : 0, to = s.hi[r] - j0 < width ? s.hi[r] - j0 : width;
          if (from >= to) continue;
          tile.from = from < tile.from ? from : tile.from;
          tile.to = to > tile.to ? to : tile.to;
        }
        if (tile.from < tile.to) tiles[count++] = tile;
      }
      if (count == 0) continue;
      if (!packed) {
        PackTransposed(c.key, c.D, b, k, j0, width, s.stage, s.keys_t);
        PackTransposed(c.value, c.Dv, b, k, j0, width, s.stage, s.values_t);
        for (int64_t j = 0; j < width; ++j)
          PackRowClean(c.key, b, k, j0 + j, c.D, 1.0f, masked, s.stage, j, width, s.keys);
        packed = true;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const Row row = RowAt(c, b, k, g0 + r);
        PackRowClean(c.query, b, row.n, row.i, c.D, c.scale, masked, s.stage, r, rows, s.q);
        PackRowClean(c.dout, b, row.n, row.i, c.Dv, 1.0f, masked, s.stage, r, rows, s.dout);
      }
      for (int64_t panel = 0; panel < Panels(width); ++panel) {
        for (int64_t t = 0; t < count; ++t) {
          const RowTile& tile = tiles[t];
          if (tile.to <= panel * kPanel || tile.from >= (panel + 1) * kPanel) continue;
          const int64_t at = tile.r * s.s_row + panel * kPanel;
          TimesTransposed(tile.n, c.D, s.q + tile.r * kPanel, rows, s.keys_t + panel * c.D * kPanel, s.p + at, s.s_row);
          TimesTransposed(tile.n, c.Dv, s.dout + tile.r * kPanel, rows, s.values_t + panel * c.Dv * kPanel, s.ds + at,
                          s.s_row);
        }
      }
      int64_t done = tiles[0].r;  // rows before are never read
      for (int64_t t = 0; t < count; ++t) {
        const RowTile& tile = tiles[t];
        for (; done < tile.r; ++done) {
          Fill(s.p + done * s.s_row, 0, keys, 0.0f);
          Fill(s.ds + done * s.s_row, 0, keys, 0.0f);
        }
        const int64_t c0 = tile.from / kLanes * kLanes, c1 = RoundUp(tile.to, kLanes);
        for (int64_t r = tile.r; r < tile.r + tile.n; ++r) {
          const Row row = RowAt(c, b, k, g0 + r);
          int64_t from = s.lo[g0 + r] - j0 > 0 ? s.lo[g0 + r] - j0 : 0;
          int64_t to = s.hi[g0 + r] - j0 < width ? s.hi[g0 + r] - j0 : width;
          if (from >= to) from = to = c0;
          float *p = s.p + r * s.s_row, *ds = s.ds + r * s.s_row;
          RowGradients(c, s, row, g0 + r, j0, from, to, c0, c1, p, ds, dslopes ? dslopes + row.n % c.G() : nullptr);
          Fill(p, 0, c0, 0.0f);
          Fill(ds, 0, c0, 0.0f);
          Fill(p, c1, keys, 0.0f);
          Fill(ds, c1, keys, 0.0f);
        }
        done = tile.r + tile.n;
        for (int64_t d = 0; d < Panels(c.D); ++d) {
          Gemm<true>(tile.n, tile.to - tile.from, s.ds + tile.r * s.s_row + tile.from, s.s_row, 1,
                     s.keys + (d * width + tile.from) * kPanel, dq + (g0 + tile.r) * plan.dq_row + d * kPanel,
                     plan.dq_row);
        }
      }
      // dk and dv: tiles of kRows keys, over the rows that see any of them.
      const int64_t key_parts = (width + kRows - 1) / kRows;
      for (int64_t t = 0; t < key_parts; ++t) {
        const int64_t a = width * t / key_parts, e = width * (t + 1) / key_parts;
        int64_t first = rows, last = 0;
        for (int64_t u = 0; u < count; ++u) {
          if (tiles[u].from >= e || tiles[u].to <= a) continue;
          first = tiles[u].r < first ? tiles[u].r : first;
          last = tiles[u].r + tiles[u].n;
        }
        if (first >= last) continue;
        for (int64_t d = 0; d < Panels(c.Dv); ++d)
          Gemm<true>(e - a, last - first, s.p + first * s.s_row + a, 1, s.s_row,
                     s.dout + (d * rows + first) * kPanel, s.dv + a * s.dv_row + d * kPanel, s.dv_row);
        for (int64_t d = 0; d < Panels(c.D); ++d)
          Gemm<true>(e - a, last - first, s.ds + first * s.s_row + a, 1, s.s_row,
                     s.q + (d * rows + first) * kPanel, s.dk + a * plan.dq_row + d * kPanel, plan.dq_row);
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      StoreRow(s.dk + j * plan.dq_row, c.dkey.Bytes(b, k, j0 + j), c.dkey.dtype, c.dkey.col, c.D);
      StoreRow(s.dv + j * s.dv_row, c.dvalue.Bytes(b, k, j0 + j), c.dvalue.dtype, c.dvalue.col, c.Dv);
    }
  }
}

inline void StoreQueryRow(const Call& c, const Row& row, float* dq) {
  for (int64_t d = 0; d < c.D; ++d) dq[d] *= c.scale;
  StoreRow(dq, c.dquery.Bytes(row.b, row.n, row.i), c.dquery.dtype, c.dquery.col, c.D);
}

// `dbias` must be zero; `dslopes` is overwritten.
void Backward(const Call& c, const Runner& runner) {
  const BackwardPlan plan(c);
  const int64_t heads = c.B * c.K, G = c.G(), head_size = plan.rows * plan.dq_row;
  const Buffer dq_parts(plan.splits > 1 ? heads * plan.splits * head_size : 0);  // per key head and split
  const int64_t slope_count = c.dslopes ? heads * plan.splits * G : 0;
  const Buffer slopes(slope_count);
  Fill(slopes.get(), 0, slope_count, 0.0f);

  Run(runner, plan.groups * plan.splits, [&](int64_t task) {
    const int64_t group = task / plan.splits, split = task % plan.splits;
    const int64_t key0 = split * plan.split_keys;
    const int64_t key1 = key0 + plan.split_keys < c.Skv ? key0 + plan.split_keys : c.Skv;
    const BackwardScratch s(c, plan, plan.splits == 1);
    for (int64_t head = 0; head < heads; ++head) {
      if (plan.group_of[head] != group) continue;
      const int64_t b = head / c.K, k = head % c.K, part = head * plan.splits + split;
      float* dq = plan.splits == 1 ? s.dq : dq_parts.get() + part * head_size;
      BackwardHead(c, plan, s, b, k, key0, key1, dq, c.dslopes ? slopes.get() + part * G : nullptr);
      if (plan.splits > 1) continue;
      for (int64_t r = 0; r < plan.rows; ++r) StoreQueryRow(c, RowAt(c, b, k, r), dq + r * plan.dq_row);
    }
  });

  if (plan.splits > 1) {
    Run(runner, heads, [&](int64_t head) {
      float* total = dq_parts.get() + head * plan.splits * head_size;
      for (int64_t split = 1; split < plan.splits; ++split)
        for (int64_t x = 0; x < head_size; ++x) total[x] += total[split * head_size + x];
      for (int64_t r = 0; r < plan.rows; ++r)
        StoreQueryRow(c, RowAt(c, head / c.K, head % c.K, r), total + r * plan.dq_row);
    });
  }
  if (c.dslopes) {
    for (int64_t b = 0; b < c.B; ++b)
      for (int64_t n = 0; n < c.N; ++n) *c.dslopes.At<float>(b, n) = 0.0f;
    for (int64_t b = 0; b < c.B; ++b)
      for (int64_t n = 0; n < c.N; ++n)
        for (int64_t split = 0; split < plan.splits; ++split)
          *c.dslopes.At<float>(b, n) += slopes.get()[((b * c.K + n / G) * plan.splits + split) * G + n % G];
  }
}
