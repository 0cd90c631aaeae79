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

// What messages call an array. Put together only when there is a message: this is checked in every call.
struct Label {
  constexpr Label(const char* text) : text(text) {}  // NOLINT(google-explicit-constructor,misc-explicit-constructor)
  constexpr Label(const char* what, const char* of) : text(what), of(of) {}
  std::string Text() const { return std::string(text) + of; }
  const char* text;
  const char* of = "";
};

// --- texts of messages

inline std::string Joined(const std::vector<std::string>& list, const char* between) {
  std::string text;
  for (const std::string& x : list) text += (text.empty() ? "" : between) + x;
  return text;
}
inline std::string ElementName(Element e) {
  static const char* const kNames[] = {"float32", "bfloat16", "float16", "int32",         "uint32",
                                       "uint8",   "bool",     "int8",    "float8_e4m3fn", "float8_e5m2"};
  return e == Element::kOther ? "another dtype" : kNames[static_cast<int>(e)];
}
inline std::string ShapeText(const Shape& x) {
  std::vector<std::string> dims;
  dims.reserve(x.rank);
  for (size_t i = 0; i < x.rank; ++i) dims.push_back(std::to_string(x.dims[i]));
  return ElementName(x.element) + " (" + Joined(dims, ", ") + ")";
}

[[noreturn]] inline void Differs(const Label& label, const Shape& x, uint32_t elements,
                                 const std::vector<std::string>& dims) {
  std::vector<std::string> names;
  for (int e = 0; e < static_cast<int>(Element::kOther); ++e)
    if (elements >> e & 1) names.push_back(ElementName(static_cast<Element>(e)));
  throw BadCall(label.Text() + " is " + ShapeText(x) + "; expected " + Joined(names, " or ") + " (" +
                Joined(dims, ", ") + ")");
}

// --- calls

// An array of a call besides its operands: its view, and what it is like.
struct OtherArray {
  enum Like : uint8_t { kOut, kStatistic, kTangent, kGradient };  // the last two: like `operand`
  Label label;
  View Call::* view;
  Like like;
  Operand operand = kQuery;
};

// One call: its static part, and its arrays in order.
struct CallShapes {
  static constexpr size_t kMostArrays = 16;  // but for rare ones: memory is asked for once
  Pass pass = Pass::kForward;
  uint32_t present = 0, saved = 0;
  std::string_view query_axes, key_axes, value_axes, out_axes;  // canonical dim i is stored dim axes[i] - 'a'
  std::vector<Shape> args, rets;

  bool Has(Operand i) const { return present >> i & 1; }
  const Form& FormOf(Operand i) const { return i == kBias && Has(kBiasOffset) ? kIndexedBias : kForms[i]; }
  size_t Operands() const { return static_cast<size_t>(__builtin_popcount(present)); }
  // Where operand i is among the arrays.
  size_t At(Operand i) const { return static_cast<size_t>(__builtin_popcount(present & ((uint32_t{1} << i) - 1))); }

  // The arguments that follow the operands.
  std::vector<OtherArray> OtherArgs() const {
    std::vector<OtherArray> list;
    list.reserve(kMostArrays);
    if (!IsForward(pass)) AddSaved(list);
    for (size_t i = 0; i < kDifferentiables; ++i)
      if (saved & TangentBit(i)) AddLikeOperand("the tangent of ", OtherArray::kTangent, i, list);
    return list;
  }

  std::vector<OtherArray> Results() const {
    std::vector<OtherArray> list;
    list.reserve(kMostArrays);
    if (IsForward(pass)) AddSaved(list);
    if (HasCotangents(pass))
      for (size_t i = 0; i < kDifferentiables; ++i)
        if (Has(kDifferentiable[i].operand) && !(saved & UnwantedBit(i)))
          AddLikeOperand("the gradient of ", OtherArray::kGradient, i, list);
    if (HasTangents(pass))
      for (const TangentResult& x : kTangentResults)
        if (!(saved & x.unwanted))
          list.push_back({x.text, x.view, x.like_out ? OtherArray::kOut : OtherArray::kStatistic});
    return list;
  }

 private:
  void AddSaved(std::vector<OtherArray>& list) const {
    for (const SavedArray& x : kSavedArrays)
      if (x.IsGiven(saved) && (x.of_forward || HasCotangents(pass)))
        list.push_back({x.text, x.view, x.like_out ? OtherArray::kOut : OtherArray::kStatistic});
  }
  static void AddLikeOperand(const char* what, OtherArray::Like like, size_t i, std::vector<OtherArray>& list) {
    const Differentiable& x = kDifferentiable[i];
    list.push_back(
        {{what, kForms[x.operand].name}, like == OtherArray::kTangent ? x.tangent : x.gradient, like, x.operand});
  }
};

struct Sizes {
  std::vector<int64_t> B;
  int64_t Sq = 0, Skv = 0, N = 0, K = 0, D = 0, Dv = 0;
  int64_t row_blocks = 0, key_blocks = 0;  // of a mask by blocks

  int64_t Of(char letter) const {  // of Form
    switch (letter) {
      case 'N':
      case 'n': return N;
      case 'K': return K;
      case 'S':
      case 's': return Sq;
      case 'T':
      case 't': return Skv;
      case 'D': return D;
      case 'V': return Dv;
      case 'R': return row_blocks;
      case 'C': return key_blocks;
      default: return letter - '0';
    }
  }

  void CutIntoBlocks(int64_t rows, int64_t keys) {
    row_blocks = Sq / rows + (Sq % rows != 0);
    key_blocks = Skv / keys + (Skv % keys != 0);
  }
};

class ShapeCheck {
 public:
  // Throws BadCall, which names the array, what it is and what it should be.
  static Sizes Of(const CallShapes& call) { return Of(call, call.OtherArgs(), call.Results()); }

  static Sizes Of(const CallShapes& call, const std::vector<OtherArray>& others,
                  const std::vector<OtherArray>& results) {
    ShapeCheck check(call);
    check.Static();
    check.Count("arguments", call.args.size(), call.Operands() + others.size());
    check.Count("results", call.rets.size(), results.size());
    check.ReadSizes(others, results);
    check.Operands();
    for (size_t i = 0; i < others.size(); ++i) check.Other(others[i], call.args[call.Operands() + i], false);
    for (size_t i = 0; i < results.size(); ++i) check.Other(results[i], call.rets[i], true);
    return std::move(check.sizes_);
  }

 private:
  explicit ShapeCheck(const CallShapes& call) : call_(call) {}

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
    if ((call_.saved & ~SavedBits(call_.pass)) != 0) throw BadCall("`saved` has bits for arrays that there are not");
    for (Operand i : {kQuery, kKey, kValue})
      if (!call_.Has(i)) throw BadCall(std::string(kForms[i].name) + " must be given");
    for (const auto& [i, needs] :
         {std::pair(kSeed, kStream), std::pair(kStream, kSeed), std::pair(kDropBits, kDropOffset),
          std::pair(kDropOffset, kDropBits), std::pair(kBiasOffset, kBias), std::pair(kSegmentRow, kSegmentKey),
          std::pair(kSegmentKey, kSegmentRow), std::pair(kDropoutStart, kSeed), std::pair(kBlocks, kBlockPairs),
          std::pair(kBlockPairs, kBlocks)})
      if (call_.Has(i) && !call_.Has(needs))
        throw BadCall(std::string(kForms[i].name) + " is given without " + kForms[needs].name);
    for (size_t i = 0; i < kDifferentiables; ++i) {
      const Operand of = kDifferentiable[i].operand;
      if ((call_.saved & TangentBit(i)) && !call_.Has(of))
        throw BadCall(std::string("the tangent of ") + kForms[of].name + " is given without " + kForms[of].name);
    }
  }

  void Count(const char* what, size_t got, size_t expected) {
    if (got != expected)
      throw BadCall("there are " + std::to_string(got) + " " + what + "; expected " + std::to_string(expected));
  }

  // The batch from all arrays, Sq and N from the statistics, the others from key and value.
  void ReadSizes(const std::vector<OtherArray>& others, const std::vector<OtherArray>& results) {
    const size_t lead = call_.query_axes.size() - 3;
    const Shape& m = IsForward(call_.pass) ? call_.rets[1] : call_.args[call_.Operands() + 1];
    Rank("softmax max", m, lead + 2);
    sizes_.N = m.dims[lead], sizes_.Sq = m.dims[lead + 1];
    sizes_.B.assign(m.dims, m.dims + lead);
    // Where some are 1, another array has the full size. (The ranks are checked later.)
    const auto widen = [&](const Shape& x, std::string_view axes) {
      for (size_t i = 0; i < lead && x.rank >= lead; ++i) {
        const size_t at = axes.empty() ? i : static_cast<size_t>(axes[i] - 'a');
        if (sizes_.B[i] == 1 && at < x.rank) sizes_.B[i] = x.dims[at];
      }
    };
    for (size_t i = 0, next = 0; i < kOperands; ++i)
      if (call_.Has(static_cast<Operand>(i))) widen(call_.args[next++], AxesOf(static_cast<Operand>(i)));
    for (size_t i = 0; i < others.size(); ++i) widen(call_.args[call_.Operands() + i], AxesOf(others[i]));
    for (size_t i = 0; i < results.size(); ++i) widen(call_.rets[i], AxesOf(results[i]));
    const Shape &key = call_.args[1], &value = call_.args[2];
    Rank("key", key, lead + 3);
    Rank("value", value, lead + 3);
    const auto of = [&](const Shape& x, std::string_view axes, size_t i) { return x.dims[axes[lead + i] - 'a']; };
    sizes_.Skv = of(key, call_.key_axes, 0), sizes_.K = of(key, call_.key_axes, 1);
    sizes_.D = of(key, call_.key_axes, 2), sizes_.Dv = of(value, call_.value_axes, 2);
    if (sizes_.D < 1) throw BadCall("key is " + ShapeText(key) + "; expected a head_dim of at least 1");
    if (sizes_.K < 1 || sizes_.N % sizes_.K != 0)
      throw BadCall("key is " + ShapeText(key) + ", that is " + std::to_string(sizes_.K) +
                    " heads; expected a number that divides the " + std::to_string(sizes_.N) + " of query");
    if (sizes_.Skv >= INT32_MAX || sizes_.Sq >= INT32_MAX) throw BadCall("a sequence is longer than 2^31 - 2");
    if (call_.Has(kBlockPairs)) ReadBlocks(lead, call_.args[call_.At(kBlockPairs)]);
  }

  void ReadBlocks(size_t lead, const Shape& pairs) {
    Rank("block_pairs", pairs, lead + 4);
    const int64_t rows = pairs.dims[lead + 2], keys = pairs.dims[lead + 3];
    if (rows < 1 || keys < 1)
      throw BadCall("block_pairs is " + ShapeText(pairs) + "; expected blocks of at least one row and key");
    sizes_.CutIntoBlocks(rows, keys);
  }

  void Rank(const Label& label, const Shape& x, size_t rank) {
    if (x.rank != rank)
      throw BadCall(label.Text() + " is " + ShapeText(x) + ", of rank " + std::to_string(x.rank) + "; expected rank " +
                    std::to_string(rank));
  }

  // The axes in which an array is stored; none: canonically.
  std::string_view AxesOf(Operand i) const {
    const std::string_view axes[] = {call_.query_axes, call_.key_axes, call_.value_axes};
    return i <= kValue ? axes[i] : std::string_view();
  }
  std::string_view AxesOf(const OtherArray& x) const {
    if (x.like == OtherArray::kOut) return call_.out_axes;
    return x.like == OtherArray::kStatistic ? std::string_view() : AxesOf(x.operand);
  }

  void Operands() {
    size_t next = 0;
    for (int at = 0; at < kOperands; ++at) {
      const auto i = static_cast<Operand>(at);
      if (!call_.Has(i)) continue;
      const Form& form = call_.FormOf(i);
      const Shape& x = call_.args[next++];
      if (i <= kValue) {
        Stored(form.name, x, AxesOf(i), form.sizes, form.elements, false);
      } else {
        Canonical(form.name, x, form.sizes, form.elements, false);
      }
    }
  }

  void Other(const OtherArray& form, const Shape& x, bool result) {
    if (form.like == OtherArray::kOut) {
      Stored(form.label, x, call_.out_axes, "SNV", Bit(call_.args[0].element), result);
    } else if (form.like == OtherArray::kStatistic) {
      Canonical(form.label, x, "NS", kFloat, result);
    } else {
      LikeOperand(form, x);
    }
  }

  // It has its operand's dims but in the batch: there a tangent's are 1 or full, those of the gradients of query, key and
  // value full, and those of other gradients full or the operand's.
  void LikeOperand(const OtherArray& form, const Shape& x) {
    const Shape& operand = call_.args[call_.At(form.operand)];
    const bool stored = form.operand <= kValue, tangent = form.like == OtherArray::kTangent;
    const std::string_view axes = AxesOf(form.operand);
    Rank(form.label, x, operand.rank);
    Fits(form.label, x, axes, stored || tangent ? Bit(operand.element) : kFloat, [&](size_t i, size_t at) {
      const int64_t own = operand.dims[at], full = i < sizes_.B.size() ? sizes_.B[i] : own;
      return Expected{i >= sizes_.B.size() ? own : tangent ? 1 : stored ? full : own, full};
    });
  }

  void Canonical(const Label& label, const Shape& x, std::string_view sizes, uint32_t elements, bool full) {
    Rank(label, x, sizes_.B.size() + sizes.size());
    Sized(label, x, {}, sizes, elements, full);
  }

  // `full`: all batch dims are.
  void Stored(const Label& label, const Shape& x, std::string_view axes, std::string_view sizes, uint32_t elements,
              bool full) {
    Rank(label, x, axes.size());
    Sized(label, x, axes, sizes, elements, full);
  }

  void Sized(const Label& label, const Shape& x, std::string_view axes, std::string_view sizes, uint32_t elements,
             bool full) {
    Fits(label, x, axes, elements, [&](size_t i, size_t) {
      const size_t lead = sizes_.B.size();
      const char letter = i < lead ? 0 : sizes[i - lead];
      if (letter == 'e') return Expected{kAny, kAny};
      const bool one = i < lead ? !full : letter >= 'a' && letter <= 'z';
      const int64_t size = i < lead ? sizes_.B[i] : sizes_.Of(letter);
      return Expected{one ? 1 : size, size};
    });
  }

  // One of two sizes of a dim.
  struct Expected {
    int64_t other, size;
  };
  static constexpr int64_t kAny = -1;

  // Whether the dims are those that `expected(canonical dim, stored dim)` gives. Without axes they are stored canonically.
  template <typename Fn>
  static void Fits(const Label& label, const Shape& x, std::string_view axes, uint32_t elements, const Fn& expected) {
    const auto at = [&](size_t i) { return axes.empty() ? i : static_cast<size_t>(axes[i] - 'a'); };
    bool fits = elements >> static_cast<int>(x.element) & 1;
    for (size_t i = 0; i < x.rank; ++i) {
      const Expected e = expected(i, at(i));
      fits = fits && (e.size == kAny || x.dims[at(i)] == e.size || x.dims[at(i)] == e.other);
    }
    if (fits) return;
    std::vector<std::string> dims(x.rank);
    for (size_t i = 0; i < x.rank; ++i) {
      const Expected e = expected(i, at(i));
      dims[at(i)] =
          e.size == kAny ? "any" : (e.other == e.size ? "" : std::to_string(e.other) + " or ") + std::to_string(e.size);
    }
    Differs(label, x, elements, dims);
  }

  const CallShapes& call_;
  Sizes sizes_;
};

}  // namespace jax_fa
