// Backward from the saved softmax max and sum: dq, dk, dv, and sums for bias, ALiBi slopes, scale and soft cap.
//
//   p = exp(s - m) / l,  dp = keep / keep_prob (dout v^T),  ds = p (dp - delta),  delta = dout.out - dlogsumexp
//   dq = scale ds k,  dk = scale ds^T q,  dv = (keep / keep_prob p)^T dout,  dbias = ds,  dscale = ds q.k
//
// Key blocks are the outer loop: dk and dv of a block stay in L2 while all query rows pass; dq lies in a float
// buffer. A task is a range of keys of all the key heads that share one bias gradient (without bias: of one
// head), so every sum has one owner and a fixed order, whatever the number of threads.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/backward_balance-inl.h"
#include "cpu/backward_plan-inl.h"
#include "cpu/backward_rows-inl.h"
#include "cpu/backward_sums-inl.h"
#include "cpu/direct-inl.h"
#include "cpu/gemm-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/rows-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

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

// dk and dv of a block: tiles of kRows keys, over the rows to which any of them is visible, a chunk of rows at a time.
template <bool kPairs>
inline void KeyGradients(const Call& c, const BackwardPlan& plan, const BackwardScratch<kPairs>& s, int64_t rows,
                         int64_t width, const RowTile* tiles, int64_t count) {
  constexpr int64_t kMostParts = kMostBackwardKeys / kRows + 1;
  const int64_t per = Unit<kPairs>::kElements, units = Units<kPairs>(rows), parts = (width + kRows - 1) / kRows;
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
  const int64_t per = Unit<kPairs>::kElements, keys = RoundUp(width, per * kLanes);
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

// The gradients of slopes, scale and soft cap are overwritten.
template <bool kPairs>
void BackwardAs(const Call& c, const Runner& runner) {
  const BackwardPlan plan(c);
  const int64_t heads = c.B * c.K, head_size = plan.rows * plan.dq_row + BalanceSize<kPairs>(plan);
  const Buffer dq_parts(plan.splits > 1 ? heads * plan.splits * head_size : 0);  // per key head and split
  const AllSums sums(c, plan);

  const bool large = head_size > kThreadFloats;
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
      float* stage = nullptr;
      const ThreadParts memory([&](Arena& arena) { stage = arena.Take(StageSize(c)); });
      FinishQueries<kPairs>(c, plan, head / c.K, head % c.K, stage, total);
    });
  }
  sums.Store();
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
