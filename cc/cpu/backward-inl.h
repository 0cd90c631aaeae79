// Backward from the saved softmax max and sum: dq, dk, dv, and sums for bias, ALiBi slopes, scale and soft cap.
//
//   p = exp(s - m) / l,  dp = keep / keep_prob (dout v^T),  ds = p (dp - delta),  delta = dout.out - dlogsumexp
//   dq = scale ds k,  dk = scale ds^T q,  dv = (keep / keep_prob p)^T dout,  dbias = ds,  dscale = ds q.k
//
// A gradient that is not wanted has no array, and its products and sums are left out.
//
// Key blocks are the outer loop: dk and dv of a block stay in L2 while all query rows pass; dq lies in a float
// buffer. A task is a range of keys, and of rows where there are few such, of all the key heads that share one bias gradient
// (without bias: of one head), so every sum has one owner and a fixed order, whatever the number of threads.
#pragma once

#include "call.h"
#include "cpu/ahead-inl.h"
#include "cpu/arrays-inl.h"
#include "cpu/backward_balance-inl.h"
#include "cpu/backward_block-inl.h"
#include "cpu/backward_plan-inl.h"
#include "cpu/backward_rows-inl.h"
#include "cpu/backward_sums-inl.h"
#include "cpu/key_sums-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/scratch-inl.h"
#include "cpu/turns-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Whether the query heads of a key head have the same scale, which its dk then takes at the end.
inline bool HaveOneScale(const Call& c, int64_t b, int64_t k) {
  for (int64_t n = k * c.G() + 1; n < (k + 1) * c.G(); ++n)
    if (ScaleOf(c, b, n) != ScaleOf(c, b, k * c.G())) return false;
  return true;
}

// Places for packed rows: see RowPlaces.
template <bool kPairs>
inline RowPlaces PlacesForRows(const Call& c, const BackwardPlan& plan, const BackwardScratch<kPairs>& s, int64_t b,
                               int64_t k, const HeadPart& part) {
  for (int64_t j0 = part.key0; j0 < part.key1 && plan.kept_blocks < plan.row_blocks; j0 += plan.key_block) {
    int64_t first = part.block1, last = 0;
    for (int64_t block = part.block0; block < part.block1; ++block) {
      const int64_t end = j0 + plan.key_block < part.key1 ? j0 + plan.key_block : part.key1;
      if (!SeesAny<kPairs>(c, plan, s, b, k, block, j0, end)) continue;
      first = block < first ? block : first;
      last = block;
    }
    if (last - first < plan.kept_blocks) continue;
    return {plan.kept_blocks, part.block1 - plan.kept_blocks + 1};  // under a causal mask most keys see the last rows
  }
  return {plan.kept_blocks, -1};
}

// Rows, their parts of dq and packed places, before the keys pass. Returns these places.
template <bool kPairs>
inline RowPlaces StartHead(const Call& c, const BackwardPlan& plan, const BackwardScratch<kPairs>& s, int64_t b,
                           int64_t k, const HeadPart& part, float* dq) {
  RangesOfRows<kPairs>(c, plan, s, b, k);
  const bool sinks = kPairs && c.sinks && !SumIsUnknown(c) && part.key0 == 0;  // counted once, by the first keys
  int32_t* const given = BlocksGiven<kPairs>(plan, dq);
  for (int64_t block = part.block0; block < part.block1; ++block) {
    const int64_t g0 = block * plan.block_rows;
    const int64_t rows = g0 + plan.block_rows < plan.rows ? plan.block_rows : plan.rows - g0;
    given[block] = SeesAny<kPairs>(c, plan, s, b, k, block, part.key0, part.key1);
    if (given[block] || sinks) PrepareRows<kPairs>(c, s, b, k, g0, rows);
    if (c.dquery && (given[block] || plan.splits == 1)) ClearRows(dq + g0 * plan.dq_row, rows, plan.dq_row, c.D);
    if constexpr (kPairs) {
      ClearBalance(BalanceOf(plan, dq), g0, rows);
      if (sinks) BalanceSinks(c, s, b, k, g0, rows, BalanceOf(plan, dq));
    }
  }
  for (int64_t place = 0; place < plan.kept_blocks; ++place) s.holds[place] = -1;
  return PlacesForRows<kPairs>(c, plan, s, b, k, part);
}

// What dk lacks: a scale that all heads of a key head have.
inline float KeyScale(const Call& c, int64_t b, int64_t k) {
  return HaveOneScale(c, b, k) ? ScaleOf(c, b, k * c.G()) : 1.0f;
}

// What a task touches after the products of a key head: its gradients, and what the thread's next head, or a number of all
// heads, begins with.
inline Ahead NextHead(const Call& c, const BackwardPlan& plan, int64_t head, int64_t next) {
  Ahead ahead;
  if (plan.splits * plan.row_splits > 1 || c.blocks) return ahead;
  const auto row = [](const View& x, int64_t width) { return x ? width * ItemSize(x.dtype) : 0; };
  const int64_t of_row =
      row(c.query, c.D) + row(c.dquery, c.D) + row(c.out, c.Dv) + row(c.rounding, c.Dv) + row(c.dout, c.Dv);
  const int64_t of_key = row(c.key, c.D) + row(c.value, c.Dv) + row(c.dkey, c.D) + row(c.dvalue, c.Dv);
  if (!AsksForNextHead(plan.rows * of_row + c.Skv * of_key, c.B * c.K)) return ahead;
  const int64_t G = c.G(), b = head / c.K, k = head % c.K, next_b = next / c.K, next_k = next % c.K;
  for (int64_t n = k * G; n < (k + 1) * G; ++n) ahead.Add(c.dquery, b, n, 0, c.Sq, c.D, true);
  ahead.Add(c.dkey, b, k, 0, c.Skv, c.D, true);
  ahead.Add(c.dvalue, b, k, 0, c.Skv, c.Dv, true);
  for (int64_t n = next_k * G; n < (next_k + 1) * G && next < c.B * c.K; ++n) {
    ahead.Add(c.dout, next_b, n, 0, c.Sq, c.Dv);
    ahead.Add(c.out, next_b, n, 0, c.Sq, c.Dv);
    ahead.Add(c.rounding, next_b, n, 0, c.Sq, c.Dv);
    ahead.Add(c.query, next_b, n, 0, c.Sq, c.D);
  }
  if (next < c.B * c.K) {
    ahead.Add(c.key, next_b, next_k, 0, c.Skv, c.D);
    ahead.Add(c.value, next_b, next_k, 0, c.Skv, c.Dv);
  }
  const int64_t row_tiles = plan.rows / kRows + 1, key_tiles = plan.row_blocks * (c.Skv / kRows + 1);
  const int64_t steps = (Panels(c.Skv) + Panels(c.D)) * row_tiles + (Panels(c.D) + Panels(c.Dv)) * key_tiles;
  ahead.Spread(IsMasked(c) ? steps / 2 : steps);
  return ahead;
}

template <bool kPairs>
inline void BackwardHead(const Call& c, const BackwardPlan& plan, const BackwardScratch<kPairs>& s, int64_t b,
                         int64_t k, const HeadPart& part, float* dq, const HeadSums& sums, Ahead* ahead) {
  const bool one_scale = HaveOneScale(c, b, k);
  RowTile tiles[kMostRows];
  int32_t lo[kMostRows], hi[kMostRows];
  const RowPlaces places = StartHead<kPairs>(c, plan, s, b, k, part, dq);
  for (int64_t j0 = part.key0; j0 < part.key1; j0 += plan.key_block) {
    const int64_t width = j0 + plan.key_block < part.key1 ? plan.key_block : part.key1 - j0;
    ClearRows(s.dk, width, plan.dq_row, c.D);
    ClearRows(s.dv, width, plan.dv_row, c.Dv);
    bool packed = false;
    for (int64_t block = part.block0; block < part.block1; ++block) {
      if (!SeesAny<kPairs>(c, plan, s, b, k, block, j0, j0 + width)) continue;
      if (!packed) {
        if (!IsDirect(c)) PackTransposed<kPairs>(c.key, c.D, b, k, j0, width, s.stage, s.keys_t);
        PackTransposed<kPairs>(c.value, c.Dv, b, k, j0, width, s.stage, s.values_t);
        if (c.dquery)
          PackClean<kPairs>(c.key, IsMasked(c), width, c.D, s.stage, s.keys,
                            [&](int64_t j) { return Row{b, k, j0 + j}; });
        packed = true;
      }
      const int64_t g0 = block * plan.block_rows,
                    rows = g0 + plan.block_rows < plan.rows ? plan.block_rows : plan.rows - g0;
      const RowRanges ranges = RangesIn(c, RowAt(c, b, k, g0), rows, j0, width, {s.lo + g0, s.hi + g0}, lo, hi);
      const int64_t count = MakeTiles(ranges, rows, j0, width, tiles);
      const RowBlock x = {
          b, k, g0, rows, j0, width, ranges, count, tiles, PackedRowsOf<kPairs>(plan, s, block, places), ahead};
      if (count > 0) BackwardBlock<kPairs>(c, plan, s, x, dq, one_scale, sums);
    }
    if (part.keys == nullptr) {
      StoreKeySums(c, plan.Keys(c), b, k, j0, width, s.dk, s.dv, KeyScale(c, b, k));
      continue;
    }
    const auto keep = [&](const float* from, int64_t row, float* to) {
      __builtin_memcpy(to + j0 * row, from, sizeof(float) * static_cast<size_t>(width * row));
    };
    keep(s.dk, plan.dq_row, part.keys);
    keep(s.dv, plan.dv_row, part.keys + plan.Keys(c).dv_at);
  }
}

// The rows [r0, r1) of dq of a key head, which then are complete.
template <bool kPairs>
inline void FinishQueries(const Call& c, const BackwardPlan& plan, int64_t b, int64_t k, int64_t r0, int64_t r1,
                          float* stage, float* dq) {
  if (!c.dquery || r0 >= r1) return;
  Row row = RowAt(c, b, k, r0);
  for (int64_t r = r0; r < r1; ++r, row = After(c, row)) {
    float* const of_row = dq + r * plan.dq_row;
    if constexpr (kPairs) AddMissing(c, row, k, BalanceOf(plan, dq), r, stage, of_row);
    StoreRow(of_row, ScaleOf(c, row), c.dquery.Bytes(b, row.n, row.i), c.dquery.dtype, c.dquery.col, c.D);
  }
}

// Adds the dq of another range of keys. Rows that neither has are left as they are.
template <bool kPairs>
inline void AddPart(const BackwardPlan& plan, float* part, float* total) {
  int32_t *const given = BlocksGiven<kPairs>(plan, part), *const there = BlocksGiven<kPairs>(plan, total);
  const int64_t size = plan.dq_size == 0 ? 0 : plan.block_rows * plan.dq_row;
  for (int64_t block = 0; block < plan.row_blocks; ++block) {
    if (!given[block]) continue;
    const int64_t end = (block + 1) * size < plan.dq_size ? (block + 1) * size : plan.dq_size;
    for (int64_t x = block * size; x < end; x += kLanes) {
      const F more = Load(part + x);
      Store(total + x, there[block] ? Load(total + x) + more : more);
    }
    there[block] = 1;
  }
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

// The dq of all ranges of keys in the place of the first.
template <bool kPairs>
inline void AddParts(const Call& c, const BackwardPlan& plan, float* total) {
  for (int64_t split = 1; split < plan.splits; ++split)
    AddPart<kPairs>(plan, total + split * PartSize<kPairs>(plan), total);
  if (!c.dquery) return;
  for (int64_t block = 0; block < plan.row_blocks; ++block) {
    const int64_t g0 = block * plan.block_rows;
    const int64_t rows = g0 + plan.block_rows < plan.rows ? plan.block_rows : plan.rows - g0;
    if (!BlocksGiven<kPairs>(plan, total)[block]) ClearRows(total + g0 * plan.dq_row, rows, plan.dq_row, c.D);
  }
}

// The gradients of slopes, scale and soft cap are overwritten.
template <bool kPairs>
void BackwardAs(const Call& c, const Runner& runner) {
  const BackwardPlan plan(c);
  const KeySums keys = plan.Keys(c);
  const int64_t heads = c.B * c.K, head_size = PartSize<kPairs>(plan), parts = plan.splits * plan.row_splits;
  const Buffer dq_parts(plan.splits > 1 ? heads * plan.splits * head_size : 0);  // per key head and range of keys
  const Buffer key_parts(plan.row_splits > 1 ? heads * plan.row_splits * keys.size : 0);
  const AllSums sums(c, parts);
  const BiasParts bias(c, runner, plan.groups);

  const bool large = head_size > kThreadFloats;
  const int64_t groups = plan.groups.count();
  const auto group_of = [&](int64_t at) {
    if (plan.groups.shared() || at >= groups) return at;
    const Turn turn = TurnAt(at, c.B, c.K, runner.threads);
    return turn.unit * c.K + turn.turn;
  };
  Run(runner, groups * parts, [&](int64_t task) {
    const int64_t group = group_of(task / parts), after = group_of(task / parts + runner.threads);
    const int64_t split = task % parts / plan.row_splits, row_split = task % plan.row_splits;
    const auto end = [](int64_t i, int64_t size, int64_t all) { return (i + 1) * size < all ? (i + 1) * size : all; };
    HeadPart part = {split * plan.split_keys, end(split, plan.split_keys, c.Skv), row_split * plan.split_blocks,
                     end(row_split, plan.split_blocks, plan.row_blocks), nullptr};
    const BackwardScratch<kPairs> s(c, plan, plan.splits == 1 && !large);
    const Buffer own_dq(plan.splits == 1 && large ? head_size : 0);
    const Call own = bias.Of(group);
    for (int64_t i = plan.groups.Begin(group); i < plan.groups.End(group); ++i) {
      const int64_t head = plan.groups.Head(i), b = head / c.K, k = head % c.K;
      float* dq = plan.splits > 1 ? dq_parts.get() + (head * plan.splits + split) * head_size
                  : large         ? own_dq.get()
                                  : s.dq;
      if (plan.row_splits > 1) part.keys = key_parts.get() + (head * plan.row_splits + row_split) * keys.size;
      const int64_t next = i + 1 < plan.groups.End(group) ? plan.groups.Head(i + 1)
                           : after < groups               ? plan.groups.Head(plan.groups.Begin(after))
                                                          : heads;
      Ahead ahead = NextHead(own, plan, head, next);
      BackwardHead<kPairs>(own, plan, s, b, k, part, dq, sums.Of(head, task % parts, i == plan.groups.Begin(group)),
                           &ahead);
      if (plan.splits > 1) continue;
      FinishQueries<kPairs>(c, plan, b, k, part.block0 * plan.block_rows,
                            end(part.block1 - 1, plan.block_rows, plan.rows), s.stage, dq);
    }
  });

  if (plan.splits > 1) {
    Run(runner, heads, [&](int64_t head) {
      float* total = dq_parts.get() + head * plan.splits * head_size;
      AddParts<kPairs>(c, plan, total);
      float* stage = nullptr;
      const ThreadParts scratch([&](Arena& arena) { stage = arena.Take(StageSize(c)); });
      FinishQueries<kPairs>(c, plan, head / c.K, head % c.K, 0, plan.rows, stage, total);
    });
  }
  if (plan.row_splits > 1)
    AddKeySums(c, keys, runner, key_parts.get(), [&](int64_t b, int64_t k) { return KeyScale(c, b, k); });
  bias.Add();
  sums.Store();
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
