// One attention call as the CPU kernels see it: pointers, extents and strides, and nothing of XLA.
//
// Letters as everywhere: B flattened batch entries, Sq, Skv lengths, N query heads, K key/value heads,
// G = N / K, D query/key head_dim, Dv value head_dim.
//
// The kernels are compiled once per instruction set. A linker keeps one copy of an inline function, whichever
// file it came from, so an inline function shared between them could bring AVX-512 to a machine without it.
// Hence here: plain data and always-inlined functions only, no standard library.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define JAX_FA_INLINE inline __attribute__((always_inline))

namespace jax_fa {

enum class DType : uint8_t { kF32, kBF16, kF16, kI32, kU32, kU8, kI8, kF8E4M3, kF8E5M2 };

JAX_FA_INLINE constexpr bool IsByte(DType t) { return t >= DType::kU8; }
JAX_FA_INLINE constexpr int64_t ItemSize(DType t) {
  return t >= DType::kU8 ? 1 : t == DType::kBF16 || t == DType::kF16 ? 2 : 4;
}

// An array of the call. Strides are in elements; a dim of size 1 that broadcasts has stride 0.
struct View {
  char* data = nullptr;  // nullptr: absent
  DType dtype = DType::kF32;
  const int64_t* batch = nullptr;  // offset of each flattened batch entry
  int64_t head = 0, row = 0, col = 0;

  JAX_FA_INLINE explicit operator bool() const { return data != nullptr; }

  JAX_FA_INLINE char* Bytes(int64_t b, int64_t h, int64_t r = 0, int64_t c = 0) const {
    return data + (batch[b] + h * head + r * row + c * col) * ItemSize(dtype);
  }
  template <typename T>
  JAX_FA_INLINE T* At(int64_t b, int64_t h, int64_t r = 0, int64_t c = 0) const {
    return reinterpret_cast<T*>(data) + (batch[b] + h * head + r * row + c * col);
  }
};

// Where keys and values lie if those of a batch entry are not one after the other: in pages of one pool, all of whose rows
// are neighbours. The batch offsets of key and value are 0 then.
struct Pages {
  const int32_t* table = nullptr;    // [B, each]: which page; nullptr: there are no pages
  const int32_t* lengths = nullptr;  // [B]: how many keys there are; entries of the table behind them are not read
  int64_t count = 0, size = 0;       // pages of the pool, keys of a page
  int64_t each = 0;                  // pages of a batch entry

  JAX_FA_INLINE explicit operator bool() const { return table != nullptr; }

  // Page i of a batch entry, moved into the pool.
  JAX_FA_INLINE int64_t Page(int64_t b, int64_t i) const {
    const int64_t page = table[b * each + i];
    return page < 0 ? 0 : page < count ? page : count - 1;
  }
  JAX_FA_INLINE int64_t Row(int64_t b, int64_t j) const { return Page(b, j / size) * size + j % size; }
};

enum class Alibi : uint8_t { kNone, kLinear, kSqrt };

struct Call {
  int64_t B = 0, Sq = 0, Skv = 0, N = 0, K = 0, D = 0, Dv = 0;
  float scale = 1.0f, keep_prob = 1.0f, soft_cap = 0.0f;  // soft_cap 0: none
  Alibi alibi = Alibi::kNone;
  uint32_t threshold = 0;  // a 16-bit number below it keeps its element

  View query, key, value, out;  // row: position, col: head_dim
  Pages pages;                  // of keys and values
  View key_scale, value_scale;  // with pages: float [.., K], row: page, col: key of a page; factors of keys and values
  View bias, mask;              // row: query, col: key; mask: nonzero = visible
  View bias_offset;             // int32 [.., N, Sq]: then bias is [.., N, elements], and key j's is at offset + j
  int64_t bias_elements = 0;    // of one head; what lies outside belongs to masked pairs
  bool bias_apart = false;      // with bias_offset: no two key heads or batch entries share an element
  View lower, upper;            // int32 [.., N, Sq]
  View segment_row, segment_key;  // int32 [.., N, Sq], [.., N, Skv]: visible where row < 0 or row == key
  // A mask by blocks of rows and keys, int32 [.., N, blocks of rows, blocks of keys]: 0 masks all pairs of a block, 1 none,
  // and 2 + i those that are 0 in pairs i of uint8 [.., N, pairs, block_rows, block_keys].
  View blocks, block_pairs;
  int64_t block_rows = 1, block_keys = 1, block_count = 0;  // the last: of pairs
  View slopes;                                              // float [.., N, Sq]
  View position;                // int32 [.., N, Sq]: where a row stands among the keys, for ALiBi; absent: its index
  View seed, stream;            // uint32: [.., 2] per batch entry, [.., N, 2]
  View drop_bits, drop_offset;  // uint8 [.., bytes], int32 [.., N, Sq, 2]
  int64_t drop_bytes = 0;       // length of one batch entry's bits
  View scale_of_head, soft_cap_of_head;  // float [.., N], instead of scale and soft_cap
  View threshold_of_head;                // uint32 [.., N], instead of threshold and keep_prob
  View dropout_start;                    // uint32 [.., 2]: the row and column of dropout at which this call begins
  View sinks;                            // float [.., N]: one more logit of each row; its own gradient is not computed
  bool partial = false;                  // the statistics of a derivative are of these keys and others
  View m, l;                             // float [.., N, Sq]
  View rounding;                         // as out: what rounding took from it, in halves of the dtype's epsilon

  // Backward and second only; a gradient that is not wanted is absent. Those of bias, slopes, scale and soft cap
  // (float) have the operand's broadcast dims. dbias must be zero when the kernel starts, unless WritesAllBias.
  View dout, dlogsumexp, dquery, dkey, dvalue, dbias, dslopes, dscale, dsoft_cap;

  // Derivatives along tangents: those of the operands, each with the operand's dims (batch dims may broadcast where the
  // operand's do not, and the other way round); absent where zero. Of the second, the tangents of the cotangents too.
  View query_tangent, key_tangent, value_tangent, bias_tangent, slopes_tangent, scale_tangent, soft_cap_tangent;
  View dout_tangent, dlogsumexp_tangent;
  // Results: the tangents of out and log-sum-exp; of the second, the gradients by dout and dlogsumexp, the same formulas.
  View out_tangent, logsumexp_tangent;
  bool with_forward = false;  // the tangents are wanted together with out, m, l and rounding, which then are results

  // A division takes as long as much of what is done for a row.
  JAX_FA_INLINE int64_t G() const { return N == K ? 1 : N / K; }

  // The row of key and value that key j of a batch entry is.
  JAX_FA_INLINE int64_t KeyRow(int64_t b, int64_t j) const { return pages ? pages.Row(b, j) : j; }
  // How many keys a batch entry has.
  JAX_FA_INLINE int64_t Keys(int64_t b) const {
    if (!pages) return Skv;
    const int64_t n = pages.lengths[b];
    return n < 0 ? 0 : n < Skv ? n : Skv;
  }
};

// Whether two batch entries add to the same bias gradient: then one shares the first's, as an axis broadcasts as a whole.
JAX_FA_INLINE bool SharesBiasBatch(const Call& c) {
  for (int64_t b = 1; b < c.B; ++b)
    if (c.dbias.batch[b] == c.dbias.batch[0]) return true;
  return false;
}

// Whether each head has a ds for every number of dbias that it adds to, so that the first head just writes it.
JAX_FA_INLINE bool WritesAllBias(const Call& c) {
  return !c.lower && !c.upper && !c.mask && !c.segment_row && !c.blocks && !c.bias_offset && c.dbias.col == 1 &&
         (c.dbias.row != 0 || c.Sq == 1);
}

// Runs fn(context, 0), ..., fn(context, count - 1), possibly in parallel, and returns when all are done.
struct Runner {
  using Task = void (*)(void* context, int64_t index);
  void (*run)(const Runner* self, int64_t count, Task fn, void* context);
  int64_t threads = 1;  // about so many at a time; results do not depend on it
};

// Defined once, for the baseline instruction set: this thread's scratch of at least that many floats, aligned
// to 64 bytes and kept from call to call (fresh pages cost more than the work on small calls); memory that
// the caller frees. Both throw std::bad_alloc.
float* ThreadScratch(int64_t floats);
float* AllocateFloats(int64_t floats);
void FreeFloats(float* p);

}  // namespace jax_fa
