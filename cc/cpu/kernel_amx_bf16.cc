#define JAX_FA_ISA amx_bf16
#define JAX_FA_SIMD "cpu/simd_amx_bf16-inl.h"
#include "cpu/kernel-inl.h"
