// The arrays of a call: which there are, in which order, and what sizes and elements they have. jax_fa/call.py lists them
// in the same order; Python compares the names of both when it loads the extension (see module.cc).
#pragma once

#include <cstddef>
#include <cstdint>

#include "call.h"

namespace jax_fa {

// Increased by one where what the handlers take changes in a way that the names do not show: attributes, their order or
// meaning, sizes, dtypes.
constexpr int64_t kAbi = 6;

enum class Element : uint8_t { kF32, kBF16, kF16, kI32, kU32, kU8, kBool, kI8, kF8E4M3, kF8E5M2, kOther };

constexpr uint32_t Bit(Element e) { return uint32_t{1} << static_cast<int>(e); }
constexpr uint32_t kFloats = Bit(Element::kF32) | Bit(Element::kBF16) | Bit(Element::kF16);
constexpr uint32_t kFloat = Bit(Element::kF32), kInt = Bit(Element::kI32), kUnsigned = Bit(Element::kU32);

inline DType ToDType(Element e) {
  switch (e) {
    case Element::kBF16: return DType::kBF16;
    case Element::kF16: return DType::kF16;
    case Element::kI32: return DType::kI32;
    case Element::kU32: return DType::kU32;
    case Element::kU8:
    case Element::kBool: return DType::kU8;
    case Element::kI8: return DType::kI8;
    case Element::kF8E4M3: return DType::kF8E4M3;
    case Element::kF8E5M2: return DType::kF8E5M2;
    default: return DType::kF32;
  }
}

// Operand i is given where bit i of `present` is set; the arrays come in this order.
enum Operand : uint8_t {
  kQuery,
  kKey,
  kValue,
  kBias,
  kMask,
  kLower,
  kUpper,
  kSlopes,
  kSeed,
  kStream,
  kDropBits,
  kDropOffset,
  kBiasOffset,
  kPosition,
  kSegmentRow,
  kSegmentKey,
  kScale,
  kSoftCap,
  kKeepThreshold,
  kDropoutStart,
  kSinks,
  kBlocks,
  kBlockPairs,
  kOperands
};

// `name`: the field of Python's Operands. `sizes`: what follows the batch dims, N K heads, S T positions of queries and
// keys, D V head_dim, R C blocks of rows and keys, 2 that number, e any; in lower case, 1 does too. `roles`, for views: h head, r row, c col, - none.
// `elements`: a set of bits.
struct Form {
  Operand operand;
  const char *name, *sizes, *roles;
  uint32_t elements;
  View Call::* view;
};

constexpr Form kForms[] = {
    {kQuery, "query", "SND", "rhc", kFloats, &Call::query},
    {kKey, "key", "TKD", "rhc", kFloats, &Call::key},
    {kValue, "value", "TKV", "rhc", kFloats, &Call::value},
    {kBias, "bias", "nst", "hrc", kFloats, &Call::bias},
    {kMask, "mask", "nst", "hrc", Bit(Element::kBool) | Bit(Element::kU8), &Call::mask},
    {kLower, "lower", "ns", "hr", kInt, &Call::lower},
    {kUpper, "upper", "ns", "hr", kInt, &Call::upper},
    {kSlopes, "alibi_slopes", "Ns", "hr", kFloat, &Call::slopes},
    {kSeed, "dropout_seed", "2", "-", kUnsigned, &Call::seed},
    {kStream, "dropout_stream", "n2", "h-", kUnsigned, &Call::stream},
    {kDropBits, "drop_bits", "e", "-", Bit(Element::kU8), &Call::drop_bits},
    {kDropOffset, "drop_offset", "ns2", "hr-", kInt, &Call::drop_offset},
    {kBiasOffset, "bias_offset", "ns", "hr", kInt, &Call::bias_offset},
    {kPosition, "position", "ns", "hr", kInt, &Call::position},
    {kSegmentRow, "segment_row", "ns", "hr", kInt, &Call::segment_row},
    {kSegmentKey, "segment_key", "nT", "hc", kInt, &Call::segment_key},
    {kScale, "scale", "n", "h", kFloat, &Call::scale_of_head},
    {kSoftCap, "soft_cap", "n", "h", kFloat, &Call::soft_cap_of_head},
    {kKeepThreshold, "keep_threshold", "n", "h", kUnsigned, &Call::threshold_of_head},
    {kDropoutStart, "dropout_start", "2", "-", kUnsigned, &Call::dropout_start},
    {kSinks, "sinks", "n", "h", kFloat, &Call::sinks},
    {kBlocks, "blocks", "nRC", "hrc", kInt, &Call::blocks},
    {kBlockPairs, "block_pairs", "neee", "hr--", Bit(Element::kBool) | Bit(Element::kU8), &Call::block_pairs},
};
constexpr Form kIndexedBias = {kBias, "bias", "ne", "hc", kFloats, &Call::bias};  // with a bias_offset

constexpr bool FormsAreInOrder() {
  for (size_t i = 0; i < kOperands; ++i)
    if (kForms[i].operand != i) return false;
  return true;
}
static_assert(sizeof(kForms) / sizeof(kForms[0]) == kOperands && FormsAreInOrder());

// Operands with gradients and tangents, in the order of both, and where those are.
struct Differentiable {
  Operand operand;
  View Call::*gradient, Call::*tangent;
};
constexpr Differentiable kDifferentiable[] = {
    {kQuery, &Call::dquery, &Call::query_tangent},         {kKey, &Call::dkey, &Call::key_tangent},
    {kValue, &Call::dvalue, &Call::value_tangent},         {kBias, &Call::dbias, &Call::bias_tangent},
    {kSlopes, &Call::dslopes, &Call::slopes_tangent},      {kScale, &Call::dscale, &Call::scale_tangent},
    {kSoftCap, &Call::dsoft_cap, &Call::soft_cap_tangent},
};
constexpr size_t kDifferentiables = sizeof(kDifferentiable) / sizeof(kDifferentiable[0]);

// What a handler computes: the results of the forward; gradients; both the forward's results and their tangents; the
// tangents alone; and the second, the derivative of the gradients along tangents of operands and cotangents.
enum class Pass : uint8_t { kForward, kBackward, kJvp, kTangent, kSecond };

constexpr bool IsForward(Pass p) { return p == Pass::kForward || p == Pass::kJvp; }
constexpr bool HasCotangents(Pass p) { return p == Pass::kBackward || p == Pass::kSecond; }
constexpr bool HasTangents(Pass p) { return p == Pass::kJvp || p == Pass::kTangent || p == Pass::kSecond; }

// The bits of `saved`, which says what arrays there are besides the operands: those of kSavedArrays that may be absent,
// the tangents, and the gradients and results of the second that are not wanted.
enum Saved : uint32_t {
  kRounding = 1,
  kLogSumExp = 2,
  kOutTangent = 4,
  kLogSumExpTangent = 8,
  kFirstTangent = 1u << 8,    // of kDifferentiable[0], and so on
  kFirstUnwanted = 1u << 16,  // likewise
  kOutUnwanted = 1u << 23,    // the gradient of the second by the cotangent of out,
  kLogSumExpUnwanted = 1u << 24,
};
constexpr uint32_t TangentBit(size_t i) { return uint32_t{kFirstTangent} << i; }
constexpr uint32_t UnwantedBit(size_t i) { return uint32_t{kFirstUnwanted} << i; }

// Those that a pass may have.
constexpr uint32_t SavedBits(Pass p) {
  constexpr uint32_t kEvery = UnwantedBit(kDifferentiables) - UnwantedBit(0);
  return kRounding | (HasTangents(p) ? TangentBit(kDifferentiables) - TangentBit(0) : 0) |
         (HasCotangents(p) ? kLogSumExp | kEvery : 0) |
         (p == Pass::kSecond ? kOutTangent | kLogSumExpTangent | kOutUnwanted | kLogSumExpUnwanted : 0);
}
static_assert(TangentBit(kDifferentiables) <= kFirstUnwanted && UnwantedBit(kDifferentiables) <= kOutUnwanted);

// The arrays that follow the operands of a derivative, in their order; some of them are the results of the forward.
// `name`: the field of Python's Saved. `text`: what messages call it. `like_out`: of the shape and dtype of out, else a
// float per row. `bit`: that of `saved` where it may be absent, else 0.
struct SavedArray {
  const char *name, *text;
  View Call::* view;
  bool like_out, of_forward;
  uint32_t bit;

  constexpr bool IsGiven(uint32_t saved) const { return bit == 0 || (saved & bit) != 0; }
};
constexpr SavedArray kSavedArrays[] = {
    {"out", "out", &Call::out, true, true, 0},
    {"m", "softmax max", &Call::m, false, true, 0},
    {"l", "softmax sum", &Call::l, false, true, 0},
    {"dout", "the cotangent of out", &Call::dout, true, false, 0},
    {"rounding", "rounding", &Call::rounding, true, true, kRounding},
    {"dlogsumexp", "the cotangent of log-sum-exp", &Call::dlogsumexp, false, false, kLogSumExp},
    {"dout_tangent", "the tangent of out's cotangent", &Call::dout_tangent, true, false, kOutTangent},
    {"dlogsumexp_tangent", "the tangent of log-sum-exp's cotangent", &Call::dlogsumexp_tangent, false, false,
     kLogSumExpTangent},
};

// The tangents that jvp, tangent and second give, in their order; those of the second are its gradients by the cotangents.
struct TangentResult {
  const char *cotangent, *text;  // what Python's Saved and messages call it
  View Call::* view;
  bool like_out;
  uint32_t unwanted;
};
constexpr TangentResult kTangentResults[] = {
    {"dout", "the tangent of out", &Call::out_tangent, true, kOutUnwanted},
    {"dlogsumexp", "the tangent of log-sum-exp", &Call::logsumexp_tangent, false, kLogSumExpUnwanted},
};

}  // namespace jax_fa
