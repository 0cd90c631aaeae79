// Checks a call's arrays, on plain shapes, before a handler touches any memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "operands.h"

namespace jax_fa {

struct BadCall : std::exception {
  explicit BadCall(std::string text) : text("jax_fa cpu: " + std::move(text)) {}
  const char* what() const noexcept override { return text.c_str(); }
  std::string text;
};

// Elements and dims of an array as it is stored.
struct Shape {
  Element element = Element::kOther;
  const int64_t* dims = nullptr;
  size_t rank = 0;
};

// One call: its static part, and its arrays in order.
struct CallShapes {
  uint32_t present = 0, saved = 0;
  std::string_view query_axes, key_axes, value_axes, out_axes;  // canonical dim i is stored dim axes[i] - 'a'
  std::vector<Shape> args, rets;

  bool Has(Operand i) const { return present >> i & 1; }
  const Form& FormOf(Operand i) const { return i == kBias && Has(kBiasOffset) ? kIndexedBias : kForms[i]; }
  size_t Operands() const { return static_cast<size_t>(__builtin_popcount(present)); }
  // Where operand i is among the arrays.
  size_t At(Operand i) const { return static_cast<size_t>(__builtin_popcount(present & ((uint32_t{1} << i) - 1))); }
};

struct Sizes {
  std::vector<int64_t> B;
  int64_t Sq = 0, Skv = 0, N = 0, K = 0, D = 0, Dv = 0;
};

class ShapeCheck {
 public:
  // Each throws BadCall, which names the array, what it is and what it should be.
  static Sizes Forward(const CallShapes& call) {
    ShapeCheck check(call);
    check.Static();
    check.Count("arguments", call.args.size(), call.Operands());
    size_t next = 0, count = 0;
    for (const SavedArray& x : kSavedArrays) count += x.of_forward && x.IsGiven(call.saved) ? 1 : 0;
    check.Count("results", call.rets.size(), count);
    check.ReadSizes(call.rets[1]);
    check.Operands();
    for (const SavedArray& x : kSavedArrays)
      if (x.of_forward && x.IsGiven(call.saved)) check.Saved(x, call.rets[next++]);
    return check.sizes_;
  }

  static Sizes Backward(const CallShapes& call) {
    ShapeCheck check(call);
    check.Static();
    size_t next = call.Operands(), count = next, gradients = 0;
    for (const SavedArray& x : kSavedArrays) count += x.IsGiven(call.saved) ? 1 : 0;
    check.Count("arguments", call.args.size(), count);
    for (const Differentiable& x : kDifferentiable) gradients += call.Has(x.operand) ? 1 : 0;
    check.Count("results", call.rets.size(), gradients);
    check.ReadSizes(call.args[next + 1]);
    check.Operands();
    for (const SavedArray& x : kSavedArrays)
      if (x.IsGiven(call.saved)) check.Saved(x, call.args[next++]);
    size_t result = 0;
    for (const Differentiable& x : kDifferentiable)
      if (call.Has(x.operand)) check.Gradient(x.operand, call.rets[result++]);
    return check.sizes_;
  }

 private:
  explicit ShapeCheck(const CallShapes& call) : call_(call) {}

  static std::string Text(const std::vector<std::string>& list, const char* between) {
    std::string text;
    for (const std::string& x : list) text += (text.empty() ? "" : between) + x;
    return text;
  }
  static std::string Text(const Shape& x) {
    std::vector<std::string> dims;
    dims.reserve(x.rank);
    for (size_t i = 0; i < x.rank; ++i) dims.push_back(std::to_string(x.dims[i]));
    return Name(x.element) + " (" + Text(dims, ", ") + ")";
  }
  static std::string Name(Element e) {
    static const char* const kNames[] = {"float32", "bfloat16", "float16", "int32", "uint32", "uint8", "bool"};
    return e == Element::kOther ? "another dtype" : kNames[static_cast<int>(e)];
  }

  // What does not depend on shapes.
  void Static() {
    const auto is_permutation = [&](const char* name, std::string_view axes) {
      uint64_t seen = 0;
      for (char a : axes)
        if (a >= 'a' && static_cast<size_t>(a - 'a') < axes.size() && axes.size() < 64)
          seen |= uint64_t{1} << (a - 'a');
      if (axes.size() < 3 || axes.size() >= 64 || axes.size() != call_.query_axes.size() ||
          seen != (uint64_t{1} << axes.size()) - 1)
        throw BadCall(std::string(name) + "='" + std::string(axes) + "' must be a permutation of three letters or " +
                      "more, as many as query_axes has");
    };
    is_permutation("query_axes", call_.query_axes);
    is_permutation("key_axes", call_.key_axes);
    is_permutation("value_axes", call_.value_axes);
    is_permutation("out_axes", call_.out_axes);
    if (call_.present >> kOperands != 0) throw BadCall("`present` has bits for operands that there are not");
    if (call_.saved > (kRounding | kLogSumExp)) throw BadCall("`saved` has bits for arrays that there are not");
    for (Operand i : {kQuery, kKey, kValue})
      if (!call_.Has(i)) throw BadCall(std::string(kForms[i].name) + " must be given");
    for (const auto& [i, needs] :
         {std::pair(kSeed, kStream), std::pair(kStream, kSeed), std::pair(kDropBits, kDropOffset),
          std::pair(kDropOffset, kDropBits), std::pair(kBiasOffset, kBias), std::pair(kSegmentRow, kSegmentKey),
          std::pair(kSegmentKey, kSegmentRow)})
      if (call_.Has(i) && !call_.Has(needs))
        throw BadCall(std::string(kForms[i].name) + " is given without " + kForms[needs].name);
  }

  void Count(const char* what, size_t got, size_t expected) {
    if (got != expected)
      throw BadCall("there are " + std::to_string(got) + " " + what + "; expected " + std::to_string(expected));
  }

  // Batch, Sq and N from the statistics, the others from key and value.
  void ReadSizes(const Shape& m) {
    const size_t lead = call_.query_axes.size() - 3;
    Rank("softmax max", m, lead + 2);
    sizes_.B.assign(m.dims, m.dims + lead);
    sizes_.N = m.dims[lead], sizes_.Sq = m.dims[lead + 1];
    const Shape &key = call_.args[1], &value = call_.args[2];
    Rank("key", key, lead + 3);
    Rank("value", value, lead + 3);
    const auto of = [&](const Shape& x, std::string_view axes, size_t i) { return x.dims[axes[lead + i] - 'a']; };
    sizes_.Skv = of(key, call_.key_axes, 0), sizes_.K = of(key, call_.key_axes, 1);
    sizes_.D = of(key, call_.key_axes, 2), sizes_.Dv = of(value, call_.value_axes, 2);
    if (sizes_.D < 1) throw BadCall("key is " + Text(key) + "; expected a head_dim of at least 1");
    if (sizes_.K < 1 || sizes_.N % sizes_.K != 0)
      throw BadCall("key is " + Text(key) + ", that is " + std::to_string(sizes_.K) +
                    " heads; expected a number that divides the " + std::to_string(sizes_.N) + " of query");
    if (sizes_.Skv >= INT32_MAX || sizes_.Sq >= INT32_MAX) throw BadCall("a sequence is longer than 2^31 - 2");
  }

  void Rank(const char* name, const Shape& x, size_t rank) {
    if (x.rank != rank)
      throw BadCall(std::string(name) + " is " + Text(x) + ", of rank " + std::to_string(x.rank) + "; expected rank " +
                    std::to_string(rank));
  }

  void Operands() {
    const std::string_view axes[] = {call_.query_axes, call_.key_axes, call_.value_axes};
    size_t next = 0;
    for (int at = 0; at < kOperands; ++at) {
      const auto i = static_cast<Operand>(at);
      if (!call_.Has(i)) continue;
      const Form& form = call_.FormOf(i);
      const Shape& x = call_.args[next++];
      if (i <= kValue) {
        Stored(form.name, x, axes[i], form.sizes, form.elements, false);
      } else {
        Canonical(form.name, x, form.sizes, form.elements, false);
      }
    }
  }

  void Saved(const SavedArray& form, const Shape& x) {
    if (form.like_out) {
      Stored(form.text, x, call_.out_axes, "SNV", Bit(call_.args[0].element), true);
    } else {
      Canonical(form.text, x, "NS", kFloat, true);
    }
  }

  // It has its operand's dims; those of the batch may be full where the operand's are 1.
  void Gradient(Operand i, const Shape& x) {
    const std::string name = std::string("the gradient of ") + kForms[i].name;
    const Shape& operand = call_.args[call_.At(i)];
    if (i <= kValue) {
      const std::string_view axes[] = {call_.query_axes, call_.key_axes, call_.value_axes};
      return Stored(name.c_str(), x, axes[i], kForms[i].sizes, Bit(operand.element), true);
    }
    Rank(name.c_str(), x, operand.rank);
    std::vector<std::string> expected;
    bool fits = x.element == Element::kF32;
    for (size_t d = 0; d < operand.rank; ++d) {
      const int64_t own = operand.dims[d], full = d < sizes_.B.size() ? sizes_.B[d] : own;
      fits = fits && (x.dims[d] == own || x.dims[d] == full);
      expected.push_back(std::to_string(own) + (full == own ? "" : " or " + std::to_string(full)));
    }
    if (!fits) Differs(name.c_str(), x, kFloat, expected);
  }

  void Canonical(const char* name, const Shape& x, const char* sizes, uint32_t elements, bool full) {
    std::string axes;
    for (size_t i = 0; i < sizes_.B.size() + std::string_view(sizes).size(); ++i)
      axes.push_back(static_cast<char>('a' + i));
    Stored(name, x, axes, sizes, elements, full);
  }

  // `full`: all batch dims are.
  void Stored(const char* name, const Shape& x, std::string_view axes, std::string_view sizes, uint32_t elements,
              bool full) {
    Rank(name, x, axes.size());
    std::vector<std::string> expected(axes.size());
    bool fits = elements >> static_cast<int>(x.element) & 1;
    for (size_t i = 0; i < axes.size(); ++i) {
      const size_t at = static_cast<size_t>(axes[i] - 'a'), lead = sizes_.B.size();
      const char letter = i < lead ? 0 : sizes[i - lead];
      if (letter == 'e') {
        expected[at] = "any";
        continue;
      }
      const bool one = i < lead ? !full : letter >= 'a' && letter <= 'z';
      const int64_t size = i < lead ? sizes_.B[i] : SizeOf(letter);
      fits = fits && (x.dims[at] == size || (one && x.dims[at] == 1));
      expected[at] = (one && size != 1 ? "1 or " : "") + std::to_string(size);
    }
    if (!fits) Differs(name, x, elements, expected);
  }

  int64_t SizeOf(char letter) const {
    switch (letter) {
      case 'N':
      case 'n': return sizes_.N;
      case 'K': return sizes_.K;
      case 'S':
      case 's': return sizes_.Sq;
      case 'T':
      case 't': return sizes_.Skv;
      case 'D': return sizes_.D;
      case 'V': return sizes_.Dv;
      default: return letter - '0';
    }
  }

  [[noreturn]] static void Differs(const char* name, const Shape& x, uint32_t elements,
                                   const std::vector<std::string>& dims) {
    std::vector<std::string> names;
    for (int e = 0; e < static_cast<int>(Element::kOther); ++e)
      if (elements >> e & 1) names.push_back(Name(static_cast<Element>(e)));
    throw BadCall(std::string(name) + " is " + Text(x) + "; expected " + Text(names, " or ") + " (" + Text(dims, ", ") +
                  ")");
  }

  const CallShapes& call_;
  Sizes sizes_;
};

}  // namespace jax_fa
