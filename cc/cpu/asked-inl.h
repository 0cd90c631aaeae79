// Rows of all key heads, asked for in the order of the memory, some bytes at a time: the processor's own prefetching stops at
// the end of a page, and reading a few rows of each head in turn leaves it behind altogether.
#pragma once

#include "call.h"
#include "cpu/target-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Whether all heads of a row lie side by side, before the next row.
inline bool HeadsInRow(const Call& c, const View& x) { return c.K > 1 && x.head < x.row; }

class Asked {
 public:
  Asked(const Call& c, int64_t b) : c_(c), b_(b) {}

  // Rows [first, last) of `width` elements, after those of calls before.
  void Then(const View& x, int64_t width, int64_t first, int64_t last) {
    if (x.col != 1 || width == 0 || first >= last || (c_.pages && x.row == 0)) return;
    const int64_t size = ItemSize(x.dtype), n = last - first;
    if (c_.pages) return ThenPages(x.Bytes(b_, 0), x.row * size, first, n);
    Span s{x.Bytes(b_, 0, first), x.row * size, n, x.head * size, c_.K, width * size};
    if (HeadsInRow(c_, x)) {
      s.bytes += (c_.K - 1) * s.outer;
      s.outer = 0, s.outer_count = 1;
    }
    if (s.inner == s.bytes) s.bytes *= n, s.inner_count = 1;
    spans_[count_++] = s;
  }

  // Where the next `bytes` begin.
  JAX_FA_INLINE const char* Next(int64_t bytes) {
    if (left_ <= 0 && !NextRun()) return at_;
    const char* p = at_;
    at_ += bytes, left_ -= bytes;
    return p;
  }

 private:
  // inner_count runs of bytes that lie side by side, and that outer_count times.
  struct Span {
    const char* data;
    int64_t inner, inner_count, outer, outer_count, bytes;
  };

  // A key's place in its sequence.
  struct Place {
    int64_t page, row;
  };
  // In pages, page by page in whole rows: `rows` of them from `next` on, and those from `touched` on that are touched.
  struct PageSpan {
    const char* data;
    int64_t bytes, rows;
    Place next, touched;
    int64_t to_touch;
  };

  bool NextRun() {
    if (c_.pages) return NextPage();
    for (; span_ < count_; ++span_, outer_ = 0) {
      const Span& s = spans_[span_];
      for (; outer_ < s.outer_count; ++outer_, inner_ = 0) {
        if (inner_ == s.inner_count) continue;
        at_ = s.data + outer_ * s.outer + inner_++ * s.inner;
        left_ = s.bytes;
        return true;
      }
    }
    return false;
  }

  void ThenPages(const char* data, int64_t bytes, int64_t first, int64_t n) {
    const int64_t size = c_.pages.size, ahead = first + kTouchedBytes / bytes;
    pages_[count_++] = {
        data, bytes, n, {first / size, first % size}, {ahead / size, ahead % size}, c_.Keys(b_) - ahead};
  }

  bool NextPage() {
    for (; span_ < count_; ++span_) {
      PageSpan& s = pages_[span_];
      if (s.rows == 0) continue;
      const int64_t most = kMachinePage > s.bytes ? kMachinePage / s.bytes : 1;
      const int64_t rest = c_.pages.size - s.next.row, left = rest < s.rows ? rest : s.rows;
      const int64_t n = left < most ? left : most;
      at_ = At(s, s.next);
      left_ = n * s.bytes;
      s.rows -= n;
      Advance(&s.next, n);
      if (s.to_touch >= n) Touch(At(s, s.touched), n * s.bytes);
      s.to_touch -= n;
      Advance(&s.touched, n);
      return true;
    }
    return false;
  }

  const char* At(const PageSpan& s, const Place& p) const {
    return s.data + (c_.pages.Page(b_, p.page) * c_.pages.size + p.row) * s.bytes;
  }

  void Advance(Place* p, int64_t n) const {
    for (p->row += n; p->row >= c_.pages.size; ++p->page) p->row -= c_.pages.size;
  }

  // The first lines of every page of the machine.
  static void Touch(const char* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kMachinePage)
      for (int64_t line = i; line < i + kTouchedLines * 64 && line < bytes; line += 64)
        __builtin_prefetch(p + line, 0, 2);
  }

  const Call& c_;
  const int64_t b_;
  Span spans_[2];
  PageSpan pages_[2];
  int count_ = 0, span_ = 0;
  int64_t outer_ = 0, inner_ = 0, left_ = 0;
  const char* at_ = nullptr;
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
