// How tangents are cut into tasks and blocks, and where a task keeps what it works on.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/scratch-inl.h"
#include "cpu/simd-inl.h"
#include "cpu/tangent_rows-inl.h"
#include "cpu/tuning.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// A block of keys as the products take it; what they do not take is null. The markers as in PackValues, or null.
struct TangentBlock {
  float *keys, *key_tangents, *values, *value_tangents, *nan_marker, *tangent_marker;
};

struct TangentPlan {
  int64_t rows;               // query rows of a key head, over all heads of its group
  int64_t group_rows;         // rows whose logits are kept together
  int64_t task_rows, blocks;  // rows of a task, tasks of a key head
  int64_t key_block;
  int64_t keys_size, values_size;  // floats of an array of a packed block
  bool logits;                     // whether logits have tangents
  bool sums;                       // whether sums of w v are kept, which the center moves by
  bool values;                     // whether products take values
  bool key_tangents, value_tangents;
  int64_t wave;  // key heads whose tasks run together: so many that their blocks may be shared
  bool shared;   // packed once for all tasks

  TangentPlan(const Call& c, int64_t threads) {
    const Tiles& tiles = TilesInUse();
    rows = c.G() * c.Sq;
    group_rows = AlignedRows(c, tiles.tangent_rows);
    key_block = AlignedKeys(c, KeysOf(tiles.forward_keys, c.D > c.Dv ? c.D : c.Dv));
    keys_size = RoundUp(key_block, kPanel) * c.D;
    values_size = Panels(c.Dv) * kPanel * key_block;
    logits = MovesLogits(c);
    sums = c.with_forward || MovesByPlace(c);
    values = logits || c.with_forward;
    key_tangents = bool{c.key_tangent};
    value_tangents = bool{c.value_tangent};
    const int64_t heads = c.B * c.K, head_size = (c.Skv + key_block - 1) / key_block * BlockSize();
    shared = rows > group_rows && head_size > 0 && head_size <= kTangentSharedFloats;
    const int64_t most = shared ? kTangentSharedFloats / head_size : heads;
    const int64_t waves = heads > 0 ? (heads + most - 1) / most : 1;
    wave = (heads + waves - 1) / waves;
    task_rows = TaskRows(c, group_rows);
    while (task_rows > group_rows && wave * ((rows + task_rows - 1) / task_rows) < kThreadTasks * threads)
      task_rows /= 2;
    blocks = (rows + task_rows - 1) / task_rows;
  }

  // Floats of a packed block, and where its parts lie.
  int64_t BlockSize() const {
    return (key_tangents ? 2 : 1) * keys_size + (values + value_tangents) * values_size + 2 * key_block;
  }
  TangentBlock Place(float* memory) const {
    const auto take = [&](bool wanted, int64_t size) {
      float* const part = wanted ? memory : nullptr;
      memory += wanted ? size : 0;
      return part;
    };
    TangentBlock block{};
    block.keys = take(true, keys_size);
    block.key_tangents = take(key_tangents, keys_size);
    block.values = take(values, values_size);
    block.value_tangents = take(value_tangents, values_size);
    block.nan_marker = take(true, key_block);
    block.tangent_marker = take(true, key_block);
    return block;
  }
};

struct TangentScratch {
  float *q, *q_tangent;                // rows of a task
  float *acc, *acc_tangent;            // sums of w v, and of w (T - center) v + w e; w are weights without 1 / l
  float *m, *l, *center, *moved;       // of each row; the last one: the sum of w (T - center)
  float* centered;                     // ... and that of w which the center is the mean of
  float *logits, *tangents;            // rows of a group: products, then weights, and those times T - center
  float *by_x, *by_cap, *stage, *tmp;  // of one row
  float* block;                        // of a packed block, if not shared
  int32_t *lo, *hi;                    // visible keys of each row
  int64_t out_row, s_row;

  TangentScratch(const Call& c, const TangentPlan& plan) : memory([&](Arena& arena) { Place(c, plan, arena); }) {}

 private:
  void Place(const Call& c, const TangentPlan& plan, Arena& arena) {
    const int64_t n = plan.task_rows, kb = RoundUp(plan.key_block, kPanel);
    out_row = Panels(c.Dv) * kPanel;
    s_row = kb + kLanes;  // padded, so that rows do not meet in one cache set
    q = arena.Take(n * c.D);
    q_tangent = arena.Take(c.query_tangent ? n * c.D : 0);
    acc = arena.Take(plan.sums ? n * out_row : 0);
    acc_tangent = arena.Take(n * out_row);
    m = arena.Take(n);
    l = arena.Take(n);
    center = arena.Take(n);
    centered = arena.Take(n);
    moved = arena.Take(n);
    logits = arena.Take(plan.group_rows * s_row);
    tangents = arena.Take(plan.logits ? plan.group_rows * s_row : 0);
    by_x = arena.Take(kb);
    by_cap = arena.Take(kb);
    stage = arena.Take(StageSize(c));
    tmp = arena.Take(kb);
    block = arena.Take(plan.shared ? 0 : plan.BlockSize());
    lo = arena.Take<int32_t>(n);
    hi = arena.Take<int32_t>(n);
  }

  const ThreadParts memory;  // the last member, as it fills in those above
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
