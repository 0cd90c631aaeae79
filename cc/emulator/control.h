// The emulator's common ground: counters, faults, error texts, the log, queued work. Lives in libascendcl.so; the other
// libraries of the emulator link to it, as CANN's do.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#define CANN_EMULATOR_API __attribute__((visibility("default")))
#define CANN_EMULATOR_C extern "C" CANN_EMULATOR_API

namespace cann_emulator {

enum class Kind { kTensor, kIntArray, kExecutor, kMemory, kStream, kCount };

// Ends the process: the caller broke a rule whose breach on a device is undefined.
[[noreturn]] CANN_EMULATOR_API void Abort(const std::string& what);

// Counts a call of a C function; returns the code of a fault that is due, or 0.
CANN_EMULATOR_API int Enter(const char* function);
// As Enter, and 107002 if this thread has set no device.
CANN_EMULATOR_API int EnterOnDevice(const char* function);

// Adds to this thread's error text; returns `code`.
CANN_EMULATOR_API int Fail(int code, const std::string& text);

CANN_EMULATOR_API void Count(Kind kind, int64_t change);
// Whether errors of tiling come from phase 1, as in newer releases.
CANN_EMULATOR_API bool TilingInPhase1();
CANN_EMULATOR_API void Log(const std::string& json);

// Queues work; its code is what the stream's synchronization returns. It runs then, not before.
using Work = std::function<int()>;
CANN_EMULATOR_API int Enqueue(void* stream, Work work);

// For device.cc.
void SetDevice();
const char* TakeErrorText();

}  // namespace cann_emulator
