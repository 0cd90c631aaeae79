#include "cann/workspace.h"

#include <algorithm>
#include <cstdint>
#include <string>

namespace jax_fa::cann {
namespace {

int Allocate(const Library& library, int device, size_t bytes, void** memory) {
  // A size that passed below 0 somewhere must fail, and not come round to a few bytes.
  const size_t more = std::min(kWorkspaceAlignment, SIZE_MAX - bytes);
  return WithDevice(library, device,
                    [&] { return library.api.aclrtMalloc(memory, bytes + more, ACL_MEM_MALLOC_HUGE_FIRST); });
}

}  // namespace

void* Workspaces::Get(const Library& library, int device, aclrtStream stream, size_t bytes) {
  const Key key(device, stream);
  size_t size = bytes;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Blocks& blocks = blocks_[key];
    if (!blocks.empty() && blocks.back().bytes >= bytes) return blocks.back().Start();
    if (!blocks.empty()) size = std::max(bytes, 2 * blocks.back().bytes);
  }
  // Not under the lock: aclrtMalloc may wait for the device. Two threads that grow the same stream's memory at once both
  // keep theirs.
  void* memory = nullptr;
  int code = Allocate(library, device, size, &memory);
  if (code == kMemoryAllocation && size > bytes) {
    TakeErrorText(library);
    size = bytes;
    code = Allocate(library, device, size, &memory);
  }
  if (code != kSuccess)
    throw CodeFailure("aclrtMalloc of " + std::to_string(size) + " bytes of workspace", code, TakeErrorText(library));
  const Block block{memory, size};
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    Blocks& blocks = blocks_[key];
    const auto larger = std::find_if(blocks.begin(), blocks.end(), [&](const Block& b) { return b.bytes > size; });
    blocks.insert(larger, block);
  } catch (...) {  // no memory to remember it by
    Forget(library, library.api.aclrtFree(memory));
    throw;
  }
  return block.Start();
}

void Workspaces::Free(const Library& library, int device, const Blocks& blocks) {
  Cleanup cleanup;
  for (const Block& block : blocks)
    cleanup.Do([&] { Check(library, device, "aclrtFree", [&] { return library.api.aclrtFree(block.memory); }); });
  cleanup.End();
}

void Workspaces::Release(const Library& library) {
  std::map<Key, Blocks> released;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    released.swap(blocks_);
  }
  std::map<int, Blocks> of_device;
  for (const auto& [key, blocks] : released) {
    Blocks& all = of_device[key.first];
    all.insert(all.end(), blocks.begin(), blocks.end());
  }
  Cleanup cleanup;
  for (const auto& of : of_device) cleanup.Do([&] { Free(library, of.first, of.second); });
  cleanup.End();
}

void Workspaces::Release(const Library& library, int device, aclrtStream stream) {
  Blocks released;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto it = blocks_.find(Key(device, stream));
    if (it == blocks_.end()) return;
    released.swap(it->second);
    blocks_.erase(it);
  }
  Free(library, device, released);
}

Workspaces& ProcessWorkspaces() {
  // Never destroyed: work of other threads may outlive the end of main, and CANN's own libraries may end before.
  static Workspaces* const workspaces = new Workspaces;
  return *workspaces;
}

}  // namespace jax_fa::cann
