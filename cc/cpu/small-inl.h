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

namespace jax_fa::JAX_FA_ISA {
namespace {

inline bool IsSmall(const Call& c) {
  const int64_t rows = c.G() * c.Sq;
  return rows > 0 && rows <= kSmallRows && c.Skv > 0 && c.Skv <= kSmallKeys;
}

// A head's rows in floats, each filled up with zeros to whole vectors.
struct FloatRows {
  const float* first;
  int64_t stride;
  const float* operator[](int64_t i) const { return first + i * stride; }
};

struct SmallScratch : GradientRows {
  float *q, *keys, *values, *out, *dout, *sums;  // rows
  float *p, *ds, *l;
  float* key_marks;  // NaN for each key whose value is not finite
  int64_t row, s_row;

  explicit SmallScratch(const Call& c)
      : row(RoundUp(c.D > c.Dv ? c.D : c.Dv, kLanes)), s_row(RoundUp(c.Skv, kLanes)), memory([&](Arena& arena) {
          const int64_t n = c.G() * c.Sq, most = n > c.Skv ? n : c.Skv;
          q = arena.Take(n * row);
          out = arena.Take(n * row);
          dout = arena.Take(n * row);
          keys = arena.Take(c.Skv * row);
          values = arena.Take(c.Skv * row);
          sums = arena.Take(most * row);
          p = arena.Take(n * s_row);
          ds = arena.Take(n * s_row);
          slope = arena.Take(s_row);
          by_cap = arena.Take(s_row);
          products = arena.Take(s_row);
          tmp = arena.Take(s_row);
          key_marks = arena.Take(s_row);
          m = arena.Take(RoundUp(n, 4));
          l = arena.Take(RoundUp(n, 4));
          inverse = arena.Take(RoundUp(n, 4));
          delta = arena.Take(RoundUp(n, 4));
        }) {}

 private:
  const ThreadParts memory;  // the last member, as it fills in those above
};

// Calls what(scratch, i) for all i < count, several a task.
template <typename What>
inline void RunSmall(const Call& c, const Runner& runner, int64_t count, const What& what) {
  const int64_t most = kThreadTasks * runner.threads, tasks = count < most ? count : most;
  Run(runner, tasks, [&](int64_t task) {
    SmallScratch s(c);
    for (int64_t i = count * task / tasks; i < count * (task + 1) / tasks; ++i) what(s, i);
  });
}

// Rows i < n of an array, the first of head h, each head having `length`: in place if they are such already, else in
// `own`. With `marks`, those that are not all finite are 0, and NaN is added to their marks.
inline FloatRows ReadRows(const View& x, int64_t b, int64_t h, int64_t n, int64_t length, int64_t width, float* own,
                          float* marks = nullptr) {
  const int64_t stride = RoundUp(width, kLanes);
  if (marks == nullptr && x.dtype == DType::kF32 && x.col == 1 && width == stride && (n <= length || length == 1))
    return {x.At<float>(b, h), n <= length ? x.row : x.head};
  for (int64_t i = 0, at = 0; i < n; ++i, ++at) {
    if (at == length) at = 0, ++h;
    float* to = own + i * stride;
    LoadRow(x.Bytes(b, h, at), x.dtype, x.col, width, to);
    Fill(to, width, stride, 0.0f);
    if (marks == nullptr) continue;
    const float mark = ZeroOrNaN(to, stride);
    if (mark == 0.0f) continue;
    Fill(to, 0, stride, 0.0f);
    marks[i] += mark;
  }
  return {own, stride};
}

// The sums over d of x[r + i][d] y[i][d], i < kRows, and of them four at a time over lanes.
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

// The products of n rows of x with m rows of y. Columns up to a multiple of four are written.
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

// The product of each of n rows of x with that of y, in the order of sums of the above.
inline void RowDots(int64_t n, const FloatRows& x, const FloatRows& y, int64_t width, float* to) {
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

// c[i] = sum over k < K of weights a(i, k) times row k of b, i < n, of which `width` columns count.
inline void Combination(int64_t n, int64_t K, const float* a, int64_t a_row, int64_t a_k, const FloatRows& b,
                        int64_t width, float* c, int64_t c_row) {
  for (int64_t d = 0; d < width; d += kPanel)
    GemmColumns<false, false>({0, width - d}, n, K, a, a_row, a_k, b.first + d, c + d, c_row, b.stride);
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
