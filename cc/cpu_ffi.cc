#include "cpu_ffi.h"

#include <cmath>
#include <cstring>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/kernel.h"
#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jax_fa {

// Mirrors what backends/cpu.py sends. `present`: bit i is set where operand i of `Operands` (in field order)
// is given; the arrays come in that order. `saved`: bit 0, the rounding of out is saved; bit 1, log-sum-exp has a cotangent.
struct ProblemAttr {
  uint32_t present, saved;
  std::string_view query_axes, key_axes, value_axes, out_axes;  // canonical dim i is stored dim axes[i] - 'a'
  float scale, keep_prob, soft_cap;
  uint8_t alibi, bias_apart;
  uint32_t threshold;
};

namespace {

// The operands in the order of problem.py.
enum Operand {
  kQuery, kKey, kValue, kBias, kMask, kLower, kUpper, kSlopes, kSeed, kStream, kDropBits, kDropOffset, kOperands
};

enum Saved : uint32_t { kRounding = 1, kLogSumExp = 2 };

struct BadCall : std::exception {
  explicit BadCall(std::string text) : text(std::move(text)) {}
  const char* what() const noexcept override { return text.c_str(); }
  std::string text;
};

DType ToDType(ffi::DataType t) {
  switch (t) {
    case ffi::F32: return DType::kF32;
    case ffi::BF16: return DType::kBF16;
    case ffi::F16: return DType::kF16;
    case ffi::S32: return DType::kI32;
    case ffi::U32: return DType::kU32;
    case ffi::U8: case ffi::PRED: return DType::kU8;
    default: throw BadCall("jax_fa cpu: dtype " + std::to_string(static_cast<int>(t)) + " is not supported");
  }
}

// Builds views; owns their tables of batch offsets.
class Views {
 public:
  Views(ffi::Span<const int64_t> batch) : batch_(batch.begin(), batch.end()) {}

  int64_t entries() const {
    int64_t n = 1;
    for (int64_t size : batch_) n *= size;
    return n;
  }

  // An array stored canonically, `*#B` and then head, row and col as far as `dims` says.
  View Canonical(const ffi::AnyBuffer& x, const char* dims) {
    std::string axes;
    for (size_t i = 0; i < x.dimensions().size(); ++i) axes.push_back(static_cast<char>('a' + i));
    return Stored(x, axes, dims);
  }

  // An array stored in the order `axes`; `dims` names what follows `*#B`:
  // h head, r row, c col, - anything else.
  View Stored(const ffi::AnyBuffer& x, std::string_view axes, const char* dims) {
    const size_t rank = x.dimensions().size(), lead = batch_.size();
    if (axes.size() != rank || rank != lead + std::strlen(dims))
      throw BadCall("jax_fa cpu: an operand has rank " + std::to_string(rank) + ", expected " +
                    std::to_string(lead + std::strlen(dims)));
    std::vector<int64_t> stride(rank, 1);
    for (size_t i = rank; i-- > 1;) stride[i - 1] = stride[i] * x.dimensions()[i];
    const auto at = [&](size_t i) {  // stride of canonical dim i, 0 where it broadcasts
      const size_t axis = static_cast<size_t>(axes[i] - 'a');
      return x.dimensions()[axis] == 1 ? 0 : stride[axis];
    };
    View v;
    v.data = static_cast<char*>(x.untyped_data());
    v.dtype = ToDType(x.element_type());
    for (size_t i = 0; dims[i] != 0; ++i) {
      if (dims[i] == 'h') v.head = at(lead + i);
      if (dims[i] == 'r') v.row = at(lead + i);
      // A single column is still a column: kernels take stride 1 as contiguous.
      if (dims[i] == 'c') v.col = at(lead + i);
    }
    std::vector<int64_t> offsets(static_cast<size_t>(entries()), 0);
    for (size_t b = 0; b < offsets.size(); ++b) {
      int64_t rest = static_cast<int64_t>(b);
      for (size_t i = lead; i-- > 0;) {
        offsets[b] += rest % batch_[i] * at(i);
        rest /= batch_[i];
      }
    }
    tables_.push_back(std::move(offsets));
    v.batch = tables_.back().data();
    return v;
  }

 private:
  std::vector<int64_t> batch_;
  std::vector<std::vector<int64_t>> tables_;
};

ffi::AnyBuffer Arg(const ffi::RemainingArgs& args, size_t i) {
  auto x = args.get<ffi::AnyBuffer>(i);
  if (!x.has_value()) throw BadCall(x.error().message());
  return *x;
}

ffi::AnyBuffer Ret(const ffi::RemainingRets& rets, size_t i) {
  auto x = rets.get<ffi::AnyBuffer>(i);
  if (!x.has_value()) throw BadCall(x.error().message());
  return **x;
}

// Reads the operands into `c`; returns how many arrays they were.
size_t ReadOperands(const ProblemAttr& p, const ffi::RemainingArgs& args, Views& views, Call& c) {
  static const char* const kDims[kOperands] = {"rhc", "rhc", "rhc", "hrc", "hrc", "hr", "hr", "h", "-", "h-", "-", "hr-"};
  View* const slots[kOperands] = {&c.query, &c.key, &c.value, &c.bias, &c.mask, &c.lower, &c.upper, &c.slopes,
                                  &c.seed, &c.stream, &c.drop_bits, &c.drop_offset};
  const std::string_view axes[3] = {p.query_axes, p.key_axes, p.value_axes};
  size_t next = 0;
  for (int i = 0; i < kOperands; ++i) {
    if (!(p.present >> i & 1)) continue;
    const ffi::AnyBuffer x = Arg(args, next++);
    *slots[i] = i <= kValue ? views.Stored(x, axes[i], kDims[i]) : views.Canonical(x, kDims[i]);
    if (i == kDropBits) c.drop_bytes = x.dimensions().back();
  }
  const size_t rank = p.query_axes.size() - 3;
  const auto size = [&](size_t operand, size_t dim) {
    return Arg(args, operand).dimensions()[static_cast<size_t>(axes[operand][rank + dim] - 'a')];
  };
  c.B = views.entries();
  c.Sq = size(kQuery, 0);
  c.N = size(kQuery, 1);
  c.D = size(kQuery, 2);
  c.Skv = size(kKey, 0);
  c.K = size(kKey, 1);
  c.Dv = size(kValue, 2);
  if (c.Skv >= INT32_MAX || c.Sq >= INT32_MAX) throw BadCall("jax_fa cpu: a sequence is longer than 2^31 - 1");
  c.scale = p.scale;
  c.keep_prob = p.keep_prob;
  c.soft_cap = p.soft_cap;
  c.alibi = c.slopes ? static_cast<Alibi>(p.alibi) : Alibi::kNone;
  c.threshold = p.threshold;
  return next;
}

// Lead dims of the statistics `*B N Sq`.
ffi::Span<const int64_t> BatchOf(const ffi::AnyBuffer& stats) {
  return ffi::Span<const int64_t>(stats.dimensions().begin(), stats.dimensions().size() - 2);
}

const Kernels& Chosen() {
  const Kernels* kernels = ChosenKernels();
  if (kernels == nullptr) throw BadCall("jax_fa cpu: JAX_FA_CPU_ISA names no instruction set that this machine has");
  return *kernels;
}

template <typename Fn>
ffi::Error Guard(const Fn& fn) {
  try {
    fn();
    return ffi::Error::Success();
  } catch (const BadCall& e) {
    return ffi::Error::InvalidArgument(e.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_fa cpu: out of memory for scratch");
  } catch (const std::exception& e) {
    return ffi::Error::Internal(std::string("jax_fa cpu: ") + e.what());
  } catch (...) {
    return ffi::Error::Internal("jax_fa cpu: unknown failure");
  }
}

ffi::Error Forward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, ProblemAttr p) {
  return Guard([&] {
    const ffi::AnyBuffer m = Ret(rets, 1);
    Views views(BatchOf(m));
    Call c;
    ReadOperands(p, args, views, c);
    c.out = views.Stored(Ret(rets, 0), p.out_axes, "rhc");
    c.m = views.Canonical(m, "hr");
    c.l = views.Canonical(Ret(rets, 2), "hr");
    if (p.saved & kRounding) c.rounding = views.Stored(Ret(rets, 3), p.out_axes, "rhc");
    if (c.B == 0 || c.N == 0 || c.Sq == 0) return;
    PoolRunner<ffi::ThreadPool> runner(pool);
    Chosen().forward(c, runner);
  });
}

ffi::Error Backward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, ProblemAttr p) {
  return Guard([&] {
    const int operands = __builtin_popcount(p.present);
    const ffi::AnyBuffer m = Arg(args, static_cast<size_t>(operands) + 1);
    Views views(BatchOf(m));
    Call c;
    size_t next = ReadOperands(p, args, views, c);
    c.out = views.Stored(Arg(args, next++), p.out_axes, "rhc");
    c.m = views.Canonical(Arg(args, next++), "hr");
    c.l = views.Canonical(Arg(args, next++), "hr");
    c.dout = views.Stored(Arg(args, next++), p.out_axes, "rhc");
    if (p.saved & kRounding) c.rounding = views.Stored(Arg(args, next++), p.out_axes, "rhc");
    if (p.saved & kLogSumExp) c.dlogsumexp = views.Canonical(Arg(args, next++), "hr");
    size_t result = 0;
    c.dquery = views.Stored(Ret(rets, result++), p.query_axes, "rhc");
    c.dkey = views.Stored(Ret(rets, result++), p.key_axes, "rhc");
    c.dvalue = views.Stored(Ret(rets, result++), p.value_axes, "rhc");
    if (c.bias) {
      const ffi::AnyBuffer x = Ret(rets, result++);
      c.dbias = views.Canonical(x, "hrc");
      if (!WritesAllBias(c)) std::memset(x.untyped_data(), 0, x.size_bytes());
    }
    if (c.slopes) c.dslopes = views.Canonical(Ret(rets, result++), "h");
    if (c.B == 0 || c.N == 0) {  // what broadcasts still has a gradient
      for (size_t i = 0; i < result; ++i) std::memset(Ret(rets, i).untyped_data(), 0, Ret(rets, i).size_bytes());
      return;
    }
    PoolRunner<ffi::ThreadPool> runner(pool);
    Chosen().backward(c, runner);
  });
}

}  // namespace
}  // namespace jax_fa

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_fa::ProblemAttr, xla::ffi::StructMember<uint32_t>("present"),
    xla::ffi::StructMember<uint32_t>("saved"),
    xla::ffi::StructMember<std::string_view>("query_axes"),
    xla::ffi::StructMember<std::string_view>("key_axes"),
    xla::ffi::StructMember<std::string_view>("value_axes"),
    xla::ffi::StructMember<std::string_view>("out_axes"),
    xla::ffi::StructMember<float>("scale"), xla::ffi::StructMember<float>("keep_prob"),
    xla::ffi::StructMember<float>("soft_cap"), xla::ffi::StructMember<uint8_t>("alibi"),
    xla::ffi::StructMember<uint8_t>("bias_apart"),
    xla::ffi::StructMember<uint32_t>("threshold"));

namespace jax_fa {

XLA_FFI_DEFINE_HANDLER(kCpuForward, Forward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .RemainingArgs()               // the operands that are present
                           .RemainingRets()               // out, softmax max, softmax sum
                           .Attr<ProblemAttr>("problem"));

XLA_FFI_DEFINE_HANDLER(kCpuBackward, Backward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .RemainingArgs()               // operands, out, m, l, dout, dlogsumexp if used
                           .RemainingRets()               // gradients of query, key, value, bias, alibi_slopes
                           .Attr<ProblemAttr>("problem"));

XLA_FFI_Error* CpuForward(XLA_FFI_CallFrame* call_frame) { return kCpuForward(call_frame); }
XLA_FFI_Error* CpuBackward(XLA_FFI_CallFrame* call_frame) { return kCpuBackward(call_frame); }

}  // namespace jax_fa
