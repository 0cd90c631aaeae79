// How the forward is cut into tasks and blocks, and where a task keeps what it works on.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/scratch-inl.h"
#include "cpu/simd-inl.h"
#include "cpu/tuning.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Some rows, plain, of many keys that products can take in place: see narrow-inl.h.
inline bool IsNarrow(const Call& c) {
  const bool pairs = InPairs(c), floats = c.key.dtype == DType::kF32 && c.value.dtype == DType::kF32;
  if (pairs && (kHasMatrix || c.D % 2 != 0 || c.key.row % 2 != 0)) return false;
  const int64_t rows = c.G() * c.Sq;
  return rows > (floats ? FewestNarrow(kTarget) : kDirectRows) && rows <= kNarrowRows && c.Skv >= kNarrowSpan &&
         !c.pages && AreWeightsPlain(c) && c.key.col == 1 && c.value.col == 1;
}

// Whether rows see few of the keys, by some of them: a window, or documents. (Only how work is cut depends on it.)
inline bool SeesFewKeys(const Call& c) {
  if (!c.lower && !c.upper) return false;
  constexpr int64_t kSamples = 64;
  const int64_t all = c.B * c.N * c.Sq, step = all > kSamples ? all / kSamples : 1;
  int64_t count = 0, keys = 0;
  for (int64_t at = step / 2; at < all; at += step, ++count) {
    const Range v = Visible(c, {at / (c.N * c.Sq), at / c.Sq % c.N, at % c.Sq});
    keys += v.Empty() ? 0 : v.hi - v.lo;
  }
  return keys * kFewKeys <= count * c.Skv;
}

// Keys of a block whose keys and values of all heads stay in the second cache beside those of the next one.
inline int64_t NarrowKeys(const Call& c) {
  int64_t keys = kDirectKeys;
  const int64_t bytes = c.K * (c.D + c.Dv) * (InPairs(c) ? 2 : 4);  // as the products take them
  while (keys > kLeastNarrowKeys && keys * bytes > kNarrowBytes) keys /= 2;
  return keys;
}

// Keys and values of a block as the products take them. `nan_marker` as in PackValues, or null.
struct Packed {
  float *keys, *values, *nan_marker;
};

template <bool kPairs>
struct ForwardPlan {
  int64_t rows;               // query rows of a key head, over all heads of its group
  int64_t group_rows;         // rows whose logits are kept together
  int64_t task_rows, blocks;  // rows of a task, tasks of a key head and split
  int64_t key_block, key_blocks;
  int64_t splits, split_keys;      // key ranges whose partial results are merged
  int64_t keys_size, values_size;  // floats of a packed block
  bool direct, narrow;             // few rows, or some: keys and values are read in place
  bool few_keys;                   // the rows of a task see few of them: it packs what they see
  int64_t task_heads;              // key heads of a task
  bool shared;                     // packed once for all tasks
  int64_t threads;

  ForwardPlan(const Call& c, int64_t threads) : threads(threads) {
    const Tiles& tiles = TilesInUse();
    rows = c.G() * c.Sq;
    group_rows = AlignedRows(c, tiles.group_rows);
    const int64_t wide = c.D > c.Dv ? c.D : c.Dv;
    narrow = IsNarrow(c);
    direct = narrow || IsDirect(c);
    key_block = narrow ? NarrowKeys(c) : direct ? kDirectKeys : AlignedKeys(c, KeysOf(tiles.forward_keys, wide));
    key_blocks = (c.Skv + key_block - 1) / key_block;
    keys_size = RoundUp(key_block, kPanel) * (narrow ? RoundUp(c.D, kLanes) : Units<kPairs>(c.D));
    values_size = Panels(c.Dv) * kPanel * Units<kPairs>(key_block);
    const int64_t heads = c.B * c.K;
    task_heads = direct ? c.K : 1;
    few_keys = !direct && !c.blocks && SeesFewKeys(c);
    task_rows = direct ? kNarrowRows : few_keys ? kFewKeysTaskRows : TaskRows(c, group_rows);
    const bool paged = c.pages && rows <= kMostSplitRows, whole = paged || direct;
    // Few rows (decoding): several tasks share the keys. The split depends on the shape alone.
    const bool several = rows > kSplitRows && !paged;
    const int64_t tasks = heads / task_heads * (several ? (rows + kSplitRows - 1) / kSplitRows : 1);
    const int64_t enough = several ? kEnoughTasks / 2 : kEnoughTasks;
    splits = tasks == 0 || tasks >= enough || rows > kMostSplitRows ? 1 : (kFewTasks + tasks - 1) / tasks;
    if (paged) splits = PagedSplits(c, splits);
    const int64_t most = c.Skv / kSplitKeys;
    splits = splits < most ? splits : most;
    splits = splits > 1 ? splits : 1;
    split_keys = (key_blocks + splits - 1) / splits * key_block;
    splits = split_keys > 0 ? (c.Skv + split_keys - 1) / split_keys : 1;
    splits = splits > 1 ? splits : 1;
    if (!whole && rows <= kWholeRows && heads * splits >= kThreadHeads * threads) {
      task_rows = kWholeRows;
    } else {
      while (!whole && task_rows > group_rows &&
             heads * splits * ((rows + task_rows - 1) / task_rows) < kThreadTasks * threads)
        task_rows /= 2;
    }
    blocks = (rows + task_rows - 1) / task_rows;
    if (blocks > 1 && !c.blocks) task_rows = RoundUp((rows + blocks - 1) / blocks, kRows);
    shared = !direct && !few_keys && blocks > 1 && heads * key_blocks * BlockSize() <= kSharedFloats;
  }

  // Of which a row takes so many floats: the output, then max and sum.
  static int64_t PartRow(const Call& c) { return Panels(c.Dv) * kPanel + kLanes; }

  // At least `splits`.
  int64_t PagedSplits(const Call& c, int64_t splits) const {
    const int64_t wanted = (c.Skv + kPagedSplitKeys - 1) / kPagedSplitKeys;
    const int64_t part = c.B * c.K * rows * PartRow(c), most = part > 0 ? kPagedPartFloats / part : 1;
    const int64_t found = wanted < most ? wanted : most;
    return found > splits ? found : splits;
  }

  // Those that hold keys of a batch entry; the first one always does.
  int64_t SplitsOf(const Call& c, int64_t b) const {
    const int64_t n = splits > 1 ? (c.Keys(b) + split_keys - 1) / split_keys : 1;
    return n > 1 ? n : 1;
  }

  // Floats of a packed block, and where its parts lie.
  int64_t BlockSize() const { return keys_size + values_size + key_block; }
  Packed Place(float* memory) const { return {memory, memory + keys_size, memory + keys_size + values_size}; }
};

template <bool kPairs>
struct ForwardScratch {
  float *q, *acc, *m, *l, *logits, *stage, *tmp;
  Packed own;
  float *sums, *before_m, *before_l, *zeros;  // of few rows: see DirectBlock
  int64_t *key_at, *value_at;
  float *key_scale, *value_scale;
  float *q_panels, *weights;  // of some rows: see NarrowBlock
  int32_t *lo, *hi;
  int32_t *block_lo, *block_hi;  // ... in one block of keys, of few rows and a mask by blocks
  int64_t q_row, s_row;

  ForwardScratch(const Call& c, const ForwardPlan<kPairs>& plan)
      : memory([&](Arena& arena) { Place(c, plan, arena); }) {}

 private:
  void Place(const Call& c, const ForwardPlan<kPairs>& plan, Arena& arena) {
    const int64_t n = plan.direct ? plan.rows * plan.task_heads : plan.task_rows;
    const int64_t kb = RoundUp(plan.key_block, kPanel), dv = Panels(c.Dv) * kPanel;
    q_row = Units<kPairs>(c.D);
    s_row = kb + kLanes;  // padded, so that rows do not meet in one cache set
    q = arena.Take(n * q_row);
    acc = arena.Take(n * dv);
    m = arena.Take(n);
    l = arena.Take(n);
    logits = arena.Take(plan.narrow ? 0 : (n > plan.group_rows ? n : plan.group_rows) * s_row);
    stage = arena.Take(StageSize(c));
    tmp = arena.Take(kb);
    own.keys = arena.Take(plan.shared || (plan.direct && !plan.narrow) ? 0 : plan.keys_size);
    own.values = arena.Take(plan.shared ? 0 : plan.values_size);
    own.nan_marker = arena.Take(kb);
    const int64_t few = plan.direct ? n : 0;
    sums = arena.Take(few * dv);
    before_m = arena.Take(few);
    before_l = arena.Take(few);
    zeros = arena.Take(plan.direct ? c.Dv : 0);
    key_at = arena.Take<int64_t>(plan.direct ? kb : 0);
    value_at = arena.Take<int64_t>(plan.direct ? kb : 0);
    key_scale = arena.Take(plan.direct && c.key_scale ? c.K * kb : 0);
    value_scale = arena.Take(plan.direct && c.value_scale ? c.K * kb : 0);
    const int64_t some = plan.narrow ? Panels(plan.rows) * kPanel : 0;
    q_panels = arena.Take(some * c.K * c.D);
    weights = arena.Take(some * plan.key_block);
    lo = arena.Take<int32_t>(n);
    hi = arena.Take<int32_t>(n);
    block_lo = arena.Take<int32_t>(c.blocks ? few : 0);
    block_hi = arena.Take<int32_t>(c.blocks ? few : 0);
  }

  const ThreadParts memory;  // the last member, as it fills in those above
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
