// What XLA keeps with a compiled call.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "handlers.h"

namespace jax_fa {

// XLA makes one when it compiles a program or loads one, and frees it with the program; programs may run on several threads
// at a time.
class CompiledCall {
 public:
  inline static ffi::TypeId id = {};

  virtual ~CompiledCall() = default;
};

// One whose layout is that of every execution; the first makes it, as shapes are not known before.
template <typename Layout>
class CallWithLayout : public CompiledCall {
 public:
  const Layout& LayoutOf(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) {
    if (const Layout* made = made_.load(std::memory_order_acquire)) return *made;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!layout_) {
      std::vector<Shape> arg_shapes, ret_shapes;
      for (size_t i = 0; i < args.size(); ++i) arg_shapes.push_back(ShapeOf(Arg(args, i)));
      for (size_t i = 0; i < rets.size(); ++i) ret_shapes.push_back(ShapeOf(Ret(rets, i)));
      layout_ = Make(arg_shapes, ret_shapes);
      made_.store(layout_.get(), std::memory_order_release);
    }
    return *layout_;
  }

 private:
  virtual std::unique_ptr<const Layout> Make(const std::vector<Shape>& args, const std::vector<Shape>& rets) const = 0;

  std::mutex mutex_;  // guards layout_
  std::unique_ptr<const Layout> layout_;
  std::atomic<const Layout*> made_{nullptr};
};

// Made of its attributes, or the error that this gave.
template <typename Made, typename Attributes>
ffi::ErrorOr<std::unique_ptr<CompiledCall>> MakeCompiledCall(const Attributes& attributes) {
  std::unique_ptr<CompiledCall> made;
  const ffi::Error error = Guard([&] { made = std::make_unique<Made>(attributes); });
  if (error.failure()) return ffi::Unexpected(error);
  return made;
}

}  // namespace jax_fa
