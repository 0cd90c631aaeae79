// The tiles of amx-inl.h in C++, as Intel's manual defines the instructions: for tests where no processor has them.
#pragma once

#include "cpu/convert-inl.h"
#include "cpu/target-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

constexpr int kTileSide = 16;

struct EmulatedTiles {
  bool configured;
  float tile[8][kTileSide][kTileSide];
};
thread_local EmulatedTiles emulated_tiles;

// A program that uses tiles without them, or leaves a task with them, is wrong.
JAX_FA_INLINE EmulatedTiles& UseTiles(bool configured = true) {
  if (emulated_tiles.configured != configured) __builtin_trap();
  return emulated_tiles;
}

struct MatrixTiles {
  MatrixTiles() {
    UseTiles(false).configured = true;
    __builtin_memset(emulated_tiles.tile, 0, sizeof emulated_tiles.tile);
  }
  ~MatrixTiles() { UseTiles().configured = false; }
  MatrixTiles(const MatrixTiles&) = delete;
  MatrixTiles& operator=(const MatrixTiles&) = delete;
};

template <int kTile>
inline void TileZero() {
  __builtin_memset(UseTiles().tile[kTile], 0, sizeof emulated_tiles.tile[kTile]);
}
template <int kTile>
inline void TileLoad(const float* p, int64_t row) {
  for (int i = 0; i < kTileSide; ++i)
    __builtin_memcpy(UseTiles().tile[kTile][i], p + i * row, sizeof(float) * kTileSide);
}
template <int kTile>
inline void TileStore(float* p, int64_t row) {
  for (int i = 0; i < kTileSide; ++i)
    __builtin_memcpy(p + i * row, UseTiles().tile[kTile][i], sizeof(float) * kTileSide);
}

// Numbers below the normal ones count as zero, in operands and results.
inline float Flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0.0f : x; }

// The even elements of the pairs and the odd ones are summed apart, from zero, and their sum is added.
template <int kSum, int kA, int kB>
inline void TileDot() {
  EmulatedTiles& t = UseTiles();
  const auto half = [](float pair, bool odd) {
    return Flushed(ToFloatBF16(static_cast<uint16_t>(FloatToBits(pair) >> (odd ? 16 : 0))));
  };
  for (int i = 0; i < kTileSide; ++i) {
    float even[kTileSide] = {}, odd[kTileSide] = {};
    for (int k = 0; k < kTileSide; ++k) {
      const float x = half(t.tile[kA][i][k], false), y = half(t.tile[kA][i][k], true);
      for (int j = 0; j < kTileSide; ++j) {
        even[j] = Flushed(__builtin_fmaf(x, half(t.tile[kB][k][j], false), even[j]));
        odd[j] = Flushed(__builtin_fmaf(y, half(t.tile[kB][k][j], true), odd[j]));
      }
    }
    for (int j = 0; j < kTileSide; ++j) {
      float& sum = t.tile[kSum][i][j];
      sum = Flushed(sum + Flushed(even[j] + odd[j]));
    }
  }
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
