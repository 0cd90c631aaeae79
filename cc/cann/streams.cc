#include "cann/streams.h"

#include "cann/workspace.h"

namespace jax_fa::cann {

void StreamPool::Lease::Wait() {
  Check(library_, kDevice, "aclrtSynchronizeStream", [&] { return library_.api.aclrtSynchronizeStream(stream_); });
  waited_ = true;
}

aclrtStream StreamPool::Take(const Library& library) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++users_;
    if (!idle_.empty()) {
      aclrtStream stream = idle_.back();
      idle_.pop_back();
      return stream;
    }
  }
  try {
    aclrtStream stream = nullptr;
    Check(library, kDevice, "aclrtCreateStream", [&] { return library.api.aclrtCreateStream(&stream); });
    return stream;
  } catch (...) {
    Left();
    throw;
  }
}

void StreamPool::Left() noexcept {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    --users_;
  }
  left_.notify_all();
}

void StreamPool::Return(const Library& library, aclrtStream stream) noexcept {
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(stream);
  } catch (...) {
    Destroy(library, stream);
  }
}

void StreamPool::Close(const Library& library, aclrtStream stream) {
  const auto check = [&](const char* name, auto function) {
    Check(library, kDevice, name, [&] { return function(stream); });
  };
  Cleanup cleanup;
  cleanup.Do([&] { check("aclrtSynchronizeStream", library.api.aclrtSynchronizeStream); });
  cleanup.Do([&] { check("aclrtDestroyStream", library.api.aclrtDestroyStream); });
  cleanup.Do([&] { ProcessWorkspaces().Release(library, kDevice, stream); });
  cleanup.End();
}

void StreamPool::Destroy(const Library& library, aclrtStream stream) noexcept {
  try {
    Close(library, stream);
  } catch (...) {  // NOLINT(bugprone-empty-catch): nobody is left who could act on it
  }
}

void StreamPool::Release(const Library& library) {
  std::vector<aclrtStream> released;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    left_.wait(lock, [&] { return users_ == 0; });
    released.swap(idle_);
  }
  Cleanup cleanup;
  for (aclrtStream stream : released) cleanup.Do([&] { Close(library, stream); });
  cleanup.End();
}

StreamPool& ProcessStreams() {
  static StreamPool* const streams = new StreamPool;  // never destroyed, as the workspaces
  return *streams;
}

}  // namespace jax_fa::cann
