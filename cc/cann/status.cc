#include "cann/status.h"

#include <string>

namespace jax_fa::cann {
namespace {

constexpr const char* kSplit =
    "The kernel stopped on the device: too much work in one launch, or an address out of range. A lower max_work= "
    "makes jax_fa split such calls over batch, heads and rows.";
constexpr const char* kKernelPackage =
    "Install the kernel package of this SoC (the CANN kernels package that matches the toolkit's version).";
constexpr const char* kSetEnv =
    "Source set_env.sh of the CANN installation before the process starts: ASCEND_OPP_PATH is read once.";
constexpr const char* kTiling =
    "CANN's tiling refused the call: read its text below. Usual causes are the shape of a mask or pse, sparse tokens, "
    "and cumulative lengths that do not end at the number of tokens.";
constexpr const char* kMemory = "Device memory is exhausted: smaller shapes, or less memory held by the framework.";
constexpr const char* kDevice = "The thread has no device, and setting one did not help: check aclrtSetDevice.";
constexpr const char* kSerious = "See the device log (plog) for the error before this one.";

// By family; looked through once per error.
constexpr CodeInfo kCodes[] = {
    {161001, "ACLNN_ERR_PARAM_NULLPTR", "a required argument is null, or an inner launch failed",
     "Newer releases also report refused shapes and lengths so: read CANN's text below."},
    {161002, "ACLNN_ERR_PARAM_INVALID", "an argument's dtype, format, layout or shape is not accepted", ""},
    {361001, "ACLNN_ERR_RUNTIME_ERROR", "a call of the runtime failed inside the op library", kSerious},
    {561000, "ACLNN_ERR_INNER", "internal error of the op library", ""},
    {561001, "ACLNN_ERR_INNER_INFERSHAPE_ERROR", "output shapes could not be inferred", ""},
    {561002, "ACLNN_ERR_INNER_TILING_ERROR", "tiling failed", kTiling},
    {561003, "ACLNN_ERR_INNER_FIND_KERNEL_ERROR", "no kernel binary was found", kKernelPackage},
    {561101, "ACLNN_ERR_INNER_CREATE_EXECUTOR", "the executor could not be created", ""},
    {561102, "ACLNN_ERR_INNER_NOT_TRANS_EXECUTOR", "the executor was not handed over", ""},
    {561103, "ACLNN_ERR_INNER_NULLPTR", "an inner null pointer; older releases report a failed tiling so", kTiling},
    {561104, "ACLNN_ERR_INNER_WRONG_ATTR_INFO_SIZE", "wrong number of attributes", ""},
    {561105, "ACLNN_ERR_INNER_KEY_CONFILICT", "kernel keys conflict", ""},
    {561106, "ACLNN_ERR_INNER_INVALID_IMPL_MODE", "invalid implementation mode", ""},
    {561107, "ACLNN_ERR_INNER_OPP_PATH_NOT_FOUND", "ASCEND_OPP_PATH is not set", kSetEnv},
    {561108, "ACLNN_ERR_INNER_LOAD_JSON_FAILED", "a kernel's JSON file could not be loaded", kKernelPackage},
    {561109, "ACLNN_ERR_INNER_JSON_VALUE_NOT_FOUND", "a field of a kernel's JSON file is missing", kKernelPackage},
    {561110, "ACLNN_ERR_INNER_JSON_FORMAT_INVALID", "a kernel's JSON file has a wrong format", kKernelPackage},
    {561111, "ACLNN_ERR_INNER_JSON_DTYPE_INVALID", "a kernel's JSON file has a wrong dtype", kKernelPackage},
    {561112, "ACLNN_ERR_INNER_OPP_KERNEL_PKG_NOT_FOUND", "the kernel package is not installed", kKernelPackage},
    {561113, "ACLNN_ERR_INNER_OP_FILE_INVALID", "a kernel file is invalid", kKernelPackage},
    {561114, "ACLNN_ERR_INNER_ATTR_NUM_OUT_OF_BOUND", "too many attributes", ""},
    {561115, "ACLNN_ERR_INNER_ATTR_LEN_NOT_ENOUGH", "an attribute is too short", ""},
    {561116, "ACLNN_ERR_INNER_INPUT_NUM_IN_JSON_TOO_LARGE", "a kernel's JSON file lists too many inputs", ""},
    {561117, "ACLNN_ERR_INNER_INPUT_JSON_IS_NULL", "a kernel's JSON file lists no inputs", ""},
    {561118, "ACLNN_ERR_INNER_STATIC_WORKSPACE_INVALID", "a kernel's static workspace is invalid", ""},
    {561119, "ACLNN_ERR_INNER_STATIC_BLOCK_DIM_INVALID", "a kernel's static block count is invalid", ""},
    {100000, "ACL_ERROR_INVALID_PARAM", "an argument is invalid", ""},
    {100001, "ACL_ERROR_UNINITIALIZE", "aclInit was not called", ""},
    {kRepeatInitialize, "ACL_ERROR_REPEAT_INITIALIZE", "aclInit was called before", ""},
    {148049, "ACL_ERROR_INVALID_OPP_PATH", "ASCEND_OPP_PATH is not set or wrong", kSetEnv},
    {200000, "ACL_ERROR_BAD_ALLOC", "host memory is exhausted", ""},
    {200001, "ACL_ERROR_API_NOT_SUPPORT", "this release does not support the call", ""},
    {300000, "ACL_ERROR_STORAGE_OVER_LIMIT", "a limit of the runtime is reached", ""},
    {500000, "ACL_ERROR_INTERNAL_ERROR", "internal error", kSerious},
    {500001, "ACL_ERROR_FAILURE", "internal failure", kSerious},
    {500002, "ACL_ERROR_GE_FAILURE", "failure of the graph engine", kSerious},
    {500003, "ACL_ERROR_RT_FAILURE", "failure of the runtime", kSerious},
    {500004, "ACL_ERROR_DRV_FAILURE", "failure of the driver", kSerious},
    {107000, "ACL_ERROR_RT_PARAM_INVALID", "an argument of a runtime call is invalid", ""},
    {107001, "ACL_ERROR_RT_INVALID_DEVICEID", "no such device", "Check ASCEND_RT_VISIBLE_DEVICES and npu-smi info."},
    {kContextNull, "ACL_ERROR_RT_CONTEXT_NULL", "the thread has no device", kDevice},
    {107003, "ACL_ERROR_RT_STREAM_CONTEXT", "the stream belongs to another context",
     "The thread's current device is not that of the stream."},
    {107008, "ACL_ERROR_RT_ADDR_UNALIGNED", "an address is not aligned",
     "Tensors must start at multiples of 32 bytes."},
    {107017, "ACL_ERROR_RT_INVALID_HANDLE", "a handle is invalid", ""},
    {107019, "ACL_ERROR_RT_WAIT_TIMEOUT", "waiting timed out", kSplit},
    {107020, "ACL_ERROR_RT_TASK_TIMEOUT", "a task timed out", kSplit},
    {kMemoryAllocation, "ACL_ERROR_RT_MEMORY_ALLOCATION", "out of memory", kMemory},
    {207018, "ACL_ERROR_RT_DEVICE_OOM", "out of device memory", kMemory},
    {507000, "ACL_ERROR_RT_INTERNAL_ERROR", "internal error of the runtime", kSerious},
    {507011, "ACL_ERROR_RT_MODEL_EXECUTE", "execution of a model failed", kSerious},
    {507014, "ACL_ERROR_RT_AICORE_TIMEOUT", "an AI core timed out", kSplit},
    {507015, "ACL_ERROR_RT_AICORE_EXCEPTION", "an AI core raised an exception", kSplit},
    {507016, "ACL_ERROR_RT_AICORE_TRAP_EXCEPTION", "an AI core trapped", kSplit},
    {507034, "ACL_ERROR_RT_VECTOR_CORE_TIMEOUT", "a vector core timed out", kSplit},
    {507035, "ACL_ERROR_RT_VECTOR_CORE_EXCEPTION", "a vector core raised an exception", kSplit},
    {507036, "ACL_ERROR_RT_VECTOR_CORE_TRAP_EXCEPTION", "a vector core trapped", kSplit},
    {507046, "ACL_ERROR_RT_STREAM_SYNC_TIMEOUT", "waiting for the stream timed out", kSplit},
    {507048, "ACL_ERROR_RT_FFTS_PLUS_TIMEOUT", "a task of the device's scheduler timed out", kSplit},
    {507053, "ACL_ERROR_RT_DEVICE_MEM_ERROR", "the device's memory failed", kSerious},
    {507899, "ACL_ERROR_RT_DRV_INTERNAL_ERROR", "internal error of the driver", kSerious},
};

// For codes that newer releases add: what their number still says.
CodeInfo Family(int code) {
  switch (code / 1000) {
    case 107: return {code, "", "a runtime call was given something invalid", ""};
    case 207: return {code, "", "a resource of the device is exhausted or in use", ""};
    case 507: return {code, "", "the device or the runtime failed", kSerious};
    case 561: return {code, "", "internal error of the op library", ""};
    default: return {code, "", "unknown code", ""};
  }
}

Outcome OutcomeOf(int code) {
  switch (code) {
    case 161001:
    case 161002:
    case 100000:
    case 107000:
    case 107008: return Outcome::kInvalidArgument;
    case 200000:
    case kMemoryAllocation:
    case 207018: return Outcome::kOutOfMemory;
    case 561003:
    case 561107:
    case 561112:
    case 148049: return Outcome::kUnavailable;
    case 200001: return Outcome::kUnimplemented;
    default: return Outcome::kInternal;
  }
}

}  // namespace

CodeInfo Describe(int code) {
  for (const CodeInfo& info : kCodes)
    if (info.code == code) return info;
  return Family(code);
}

Failure CodeFailure(const std::string& call, int code, const std::string& cann_text) {
  const CodeInfo info = Describe(code);
  std::string text = call + " returned " + std::to_string(code) + " (";
  if (*info.name) text += std::string(info.name) + ": ";
  text += std::string(info.meaning) + ").";
  if (*info.advice) text += std::string(" ") + info.advice;
  if (!cann_text.empty()) text += " CANN says: " + cann_text;
  return Failure(OutcomeOf(code), text);
}

}  // namespace jax_fa::cann
