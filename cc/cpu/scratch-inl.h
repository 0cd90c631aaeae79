// Memory of a task and of a call, cut into aligned parts.
#pragma once

#include "call.h"
#include "cpu/simd-inl.h"
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
// and counts: the same function lays out the parts twice, first to learn their size, then to place them. Under
// AddressSanitizer what lies between two parts must not be touched.
class Arena {
 public:
  Arena() = default;
  Arena(float* memory, int64_t floats) : memory_(memory), end_(floats) {}

  int64_t floats() const { return used_; }

  template <typename T = float>
  T* Take(int64_t count) {
    static_assert(sizeof(float) == 4 && sizeof(T) % 4 == 0 && alignof(T) <= 64, "parts are counted in floats");
    const int64_t size = count * static_cast<int64_t>(sizeof(T) / 4);
    const int64_t next = used_ + (size + kAlign - 1) / kAlign * kAlign + kGap;
    float* const part = memory_ == nullptr ? nullptr : memory_ + used_;
    if (part != nullptr && next > end_) __builtin_trap();  // laid out in another way than counted
#if defined(JAX_FA_ASAN)
    if (part != nullptr)
      __asan_poison_memory_region(part + size, sizeof(float) * static_cast<size_t>(next - used_ - size));
#endif
    used_ = next;
    return reinterpret_cast<T*>(part);
  }

  // Floats that `place(arena)` takes.
  template <typename Place>
  static int64_t Count(const Place& place) {
    Arena arena;
    place(arena);
    return arena.floats();
  }

  // Joins the parts of a block again, before others use it.
  static void Join([[maybe_unused]] float* memory, [[maybe_unused]] int64_t floats) {
#if defined(JAX_FA_ASAN)
    __asan_unpoison_memory_region(memory, sizeof(float) * static_cast<size_t>(floats));
#endif
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

// This thread's scratch, cut by `place(arena)`. A thread has one at a time: tasks are not nested.
class ThreadParts {
 public:
  template <typename Place>
  explicit ThreadParts(const Place& place) : floats_(Arena::Count(place)), memory_(ThreadScratch(floats_)) {
    Arena arena(memory_, floats_);
    place(arena);
  }
  ~ThreadParts() { Arena::Join(memory_, floats_); }
  ThreadParts(const ThreadParts&) = delete;
  ThreadParts& operator=(const ThreadParts&) = delete;

 private:
  const int64_t floats_;
  float* const memory_;
};

// Memory that lives as long as this object.
class Buffer {
 public:
  explicit Buffer(int64_t floats) : data_(floats > 0 ? AllocateFloats(floats) : nullptr) {}
  ~Buffer() { FreeFloats(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* get() const { return data_; }
  double* doubles() const { return reinterpret_cast<double*>(data_); }

 private:
  float* data_;
};

// Such memory, cut by `place(arena)`.
class BufferParts {
 public:
  template <typename Place>
  explicit BufferParts(const Place& place) : floats_(Arena::Count(place)), buffer_(floats_) {
    Arena arena(buffer_.get(), floats_);
    place(arena);
  }
  ~BufferParts() { Arena::Join(buffer_.get(), floats_); }
  BufferParts(const BufferParts&) = delete;
  BufferParts& operator=(const BufferParts&) = delete;

 private:
  const int64_t floats_;
  const Buffer buffer_;
};

// Runs a callable for every index.
template <typename Fn>
inline void Run(const Runner& runner, int64_t count, const Fn& fn) {
  runner.run(
      &runner, count,
      [](void* context, int64_t i) {
        [[maybe_unused]] const TaskState<kHasMatrix> state{};
        (*static_cast<const Fn*>(context))(i);
      },
      const_cast<Fn*>(&fn));
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
