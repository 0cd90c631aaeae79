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
  int lanes;            // floats of a vector
  int vectors, rows;    // of a tile
  int registers;        // vector registers
  bool pairs;           // whether it multiplies pairs of bfloat16
  bool matrix = false;  // ... and those of whole tiles by AMX

  constexpr bool Fits() const { return rows * vectors + vectors + 1 <= registers; }
};

namespace portable {
// 21 of the 32 registers of Arm. SSE has 16, and some sums are kept in memory.
constexpr Target kTarget{4, 4, 4, 32, false};
}  // namespace portable
namespace neon {
// 29 of the 32 registers of AArch64. Of a step's 24 FMLA, which take 12 cycles in two pipes (Cortex-A76, Neoverse N1 and
// N2) and 6 in four (Cortex-X, Neoverse V1 and V2, Apple M), none waits: 24 sums cover a latency of 4 in four pipes, for
// which 16 would do. The packed operand takes two loads of a pair of vectors, and FMLA by element reads the other one from
// one lane, so that a row's element is a plain load of 4 bytes: 8 loads of two or three a cycle, and no slot of the pipes,
// one of which a load that repeats an element (LD1R) takes on these cores. Counted, not measured.
constexpr Target kTarget{4, 4, 6, 32, false};
}  // namespace neon
namespace avx2 {
constexpr Target kTarget{8, 2, 6, 16, false};  // 15 of 16 ymm
}
namespace avx512 {
constexpr Target kTarget{16, 4, 6, 32, false};  // 29 of 32 zmm
}
namespace avx512_bf16 {
constexpr Target kTarget{16, 4, 6, 32, true};
}
namespace amx_bf16 {
// Vectors as above for all but the products of pairs. Those keep 16 rows x 64 columns in four of the eight tiles of AMX,
// beside one tile of A and three of B, so that a product does not wait for the load of the next one: a step of 16 units
// loads five tiles for four products, which take 16 cycles each, as the load of 16 lines takes 8. On paper: it has been
// run with emulated tiles only, never on a processor that has them.
constexpr Target kTarget{16, 4, 6, 32, true, true};
}  // namespace amx_bf16
static_assert(portable::kTarget.Fits() && neon::kTarget.Fits() && avx2::kTarget.Fits() && avx512::kTarget.Fits() &&
              avx512_bf16::kTarget.Fits() && amx_bf16::kTarget.Fits());

// ---- caches ----

// Bytes of a core's first and second cache, and of the third, which cores share.
struct Caches {
  int64_t first, second, third;
};

// Keys of a block, or rows, for a head_dim (the larger of D and Dv) up to `head_dim`.
struct KeyBlock {
  int64_t head_dim, keys;
};

template <int kCount>
JAX_FA_INLINE constexpr int64_t KeysOf(const KeyBlock (&blocks)[kCount], int64_t head_dim) {
  int i = 0;
  while (i + 1 < kCount && head_dim > blocks[i].head_dim) ++i;
  return blocks[i].keys;
}

// Fewer keys than these are not made one block for a mask of smaller blocks.
constexpr int64_t kLeastAlignedKeys = 128;

// What depends on the second cache.
//
// Forward: the logits of a group of rows stay in it while a packed block of keys and values is read once for each group.
// Tangents: the same blocks of keys, so that a forward with tangents gives the bits of a forward that packs them. Logits
// and their tangents take twice as much; a packed block holds two more arrays and may come from the third cache for each
// group: the more rows, the less often. With 48 rows instead of 96 a head_dim of 128 took 4 % longer.
// Backward: p and ds of a block of rows and keys stay there; q and dout, as rows and as panels, pass once for each block.
// For a wider head_dim the products take longer than reading p and ds again, and longer blocks of keys pack q and dout less
// often. Beyond 128, dk, dv, and the keys and values in both of their packed forms bound the block.
// Second derivative: the arrays of a block of rows and keys, four and more, and the packed keys and values of one pass.
// Where those are packed again for each block of rows, twice the rows do it half as often.
struct Tiles {
  int64_t second_cache;  // for one of at least so many bytes
  int64_t group_rows;    // of the forward
  KeyBlock forward_keys[3];
  int64_t tangent_rows;
  int64_t backward_rows;
  KeyBlock backward_keys[4];
  int64_t second_rows, most_second_rows;
  KeyBlock second_keys[2];
};

// Rows of a block, at most `most`, where a mask has blocks of so many: as many as no two of its blocks share, if these are
// not too few, or all rows of some.
JAX_FA_INLINE int64_t AlignedRows(const Call& c, int64_t most) {
  if (!c.blocks) return most;
  if (c.block_rows <= most) return most / c.block_rows * c.block_rows;
  for (int64_t rows = most; 2 * rows > most; --rows)
    if (c.block_rows % rows == 0) return rows;
  return most;
}

// Keys of a block, at most `most`, likewise: of up to two blocks of the mask, so that no masked one lies between visible ones.
JAX_FA_INLINE int64_t AlignedKeys(const Call& c, int64_t most) {
  while (c.blocks && most > 2 * c.block_keys && most > kLeastAlignedKeys) most /= 2;
  return most;
}

// The least first. The KiB beside each are those of its largest blocks at head_dim 64, then 128.
// clang-format off
constexpr Tiles kTiles[] = {
    {0,
     48, {{64, 256}, {128, 128}, {INT64_MAX, 128}},              // logits 48, keys and values 128; 24, 128
     48,                                                         // logits and their tangents 96; 48
     48, {{64, 128}, {128, 128}, {256, 64}, {INT64_MAX, 64}},    // p and ds 48, keys and values 96, dk and dv 64; 48, 192, 128
     48, 96, {{64, 128}, {INT64_MAX, 64}}},                      // four arrays 96, keys and values 128; 48, 128
    {int64_t{512} << 10,
     48, {{64, 512}, {128, 256}, {INT64_MAX, 128}},              // 96, 256; 48, 256
     96,                                                         // 384; 192
     96, {{64, 128}, {128, 128}, {256, 128}, {INT64_MAX, 64}},   // 96, 96, 64; 96, 192, 128
     96, 192, {{64, 128}, {INT64_MAX, 128}}},                    // 192, 128; 192, 256
    {int64_t{1} << 20,
     96, {{128, 512}, {256, 256}, {INT64_MAX, 128}},             // 192, 256; 192, 512
     96,                                                         // 384; 384
     192, {{64, 256}, {128, 512}, {256, 256}, {INT64_MAX, 128}}, // 384, 192, 128; 768, 768, 512
     96, 192, {{64, 256}, {INT64_MAX, 128}}},                    // 384, 256; 192, 256
};
// clang-format on

// The most of any row above: what arrays on the stack hold.
constexpr int64_t kMostRows = 192, kMostKeys = 512;

constexpr bool StackHolds(const Tiles& t) {
  return t.group_rows <= kMostRows && t.tangent_rows <= kMostRows && t.backward_rows <= kMostRows &&
         t.most_second_rows <= kMostRows && KeysOf(t.forward_keys, 0) <= kMostKeys &&
         KeysOf(t.backward_keys, 0) <= kMostKeys && KeysOf(t.backward_keys, 128) <= kMostKeys &&
         KeysOf(t.second_keys, 0) <= kMostKeys;
}
static_assert(StackHolds(kTiles[0]) && StackHolds(kTiles[1]) && StackHolds(kTiles[2]));

// Floats of a panel that a product reads again and again while tiles of rows pass: the rest of the first cache is for the
// rows, as many floats of each as the panel has rows. 24 of 48 KiB, and 16 of 32.
JAX_FA_INLINE int64_t ChunkFloats(const Caches& caches) { return caches.first >= (int64_t{48} << 10) ? 6144 : 4096; }

JAX_FA_INLINE const Tiles& TilesFor(const Caches& caches) {
  const Tiles* chosen = kTiles;
  for (const Tiles& t : kTiles)
    if (caches.second >= t.second_cache) chosen = &t;
  return *chosen;
}

// What this machine runs with: its caches, or those that JAX_FA_CPU_CACHES names. See caches.cc.
struct Tuning {
  Caches caches;
  Tiles tiles;
  int64_t chunk_floats;
  bool halves;  // a vector of 512 bits is multiplied in two halves: one a cycle, for two loads
};
const Tuning& TuningInUse();

// ---- few rows ----

// Forward of few rows: keys whose products are computed together.
constexpr int kDirectTile = 4;

// ... values of a head in turn before those of the next: heads that lie side by side are read nearly in the order of the
// memory. The more rows, the less that matters beside the sums, which are taken to registers and back for each turn. (Two
// cores of Zen 4, 8 heads of 128: with 8 values in turn, or 4 of 32 bits, one row took up to a fifth longer than with 16, with
// 64 a quarter; 16 rows take a fifteenth longer with 16 than with 32, and 64 are no better.)
JAX_FA_INLINE int64_t DirectNeighbours(int64_t rows) { return rows <= 4 ? 16 : 32; }

// ... and values of 8 bits, which are widened in registers, so many of a head in turn.
constexpr int64_t kByteNeighbours = 32;

// ... and how many bytes before it is read the memory is asked for, in its order, a few lines at a time.
constexpr int64_t kAskedBytes = 16384;

// ... by the second cache where products wait for memory, as the first one has no room for as much as that takes; where memory
// waits for products, of several tiles of rows (`parts`) or floats that are widened, by the first. (Two cores of Zen 4, 8
// heads of 128: 4 rows of each took 1.4 times as long with the first cache and 8 KiB, at 60 % to 68 % of the rate of
// reading alone; 16 rows of float16 a sixth longer with the second one.)
JAX_FA_INLINE bool AsksFar(int64_t parts, int64_t unit_bytes) { return parts <= (unit_bytes >= 4 ? 2 : 1); }

// ... of a paged cache, also the first lines of every page of the machine, so much further ahead: their address is translated
// by then, and the processor has begun to prefetch what follows. In an order without neighbours nothing else tells it where
// it goes on. (Pages of 16 keys of 2 KiB: without, half more time; with one line instead of 8, a twentieth.)
constexpr int64_t kTouchedBytes = 32768, kTouchedLines = 8, kMachinePage = 4096;

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

// ---- accuracy ----

// Tangents: the growth of a row's sum of weights that makes its center one of more of them. What a far center costs is then
// less than kGrown times what the distances of tangents from their mean do in any case.
constexpr float kGrown = 4.0f;

// ---- tasks ----

// Forward: rows of a task, which reads every packed key and value for each group_rows of them. Halved, down to one group,
// while there are fewer tasks than kThreadTasks for each thread: no row's result depends on the task it is in. Keys and
// values of which one task takes all rows are packed there, and stay in its caches.
constexpr int64_t kTaskRows = 384, kThreadTasks = 8;
JAX_FA_INLINE int64_t TaskRows(const Call& c, int64_t group_rows) {
  if (!c.blocks) return kTaskRows;
  while (2 * group_rows <= kTaskRows) group_rows *= 2;
  return group_rows;
}

// ... or all rows of a key head, up to kWholeRows, where there are at least kThreadHeads heads for each thread: then no
// thread waits for others that pack, which takes 15 us a call, as long as a tenth of 128 rows of 8 heads.
constexpr int64_t kWholeRows = 512, kThreadHeads = 4;

// ... or kFewKeysTaskRows, where rows see at most one in kFewKeys of the keys: then each task packs what its rows see, which
// packing for all tasks would write to the memory and read again.
constexpr int64_t kFewKeysTaskRows = 1024, kFewKeys = 8;

// Forward of few rows (decoding): with fewer than kEnoughTasks tasks the keys are split so that there are about kFewTasks,
// of at least kSplitKeys keys each, below which the merging costs more than it gains. Where a key head has more than kSplitRows
// rows, they are several tasks, half as many of which are enough; with more than kMostSplitRows, they always are. (256 rows of
// one key head, which gave two threads three tasks: 0.8 of the time. But those of 8 or 16 heads took up to a tenth longer.)
constexpr int64_t kEnoughTasks = 32, kFewTasks = 64, kSplitKeys = 256, kSplitRows = 96, kMostSplitRows = 256;

// ... and of a paged cache so that a part has at most kPagedSplitKeys keys: sequences differ in length, and parts behind a
// sequence's end take no time. The partial results may take kPagedPartFloats floats (64 MiB). All rows of a key
// head are one task: the heads of multi-head latent attention are 128 rows of one key head.
constexpr int64_t kPagedSplitKeys = 2048, kPagedPartFloats = int64_t{16} << 20;
static_assert(kMostSplitRows <= kTaskRows);

// With at most this many query rows per key head, keys and values are read in place, kDirectKeys at a time: the time is
// that of reading them once, and packing would write and read them once more.
constexpr int64_t kDirectRows = 16, kDirectKeys = 128;

// With more, up to kNarrowRows, and plain weights of at least kNarrowSpan keys, they are read in place too: keys by
// broadcast, next to a vector of rows, in blocks of up to so many bytes of all heads, but not of fewer keys than
// kLeastNarrowKeys. (Packed, 32 rows of one head took a seventh longer, 24 of each of 8 a third, 48 a half.)
constexpr int64_t kNarrowRows = 64, kNarrowSpan = 2048, kNarrowBytes = int64_t{256} << 10, kLeastNarrowKeys = 32;

// ... and with fewer, of float32, more than these. A row of a tile takes a load for each multiply-add where the rows are one
// vector: as many as there are where vectors are multiplied in halves, elsewhere twice as many, so that there the sums of few
// rows, which are taken over lanes, cost less. (Of the time of those, 16 rows of each of 8 heads took 0.81 on Zen 4 and 1.3 on
// Zen 5; by AVX2, where they are two vectors, 0.71, and 8 rows 0.93. float16, which is widened to memory first, and
// bfloat16 whose values are packed: 1.0 and more. 24 rows of each of 8 heads of bfloat16, packed all, took 1.4 times as long.)
JAX_FA_INLINE int64_t FewestNarrow(const Target& target) {
  if (target.lanes >= 16) return TuningInUse().halves ? target.lanes / 2 : kDirectRows;
  return 4;
}

// With at most this many rows and as many keys of a key head, packing them takes longer than it saves. (AVX-512, 64 rows of
// 64 keys: at head_dim 16 packed products took a third longer, at 256 a tenth less, and a third less in bfloat16.)
constexpr KeyBlock kSmallRows[] = {{32, 64}, {128, 32}, {INT64_MAX, 16}};

// ... and for products of pairs, which are twice as fast: 32 rows of head_dim 128 took an eighth longer unpacked.
constexpr KeyBlock kSmallPairRows[] = {{32, 64}, {64, 32}, {INT64_MAX, 16}};

// ... which are read in place unless more of them than this begin in one set of the first cache. (float32, 32 rows in one
// set: copies took a quarter less at head_dim 32, a tenth more at 128; elsewhere a quarter more.)
constexpr int64_t kSmallInPlace = 16, kSmallCopied = 64;

// ... and several heads are a task, of about so many elements: 5 to 20 us, next to which the beginning of a task is little.
constexpr int64_t kSmallTask = int64_t{1} << 15;

// Forward: packed keys and values of all heads may take this many floats (80 MiB); beyond, each task packs for itself.
constexpr int64_t kSharedFloats = int64_t{20} << 20;

// Tangents: the same, of up to four arrays (48 MiB), so that all memory of a call stays below 64 MiB. Beyond, heads take
// turns in waves; a head that is larger by itself is packed by each task, which takes a thirtieth of its time.
constexpr int64_t kTangentSharedFloats = int64_t{12} << 20;

// Backward: with fewer tasks than kBackwardTasks the keys are split, which takes a dq per part: up to kSplitBytes of them
// or, however large they are, as many as give kLeastBackwardTasks tasks.
constexpr int64_t kBackwardTasks = 16, kLeastBackwardTasks = 4, kSplitBytes = int64_t{64} << 20;
// Where even so there are at most half of kFewBackwardTasks, of few key heads and keys, the rows are split too.
constexpr int64_t kFewBackwardTasks = 8;
// Where fewer groups of heads than that add to one bias gradient each, they are cut into parts of at least kLeastHeads heads,
// whose gradients of their own take up to kSplitBytes too. Of small heads, for which a task is short, into kSmallBiasTasks.
constexpr int64_t kLeastHeads = 2, kSmallBiasTasks = 64;

// Backward: the rows of query and dout of a key head, in the forms in which products take them, are kept for all of its
// blocks of keys up to this many floats (8 MiB), or as many as see a block of keys: in a window they are few. Made again for
// each block they took up to an eighth of the time. Of more, the last ones are kept; room for all of 8192 rows took as long.
constexpr int64_t kKeptRowFloats = int64_t{2} << 20;

// Backward: whether what the next head begins with is asked for during the products of one, by the bytes that a head reads and
// writes. Not of heads so large that the rows would have left the second cache again, nor of calls so small that they may come
// from the third one. (64 sequences of 128: 0.66 to 0.73 of the time in bfloat16, 0.8 in float32.)
JAX_FA_INLINE bool AsksForNextHead(int64_t head_bytes, int64_t heads) {
  const Caches& caches = TuningInUse().caches;
  return head_bytes <= caches.second / 2 && heads * head_bytes >= caches.third / 4;
}

// Second derivative: likewise, of rows; each part has sums for all keys.
constexpr int64_t kSecondTasks = 16, kLeastSecondTasks = 4, kSecondSplitBytes = int64_t{32} << 20;

// A dq of more floats than this (4 MiB) is allocated for the task instead of being kept by each thread.
constexpr int64_t kThreadFloats = int64_t{1} << 20;

// Memory of a call is kept for the next one, up to this many floats in all (80 MiB): fresh pages cost a small call a
// tenth of its time.
constexpr int64_t kKeptFloats = int64_t{20} << 20;

}  // namespace jax_fa
