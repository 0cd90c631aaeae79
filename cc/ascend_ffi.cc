#include "ascend_ffi.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <iterator>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "cann/adapter.h"
#include "cann/call.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jax_fa {

namespace {

// Mirrors what backends/ascend.py sends.
struct AscendProblemAttr {
  std::string_view input_layout;
  int64_t head_num;
  double scale_value, keep_prob;
  int64_t pre_tokens, next_tokens, inner_precise, sparse_mode, pse_type;
  int64_t q_start, kv_start;
  uint32_t present;  // bit 0 pse, 1 drop_mask, 2 atten_mask, 3 sink
  std::string_view softmax_layout;
};

using cann::Array;
using Ints = ffi::Span<const int64_t>;
constexpr auto kForward = cann::Direction::kForward;
constexpr auto kBackward = cann::Direction::kBackward;

cann::Failure BadCall(const std::string& what) {
  return cann::Failure(cann::Outcome::kInvalidArgument, "jax_fa ascend: " + what);
}

cann::aclDataType ToDType(const std::string& name, ffi::DataType dtype) {
  switch (dtype) {
    case ffi::F32: return cann::ACL_FLOAT;
    case ffi::F16: return cann::ACL_FLOAT16;
    case ffi::BF16: return cann::ACL_BF16;
    case ffi::U8: return cann::ACL_UINT8;
    case ffi::PRED: return cann::ACL_BOOL;
    default: break;
  }
  throw BadCall(name + " has XLA dtype " + std::to_string(static_cast<int>(dtype)) +
                "; float32, float16, bfloat16, uint8 and bool are supported");
}

Array ToArray(const std::string& name, const ffi::AnyBuffer& buffer) {
  Array x;
  x.data = buffer.untyped_data();
  x.dims.assign(buffer.dimensions().begin(), buffer.dimensions().end());
  x.dtype = ToDType(name, buffer.element_type());
  return x;
}

using Member = Array cann::Call::*;
constexpr Member kOptionals[] = {&cann::Call::pse, &cann::Call::drop_mask, &cann::Call::atten_mask, &cann::Call::sink};
constexpr size_t kSinkBit = 3;

// The operands and results of a call in the order of the FFI.
std::vector<Member> Operands(cann::Direction direction, uint32_t present) {
  using C = cann::Call;
  std::vector<Member> members = {&C::query, &C::key, &C::value};
  if (direction == kBackward) members.push_back(&C::dy);
  for (size_t i = 0; i < std::size(kOptionals); ++i)
    if (present >> i & 1U) members.push_back(kOptionals[i]);
  if (direction == kBackward) members.insert(members.end(), {&C::softmax_max, &C::softmax_sum, &C::attention});
  return members;
}

std::vector<Member> Results(cann::Direction direction, bool with_sink) {
  using C = cann::Call;
  if (direction == kForward) return {&C::softmax_max, &C::softmax_sum, &C::attention};
  std::vector<Member> members = {&C::dq, &C::dk, &C::dv};
  if (with_sink) members.push_back(&C::dsink);
  return members;
}

std::string NameOf(Member member) {
  for (const cann::Slot& slot : cann::kSlots)
    if (slot.array == member) return slot.name;
  return "operand";
}

void MustCount(const char* what, size_t got, size_t wanted) {
  if (got != wanted)
    throw BadCall("expected " + std::to_string(wanted) + " " + what + " for these attributes; got " +
                  std::to_string(got));
}

cann::Call ToCall(cann::Direction direction, const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                  const AscendProblemAttr& p, Ints prefix, Ints actual_seq_qlen, Ints actual_seq_kvlen) {
  cann::Call c;
  c.direction = direction;
  c.input_layout = p.input_layout;
  c.softmax_layout = p.softmax_layout;
  c.head_num = p.head_num;
  c.scale_value = p.scale_value;
  c.keep_prob = p.keep_prob;
  c.pre_tokens = p.pre_tokens;
  c.next_tokens = p.next_tokens;
  c.inner_precise = p.inner_precise;
  c.sparse_mode = p.sparse_mode;
  c.pse_type = p.pse_type;
  c.q_start = p.q_start;
  c.kv_start = p.kv_start;
  c.prefix.assign(prefix.begin(), prefix.end());
  c.actual_seq_qlen.assign(actual_seq_qlen.begin(), actual_seq_qlen.end());
  c.actual_seq_kvlen.assign(actual_seq_kvlen.begin(), actual_seq_kvlen.end());
  if (p.present >> std::size(kOptionals) != 0)
    throw BadCall("present has bits beyond pse, drop_mask, atten_mask and sink");

  const std::vector<Member> operands = Operands(direction, p.present),
                            results = Results(direction, p.present >> kSinkBit & 1U);
  MustCount("operands", args.size(), operands.size());
  MustCount("results", rets.size(), results.size());
  for (size_t i = 0; i < operands.size(); ++i) {
    const auto x = args.get<ffi::AnyBuffer>(i);
    if (!x.has_value()) throw BadCall(x.error().message());
    c.*operands[i] = ToArray(NameOf(operands[i]), *x);
  }
  for (size_t i = 0; i < results.size(); ++i) {
    auto x = rets.get<ffi::AnyBuffer>(i);
    if (!x.has_value()) throw BadCall(x.error().message());
    c.*results[i] = ToArray(NameOf(results[i]), **x);
  }
  return c;
}

// XLA's CPU constants and parameters start at multiples of 16 bytes, CANN's tensors at multiples of 32: what does not fit
// is given as a copy.
class AlignedCopies {
 public:
  explicit AlignedCopies(cann::Call& call) {
    const std::vector<Member> results = Results(call.direction, call.sink.present());
    for (const cann::Slot& slot : cann::kSlots) {
      Array& x = call.*slot.array;
      if (!x.present() || cann::Aligned(x)) continue;
      Copy copy;
      copy.memory.reset(new (kAlignment) std::byte[x.bytes()]);
      copy.original = x.data;
      copy.bytes = x.bytes();
      for (Member result : results) copy.result = copy.result || result == slot.array;
      if (!copy.result) std::memcpy(copy.memory.get(), x.data, copy.bytes);
      x.data = copy.memory.get();
      copies_.push_back(std::move(copy));
    }
  }

  void Deliver() const {
    for (const Copy& copy : copies_)
      if (copy.result) std::memcpy(copy.original, copy.memory.get(), copy.bytes);
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete[](memory, kAlignment); }
  };
  struct Copy {
    std::unique_ptr<std::byte[], Free> memory;
    void* original = nullptr;
    size_t bytes = 0;
    bool result = false;
  };
  std::vector<Copy> copies_;
};

ffi::Error ToError(const cann::Status& status) {
  switch (status.outcome) {
    case cann::Outcome::kOk: return ffi::Error::Success();
    case cann::Outcome::kInvalidArgument: return ffi::Error(ffi::ErrorCode::kInvalidArgument, status.message);
    case cann::Outcome::kUnimplemented: return ffi::Error(ffi::ErrorCode::kUnimplemented, status.message);
    case cann::Outcome::kUnavailable: return ffi::Error(ffi::ErrorCode::kFailedPrecondition, status.message);
    case cann::Outcome::kOutOfMemory: return ffi::Error(ffi::ErrorCode::kResourceExhausted, status.message);
    case cann::Outcome::kInternal: break;
  }
  return ffi::Error(ffi::ErrorCode::kInternal, status.message);
}

template <typename Fn>
ffi::Error Guard(const Fn& fn) {
  try {
    return ToError(fn());
  } catch (const cann::Failure& failure) {
    return ToError(failure.status);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_fa ascend: out of host memory");
  } catch (const std::exception& e) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("jax_fa ascend: ") + e.what());
  } catch (...) {
    return ffi::Error(ffi::ErrorCode::kInternal, "jax_fa ascend: unknown failure");
  }
}

template <cann::Direction direction>
ffi::Error OnDevice(void* stream, ffi::ScratchAllocator scratch, int32_t device, ffi::RemainingArgs args,
                    ffi::RemainingRets rets, AscendProblemAttr p, Ints prefix, Ints actual_seq_qlen,
                    Ints actual_seq_kvlen) {
  return Guard([&] {
    const cann::Call call = ToCall(direction, args, rets, p, prefix, actual_seq_qlen, actual_seq_kvlen);
    return cann::Enqueue(call, stream, device, [&](size_t bytes, size_t alignment) -> void* {
      return scratch.Allocate(bytes, alignment).value_or(nullptr);
    });
  });
}

template <cann::Direction direction>
ffi::Error OnHost(ffi::RemainingArgs args, ffi::RemainingRets rets, AscendProblemAttr p, Ints prefix,
                  Ints actual_seq_qlen, Ints actual_seq_kvlen) {
  return Guard([&] {
    cann::Call call = ToCall(direction, args, rets, p, prefix, actual_seq_qlen, actual_seq_kvlen);
    const AlignedCopies copies(call);
    cann::Status status = cann::RunAndWait(call);
    if (status.ok()) copies.Deliver();
    return status;
  });
}

}  // namespace
}  // namespace jax_fa

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_fa::AscendProblemAttr, xla::ffi::StructMember<std::string_view>("input_layout"),
    xla::ffi::StructMember<int64_t>("head_num"), xla::ffi::StructMember<double>("scale_value"),
    xla::ffi::StructMember<double>("keep_prob"), xla::ffi::StructMember<int64_t>("pre_tokens"),
    xla::ffi::StructMember<int64_t>("next_tokens"), xla::ffi::StructMember<int64_t>("inner_precise"),
    xla::ffi::StructMember<int64_t>("sparse_mode"), xla::ffi::StructMember<int64_t>("pse_type"),
    xla::ffi::StructMember<int64_t>("q_start"), xla::ffi::StructMember<int64_t>("kv_start"),
    xla::ffi::StructMember<uint32_t>("present"), xla::ffi::StructMember<std::string_view>("softmax_layout"));

namespace jax_fa {
namespace {

// operands: query, key, value, [dy], [pse], [drop_mask], [atten_mask], [sink], [softmax_max, softmax_sum, attention_in]
// results: softmax_max, softmax_sum, attention_out, or dq, dk, dv, [dsink]
template <typename Binding>
auto Common(Binding&& binding) {
  return std::forward<Binding>(binding)
      .RemainingArgs()
      .RemainingRets()
      .template Attr<AscendProblemAttr>("problem")
      .template Attr<Ints>("prefix")
      .template Attr<Ints>("actual_seq_qlen")
      .template Attr<Ints>("actual_seq_kvlen");
}

auto DeviceBinding() {
  return Common(
      ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().Ctx<ffi::ScratchAllocator>().Ctx<ffi::DeviceOrdinal>());
}

auto HostBinding() { return Common(ffi::Ffi::Bind()); }

}  // namespace

XLA_FFI_DEFINE_HANDLER(kAscendForward, OnDevice<kForward>, DeviceBinding());
XLA_FFI_DEFINE_HANDLER(kAscendBackward, OnDevice<kBackward>, DeviceBinding());
XLA_FFI_DEFINE_HANDLER(kAscendHostForward, OnHost<kForward>, HostBinding());
XLA_FFI_DEFINE_HANDLER(kAscendHostBackward, OnHost<kBackward>, HostBinding());

XLA_FFI_Error* AscendForward(XLA_FFI_CallFrame* call_frame) { return kAscendForward(call_frame); }
XLA_FFI_Error* AscendBackward(XLA_FFI_CallFrame* call_frame) { return kAscendBackward(call_frame); }
XLA_FFI_Error* AscendHostForward(XLA_FFI_CallFrame* call_frame) { return kAscendHostForward(call_frame); }
XLA_FFI_Error* AscendHostBackward(XLA_FFI_CallFrame* call_frame) { return kAscendHostBackward(call_frame); }

}  // namespace jax_fa
