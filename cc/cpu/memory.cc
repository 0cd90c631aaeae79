// The memory the kernels ask for (see call.h).

#include <cstdlib>
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

float* AllocateFloats(int64_t floats) { return Aligned(floats); }
void FreeFloats(float* p) { std::free(p); }

}  // namespace jax_fa
