// Rows of a task are query rows of one key head: row r is position r % Sq of query head k * G + r / Sq, so
// that the heads of a group share every packed key and value.
#pragma once

#include "call.h"
#include "cpu/simd-inl.h"
#include "cpu/target-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

struct Row {
  int64_t b, n, i;  // batch entry, query head, position
};

inline Row RowAt(const Call& c, int64_t b, int64_t k, int64_t r) {
  if (r < c.Sq) return {b, k * c.G(), r};
  return {b, k * c.G() + r / c.Sq, r % c.Sq};
}

// The row after it, without the divisions.
inline Row After(const Call& c, Row row) {
  if (++row.i == c.Sq) row.i = 0, ++row.n;
  return row;
}

struct Range {
  int64_t lo, hi;
  bool Empty() const { return lo >= hi; }
};

// `value` to the columns of [c0, c1), whole vectors, that are not in v. What is stored by the element would not be forwarded to
// the vectors that are read next.
inline void FillOutside(float* x, int64_t c0, int64_t c1, Range v, float value) {
  const F f = Set(value);
  int64_t j = c0;
  for (; j + kLanes <= v.lo; j += kLanes) Store(x + j, f);
  if (j < v.lo) Store(x + j, Select(First(static_cast<int>(v.lo - j)), f, Load(x + j)));
  j = c0 + (v.hi - c0) / kLanes * kLanes;
  if (j < v.hi) {
    Store(x + j, Select(First(static_cast<int>(v.hi - j)), Load(x + j), f));
    j += kLanes;
  }
  for (; j < c1; j += kLanes) Store(x + j, f);
}

inline Range Visible(const Call& c, const Row& row) {
  const int64_t lo = c.lower ? *c.lower.At<int32_t>(row.b, row.n, row.i) : 0;
  const int64_t hi = c.upper ? *c.upper.At<int32_t>(row.b, row.n, row.i) : c.Skv;
  return {lo < 0 ? 0 : lo, hi > c.Skv ? c.Skv : hi};
}

// Lanes of a vector at most.
inline int Rest(int64_t n) { return n < kLanes ? static_cast<int>(n) : kLanes; }

inline bool IsMasked(const Call& c) { return c.lower || c.upper || c.mask || c.segment_row || c.blocks; }

// What is one scalar for the call, or one for each head.
inline float ScaleOf(const Call& c, int64_t b, int64_t n) {
  return c.scale_of_head ? *c.scale_of_head.At<float>(b, n) : c.scale;
}
inline float ScaleOf(const Call& c, const Row& row) { return ScaleOf(c, row.b, row.n); }
inline float SoftCapOf(const Call& c, const Row& row) {
  return c.soft_cap_of_head ? *c.soft_cap_of_head.At<float>(row.b, row.n) : c.soft_cap;
}
inline uint32_t ThresholdOf(const Call& c, const Row& row) {
  return c.threshold_of_head ? *c.threshold_of_head.At<uint32_t>(row.b, row.n) : c.threshold;
}
inline float KeepProbOf(const Call& c, const Row& row) {
  if (!c.threshold_of_head) return c.keep_prob;
  return static_cast<float>(*c.threshold_of_head.At<uint32_t>(row.b, row.n)) * 0x1p-16f;
}

// Few rows: see direct-inl.h.
inline bool IsDirect(const Call& c) { return c.G() * c.Sq <= kDirectRows && c.Skv > 0; }

// Whether products that are not of small heads are those of pairs. Few rows take 8-bit elements, which are exact in
// bfloat16, and scales too.
inline bool InPairs(const Call& c) {
  if (!kHasPairs || c.query.dtype != DType::kBF16) return false;
  if (c.key.dtype == DType::kBF16 && c.value.dtype == DType::kBF16 && !c.key_scale && !c.value_scale) return true;
  const auto exact = [](DType t) { return t == DType::kBF16 || IsByte(t); };
  return c.pages && exact(c.key.dtype) && exact(c.value.dtype) && IsDirect(c);
}

// Whether weights are those of the products alone, within a range of keys of each row.
inline bool AreWeightsPlain(const Call& c) {
  return !c.bias && !c.slopes && !c.mask && !c.segment_row && !c.blocks && c.soft_cap == 0.0f && !c.soft_cap_of_head &&
         !c.scale_of_head && !c.seed && !c.drop_bits;
}

// Where a row stands among the keys, for ALiBi.
inline int64_t PositionOf(const Call& c, const Row& row) {
  return c.position ? *c.position.At<int32_t>(row.b, row.n, row.i) : row.i;
}

// --- which keys are visible to the rows of a block

struct RowTile {
  int64_t r, n;      // first row within the block, and how many
  int64_t from, to;  // its visible keys, relative to the block of keys
};

// The keys of j0 + [0, width) that are visible to a row with the range [lo, hi), relative to j0; empty as (0, 0).
inline Range Within(int32_t lo, int32_t hi, int64_t j0, int64_t width) {
  const Range v{lo - j0 > 0 ? lo - j0 : 0, hi - j0 < width ? hi - j0 : width};
  return v.Empty() ? Range{0, 0} : v;
}

// --- masks by blocks

// The kinds of a row's blocks of keys. Those that name no pairs mask all.
struct RowBlocks {
  const int32_t* kinds;
  int64_t step, count;

  RowBlocks(const Call& c, const Row& row)
      : kinds(c.blocks.At<int32_t>(row.b, row.n, row.i / c.block_rows)), step(c.blocks.col), count(c.block_count) {}
  int32_t Kind(int64_t block) const { return kinds[block * step]; }
  bool IsVisible(int64_t block) const { return Kind(block) > 0 && Kind(block) - 2 < count; }
};

// From the first key of [j0, j1) in a block that is visible to the row to the end of the last one; empty as (0, 0).
inline Range SpanOfBlocks(const Call& c, const Row& row, int64_t j0, int64_t j1) {
  const RowBlocks of(c, row);
  int64_t first = j0 / c.block_keys, end = (j1 + c.block_keys - 1) / c.block_keys;
  while (first < end && !of.IsVisible(first)) ++first;
  while (first < end && !of.IsVisible(end - 1)) --end;
  if (first >= end) return {0, 0};
  const int64_t lo = first * c.block_keys, hi = end * c.block_keys;
  return {lo > j0 ? lo : j0, hi < j1 ? hi : j1};
}

// Whether rows [r, r + n) of key head k have a visible block with keys of [j0, j1), if the mask is one by blocks.
inline bool SeesBlocks(const Call& c, int64_t b, int64_t k, int64_t r, int64_t n, int64_t j0, int64_t j1) {
  if (!c.blocks) return true;
  for (const int64_t end = r + n; r < end;) {
    const Row row = RowAt(c, b, k, r);
    if (!SpanOfBlocks(c, row, j0, j1).Empty()) return true;
    const int64_t next = (row.i / c.block_rows + 1) * c.block_rows;
    r += (next < c.Sq ? next : c.Sq) - row.i;
  }
  return false;
}

// The visible keys of some rows, as the ranges [lo, hi).
struct RowRanges {
  const int32_t *lo, *hi;
  Range Within(int64_t r, int64_t j0, int64_t width) const {
    return jax_fa::JAX_FA_ISA::Within(lo[r], hi[r], j0, width);
  }
};

// The ranges of n rows, from `row` on, where keys of j0 + [0, width) alone count: as they are or, of a mask by blocks, only as
// wide as the visible blocks there, in `own_lo` and `own_hi`.
inline RowRanges RangesIn(const Call& c, Row row, int64_t n, int64_t j0, int64_t width, const RowRanges& all,
                          int32_t* own_lo, int32_t* own_hi) {
  if (!c.blocks) return all;
  Range span{0, 0};
  for (int64_t r = 0; r < n; ++r, row = After(c, row)) {
    if (r == 0 || row.i % c.block_rows == 0) span = SpanOfBlocks(c, row, j0, j0 + width);
    const Range v{all.lo[r] > span.lo ? all.lo[r] : span.lo, all.hi[r] < span.hi ? all.hi[r] : span.hi};
    own_lo[r] = static_cast<int32_t>(v.Empty() ? 0 : v.lo);
    own_hi[r] = static_cast<int32_t>(v.Empty() ? 0 : v.hi);
  }
  return {own_lo, own_hi};
}

// --- tiles

// Tiles of up to kTileRows of `rows` rows with these ranges; fully masked ones are left out. Returns how many.
inline int64_t MakeTiles(const RowRanges& ranges, int64_t rows, int64_t j0, int64_t width, RowTile* tiles) {
  const int64_t parts = (rows + kTileRows - 1) / kTileRows;
  int64_t count = 0;
  for (int64_t t = 0; t < parts; ++t) {
    RowTile tile{rows * t / parts, 0, width, 0};
    tile.n = rows * (t + 1) / parts - tile.r;
    for (int64_t r = tile.r; r < tile.r + tile.n; ++r) {
      const Range v = ranges.Within(r, j0, width);
      if (v.Empty()) continue;
      tile.from = v.lo < tile.from ? v.lo : tile.from;
      tile.to = v.hi > tile.to ? v.hi : tile.to;
    }
    if (tile.from >= tile.to) continue;
    tile.from = tile.from / kTileKeys * kTileKeys;
    tile.to = (tile.to + kTileKeys - 1) / kTileKeys * kTileKeys;
    tile.to = tile.to < width ? tile.to : width;
    tiles[count++] = tile;
  }
  return count;
}

// The other way round: tiles of up to kTileRows of `width` keys, and the rows, in units, to which any key of each is visible.
// Returns how many; tile t begins at key width * t / how many.
template <bool kPairs>
inline int64_t KeyTiles(const RowTile* tiles, int64_t count, int64_t units, int64_t width, Range* visible_to) {
  const int64_t per = Unit<kPairs>::kElements, parts = (width + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < parts; ++t) {
    const int64_t a = width * t / parts, e = width * (t + 1) / parts;
    visible_to[t] = {units, 0};
    for (int64_t u = 0; u < count; ++u) {
      const RowTile& tile = tiles[u];
      if (tile.from >= e || tile.to <= a) continue;
      const int64_t first = tile.r / per;
      visible_to[t].lo = first < visible_to[t].lo ? first : visible_to[t].lo;
      visible_to[t].hi = Units<kPairs>(tile.r + tile.n);
    }
  }
  return parts;
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
