// One call of flash attention in CANN's terms, before it is known which C function serves it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cann/abi.h"

namespace jax_fa::cann {

// A contiguous array on the device.
struct Array {
  void* data = nullptr;
  std::vector<int64_t> dims;
  aclDataType dtype = ACL_DT_UNDEFINED;  // undefined: the operand is absent

  bool present() const { return dtype != ACL_DT_UNDEFINED; }
  int64_t elements() const;
  size_t bytes() const;
};

enum class Direction { kForward, kBackward };

struct Call {
  Direction direction = Direction::kForward;
  std::string input_layout;    // BSH, SBH, BSND, BNSD, TND
  std::string softmax_layout;  // "" or, with TND, "same_as_input"
  int64_t head_num = 0;
  double scale_value = 1.0, keep_prob = 1.0;
  int64_t pre_tokens = 0, next_tokens = 0, inner_precise = 0, sparse_mode = 0, pse_type = 1;
  int64_t q_start = 0, kv_start = 0;                               // of ALiBi's positions
  std::vector<int64_t> prefix, actual_seq_qlen, actual_seq_kvlen;  // empty: absent
  Array query, key, value, pse, drop_mask, atten_mask, sink;
  Array softmax_max, softmax_sum, attention;  // results of the forward, operands of the backward
  Array dy, dq, dk, dv, dsink;                // of the backward

  bool backward() const { return direction == Direction::kBackward; }
  bool varlen() const { return input_layout == "TND"; }
};

// An array of a call, and its place in phase 1 in each direction (null: not taken).
struct Slot {
  const char* name;
  Array Call::* array;
  Tensor Arguments::* forward;
  Tensor Arguments::* backward;
  bool required;
};

inline constexpr Slot kSlots[] = {
    {"query", &Call::query, &Arguments::query, &Arguments::query, true},
    {"key", &Call::key, &Arguments::key, &Arguments::key, true},
    {"value", &Call::value, &Arguments::value, &Arguments::value, true},
    {"dy", &Call::dy, nullptr, &Arguments::dy, true},
    {"pse", &Call::pse, &Arguments::real_shift, &Arguments::real_shift, false},
    {"drop_mask", &Call::drop_mask, &Arguments::drop_mask, &Arguments::drop_mask, false},
    {"atten_mask", &Call::atten_mask, &Arguments::atten_mask, &Arguments::atten_mask, false},
    {"sink", &Call::sink, &Arguments::sink, &Arguments::sink, false},
    {"softmax_max", &Call::softmax_max, &Arguments::softmax_max_out, &Arguments::softmax_max, true},
    {"softmax_sum", &Call::softmax_sum, &Arguments::softmax_sum_out, &Arguments::softmax_sum, true},
    {"attention", &Call::attention, &Arguments::attention_out, &Arguments::attention_in, true},
    {"dq", &Call::dq, nullptr, &Arguments::dq, true},
    {"dk", &Call::dk, nullptr, &Arguments::dk, true},
    {"dv", &Call::dv, nullptr, &Arguments::dv, true},
    {"dsink", &Call::dsink, nullptr, &Arguments::dsink, false},
};

inline Tensor Arguments::* Place(const Slot& slot, const Call& call) {
  return call.backward() ? slot.backward : slot.forward;
}

// Where a tensor must start.
inline constexpr size_t kTensorAlignment = 32;

bool Aligned(const Array& array);

// Throws Failure where CANN would crash, or not notice: what else it checks itself is left to it.
void Validate(const Call& call);

// Throws Failure unless the arrays, of which those that are required are present, with layout and ranks that fit each
// other, have the shapes that the call gives them.
void ValidateShapes(const Call& call);

// "float16[2, 8, 64]"
std::string Text(const Array& array);

// The call in words, for error messages.
std::string Text(const Call& call);

}  // namespace jax_fa::cann
