// Heads of one row and one key, plain, a vector of them at a time. The time is that of reading and writing rows, so what
// surrounds them is done for many heads together.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/direct_dots-inl.h"
#include "cpu/exact_out-inl.h"
#include "cpu/forward_results-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/small-inl.h"
#include "cpu/small_backward-inl.h"
#include "cpu/softmax-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

inline bool TakesOneKey(const Call& c) { return c.Skv == 1 && c.G() * c.Sq == 1 && !c.pages && AreWeightsPlain(c); }

// Up to kLanes heads, the first of them and those after it.
class Heads {
 public:
  Heads(const Call& c, int64_t first, int64_t count) : heads_of_entry_(c.K), first_(first), count_(count) {}

  int64_t count() const { return count_; }

  // Calls what(i, place) with where the row of each lies in an array.
  template <typename What>
  JAX_FA_INLINE void Each(const View& x, const What& what) const {
    const int64_t step = x.head * ItemSize(x.dtype);
    int64_t b = first_ / heads_of_entry_, n = first_ % heads_of_entry_;
    for (int64_t i = 0; i < count_; ++b, n = 0)
      for (char* p = x.Bytes(b, n); n < heads_of_entry_ && i < count_; ++n, ++i, p += step) what(i, p);
  }

  // The same with the row.
  template <typename What>
  JAX_FA_INLINE void EachRow(const What& what) const {
    for (int64_t i = 0; i < count_; ++i)
      what(i, Row{(first_ + i) / heads_of_entry_, (first_ + i) % heads_of_entry_, 0});
  }

 private:
  const int64_t heads_of_entry_, first_, count_;
};

// Whether a row is whole vectors.
inline bool AreVectors(const View& x, int64_t width) { return x.col == 1 && width % kLanes == 0; }

// Their rows of an array in floats, filled up with zeros to whole vectors: in place, or in `own`.
struct HeadRows {
  const float* of[kLanes];
  const float* operator[](int64_t i) const { return of[i]; }

  HeadRows(const Heads& heads, const View& x, int64_t width, float* own) {
    const int64_t stride = RoundUp(width, kLanes);
    if (AreFloatRows(x, width)) {
      heads.Each(x, [&](int64_t i, const char* place) { of[i] = reinterpret_cast<const float*>(place); });
      return;
    }
    for (int64_t i = 0; i < heads.count(); ++i) of[i] = own + i * stride;
    if (!AreVectors(x, width)) {
      heads.Each(x,
                 [&](int64_t i, const char* place) { LoadWholeRow(place, x.dtype, x.col, width, own + i * stride); });
      return;
    }
    WithElements<false>(x.dtype, [&](auto elements) {
      heads.Each(x, [&](int64_t i, const char* place) {
        for (int64_t d = 0; d < width; d += kLanes)
          Store(own + i * stride + d, LoadAs<false, decltype(elements)::kOf>(place, d));
      });
    });
  }
};

inline void LoadStatistic(const Heads& heads, const View& x, float* to) {
  heads.Each(x, [&](int64_t i, char* place) { to[i] = *reinterpret_cast<const float*>(place); });
}

inline void StoreStatistic(const Heads& heads, const float* from, const View& x) {
  heads.Each(x, [&](int64_t i, char* place) { *reinterpret_cast<float*>(place) = from[i]; });
}

template <DType kType>
JAX_FA_INLINE void StoreAs(char* p, int64_t i, F x) {
  if constexpr (kType == DType::kF32) {
    Store(reinterpret_cast<float*>(p) + i, x);
  } else if constexpr (kType == DType::kBF16) {
    StoreBF16(reinterpret_cast<uint16_t*>(p) + i, x);
  } else {
    StoreF16(reinterpret_cast<uint16_t*>(p) + i, x);
  }
}

// row(i) times its factor.
template <typename RowOf>
inline void StoreRows(const Heads& heads, const RowOf& row, const float* factors, const View& to, int64_t width) {
  if (!to) return;
  if (!AreVectors(to, width))
    return heads.Each(to,
                      [&](int64_t i, char* place) { StoreRow(row(i), factors[i], place, to.dtype, to.col, width); });
  WithElements<false>(to.dtype, [&](auto elements) {
    heads.Each(to, [&](int64_t i, char* place) {
      const float* from = row(i);
      const F factor = Set(factors[i]);
      for (int64_t d = 0; d < width; d += kLanes) StoreAs<decltype(elements)::kOf>(place, d, Load(from + d) * factor);
    });
  });
}

inline void ReadRanges(const Call& c, const SmallScratch& s, const Heads& heads) {
  if (IsMasked(c)) heads.EachRow([&](int64_t i, const Row& row) { ReadRange(c, s, row, i); });
}

// The key weighs 1 or nothing, or NaN.
inline void OneKeyForward(const Call& c, const SmallScratch& s, const Heads& heads) {
  const HeadRows q(heads, c.query, c.D, s.q), keys(heads, c.key, c.D, s.keys);
  const HeadRows values(heads, c.value, c.Dv, s.values);
  RowDots(heads.count(), q, keys, c.D, s.p);
  F x = Rounded(Load(s.p) * Set(c.scale));
  ReadRanges(c, s, heads);
  if (IsMasked(c)) x = OnlyVisible(Load(s.lo), Load(s.hi), 0, x, Set(-__builtin_inff()));
  const F m = Max(Set(-kFloatMax), x), l = Exp(x - m);
  Store(s.m, Select(Equal(l, l), m, l));
  Store(s.l, l);
  Fill(s.sums, 0, s.row, 0.0f);
  const auto row = [&](int64_t i) { return s.l[i] == 0.0f ? s.sums : values[i]; };
  if (c.rounding || c.sinks)
    return heads.EachRow([&](int64_t i, const Row& at) { StoreResult(c, at, row(i), s.m[i], s.l[i]); });
  StoreRows(heads, row, s.l, c.out, c.Dv);
  StoreStatistic(heads, s.m, c.m);
  StoreStatistic(heads, s.l, c.l);
}

// What is masked adds nothing, whatever it is.
inline void OneKeyBackward(const Call& c, const SmallScratch& s, const Heads& heads) {
  const int64_t n = heads.count();
  const HeadRows q(heads, c.query, c.D, s.q), keys(heads, c.key, c.D, s.keys);
  const HeadRows values(heads, c.value, c.Dv, s.values), dout(heads, c.dout, c.Dv, s.dout);
  HeadRows out(heads, c.out, c.Dv, s.out);
  if (c.rounding)
    heads.EachRow(
        [&](int64_t i, const Row& row) { out.of[i] = ExactOut(c, row, s.out + i * RoundUp(c.Dv, kLanes), s.sums); });
  RowDots(n, q, keys, c.D, s.p);
  RowDots(n, dout, values, c.Dv, s.ds);
  RowDots(n, dout, out, c.Dv, s.delta);
  LoadStatistic(heads, c.m, s.m);
  LoadStatistic(heads, c.l, s.l);
  const F l = Load(s.l), none = Set(0.0f);
  Store(s.inverse, Select(IsZero(l), none, Set(1.0f) / l));
  if (c.dlogsumexp) {
    LoadStatistic(heads, c.dlogsumexp, s.l);
    Store(s.delta, Load(s.delta) - Load(s.l));
  }
  ReadRanges(c, s, heads);
  if (IsMasked(c)) {
    PlainGradients<true>(c, s, n);
  } else {
    PlainGradients<false>(c, s, n);
  }
  Store(s.ds, Load(s.ds) * Set(c.scale));
  Fill(s.sums, 0, s.row, 0.0f);
  const auto visible = [&](const HeadRows& rows) {
    return [&](int64_t i) { return !IsMasked(c) || (s.lo[i] <= 0.0f && s.hi[i] >= 1.0f) ? rows[i] : s.sums; };
  };
  StoreRows(heads, visible(keys), s.ds, c.dquery, c.D);
  StoreRows(heads, visible(q), s.ds, c.dkey, c.D);
  StoreRows(heads, visible(dout), s.p, c.dvalue, c.Dv);
}

// Calls what(c, scratch, heads) for all of them.
template <typename What>
inline void RunOneKey(const Call& c, const Runner& runner, const What& what) {
  const int64_t heads = c.B * c.K;
  RunSmall(c, runner, (heads + kLanes - 1) / kLanes, HeadsOfTask(c) / kLanes, [&](const SmallScratch& s, int64_t i) {
    const int64_t first = i * kLanes;
    what(c, s, Heads(c, first, heads - first < kLanes ? heads - first : kLanes));
  });
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
