// Tests of the XLA FFI handlers without XLA: calls at random, most of them with something wrong.
//
//   ffi_test COUNT [SEED]
//
// A call is put together as XLA would: every array has exactly the bytes of its shape, with random ones in them. One that is
// as the forms of operands.h have it must be computed, and any other computed or refused with a text; with sanitizers, a
// read or write elsewhere shows. Prints a line per failure and exits with 1 if there is any.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "cpu_ffi.h"
#include "ffi_frame.h"
#include "numbers.h"
#include "operands.h"
#include "paged_shapes.h"
#include "shapes.h"

namespace jax_fa_test {
namespace {

using jax_fa::CallShapes;
using jax_fa::Element;
using jax_fa::OtherArray;
using jax_fa::Pass;
using jax_fa::Sizes;

int g_failures = 0;

// The sizes of a call, and its batch.
XLA_FFI_DataType TypeOf(Element e) {
  switch (e) {
    case Element::kF32: return XLA_FFI_DataType_F32;
    case Element::kBF16: return XLA_FFI_DataType_BF16;
    case Element::kF16: return XLA_FFI_DataType_F16;
    case Element::kI32: return XLA_FFI_DataType_S32;
    case Element::kU32: return XLA_FFI_DataType_U32;
    case Element::kU8: return XLA_FFI_DataType_U8;
    case Element::kBool: return XLA_FFI_DataType_PRED;
    case Element::kI8: return XLA_FFI_DataType_S8;
    case Element::kF8E4M3: return XLA_FFI_DataType_F8E4M3FN;
    case Element::kF8E5M2: return XLA_FFI_DataType_F8E5M2;
    default: return XLA_FFI_DataType_F64;
  }
}

class Calls {
 public:
  explicit Calls(uint64_t seed) : random_(seed) {}

  void Run() {
    Frame frame;
    const jax_fa::FfiTarget& target = random_.OneIn(5) ? Paged(frame) : Attention(frame);
    const bool good = random_.OneIn(3);
    const int64_t changes = good ? 0 : 1 + random_.Below(3);
    for (int64_t i = 0; i < changes; ++i) Spoil(frame);
    for (auto* list : {&frame.args, &frame.rets})
      for (FrameArray& x : *list) Fill(x);
    const std::string text = frame.Call(target, 1 + random_.Below(3));
    if (good && text != kSuccess) Fail("a good call is refused", text, frame);
    if (text.empty()) Fail("refused without a text", text, frame);
  }

 private:
  Element OneOf(uint32_t elements) {
    Element e;
    do e = static_cast<Element>(random_.Below(static_cast<int64_t>(Element::kOther)));
    while ((elements & jax_fa::Bit(e)) == 0);
    return e;
  }

  // `*#B` and what the letters name; `full`: no dim but those in lower case is 1 by choice.
  std::vector<int64_t> Dims(const Sizes& s, const char* letters, bool full) {
    std::vector<int64_t> dims;
    for (int64_t b : s.B) dims.push_back(!full && random_.OneIn(3) ? 1 : b);
    for (const char* c = letters; *c != 0; ++c) {
      const bool may_be_one = *c >= 'a' && *c <= 'z';
      dims.push_back(*c == 'e' ? random_.Below(60) : may_be_one && random_.OneIn(3) ? 1 : s.Of(*c));
    }
    return dims;
  }

  std::string Axes(size_t rank) {
    std::string axes;
    for (size_t i = 0; i < rank; ++i) axes += static_cast<char>('a' + i);
    for (size_t i = rank; i-- > 1 && random_.OneIn(2);)
      std::swap(axes[i], axes[static_cast<size_t>(random_.Below(static_cast<int64_t>(i) + 1))]);
    return axes;
  }

  static std::vector<int64_t> Stored(const std::vector<int64_t>& dims, const std::string& axes) {
    std::vector<int64_t> stored(dims.size());
    for (size_t i = 0; i < dims.size(); ++i) stored[static_cast<size_t>(axes[i] - 'a')] = dims[i];
    return stored;
  }

  const jax_fa::FfiTarget& Attention(Frame& frame) {
    constexpr struct {
      Pass pass;
      const jax_fa::FfiTarget& target;
    } kPasses[] = {{Pass::kForward, jax_fa::kCpuForward},
                   {Pass::kBackward, jax_fa::kCpuBackward},
                   {Pass::kJvp, jax_fa::kCpuJvp},
                   {Pass::kTangent, jax_fa::kCpuTangent},
                   {Pass::kSecond, jax_fa::kCpuSecond}};
    const auto& [pass, target] = kPasses[random_.Below(5)];
    Sizes s;
    for (int64_t rank = random_.Below(3); rank > 0; --rank) s.B.push_back(random_.OneIn(12) ? 0 : 1 + random_.Below(3));
    s.K = 1 + random_.Below(3), s.N = s.K * (1 + random_.Below(3));
    s.Sq = random_.OneIn(10) ? 0 : 1 + random_.Below(40), s.Skv = random_.OneIn(10) ? 0 : 1 + random_.Below(70);
    s.D = 1 + random_.Below(40), s.Dv = random_.OneIn(10) ? 0 : 1 + random_.Below(40);
    const int64_t block_rows = 1 + random_.Below(20), block_keys = 1 + random_.Below(20);
    s.CutIntoBlocks(block_rows, block_keys);
    CallShapes call;
    call.pass = pass;
    call.present = Present();
    call.saved = Saved(call);
    const size_t rank = s.B.size() + 3;
    const std::string axes[] = {Axes(rank), Axes(rank), Axes(rank), Axes(rank)};
    // Query, key, value and results of one dtype.
    const Element own = OneOf(jax_fa::kFloats);
    std::vector<std::vector<int64_t>> canonical(jax_fa::kOperands);
    for (const jax_fa::Form& form : jax_fa::kForms) {
      if (!call.Has(form.operand)) continue;
      const jax_fa::Form& actual = call.FormOf(form.operand);
      std::vector<int64_t>& dims = canonical[form.operand] = Dims(s, actual.sizes, false);
      if (form.operand == jax_fa::kBlockPairs) dims.end()[-2] = block_rows, dims.end()[-1] = block_keys;
      const bool stored = form.operand <= jax_fa::kValue;
      frame.Add(frame.args, actual.name, TypeOf(stored ? own : OneOf(actual.elements)),
                stored ? Stored(dims, axes[form.operand]) : dims);
    }
    const auto other = [&](std::vector<FrameArray>& list, const OtherArray& x, bool result) {
      if (x.like == OtherArray::kOut) {
        frame.Add(list, x.label.Text(), TypeOf(own), Stored(Dims(s, "SNV", result), axes[3]));
      } else if (x.like == OtherArray::kStatistic) {
        frame.Add(list, x.label.Text(), XLA_FFI_DataType_F32, Dims(s, "NS", result));
      } else {
        std::vector<int64_t> dims = canonical[x.operand];
        const bool stored = x.operand <= jax_fa::kValue, tangent = x.like == OtherArray::kTangent;
        for (size_t i = 0; i < s.B.size(); ++i)
          if (tangent ? random_.OneIn(2) : stored || random_.OneIn(3))
            dims[i] = tangent && random_.OneIn(2) ? 1 : s.B[i];
        const XLA_FFI_DataType type = stored || tangent ? frame.args[call.At(x.operand)].dtype : XLA_FFI_DataType_F32;
        frame.Add(list, x.label.Text(), type, stored ? Stored(dims, axes[x.operand]) : dims);
      }
    };
    for (const OtherArray& x : call.OtherArgs()) other(frame.args, x, false);
    for (const OtherArray& x : call.Results()) other(frame.rets, x, true);
    frame.Set("present", call.present), frame.Set("saved", call.saved);
    frame.Set("query_axes", axes[0]), frame.Set("key_axes", axes[1]);
    frame.Set("value_axes", axes[2]), frame.Set("out_axes", axes[3]);
    frame.Set("scale", AnyFloat()), frame.Set("keep_prob", AnyFloat()), frame.Set("soft_cap", AnyFloat());
    frame.Set("alibi", static_cast<uint8_t>(random_.Below(4)));
    frame.Set("bias_apart", static_cast<uint8_t>(0));
    frame.Set("partial", static_cast<uint8_t>(random_.Below(2)));
    frame.Set("threshold", static_cast<uint32_t>(random_.Below(65537)));
    return target;
  }

  // Every dim of some array is full: then the sizes are those of the call.
  uint32_t Present() {
    uint32_t present = 7;
    for (uint32_t i = jax_fa::kBias; i < jax_fa::kOperands; ++i)
      if (random_.OneIn(4)) present |= uint32_t{1} << i;
    const auto together = [&](jax_fa::Operand a, jax_fa::Operand b) {
      const uint32_t both = uint32_t{1} << a | uint32_t{1} << b;
      if ((present & both) != 0) present |= both;
    };
    together(jax_fa::kSeed, jax_fa::kStream);
    together(jax_fa::kDropBits, jax_fa::kDropOffset);
    together(jax_fa::kSegmentRow, jax_fa::kSegmentKey);
    together(jax_fa::kBlocks, jax_fa::kBlockPairs);
    if ((present >> jax_fa::kBiasOffset & 1) != 0) present |= uint32_t{1} << jax_fa::kBias;
    if ((present >> jax_fa::kSeed & 1) == 0) present &= ~(uint32_t{1} << jax_fa::kDropoutStart);
    return present;
  }

  uint32_t Saved(const CallShapes& call) {
    uint32_t saved = jax_fa::SavedBits(call.pass) & static_cast<uint32_t>(random_.Bits());
    for (size_t i = 0; i < jax_fa::kDifferentiables; ++i)
      if (!call.Has(jax_fa::kDifferentiable[i].operand)) saved &= ~jax_fa::TangentBit(i);
    return saved;
  }

  const jax_fa::FfiTarget& Paged(Frame& frame) {
    jax_fa::PagedSizes s;
    s.B = random_.Below(4), s.Sq = 1 + random_.Below(4), s.K = 1 + random_.Below(2), s.N = s.K * (1 + random_.Below(4));
    s.D = 1 + random_.Below(40), s.count = 1 + random_.Below(6), s.size = 1 + random_.Below(20);
    s.each = 1 + random_.Below(4);
    const auto present = static_cast<uint32_t>(random_.Below(32));
    s.Dv = (present & jax_fa::kPagedValue) != 0 ? random_.Below(40) : 1 + random_.Below(s.D);
    const Element pages = OneOf(jax_fa::kPageElements);
    const auto add = [&](std::vector<FrameArray>& list, const jax_fa::PagedForm& form) {
      std::vector<int64_t> dims;
      for (const char* c = form.sizes; *c != 0; ++c) dims.push_back(*c >= 'a' && random_.OneIn(2) ? 1 : s.Of(*c));
      const bool of_pages = form.elements == jax_fa::kPageElements;
      frame.Add(list, form.name, TypeOf(of_pages ? pages : OneOf(form.elements)), dims);
    };
    for (const jax_fa::PagedForm& form : jax_fa::kPagedForms)
      if (form.bit == 0 || (present & form.bit) != 0) add(frame.args, form);
    for (const jax_fa::PagedForm& form : jax_fa::kPagedResults) add(frame.rets, form);
    frame.Set("present", present), frame.Set("scale", AnyFloat()), frame.Set("soft_cap", AnyFloat());
    return jax_fa::kCpuPaged;
  }

  float AnyFloat() {
    constexpr float kAny[] = {0.0f, 0.5f, 1.0f, -1.0f, 3e38f, 1e-40f};
    return random_.OneIn(3) ? kAny[random_.Below(6)] : static_cast<float>(random_.Normal());
  }

  // One thing is otherwise.
  void Spoil(Frame& frame) {
    std::vector<FrameArray>& list = random_.OneIn(3) ? frame.rets : frame.args;
    FrameArray* x =
        list.empty() ? nullptr : &list[static_cast<size_t>(random_.Below(static_cast<int64_t>(list.size())))];
    constexpr int64_t kSizes[] = {0, 1, 2, 3, 4, 5, 7, 16, 33, 65};
    switch (random_.Below(8)) {
      case 0:
        if (x != nullptr && !x->dims.empty())
          x->dims[static_cast<size_t>(random_.Below(static_cast<int64_t>(x->dims.size())))] = kSizes[random_.Below(10)];
        return;
      case 1:
        if (x != nullptr) x->dtype = AnyType(random_);
        return;
      case 2:
        if (x != nullptr && random_.OneIn(2)) x->dims.push_back(1 + random_.Below(3));
        if (x != nullptr && !x->dims.empty() && random_.OneIn(2)) x->dims.pop_back();
        return;
      case 3:
        if (x != nullptr) list.erase(list.begin() + (x - list.data()));
        return;
      case 4: return frame.Add(list, "one more", XLA_FFI_DataType_F32, {1 + random_.Below(3)});
      case 5: {  // an axis that there is not, twice, or none
        constexpr const char* kAxes[] = {"query_axes", "key_axes", "value_axes", "out_axes"};
        std::string axes;
        for (int64_t i = random_.Below(8); i > 0; --i)
          axes += static_cast<char>(random_.OneIn(4) ? random_.Below(256) : 'a' + random_.Below(6));
        return frame.Set(kAxes[random_.Below(4)], axes);
      }
      case 6: {
        const char* const name = random_.OneIn(2) ? "present" : "saved";
        return frame.Set(name, frame.Unsigned(name) ^ (random_.OneIn(4) ? static_cast<uint32_t>(random_.Bits())
                                                                        : uint32_t{1} << random_.Below(32)));
      }
      default: return frame.SpoilAttribute(random_);
    }
  }

  // Random bytes, or small integers.
  void Fill(FrameArray& x) {
    x.Allocate();
    const int64_t kind = random_.Below(3);
    for (size_t i = 0; i < x.bytes; ++i)
      x.data.get()[i] = static_cast<char>(kind == 0 ? random_.Bits() : kind == 1 && i % 4 == 0 ? random_.Below(40) : 0);
  }

  void Fail(const char* what, const std::string& text, const Frame& frame) {
    ++g_failures;
    std::printf("FAIL: %s: %s [%s]\n", what, text.c_str(), frame.Text().c_str());
    std::fflush(stdout);
  }

  Random random_;
};

}  // namespace
}  // namespace jax_fa_test

int main(int argc, char** argv) {
  const long long count = argc > 1 ? std::atoll(argv[1]) : 2000;
  const unsigned long long seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  static_cast<XLA_FFI_TypeId*>(jax_fa::CompiledCallTypeId())->type_id = 1;  // as XLA does, told of the type
  for (long long i = 0; i < count; ++i) jax_fa_test::Calls(seed * 1000003 + static_cast<uint64_t>(i)).Run();
  std::printf("%lld calls, %d failures\n", count, jax_fa_test::g_failures);
  return jax_fa_test::g_failures == 0 ? 0 : 1;
}
