// The CPU kernels' XLA FFI handlers.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace jax_fa {

XLA_FFI_Error* CpuForward(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CpuBackward(XLA_FFI_CallFrame* call_frame);

}  // namespace jax_fa
