// Rows of arrays that are read or written soon, asked for a few at a time while products run: rows of a head lie apart,
// each on a few lines, which the processor's own prefetching does not follow.
#pragma once

#include "call.h"
#include "cpu/target-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

class Ahead {
 public:
  // Rows [i0, i0 + n) of `width` elements.
  void Add(const View& x, int64_t b, int64_t h, int64_t i0, int64_t n, int64_t width, bool written = false) {
    if (!x || count_ == kMost || n <= 0 || x.col != 1) return;
    spans_[count_++] = {x.Bytes(b, h, i0), x.row * ItemSize(x.dtype), width * ItemSize(x.dtype), n, written};
    left_ += n;
  }

  // All of them are to be asked for in so many calls of Some.
  void Spread(int64_t calls) { some_ = left_ / (calls > 0 ? calls : 1) + 1; }

  JAX_FA_INLINE void Some() {
    for (int64_t i = 0; i < some_ && at_ < count_; ++i) {
      Span& span = spans_[at_];
      for (int64_t line = 0; line < span.bytes; line += kLine) {
        if (span.written) {
          __builtin_prefetch(span.data + line, 1, 2);
        } else {
          __builtin_prefetch(span.data + line, 0, 2);
        }
      }
      span.data += span.row;
      if (--span.n == 0) ++at_;
    }
  }

 private:
  static constexpr int kMost = 16;
  static constexpr int64_t kLine = 64;
  struct Span {
    const char* data;
    int64_t row, bytes, n;
    bool written;
  };
  Span spans_[kMost];
  int count_ = 0, at_ = 0;
  int64_t left_ = 0, some_ = 0;
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
