// The CPU kernels' XLA FFI handlers.
#pragma once

struct XLA_FFI_CallFrame;  // of xla/ffi/api/c_api.h
struct XLA_FFI_Error;

namespace jax_fa {

// A target of XLA's custom calls. `instantiate` makes what all executions of a compiled call share.
struct FfiTarget {
  const char* name;
  XLA_FFI_Error* (*instantiate)(XLA_FFI_CallFrame*);
  XLA_FFI_Error* (*execute)(XLA_FFI_CallFrame*);
};
extern const FfiTarget kCpuForward, kCpuBackward, kCpuJvp, kCpuTangent, kCpuSecond, kCpuPaged;

// What `instantiate` makes; XLA is to be told before it is told of the targets. An XLA_FFI_TypeId and XLA_FFI_TypeInfo.
void* CompiledCallTypeId();
void* CompiledCallTypeInfo();

}  // namespace jax_fa
