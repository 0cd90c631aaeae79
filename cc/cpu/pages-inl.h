// Keys and values that lie in pages: where they are, and their scales.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/simd-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Calls what(key, page, row, n) for every part of the keys [from, to) that lies in one page, in n rows from `row` on.
template <typename What>
inline void EachPage(const Pages& pages, int64_t b, int64_t from, int64_t to, const What& what) {
  for (int64_t j = from; j < to;) {
    const int64_t row = j % pages.size, rest = pages.size - row, n = rest < to - j ? rest : to - j;
    what(j, pages.Page(b, j / pages.size), row, n);
    j += n;
  }
}

// at[j - j0]: how many bytes key or value j in [from, to) lies behind row 0 of the pool.
inline void FindRows(const Call& c, const View& x, int64_t b, int64_t j0, int64_t from, int64_t to, int64_t* at) {
  const int64_t bytes = x.row * ItemSize(x.dtype);
  EachPage(c.pages, b, from, to, [&](int64_t j, int64_t page, int64_t row, int64_t n) {
    for (int64_t i = 0; i < n; ++i) at[j - j0 + i] = (page * c.pages.size + row + i) * bytes;
  });
}

// The scales of keys [from, end) for up to kLanes heads that lie side by side, transposed as so many keys.
inline void FindScalesOf(const Call& c, const View& x, int64_t b, int64_t first, int heads, int64_t from, int64_t end,
                         int64_t stride, float* to) {
  float rows[kLanes * kLanes], columns[kLanes * kLanes];
  int count = 0;
  const auto put = [&] {
    TransposeBlock(rows, kLanes, columns, kLanes);
    for (int k = 0; k < heads; ++k) StoreFirst(to + k * stride, Load(columns + k * kLanes), count);
    to += count;
    count = 0;
  };
  EachPage(c.pages, b, from, end, [&](int64_t, int64_t page, int64_t row, int64_t n) {
    const float* p = x.At<float>(b, first, page, row);
    for (int64_t i = 0; i < n; ++i, p += x.col) {
      Store(rows + count * kLanes, LoadFirst(p, heads));
      if (++count == kLanes) put();
    }
  });
  if (count > 0) put();
}

// to[k * stride + j - j0]: the scales of keys [from, to) for all heads, or for the `heads` from the first one on.
inline void FindScales(const Call& c, const View& x, int64_t b, int64_t first, int64_t heads, int64_t j0, int64_t from,
                       int64_t end, int64_t stride, float* to) {
  if (x.head == 1) {
    for (int64_t k = 0; k < heads; k += kLanes)
      FindScalesOf(c, x, b, first + k, Rest(heads - k), from, end, stride, to + k * stride + from - j0);
    return;
  }
  EachPage(c.pages, b, from, end, [&](int64_t j, int64_t page, int64_t row, int64_t n) {
    const float* p = x.At<float>(b, first, page, row);
    for (int64_t i = 0; i < n; ++i, p += x.col)
      for (int64_t k = 0; k < heads; ++k) to[k * stride + j - j0 + i] = p[k * x.head];
  });
}

// Asks for those of keys [from, to) and all heads: they are read bit by bit, each page's on a few lines.
inline void AskForScales(const Call& c, const View& x, int64_t b, int64_t from, int64_t to) {
  EachPage(c.pages, b, from, to, [&](int64_t, int64_t page, int64_t row, int64_t n) {
    const char *p = x.Bytes(b, 0, page, row), *end = x.Bytes(b, c.K - 1, page, row + n - 1);
    for (; p <= end; p += 64) __builtin_prefetch(p, 0, 2);
  });
}

// Keys or values [j0, j0 + n) of a head as neighbours, in floats times their scale, or in units without it; zeros for those that the
// batch entry has not, or before `from`. `stage` is that of StageSize.
template <bool kPairs>
inline View Gathered(const Call& c, const View& x, const View& scale, int64_t width, int64_t b, int64_t k, int64_t j0,
                     int64_t from, int64_t n, float* stage) {
  static constexpr int64_t kNone = 0;
  using T = typename StoredAs<kPairs>::Type;
  T* const to = reinterpret_cast<T*>(stage + StagedRows(c));
  const int64_t row = RoundUp(width, 2 * kLanes), keys = c.Keys(b);
  from = from > j0 ? from : j0;
  const int64_t end = j0 + n < keys ? j0 + n : keys, size = static_cast<int64_t>(sizeof(T));
  const auto clear = [&](int64_t j, int64_t until) {
    if (j < until) __builtin_memset(to + (j - j0) * row, 0, static_cast<size_t>((until - j) * row * size));
  };
  clear(j0, from < j0 + n ? from : j0 + n);
  EachPage(c.pages, b, from, end, [&](int64_t j, int64_t page, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      T* const own = to + (j + i - j0) * row;
      const char* src = x.Bytes(b, k, page * c.pages.size + first + i);
      if constexpr (kPairs) {
        if (IsByte(x.dtype)) {
          LoadRow(src, x.dtype, 1, width, stage);
          for (int64_t d = 0; d < width; ++d) own[d] = FromFloatBF16(stage[d]);
          continue;
        }
        __builtin_memcpy(own, src, static_cast<size_t>(width * size));
      } else {
        LoadRow(src, x.dtype, 1, width, own);
        if (!scale) continue;
        const float factor = *scale.At<float>(b, k, page, first + i);
        for (int64_t d = 0; d < width; ++d) own[d] *= factor;
      }
    }
  });
  clear(end > from ? end : from, j0 + n);
  View v;
  v.data = reinterpret_cast<char*>(to);
  v.dtype = kPairs ? DType::kBF16 : DType::kF32;
  v.batch = &kNone;
  v.row = row, v.col = 1;
  return v;
}

// PackTransposed of keys, and PackValues of values, wherever they lie; with pages, those before `from` are zeros.
template <bool kPairs>
inline void PackKeysOf(const Call& c, int64_t b, int64_t k, int64_t j0, int64_t from, int64_t n, float* stage,
                       float* panels) {
  if (!c.pages) return PackTransposed<kPairs>(c.key, c.D, b, k, j0, n, stage, panels);
  const View x = Gathered<kPairs>(c, c.key, c.key_scale, c.D, b, k, j0, from, n, stage);
  PackTransposed<kPairs>(x, c.D, 0, 0, 0, n, stage, panels);
}
template <bool kPairs>
inline bool PackValuesOf(const Call& c, int64_t b, int64_t k, int64_t j0, int64_t from, int64_t n, float* stage,
                         float* nan_marker, float* panels) {
  if (!c.pages) return PackValues<kPairs>(c.value, c.Dv, b, k, j0, n, stage, nan_marker, panels);
  const View x = Gathered<kPairs>(c, c.value, c.value_scale, c.Dv, b, k, j0, from, n, stage);
  return PackValues<kPairs>(x, c.Dv, 0, 0, 0, n, stage, nan_marker, panels);
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
