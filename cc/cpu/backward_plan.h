// How the backward is cut into tasks and blocks, and where a task keeps what it works on.

constexpr int64_t kBackwardRows = 192;

// Numbers the distinct offsets of batch entries in the order of their first entries: class_of[b] is that of entry b.
// Returns how many there are. By hashing, so that the time is that of one pass.
inline int64_t Classes(const int64_t* offsets, int64_t count, int64_t* class_of) {
  int64_t bits = 1;
  while ((int64_t{1} << bits) < 2 * count) ++bits;
  const int64_t slots = int64_t{1} << bits;
  const Buffer memory(2 * slots);
  int64_t *const first = memory.ints(), classes = 0;  // first: the entry that came first to a slot
  for (int64_t i = 0; i < slots; ++i) first[i] = -1;
  for (int64_t b = 0; b < count; ++b) {
    const uint64_t hash = static_cast<uint64_t>(offsets[b]) * 0x9E3779B97F4A7C15u;
    int64_t at = static_cast<int64_t>(hash >> (64 - bits));
    while (first[at] >= 0 && offsets[first[at]] != offsets[b]) at = (at + 1) & (slots - 1);
    if (first[at] < 0) first[at] = b, class_of[b] = classes++;
    class_of[b] = class_of[first[at]];
  }
  return classes;
}

struct BackwardPlan {
  int64_t rows, row_blocks, key_block, dq_row, splits, split_keys;
  int64_t groups = 0;
  Buffer memory;
  int64_t *heads, *starts;  // key heads b * K + k, group by group, and where each group starts
  bool writes_all_bias;

  explicit BackwardPlan(const Call& c) : memory(8 * c.B * c.K + 4) {
    writes_all_bias = c.dbias && WritesAllBias(c);
    rows = c.G() * c.Sq;
    const int64_t wide = c.D > c.Dv ? c.D : c.Dv;
    key_block = wide <= 64 ? 256 : wide <= 128 ? 512 : wide <= 256 ? 256 : 128;
    dq_row = Panels(c.D) * kPanel;
    row_blocks = (rows + kBackwardRows - 1) / kBackwardRows;
    Group(c);
    // Splits keep more threads busy and cost a dq buffer each.
    const int64_t key_blocks = (c.Skv + key_block - 1) / key_block;
    const int64_t dq_bytes = c.B * c.K * rows * dq_row * 4 + 1;
    splits = groups >= 16 ? 1 : (16 + groups - 1) / (groups > 0 ? groups : 1);
    // ... up to 64 MiB, and four however large where there would be less than four tasks.
    const int64_t affordable = (int64_t{64} << 20) / dq_bytes, least = groups > 0 ? 4 / groups : 1;
    const int64_t most = affordable > least ? affordable : least;
    splits = splits < most ? splits : most;
    if (c.dbias && (c.dbias.col == 0 || c.bias_offset)) splits = 1;  // different keys add to one element
    splits = splits < key_blocks ? splits : key_blocks;
    splits = splits < 1 ? 1 : splits;
    split_keys = (key_blocks + splits - 1) / splits * key_block;
    splits = split_keys > 0 ? (c.Skv + split_keys - 1) / split_keys : 1;
    splits = splits < 1 ? 1 : splits;
  }

  // Heads that add to the same bias gradient form a group; without one, each head is its own.
  void Group(const Call& c) {
    const int64_t count = c.B * c.K;
    heads = memory.ints();
    starts = heads + count;  // count + 1 of them
    int64_t *group_of = starts + count + 1, *next = group_of + count;
    const bool shared = c.dbias && !c.bias_apart, by_head = shared && c.dbias.head == 0;
    const bool by_batch = shared && SharesBiasBatch(c);
    const int64_t groups_of_batch = by_head ? 1 : c.K;
    groups = (by_batch ? Classes(c.dbias.batch, c.B, next) : c.B) * groups_of_batch;
    for (int64_t b = 0; b < c.B; ++b) {
      const int64_t first = (by_batch ? next[b] : b) * groups_of_batch;
      for (int64_t k = 0; k < c.K; ++k) group_of[b * c.K + k] = first + (by_head ? 0 : k);
    }
    for (int64_t g = 0; g <= groups; ++g) starts[g] = 0;
    for (int64_t head = 0; head < count; ++head) ++starts[group_of[head] + 1];
    for (int64_t g = 0; g < groups; ++g) starts[g + 1] += starts[g];
    for (int64_t g = 0; g < groups; ++g) next[g] = starts[g];
    for (int64_t head = 0; head < count; ++head) heads[next[group_of[head]]++] = head;
  }
};

// Floats behind the dq of a key head (see Balance).
template <bool kPairs>
inline int64_t BalanceSize(const BackwardPlan& plan) {
  return kPairs ? RoundUp(3 * plan.rows, kLanes) : 0;
}

template <bool kPairs>
struct BackwardScratch {
  float *q, *dout;            // rows of a block, as units
  float *q_panels, *dout_panels;
  float *p, *ds, *ds_rows;    // ds_rows: rows of ds as pairs
  float *slope, *by_cap, *products, *keys_t, *values_t, *keys, *dk, *dv, *stage, *tmp, *m, *inverse, *delta, *dq;
  int32_t *lo, *hi, *block_lo, *block_hi;
  int64_t q_row, dout_row, s_row, half_row, dv_row;
  bool writes_all_bias;

  BackwardScratch(const Call& c, const BackwardPlan& plan, bool own_dq) {
    const int64_t kb = RoundUp(plan.key_block, kPanel), n = kBackwardRows, row_units = Units<kPairs>(n);
    writes_all_bias = plan.writes_all_bias;
    q_row = RoundUp(Units<kPairs>(c.D), kLanes);
    dout_row = RoundUp(Units<kPairs>(c.Dv), kLanes);
    dv_row = Panels(c.Dv) * kPanel;
    s_row = kb + kLanes;
    half_row = kb / 2 + kLanes;
    const int64_t sizes[] = {n * q_row, n * dout_row, row_units * plan.dq_row, row_units * dv_row, n * s_row, n * s_row,
                             kPairs ? n * half_row : 0, s_row, c.dsoft_cap ? s_row : 0, c.dscale ? s_row : 0,
                             kb * Units<kPairs>(c.D), kb * Units<kPairs>(c.Dv),
                             Units<kPairs>(kb) * plan.dq_row, kb * plan.dq_row, kb * dv_row, StageSize(c), kb,
                             plan.rows, plan.rows, plan.rows, own_dq ? plan.rows * plan.dq_row + BalanceSize<kPairs>(plan) : 0,
                             plan.rows, plan.rows, plan.row_blocks, plan.row_blocks};
    float* parts[25];
    TakeScratch(sizes, parts);
    float** const names[] = {&q, &dout, &q_panels, &dout_panels, &p, &ds, &ds_rows, &slope, &by_cap, &products,
                             &keys_t, &values_t, &keys, &dk, &dv, &stage, &tmp, &m, &inverse, &delta, &dq};
    for (int i = 0; i < 21; ++i) *names[i] = parts[i];
    int32_t** const ints[] = {&lo, &hi, &block_lo, &block_hi};
    for (int i = 0; i < 4; ++i) *ints[i] = reinterpret_cast<int32_t*>(parts[21 + i]);
  }
};
