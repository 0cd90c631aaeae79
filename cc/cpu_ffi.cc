#include "cpu_ffi.h"

#include <cmath>
#include <string_view>
#include <vector>

#include "handlers.h"
#include "large_results.h"
#include "operands.h"
#include "shapes.h"
#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fa {

namespace {

// Mirrors what backends/cpu.py sends. `present`, `saved`: see operands.h.
struct ProblemAttr {
  uint32_t present, saved;
  std::string_view query_axes, key_axes, value_axes, out_axes;  // canonical dim i is stored dim axes[i] - 'a'
  float scale, keep_prob, soft_cap;
  uint8_t alibi, bias_apart, partial;
  uint32_t threshold;
};

// Builds views of arrays whose shapes were checked; owns their tables of batch offsets.
class Views {
 public:
  explicit Views(const std::vector<int64_t>& batch) : batch_(batch) {
    tables_.reserve(CallShapes::kMostArrays);
    for (int64_t size : batch) entries_ *= static_cast<size_t>(size);
  }

  // An array stored canonically, `*#B` and then what `roles` names.
  View Canonical(const ffi::AnyBuffer& x, const char* roles) { return Stored(x, {}, roles); }

  // An array stored in the order `axes`; `roles` names what follows `*#B`: h head, r row, c col, - anything else.
  View Stored(const ffi::AnyBuffer& x, std::string_view axes, const char* roles) {
    const size_t lead = batch_.size();
    const auto dims = x.dimensions();
    const auto stride = [&](size_t i) {  // of canonical dim i, 0 where it broadcasts
      const size_t axis = axes.empty() ? i : static_cast<size_t>(axes[i] - 'a');
      if (dims[axis] == 1) return int64_t{0};
      int64_t elements = 1;
      for (size_t inner = axis + 1; inner < dims.size(); ++inner) elements *= dims[inner];
      return elements;
    };
    View v;
    v.data = static_cast<char*>(x.untyped_data());
    v.dtype = ToDType(ToElement(x.element_type()));
    for (size_t i = 0; roles[i] != 0; ++i) {
      if (roles[i] == 'h') v.head = stride(lead + i);
      if (roles[i] == 'r') v.row = stride(lead + i);
      if (roles[i] == 'c') v.col = stride(lead + i);
    }
    std::vector<int64_t>& offsets = tables_.emplace_back();
    offsets.reserve(entries_);
    offsets.push_back(0);
    for (size_t i = lead; i-- > 0;) {  // one dim after the other, innermost first: copies of what is there, further on
      const int64_t step = stride(i);
      const size_t inner = offsets.size();
      for (int64_t b = 1; b < batch_[i]; ++b)
        for (size_t j = 0; j < inner; ++j) offsets.push_back(offsets[j] + b * step);
    }
    v.batch = offsets.data();
    return v;
  }

 private:
  const std::vector<int64_t>& batch_;
  size_t entries_ = 1;
  std::vector<std::vector<int64_t>> tables_;  // their data stays where it is
};

CallShapes ShapesOf(Pass pass, const ProblemAttr& p, const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) {
  CallShapes call;
  call.pass = pass;
  call.present = p.present, call.saved = p.saved;
  call.query_axes = p.query_axes, call.key_axes = p.key_axes, call.value_axes = p.value_axes;
  call.out_axes = p.out_axes;
  call.args.reserve(args.size());
  call.rets.reserve(rets.size());
  for (size_t i = 0; i < args.size(); ++i) call.args.push_back(ShapeOf(Arg(args, i)));
  for (size_t i = 0; i < rets.size(); ++i) call.rets.push_back(ShapeOf(Ret(rets, i)));
  return call;
}

// The call but for its arrays.
Call PlainCall(const ProblemAttr& p, const Sizes& sizes) {
  Call c;
  c.B = 1;
  for (int64_t size : sizes.B) c.B *= size;
  c.Sq = sizes.Sq, c.Skv = sizes.Skv, c.N = sizes.N, c.K = sizes.K, c.D = sizes.D, c.Dv = sizes.Dv;
  c.scale = p.scale;
  c.keep_prob = p.keep_prob;
  c.soft_cap = p.soft_cap;
  c.alibi = p.alibi == static_cast<uint8_t>(Alibi::kSqrt) ? Alibi::kSqrt : Alibi::kLinear;
  c.threshold = p.threshold;
  c.bias_apart = p.bias_apart != 0;
  c.partial = p.partial != 0;
  return c;
}

// An operand, or an array of its shape.
View OperandView(const ProblemAttr& p, const CallShapes& call, Operand i, const ffi::AnyBuffer& x, Views& views) {
  const std::string_view axes[3] = {p.query_axes, p.key_axes, p.value_axes};
  const char* roles = call.FormOf(i).roles;
  return i <= kValue ? views.Stored(x, axes[i], roles) : views.Canonical(x, roles);
}

void ReadOperands(const ProblemAttr& p, const CallShapes& call, const ffi::RemainingArgs& args, Views& views, Call& c) {
  size_t next = 0;
  for (const Form& form : kForms) {
    const Operand i = form.operand;
    if (!call.Has(i)) continue;
    const ffi::AnyBuffer x = Arg(args, next++);
    c.*form.view = OperandView(p, call, i, x, views);
    if (i == kDropBits) c.drop_bytes = x.dimensions().back();
    if (i == kBias && call.Has(kBiasOffset)) c.bias_elements = x.dimensions().back();
    if (i != kBlockPairs) continue;
    const auto dims = x.dimensions();
    c.block_count = dims[dims.size() - 3], c.block_rows = dims[dims.size() - 2], c.block_keys = dims.back();
  }
}

View OtherView(const ProblemAttr& p, const CallShapes& call, const OtherArray& form, const ffi::AnyBuffer& x,
               Views& views) {
  if (form.like == OtherArray::kOut) return views.Stored(x, p.out_axes, "rhc");
  if (form.like == OtherArray::kStatistic) return views.Canonical(x, "hr");
  return OperandView(p, call, form.operand, x, views);
}

// Whether a call takes less time than another thread needs to wake (3 to 10 us). Tasks are the same, and so are results.
bool IsTiny(const Call& c) {
  constexpr double kMost = 1 << 19, kRow = 512;  // multiply-adds of the forward, and what a row costs beside them
  constexpr double kElement = 4;                 // ... and each element of an array
  const double rows = static_cast<double>(c.B) * static_cast<double>(c.N * (c.Sq + c.Skv));
  const double pairs = static_cast<double>(c.B * c.N) * static_cast<double>(c.Sq) * static_cast<double>(c.Skv);
  return (pairs + kElement * rows) * static_cast<double>(c.D + c.Dv) + kRow * rows < kMost;
}

template <Pass kPass>
ffi::Error Compute(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, ProblemAttr p) {
  return Guard([&] {
    const CallShapes call = ShapesOf(kPass, p, args, rets);
    const std::vector<OtherArray> others = call.OtherArgs(), results = call.Results();
    const Sizes sizes = ShapeCheck::Of(call, others, results);
    Call c = PlainCall(p, sizes);
    if (c.B == 0 || c.N == 0 || (c.Sq == 0 && !HasCotangents(kPass))) {  // what broadcasts still has a gradient
      for (size_t i = 0; i < rets.size(); ++i)
        Clear(PoolRunner<ffi::ThreadPool>(pool), Ret(rets, i).untyped_data(), Ret(rets, i).size_bytes());
      return;
    }
    Views views(sizes.B);
    ReadOperands(p, call, args, views, c);
    PoolRunner<ffi::ThreadPool> runner(pool, IsTiny(c));
    size_t next = call.Operands(), result = 0;
    for (const OtherArray& x : others) c.*x.view = OtherView(p, call, x, Arg(args, next++), views);
    for (const OtherArray& x : results) {
      const ffi::AnyBuffer to = Ret(rets, result++);
      c.*x.view = OtherView(p, call, x, to, views);
      TakeHugePages(to.untyped_data(), to.size_bytes());
      if (x.view == &Call::dbias && !WritesAllBias(c)) Clear(runner, to.untyped_data(), to.size_bytes());
    }
    c.with_forward = kPass == Pass::kJvp;
    const Kernels& kernels = Chosen();
    switch (kPass) {
      case Pass::kForward: return kernels.forward(c, runner);
      case Pass::kBackward: return kernels.backward(c, runner);
      case Pass::kJvp:
      case Pass::kTangent: return kernels.tangent(c, runner);
      case Pass::kSecond: return kernels.second(c, runner);
    }
  });
}

}  // namespace
}  // namespace jax_fa

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_fa::ProblemAttr, xla::ffi::StructMember<uint32_t>("present"), xla::ffi::StructMember<uint32_t>("saved"),
    xla::ffi::StructMember<std::string_view>("query_axes"), xla::ffi::StructMember<std::string_view>("key_axes"),
    xla::ffi::StructMember<std::string_view>("value_axes"), xla::ffi::StructMember<std::string_view>("out_axes"),
    xla::ffi::StructMember<float>("scale"), xla::ffi::StructMember<float>("keep_prob"),
    xla::ffi::StructMember<float>("soft_cap"), xla::ffi::StructMember<uint8_t>("alibi"),
    xla::ffi::StructMember<uint8_t>("bias_apart"), xla::ffi::StructMember<uint8_t>("partial"),
    xla::ffi::StructMember<uint32_t>("threshold"));

namespace jax_fa {

// The arrays are those of shapes.h: operands that are present, then OtherArgs; and Results.
#define JAX_FA_HANDLER(name)                                                                                 \
  XLA_FFI_DEFINE_HANDLER(                                                                                    \
      kHandler##name, Compute<Pass::k##name>,                                                                \
      ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<ProblemAttr>("problem")); \
  XLA_FFI_Error* Cpu##name(XLA_FFI_CallFrame* call_frame) { return kHandler##name(call_frame); }

JAX_FA_HANDLER(Forward)
JAX_FA_HANDLER(Backward)
JAX_FA_HANDLER(Jvp)
JAX_FA_HANDLER(Tangent)
JAX_FA_HANDLER(Second)

}  // namespace jax_fa
