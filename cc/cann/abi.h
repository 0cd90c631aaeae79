// CANN's C ABI, as far as the adapter uses it. CANN's own headers are not needed to build: every function is found
// with dlsym at run time, so what is written here is the only description of their arguments that the compiler sees.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

namespace jax_fa::cann {

struct aclTensor;
struct aclIntArray;
struct aclOpExecutor;

using aclError = int;
using aclnnStatus = int32_t;
using aclrtStream = void*;

enum aclDataType : int {
  ACL_DT_UNDEFINED = -1,
  ACL_FLOAT = 0,
  ACL_FLOAT16 = 1,
  ACL_UINT8 = 4,
  ACL_BOOL = 12,
  ACL_BF16 = 27,
};

enum aclFormat : int { ACL_FORMAT_ND = 2 };

enum aclrtMemMallocPolicy : int { ACL_MEM_MALLOC_HUGE_FIRST = 0 };

// Result, name, parameters. libascendcl.so or libacl_rt.so:
#define JAX_FA_CANN_RUNTIME(X)                                                         \
  X(aclError, aclInit, (const char* config))                                           \
  X(const char*, aclGetRecentErrMsg, ())                                               \
  X(aclError, aclrtSetDevice, (int32_t device))                                        \
  X(aclError, aclrtCreateStream, (aclrtStream * stream))                               \
  X(aclError, aclrtDestroyStream, (aclrtStream stream))                                \
  X(aclError, aclrtSynchronizeStream, (aclrtStream stream))                            \
  X(aclError, aclrtMalloc, (void** memory, size_t bytes, aclrtMemMallocPolicy policy)) \
  X(aclError, aclrtFree, (void* memory))

// libnnopbase.so:
#define JAX_FA_CANN_NNOPBASE(X)                                                                                   \
  X(aclTensor*, aclCreateTensor,                                                                                  \
    (const int64_t* view_dims, uint64_t view_dims_num, aclDataType dtype, const int64_t* strides, int64_t offset, \
     aclFormat format, const int64_t* storage_dims, uint64_t storage_dims_num, void* data))                       \
  X(aclnnStatus, aclDestroyTensor, (const aclTensor* tensor))                                                     \
  X(aclIntArray*, aclCreateIntArray, (const int64_t* values, uint64_t size))                                      \
  X(aclnnStatus, aclDestroyIntArray, (const aclIntArray* array))

// libnnopbase.so, used on error paths only: an abandoned executor leaks where a release lacks it.
#define JAX_FA_CANN_NNOPBASE_OPTIONAL(X) X(aclnnStatus, aclDestroyAclOpExecutor, (aclOpExecutor * executor))

struct Api {
#define JAX_FA_CANN_FIELD(result, name, parameters) result(*name) parameters = nullptr;
  JAX_FA_CANN_RUNTIME(JAX_FA_CANN_FIELD)
  JAX_FA_CANN_NNOPBASE(JAX_FA_CANN_FIELD)
  JAX_FA_CANN_NNOPBASE_OPTIONAL(JAX_FA_CANN_FIELD)
#undef JAX_FA_CANN_FIELD
};

// Phase 2, the same for every op. It only enqueues, and deletes the executor whether it succeeds or fails.
using Phase2 = aclnnStatus (*)(void* workspace, uint64_t workspace_size, aclOpExecutor* executor, aclrtStream stream);

// Phase 1: the variants differ by which of these blocks they have and where. A block is a run of arguments; the order
// in args() is the order in the ABI.
using Tensor = const aclTensor*;
using Ints = const aclIntArray*;

// One tensor each. The rotated parts of query and key, and their gradients, stay null: they are joined with the others. So
// does that of pse: CANN does not compute it, and would fill it with garbage.
#define JAX_FA_CANN_TENSOR(Block, field)                 \
  struct Block {                                         \
    Tensor field = nullptr;                              \
    auto args() const { return std::make_tuple(field); } \
  };
JAX_FA_CANN_TENSOR(Query, query)
JAX_FA_CANN_TENSOR(QueryRope, query_rope)
JAX_FA_CANN_TENSOR(Key, key)
JAX_FA_CANN_TENSOR(KeyRope, key_rope)
JAX_FA_CANN_TENSOR(Value, value)
JAX_FA_CANN_TENSOR(OutGradient, dy)
JAX_FA_CANN_TENSOR(Sink, sink)  // one more logit per head, float32
JAX_FA_CANN_TENSOR(QueryGradient, dq)
JAX_FA_CANN_TENSOR(QueryRopeGradient, dq_rope)
JAX_FA_CANN_TENSOR(KeyGradient, dk)
JAX_FA_CANN_TENSOR(KeyRopeGradient, dk_rope)
JAX_FA_CANN_TENSOR(ValueGradient, dv)
JAX_FA_CANN_TENSOR(PseGradient, dpse)
JAX_FA_CANN_TENSOR(SinkGradient, dsink)
#undef JAX_FA_CANN_TENSOR

struct Optionals {
  Tensor real_shift = nullptr, drop_mask = nullptr, padding_mask = nullptr, atten_mask = nullptr;
  auto args() const { return std::make_tuple(real_shift, drop_mask, padding_mask, atten_mask); }
};
struct Saved {  // what the forward left for the backward
  Tensor softmax_max = nullptr, softmax_sum = nullptr, softmax_in = nullptr, attention_in = nullptr;
  auto args() const { return std::make_tuple(softmax_max, softmax_sum, softmax_in, attention_in); }
};
struct Prefix {
  Ints prefix = nullptr;
  auto args() const { return std::make_tuple(prefix); }
};
struct Lengths {  // cumulative ends of the sequences, no leading 0
  Ints actual_seq_qlen = nullptr, actual_seq_kvlen = nullptr;
  auto args() const { return std::make_tuple(actual_seq_qlen, actual_seq_kvlen); }
};
struct Starts {  // of ALiBi's positions; null is 0
  Ints q_start = nullptr, kv_start = nullptr;
  auto args() const { return std::make_tuple(q_start, kv_start); }
};
struct Scalars {
  double scale_value = 1.0, keep_prob = 1.0;
  int64_t pre_tokens = 0, next_tokens = 0, head_num = 0;
  char* input_layout = nullptr;
  int64_t inner_precise = 0, sparse_mode = 0;
  auto args() const {
    return std::make_tuple(scale_value, keep_prob, pre_tokens, next_tokens, head_num, input_layout, inner_precise,
                           sparse_mode);
  }
};
struct PseType {
  int64_t pse_type = 1;
  auto args() const { return std::make_tuple(pse_type); }
};
struct SoftmaxLayout {  // never null: the backward compares it without looking
  char* softmax_layout = nullptr;
  auto args() const { return std::make_tuple(softmax_layout); }
};
struct Outputs {  // softmax_out is reserved; null is allowed
  Tensor softmax_max_out = nullptr, softmax_sum_out = nullptr, softmax_out = nullptr, attention_out = nullptr;
  auto args() const { return std::make_tuple(softmax_max_out, softmax_sum_out, softmax_out, attention_out); }
};
// All that any variant takes; each variant picks its blocks.
struct Arguments : Query,
                   QueryRope,
                   Key,
                   KeyRope,
                   Value,
                   OutGradient,
                   Optionals,
                   Saved,
                   Sink,
                   Prefix,
                   Lengths,
                   Starts,
                   Scalars,
                   PseType,
                   SoftmaxLayout,
                   Outputs,
                   QueryGradient,
                   QueryRopeGradient,
                   KeyGradient,
                   KeyRopeGradient,
                   ValueGradient,
                   PseGradient,
                   SinkGradient {};

template <typename Tuple>
struct Phase1Pointer;
template <typename... Args>
struct Phase1Pointer<std::tuple<Args...>> {
  using Type = aclnnStatus (*)(Args..., uint64_t* workspace_size, aclOpExecutor** executor);
  static constexpr size_t kCount = sizeof...(Args) + 2;
};

// The phase-1 function whose arguments are these blocks.
template <typename... Blocks>
struct Phase1 {
  using Pointer = Phase1Pointer<decltype(std::tuple_cat(std::declval<Blocks>().args()...))>;
  static constexpr size_t kCount = Pointer::kCount;

  static aclnnStatus Call(void* function, const Arguments& a, uint64_t* workspace_size, aclOpExecutor** executor) {
    return std::apply(
        reinterpret_cast<typename Pointer::Type>(function),
        std::tuple_cat(static_cast<const Blocks&>(a).args()..., std::make_tuple(workspace_size, executor)));
  }
};

using Score = Phase1<Query, Key, Value, Optionals, Prefix, Scalars, Outputs>;
using ScoreV2 = Phase1<Query, Key, Value, Optionals, Prefix, Starts, Scalars, PseType, Outputs>;
using ScoreV3 = Phase1<Query, Key, Value, Optionals, Sink, Prefix, Starts, Scalars, PseType, Outputs>;
using VarLenScore = Phase1<Query, Key, Value, Optionals, Prefix, Lengths, Scalars, Outputs>;
using VarLenScoreV2 = Phase1<Query, Key, Value, Optionals, Prefix, Lengths, Starts, Scalars, PseType, Outputs>;
using VarLenScoreV4 = Phase1<Query, Key, Value, Optionals, Prefix, Lengths, Scalars, SoftmaxLayout, Outputs>;
using VarLenScoreV5 = Phase1<Query, QueryRope, Key, KeyRope, Value, Optionals, Sink, Prefix, Lengths, Starts, Scalars,
                             PseType, SoftmaxLayout, Outputs>;
using ScoreGrad = Phase1<Query, Key, Value, OutGradient, Optionals, Saved, Prefix, Scalars, QueryGradient, KeyGradient,
                         ValueGradient, PseGradient>;
using ScoreGradV2 = Phase1<Query, Key, Value, OutGradient, Optionals, Saved, Prefix, Starts, Scalars, PseType,
                           QueryGradient, KeyGradient, ValueGradient, PseGradient>;
using ScoreGradV3 = Phase1<Query, Key, Value, OutGradient, Optionals, Saved, Sink, Prefix, Starts, Scalars, PseType,
                           QueryGradient, KeyGradient, ValueGradient, PseGradient, SinkGradient>;
using UnpaddingScoreGrad = Phase1<Query, Key, Value, OutGradient, Optionals, Saved, Prefix, Lengths, Scalars,
                                  QueryGradient, KeyGradient, ValueGradient, PseGradient>;
using UnpaddingScoreGradV2 = Phase1<Query, Key, Value, OutGradient, Optionals, Saved, Prefix, Lengths, Starts, Scalars,
                                    PseType, QueryGradient, KeyGradient, ValueGradient, PseGradient>;
using UnpaddingScoreGradV4 = Phase1<Query, Key, Value, OutGradient, Optionals, Saved, Prefix, Lengths, Scalars,
                                    QueryGradient, KeyGradient, ValueGradient, PseGradient, SoftmaxLayout>;
using UnpaddingScoreGradV5 = Phase1<Query, QueryRope, Key, KeyRope, Value, OutGradient, Optionals, Saved, Sink, Prefix,
                                    Lengths, Starts, Scalars, PseType, SoftmaxLayout, QueryGradient, QueryRopeGradient,
                                    KeyGradient, KeyRopeGradient, ValueGradient, PseGradient, SinkGradient>;

static_assert(Score::kCount == 22 && ScoreV2::kCount == 25 && ScoreV3::kCount == 26);
static_assert(VarLenScore::kCount == 24 && VarLenScoreV2::kCount == 27 && VarLenScoreV4::kCount == 25 &&
              VarLenScoreV5::kCount == 31);
static_assert(ScoreGrad::kCount == 27 && ScoreGradV2::kCount == 30 && ScoreGradV3::kCount == 32);
static_assert(UnpaddingScoreGrad::kCount == 29 && UnpaddingScoreGradV2::kCount == 32 &&
              UnpaddingScoreGradV4::kCount == 30 && UnpaddingScoreGradV5::kCount == 39);

// The short custom op, exported as aclnnFlashAttentionScoreWithLargeHeadDim and, by older builds, under the very name of
// the built-in op.
struct ShortScore {
  using Pointer = aclnnStatus (*)(Tensor query, Tensor key, Tensor value, double scale_value, int64_t head_num,
                                  Tensor softmax_max_out, Tensor softmax_sum_out, Tensor attention_out,
                                  uint64_t* workspace_size, aclOpExecutor** executor);
  static constexpr size_t kCount = 10;

  static aclnnStatus Call(void* function, const Arguments& a, uint64_t* workspace_size, aclOpExecutor** executor) {
    return reinterpret_cast<Pointer>(function)(a.query, a.key, a.value, a.scale_value, a.head_num, a.softmax_max_out,
                                               a.softmax_sum_out, a.attention_out, workspace_size, executor);
  }
};

}  // namespace jax_fa::cann
