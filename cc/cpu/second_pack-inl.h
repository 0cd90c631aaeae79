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

// A block of keys and values in packed form: transposed for the first pass, as panels for the second. They stay so for
// the next block of rows where there is room.
class PackedKeys {
 public:
  const float *keys_t, *keys_tangent_t, *values_t, *values_tangent_t;
  const float *keys, *keys_tangent, *values, *values_tangent;
  // In masked calls NaN for a key whose tangent of values is not all finite, which is 0 in the panels; null without any.
  const float* nan_marker;

  static void Forget(const SecondPlan& plan, const SecondScratch& s) {
    for (int64_t i = 0; i < plan.key_slots; ++i) s.packed_for[i] = 0;
  }

  // Keys j0 + [0, width) of the rows' key head, for the first pass or the second.
  PackedKeys(const Call& c, const SecondPlan& plan, const SecondScratch& s, const SecondRows& x, int64_t j0,
             int64_t width, bool second) {
    const int64_t slot = plan.key_slots > 1 ? j0 / plan.key_block : 0;
    const KeySizes sizes(c, plan);
    float* at = s.packed + slot * sizes.All();
    const auto next = [&](int64_t size) { return (at += size) - size; };
    float* const first_forms[] = {next(sizes.keys_t), next(sizes.keys_tangent_t), next(sizes.values_t),
                                  next(sizes.values_tangent_t)};
    float* const second_forms[] = {next(sizes.keys), next(sizes.keys_tangent), next(sizes.values),
                                   next(sizes.values_tangent)};
    float* const marker = next(sizes.marker);
    keys_t = first_forms[0], keys_tangent_t = first_forms[1];
    values_t = first_forms[2], values_tangent_t = first_forms[3];
    keys = second_forms[0], keys_tangent = second_forms[1];
    values = second_forms[2], values_tangent = second_forms[3];
    int32_t& packed_for = s.packed_for[slot];
    if (plan.key_slots == 1) packed_for = 0;
    if (!second && !(packed_for & kFirst)) {
      PackTransposed(c, plan.terms, s, x, j0, width, first_forms);
      packed_for |= kFirst | (Mark(c, plan.terms, s, x, j0, width, marker) ? kMarked : 0);
    }
    if (second && !(packed_for & kSecond)) {
      PackPanels(c, plan.terms, s, x, j0, width, second_forms);
      packed_for |= kSecond;
    }
    nan_marker = packed_for & kMarked ? marker : nullptr;
  }

 private:
  enum : int32_t { kFirst = 1, kSecond = 2, kMarked = 4 };

  static void PackTransposed(const Call& c, const SecondTerms& terms, const SecondScratch& s, const SecondRows& x,
                             int64_t j0, int64_t width, float* const* to) {
    const auto pack = [&](bool wanted, const View& from, int64_t depth, float* panels) {
      if (wanted) jax_fa::JAX_FA_ISA::PackTransposed<false>(from, depth, x.b, x.k, j0, width, s.stage, panels);
    };
    pack(true, c.key, c.D, to[0]);
    pack(bool{c.key_tangent}, c.key_tangent, c.D, to[1]);
    pack(terms.dp || (terms.dp_tangent && c.dout_tangent), c.value, c.Dv, to[2]);
    pack(terms.dp_tangent && c.value_tangent, c.value_tangent, c.Dv, to[3]);
  }

  static void PackPanels(const Call& c, const SecondTerms& terms, const SecondScratch& s, const SecondRows& x,
                         int64_t j0, int64_t width, float* const* to) {
    const auto pack = [&](bool wanted, const View& from, int64_t columns, float* panels) {
      if (!wanted) return;
      PackClean<false>(from, IsMasked(c), width, columns, s.stage, panels,
                       [&](int64_t j) { return Row{x.b, x.k, j0 + j}; });
    };
    pack(bool{c.dquery}, c.key, c.D, to[0]);
    pack(terms.by_key, c.key_tangent, c.D, to[1]);
    pack(terms.weights && c.out_tangent, c.value, c.Dv, to[2]);
    pack(terms.values, c.value_tangent, c.Dv, to[3]);
  }

  static bool Mark(const Call& c, const SecondTerms& terms, const SecondScratch& s, const SecondRows& x, int64_t j0,
                   int64_t width, float* marker) {
    bool any = false;
    if (!IsMasked(c) || !terms.values) return any;
    for (int64_t j = 0; j < width; ++j) {
      marker[j] = ZeroOrNaN(ReadRow<false>(c.value_tangent, x.b, x.k, j0 + j, c.Dv, s.stage), c.Dv);
      any = any || marker[j] != 0.0f;
    }
    return any;
  }
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
