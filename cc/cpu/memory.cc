// The memory the kernels ask for (see call.h).

#include <cstdlib>
#include <mutex>
#include <new>

#include "call.h"

namespace jax_fa {
namespace {

float* Aligned(int64_t floats) {
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 64) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes);
  if (p == nullptr) throw std::bad_alloc();
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

// Memory of a call is kept for the next one, up to kMostKept floats in all (80 MiB): fresh pages cost a small call a
// tenth of its time.
namespace {

constexpr int64_t kMostKept = int64_t{20} << 20, kHeader = 16;  // floats

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
    if (kept_floats + block->size <= kMostKept) {
      block->next = kept_blocks;
      kept_blocks = block;
      kept_floats += block->size;
      return;
    }
  }
  std::free(block);
}

}  // namespace jax_fa
