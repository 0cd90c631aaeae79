// Few query rows (decoding): the time is that of reading keys and values once, so they are read in place
// instead of being packed. A task takes all key heads of a range of keys.
//
// The backward of such calls takes its products q.k from here too: summed in another order they would differ
// from those of the saved max and sum, which matters where logits are large. Hence the choice depends on the shape alone.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/forward_plan-inl.h"
#include "cpu/gemm-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/softmax-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// One vector of elements of an array, or of units, read in place.
template <bool kPairs, DType kType>
JAX_FA_INLINE F LoadAs(const char* p, int64_t i) {
  if constexpr (kPairs || kType == DType::kF32) {
    return Load(reinterpret_cast<const float*>(p) + i);
  } else if constexpr (kType == DType::kBF16) {
    return LoadBF16(reinterpret_cast<const uint16_t*>(p) + i);
  } else {
    return LoadF16(reinterpret_cast<const uint16_t*>(p) + i);
  }
}

// The last `n` elements of a row, from unit i on, which do not fill a vector; then zeros.
template <bool kPairs, DType kType>
JAX_FA_INLINE F LoadRest(const char* p, int64_t i, int n) {
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(p);
  if constexpr (kPairs) {
    return Unit<kPairs>::LoadFirst(halves + 2 * i, n);
  } else if constexpr (kType == DType::kF32) {
    return LoadFirst(reinterpret_cast<const float*>(p) + i, n);
  } else if constexpr (kType == DType::kBF16) {
    return LoadFirstBF16(halves + i, n, i > 0);
  } else {
    return LoadFirstF16(halves + i, n, i > 0);
  }
}

// kR rows of queries times kLanes / kR keys of D elements: lane i of the result is row i / (kLanes / kR), key
// i % (kLanes / kR).
template <bool kPairs, DType kType, int kR>
inline F DotKeys(const float* q, int64_t q_row, int64_t D, const char* const* keys) {
  constexpr int kKeys = kLanes / kR;
  constexpr int64_t kPer = Unit<kPairs>::kElements;
  F sums[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sums[i] = Set(0.0f);
  int64_t d = 0;
  for (; d + kLanes <= D / kPer; d += kLanes) {
    F x[kR];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) x[r] = Load(q + r * q_row + d);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      const F key = LoadAs<kPairs, kType>(keys[i], d);
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) sums[r * kKeys + i] = Unit<kPairs>::MulAdd(key, x[r], sums[r * kKeys + i]);
    }
  }
  if (const int rest = static_cast<int>(D - d * kPer); rest > 0) {
    F x[kR];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) x[r] = LoadFirst(q + r * q_row + d, static_cast<int>(Units<kPairs>(rest)));
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      const F key = LoadRest<kPairs, kType>(keys[i], d, rest);
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) sums[r * kKeys + i] = Unit<kPairs>::MulAdd(key, x[r], sums[r * kKeys + i]);
    }
  }
  return SumEach(sums);
}

// Rows r .. r + kR of logits for kLanes keys.
template <bool kPairs, DType kType, int kR>
inline void DotRows(const float* q, int64_t q_row, int64_t D, const char* const* keys, float* logits, int64_t s_row) {
  constexpr int kKeys = kLanes / kR;
  for (int j = 0; j < kLanes; j += kKeys) {
    float lanes[kLanes];
    Store(lanes, DotKeys<kPairs, kType, kR>(q, q_row, D, keys + j));
    for (int r = 0; r < kR; ++r) __builtin_memcpy(logits + r * s_row + j, lanes + r * kKeys, sizeof(float) * kKeys);
  }
}

template <bool kPairs, DType kType>
inline void DotAll(int64_t n, const float* q, int64_t q_row, int64_t D, const char* const* keys, float* logits,
                   int64_t s_row) {
  int64_t r = 0;
  for (; r + 4 <= n; r += 4) DotRows<kPairs, kType, 4>(q + r * q_row, q_row, D, keys, logits + r * s_row, s_row);
  for (; r + 2 <= n; r += 2) DotRows<kPairs, kType, 2>(q + r * q_row, q_row, D, keys, logits + r * s_row, s_row);
  for (; r < n; ++r) DotRows<kPairs, kType, 1>(q + r * q_row, q_row, D, keys, logits + r * s_row, s_row);
}

// Products of the n rows of head k, as units in q, with up to kLanes keys from j0 on; those from `end` on repeat the last
// key and are not looked at. `stage` holds kLanes rows.
template <bool kPairs>
inline void DirectDots(const Call& c, int64_t b, int64_t k, int64_t n, const float* q, int64_t q_row, int64_t j0,
                       int64_t end, float* stage, float* logits, int64_t s_row) {
  const char* keys[kLanes];
  const bool in_place = c.key.col == 1;
  const int64_t ld = RoundUp(Units<kPairs>(c.D), kLanes);
  for (int64_t i = 0; i < kLanes; ++i) {
    const int64_t j = j0 + i < end ? j0 + i : end - 1;
    keys[i] = c.key.Bytes(b, k, j);
    if (in_place) continue;
    CopyRow<kPairs>(c.key, b, k, j, c.D, stage + i * ld);
    keys[i] = reinterpret_cast<const char*>(stage + i * ld);
  }
  if (kPairs || c.key.dtype == DType::kF32 || !in_place) {
    DotAll<kPairs, DType::kF32>(n, q, q_row, c.D, keys, logits, s_row);
  } else if (c.key.dtype == DType::kBF16) {
    DotAll<kPairs, DType::kBF16>(n, q, q_row, c.D, keys, logits, s_row);
  } else {
    DotAll<kPairs, DType::kF16>(n, q, q_row, c.D, keys, logits, s_row);
  }
}

// A 16-bit value row of n elements as floats, up to whole vectors: row `i` of panels of `rows` rows.
template <DType kType>
inline void WidenRow(const uint16_t* x, int64_t n, int64_t i, int64_t rows, float* panels) {
  const auto at = [&](int64_t d) { return panels + (d / kPanel * rows + i) * kPanel + d % kPanel; };
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) Store(at(d), kType == DType::kBF16 ? LoadBF16(x + d) : LoadF16(x + d));
  if (const int rest = static_cast<int>(n - d); rest > 0)
    Store(at(d), kType == DType::kBF16 ? LoadFirstBF16(x + d, rest, d > 0) : LoadFirstF16(x + d, rest, d > 0));
}

// Adds the product with values [units][row], of which the first `columns` count, to acc.
template <bool kPairs, bool kPart, int kVectors = 1>
inline void DirectProduct(int64_t columns, int64_t n, int64_t units, const float* weights, int64_t s_row,
                          const float* values, int64_t row, float* acc, int64_t dv) {
  if constexpr (kVectors < kPanelVectors) {
    if (columns > kVectors * kLanes)
      return DirectProduct<kPairs, kPart, kVectors + 1>(columns, n, units, weights, s_row, values, row, acc, dv);
  }
  Gemm<kPairs, true, kVectors, kPart>(n, units, weights, s_row, 1, values, acc, dv, row,
                                      static_cast<int>(columns - (kVectors - 1) * kLanes));
}

// Adds to the output of the n rows of head k the product with the values j0 + [from, to), floats read in place.
template <bool kPairs>
inline void DirectValues(const Call& c, const ForwardScratch<kPairs>& s, int64_t b, int64_t k, int64_t n, int64_t j0,
                         int64_t from, int64_t to) {
  const int64_t given = to - from, dv = Panels(c.Dv) * kPanel, units = Units<kPairs>(given);
  const float* weights = s.logits + k * n * s.s_row + from / Unit<kPairs>::kElements;
  float* acc = s.acc + k * n * dv;
  const char* first = c.value.Bytes(b, k, j0 + from);
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(first);
  const float* values = s.own.values;
  int64_t panel = units * kPanel, row = kPanel;
  if constexpr (kPairs) {
    for (int64_t i = 0; i < given; i += 2) {
      const uint16_t* x = halves + i * c.value.row;
      PackPairs<kPairs>(x, i + 1 < given ? x + c.value.row : nullptr, c.Dv, i / 2, units, s.own.values);
    }
  } else if (c.value.dtype == DType::kF32) {
    values = reinterpret_cast<const float*>(first), panel = kPanel, row = c.value.row;
  } else {
    for (int64_t i = 0; i < given; ++i) {
      if (c.value.dtype == DType::kBF16) {
        WidenRow<DType::kBF16>(halves + i * c.value.row, c.Dv, i, given, s.own.values);
      } else {
        WidenRow<DType::kF16>(halves + i * c.value.row, c.Dv, i, given, s.own.values);
      }
    }
  }
  for (int64_t p = 0; p < Panels(c.Dv); ++p) {
    const int64_t columns = c.Dv - p * kPanel;
    if (columns >= kPanel) {
      Gemm<kPairs, true>(n, units, weights, s.s_row, 1, values + p * panel, acc + p * kPanel, dv, row);
    } else if (values == s.own.values) {  // whole vectors of them
      DirectProduct<kPairs, false>(columns, n, units, weights, s.s_row, values + p * panel, row, acc + p * kPanel, dv);
    } else {
      DirectProduct<kPairs, !kPairs>(columns, n, units, weights, s.s_row, values + p * panel, row, acc + p * kPanel,
                                     dv);
    }
  }
}

// The rows of all key heads (n of each, one head after the other in the scratch) over the keys j0 + [0, width) that lie
// within `all`. Keys, then values, are read in the order of the memory where heads lie side by side, which the
// processor's own prefetching follows. Where a value of a masked call is not finite, values are packed, which keeps it
// apart from the rows to which it is masked.
template <bool kPairs>
inline void DirectBlock(const Call& c, const ForwardScratch<kPairs>& s, int64_t b, int64_t n, int64_t j0, int64_t width,
                        Range all) {
  const int64_t dv = Panels(c.Dv) * kPanel;
  const int64_t first = all.lo > j0 ? all.lo - j0 : 0, last = all.hi < j0 + width ? all.hi - j0 : width;
  if (first >= last) return;
  const int64_t c0 = first / kLanes * kLanes, c1 = RoundUp(last, kLanes);
  for (int64_t j = c0; j < c1; j += kLanes)
    for (int64_t k = 0; k < c.K; ++k)
      DirectDots<kPairs>(c, b, k, n, s.q + k * n * s.q_row, s.q_row, j0 + j, j0 + last, s.stage,
                         s.logits + k * n * s.s_row + j, s.s_row);
  bool packs = c.value.col != 1;
  if (IsMasked(c) && !packs) {
    float bad = 0.0f;
    for (int64_t j = c0; j < last; ++j)
      for (int64_t k = 0; k < c.K; ++k) bad += ZeroOrNaN(ReadRow<kPairs>(c.value, b, k, j0 + j, c.Dv, s.stage), c.Dv);
    packs = bad != 0.0f;
  }
  const auto soften = [&](int64_t k, const float* nan_marker) {
    for (int64_t r = k * n; r < (k + 1) * n; ++r)
      SoftmaxRow<kPairs>(c, RowAt(c, b, k, r - k * n), j0, Within(s.lo[r], s.hi[r], j0, width), c0, c1, nan_marker,
                         s.tmp, s.logits + r * s.s_row, s.m + r, s.l + r, s.acc + r * dv);
  };
  if (packs) {
    const int64_t units = Units<kPairs>(width), from = c0 / Unit<kPairs>::kElements, to = Units<kPairs>(last);
    for (int64_t k = 0; k < c.K; ++k) {
      float* nan_marker = IsMasked(c) ? s.own.nan_marker : nullptr;
      const bool any = PackValues<kPairs>(c.value, c.Dv, b, k, j0, width, s.stage, nan_marker, s.own.values);
      soften(k, any ? nan_marker : nullptr);
      for (int64_t p = 0; p < Panels(c.Dv); ++p)
        Gemm<kPairs, true>(n, to - from, s.logits + k * n * s.s_row + from, s.s_row, 1,
                           s.own.values + (p * units + from) * kPanel, s.acc + k * n * dv + p * kPanel, dv);
    }
    return;
  }
  for (int64_t k = 0; k < c.K; ++k) soften(k, nullptr);
  for (int64_t j = c0; j < last; j += kDirectStep)
    for (int64_t k = 0; k < c.K; ++k)
      DirectValues<kPairs>(c, s, b, k, n, j0, j, j + kDirectStep < last ? j + kDirectStep : last);
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
