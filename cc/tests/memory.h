// Memory that faults where it ends, and the kernels' own memory made of it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "call.h"

namespace jax_fa_test {

// Whole pages between two that fault. The bytes asked for lie against the page behind or the one before.
class Pages {
 public:
  Pages(size_t bytes, bool at_end) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    inner_ = (bytes + page) / page * page;
    total_ = inner_ + 2 * page;
    void* p = mmap(nullptr, total_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(p);
    first_ = base_ + page;
    Protect(PROT_READ | PROT_WRITE);
    data_ = at_end ? first_ + inner_ - bytes : first_;
  }
  ~Pages() { munmap(base_, total_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void Protect(int rights) const {
    if (mprotect(first_, inner_, rights) != 0) std::abort();
  }
  // Every byte, those around the data too, so that what nobody may read is NaN, and a write to it shows.
  void Fill() const { std::memset(first_, 0xFF, inner_); }
  bool IsFilled() const {
    // (Each byte equals the one before it.)
    return static_cast<unsigned char>(first_[0]) == 0xFF && std::memcmp(first_, first_ + 1, inner_ - 1) == 0;
  }

 private:
  char *base_, *first_, *data_;
  size_t bytes_, inner_, total_;
};

// What the kernels allocate (see call.h): all NaN at first, and against a guard page.
class KernelMemory {
 public:
  static float* Scratch(int64_t floats) {
    Fail();
    thread_local std::unique_ptr<Pages> kept;
    const size_t bytes = Bytes(floats);
    if (!kept || kept->bytes() < bytes) kept = std::make_unique<Pages>(bytes, true);
    char* p = kept->data() + (kept->bytes() - bytes);
    std::memset(p, 0xFF, bytes);
    return reinterpret_cast<float*>(p);
  }
  static float* Allocate(int64_t floats) {
    Fail();
    std::unique_ptr<Pages> pages = Freed(Bytes(floats));
    if (!pages) pages = std::make_unique<Pages>(Bytes(floats), true);
    pages->Fill();
    float* p = reinterpret_cast<float*>(pages->data());
    const std::lock_guard<std::mutex> lock(Mutex());
    Live()[p] = std::move(pages);
    return p;
  }
  static void Free(float* p) {
    if (p == nullptr) return;
    const std::lock_guard<std::mutex> lock(Mutex());
    const auto at = Live().find(p);
    if (at == Live().end()) std::abort();
    at->second->Protect(PROT_NONE);
    auto& freed = FreedPages();
    if (freed.size() == kMostFreed) freed.erase(freed.begin());
    freed.push_back(std::move(at->second));
    Live().erase(at);
  }
  static size_t live() {
    const std::lock_guard<std::mutex> lock(Mutex());
    return Live().size();
  }
  // The n-th request from now on (1: the next) throws std::bad_alloc; 0: none does.
  static void FailAt(int64_t n) {
    const std::lock_guard<std::mutex> lock(Mutex());
    Countdown() = n;
  }

 private:
  static size_t Bytes(int64_t floats) { return (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64; }
  static void Fail() {
    const std::lock_guard<std::mutex> lock(Mutex());
    if (Countdown() == 0) return;
    --Countdown();
    if (Countdown() == 0) throw std::bad_alloc();
  }
  // What was freed last may not be touched, until a request of its size takes it: most of the time of a test of small
  // arrays would be new pages otherwise.
  static constexpr size_t kMostFreed = 32;
  static std::vector<std::unique_ptr<Pages>>& FreedPages() {
    static std::vector<std::unique_ptr<Pages>> freed;
    return freed;
  }
  static std::unique_ptr<Pages> Freed(size_t bytes) {
    const std::lock_guard<std::mutex> lock(Mutex());
    auto& freed = FreedPages();
    for (auto at = freed.begin(); at != freed.end(); ++at) {
      if ((*at)->bytes() != bytes) continue;
      std::unique_ptr<Pages> pages = std::move(*at);
      freed.erase(at);
      pages->Protect(PROT_READ | PROT_WRITE);
      return pages;
    }
    return nullptr;
  }
  static int64_t& Countdown() {
    static int64_t n = 0;
    return n;
  }
  static std::mutex& Mutex() {
    static std::mutex mutex;
    return mutex;
  }
  static std::map<float*, std::unique_ptr<Pages>>& Live() {
    static std::map<float*, std::unique_ptr<Pages>> live;
    return live;
  }
};

}  // namespace jax_fa_test
