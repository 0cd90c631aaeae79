#include "emulator/control.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

namespace cann_emulator {
namespace {

constexpr const char* kNames[] = {"tensor", "int_array", "executor", "memory", "stream"};
std::atomic<int64_t> live[static_cast<int>(Kind::kCount)];

struct Fault {
  int code, skip, times;
};

struct State {
  std::mutex mutex;
  std::map<std::string, int64_t> calls;
  std::map<std::string, Fault> faults;
  std::vector<std::string> log;
  std::string words;  // of faults
  std::atomic<bool> newer{false};
};

State& Shared() {
  static State* const state = new State;  // other threads may outlive the end of main
  return *state;
}

struct Thread {
  bool device = false;
  std::string errors;  // since they were last read
  std::string read;    // what aclGetRecentErrMsg pointed at last
  std::string log;     // what jaxFaEmulatorLog pointed at last
};
thread_local Thread thread;

void ReportLeaks() {
  const char* const wish = std::getenv("JAX_FA_EMULATOR_LEAKS");
  if (wish == nullptr || std::string(wish) != "abort") return;
  bool any = false;
  for (int i = 0; i < static_cast<int>(Kind::kCount); ++i) {
    if (live[i] == 0) continue;
    std::fprintf(stderr, "CANN emulator: %lld live objects of kind %s at exit\n", static_cast<long long>(live[i]),
                 kNames[i]);
    any = true;
  }
  if (any) std::_Exit(86);
}

[[maybe_unused]] const int registered = std::atexit(ReportLeaks);

}  // namespace

void Abort(const std::string& what) {
  std::fprintf(stderr, "CANN emulator: %s\n", what.c_str());
  std::abort();
}

int Fail(int code, const std::string& text) {
  thread.errors += "EZ9999: Inner Error! " + text + "\n";
  return code;
}

int Enter(const char* function) {
  State& s = Shared();
  int code = 0;
  std::string words;
  {
    const std::lock_guard<std::mutex> lock(s.mutex);
    ++s.calls[function];
    const auto it = s.faults.find(function);
    if (it == s.faults.end()) return 0;
    if (it->second.skip > 0) {
      --it->second.skip;
      return 0;
    }
    code = it->second.code;
    if (--it->second.times <= 0) s.faults.erase(it);
    words = s.words;
  }
  return Fail(code, std::string("fault injected into ") + function + "." + words);
}

int EnterOnDevice(const char* function) {
  if (const int code = Enter(function)) return code;
  return thread.device ? 0 : Fail(107002, std::string(function) + ": the context is null, call aclrtSetDevice first.");
}

void Count(Kind kind, int64_t change) { live[static_cast<int>(kind)] += change; }
bool TilingInPhase1() { return Shared().newer; }

void Log(const std::string& json) {
  State& s = Shared();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.log.push_back(json);
}

void SetDevice() { thread.device = true; }

const char* TakeErrorText() {
  thread.read.swap(thread.errors);
  thread.errors.clear();
  return thread.read.empty() ? nullptr : thread.read.c_str();
}

}  // namespace cann_emulator

using cann_emulator::Shared;

CANN_EMULATOR_C int64_t jaxFaEmulatorLive(const char* kind) {
  const auto* const it =
      std::find(std::begin(cann_emulator::kNames), std::end(cann_emulator::kNames), std::string(kind));
  return it == std::end(cann_emulator::kNames) ? -1 : cann_emulator::live[it - cann_emulator::kNames].load();
}

CANN_EMULATOR_C int64_t jaxFaEmulatorCalls(const char* function) {
  const std::lock_guard<std::mutex> lock(Shared().mutex);
  const auto it = Shared().calls.find(function);
  return it == Shared().calls.end() ? 0 : it->second;
}

// After `skip` more calls, the next `times` calls of the function fail with `code`. "kernel" is queued work itself.
CANN_EMULATOR_C void jaxFaEmulatorFail(const char* function, int code, int skip, int times) {
  const std::lock_guard<std::mutex> lock(Shared().mutex);
  if (function == nullptr || *function == 0) return Shared().faults.clear();
  Shared().faults[function] = {code, skip, times};
}

// What the error texts of faults end with, in any encoding.
CANN_EMULATOR_C void jaxFaEmulatorWords(const char* words) {
  const std::lock_guard<std::mutex> lock(Shared().mutex);
  Shared().words = words;
}

CANN_EMULATOR_C void jaxFaEmulatorStyle(int style) { Shared().newer = style != 0; }

// A JSON array of the phase 1 calls that succeeded, oldest first; valid until this thread's next call.
CANN_EMULATOR_C const char* jaxFaEmulatorLog() {
  std::string& text = cann_emulator::thread.log;
  text = "[";
  const std::lock_guard<std::mutex> lock(Shared().mutex);
  for (const std::string& entry : Shared().log) text += (text.size() > 1 ? ",\n" : "") + entry;
  text += ']';
  return text.c_str();
}

// Forgets log, counts, faults, their words and style; what is alive stays so.
CANN_EMULATOR_C void jaxFaEmulatorReset() {
  const std::lock_guard<std::mutex> lock(Shared().mutex);
  Shared().calls.clear();
  Shared().faults.clear();
  Shared().log.clear();
  Shared().words.clear();
  Shared().newer = false;
}
