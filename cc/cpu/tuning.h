// The sizes of register tiles, cache blocks and tasks, each with its reason: all of them are here. A block of keys and a
// split into tasks fix the order of sums, so they depend on shapes and never on the number of threads.
#pragma once

#include <stdint.h>

#include "call.h"

namespace jax_fa {

// ---- registers: one row per instruction set ----
//
// A product keeps rows x vectors sums in registers, beside the `vectors` it loads from the packed operand and one element
// of the other operand, repeated in all lanes. Each step of the sum thus takes `vectors` loads and `rows` broadcasts for
// rows x vectors multiply-adds: the larger the tile, the less the loads count, and as soon as it exceeds the registers,
// the compiler keeps sums in memory.
struct Target {
  int lanes;          // floats of a vector
  int vectors, rows;  // of a tile
  int registers;      // vector registers
  bool pairs;         // whether it multiplies pairs of bfloat16

  constexpr bool Fits() const { return rows * vectors + vectors + 1 <= registers; }
};

namespace portable {
// 21 of the 32 registers of Arm. SSE has 16, and some sums are kept in memory.
constexpr Target kTarget{4, 4, 4, 32, false};
}  // namespace portable
namespace avx2 {
constexpr Target kTarget{8, 2, 6, 16, false};  // 15 of 16 ymm
}
namespace avx512 {
constexpr Target kTarget{16, 4, 6, 32, false};  // 29 of 32 zmm
}
namespace avx512_bf16 {
constexpr Target kTarget{16, 4, 6, 32, true};
}
static_assert(portable::kTarget.Fits() && avx2::kTarget.Fits() && avx512::kTarget.Fits() &&
              avx512_bf16::kTarget.Fits());

// ---- first cache (32 KiB or more) ----

// Floats of a panel that a product reads again and again while tiles of rows pass: 24 KiB, the rest is for the rows.
constexpr int64_t kChunkFloats = 6144;

// Few-row forward: keys whose products are computed together.
constexpr int kDirectTile = 4;

// ... and values (or pairs of them) that are added to the sums of one head, in registers, before the next head, from as many
// parts of a block. Decoding 32 heads on 8 in bfloat16 by AVX-512 took 9.2 ms with 8 parts and 14.0 ms with 16 neighbours,
// in float32 18.2 and 18.0 ms. With many rows the sums of all heads exceed the first cache.
constexpr int64_t kFewRows = 4, kFewValues = 8, kManyValues = 32;

// ---- second cache (512 KiB or more) ----

// Keys of a block, for a head_dim (the larger of D and Dv) up to `head_dim`.
struct KeyBlock {
  int64_t head_dim, keys;
};

template <int kCount>
JAX_FA_INLINE int64_t KeysOf(const KeyBlock (&blocks)[kCount], int64_t head_dim) {
  int i = 0;
  while (i + 1 < kCount && head_dim > blocks[i].head_dim) ++i;
  return blocks[i].keys;
}

// Forward: the logits of a group of rows stay there, 96 x 512 floats = 192 KiB, while a packed block of keys and values,
// 2 x 512 x 128 floats = 512 KiB at most, is read once for each group.
constexpr int64_t kGroupRows = 96;
constexpr KeyBlock kForwardKeys[] = {{128, 512}, {256, 256}, {INT64_MAX, 128}};

// Tangents: the same blocks of keys, so that a forward with tangents gives the bits of the forward. Logits and their
// tangents of a group of rows take 2 x 96 x 512 floats = 384 KiB. A packed block holds two more arrays, 4 x 512 x 128
// floats = 1 MiB at most, and may come from the third cache for each group: the more rows, the less often. With 48 rows a
// head_dim of 128 took 4 % longer.
constexpr int64_t kTangentRows = 96;

// Backward: p and ds of a block of rows stay there, 2 x 192 x 256 floats = 384 KiB for a head_dim up to 64. For a wider
// one the products take longer than reading p and ds again, and longer blocks of keys pack q and dout less often. Beyond
// 128, dk, dv, and the keys and values in both of their packed forms bound the block: 256 x 256 floats = 256 KiB each.
constexpr int64_t kBackwardRows = 192;
constexpr KeyBlock kBackwardKeys[] = {{64, 256}, {128, 512}, {256, 256}, {INT64_MAX, 128}};
constexpr int64_t kMostBackwardKeys = 512;

// Second derivative: of a block of rows and keys, the arrays (four and more), 4 x 96 x 128 floats = 192 KiB, and the packed
// keys and values of one pass, 4 x 128 x 128 floats = 256 KiB. Where those are packed again for each block of rows, twice
// the rows do it half as often.
constexpr int64_t kSecondRows = 96, kMostSecondRows = 192;
constexpr KeyBlock kSecondKeys[] = {{64, 256}, {INT64_MAX, 128}};
constexpr int64_t kMostSecondKeys = 256;

// ---- third cache, or memory ----

// Second derivative: the arrays of a block of rows and all of its keys are kept from the first pass to the second up to
// this many floats (4 MiB). Each number is written twice and read twice, 64 bytes a pair next to 1536 operations and more.
constexpr int64_t kSecondFloats = int64_t{1} << 20;

// ... and so are all packed keys and values of a key head, for its next block of rows, up to this many (20 MiB: 4096 keys
// and values of 128 elements, with tangents). Packed for each block of 54 rows they took a third of the time.
constexpr int64_t kSecondPackedFloats = int64_t{5} << 20;

// Fewest rows for which arrays are kept. With 30, and packed keys that stay, the second derivative took 2.8 times as long as
// the backward, and 3.4 times where the second pass computed four products again. Where keys are packed for each block, 54
// rows and 192 with those products took the same time.
constexpr int64_t kLeastSecondRows = 24, kLeastUnpackedRows = 60;

// ---- tasks ----

// Forward: rows of a task, which reads every packed key and value for each kGroupRows of them. Halved, down to one group,
// while there are fewer tasks than kFewTasks.
constexpr int64_t kTaskRows = 384, kFewTasks = 64;

// Forward of few rows (decoding): with fewer than kEnoughTasks tasks the keys are split so that there are about kFewTasks,
// of at least kSplitKeys keys each; below that the merging costs more than it gains.
constexpr int64_t kEnoughTasks = 32, kSplitKeys = 256;

// With at most this many query rows per key head, keys and values are read in place, kDirectKeys at a time: the time is
// that of reading them once, and packing would write and read them once more.
constexpr int64_t kDirectRows = 16, kDirectKeys = 128;

// Forward: packed keys and values of all heads may take this many floats (80 MiB); beyond, each task packs for itself.
constexpr int64_t kSharedFloats = int64_t{20} << 20;

// Tangents: the same, of up to four arrays (48 MiB), so that all memory of a call stays below 64 MiB. Beyond, heads take
// turns in waves; a head that is larger by itself is packed by each task, which takes a thirtieth of its time.
constexpr int64_t kTangentSharedFloats = int64_t{12} << 20;

// Backward: with fewer tasks than kBackwardTasks the keys are split, which takes a dq per part: up to kSplitBytes of them
// or, however large they are, as many as give kLeastBackwardTasks tasks.
constexpr int64_t kBackwardTasks = 16, kLeastBackwardTasks = 4, kSplitBytes = int64_t{64} << 20;

// Second derivative: likewise, of rows; each part has sums for all keys.
constexpr int64_t kSecondTasks = 16, kLeastSecondTasks = 4, kSecondSplitBytes = int64_t{32} << 20;

// A dq of more floats than this (4 MiB) is allocated for the task instead of being kept by each thread.
constexpr int64_t kThreadFloats = int64_t{1} << 20;

// Memory of a call is kept for the next one, up to this many floats in all (80 MiB): fresh pages cost a small call a
// tenth of its time.
constexpr int64_t kKeptFloats = int64_t{20} << 20;

}  // namespace jax_fa
