// The backward of small heads: see backward-inl.h.
#pragma once

#include "call.h"
#include "cpu/backward-inl.h"
#include "cpu/backward_rows-inl.h"
#include "cpu/backward_sums-inl.h"
#include "cpu/bias_parts-inl.h"
#include "cpu/groups-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/small-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// delta as in Deltas: where out is a value, its product with dout and that value's have the same bits.
inline void SmallDeltas(const Call& c, const SmallScratch& s, int64_t b, int64_t h, int64_t n, const FloatRows& dout) {
  const FloatRows out = ReadRows(c.out, b, h, n, c.Sq, c.Dv, s.out);
  if (c.rounding) {  // then out is of 16 bits, and its rows are copies
    const FloatRows rest = ReadRows(c.rounding, b, h, n, c.Sq, c.Dv, s.sums);
    const F unit = Set(RoundingUnit(c));
    Combine(n * out.stride, s.out, rest.first, [&](F x, F lost) { return Fma(lost, unit, x); });
  }
  RowDots(n, dout, out, c.Dv, s.delta);
  Row row{b, h, 0};
  for (int64_t r = 0; c.dlogsumexp && r < n; ++r, row = After(c, row))
    s.delta[r] -= *c.dlogsumexp.At<float>(b, row.n, row.i);
}

// Products q.k and dout.v of plain rows to weights and ds.
template <bool kMasked>
inline void PlainGradients(const Call& c, const SmallScratch& s, int64_t n) {
  const F scale = Set(c.scale), none = Set(0.0f);
  for (int64_t r = 0; r < n; r += kLanes) {
    const F m = Load(s.m + r), inverse = Load(s.inverse + r), delta = Load(s.delta + r);
    F lo = none, hi = none;
    if (kMasked) lo = Load(s.lo + r), hi = Load(s.hi + r);
    for (int64_t j = 0; j < c.Skv; ++j) {
      float *p = s.p + j * s.layout.of_key + r, *ds = s.ds + j * s.layout.of_key + r;
      const F w = Weight(Load(p), scale, m) * inverse, by_logit = w * (Load(ds) - delta);
      Store(p, kMasked ? OnlyVisible(lo, hi, j, w, none) : w);
      Store(ds, kMasked ? OnlyVisible(lo, hi, j, by_logit, none) : by_logit);
    }
  }
}

inline void SmallBackwardHead(const Call& c, const SmallScratch& s, int64_t b, int64_t k, const HeadSums& sums) {
  const int64_t n = c.G() * c.Sq, h = k * c.G();
  const Row first{b, h, 0};
  Row row = first;
  for (int64_t r = 0; r < n; ++r, row = After(c, row)) ReadStatistics(c, row, s.m + r, s.inverse + r);
  const bool masked = IsMasked(c);
  float* const marks = masked ? s.inverse : nullptr;
  const FloatRows q = ReadRows(c.query, b, h, n, c.Sq, c.D, s.q, marks);
  const FloatRows dout = ReadRows(c.dout, b, h, n, c.Sq, c.Dv, s.dout, marks);
  const FloatRows keys = ReadRows(c.key, b, k, c.Skv, c.Skv, c.D, s.keys, masked ? s.key_marks : nullptr);
  const FloatRows values = ReadRows(c.value, b, k, c.Skv, c.Skv, c.Dv, s.values);
  const bool plain = s.layout.plain;
  const int64_t of_row = s.layout.of_row, of_key = s.layout.of_key;
  Dots(c, s.layout, n, q, keys, c.D, s.p);
  Dots(c, s.layout, n, dout, values, c.Dv, s.ds);
  SmallDeltas(c, s, b, h, n, dout);
  if (!plain) {
    row = first;
    for (int64_t r = 0; r < n; ++r, row = After(c, row))
      RowGradients(c, s, row, r, 0, Visible(c, row), 0, of_row, s.p + r * of_row, s.ds + r * of_row, sums);
  } else if (masked) {
    row = first;
    for (int64_t r = 0; r < n; ++r, row = After(c, row)) ReadRange(c, s, row, r);
    PlainGradients<true>(c, s, n);
  } else {
    PlainGradients<false>(c, s, n);
  }
  if (c.dquery) {
    Combination(n, c.Skv, s.ds, of_row, of_key, keys, c.D, s.sums, s.row);
    row = first;
    for (int64_t r = 0; r < n; ++r, row = After(c, row))
      StoreRow(s.sums + r * s.row, ScaleOf(c, row), c.dquery.Bytes(b, row.n, row.i), c.dquery.dtype, c.dquery.col, c.D);
  }
  const auto store = [&](const View& to, const float* weights, const FloatRows& rows, int64_t width, float scale) {
    if (!to) return;
    Combination(c.Skv, n, weights, of_key, of_row, rows, width, s.sums, s.row);
    for (int64_t j = 0; j < c.Skv; ++j) StoreRow(s.sums + j * s.row, scale, to.Bytes(b, k, j), to.dtype, to.col, width);
  };
  const bool one_scale = HaveOneScale(c, b, k);
  if (!one_scale) {
    row = first;
    for (int64_t r = 0; r < n; ++r, row = After(c, row)) Rescale(ScaleOf(c, row), of_row, s.ds + r * of_row);
  }
  store(c.dkey, s.ds, q, c.D, one_scale ? ScaleOf(c, first) : 1.0f);
  store(c.dvalue, s.p, dout, c.Dv, 1.0f);
}

inline void SmallBackward(const Call& c, const Runner& runner) {
  HeadGroups groups(c);
  const AllSums sums(c, 1);
  if (!groups.shared()) {
    RunSmall(c, runner, groups.count(), HeadsOfTask(c), [&](SmallScratch& s, int64_t head) {
      SmallBackwardHead(c, s, head / c.K, head % c.K, sums.Of(head, 0, true));
    });
  } else {
    CutGroups(c, kSmallBiasTasks, HeadsOfTask(c) > kLeastHeads ? HeadsOfTask(c) : kLeastHeads, &groups);
    const BiasParts bias(c, runner, groups);
    RunSmall(c, runner, groups.count(), 1, [&](SmallScratch& s, int64_t group) {
      const Call own = bias.Of(group);
      for (int64_t i = groups.Begin(group); i < groups.End(group); ++i) {
        const int64_t head = groups.Head(i);
        SmallBackwardHead(own, s, head / c.K, head % c.K, sums.Of(head, 0, i == groups.Begin(group)));
      }
    });
    bias.Add();
  }
  sums.Store();
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
