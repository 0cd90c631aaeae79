#include "cpu_ffi.h"

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "compiled_call.h"
#include "handlers.h"
#include "large_results.h"
#include "layout.h"
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

// The call but for its shapes and arrays.
Call PlainCall(const ProblemAttr& p) {
  Call c;
  c.scale = p.scale;
  c.keep_prob = p.keep_prob;
  c.soft_cap = p.soft_cap;
  c.alibi = p.alibi == static_cast<uint8_t>(Alibi::kSqrt) ? Alibi::kSqrt : Alibi::kLinear;
  c.threshold = p.threshold;
  c.bias_apart = p.bias_apart != 0;
  c.partial = p.partial != 0;
  return c;
}

template <Pass kPass>
class OperandCall : public CallWithLayout<Layout> {
 public:
  explicit OperandCall(const ProblemAttr& p)
      : call_(PlainCall(p)),
        axes_{std::string(p.query_axes), std::string(p.key_axes), std::string(p.value_axes), std::string(p.out_axes)},
        present_(p.present),
        saved_(p.saved) {}

 private:
  std::unique_ptr<const Layout> Make(const std::vector<Shape>& args, const std::vector<Shape>& rets) const override {
    CallShapes shapes;
    shapes.pass = kPass;
    shapes.present = present_, shapes.saved = saved_;
    shapes.query_axes = axes_[0], shapes.key_axes = axes_[1], shapes.value_axes = axes_[2];
    shapes.out_axes = axes_[3];
    shapes.args = args, shapes.rets = rets;
    return std::make_unique<const Layout>(call_, shapes);
  }

  const Call call_;
  const std::array<std::string, 4> axes_;
  const uint32_t present_, saved_;
};

template <Pass kPass>
ffi::ErrorOr<std::unique_ptr<CompiledCall>> Instantiate(const ProblemAttr& p) {
  return MakeCompiledCall<OperandCall<kPass>>(p);
}

template <Pass kPass>
ffi::Error Compute(ffi::ThreadPool pool, CompiledCall* compiled, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  return Guard([&] {
    const Layout& layout = static_cast<OperandCall<kPass>*>(compiled)->LayoutOf(args, rets);
    PoolRunner<ffi::ThreadPool> runner(pool, layout.IsTiny());
    if (layout.IsEmpty()) {
      for (size_t i = 0; i < rets.size(); ++i) Clear(runner, Ret(rets, i).untyped_data(), Ret(rets, i).size_bytes());
      return;
    }
    const Call c = layout.At([&](size_t i) { return Arg(args, i).untyped_data(); },
                             [&](size_t i) { return Ret(rets, i).untyped_data(); });
    for (size_t i = 0; i < rets.size(); ++i) {
      const ffi::AnyBuffer to = Ret(rets, i);
      TakeHugePages(to.untyped_data(), to.size_bytes());
      if (layout.Result(i) == &Call::dbias && !WritesAllBias(c)) Clear(runner, to.untyped_data(), to.size_bytes());
    }
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
#define JAX_FA_TARGET(name, target)                                                                             \
  XLA_FFI_DEFINE_HANDLER(kInstantiate##name, Instantiate<Pass::k##name>,                                        \
                         ffi::Ffi::BindInstantiate().Attr<ProblemAttr>("problem"));                             \
  XLA_FFI_DEFINE_HANDLER(                                                                                       \
      kExecute##name, Compute<Pass::k##name>,                                                                   \
      ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Ctx<ffi::State<CompiledCall>>().RemainingArgs().RemainingRets()); \
  const FfiTarget kCpu##name = {target, [](XLA_FFI_CallFrame* frame) { return kInstantiate##name(frame); },     \
                                [](XLA_FFI_CallFrame* frame) { return kExecute##name(frame); }};

JAX_FA_TARGET(Forward, "jax_fa_cpu_forward")
JAX_FA_TARGET(Backward, "jax_fa_cpu_backward")
JAX_FA_TARGET(Jvp, "jax_fa_cpu_jvp")
JAX_FA_TARGET(Tangent, "jax_fa_cpu_tangent")
JAX_FA_TARGET(Second, "jax_fa_cpu_second")

void* CompiledCallTypeId() { return &CompiledCall::id; }

void* CompiledCallTypeInfo() {
  static ffi::TypeInfo info = ffi::MakeTypeInfo<CompiledCall>();
  return &info;
}

}  // namespace jax_fa
