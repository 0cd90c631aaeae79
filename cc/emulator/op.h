// One call of the operator, as phase 1 gets it. Letters: B batch entries (TND: sequences), N query heads, K key heads,
// D and Dv head_dims; a sequence b has rows 0..sq and keys 0..skv.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator/objects.h"

namespace cann_emulator {

struct Op {
  const char* name = "";
  bool backward = false, varlen = false;
  bool typed_pse = false;  // the function has pseType
  bool short_abi = false;
  const char* softmax_layout = nullptr;  // null: the function has none
  std::string layout;
  double scale = 1, keep_prob = 1;
  int64_t pre = 0, next = 0, heads = 0, inner_precise = 0, sparse_mode = 0, pse_type = 1;
  bool has_prefix = false, has_seq = false;
  std::vector<int64_t> prefix, q_ends, kv_ends, q_start, kv_start;
  // Absent ones are not present(). max, sum and out are operands of the backward.
  Array query, key, value, query_rope, key_rope, dy, pse, drop, padding, mask, sink;
  Array max, sum, softmax, out, dq, dk, dv, dq_rope, dk_rope, dpse, dsink;
};

// What follows from shapes and layout.
struct Sizes {
  int64_t B = 0, N = 0, K = 0, D = 0, Dv = 0;
  std::vector<int64_t> sq, skv, q_begin, kv_begin;  // of each sequence; begin: in rows of TND
};

struct Verdict {
  int code = 0;
  std::string text;
  bool tiling = false;  // found by tiling: older releases say so in phase 2
};

Sizes SizesOf(const Op& op);
// What CANN checks, in its order.
Verdict Judge(const Op& op);
// Pairs of row i and key j that sparse mode and lengths let see each other, the mask operand left aside.
bool InStructure(const Op& op, const Sizes& s, int64_t b, int64_t i, int64_t j);
// Whether rows without a key become 0, marked in the statistics.
bool ZeroesHiddenRows(const Op& op, const Sizes& s);
bool Compressed(const Op& op);

int RunForward(const Op& op);
int RunBackward(const Op& op);
int RunShort(const Op& op);

}  // namespace cann_emulator
