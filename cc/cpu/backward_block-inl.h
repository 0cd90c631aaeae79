// A block of rows of the backward over a block of keys: products, weights, and what they add to dq, dk and dv.
#pragma once

#include "call.h"
#include "cpu/ahead-inl.h"
#include "cpu/arrays-inl.h"
#include "cpu/backward_balance-inl.h"
#include "cpu/backward_plan-inl.h"
#include "cpu/backward_rows-inl.h"
#include "cpu/backward_sums-inl.h"
#include "cpu/direct_dots-inl.h"
#include "cpu/forward_plan-inl.h"
#include "cpu/gemm-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/rows-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Rows [r0, r0 + n) of the query heads of key head k, or keys, as panels. In masked calls those that are not all
// finite are 0: their NaN is in `inverse`, or masked.
template <bool kPairs, typename At>
inline void PackClean(const View& x, bool masked, int64_t n, int64_t width, float* stage, float* panels, const At& at) {
  PackRows<kPairs>(n, width, stage, panels, [&](int64_t i, float* own) {
    const Row row = at(i);
    const auto* elements = ReadRow<kPairs>(x, row.b, row.n, row.i, width, own);
    if (!masked || ZeroOrNaN(elements, width) == 0.0f) return elements;
    Fill(own, 0, Units<kPairs>(width), 0.0f);
    return reinterpret_cast<decltype(elements)>(own);
  });
}

// Rows of query and dout as products take them: as units, and as panels. Whether they are there: the place `holds` them.
struct PackedRows {
  float *q, *dout, *q_panels, *dout_panels;
  int32_t *holds, block;
};

// The place of a block in those that there is room for. Where they are enough for the blocks that see any one block of keys,
// blocks take turns; else those from `first` on have a place each but the first, which is that of the others.
struct RowPlaces {
  int64_t count, first;
  int64_t Of(int64_t block) const { return first < 0 ? block % count : block < first ? 0 : block - first + 1; }
};

// The rows of a block.
template <bool kPairs>
inline PackedRows PackedRowsOf(const BackwardPlan& plan, const BackwardScratch<kPairs>& s, int64_t block,
                               const RowPlaces& places) {
  const int64_t place = places.Of(block), at = place * plan.block_rows;
  const int64_t units = place * Units<kPairs>(plan.block_rows);
  return {s.q + at * s.q_row,
          s.dout + at * s.dout_row,
          s.q_panels + units * plan.dq_row,
          s.dout_panels + units * plan.dv_row,
          s.holds + place,
          static_cast<int32_t>(block)};
}

// Rows [g0, g0 + rows) of key head k over keys j0 + [0, width), and the tiles of rows to which any of them is visible.
struct RowBlock {
  int64_t b, k, g0, rows, j0, width;
  RowRanges ranges;
  int64_t count;
  const RowTile* tiles;
  PackedRows packed;
  Ahead* ahead;

  Row At(const Call& c, int64_t i) const { return RowAt(c, b, k, g0 + i); }
};

template <bool kPairs>
inline void PackQueries(const Call& c, const BackwardScratch<kPairs>& s, const RowBlock& x) {
  Row from = x.At(c, 0);
  for (int64_t r = 0; r < x.rows; ++r, from = After(c, from)) {
    CopyRow<kPairs>(c.query, x.b, from.n, from.i, c.D, x.packed.q + r * s.q_row);
    CopyRow<kPairs>(c.dout, x.b, from.n, from.i, c.Dv, x.packed.dout + r * s.dout_row);
  }
  const auto row_at = [&](int64_t i) { return x.At(c, i); };
  if (c.dkey) PackClean<kPairs>(c.query, IsMasked(c), x.rows, c.D, s.stage, x.packed.q_panels, row_at);
  if (c.dvalue) PackClean<kPairs>(c.dout, IsMasked(c), x.rows, c.Dv, s.stage, x.packed.dout_panels, row_at);
}

// The products q.k into p and dout.v into ds, of tiles of rows and the panels of keys that are visible to them.
template <bool kPairs>
inline void BlockProducts(const Call& c, const BackwardScratch<kPairs>& s, const RowBlock& x) {
  const int64_t depth = Units<kPairs>(c.D), dv_depth = Units<kPairs>(c.Dv);
  const bool direct = IsDirect(c);
  if (direct) {
    int64_t first = x.width, last = 0;
    for (int64_t t = 0; t < x.count; ++t) {
      first = x.tiles[t].from < first ? x.tiles[t].from : first;
      last = x.tiles[t].to > last ? x.tiles[t].to : last;
    }
    DirectDots<kPairs>(c, x.b, x.k, x.rows, x.packed.q, s.q_row, x.j0, first, last, s.stage, s.p, s.s_row);
  }
  for (int64_t panel = 0; panel < Panels(x.width); ++panel) {
    for (int64_t t = 0; t < x.count; ++t) {
      const RowTile& tile = x.tiles[t];
      if (tile.to <= panel * kPanel || tile.from >= (panel + 1) * kPanel) continue;
      const int64_t at = tile.r * s.s_row + panel * kPanel;
      const int64_t from = tile.from - panel * kPanel, end = tile.to - panel * kPanel;
      const Columns columns{from > 0 ? from : 0, end < kPanel ? end : kPanel};
      PrefetchLogits(c, x.At(c, tile.r), tile.n, x.j0, panel * kPanel, PanelEnd(panel, x.width));
      x.ahead->Some();
      if (!direct)
        GemmColumns<kPairs, false>(columns, tile.n, depth, x.packed.q + tile.r * s.q_row, s.q_row, 1,
                                   s.keys_t + panel * depth * kPanel, s.p + at, s.s_row);
      GemmColumns<kPairs, false>(columns, tile.n, dv_depth, x.packed.dout + tile.r * s.dout_row, s.dout_row, 1,
                                 s.values_t + panel * dv_depth * kPanel, s.ds + at, s.s_row);
    }
  }
}

// From products to weights and ds, in columns [0, keys) of p and ds; 0 where no key is visible.
// `join(r)` is called for each two rows from r on as soon as they are there, while the first cache holds them.
template <bool kPairs, typename Join>
inline void BlockWeights(const Call& c, const BackwardScratch<kPairs>& s, const RowBlock& x, int64_t keys,
                         const HeadSums& sums, const Join& join) {
  int64_t done = 0;
  const auto clear = [&](int64_t to) {  // rows to which none of these keys is visible
    for (; done < to; ++done) {
      Fill(s.p + done * s.s_row, 0, keys, 0.0f);
      Fill(s.ds + done * s.s_row, 0, keys, 0.0f);
      if (done % 2 == 1) join(done - 1);
    }
  };
  for (int64_t t = 0; t < x.count; ++t) {
    const RowTile& tile = x.tiles[t];
    clear(tile.r);
    const int64_t c0 = tile.from / kLanes * kLanes, c1 = RoundUp(tile.to, kLanes);
    Row row = x.At(c, tile.r);
    for (int64_t r = tile.r; r < tile.r + tile.n; ++r, row = After(c, row)) {
      float *p = s.p + r * s.s_row, *ds = s.ds + r * s.s_row;
      RowGradients(c, s, row, x.g0 + r, x.j0, x.ranges.Within(r, x.j0, x.width), c0, c1, p, ds, sums);
      float* const both[] = {p, ds};
      for (float* y : both) {
        Fill(y, 0, c0, 0.0f);
        Fill(y, c1, keys, 0.0f);
      }
      if (r % 2 == 1) join(r - 1);
    }
    done = tile.r + tile.n;
  }
  clear(x.rows);
  if (x.rows % 2 == 1) join(x.rows - 1);
}

// Adds to dq what the keys of the block give, a chunk of keys at a time.
template <bool kPairs>
inline void QueryGradients(const Call& c, const BackwardPlan& plan, const BackwardScratch<kPairs>& s, const RowBlock& x,
                           float* dq) {
  const int64_t per = Unit<kPairs>::kElements, chunk = Chunk();
  const float* ds_rows = kPairs ? s.ds_rows : s.ds;
  const int64_t ds_row = kPairs ? s.half_row : s.s_row, key_units = Units<kPairs>(x.width);
  for (int64_t d = 0; d < Panels(c.D); ++d) {
    for (int64_t u0 = 0; u0 < key_units; u0 += chunk) {
      for (int64_t t = 0; t < x.count; ++t) {
        const RowTile& tile = x.tiles[t];
        const int64_t from = tile.from / per > u0 ? tile.from / per : u0, end = Units<kPairs>(tile.to);
        const int64_t to = end < u0 + chunk ? end : u0 + chunk;
        if (from >= to) continue;
        x.ahead->Some();
        GemmColumns<kPairs, true>({0, c.D - d * kPanel}, tile.n, to - from, ds_rows + tile.r * ds_row + from, ds_row, 1,
                                  s.keys + (d * key_units + from) * kPanel,
                                  dq + (x.g0 + tile.r) * plan.dq_row + d * kPanel, plan.dq_row);
      }
    }
  }
}

// dk and dv of a block: tiles of kRows keys, over the rows to which any of them is visible, a chunk of rows at a time.
template <bool kPairs>
inline void KeyGradients(const Call& c, const BackwardPlan& plan, const BackwardScratch<kPairs>& s, const RowBlock& x) {
  const int64_t per = Unit<kPairs>::kElements, units = Units<kPairs>(x.rows), chunk = Chunk();
  Range visible_to[kMostKeys / kRows + 1];
  const int64_t parts = KeyTiles<kPairs>(x.tiles, x.count, units, x.width, visible_to);
  struct Product {
    bool wanted;
    const float *weights, *panels;
    float* sum;
    int64_t sum_row, columns;
  };
  const Product products[] = {{bool{c.dvalue}, s.p, x.packed.dout_panels, s.dv, plan.dv_row, c.Dv},
                              {bool{c.dkey}, s.ds, x.packed.q_panels, s.dk, plan.dq_row, c.D}};
  const int64_t weights_row = per * s.s_row;  // pairs of rows lie in every second one
  for (const Product& y : products) {
    if (!y.wanted) continue;
    for (int64_t d = 0; d < Panels(y.columns); ++d) {
      for (int64_t u0 = 0; u0 < units; u0 += chunk) {
        for (int64_t t = 0; t < parts; ++t) {
          const int64_t a = x.width * t / parts, e = x.width * (t + 1) / parts;
          const int64_t from = visible_to[t].lo > u0 ? visible_to[t].lo : u0;
          const int64_t to = visible_to[t].hi < u0 + chunk ? visible_to[t].hi : u0 + chunk;
          if (from >= to) continue;
          x.ahead->Some();
          GemmColumns<kPairs, true>({0, y.columns - d * kPanel}, e - a, to - from, y.weights + from * weights_row + a,
                                    1, weights_row, y.panels + (d * units + from) * kPanel,
                                    y.sum + a * y.sum_row + d * kPanel, y.sum_row);
        }
      }
    }
  }
}

// Rows over one block of keys, already packed.
template <bool kPairs>
inline void BackwardBlock(const Call& c, const BackwardPlan& plan, const BackwardScratch<kPairs>& s, const RowBlock& x,
                          float* dq, bool one_scale, const HeadSums& sums) {
  const int64_t keys = RoundUp(x.width, Unit<kPairs>::kElements * kLanes);
  if (*x.packed.holds != x.packed.block) PackQueries<kPairs>(c, s, x);
  *x.packed.holds = x.packed.block;
  BlockProducts<kPairs>(c, s, x);
  float scales[kMostRows];
  if (!one_scale)
    for (int64_t r = 0; r < x.rows; ++r) scales[r] = ScaleOf(c, x.At(c, r));
  BlockWeights<kPairs>(c, s, x, keys, sums, [&](int64_t r) {
    if constexpr (kPairs)
      JoinRows<kPairs>(s, BalanceOf(plan, dq), x.g0, r, r + 1 < x.rows, x.j0, keys, one_scale ? nullptr : scales,
                       SumIsUnknown(c));
  });
  if (c.dquery) QueryGradients<kPairs>(c, plan, s, x, dq);
  if (!kPairs && !one_scale) {
    for (int64_t r = 0; r < x.rows; ++r) {
      const F f = Set(scales[r]);
      Combine(keys, s.ds + r * s.s_row, s.ds + r * s.s_row, [&](F y, F) { return y * f; });
    }
  }
  KeyGradients<kPairs>(c, plan, s, x);
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
