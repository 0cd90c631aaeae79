// XLA FFI handlers of flash attention through CANN: for arrays on an Ascend device, and for arrays on the host, which
// only the CANN emulator takes.
#pragma once

struct XLA_FFI_CallFrame;  // of xla/ffi/api/c_api.h
struct XLA_FFI_Error;

namespace jax_fa {

XLA_FFI_Error* AscendForward(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* AscendBackward(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* AscendHostForward(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* AscendHostBackward(XLA_FFI_CallFrame* call_frame);

}  // namespace jax_fa
