// Rows of arrays to panels, which the products read in order.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/simd-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// One row of `n` elements into row `r` of panels of `rows` rows each ([panel][rows][kPanel]); the last panel
// is filled up with zeros, to whole vectors.
inline void PackRow(const float* src, int64_t n, int64_t r, int64_t rows, float* panels) {
  for (int64_t p = 0; p * kPanel < n; ++p) {
    float* dst = panels + (p * rows + r) * kPanel;
    const int64_t width = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
    int64_t c = 0;
    for (; c + kLanes <= width; c += kLanes) Store(dst + c, Load(src + p * kPanel + c));
    for (; c < width; ++c) dst[c] = src[p * kPanel + c];
    for (; c % kLanes != 0; ++c) dst[c] = 0.0f;
  }
}

// Rows j0 .. j0 + n of key or value as transposed panels [panel][units of width][kPanel]. `stage` holds kLanes rows.
template <bool kPairs>
inline void PackTransposed(const View& x, int64_t width, int64_t b, int64_t k, int64_t j0, int64_t n, float* stage,
                           float* panels) {
  const int64_t units = Units<kPairs>(width), ld = RoundUp(units, kLanes), per = Unit<kPairs>::kElements;
  const bool direct =
      (kPairs || x.dtype == DType::kF32) && x.col == 1 && width % (kLanes * per) == 0 && x.row % per == 0;
  // Columns without a row are not looked at: whole vectors of them stay as they are, but for what matrix tiles load.
  const int64_t columns = kPairs && kHasMatrix ? Panels(n) * kPanel : RoundUp(n, kLanes);
  for (int64_t r = 0; r < columns; r += kLanes) {
    float* dst = panels + (r / kPanel) * units * kPanel + r % kPanel;
    if (direct && r + kLanes <= n) {
      const float* src = reinterpret_cast<const float*>(x.Bytes(b, k, j0 + r));
      for (int64_t d = 0; d < units; d += kLanes) TransposeBlock(src + d, x.row / per, dst + d * kPanel, kPanel);
      continue;
    }
    for (int64_t i = 0; i < kLanes; ++i) {
      if (r + i < n) {
        CopyRow<kPairs>(x, b, k, j0 + r + i, width, stage + i * ld);
      } else {
        Fill(stage + i * ld, 0, ld, 0.0f);
      }
    }
    int64_t d = 0;
    for (; d + kLanes <= units; d += kLanes) TransposeBlock(stage + d, ld, dst + d * kPanel, kPanel);
    for (; d < units; ++d)
      for (int i = 0; i < kLanes; ++i) dst[d * kPanel + i] = stage[i * ld + d];
  }
}

// Two rows of `n` bfloat16 elements (the second may be null: zeros) as pairs: row `r` of panels of `rows` rows each.
template <bool kPairs>
inline void PackPairs(const uint16_t* first, const uint16_t* second, int64_t n, int64_t r, int64_t rows,
                      float* panels) {
  const auto put = [](float* dst, F a, F b) {
    F low, high;
    Unit<kPairs>::Interleave(a, b, &low, &high);
    Store(dst, low);
    Store(dst + kLanes, high);
  };
  const auto whole = [](const uint16_t* x) { return Load(reinterpret_cast<const float*>(x)); };
  float* dst = panels + r * kPanel;
  int64_t at = 0;
  if (second != nullptr) {
    for (; at + kPanel <= n; at += kPanel, dst += rows * kPanel)
#pragma GCC unroll 4
      for (int64_t c = 0; c < kPanel; c += 2 * kLanes) put(dst + c, whole(first + at + c), whole(second + at + c));
  }
  for (; at < n; at += kPanel, dst += rows * kPanel) {
    for (int64_t c = 0; c < kPanel && (kHasMatrix || at + c < n); c += 2 * kLanes) {  // matrix tiles take them all
      const int64_t rest = n - at - c;
      const auto part = [&](const uint16_t* x) {
        return x == nullptr || rest <= 0 ? Set(0.0f)
               : rest < 2 * kLanes       ? Unit<kPairs>::LoadFirst(x + at + c, static_cast<int>(rest))
                                         : whole(x + at + c);
      };
      put(dst + c, part(first), part(second));
    }
  }
}

// Rows given by `read(i, stage)` (a pointer to `width` elements; may use the stage), i = 0 .. n - 1, as panels
// [panel][units of n][kPanel]. `stage` holds two rows, filled up to whole panels.
template <bool kPairs, typename Read>
inline void PackRows(int64_t n, int64_t width, float* stage, float* panels, const Read& read) {
  if constexpr (!kPairs) {
    for (int64_t i = 0; i < n; ++i) PackRow(read(i, stage), width, i, n, panels);
  } else {
    const int64_t full = Panels(width) * kPanel;
    uint16_t* const stages[2] = {reinterpret_cast<uint16_t*>(stage), reinterpret_cast<uint16_t*>(stage) + full};
    for (int64_t i = 0; i < n; i += 2) {
      const uint16_t* first = read(i, reinterpret_cast<float*>(stages[0]));
      const uint16_t* second = i + 1 < n ? read(i + 1, reinterpret_cast<float*>(stages[1])) : nullptr;
      PackPairs<kPairs>(first, second, width, i / 2, Units<true>(n), panels);
    }
  }
}

// Rows j0 .. j0 + n of value, or of its tangent, of one head as panels. `nan_marker`: null where nothing is masked, else it gets NaN for each key
// whose values are not all finite; those values are 0, so that they reach only the rows to which they are visible.
// Returns whether there are any.
template <bool kPairs>
inline bool PackValues(const View& x, int64_t width, int64_t b, int64_t k, int64_t j0, int64_t n, float* stage,
                       float* nan_marker, float* panels) {
  Finite all;
  PackRows<kPairs>(n, width, stage, panels, [&](int64_t j, float* own) {
    const auto* row = ReadRow<kPairs>(x, b, k, j0 + j, width, own);
    if (nan_marker != nullptr) all.Take(row, width);
    return row;
  });
  if (all.ZeroOrNaN() == 0.0f) {
    if (nan_marker != nullptr) Fill(nan_marker, 0, n, 0.0f);
    return false;
  }
  // Once more, row by row.
  PackRows<kPairs>(n, width, stage, panels, [&](int64_t j, float* own) {
    const auto* row = ReadRow<kPairs>(x, b, k, j0 + j, width, own);
    nan_marker[j] = ZeroOrNaN(row, width);
    if (nan_marker[j] == 0.0f) return row;
    Fill(own, 0, Units<kPairs>(width), 0.0f);
    return reinterpret_cast<decltype(row)>(own);
  });
  return true;
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
