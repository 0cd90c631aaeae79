// Results so large that the time of getting and clearing their memory counts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "call.h"

namespace jax_fa {

// From so many bytes on the C library maps fresh memory for each array, which costs a fault for each page of 4 KiB when it
// is first touched: for the gradient of a bias as much as its products. Asks for pages of 2 MiB; where there are none,
// nothing changes.
inline void TakeHugePages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kLarge = size_t{32} << 20;
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (bytes < kLarge) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t skipped = (kPage - begin % kPage) % kPage, size = (bytes - skipped) / kPage * kPage;
  madvise(static_cast<char*>(data) + skipped, size, MADV_HUGEPAGE);
#endif
}

// Zeros, by all threads.
inline void Clear(const Runner& runner, void* data, size_t bytes) {
  constexpr size_t kPart = size_t{1} << 20;
  struct Memory {
    char* data;
    size_t bytes;
  } memory{static_cast<char*>(data), bytes};
  runner.run(
      &runner, static_cast<int64_t>((bytes + kPart - 1) / kPart),
      [](void* context, int64_t i) {
        const Memory& all = *static_cast<const Memory*>(context);
        const size_t from = static_cast<size_t>(i) * kPart, left = all.bytes - from;
        std::memset(all.data + from, 0, left < kPart ? left : kPart);
      },
      &memory);
}

}  // namespace jax_fa
