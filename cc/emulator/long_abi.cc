// libopapi.so: the exported functions of the built-in operator. The signatures stand as CANN's headers have them, one by
// one, and share nothing with those of the adapter. CANN_EMULATOR_RELEASE says which are exported: 1 the first ones, 2 also
// those with pseType and a layout of the statistics, 3 also those with a sink.
#include "emulator/phase1.h"

#ifndef CANN_EMULATOR_RELEASE
#define CANN_EMULATOR_RELEASE 3
#endif

using namespace cann_emulator;

namespace {

using T = const aclTensor*;
using I = const aclIntArray*;
struct Numbers {
  double scale, keep_prob;
  int64_t pre, next, heads;
  const char* layout;
  int64_t inner_precise, sparse_mode;
};

void Inputs(Phase1& p, T query, T key, T value) {
  p.Tensor(&Op::query, query, "query", true)
      .Tensor(&Op::key, key, "key", true)
      .Tensor(&Op::value, value, "value", true);
}

void Optionals(Phase1& p, T pse, T drop, T padding, T mask, I prefix) {
  p.Tensor(&Op::pse, pse, "realShift").Tensor(&Op::drop, drop, "dropMask");
  p.Tensor(&Op::padding, padding, "paddingMask").Tensor(&Op::mask, mask, "attenMask");
  p.Ints(&Op::prefix, prefix, "prefix");
}

void Sequences(Phase1& p, I q, I kv) {
  p.op().varlen = true;
  p.op().has_seq = q != nullptr && kv != nullptr;
  p.Ints(&Op::q_ends, q, "actualSeqQLen").Ints(&Op::kv_ends, kv, "actualSeqKvLen");
}

[[maybe_unused]] void Typed(Phase1& p, I q_start, I kv_start, int64_t pse_type) {
  p.op().typed_pse = true;
  p.op().pse_type = pse_type;
  p.Ints(&Op::q_start, q_start, "qStartIdx").Ints(&Op::kv_start, kv_start, "kvStartIdx");
}

void Scalars(Phase1& p, const Numbers& n) {
  Op& op = p.op();
  op.scale = n.scale;
  op.keep_prob = n.keep_prob;
  op.pre = n.pre;
  op.next = n.next;
  op.heads = n.heads;
  op.inner_precise = n.inner_precise;
  op.sparse_mode = n.sparse_mode;
}

void Outputs(Phase1& p, T max, T sum, T softmax, T attention) {
  p.Tensor(&Op::max, max, "softmaxMax", true).Tensor(&Op::sum, sum, "softmaxSum", true);
  p.Tensor(&Op::softmax, softmax, "softmaxOut").Tensor(&Op::out, attention, "attentionOut", true);
}

void Saved(Phase1& p, T dy, T max, T sum, T softmax, T attention) {
  p.op().backward = true;
  p.Tensor(&Op::dy, dy, "dy", true).Tensor(&Op::max, max, "softmaxMax").Tensor(&Op::sum, sum, "softmaxSum");
  p.Tensor(&Op::softmax, softmax, "softmaxIn").Tensor(&Op::out, attention, "attentionIn", true);
}

[[maybe_unused]] void Ropes(Phase1& p, T query, T key) {
  p.Tensor(&Op::query_rope, query, "queryRope").Tensor(&Op::key_rope, key, "keyRope");
}

[[maybe_unused]] void Sink(Phase1& p, T sink) { p.Tensor(&Op::sink, sink, "sink"); }

[[maybe_unused]] void RopeGradients(Phase1& p, T dq, T dk) {
  p.Tensor(&Op::dq_rope, dq, "dqRope").Tensor(&Op::dk_rope, dk, "dkRope");
}

[[maybe_unused]] void SinkGradient(Phase1& p, T dsink) { p.Tensor(&Op::dsink, dsink, "dsink"); }

void Gradients(Phase1& p, T dq, T dk, T dv, T dpse) {
  p.Tensor(&Op::dq, dq, "dq", true).Tensor(&Op::dk, dk, "dk", true).Tensor(&Op::dv, dv, "dv", true);
  p.Tensor(&Op::dpse, dpse, "dpse");
}

}  // namespace

#define PHASE2(op)                                                                                 \
  CANN_EMULATOR_C int op(void* workspace, uint64_t bytes, aclOpExecutor* executor, void* stream) { \
    return Run(#op, workspace, bytes, executor, stream, false);                                    \
  }

#define OPTIONALS T real_shift, T drop_mask, T padding_mask, T atten_mask
#define SCALARS                                                                                                  \
  double scale, double keep_prob, int64_t pre, int64_t next, int64_t heads, char *layout, int64_t inner_precise, \
      int64_t sparse_mode
#define NUMBERS \
  Numbers { scale, keep_prob, pre, next, heads, layout, inner_precise, sparse_mode }
#define OUTPUTS T softmax_max, T softmax_sum, T softmax_out, T attention_out
#define TAIL uint64_t *workspace, aclOpExecutor **executor

PHASE2(aclnnFlashAttentionScore)
CANN_EMULATOR_C int aclnnFlashAttentionScoreGetWorkspaceSize(T query, T key, T value, OPTIONALS, I prefix, SCALARS,
                                                             OUTPUTS, TAIL) {
  Phase1 p("aclnnFlashAttentionScore");
  Inputs(p, query, key, value);
  Optionals(p, real_shift, drop_mask, padding_mask, atten_mask, prefix);
  Scalars(p, NUMBERS);
  p.Layout(layout, nullptr, false);
  Outputs(p, softmax_max, softmax_sum, softmax_out, attention_out);
  return p.Finish(workspace, executor);
}

PHASE2(aclnnFlashAttentionVarLenScore)
CANN_EMULATOR_C int aclnnFlashAttentionVarLenScoreGetWorkspaceSize(T query, T key, T value, OPTIONALS, I prefix,
                                                                   I q_len, I kv_len, SCALARS, OUTPUTS, TAIL) {
  Phase1 p("aclnnFlashAttentionVarLenScore");
  Inputs(p, query, key, value);
  Optionals(p, real_shift, drop_mask, padding_mask, atten_mask, prefix);
  Sequences(p, q_len, kv_len);
  Scalars(p, NUMBERS);
  p.Layout(layout, nullptr, false);
  Outputs(p, softmax_max, softmax_sum, softmax_out, attention_out);
  return p.Finish(workspace, executor);
}

PHASE2(aclnnFlashAttentionScoreGrad)
CANN_EMULATOR_C int aclnnFlashAttentionScoreGradGetWorkspaceSize(T query, T key, T value, T dy, OPTIONALS,
                                                                 T softmax_max, T softmax_sum, T softmax_in,
                                                                 T attention_in, I prefix, SCALARS, T dq, T dk, T dv,
                                                                 T dpse, TAIL) {
  Phase1 p("aclnnFlashAttentionScoreGrad");
  Inputs(p, query, key, value);
  Optionals(p, real_shift, drop_mask, padding_mask, atten_mask, prefix);
  Saved(p, dy, softmax_max, softmax_sum, softmax_in, attention_in);
  Scalars(p, NUMBERS);
  p.Layout(layout, nullptr, false);
  Gradients(p, dq, dk, dv, dpse);
  return p.Finish(workspace, executor);
}

PHASE2(aclnnFlashAttentionUnpaddingScoreGrad)
CANN_EMULATOR_C int aclnnFlashAttentionUnpaddingScoreGradGetWorkspaceSize(T query, T key, T value, T dy, OPTIONALS,
                                                                          T softmax_max, T softmax_sum, T softmax_in,
                                                                          T attention_in, I prefix, I q_len, I kv_len,
                                                                          SCALARS, T dq, T dk, T dv, T dpse, TAIL) {
  Phase1 p("aclnnFlashAttentionUnpaddingScoreGrad");
  Inputs(p, query, key, value);
  Optionals(p, real_shift, drop_mask, padding_mask, atten_mask, prefix);
  Saved(p, dy, softmax_max, softmax_sum, softmax_in, attention_in);
  Sequences(p, q_len, kv_len);
  Scalars(p, NUMBERS);
  p.Layout(layout, nullptr, false);
  Gradients(p, dq, dk, dv, dpse);
  return p.Finish(workspace, executor);
}

#if CANN_EMULATOR_RELEASE >= 2

PHASE2(aclnnFlashAttentionScoreV2)
CANN_EMULATOR_C int aclnnFlashAttentionScoreV2GetWorkspaceSize(T query, T key, T value, OPTIONALS, I prefix, I q_start,
                                                               I kv_start, SCALARS, int64_t pse_type, OUTPUTS, TAIL) {
  Phase1 p("aclnnFlashAttentionScoreV2");
  Typed(p, q_start, kv_start, pse_type);
  Inputs(p, query, key, value);
  Optionals(p, real_shift, drop_mask, padding_mask, atten_mask, prefix);
  Scalars(p, NUMBERS);
  p.Layout(layout, nullptr, false);
  Outputs(p, softmax_max, softmax_sum, softmax_out, attention_out);
  return p.Finish(workspace, executor);
}

PHASE2(aclnnFlashAttentionVarLenScoreV2)
CANN_EMULATOR_C int aclnnFlashAttentionVarLenScoreV2GetWorkspaceSize(T query, T key, T value, OPTIONALS, I prefix,
                                                                     I q_len, I kv_len, I q_start, I kv_start, SCALARS,
                                                                     int64_t pse_type, OUTPUTS, TAIL) {
  Phase1 p("aclnnFlashAttentionVarLenScoreV2");
  Typed(p, q_start, kv_start, pse_type);
  Inputs(p, query, key, value);
  Optionals(p, real_shift, drop_mask, padding_mask, atten_mask, prefix);
  Sequences(p, q_len, kv_len);
  Scalars(p, NUMBERS);
  p.Layout(layout, nullptr, false);
  Outputs(p, softmax_max, softmax_sum, softmax_out, attention_out);
  return p.Finish(workspace, executor);
}

PHASE2(aclnnFlashAttentionVarLenScoreV4)
CANN_EMULATOR_C int aclnnFlashAttentionVarLenScoreV4GetWorkspaceSize(T query, T key, T value, OPTIONALS, I prefix,
                                                                     I q_len, I kv_len, SCALARS, char* softmax_layout,
                                                                     OUTPUTS, TAIL) {
  Phase1 p("aclnnFlashAttentionVarLenScoreV4");
  Inputs(p, query, key, value);
  Optionals(p, real_shift, drop_mask, padding_mask, atten_mask, prefix);
  Sequences(p, q_len, kv_len);
  Scalars(p, NUMBERS);
  p.Layout(layout, softmax_layout, true);
  Outputs(p, softmax_max, softmax_sum, softmax_out, attention_out);
  return p.Finish(workspace, executor);
}

PHASE2(aclnnFlashAttentionScoreGradV2)
CANN_EMULATOR_C int aclnnFlashAttentionScoreGradV2GetWorkspaceSize(T query, T key, T value, T dy, OPTIONALS,
                                                                   T softmax_max, T softmax_sum, T softmax_in,
                                                                   T attention_in, I prefix, I q_start, I kv_start,
                                                                   SCALARS, int64_t pse_type, T dq, T dk, T dv, T dpse,
                                                                   TAIL) {
  Phase1 p("aclnnFlashAttentionScoreGradV2");
  Typed(p, q_start, kv_start, pse_type);
  Inputs(p, query, key, value);
  Optionals(p, real_shift, drop_mask, padding_mask, atten_mask, prefix);
  Saved(p, dy, softmax_max, softmax_sum, softmax_in, attention_in);
  Scalars(p, NUMBERS);
  p.Layout(layout, nullptr, false);
  Gradients(p, dq, dk, dv, dpse);
  return p.Finish(workspace, executor);
}

PHASE2(aclnnFlashAttentionUnpaddingScoreGradV2)
CANN_EMULATOR_C int aclnnFlashAttentionUnpaddingScoreGradV2GetWorkspaceSize(
    T query, T key, T value, T dy, OPTIONALS, T softmax_max, T softmax_sum, T softmax_in, T attention_in, I prefix,
    I q_len, I kv_len, I q_start, I kv_start, SCALARS, int64_t pse_type, T dq, T dk, T dv, T dpse, TAIL) {
  Phase1 p("aclnnFlashAttentionUnpaddingScoreGradV2");
  Typed(p, q_start, kv_start, pse_type);
  Inputs(p, query, key, value);
  Optionals(p, real_shift, drop_mask, padding_mask, atten_mask, prefix);
  Saved(p, dy, softmax_max, softmax_sum, softmax_in, attention_in);
  Sequences(p, q_len, kv_len);
  Scalars(p, NUMBERS);
  p.Layout(layout, nullptr, false);
  Gradients(p, dq, dk, dv, dpse);
  return p.Finish(workspace, executor);
}

PHASE2(aclnnFlashAttentionUnpaddingScoreGradV4)
CANN_EMULATOR_C int aclnnFlashAttentionUnpaddingScoreGradV4GetWorkspaceSize(T query, T key, T value, T dy, OPTIONALS,
                                                                            T softmax_max, T softmax_sum, T softmax_in,
                                                                            T attention_in, I prefix, I q_len, I kv_len,
                                                                            SCALARS, T dq, T dk, T dv, T dpse,
                                                                            char* softmax_layout, TAIL) {
  Phase1 p("aclnnFlashAttentionUnpaddingScoreGradV4");
  Inputs(p, query, key, value);
  Optionals(p, real_shift, drop_mask, padding_mask, atten_mask, prefix);
  Saved(p, dy, softmax_max, softmax_sum, softmax_in, attention_in);
  Sequences(p, q_len, kv_len);
  Scalars(p, NUMBERS);
  p.Layout(layout, softmax_layout, true);
  Gradients(p, dq, dk, dv, dpse);
  return p.Finish(workspace, executor);
}

#endif

#if CANN_EMULATOR_RELEASE >= 3

PHASE2(aclnnFlashAttentionScoreV3)
CANN_EMULATOR_C int aclnnFlashAttentionScoreV3GetWorkspaceSize(T query, T key, T value, OPTIONALS, T sink, I prefix,
                                                               I q_start, I kv_start, SCALARS, int64_t pse_type,
                                                               OUTPUTS, TAIL) {
  Phase1 p("aclnnFlashAttentionScoreV3");
  Typed(p, q_start, kv_start, pse_type);
  Inputs(p, query, key, value);
  Optionals(p, real_shift, drop_mask, padding_mask, atten_mask, prefix);
  Sink(p, sink);
  Scalars(p, NUMBERS);
  p.Layout(layout, nullptr, false);
  Outputs(p, softmax_max, softmax_sum, softmax_out, attention_out);
  return p.Finish(workspace, executor);
}

PHASE2(aclnnFlashAttentionVarLenScoreV5)
CANN_EMULATOR_C int aclnnFlashAttentionVarLenScoreV5GetWorkspaceSize(T query, T query_rope, T key, T key_rope, T value,
                                                                     OPTIONALS, T sink, I prefix, I q_len, I kv_len,
                                                                     I q_start, I kv_start, SCALARS, int64_t pse_type,
                                                                     char* softmax_layout, OUTPUTS, TAIL) {
  Phase1 p("aclnnFlashAttentionVarLenScoreV5");
  Typed(p, q_start, kv_start, pse_type);
  Inputs(p, query, key, value);
  Ropes(p, query_rope, key_rope);
  Optionals(p, real_shift, drop_mask, padding_mask, atten_mask, prefix);
  Sink(p, sink);
  Sequences(p, q_len, kv_len);
  Scalars(p, NUMBERS);
  p.Layout(layout, softmax_layout, true);
  Outputs(p, softmax_max, softmax_sum, softmax_out, attention_out);
  return p.Finish(workspace, executor);
}

PHASE2(aclnnFlashAttentionScoreGradV3)
CANN_EMULATOR_C int aclnnFlashAttentionScoreGradV3GetWorkspaceSize(T query, T key, T value, T dy, OPTIONALS,
                                                                   T softmax_max, T softmax_sum, T softmax_in,
                                                                   T attention_in, T sink, I prefix, I q_start,
                                                                   I kv_start, SCALARS, int64_t pse_type, T dq, T dk,
                                                                   T dv, T dpse, T dsink, TAIL) {
  Phase1 p("aclnnFlashAttentionScoreGradV3");
  Typed(p, q_start, kv_start, pse_type);
  Inputs(p, query, key, value);
  Optionals(p, real_shift, drop_mask, padding_mask, atten_mask, prefix);
  Saved(p, dy, softmax_max, softmax_sum, softmax_in, attention_in);
  Sink(p, sink);
  Scalars(p, NUMBERS);
  p.Layout(layout, nullptr, false);
  Gradients(p, dq, dk, dv, dpse);
  SinkGradient(p, dsink);
  return p.Finish(workspace, executor);
}

PHASE2(aclnnFlashAttentionUnpaddingScoreGradV5)
CANN_EMULATOR_C int aclnnFlashAttentionUnpaddingScoreGradV5GetWorkspaceSize(
    T query, T query_rope, T key, T key_rope, T value, T dy, OPTIONALS, T softmax_max, T softmax_sum, T softmax_in,
    T attention_in, T sink, I prefix, I q_len, I kv_len, I q_start, I kv_start, SCALARS, int64_t pse_type,
    char* softmax_layout, T dq, T dq_rope, T dk, T dk_rope, T dv, T dpse, T dsink, TAIL) {
  Phase1 p("aclnnFlashAttentionUnpaddingScoreGradV5");
  Typed(p, q_start, kv_start, pse_type);
  Inputs(p, query, key, value);
  Ropes(p, query_rope, key_rope);
  Optionals(p, real_shift, drop_mask, padding_mask, atten_mask, prefix);
  Saved(p, dy, softmax_max, softmax_sum, softmax_in, attention_in);
  Sink(p, sink);
  Sequences(p, q_len, kv_len);
  Scalars(p, NUMBERS);
  p.Layout(layout, softmax_layout, true);
  Gradients(p, dq, dk, dv, dpse);
  RopeGradients(p, dq_rope, dk_rope);
  SinkGradient(p, dsink);
  return p.Finish(workspace, executor);
}

#endif
