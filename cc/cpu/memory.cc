// The memory the kernels ask for (see call.h).

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#include "call.h"
#include "cpu/tuning.h"

namespace jax_fa {
namespace {

float* Aligned(int64_t floats) {
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 64) / 64 * 64;
  void* p = nullptr;  // std::aligned_alloc is missing before macOS 10.15
  if (posix_memalign(&p, 64, bytes) != 0) throw std::bad_alloc();
  return static_cast<float*>(p);
}

struct Kept {
  float* data = nullptr;
  int64_t size = 0;
  ~Kept() { std::free(data); }
};

}  // namespace

float* ThreadScratch(int64_t floats) {
  thread_local Kept kept;
  if (floats > kept.size) {
    std::free(kept.data);
    kept.data = nullptr;
    kept.size = 0;
    kept.data = Aligned(floats);
    kept.size = floats;
  }
  return kept.data;
}

namespace {

constexpr int64_t kHeader = 16;  // floats

struct Block {
  Block* next;
  int64_t size;  // floats, without this header
};
static_assert(sizeof(Block) <= kHeader * sizeof(float), "the header must hold a Block");

std::mutex kept_mutex;
Block* kept_blocks = nullptr;  // the last one freed comes first

Block* TakeKept(int64_t floats) {
  const std::lock_guard<std::mutex> lock(kept_mutex);
  for (Block** link = &kept_blocks; *link != nullptr; link = &(*link)->next) {
    Block* block = *link;
    if (block->size < floats || block->size > 4 * floats) continue;
    *link = block->next;
    return block;
  }
  return nullptr;
}

// Those that were freed so long ago that there is no room for them. Kept for good, blocks of shapes that a program has left
// behind would keep out those that it needs now.
Block* DropOldest() {
  Block** link = &kept_blocks;
  for (int64_t floats = 0; *link != nullptr && (floats += (*link)->size) <= kKeptFloats;) link = &(*link)->next;
  return std::exchange(*link, nullptr);
}

}  // namespace

float* AllocateFloats(int64_t floats) {
  Block* block = TakeKept(floats);
  if (block == nullptr) {
    block = reinterpret_cast<Block*>(Aligned(floats + kHeader));
    block->size = floats;
  }
  return reinterpret_cast<float*>(block) + kHeader;
}

void FreeFloats(float* p) {
  if (p == nullptr) return;
  Block* dropped = reinterpret_cast<Block*>(p - kHeader);
  if (dropped->size <= kKeptFloats) {
    const std::lock_guard<std::mutex> lock(kept_mutex);
    dropped->next = kept_blocks;
    kept_blocks = dropped;
    dropped = DropOldest();
  } else {
    dropped->next = nullptr;
  }
  while (dropped != nullptr) std::free(std::exchange(dropped, dropped->next));
}

}  // namespace jax_fa
