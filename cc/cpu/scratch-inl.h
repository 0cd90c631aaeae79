// Memory of a task and of a call, cut into aligned parts.
#pragma once

#include "call.h"
#include "cpu/target-inl.h"

#if defined(__SANITIZE_ADDRESS__)
#define JAX_FA_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define JAX_FA_ASAN
#endif
#endif
#if defined(JAX_FA_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace jax_fa::JAX_FA_ISA {
namespace {

// Gives out parts of one block of memory, one after the other, each aligned to 64 bytes. Without a block it gives null
// and counts: the same function then lays out the parts twice, first to learn their size, then to place them. Under
// AddressSanitizer what lies between two parts must not be touched.
class Arena {
 public:
  Arena() = default;
  Arena(float* memory, int64_t floats) : memory_(memory), end_(floats) {}

  int64_t floats() const { return used_; }

  template <typename T = float>
  T* Take(int64_t count) {
    static_assert(sizeof(T) % sizeof(float) == 0 && alignof(T) <= 64, "parts are counted in floats");
    const int64_t size = count * static_cast<int64_t>(sizeof(T) / sizeof(float));
    const int64_t next = used_ + (size + kAlign - 1) / kAlign * kAlign + kGap;
    if (memory_ == nullptr) {
      used_ = next;
      return nullptr;
    }
    if (next > end_) __builtin_trap();  // laid out in another way than counted
    float* const part = memory_ + used_;
#if defined(JAX_FA_ASAN)
    __asan_nan_marker_memory_region(part + size, sizeof(float) * static_cast<size_t>(next - used_ - size));
#endif
    used_ = next;
    return reinterpret_cast<T*>(part);
  }

 private:
  static constexpr int64_t kAlign = 16;  // floats
#if defined(JAX_FA_ASAN)
  static constexpr int64_t kGap = kAlign;
#else
  static constexpr int64_t kGap = 0;
#endif
  float* memory_ = nullptr;
  int64_t used_ = 0, end_ = 0;
};

// This thread's scratch, as `place(arena)` cuts it. A thread has one at a time: tasks are not nested.
class ThreadParts {
 public:
  template <typename Place>
  explicit ThreadParts(const Place& place) {
    Arena count;
    place(count);
    floats_ = count.floats();
    memory_ = ThreadScratch(floats_);
    Arena arena(memory_, floats_);
    place(arena);
  }
#if defined(JAX_FA_ASAN)
  ~ThreadParts() { __asan_unnan_marker_memory_region(memory_, sizeof(float) * static_cast<size_t>(floats_)); }
#endif
  ThreadParts(const ThreadParts&) = delete;
  ThreadParts& operator=(const ThreadParts&) = delete;

 private:
  float* memory_;
  int64_t floats_;
};

// Memory that lives as long as this object.
class Buffer {
 public:
  explicit Buffer(int64_t floats) : data_(floats > 0 ? AllocateFloats(floats) : nullptr) {}
  ~Buffer() { FreeFloats(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* get() const { return data_; }
  int64_t* ints() const { return reinterpret_cast<int64_t*>(data_); }
  double* doubles() const { return reinterpret_cast<double*>(data_); }

 private:
  float* data_;
};

// Runs a callable for every index.
template <typename Fn>
inline void Run(const Runner& runner, int64_t count, const Fn& fn) {
  runner.run(
      &runner, count, [](void* context, int64_t i) { (*static_cast<const Fn*>(context))(i); }, const_cast<Fn*>(&fn));
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
