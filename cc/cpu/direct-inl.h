// Few query rows (decoding): the time is that of reading keys and values once, so they are read in place
// instead of being packed. A task takes all key heads of a range of keys.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/asked-inl.h"
#include "cpu/direct_bytes-inl.h"
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

// The rows of all key heads (n of each, one head after the other in the scratch) over the keys j0 + [0, width), of which
// [first, last) are visible to any row.
template <bool kPairs>
struct DirectBlock {
  static constexpr int64_t kPer = Unit<kPairs>::kElements, kScale = sizeof(float);

  const Call& c;
  const ForwardScratch<kPairs>& s;
  RowRanges ranges;
  int64_t b, n, j0, width, first, last;
  int64_t dv = Panels(c.Dv) * kPanel, kb = RoundUp(kDirectKeys, kPanel);

  // Where keys and values lie, and their scales.
  void Find() const {
    if (!c.pages) return;
    const int64_t from = first / kPer * kPer;  // of values, pairs
    FindRows(c, c.key, b, j0, j0 + first, j0 + last, s.key_at);
    FindRows(c, c.value, b, j0, j0 + from, j0 + last, s.value_at);
    if (c.key_scale) FindScales(c, c.key_scale, b, 0, c.K, j0, j0 + first, j0 + last, kb, s.key_scale);
    if (c.value_scale) FindScales(c, c.value_scale, b, 0, c.K, j0, j0 + first, j0 + last, kb, s.value_scale);
  }

  // Of the next block, asked for in the order of the memory while the products of this one run.
  Asked NextScales(const View& x) const {
    Asked asked(c, b);
    const int64_t end = j0 + last, next = Least(end + kDirectKeys, c.Keys(b));
    View rows = x;
    rows.row = x.col, rows.col = x.head;
    if (x && x.head == 1 && x.col > 0 && x.row == c.pages.size * x.col) {
      asked.Then(rows, c.K, end, next);
    } else if (x) {
      AskForScales(c, x, b, end, next);
    }
    return asked;
  }

  void Dots() const {
    const bool bytes_in_pairs = AreBytes<kPairs>(c.key);
    const int64_t together = n == 1 && !bytes_in_pairs ? 1 : kDirectTile, end = j0 + last;
    Asked asked(c, b);
    asked.Then(c.key, c.D, j0 + first + AskedRows(c.key, c.D, KeyNeighbours(together)), end);
    asked.Then(c.value, c.Dv, j0 + first, Least(j0 + first + AskedRows(c.value, c.Dv, Neighbours()), end));
    Asked scales = NextScales(c.key_scale);
    if (bytes_in_pairs)
      return ReadInOrder(c, c.key, first, last, 1, kDirectTile, together, [&](int64_t k, int64_t j, int64_t count) {
        if (c.key_scale) __builtin_prefetch(scales.Next(count * kScale));
        DotBytes(k, j, count, asked.Next(count * c.D));
      });
    const bool in_place = c.key.col == 1;
    const int64_t size = ItemSize(c.key.dtype), bytes = kDirectTile * c.D * size;
    const int64_t head = c.key.head * size, ld = RoundUp(Units<kPairs>(c.D), kLanes);
    const char* const keys = c.key.Bytes(b, 0, c.pages ? 0 : j0);
    const int64_t row = c.key.row * size;
    DueKeys<kPairs> due(in_place ? c.key.dtype : DType::kF32, n, s.q_row, c.D, s.s_row);
    ReadInOrder(c, c.key, first, last, 1, kDirectTile, together, [&](int64_t k, int64_t j, int64_t count) {
      if (c.key_scale) __builtin_prefetch(scales.Next(count * kScale));
      const float* q = s.q + k * n * s.q_row;
      float* to = s.logits + k * n * s.s_row;
      for (int64_t i = j; i < j + count; ++i) {
        const char* key = keys + k * head + (c.pages ? s.key_at[i] : i * row);
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
    asked.Then(c.key, c.D, end, Least(end + AskedRows(c.key, c.D, KeyNeighbours(kDirectTile)), c.Keys(b)));
    const char* const values = c.value.Bytes(b, 0, c.pages ? 0 : j0);
    const int64_t size = ItemSize(c.value.dtype), head = c.value.head * size, row = c.value.row * size;
    const int64_t* const at = c.pages ? s.value_at : nullptr;
    Fill(s.sums, 0, n * c.K * dv, 0.0f);
    Asked scales = NextScales(c.value_scale);
    if (AreBytes<kPairs>(c.value))
      return ReadInOrder(c, c.value, first / kPer * kPer, last, kPer, together / kPer, together,
                         [&](int64_t k, int64_t j, int64_t count) {
                           if (c.value_scale) __builtin_prefetch(scales.Next(count * kPer * kScale));
                           AddByteValues(k, j, count * kPer, asked.Next(count * bytes));
                         });
    ReadInOrder(c, c.value, first / kPer * kPer, last, kPer, together / kPer, together,
                [&](int64_t k, int64_t j, int64_t count) {
                  if (c.value_scale) __builtin_prefetch(scales.Next(count * kPer * kScale));
                  DirectValues<kPairs>(c.value.dtype, c.Dv, {values + k * head, at, row}, n, j, count, last, s.zeros,
                                       s.logits + k * n * s.s_row, s.s_row, s.sums + k * n * dv, dv,
                                       asked.Next(count * bytes));
                });
  }

  // The products of the rows of a head with `count` keys of 8 bits. Up to kDirectTile - 1 columns behind are written too.
  void DotBytes(int64_t k, int64_t j, int64_t count, const char* ask) const {
    if constexpr (kPairs) {
      const char* keys[kDirectTile];
      for (int64_t i = 0; i < kDirectTile; ++i) keys[i] = c.key.Bytes(b, k) + s.key_at[j + (i < count ? i : 0)];
      ByteDots<kPairs>(c.key.dtype, keys, n, s.q + k * n * s.q_row, s.q_row, c.D, s.logits + k * n * s.s_row + j,
                       s.s_row, ask);
    }
  }

  // Adds the weighted values of a head from j on, `count` of them or up to the last.
  void AddByteValues(int64_t k, int64_t j, int64_t count, const char* ask) const {
    if constexpr (kPairs)
      ByteValues<kPairs>(c.value.dtype, c.value.Bytes(b, k), s.value_at + j, Least(count, last - j), c.Dv,
                         reinterpret_cast<const char*>(s.zeros), n, s.logits + k * n * s.s_row + j / kPer, s.s_row,
                         s.sums + k * n * dv, dv, ask);
  }

  int64_t Neighbours() const { return AreBytes<kPairs>(c.value) ? kByteNeighbours : DirectNeighbours(n); }
  // Bytes are asked for as far ahead as values: for these, while keys are read, and the other way round.
  int64_t KeyNeighbours(int64_t otherwise) const { return AreBytes<kPairs>(c.key) ? kByteNeighbours : otherwise; }
  static int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }

  // How many rows before they are taken they are asked for, where `together` of each head are read in turn.
  int64_t AskedRows(const View& x, int64_t width, int64_t together) const {
    const int64_t bytes = width * ItemSize(x.dtype) * (HeadsInRow(c, x) ? c.K : 1);
    return together + (bytes > 0 && kAskedBytes > bytes ? kAskedBytes / bytes - 1 : 0);
  }

  void ScaleDots(int64_t k) const {
    if (c.key_scale) ScaleColumns(s.key_scale + k * kb, n, first, last, s.logits + k * n * s.s_row, s.s_row);
  }

  const float* ValueFactors(int64_t k) const { return c.value_scale ? s.value_scale + k * kb : nullptr; }

  // Weights are multiplied by `factors`, or null.
  void Soften(int64_t k, const float* nan_marker, const float* factors) const {
    const int64_t c0 = first / kLanes * kLanes, c1 = RoundUp(last, kLanes);
    for (int64_t r0 = k * n; r0 < (k + 1) * n; r0 += kTileRows) {
      const int64_t count = (k + 1) * n - r0 < kTileRows ? (k + 1) * n - r0 : kTileRows;
      Softmax<kPairs>(c, RowAt(c, b, k, r0 - k * n), count, j0, c0, c1, nan_marker, s.tmp,
                      {s.logits + r0 * s.s_row, s.m + r0, s.l + r0, s.acc + r0 * dv, s.s_row, dv, factors},
                      [&](int64_t r) { return ranges.Within(r0 + r, j0, width); });
    }
  }

  // From the products of a head on, with packed values. Those that are not finite are kept apart from the rows to which
  // they are masked.
  void Packed(int64_t k) const {
    const int64_t units = Units<kPairs>(width), from = first / kLanes * kLanes / kPer, to = Units<kPairs>(last);
    float* nan_marker = IsMasked(c) ? s.own.nan_marker : nullptr;
    bool any = PackValuesOf<kPairs>(c, b, k, j0, j0 + first, width, s.stage, nan_marker, s.own.values);
    const float* factors = kPairs ? ValueFactors(k) : nullptr;  // floats are multiplied as they are packed
    if (factors != nullptr && nan_marker != nullptr)
      for (int64_t j = first; j < last; ++j) {
        nan_marker[j] += factors[j] * 0.0f;
        any = any || nan_marker[j] != 0.0f;
      }
    Soften(k, any ? nan_marker : nullptr, factors);
    for (int64_t p = 0; p < Panels(c.Dv); ++p)
      Gemm<kPairs, true>(n, to - from, s.logits + k * n * s.s_row + from, s.s_row, 1,
                         s.own.values + (p * units + from) * kPanel, s.acc + k * n * dv + p * kPanel, dv);
  }

  // Where a value is not finite and its key may be masked, whose weight of 0 gives NaN: once more, with packed values.
  // The max stays as it is; the sum is what it was without this block.
  void Again(int64_t k) const {
    for (int64_t r = k * n; r < (k + 1) * n; ++r)
      s.l[r] = s.before_l[r] * (s.m[r] > s.before_m[r] ? __builtin_expf(s.before_m[r] - s.m[r]) : 1.0f);
    if (AreBytes<kPairs>(c.key)) {
      for (int64_t j = first; j < last; j += kDirectTile)
        DotBytes(k, j, Least(kDirectTile, last - j), c.key.Bytes(b, k));
    } else {
      DirectDots<kPairs>(c, b, k, n, s.q + k * n * s.q_row, s.q_row, j0, first, last, s.stage,
                         s.logits + k * n * s.s_row, s.s_row);
    }
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
    for (int64_t k = 0; k < c.K; ++k) Soften(k, nullptr, ValueFactors(k));
    Values();
    for (int64_t k = 0; k < c.K; ++k) AddSums(k);
  }
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
