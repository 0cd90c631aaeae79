// Few query rows (decoding): weights times values that are read in place, and converted in registers.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/direct_dots-inl.h"
#include "cpu/simd-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// What a product adds up: `count` units, each `step` bytes of values and `weight_step` units of weights after the one
// before. `second`: with kPairs the row whose elements are the other ones of the pairs.
struct ValueRows {
  int64_t count, step, weight_step;
  const char *first, *second;
};

// kV vectors of units from column d on, or (kRest) the last `rest` columns and zeros.
template <bool kPairs, DType kType, int kV, bool kRest>
JAX_FA_INLINE void LoadValues(const char* first, const char* second, int64_t d, int rest, F* v) {
  if constexpr (kPairs) {
    const auto load = [&](const char* p, int64_t at) {
      const uint16_t* x = reinterpret_cast<const uint16_t*>(p) + at;
      return kRest ? Unit<kPairs>::LoadFirst(x, rest) : Load(reinterpret_cast<const float*>(x));
    };
#pragma GCC unroll 4
    for (int i = 0; i < kV; i += 2) {
      const int64_t at = d + i * kLanes;
      Unit<kPairs>::Interleave(load(first, at), load(second, at), v + i, v + i + 1);
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kV; ++i)
      v[i] = kRest ? LoadRest<kPairs, kType>(first, d, rest) : LoadAs<kPairs, kType>(first, d + i * kLanes);
  }
}

// Adds to kV vectors of kR rows of sums their weights times values.
template <bool kPairs, DType kType, int kR, int kV, bool kRest>
__attribute__((noinline)) void AddValues(const ValueRows& x, int64_t d, int rest, const float* weights, int64_t s_row,
                                         float* sums, int64_t dv, Ask ask) {
  F acc[kR][kV];
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kV; ++i) acc[r][i] = Load(sums + r * dv + i * kLanes);
  const char *first = x.first, *second = x.second;
  for (int64_t u = x.count; u > 0; --u, first += x.step, second += x.step, weights += x.weight_step) {
    F v[kV];
    LoadValues<kPairs, kType, kV, kRest>(first, second, d, rest, v);
    ask.Some();
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      const F w = Set(weights[r * s_row]);
#pragma GCC unroll 8
      for (int i = 0; i < kV; ++i) acc[r][i] = Unit<kPairs>::MulAdd(w, v[i], acc[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kV; ++i) Store(sums + r * dv + i * kLanes, acc[r][i]);
}

// The same for all `columns`: kV vectors at a time, then half of them. `parts`: of what lies at `ask`, one for each tile of
// rows.
template <bool kPairs, DType kType, int kR, int kV>
inline void AddColumns(const ValueRows& x, int64_t d, int64_t columns, const float* weights, int64_t s_row, float* sums,
                       int64_t dv, const char* ask, int64_t parts) {
  constexpr int kLeast = kPairs ? 2 : 1;
  const int64_t step = kV * kLanes * BytesOf<kPairs, kType>() / parts;
  const bool far = AsksFar(parts, BytesOf<kPairs, kType>());
  for (; d + kV * kLanes <= columns; d += kV * kLanes, ask += x.count * step)
    AddValues<kPairs, kType, kR, kV, false>(x, d, 0, weights, s_row, sums + d, dv, {ask, step, far});
  if constexpr (kV > kLeast) {
    AddColumns<kPairs, kType, kR, kV / 2>(x, d, columns, weights, s_row, sums, dv, ask, parts);
  } else if (d < columns) {
    AddValues<kPairs, kType, kR, kLeast, true>(x, d, static_cast<int>(columns - d), weights, s_row, sums + d, dv,
                                               {ask, 0, far});
  }
}

// The same for n rows and an array's type of values. One row takes twice the vectors, for sums that do not wait for
// each other. As many bytes as the values have are asked for from `ask` on.
template <bool kPairs>
inline void AddRows(DType type, const ValueRows& x, int64_t columns, int64_t n, const float* weights, int64_t s_row,
                    float* sums, int64_t dv, const char* ask) {
  WithElements<kPairs>(type, [&](auto elements) {
    constexpr DType kType = decltype(elements)::kOf;
    const int64_t parts = RowTiles(n), bytes = x.count * columns * BytesOf<kPairs, kType>() / parts;
    for (int64_t r = 0, done; r < n; r += done, ask += bytes) {
      const float* w = weights + r * s_row;
      float* to = sums + r * dv;
      done = n - r >= 4 ? 4 : n - r >= 2 ? 2 : 1;
      switch (done) {
        case 4: AddColumns<kPairs, kType, 4, kPanelVectors>(x, 0, columns, w, s_row, to, dv, ask, parts); break;
        case 2: AddColumns<kPairs, kType, 2, kPanelVectors>(x, 0, columns, w, s_row, to, dv, ask, parts); break;
        default: AddColumns<kPairs, kType, 1, 2 * kPanelVectors>(x, 0, columns, w, s_row, to, dv, ask, parts);
      }
    }
  });
}

// Values of a head: that of key j lies `at[j]` bytes behind `first`, or, without `at`, j rows.
struct ValuesAt {
  const char* first;
  const int64_t* at;
  int64_t row;  // bytes

  JAX_FA_INLINE const char* Of(int64_t j) const { return first + (at == nullptr ? j * row : at[j]); }

  // Of `count` units from key j on those at equal steps.
  template <bool kPairs>
  JAX_FA_INLINE ValueRows Run(int64_t j, int64_t count) const {
    constexpr int64_t kPer = Unit<kPairs>::kElements;
    const char *p = Of(j), *second = kPairs ? Of(j + kPer - 1) : p;
    if (at == nullptr) return {count, kPer * row, 1, p, second};
    const int64_t step = count > 1 ? at[j + kPer] - at[j] : 0;
    int64_t n = 1;
    for (int64_t i = j + kPer; n < count; ++n, i += kPer)
      if (at[i] - at[i - kPer] != step || (kPairs && at[i + kPer - 1] - at[i] != second - p)) break;
    return {n, step, 1, p, second};
  }
};

// Adds to the sums of n rows `count` values of `columns` elements of a type, or pairs of them, from j on. Column 0 of the
// weights is that of key 0. `zeros` stands for what lacks in the pair of the last of all, key `end` - 1.
template <bool kPairs>
inline void DirectValues(DType type, int64_t columns, const ValuesAt& values, int64_t n, int64_t j, int64_t count,
                         int64_t end, const float* zeros, const float* weights, int64_t s_row, float* sums, int64_t dv,
                         const char* ask) {
  constexpr int64_t kPer = Unit<kPairs>::kElements;
  weights += j / kPer;
  const bool half = kPairs && j + (count - 1) * kPer + 1 == end;
  for (int64_t left = half ? count - 1 : count; left > 0;) {
    const ValueRows x = values.template Run<kPairs>(j, left);
    AddRows<kPairs>(type, x, columns, n, weights, s_row, sums, dv, ask);
    ask += x.count * kPer * columns * ItemSize(type);
    left -= x.count, j += x.count * kPer, weights += x.count;
  }
  if (!half) return;
  const ValueRows x{1, 0, 0, values.Of(j), reinterpret_cast<const char*>(zeros)};
  AddRows<kPairs>(type, x, columns, n, weights, s_row, sums, dv, x.first);
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
