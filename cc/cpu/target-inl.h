// The instruction set that a translation unit compiles the kernels for.
//
// kernel_<set>.cc is compiled with the flags of its set. It defines JAX_FA_ISA, the namespace of everything here, and
// JAX_FA_SIMD, the header with the vectors of the set. Parsed alone, as editors and linters do, each `-inl.h` header
// takes the portable set, and simd_<set>-inl.h its own. A translation unit holds one set, so an ordinary include guard
// is a guard per set. All but the entries of kernel-inl.h has internal linkage, and nothing of the standard library is
// used, so that code of one set is never called for another (see call.h).
#pragma once

#ifndef JAX_FA_ISA
#define JAX_FA_ISA portable
#define JAX_FA_SIMD "cpu/simd_portable-inl.h"
#endif

#include <stdint.h>

#include "call.h"
#include "cpu/tuning.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

constexpr int kLanes = kTarget.lanes, kPanelVectors = kTarget.vectors, kRows = kTarget.rows;
constexpr int kPanel = kLanes * kPanelVectors;  // columns of a packed panel
constexpr bool kHasPairs = kTarget.pairs, kHasMatrix = kTarget.matrix;
constexpr float kLog2E = 1.44269504088896340736f;

// Rows of a tile of rows, which a product takes at once, and the multiple of keys at which its keys begin and end: with
// AMX, 16 pairs.
constexpr int kTileRows = kHasMatrix ? 16 : kRows;
constexpr int64_t kTileKeys = kHasMatrix ? 32 : 1;

inline const Tiles& TilesInUse() { return TuningInUse().tiles; }
inline int64_t Chunk() { return TuningInUse().chunk_floats / kPanel; }  // rows of a panel

// What the products are made of: 32-bit units in the lanes of a vector, one float or (where the instruction set has
// products of bfloat16) two neighbours along the sum, the first in the low half.
template <bool kPairs>
struct Unit;

// Products of pairs in tiles of a matrix, and what a task needs for them while it runs.
template <bool kPairs>
struct Matrix;
template <bool kHasMatrix>
struct TaskState {};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
