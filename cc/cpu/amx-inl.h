// The tiles of AMX: eight of 16 rows of 16 units, here all of that shape, and the product of two of them.
//
// In assembly, as the compilers' intrinsics take a tile's number as a literal only, and GCC's do not say which memory they
// read and write. With JAX_FA_EMULATE_AMX, the same in C++.
#pragma once

#include "cpu/target-inl.h"

#if defined(JAX_FA_EMULATE_AMX)
#include "cpu/amx_emulated-inl.h"
#else

namespace jax_fa::JAX_FA_ISA {
namespace {

constexpr int kTileSide = 16;

// A thread has tiles while this exists; what other libraries do with them comes before or after.
struct MatrixTiles {
  MatrixTiles() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_of_row[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    static_assert(sizeof shapes == 64, "as the processor reads it");
    for (int i = 0; i < 8; ++i) {
      shapes.bytes_of_row[i] = 4 * kTileSide;
      shapes.rows[i] = kTileSide;
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~MatrixTiles() { asm volatile("tilerelease"); }
  MatrixTiles(const MatrixTiles&) = delete;
  MatrixTiles& operator=(const MatrixTiles&) = delete;
};

template <int kTile>
JAX_FA_INLINE void TileZero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// Rows `row` floats apart.
template <int kTile>
JAX_FA_INLINE void TileLoad(const float* p, int64_t row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(4 * row), "i"(kTile) : "memory");
}
template <int kTile>
JAX_FA_INLINE void TileStore(float* p, int64_t row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(4 * row), "i"(kTile) : "memory");
}
// sum[i][j] += the products of row i of a's pairs and column j of b's.
template <int kSum, int kA, int kB>
JAX_FA_INLINE void TileDot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA

#endif
