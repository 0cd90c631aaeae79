// The memory the kernels ask for (see call.h).

#include <cstdlib>
#include <mutex>
#include <new>

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
Block* kept_blocks = nullptr;
int64_t kept_floats = 0;

Block* TakeKept(int64_t floats) {
  const std::lock_guard<std::mutex> lock(kept_mutex);
  for (Block** link = &kept_blocks; *link != nullptr; link = &(*link)->next) {
    Block* block = *link;
    if (block->size < floats || block->size > 4 * floats) continue;
    *link = block->next;
    kept_floats -= block->size;
    return block;
  }
  return nullptr;
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
  Block* block = reinterpret_cast<Block*>(p - kHeader);
  {
    const std::lock_guard<std::mutex> lock(kept_mutex);
    if (kept_floats + block->size <= kKeptFloats) {
      block->next = kept_blocks;
      kept_blocks = block;
      kept_floats += block->size;
      return;
    }
  }
  std::free(block);
}

}  // namespace jax_fa
