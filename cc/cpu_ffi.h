// The CPU kernels' XLA FFI handlers.
#pragma once

struct XLA_FFI_CallFrame;  // of xla/ffi/api/c_api.h
struct XLA_FFI_Error;

namespace jax_fa {

XLA_FFI_Error* CpuForward(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CpuBackward(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CpuJvp(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CpuTangent(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CpuSecond(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CpuPaged(XLA_FFI_CallFrame* call_frame);

}  // namespace jax_fa
