// The second derivative: that of the backward along tangents of all it takes (cotangents included), out, max and sum moving
// with the operands; with the gradients by the cotangents, the tangents of out and log-sum-exp, it is a symmetric Hessian.
//
//   p, dp, ds, delta as in the backward;  X' tangent of a logit, T behind the soft cap f;  U = keep / keep_prob times the
//   tangent of dout v^T;  tau = sum p T;  sigma = sum ds (T - tau) + sum p U - dlogsumexp'
//   G = ds (T - tau) + p (U - sigma),  GX = G f' + ds (f'' X' + f'_cap cap'),  dX = ds f'
//   gq = (scale GX + scale' dX) k + scale dX k',  gk likewise,  gv = (keep p (T - tau))^T dout + (keep p)^T dout'
//   gbias = GX,  gslope = -GX distance,  gscale = GX q.k + dX (q'.k + q.k'),  out' = keep p (T - tau) v + keep p v'
//
// Differences are formed first: both of their terms may be far larger than they are.
//
// tau and sigma are sums over all keys, so a block of rows passes its keys twice, and what the first pass finds of each
// pair is kept for the second where it fits: with tangents of q, k and v, 12 products. The rows of a task are those of all
// key heads that share one bias gradient, or a part of them; each part has sums of its own for keys and values, added up
// at the end in a fixed order, whatever the number of threads.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/backward_sums-inl.h"
#include "cpu/key_sums-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/scratch-inl.h"
#include "cpu/second_block-inl.h"
#include "cpu/second_pack-inl.h"
#include "cpu/second_plan-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// The rows of a block, which then are complete.
inline void FinishSecondRows(const Call& c, const SecondPlan& plan, const SecondScratch& s, const SecondRows& x) {
  Row row = RowAt(c, x.b, x.k, x.g0);
  for (int64_t r = 0; r < x.rows; ++r, row = After(c, row)) {
    const auto store = [&](const View& to, const float* sums, int64_t n) {
      if (to) StoreRow(sums, 1.0f, to.Bytes(row.b, row.n, row.i), to.dtype, to.col, n);
    };
    store(c.dquery, s.gq + r * plan.dq_row, c.D);
    store(c.out_tangent, s.out + r * plan.dv_row, c.Dv);
    if (c.logsumexp_tangent) *c.logsumexp_tangent.At<float>(row.b, row.n, row.i) = s.tau[r];
  }
}

// Rows [r0, r1) of key head k. dk and dv: their sums over all rows.
inline void SecondHead(const Call& c, const SecondPlan& plan, const SecondScratch& s, int64_t b, int64_t k, int64_t r0,
                       int64_t r1, float* dk, float* dv, const HeadSums& sums) {
  for (int64_t g0 = r0; g0 < r1; g0 += plan.block_rows) {
    SecondRows x{b, k, g0, g0 + plan.block_rows < r1 ? plan.block_rows : r1 - g0, {}};
    StartSecondRows(c, plan, s, &x);
    SecondBlock(c, plan, s, x, dk, dv, sums);
    FinishSecondRows(c, plan, s, x);
  }
}

// dbias must be zero, unless WritesAllBias; the other results are overwritten.
inline void SecondAs(const Call& c, const Runner& runner) {
  const SecondPlan plan(c);
  const KeySums keys = {plan.dq_row, plan.dv_row,   plan.dk_size, plan.dk_size + plan.dv_size,
                        plan.splits, plan.key_block};
  const Buffer parts(plan.splits > 1 ? c.B * c.K * plan.splits * keys.size : 0);  // per key head and split
  const AllSums sums(c, plan.splits);
  const BiasParts bias(c, runner, plan.groups);

  Run(runner, plan.groups.count() * plan.splits, [&](int64_t task) {
    const int64_t group = task / plan.splits, split = task % plan.splits;
    const SecondScratch s(c, plan, plan.splits == 1);
    const Call own = bias.Of(group);
    for (int64_t i = plan.groups.Begin(group); i < plan.groups.End(group); ++i) {
      const int64_t head = plan.groups.Head(i), b = head / c.K, k = head % c.K;
      float* part = plan.splits > 1 ? parts.get() + (head * plan.splits + split) * keys.size : s.sums;
      float *dk = part, *dv = part + plan.dk_size;
      PackedKeys::Forget(plan, s);
      Fill(dk, 0, plan.dk_size, 0.0f);
      Fill(dv, 0, plan.dv_size, 0.0f);
      const HeadSums own_sums = sums.Of(head, split, i == plan.groups.Begin(group));
      if (plan.splits == 1) {
        SecondHead(own, plan, s, b, k, 0, plan.rows, dk, dv, own_sums);
        StoreKeySums(c, keys, b, k, 0, c.Skv, dk, dv, 1.0f);
        continue;
      }
      const int64_t from = split * plan.split_positions, to = from + plan.split_positions;
      for (int64_t g = 0; g < c.G(); ++g)
        SecondHead(own, plan, s, b, k, g * c.Sq + from, g * c.Sq + (to < c.Sq ? to : c.Sq), dk, dv, own_sums);
    }
  });

  if (plan.splits > 1 && keys.size > 0) AddKeySums(c, keys, runner, parts.get(), [](int64_t, int64_t) { return 1.0f; });
  bias.Add();
  sums.Store();
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
