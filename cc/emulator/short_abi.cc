// libcust_opapi.so of the large-head_dim operator: ten arguments, under its name and under the older one, which is that
// of the built-in operator.
#include "emulator/phase1.h"

using namespace cann_emulator;

namespace {

int GetWorkspaceSize(const char* name, const aclTensor* query, const aclTensor* key, const aclTensor* value,
                     double scale, int64_t heads, const aclTensor* max, const aclTensor* sum, const aclTensor* out,
                     uint64_t* workspace, aclOpExecutor** executor) {
  Phase1 p(name);
  p.op().short_abi = true;
  p.op().scale = scale;
  p.op().heads = heads;
  p.Layout("BSH", nullptr, false);
  p.Tensor(&Op::query, query, "query", true)
      .Tensor(&Op::key, key, "key", true)
      .Tensor(&Op::value, value, "value", true);
  p.Tensor(&Op::max, max, "softmaxMax", true).Tensor(&Op::sum, sum, "softmaxSum", true);
  p.Tensor(&Op::out, out, "attentionOut", true);
  return p.Finish(workspace, executor);
}

}  // namespace

#define SHORT_OP(op)                                                                                                \
  CANN_EMULATOR_C int op##GetWorkspaceSize(const aclTensor* query, const aclTensor* key, const aclTensor* value,    \
                                           double scale, int64_t heads, const aclTensor* max, const aclTensor* sum, \
                                           const aclTensor* out, uint64_t* workspace, aclOpExecutor** executor) {   \
    return GetWorkspaceSize(#op, query, key, value, scale, heads, max, sum, out, workspace, executor);              \
  }                                                                                                                 \
  CANN_EMULATOR_C int op(void* workspace, uint64_t bytes, aclOpExecutor* executor, void* stream) {                  \
    return Run(#op, workspace, bytes, executor, stream, true);                                                      \
  }

SHORT_OP(aclnnFlashAttentionScoreWithLargeHeadDim)
SHORT_OP(aclnnFlashAttentionScore)
