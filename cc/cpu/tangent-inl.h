// Tangents of out and log-sum-exp, alone from the saved statistics or together with the forward.
//
//   w = exp(s - m),  l = sum w,  T: the tangent of s (see tangent_rows-inl.h),  tau = sum w T / l: that of log-sum-exp
//   out = sum w' v / l,  its tangent is (sum w' T v + sum w' v') / l - tau out,  w' = keep / keep_prob w
//
// The max is that of the products here: the forward may have had others (of few rows, of small heads, of pairs), and a large
// logit differs from itself by more than weights can bear.
//
// Blocks, tasks and the order of sums are those of the forward, so that together with it out, m and l have its bits, where
// its products are these (else it may run on its own: see RunTangent). What
// all T of a row have in common moves no weight, but rounding of it does, in both terms that then cancel. So T counts from
// a center: the mean of T over the first of the row's blocks that has any weight, and then over all so far whenever these have
// kGrown times the weight, where sums of w v say by how much those of w (T - center) v change. With ALiBi slopes the last
// blocks have nearly all of it, and T may be thousands away in those before.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/exact_out-inl.h"
#include "cpu/forward-inl.h"
#include "cpu/gemm-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/shared_blocks-inl.h"
#include "cpu/softmax-inl.h"
#include "cpu/tangent_plan-inl.h"
#include "cpu/tangent_rows-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

inline void PackTangentBlock(const Call& c, int64_t b, int64_t k, int64_t j0, int64_t width, float* stage,
                             TangentBlock* to) {
  PackTransposed<false>(c.key, c.D, b, k, j0, width, stage, to->keys);
  if (to->key_tangents != nullptr) PackTransposed<false>(c.key_tangent, c.D, b, k, j0, width, stage, to->key_tangents);
  const auto pack = [&](const View& x, float* panels, float* marker) {
    if (panels == nullptr) return static_cast<float*>(nullptr);
    float* const marked = IsMasked(c) ? marker : nullptr;
    return PackValues<false>(x, c.Dv, b, k, j0, width, stage, marked, panels) ? marker : nullptr;
  };
  to->nan_marker = pack(c.value, to->values, to->nan_marker);
  to->tangent_marker = pack(c.value_tangent, to->value_tangents, to->tangent_marker);
}

// Up to group_rows rows [g0, g0 + rows) of a task over one block of keys j0 + [0, width), and their tiles.
struct TangentGroup {
  int64_t b, k, r0, g0, j0, width;
  TangentBlock block;
  RowRanges ranges;
  int64_t count;
  RowTile tiles[kMostRows];
};

// The products q.k to logits, and a.k + q.b to tangents.
inline void TangentProducts(const Call& c, const TangentScratch& s, const TangentGroup& x) {
  const int64_t size = c.D * kPanel;
  for (int64_t p = 0; p < Panels(x.width); ++p) {
    const auto each_tile = [&](const float* next, const auto& fn) {
      for (int64_t t = 0; t < x.count; ++t) {
        const RowTile& tile = x.tiles[t];
        if (tile.to <= p * kPanel || tile.from >= (p + 1) * kPanel) continue;
        if (next != nullptr) Prefetch(next, size, t, x.count);
        fn(tile.n, (x.g0 + tile.r) * c.D, tile.r * s.s_row + p * kPanel);
      }
    };
    const float *keys = x.block.keys + p * size, *more = p + 1 < Panels(x.width) ? keys + size : nullptr;
    const float* tangents = x.block.key_tangents == nullptr ? nullptr : x.block.key_tangents + p * size;
    each_tile(tangents == nullptr ? more : tangents, [&](int64_t n, int64_t from, int64_t to) {
      Gemm<false, false>(n, c.D, s.q + from, c.D, 1, keys, s.logits + to, s.s_row);
      if (c.query_tangent) Gemm<false, false>(n, c.D, s.q_tangent + from, c.D, 1, keys, s.tangents + to, s.s_row);
    });
    if (tangents == nullptr) continue;
    each_tile(more, [&](int64_t n, int64_t from, int64_t to) {
      if (c.query_tangent) {
        Gemm<false, true>(n, c.D, s.q + from, c.D, 1, tangents, s.tangents + to, s.s_row);
      } else {
        Gemm<false, false>(n, c.D, s.q + from, c.D, 1, tangents, s.tangents + to, s.s_row);
      }
    });
  }
}

// The sum of f(j) over whole vectors from `from` to `to`. It does not change where f is 0 in more of them.
template <typename Fn>
inline float SumOver(int64_t from, int64_t to, const Fn& f) {
  F a = Set(0.0f), b = a;
  int64_t j = from;
  for (; j + 2 * kLanes <= to; j += 2 * kLanes) {
    a = a + f(j);
    b = b + f(j + kLanes);
  }
  if (j < to) a = a + f(j);
  return Sum(a + b);
}

// NaN if one of the keys v is marked and visible, whose logit then is not -inf; else 0.
inline float VisibleMarks(Range v, const float* logits, const float* marker) {
  float sum = 0.0f;
  for (int64_t j = v.lo; j < v.hi; ++j)
    if (logits[j] != -__builtin_inff()) sum += marker[j];
  return sum;
}

// Takes the center of row `at`, and its sums if there are any, to one that is larger by `by`.
inline void MoveCenter(const TangentPlan& plan, const TangentScratch& s, int64_t at, float by) {
  const float before = s.center[at];
  s.center[at] += by;
  if (!plan.sums || s.l[at] == 0.0f) return;
  const float change = before - s.center[at];  // as it has been rounded
  s.moved[at] += change * s.l[at];
  const F shift = Set(change);
  float *sums = s.acc + at * s.out_row, *to = s.acc_tangent + at * s.out_row;
  for (int64_t d = 0; d < s.out_row; d += kLanes) Store(to + d, Fma(shift, Load(sums + d), Load(to + d)));
}

// Turns row `at` of products with keys j0 + [c0, c1), of which v are visible, into weights w, and its tangents into
// w (T - center).
inline void TangentRow(const Call& c, const TangentPlan& plan, const TangentScratch& s, const TangentBlock& block,
                       const Row& row, int64_t at, int64_t j0, Range v, int64_t c0, int64_t c1, float* x, float* t) {
  if (v.Empty()) v = {c0, c0};
  if (plan.logits && !v.Empty()) ToTangentsOfX(c, row, j0, v.lo, v.hi, x, t, s.tmp);
  const SoftCapRows cap_rows{plan.logits ? s.by_x : nullptr, c.soft_cap_tangent ? s.by_cap : nullptr};
  const float scale = RowLogits(c, row, j0, v, c0, c1, block.nan_marker, cap_rows, s.tmp, x);
  if (plan.logits) {
    ToTangentsOfLogits(c, row, j0, v, c0, c1, s.by_x, s.by_cap, t);
    ClearByLogits(c, c0, c1, x, t);
  }
  float *m = s.m + at, *l = s.l + at, *moved = s.moved + at, *center = s.center + at;
  if (const float rescale = RaiseMax(RowMax(x, c0, c1), scale, m); rescale != 1.0f) {
    if (plan.sums) Rescale(rescale, s.out_row, s.acc + at * s.out_row);
    Rescale(rescale, s.out_row, s.acc_tangent + at * s.out_row);
    *l *= rescale;
    *moved *= rescale;
    s.centered[at] *= rescale;
  }
  if (block.tangent_marker != nullptr) *moved += VisibleMarks(v, x, block.tangent_marker);
  const float sum = Sum(RowExp<false>(x, c0, c1, scale, *m));
  if (plan.logits) {
    if (plan.sums ? *l + sum > kGrown * s.centered[at] : *l == 0.0f && sum > 0.0f) {
      const F before = Set(*center);
      const float away = SumOver(c0, c1, [&](int64_t j) { return Load(x + j) * (Load(t + j) - before); });
      MoveCenter(plan, s, at, (*moved + away) / (*l + sum));
      s.centered[at] = *l + sum;
    }
    const F from = Set(*center);
    *moved += SumOver(c0, c1, [&](int64_t j) {
      const F y = Load(x + j) * (Load(t + j) - from);
      Store(t + j, y);
      return y;
    });
  }
  *l += sum;
  if (c.seed || c.drop_bits) {
    Drop(c, row, j0, v.lo, v.hi, x);
    if (plan.logits) Combine(c1 - c0, t + c0, x + c0, [](F y, F w) { return Select(IsZero(w), w, y); });
  }
}

// Adds the products of weights [.., keys] with `values` to sums of rows of the group, for all its tiles and panels. A chunk
// of values stays in the first cache meanwhile; `more`, if not null, are other weights for the same values.
inline void TangentSums(const Call& c, const TangentScratch& s, const TangentGroup& x, const float* values,
                        const float* weights, float* sums, const float* more, float* more_sums) {
  const int64_t chunk = Chunk();
  int64_t first = x.width, last = 0;
  for (int64_t t = 0; t < x.count; ++t) {
    first = x.tiles[t].from < first ? x.tiles[t].from : first;
    last = x.tiles[t].to > last ? x.tiles[t].to : last;
  }
  for (int64_t p = 0; p < Panels(c.Dv); ++p) {
    const float* panel = values + p * x.width * kPanel;
    for (int64_t u0 = first / chunk * chunk; u0 < last; u0 += chunk) {
      for (int64_t t = 0; t < x.count; ++t) {
        const RowTile& tile = x.tiles[t];
        const int64_t from = tile.from > u0 ? tile.from : u0, to = tile.to < u0 + chunk ? tile.to : u0 + chunk;
        if (from >= to) continue;
        if (u0 + chunk < last) Prefetch(panel + (u0 + chunk) * kPanel, chunk * kPanel, t, x.count);
        const int64_t at = tile.r * s.s_row + from, to_row = (x.g0 + tile.r) * s.out_row + p * kPanel;
        Gemm<false, true>(tile.n, to - from, weights + at, s.s_row, 1, panel + from * kPanel, sums + to_row, s.out_row);
        if (more != nullptr)
          Gemm<false, true>(tile.n, to - from, more + at, s.s_row, 1, panel + from * kPanel, more_sums + to_row,
                            s.out_row);
      }
    }
  }
}

inline void RunGroup(const Call& c, const TangentPlan& plan, const TangentScratch& s, const TangentGroup& x) {
  TangentProducts(c, s, x);
  for (int64_t t = 0; t < x.count; ++t) {
    const RowTile& tile = x.tiles[t];
    const int64_t c0 = tile.from / kLanes * kLanes, c1 = RoundUp(tile.to, kLanes);
    Row row = RowAt(c, x.b, x.k, x.r0 + x.g0 + tile.r);
    for (int64_t r = tile.r; r < tile.r + tile.n; ++r, row = After(c, row)) {
      const int64_t at = x.g0 + r;
      TangentRow(c, plan, s, x.block, row, at, x.j0, x.ranges.Within(r, x.j0, x.width), c0, c1, s.logits + r * s.s_row,
                 s.tangents + r * s.s_row);
    }
  }
  const float *w = s.logits, *t = plan.logits ? s.tangents : nullptr;
  if (plan.sums) {
    TangentSums(c, s, x, x.block.values, w, s.acc, t, s.acc_tangent);
  } else if (plan.logits) {
    TangentSums(c, s, x, x.block.values, t, s.acc_tangent, nullptr, nullptr);
  }
  if (plan.value_tangents) TangentSums(c, s, x, x.block.value_tangents, w, s.acc_tangent, nullptr, nullptr);
}

// Takes rows [r0, r0 + n) of key head k to the scratch. Returns the range of keys that are visible to any of them.
inline Range StartTangentRows(const Call& c, const TangentPlan& plan, const TangentScratch& s, int64_t b, int64_t k,
                              int64_t r0, int64_t n) {
  Range all{c.Skv, 0};
  Row row = RowAt(c, b, k, r0);
  for (int64_t r = 0; r < n; ++r, row = After(c, row)) {
    Range v = Visible(c, row);
    if (!c.with_forward && *c.l.At<float>(b, row.n, row.i) == 0.0f) v = {0, 0};
    s.lo[r] = static_cast<int32_t>(v.Empty() ? 0 : v.lo);
    s.hi[r] = static_cast<int32_t>(v.Empty() ? 0 : v.hi);
    if (!v.Empty()) {
      all.lo = v.lo < all.lo ? v.lo : all.lo;
      all.hi = v.hi > all.hi ? v.hi : all.hi;
    }
    CopyRow<false>(c.query, b, row.n, row.i, c.D, s.q + r * c.D);
    if (c.query_tangent) CopyRow<false>(c.query_tangent, b, row.n, row.i, c.D, s.q_tangent + r * c.D);
    const float saved = c.with_forward ? 0.0f : *c.m.At<float>(b, row.n, row.i);
    s.m[r] = saved == saved ? -kFloatMax : saved;  // NaN: it saw a value that is not finite, which may not be read here
    s.l[r] = s.center[r] = s.centered[r] = s.moved[r] = 0.0f;
  }
  if (plan.sums) Fill(s.acc, 0, n * s.out_row, 0.0f);
  Fill(s.acc_tangent, 0, n * s.out_row, 0.0f);
  return all;
}

inline void FinishTangentRow(const Call& c, const TangentPlan& plan, const TangentScratch& s, const Row& row,
                             int64_t at) {
  float *acc = s.acc + at * s.out_row, *sum = s.acc_tangent + at * s.out_row;
  const float l = s.l[at];
  const bool none = l == 0.0f;
  const float moved = none ? 0.0f : s.moved[at] / l;  // the log-sum-exp, against the center
  const float share = c.sinks ? KeyShare(c, row, s.m[at], l) : 1.0f;
  float factor = none ? 0.0f : 1.0f / (l * KeepProbOf(c, row));
  const F more = Set(s.center[at] * (1.0f - share) - share * moved);
  const bool moves = plan.logits || moved != moved;
  if (none) {
    Fill(sum, 0, c.Dv, 0.0f);
  } else if (moves && plan.sums) {
    Combine(c.Dv, sum, acc, [&](F x, F y) { return Fma(more, y, x); });
    factor *= share;
  } else if (moves) {
    const F by = Set(factor * share);  // both sums are of the weights without a sink, and out has it
    const float* out = ExactOut(c, row, s.stage, s.stage + RoundUp(c.Dv, kLanes));
    Combine(c.Dv, sum, out, [&](F x, F y) { return Fma(more, y, x * by); });
    factor = 1.0f;
  } else {
    factor *= share;
  }
  const View& to = c.out_tangent;
  StoreRow(sum, factor, to.Bytes(row.b, row.n, row.i), to.dtype, to.col, c.Dv);
  *c.logsumexp_tangent.At<float>(row.b, row.n, row.i) = none ? 0.0f : share * (s.center[at] + moved);
  if (c.with_forward) FinishRow(c, row, acc, s.m[at], l);
}

// Rows of a key head over all keys.
inline void TangentTask(const Call& c, const TangentPlan& plan, const SharedBlocks<TangentBlock>& shared,
                        int64_t task) {
  const TangentScratch s(c, plan);
  // Last rows first: under a causal mask they are the longest.
  const int64_t head = task / plan.blocks, block = plan.blocks - 1 - task % plan.blocks;
  const int64_t b = head / c.K, k = head % c.K, r0 = block * plan.task_rows;
  const int64_t n = r0 + plan.task_rows < plan.rows ? plan.task_rows : plan.rows - r0;
  const Range all = StartTangentRows(c, plan, s, b, k, r0, n);
  int32_t lo[kMostRows], hi[kMostRows];
  for (int64_t j0 = all.lo / plan.key_block * plan.key_block; j0 < all.hi; j0 += plan.key_block) {
    TangentGroup x{b, k, r0, 0, j0, j0 + plan.key_block < c.Skv ? plan.key_block : c.Skv - j0, {}, {}, 0, {}};
    if (!SeesBlocks(c, b, k, r0, n, j0, j0 + x.width)) continue;
    if (plan.shared) {
      x.block = shared.At(head, j0);
    } else {
      x.block = plan.Place(s.block);
      PackTangentBlock(c, b, k, j0, x.width, s.stage, &x.block);
    }
    for (x.g0 = 0; x.g0 < n; x.g0 += plan.group_rows) {
      const int64_t rows = x.g0 + plan.group_rows < n ? plan.group_rows : n - x.g0;
      x.ranges = RangesIn(c, RowAt(c, b, k, r0 + x.g0), rows, j0, x.width, {s.lo + x.g0, s.hi + x.g0}, lo, hi);
      x.count = MakeTiles(x.ranges, rows, j0, x.width, x.tiles);
      if (x.count > 0) RunGroup(c, plan, s, x);
    }
  }
  Row row = RowAt(c, b, k, r0);
  for (int64_t r = 0; r < n; ++r, row = After(c, row)) FinishTangentRow(c, plan, s, row, r);
}

inline void TangentAs(const Call& c, const Runner& runner) {
  const TangentPlan plan(c, runner.threads);
  const int64_t heads = c.B * c.K;
  for (int64_t first = 0; first < heads; first += plan.wave) {
    const int64_t n = first + plan.wave < heads ? plan.wave : heads - first;
    const SharedBlocks<TangentBlock> shared(c, first, plan.shared ? n : 0, plan.key_block, plan.BlockSize(),
                                            [&](float* memory) { return plan.Place(memory); });
    shared.Pack(c, runner, [&](int64_t b, int64_t k, int64_t j0, int64_t width, float* stage, TangentBlock* to) {
      PackTangentBlock(c, b, k, j0, width, stage, to);
    });
    Run(runner, n * plan.blocks, [&](int64_t task) { TangentTask(c, plan, shared, first * plan.blocks + task); });
  }
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
