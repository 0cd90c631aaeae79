// A block of rows of the second derivative over blocks of keys: the two passes, and the products before and behind them.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/backward_sums-inl.h"
#include "cpu/gemm-inl.h"
#include "cpu/packed_forward-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/second_pack-inl.h"
#include "cpu/second_plan-inl.h"
#include "cpu/second_rows-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Keys j0 + [0, width), the tiles of rows to which any of them is visible, and the arrays of these pairs.
struct SecondPairs {
  int64_t j0, width;
  RowRanges ranges;
  const RowTile* tiles;
  int64_t count;
  float* of[kSecondArrays];
  int64_t row;  // stride of the arrays

  float* operator[](SecondArray i) const { return of[i]; }
  SecondRow Row(int64_t r) const {
    SecondRow x{};
    for (int i = 0; i < kSecondArrays; ++i) x.of[i] = of[i] == nullptr ? nullptr : of[i] + r * row;
    return x;
  }
};

// The products of the first pass: x gets rows times transposed keys, for tiles and the panels that are visible to them.
// Meanwhile asks for the panel of the next product. `all`: not those of the logits alone.
inline void FirstPassProducts(const Call& c, const SecondPlan& plan, const SecondScratch& s, const PackedKeys& of,
                              const SecondPairs& x, bool all) {
  struct Product {
    bool wanted, first;  // first: nothing has been stored in x yet
    const float *rows, *keys;
    int64_t row, depth;
    float* x;
  };
  const bool a{c.query_tangent}, b{c.key_tangent}, e{c.value_tangent}, more{c.dout_tangent}, u = plan.terms.dp_tangent;
  const Product products[] = {
      // those that read the same keys one after the other
      {true, true, s.q, of.keys_t, plan.dq_row, c.D, x[kWeight]},
      {a, true, s.q_tangent, of.keys_t, plan.dq_row, c.D, x[kLogit]},
      {b, !a, s.q, of.keys_tangent_t, plan.dq_row, c.D, x[kLogit]},
      {plan.terms.dp, true, s.dout, of.values_t, plan.dv_row, c.Dv, x[kDs]},
      {u && more, true, s.dout_tangent, of.values_t, plan.dv_row, c.Dv, x[kDp]},
      {u && e, !more, s.dout, of.values_tangent_t, plan.dv_row, c.Dv, x[kDp]},
  };
  const Product* wanted[6];
  int64_t count = 0;
  for (const Product& y : products)
    if (y.wanted && (all || count == 0)) wanted[count++] = &y;
  for (int64_t panel = 0; panel < Panels(x.width); ++panel) {
    for (int64_t i = 0; i < count; ++i) {
      const Product &y = *wanted[i], &next = *wanted[i + 1 < count ? i + 1 : 0];
      const int64_t next_panel = i + 1 < count ? panel : panel + 1, next_size = next.depth * kPanel;
      const bool asks = next.keys != y.keys && next_panel < Panels(x.width);
      const float* keys = y.keys + panel * y.depth * kPanel;
      for (int64_t t = 0; t < x.count; ++t) {
        const RowTile& tile = x.tiles[t];
        if (asks) Prefetch(next.keys + next_panel * next_size, next_size, t, x.count);
        if (tile.to <= panel * kPanel || tile.from >= (panel + 1) * kPanel) continue;
        const float* rows = y.rows + tile.r * y.row;
        float* to = y.x + tile.r * x.row + panel * kPanel;
        if (y.first) {
          Gemm<false, false>(tile.n, y.depth, rows, y.row, 1, keys, to, x.row);
        } else {
          Gemm<false, true>(tile.n, y.depth, rows, y.row, 1, keys, to, x.row);
        }
      }
    }
  }
}

// Runs fn(row, r, visible keys, c0, c1) for the rows of all tiles; columns [c0, c1) hold what is visible to the tile.
template <typename Fn>
inline void ForEachRow(const Call& c, const SecondRows& x, const SecondPairs& y, const Fn& fn) {
  for (int64_t t = 0; t < y.count; ++t) {
    const RowTile& tile = y.tiles[t];
    Row row = RowAt(c, x.b, x.k, x.g0 + tile.r);
    for (int64_t r = tile.r; r < tile.r + tile.n; ++r, row = After(c, row))
      fn(row, r, y.ranges.Within(r, y.j0, y.width), tile.from / kLanes * kLanes, RoundUp(tile.to, kLanes));
  }
}

// The rows of the second pass; what the products read is 0 where no key is visible.
inline void SecondPassRows(const Call& c, const SecondScratch& s, const SecondRows& x, const SecondPairs& y,
                           const HeadSums& sums) {
  int64_t done = 0;
  const auto clear = [&](int64_t r, int64_t from, int64_t to) {
    float* const all[] = {y[kGX], y[kDX], y[kTangent], y[kKept]};
    for (float* z : all) Fill(z + r * y.row, from, to, 0.0f);
  };
  const int64_t keys = RoundUp(y.width, kLanes);
  ForEachRow(c, x, y, [&](const Row& row, int64_t r, Range v, int64_t c0, int64_t c1) {
    for (; done < r; ++done) clear(done, 0, keys);
    ++done;
    SecondPassRow(c, s, row, r, y.j0, v, c0, c1, y.Row(r), sums);
    clear(r, 0, c0);
    clear(r, c1, keys);
  });
  for (; done < x.rows; ++done) clear(done, 0, keys);
}

// Adds to the results of the rows what the keys give, a chunk of keys at a time. Meanwhile asks for dk and dv of the keys,
// which were last used by the block of rows before.
inline void AddToRows(const Call& c, const SecondPlan& plan, const SecondScratch& s, const PackedKeys& of,
                      const SecondPairs& x, const float* dk, const float* dv) {
  struct Product {
    bool wanted;
    const float *weights, *panels;
    float* sum;
    int64_t sum_row;
    const float* next;
    int64_t next_row;  // 0: nothing to ask for
  };
  const Product products[] = {
      {bool{c.dquery}, x[kGX], of.keys, s.gq, plan.dq_row, dk, c.dkey ? plan.dq_row : 0},
      {plan.terms.by_key, x[kDX], of.keys_tangent, s.gq, plan.dq_row, nullptr, 0},
      {plan.terms.weights && c.out_tangent, x[kTangent], of.values, s.out, plan.dv_row, dv, c.dvalue ? plan.dv_row : 0},
      {plan.terms.values, x[kKept], of.values_tangent, s.out, plan.dv_row, nullptr, 0},
  };
  const int64_t chunk = Chunk();
  for (const Product& y : products) {
    if (!y.wanted) continue;
    const int64_t panels = y.sum_row / kPanel, next = x.width * y.next_row;
    for (int64_t d = 0; d < panels; ++d) {
      for (int64_t u0 = 0; u0 < x.width; u0 += chunk) {
        for (int64_t t = 0; t < x.count; ++t) {
          const RowTile& tile = x.tiles[t];
          if (u0 == 0 && d + 1 < panels) Prefetch(y.panels + (d + 1) * x.width * kPanel, x.width * kPanel, t, x.count);
          if (u0 == 0 && next > 0) Prefetch(y.next + x.j0 * y.next_row, next, d * x.count + t, panels * x.count);
          const int64_t from = tile.from > u0 ? tile.from : u0, to = tile.to < u0 + chunk ? tile.to : u0 + chunk;
          if (from >= to) continue;
          Gemm<false, true>(tile.n, to - from, y.weights + tile.r * x.row + from, x.row, 1,
                            y.panels + (d * x.width + from) * kPanel, y.sum + tile.r * y.sum_row + d * kPanel,
                            y.sum_row);
        }
      }
    }
  }
}

// Adds to the results of the keys what the rows give: tiles of kRows keys, over the rows to which any of them is visible, a
// chunk of rows at a time.
inline void AddToKeys(const Call& c, const SecondPlan& plan, const SecondScratch& s, int64_t rows, const SecondPairs& x,
                      float* dk, float* dv) {
  struct Product {
    bool wanted;
    const float *weights, *panels;
    float* sum;
    int64_t sum_row;
  };
  const Product products[] = {
      {bool{c.dkey}, x[kGX], s.q_panels, dk, plan.dq_row},
      {plan.terms.by_query, x[kDX], s.q_tangent_panels, dk, plan.dq_row},
      {plan.terms.weights && c.dvalue, x[kTangent], s.dout_panels, dv, plan.dv_row},
      {plan.terms.douts, x[kKept], s.dout_tangent_panels, dv, plan.dv_row},
  };
  Range visible_to[kMostKeys / kRows + 1];
  const int64_t parts = KeyTiles<false>(x.tiles, x.count, rows, x.width, visible_to), chunk = Chunk();
  for (const Product& y : products) {
    if (!y.wanted) continue;
    for (int64_t d = 0; d < y.sum_row; d += kPanel) {
      for (int64_t u0 = 0; u0 < rows; u0 += chunk) {
        for (int64_t t = 0; t < parts; ++t) {
          const int64_t a = x.width * t / parts, e = x.width * (t + 1) / parts;
          const int64_t from = visible_to[t].lo > u0 ? visible_to[t].lo : u0;
          const int64_t to = visible_to[t].hi < u0 + chunk ? visible_to[t].hi : u0 + chunk;
          if (from >= to) continue;
          Gemm<false, true>(e - a, to - from, y.weights + from * x.row + a, 1, x.row,
                            y.panels + d * rows + from * kPanel, y.sum + (x.j0 + a) * y.sum_row + d, y.sum_row);
        }
      }
    }
  }
}

// tau and sigma of each row, after the first pass. The ds of a row add up to dlogsumexp, but for what their delta has of the
// rounding of out, which is far more where the forward rounded its weights to 16 bits. That excess is known now: the second
// pass takes it from ds, and sigma from sum ds T.
inline void FinishSums(const Call& c, const SecondTerms& terms, const SecondScratch& s, const SecondRows& x) {
  Row row = RowAt(c, x.b, x.k, x.g0);
  for (int64_t r = 0; r < x.rows; ++r, row = After(c, row)) {
    double excess = s.ds_sum[r], sigma = s.sigma_sum[r] - s.tau_sum[r] * s.ds_sum[r];
    if (c.dlogsumexp) excess -= *c.dlogsumexp.At<float>(row.b, row.n, row.i);
    if (c.dlogsumexp_tangent) sigma -= *c.dlogsumexp_tangent.At<float>(row.b, row.n, row.i);
    s.tau[r] = static_cast<float>(s.tau_sum[r]);
    s.sigma[r] = static_cast<float>(sigma);
    s.excess[r] = terms.dp ? static_cast<float>(excess) : 0.0f;
  }
}

// Takes the products of a row's logits into its max and sum.
inline void StatisticsRow(const Call& c, const SecondScratch& s, const Row& row, int64_t r, int64_t j0, Range v,
                          int64_t c0, int64_t c1, float* x) {
  if (v.Empty() || !(s.inverse[r] * 0.0f == 0.0f)) return;
  const float scale = RowLogits(c, row, j0, v, c0, c1, nullptr, {}, s.tmp, x);
  s.tau_sum[r] *= RaiseMax(RowMax(x, c0, c1), scale, s.m + r);
  s.tau_sum[r] += Sum(RowExp<false>(x, c0, c1, scale, s.m[r]));
}

// A block of rows over all keys that are visible to any of them. The first pass finds tau and sigma of each row, and keeps
// what the second reads if it fits; else that computes it again. dk, dv: sums of the key head.
inline void SecondBlock(const Call& c, const SecondPlan& plan, const SecondScratch& s, const SecondRows& x, float* dk,
                        float* dv, const HeadSums& sums) {
  RowTile tiles[kMostRows];
  int32_t lo[kMostRows], hi[kMostRows];
  const int64_t first = x.visible.lo / plan.key_block, last = (x.visible.hi + plan.key_block - 1) / plan.key_block;
  const bool kept = last - first <= plan.kept_blocks;
  const auto over_keys = [&](const auto& fn) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t j0 = block * plan.key_block, width = j0 + plan.key_block < c.Skv ? plan.key_block : c.Skv - j0;
      const RowRanges ranges = RangesIn(c, RowAt(c, x.b, x.k, x.g0), x.rows, j0, width, {s.lo, s.hi}, lo, hi);
      SecondPairs y{j0, width, ranges, tiles, MakeTiles(ranges, x.rows, j0, width, tiles), {}, plan.s_row};
      if (y.count == 0) continue;
      float* arrays = s.arrays + (kept ? block - first : 0) * plan.BlockFloats();
      for (int i = 0; i < kSecondArrays; ++i)
        if (plan.at[i] >= 0) y.of[i] = arrays + plan.at[i] * plan.block_rows * plan.s_row;
      fn(y);
    }
  };
  const auto first_pass = [&](const SecondPairs& y, bool adds) {
    const PackedKeys of(c, plan, s, x, y.j0, y.width, false);
    FirstPassProducts(c, plan, s, of, y, true);
    ForEachRow(c, x, y, [&](const Row& row, int64_t r, Range v, int64_t c0, int64_t c1) {
      FirstPassRow(c, plan, s, row, r, y.j0, v, c0, c1, of.nan_marker, y.Row(r), adds);
    });
  };
  bool large = false;
  for (int64_t r = 0; r < x.rows; ++r) large = large || IsLarge(s.m[r]);
  if (large && !c.partial &&
      !IsForwardPacked(c)) {  // max and sum of the products here; the sum is in tau_sum meanwhile
    for (int64_t r = 0; r < x.rows; ++r) {
      const float m = s.m[r];
      if (m == m) s.m[r] = -kFloatMax;  // else NaN, as it is
    }
    over_keys([&](const SecondPairs& y) {
      FirstPassProducts(c, plan, s, PackedKeys(c, plan, s, x, y.j0, y.width, false), y, false);
      ForEachRow(c, x, y, [&](const Row& row, int64_t r, Range v, int64_t c0, int64_t c1) {
        StatisticsRow(c, s, row, r, y.j0, v, c0, c1, y.Row(r)[kWeight]);
      });
    });
    for (int64_t r = 0; r < x.rows; ++r) {
      if (s.tau_sum[r] != 0.0) s.inverse[r] = static_cast<float>(1.0 / s.tau_sum[r]);
      s.tau_sum[r] = 0.0;
    }
  }
  over_keys([&](const SecondPairs& y) { first_pass(y, true); });
  FinishSums(c, plan.terms, s, x);
  over_keys([&](const SecondPairs& y) {
    if (!kept) first_pass(y, false);
    SecondPassRows(c, s, x, y, sums);
    AddToRows(c, plan, s, PackedKeys(c, plan, s, x, y.j0, y.width, true), y, dk, dv);
    AddToKeys(c, plan, s, x.rows, y, dk, dv);
  });
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
