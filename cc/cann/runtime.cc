#include "cann/runtime.h"

#include <atomic>
#include <cctype>
#include <mutex>

namespace jax_fa::cann {
namespace {

// Not call_once with the loading: an aclInit that failed is tried again by the next call.
void InitializeOnce(const Library& library) {
  static std::atomic<bool> done{false};
  static std::mutex mutex;
  if (done.load(std::memory_order_acquire)) return;
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.load(std::memory_order_relaxed)) return;
  const int code = library.api.aclInit(nullptr);
  if (code != kSuccess) {
    const std::string text = TakeErrorText(library);
    // The framework that owns the device has usually called it before.
    if (code != kRepeatInitialize) throw CodeFailure("aclInit", code, text);
  }
  done.store(true, std::memory_order_release);
}

}  // namespace

const Library& Ready() {
  const Library& library = Library::Get();
  if (!library.error.empty()) throw Failure(Outcome::kUnavailable, library.error);
  InitializeOnce(library);
  return library;
}

std::string TakeErrorText(const Library& library) {
  const char* const message = library.api.aclGetRecentErrMsg();
  std::string text;
  if (message == nullptr) return text;
  for (const char* c = message; *c != 0; ++c) {
    const bool space = std::isspace(static_cast<unsigned char>(*c));
    if (!space) text += *c;
    if (space && !text.empty() && text.back() != ' ') text += ' ';
  }
  if (!text.empty() && text.back() == ' ') text.pop_back();
  return text;
}

void SetDevice(const Library& library, int device) {
  TakeErrorText(library);  // of the call that said 107002, which is answered here
  const int code = library.api.aclrtSetDevice(device);
  if (code != kSuccess)
    throw CodeFailure("aclrtSetDevice(" + std::to_string(device) + ") of a thread without a device", code,
                      TakeErrorText(library));
}

}  // namespace jax_fa::cann
