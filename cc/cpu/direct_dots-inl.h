// Few query rows (decoding): their products with keys that are read in place, and converted in registers.
//
// The backward of such calls takes its products q.k from here too: summed in another order they would differ
// from those of the saved max and sum, which matters where logits are large. Hence each product is summed in one order,
// whatever the tile it is part of.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/simd-inl.h"

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

// Calls what(type) with the type of elements of an array, or of units, as a constant.
template <DType kType>
struct Elements {
  static constexpr DType kOf = kType;
};
template <bool kPairs, typename What>
JAX_FA_INLINE void WithElements(DType type, const What& what) {
  if (kPairs || type == DType::kF32) {
    what(Elements<DType::kF32>{});
  } else if (type == DType::kBF16) {
    what(Elements<DType::kBF16>{});
  } else {
    what(Elements<DType::kF16>{});
  }
}

// One step of kR x kKeys products: a vector from unit d on, or (kRest) the last `rest` elements.
template <bool kPairs, DType kType, int kR, int kKeys, bool kRest>
JAX_FA_INLINE void DotStep(const float* q, int64_t q_row, const char* const* keys, int64_t d, int rest, F* sums,
                           int64_t ahead) {
  F x[kR];
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) {
    const float* p = q + r * q_row + d;
    x[r] = kRest ? LoadFirst(p, static_cast<int>(Units<kPairs>(rest))) : Load(p);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kKeys; ++i) {
    const F key = kRest ? LoadRest<kPairs, kType>(keys[i], d, rest) : LoadAs<kPairs, kType>(keys[i], d);
    if (!kRest) __builtin_prefetch(keys[i] + d * (kPairs || kType == DType::kF32 ? 4 : 2) + ahead);
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) sums[r * kKeys + i] = Unit<kPairs>::MulAdd(key, x[r], sums[r * kKeys + i]);
  }
}

// kR rows of queries times kDirectTile keys of D elements: the product of row r and key i goes to to[i][r * s_row]. As
// many keys are taken at a time as sums fit half of the registers.
template <bool kPairs, DType kType, int kR>
__attribute__((noinline)) void DotTile(const float* q, int64_t q_row, int64_t D, const char* const* keys,
                                       float* const* to, int64_t s_row, int64_t ahead) {
  constexpr int kSums = kTarget.registers / 2;
  constexpr int kKeys = kSums / kR < kDirectTile ? kSums / kR : kDirectTile;
  constexpr int64_t kPer = Unit<kPairs>::kElements;
  for (int first = 0; first < kDirectTile; first += kKeys, keys += kKeys, to += kKeys) {
    F sums[kR * kKeys];
#pragma GCC unroll 16
    for (int i = 0; i < kR * kKeys; ++i) sums[i] = Set(0.0f);
    const char* own[kKeys];
#pragma GCC unroll 4
    for (int i = 0; i < kKeys; ++i) own[i] = keys[i];
    int64_t d = 0;
    for (; d + kLanes <= D / kPer; d += kLanes)
      DotStep<kPairs, kType, kR, kKeys, false>(q, q_row, own, d, 0, sums, ahead);
    if (const int rest = static_cast<int>(D - d * kPer); rest > 0)
      DotStep<kPairs, kType, kR, kKeys, true>(q, q_row, own, d, rest, sums, ahead);
    float lanes[kR * kKeys];
#pragma GCC unroll 4
    for (int i = 0; i < kR * kKeys; i += 4) SumFour(sums + i, lanes + i);
#pragma GCC unroll 4
    for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) to[i][r * s_row] = lanes[r * kKeys + i];
  }
}

// The same for n rows and an array's type of keys.
template <bool kPairs>
inline void DotRows(DType type, int64_t n, const float* q, int64_t q_row, int64_t D, const char* const* keys,
                    float* const* to, int64_t s_row, int64_t ahead) {
  WithElements<kPairs>(type, [&](auto elements) {
    constexpr DType kType = decltype(elements)::kOf;
    float* at[kDirectTile];
    for (int i = 0; i < kDirectTile; ++i) at[i] = to[i];
    for (int64_t r = 0, done; r < n; r += done) {
      const float* rows = q + r * q_row;
      done = n - r >= 4 ? 4 : n - r >= 2 ? 2 : 1;
      switch (done) {
        case 4: DotTile<kPairs, kType, 4>(rows, q_row, D, keys, at, s_row, ahead); break;
        case 2: DotTile<kPairs, kType, 2>(rows, q_row, D, keys, at, s_row, ahead); break;
        default: DotTile<kPairs, kType, 1>(rows, q_row, D, keys, at, s_row, ahead);
      }
      for (int i = 0; i < kDirectTile; ++i) at[i] += done * s_row;
    }
  });
}

// The products of the n rows of head k, as units in q, with up to kDirectTile keys from j on below `end`,
// counted from key j0, which is column 0 of logits. The last column of these rows takes the others. `stage` holds kLanes
// rows.
template <bool kPairs>
inline void DirectDots(const Call& c, int64_t b, int64_t k, int64_t n, const float* q, int64_t q_row, int64_t j0,
                       int64_t j, int64_t end, float* stage, float* logits, int64_t s_row) {
  const char* keys[kDirectTile];
  float* to[kDirectTile];
  const bool in_place = c.key.col == 1;
  const int64_t ld = RoundUp(Units<kPairs>(c.D), kLanes);
  for (int i = 0; i < kDirectTile; ++i, ++j) {
    keys[i] = i > 0 ? keys[i - 1] : nullptr;
    to[i] = logits + s_row - 1;
    if (j >= end) continue;
    keys[i] = c.key.Bytes(b, k, j0 + j);
    to[i] = logits + j;
    if (in_place) continue;
    CopyRow<kPairs>(c.key, b, k, j0 + j, c.D, stage + i * ld);
    keys[i] = reinterpret_cast<const char*>(stage + i * ld);
  }
  DotRows<kPairs>(in_place ? c.key.dtype : DType::kF32, n, q, q_row, c.D, keys, to, s_row,
                  DirectNeighbours(c.key.dtype) * c.key.row * ItemSize(c.key.dtype));
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
