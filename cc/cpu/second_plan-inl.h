// How the second derivative is cut into tasks and blocks, and where a task keeps what it works on.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/bias_parts-inl.h"
#include "cpu/groups-inl.h"
#include "cpu/scratch-inl.h"
#include "cpu/simd-inl.h"
#include "cpu/tangent_rows-inl.h"
#include "cpu/tuning.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Which terms there are: what is absent or not wanted takes no product.
struct SecondTerms {
  bool logits;            // the logits have a tangent
  bool products;          // ... to which query or key contribute
  bool ds, weights;       // G, or the tangent of the weights, is wanted
  bool dp, dp_tangent;    // dout.v and its tangent are needed
  bool by_key, by_query;  // dX times the tangents of key (for query) and query (for key)
  bool values, douts;     // the weights times the tangents of value (for out) and dout (for value)

  explicit SecondTerms(const Call& c) {
    products = MovesProducts(c);
    logits = MovesLogits(c);
    ds = c.dquery || c.dkey || c.dbias || c.dslopes || c.dscale || c.dsoft_cap;
    weights = logits && (c.dvalue || c.out_tangent);
    dp = ds && logits;
    dp_tangent = ds && (c.value_tangent || c.dout_tangent);
    by_key = c.dquery && c.key_tangent;
    by_query = c.dkey && c.query_tangent;
    values = c.out_tangent && c.value_tangent;
    douts = c.dvalue && c.dout_tangent;
  }
};

// What is kept of each pair of a row and a key between the two passes; the first four are there in every call. The second
// pass leaves in their place what is multiplied with q and k (kGX), their tangents (kDX), dout and v (kTangent), and their
// tangents (kKept).
enum SecondArray {
  kWeight,
  kDs,
  kLogit,  // T
  kDp,     // U
  kKeep,   // with dropout: weights that are kept, divided by keep_prob
  kByX,    // with a soft cap: its derivative, and the tangent of that
  kCurve,
  kByCap,  // for the gradient by the soft cap: its derivative by cap, and x / cap
  kQuotient,
  kDot,  // for the gradient by the scale: q.k, and its tangent
  kDotTangent,
  kSecondArrays
};
constexpr SecondArray kGX = kWeight, kDX = kDs, kTangent = kLogit, kKept = kDp;

struct SecondPlan;

// Floats of each packed form of a block of keys, of its values and of the NaN marker; 0 for tangents that are absent.
struct KeySizes {
  int64_t keys_t, keys_tangent_t, values_t, values_tangent_t;
  int64_t keys, keys_tangent, values, values_tangent, marker;

  KeySizes(const Call& c, const SecondPlan& plan);
  int64_t All() const {
    return keys_t + keys_tangent_t + values_t + values_tangent_t + keys + keys_tangent + values + values_tangent +
           marker;
  }
};

struct SecondPlan {
  const SecondTerms terms;
  HeadGroups groups;
  int64_t rows, block_rows;           // of a key head, and of a block
  int64_t key_block, kept_blocks;     // keys of a block, and how many blocks the arrays of a block of rows hold
  int64_t at[kSecondArrays], arrays;  // where each array is among them (-1: absent), and how many there are
  int64_t s_row, q_row, dq_row, dv_row;
  int64_t dk_size, dv_size;         // floats of the gradients of a key head; 0 where not wanted
  int64_t splits, split_positions;  // parts of the rows of each query head
  int64_t key_slots;                // blocks of keys that stay packed: all of a key head's, or 1

  explicit SecondPlan(const Call& c) : terms(c), groups(c) {
    rows = c.G() * c.Sq;
    key_block = AlignedKeys(c, KeysOf(TilesInUse().second_keys, c.D > c.Dv ? c.D : c.Dv));
    q_row = Panels(c.D > c.Dv ? c.D : c.Dv) * kPanel;
    dq_row = Panels(c.D) * kPanel;
    dv_row = Panels(c.Dv) * kPanel;
    dk_size = c.dkey ? c.Skv * dq_row : 0;
    dv_size = c.dvalue ? c.Skv * dv_row : 0;
    s_row = RoundUp(key_block, kPanel) + kLanes;
    PlaceArrays(c);
    PlanBlocks(c);
    PlanSplits(c);
    const bool again = (splits > 1 ? split_positions : rows) > block_rows;  // more than one block of rows reads them
    key_slots = again && PacksFit(c) && c.Skv > 0 ? (c.Skv + key_block - 1) / key_block : 1;
  }

  int64_t BlockFloats() const { return arrays * block_rows * s_row; }  // of one block of rows and keys

 private:
  void PlaceArrays(const Call& c) {
    const bool dropout = c.seed || c.drop_bits, cap = c.soft_cap != 0.0f || c.soft_cap_of_head;
    const bool by_cap{c.dsoft_cap}, by_scale{c.dscale};
    const bool given[kSecondArrays] = {
        true, true, true, true, dropout, cap, cap, by_cap, by_cap, by_scale, by_scale && terms.products};
    arrays = 0;
    for (int i = 0; i < kSecondArrays; ++i) at[i] = given[i] ? arrays++ : -1;
  }

  // Whether all packed keys and values of a key head may stay.
  bool PacksFit(const Call& c) const {
    return (c.Skv + key_block - 1) / key_block * KeySizes(c, *this).All() <= kSecondPackedFloats;
  }

  // As many rows as leave room for all keys; where that would be too few, the products of the second pass are computed
  // again, unless a mask leaves few enough of the keys.
  void PlanBlocks(const Call& c) {
    const bool packed = PacksFit(c);
    const int64_t key_blocks = (c.Skv + key_block - 1) / key_block;
    const int64_t most = RoundUp(packed ? TilesInUse().second_rows : TilesInUse().most_second_rows, kRows);
    const int64_t least = packed ? kLeastSecondRows : kLeastUnpackedRows;
    const int64_t fit = kSecondFloats / (arrays * s_row * (key_blocks > 0 ? key_blocks : 1)) / kRows * kRows;
    block_rows = AlignedRows(c, fit >= most || fit < least ? most : fit);
    block_rows = block_rows < rows ? block_rows : rows > 0 ? rows : 1;
    kept_blocks = kSecondFloats / BlockFloats();
    kept_blocks = kept_blocks < key_blocks ? kept_blocks : key_blocks;
    kept_blocks = kept_blocks > 1 ? kept_blocks : 1;
  }

  void PlanSplits(const Call& c) {
    const int64_t count = groups.count() > 0 ? groups.count() : 1, bytes = c.B * c.K * (dk_size + dv_size) * 4 + 1;
    splits = (kSecondTasks + count - 1) / count;
    const int64_t affordable = kSecondSplitBytes / bytes, least = kLeastSecondTasks / count;
    const int64_t most = affordable > least ? affordable : least;
    splits = splits < most ? splits : most;
    if (c.dbias && (c.bias_offset || c.dbias.row == 0)) splits = 1;  // different rows add to one element
    const int64_t blocks = (c.Sq + block_rows - 1) / block_rows;
    splits = splits < blocks ? splits : blocks;
    splits = splits < 1 ? 1 : splits;
    split_positions = (blocks + splits - 1) / splits * block_rows;
    splits = split_positions > 0 ? (c.Sq + split_positions - 1) / split_positions : 1;
    splits = splits < 1 ? 1 : splits;
    CutGroups(c, kSecondTasks / splits, kLeastHeads, &groups);
  }
};

inline KeySizes::KeySizes(const Call& c, const SecondPlan& plan) {
  const int64_t rounded = RoundUp(plan.key_block, kPanel);
  keys_t = rounded * c.D;
  values_t = rounded * c.Dv;
  keys = plan.key_block * plan.dq_row;
  values = plan.key_block * plan.dv_row;
  marker = rounded;
  keys_tangent_t = c.key_tangent ? keys_t : 0;
  keys_tangent = c.key_tangent ? keys : 0;
  values_tangent_t = c.value_tangent ? values_t : 0;
  values_tangent = c.value_tangent ? values : 0;
}

struct SecondScratch {
  float *q, *q_tangent, *dout, *dout_tangent;                              // rows of a block
  float *q_panels, *q_tangent_panels, *dout_panels, *dout_tangent_panels;  // ... as panels
  float *gq, *out;                                                         // ... and their results
  float* sums;                                                             // dk, then dv, of all keys
  float* packed;                                                           // keys: see PackedKeys
  int32_t* packed_for;                                                     // ... and for what each block of them is
  float* arrays;                                                           // see SecondArray
  float *stage, *tmp, *by_cap, *quotient;                                  // of a row, or of its keys
  float *m, *inverse, *delta, *tau, *sigma, *excess;                       // of each row
  double *tau_sum, *sigma_sum, *ds_sum;
  int32_t *lo, *hi;

  SecondScratch(const Call& c, const SecondPlan& plan, bool own_sums)
      : memory([&](Arena& arena) { Place(c, plan, own_sums, arena); }) {}

 private:
  void Place(const Call& c, const SecondPlan& plan, bool own_sums, Arena& arena) {
    const int64_t n = plan.block_rows;
    const auto take = [&](bool given, int64_t floats) { return arena.Take(given ? floats : 0); };
    const bool a{c.query_tangent}, more{c.dout_tangent};
    q = arena.Take(n * plan.dq_row);
    q_tangent = take(a, n * plan.dq_row);
    dout = arena.Take(n * plan.dv_row);
    dout_tangent = take(more, n * plan.dv_row);
    q_panels = arena.Take(n * plan.dq_row);
    q_tangent_panels = take(a, n * plan.dq_row);
    dout_panels = arena.Take(n * plan.dv_row);
    dout_tangent_panels = take(more, n * plan.dv_row);
    gq = arena.Take(n * plan.dq_row);
    out = arena.Take(n * plan.dv_row);
    sums = take(own_sums, plan.dk_size + plan.dv_size);
    packed = arena.Take(plan.key_slots * KeySizes(c, plan).All());
    packed_for = arena.Take<int32_t>(plan.key_slots);
    arrays = arena.Take(plan.kept_blocks * plan.BlockFloats());
    stage = arena.Take(StageSize(c));
    float** const of_keys[] = {&tmp, &by_cap, &quotient};
    for (float** x : of_keys) *x = arena.Take(plan.s_row);
    float** const of_rows[] = {&m, &inverse, &delta, &tau, &sigma, &excess};
    for (float** x : of_rows) *x = arena.Take(n);
    tau_sum = arena.Take<double>(n);
    sigma_sum = arena.Take<double>(n);
    ds_sum = arena.Take<double>(n);
    lo = arena.Take<int32_t>(n);
    hi = arena.Take<int32_t>(n);
  }

  const BufferParts memory;  // the last member, as it fills in those above; too large to be kept by each thread
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
