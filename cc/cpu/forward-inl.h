// Forward: out, softmax max and sum (arXiv:2205.14135, 2307.08691).
//
// A task is a group of query rows of one key head; it walks the blocks of keys that are visible to any of its rows. Keys
// (transposed) and values are packed once for all tasks of a head, or by the one that takes all rows. Logits stay in the
// second cache, a panel of keys or a chunk of values in the first while all tiles of kRows rows pass, and tiles compute
// only visible panels.
// A row's result does not depend on how rows are grouped: blocks begin at multiples of the block size, and masked
// keys contribute exact zeros.
#pragma once

#include "call.h"
#include "cpu/ahead-inl.h"
#include "cpu/arrays-inl.h"
#include "cpu/direct-inl.h"
#include "cpu/forward_plan-inl.h"
#include "cpu/forward_results-inl.h"
#include "cpu/gemm-inl.h"
#include "cpu/narrow-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/pages-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/shared_blocks-inl.h"
#include "cpu/softmax-inl.h"
#include "cpu/turns-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

template <bool kPairs>
inline void PackBlock(const Call& c, int64_t b, int64_t k, int64_t j0, int64_t width, float* stage, Packed* to) {
  if (j0 >= c.Keys(b)) return;
  PackKeysOf<kPairs>(c, b, k, j0, j0, width, stage, to->keys);
  float* nan_marker = IsMasked(c) ? to->nan_marker : nullptr;
  if (!PackValuesOf<kPairs>(c, b, k, j0, j0, width, stage, nan_marker, to->values)) to->nan_marker = nullptr;
}

// Up to group_rows rows [g0, g0 + rows) of a task over one block of keys.
template <bool kPairs>
inline void ForwardGroup(const Call& c, const ForwardScratch<kPairs>& s, int64_t b, int64_t k, int64_t r0, int64_t g0,
                         int64_t rows, int64_t j0, int64_t width, const Packed& packed, Ahead* ahead) {
  const int64_t per = Unit<kPairs>::kElements, depth = Units<kPairs>(c.D), dv = Panels(c.Dv) * kPanel;
  RowTile tiles[kMostRows];
  const int64_t chunk = Chunk();
  int32_t lo[kMostRows], hi[kMostRows];
  const RowRanges ranges = RangesIn(c, RowAt(c, b, k, r0 + g0), rows, j0, width, {s.lo + g0, s.hi + g0}, lo, hi);
  const int64_t count = MakeTiles(ranges, rows, j0, width, tiles);
  const float* q = s.q + g0 * s.q_row;
  float* acc = s.acc + g0 * dv;
  for (int64_t p = 0; p < Panels(width); ++p) {
    for (int64_t t = 0; t < count; ++t) {
      const RowTile& tile = tiles[t];
      if (tile.to <= p * kPanel || tile.from >= (p + 1) * kPanel) continue;
      if (p + 1 < Panels(width)) Prefetch(packed.keys + (p + 1) * depth * kPanel, depth * kPanel, t, count);
      PrefetchLogits(c, RowAt(c, b, k, r0 + g0 + tile.r), tile.n, j0, p * kPanel, PanelEnd(p, width));
      ahead->Some();
      const int64_t from = tile.from - p * kPanel, to = tile.to - p * kPanel;
      GemmColumns<kPairs, false>({from > 0 ? from : 0, to < kPanel ? to : kPanel}, tile.n, depth, q + tile.r * s.q_row,
                                 s.q_row, 1, packed.keys + p * depth * kPanel, s.logits + tile.r * s.s_row + p * kPanel,
                                 s.s_row);
    }
  }
  int64_t first = width, last = 0;
  bool fresh[kMostRows];  // of each tile: whether its sums begin with this block
  for (int64_t t = 0; t < count; ++t) {
    RowTile& tile = tiles[t];
    const int64_t c0 = tile.from / kLanes * kLanes, c1 = RoundUp(tile.to, kLanes);
    const int64_t at = g0 + tile.r;
    ahead->Some();
    fresh[t] = true;
    for (int64_t r = 0; r < tile.n; ++r) fresh[t] = fresh[t] && s.l[at + r] == 0.0f;
    Softmax<kPairs>(
        c, RowAt(c, b, k, r0 + at), tile.n, j0, c0, c1, packed.nan_marker, s.tmp,
        {s.logits + tile.r * s.s_row, s.m + at, s.l + at, fresh[t] ? nullptr : acc + tile.r * dv, s.s_row, dv},
        [&](int64_t r) { return ranges.Within(tile.r + r, j0, width); });
    tile.from /= per;  // from here on in units
    tile.to = Units<kPairs>(tile.to);
    first = tile.from < first ? tile.from : first;
    last = tile.to > last ? tile.to : last;
  }
  const int64_t units = Units<kPairs>(width);
  for (int64_t p = 0; p < Panels(c.Dv); ++p) {
    for (int64_t u0 = first / chunk * chunk; u0 < last; u0 += chunk) {
      for (int64_t t = 0; t < count; ++t) {
        const RowTile& tile = tiles[t];
        const int64_t from = tile.from > u0 ? tile.from : u0, to = tile.to < u0 + chunk ? tile.to : u0 + chunk;
        if (from >= to) continue;
        ahead->Some();
        if (u0 + chunk < last) Prefetch(packed.values + (p * units + u0 + chunk) * kPanel, chunk * kPanel, t, count);
        const float *weights = s.logits + tile.r * s.s_row + from, *panel = packed.values + (p * units + from) * kPanel;
        float* const sums = acc + tile.r * dv + p * kPanel;
        const Columns columns{0, c.Dv - p * kPanel};
        if (fresh[t] && from == tile.from) {
          GemmColumns<kPairs, false>(columns, tile.n, to - from, weights, s.s_row, 1, panel, sums, dv);
        } else {
          GemmColumns<kPairs, true>(columns, tile.n, to - from, weights, s.s_row, 1, panel, sums, dv);
        }
      }
    }
  }
}

// Takes rows [r0, r0 + n) of key head k to the scratch, from its row `at` on, for keys [key0, key1). Returns the range
// of keys that are visible to any of them.
template <bool kPairs>
inline Range StartRows(const Call& c, const ForwardScratch<kPairs>& s, int64_t b, int64_t k, int64_t r0, int64_t n,
                       int64_t at, int64_t key0, int64_t key1) {
  Range all{key1, key0};
  Row row = RowAt(c, b, k, r0);
  for (int64_t r = 0; r < n; ++r, row = After(c, row)) {
    Range v = Visible(c, row);
    v = {v.lo > key0 ? v.lo : key0, v.hi < key1 ? v.hi : key1};
    s.lo[at + r] = static_cast<int32_t>(v.Empty() ? 0 : v.lo);
    s.hi[at + r] = static_cast<int32_t>(v.Empty() ? 0 : v.hi);
    if (!v.Empty()) {
      all.lo = v.lo < all.lo ? v.lo : all.lo;
      all.hi = v.hi > all.hi ? v.hi : all.hi;
    }
    CopyRow<kPairs>(c.query, b, row.n, row.i, c.D, s.q + (at + r) * s.q_row);
    s.m[at + r] = -kFloatMax;
    s.l[at + r] = 0.0f;
  }
  return all;
}

// What a task works on: its first key head, block of rows, and range of keys.
struct TaskPlace {
  int64_t head, block, split;
};

// Head by head, so that its keys stay in the cache, and last rows first: under a causal mask they are the longest. Where keys do
// not stay in any case, as a task takes all rows or rows see few keys, the heads of a batch entry take turns.
template <bool kPairs>
inline TaskPlace PlaceOf(const Call& c, const ForwardPlan<kPairs>& plan, int64_t task) {
  const int64_t turns = plan.few_keys || plan.blocks == 1 ? c.K / plan.task_heads : 1;
  const int64_t units = c.B * c.K / plan.task_heads * plan.blocks / turns;
  const Turn at = TurnAt(task / plan.splits, units, turns, plan.threads);
  return {(at.unit / plan.blocks * turns + at.turn) * plan.task_heads, plan.blocks - 1 - at.unit % plan.blocks,
          task % plan.splits};
}

// What a task that packs keys and values itself touches after those before `from`, of which `to` is the end: its next
// block of them, or its rows of the output and what its thread's next task begins with.
template <bool kPairs>
inline Ahead NextRows(const Call& c, const ForwardPlan<kPairs>& plan, int64_t task, int64_t b, int64_t k, int64_t r0,
                      int64_t n, int64_t from, int64_t to) {
  Ahead ahead;
  if (c.pages || c.blocks) return ahead;
  const auto keys = [&](int64_t b, int64_t k, int64_t j0) {
    const int64_t n = j0 + plan.key_block < c.Skv ? plan.key_block : c.Skv - j0;
    ahead.Add(c.key, b, k, j0, n, c.D);
    ahead.Add(c.value, b, k, j0, n, c.Dv);
  };
  if (plan.shared) {
    if (from < to || c.G() != 1) return ahead;
    if (const int64_t next = r0 - plan.threads * plan.task_rows; next >= 0)
      ahead.Add(c.query, b, k, next, plan.task_rows, c.D);
    ahead.Add(c.out, b, k, r0, n, c.Dv, true);
    return ahead;
  }
  if (from < to) {
    keys(b, k, from);
  } else if (plan.splits == 1 && (plan.blocks == 1 || plan.few_keys)) {
    if (c.G() == 1) ahead.Add(c.out, b, k, r0, n, c.Dv, true);
    task += plan.threads;
    if (task >= plan.blocks * c.B * c.K) return ahead;
    const TaskPlace next = PlaceOf(c, plan, task);
    b = next.head / c.K, k = next.head % c.K, r0 = next.block * plan.task_rows;
    if (c.G() == 1) ahead.Add(c.query, b, k, r0, r0 + plan.task_rows < c.Sq ? plan.task_rows : c.Sq - r0, c.D);
    keys(b, k, Visible(c, RowAt(c, b, k, r0)).lo / plan.key_block * plan.key_block);
  }
  return ahead;
}

// How often ForwardGroup asks ahead in the products of n rows with keys j0 + [0, width), about: a mask leaves out some.
template <bool kPairs>
inline int64_t AsksOf(const Call& c, const ForwardScratch<kPairs>& s, int64_t n, int64_t j0, int64_t width) {
  const RowRanges ranges{s.lo, s.hi};
  const int64_t chunk = Chunk() * Unit<kPairs>::kElements;
  int64_t asks = 0;
  for (int64_t r = 0; r < n; r += kTileRows) {
    const Range v = ranges.Within(r + kTileRows < n ? r + kTileRows - 1 : n - 1, j0, width);
    if (v.Empty()) continue;
    asks += Panels(v.hi) - v.lo / kPanel + Panels(c.Dv) * ((v.hi - 1) / chunk + 1 - v.lo / chunk) + 1;
  }
  return asks;
}

// Rows [r0, r0 + n) of key head k of batch entry b over keys [key0, key1). Leaves the unnormalized output, max and sum
// in the scratch. `block_at(j)` gives the shared packed block of keys from j on.
template <bool kPairs, typename BlockAt>
inline void ForwardRows(const Call& c, const ForwardPlan<kPairs>& plan, const ForwardScratch<kPairs>& s, int64_t task,
                        int64_t b, int64_t k, int64_t r0, int64_t n, int64_t key0, int64_t key1,
                        const BlockAt& block_at) {
  const Range all = StartRows<kPairs>(c, s, b, k, r0, n, 0, key0, key1);
  if (all.Empty()) return;
  for (int64_t j0 = all.lo / plan.key_block * plan.key_block; j0 < all.hi; j0 += plan.key_block) {
    const int64_t width = (j0 + plan.key_block < c.Skv ? j0 + plan.key_block : c.Skv) - j0;
    if (!SeesBlocks(c, b, k, r0, n, j0, j0 + width)) continue;
    Packed packed = plan.shared ? block_at(j0) : s.own;
    if (!plan.shared) PackBlock<kPairs>(c, b, k, j0, width, s.stage, &packed);
    Ahead ahead = NextRows(c, plan, task, b, k, r0, n, j0 + width, all.hi);
    ahead.Spread(AsksOf<kPairs>(c, s, n, j0, width));
    for (int64_t g0 = 0; g0 < n; g0 += plan.group_rows)
      ForwardGroup<kPairs>(c, s, b, k, r0, g0, g0 + plan.group_rows < n ? plan.group_rows : n - g0, j0, width, packed,
                           &ahead);
  }
}

// The ranges of n rows of each key head in keys j0 + [0, width); of a mask by blocks, `all` becomes those of any of them.
template <bool kPairs>
inline RowRanges DirectRanges(const Call& c, const ForwardScratch<kPairs>& s, int64_t b, int64_t n, int64_t j0,
                              int64_t width, Range* all) {
  if (!c.blocks) return {s.lo, s.hi};
  *all = {j0 + width, j0};
  for (int64_t k = 0; k < c.K; ++k)
    RangesIn(c, RowAt(c, b, k, 0), n, j0, width, {s.lo + k * n, s.hi + k * n}, s.block_lo + k * n, s.block_hi + k * n);
  for (int64_t r = 0; r < c.K * n; ++r) {
    if (s.block_lo[r] >= s.block_hi[r]) continue;
    all->lo = s.block_lo[r] < all->lo ? s.block_lo[r] : all->lo;
    all->hi = s.block_hi[r] > all->hi ? s.block_hi[r] : all->hi;
  }
  return {s.block_lo, s.block_hi};
}

// The same for few rows, or some: those of all key heads, one after the other in the scratch.
template <bool kPairs>
inline void DirectRows(const Call& c, const ForwardPlan<kPairs>& plan, const ForwardScratch<kPairs>& s, int64_t b,
                       int64_t key0, int64_t key1) {
  const int64_t n = plan.rows;
  Range all{key1, key0};
  Fill(s.zeros, 0, c.Dv, 0.0f);
  Fill(s.acc, 0, c.K * n * Panels(c.Dv) * kPanel, 0.0f);
  for (int64_t k = 0; k < c.K; ++k) {
    const Range visible = StartRows<kPairs>(c, s, b, k, 0, n, k * n, key0, key1);
    all.lo = visible.lo < all.lo ? visible.lo : all.lo;
    all.hi = visible.hi > all.hi ? visible.hi : all.hi;
  }
  if (plan.narrow) PackNarrow(c, s, n);
  for (int64_t j0 = key0; j0 < key1; j0 += plan.key_block) {
    const int64_t width = j0 + plan.key_block < key1 ? plan.key_block : key1 - j0;
    const RowRanges ranges = DirectRanges(c, s, b, n, j0, width, &all);
    const int64_t first = all.lo > j0 ? all.lo - j0 : 0, last = all.hi < j0 + width ? all.hi - j0 : width;
    if (first >= last) continue;
    if (plan.narrow) {
      NarrowBlock<kPairs>{c, s, b, n, j0 + first, last - first, j0 + last < all.hi ? plan.key_block : 0}.Run();
      continue;
    }
    DirectBlock<kPairs>{c, s, ranges, b, n, j0, width, first, last}.Run();
  }
}

// Rows of a key head (of all, for few rows) and a range of keys.
template <bool kPairs>
inline void ForwardTask(const Call& c, const ForwardPlan<kPairs>& plan, const SharedBlocks<Packed>& shared,
                        const Partials<kPairs>& partials, int64_t task) {
  const TaskPlace place = PlaceOf(c, plan, task);
  const int64_t head = place.head, split = place.split, b = head / c.K, k = head % c.K;
  if (split >= plan.SplitsOf(c, b)) return;
  const ForwardScratch<kPairs> s(c, plan);
  const int64_t r0 = place.block * plan.task_rows,
                n = r0 + plan.task_rows < plan.rows ? plan.task_rows : plan.rows - r0;
  const int64_t key0 = split * plan.split_keys;
  const int64_t key1 = plan.splits == 1 || key0 + plan.split_keys > c.Skv ? c.Skv : key0 + plan.split_keys;
  if (plan.direct) {
    DirectRows<kPairs>(c, plan, s, b, key0, key1);
  } else {
    ForwardRows<kPairs>(c, plan, s, task, b, k, r0, n, key0, key1, [&](int64_t j0) { return shared.At(head, j0); });
  }
  const int64_t dv = Panels(c.Dv) * kPanel;
  for (int64_t h = 0; h < plan.task_heads; ++h) {
    const int64_t at = h * n;
    if (plan.splits == 1) {
      FinishRows(c, RowAt(c, b, k + h, r0), n, s.acc + at * dv, dv, s.m + at, s.l + at);
      continue;
    }
    for (int64_t r = 0; r < n; ++r)
      partials.Keep(head + h, split, r0 + r, s.acc + (at + r) * dv, s.m[at + r], s.l[at + r]);
  }
}

template <bool kPairs>
void ForwardAs(const Call& c, const Runner& runner) {
  const ForwardPlan<kPairs> plan(c, runner.threads);
  const Partials<kPairs> partials(c, plan);
  const SharedBlocks<Packed> shared(c, 0, plan.shared ? c.B * c.K : 0, plan.key_block, plan.BlockSize(),
                                    [&](float* memory) { return plan.Place(memory); });
  shared.Pack(c, runner, [&](int64_t b, int64_t k, int64_t j0, int64_t width, float* stage, Packed* to) {
    PackBlock<kPairs>(c, b, k, j0, width, stage, to);
  });
  const int64_t groups = c.B * c.K / plan.task_heads;
  Run(runner, groups * plan.blocks * plan.splits,
      [&](int64_t task) { ForwardTask<kPairs>(c, plan, shared, partials, task); });
  if (plan.splits > 1) partials.Merge(c, runner);
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
