// Checks of shapes: a call with one thing wrong is refused, and the message says what.
#pragma once

#include "check.h"
#include "shapes.h"

namespace jax_fa_test {
namespace {

using jax_fa::BadCall;
using jax_fa::CallShapes;
using jax_fa::Element;
using jax_fa::Pass;
using jax_fa::ShapeCheck;

// An array of a call as it is, and as messages call it.
struct Given {
  std::string name;
  Element element;
  std::vector<int64_t> dims;
  std::string any;  // a digit for each dim that may be 1 or full, e for one of any size, else '.'
};

// A call with all operands, or without what excludes something else.
struct GivenCall {
  Pass pass = Pass::kForward;
  bool indexed = false;
  uint32_t present = 0, saved = 0;
  std::string query_axes = "abcde", key_axes = "acbde", value_axes = "eabcd", out_axes = "abdce";
  std::vector<Given> args, rets;

  // B 2 3, Sq 5, Skv 7, N 4, K 2, D 8, Dv 9. `broadcasts`: every dim that may be 1 is.
  GivenCall(Pass pass, bool indexed, bool broadcasts, Element dtype) : pass(pass), indexed(indexed) {
    using E = Element;
    const auto add = [&](std::vector<Given>& list, const char* name, E element, std::vector<int64_t> dims,
                         const char* any, const std::string& axes = "") {
      Given given{name, element, dims, any};
      if (broadcasts)
        for (size_t i = 0; i < dims.size(); ++i) given.dims[i] = any[i] == '1' ? 1 : dims[i];
      Given stored = given;  // canonical dim i is stored dim axes[i] - 'a'
      for (size_t i = 0; i < axes.size(); ++i) {
        const auto at = static_cast<size_t>(axes[i] - 'a');
        stored.dims[at] = given.dims[i], stored.any[at] = given.any[i];
      }
      list.push_back(stored);
    };
    const auto operand = [&](jax_fa::Operand i, E element, std::vector<int64_t> dims, const char* any,
                             const std::string& axes = "") {
      present |= uint32_t{1} << i;
      add(args, jax_fa::kForms[i].name, element, std::move(dims), any, axes);
    };
    operand(jax_fa::kQuery, dtype, {2, 3, 5, 4, 8}, "11...", query_axes);
    operand(jax_fa::kKey, dtype, {2, 3, 7, 2, 8}, "11...", key_axes);
    operand(jax_fa::kValue, dtype, {2, 3, 7, 2, 9}, "11...", value_axes);
    if (indexed) {
      operand(jax_fa::kBias, E::kF32, {2, 3, 4, 100}, "111e");
    } else {
      operand(jax_fa::kBias, E::kF32, {2, 3, 4, 5, 7}, "11111");
    }
    operand(jax_fa::kMask, E::kBool, {2, 3, 4, 5, 7}, "11111");
    operand(jax_fa::kLower, E::kI32, {2, 3, 4, 5}, "1111");
    operand(jax_fa::kUpper, E::kI32, {2, 3, 4, 5}, "1111");
    operand(jax_fa::kSlopes, E::kF32, {2, 3, 4, 5}, "11.1");
    operand(jax_fa::kSeed, E::kU32, {2, 3, 2}, "11.");
    operand(jax_fa::kStream, E::kU32, {2, 3, 4, 2}, "111.");
    operand(jax_fa::kDropBits, E::kU8, {2, 3, 50}, "11e");
    operand(jax_fa::kDropOffset, E::kI32, {2, 3, 4, 5, 2}, "1111.");
    if (indexed) operand(jax_fa::kBiasOffset, E::kI32, {2, 3, 4, 5}, "1111");
    operand(jax_fa::kPosition, E::kI32, {2, 3, 4, 5}, "1111");
    operand(jax_fa::kSegmentRow, E::kI32, {2, 3, 4, 5}, "1111");
    operand(jax_fa::kSegmentKey, E::kI32, {2, 3, 4, 7}, "111.");
    operand(jax_fa::kScale, E::kF32, {2, 3, 4}, "111");
    operand(jax_fa::kSoftCap, E::kF32, {2, 3, 4}, "111");
    operand(jax_fa::kKeepThreshold, E::kU32, {2, 3, 4}, "111");
    operand(jax_fa::kDropoutStart, E::kU32, {2, 3, 2}, "11.");
    operand(jax_fa::kBlocks, E::kI32, {2, 3, 4, 3, 4}, "111..");  // of 2 rows and keys
    operand(jax_fa::kBlockPairs, E::kBool, {2, 3, 4, 6, 2, 2}, "111eee");
    const bool forward = jax_fa::IsForward(pass), gradients = jax_fa::HasCotangents(pass);
    const bool tangents = jax_fa::HasTangents(pass), second = pass == Pass::kSecond;
    std::vector<Given>& list = forward ? rets : args;
    const char *like_out = forward ? "....." : "11...", *statistic = forward ? "...." : "11..";
    saved = jax_fa::SavedBits(pass) & 0xFFFF;
    add(list, "out", dtype, {2, 3, 5, 4, 9}, like_out, out_axes);
    add(list, "softmax max", E::kF32, {2, 3, 4, 5}, broadcasts ? "...." : statistic);
    add(list, "softmax sum", E::kF32, {2, 3, 4, 5}, statistic);
    if (gradients) add(list, "the cotangent of out", dtype, {2, 3, 5, 4, 9}, like_out, out_axes);
    add(list, "rounding", dtype, {2, 3, 5, 4, 9}, like_out, out_axes);
    if (gradients) add(list, "the cotangent of log-sum-exp", E::kF32, {2, 3, 4, 5}, statistic);
    if (second) add(list, "the tangent of out's cotangent", dtype, {2, 3, 5, 4, 9}, like_out, out_axes);
    if (second) add(list, "the tangent of log-sum-exp's cotangent", E::kF32, {2, 3, 4, 5}, statistic);
    // What is like an operand has its dims. Those of the batch: of tangents 1 or full, of the gradients of query, key and
    // value full, and of the other gradients they may be full where the operand's are 1.
    for (const jax_fa::Differentiable& x : jax_fa::kDifferentiable) {
      const auto at = static_cast<size_t>(__builtin_popcount(present & ((uint32_t{1} << x.operand) - 1)));
      const std::string name = jax_fa::kForms[x.operand].name;
      const std::string* const axes[] = {&query_axes, &key_axes, &value_axes};
      const bool stored = x.operand <= jax_fa::kValue;
      Given tangent = args[at], gradient = tangent;
      tangent.name = "the tangent of " + name, gradient.name = "the gradient of " + name;
      for (Given* y : {&tangent, &gradient}) y->any.assign(y->any.size(), '.');
      for (size_t i = 0; i < 2; ++i) {
        const size_t to = stored ? static_cast<size_t>((*axes[x.operand])[i] - 'a') : i;
        tangent.any[to] = '1';
        if (broadcasts) tangent.dims[to] = 1;
        if (stored) gradient.dims[to] = i == 0 ? 2 : 3;
      }
      if (!stored) gradient.element = E::kF32;
      if (gradients) rets.push_back(gradient);
      if (tangents) args.push_back(tangent);
    }
    if (!tangents) return;
    add(rets, "the tangent of out", dtype, {2, 3, 5, 4, 9}, ".....", out_axes);
    add(rets, "the tangent of log-sum-exp", E::kF32, {2, 3, 4, 5}, "....");
  }

  // "" if the call is right.
  std::string Message() const {
    CallShapes call;
    call.pass = pass, call.present = present, call.saved = saved;
    call.query_axes = query_axes, call.key_axes = key_axes, call.value_axes = value_axes, call.out_axes = out_axes;
    for (const auto& [from, to] : {std::pair(&args, &call.args), std::pair(&rets, &call.rets)})
      for (const Given& x : *from) to->push_back({x.element, x.dims.data(), x.dims.size()});
    try {
      const jax_fa::Sizes sizes = ShapeCheck::Of(call);
      const bool right = sizes.B == std::vector<int64_t>{2, 3} && sizes.Sq == 5 && sizes.Skv == 7 && sizes.N == 4 &&
                         sizes.K == 2 && sizes.D == 8 && sizes.Dv == 9;
      if (!right) Fail("the sizes are wrong");
      return "";
    } catch (const BadCall& e) {
      return e.what();
    }
  }

  void Refused(const std::string& start, const std::string& part) const {
    ++g_cases;
    const std::string message = Message();
    if (message.rfind("jax_fa cpu: " + start, 0) != 0 || message.find(part) == std::string::npos)
      Fail("expected '%s...%s', got '%s'", start.c_str(), part.c_str(), message.c_str());
  }
};

std::string DimsText(const std::vector<int64_t>& dims) {
  std::string text;
  for (int64_t n : dims) text += (text.empty() ? "(" : ", ") + std::to_string(n);
  return text + ")";
}

// Each array with each dim too small, too large or 1, one dim more and one fewer, and of another dtype.
void CheckWrongArrays(const GivenCall& call) {
  for (std::vector<Given> GivenCall::* list : {&GivenCall::args, &GivenCall::rets}) {
    for (size_t at = 0; at < (call.*list).size(); ++at) {
      const Given& right = (call.*list)[at];
      const auto with = [&](const auto& change, bool sizes) {
        GivenCall wrong = call;
        Given& x = (wrong.*list)[at];
        change(x);
        // The sizes of a call are those of these: another array does not fit them then.
        const bool source = right.name == "softmax max" || right.name == "key" || right.name == "value";
        wrong.Refused(sizes && source ? "" : right.name + " is ", sizes && source ? "; expected " : DimsText(x.dims));
        wrong.Refused("", "; expected ");
      };
      for (size_t d = 0; d < right.dims.size(); ++d) {
        if (right.any[d] == 'e') continue;
        for (int64_t size : {right.dims[d] - 1, right.dims[d] + 1, int64_t{0}, int64_t{1}, right.dims[d] * 100}) {
          if (size == right.dims[d] || (size == 1 && right.any[d] == '1') || size < 0) continue;
          with([&](Given& x) { x.dims[d] = size; }, true);
        }
      }
      with([](Given& x) { x.dims.push_back(1), x.any += '.'; }, false);
      with([](Given& x) { x.dims.pop_back(); }, false);
      with([](Given& x) { x.dims.clear(); }, false);
      for (int e = 0; e <= static_cast<int>(Element::kOther); ++e) {
        const auto element = static_cast<Element>(e);
        const bool floats = element == Element::kF32 || element == Element::kBF16 || element == Element::kF16;
        const bool any_float = right.name == "key" || right.name == "value" || right.name == "bias";
        if (element == right.element || (any_float && floats)) continue;
        if ((right.name == "mask" || right.name == "block_pairs") && element == Element::kU8) continue;
        // The dtype of query is that of out, and so on.
        if (right.name == "query" && floats) continue;
        with([&](Given& x) { x.element = element; }, false);
      }
    }
  }
}

void CheckShapes() {
  Doing("shapes.h", "", "");
  for (Pass pass : {Pass::kForward, Pass::kBackward, Pass::kJvp, Pass::kTangent, Pass::kSecond}) {
    for (bool indexed : {false, true}) {
      for (bool broadcasts : {false, true}) {
        const GivenCall call(pass, indexed, broadcasts, broadcasts ? Element::kBF16 : Element::kF32);
        if (const std::string message = call.Message(); !message.empty()) Fail("refused: %s", message.c_str());
        if (!broadcasts) CheckWrongArrays(call);
      }
    }
    const GivenCall right(pass, false, false, Element::kF32);
    const auto wrong = [&](const auto& change, const char* start, const char* part) {
      GivenCall call = right;
      change(call);
      call.Refused(start, part);
    };
    const std::string args = std::to_string(right.args.size()), rets = std::to_string(right.rets.size());
    wrong([](GivenCall& c) { c.args.pop_back(); }, "there are ", ("arguments; expected " + args).c_str());
    wrong([](GivenCall& c) { c.args.push_back(c.args[0]); }, "there are ", ("arguments; expected " + args).c_str());
    wrong([](GivenCall& c) { c.rets.pop_back(); }, "there are ", ("results; expected " + rets).c_str());
    wrong([](GivenCall& c) { c.rets.push_back(c.rets[0]); }, "there are ", ("results; expected " + rets).c_str());
    wrong([](GivenCall& c) { c.saved = 0; }, "there are ", "; expected ");
    for (uint32_t bit = 1; bit != 0; bit *= 2)
      if (!(jax_fa::SavedBits(pass) & bit)) wrong([=](GivenCall& c) { c.saved |= bit; }, "`saved` has bits", "");
    if (jax_fa::HasTangents(pass))
      wrong([](GivenCall& c) { c.present &= ~(1u << jax_fa::kBias); }, "the tangent of bias is given without bias", "");
    if (jax_fa::HasCotangents(pass))
      for (const size_t i : {size_t{0}, jax_fa::kDifferentiables - 1}) {
        GivenCall fewer = right;
        fewer.saved |= jax_fa::UnwantedBit(i);
        fewer.Refused("there are ", "results; expected " + std::to_string(right.rets.size() - 1));
        fewer.rets.erase(fewer.rets.begin() + static_cast<std::ptrdiff_t>(i));
        if (const std::string message = fewer.Message(); !message.empty()) Fail("refused: %s", message.c_str());
      }
    wrong([](GivenCall& c) { c.present |= 1u << 31; }, "`present` has bits", "");
    wrong([](GivenCall& c) { c.present = 0; }, "query must be given", "");
    for (const auto& [i, message] : {std::pair(jax_fa::kSeed, "dropout_stream is given without dropout_seed"),
                                     std::pair(jax_fa::kStream, "dropout_seed is given without dropout_stream"),
                                     std::pair(jax_fa::kDropBits, "drop_offset is given without drop_bits"),
                                     std::pair(jax_fa::kDropOffset, "drop_bits is given without drop_offset"),
                                     std::pair(jax_fa::kSegmentRow, "segment_key is given without segment_row"),
                                     std::pair(jax_fa::kSegmentKey, "segment_row is given without segment_key"),
                                     std::pair(jax_fa::kBlocks, "block_pairs is given without blocks"),
                                     std::pair(jax_fa::kBlockPairs, "blocks is given without block_pairs")})
      wrong([at = i](GivenCall& c) { c.present &= ~(1u << at); }, message, "");
    wrong([](GivenCall& c) { c.present &= ~(1u << jax_fa::kSeed | 1u << jax_fa::kStream); },
          "dropout_start is given without dropout_seed", "");
    for (std::string GivenCall::* axes :
         {&GivenCall::query_axes, &GivenCall::key_axes, &GivenCall::value_axes, &GivenCall::out_axes})
      for (const char* bad : {"aabcd", "abcdf", "abcd", "abcdef", "", "abcdA"})
        wrong([&](GivenCall& c) { c.*axes = bad; }, "", "must be a permutation");
    wrong([](GivenCall& c) { c.args[1].dims[3] = 3; }, "key is ",
          "3 heads; expected a number that divides the 4 of query");
    wrong([](GivenCall& c) { c.args[1].dims[3] = 0; }, "key is ", "0 heads; expected a number");
    wrong([](GivenCall& c) { c.args[1].dims[4] = 0; }, "key is ", "expected a head_dim of at least 1");
    for (const size_t dim : {size_t{4}, size_t{5}})
      wrong(
          [dim](GivenCall& c) {
            for (Given& x : c.args)
              if (x.name == "block_pairs") x.dims[dim] = 0;
          },
          "block_pairs is ", "expected blocks of at least one row and key");
  }
}

}  // namespace
}  // namespace jax_fa_test
