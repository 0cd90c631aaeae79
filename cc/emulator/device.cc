// libascendcl.so: devices, streams, memory, on the host.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>

#include "emulator/control.h"

namespace cann_emulator {
namespace {

constexpr uint32_t kAlive = 0x57AEA111, kDead = 0xDEAD57AE;

struct Stream {
  uint32_t magic = kAlive;
  std::mutex mutex;
  std::deque<Work> queue;
};

// CANN's default stream is the null pointer.
Stream& Find(void* stream) {
  static Stream* const standard = new Stream;
  if (stream == nullptr) return *standard;
  Stream& found = *static_cast<Stream*>(stream);
  if (found.magic != kAlive) Abort("a stream was used that is none, or was destroyed");
  return found;
}

struct Memory {
  std::mutex mutex;
  std::set<void*> blocks;
};

Memory& Blocks() {
  static Memory* const memory = new Memory;
  return *memory;
}

int Drain(Stream& stream) {
  for (;;) {
    Work work;
    {
      const std::lock_guard<std::mutex> lock(stream.mutex);
      if (stream.queue.empty()) return 0;
      work = std::move(stream.queue.front());
      stream.queue.pop_front();
    }
    int code = Enter("kernel");
    if (code == 0) code = work();
    if (code == 0) continue;
    const std::lock_guard<std::mutex> lock(stream.mutex);
    stream.queue.clear();  // a stream whose work failed drops what follows
    return code;
  }
}

}  // namespace

int Enqueue(void* stream, Work work) {
  Stream& s = Find(stream);
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.queue.push_back(std::move(work));
  return 0;
}

}  // namespace cann_emulator

using namespace cann_emulator;

CANN_EMULATOR_C int aclInit(const char*) {
  if (const int code = Enter("aclInit")) return code;
  static std::atomic<bool> done{false};
  return done.exchange(true) ? Fail(100002, "aclInit was called before.") : 0;
}

CANN_EMULATOR_C int aclFinalize() { return Enter("aclFinalize"); }

CANN_EMULATOR_C const char* aclGetRecentErrMsg() {
  Enter("aclGetRecentErrMsg");
  return TakeErrorText();
}

CANN_EMULATOR_C int aclrtSetDevice(int32_t device) {
  if (const int code = Enter("aclrtSetDevice")) return code;
  if (device != 0) return Fail(107001, "invalid device id " + std::to_string(device) + ", there is one device.");
  SetDevice();
  return 0;
}

CANN_EMULATOR_C int aclrtGetDevice(int32_t* device) {
  if (const int code = EnterOnDevice("aclrtGetDevice")) return code;
  *device = 0;
  return 0;
}

CANN_EMULATOR_C int aclrtGetDeviceCount(uint32_t* count) {
  *count = 1;
  return Enter("aclrtGetDeviceCount");
}

CANN_EMULATOR_C int aclrtGetCurrentContext(void** context) {
  if (const int code = EnterOnDevice("aclrtGetCurrentContext")) return code;
  static int only;
  *context = &only;
  return 0;
}

CANN_EMULATOR_C int aclrtSetCurrentContext(void*) {
  if (const int code = Enter("aclrtSetCurrentContext")) return code;
  SetDevice();
  return 0;
}

CANN_EMULATOR_C int aclrtCreateStream(void** stream) {
  if (const int code = EnterOnDevice("aclrtCreateStream")) return code;
  *stream = new Stream;
  Count(Kind::kStream, 1);
  return 0;
}

CANN_EMULATOR_C int aclrtDestroyStream(void* stream) {
  if (const int code = EnterOnDevice("aclrtDestroyStream")) return code;
  Stream& s = Find(stream);
  if (stream == nullptr) Abort("the default stream cannot be destroyed");
  if (!s.queue.empty()) Abort("a stream with queued work was destroyed");
  s.magic = kDead;
  delete &s;
  Count(Kind::kStream, -1);
  return 0;
}

CANN_EMULATOR_C int aclrtSynchronizeStream(void* stream) {
  if (const int code = EnterOnDevice("aclrtSynchronizeStream")) return code;
  return Drain(Find(stream));
}

CANN_EMULATOR_C int aclrtSynchronizeStreamWithTimeout(void* stream, int32_t) {
  if (const int code = EnterOnDevice("aclrtSynchronizeStreamWithTimeout")) return code;
  return Drain(Find(stream));
}

CANN_EMULATOR_C int aclrtMalloc(void** memory, size_t bytes, int) {
  if (const int code = EnterOnDevice("aclrtMalloc")) return code;
  if (bytes == 0) return Fail(107000, "aclrtMalloc of 0 bytes.");
  // One cache line more than asked, so that blocks lie apart; aligned to 64 and not to more, as on a device.
  *memory = bytes > SIZE_MAX - 127 ? nullptr : std::aligned_alloc(64, (bytes + 127) / 64 * 64);
  if (*memory == nullptr) return Fail(207001, "out of device memory.");
  const std::lock_guard<std::mutex> lock(Blocks().mutex);
  Blocks().blocks.insert(*memory);
  Count(Kind::kMemory, 1);
  return 0;
}

CANN_EMULATOR_C int aclrtFree(void* memory) {
  if (const int code = EnterOnDevice("aclrtFree")) return code;
  {
    const std::lock_guard<std::mutex> lock(Blocks().mutex);
    if (Blocks().blocks.erase(memory) == 0) Abort("aclrtFree of memory that aclrtMalloc did not give, or twice");
  }
  std::free(memory);
  Count(Kind::kMemory, -1);
  return 0;
}

CANN_EMULATOR_C int aclrtMemcpy(void* to, size_t room, const void* from, size_t bytes, int) {
  if (const int code = EnterOnDevice("aclrtMemcpy")) return code;
  if (bytes > room) return Fail(107000, "aclrtMemcpy of more bytes than there is room for.");
  std::memcpy(to, from, bytes);
  return 0;
}

CANN_EMULATOR_C int aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t bytes, int, void* stream) {
  if (const int code = EnterOnDevice("aclrtMemcpyAsync")) return code;
  if (bytes > room) return Fail(107000, "aclrtMemcpyAsync of more bytes than there is room for.");
  return Enqueue(stream, [=] {
    std::memcpy(to, from, bytes);
    return 0;
  });
}

CANN_EMULATOR_C int aclrtMemset(void* to, size_t room, int32_t value, size_t bytes) {
  if (const int code = EnterOnDevice("aclrtMemset")) return code;
  std::memset(to, value, std::min(room, bytes));
  return 0;
}

CANN_EMULATOR_C int aclrtMemsetAsync(void* to, size_t room, int32_t value, size_t bytes, void* stream) {
  if (const int code = EnterOnDevice("aclrtMemsetAsync")) return code;
  return Enqueue(stream, [=] {
    std::memset(to, value, std::min(room, bytes));
    return 0;
  });
}
