// Thread pools as they may be: with an interface like that of XLA's, and with its worst manners.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace jax_fa_test {

enum class Manner {
  kPrompt,
  kLate,    // begins each closure a moment later
  kNever,   // runs nothing before Finish
  kInline,  // runs closures in Schedule, as a pool with a full queue does
  kThrows,  // refuses all but the first with an exception
};

class FakePool {
 public:
  explicit FakePool(int64_t threads, Manner manner = Manner::kPrompt) : size_(threads), manner_(manner) {
    if (manner == Manner::kNever || manner == Manner::kInline) return;
    for (int64_t i = 0; i < threads; ++i) threads_.emplace_back([this] { Work(); });
  }
  ~FakePool() { Finish(); }

  int64_t num_threads() const { return size_; }

  template <typename F>
  void Schedule(F&& f) {
    if (manner_ == Manner::kInline) return f();
    if (manner_ == Manner::kThrows && scheduled_++ > 0) throw std::bad_alloc();
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.emplace_back(std::forward<F>(f));
    changed_.notify_one();
  }

  // Runs what is left and ends the threads.
  void Finish() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      finished_ = true;
      changed_.notify_all();
    }
    for (std::thread& t : threads_) t.join();
    threads_.clear();
    for (auto& f : queue_) f();
    queue_.clear();
  }

 private:
  void Work() {
    for (;;) {
      std::function<void()> f;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return finished_ || !queue_.empty(); });
        if (queue_.empty()) return;
        f = std::move(queue_.front());
        queue_.pop_front();
      }
      if (manner_ == Manner::kLate) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      f();
    }
  }

  const int64_t size_;
  const Manner manner_;
  int scheduled_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  bool finished_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace jax_fa_test
