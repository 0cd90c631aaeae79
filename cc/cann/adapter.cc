#include "cann/adapter.h"

#include <cstdint>
#include <exception>
#include <new>
#include <string>

#include "cann/choose.h"
#include "cann/objects.h"
#include "cann/runtime.h"
#include "cann/search.h"
#include "cann/streams.h"
#include "cann/text.h"
#include "cann/workspace.h"

namespace jax_fa::cann {
namespace {

constexpr const char* kPrefix = "jax_fa ascend: ";

// A layout for the ABI, which wants it writable.
class LayoutText {
 public:
  explicit LayoutText(const std::string& text) { text.copy(text_, sizeof text_ - 1); }
  char* get() { return text_; }

 private:
  char text_[20] = {};  // Validate knows every layout, and none is longer
};

// The arguments of phase 1, and what they point at.
class Marshalled {
 public:
  Marshalled(const Library& library, const Call& call)
      : descriptors_(library), input_layout_(call.input_layout), softmax_layout_(call.softmax_layout) {
    Arguments& a = arguments_;
    for (const Slot& slot : kSlots) {
      const Array& x = call.*slot.array;
      if (Tensor Arguments::* const place = Place(slot, call); place != nullptr && x.present())
        a.*place = descriptors_.AddTensor(x.dims, x.dtype, x.data);
    }
    const auto ints = [&](const std::vector<int64_t>& values) {
      return values.empty() ? nullptr : descriptors_.AddInts(values);
    };
    a.prefix = ints(call.prefix);
    if (call.q_start != 0 || call.kv_start != 0) {
      a.q_start = ints({call.q_start});
      a.kv_start = ints({call.kv_start});
    }
    a.actual_seq_qlen = ints(call.actual_seq_qlen);
    a.actual_seq_kvlen = ints(call.actual_seq_kvlen);
    a.scale_value = call.scale_value;
    a.keep_prob = call.keep_prob;
    a.pre_tokens = call.pre_tokens;
    a.next_tokens = call.next_tokens;
    a.head_num = call.head_num;
    a.input_layout = input_layout_.get();
    a.inner_precise = call.inner_precise;
    a.sparse_mode = call.sparse_mode;
    // Any other type demands a pse.
    a.pse_type = call.pse.present() ? call.pse_type : 1;
    a.softmax_layout = softmax_layout_.get();
  }
  Marshalled(const Marshalled&) = delete;
  Marshalled& operator=(const Marshalled&) = delete;

  const Arguments& arguments() const { return arguments_; }

 private:
  Descriptors descriptors_;
  LayoutText input_layout_, softmax_layout_;
  Arguments arguments_;
};

void* Workspace(const Library& library, aclrtStream stream, int device, size_t bytes, const Scratch& scratch) {
  if (bytes == 0) return nullptr;
  void* const memory = scratch ? scratch(bytes, kWorkspaceAlignment) : nullptr;
  const bool aligned = reinterpret_cast<uintptr_t>(memory) % kWorkspaceAlignment == 0;
  if (memory != nullptr && aligned) return memory;
  return ProcessWorkspaces().Get(library, device, stream, bytes);
}

// Both phases. As phase 2 deletes the executor even when it fails, a call that finds the thread without a device begins
// again at phase 1.
void TwoPhases(const Library& library, Function function, const Arguments& arguments, aclrtStream stream, int device,
               const Scratch& scratch) {
  const Resolved& op = library[function];
  std::string failed;
  const auto attempt = [&]() -> int {
    uint64_t bytes = 0;
    aclOpExecutor* created = nullptr;
    failed = std::string(kFunctionTable[function].phase2) + "GetWorkspaceSize";
    if (const int code = kFunctionTable[function].call(op.phase1, arguments, &bytes, &created); code != kSuccess)
      return code;
    Executor executor(library, created);
    void* const workspace = Workspace(library, stream, device, bytes, scratch);
    failed = kFunctionTable[function].phase2;
    return op.phase2(workspace, bytes, executor.Release(), stream);
  };
  if (const int code = WithDevice(library, device, attempt); code != kSuccess)
    throw CodeFailure(failed, code, TakeErrorText(library));
}

// Nothing to compute: spares CANN shapes that only some of its releases accept.
bool NoResults(const Call& call) {
  const auto empty = [](const Array& x) { return x.elements() == 0; };
  return call.backward() ? empty(call.dq) && empty(call.dk) && empty(call.dv)
                         : empty(call.softmax_max) && empty(call.softmax_sum) && empty(call.attention);
}

void EnqueueOrThrow(const Library& library, const Call& call, aclrtStream stream, int device, const Scratch& scratch) {
  const Function function = Choose(library, call);
  try {
    const Marshalled marshalled(library, function == kShortScore ? AsShort(call) : call);
    TwoPhases(library, function, marshalled.arguments(), stream, device, scratch);
  } catch (const Failure& failure) {
    throw Failure(failure.status.outcome, failure.status.message + " Function: " + kFunctionTable[function].phase2 +
                                              " of " + library[function].file + ".");
  }
}

// The way out of the adapter: here CANN's words, and the names of files, become text.
Status Told(Outcome outcome, const std::string& message) {
  const bool told = message.rfind(kPrefix, 0) == 0;
  return {outcome, Readable(told ? message : kPrefix + message)};
}

// Runs fn(), and turns whatever it throws into a Status.
template <typename Fn>
Status Caught(const Fn& fn) {
  try {
    fn();
    return {};
  } catch (const Failure& failure) {
    return Told(failure.status.outcome, failure.status.message);
  } catch (const std::bad_alloc&) {
    return {Outcome::kOutOfMemory, "jax_fa ascend: out of host memory"};
  } catch (const std::exception& e) {
    return Told(Outcome::kInternal, e.what());
  } catch (...) {
    return {Outcome::kInternal, "jax_fa ascend: unknown failure"};
  }
}

template <typename Fn>
Status CaughtWith(const Call& call, const Fn& fn) {
  return Caught([&] {
    try {
      fn();
    } catch (const Failure& failure) {
      throw Failure(failure.status.outcome, failure.status.message + " Call: " + Text(call) + ".");
    }
  });
}

}  // namespace

Status Enqueue(const Call& call, aclrtStream stream, int device, const Scratch& scratch) {
  return CaughtWith(call, [&] {
    Validate(call);
    if (NoResults(call)) return;
    EnqueueOrThrow(Ready(), call, stream, device, scratch);
  });
}

Status RunAndWait(const Call& call) {
  return CaughtWith(call, [&] {
    // Asked before anything is loaded, and again of what was loaded.
    const bool wanted = !Environment("JAX_FA_CANN_EMULATOR").empty();
    if (!wanted || !Ready().emulator)
      throw Failure(
          Outcome::kUnavailable,
          "arrays on the host can be given to the CANN emulator only; set JAX_FA_CANN_EMULATOR to its directory "
          "before the process starts.");
    const Library& library = Library::Get();
    Validate(call);
    if (NoResults(call)) return;
    StreamPool::Lease stream(ProcessStreams(), library);
    EnqueueOrThrow(library, call, stream.get(), StreamPool::kDevice, nullptr);
    stream.Wait();
  });
}

Status ReleaseAll() {
  return Caught([&] {
    if (!Library::Loaded() || !Library::Get().error.empty()) return;  // nothing can have been created
    const Library& library = Library::Get();
    Cleanup cleanup;
    cleanup.Do([&] { ProcessStreams().Release(library); });
    cleanup.Do([&] { ProcessWorkspaces().Release(library); });
    cleanup.End();
  });
}

}  // namespace jax_fa::cann
