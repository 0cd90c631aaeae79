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

// Bytes of an element of an array, or of a unit.
template <bool kPairs, DType kType>
JAX_FA_INLINE constexpr int64_t BytesOf() {
  return kPairs ? 4 : ItemSize(kType);
}

// One vector of elements of an array, or of units, read in place.
template <bool kPairs, DType kType>
JAX_FA_INLINE F LoadAs(const char* p, int64_t i) {
  if constexpr (kPairs || kType == DType::kF32) {
    return Load(reinterpret_cast<const float*>(p) + i);
  } else if constexpr (kType == DType::kBF16) {
    return LoadBF16(reinterpret_cast<const uint16_t*>(p) + i);
  } else if constexpr (kType == DType::kF16) {
    return LoadF16(reinterpret_cast<const uint16_t*>(p) + i);
  } else {
    return LoadBytes<kType>(p + i);
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
  } else if constexpr (kType == DType::kF16) {
    return LoadFirstF16(halves + i, n, i > 0);
  } else {
    return LoadFirstBytes<kType>(p + i, n);
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
  } else if constexpr (!kPairs) {
    switch (type) {
      case DType::kBF16: return what(Elements<DType::kBF16>{});
      case DType::kF16: return what(Elements<DType::kF16>{});
      case DType::kI8: return what(Elements<DType::kI8>{});
      case DType::kF8E4M3: return what(Elements<DType::kF8E4M3>{});
      default: return what(Elements<DType::kF8E5M2>{});
    }
  }
}

// A key whose products with the rows of its head are due: where those rows begin, the key in place, and the place of the
// product with the first of them.
struct DueKey {
  const float* q;
  const char* key;
  float* to;
};

// What a product asks for, a part at each of its steps: so that no more is asked for at once than the processor can wait
// for, which would then wait itself.
struct Ask {
  const char* at;
  int64_t step;  // bytes
  bool far;      // for the second cache

  JAX_FA_INLINE void Some() {
    if (far) {
      for (int64_t line = 0; line < step; line += 64) __builtin_prefetch(at + line, 0, 2);
    } else {
      for (int64_t line = 0; line < step; line += 64) __builtin_prefetch(at + line);
    }
    at += step;
  }
};

// One step of kR x kKeys products: a vector from unit d on, or (kRest) the last `rest` elements.
template <bool kPairs, DType kType, int kR, int kKeys, bool kOneHead, bool kRest>
JAX_FA_INLINE void DotStep(const float* const* q, int64_t q_row, const char* const* keys, int64_t d, int rest,
                           F* sums) {
  F x[kR];
#pragma GCC unroll 4
  for (int i = 0; i < kKeys; ++i) {
    if (i == 0 || !kOneHead) {
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) {
        const float* p = q[i] + r * q_row + d;
        x[r] = kRest ? LoadFirst(p, static_cast<int>(Units<kPairs>(rest))) : Load(p);
      }
    }
    const F key = kRest ? LoadRest<kPairs, kType>(keys[i], d, rest) : LoadAs<kPairs, kType>(keys[i], d);
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) sums[r * kKeys + i] = Unit<kPairs>::MulAdd(key, x[r], sums[r * kKeys + i]);
  }
}

// Rows [r, r + kR) of each of kKeys keys. Those of one head are neighbours, and so are the products of a row with them.
template <bool kPairs, DType kType, int kR, int kKeys, bool kOneHead>
__attribute__((noinline)) void DotTile(const DueKey* due, int64_t r, int64_t q_row, int64_t D, int64_t s_row, Ask ask) {
  static_assert(kR * kKeys % 4 == 0, "sums of lanes are taken four at a time");
  constexpr int64_t kPer = Unit<kPairs>::kElements;
  F sums[kR * kKeys];
#pragma GCC unroll 16
  for (int i = 0; i < kR * kKeys; ++i) sums[i] = Set(0.0f);
  const char* keys[kKeys];
  const float* q[kKeys];
#pragma GCC unroll 4
  for (int i = 0; i < kKeys; ++i) {
    keys[i] = due[i].key;
    q[i] = due[i].q + r * q_row;
  }
  int64_t d = 0;
  for (; d + kLanes <= D / kPer; d += kLanes) {
    ask.Some();
    DotStep<kPairs, kType, kR, kKeys, kOneHead, false>(q, q_row, keys, d, 0, sums);
  }
  if (const int rest = static_cast<int>(D - d * kPer); rest > 0)
    DotStep<kPairs, kType, kR, kKeys, kOneHead, true>(q, q_row, keys, d, rest, sums);
  float lanes[kR * kKeys];
#pragma GCC unroll 4
  for (int i = 0; i < kR * kKeys; i += 4) SumFour(sums + i, lanes + i);
#pragma GCC unroll 4
  for (int i = 0; i < kR; ++i) {
    if constexpr (kOneHead) {
      __builtin_memcpy(due->to + (r + i) * s_row, lanes + i * kKeys, sizeof(float) * kKeys);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < kKeys; ++j) due[j].to[(r + i) * s_row] = lanes[i * kKeys + j];
    }
  }
}

// All kDirectTile keys, as many at a time as sums fit half of the registers. `parts`: of what lies at `ask`, one for each
// tile of rows.
template <bool kPairs, DType kType, int kR, bool kOneHead>
JAX_FA_INLINE void DotTiles(const DueKey* due, int64_t r, int64_t q_row, int64_t D, int64_t s_row, const char* ask,
                            int64_t parts) {
  constexpr int kSums = kTarget.registers / 2, kKeys = kSums / kR < kDirectTile ? kSums / kR : kDirectTile;
  constexpr int64_t kBytes = BytesOf<kPairs, kType>();
  const int64_t step = kKeys * kLanes * kBytes / parts, bytes = kKeys * Units<kPairs>(D) * kBytes / parts;
  for (int i = 0; i < kDirectTile; i += kKeys, ask += bytes)
    DotTile<kPairs, kType, kR, kKeys, kOneHead>(due + i, r, q_row, D, s_row, {ask, step, AsksFar(parts, kBytes)});
}

// Tiles of 4, 2 or 1 rows that n rows take.
inline int64_t RowTiles(int64_t n) { return (n + 3) / 4 + (n % 4 == 3); }

// The products of n rows of each head with kDirectTile keys of D elements of a type, which are of one head where there
// are several rows. Each is summed in one order. As many bytes as the keys have are asked for from `ask` on.
template <bool kPairs>
inline void DotRows(DType type, int64_t n, const DueKey* due, int64_t q_row, int64_t D, int64_t s_row,
                    const char* ask) {
  WithElements<kPairs>(type, [&](auto elements) {
    constexpr DType kType = decltype(elements)::kOf;
    if (n == 1) return DotTiles<kPairs, kType, 1, false>(due, 0, q_row, D, s_row, ask, 1);
    const int64_t parts = RowTiles(n), bytes = kDirectTile * Units<kPairs>(D) * BytesOf<kPairs, kType>() / parts;
    for (int64_t r = 0, done; r < n; r += done, ask += bytes) {
      done = n - r >= 4 ? 4 : n - r >= 2 ? 2 : 1;
      switch (done) {
        case 4: DotTiles<kPairs, kType, 4, true>(due, r, q_row, D, s_row, ask, parts); break;
        case 2: DotTiles<kPairs, kType, 2, true>(due, r, q_row, D, s_row, ask, parts); break;
        default: DotTiles<kPairs, kType, 1, true>(due, r, q_row, D, s_row, ask, parts);
      }
    }
  });
}

// Keys of D elements of a type, until there are kDirectTile of them, each with the n rows of its head. Where there are
// several rows, those of a head have to be neighbours, and finished before those of the next.
template <bool kPairs>
class DueKeys {
 public:
  DueKeys(DType type, int64_t n, int64_t q_row, int64_t D, int64_t s_row)
      : type_(type), n_(n), q_row_(q_row), D_(D), s_row_(s_row) {}

  int count() const { return count_; }

  // `ask()`: where what is to be asked for begins.
  template <typename Where>
  JAX_FA_INLINE void Add(const DueKey& key, const Where& ask) {
    due_[count_] = key;
    if (++count_ == kDirectTile) Multiply(ask());
  }

  // Of those that are left. Products with what lacks go to `any`, or behind those of the last key.
  void Finish(float* any) {
    if (count_ == 0) return;
    for (; count_ < kDirectTile; ++count_) due_[count_] = {due_[0].q, due_[0].key, n_ == 1 ? any : due_[0].to + count_};
    Multiply(due_[0].key);
  }

 private:
  JAX_FA_INLINE void Multiply(const char* ask) {
    count_ = 0;
    DotRows<kPairs>(type_, n_, due_, q_row_, D_, s_row_, ask);
  }

  const DType type_;
  const int64_t n_, q_row_, D_, s_row_;
  DueKey due_[kDirectTile];
  int count_ = 0;
};

// The products of the n rows of head k with keys [j, end), counted from key j0, which is column 0 of logits. The last
// column of these rows is written too, and up to kDirectTile - 1 behind the others.
template <bool kPairs>
inline void DirectDots(const Call& c, int64_t b, int64_t k, int64_t n, const float* q, int64_t q_row, int64_t j0,
                       int64_t j, int64_t end, float* stage, float* logits, int64_t s_row) {
  const bool in_place = c.key.col == 1;
  const int64_t ld = RoundUp(Units<kPairs>(c.D), kLanes);
  DueKeys<kPairs> due(in_place ? c.key.dtype : DType::kF32, n, q_row, c.D, s_row);
  for (; j < end; ++j) {
    const char* key = c.key.Bytes(b, k, c.KeyRow(b, j0 + j));
    if (!in_place) {
      float* own = stage + due.count() * ld;
      CopyRow<kPairs>(c.key, b, k, j0 + j, c.D, own);
      key = reinterpret_cast<const char*>(own);
    }
    due.Add({q, key, logits + j}, [&] { return key; });
  }
  due.Finish(logits + s_row - 1);
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
