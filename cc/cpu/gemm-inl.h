// C[M][kPanel] (+)= sum_k A(i, k) B[k][kPanel], with B a packed panel and A read by broadcast; k counts units.
//
// A is addressed by a row and a k stride, so row-major A (logits) and column-major A (the transposed
// products of the backward) are the same code. kRows x kPanelVectors accumulators fill the registers; inlined, the
// compiler would keep its pointers in memory.
#pragma once

#include "cpu/simd-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// What a product asks for at each step of its sums: here nothing.
struct Quiet {
  JAX_FA_INLINE void Some() {}
};

template <bool kPairs, int M, bool kAdd, int kVectors, typename Asks>
__attribute__((noinline)) void GemmRows(int64_t K, const float* __restrict a, int64_t a_row, int64_t a_k,
                                        const float* __restrict b, int64_t b_row, float* __restrict c, int64_t c_row,
                                        Asks ask) {
  F acc[M][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[i][v] = Set(0.0f);
  for (int64_t k = 0; k < K; ++k) {
    F bv[kVectors];
    ask.Some();
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) bv[v] = Load(b + k * b_row + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const F ai = Repeat(a + i * a_row + k * a_k);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[i][v] = Unit<kPairs>::MulAdd(ai, bv[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* p = c + i * c_row + v * kLanes;
      Store(p, kAdd ? Load(p) + acc[i][v] : acc[i][v]);
    }
}

// The same for any number of rows, split as evenly as possible. With kAdd the sum over k starts from zero
// and is added to C at the end: continuing C's accumulation would cost accuracy. kVectors: those of a panel that are
// there.
template <bool kPairs, bool kAdd, int kVectors, typename Asks>
inline void GemmVectors(int64_t rows, int64_t K, const float* a, int64_t a_row, int64_t a_k, const float* b,
                        int64_t b_row, float* c, int64_t c_row, Asks ask) {
  static_assert(kRows <= 6, "the cases below");
  const int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t i0 = rows * t / tiles, n = rows * (t + 1) / tiles - i0;
    const float* at = a + i0 * a_row;
    float* ct = c + i0 * c_row;
    switch (n) {
      case 1: GemmRows<kPairs, 1, kAdd, kVectors>(K, at, a_row, a_k, b, b_row, ct, c_row, ask); break;
      case 2: GemmRows<kPairs, 2, kAdd, kVectors>(K, at, a_row, a_k, b, b_row, ct, c_row, ask); break;
      case 3: GemmRows<kPairs, 3, kAdd, kVectors>(K, at, a_row, a_k, b, b_row, ct, c_row, ask); break;
      case 4: GemmRows<kPairs, 4, kAdd, kVectors>(K, at, a_row, a_k, b, b_row, ct, c_row, ask); break;
      case 5: GemmRows<kPairs, 5, kAdd, kVectors>(K, at, a_row, a_k, b, b_row, ct, c_row, ask); break;
      default: GemmRows<kPairs, 6, kAdd, kVectors>(K, at, a_row, a_k, b, b_row, ct, c_row, ask); break;
    }
  }
}

// ... of which the set's matrix tiles take what fills them.
template <bool kPairs, bool kAdd, int kVectors = kPanelVectors, typename Asks = Quiet>
inline void Gemm(int64_t rows, int64_t K, const float* a, int64_t a_row, int64_t a_k, const float* b, float* c,
                 int64_t c_row, int64_t b_row = kPanel, Asks ask = {}) {
  if constexpr (kPairs && kHasMatrix && kVectors == kPanelVectors) {
    const int64_t done = Matrix<kPairs>::template Product<kAdd>(rows, K, a, a_row, a_k, b, b_row, c, c_row);
    if (done > 0) {
      if (done == K) return;
      a += done * a_k, b += done * b_row;
      return GemmVectors<kPairs, true, kVectors>(rows, K - done, a, a_row, a_k, b, b_row, c, c_row, ask);
    }
  }
  GemmVectors<kPairs, kAdd, kVectors>(rows, K, a, a_row, a_k, b, b_row, c, c_row, ask);
}

// Columns of a panel: whole vectors of them are computed, from that with `first` to that with `end` - 1.
struct Columns {
  int64_t first, end;
};

// The same for some columns alone. Matrix tiles take whole panels: other sums would not have the same bits for every tile
// of rows.
template <bool kPairs, bool kAdd, int kVectors = 1, typename Asks = Quiet>
inline void GemmColumns(const Columns& columns, int64_t rows, int64_t K, const float* a, int64_t a_row, int64_t a_k,
                        const float* b, float* c, int64_t c_row, int64_t b_row = kPanel, Asks ask = {}) {
  const int64_t first = columns.first / kLanes * kLanes;
  if constexpr (kVectors == kPanelVectors || (kPairs && kHasMatrix)) {
    Gemm<kPairs, kAdd>(rows, K, a, a_row, a_k, b, c, c_row, b_row, ask);
  } else if (columns.end - first > kVectors * kLanes) {
    GemmColumns<kPairs, kAdd, kVectors + 1>(columns, rows, K, a, a_row, a_k, b, c, c_row, b_row, ask);
  } else {
    Gemm<kPairs, kAdd, kVectors>(rows, K, a, a_row, a_k, b + first, c + first, c_row, b_row, ask);
  }
}

// Asks for part `i` of `parts` of n floats that the next products read, so that they do not wait for the caches
// beyond the first. Always inlined: GCC drops calls of a function that does nothing but this.
JAX_FA_INLINE void Prefetch(const float* p, int64_t n, int64_t i, int64_t parts) {
  for (int64_t at = n * i / parts / 16 * 16; at < n * (i + 1) / parts; at += 16) __builtin_prefetch(p + at);
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
