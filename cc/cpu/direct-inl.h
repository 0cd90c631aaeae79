// Few query rows (decoding): the time is that of reading keys and values once, so they are read in place
// instead of being packed. A task takes all key heads of a range of keys.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/direct_dots-inl.h"
#include "cpu/direct_values-inl.h"
#include "cpu/forward_plan-inl.h"
#include "cpu/gemm-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/pages-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/softmax-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Whether all heads of a row lie side by side, before the next row.
inline bool HeadsInRow(const Call& c, const View& x) { return c.K > 1 && x.head < x.row; }

// Calls what(k, j, count) for all heads and `per` elements at a time of [first, last), `count` of them from j on and at
// most `most`. Where heads lie side by side, `together` neighbours of each head in turn, which is near the order of the
// memory.
template <typename What>
inline void ReadInOrder(const Call& c, const View& x, int64_t first, int64_t last, int64_t per, int64_t most,
                        int64_t together, const What& what) {
  const int64_t n = last - first;
  if (!HeadsInRow(c, x)) together = n;
  for (int64_t from = 0; from < n; from += together) {
    const int64_t to = from + together < n ? from + together : n;
    for (int64_t k = 0; k < c.K; ++k)
      for (int64_t i = from; i < to; i += per * most) {
        const int64_t given = (to - i + per - 1) / per;
        what(k, first + i, given < most ? given : most);
      }
  }
}

// Asks for rows of all heads in the order of the memory, some bytes at a time: the processor's own prefetching stops at
// the end of a page, and reading a few rows of each head in turn leaves it behind altogether.
class Asked {
 public:
  Asked(const Call& c, int64_t b) : c_(c), b_(b) {}

  // Rows [first, last) of `width` elements, after those of calls before.
  void Then(const View& x, int64_t width, int64_t first, int64_t last) {
    if (x.col != 1 || width == 0 || first >= last) return;
    const int64_t size = ItemSize(x.dtype), n = last - first;
    if (c_.pages) {  // page by page, in whole rows
      spans_[count_++] = {x.Bytes(b_, 0), first, last, 0, 1, x.row * size};
      return;
    }
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
  // inner_count runs of bytes that lie side by side, and that outer_count times. In pages, keys [inner, inner_count) of so many
  // bytes each.
  struct Span {
    const char* data;
    int64_t inner, inner_count, outer, outer_count, bytes;
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

  bool NextPage() {
    for (; span_ < count_; ++span_) {
      Span& s = spans_[span_];
      if (s.inner >= s.inner_count) continue;
      const int64_t ahead = kTouchedBytes / s.bytes, most = kMachinePage > s.bytes ? kMachinePage / s.bytes : 1;
      const int64_t rest = c_.pages.size - s.inner % c_.pages.size, left = s.inner_count - s.inner;
      int64_t n = rest < left ? rest : left;
      n = n < most ? n : most;
      at_ = s.data + c_.pages.Row(b_, s.inner) * s.bytes;
      left_ = n * s.bytes;
      s.inner += n;
      Touch(s, s.inner + ahead, n);
      return true;
    }
    return false;
  }

  // Asks for a line of every page of the machine in which n keys from j on lie, if these do.
  void Touch(const Span& s, int64_t j, int64_t n) const {
    if (j + n > c_.Keys(b_)) return;
    const char *p = s.data + c_.pages.Row(b_, j) * s.bytes, *end = p + n * s.bytes;
    for (; p < end; p += kMachinePage) __builtin_prefetch(p, 0, 2);
  }

  const Call& c_;
  const int64_t b_;
  Span spans_[2];
  int count_ = 0, span_ = 0;
  int64_t outer_ = 0, inner_ = 0, left_ = 0;
  const char* at_ = nullptr;
};

// The rows of all key heads (n of each, one head after the other in the scratch) over the keys j0 + [0, width), of which
// [first, last) are visible to any row.
template <bool kPairs>
struct DirectBlock {
  static constexpr int64_t kPer = Unit<kPairs>::kElements;

  const Call& c;
  const ForwardScratch<kPairs>& s;
  RowRanges ranges;
  int64_t b, n, j0, width, first, last;
  int64_t dv = Panels(c.Dv) * kPanel, kb = RoundUp(kDirectKeys, kPanel);

  void Find() const {
    const int64_t from = first / kPer * kPer;  // of values, pairs
    FindRows(c, c.key, b, j0, j0 + first, j0 + last, s.key_at);
    FindRows(c, c.value, b, j0, j0 + from, j0 + last, s.value_at);
    if (c.key_scale) FindScales(c, c.key_scale, b, 0, c.K, j0, j0 + first, j0 + last, kb, s.key_scale);
    if (c.value_scale) FindScales(c, c.value_scale, b, 0, c.K, j0, j0 + first, j0 + last, kb, s.value_scale);
    const int64_t end = j0 + last, next = Least(end + kDirectKeys, c.Keys(b));
    if (c.key_scale) AskForScales(c, c.key_scale, b, end, next);
    if (c.value_scale) AskForScales(c, c.value_scale, b, end, next);
  }

  void Dots() const {
    const int64_t together = n == 1 ? 1 : kDirectTile, end = j0 + last;
    Asked asked(c, b);
    asked.Then(c.key, c.D, j0 + first + AskedRows(c.key, c.D, together), end);
    asked.Then(c.value, c.Dv, j0 + first, Least(j0 + first + AskedRows(c.value, c.Dv, Neighbours()), end));
    const bool in_place = c.key.col == 1;
    const int64_t size = ItemSize(c.key.dtype), bytes = kDirectTile * c.D * size;
    const int64_t head = c.key.head * size, ld = RoundUp(Units<kPairs>(c.D), kLanes);
    const char* const keys = c.key.Bytes(b, 0);
    DueKeys<kPairs> due(in_place ? c.key.dtype : DType::kF32, n, s.q_row, c.D, s.s_row);
    ReadInOrder(c, c.key, first, last, 1, kDirectTile, together, [&](int64_t k, int64_t j, int64_t count) {
      const float* q = s.q + k * n * s.q_row;
      float* to = s.logits + k * n * s.s_row;
      for (int64_t i = j; i < j + count; ++i) {
        const char* key = keys + k * head + s.key_at[i];
        if (!in_place) {
          float* own = s.stage + due.count() * ld;
          CopyRow<kPairs>(c.key, b, k, j0 + i, c.D, own);
          key = reinterpret_cast<const char*>(own);
        }
        due.Add({q, key, to + i}, [&] { return asked.Next(bytes); });
      }
      if (n > 1) due.Finish(nullptr);
    });
    due.Finish(s.logits + s.s_row - 1);
  }

  void Values() const {
    const int64_t together = Neighbours(), bytes = kPer * c.Dv * ItemSize(c.value.dtype), end = j0 + last;
    Asked asked(c, b);
    asked.Then(c.value, c.Dv, j0 + first + AskedRows(c.value, c.Dv, together), end);
    asked.Then(c.key, c.D, end, Least(end + AskedRows(c.key, c.D, kDirectTile), c.Keys(b)));
    const char* const values = c.value.Bytes(b, 0);
    const int64_t head = c.value.head * ItemSize(c.value.dtype);
    Fill(s.sums, 0, n * c.K * dv, 0.0f);
    ReadInOrder(c, c.value, first / kPer * kPer, last, kPer, together / kPer, together,
                [&](int64_t k, int64_t j, int64_t count) {
                  DirectValues<kPairs>(c.value.dtype, c.Dv, {values + k * head, s.value_at, !c.pages}, n, j, count,
                                       last, s.zeros, s.logits + k * n * s.s_row, s.s_row, s.sums + k * n * dv, dv,
                                       asked.Next(count * bytes));
                });
  }

  int64_t Neighbours() const { return DirectNeighbours(c.value.dtype, n); }
  static int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }

  // How many rows before they are taken they are asked for, where `together` of each head are read in turn.
  int64_t AskedRows(const View& x, int64_t width, int64_t together) const {
    const int64_t bytes = width * ItemSize(x.dtype) * (HeadsInRow(c, x) ? c.K : 1);
    return together + (bytes > 0 && kAskedBytes > bytes ? kAskedBytes / bytes - 1 : 0);
  }

  void ScaleDots(int64_t k) const {
    if (c.key_scale) ScaleColumns(s.key_scale + k * kb, n, first, last, s.logits + k * n * s.s_row, s.s_row);
  }

  void Soften(int64_t k, const float* nan_marker) const {
    const int64_t c0 = first / kLanes * kLanes, c1 = RoundUp(last, kLanes);
    for (int64_t r = k * n; r < (k + 1) * n; ++r)
      SoftmaxRow<kPairs>(c, RowAt(c, b, k, r - k * n), j0, ranges.Within(r, j0, width), c0, c1, nan_marker, s.tmp,
                         s.logits + r * s.s_row, s.m + r, s.l + r, s.acc + r * dv);
  }

  // From the products of a head on, with packed values. Those that are not finite are kept apart from the rows to which
  // they are masked.
  void Packed(int64_t k) const {
    const int64_t units = Units<kPairs>(width), from = first / kLanes * kLanes / kPer, to = Units<kPairs>(last);
    float* nan_marker = IsMasked(c) ? s.own.nan_marker : nullptr;
    const bool any = PackValuesOf<kPairs>(c, b, k, j0, j0 + first, width, s.stage, nan_marker, s.own.values);
    Soften(k, any ? nan_marker : nullptr);
    for (int64_t p = 0; p < Panels(c.Dv); ++p)
      Gemm<kPairs, true>(n, to - from, s.logits + k * n * s.s_row + from, s.s_row, 1,
                         s.own.values + (p * units + from) * kPanel, s.acc + k * n * dv + p * kPanel, dv);
  }

  // Where a value is not finite and its key may be masked, whose weight of 0 gives NaN: once more, with packed values.
  // The max stays as it is; the sum is what it was without this block.
  void Again(int64_t k) const {
    for (int64_t r = k * n; r < (k + 1) * n; ++r)
      s.l[r] = s.before_l[r] * (s.m[r] > s.before_m[r] ? __builtin_expf(s.before_m[r] - s.m[r]) : 1.0f);
    DirectDots<kPairs>(c, b, k, n, s.q + k * n * s.q_row, s.q_row, j0, first, last, s.stage, s.logits + k * n * s.s_row,
                       s.s_row);
    ScaleDots(k);
    Packed(k);
  }

  // Adds the sums of the block, which start from zero: to continue those of the blocks before would cost accuracy.
  void AddSums(int64_t k) const {
    float *acc = s.acc + k * n * dv, *sums = s.sums + k * n * dv;
    if (IsMasked(c) && ZeroOrNaN(sums, n * dv) != 0.0f) return Again(k);
    Combine(n * dv, acc, sums, [](F x, F more) { return x + more; });
  }

  void Run() const {
    const int64_t rows = n * c.K;
    Find();
    Dots();
    for (int64_t k = 0; k < c.K; ++k) ScaleDots(k);
    if (c.value.col != 1) {
      for (int64_t k = 0; k < c.K; ++k) Packed(k);
      return;
    }
    __builtin_memcpy(s.before_m, s.m, sizeof(float) * static_cast<size_t>(rows));
    __builtin_memcpy(s.before_l, s.l, sizeof(float) * static_cast<size_t>(rows));
    for (int64_t k = 0; k < c.K; ++k) {
      Soften(k, nullptr);
      if (c.value_scale) ScaleColumns(s.value_scale + k * kb, n, first, last, s.logits + k * n * s.s_row, s.s_row);
    }
    Values();
    for (int64_t k = 0; k < c.K; ++k) AddSums(k);
  }
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
