// Forward of some query rows (a group of heads that shares its keys, a few new tokens): keys and values are read in
// place, for packing them would take longer than the products. What is packed are the rows: a key's element is repeated
// in all lanes and multiplied by a vector of rows, so that max and sum of a row are not over lanes either.
//
// Products are summed in the order of those with packed keys, and so have their bits.
#pragma once

#include "call.h"
#include "cpu/ahead-inl.h"
#include "cpu/arrays-inl.h"
#include "cpu/forward_plan-inl.h"
#include "cpu/gemm-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/softmax-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// The n rows of each key head as panels [element][row].
inline void PackNarrow(const Call& c, const ForwardScratch<false>& s, int64_t n) {
  const int64_t columns = Panels(n) * kPanel;
  for (int64_t k = 0; k < c.K; ++k)
    for (int64_t r = 0; r < columns; ++r) {
      float* to = s.q_panels + (k * columns + r / kPanel * kPanel) * c.D + r % kPanel;
      const float* q = s.q + (k * n + r) * s.q_row;
      for (int64_t d = 0; d < c.D; ++d) to[d * kPanel] = r < n ? q[d] : 0.0f;
    }
}

// The rows of all key heads (n of each, one head after the other in the scratch) over `count` keys from j0 on, after
// which `next` are read.
struct NarrowBlock {
  const Call& c;
  const ForwardScratch<false>& s;
  int64_t b, n, j0, count, next;
  int64_t columns = Panels(n) * kPanel, dv = Panels(c.Dv) * kPanel;

  // Rows of keys or values in floats: in place, or in `own`.
  struct Floats {
    const float* first;
    int64_t row;
  };
  Floats Read(const View& x, int64_t k, int64_t width, bool vectors, float* own) const {
    if (x.dtype == DType::kF32 && (!vectors || width % kLanes == 0)) return {x.At<float>(b, k, j0), x.row};
    const int64_t row = RoundUp(width, kLanes);
    for (int64_t j = 0; j < count; ++j) {
      LoadRow(x.Bytes(b, k, j0 + j), x.dtype, x.col, width, own + j * row);
      Fill(own + j * row, width, row, 0.0f);
    }
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
    for (int64_t j = 0; j < count; ++j) {
      F y = Rounded(Load(x + j * columns) * scale);
      if (kMasked) y = OnlyVisible(lo, hi, j, marks == nullptr ? y : y + Set(marks[j]), masked);
      most = Max(most, y);
      Store(x + j * columns, y);
    }
    F sum = Set(0.0f), other = sum;
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
      const F y = Exp(Load(x + j * columns) - most), z = Exp(Load(x + (j + 1) * columns) - most);
      Store(x + j * columns, y);
      Store(x + (j + 1) * columns, z);
      sum = sum + y, other = other + z;
    }
    if (j < count) {
      const F y = Exp(Load(x + j * columns) - most);
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

  void Head(int64_t k, Ahead* ahead) const {
    const Floats keys = Read(c.key, k, c.D, false, s.own.keys);
    Floats values = Read(c.value, k, c.Dv, true, s.own.values);
    const float* marks = IsMasked(c) && Clean(&values, s.own.values, s.own.nan_marker) ? s.own.nan_marker : nullptr;
    for (int64_t j = 0; j < count; j += kRows) {
      const int64_t rows = j + kRows < count ? kRows : count - j;
      for (int64_t p = 0; p < columns; p += kPanel) {
        ahead->Some();
        GemmColumns<false, false>({0, n - p}, rows, c.D, keys.first + j * keys.row, keys.row, 1,
                                  s.q_panels + (k * columns + p) * c.D, s.weights + j * columns + p, columns);
      }
    }
    for (int64_t r = 0; r < n; r += kLanes) {
      if (IsMasked(c)) {
        Soften<true>(k, r, marks);
      } else {
        Soften<false>(k, r, nullptr);
      }
    }
    for (int64_t p = 0; p < c.Dv; p += kPanel)
      for (int64_t r = 0; r < n; r += kRows) {
        ahead->Some();
        GemmColumns<false, true>({0, c.Dv - p}, n - r < kRows ? n - r : kRows, count, s.weights + r, 1, columns,
                                 values.first + p, s.acc + (k * n + r) * dv + p, dv, values.row);
      }
  }

  void Run() const {
    Ahead ahead;
    const auto then = [&](View x,
                          int64_t width) {  // where the rows of all heads lie
                                            // side by side, as if of one
      if (x.row != c.K * width || (c.K > 1 && x.head != width)) return;
      const int64_t from = j0 + count, end = from + next < c.Skv ? from + next : c.Skv;
      x.row = width;
      ahead.Add(x, b, 0, from * c.K, (end - from) * c.K, width);
    };
    then(c.key, c.D);
    then(c.value, c.Dv);
    const int64_t row_tiles = (n + kRows - 1) / kRows, key_tiles = (count + kRows - 1) / kRows;
    ahead.Spread(c.K * (key_tiles * Panels(n) + Panels(c.Dv) * row_tiles));
    for (int64_t k = 0; k < c.K; ++k) Head(k, &ahead);
  }
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
