// How the backward is cut into tasks and blocks, and where a task keeps what it works on.

constexpr int64_t kBackwardRows = 192;

struct BackwardPlan {
  int64_t rows, row_blocks, key_block, dq_row, splits, split_keys;
  int64_t groups = 0;
  Buffer memory;
  int64_t *heads, *starts;  // key heads b * K + k, group by group, and where each group starts

  explicit BackwardPlan(const Call& c) : memory(8 * c.B * c.K + 4) {
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
    if (c.dbias && c.dbias.col == 0) splits = 1;  // all keys add to one column
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
    int64_t *owner = starts + count + 1, *group_of = owner + count;  // owner: where a group's bias gradient begins
    const bool shared = c.dbias && (c.dbias.head == 0 || SharesBiasBatch(c));
    for (int64_t head = 0; head < count; ++head) {
      int64_t g = groups;
      if (shared) {
        const int64_t own = c.dbias.batch[head / c.K] + head % c.K * c.G() * c.dbias.head;
        for (g = groups - 1; g >= 0 && owner[g] != own;) --g;  // mostly that of the head before, or K before
        if (g < 0) g = groups;
        owner[g] = own;
      }
      group_of[head] = g;
      groups = g < groups ? groups : g + 1;
    }
    for (int64_t g = 0; g <= groups; ++g) starts[g] = 0;
    for (int64_t head = 0; head < count; ++head) ++starts[group_of[head] + 1];
    for (int64_t g = 0; g < groups; ++g) starts[g + 1] += starts[g];
    int64_t* next = owner;
    for (int64_t g = 0; g < groups; ++g) next[g] = starts[g];
    for (int64_t head = 0; head < count; ++head) heads[next[group_of[head]]++] = head;
  }
};

template <bool kPairs>
struct BackwardScratch {
  float *q, *dout;            // rows of a block, as units
  float *q_panels, *dout_panels;
  float *p, *ds, *ds_rows;    // ds_rows: rows of ds as pairs
  float *slope, *keys_t, *values_t, *keys, *dk, *dv, *stage, *tmp, *m, *inverse, *delta, *dq;
  int32_t *lo, *hi, *block_lo, *block_hi;
  int64_t q_row, dout_row, s_row, half_row, dv_row;
  bool writes_all_bias;

  BackwardScratch(const Call& c, const BackwardPlan& plan, bool own_dq) {
    const int64_t kb = RoundUp(plan.key_block, kPanel), n = kBackwardRows, row_units = Units<kPairs>(n);
    writes_all_bias = c.dbias && WritesAllBias(c);
    q_row = RoundUp(Units<kPairs>(c.D), kLanes);
    dout_row = RoundUp(Units<kPairs>(c.Dv), kLanes);
    dv_row = Panels(c.Dv) * kPanel;
    s_row = kb + kLanes;
    half_row = kb / 2 + kLanes;
    const int64_t sizes[] = {n * q_row, n * dout_row, row_units * plan.dq_row, row_units * dv_row, n * s_row, n * s_row,
                             kPairs ? n * half_row : 0, s_row, kb * Units<kPairs>(c.D), kb * Units<kPairs>(c.Dv),
                             Units<kPairs>(kb) * plan.dq_row, kb * plan.dq_row, kb * dv_row, StageSize(c), kb,
                             plan.rows, plan.rows, plan.rows, own_dq ? plan.rows * plan.dq_row + 4 * plan.rows + kLanes : 0,
                             plan.rows, plan.rows, plan.row_blocks, plan.row_blocks};
    float* parts[23];
    TakeScratch(sizes, parts);
    float** const names[] = {&q, &dout, &q_panels, &dout_panels, &p, &ds, &ds_rows, &slope, &keys_t, &values_t,
                             &keys, &dk, &dv, &stage, &tmp, &m, &inverse, &delta, &dq};
    for (int i = 0; i < 19; ++i) *names[i] = parts[i];
    int32_t** const ints[] = {&lo, &hi, &block_lo, &block_hi};
    for (int i = 0; i < 4; ++i) *ints[i] = reinterpret_cast<int32_t*>(parts[19 + i]);
  }
};
