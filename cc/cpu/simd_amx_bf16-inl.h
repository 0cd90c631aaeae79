// AVX-512 with products of bfloat16 pairs, those of whole tiles by AMX (TDPBF16PS).
#pragma once

#ifndef JAX_FA_ISA  // parsed alone
#define JAX_FA_ISA amx_bf16
#endif

#include "cpu/simd_avx512_bf16-inl.h"

// ... whose vectors it has.
#include "cpu/amx-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

template <>
struct TaskState<true> {
  MatrixTiles tiles;
};

template <>
struct Matrix<true> {
  // C (+)= A B over the whole tiles of K units, where kAdd as for Gemm; returns how many units those are. The choice
  // depends on K alone, and tiles of rows begin at whole tiles of keys (see kTileKeys), so that a row's sum is made of the
  // same parts however rows are grouped.
  template <bool kAdd>
  static int64_t Product(int64_t rows, int64_t K, const float* a, int64_t a_row, int64_t a_k, const float* b,
                         int64_t b_row, float* c, int64_t c_row) {
    const int64_t steps = K / kTileSide;
    if (steps == 0) return 0;
    alignas(64) float sums[kTileSide * kPanel];
    for (int64_t i = 0; i < rows; i += kTileSide) {
      const int n = static_cast<int>(rows - i < kTileSide ? rows - i : kTileSide);
      Sums(n, steps, a + i * a_row, a_row, a_k, b, b_row, sums);
      for (int r = 0; r < n; ++r)
        for (int v = 0; v < kPanel; v += kLanes) {
          float* to = c + (i + r) * c_row + v;
          const F sum = Load(sums + r * kPanel + v);
          Store(to, kAdd ? Load(to) + sum : sum);
        }
    }
    return steps * kTileSide;
  }

 private:
  // Four tiles of sums, one of A, and one of B for each of them.
  static void Sums(int n, int64_t steps, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row,
                   float* sums) {
    static_assert(kPanel == 4 * kTileSide && kLanes == kTileSide, "the tiles below");
    alignas(64) float packed[kTileSide * kTileSide];
    TileZero<0>();
    TileZero<1>();
    TileZero<2>();
    TileZero<3>();
    for (int64_t s = 0; s < steps; ++s, a += kTileSide * a_k, b += kTileSide * b_row) {
      if (n == kTileSide && a_k == 1) {
        TileLoad<4>(a, a_row);
      } else {
        Pack(n, a, a_row, a_k, packed);
        TileLoad<4>(packed, kTileSide);
      }
      Step<0, 5>(b, b_row);
      Step<1, 6>(b, b_row);
      Step<2, 7>(b, b_row);
      Step<3, 5>(b, b_row);
    }
    TileStore<0>(sums, kPanel);
    TileStore<1>(sums + kTileSide, kPanel);
    TileStore<2>(sums + 2 * kTileSide, kPanel);
    TileStore<3>(sums + 3 * kTileSide, kPanel);
  }

  template <int kSum, int kB>
  static JAX_FA_INLINE void Step(const float* b, int64_t b_row) {
    TileLoad<kB>(b + kSum * kTileSide, b_row);
    TileDot<kSum, 4, kB>();
  }

  // A tile of A by rows, with zeros from row n on; nothing behind A's rows is read.
  static void Pack(int n, const float* a, int64_t a_row, int64_t a_k, float* packed) {
    if (a_k == 1) {
      for (int i = 0; i < kTileSide; ++i) Store(packed + i * kTileSide, i < n ? Load(a + i * a_row) : Set(0.0f));
    } else {  // by columns
      alignas(64) float columns[kTileSide * kTileSide];
      for (int k = 0; k < kTileSide; ++k) Store(columns + k * kTileSide, LoadFirst(a + k * a_k, n));
      TransposeBlock(columns, kTileSide, packed, kTileSide);
    }
  }
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
