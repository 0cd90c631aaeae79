// Forward: out, softmax max and sum (arXiv:2205.14135, 2307.08691).
//
// A task is up to kTaskRows query rows of one key head. It walks the key blocks that any of its rows sees,
// packs each block once (keys transposed), and runs its rows over it in groups whose logits stay in L2.
// Within a group, tiles of kRows rows compute only the panels they see. A row's result does not depend on how
// rows are grouped: blocks begin at multiples of the block size, and hidden keys contribute exact zeros.

constexpr int64_t kTaskRows = 384, kGroupRows = 96;

struct ForwardPlan {
  int64_t rows;       // query rows of a key head, over all heads of its group
  int64_t task_rows, blocks;  // rows of a task, tasks of a key head and split
  int64_t key_block;
  int64_t splits, split_keys;  // key ranges whose partial results are merged

  explicit ForwardPlan(const Call& c) {
    rows = c.G() * c.Sq;
    const int64_t wide = c.D > c.Dv ? c.D : c.Dv;
    key_block = wide <= 128 ? 512 : wide <= 256 ? 256 : 128;
    const int64_t heads = c.B * c.K;
    task_rows = kTaskRows;
    while (task_rows > kGroupRows && heads * ((rows + task_rows - 1) / task_rows) < 64) task_rows /= 2;
    blocks = (rows + task_rows - 1) / task_rows;
    // Few rows (decoding): several tasks share the keys. The split depends on the shape alone.
    const int64_t tasks = heads * blocks, key_blocks = (c.Skv + key_block - 1) / key_block;
    splits = tasks == 0 || tasks >= 32 || rows > kGroupRows ? 1 : (64 + tasks - 1) / tasks;
    if (splits > key_blocks) splits = key_blocks;
    if (splits < 1) splits = 1;
    split_keys = (key_blocks + splits - 1) / splits * key_block;
    if (split_keys > 0) splits = (c.Skv + split_keys - 1) / split_keys;
    if (splits < 1) splits = 1;
  }
};

struct ForwardScratch {
  float *q, *acc, *m, *l, *keys, *values, *logits, *stage, *poison, *tmp;
  int32_t *lo, *hi;
  int64_t s_row;

  ForwardScratch(const Call& c, const ForwardPlan& plan) {
    const int64_t n = plan.task_rows, kb = RoundUp(plan.key_block, kPanel), dv = Panels(c.Dv) * kPanel;
    s_row = kb + kLanes;  // padded, so that rows do not meet in one cache set
    const int64_t stage_size = kLanes * RoundUp(c.D > c.Dv ? c.D : c.Dv, kLanes);
    const int64_t sizes[] = {n * c.D, n * dv, n, n, kb * c.D, kb * dv, kGroupRows * s_row, stage_size, kb, kb, n, n};
    float* parts[12];
    TakeScratch(sizes, parts);
    float** const names[] = {&q, &acc, &m, &l, &keys, &values, &logits, &stage, &poison, &tmp};
    for (int i = 0; i < 10; ++i) *names[i] = parts[i];
    lo = reinterpret_cast<int32_t*>(parts[10]);
    hi = reinterpret_cast<int32_t*>(parts[11]);
  }
};

// Values j0 .. j0 + n of one head as panels [panel][keys][kPanel]. Returns whether any is not finite; such a
// key's values become 0 and its `poison` NaN, so that it reaches only the rows that see it.
inline bool PackValues(const Call& c, int64_t b, int64_t k, int64_t j0, int64_t n, int64_t rows,
                       float* stage, float* poison, float* panels) {
  bool any = false;
  for (int64_t j = 0; j < n; ++j) {
    const char* src = c.value.Bytes(b, k, j0 + j);
    const float* row = stage;
    if (c.value.dtype == DType::kF32 && c.value.col == 1) {
      row = reinterpret_cast<const float*>(src);
    } else {
      LoadRow(src, c.value.dtype, c.value.col, c.Dv, stage);
    }
    if (poison != nullptr) {
      poison[j] = ZeroOrNaN(row, c.Dv);
      if (poison[j] != 0.0f) {
        any = true;
        Fill(stage, 0, c.Dv, 0.0f);
        row = stage;
      }
    }
    PackRow(row, c.Dv, j, rows, panels);
  }
  return any;
}

struct RowTile {
  int64_t r, n;       // first row within the task, and how many
  int64_t from, to;   // keys it sees of the block, relative to it
};

// One task: rows [r0, r1) of key head k of batch entry b over keys [key0, key1). Leaves the unnormalized
// output, max and sum in the scratch.
inline void ForwardRows(const Call& c, const ForwardPlan& plan, const ForwardScratch& s, int64_t b, int64_t k,
                        int64_t r0, int64_t r1, int64_t key0, int64_t key1) {
  const int64_t n = r1 - r0, dv = Panels(c.Dv) * kPanel;
  const bool masked = IsMasked(c);
  Range all{key1, key0};
  for (int64_t r = 0; r < n; ++r) {
    const Row row = RowAt(c, b, k, r0 + r);
    Range v = Visible(c, row);
    v = {v.lo > key0 ? v.lo : key0, v.hi < key1 ? v.hi : key1};
    s.lo[r] = static_cast<int32_t>(v.Empty() ? 0 : v.lo);
    s.hi[r] = static_cast<int32_t>(v.Empty() ? 0 : v.hi);
    if (!v.Empty()) {
      all.lo = v.lo < all.lo ? v.lo : all.lo;
      all.hi = v.hi > all.hi ? v.hi : all.hi;
    }
    float* q = s.q + r * c.D;
    LoadRow(c.query.Bytes(b, row.n, row.i), c.query.dtype, c.query.col, c.D, q);
    for (int64_t d = 0; d < c.D; ++d) q[d] *= c.scale;
    s.m[r] = -kFloatMax;
    s.l[r] = 0.0f;
  }
  Fill(s.acc, 0, n * dv, 0.0f);
  if (all.Empty()) return;

  for (int64_t j0 = all.lo / plan.key_block * plan.key_block; j0 < all.hi; j0 += plan.key_block) {
    const int64_t je = j0 + plan.key_block < key1 ? j0 + plan.key_block : key1, width = je - j0;
    PackTransposed(c.key, c.D, b, k, j0, width, s.stage, s.keys);
    float* poison = masked ? s.poison : nullptr;
    if (!PackValues(c, b, k, j0, width, width, s.stage, poison, s.values)) poison = nullptr;

    for (int64_t g0 = 0; g0 < n; g0 += kGroupRows) {
      const int64_t rows = g0 + kGroupRows < n ? kGroupRows : n - g0;
      RowTile tiles[kGroupRows];
      int64_t count = 0;
      const int64_t parts = (rows + kRows - 1) / kRows;
      for (int64_t t = 0; t < parts; ++t) {
        RowTile tile{g0 + rows * t / parts, 0, width, 0};
        tile.n = g0 + rows * (t + 1) / parts - tile.r;
        for (int64_t r = tile.r; r < tile.r + tile.n; ++r) {
          const int64_t from = s.lo[r] - j0 > 0 ? s.lo[r] - j0 : 0, to = s.hi[r] - j0 < width ? s.hi[r] - j0 : width;
          if (from >= to) continue;
          tile.from = from < tile.from ? from : tile.from;
          tile.to = to > tile.to ? to : tile.to;
        }
        if (tile.from < tile.to) tiles[count++] = tile;
      }
      // Logits, panel by panel: a panel of keys stays in L1 while all tiles pass it.
      for (int64_t p = 0; p < Panels(width); ++p) {
        for (int64_t t = 0; t < count; ++t) {
          const RowTile& tile = tiles[t];
          if (tile.to <= p * kPanel || tile.from >= (p + 1) * kPanel) continue;
          Gemm<false>(tile.n, c.D, s.q + tile.r * c.D, c.D, 1, s.keys + p * c.D * kPanel,
                      s.logits + (tile.r - g0) * s.s_row + p * kPanel, s.s_row);
        }
      }
      for (int64_t t = 0; t < count; ++t) {
        const RowTile& tile = tiles[t];
        const int64_t c0 = tile.from / kLanes * kLanes, c1 = RoundUp(tile.to, kLanes);
        for (int64_t r = tile.r; r < tile.r + tile.n; ++r) {
          float* x = s.logits + (r - g0) * s.s_row;
          const Row row = RowAt(c, b, k, r0 + r);
          int64_t from = s.lo[r] - j0 > 0 ? s.lo[r] - j0 : 0, to = s.hi[r] - j0 < width ? s.hi[r] - j0 : width;
          if (from >= to) from = to = c0;
          if (from < to) ToLogits(c, row, j0, from, to, poison, x, nullptr, s.tmp);
          Fill(x, c0, from, -__builtin_inff());
          Fill(x, to, c1, -__builtin_inff());
          const float m = RowMax(x, c0, c1, s.m[r]);
          if (m != s.m[r]) {
            const float rescale = __builtin_expf(s.m[r] - m);
            s.l[r] *= rescale;
            float* acc = s.acc + r * dv;
            const F f = Set(rescale);
            for (int64_t d = 0; d < dv; d += kLanes) Store(acc + d, Load(acc + d) * f);
            s.m[r] = m;
          }
          s.l[r] += RowExp(x, c0, c1, m);
          Drop(c, row, j0, from, to, x);
        }
        for (int64_t p = 0; p < Panels(c.Dv); ++p) {
          Gemm<true>(tile.n, tile.to - tile.from, s.logits + (tile.r - g0) * s.s_row + tile.from, s.s_row, 1,
                     s.values + (p * width + tile.from) * kPanel, s.acc + tile.r * dv + p * kPanel, dv);
        }
      }
    }
  }
}

inline void FinishRow(const Call& c, const Row& row, float* acc, float m, float l) {
  const float factor = l == 0.0f ? 0.0f : 1.0f / (l * c.keep_prob);
  for (int64_t d = 0; d < c.Dv; ++d) acc[d] = l == 0.0f ? 0.0f : acc[d] * factor;
  StoreRow(acc, c.out.Bytes(row.b, row.n, row.i), c.out.dtype, c.out.col, c.Dv);
  *c.m.At<float>(row.b, row.n, row.i) = l == l ? m : l;  // a NaN is not seen by max
  *c.l.At<float>(row.b, row.n, row.i) = l;
}

void Forward(const Call& c, const Runner& runner) {
  const ForwardPlan plan(c);
  const int64_t heads = c.B * c.K, dv = Panels(c.Dv) * kPanel, partial = dv + 2;
  // Per key head, split and row: output, max, sum.
  const Buffer partials(plan.splits > 1 ? heads * plan.splits * plan.rows * partial : 0);

  Run(runner, heads * plan.blocks * plan.splits, [&](int64_t task) {
    const ForwardScratch s(c, plan);
    // Last rows first: under a causal mask they are the longest.
    const int64_t block = plan.blocks - 1 - task / (heads * plan.splits);
    const int64_t head = task % (heads * plan.splits) / plan.splits, split = task % plan.splits;
    const int64_t b = head / c.K, k = head % c.K;
    const int64_t r0 = block * plan.task_rows, r1 = r0 + plan.task_rows < plan.rows ? r0 + plan.task_rows : plan.rows;
    const int64_t key0 = split * plan.split_keys, key1 = plan.splits == 1 || key0 + plan.split_keys > c.Skv
                                                             ? c.Skv : key0 + plan.split_keys;
    ForwardRows(c, plan, s, b, k, r0, r1, key0, key1);
    for (int64_t r = 0; r < r1 - r0; ++r) {
      if (plan.splits == 1) {
        FinishRow(c, RowAt(c, b, k, r0 + r), s.acc + r * dv, s.m[r], s.l[r]);
      } else {
        float* part = partials.get() + ((head * plan.splits + split) * plan.rows + r0 + r) * partial;
        __builtin_memcpy(part, s.acc + r * dv, sizeof(float) * dv);
        part[dv] = s.m[r];
        part[dv + 1] = s.l[r];
      }
    }
  });
  if (plan.splits == 1) return;

  Run(runner, heads, [&](int64_t head) {
    const int64_t b = head / c.K, k = head % c.K;
    for (int64_t r = 0; r < plan.rows; ++r) {
      const auto part = [&](int64_t split) {
        return partials.get() + ((head * plan.splits + split) * plan.rows + r) * partial;
      };
      float m = -kFloatMax, l = 0.0f;
      for (int64_t split = 0; split < plan.splits; ++split) m = part(split)[dv] > m ? part(split)[dv] : m;
      float* total = part(0);
      for (int64_t split = 0; split < plan.splits; ++split) {
        float* p = part(split);
        const float f = __builtin_expf(p[dv] - m);
        l += p[dv + 1] * f;
        for (int64_t d = 0; d < dv; ++d) total[d] = (split == 0 ? 0.0f : total[d]) + p[d] * f;
      }
      FinishRow(c, RowAt(c, b, k, r), total, m, l);
    }
  });
}
