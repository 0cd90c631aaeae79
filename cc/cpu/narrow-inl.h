// Forward of some query rows (a group of heads that shares its keys, a few new tokens): keys and values are read in
// place, for packing them would take longer than the products. What is packed are the rows: a key's element is repeated
// in all lanes and multiplied by a vector of rows, so that max and sum of a row are not over lanes either.
//
// Products are summed in the order of those with packed keys, and so have their bits. Those of pairs take a key's neighbours as
// they lie, and values of two keys at a time, which are packed.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/forward_plan-inl.h"
#include "cpu/gemm-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/softmax-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Asks for the keys and values of the next block, evenly over the steps of this one's products: asked for many at a time, the
// processor waits for the first of them.
class NextBlock {
 public:
  struct Part {
    const char* at;
    int64_t step;
    JAX_FA_INLINE void Some() {
      __builtin_prefetch(at, 0, 2);
      at += step;
    }
  };

  void Add(const char* data, int64_t bytes) {
    spans_[count_++] = {data, bytes};
    left_ += bytes;
  }
  void Spread(int64_t steps) { step_ = count_ > 0 ? left_ / (steps > 0 ? steps : 1) + 1 : 0; }

  // The part of the next `steps`.
  Part Take(int64_t steps) {
    if (at_ == count_) return {reinterpret_cast<const char*>(this), 0};
    Span& span = spans_[at_];
    const Part part{span.data, step_};
    span.data += steps * step_, span.bytes -= steps * step_;
    if (span.bytes <= 0) ++at_;
    return part;
  }

 private:
  struct Span {
    const char* data;
    int64_t bytes;
  };
  Span spans_[2];
  int count_ = 0, at_ = 0;
  int64_t left_ = 0, step_ = 0;
};

// The n rows of each key head as columns [unit][row].
template <bool kPairs>
inline void PackNarrow(const Call& c, const ForwardScratch<kPairs>& s, int64_t n) {
  const int64_t columns = RoundUp(n, kLanes), depth = Units<kPairs>(c.D);
  for (int64_t k = 0; k < c.K; ++k)
    for (int64_t r = 0; r < columns; ++r) {
      float* to = s.q_panels + k * columns * depth + r;
      const float* q = s.q + (k * n + r) * s.q_row;
      for (int64_t d = 0; d < depth; ++d) to[d * columns] = r < n ? q[d] : 0.0f;
    }
}

// The rows of all key heads (n of each, one head after the other in the scratch) over `count` keys from j0 on, after
// which `next` are read.
template <bool kPairs>
struct NarrowBlock {
  const Call& c;
  const ForwardScratch<kPairs>& s;
  int64_t b, n, j0, count, next;
  int64_t columns = RoundUp(n, kLanes), dv = Panels(c.Dv) * kPanel;

  // Rows of keys or values in floats: in place, or in `own`.
  struct Floats {
    const float* first;
    int64_t row;
  };
  Floats Read(const View& x, int64_t k, int64_t width, bool vectors, float* own) const {
    if (x.dtype == DType::kF32 && (!vectors || width % kLanes == 0)) return {x.At<float>(b, k, j0), x.row};
    const int64_t row = RoundUp(width, kLanes);
    for (int64_t j = 0; j < count; ++j) LoadWholeRow(x.Bytes(b, k, j0 + j), x.dtype, x.col, width, own + j * row);
    return {own, row};
  }

  // In masked calls values that are not all finite are 0, and have a NaN in `marks`. Returns whether there are any.
  bool Clean(Floats* values, float* own, float* marks) const {
    bool any = false;
    for (int64_t j = 0; j < count; ++j) {
      marks[j] = ZeroOrNaN(values->first + j * values->row, c.Dv);
      any = any || marks[j] != 0.0f;
    }
    if (!any) return false;
    const int64_t row = RoundUp(c.Dv, kLanes);
    for (int64_t j = 0; j < count; ++j) {
      float* to = own + j * row;
      if (to != values->first + j * values->row)
        __builtin_memcpy(to, values->first + j * values->row, sizeof(float) * static_cast<size_t>(row));
      if (marks[j] != 0.0f) Fill(to, 0, row, 0.0f);
    }
    *values = {own, row};
    return true;
  }

  // A vector of rows, from r on, of products to weights.
  template <bool kMasked>
  void Soften(int64_t k, int64_t r, const float* marks) const {
    const F scale = Set(c.scale), masked = Set(-__builtin_inff());
    float *x = s.weights + r, *m = s.m + k * n + r, *l = s.l + k * n + r, *acc = s.acc + (k * n + r) * dv;
    const int lanes = static_cast<int>(n - r < kLanes ? n - r : kLanes);
    F lo = masked, hi = masked;
    if (kMasked) {
      float first[kLanes] = {}, end[kLanes] = {};
      for (int i = 0; i < lanes; ++i) {
        first[i] = static_cast<float>(s.lo[k * n + r + i] - j0);
        end[i] = static_cast<float>(s.hi[k * n + r + i] - j0);
      }
      lo = Load(first), hi = Load(end);
    }
    const F before = LoadFirst(m, lanes);
    F most = before;
    if (kMasked) {
      for (int64_t j = 0; j < count; ++j) {
        F y = Rounded(Load(x + j * columns) * scale);
        y = OnlyVisible(lo, hi, j, marks == nullptr ? y : y + Set(marks[j]), masked);
        most = Max(most, y);
        Store(x + j * columns, y);
      }
    } else {
      const F sign = Set(c.scale < 0.0f ? -1.0f : 1.0f);
      F a = masked, b = a;
      int64_t j = 0;
      for (; j + 2 <= count; j += 2) {
        a = Max(a, Load(x + j * columns) * sign);
        b = Max(b, Load(x + (j + 1) * columns) * sign);
      }
      if (j < count) a = Max(a, Load(x + j * columns) * sign);
      most = Max(most, Rounded(Max(a, b) * sign * scale));
    }
    const auto weight = [&](const float* at) { return kMasked ? Exp(Load(at) - most) : Weight(Load(at), scale, most); };
    F sum = Set(0.0f), other = sum;
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
      const F y = weight(x + j * columns), z = weight(x + (j + 1) * columns);
      Store(x + j * columns, y);
      Store(x + (j + 1) * columns, z);
      sum = sum + y, other = other + z;
    }
    if (j < count) {
      const F y = weight(x + j * columns);
      Store(x + j * columns, y);
      sum = sum + y;
    }
    const F one = Set(1.0f);  // the change of the first keys is a huge one
    const F factor = Select(Equal(before, most), one, Exp(Max(Set(-104.0f), before - most)));
    StoreFirst(m, most, lanes);
    StoreFirst(l, Fma(LoadFirst(l, lanes), factor, sum + other), lanes);
    float factors[kLanes];
    Store(factors, factor);
    for (int i = 0; i < lanes; ++i)
      if (factors[i] != 1.0f) Rescale(factors[i], dv, acc + i * dv);
  }

  // The next rows of keys come from the second cache, of each a few lines that the processor does not foresee.
  void AskForKeys(const Floats& keys, int64_t from, int64_t to) const {
    for (int64_t j = from; j < to && j < count; ++j)
      for (int64_t d = 0; d < c.D; d += 16) __builtin_prefetch(keys.first + j * keys.row + d);
  }

  // The keys as units, in place where they can be.
  Floats Keys(int64_t k) const {
    if constexpr (kPairs) {
      return {reinterpret_cast<const float*>(c.key.Bytes(b, k, j0)), c.key.row / 2};
    } else {
      return Read(c.key, k, c.D, false, s.own.keys);
    }
  }

  // The values of units of keys, a panel after the other where `panel` is the size of one. `marks`: see Clean.
  struct Values {
    Floats rows;
    int64_t panel;
    const float* marks;
  };
  Values ValuesOf(int64_t k) const {
    float* const marks = IsMasked(c) ? s.own.nan_marker : nullptr;
    if constexpr (kPairs) {
      const bool any = PackValues<kPairs>(c.value, c.Dv, b, k, j0, count, s.stage, marks, s.own.values);
      return {{s.own.values, kPanel}, Units<kPairs>(count) * kPanel, any ? marks : nullptr};
    } else {
      Floats rows = Read(c.value, k, c.Dv, true, s.own.values);
      const bool any = marks != nullptr && Clean(&rows, s.own.values, marks);
      return {rows, kPanel, any ? marks : nullptr};
    }
  }

  // Weights of a vector of rows, from x on, of two keys at a time as pairs.
  void JoinWeights(float* x) const {
    if constexpr (kPairs) {
      const F none = Set(0.0f);
      for (int64_t j = 0; j < count; j += 2) {
        const F second = j + 1 < count ? Load(x + (j + 1) * columns) : none;
        F pairs, rest;
        Unit<kPairs>::Interleave(Unit<kPairs>::Join(Load(x + j * columns), none), Unit<kPairs>::Join(second, none),
                                 &pairs, &rest);
        Store(x + j / 2 * columns, pairs);
      }
    }
  }

  void Head(int64_t k, NextBlock* next_block) const {
    const Floats keys = Keys(k);
    const int64_t depth = Units<kPairs>(c.D), key_units = Units<kPairs>(count);
    for (int64_t j = 0; j < count; j += kRows) {
      const int64_t rows = j + kRows < count ? kRows : count - j;
      for (int64_t p = 0; p < n; p += kPanel) {
        if (p == 0) AskForKeys(keys, j + kRows, j + 2 * kRows);
        GemmColumns<kPairs, false>({0, n - p}, rows, depth, keys.first + j * keys.row, keys.row, 1,
                                   s.q_panels + k * columns * depth + p, s.weights + j * columns + p, columns, columns,
                                   next_block->Take(depth));
      }
    }
    const Values values = ValuesOf(k);
    for (int64_t r = 0; r < n; r += kLanes) {
      if (IsMasked(c)) {
        Soften<true>(k, r, values.marks);
      } else {
        Soften<false>(k, r, nullptr);
      }
      JoinWeights(s.weights + r);
    }
    for (int64_t p = 0; p < c.Dv; p += kPanel)
      for (int64_t r = 0; r < n; r += kRows) {
        GemmColumns<kPairs, true>({0, c.Dv - p}, n - r < kRows ? n - r : kRows, key_units, s.weights + r, 1, columns,
                                  values.rows.first + p / kPanel * values.panel, s.acc + (k * n + r) * dv + p, dv,
                                  values.rows.row, next_block->Take(key_units));
      }
  }

  void Run() const {
    NextBlock next_block;
    const auto then = [&](const View& x, int64_t width) {  // where the rows of all heads lie side by side
      if (x.row != c.K * width || (c.K > 1 && x.head != width)) return;
      const int64_t from = j0 + count, end = from + next < c.Skv ? from + next : c.Skv;
      if (from < end) next_block.Add(x.Bytes(b, 0, from), (end - from) * x.row * ItemSize(x.dtype));
    };
    then(c.key, c.D);
    then(c.value, c.Dv);
    const int64_t row_tiles = (n + kRows - 1) / kRows, key_tiles = (count + kRows - 1) / kRows;
    next_block.Spread(c.K * (key_tiles * ((n + kPanel - 1) / kPanel) * Units<kPairs>(c.D) +
                             Panels(c.Dv) * row_tiles * Units<kPairs>(count)));
    for (int64_t k = 0; k < c.K; ++k) Head(k, &next_block);
  }
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
