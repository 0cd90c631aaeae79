// What the second derivative reads of rows and keys: what the saved statistics give, and the operands in packed form.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/backward_block-inl.h"
#include "cpu/backward_rows-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/second_plan-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Rows [g0, g0 + rows) of key head k, and the keys that are visible to any of them.
struct SecondRows {
  int64_t b, k, g0, rows;
  Range visible;
};

// Rows of one array: as they are, and as panels times a factor, to which `more` of another array's rows may be added.
struct RowsOf {
  const View& x;
  int64_t width, row;
  float *rows, *panels;
};

// Copies a row of an array to row r of its rows and, if wanted, to its panels. In masked calls a row that is not all finite
// is 0 in the panels; returns NaN for it, else 0.
inline float TakeRow(const RowsOf& to, const Row& row, int64_t r, int64_t n, bool masked, float* stage) {
  float* own = to.rows + r * to.row;
  CopyRow<false>(to.x, row.b, row.n, row.i, to.width, own);
  const float nan = masked ? ZeroOrNaN(own, to.width) : 0.0f;
  if (to.panels == nullptr) return nan;
  if (nan != 0.0f) Fill(stage, 0, to.width, 0.0f);
  PackRow(nan != 0.0f ? stage : own, to.width, r, n, to.panels);
  return nan;
}

// Per row: max, 1 / sum (0 for a fully masked row; NaN where an array of the row is not finite, which so propagates to
// the row's visible keys only), delta and the visible range; q, dout and their tangents; and zero results.
inline void StartSecondRows(const Call& c, const SecondPlan& plan, const SecondScratch& s, SecondRows* x) {
  const bool masked = IsMasked(c);
  const auto panels = [](bool wanted, float* p) { return wanted ? p : nullptr; };
  const RowsOf arrays[] = {
      {c.query, c.D, plan.dq_row, s.q, panels(bool{c.dkey}, s.q_panels)},
      {c.dout, c.Dv, plan.dv_row, s.dout, panels(bool{c.dvalue}, s.dout_panels)},
      {c.query_tangent, c.D, plan.dq_row, s.q_tangent, panels(bool{c.dkey}, s.q_tangent_panels)},
      {c.dout_tangent, c.Dv, plan.dv_row, s.dout_tangent, panels(bool{c.dvalue}, s.dout_tangent_panels)},
  };
  for (int64_t r = 0; plan.terms.dp && r < x->rows; r += kDeltas)  // out is not used yet
    Deltas<kDeltas>(c, x->b, x->k, x->g0 + r, r + kDeltas < x->rows ? kDeltas : x->rows - r, s.stage, s.out,
                    s.delta + r);
  x->visible = {c.Skv, 0};
  Row row = RowAt(c, x->b, x->k, x->g0);
  for (int64_t r = 0; r < x->rows; ++r, row = After(c, row)) {
    Range v = Visible(c, row);
    const float l = *c.l.At<float>(row.b, row.n, row.i);
    if (v.Empty() || (masked && l == 0.0f)) v = {0, 0};
    s.lo[r] = static_cast<int32_t>(v.lo);
    s.hi[r] = static_cast<int32_t>(v.hi);
    if (!v.Empty()) {
      x->visible.lo = v.lo < x->visible.lo ? v.lo : x->visible.lo;
      x->visible.hi = v.hi > x->visible.hi ? v.hi : x->visible.hi;
    }
    s.m[r] = *c.m.At<float>(row.b, row.n, row.i);
    s.inverse[r] = l == 0.0f ? 0.0f : 1.0f / l;
    if (!plan.terms.dp || l == 0.0f) s.delta[r] = 0.0f;
    for (const RowsOf& to : arrays)
      if (to.x) s.inverse[r] += TakeRow(to, row, r, x->rows, masked, s.stage);
    s.tau_sum[r] = s.sigma_sum[r] = 0.0;
  }
  Fill(s.gq, 0, x->rows * plan.dq_row, 0.0f);
  Fill(s.out, 0, x->rows * plan.dv_row, 0.0f);
}

// Keys and values from j0 on, transposed, for the products of the first pass. Marks, in masked calls, keys whose tangents
// of values are not all finite: those are 0 in the panels. Returns whether there are any.
inline bool PackFirstPass(const Call& c, const SecondPlan& plan, const SecondScratch& s, const SecondRows& x,
                          int64_t j0, int64_t width) {
  const SecondTerms& terms = plan.terms;
  const auto pack = [&](bool wanted, const View& from, int64_t depth, float* to) {
    if (wanted) PackTransposed<false>(from, depth, x.b, x.k, j0, width, s.stage, to);
  };
  pack(true, c.key, c.D, s.keys_t);
  pack(bool{c.key_tangent}, c.key_tangent, c.D, s.keys_tangent_t);
  pack(terms.dp || (terms.dp_tangent && c.dout_tangent), c.value, c.Dv, s.values_t);
  pack(terms.dp_tangent && c.value_tangent, c.value_tangent, c.Dv, s.values_tangent_t);
  bool any = false;
  if (!IsMasked(c) || !terms.values) return any;
  for (int64_t j = 0; j < width; ++j) {
    s.nan_marker[j] = ZeroOrNaN(ReadRow<false>(c.value_tangent, x.b, x.k, j0 + j, c.Dv, s.stage), c.Dv);
    any = any || s.nan_marker[j] != 0.0f;
  }
  return any;
}

// The same as rows in panels, for those of the second pass.
inline void PackSecondPass(const Call& c, const SecondPlan& plan, const SecondScratch& s, const SecondRows& x,
                           int64_t j0, int64_t width) {
  const auto pack = [&](bool wanted, const View& from, int64_t columns, float* to) {
    if (!wanted) return;
    PackClean<false>(from, IsMasked(c), width, columns, s.stage, to, [&](int64_t j) { return Row{x.b, x.k, j0 + j}; });
  };
  pack(bool{c.dquery}, c.key, c.D, s.keys);
  pack(plan.terms.by_key, c.key_tangent, c.D, s.keys_tangent);
  pack(plan.terms.weights && c.out_tangent, c.value, c.Dv, s.values);
  pack(plan.terms.values, c.value_tangent, c.Dv, s.values_tangent);
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
