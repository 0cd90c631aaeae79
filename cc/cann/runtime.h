// Calls of the CANN runtime with their errors: one place that initializes, reads the error text, and gives a thread its
// device.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "cann/library.h"
#include "cann/status.h"

namespace jax_fa::cann {

// The loaded library; throws Failure where there is none. CANN is initialized when this returns.
const Library& Ready();

// CANN's text about the calls that failed on this thread since the last time, which this clears. One line; may be empty.
std::string TakeErrorText(const Library& library);

// Gives the thread its device, for a call that said 107002. Throws if that fails.
void SetDevice(const Library& library, int device);

// Calls fn() -> code; where the thread had no device, gives it one and calls once more.
template <typename Fn>
int WithDevice(const Library& library, int device, const Fn& fn) {
  const int code = fn();
  if (code != kContextNull) return code;
  SetDevice(library, device);
  return fn();
}

// Throws where fn(), tried WithDevice, does not return 0. `name` is that of the C function.
template <typename Fn>
void Check(const Library& library, int device, const std::string& name, const Fn& fn) {
  const int code = WithDevice(library, device, fn);
  if (code != kSuccess) throw CodeFailure(name, code, TakeErrorText(library));
}

// Steps that are all taken, whatever fails before.
class Cleanup {
 public:
  template <typename Fn>
  void Do(const Fn& fn) {
    try {
      fn();
    } catch (const Failure& failure) {
      if (!first_) first_ = failure;
    }
  }
  // Throws the first failure.
  void End() const {
    if (first_) throw Failure(*first_);
  }

 private:
  std::optional<Failure> first_;
};

// For calls whose failure nobody can act on (destructors): the text must not turn up in a later error.
template <typename Code>
void Forget(const Library& library, Code code) noexcept {
  if (code != kSuccess) library.api.aclGetRecentErrMsg();
}

}  // namespace jax_fa::cann
