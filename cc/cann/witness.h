// What the files beside a vendor's libcust_opapi.so say about its aclnnFlashAttentionScore. Two ops with different
// arguments bear that name, and a call with the wrong ones corrupts memory without a word, so the library's symbols
// alone are not believed where other evidence is at hand.
#pragma once

#include <string>
#include <vector>

namespace jax_fa::cann {

enum class Abi { kLong, kShort };

struct Testimony {
  Abi abi;
  std::string text;  // "<file> lists 3 inputs for FlashAttentionScore"
};

// What the vendor directory of a library at <vendor>/op_api/lib says; empty where it says nothing.
std::vector<Testimony> Witnesses(const std::string& library);

}  // namespace jax_fa::cann
