#include <string>
#include <vector>

#include "cpu_ffi.h"
#include "handlers.h"
#include "paged_shapes.h"
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

// Makes views of arrays whose shapes were checked; owns their tables of batch offsets.
class PagedViews {
 public:
  explicit PagedViews(const PagedSizes& s) : entries_(static_cast<size_t>(s.B)) { tables_.reserve(kMost); }

  // An array `B ...` (or of one batch entry for all) whose dims after that are what `roles` says: h head, r row, c col.
  View OfBatch(const ffi::AnyBuffer& x, const char* roles) {
    View v = Strided(x, 1, roles);
    int64_t entry = 1;
    for (size_t i = 1; i < x.dimensions().size(); ++i) entry *= x.dimensions()[i];
    std::vector<int64_t>& offsets = tables_.emplace_back(entries_, 0);
    if (x.dimensions()[0] != 1)
      for (size_t b = 0; b < entries_; ++b) offsets[b] = static_cast<int64_t>(b) * entry;
    v.batch = offsets.data();
    return v;
  }

  // One that all batch entries have in common.
  View Shared(const ffi::AnyBuffer& x, const char* roles) {
    View v = Strided(x, 0, roles);
    v.batch = tables_.emplace_back(entries_, 0).data();
    return v;
  }

 private:
  static constexpr size_t kMost = kPagedArgs + kPagedResultCount;

  static View Strided(const ffi::AnyBuffer& x, size_t lead, const char* roles) {
    const auto dims = x.dimensions();
    View v;
    v.data = static_cast<char*>(x.untyped_data());
    v.dtype = ToDType(ToElement(x.element_type()));
    int64_t stride = 1;
    for (size_t i = dims.size(); i-- > lead; stride *= dims[i]) {
      const int64_t own = dims[i] == 1 ? 0 : stride;
      if (roles[i - lead] == 'h') v.head = own;
      if (roles[i - lead] == 'r') v.row = own;
      if (roles[i - lead] == 'c') v.col = own;
    }
    return v;
  }

  const size_t entries_;
  std::vector<std::vector<int64_t>> tables_;  // their data stays where it is
};

// Rows of pages are neighbours whatever the size of a page is, and so are elements of a row.
View PageView(const ffi::AnyBuffer& x, PagedViews& views) {
  View v = views.Shared(x, "-rhc");
  v.head = x.dimensions()[3];
  v.row = x.dimensions()[2] * v.head;
  v.col = 1;
  return v;
}

ffi::Error Compute(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, PagedAttr p) {
  return Guard([&] {
    std::vector<Shape> arg_shapes, ret_shapes;
    for (size_t i = 0; i < args.size(); ++i) arg_shapes.push_back(ShapeOf(Arg(args, i)));
    for (size_t i = 0; i < rets.size(); ++i) ret_shapes.push_back(ShapeOf(Ret(rets, i)));
    const PagedSizes s = PagedCheck::Of(p.present, arg_shapes, ret_shapes);
    Call c;
    c.B = s.B, c.Sq = s.Sq, c.Skv = s.each * s.size, c.N = s.N, c.K = s.K, c.D = s.D, c.Dv = s.Dv;
    c.scale = p.scale, c.soft_cap = p.soft_cap;
    if (c.B == 0 || c.N == 0 || c.Sq == 0) return;  // no row
    PagedViews views(s);
    size_t next = 0;
    for (size_t i = 0; i < kPagedArgs; ++i) {
      if (kPagedForms[i].bit != 0 && (p.present & kPagedForms[i].bit) == 0) continue;
      const ffi::AnyBuffer x = Arg(args, next++);
      switch (static_cast<PagedArg>(i)) {
        case kPagedQuery: c.query = views.OfBatch(x, "rhc"); break;
        case kPagedKeys: c.key = PageView(x, views); break;
        case kPagedValues: c.value = PageView(x, views); break;
        case kPagedTable: c.pages.table = static_cast<const int32_t*>(x.untyped_data()); break;
        case kPagedLengths: c.pages.lengths = static_cast<const int32_t*>(x.untyped_data()); break;
        case kPagedLower: c.lower = views.OfBatch(x, "r"); break;
        case kPagedUpper: c.upper = views.OfBatch(x, "r"); break;
        case kPagedKeyFactors: c.key_scale = views.Shared(x, "rch"); break;
        case kPagedValueFactors: c.value_scale = views.Shared(x, "rch"); break;
        case kPagedLogitFactor: c.scale_of_head = views.OfBatch(x, ""); break;
        case kPagedCap: c.soft_cap_of_head = views.OfBatch(x, ""); break;
        case kPagedArgs: break;
      }
    }
    if (!c.value) c.value = c.key, c.value_scale = c.key_scale;
    c.pages.count = s.count, c.pages.size = s.size, c.pages.each = s.each;
    c.query.col = 1;
    c.out = views.OfBatch(Ret(rets, 0), "rhc");
    c.out.col = 1;
    c.m = views.OfBatch(Ret(rets, 1), "hr");
    c.l = views.OfBatch(Ret(rets, 2), "hr");
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
XLA_FFI_DEFINE_HANDLER(
    kHandlerPaged, Compute,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<PagedAttr>("problem"));
const FfiTarget kCpuPaged = {"jax_fa_cpu_paged", nullptr,
                             [](XLA_FFI_CallFrame* frame) { return kHandlerPaged(frame); }};

}  // namespace jax_fa
