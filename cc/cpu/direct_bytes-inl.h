// Few query rows (decoding) by keys and values of 8 bits, which are read in place and widened to bfloat16 in registers:
// products of pairs, in the order of those with bfloat16 keys and values, whose bits they have.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/direct_dots-inl.h"
#include "cpu/direct_values-inl.h"
#include "cpu/simd-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

constexpr int64_t kBytesAtOnce = 4 * kLanes;

// Whether an array's elements are widened like this.
template <bool kPairs>
JAX_FA_INLINE bool AreBytes(const View& x) {
  return kPairs && IsByte(x.dtype);
}

// Calls what(widen) for a type, known as a constant.
template <bool kPairs, typename What>
JAX_FA_INLINE void WithWiden(DType type, const What& what) {
  switch (type) {
    case DType::kI8: return what(typename Unit<kPairs>::template Widen<DType::kI8>{});
    case DType::kF8E4M3: return what(typename Unit<kPairs>::template Widen<DType::kF8E4M3>{});
    default: return what(typename Unit<kPairs>::template Widen<DType::kF8E5M2>{});
  }
}

// One step of kR rows by kDirectTile keys of a head, from element d on.
template <bool kPairs, int kR, bool kAll, typename Widen>
JAX_FA_INLINE void ByteDotStep(const Widen& widen, const char* const* keys, int64_t d, int64_t rest, const float* q,
                               int64_t q_row, F* sums) {
  const int64_t units = Units<kPairs>(rest);
#pragma GCC unroll 4
  for (int i = 0; i < kDirectTile; ++i) {
    F key[2];
    widen.template Row<kAll>(keys[i] + d, rest, key);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) {
        const float* p = q + r * q_row + d / 2 + h * kLanes;
        const int64_t left = units - h * kLanes;
        const F x = kAll ? Load(p) : LoadFirst(p, static_cast<int>(left < 0 ? 0 : left < kLanes ? left : kLanes));
        sums[r * kDirectTile + i] = Unit<kPairs>::MulAdd(key[h], x, sums[r * kDirectTile + i]);
      }
  }
}

template <bool kPairs, int kR, typename Widen>
__attribute__((noinline)) void ByteDotTile(const char* const* keys, const float* q, int64_t q_row, int64_t D, float* to,
                                           int64_t s_row, Ask ask) {
  const Widen widen;
  F sums[kR * kDirectTile];
#pragma GCC unroll 16
  for (int i = 0; i < kR * kDirectTile; ++i) sums[i] = Set(0.0f);
  int64_t d = 0;
  for (; d + kBytesAtOnce <= D; d += kBytesAtOnce) {
    ask.Some();
    ByteDotStep<kPairs, kR, true>(widen, keys, d, 0, q, q_row, sums);
  }
  if (d < D) ByteDotStep<kPairs, kR, false>(widen, keys, d, D - d, q, q_row, sums);
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) SumFour(sums + r * kDirectTile, to + r * s_row);
}

// The products of n rows of a head with kDirectTile keys of D elements. As many bytes as the keys have are asked for from
// `ask` on.
template <bool kPairs>
inline void ByteDots(DType type, const char* const* keys, int64_t n, const float* q, int64_t q_row, int64_t D,
                     float* to, int64_t s_row, const char* ask) {
  static_assert(kDirectTile == 4, "sums of lanes are taken four at a time");
  WithWiden<kPairs>(type, [&](auto widen) {
    using Widen = decltype(widen);
    const int64_t parts = RowTiles(n);
    const int64_t step = kDirectTile * kBytesAtOnce / parts;
    const bool far = AsksFar(parts, 1);
    for (int64_t r = 0, done; r < n; r += done, ask += kDirectTile * D / parts) {
      done = n - r >= 4 ? 4 : n - r >= 2 ? 2 : 1;
      const float* x = q + r * q_row;
      float* at = to + r * s_row;
      switch (done) {
        case 4: ByteDotTile<kPairs, 4, Widen>(keys, x, q_row, D, at, s_row, {ask, step, far}); break;
        case 2: ByteDotTile<kPairs, 2, Widen>(keys, x, q_row, D, at, s_row, {ask, step, far}); break;
        default: ByteDotTile<kPairs, 1, Widen>(keys, x, q_row, D, at, s_row, {ask, step, far});
      }
    }
  });
}

// Adds to kBytesAtOnce columns of kR rows of sums, from column d on, `count` values times their weights: that of value i is
// at[i] bytes behind `first`. `zeros` stands for what lacks in the last pair.
template <bool kPairs, int kR, bool kAll, typename Widen>
__attribute__((noinline)) void AddBytes(const char* first, const int64_t* at, int64_t count, int64_t rest,
                                        const char* zeros, const float* weights, int64_t s_row, float* sums, int64_t dv,
                                        Ask ask) {
  constexpr int kV = 4;
  const Widen widen;
  F acc[kR][kV];
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kV; ++i) acc[r][i] = Load(sums + r * dv + i * kLanes);
  for (int64_t j = 0; j < count; j += 2, ++weights) {
    F v[kV];
    widen.template Pair<kAll>(first + at[j], j + 1 < count ? first + at[j + 1] : zeros, rest, v);
    ask.Some();
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      const F w = Set(weights[r * s_row]);
#pragma GCC unroll 4
      for (int i = 0; i < kV; ++i) acc[r][i] = Unit<kPairs>::MulAdd(w, v[i], acc[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kV; ++i) Store(sums + r * dv + i * kLanes, acc[r][i]);
}

// The same for n rows and all `columns`. As many bytes as the values have are asked for from `ask` on.
template <bool kPairs>
inline void ByteValues(DType type, const char* first, const int64_t* at, int64_t count, int64_t columns,
                       const char* zeros, int64_t n, const float* weights, int64_t s_row, float* sums, int64_t dv,
                       const char* ask) {
  WithWiden<kPairs>(type, [&](auto widen) {
    using Widen = decltype(widen);
    const int64_t parts = RowTiles(n), step = 2 * kBytesAtOnce / parts;
    for (int64_t d = 0; d < columns; d += kBytesAtOnce)
      for (int64_t r = 0, done; r < n; r += done, ask += (count + 1) / 2 * step) {
        const bool all = d + kBytesAtOnce <= columns;
        const auto add = [&](auto rows) {
          constexpr int kR = sizeof(rows);
          const auto run = all ? AddBytes<kPairs, kR, true, Widen> : AddBytes<kPairs, kR, false, Widen>;
          run(first + d, at, count, columns - d, zeros, weights + r * s_row, s_row, sums + r * dv + d, dv,
              {ask, all ? step : 0, AsksFar(parts, 1)});
        };
        done = n - r >= 4 ? 4 : n - r >= 2 ? 2 : 1;
        switch (done) {
          case 4: add(int32_t{}); break;
          case 2: add(int16_t{}); break;
          default: add(int8_t{});
        }
      }
  });
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
