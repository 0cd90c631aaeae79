// What all executions of a compiled call have in common: everything but the addresses of its arrays. To check shapes and to
// follow strides takes longer than a small call computes, and XLA's shapes do not change from one execution to the next.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "operands.h"
#include "shapes.h"
#include "views.h"

namespace jax_fa {

class Layout {
 public:
  // `attributes`: what the call is but for its shapes. Throws BadCall, see ShapeCheck.
  Layout(const Call& attributes, const CallShapes& shapes) : Layout(attributes, shapes, ShapeCheck::Of(shapes)) {}
  Layout(const Layout&) = delete;  // the views point into its tables
  Layout& operator=(const Layout&) = delete;

  // Whether there is nothing to compute: what results have are zeros.
  bool IsEmpty() const { return is_empty_; }

  // Whether a call takes less time than another thread needs to wake. Tasks are the same, and so are results.
  bool IsTiny() const { return is_tiny_; }

  // The call whose arguments and results, in their order, lie at `arg(i)` and `ret(i)`.
  template <typename Arg, typename Ret>
  Call At(const Arg& arg, const Ret& ret) const {
    Call c = call_;
    for (size_t i = 0; i < args_.size(); ++i) (c.*args_[i]).data = static_cast<char*>(arg(i));
    for (size_t i = 0; i < rets_.size(); ++i) (c.*rets_[i]).data = static_cast<char*>(ret(i));
    return c;
  }

  // Where result i goes.
  View Call::* Result(size_t i) const { return rets_[i]; }

 private:
  Layout(const Call& attributes, const CallShapes& shapes, const Sizes& sizes) : call_(attributes), views_(sizes.B) {
    call_.B = 1;
    for (int64_t size : sizes.B) call_.B *= size;
    call_.Sq = sizes.Sq, call_.Skv = sizes.Skv, call_.N = sizes.N, call_.K = sizes.K;
    call_.D = sizes.D, call_.Dv = sizes.Dv;
    call_.with_forward = shapes.pass == Pass::kJvp;
    // (What broadcasts over no rows still has a gradient.)
    is_empty_ = call_.B == 0 || call_.N == 0 || (call_.Sq == 0 && !HasCotangents(shapes.pass));
    if (is_empty_) return;
    is_tiny_ = Work() < kTiny;
    size_t next = 0;
    for (const Form& form : kForms)
      if (shapes.Has(form.operand)) AddOperand(shapes, form, shapes.args[next++]);
    for (const OtherArray& x : shapes.OtherArgs()) Add(args_, x.view, OtherView(shapes, x, shapes.args[next++]));
    next = 0;
    for (const OtherArray& x : shapes.Results()) Add(rets_, x.view, OtherView(shapes, x, shapes.rets[next++]));
  }

  void Add(std::vector<View Call::*>& list, View Call::* at, const View& view) {
    call_.*at = view;
    list.push_back(at);
  }

  void AddOperand(const CallShapes& shapes, const Form& form, const Shape& x) {
    const Operand i = form.operand;
    Add(args_, form.view, OperandView(shapes, i, x));
    const int64_t* const end = x.dims + x.rank;
    if (i == kDropBits) call_.drop_bytes = end[-1];
    if (i == kBias && shapes.Has(kBiasOffset)) call_.bias_elements = end[-1];
    if (i == kBlockPairs) call_.block_count = end[-3], call_.block_rows = end[-2], call_.block_keys = end[-1];
  }

  // An operand, or an array of its shape.
  View OperandView(const CallShapes& shapes, Operand i, const Shape& x) {
    const std::string_view axes[3] = {shapes.query_axes, shapes.key_axes, shapes.value_axes};
    const char* roles = shapes.FormOf(i).roles;
    return i <= kValue ? views_.Stored(x, axes[i], roles) : views_.Canonical(x, roles);
  }

  View OtherView(const CallShapes& shapes, const OtherArray& form, const Shape& x) {
    if (form.like == OtherArray::kOut) return views_.Stored(x, shapes.out_axes, "rhc");
    if (form.like == OtherArray::kStatistic) return views_.Canonical(x, "hr");
    return OperandView(shapes, form.operand, x);
  }

  // Multiply-adds of the forward, and what else takes as long; to wake a thread takes 3 to 10 us.
  static constexpr double kTiny = 1 << 19;
  double Work() const {
    constexpr double kRow = 512, kElement = 4;  // what a row costs beside its products, and each element of an array
    const double heads = static_cast<double>(call_.B) * static_cast<double>(call_.N);
    const double rows = heads * static_cast<double>(call_.Sq + call_.Skv);
    const double pairs = heads * static_cast<double>(call_.Sq) * static_cast<double>(call_.Skv);
    return (pairs + kElement * rows) * static_cast<double>(call_.D + call_.Dv) + kRow * rows;
  }

  Call call_;  // its views have no addresses
  Views views_;
  std::vector<View Call::*> args_, rets_;
  bool is_empty_ = false, is_tiny_ = false;
};

}  // namespace jax_fa
