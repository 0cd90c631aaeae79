#include <memory>
#include <vector>

#include "compiled_call.h"
#include "cpu_ffi.h"
#include "handlers.h"
#include "paged_layout.h"
#include "tasks.h"

namespace jax_fa {

namespace {

// Mirrors what backends/cpu.py sends. `present`: see paged_shapes.h.
struct PagedAttr {
  uint32_t present;
  float scale, soft_cap;
};

// Whether a call takes less time than another thread needs to wake; see cpu_ffi.cc.
bool IsTiny(const Call& c) {
  constexpr double kMost = 1 << 19, kRow = 512;
  double keys = 0.0;
  for (int64_t b = 0; b < c.B; ++b) keys += static_cast<double>(c.Keys(b));
  const double pairs = keys * static_cast<double>(c.N * c.Sq);
  return pairs * static_cast<double>(c.D + c.Dv) + kRow * static_cast<double>(c.B * c.N * c.Sq) < kMost;
}

class PagedCall : public CallWithLayout<PagedLayout> {
 public:
  explicit PagedCall(const PagedAttr& p) : p_(p) {}

 private:
  std::unique_ptr<const PagedLayout> Make(const std::vector<Shape>& args,
                                          const std::vector<Shape>& rets) const override {
    Call attributes;
    attributes.scale = p_.scale, attributes.soft_cap = p_.soft_cap;
    return std::make_unique<const PagedLayout>(attributes, p_.present, args, rets);
  }

  const PagedAttr p_;
};

ffi::ErrorOr<std::unique_ptr<CompiledCall>> Instantiate(const PagedAttr& p) { return MakeCompiledCall<PagedCall>(p); }

ffi::Error Compute(ffi::ThreadPool pool, CompiledCall* compiled, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  return Guard([&] {
    const PagedLayout& layout = static_cast<PagedCall*>(compiled)->LayoutOf(args, rets);
    if (layout.IsEmpty()) return;  // no row
    const Call c = layout.At([&](size_t i) { return Arg(args, i).untyped_data(); },
                             [&](size_t i) { return Ret(rets, i).untyped_data(); });
    const PoolRunner<ffi::ThreadPool> runner(pool, IsTiny(c));
    Chosen().forward(c, runner);
  });
}

}  // namespace
}  // namespace jax_fa

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa::PagedAttr, xla::ffi::StructMember<uint32_t>("present"),
                                      xla::ffi::StructMember<float>("scale"),
                                      xla::ffi::StructMember<float>("soft_cap"));

namespace jax_fa {

// The arrays are those of paged_shapes.h that are present, in its order.
XLA_FFI_DEFINE_HANDLER(kInstantiatePaged, Instantiate, ffi::Ffi::BindInstantiate().Attr<PagedAttr>("problem"));
XLA_FFI_DEFINE_HANDLER(
    kExecutePaged, Compute,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Ctx<ffi::State<CompiledCall>>().RemainingArgs().RemainingRets());
const FfiTarget kCpuPaged = {"jax_fa_cpu_paged", [](XLA_FFI_CallFrame* frame) { return kInstantiatePaged(frame); },
                             [](XLA_FFI_CallFrame* frame) { return kExecutePaged(frame); }};

}  // namespace jax_fa
