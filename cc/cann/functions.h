// The flash attention functions that the adapter knows, one row each.
#pragma once

#include "cann/abi.h"

namespace jax_fa::cann {

enum Function {
  kScore,
  kScoreV2,
  kScoreV3,
  kVarLenScore,
  kVarLenScoreV2,
  kVarLenScoreV4,
  kVarLenScoreV5,
  kScoreGrad,
  kScoreGradV2,
  kScoreGradV3,
  kUnpaddingScoreGrad,
  kUnpaddingScoreGradV2,
  kUnpaddingScoreGradV4,
  kUnpaddingScoreGradV5,
  kLongFunctions,  // those above have the long ABI
  kShortScore = kLongFunctions,
  kFunctions
};

struct FunctionInfo {
  const char* phase2;  // the op's name; phase 1 is this and "GetWorkspaceSize"
  aclnnStatus (*call)(void* phase1, const Arguments& arguments, uint64_t* workspace_size, aclOpExecutor** executor);
};

inline constexpr FunctionInfo kFunctionTable[] = {
    {"aclnnFlashAttentionScore", Score::Call},
    {"aclnnFlashAttentionScoreV2", ScoreV2::Call},
    {"aclnnFlashAttentionScoreV3", ScoreV3::Call},
    {"aclnnFlashAttentionVarLenScore", VarLenScore::Call},
    {"aclnnFlashAttentionVarLenScoreV2", VarLenScoreV2::Call},
    {"aclnnFlashAttentionVarLenScoreV4", VarLenScoreV4::Call},
    {"aclnnFlashAttentionVarLenScoreV5", VarLenScoreV5::Call},
    {"aclnnFlashAttentionScoreGrad", ScoreGrad::Call},
    {"aclnnFlashAttentionScoreGradV2", ScoreGradV2::Call},
    {"aclnnFlashAttentionScoreGradV3", ScoreGradV3::Call},
    {"aclnnFlashAttentionUnpaddingScoreGrad", UnpaddingScoreGrad::Call},
    {"aclnnFlashAttentionUnpaddingScoreGradV2", UnpaddingScoreGradV2::Call},
    {"aclnnFlashAttentionUnpaddingScoreGradV4", UnpaddingScoreGradV4::Call},
    {"aclnnFlashAttentionUnpaddingScoreGradV5", UnpaddingScoreGradV5::Call},
    {"aclnnFlashAttentionScoreWithLargeHeadDim", ShortScore::Call},
};
static_assert(sizeof(kFunctionTable) / sizeof(kFunctionTable[0]) == kFunctions);

}  // namespace jax_fa::cann
