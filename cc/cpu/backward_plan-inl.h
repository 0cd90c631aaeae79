// How the backward is cut into tasks and blocks, and where a task keeps what it works on.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/bias_parts-inl.h"
#include "cpu/groups-inl.h"
#include "cpu/key_sums-inl.h"
#include "cpu/scratch-inl.h"
#include "cpu/simd-inl.h"
#include "cpu/tuning.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

struct BackwardPlan {
  int64_t rows, block_rows, row_blocks, key_block, dq_row, dv_row;
  int64_t splits, split_keys;        // ranges of keys
  int64_t row_splits, split_blocks;  // ... and of blocks of rows, each with a dk and a dv of its own
  int64_t dq_size;                   // floats of the dq of a key head; 0 where it is not wanted
  int64_t kept_blocks;               // of rows of query and dout that there is room for in packed form
  HeadGroups groups;

  explicit BackwardPlan(const Call& c) : groups(c) {
    const Tiles& tiles = TilesInUse();
    rows = c.G() * c.Sq;
    block_rows = AlignedRows(c, tiles.backward_rows);
    const int64_t wide = c.D > c.Dv ? c.D : c.Dv;
    key_block = AlignedKeys(c, KeysOf(tiles.backward_keys, wide));
    dq_row = Panels(c.D) * kPanel;
    dv_row = Panels(c.Dv) * kPanel;
    dq_size = c.dquery ? rows * dq_row : 0;
    row_blocks = (rows + block_rows - 1) / block_rows;
    kept_blocks = kKeptRowFloats / (block_rows * 4 * RoundUp(wide, kPanel));
    kept_blocks = kept_blocks < row_blocks ? kept_blocks : row_blocks;
    kept_blocks = kept_blocks > 1 ? kept_blocks : 1;
    const int64_t key_blocks = (c.Skv + key_block - 1) / key_block;
    const int64_t dq_bytes = c.B * c.K * rows * dq_row * 4 + 1;
    const int64_t count = groups.count();
    splits = count >= kBackwardTasks ? 1 : (kBackwardTasks + count - 1) / (count > 0 ? count : 1);
    const int64_t affordable = kSplitBytes / dq_bytes, least = count > 0 ? kLeastBackwardTasks / count : 1;
    const int64_t most = affordable > least ? affordable : least;
    splits = splits < most ? splits : most;
    if (c.dbias && (c.dbias.col == 0 || c.bias_offset)) splits = 1;  // different keys add to one element
    splits = splits < key_blocks ? splits : key_blocks;
    splits = splits < 1 ? 1 : splits;
    split_keys = (key_blocks + splits - 1) / splits * key_block;
    splits = split_keys > 0 ? (c.Skv + split_keys - 1) / split_keys : 1;
    splits = splits < 1 ? 1 : splits;
    CutGroups(c, kBackwardTasks / splits, kLeastHeads, &groups);
    const int64_t tasks = count * splits, wanted = c.dbias || tasks == 0 ? 1 : kFewBackwardTasks / tasks;
    split_blocks = wanted > 1 ? (row_blocks + wanted - 1) / wanted : row_blocks;
    row_splits = split_blocks > 0 ? (row_blocks + split_blocks - 1) / split_blocks : 1;
  }

  // Of the ranges of rows.
  KeySums Keys(const Call& c) const {
    return {dq_row, dv_row, c.Skv * dq_row, c.Skv * (dq_row + dv_row), row_splits, key_block};
  }
};

// The part of a key head that is a task's: keys [key0, key1) and blocks of rows [block0, block1). `keys`: where dk and dv go,
// or null, straight to the results.
struct HeadPart {
  int64_t key0, key1, block0, block1;
  float* keys;
};

// Floats behind the dq of a key head (see Balance).
template <bool kPairs>
inline int64_t BalanceSize(const BackwardPlan& plan) {
  return kPairs ? RoundUp(3 * plan.rows, kLanes) : 0;
}

// The part of dq that some keys give: of which blocks of rows there is any. Stored behind the Balance.
template <bool kPairs>
inline int32_t* BlocksGiven(const BackwardPlan& plan, float* dq) {
  return reinterpret_cast<int32_t*>(dq + plan.dq_size + BalanceSize<kPairs>(plan));
}

// Floats of a dq with what is behind it.
template <bool kPairs>
inline int64_t PartSize(const BackwardPlan& plan) {
  return plan.dq_size + BalanceSize<kPairs>(plan) + RoundUp(plan.row_blocks, kLanes);
}

// What gradients of a row are made with.
struct GradientRows {
  float *slope, *by_cap, *products;  // of one row: derivatives of the soft cap, products q.k
  float* tmp;                        // ... of keep factors or bias
  float* stage;                      // rows on their way
  float *m, *inverse, *delta;        // of all rows: see PrepareRows
};

template <bool kPairs>
struct BackwardScratch : GradientRows {
  float *q, *dout;                         // rows of some blocks, as units
  float *q_panels, *dout_panels;           // ... and as panels
  int32_t* holds;                          // ... and which blocks these are, or -1
  float *p, *ds, *ds_rows;                 // rows of logits, then weights, and of ds; ds_rows: those of ds as pairs
  float *keys_t, *values_t, *keys;         // a block of keys and values, packed
  float *dk, *dv;                          // ... and its gradients
  float* dq;                               // of all rows, and their Balance
  int32_t *lo, *hi, *block_lo, *block_hi;  // visible keys of all rows, and of blocks of rows
  int64_t q_row, dout_row, s_row, half_row;

  BackwardScratch(const Call& c, const BackwardPlan& plan, bool own_dq)
      : memory([&](Arena& arena) { Place(c, plan, own_dq, arena); }) {}

 private:
  void Place(const Call& c, const BackwardPlan& plan, bool own_dq, Arena& arena) {
    const int64_t kb = RoundUp(plan.key_block, kPanel), n = plan.block_rows, row_units = Units<kPairs>(n);
    q_row = RoundUp(Units<kPairs>(c.D), kLanes);
    dout_row = RoundUp(Units<kPairs>(c.Dv), kLanes);
    s_row = kb + kLanes;
    half_row = kb / 2 + kLanes;
    const int64_t kept = plan.kept_blocks;
    q = arena.Take(kept * n * q_row);
    dout = arena.Take(kept * n * dout_row);
    q_panels = arena.Take(kept * row_units * plan.dq_row);
    dout_panels = arena.Take(kept * row_units * plan.dv_row);
    holds = arena.Take<int32_t>(kept);
    p = arena.Take(n * s_row);
    ds = arena.Take(n * s_row);
    ds_rows = arena.Take(kPairs ? n * half_row : 0);
    slope = arena.Take(s_row);
    by_cap = arena.Take(c.dsoft_cap ? s_row : 0);
    products = arena.Take(c.dscale ? s_row : 0);
    keys_t = arena.Take(kb * Units<kPairs>(c.D));
    values_t = arena.Take(kb * Units<kPairs>(c.Dv));
    keys = arena.Take(Units<kPairs>(kb) * plan.dq_row);
    dk = arena.Take(kb * plan.dq_row);
    dv = arena.Take(kb * plan.dv_row);
    stage = arena.Take(StageSize(c));
    tmp = arena.Take(kb);
    m = arena.Take(plan.rows);
    inverse = arena.Take(plan.rows);
    delta = arena.Take(plan.rows);
    dq = arena.Take(own_dq ? PartSize<kPairs>(plan) : 0);
    lo = arena.Take<int32_t>(plan.rows);
    hi = arena.Take<int32_t>(plan.rows);
    block_lo = arena.Take<int32_t>(plan.row_blocks);
    block_hi = arena.Take<int32_t>(plan.row_blocks);
  }

  const ThreadParts memory;  // the last member, as it fills in those above
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
