// Streams of our own, for calls that come without one.
#pragma once

#include <condition_variable>
#include <mutex>
#include <vector>

#include "cann/runtime.h"

namespace jax_fa::cann {

class StreamPool {
 public:
  static constexpr int kDevice = 0;

  // A stream for one user at a time.
  class Lease {
   public:
    explicit Lease(StreamPool& pool, const Library& library)
        : pool_(pool), library_(library), stream_(pool.Take(library)) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() {
      waited_ ? pool_.Return(library_, stream_) : pool_.Destroy(library_, stream_);
      pool_.Left();
    }

    aclrtStream get() const { return stream_; }

    // Waits for the work. A stream whose work failed, or that may still have work, is not used again.
    void Wait();

   private:
    StreamPool& pool_;
    const Library& library_;
    aclrtStream stream_;
    bool waited_ = false;
  };

  // Waits for the users, and destroys all streams: a process may end while calls that nobody waits for still run.
  void Release(const Library& library);

 private:
  aclrtStream Take(const Library& library);
  void Return(const Library& library, aclrtStream stream) noexcept;
  // Waits first: a call that failed half-way may have queued work, and its memory goes when this returns.
  static void Close(const Library& library, aclrtStream stream);
  // The same where nobody is left who could act on a failure.
  static void Destroy(const Library& library, aclrtStream stream) noexcept;

  void Left() noexcept;

  std::mutex mutex_;
  std::condition_variable left_;
  int users_ = 0;
  std::vector<aclrtStream> idle_;
};

// Of the process.
StreamPool& ProcessStreams();

}  // namespace jax_fa::cann
