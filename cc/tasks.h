// Runs independent tasks on XLA's thread pool and the calling thread.
//
// A handler that blocks until the pool has run its tasks can deadlock: all threads of the pool may be such
// handlers. Here the caller takes tasks from the same counter as its helpers, so that it gets through all of
// them alone if no helper comes; at the end it waits only for tasks that a helper has already begun. A helper
// that comes late finds nothing and touches nothing but the shared counter. No lock is held while a task runs.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>

#include "call.h"

namespace jax_fa {

template <typename Pool>
class PoolRunner : public Runner {
 public:
  // `alone`: the calling thread runs all tasks, which takes less time than waking others where there is little to do.
  explicit PoolRunner(Pool& pool, bool alone = false)
      : Runner{&PoolRunner::RunAll, alone ? 1 : pool.num_threads()}, pool_(pool) {}

 private:
  struct Shared {
    Task fn;
    void* context;
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
    std::exception_ptr failure;  // of the first task that threw; guarded by mutex

    // Runs tasks until none is left to begin.
    void Drain() {
      for (;;) {
        const int64_t i = next.fetch_add(1);
        if (i >= count) return;
        try {
          fn(context, i);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(mutex);
          if (!failure) failure = std::current_exception();
        }
        if (done.fetch_add(1) + 1 == count) {
          const std::lock_guard<std::mutex> lock(mutex);
          all_done.notify_all();
        }
      }
    }
  };

  static void RunAll(const Runner* self, int64_t count, Task fn, void* context) {
    const auto* const runner = static_cast<const PoolRunner*>(self);
    Pool& pool = runner->pool_;
    // One for each processor but that of the caller: one more would take turns with the others in the middle of a task.
    const int64_t helpers = (count < runner->threads ? count : runner->threads) - 1;
    if (helpers <= 0) {
      for (int64_t i = 0; i < count; ++i) fn(context, i);
      return;
    }
    const auto shared = std::make_shared<Shared>();
    shared->fn = fn;
    shared->context = context;
    shared->count = count;
    try {
      for (int64_t h = 0; h < helpers; ++h) pool.Schedule([shared] { shared->Drain(); });
    } catch (...) {  // NOLINT(bugprone-empty-catch)
      // No memory for another helper. Those already scheduled still need this frame, so go on.
    }
    shared->Drain();
    for (int i = 0; i < kSpins && shared->done.load() != count; ++i) Pause();
    std::unique_lock<std::mutex> lock(shared->mutex);
    shared->all_done.wait(lock, [&] { return shared->done.load() == count; });
    if (shared->failure) std::rethrow_exception(std::move(shared->failure));  // the caller's alone from here on
  }

  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  // How often the caller looks for the end of the last tasks before it sleeps: some 20 us. To be woken takes 50 on a virtual
  // machine, as long as a call of 128 rows.
  static constexpr int kSpins = 1000;

  Pool& pool_;
};

}  // namespace jax_fa
