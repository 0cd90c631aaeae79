// Heads of few rows and few keys, of which there are many: the time is that of what surrounds the products. They are
// computed in floats whatever the dtype, from rows as they are, several heads a task.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/backward_plan-inl.h"
#include "cpu/gemm-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/scratch-inl.h"
#include "cpu/simd-inl.h"
#include "cpu/softmax-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

inline bool IsSmall(const Call& c) {
  const int64_t rows = c.G() * c.Sq, width = c.D > c.Dv ? c.D : c.Dv;
  const int64_t most = InPairs(c) ? KeysOf(kSmallPairRows, width) : KeysOf(kSmallRows, width);
  return rows > 0 && rows <= most && c.Skv > 0 && c.Skv <= most && !c.pages;
}

// A head's rows in floats, each filled up with zeros to whole vectors.
struct FloatRows {
  const float* first;
  int64_t stride;
  const float* operator[](int64_t i) const { return first + i * stride; }
};

// Products, weights and ds: where an element of a row and a key is. Plain ones are made for a vector of rows at a time, so
// that no sum or max is one over lanes.
struct SmallLayout {
  bool plain;
  int64_t of_row, of_key;

  explicit SmallLayout(const Call& c)
      : plain(AreWeightsPlain(c)),
        of_row(plain ? 1 : RoundUp(c.Skv, kLanes)),
        of_key(plain ? RoundUp(c.G() * c.Sq, kLanes) : 1) {}
};

struct SmallScratch : GradientRows {
  const SmallLayout layout;
  float *q, *keys, *values, *out, *dout, *sums;  // rows
  float *p, *ds, *l, *lo, *hi;                   // lo, hi: the visible keys, as floats
  float* key_marks;                              // NaN for each key whose value is not finite
  int64_t row;

  explicit SmallScratch(const Call& c)
      : layout(c), row(RoundUp(c.D > c.Dv ? c.D : c.Dv, kLanes)), memory([&](Arena& arena) {
          const int64_t n = c.G() * c.Sq, n_up = RoundUp(n, kLanes), keys_up = RoundUp(c.Skv, kLanes);
          q = arena.Take(n_up * row);
          out = arena.Take(n_up * row);
          dout = arena.Take(n_up * row);
          keys = arena.Take(keys_up * row);
          values = arena.Take(keys_up * row);
          sums = arena.Take((n_up > keys_up ? n_up : keys_up) * row);
          p = arena.Take(n_up * keys_up);
          ds = arena.Take(n_up * keys_up);
          slope = arena.Take(keys_up);
          by_cap = arena.Take(keys_up);
          products = arena.Take(keys_up);
          tmp = arena.Take(keys_up);
          stage = arena.Take(3 * row);
          key_marks = arena.Take(keys_up);
          m = arena.Take(n_up);
          l = arena.Take(n_up);
          inverse = arena.Take(n_up);
          delta = arena.Take(n_up);
          lo = arena.Take(n_up);
          hi = arena.Take(n_up);
        }) {}

 private:
  const ThreadParts memory;  // the last member, as it fills in those above
};

inline bool AreFloatRows(const View& x, int64_t width) {
  return x.dtype == DType::kF32 && x.col == 1 && width % kLanes == 0;
}

// How many of n rows begin in one set of the first cache, which holds what is 4 KiB apart.
inline int64_t InOneSet(int64_t n, int64_t floats_apart) {
  const int64_t power = floats_apart & -floats_apart;
  return power < 1024 ? n * power / 1024 : n;
}

// Rows i < n of an array, the first of head h, each head having `length`: in place if they are such already, else in
// `own`. With `marks`, those that are not all finite are 0, and NaN is added to their marks.
inline FloatRows ReadRows(const View& x, int64_t b, int64_t h, int64_t n, int64_t length, int64_t width, float* own,
                          float* marks = nullptr) {
  const int64_t stride = RoundUp(width, kLanes);
  const auto finite = [&](const FloatRows& rows) {
    F sum = Set(0.0f);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t d = 0; d < stride; d += kLanes) sum = Fma(Load(rows[i] + d), Set(0.0f), sum);
    return Sum(sum) == 0.0f;
  };
  if (const int64_t apart = n <= length ? x.row : x.head;
      AreFloatRows(x, width) && (n <= length || length == 1) &&
      (InOneSet(n, apart) <= kSmallInPlace || width > kSmallCopied)) {
    const FloatRows rows{x.At<float>(b, h), apart};
    if (marks == nullptr || finite(rows)) return rows;
  }
  for (int64_t i = 0, at = 0; i < n; ++i, ++at) {
    if (at == length) at = 0, ++h;
    LoadWholeRow(x.Bytes(b, h, at), x.dtype, x.col, width, own + i * stride);
  }
  const FloatRows rows{own, stride};
  if (marks == nullptr || finite(rows)) return rows;
  for (int64_t i = 0; i < n; ++i) {
    const float mark = ZeroOrNaN(rows[i], stride);
    if (mark == 0.0f) continue;
    Fill(own + i * stride, 0, stride, 0.0f);
    marks[i] += mark;
  }
  return rows;
}

// The products of kCount rows of x with four of y.
template <int kCount>
JAX_FA_INLINE void DotTile(const float* x, int64_t x_stride, const float* const* y, int64_t width, float* to,
                           int64_t to_row) {
  F sums[kCount][4];
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[r][i] = Set(0.0f);
  for (int64_t d = 0; d < width; d += kLanes) {
    F rows[kCount];
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) rows[r] = Load(x + r * x_stride + d);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const F column = Load(y[i] + d);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) sums[r][i] = Fma(rows[r], column, sums[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) SumFour(sums[r], to + r * to_row);
}

// The products of n rows of x with m rows of y, in columns up to a multiple of four.
inline void Dots(int64_t n, const FloatRows& x, int64_t m, const FloatRows& y, int64_t width, float* to,
                 int64_t to_row) {
  for (int64_t j = 0; j < m; j += 4) {
    const float* columns[4];
    for (int64_t i = 0; i < 4; ++i) columns[i] = y[j + i < m ? j + i : m - 1];
    int64_t r = 0;
    if (kTarget.registers >= 32)
      for (; r + 4 <= n; r += 4) DotTile<4>(x[r], x.stride, columns, width, to + r * to_row + j, to_row);
    for (; r + 2 <= n; r += 2) DotTile<2>(x[r], x.stride, columns, width, to + r * to_row + j, to_row);
    if (r < n) DotTile<1>(x[r], x.stride, columns, width, to + r * to_row + j, to_row);
  }
}

// The product of each of n rows of x with that of y, in the order of sums of the above; up to a multiple of four.
template <typename X, typename Y>
inline void RowDots(int64_t n, const X& x, const Y& y, int64_t width, float* to) {
  for (int64_t r = 0; r < n; r += 4) {
    F sums[4];
    const float *a[4], *b[4];
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t at = r + i < n ? r + i : n - 1;
      a[i] = x[at], b[i] = y[at], sums[i] = Set(0.0f);
    }
    for (int64_t d = 0; d < width; d += kLanes)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[i] = Fma(Load(a[i] + d), Load(b[i] + d), sums[i]);
    SumFour(sums, to + r);
  }
}

// The products of n rows with all keys, as the layout has them.
inline void Dots(const Call& c, const SmallLayout& to, int64_t n, const FloatRows& rows, const FloatRows& keys,
                 int64_t width, float* products) {
  if (to.plain) {
    Dots(c.Skv, keys, n, rows, width, products, to.of_key);
  } else {
    Dots(n, rows, c.Skv, keys, width, products, to.of_row);
  }
}

// The range of visible keys of a row, as floats.
inline void ReadRange(const Call& c, const SmallScratch& s, const Row& row, int64_t r) {
  const Range v = Visible(c, row);
  s.lo[r] = static_cast<float>(v.lo);
  s.hi[r] = static_cast<float>(v.hi);
}

// c[i] = sum over k < K of weights a(i, k) times row k of b, i < n, of which `width` columns count.
inline void Combination(int64_t n, int64_t K, const float* a, int64_t a_row, int64_t a_k, const FloatRows& b,
                        int64_t width, float* c, int64_t c_row) {
  for (int64_t d = 0; d < width; d += kPanel)
    GemmColumns<false, false>({0, width - d}, n, K, a, a_row, a_k, b.first + d, c + d, c_row, b.stride);
}

// Heads of which a task takes about kSmallTask elements.
inline int64_t HeadsOfTask(const Call& c) { return kSmallTask / ((c.G() * c.Sq + c.Skv) * (c.D + c.Dv)); }

// Calls what(scratch, i) for all i < count, up to `each` of them a task.
template <typename What>
inline void RunSmall(const Call& c, const Runner& runner, int64_t count, int64_t each, const What& what) {
  each = each < 1 ? 1 : each;
  Run(runner, (count + each - 1) / each, [&](int64_t task) {
    SmallScratch s(c);
    for (int64_t i = task * each; i < count && i < (task + 1) * each; ++i) what(s, i);
  });
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
