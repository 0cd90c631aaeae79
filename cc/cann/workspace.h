// Device memory for the workspaces of streams, for when the framework's allocator gives none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "cann/runtime.h"

namespace jax_fa::cann {

// Where a workspace should start: what frameworks' own allocators give; the documents ask for 32 bytes at least.
inline constexpr size_t kWorkspaceAlignment = 512;

class Workspaces {
 public:
  // At least `bytes` on `device`, valid for work queued on `stream` until Release. Calls for one stream may get the same
  // memory: the work of a stream is done in order.
  void* Get(const Library& library, int device, aclrtStream stream, size_t bytes);

  // Frees everything, or what belongs to one stream. Nothing queued may still use it.
  void Release(const Library& library);
  void Release(const Library& library, int device, aclrtStream stream);

 private:
  using Key = std::pair<int, aclrtStream>;  // a stream's address may come back on another device
  struct Block {
    void* memory;  // as aclrtMalloc gave it
    size_t bytes;  // of them usable from Start() on

    // aclrtMalloc promises less than kWorkspaceAlignment, so a block is longer than `bytes` by that much.
    void* Start() const {
      const uintptr_t past = reinterpret_cast<uintptr_t>(memory) % kWorkspaceAlignment;
      return static_cast<char*>(memory) + (past == 0 ? 0 : kWorkspaceAlignment - past);
    }
  };
  // Only the last block is handed out. The smaller ones before it may be in use by work still queued; as sizes double,
  // all of them together are hardly larger than the last.
  using Blocks = std::vector<Block>;

  static void Free(const Library& library, int device, const Blocks& blocks);

  std::mutex mutex_;
  std::map<Key, Blocks> blocks_;
};

// Of the process.
Workspaces& ProcessWorkspaces();

}  // namespace jax_fa::cann
