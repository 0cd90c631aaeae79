// What all executions of a compiled call with keys in pages have in common; see layout.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "paged_shapes.h"
#include "views.h"

namespace jax_fa {

class PagedLayout {
 public:
  // `attributes`: what the call is but for its shapes. Throws BadCall, see PagedCheck.
  PagedLayout(const Call& attributes, uint32_t present, const std::vector<Shape>& args, const std::vector<Shape>& rets)
      : PagedLayout(attributes, present, args, rets, PagedCheck::Of(present, args, rets)) {}
  PagedLayout(const PagedLayout&) = delete;  // the views point into its tables
  PagedLayout& operator=(const PagedLayout&) = delete;

  bool IsEmpty() const { return call_.B == 0 || call_.N == 0 || call_.Sq == 0; }

  // The call whose arguments and results, in their order, lie at `arg(i)` and `ret(i)`.
  template <typename Arg, typename Ret>
  Call At(const Arg& arg, const Ret& ret) const {
    Call c = call_;
    for (size_t i = 0; i < args_.size(); ++i) {
      void* const data = arg(i);
      if (args_[i] != nullptr) {
        (c.*args_[i]).data = static_cast<char*>(data);
      } else {
        (i == table_ ? c.pages.table : c.pages.lengths) = static_cast<const int32_t*>(data);
      }
    }
    c.out.data = static_cast<char*>(ret(0));
    c.m.data = static_cast<char*>(ret(1));
    c.l.data = static_cast<char*>(ret(2));
    if (!c.value) c.value = c.key, c.value_scale = c.key_scale;
    return c;
  }

 private:
  PagedLayout(const Call& attributes, uint32_t present, const std::vector<Shape>& args, const std::vector<Shape>& rets,
              const PagedSizes& s)
      : call_(attributes), views_({s.B}) {
    call_.B = s.B, call_.Sq = s.Sq, call_.Skv = s.each * s.size, call_.N = s.N, call_.K = s.K, call_.D = s.D;
    call_.Dv = s.Dv;
    call_.pages.count = s.count, call_.pages.size = s.size, call_.pages.each = s.each;
    for (size_t i = 0; i < kPagedArgs; ++i) {
      if (kPagedForms[i].bit != 0 && (present & kPagedForms[i].bit) == 0) continue;
      Add(static_cast<PagedArg>(i), args[args_.size()]);
    }
    call_.query.col = 1;
    call_.out = views_.Canonical(rets[0], "rhc");
    call_.out.col = 1;
    call_.m = views_.Canonical(rets[1], "hr");
    call_.l = views_.Canonical(rets[2], "hr");
  }

  void Add(PagedArg arg, const Shape& x) {
    switch (arg) {
      case kPagedQuery: return Add(&Call::query, views_.Canonical(x, "rhc"));
      case kPagedKeys: return Add(&Call::key, PageView(x));
      case kPagedValues: return Add(&Call::value, PageView(x));
      case kPagedTable: table_ = args_.size(); return args_.push_back(nullptr);
      case kPagedLengths: return args_.push_back(nullptr);
      case kPagedLower: return Add(&Call::lower, views_.Canonical(x, "r"));
      case kPagedUpper: return Add(&Call::upper, views_.Canonical(x, "r"));
      case kPagedKeyFactors: return Add(&Call::key_scale, views_.Shared(x, "rch"));
      case kPagedValueFactors: return Add(&Call::value_scale, views_.Shared(x, "rch"));
      case kPagedLogitFactor: return Add(&Call::scale_of_head, views_.Canonical(x, ""));
      case kPagedCap: return Add(&Call::soft_cap_of_head, views_.Canonical(x, ""));
      case kPagedArgs: return;
    }
  }

  void Add(View Call::* at, const View& view) {
    call_.*at = view;
    args_.push_back(at);
  }

  // Rows of pages are neighbours whatever the size of a page is, and so are elements of a row.
  View PageView(const Shape& x) {
    View v = views_.Shared(x, "-rhc");
    v.head = x.dims[3];
    v.row = x.dims[2] * v.head;
    v.col = 1;
    return v;
  }

  Call call_;  // its views have no addresses
  Views views_;
  std::vector<View Call::*> args_;  // nullptr: the table of pages, or lengths
  size_t table_ = 0;
};

}  // namespace jax_fa
